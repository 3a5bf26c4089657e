/* model: a compiled model on the command line. Reads and writes .npy files, times, generates. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "edge_npy.h"
#include "model.h"

enum { PORTS = 64, BAD_INPUT = 2 };

static const char USAGE[] =
    "usage: model [OPTIONS] [FILE.npy ...]\n"
    "\n"
    "Runs the model on .npy files, in the order of its inputs, and writes its outputs.\n"
    "\n"
    "  --input NAME=FILE.npy   an input by name; repeatable\n"
    "  --out DIR               where the outputs go, as NAME.npy; they are only described without\n"
    "  --threads N             threads that compute; 0 for one per CPU (default 1)\n"
    "  --weights FILE          default: weights.bin beside this program\n"
    "  --copy-weights          copy the weights into memory, in huge pages if there are any: faster\n"
    "                          for large models\n"
    "  --benchmark N           run N times and print the times; without inputs, on zeros\n"
    "  --profile               with --benchmark: where the time goes\n"
    "  --generate FILE.npy     language models: continue these tokens (int64), the likeliest first\n"
    "  --max-new-tokens N      how many tokens to generate (default 32)\n"
    "  --stop N                end after this token; repeatable\n"
    "  --info                  describe the model as JSON\n"
    "  --help                  this text\n"
    "\n"
    "Exit codes: 0 done, 1 the model failed, 2 bad input.\n";

struct options {
  const char *files[PORTS]; /* by input */
  const char *out, *weights, *prompt;
  long threads, benchmark, tokens, stop[16];
  int stops, profile, info, copy;
};

static void end(int code, const char *format, ...) __attribute__((format(printf, 2, 3), noreturn));
static void end(int code, const char *format, ...) {
  va_list values;
  va_start(values, format);
  fputs("error: ", stderr);
  vfprintf(stderr, format, values);
  fputc('\n', stderr);
  va_end(values);
  exit(code);
}

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static long number(const char *option, const char *text, long least, long most) {
  char *rest;
  errno = 0;
  long value = strtol(text, &rest, 10);
  if (!*text || *rest || errno || value < least || value > most)
    end(BAD_INPUT, "%s takes a number from %ld to %ld, not '%s'", option, least, most, text);
  return value;
}

static void set_input(struct options *o, const char *text) {
  const char *equals = strchr(text, '=');
  size_t length = equals ? (size_t)(equals - text) : 0;
  if (!equals) end(BAD_INPUT, "--input takes NAME=FILE.npy, not '%s'", text);
  for (int i = 0; i < model_input_count(); i++) {
    const char *name = model_input(i)->name;
    if (strlen(name) != length || memcmp(name, text, length)) continue;
    if (o->files[i]) end(BAD_INPUT, "input '%s' is given twice", name);
    o->files[i] = equals + 1;
    return;
  }
  end(BAD_INPUT, "the model has no input '%.*s'; model --info lists them", (int)length, text);
}

static void parse(struct options *o, int count, char **words) {
  int next = 0;
  for (int i = 1; i < count; i++) {
    const char *word = words[i], *value = i + 1 < count ? words[i + 1] : NULL;
    if (!strcmp(word, "--help") || !strcmp(word, "-h")) {
      fputs(USAGE, stdout);
      exit(0);
    }
    if (!strcmp(word, "--info")) {
      o->info = 1;
      continue;
    }
    if (!strcmp(word, "--copy-weights")) {
      o->copy = 1;
      continue;
    }
    if (!strcmp(word, "--profile")) {
      o->profile = 1;
      continue;
    }
    if (word[0] != '-' || !word[1]) {
      while (next < model_input_count() && o->files[next]) next++;
      if (next == model_input_count())
        end(BAD_INPUT, "'%s' is one file too many: the model has %d inputs", word, next);
      o->files[next++] = word;
      continue;
    }
    static const char *const valued[] = {"--input",   "--out",      "--threads",        "--weights",
                                         "--benchmark", "--generate", "--max-new-tokens", "--stop"};
    int known = 0;
    for (size_t k = 0; k < sizeof valued / sizeof *valued; k++) known |= !strcmp(word, valued[k]);
    if (!known) end(BAD_INPUT, "unknown option '%s'; model --help lists them", word);
    if (!value) end(BAD_INPUT, "%s takes a value; see model --help", word);
    i++;
    if (!strcmp(word, "--input")) set_input(o, value);
    if (!strcmp(word, "--out")) o->out = value;
    if (!strcmp(word, "--weights")) o->weights = value;
    if (!strcmp(word, "--generate")) o->prompt = value;
    if (!strcmp(word, "--threads")) o->threads = number(word, value, 0, 1024);
    if (!strcmp(word, "--benchmark")) o->benchmark = number(word, value, 1, 1000000);
    if (!strcmp(word, "--max-new-tokens")) o->tokens = number(word, value, 1, 1000000000);
    if (!strcmp(word, "--stop")) {
      if (o->stops == 16) end(BAD_INPUT, "--stop can be given 16 times");
      o->stop[o->stops++] = number(word, value, 0, 1000000000);
    }
  }
}

