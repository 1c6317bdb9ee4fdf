/* Residual scaling and the RMSNorm behind it, one pass over the rows each way; either half alone is
 * the same with the other left out. The backward makes the scaled stream again. A row at a time:
 * rows of several tensors at once fall on the same lines of a cache. Sums over rows are
 * fp32 over SPAN rows, then fp64, over parts of the rows that threads do not change. */
#include "gemm.h"

#define SPAN 32

typedef struct {
    long rows, width, stream, branch, normed, threads, parts; /* types of the tensors so named */
    float eps;
} Shape;

typedef struct {
    const void *stream, *branch; /* [rows, width]; no branch: no residual */
    const float *stream_scale, *stream_bias, *branch_scale, *branch_bias, *weight; /* [width] */
} Inputs;

typedef struct {
    const float *rstd;                                   /* [rows] */
    const void *grad_out, *grad_normed;                  /* either may be absent */
    void *to_stream, *to_branch;
    double *sums;                                        /* [parts, 4, width], zero at first */
    float *to_vectors;                                   /* [5, width], in the order of Inputs */
} Gradients;

enum { WEIGHT, TOTAL, STREAM, BRANCH, SUMS }; /* of one column */

/* Types of stream, branch and normed rows: constants where the calls below give constants. */
typedef struct {
    int stream, branch, normed;
} Kinds;

/* (stream + b) a + (branch + b') a' of the columns from c on. */
INLINE vec scaled(const Inputs *in, long c, long left, vec stream, vec branch) {
    stream += load_few(in->stream_bias, FP32, c, left);
    branch += load_few(in->branch_bias, FP32, c, left);
    return stream * load_few(in->stream_scale, FP32, c, left) +
           branch * load_few(in->branch_scale, FP32, c, left);
}

INLINE void forward_row(Shape s, Inputs in, void *out, void *normed, float *rstd, long row,
                        Kinds k) {
    long first = row * s.width;
    vec squares = all(0);
    for (long c = 0; c < s.width; c += LANES) {
        long left = s.width - c;
        vec x = load_few(in.stream, k.stream, first + c, left);
        if (in.branch) {
            x = scaled(&in, c, left, x, load_few(in.branch, k.branch, first + c, left));
            store_few(out, FP32, first + c, left, x);
        }
        squares += x * x;
    }
    if (!normed) return;
    const void *from = in.branch ? out : in.stream;
    float scale = (float)(1 / sqrt((double)total(squares) / s.width + s.eps));
    rstd[row] = scale;
    for (long c = 0; c < s.width; c += LANES) {
        long left = s.width - c;
        vec x = load_few(from, in.branch ? FP32 : k.stream, first + c, left);
        vec weight = load_few(in.weight, FP32, c, left);
        store_few(normed, k.normed, first + c, left, x * scale * weight);
    }
}

/* The normed row without weight into `x`; returns the mean of it times its gradient. */
INLINE float norm_again(Shape s, Inputs in, Gradients g, float *x, float *sums, long row,
                        Kinds k) {
    long first = row * s.width;
    float scale = g.rstd[row];
    vec dots = all(0);
    for (long c = 0; c < s.width; c += LANES) {
        long left = s.width - c;
        vec own = load_few(in.stream, k.stream, first + c, left);
        if (in.branch)
            own = scaled(&in, c, left, own, load_few(in.branch, k.branch, first + c, left));
        own *= scale;
        vec product = own * load_few(g.grad_normed, k.normed, first + c, left);
        *(vec *)(sums + c) += product;
        *(vec *)(x + c) = own;
        dots += product * load_few(in.weight, FP32, c, left);
    }
    return total(dots) / s.width;
}

