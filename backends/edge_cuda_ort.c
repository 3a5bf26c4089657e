/* A library of custom operators for ONNX Runtime's CUDA provider: linears on generated kernels.
 *
 *     qcompiler::QuantizedMatMul(weights, x_0, …; number, library) -> y_0, …, kept_0, …, scratch
 *
 * Each x is float16 (…, K); each y float16 (…, N), of one of the linears that read what an operator
 * computes of them: x_0 itself, or steps, whose last value may be quantized by row. Each kept value
 * of the steps is float16 (…, K). `scratch` is memory that ONNX Runtime owns and the kernels write
 * in between; nothing reads it. `number` says which of
 * the compiled operators it is, `library` which library its weights are packed for. Kernels are told
 * how many rows there are; they are launched by the driver on the session's stream, so that a
 * captured CUDA graph holds them. Nothing is linked but libc: the driver is opened at run time. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "edge_cuda_ort.h"
#include "edge_ort_call.h"

#ifndef PROVIDER /* tests take the CPU's, with a driver of their own */
#define PROVIDER "CUDAExecutionProvider"
#endif

enum { OLDEST = 12000, ALIGNMENT = 256, MAX_CONTEXTS = 64 };
enum { UNIT = 8192, UNIT_ROWS = 64, UNIT_BYTES = 128 }; /* kernels/cuda_units.py */
enum { COUNTER_COUNT = 256 };              /* edge_cuda_products.py */

/* The driver API's own numbers and layouts. */
enum { CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, PROCESSORS = 16, MAX_DYNAMIC_SHARED = 8 };
enum { PROGRAMMATIC_SERIALIZATION = 6 };
enum { MAP_FLOAT16 = 6, MAP_PLAIN = 0, MAP_SWIZZLE_128 = 3, MAP_FETCH_128 = 2, MAP_ZEROS = 0 };
enum { MAP_BYTES = 128, MAP_COLUMNS = 64 }; /* columns of a tile: 128 bytes, kernels/cuda_units.py */

struct attribute {
  int id, padding;
  int value[16];
};

struct config {
  unsigned grid[3], block[3], shared;
  void *stream;
  struct attribute *attributes;
  unsigned count;
};

#define FUNCTIONS(F)                                                     \
  F(cuInit, (unsigned flags))                                            \
  F(cuDriverGetVersion, (int *version))                                  \
  F(cuDeviceGetCount, (int *count))                                      \
  F(cuDeviceGet, (int *device, int number))                              \
  F(cuDeviceGetAttribute, (int *value, int attribute, int device))       \
  F(cuDeviceGetName, (char *name, int size, int device))                 \
  F(cuCtxGetCurrent, (void **context))                                   \
  F(cuCtxSetCurrent, (void *context))                                    \
  F(cuCtxGetDevice, (int *device))                                       \
  F(cuStreamGetCtx, (void *stream, void **context))                      \
  F(cuModuleLoadData, (void **module, const void *image))                \
  F(cuModuleUnload, (void *module))                                      \
  F(cuModuleGetFunction, (void **function, void *module, const char *))  \
  F(cuFuncSetAttribute, (void *function, int attribute, int value))      \
  F(cuLaunchKernelEx,                                                    \
    (const struct config *config, void *function, void **parameters, void **extra)) \
  F(cuTensorMapEncodeTiled,                                              \
    (void *map, int type, uint32_t rank, void *at, const uint64_t *sizes, const uint64_t *strides, \
     const uint32_t *tile, const uint32_t *steps, int interleave, int swizzle, int fetch, int fill)) \
  F(cuMemsetD8Async, (uint64_t at, unsigned char value, size_t count, void *stream)) \
  F(cuGetErrorName, (int code, const char **name))

static struct {
#define DECLARE(name, parameters) int(*name) parameters;
  FUNCTIONS(DECLARE)
} cu;

static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char absent[300]; /* why there is no driver; empty where there is one */

static void open_driver(void) {
  int version = 0;
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    snprintf(absent, sizeof absent, "no GPU: NVIDIA's driver (libcuda.so.1) was not found");
    return;
  }
