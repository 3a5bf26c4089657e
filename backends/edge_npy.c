/* NumPy's .npy format, numpy/lib/format.py: magic, version, length of the header, the header as a
 * Python dictionary, the numbers. Nothing in a file is believed before it is checked. */
#define _GNU_SOURCE
#include "edge_npy.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const struct {
  const char *name, *code;
  size_t size;
} types[] = {
    [MODEL_FLOAT32] = {"float32", "<f4", 4}, [MODEL_FLOAT64] = {"float64", "<f8", 8},
    [MODEL_FLOAT16] = {"float16", "<f2", 2}, [MODEL_INT8] = {"int8", "|i1", 1},
    [MODEL_INT16] = {"int16", "<i2", 2},     [MODEL_INT32] = {"int32", "<i4", 4},
    [MODEL_INT64] = {"int64", "<i8", 8},     [MODEL_UINT8] = {"uint8", "|u1", 1},
    [MODEL_UINT16] = {"uint16", "<u2", 2},   [MODEL_UINT32] = {"uint32", "<u4", 4},
    [MODEL_UINT64] = {"uint64", "<u8", 8},   [MODEL_BOOL] = {"bool", "|b1", 1},
};

const char *npy_name(model_dtype dtype) { return types[dtype].name; }

size_t npy_size(model_dtype dtype) { return types[dtype].size; }

/* The part of the header that is not read yet. */
struct text {
  const char *at, *end;
};

static void skip_spaces(struct text *t) {
  while (t->at < t->end && (*t->at == ' ' || *t->at == '\n' || *t->at == '\t')) t->at++;
}

static int take(struct text *t, char wanted) {
  skip_spaces(t);
  if (t->at == t->end || *t->at != wanted) return 0;
  t->at++;
  return 1;
}

/* A quoted string of less than `size` characters, without escapes. */
static int take_string(struct text *t, char *text, size_t size) {
  size_t length = 0;
  skip_spaces(t);
  if (t->at == t->end || (*t->at != '\'' && *t->at != '"')) return 0;
  char quote = *t->at++;
  while (t->at < t->end && *t->at != quote) {
    if (*t->at == '\\' || length + 1 >= size) return 0;
    text[length++] = *t->at++;
  }
  if (t->at == t->end) return 0;
  t->at++;
  text[length] = 0;
  return 1;
}

static int take_word(struct text *t, const char *word) {
  size_t length = strlen(word);
  skip_spaces(t);
  if ((size_t)(t->end - t->at) < length || memcmp(t->at, word, length)) return 0;
  t->at += length;
  return 1;
}

static const char *take_shape(struct text *t, model_tensor *array) {
  array->rank = 0;
  if (!take(t, '(')) return "its shape is no tuple";
  while (!take(t, ')')) {
    int64_t size = 0;
    int digits = 0;
    if (array->rank == MODEL_MAX_RANK) return "it has more than 8 dimensions";
    skip_spaces(t);
    for (; t->at < t->end && *t->at >= '0' && *t->at <= '9'; t->at++, digits++) {
      if (size > (INT64_MAX - 9) / 10) return "a size in its shape is too large";
      size = size * 10 + (*t->at - '0');
    }
    if (!digits) return "its shape is no tuple of numbers";
    array->shape[array->rank++] = size;
    if (!take(t, ',')) {
      if (!take(t, ')')) return "its shape is no tuple of numbers";
      /* In Python, (3) is a number and no tuple. */
      return array->rank == 1 ? "its shape is no tuple" : NULL;
    }
  }
  return NULL;
}

static const char *take_type(struct text *t, model_tensor *array) {
  char code[16];
  if (!take_string(t, code, sizeof code)) return "its dtype is no plain number format";
  for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
    if (strcmp(code, types[i].code)) continue;
    array->dtype = (model_dtype)i;
    return NULL;
  }
  if (code[0] == '>') return "its numbers are big-endian; save it with x.astype(x.dtype.newbyteorder('<'))";
  return "its dtype is none of bool, int8 … int64, uint8 … uint64, float16, float32, float64";
}

static const char *parse_header(struct text t, model_tensor *array) {
  enum { DESCR = 1, ORDER = 2, SHAPE = 4 };
  int seen = 0;
  const char *problem = NULL;
  if (!take(&t, '{')) return "its header is no dictionary";
  while (!take(&t, '}')) {
    char key[16];
    if (!take_string(&t, key, sizeof key) || !take(&t, ':')) return "its header is malformed";
    int which = !strcmp(key, "descr")           ? DESCR
                : !strcmp(key, "fortran_order") ? ORDER
                : !strcmp(key, "shape")         ? SHAPE
                                                : 0;
    if (!which || seen & which) return "its header has an unknown key, or a key twice";
    seen |= which;
    if (which == DESCR)
      problem = take_type(&t, array);
    else if (which == SHAPE)
      problem = take_shape(&t, array);
    else if (take_word(&t, "True"))
      problem = "it is in Fortran order; save numpy.ascontiguousarray(x)";
    else if (!take_word(&t, "False"))
      problem = "its header is malformed";
    if (problem) return problem;
    if (!take(&t, ',')) {
      if (!take(&t, '}')) return "its header is malformed";
      break;
    }
  }
  skip_spaces(&t);
  if (t.at != t.end) return "its header is malformed";
  return seen == (DESCR | ORDER | SHAPE) ? NULL : "its header lacks descr, fortran_order or shape";
}

