/* The rest of model.h: what a model is, where its time goes, and language models. */
#include <string.h>

#include "edge_runtime.h"

static const struct program *const P = &compiled;

int model_version(void) { return MODEL_VERSION; }

const char *model_target(void) { return P->target; }

const char *model_features(void) { return P->features; }

int model_input_count(void) { return P->input_count; }

int model_output_count(void) { return P->output_count; }

const model_port *model_input(int index) {
  return index >= 0 && index < P->input_count ? &P->inputs[index] : NULL;
}

const model_port *model_output(int index) {
  return index >= 0 && index < P->output_count ? &P->outputs[index] : NULL;
}

int model_entry_count(void) { return P->entry_count; }

int64_t model_entry_size(int index, const char *name) {
  int size = index >= 0 && index < P->entry_count && name ? size_index(name) : -1;
  return size < 0 ? -1 : P->entries[index].sizes[size];
}

void model_profile(model *m, int on) {
  int steps = steps_before(P->entry_count);
  m->profiling = on;
  memset(m->seconds, 0, (size_t)steps * sizeof *m->seconds);
  memset(m->runs, 0, (size_t)steps * sizeof *m->runs);
}

int model_step(const model *m, int index, const char **label, double *seconds, int64_t *runs) {
  for (int e = 0, first = 0; index >= 0 && e < P->entry_count; e++) {
    int count = (int)P->entries[e].step_count;
    if (index < first + count) {
      *label = P->entries[e].steps[index - first].label;
      *seconds = m->seconds[index];
      *runs = m->runs[index];
      return 0;
    }
    first += count;
  }
  return -1;
}

int64_t model_capacity(void) { return P->decodes ? P->capacity : 0; }

int64_t model_vocabulary(void) {
  return P->decodes ? P->outputs[P->logits].shape[2] : 0;
}

int64_t model_position(const model *m) { return m->position; }

/* How many of `left` tokens to read next, in which chunk: an entry's length in `length`, and in
 * `again` how many tokens before these are read once more to fill it. `done` tokens were read by
 * this call.
 *
 * Where the scores come for the last token of the chunk alone, a chunk must be full: a shorter rest
 * is either filled up with tokens just read, which writes the same into the cache a second time, or
 * read in smaller chunks. Otherwise a chunk may be padded, within the capacity. */
static int64_t choose(const model *m, int64_t done, int64_t left, int64_t *length, int64_t *again) {
  const model_port *tokens = &P->inputs[P->tokens], *logits = &P->outputs[P->logits];
  int last_only = !logits->sizes[1] && logits->shape[1] == 1;
  int64_t room = P->capacity - m->position, full = 0, wider = 0;
  for (int e = 0; e < P->entry_count; e++) {
    int64_t size = extent(tokens, 1, P->entries[e].sizes);
    if (size <= left && size > full) full = size;
    if (size > left && (!wider || size < wider)) wider = size;
  }
  *again = 0;
  if (wider && full < left) {
    if (!last_only && wider <= room && (!full || wider < 2 * left) &&
        P->padded[size_index(tokens->sizes[1])]) {
      *length = left;
      return left;
    }
    /* Reading twice pays where little is read twice, or where it saves several chunks. */
    if (last_only && wider - left <= done && (full * 2 < left || wider <= left + left / 4)) {
      *length = wider;
      *again = wider - left;
      return left;
    }
  }
  *length = full;
  return full;
}

int model_read(model *m, const int64_t *tokens, int64_t count, const float **logits) {
  model_tensor inputs[2], outputs[2];
  if (!P->decodes) return FAIL(m, "this is no language model; use model_run()");
  int64_t words = model_vocabulary();
  if (!tokens || count < 1) return FAIL(m, "no tokens to read");
  if (count > P->capacity - m->position)
    return FAIL(m,
                "%lld tokens after %lld are more than the model's capacity of %lld; call "
                "model_reset() or compile with a larger capacity",
                (long long)count, (long long)m->position, (long long)P->capacity);
  for (int64_t i = 0; i < count; i++)
    if (tokens[i] < 0 || tokens[i] >= words)
      return FAIL(m, "token %lld is not in the vocabulary of %lld", (long long)tokens[i],
                  (long long)words);
  for (int64_t done = 0; done < count;) {
    int64_t length, again, next = choose(m, done, count - done, &length, &again);
    if (next < 1)
      return FAIL(m, "no code was compiled that reads %lld tokens", (long long)(count - done));
    int64_t position = m->position - again;
    inputs[P->tokens] = (model_tensor){
        MODEL_INT64, 2, {1, length}, (void *)(uintptr_t)(tokens + done - again)};
    inputs[P->position] = (model_tensor){MODEL_INT64, 1, {1}, &position};
    if (model_run(m, inputs, outputs)) return -1;
    m->position += next;
    done += next;
  }
  const model_tensor *scores = &outputs[P->logits];
  *logits = (const float *)scores->data + (scores->shape[1] - 1) * words;
  return 0;
}