static void print_json_string(const char *text) {
  putchar('"');
  for (; *text; text++) {
    if (*text == '"' || *text == '\\') putchar('\\');
    if ((unsigned char)*text < ' ')
      printf("\\u%04x", (unsigned char)*text);
    else
      putchar(*text);
  }
  putchar('"');
}

static void print_port(const model_port *port) {
  fputs("  {\"name\": ", stdout);
  print_json_string(port->name);
  printf(", \"dtype\": \"%s\", \"shape\": [", npy_name(port->dtype));
  for (int d = 0; d < port->rank; d++) {
    if (d) fputs(", ", stdout);
    if (port->sizes[d])
      print_json_string(port->sizes[d]);
    else
      printf("%lld", (long long)port->shape[d]);
  }
  fputs("]}", stdout);
}

static void print_info(void) {
  fputs("{\n \"target\": ", stdout);
  print_json_string(model_target());
  fputs(",\n \"features\": ", stdout);
  print_json_string(model_features());
  fputs(",\n \"inputs\": [\n", stdout);
  for (int i = 0; i < model_input_count(); i++) {
    if (i) fputs(",\n", stdout);
    print_port(model_input(i));
  }
  fputs("\n ],\n \"outputs\": [\n", stdout);
  for (int i = 0; i < model_output_count(); i++) {
    if (i) fputs(",\n", stdout);
    print_port(model_output(i));
  }
  printf("\n ],\n \"entries\": %d,\n \"capacity\": %lld\n}\n", model_entry_count(),
         (long long)model_capacity());
}

/* weights.bin in this program's folder. */
static const char *weights_beside(void) {
  static char path[4096];
  static const char name[] = "weights.bin";
  ssize_t length = readlink("/proc/self/exe", path, sizeof path - sizeof name - 1);
  while (length > 0 && path[length - 1] != '/') length--;
  memcpy(path + (length > 0 ? length : 0), name, sizeof name);
  return path;
}

static void check(const model *m, int status) {
  if (status) end(BAD_INPUT, "%s", model_error(m));
}

static void describe(const model_tensor *array) {
  printf(" %s (", npy_name(array->dtype));
  for (int d = 0; d < array->rank; d++)
    printf("%s%lld", d ? ", " : "", (long long)array->shape[d]);
  fputs(array->rank == 1 ? ",)" : ")", stdout);
}

static void write_outputs(const char *folder, const model_tensor *outputs) {
  for (int i = 0; i < model_output_count(); i++) {
    char path[4096], error[4300];
    const char *name = model_output(i)->name;
    fputs(name, stdout);
    describe(&outputs[i]);
    if (folder) {
      size_t start = (size_t)snprintf(path, sizeof path, "%s/", folder);
      size_t total = start + (size_t)snprintf(path + (start < sizeof path ? start : 0),
                                              start < sizeof path ? sizeof path - start : 0,
                                              "%s.npy", name);
      if (start >= sizeof path || total >= sizeof path)
        end(BAD_INPUT, "the path of output '%s' is too long", name);
      for (char *c = path + start; *c; c++)
        if (*c == '/') *c = '_'; /* names come from the model */
      if (npy_write(path, &outputs[i], error, sizeof error)) end(BAD_INPUT, "%s", error);
      printf(" -> %s", path);
    }
    putchar('\n');
  }
}

