/* The router (zaya_kernels/router/op.py) in blocks of tokens that stay in the cache: each product is
 * followed by what is left to do on its rows. All but the down-projection is fp32.
 *
 * Legend: T tokens, D hidden, R width, C classes; z1, z2 what goes into the two activations. */
#include "gemm.h"

#define BLOCK 256
#define SPAN 32 /* rows whose columns are summed in fp32 before fp64 takes over */

typedef struct {
    long tokens, hidden, width, classes, type, threads, parts;
    float eps;
} Shape;

typedef struct {
    const void *x, *down;                           /* [T, D], [R, D], both of `type` */
    const float *down_bias, *previous, *depth_scale; /* [R], [T, R] and [R] or nothing */
    const float *norm, *fc1, *fc1_bias, *fc2, *fc2_bias, *out; /* [R], [R, R], .., [C, R] */
} Inputs;

typedef struct {
    float *state, *rstd, *z1, *z2, *probabilities; /* [T, R], [T], [T, R], [T, R], [T, C] */
    int64_t *choice;                               /* [T] */
} Kept;

typedef struct {
    const float *probability, *state; /* [T], [T, R]; either may be absent */
    void *to_x;                       /* [T, D] */
    float *to_previous;               /* [T, R] or nothing */
    float *to_down, *to_fc1, *to_fc2, *to_out; /* `parts` of them and of what follows */
    double *sums;                     /* [VECTORS, R], zero at first */
} Gradients;

enum { DOWN_BIAS, DEPTH, NORM, FC1_BIAS, FC2_BIAS, VECTORS };

static Operand plain(const float *x, long columns) { return (Operand){x, columns, 1}; }
static Operand turned(const float *x, long columns) { return (Operand){x, 1, columns}; }
static Result into(float *x, long columns, int add) { return (Result){x, columns, FP32, add}; }

static const void *typed(const void *x, long elements, long type) {
    return (const char *)x + elements * (type == BF16 ? 2 : 4);
}

INLINE vec columns(const float *x, long c, long left) { return load_few(x, FP32, c, left); }

/* The normal distribution's function and density. Near 0 one half and an odd polynomial (relative
 * error 4e-8), which rounds as a sum with 1/2 does; beyond, the smaller tail: e^(-x^2 / 2) times a
 * polynomial in 1 / (1 + 0.3 |x|) (1.4e-7). */
static inline vec normal(vec x, vec *density) {
    words negative = x < all(0);
    vec size = choose(negative, -x, x), square = x * x, e = exp_of(square * -0.5f);
    vec near = 4.76074945e-7f * square - 9.05844172e-6f;
    near = near * square + 1.15032155e-4f;
    near = near * square - 1.18710962e-3f;
    near = near * square + 9.97349992e-3f;
    near = near * square - 6.64903745e-2f;
    near = near * square + 0.398942292f;
    vec t = 1 / (1 + 0.3f * size), tail = 0.0360362083f * t - 0.158713236f;
    tail = tail * t + 0.208964005f;
    tail = tail * t - 0.0560953841f;
    tail = tail * t + 0.129843175f;
    tail = tail * t + 0.0995231345f;
    tail = tail * t + 0.120816879f;
    tail = tail * t + 0.119625166f;
    tail = tail * t * e;
    *density = e * 0.398942280f;
    words inner = size < all(1.25f);
    return choose(inner, near * x + 0.5f, choose(negative, tail, 1 - tail));
}

/* z [rows, R] += bias; its GELU. */
static void activate(float *z, const float *bias, float *to, long rows, long width) {
    for (long r = 0; r < rows; r++, z += width, to += width)
        for (long c = 0; c < width; c += LANES) {
            long left = width - c;
            vec density, x = columns(z, c, left) + columns(bias, c, left);
            store_few(z, FP32, c, left, x);
            store_few(to, FP32, c, left, x * normal(x, &density));
        }
}

/* GELU of z again, and `grad` [rows, R] through it. */
static void deactivate(const float *z, float *grad, float *to, long count) {
    for (long i = 0; i < count; i += LANES) {
        long left = count - i;
        vec density, x = columns(z, i, left), share = normal(x, &density);
        store_few(to, FP32, i, left, x * share);
        store_few(grad, FP32, i, left, columns(grad, i, left) * (share + x * density));
    }
}

/* A token's state from its product in place, and its norm. */
static void average(const Shape *s, const Inputs *in, const Kept *k, long token, float *to) {
    float *state = k->state + token * s->width;
    vec squares = all(0);
    for (long c = 0; c < s->width; c += LANES) {
        long left = s->width - c;
        vec x = columns(state, c, left) + columns(in->down_bias, c, left);
        if (in->previous)
            x += columns(in->previous + token * s->width, c, left) *
                 columns(in->depth_scale, c, left);
        store_few(state, FP32, c, left, x);
        squares += x * x;
    }
    float scale = (float)(1 / sqrt((double)total(squares) / s->width + s->eps));
    k->rstd[token] = scale;
    for (long c = 0; c < s->width; c += LANES) {
        long left = s->width - c;
        vec x = columns(state, c, left) * scale * columns(in->norm, c, left);
        store_few(to, FP32, c, left, x);
    }
}

