/* model.h: run a compiled model. C99 and C++; link with libmodel.a or libmodel.so, and -lm -lpthread.
 *
 *     model *m = model_create("weights.bin", 1);
 *     model_tensor input = {MODEL_FLOAT32, 2, {1, 64}, numbers}, output;
 *     if (!m || model_run(m, &input, &output)) puts(model_error(m));
 *     model_destroy(m);
 *
 * A function that can fail returns NULL or a number that is not 0; model_error() then says what is
 * wrong, where, and what to do, in one line. No function prints or ends the process.
 *
 * Threads: several models, also several made from one library, may run at the same time on different
 * threads. One model is used by one thread at a time; model_run() refuses a second one. Results are
 * the same, bit for bit, whatever the number of threads.
 *
 * Memory: all of it is taken in model_create() and in the first run of each size; later runs take none.
 *
 * Processes: a child of fork() may destroy its copy of a model, and create its own; not run it.
 */
#ifndef MODEL_H
#define MODEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this interface. It changes when a program compiled with an older header would not
 * run any more; model_version() is the library's. */
#define MODEL_VERSION 1

/* Dimensions of a tensor at most. */
#define MODEL_MAX_RANK 8

/* Element types. MODEL_BOOL is a byte 0 or 1; bfloat16 numbers go as MODEL_UINT16, their bits. */
typedef enum {
  MODEL_FLOAT32,
  MODEL_FLOAT64,
  MODEL_FLOAT16,
  MODEL_INT8,
  MODEL_INT16,
  MODEL_INT32,
  MODEL_INT64,
  MODEL_UINT8,
  MODEL_UINT16,
  MODEL_UINT32,
  MODEL_UINT64,
  MODEL_BOOL
} model_dtype;

/* An array in row-major order without gaps. `data` may have any alignment; an input whose address is
 * a multiple of 64 and that needs no padding is read where it lies, others are copied. */
typedef struct {
  model_dtype dtype;
  int rank;
  int64_t shape[MODEL_MAX_RANK];
  void *data;
} model_tensor;

/* An input or output. `shape[i]` is −1 where the size may vary; `sizes[i]` is then its name, and
 * NULL where it may not. Sizes of one name are equal in one run. */
typedef struct {
  const char *name;
  model_dtype dtype;
  int rank;
  int64_t shape[MODEL_MAX_RANK];
  const char *sizes[MODEL_MAX_RANK];
} model_port;

typedef struct model model;

/* The version of the library; compare with MODEL_VERSION. */
int model_version(void);

/* The target that the library was compiled for, such as "tvm:aarch64:dotprod". */
const char *model_target(void);

/* The CPU features that the code needs, separated by spaces, such as "neon dotprod". */
const char *model_features(void);

/* Makes a model ready to run.
 *
 * weights: path of weights.bin, which is mapped into memory and must not change while it is in use.
 *          Its size and checksum are verified.
 * threads: how many threads compute, the caller's among them; 0 for one per CPU of the process.
 * Returns NULL on failure, and model_error(NULL) says why: the CPU lacks a feature, the file is not
 * the one compiled with this library, memory is short. */
model *model_create(const char *weights, int threads);

/* Frees a model; NULL is allowed. The tensors that model_run() gave become invalid. */
void model_destroy(model *m);

/* Why the last call on this model failed, in one line; "" when none did. For NULL, why the last
 * model_create() on this thread failed. */
const char *model_error(const model *m);

/* How many threads compute. */
int model_threads(const model *m);

/* How many inputs and outputs there are, and the one with that number, from 0; NULL if there is none.
 * They need no model. */
int model_input_count(void);
int model_output_count(void);
const model_port *model_input(int index);
const model_port *model_output(int index);

/* The combinations of sizes that were compiled: how many there are, and the size called `name` in the
 * one with that number; −1 if there is none. Inputs in between are padded to the next
 * combination, or refused where a size cannot be padded. */
int model_entry_count(void);
int64_t model_entry_size(int index, const char *name);

/* Computes the outputs of `inputs` (model_input_count() of them) and describes them in `outputs`
 * (model_output_count() of them). Their data belong to the model, are 64-byte aligned, and are
 * valid until the next run or model_destroy().
 * Returns 0, or another number on failure: wrong dtype or shape, sizes that were not compiled. */
int model_run(model *m, const model_tensor *inputs, model_tensor *outputs);

/* Copies the weights from the mapped file into memory of the process's own, in huge pages where the
 * system gives them. Models that read much more than fits into the caches then run faster (a plain
 * sum over 80 MB by 14 %, on Zen 4), at the price of that memory and of the copy. The model computes
 * the same. Returns 0, or another number when memory is short; the model is then as before. */
int model_copy_weights(model *m);

/* Sets what the model remembers from run to run (such as a language model's cache) back to zero. */
void model_reset(model *m);

/* Language models only: how many tokens the model remembers at most; 0 for other models. */
int64_t model_capacity(void);

/* Language models only: how many different tokens it knows, 0, 1, and so on; 0 for other models. */
int64_t model_vocabulary(void);

/* Language models only: how many tokens the model has read since model_create() or model_reset(). */
int64_t model_position(const model *m);

/* Language models only: reads `count` further tokens, and gives the scores of what comes next.
 *
 * logits: set to the float32 scores of all model_vocabulary() tokens, valid until the next call.
 * Returns 0, or another number on failure: no language model, or more tokens than the capacity. */
int model_read(model *m, const int64_t *tokens, int64_t count, const float **logits);

/* Where the time goes. model_profile() starts (on != 0) or stops measuring and sets all times to
 * zero; model_step() describes one kernel call: a line for people in `label`, the seconds spent in
 * it since then, and how often it ran. It returns 0, or another number when there is no such step. */
void model_profile(model *m, int on);
int model_step(const model *m, int index, const char **label, double *seconds, int64_t *runs);

#ifdef __cplusplus
}
#endif
#endif
