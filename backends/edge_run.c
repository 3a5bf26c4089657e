/* A run: checks the inputs, pads them to an entry, calls its kernels, cuts the outputs. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "edge_runtime.h"

enum { MAX_SIZES = 32 };

static const struct program *const P = &compiled;

/* "1x128, 1x256": the entries, for error messages. */
static void list_entries(char *text, size_t size) {
  size_t used = 0;
  text[0] = 0;
  for (int e = 0; e < P->entry_count && used < size; e++)
    for (int i = 0; i < P->size_count && used < size; i++)
      used += (size_t)snprintf(text + used, size - used, "%s%s=%lld",
                               i ? " " : e ? ", " : "", P->size_names[i],
                               (long long)P->entries[e].sizes[i]);
}

static void shape_text(char *text, size_t size, int rank, const int64_t *shape,
                       const char *const *sizes) {
  size_t used = (size_t)snprintf(text, size, "(");
  for (int i = 0; i < rank && used < size; i++)
    used += sizes && sizes[i]
                ? (size_t)snprintf(text + used, size - used, "%s%s", i ? ", " : "", sizes[i])
                : (size_t)snprintf(text + used, size - used, "%s%lld", i ? ", " : "",
                                   (long long)shape[i]);
  if (used < size) snprintf(text + used, size - used, ")");
}

/* Whether numbers that are looked up in a table are inside it. */
static int check_rows(model *m, const model_port *port, const model_tensor *input, int64_t limit) {
  const int64_t *row = input->data;
  int64_t count = 1;
  for (int d = 0; d < input->rank; d++) count *= input->shape[d];
  for (int64_t i = 0; i < count; i++)
    if (row[i] < 0 || row[i] >= limit)
      return FAIL(m, "input '%s' has the number %lld at position %lld, and the model's table has %lld rows",
                  port->name, (long long)row[i], (long long)i, (long long)limit);
  return 0;
}

/* Compares inputs with the ports and finds the value of each named size; −1 for those of outputs
 * alone. */
static int check_inputs(model *m, const model_tensor *inputs, int64_t *sizes) {
  for (int i = 0; i < P->size_count; i++) sizes[i] = -1;
  for (int i = 0; i < P->input_count; i++) {
    const model_port *port = &P->inputs[i];
    const model_tensor *input = &inputs[i];
    char wanted[200], given[200];
    int fits = input->rank == port->rank;
    if ((int)input->dtype < 0 || input->dtype > MODEL_BOOL || input->dtype != port->dtype)
      return FAIL(m, "input '%s' is %s, and the model takes %s", port->name,
                  (int)input->dtype < 0 || input->dtype > MODEL_BOOL ? "of an unknown dtype"
                                                                     : element_types[input->dtype].name,
                  element_types[port->dtype].name);
    for (int d = 0; fits && d < port->rank; d++) {
      if (!port->sizes[d]) {
        fits = input->shape[d] == port->shape[d];
        continue;
      }
      int64_t *size = &sizes[size_index(port->sizes[d])];
      if (*size >= 0 && *size != input->shape[d])
        return FAIL(m, "input '%s' has %lld where another input has %lld for '%s'", port->name,
                    (long long)input->shape[d], (long long)*size, port->sizes[d]);
      *size = input->shape[d];
      fits = *size > 0;
    }
    if (!fits) {
      shape_text(wanted, sizeof wanted, port->rank, port->shape, port->sizes);
      if (input->rank < 0 || input->rank > MODEL_MAX_RANK)
        snprintf(given, sizeof given, "of rank %d", input->rank);
      else
        shape_text(given, sizeof given, input->rank, input->shape, NULL);
      return FAIL(m, "input '%s' has the shape %s, and the model takes %s", port->name, given,
                  wanted);
    }
    if (!input->data) return FAIL(m, "input '%s' has no data", port->name);
    if (P->limits[i] && check_rows(m, port, input, P->limits[i])) return 1;
  }
  return 0;
}

/* The first entry that these sizes fit in. */
static int find_entry(model *m, const int64_t *sizes) {
  char asked[200] = "", known[300];
  size_t used = 0;
  for (int e = 0; e < P->entry_count; e++) {
    int fits = 1;
    for (int i = 0; fits && i < P->size_count; i++) {
      int64_t most = P->entries[e].sizes[i];
      fits = sizes[i] < 0 || (P->padded[i] ? sizes[i] <= most : sizes[i] == most);
    }
    if (fits) return e;
  }
  for (int i = 0; i < P->size_count && used < sizeof asked; i++)
    if (sizes[i] >= 0)
      used += (size_t)snprintf(asked + used, sizeof asked - used, "%s%s=%lld", used ? " " : "",
                               P->size_names[i], (long long)sizes[i]);
  list_entries(known, sizeof known);
  return FAIL(m, "the sizes %s fit none that were compiled: %s", asked, known);
}

