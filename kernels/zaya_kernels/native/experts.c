/* SwiGLU experts over rows sorted by expert, each at its own number of rows. Pre-activation,
 * activation and their gradients are rounded to the rows' type between products. */
#include "gemm.h"

typedef struct {
    long experts, hidden, width; /* columns of rows, and of the activation */
    long type, threads;
} Sizes;

static void *offset(const void *x, long elements, long type) {
    return (char *)x + elements * (type == BF16 ? 2 : 4);
}

static Operand plain(const void *x, long columns) { return (Operand){x, columns, 1}; }
static Operand turned(const void *x, long columns) { return (Operand){x, 1, columns}; }

static long first_row(const int64_t *counts, long expert) {
    long first = 0;
    for (long e = 0; e < expert; e++) first += counts[e];
    return first;
}

static vec sigmoids(vec x) { return 1 / (1 + exp_of(-x)); }
static vec silu_of(vec x) { return x / (1 + exp_of(-x)); }

static void activate(const void *hidden, void *to, long width, long type) {
    const void *up = offset(hidden, width, type);
    long i = 0;
    for (; i + LANES <= width; i += LANES) {
        vec g = load(hidden, type, i);
        store(to, type, i, silu_of(g) * load(up, type, i));
    }
    for (; i < width; i++) {
        float g = at(hidden, type, i);
        put(to, type, i, silu_of(all(g))[0] * at(up, type, i));
    }
}

/* hidden [R, 2 width] and out [R, hidden] of rows [R, hidden]. */
void zaya_experts(const Sizes *s, const int64_t *counts, const void *rows, const void *gate_up,
                  const void *down, void *hidden, void *out) {
    long d = s->hidden, f = s->width, type = s->type;
#pragma omp parallel for schedule(dynamic) num_threads(s->threads) if (s->threads > 1)
    for (long e = 0; e < s->experts; e++) {
        long first = first_row(counts, e), n = counts[e];
        void *before = offset(hidden, first * 2 * f, type);
        void *active = scratch(SCRATCH_CALLER, n * f * 4);
        gemm(n, 2 * f, d, plain(offset(rows, first * d, type), d),
             turned(offset(gate_up, e * 2 * f * d, type), d), type, (Result){before, 2 * f, type, 0}, 1);
        for (long i = 0; i < n; i++)
            activate(offset(before, i * 2 * f, type), offset(active, i * f, type), f, type);
        gemm(n, d, f, plain(active, f), turned(offset(down, e * d * f, type), f), type,
             (Result){offset(out, first * d, type), d, type, 0}, 1);
    }
}

/* One row: the activation again, and the gradient of what went into it.
 * d silu(g) / dg = s + silu(g) (1 - s) with s = sigmoid(g). */
static void deactivate(const void *hidden, const float *grad, void *active, void *to, long width,
                       long type) {
    const void *up = offset(hidden, width, type);
    void *to_up = offset(to, width, type);
    long i = 0;
    for (; i + LANES <= width; i += LANES) {
        vec g = load(hidden, type, i), u = load(up, type, i), by = *(const vec *)(grad + i);
        vec s = sigmoids(g), silu = g * s;
        store(active, type, i, silu * u);
        store(to, type, i, by * u * (s + silu * (1 - s)));
        store(to_up, type, i, by * silu);
    }
    for (; i < width; i++) {
        float g = at(hidden, type, i), u = at(up, type, i), s = sigmoids(all(g))[0], silu = g * s;
        put(active, type, i, silu * u);
        put(to, type, i, grad[i] * u * (s + silu * (1 - s)));
        put(to_up, type, i, grad[i] * silu);
    }
}

typedef struct {
    const void *rows, *hidden, *gate_up, *down, *grad;
    void *to_rows, *to_gate_up, *to_down;
} Tensors;

static void expert_backward(const Sizes *s, const Tensors *x, long e, long first, long n) {
    long d = s->hidden, f = s->width, type = s->type, unit = type == BF16 ? 2 : 4;
    float *grad_active = scratch(SCRATCH_CALLER, n * f * (4 + 3 * unit));
    char *active = (char *)(grad_active + n * f), *grad_hidden = active + n * f * unit;
    const void *grad = offset(x->grad, first * d, type), *rows = offset(x->rows, first * d, type);
    gemm(n, f, d, plain(grad, d), plain(offset(x->down, e * d * f, type), f), type,
         (Result){grad_active, f, FP32, 0}, 1);
    for (long i = 0; i < n; i++)
        deactivate(offset(x->hidden, (first + i) * 2 * f, type), grad_active + i * f,
                   active + i * f * unit, grad_hidden + i * 2 * f * unit, f, type);
    gemm(d, f, n, turned(grad, d), plain(active, f), type,
         (Result){offset(x->to_down, e * d * f, type), f, type, 0}, 1);
    gemm(2 * f, d, n, turned(grad_hidden, 2 * f), plain(rows, d), type,
         (Result){offset(x->to_gate_up, e * 2 * f * d, type), d, type, 0}, 1);
    gemm(n, d, 2 * f, plain(grad_hidden, 2 * f), plain(offset(x->gate_up, e * 2 * f * d, type), d),
         type, (Result){offset(x->to_rows, first * d, type), d, type, 0}, 1);
}

/* Gradients; an expert without rows has zeros. */
void zaya_experts_backward(const Sizes *s, const int64_t *counts, const Tensors *x) {
#pragma omp parallel for schedule(dynamic) num_threads(s->threads) if (s->threads > 1)
    for (long e = 0; e < s->experts; e++)
        expert_backward(s, x, e, first_row(counts, e), counts[e]);
}
