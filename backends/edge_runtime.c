/* Makes a model ready to run: maps its weights, takes its memory, gives its tensors addresses. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "edge_runtime.h"

static const struct program *const P = &compiled;
static _Thread_local char create_error[600];

const struct element_type element_types[] = {
    [MODEL_FLOAT32] = {"float32", 2, 32}, [MODEL_FLOAT64] = {"float64", 2, 64},
    [MODEL_FLOAT16] = {"float16", 2, 16}, [MODEL_INT8] = {"int8", 0, 8},
    [MODEL_INT16] = {"int16", 0, 16},     [MODEL_INT32] = {"int32", 0, 32},
    [MODEL_INT64] = {"int64", 0, 64},     [MODEL_UINT8] = {"uint8", 1, 8},
    [MODEL_UINT16] = {"uint16", 1, 16},   [MODEL_UINT32] = {"uint32", 1, 32},
    [MODEL_UINT64] = {"uint64", 1, 64},   [MODEL_BOOL] = {"bool", 6, 8},
};

int fail(char *error, size_t size, const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(error, size, format, values);
  va_end(values);
  return -1;
}

#define REFUSE(...) fail(create_error, sizeof create_error, __VA_ARGS__)

static size_t padded(size_t size) { return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

int size_index(const char *name) {
  for (int i = 0; i < P->size_count; i++)
    if (!strcmp(P->size_names[i], name)) return i;
  return -1;
}

int64_t extent(const model_port *port, int i, const int64_t *sizes) {
  return port->sizes[i] ? sizes[size_index(port->sizes[i])] : port->shape[i];
}

size_t port_bytes(const model_port *port, const int64_t *sizes) {
  size_t size = element_types[port->dtype].bits / 8;
  for (int i = 0; i < port->rank; i++) size *= (size_t)extent(port, i, sizes);
  return size;
}

int steps_before(int entry) {
  int count = 0;
  for (int i = 0; i < entry; i++) count += (int)P->entries[i].step_count;
  return count;
}

/* Two sums over 64-bit words, as Fletcher's: the second one sees the order. The end counts as
 * filled up with zeros. */
static void checksum(const uint8_t *data, size_t size, uint64_t sums[2]) {
  uint64_t a = 0, b = 0, word;
  size_t i = 0;
  for (; i + 8 <= size; i += 8) {
    memcpy(&word, data + i, 8);
    a += word;
    b += a;
  }
  if (i < size) {
    word = 0;
    memcpy(&word, data + i, size - i);
    a += word;
    b += a;
  }
  sums[0] = a;
  sums[1] = b;
}

static int map_weights(model *m, const char *path) {
  struct stat status;
  uint64_t sums[2];
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return REFUSE("%s cannot be read: %s", path, strerror(errno));
  if (fstat(file, &status) || !S_ISREG(status.st_mode)) {
    close(file);
    return REFUSE("%s is no file", path);
  }
  if ((uint64_t)status.st_size != P->weights) {
    close(file);
    return REFUSE(
        "%s has %lld bytes, and this model's weights have %llu: it is truncated or another model's",
        path, (long long)status.st_size, (unsigned long long)P->weights);
  }
  if (P->weights > 0) {
    void *data = mmap(NULL, (size_t)P->weights, PROT_READ, MAP_SHARED, file, 0);
    if (data == MAP_FAILED) {
      close(file);
      return REFUSE("%s cannot be mapped into memory: %s", path, strerror(errno));
    }
    m->weights = data;
  }
  close(file);
  checksum(m->weights, (size_t)P->weights, sums);
  if (sums[0] != P->checksum[0] || sums[1] != P->checksum[1])
    return REFUSE("%s is corrupt or another model's: its checksum differs", path);
  return 0;
}

