/* What a generated program.c gives to the runtime: a compiled model as constant tables.
 *
 * Kernels have the packed C interface of TVM's code generator (tvm/ffi/c_api.h and
 * dlpack.h, whose layouts are repeated here). */
#ifndef EDGE_PROGRAM_H
#define EDGE_PROGRAM_H

#include <stdint.h>

#include "model.h"

typedef struct {
  uint8_t code, bits;
  uint16_t lanes;
} dl_type;

typedef struct {
  void *data;
  int32_t device_type, device_id;
  int32_t rank;
  dl_type type;
  int64_t *shape;
  int64_t *strides;
  uint64_t byte_offset;
} dl_tensor;

enum { DL_CPU = 1, ARGUMENT_TENSOR = 7 };

typedef struct {
  int32_t type_index;
  uint32_t padding;
  union {
    int64_t integer;
    double number;
    void *pointer;
  } value;
} argument;

typedef int (*kernel)(void *self, const argument *arguments, int32_t count, argument *result);

enum space { WEIGHTS, ARENA, INPUT, OUTPUT, STATE };

struct tensor {
  uint8_t space, dtype, rank;
  const int64_t *shape;
  uint64_t at; /* bytes from the start of the space; for ports their number */
};

struct step {
  kernel run;
  const char *label;
  uint32_t first, count; /* its arguments: a range of the entry's `arguments` */
};

struct entry {
  const int64_t *sizes; /* in the order of the program's size names */
  uint64_t arena;
  const struct tensor *tensors;
  const struct step *steps;
  const uint32_t *arguments; /* numbers of tensors */
  uint32_t tensor_count, step_count, argument_count;
};

struct program {
  const char *target;
  const char *features; /* separated by spaces */
  uint64_t weights, checksum[2], state;
  const model_port *inputs, *outputs;
  int input_count, output_count;
  const int64_t *limits; /* by input: int64 numbers must be 0 and more, and below it; or 0 */
  const char *const *size_names;
  const uint8_t *padded; /* by size: whether an input may be smaller than the entry */
  int size_count;
  const struct entry *entries;
  int entry_count;
  int decodes; /* whether the three ports below make it a language model */
  int tokens, position, logits;
  int64_t capacity;
};

extern const struct program compiled;

/* edge_pool.c: the threads of one model, and the scratch memory that their kernels ask for. */
struct pool;
struct pool *pool_create(int threads);
void pool_destroy(struct pool *pool);
int pool_threads(const struct pool *pool);
void pool_enter(struct pool *pool); /* kernels called on this thread use this pool … */
void pool_leave(void);              /* … until now */
const char *pool_error(void);       /* what the last failing kernel on this thread said */

/* edge_cpu.c: how many CPUs this process may use, and the first of the features (separated by
 * spaces) that this CPU lacks, copied to `name`; 0 when it has them all. */
int cpu_count(void);
int cpu_lacks(const char *features, char *name, size_t size);

#endif