#define FIND(name, parameters) *(void **)(&cu.name) = dlsym(library, #name);
  FUNCTIONS(FIND)
  if (!cu.cuInit || cu.cuInit(0)) {
    snprintf(absent, sizeof absent, "no GPU: NVIDIA's driver finds no device that it can use");
    return;
  }
  if (!cu.cuDriverGetVersion || cu.cuDriverGetVersion(&version) || version < OLDEST ||
      !cu.cuLaunchKernelEx || !cu.cuTensorMapEncodeTiled)
    snprintf(absent, sizeof absent,
             "the GPU's driver is made for CUDA %d.%d; %d.%d or later is needed", version / 1000,
             version % 1000 / 10, OLDEST / 1000, OLDEST % 1000 / 10);
}

static ort_status *check(ort_api api, int code, const char *what) {
  const char *name = NULL;
  if (!code) return NULL;
  if (cu.cuGetErrorName(code, &name) || !name) name = "an unknown error";
  return refuse(api, ORT_FAIL, "%s: the GPU's driver answered %s", what, name);
}

static int attribute_of(int device, int attribute) {
  int value = 0;
  return cu.cuDeviceGetAttribute(&value, attribute, device) ? 0 : value;
}

static int capability_of(int device) {
  return attribute_of(device, CAPABILITY_MAJOR) * 10 + attribute_of(device, CAPABILITY_MINOR);
}

/* The code that a GPU runs: that of its generation, not newer than it; -1 where there is none. */
static int code_for(int capability) {
  int found = -1;
  for (int i = 0; i < compiled_operators.gpu_count; i++) {
    int have = compiled_operators.gpus[i].capability;
    if (have <= capability && have / 10 == capability / 10) found = i;
  }
  return found;
}

static ort_status *refuse_device(ort_api api, int device) {
  char name[100] = "the GPU", held[100] = "";
  int capability = capability_of(device);
  cu.cuDeviceGetName(name, sizeof name, device);
  for (int i = 0; i < compiled_operators.gpu_count; i++) {
    int have = compiled_operators.gpus[i].capability;
    size_t used = strlen(held);
    snprintf(held + used, sizeof held - used, "%s%d.%d", i ? ", " : "", have / 10, have % 10);
  }
  return refuse(api, ORT_NOT_IMPLEMENTED,
                "libqcompiler_ort.so holds code for compute capability %s, and %s has %d.%d; "
                "compile the model for it (--target ort:cuda:sm_%d --kernels tvm)",
                held, name, capability / 10, capability % 10, capability);
}

/* Kernels loaded in a context: a device of this process. */
struct module {
  void *context;
  const struct gpu *gpu;
  int processors;
  void **functions;
};

static struct module modules[MAX_CONTEXTS];
static int module_count;

static ort_status *load_images(ort_api api, const struct gpu *gpu, void **images,
                               void **functions) {
  if (!images || !functions) return refuse(api, ORT_FAIL, "not enough memory for the kernels");
  for (int i = 0; i < gpu->image_count; i++)
    TRY(check(api, cu.cuModuleLoadData(&images[i], gpu->images[i]), "loading the kernels"));
  for (int i = 0; i < gpu->kernel_count; i++) {
    const struct gpu_kernel *kernel = &gpu->kernels[i];
    TRY(check(api, cu.cuModuleGetFunction(&functions[i], images[kernel->image], kernel->name),
              kernel->name));
    TRY(check(api, cu.cuFuncSetAttribute(functions[i], MAX_DYNAMIC_SHARED, (int)kernel->shared),
              kernel->name));
  }
  return NULL;
}

