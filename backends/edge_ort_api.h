/* The part of ONNX Runtime's C interface that custom operators need, by its binary layout.
 *
 * Its package for Python brings no header. The layout is part of the interface: `OrtApi` is a table
 * of functions whose places never change (newer versions add to its end, and GetApi(version) gives
 * none to a library that asks for more than there is), and `OrtCustomOp` says which version it was
 * written for. Places, by number, and signatures are those of onnxruntime_c_api.h (1.31);
 * tests/backends/test_ort_generated.py compares them with that file where it is installed. */
#ifndef EDGE_ORT_API_H
#define EDGE_ORT_API_H

#include <stddef.h>
#include <stdint.h>

enum { ORT_VERSION = 18 }; /* of the interface: ONNX Runtime 1.18 and later */
enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9 };
enum { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT64 = 7, ORT_FLOAT16 = 10 }; /* ONNXTensorElementDataType */
enum { ORT_REQUIRED, ORT_OPTIONAL, ORT_VARIADIC };    /* OrtCustomOpInputOutputCharacteristic */

/* Opaque, each its own type in the original. */
typedef struct ort_status ort_status;
typedef void ort_object;
typedef const void *const *ort_api; /* OrtApi: pointers to functions */

typedef struct {
  ort_api (*get_api)(uint32_t version);
  const char *(*version)(void);
} ort_base;

/* Places in OrtApi. */
enum {
  ORT_CREATE_STATUS = 0,
  ORT_CREATE_CUSTOM_OP_DOMAIN = 26,
  ORT_CUSTOM_OP_DOMAIN_ADD = 27,
  ORT_ADD_CUSTOM_OP_DOMAIN = 28,
  ORT_GET_TENSOR_MUTABLE_DATA = 51,
  ORT_GET_DIMENSIONS_COUNT = 61,
  ORT_GET_DIMENSIONS = 62,
  ORT_GET_TENSOR_SHAPE_ELEMENT_COUNT = 64,
  ORT_GET_TENSOR_TYPE_AND_SHAPE = 65,
  ORT_KERNEL_INFO_GET_ATTRIBUTE_INT64 = 86,
  ORT_KERNEL_CONTEXT_GET_INPUT = 90,
  ORT_KERNEL_CONTEXT_GET_OUTPUT = 91,
  ORT_RELEASE_TENSOR_TYPE_AND_SHAPE_INFO = 99,
  ORT_KERNEL_CONTEXT_GET_GPU_COMPUTE_STREAM = 193,
  ORT_KERNEL_CONTEXT_PARALLEL_FOR = 274
};

/* Their types. */
typedef ort_status *(*ort_create_status)(int code, const char *message);
typedef ort_status *(*ort_create_domain)(const char *name, ort_object **domain);
typedef ort_status *(*ort_domain_add)(ort_object *domain, const void *custom_op);
typedef ort_status *(*ort_add_domain)(ort_object *options, ort_object *domain);
typedef ort_status *(*ort_tensor_data)(ort_object *value, void **data);
typedef ort_status *(*ort_tensor_shape)(const ort_object *value, ort_object **shape);
typedef ort_status *(*ort_rank)(const ort_object *shape, size_t *rank);
typedef ort_status *(*ort_dimensions)(const ort_object *shape, int64_t *sizes, size_t count);
typedef ort_status *(*ort_element_count)(const ort_object *shape, size_t *count);
typedef void (*ort_release_shape)(ort_object *shape);
typedef ort_status *(*ort_attribute_int)(const ort_object *info, const char *name, int64_t *value);
typedef ort_status *(*ort_input)(const ort_object *context, size_t index, const ort_object **value);
typedef ort_status *(*ort_output)(ort_object *context, size_t index, const int64_t *sizes,
                                  size_t rank, ort_object **value);
typedef ort_status *(*ort_parallel_for)(const ort_object *context, void (*run)(void *, size_t),
                                        size_t total, size_t batches, void *data);
typedef ort_status *(*ort_gpu_stream)(const ort_object *context, void **stream);

/* OrtCustomOp; what is NULL is not asked. */
typedef struct ort_custom_op {
  uint32_t version;
  void *(*create_kernel_1)(const struct ort_custom_op *, ort_api, const ort_object *info);
  const char *(*name)(const struct ort_custom_op *);
  const char *(*provider)(const struct ort_custom_op *); /* NULL: the CPU's */
  int (*input_type)(const struct ort_custom_op *, size_t index);
  size_t (*input_count)(const struct ort_custom_op *);
  int (*output_type)(const struct ort_custom_op *, size_t index);
  size_t (*output_count)(const struct ort_custom_op *);
  void (*compute_1)(void *kernel, ort_object *context);
  void (*destroy)(void *kernel);
  int (*input_kind)(const struct ort_custom_op *, size_t index);
  int (*output_kind)(const struct ort_custom_op *, size_t index);
  int (*input_memory)(const struct ort_custom_op *, size_t index); /* 0: the provider's own */
  int (*variadic_inputs)(const struct ort_custom_op *);
  int (*alike_inputs)(const struct ort_custom_op *);
  int (*variadic_outputs)(const struct ort_custom_op *);
  int (*alike_outputs)(const struct ort_custom_op *);
  ort_status *(*create_kernel)(const struct ort_custom_op *, ort_api, const ort_object *info,
                               void **kernel);
  ort_status *(*compute)(void *kernel, ort_object *context);
  ort_status *(*infer_shapes)(const struct ort_custom_op *, ort_object *context);
  int (*first_version)(const struct ort_custom_op *);
  int (*last_version)(const struct ort_custom_op *);
  size_t (*in_place)(int **inputs, int **outputs);
  void (*release_in_place)(int *inputs, int *outputs);
  size_t (*aliases)(int **inputs, int **outputs);
  void (*release_aliases)(int *inputs, int *outputs);
} ort_custom_op;

#endif