/* Softmax of a token's scores, in place. */
static void softmax(float *x, long count) {
    float top = x[0];
    for (long c = 1; c < count; c++) top = fmaxf(top, x[c]);
    vec sum = all(0);
    for (long c = 0; c < count; c += LANES) {
        long left = count - c;
        vec e = exp_of(columns(x, c, left) - top);
        for (long l = left; l < LANES; l++) e[l] = 0;
        store_few(x, FP32, c, left, e);
        sum += e;
    }
    float whole = total(sum);
    for (long c = 0; c < count; c++) x[c] /= whole;
}

/* The first of the largest; 0 of a row of NaN. */
static long largest(const float *x, const float *bias, long count) {
    long best = 0;
    for (long c = 1; c < count; c++)
        if (x[c] + bias[c] > x[best] + bias[best]) best = c;
    return best;
}

static void forward_block(const Shape *s, const Inputs *in, const Kept *k, const float *balancing,
                          float *probability, long first, long rows) {
    long d = s->hidden, w = s->width, c = s->classes;
    float *h = scratch(SCRATCH_CALLER, rows * w * sizeof *h);
    float *state = k->state + first * w, *z1 = k->z1 + first * w, *z2 = k->z2 + first * w;
    float *probabilities = k->probabilities + first * c;
    gemm(rows, w, d, (Operand){typed(in->x, first * d, s->type), d, 1}, (Operand){in->down, 1, d},
         s->type, into(state, w, 0), 1);
    for (long r = 0; r < rows; r++) average(s, in, k, first + r, h + r * w);
    gemm(rows, w, w, plain(h, w), turned(in->fc1, w), FP32, into(z1, w, 0), 1);
    activate(z1, in->fc1_bias, h, rows, w);
    gemm(rows, w, w, plain(h, w), turned(in->fc2, w), FP32, into(z2, w, 0), 1);
    activate(z2, in->fc2_bias, h, rows, w);
    gemm(rows, c, w, plain(h, w), turned(in->out, w), FP32, into(probabilities, c, 0), 1);
    for (long r = 0; r < rows; r++) {
        float *row = probabilities + r * c;
        softmax(row, c);
        if (balancing) k->choice[first + r] = largest(row, balancing, c);
        probability[first + r] = row[k->choice[first + r]];
    }
}

/* probability [T]. Without `balancing` [C] the choice is given. */
void zaya_router(const Shape *s, const Inputs *in, const Kept *k, const float *balancing,
                 float *probability) {
#pragma omp parallel for schedule(dynamic) num_threads(s->threads) if (s->threads > 1)
    for (long first = 0; first < s->tokens; first += BLOCK) {
        long left = s->tokens - first;
        forward_block(s, in, k, balancing, probability, first, left < BLOCK ? left : BLOCK);
    }
}

/* to [R] += sums over rows of x [rows, R], times y where there is one. */
static void add_columns(double *to, const float *x, const float *y, long rows, long width) {
    for (long first = 0; first < rows; first += SPAN) {
        long end = rows - first < SPAN ? rows : first + SPAN;
        for (long c = 0; c < width; c += LANES) {
            long left = width - c;
            vec sum = all(0);
            for (long r = first; r < end; r++) {
                vec own = columns(x + r * width, c, left);
                if (y) own *= columns(y + r * width, c, left);
                sum += own;
            }
            for (long l = 0; l < LANES && l < left; l++) to[c + l] += sum[l];
        }
    }
}

/* Gradients of a token's scores. */
static void choice_backward(const Shape *s, const Kept *k, const Gradients *g, long token,
                            float *to) {
    const float *p = k->probabilities + token * s->classes;
    long chosen = k->choice[token];
    float own = g->probability ? p[chosen] * g->probability[token] : 0;
    for (long c = 0; c < s->classes; c++) to[c] = own * ((c == chosen) - p[c]);
}

/* The norm's: `n` [R] becomes the state over its root mean square, `grad` that of the state. */
static void norm_backward(const Shape *s, const Inputs *in, const Kept *k, const Gradients *g,
                          long token, float *n, float *grad) {
    long width = s->width, first = token * width;
    float scale = k->rstd[token];
    vec dots = all(0);
    for (long c = 0; c < width; c += LANES) {
        long left = width - c;
        vec x = columns(n, c, left), by = columns(grad, c, left) * columns(in->norm, c, left);
        dots += x * by;
    }
    float mean = total(dots) / width;
    for (long c = 0; c < width; c += LANES) {
        long left = width - c;
        vec own = columns(grad, c, left) * columns(in->norm, c, left);
        own = (own - columns(n, c, left) * mean) * scale;
        if (g->state) own += columns(g->state + first, c, left);
        store_few(grad, FP32, c, left, own);
        if (g->to_previous)
            store_few(g->to_previous, FP32, first + c, left, own * columns(in->depth_scale, c, left));
    }
}