int npy_parse(const unsigned char *file, size_t length, model_tensor *array, const char **problem) {
  size_t start, header, size;
  *problem = NULL;
  if (length < 10 || memcmp(file, "\x93NUMPY", 6)) {
    *problem = "it is no .npy file";
    return -1;
  }
  if (file[6] < 1 || file[6] > 3 || file[7]) {
    *problem = "it is of an unknown version of the .npy format";
    return -1;
  }
  start = file[6] == 1 ? 10 : 12;
  if (length < start) {
    *problem = "it is truncated";
    return -1;
  }
  header = (size_t)file[8] | (size_t)file[9] << 8;
  if (start == 12) header |= (size_t)file[10] << 16 | (size_t)file[11] << 24;
  if (header > length - start) {
    *problem = "it is truncated";
    return -1;
  }
  const char *text = (const char *)file + start;
  *problem = parse_header((struct text){text, text + header}, array);
  if (*problem) return -1;
  size = types[array->dtype].size;
  for (int i = 0; i < array->rank; i++) {
    uint64_t extent = (uint64_t)array->shape[i];
    if (extent && size > (SIZE_MAX / 2) / extent) {
      *problem = "its shape is too large";
      return -1;
    }
    size *= (size_t)extent;
  }
  if (size != length - start - header) {
    *problem = size > length - start - header ? "it is truncated" : "it goes on after its numbers";
    return -1;
  }
  array->data = (void *)(uintptr_t)(file + start + header);
  return 0;
}

int npy_read(const char *path, model_tensor *array, char *error, size_t size) {
  struct stat status;
  void *file = NULL, *data = NULL;
  const char *problem = NULL;
  FILE *stream = fopen(path, "rb");
  if (!stream || fstat(fileno(stream), &status)) {
    problem = strerror(errno);
  } else if (!S_ISREG(status.st_mode)) {
    problem = "it is no file";
  } else {
    size_t length = (size_t)status.st_size;
    file = malloc(length ? length : 1);
    if (!file)
      problem = "it does not fit into memory";
    else if (fread(file, 1, length, stream) != length)
      problem = "it cannot be read";
    else if (!npy_parse(file, length, array, &problem)) {
      size_t bytes = length - (size_t)((unsigned char *)array->data - (unsigned char *)file);
      if (posix_memalign(&data, 64, bytes ? bytes : 1)) {
        problem = "it does not fit into memory";
      } else {
        memcpy(data, array->data, bytes);
        array->data = data;
      }
    }
  }
  free(file);
  if (stream) fclose(stream);
  if (problem) snprintf(error, size, "%s: %s", path, problem);
  return problem ? -1 : 0;
}

int npy_write(const char *path, const model_tensor *array, char *error, size_t size) {
  char shape[MODEL_MAX_RANK * 24] = "", header[512];
  size_t used = 0, bytes = types[array->dtype].size;
  for (int i = 0; i < array->rank; i++) {
    used += (size_t)snprintf(shape + used, sizeof shape - used, "%s%lld", i ? ", " : "",
                             (long long)array->shape[i]);
    bytes *= (size_t)array->shape[i];
  }
  int length = snprintf(header, sizeof header, "{'descr': '%s', 'fortran_order': False, 'shape': (%s%s), }",
                        types[array->dtype].code, shape, array->rank == 1 ? "," : "");
  /* The numbers start at a multiple of 64. */
  int total = (10 + length + 1 + 63) / 64 * 64 - 10;
  unsigned char start[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)(total & 255),
                             (unsigned char)(total >> 8)};
  FILE *stream = fopen(path, "wb");
  if (!stream) {
    snprintf(error, size, "%s: %s", path, strerror(errno));
    return -1;
  }
  int done = fwrite(start, 1, 10, stream) == 10 &&
             fprintf(stream, "%-*s\n", total - 1, header) == total &&
             fwrite(array->data, 1, bytes, stream) == bytes;
  if (fclose(stream) || !done) {
    snprintf(error, size, "%s: cannot be written: %s", path, strerror(errno));
    return -1;
  }
  return 0;
}
