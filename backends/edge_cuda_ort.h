/* What a generated products.c gives to edge_cuda_ort.c: kernels and operators as constant tables. */
#ifndef EDGE_CUDA_ORT_H
#define EDGE_CUDA_ORT_H

#include "edge_ort_api.h"

enum { MOST_TENSORS = 8, MOST_PRODUCTS = 16 }; /* edge_cuda_products.py, edge_cuda_ort.py */

/* What a kernel's parameter is. The first four are forms of the activations: float16 rows; units of
 * integers, of 8 bits or as float16; rows by a tensor map. */
enum role {
  X, INT8, WIDE, MAP, WEIGHT, SCALES, SUMS, BIAS, TOKEN_SCALES, TOKEN_ZEROS, CONSTANTS, ROOM,
  COUNTERS, OUT, INPUT, KEPT = INPUT + MOST_TENSORS, TOKENS = KEPT + MOST_TENSORS, BLOCKS_X,
  BLOCKS_Y, ROLES
};

struct extent {
  unsigned fixed, each; /* blocks: fixed · ⌈tokens / each⌉, or fixed where `each` is 0 */
};

struct gpu_kernel {
  const char *name;
  int image; /* that it is in */
  unsigned threads, shared; /* of a block; bytes of dynamic shared memory */
  struct extent grid[3];
  int parameter_count;
  const uint8_t *parameters; /* roles */
};

/* What computes a product. A piece of the output is `each` tokens by one of `across` blocks of
 * outputs; `splits` blocks share a piece, and leave `room` floats each in the workspace. */
struct choice {
  int64_t most; /* tokens that it is for; 0: any number */
  int kernel, reads; /* reads: X, INT8, WIDE or MAP */
  int64_t each, across, splits, room;
};

struct choices {
  int count;
  const struct choice *list; /* the first that fits is taken */
};

/* What is computed of rows before products read them: a kernel for each set of forms that they do,
 * with a bit 1 << X, 1 << INT8 or 1 << WIDE for each; -1 where there is none. */
struct before {
  int kernels[8];
};

struct gpu {
  int capability; /* such as 90 */
  int image_count, kernel_count;
  const unsigned char *const *images;
  const struct gpu_kernel *kernels;
  const struct choices *choices; /* by the product's form */
  const struct before *befores;
};

struct product {
  int form;
  int64_t columns;               /* numbers in a row of the output */
  int64_t weight, scales, sums, bias; /* bytes from the start of the operator's constants */
};

struct operator_of {
  const char *name; /* of the layers, for people */
  uint64_t weights; /* bytes of its constants, which the graph holds */
  int64_t depth;    /* numbers in a row of x */
  int inputs, kept; /* tensors that it reads; values of its steps that are outputs */
  int before;       /* -1: products read the input as it is */
  int64_t constants; /* of the steps: bytes from the start of the operator's */
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