typedef struct {
    const Shape *s;
    const Inputs *in;
    const Kept *k;
    const Gradients *g;
    long first, rows;
    int add; /* to the part's sums, or begin them */
    float *scores, *h, *grad, *before; /* of the block: [rows, C], then three of [rows, R] */
} Block;

/* Makes `before` the gradient of the MLP's input, `h` the state over its root mean square. The
 * first layer's gradient lacks the norm's weight, a factor of its columns. */
static void mlp_backward(const Block *b) {
    const Inputs *in = b->in;
    const Gradients *g = b->g;
    long rows = b->rows, w = b->s->width, c = b->s->classes, start = b->first * w;
    float *h = b->h, *grad = b->grad, *before = b->before;
    for (long r = 0; r < rows; r++)
        choice_backward(b->s, b->k, g, b->first + r, b->scores + r * c);
    gemm(rows, w, c, plain(b->scores, c), plain(in->out, w), FP32, into(before, w, 0), 1);
    deactivate(b->k->z2 + start, before, h, rows * w);
    gemm(c, w, rows, turned(b->scores, c), plain(h, w), FP32, into(g->to_out, w, b->add), 1);
    add_columns(g->sums + FC2_BIAS * w, before, NULL, rows, w);
    gemm(rows, w, w, plain(before, w), plain(in->fc2, w), FP32, into(grad, w, 0), 1);
    deactivate(b->k->z1 + start, grad, h, rows * w);
    gemm(w, w, rows, turned(before, w), plain(h, w), FP32, into(g->to_fc2, w, b->add), 1);
    add_columns(g->sums + FC1_BIAS * w, grad, NULL, rows, w);
    gemm(rows, w, w, plain(grad, w), plain(in->fc1, w), FP32, into(before, w, 0), 1);
    for (long r = 0; r < rows; r++)
        for (long i = r * w; i < (r + 1) * w; i += LANES) {
            long left = (r + 1) * w - i;
            vec x = columns(b->k->state, start + i, left) * b->k->rstd[b->first + r];
            store_few(h, FP32, i, left, x);
        }
    gemm(w, w, rows, turned(grad, w), plain(h, w), FP32, into(g->to_fc1, w, b->add), 1);
}

static void block_backward(const Block *b) {
    const Shape *s = b->s;
    const Gradients *g = b->g;
    long rows = b->rows, w = s->width, d = s->hidden, type = s->type;
    mlp_backward(b);
    add_columns(g->sums + NORM * w, b->before, b->h, rows, w);
    for (long r = 0; r < rows; r++)
        norm_backward(s, b->in, b->k, g, b->first + r, b->h + r * w, b->before + r * w);
    add_columns(g->sums + DOWN_BIAS * w, b->before, NULL, rows, w);
    if (g->to_previous)
        add_columns(g->sums + DEPTH * w, b->before, b->in->previous + b->first * w, rows, w);
    void *rounded = b->before;
    if (type == BF16) {
        rounded = b->h;
        for (long i = 0; i < rows * w; i += LANES)
            store_few(rounded, BF16, i, rows * w - i, columns(b->before, i, rows * w - i));
    }
    const void *x = typed(b->in->x, b->first * d, type);
    Result to_x = {(void *)typed(g->to_x, b->first * d, type), d, type, 0};
    gemm(rows, d, w, (Operand){rounded, w, 1}, (Operand){b->in->down, d, 1}, type, to_x, 1);
    gemm(w, d, rows, (Operand){rounded, 1, w}, (Operand){x, d, 1}, type, into(g->to_down, d, b->add), 1);
}

static void part_backward(const Shape *s, const Inputs *in, const Kept *k, Gradients g, long part) {
    long w = s->width, end = s->tokens * (part + 1) / s->parts;
    g.to_down += part * w * s->hidden;
    g.to_fc1 += part * w * w, g.to_fc2 += part * w * w, g.to_out += part * s->classes * w;
    g.sums += part * VECTORS * w;
    Block b = {.s = s, .in = in, .k = k, .g = &g, .first = s->tokens * part / s->parts};
    b.h = scratch(SCRATCH_CALLER, BLOCK * (3 * w + s->classes) * sizeof(float));
    b.grad = b.h + BLOCK * w, b.before = b.grad + BLOCK * w, b.scores = b.before + BLOCK * w;
    do {
        b.rows = end - b.first < BLOCK ? end - b.first : BLOCK;
        block_backward(&b);
        b.first += b.rows, b.add = 1;
    } while (b.first < end);
}

/* Sums over tokens are taken in `parts` parts whatever the number of threads. */
void zaya_router_backward(const Shape *s, const Inputs *in, const Kept *k, const Gradients *g) {
#pragma omp parallel for schedule(dynamic) num_threads(s->threads) if (s->threads > 1)
    for (long part = 0; part < s->parts; part++) part_backward(s, in, k, *g, part);
}
