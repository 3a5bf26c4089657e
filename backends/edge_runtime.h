/* What the runtime's files share: a model ready to run. */
#ifndef EDGE_RUNTIME_H
#define EDGE_RUNTIME_H

#include <stdatomic.h>

#include "edge_program.h"

enum { ALIGNMENT = 64 };

/* One compiled combination of sizes, ready to call: tensors with addresses, arguments that point to
 * them. Those of the inputs get their addresses in each run. */
struct plan {
  dl_tensor *tensors;
  argument *arguments;
};

struct model {
  struct pool *pool;
  struct plan *plans;
  uint8_t *memory; /* one block: arena, state, ports */
  size_t memory_size;
  uint8_t *arena, *state;
  uint8_t **ports; /* inputs, then outputs */
  const uint8_t *weights; /* the mapped file, or a copy */
  size_t weights_size;
  int copied;
  int64_t position; /* tokens read */
  atomic_int busy;
  int profiling;
  double *seconds; /* by step, all entries in turn */
  int64_t *runs;
  char error[600];
};

struct element_type {
  const char *name;
  uint8_t code, bits; /* DLPack's */
};
extern const struct element_type element_types[]; /* by model_dtype */

/* Writes a message and gives −1. */
int fail(char *error, size_t size, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
extern _Thread_local char create_error[600]; /* of model_create() */
#define FAIL(m, ...) fail((m)->error, sizeof(m)->error, __VA_ARGS__)
#define REFUSE(...) fail(create_error, sizeof create_error, __VA_ARGS__)

/* The number of the size that is called `name`; −1 if there is none. */
int size_index(const char *name);

/* A port's size in dimension `i`, and its bytes, when the named sizes are `sizes`. */
int64_t extent(const model_port *port, int i, const int64_t *sizes);
uint64_t port_bytes(const model_port *port, const int64_t *sizes);

/* edge_memory.c: the weights, and everything else that a run writes to; 0 or −1. */
int map_weights(model *m, const char *path);
int take_memory(model *m);
void give_memory(model *m);

/* How many steps the entries before this one have. */
int steps_before(int entry);

#endif
