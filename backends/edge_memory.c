/* The memory of a model: the weights as a mapped file, and one block for everything else. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "edge_runtime.h"

/* What the system may hand out as one huge page on x86-64, ARM and RISC-V with small pages of 4 KiB. */
#define HUGE_PAGE ((size_t)2 << 20)

static const struct program *const P = &compiled;

static uint64_t padded(uint64_t size) { return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

/* Zeros for at least `*size` bytes, and how many in `*size`; NULL where memory is short. Where they
 * fill several huge pages they are asked for as such: reading through small ones took twice as long
 * (Zen 4, 80 MB). Pages that are not touched take no memory. */
static uint8_t *take_pages(size_t *size) {
  int huge = *size >= 2 * HUGE_PAGE;
  size_t unit = huge ? HUGE_PAGE : 4096, slack = huge ? HUGE_PAGE : 0;
  if (*size > SIZE_MAX / 2) return NULL;
  *size = (*size + unit) / unit * unit; /* at least one byte more, so that it is never nothing */
  uint8_t *data = mmap(NULL, *size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return NULL;
  if (huge) {
    size_t before = (unit - (uintptr_t)data % unit) % unit;
    if (before) munmap(data, before);
    data += before;
    if (slack > before) munmap(data + *size, slack - before);
#ifdef MADV_HUGEPAGE
    madvise(data, *size, MADV_HUGEPAGE); /* a wish: nothing depends on it */
#endif
  }
  return data;
}

/* Two sums over 64-bit words, as Fletcher's: the second one sees the order. The end counts as
 * filled up with zeros. */
static void checksum(const uint8_t *data, size_t size, uint64_t sums[2]) {
  uint64_t a = 0, b = 0, word;
  size_t i = 0;
  for (; i + 8 <= size; i += 8) {
    memcpy(&word, data + i, 8);
    a += word;
    b += a;
  }
  if (i < size) {
    word = 0;
    memcpy(&word, data + i, size - i);
    a += word;
    b += a;
  }
  sums[0] = a;
  sums[1] = b;
}

int map_weights(model *m, const char *path) {
  struct stat status;
  uint64_t sums[2];
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return REFUSE("%s cannot be read: %s", path, strerror(errno));
  if (fstat(file, &status) || !S_ISREG(status.st_mode)) {
    close(file);
    return REFUSE("%s is no file", path);
  }
  if ((uint64_t)status.st_size != P->weights) {
    close(file);
    return REFUSE(
        "%s has %lld bytes, and this model's weights have %llu: it is truncated or another model's",
        path, (long long)status.st_size, (unsigned long long)P->weights);
  }
  if (P->weights > 0) {
    void *data = mmap(NULL, (size_t)P->weights, PROT_READ, MAP_SHARED, file, 0);
    if (data == MAP_FAILED) {
      close(file);
      return REFUSE("%s cannot be mapped into memory: %s", path, strerror(errno));
    }
    m->weights = data;
    m->weights_size = (size_t)P->weights;
  }
  close(file);
  checksum(m->weights, (size_t)P->weights, sums);
  if (sums[0] != P->checksum[0] || sums[1] != P->checksum[1])
    return REFUSE("%s is corrupt or another model's: its checksum differs", path);
  return 0;
}

/* Arena, state and ports in one block, each as large as the largest entry needs. */
int take_memory(model *m) {
  int ports = P->input_count + P->output_count, steps = steps_before(P->entry_count);
  uint64_t arena = 0, total, *sizes = calloc((size_t)ports + 1, sizeof *sizes);
  m->ports = calloc((size_t)ports + 1, sizeof *m->ports);
  m->seconds = calloc((size_t)steps + 1, sizeof *m->seconds);
  m->runs = calloc((size_t)steps + 1, sizeof *m->runs);
  if (!sizes || !m->ports || !m->seconds || !m->runs) goto short_of_memory;
  for (int e = 0; e < P->entry_count; e++) {
    if (P->entries[e].arena > arena) arena = P->entries[e].arena;
    for (int i = 0; i < ports; i++) {
      const model_port *port =
          i < P->input_count ? &P->inputs[i] : &P->outputs[i - P->input_count];
      uint64_t size = port_bytes(port, P->entries[e].sizes);
      if (size > sizes[i]) sizes[i] = size;
    }
  }
  total = padded(arena) + padded(P->state);
  for (int i = 0; i < ports; i++) total += padded(sizes[i]);
  m->memory_size = (size_t)total;
  if (total > SIZE_MAX / 2 || !(m->memory = take_pages(&m->memory_size))) goto short_of_memory;
  m->arena = m->memory;
  m->state = m->arena + padded(arena);
  total = padded(arena) + padded(P->state);
  for (int i = 0; i < ports; i++) {
    m->ports[i] = m->memory + total;
    total += padded(sizes[i]);
  }
  free(sizes);
  return 0;

short_of_memory:
  free(sizes);
  return REFUSE("not enough memory for the model's intermediate results");
}

void give_memory(model *m) {
  if (m->memory) munmap(m->memory, m->memory_size);
  if (m->weights) munmap((void *)(uintptr_t)m->weights, m->weights_size);
}

int model_copy_weights(model *m) {
  size_t size = (size_t)P->weights;
  if (m->copied || !size) return 0;
  uint8_t *copy = take_pages(&size);
  if (!copy) return FAIL(m, "not enough memory for a copy of the weights");
  memcpy(copy, m->weights, (size_t)P->weights);
  mprotect(copy, size, PROT_READ);
  munmap((void *)(uintptr_t)m->weights, m->weights_size);
  m->weights = copy;
  m->weights_size = size;
  m->copied = 1;
  for (int e = 0; e < P->entry_count; e++)
    for (uint32_t i = 0; i < P->entries[e].tensor_count; i++)
      if (P->entries[e].tensors[i].space == WEIGHTS)
        m->plans[e].tensors[i].data = copy + P->entries[e].tensors[i].at;
  return 0;
}