static ort_status *load(ort_api api, void *context, struct module *made) {
  int device = 0;
  TRY(check(api, cu.cuCtxGetDevice(&device), "the session's GPU"));
  int code = code_for(capability_of(device));
  if (code < 0) return refuse_device(api, device);
  const struct gpu *gpu = &compiled_operators.gpus[code];
  void **images = calloc((size_t)gpu->image_count, sizeof *images);
  void **functions = calloc((size_t)gpu->kernel_count, sizeof *functions);
  ort_status *status = load_images(api, gpu, images, functions);
  if (status) {
    for (int i = 0; images && i < gpu->image_count; i++)
      if (images[i]) cu.cuModuleUnload(images[i]);
    free(functions);
  } else {
    *made = (struct module){context, gpu, attribute_of(device, PROCESSORS), functions};
  }
  free(images);
  return status;
}

/* The kernels in the thread's current context, or else that of the stream; none without any. */
static ort_status *find_module(ort_api api, void *stream, const struct module **found) {
  void *context = NULL;
  TRY(check(api, cu.cuCtxGetCurrent(&context), "the session's context"));
  if (!context && stream) {
    TRY(check(api, cu.cuStreamGetCtx(stream, &context), "the session's context"));
    TRY(check(api, cu.cuCtxSetCurrent(context), "the session's context"));
  }
  *found = NULL;
  if (!context) return NULL;
  ort_status *status = NULL;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < module_count && !*found; i++)
    if (modules[i].context == context) *found = &modules[i];
  if (!*found && module_count == MAX_CONTEXTS)
    status = refuse(api, ORT_FAIL, "more than %d contexts of GPUs in one process", MAX_CONTEXTS);
  else if (!*found && !(status = load(api, context, &modules[module_count])))
    *found = &modules[module_count++];
  pthread_mutex_unlock(&lock);
  return status;
}

/* One node of a graph. */
struct node {
  ort_api api;
  const struct operator_of *operator;
};

static ort_status *create(const ort_custom_op *op, ort_api api, const ort_object *info,
                          void **kernel) {
  int64_t number = 0;
  const struct module *module;
  (void)op;
  TRY(find_number(api, info, compiled_operators.library, compiled_operators.count, &number));
  /* A session starts with its GPU current: what is wrong with the kernels shows now. */
  TRY(find_module(api, NULL, &module));
  struct node *node = calloc(1, sizeof *node);
  if (!node) return refuse(api, ORT_FAIL, "not enough memory for an operator");
  node->api = api;
  node->operator= &compiled_operators.list[number];
  *kernel = node;
  return NULL;
}

static void destroy(void *given) { free(given); }

static int64_t up(int64_t size, int64_t by) { return (size + by - 1) / by; }

static int64_t aligned(int64_t size) { return up(size, ALIGNMENT) * ALIGNMENT; }

/* What computes so many rows. Where blocks share a piece there are no more of them than processors:
 * counters are few, and clusters that wait for a processor gain nothing. */
static const struct choice *choose(const struct module *module, int form, int64_t rows) {
  const struct choices *choices = &module->gpu->choices[form];
  for (int i = 0; i + 1 < choices->count; i++) {
    const struct choice *choice = &choices->list[i];
    int64_t blocks = up(rows, choice->each) * choice->across * choice->splits;
    if ((!choice->most || rows <= choice->most) &&
        (choice->splits == 1 || blocks <= module->processors))
      return choice;
  }
  return &choices->list[choices->count - 1];
}

/* Launches that follow one another on a stream. */
struct queue {
  ort_api api;
  const struct module *module;
  void *stream;
  int after_kernel; /* whether what the next one follows is a kernel */
};

static ort_status *launch(struct queue *queue, int number, int rows, void *const *values) {
  const struct gpu_kernel *kernel = &queue->module->gpu->kernels[number];
  void *parameters[ROLES], *held[ROLES];
  struct config config = {.block = {kernel->threads, 1, 1}, .shared = kernel->shared,
                          .stream = queue->stream};
  /* A kernel may start while the one before still runs: it waits itself before it reads what others
   * write. */
  struct attribute attribute = {.id = PROGRAMMATIC_SERIALIZATION, .value = {1}};
  config.attributes = &attribute;
  config.count = queue->after_kernel;
  for (int i = 0; i < 3; i++) {
    const struct extent *extent = &kernel->grid[i];
    config.grid[i] =
        extent->fixed * (extent->each ? (unsigned)up(rows, (int64_t)extent->each) : 1);
  }
  for (int i = 0; i < kernel->parameter_count; i++) {
    uint8_t role = kernel->parameters[i];
    held[i] = role < TOKENS ? values[role] : NULL;
    parameters[i] = role == MAP      ? values[MAP]
                    : role < TOKENS  ? (void *)&held[i]
                    : role == TOKENS ? (void *)&rows
                                     : (void *)&config.grid[role - BLOCKS_X];
  }
  queue->after_kernel = 1;
  return check(queue->api,
               cu.cuLaunchKernelEx(&config, queue->module->functions[number], parameters, NULL),
               kernel->name);
}