/* Arena, state and ports in one block, each as large as the largest entry needs. */
static int take_memory(model *m) {
  int ports = P->input_count + P->output_count, steps = steps_before(P->entry_count);
  size_t arena = 0, total, *sizes = calloc((size_t)ports + 1, sizeof *sizes);
  m->ports = calloc((size_t)ports + 1, sizeof *m->ports);
  m->seconds = calloc((size_t)steps + 1, sizeof *m->seconds);
  m->runs = calloc((size_t)steps + 1, sizeof *m->runs);
  if (!sizes || !m->ports || !m->seconds || !m->runs) goto short_of_memory;
  for (int e = 0; e < P->entry_count; e++) {
    if (P->entries[e].arena > arena) arena = (size_t)P->entries[e].arena;
    for (int i = 0; i < ports; i++) {
      const model_port *port =
          i < P->input_count ? &P->inputs[i] : &P->outputs[i - P->input_count];
      size_t size = port_bytes(port, P->entries[e].sizes);
      if (size > sizes[i]) sizes[i] = size;
    }
  }
  total = padded(arena) + padded((size_t)P->state);
  for (int i = 0; i < ports; i++) total += padded(sizes[i]);
  if (posix_memalign((void **)&m->memory, 4096, total ? total : 1)) goto short_of_memory;
  memset(m->memory, 0, total); /* here, not in the first run */
  m->arena = m->memory;
  m->state = m->arena + padded(arena);
  total = padded(arena) + padded((size_t)P->state);
  for (int i = 0; i < ports; i++) {
    m->ports[i] = m->memory + total;
    total += padded(sizes[i]);
  }
  free(sizes);
  return 0;

short_of_memory:
  free(sizes);
  return REFUSE("not enough memory for the model's intermediate results");
}

static int make_plans(model *m) {
  m->plans = calloc((size_t)P->entry_count, sizeof *m->plans);
  if (!m->plans) return REFUSE("not enough memory for the model's tables");
  for (int e = 0; e < P->entry_count; e++) {
    const struct entry *entry = &P->entries[e];
    struct plan *plan = &m->plans[e];
    plan->tensors = calloc(entry->tensor_count + 1, sizeof *plan->tensors);
    plan->arguments = calloc(entry->argument_count + 1, sizeof *plan->arguments);
    if (!plan->tensors || !plan->arguments)
      return REFUSE("not enough memory for the model's tables");
    for (uint32_t i = 0; i < entry->tensor_count; i++) {
      const struct tensor *given = &entry->tensors[i];
      uint8_t *space = given->space == ARENA ? m->arena
                       : given->space == STATE ? m->state
                       : given->space == OUTPUT ? m->ports[P->input_count + (int)given->at]
                                                : NULL;
      uint64_t at = given->space == OUTPUT ? 0 : given->at;
      plan->tensors[i] = (dl_tensor){
          .data = given->space == WEIGHTS ? (void *)(uintptr_t)(m->weights + at)
                  : space                 ? space + at
                                          : NULL,
          .device_type = DL_CPU,
          .rank = given->rank,
          .type = {element_types[given->dtype].code, element_types[given->dtype].bits, 1},
          .shape = (int64_t *)(uintptr_t)given->shape,
      };
    }
    for (uint32_t i = 0; i < entry->argument_count; i++) {
      plan->arguments[i].type_index = ARGUMENT_TENSOR;
      plan->arguments[i].value.pointer = &plan->tensors[entry->arguments[i]];
    }
  }
  return 0;
}

model *model_create(const char *weights, int threads) {
  char lacking[40];
  model *m = NULL;
  create_error[0] = 0;
  if (cpu_lacks(P->features, lacking, sizeof lacking)) {
    REFUSE("this CPU lacks '%s', which the code for %s needs (%s); compile the model for a target "
           "that this CPU has",
           lacking, P->target, P->features);
    return NULL;
  }
  if (!weights || threads < 0 || threads > 1024) {
    REFUSE("model_create takes the path of weights.bin and 0 to 1024 threads");
    return NULL;
  }
  m = calloc(1, sizeof *m);
  if (!m) {
    REFUSE("not enough memory for the model");
    return NULL;
  }
  if (map_weights(m, weights) || take_memory(m) || make_plans(m)) {
    model_destroy(m);
    return NULL;
  }
  m->pool = pool_create(threads ? threads : cpu_count());
  if (!m->pool) {
    REFUSE("%d threads cannot be started: %s", threads, strerror(errno));
    model_destroy(m);
    return NULL;
  }
  return m;
}

void model_destroy(model *m) {
  if (!m) return;
  pool_destroy(m->pool);
  for (int e = 0; m->plans && e < P->entry_count; e++) {
    free(m->plans[e].tensors);
    free(m->plans[e].arguments);
  }
  free(m->plans);
  free(m->memory);
  free(m->ports);
  free(m->seconds);
  free(m->runs);
  if (m->weights) munmap((void *)(uintptr_t)m->weights, (size_t)P->weights);
  free(m);
}

const char *model_error(const model *m) { return m ? m->error : create_error; }

int model_threads(const model *m) { return pool_threads(m->pool); }

void model_reset(model *m) {
  memset(m->state, 0, (size_t)P->state);
  m->position = 0;
}
