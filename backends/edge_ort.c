/* A library of custom operators for ONNX Runtime: linears and rotations on generated kernels.
 *
 *     qcompiler::QuantizedMatMul(weights, x, …; number, library) -> y, …
 *     qcompiler::Rotate(factors, x; number, library) -> y
 *     qcompiler::LookUp(weights, ids; number, library) -> rows of the first linear's int8 weights
 *
 * x, … are float (…, K); the outputs, float (…, N), are those of the linears that read what is
 * computed of them, after one quantization, then values on the way, float (…, K). `number` says
 * which of the compiled operators it is, `library` which library its weights are packed for. Kernels
 * are compiled for fixed numbers of rows: a call takes the rows of x piece by piece, the largest
 * first. Loops that kernels share among threads run on the session's. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edge_ort.h"
#include "edge_ort_call.h"

enum { ALIGNMENT = 64 };

/* What a thread that computes needs: scratch memory, kept from call to call, and where the session's
 * threads are to be had. */
struct worker {
  ort_api api;
  const ort_object *context; /* of the call under way; NULL in threads that only take tasks */
  uint8_t *memory;
  size_t size;
  char error[400];
};

static pthread_key_t workers;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void free_worker(void *given) {
  struct worker *worker = given;
  free(worker->memory);
  free(worker);
}

static void start(void) { pthread_key_create(&workers, free_worker); }

static struct worker *here(void) {
  struct worker *worker = pthread_getspecific(workers);
  if (!worker) {
    worker = calloc(1, sizeof *worker);
    if (worker) pthread_setspecific(workers, worker);
  }
  return worker;
}

/* The hooks of generated code; see edge_pool.c. */

typedef struct {
  void *sync_handle;
  int32_t num_task;
} group;
typedef int (*task)(int index, group *env, void *data);

struct job {
  task run;
  void *data;
  int count, failed;
};

static void run_task(void *given, size_t index) {
  struct job *job = given;
  group env = {NULL, job->count};
  if (job->run((int)index, &env, job->data)) __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
}

static int launch(task run, void *data, int count) {
  struct worker *worker = here();
  const ort_object *context = worker ? worker->context : NULL;
  struct job job = {run, data, count > 0 ? count : context ? cpu_count() : 1, 0};
  if (!context || job.count == 1) {
    for (int i = 0; i < job.count; i++) run_task(&job, (size_t)i);
    return job.failed ? -1 : 0;
  }
  worker->context = NULL; /* a loop inside a loop: its tasks in turn */
  ort_api api = worker->api;
  ort_status *status = CALL(ort_parallel_for, ORT_KERNEL_CONTEXT_PARALLEL_FOR)(
      context, run_task, (size_t)job.count, 0, &job);
  worker->context = context;
  return status || job.failed ? -1 : 0;
}

static int barrier(int index, group *env) {
  (void)index;
  return env->num_task == 1 ? 0 : -1; /* no kernel of a linear has one */
}

static void *allocate(int device, int number, uint64_t size, int code, int bits) {
  void *data = NULL;
  (void)device, (void)number, (void)code, (void)bits;
  if (size >= SIZE_MAX / 2 || posix_memalign(&data, ALIGNMENT, size ? (size_t)size : 1)) return NULL;
  return data;
}

static int release(int device, int number, void *data) {
  (void)device, (void)number;
  free(data);
  return 0;
}

int (*__TVMBackendParallelLaunch)(task, void *, int) = launch;
int (*__TVMBackendParallelBarrier)(int, group *) = barrier;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = release;

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  struct worker *worker = here();
  if (!worker) return;
  size_t size = sizeof worker->error, used = (size_t)snprintf(worker->error, size, "%s: ", kind);
  for (int i = 0; i < count && used < size; i++)
    if (parts[i]) used += (size_t)snprintf(worker->error + used, size - used, "%s", parts[i]);
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) {
  TVMFFIErrorSetRaisedFromCStrParts(kind, &message, 1);
}

/* One node of a graph. */
struct node {
  ort_api api;
  const struct linear *linear;
  pthread_mutex_t lock;
  uint8_t *weights; /* a copy, where the session's does not lie as kernels need it */
};

