/* CCA (arXiv 2510.04476) from the projected queries and keys to rotated, normalised ones, and back:
 * one key head and its query heads at a time, in blocks of tokens that stay in the cache. All of it
 * is fp32. Nothing is kept for the backward pass, which makes a block's rows again.
 *
 * Legend: r local row of tokens (a chunk), t token in it, negative before it (halo); d size of a
 * head, G heads of a group (its queries, then its key), W = G d columns. */
#include "gemm.h"

#define BLOCK 64
#define AHEAD 4 /* tokens that are asked for before they are read: a head is two lines of each */
#define SMALLEST_NORM 1.1920929e-7f

typedef struct {
    long rows, tokens, halo, halo_rows; /* tokens of a row; rows before it that count, that are given */
    long heads, kv_heads, size, depth_taps, mix_taps, rotated;
    long stride, type, threads, parts; /* stride: of one token of x */
} Shape;

typedef struct {
    const void *x, *halo; /* [rows tokens, C], [rows, halo_rows, C] or nothing */
    const int64_t *positions;
    const float *cos, *sin; /* [rows tokens, rotated / 2] */
    const float *depth, *depth_bias; /* [C, depth_taps] oldest first, [C] */
    const float *mix, *mix_bias;     /* [A, mix_taps d, d] newest first, [C] */
    const float *temperature;        /* [K] */
} Inputs;

typedef struct {
    const void *grad_q, *grad_k; /* [rows tokens, H, d], [rows tokens, K, d] */
    void *to_x, *to_halo;        /* [rows tokens, C], [rows, halo, C] */
    float *to_mix; /* `parts` of it and of what follows, zero at first */
    double *to_depth, *to_depth_bias, *to_mix_bias, *to_temperature;
} Gradients;

typedef struct {
    const Shape *s;
    const Inputs *in;
    long row, group, members, width; /* members: G, width: W */
    float *raw, *inner, *unfolded, *mixed; /* from t - halo, from t - mix_taps + 1, per head from t */
    float *depth, *bias;                   /* of the group's columns: [depth_taps, W] newest first, [W] */
} Task;

static long head_of(const Task *t, long member) {
    long queries = t->members - 1;
    return member < queries ? t->group * queries + member : t->s->heads + t->group;
}

/* Position of a token in its document, negative before that document. */
static long position(const Task *t, long token) {
    const int64_t *own = t->in->positions + t->row * t->s->tokens;
    return token < 0 ? own[0] + token : own[token];
}

static size_t task_floats(const Shape *s, long members) {
    long width = members * s->size, rows = BLOCK + s->halo;
    return width * (2 * rows + BLOCK * (s->mix_taps + 1) + s->depth_taps + 1);
}

static Task task_of(const Shape *s, const Inputs *in, long row, long group, float *memory) {
    long members = s->heads / s->kv_heads + 1, width = members * s->size, rows = BLOCK + s->halo;
    Task t = {.s = s, .in = in, .row = row, .group = group, .members = members, .width = width};
    t.raw = memory;
    t.inner = t.raw + width * rows;
    t.unfolded = t.inner + width * rows;
    t.mixed = t.unfolded + width * BLOCK * s->mix_taps;
    t.depth = t.mixed + width * BLOCK;
    t.bias = t.depth + width * s->depth_taps;
    for (long m = 0; m < members; m++)
        for (long c = 0; c < s->size; c++) {
            long from = head_of(&t, m) * s->size + c, to = m * s->size + c;
            t.bias[to] = in->depth_bias[from];
            for (long back = 0; back < s->depth_taps; back++)
                t.depth[back * width + to] =
                    in->depth[from * s->depth_taps + s->depth_taps - 1 - back];
        }
    return t;
}