/* How the copy engine brings tiles of x, as warpgroup products read them: rows of 128 bytes, swizzled,
 * `each` of them. */
static ort_status *map_rows(ort_api api, uint8_t *map, void *x, int64_t rows, int64_t depth,
                            int64_t each) {
  uint64_t sizes[2] = {(uint64_t)depth, (uint64_t)rows}, stride = (uint64_t)depth * 2;
  uint32_t tile[2] = {MAP_COLUMNS, (uint32_t)each}, steps[2] = {1, 1};
  return check(api,
               cu.cuTensorMapEncodeTiled(map, MAP_FLOAT16, 2, x, sizes, &stride, tile, steps,
                                         MAP_PLAIN, MAP_SWIZZLE_128, MAP_FETCH_128, MAP_ZEROS),
               "describing the activations");
}

/* Memory for a call: where each part of it begins, in bytes, and which forms of the activations
 * products read. */
struct scratch {
  int64_t at[ROLES], size;
  int reads, counting;
};

static void reserve(struct scratch *scratch, enum role part, int64_t size) {
  scratch->at[part] = scratch->size;
  scratch->size += aligned(size);
}

static struct scratch measure(const struct module *module, const struct operator_of *op,
                              int64_t rows) {
  struct scratch found = {.size = 0};
  int64_t most = 0, units = up(rows, UNIT_ROWS) * UNIT;
  for (int i = 0; i < op->count; i++) {
    const struct choice *choice = choose(module, op->products[i].form, rows);
    int64_t pieces = up(rows, choice->each) * choice->across;
    int64_t room = pieces * choice->splits * choice->room * (int64_t)sizeof(float);
    if (room > most) most = room;
    found.reads |= 1 << (choice->reads == MAP ? X : choice->reads);
  }
  if (op->before >= 0) {
    if (found.reads & 1 << X) reserve(&found, X, rows * op->depth * 2);
    if (found.reads & 1 << INT8) reserve(&found, INT8, units * up(op->depth, UNIT_BYTES));
    if (found.reads & 1 << WIDE) reserve(&found, WIDE, units * up(op->depth * 2, UNIT_BYTES));
    reserve(&found, TOKEN_SCALES, rows * 4);
    reserve(&found, TOKEN_ZEROS, rows * 4);
  }
  reserve(&found, ROOM, most);
  found.counting = most > 0;
  reserve(&found, COUNTERS, found.counting * COUNTER_COUNT * 4);
  return found;
}