static int by_size(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static void print_profile(const model *m, double total) {
  const char *label;
  double seconds;
  int64_t runs;
  int count = 0;
  while (!model_step(m, count, &label, &seconds, &runs)) count++;
  char *shown = calloc((size_t)count + 1, 1);
  if (!shown) end(1, "no memory for the profile");
  printf("%10s %6s  step\n", "us a run", "share");
  for (;;) {
    int best = -1;
    double most = 0;
    for (int i = 0; i < count; i++) {
      model_step(m, i, &label, &seconds, &runs);
      if (!shown[i] && runs && seconds >= most) best = i, most = seconds;
    }
    if (best < 0) break;
    shown[best] = 1;
    model_step(m, best, &label, &seconds, &runs);
    printf("%10.1f %5.1f%%  %s\n", 1e6 * seconds / (double)runs, 100 * seconds / total, label);
  }
  free(shown);
}

static void time_runs(model *m, const model_tensor *inputs, long count, int profile) {
  model_tensor outputs[PORTS];
  double *times = malloc((size_t)count * sizeof *times), total = 0;
  if (!times) end(1, "no memory for %ld times", count);
  for (long i = 0; i < 1 + count / 10; i++) check(m, model_run(m, inputs, outputs));
  if (profile) model_profile(m, 1);
  for (long i = 0; i < count; i++) {
    double start = now();
    check(m, model_run(m, inputs, outputs));
    times[i] = now() - start;
    total += times[i];
  }
  qsort(times, (size_t)count, sizeof *times, by_size);
  fputs("inputs", stdout);
  for (int i = 0; i < model_input_count(); i++) describe(&inputs[i]);
  printf(": median %.4f ms, lowest %.4f, 10%% %.4f, 90%% %.4f; %ld runs, %d thread%s\n",
         1e3 * times[count / 2], 1e3 * times[0], 1e3 * times[count / 10],
         1e3 * times[count * 9 / 10], count, model_threads(m), model_threads(m) == 1 ? "" : "s");
  if (profile) print_profile(m, total);
  free(times);
}

/* Inputs of zeros, for the sizes of an entry. */
static void time_on_zeros(model *m, long count, int profile) {
  for (int e = 0; e < model_entry_count(); e++) {
    model_tensor inputs[PORTS];
    for (int i = 0; i < model_input_count(); i++) {
      const model_port *port = model_input(i);
      size_t size = npy_size(port->dtype);
      inputs[i] = (model_tensor){port->dtype, port->rank, {0}, NULL};
      for (int d = 0; d < port->rank; d++) {
        inputs[i].shape[d] =
            port->sizes[d] ? model_entry_size(e, port->sizes[d]) : port->shape[d];
        size *= (size_t)inputs[i].shape[d];
      }
      if (posix_memalign(&inputs[i].data, 64, size ? size : 1)) end(1, "no memory for the inputs");
      memset(inputs[i].data, 0, size);
    }
    time_runs(m, inputs, count, profile);
    for (int i = 0; i < model_input_count(); i++) free(inputs[i].data);
  }
}

static int64_t likeliest(const float *logits, int64_t count) {
  int64_t best = 0;
  for (int64_t i = 1; i < count; i++)
    if (logits[i] > logits[best]) best = i;
  return best;
}

static void generate(model *m, const struct options *o) {
  char error[4300];
  model_tensor prompt;
  const float *logits;
  int64_t count = 1, made = 0;
  if (npy_read(o->prompt, &prompt, error, sizeof error)) end(BAD_INPUT, "%s", error);
  if (prompt.dtype != MODEL_INT64)
    end(BAD_INPUT, "%s: it holds %s, and tokens are int64", o->prompt, npy_name(prompt.dtype));
  for (int d = 0; d < prompt.rank; d++) {
    if (d < prompt.rank - 1 && prompt.shape[d] != 1)
      end(BAD_INPUT, "%s: it holds several prompts; give one", o->prompt);
    count *= prompt.shape[d];
  }
  double start = now();
  check(m, model_read(m, prompt.data, count, &logits));
  double read = now() - start;
  free(prompt.data);
  start = now();
  while (made < o->tokens) {
    int64_t token = likeliest(logits, model_vocabulary());
    int stop = 0;
    printf(made ? " %lld" : "%lld", (long long)token);
    fflush(stdout);
    made++;
    for (int i = 0; i < o->stops; i++) stop |= o->stop[i] == token;
    if (stop || made == o->tokens || model_position(m) == model_capacity()) break;
    check(m, model_read(m, &token, 1, &logits));
  }
  double wrote = now() - start;
  putchar('\n');
  fprintf(stderr, "read %lld tokens in %.3f s (%.1f a second)", (long long)count, read,
          (double)count / read);
  if (made > 1) /* the first came with the prompt */
    fprintf(stderr, ", wrote %lld more in %.3f s (%.1f a second)", (long long)made - 1, wrote,
            (double)(made - 1) / wrote);
  fprintf(stderr, "; %d thread%s\n", model_threads(m), model_threads(m) == 1 ? "" : "s");
  if (made < o->tokens && model_position(m) == model_capacity())
    fprintf(stderr, "the model's capacity of %lld tokens is full\n", (long long)model_capacity());
}

int main(int count, char **words) {
  struct options o = {.threads = 1, .tokens = 32};
  model_tensor inputs[PORTS], outputs[PORTS];
  int given = 0;
  parse(&o, count, words);
  if (o.info) {
    print_info();
    return 0;
  }
  for (int i = 0; i < model_input_count(); i++) given += o.files[i] != NULL;
  if (o.prompt && !model_capacity())
    end(BAD_INPUT, "--generate is for language models, and this is none");
  if (o.prompt && given) end(BAD_INPUT, "--generate takes no other inputs");
  for (int i = 0; !o.prompt && (given || !o.benchmark) && i < model_input_count(); i++) {
    char error[4300];
    if (!o.files[i])
      end(BAD_INPUT, "input '%s' is not given; model --help says how", model_input(i)->name);
    if (npy_read(o.files[i], &inputs[i], error, sizeof error)) end(BAD_INPUT, "%s", error);
  }
  model *m = model_create(o.weights ? o.weights : weights_beside(), (int)o.threads);
  if (!m) end(BAD_INPUT, "%s", model_error(NULL));
  if (o.copy) check(m, model_copy_weights(m));
  if (o.prompt) {
    generate(m, &o);
  } else if (o.benchmark && !given) {
    time_on_zeros(m, o.benchmark, o.profile);
  } else {
    check(m, model_run(m, inputs, outputs));
    write_outputs(o.out, outputs);
    if (o.benchmark) time_runs(m, inputs, o.benchmark, o.profile);
    for (int i = 0; i < model_input_count(); i++) free(inputs[i].data);
  }
  model_destroy(m);
  return fflush(stdout) ? 1 : 0;
}