/* One token's columns of the group, in fp32. */
static void read_token(const Task *t, long token, float *to) {
    const Shape *s = t->s;
    long channels = (s->heads + s->kv_heads) * s->size, unit = s->type == BF16 ? 2 : 4;
    const char *from = (const char *)t->in->x + (t->row * s->tokens + token) * s->stride * unit;
    if (token < 0 && !t->in->halo) {
        memset(to, 0, t->width * sizeof *to);
        return;
    }
    if (token < 0)
        from = (const char *)t->in->halo +
               ((t->row + 1) * s->halo_rows + token) * channels * unit;
    for (long m = 0; m < t->members; m++) {
        long first = head_of(t, m) * s->size;
        ask_for(from, (first + AHEAD * s->stride) * unit, s->size * unit);
        for (long c = 0; c < s->size; c++) to[m * s->size + c] = at(from, s->type, first + c);
    }
}

static void add_product(float *restrict to, const float *restrict x, const float *restrict y,
                        long count) {
    for (long i = 0; i < count; i++) to[i] += x[i] * y[i];
}

static void add_scaled(float *restrict to, const float *restrict x, float by, long count) {
    for (long i = 0; i < count; i++) to[i] += x[i] * by;
}

/* raw, inner, unfolded and mixed of tokens [first, first + count). */
static void mix_block(const Task *t, long first, long count) {
    const Shape *s = t->s;
    long d = s->size, width = t->width, taps = s->mix_taps, reach = taps - 1;
    for (long i = -s->halo; i < count; i++)
        read_token(t, first + i, t->raw + (i + s->halo) * width);
    for (long i = -reach; i < count; i++) {
        float *inner = t->inner + (i + reach) * width;
        memcpy(inner, t->bias, width * sizeof *inner);
        for (long back = 0; back < s->depth_taps; back++)
            if (position(t, first + i) >= back)
                add_product(inner, t->raw + (i - back + s->halo) * width, t->depth + back * width,
                            width);
    }
    for (long m = 0; m < t->members; m++) {
        float *unfolded = t->unfolded + m * BLOCK * taps * d, *mixed = t->mixed + m * BLOCK * d;
        long head = head_of(t, m);
        for (long i = 0; i < count; i++)
            for (long back = 0; back < taps; back++) {
                int inside = position(t, first + i) >= back;
                const float *from = inside ? t->inner + (i - back + reach) * width : t->bias;
                memcpy(unfolded + (i * taps + back) * d, from + m * d, d * sizeof *from);
            }
        gemm(count, d, taps * d, (Operand){unfolded, taps * d, 1},
             (Operand){t->in->mix + head * taps * d * d, d, 1}, FP32, (Result){mixed, d, FP32, 0}, 1);
        for (long i = 0; i < count; i++)
            add_scaled(mixed + i * d, t->in->mix_bias + head * d, 1, d);
    }
    /* QK-mean: half of each query and its key, half of a key and its queries' mean. */
    long queries = t->members - 1;
    float *key = t->mixed + queries * BLOCK * d;
    for (long i = 0; i < count; i++) {
        const float *raw = t->raw + (i + s->halo) * width, *raw_key = raw + queries * d;
        for (long m = 0; m < queries; m++) {
            float *query = t->mixed + (m * BLOCK + i) * d;
            add_scaled(query, raw + m * d, 0.5f, d), add_scaled(query, raw_key, 0.5f, d);
            add_scaled(key + i * d, raw + m * d, 0.5f / queries, d);
        }
        add_scaled(key + i * d, raw_key, 0.5f, d);
    }
}

/* In fp64: the temperature's gradient sums what is left of these over all tokens. */
static double dot(const float *x, const float *y, long count) {
    double parts[LANES] = {0}, sum = 0;
    long i = 0;
    for (; i + LANES <= count; i += LANES)
        for (long l = 0; l < LANES; l++) parts[l] += (double)x[i + l] * y[i + l];
    for (; i < count; i++) sum += (double)x[i] * y[i];
    for (long l = 0; l < LANES; l++) sum += parts[l];
    return sum;
}

