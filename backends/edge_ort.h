/* What a generated linears.c gives to edge_ort.c: the compiled operators as constant tables. */
#ifndef EDGE_ORT_H
#define EDGE_ORT_H

#include "edge_ort_api.h"
#include "edge_program.h"

enum { MAX_INPUTS = 8, MAX_OUTPUTS = 16 };

struct linear {
  const char *name;          /* of the layers, for people */
  uint64_t weights;          /* bytes of its constants, which the graph holds */
  int64_t depth;             /* numbers in a row of its inputs */
  const int64_t *columns;    /* numbers in a row of each output */
  int inputs, outputs, entry_count;
  const struct entry *entries; /* by rows, the fewest first; sizes[0] is their number */
  /* Its first weight as a table, int8 [rows / panel][depth / side][panel][side] from byte `at` of
   * the constants on; no rows where it is packed otherwise. */
  int64_t at, panel, side, rows;
};

struct linears {
  const char *target, *features;
  int64_t library; /* known to the model too */
  int count;
  const struct linear *linears;
};

extern const struct linears compiled_linears;

#endif