INLINE void backward_row(Shape s, Inputs in, Gradients g, float *x, float *sums, long row,
                         Kinds k) {
    long first = row * s.width, padded = (s.width + LANES - 1) / LANES * LANES;
    float mean = 0;
    if (g.grad_normed) mean = norm_again(s, in, g, x, sums + WEIGHT * padded, row, k);
    for (long c = 0; c < s.width; c += LANES) {
        long left = s.width - c, i = first + c;
        vec grad = all(0);
        if (g.grad_out) grad = load_few(g.grad_out, in.branch ? FP32 : k.stream, i, left);
        if (g.grad_normed) {
            vec weight = load_few(in.weight, FP32, c, left);
            vec own = load_few(g.grad_normed, k.normed, i, left) * weight;
            grad += (own - *(vec *)(x + c) * mean) * g.rstd[row];
        }
        if (in.branch) {
            *(vec *)(sums + TOTAL * padded + c) += grad;
            *(vec *)(sums + STREAM * padded + c) += grad * load_few(in.stream, k.stream, i, left);
            *(vec *)(sums + BRANCH * padded + c) += grad * load_few(in.branch, k.branch, i, left);
            vec scale = load_few(in.branch_scale, FP32, c, left);
            store_few(g.to_branch, k.branch, i, left, grad * scale);
            grad *= load_few(in.stream_scale, FP32, c, left);
        }
        store_few(g.to_stream, k.stream, i, left, grad);
    }
}

static int are(const Shape *s, int stream, int rest) {
    return s->stream == stream && s->branch == rest && s->normed == rest;
}

/* out fp32, with a branch; normed and rstd, or neither. */
void zaya_norm_residual(const Shape *s, const Inputs *in, float *out, void *normed, float *rstd) {
    Kinds any = {s->stream, s->branch, s->normed};
#pragma omp parallel for schedule(static) num_threads(s->threads) if (s->threads > 1)
    for (long row = 0; row < s->rows; row++) {
        if (are(s, FP32, BF16))
            forward_row(*s, *in, out, normed, rstd, row, (Kinds){FP32, BF16, BF16});
        else if (are(s, FP32, FP32))
            forward_row(*s, *in, out, normed, rstd, row, (Kinds){FP32, FP32, FP32});
        else forward_row(*s, *in, out, normed, rstd, row, any);
    }
}

static void backward_part(const Shape *s, const Inputs *in, const Gradients *g, long part) {
    long padded = (s->width + LANES - 1) / LANES * LANES;
    float *x = scratch(SCRATCH_CALLER, (1 + SUMS) * padded * sizeof *x), *sums = x + padded;
    double *wide = g->sums + part * SUMS * s->width;
    Kinds any = {s->stream, s->branch, s->normed};
    long start = s->rows * part / s->parts, end = s->rows * (part + 1) / s->parts;
    for (; start < end; start += SPAN) {
        long stop = end - start < SPAN ? end : start + SPAN;
        memset(sums, 0, SUMS * padded * sizeof *sums);
        for (long row = start; row < stop; row++) {
            if (are(s, FP32, BF16))
                backward_row(*s, *in, *g, x, sums, row, (Kinds){FP32, BF16, BF16});
            else if (are(s, FP32, FP32))
                backward_row(*s, *in, *g, x, sums, row, (Kinds){FP32, FP32, FP32});
            else backward_row(*s, *in, *g, x, sums, row, any);
        }
        for (long j = 0; j < SUMS; j++)
            for (long c = 0; c < s->width; c++) wide[j * s->width + c] += sums[j * padded + c];
    }
}

/* Gradients of scales and biases from the sums, and the weight's. */
static void vectors_backward(const Shape *s, const Inputs *in, const Gradients *g) {
    long width = s->width;
    double *sums = g->sums;
    for (long part = 1; part < s->parts; part++)
        for (long i = 0; i < SUMS * width; i++) sums[i] += g->sums[part * SUMS * width + i];
    for (long c = 0; c < width; c++) {
        g->to_vectors[4 * width + c] = (float)sums[WEIGHT * width + c];
        if (!in->branch) continue;
        double whole = sums[TOTAL * width + c];
        g->to_vectors[c] = (float)(sums[STREAM * width + c] + in->stream_bias[c] * whole);
        g->to_vectors[width + c] = (float)(in->stream_scale[c] * whole);
        g->to_vectors[2 * width + c] = (float)(sums[BRANCH * width + c] + in->branch_bias[c] * whole);
        g->to_vectors[3 * width + c] = (float)(in->branch_scale[c] * whole);
    }
}

void zaya_norm_residual_backward(const Shape *s, const Inputs *in, const Gradients *g) {
#pragma omp parallel for schedule(dynamic) num_threads(s->threads) if (s->threads > 1)
    for (long part = 0; part < s->parts; part++) backward_part(s, in, g, part);
    vectors_backward(s, in, g);
}