/* Rotates a head of one token; `turn` is -1 to rotate back. */
static void rotate(const Task *t, long token, float *x, float turn) {
    long half = t->s->rotated / 2;
    long from = (t->row * t->s->tokens + token) * half;
    for (long i = 0; i < half; i++) {
        float a = x[i], b = x[half + i];
        float cos = t->in->cos[from + i], sin = t->in->sin[from + i] * turn;
        x[i] = a * cos - b * sin, x[half + i] = b * cos + a * sin;
    }
}

static void forward_task(const Task *t, void *q, void *k) {
    const Shape *s = t->s;
    long d = s->size, queries = t->members - 1;
    float root = sqrtf(d);
    for (long first = 0; first < s->tokens; first += BLOCK) {
        long count = s->tokens - first < BLOCK ? s->tokens - first : BLOCK;
        mix_block(t, first, count);
        for (long m = 0; m < t->members; m++)
            for (long i = 0; i < count; i++) {
                float *x = t->mixed + (m * BLOCK + i) * d;
                float norm = (float)sqrt(dot(x, x, d)), scale = root / fmaxf(norm, SMALLEST_NORM);
                if (m == queries) scale *= t->in->temperature[t->group];
                for (long c = 0; c < d; c++) x[c] *= scale;
                rotate(t, first + i, x, 1);
                long token = t->row * s->tokens + first + i;
                long to = m == queries ? token * s->kv_heads + t->group
                                       : token * s->heads + head_of(t, m);
                for (long c = 0; c < d; c++) put(m == queries ? k : q, s->type, to * d + c, x[c]);
            }
    }
}

/* q [rows tokens, H, d], k [rows tokens, K, d]. */
void zaya_cca(const Shape *s, const Inputs *in, void *q, void *k) {
    long tasks = s->rows * s->kv_heads, members = s->heads / s->kv_heads + 1;
#pragma omp parallel for schedule(dynamic) num_threads(s->threads) if (s->threads > 1)
    for (long i = 0; i < tasks; i++) {
        float *memory = scratch(SCRATCH_CALLER, task_floats(s, members) * sizeof(float));
        Task t = task_of(s, in, i / s->kv_heads, i % s->kv_heads, memory);
        forward_task(&t, q, k);
    }
}

/* What one task adds to, and what goes from a block to the one before it. */
typedef struct {
    float *mixed, *unfolded;           /* gradients, like the task's */
    float *inner, *x;                  /* likewise, with the rows before the block */
    float *depth, *bias, *mix_bias;    /* sums over a block's tokens [depth_taps, W], [W], [W] */
    float *mix;                        /* this part's sums, of all heads; so below */
    double *to_depth, *to_bias, *to_mix_bias, *to_temperature;
} Slopes;

/* Gradient of a head's mixed row from that of the rotated one. */
static void norm_backward(const Task *t, Slopes *g, const Gradients *out, long first, long m,
                          long i) {
    const Shape *s = t->s;
    long d = s->size, queries = t->members - 1, token = t->row * s->tokens + first + i;
    const float *x = t->mixed + (m * BLOCK + i) * d;
    float *grad = g->mixed + (m * BLOCK + i) * d;
    long from = m == queries ? token * s->kv_heads + t->group : token * s->heads + head_of(t, m);
    long heads = m == queries ? s->kv_heads : s->heads, unit = s->type == BF16 ? 2 : 4;
    const char *given = m == queries ? out->grad_k : out->grad_q;
    ask_for(given, (from + AHEAD * heads) * d * unit, d * unit);
    for (long c = 0; c < d; c++) grad[c] = at(given, s->type, from * d + c);
    rotate(t, first + i, grad, -1);
    double length = sqrt(dot(x, x, d)), along = dot(grad, x, d);
    float norm = (float)length, floor = fmaxf(norm, SMALLEST_NORM), scale = sqrtf(d) / floor;
    if (m == queries) {
        g->to_temperature[t->group] += along * scale;
        scale *= t->in->temperature[t->group];
    }
    /* Below the floor of the norm the scale is a constant. */
    float pull = norm > SMALLEST_NORM ? (float)along * scale / (floor * floor) : 0;
    for (long c = 0; c < d; c++) grad[c] = grad[c] * scale - x[c] * pull;
}

