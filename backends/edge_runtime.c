/* Makes a model ready to run: gives its tensors addresses, checks the CPU, starts its threads. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edge_runtime.h"

static const struct program *const P = &compiled;
_Thread_local char create_error[600];

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

int size_index(const char *name) {
  for (int i = 0; i < P->size_count; i++)
    if (!strcmp(P->size_names[i], name)) return i;
  return -1;
}

int64_t extent(const model_port *port, int i, const int64_t *sizes) {
  return port->sizes[i] ? sizes[size_index(port->sizes[i])] : port->shape[i];
}

uint64_t port_bytes(const model_port *port, const int64_t *sizes) {
  uint64_t size = element_types[port->dtype].bits / 8;
  for (int i = 0; i < port->rank; i++) size *= (uint64_t)extent(port, i, sizes);
  return size;
}

int steps_before(int entry) {
  int count = 0;
  for (int i = 0; i < entry; i++) count += (int)P->entries[i].step_count;
  return count;
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
  free(m->ports);
  free(m->seconds);
  free(m->runs);
  give_memory(m);
  free(m);
}

const char *model_error(const model *m) { return m ? m->error : create_error; }

int model_threads(const model *m) { return pool_threads(m->pool); }

void model_reset(model *m) {
  memset(m->state, 0, (size_t)P->state);
  m->position = 0;
}
