/* Matrix products with fp32 sums: c [m, n] (+)= a [m, k] b [k, n], any strides of a and b. */
#ifndef ZAYA_GEMM_H
#define ZAYA_GEMM_H

#include "vectors.h"

typedef struct {
    const void *data;
    long row; /* elements from one row to the next */
    long column;
} Operand;

typedef struct {
    void *data;
    long row;
    int type;       /* FP32 or BF16 */
    int accumulate; /* add to what is there; FP32 only */
} Result;

/* Memory of the calling thread, kept between calls; each use has its own slot. */
enum Scratch { SCRATCH_RIGHT, SCRATCH_LEFT, SCRATCH_SUMS, SCRATCH_CALLER, SCRATCHES };
void *scratch(enum Scratch slot, size_t bytes);

/* Operands of one type. `threads` share the columns. */
void gemm(long m, long n, long k, Operand a, Operand b, int type, Result c, int threads);

#endif
