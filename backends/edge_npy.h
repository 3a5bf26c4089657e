/* Arrays in NumPy's .npy files, versions 1 to 3, little-endian and in row-major order. */
#ifndef EDGE_NPY_H
#define EDGE_NPY_H

#include "model.h"

/* Reads a file into memory of its own, 64-byte aligned, to be freed with free(array->data).
 * Returns 0; or −1 and writes one line about what is wrong with the file. */
int npy_read(const char *path, model_tensor *array, char *error, size_t size);

/* Reads from memory: what npy_read() does with a file's content. The numbers stay where they are. */
int npy_parse(const unsigned char *file, size_t length, model_tensor *array, const char **problem);

/* Writes a file, replacing one that is there. */
int npy_write(const char *path, const model_tensor *array, char *error, size_t size);

/* The dtype's name, such as "float32", and its bytes. */
const char *npy_name(model_dtype dtype);
size_t npy_size(model_dtype dtype);

#endif