/* A call on some rows: `tensors` has what the operator reads and keeps, and what products write. */
static ort_status *multiply(struct queue *queue, const struct operator_of *op, uint8_t *weights,
                            int64_t rows, uint8_t *memory, uint8_t *const *tensors,
                            uint8_t *const *ys) {
  struct scratch scratch = measure(queue->module, op, rows);
  uint8_t map[MAP_BYTES] __attribute__((aligned(64)));
  void *values[ROLES] = {[MAP] = map, [CONSTANTS] = weights + op->constants};
  for (int role = X; role <= COUNTERS; role++)
    if (!values[role]) values[role] = memory + scratch.at[role];
  for (int i = 0; i < 2 * MOST_TENSORS; i++) values[INPUT + i] = tensors[i];
  if (scratch.counting) {
    TRY(check(queue->api,
              cu.cuMemsetD8Async((uint64_t)(uintptr_t)values[COUNTERS], 0, COUNTER_COUNT * 4,
                                 queue->stream),
              "clearing counters"));
    queue->after_kernel = 0;
  }
  if (op->before < 0) {
    values[X] = tensors[0];
  } else {
    int kernel = queue->module->gpu->befores[op->before].kernels[scratch.reads];
    if (kernel < 0) return refuse(queue->api, ORT_FAIL, "%s: no kernel for its steps", op->name);
    TRY(launch(queue, kernel, (int)rows, values));
  }
  for (int i = 0; i < op->count; i++) {
    const struct product *product = &op->products[i];
    const struct choice *choice = choose(queue->module, product->form, rows);
    if (choice->reads == MAP)
      TRY(map_rows(queue->api, map, values[X], rows, op->depth, choice->each));
    values[WEIGHT] = weights + product->weight;
    values[SCALES] = weights + product->scales;
    values[SUMS] = weights + product->sums;
    values[BIAS] = weights + product->bias;
    values[OUT] = ys[i];
    TRY(launch(queue, choice->kernel, (int)rows, values));
  }
  return NULL;
}

static ort_status *output(ort_api api, ort_object *context, size_t index, const int64_t *sizes,
                          size_t rank, void **data) {
  ort_object *value;
  TRY(CALL(ort_output, ORT_KERNEL_CONTEXT_GET_OUTPUT)(context, index, sizes, rank, &value));
  return CALL(ort_tensor_data, ORT_GET_TENSOR_MUTABLE_DATA)(value, data);
}

static ort_status *compute(void *given, ort_object *context) {
  struct node *node = given;
  const struct operator_of *op = node->operator;
  ort_api api = node->api;
  struct queue queue = {.api = api, .after_kernel = 1};
  /* What it reads, then from MOST_TENSORS on what it keeps. */
  uint8_t *weights, *memory, *ys[MOST_PRODUCTS], *tensors[2 * MOST_TENSORS] = {NULL};
  int64_t sizes[MAX_DIMENSIONS], rows = 1, widest = op->depth;
  size_t rank, count, numbers;
  TRY(CALL(ort_gpu_stream, ORT_KERNEL_CONTEXT_GET_GPU_COMPUTE_STREAM)(context, &queue.stream));
  TRY(find_module(api, queue.stream, &queue.module));
  if (!queue.module) return refuse(api, ORT_FAIL, "%s: no context of a GPU is current", op->name);
  TRY(find_input(api, context, 0, &weights, &count, NULL, NULL));
  if (count != op->weights)
    return refuse(api, ORT_INVALID_ARGUMENT, "%s: %zu bytes of weights, and its kernels read %llu",
                  op->name, count, (unsigned long long)op->weights);
  for (int i = op->inputs - 1; i >= 0; i--) {
    numbers = i + 1 < op->inputs ? count : 0;
    TRY(find_input(api, context, (size_t)i + 1, &tensors[i], &count, sizes, &rank));
    if (rank < 1 || rank > MAX_DIMENSIONS || sizes[rank - 1] != op->depth)
      return refuse(api, ORT_INVALID_ARGUMENT, "%s reads rows of %lld numbers, not of %lld",
                    op->name, (long long)op->depth,
                    rank >= 1 && rank <= MAX_DIMENSIONS ? (long long)sizes[rank - 1] : 0LL);
    if (i + 1 < op->inputs && numbers != count)
      return refuse(api, ORT_INVALID_ARGUMENT, "%s reads tensors of one size, not of %zu and %zu",
                    op->name, count, numbers);
    if ((uintptr_t)tensors[i] % 16 || (uintptr_t)weights % 16)
      return refuse(api, ORT_INVALID_ARGUMENT,
                    "%s reads tensors that start at a multiple of 16 bytes", op->name);
  }
  for (size_t i = 0; i + 1 < rank; i++) rows *= sizes[i];
  for (int i = 0; i < op->count; i++) {
    sizes[rank - 1] = op->products[i].columns;
    if (sizes[rank - 1] > widest) widest = sizes[rank - 1];
    TRY(output(api, context, (size_t)i, sizes, rank, (void **)&ys[i]));
  }
  sizes[rank - 1] = op->depth;
  for (int i = 0; i < op->kept; i++)
    TRY(output(api, context, (size_t)(op->count + i), sizes, rank,
               (void **)&tensors[MOST_TENSORS + i]));
  /* Kernels count elements in 32 bits: of more, they take a part at a time. */
  int64_t step = INT32_MAX / widest / 128 * 128;
  int64_t halves = 0;
  for (int64_t done = 0; done < rows; done += step) {
    struct scratch part = measure(queue.module, op, rows - done < step ? rows - done : step);
    if (part.size / 2 > halves) halves = part.size / 2;
  }
  TRY(output(api, context, (size_t)(op->count + op->kept), &halves, 1, (void **)&memory));
  for (int64_t done = 0; done < rows; done += step) {
    int64_t left = rows - done < step ? rows - done : step;
    uint8_t *to[MOST_PRODUCTS], *part[2 * MOST_TENSORS];
    for (int i = 0; i < op->count; i++) to[i] = ys[i] + done * op->products[i].columns * 2;
    for (int i = 0; i < 2 * MOST_TENSORS; i++)
      part[i] = tensors[i] ? tensors[i] + done * op->depth * 2 : NULL;
    TRY(multiply(&queue, op, weights, left, memory, part, to));
  }
  return NULL;
}