static void means_backward(const Task *t, Slopes *g, long count) {
    long d = t->s->size, queries = t->members - 1;
    for (long i = 0; i < count; i++) {
        float *to = g->x + (i + t->s->halo) * t->width, *to_key = to + queries * d;
        const float *key = g->mixed + (queries * BLOCK + i) * d;
        for (long m = 0; m < queries; m++) {
            const float *query = g->mixed + (m * BLOCK + i) * d;
            add_scaled(to + m * d, query, 0.5f, d), add_scaled(to_key, query, 0.5f, d);
            add_scaled(to + m * d, key, 0.5f / queries, d);
        }
        add_scaled(to_key, key, 0.5f, d);
    }
}

static void mix_backward(const Task *t, Slopes *g, long first, long count) {
    const Shape *s = t->s;
    long d = s->size, taps = s->mix_taps, reach = taps - 1;
    for (long m = 0; m < t->members; m++) {
        long head = head_of(t, m);
        const float *unfolded = t->unfolded + m * BLOCK * taps * d;
        float *grad = g->mixed + m * BLOCK * d;
        for (long i = 0; i < count; i++) add_scaled(g->mix_bias + m * d, grad + i * d, 1, d);
        gemm(taps * d, d, count, (Operand){unfolded, 1, taps * d}, (Operand){grad, d, 1}, FP32,
             (Result){g->mix + head * taps * d * d, d, FP32, 1}, 1);
        gemm(count, taps * d, d, (Operand){grad, d, 1},
             (Operand){t->in->mix + head * taps * d * d, 1, d}, FP32,
             (Result){g->unfolded, taps * d, FP32, 0}, 1);
        for (long i = 0; i < count; i++)
            for (long back = 0; back < taps; back++) {
                int inside = position(t, first + i) >= back;
                float *to = inside ? g->inner + (i - back + reach) * t->width : g->bias;
                add_scaled(to + m * d, g->unfolded + (i * taps + back) * d, 1, d);
            }
    }
}

/* The depthwise convolution's share of inner rows [start, count), counted from `first`. */
static void depth_backward(const Task *t, Slopes *g, long first, long start, long count) {
    long width = t->width, reach = t->s->mix_taps - 1;
    for (long i = start; i < count; i++) {
        const float *grad = g->inner + (i + reach) * width;
        long place = position(t, first + i);
        add_scaled(g->bias, grad, 1, width);
        for (long back = 0; back < t->s->depth_taps && back <= place; back++) {
            long row = (i - back + t->s->halo) * width;
            add_product(g->depth + back * width, grad, t->raw + row, width);
            add_product(g->x + row, grad, t->depth + back * width, width);
        }
    }
}

static void write_tokens(const Task *t, const float *from, void *to, long rows, long first,
                         long count) {
    long channels = (t->s->heads + t->s->kv_heads) * t->s->size, d = t->s->size;
    for (long i = 0; i < count; i++)
        for (long m = 0; m < t->members; m++) {
            long place = (t->row * rows + first + i) * channels + head_of(t, m) * d;
            for (long c = 0; c < d; c++)
                put(to, t->s->type, place + c, from[i * t->width + m * d + c]);
        }
}

/* Moves the `keep` rows before a block behind where the block before it ends, zeros before them. */
static void carry(float *x, long keep, long count, long width) {
    memmove(x + count * width, x, keep * width * sizeof *x);
    memset(x, 0, count * width * sizeof *x);
}