static ort_status *create(const ort_custom_op *op, ort_api api, const ort_object *info,
                          void **kernel) {
  int64_t number = 0;
  (void)op;
  TRY(find_number(api, info, compiled_linears.library, compiled_linears.count, &number));
  struct node *node = calloc(1, sizeof *node);
  if (!node) return refuse(api, ORT_FAIL, "not enough memory for an operator");
  node->api = api;
  node->linear = &compiled_linears.linears[number];
  pthread_mutex_init(&node->lock, NULL);
  *kernel = node;
  return NULL;
}

static void destroy(void *given) {
  struct node *node = given;
  pthread_mutex_destroy(&node->lock);
  free(node->weights);
  free(node);
}

static size_t rounded(size_t size) { return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

/* Scratch memory of that many bytes, this thread's own. */
static uint8_t *scratch(struct worker *worker, size_t size) {
  if (worker->size < size) {
    void *data = NULL;
    if (posix_memalign(&data, ALIGNMENT, size)) return NULL;
    free(worker->memory);
    worker->memory = data;
    worker->size = size;
  }
  return worker->memory;
}

static ort_status *find_weights(struct node *node, const ort_object *value, const uint8_t **found) {
  ort_api api = node->api;
  ort_object *shape;
  size_t count;
  void *data;
  TRY(CALL(ort_tensor_data, ORT_GET_TENSOR_MUTABLE_DATA)((ort_object *)value, &data));
  TRY(CALL(ort_tensor_shape, ORT_GET_TENSOR_TYPE_AND_SHAPE)(value, &shape));
  ort_status *status =
      CALL(ort_element_count, ORT_GET_TENSOR_SHAPE_ELEMENT_COUNT)(shape, &count);
  CALL(ort_release_shape, ORT_RELEASE_TENSOR_TYPE_AND_SHAPE_INFO)(shape);
  if (status) return status;
  if (count != node->linear->weights)
    return refuse(api, ORT_INVALID_ARGUMENT, "%s: %zu bytes of weights, and its kernels read %llu",
                  node->linear->name, count, (unsigned long long)node->linear->weights);
  *found = data;
  if ((uintptr_t)data % ALIGNMENT == 0) return NULL;
  pthread_mutex_lock(&node->lock);
  if (!node->weights && !posix_memalign((void **)&node->weights, ALIGNMENT, rounded(count)))
    memcpy(node->weights, data, count);
  *found = node->weights;
  pthread_mutex_unlock(&node->lock);
  return *found ? NULL : refuse(api, ORT_FAIL, "not enough memory for a copy of weights");
}

static const struct element {
  uint8_t code, bits; /* DLPack's */
} elements[] = {
    [MODEL_FLOAT32] = {2, 32}, [MODEL_FLOAT64] = {2, 64}, [MODEL_FLOAT16] = {2, 16},
    [MODEL_INT8] = {0, 8},     [MODEL_INT16] = {0, 16},   [MODEL_INT32] = {0, 32},
    [MODEL_INT64] = {0, 64},   [MODEL_UINT8] = {1, 8},    [MODEL_UINT16] = {1, 16},
    [MODEL_UINT32] = {1, 32},  [MODEL_UINT64] = {1, 64},  [MODEL_BOOL] = {6, 8},
};

/* Calls an entry's kernels on as many rows as it is compiled for. */
static int run_entry(const struct entry *entry, const uint8_t *weights, uint8_t *arena,
                     void *const *inputs, void *const *outputs) {
  dl_tensor tensors[entry->tensor_count];
  argument arguments[entry->argument_count];
  for (uint32_t i = 0; i < entry->tensor_count; i++) {
    const struct tensor *given = &entry->tensors[i];
    void *data = given->space == WEIGHTS ? (void *)(uintptr_t)(weights + given->at)
                 : given->space == ARENA ? arena + given->at
                 : given->space == INPUT ? inputs[given->at]
                                         : outputs[given->at];
    tensors[i] = (dl_tensor){.data = data,
                             .device_type = DL_CPU,
                             .rank = given->rank,
                             .type = {elements[given->dtype].code, elements[given->dtype].bits, 1},
                             .shape = (int64_t *)(uintptr_t)given->shape};
  }
  for (uint32_t i = 0; i < entry->argument_count; i++)
    arguments[i] = (argument){.type_index = ARGUMENT_TENSOR,
                              .value.pointer = &tensors[entry->arguments[i]]};
  for (uint32_t s = 0; s < entry->step_count; s++) {
    argument result = {0};
    const struct step *step = &entry->steps[s];
    if (step->run(NULL, arguments + step->first, (int32_t)step->count, &result)) return -1;
  }
  return 0;
}

static ort_status *compute(void *given, ort_object *context) {
  struct node *node = given;
  const struct linear *linear = node->linear;
  ort_api api = node->api;
  const ort_object *weights_value;
  const uint8_t *weights;
  int64_t sizes[MAX_DIMENSIONS];
  size_t rank, count, rows = 1;
  float *xs[MAX_INPUTS];
  void *ys[MAX_OUTPUTS];
  TRY(CALL(ort_input, ORT_KERNEL_CONTEXT_GET_INPUT)(context, 0, &weights_value));
  TRY(find_weights(node, weights_value, &weights));
  TRY(find_input(api, context, 1, &xs[0], &count, sizes, &rank));
  if (rank < 1 || rank > MAX_DIMENSIONS || sizes[rank - 1] != linear->depth)
    return refuse(api, ORT_INVALID_ARGUMENT, "%s reads rows of %lld numbers, not of %lld",
                  linear->name, (long long)linear->depth,
                  rank >= 1 && rank <= MAX_DIMENSIONS ? (long long)sizes[rank - 1] : 0LL);
  for (size_t i = 0; i + 1 < rank; i++) rows *= (size_t)sizes[i];
  for (int i = 1; i < linear->inputs; i++) {
    TRY(find_input(api, context, (size_t)i + 1, &xs[i], &count, NULL, NULL));
    if (count != rows * (size_t)linear->depth)
      return refuse(api, ORT_INVALID_ARGUMENT, "%s reads tensors of one shape, not %zu numbers beside %zu",
                    linear->name, count, rows * (size_t)linear->depth);
  }
  for (int i = 0; i < linear->outputs; i++) {
    ort_object *value;
    sizes[rank - 1] = linear->columns[i];
    TRY(CALL(ort_output, ORT_KERNEL_CONTEXT_GET_OUTPUT)(context, (size_t)i, sizes, rank, &value));
    TRY(CALL(ort_tensor_data, ORT_GET_TENSOR_MUTABLE_DATA)(value, &ys[i]));
  }
  struct worker *worker = here();
  if (!worker) return refuse(api, ORT_FAIL, "not enough memory for an operator");
  worker->api = api;
  worker->error[0] = 0;
  size_t done = 0;
  for (int e = linear->entry_count - 1; e >= 0; e--) {
    const struct entry *entry = &linear->entries[e];
    size_t step = (size_t)entry->sizes[0], at[MAX_OUTPUTS], size = rounded((size_t)entry->arena);
    size_t input_size = rounded(step * (size_t)linear->depth * sizeof(float)), input_at = size;
    size += input_size * (size_t)linear->inputs;
    for (int i = 0; i < linear->outputs; i++) {
      at[i] = size;
      size += rounded(step * (size_t)linear->columns[i] * sizeof(float));
    }
    for (; rows - done >= step; done += step) {
      uint8_t *memory = scratch(worker, size);
      if (!memory) return refuse(api, ORT_FAIL, "not enough memory for an operator");
      /* Kernels want aligned rows; those that lie elsewhere are copied. */
      void *inputs[MAX_INPUTS], *outputs[MAX_OUTPUTS];
      for (int i = 0; i < linear->inputs; i++) {
        inputs[i] = xs[i] + done * (size_t)linear->depth;
        if ((uintptr_t)inputs[i] % ALIGNMENT)
          inputs[i] = memcpy(memory + input_at + (size_t)i * input_size, inputs[i],
                             step * (size_t)linear->depth * sizeof(float));
      }
      for (int i = 0; i < linear->outputs; i++) {
        outputs[i] = (float *)ys[i] + done * (size_t)linear->columns[i];
        if ((uintptr_t)outputs[i] % ALIGNMENT) outputs[i] = memory + at[i];
      }
      worker->context = context;
      int failed = run_entry(entry, weights, memory, inputs, outputs);
      worker->context = NULL;
      if (failed) return refuse(api, ORT_FAIL, "%s failed: %s", linear->name, worker->error);
      for (int i = 0; i < linear->outputs; i++) {
        float *to = (float *)ys[i] + done * (size_t)linear->columns[i];
        if (outputs[i] != (void *)to)
          memcpy(to, outputs[i], step * (size_t)linear->columns[i] * sizeof(float));
      }
    }
  }
  return NULL;
}

/* What an embedding that is tied to a linear reads: integers, as floats. */
static ort_status *look_up(void *given, ort_object *context) {
  struct node *node = given;
  const struct linear *linear = node->linear;
  ort_api api = node->api;
  const ort_object *weights_value;
  const uint8_t *weights;
  const int64_t *ids;
  ort_object *made;
  float *y;
  int64_t sizes[MAX_DIMENSIONS + 1];
  size_t rank, count;
  TRY(CALL(ort_input, ORT_KERNEL_CONTEXT_GET_INPUT)(context, 0, &weights_value));
  TRY(find_weights(node, weights_value, &weights));
  TRY(find_input(api, context, 1, &ids, &count, sizes, &rank));
  if (rank > MAX_DIMENSIONS || !linear->rows)
    return refuse(api, ORT_INVALID_ARGUMENT, "%s: no table for %zu dimensions of ids", linear->name, rank);
  sizes[rank] = linear->depth;
  TRY(CALL(ort_output, ORT_KERNEL_CONTEXT_GET_OUTPUT)(context, 0, sizes, rank + 1, &made));
  TRY(CALL(ort_tensor_data, ORT_GET_TENSOR_MUTABLE_DATA)(made, (void **)&y));
  const int64_t side = linear->side, block = linear->panel * side;
  const int64_t blocks = (linear->depth + side - 1) / side;
  for (size_t i = 0; i < count; i++, y += linear->depth) {
    int64_t id = ids[i] < 0 ? ids[i] + linear->rows : ids[i];
    if (id < 0 || id >= linear->rows)
      return refuse(api, ORT_INVALID_ARGUMENT, "id %lld is outside a table of %lld rows",
                    (long long)ids[i], (long long)linear->rows);
    const int8_t *row = (const int8_t *)weights + linear->at + id / linear->panel * blocks * block +
                        id % linear->panel * side;
    for (int64_t k = 0; k < linear->depth; k++) y[k] = row[k / side * block + k % side];
  }
  return NULL;
}

static const char *product_name(const ort_custom_op *op) { return (void)op, "QuantizedMatMul"; }
static const char *rotation_name(const ort_custom_op *op) { return (void)op, "Rotate"; }
static const char *table_name(const ort_custom_op *op) { return (void)op, "LookUp"; }
static int table_input(const ort_custom_op *op, size_t index) {
  return (void)op, index ? ORT_INT64 : ORT_UINT8;
}
static const char *provider(const ort_custom_op *op) { return (void)op, NULL; }
static int input_type(const ort_custom_op *op, size_t index) {
  return (void)op, index ? ORT_FLOAT : ORT_UINT8;
}
static size_t two(const ort_custom_op *op) { return (void)op, 2; }
static int output_type(const ort_custom_op *op, size_t index) {
  return (void)op, (void)index, ORT_FLOAT;
}
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

#define SAME                        \
  .version = ORT_VERSION,           \
  .provider = provider,             \
  .input_count = two,               \
  .output_type = output_type,       \
  .output_count = one,              \
  .destroy = destroy,               \
  .input_kind = input_kind,         \
  .output_kind = variadic,          \
  .input_memory = memory_kind,      \
  .variadic_inputs = yes,           \
  .alike_inputs = yes,              \
  .variadic_outputs = yes,          \
  .alike_outputs = yes,             \
  .create_kernel = create,          \
  .first_version = yes,             \
  .last_version = latest

static const ort_custom_op operators[] = {
    {.name = product_name, .input_type = input_type, .compute = compute, SAME},
    {.name = rotation_name, .input_type = input_type, .compute = compute, SAME},
    {.name = table_name, .input_type = table_input, .compute = look_up, SAME},
};

/* What ONNX Runtime calls when the library is given to a session's options. */
ort_status *RegisterCustomOps(ort_object *options, const ort_base *base) {
  char lacking[40];
  ort_api api = NULL;
  TRY(find_api(base, &api));
  if (cpu_lacks(compiled_linears.features, lacking, sizeof lacking))
    return refuse(api, ORT_NOT_IMPLEMENTED,
                  "this CPU lacks '%s', which the code for %s needs; compile the model for a "
                  "target that this CPU has",
                  lacking, compiled_linears.target);
  pthread_once(&once, start);
  return join(options, api, operators, sizeof operators / sizeof *operators);
}
