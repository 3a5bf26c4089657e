/* What a generated products.c gives to edge_cuda_ort.c: kernels and operators as constant tables. */
#ifndef EDGE_CUDA_ORT_H
#define EDGE_CUDA_ORT_H

#include "edge_ort_api.h"

/* What a kernel's parameter is. */
enum role { X, MAP, WEIGHT, SCALES, BIAS, ROOM, COUNTERS, OUT, TOKENS, BLOCKS_X, BLOCKS_Y, ROLES };

struct extent {
  unsigned fixed, each; /* blocks: fixed · ⌈tokens / each⌉, or fixed where `each` is 0 */
};

struct gpu_kernel {
  const char *name;
  unsigned threads, shared; /* of a block; bytes of dynamic shared memory */
  struct extent grid[3];
  int parameter_count;
  const uint8_t *parameters; /* roles */
};

/* What computes a product. A piece of the output is `each` tokens by one of `across` blocks of
 * outputs; `splits` blocks share a piece, and leave `room` floats each in the workspace. */
struct choice {
  int64_t most; /* tokens that it is for; 0: any number */
  int kernel, mapped; /* mapped: whether it is given x by a tensor map */
  int64_t each, across, splits, room;
};

struct choices {
  int count;
  const struct choice *list; /* the first that fits is taken */
};

struct gpu {
  int capability; /* such as 90 */
  const unsigned char *image;
  int kernel_count;
  const struct gpu_kernel *kernels;
  const struct choices *choices; /* by the product's form */
};

struct product {
  int form;
  int64_t columns;               /* numbers in a row of the output */
  int64_t weight, scales, bias;  /* bytes from the start of the operator's constants */
};

struct operator_of {
  const char *name; /* of the layers, for people */
  uint64_t weights; /* bytes of its constants, which the graph holds */
  int64_t depth;    /* numbers in a row of x */
  int count;
  const struct product *products;
};

struct operators {
  int64_t library; /* known to the model too */
  int gpu_count, count;
  const struct gpu *gpus; /* the lowest capability first */
  const struct operator_of *list;
};

extern const struct operators compiled_operators;

#endif