/* A block's sums to those of the part: in fp64, since there may be many blocks. */
static void add_sums(const Task *t, Slopes *g) {
    long taps = t->s->depth_taps, d = t->s->size;
    for (long m = 0; m < t->members; m++)
        for (long c = 0; c < d; c++) {
            long to = head_of(t, m) * d + c, from = m * d + c;
            g->to_bias[to] += g->bias[from], g->to_mix_bias[to] += g->mix_bias[from];
            for (long back = 0; back < taps; back++)
                g->to_depth[to * taps + taps - 1 - back] += g->depth[back * t->width + from];
        }
    memset(g->depth, 0, (taps + 2) * t->width * sizeof *g->depth);
}

static void backward_task(const Task *t, Slopes *g, const Gradients *out) {
    const Shape *s = t->s;
    long width = t->width, reach = s->mix_taps - 1, last = (s->tokens - 1) / BLOCK * BLOCK;
    memset(g->inner, 0, (BLOCK + s->halo) * width * 2 * sizeof *g->inner);
    for (long first = last; first >= 0; first -= BLOCK) {
        long count = first == last ? s->tokens - first : BLOCK;
        if (first != last) carry(g->inner, reach, count, width), carry(g->x, s->halo, count, width);
        mix_block(t, first, count);
        for (long m = 0; m < t->members; m++)
            for (long i = 0; i < count; i++) norm_backward(t, g, out, first, m, i);
        means_backward(t, g, count);
        mix_backward(t, g, first, count);
        depth_backward(t, g, first, first ? 0 : -reach, count);
        add_sums(t, g);
        write_tokens(t, g->x + s->halo * width, out->to_x, s->tokens, first, count);
    }
    if (t->in->halo) write_tokens(t, g->x, out->to_halo, s->halo, 0, s->halo);
}

/* Rows [first, end) of one group into the sums of one part. */
static void backward_rows(const Shape *s, const Inputs *in, const Gradients *out, long part,
                          long group) {
    long members = s->heads / s->kv_heads + 1, width = members * s->size, d = s->size;
    long channels = (s->heads + s->kv_heads) * d, per_part = (s->rows + s->parts - 1) / s->parts;
    size_t own = task_floats(s, members);
    long rows = BLOCK + s->halo, blocks = width * BLOCK + BLOCK * s->mix_taps * d;
    size_t more = blocks + 2 * rows * width + (s->depth_taps + 2) * width;
    float *memory = scratch(SCRATCH_CALLER, (own + more) * sizeof(float));
    Slopes g;
    g.mixed = memory + own;
    g.unfolded = g.mixed + width * BLOCK;
    g.inner = g.unfolded + BLOCK * s->mix_taps * d;
    g.x = g.inner + rows * width;
    g.depth = g.x + rows * width;
    g.bias = g.depth + s->depth_taps * width;
    g.mix_bias = g.bias + width;
    g.mix = out->to_mix + part * channels * s->mix_taps * d;
    g.to_depth = out->to_depth + part * channels * s->depth_taps;
    g.to_bias = out->to_depth_bias + part * channels;
    g.to_mix_bias = out->to_mix_bias + part * channels;
    g.to_temperature = out->to_temperature + part * s->kv_heads;
    memset(g.depth, 0, (s->depth_taps + 2) * width * sizeof(float));
    long end = (part + 1) * per_part < s->rows ? (part + 1) * per_part : s->rows;
    for (long row = part * per_part; row < end; row++) {
        Task t = task_of(s, in, row, group, memory);
        backward_task(&t, &g, out);
    }
}

/* Weights' gradients are sums over rows, in `parts` sums whatever the number of threads. */
void zaya_cca_backward(const Shape *s, const Inputs *in, const Gradients *out) {
    long tasks = s->parts * s->kv_heads;
#pragma omp parallel for schedule(dynamic) num_threads(s->threads) if (s->threads > 1)
    for (long i = 0; i < tasks; i++)
        backward_rows(s, in, out, i / s->kv_heads, i % s->kv_heads);
}