/* Copies the rows of a small array to or from the corner of a larger one; both without gaps. Sizes
 * beyond the corner stay as they are. A copy to the front of its own memory is allowed. */
static void copy_corner(uint8_t *to, const int64_t *to_shape, const uint8_t *from,
                        const int64_t *from_shape, const int64_t *shape, int rank, size_t size) {
  /* Trailing dimensions that both hold whole are one row. */
  while (rank > 0 && to_shape[rank - 1] == shape[rank - 1] &&
         from_shape[rank - 1] == shape[rank - 1])
    size *= (size_t)shape[--rank];
  if (rank == 0) {
    if (to != from) memmove(to, from, size);
    return;
  }
  int64_t at[MODEL_MAX_RANK] = {0};
  size_t row = size * (size_t)shape[rank - 1];
  for (;;) {
    size_t target = 0, source = 0;
    for (int i = 0; i < rank; i++) {
      target = target * (size_t)to_shape[i] + (size_t)at[i];
      source = source * (size_t)from_shape[i] + (size_t)at[i];
    }
    memmove(to + target * size, from + source * size, row);
    int d = rank - 2;
    while (d >= 0 && ++at[d] == shape[d]) at[d--] = 0;
    if (d < 0) return;
  }
}

/* Gives the entry's kernels the addresses of the inputs, padded where they must be. */
static void place_inputs(model *m, int e, const model_tensor *inputs) {
  const struct entry *entry = &P->entries[e];
  for (int i = 0; i < P->input_count; i++) {
    const model_port *port = &P->inputs[i];
    int64_t full[MODEL_MAX_RANK];
    int whole = 1;
    for (int d = 0; d < port->rank; d++) {
      full[d] = extent(port, d, entry->sizes);
      whole &= full[d] == inputs[i].shape[d];
    }
    void *data = inputs[i].data;
    if (!whole || (uintptr_t)data % ALIGNMENT) {
      data = m->ports[i];
      if (!whole) memset(data, 0, (size_t)port_bytes(port, entry->sizes));
      copy_corner(data, full, inputs[i].data, inputs[i].shape, inputs[i].shape, port->rank,
                  element_types[port->dtype].bits / 8);
    }
    for (uint32_t t = 0; t < entry->tensor_count; t++)
      if (entry->tensors[t].space == INPUT && entry->tensors[t].at == (uint64_t)i)
        m->plans[e].tensors[t].data = data;
  }
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static int call_kernels(model *m, int e) {
  const struct entry *entry = &P->entries[e];
  int first = m->profiling ? steps_before(e) : 0, status = 0;
  pool_enter(m->pool);
  for (uint32_t s = 0; !status && s < entry->step_count; s++) {
    const struct step *step = &entry->steps[s];
    argument result = {0};
    double start = m->profiling ? now() : 0;
    status = step->run(NULL, m->plans[e].arguments + step->first, (int32_t)step->count, &result);
    if (m->profiling) {
      m->seconds[first + (int)s] += now() - start;
      m->runs[first + (int)s]++;
    }
    if (status) FAIL(m, "%s failed: %s", step->label, pool_error());
  }
  pool_leave();
  return status;
}

/* Describes the outputs, cut from the entry's sizes to the sizes given. */
static void cut_outputs(model *m, int e, const int64_t *sizes, model_tensor *outputs) {
  for (int i = 0; i < P->output_count; i++) {
    const model_port *port = &P->outputs[i];
    model_tensor *output = &outputs[i];
    int64_t full[MODEL_MAX_RANK];
    *output = (model_tensor){port->dtype, port->rank, {0}, m->ports[P->input_count + i]};
    for (int d = 0; d < port->rank; d++) {
      int named = port->sizes[d] ? size_index(port->sizes[d]) : -1;
      full[d] = extent(port, d, P->entries[e].sizes);
      output->shape[d] = named >= 0 && sizes[named] >= 0 ? sizes[named] : full[d];
    }
    copy_corner(output->data, output->shape, output->data, full, output->shape, port->rank,
                element_types[port->dtype].bits / 8);
  }
}

int model_run(model *m, const model_tensor *inputs, model_tensor *outputs) {
  int64_t sizes[MAX_SIZES];
  if (!m || (!inputs && P->input_count) || (!outputs && P->output_count)) return -1;
  if (atomic_exchange(&m->busy, 1))
    return -1; /* and no message: another thread may be reading or writing one */
  m->error[0] = 0;
  int e = check_inputs(m, inputs, sizes) ? -1 : find_entry(m, sizes);
  if (e >= 0) {
    place_inputs(m, e, inputs);
    if (call_kernels(m, e))
      e = -1;
    else
      cut_outputs(m, e, sizes, outputs);
  }
  atomic_store(&m->busy, 0);
  return e < 0 ? -1 : 0;
}
