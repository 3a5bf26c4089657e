/* What libraries of custom operators do alike: calls of ONNX Runtime, errors, registration. */
#ifndef EDGE_ORT_CALL_H
#define EDGE_ORT_CALL_H

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>

#include "edge_ort_api.h"

enum { MAX_DIMENSIONS = 32 };

#define CALL(type, place) ((type)(uintptr_t)api[place])
#define TRY(call)                   \
  do {                              \
    ort_status *found = (call);     \
    if (found) return found;        \
  } while (0)

static ort_status *refuse(ort_api api, int code, const char *format, ...) {
  char text[600];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  return CALL(ort_create_status, ORT_CREATE_STATUS)(code, text);
}

/* The numbers in input `index` and, where asked for, the sizes of its dimensions. */
static ort_status *find_input(ort_api api, const ort_object *context, size_t index, void *data,
                              size_t *count, int64_t *sizes, size_t *rank) {
  const ort_object *value;
  ort_object *shape;
  TRY(CALL(ort_input, ORT_KERNEL_CONTEXT_GET_INPUT)(context, index, &value));
  TRY(CALL(ort_tensor_data, ORT_GET_TENSOR_MUTABLE_DATA)((ort_object *)value, (void **)data));
  TRY(CALL(ort_tensor_shape, ORT_GET_TENSOR_TYPE_AND_SHAPE)(value, &shape));
  ort_status *status =
      CALL(ort_element_count, ORT_GET_TENSOR_SHAPE_ELEMENT_COUNT)(shape, count);
  if (!status && rank) status = CALL(ort_rank, ORT_GET_DIMENSIONS_COUNT)(shape, rank);
  if (!status && rank && *rank >= 1 && *rank <= MAX_DIMENSIONS)
    status = CALL(ort_dimensions, ORT_GET_DIMENSIONS)(shape, sizes, *rank);
  CALL(ort_release_shape, ORT_RELEASE_TENSOR_TYPE_AND_SHAPE_INFO)(shape);
  return status;
}

/* Which of the library's operators a node of a graph is. */
static ort_status *find_number(ort_api api, const ort_object *info, int64_t library, int count,
                               int64_t *number) {
  int64_t made = 0;
  TRY(CALL(ort_attribute_int, ORT_KERNEL_INFO_GET_ATTRIBUTE_INT64)(info, "number", number));
  TRY(CALL(ort_attribute_int, ORT_KERNEL_INFO_GET_ATTRIBUTE_INT64)(info, "library", &made));
  if (made == library && *number >= 0 && *number < count) return NULL;
  return refuse(api, ORT_INVALID_ARGUMENT,
                "libqcompiler_ort.so is not the one that this model was compiled with; take "
                "both files from one artifact, and where the folder was compiled again start a "
                "new process: a library stays loaded");
}

static ort_status *find_api(const ort_base *base, ort_api *api) {
  *api = base->get_api(ORT_VERSION);
  if (*api) return NULL;
  return refuse(base->get_api(1), ORT_NOT_IMPLEMENTED,
                "libqcompiler_ort.so needs ONNX Runtime 1.%d or later, this is %s", ORT_VERSION,
                base->version());
}

/* Give a session's options the operators. */
static ort_status *join(ort_object *options, ort_api api, const ort_custom_op *operators,
                        size_t count) {
  static ort_object *domain; /* for all sessions, as long as the library is loaded */
  static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  ort_status *status = NULL;
  pthread_mutex_lock(&lock);
  if (!domain) {
    ort_object *made = NULL;
    status = CALL(ort_create_domain, ORT_CREATE_CUSTOM_OP_DOMAIN)("qcompiler", &made);
    for (size_t i = 0; !status && i < count; i++)
      status = CALL(ort_domain_add, ORT_CUSTOM_OP_DOMAIN_ADD)(made, &operators[i]);
    if (!status) domain = made;
  }
  pthread_mutex_unlock(&lock);
  if (status) return status;
  return CALL(ort_add_domain, ORT_ADD_CUSTOM_OP_DOMAIN)(options, domain);
}

#endif