static const char *name(const ort_custom_op *op) { return (void)op, "QuantizedMatMul"; }
static const char *provider(const ort_custom_op *op) { return (void)op, PROVIDER; }
static int input_type(const ort_custom_op *op, size_t index) {
  return (void)op, index ? ORT_FLOAT16 : ORT_UINT8;
}
static int output_type(const ort_custom_op *op, size_t index) {
  return (void)op, (void)index, ORT_FLOAT16;
}
static size_t two(const ort_custom_op *op) { return (void)op, 2; }
static size_t one(const ort_custom_op *op) { return (void)op, 1; }
static int input_kind(const ort_custom_op *op, size_t index) {
  return (void)op, index ? ORT_VARIADIC : ORT_REQUIRED;
}
static int variadic(const ort_custom_op *op, size_t index) {
  return (void)op, (void)index, ORT_VARIADIC;
}
static int yes(const ort_custom_op *op) { return (void)op, 1; }
static int memory_kind(const ort_custom_op *op, size_t index) { return (void)op, (void)index, 0; }
static int latest(const ort_custom_op *op) { return (void)op, INT32_MAX; }

static const ort_custom_op product_operator = {
    .version = ORT_VERSION,
    .name = name,
    .provider = provider,
    .input_type = input_type,
    .input_count = two,
    .output_type = output_type,
    .output_count = one,
    .compute = compute,
    .destroy = destroy,
    .input_kind = input_kind,
    .output_kind = variadic,
    .input_memory = memory_kind,
    .variadic_inputs = yes,
    .alike_inputs = yes,
    .variadic_outputs = yes,
    .alike_outputs = yes,
    .create_kernel = create,
    .first_version = yes,
    .last_version = latest,
};

/* What ONNX Runtime calls when the library is given to a session's options. */
ort_status *RegisterCustomOps(ort_object *options, const ort_base *base) {
  ort_api api = NULL;
  int count = 0, device = 0, fits = 0;
  TRY(find_api(base, &api));
  pthread_once(&once, open_driver);
  if (absent[0]) return refuse(api, ORT_NOT_IMPLEMENTED, "%s", absent);
  if (cu.cuDeviceGetCount(&count) || !count)
    return refuse(api, ORT_NOT_IMPLEMENTED, "no GPU: NVIDIA's driver finds no device that it can use");
  for (int i = 0; i < count && !fits; i++) {
    int code = cu.cuDeviceGet(&device, i);
    fits = !code && code_for(capability_of(device)) >= 0;
  }
  if (!fits) return refuse_device(api, device);
  return join(options, api, &product_operator, 1);
}
