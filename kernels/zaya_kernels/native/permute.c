/* Tokens' rows to their experts' order and back (zaya_kernels/moe_permute/op.py): a row at a time,
 * read once and written once.
 *
 * Legend: T tokens, R places with an expert, the first of the order, D columns. */
#include "vectors.h"

typedef struct {
    long tokens, routed, columns, type, threads;
} Shape;

static long bytes_of(const Shape *s) { return s->columns * (s->type == BF16 ? 2 : 4); }

static char *row(const Shape *s, const void *x, long number) {
    return (char *)x + number * bytes_of(s);
}

/* to = x times `factor`. */
static void write_scaled(const Shape *s, void *to, const void *x, float factor) {
    for (long c = 0; c < s->columns; c += LANES) {
        long left = s->columns - c;
        store_few(to, s->type, c, left, load_few(x, s->type, c, left) * factor);
    }
}

static float product(const Shape *s, const void *x, const void *y) {
    vec sum = all(0);
    for (long c = 0; c < s->columns; c += LANES) {
        long left = s->columns - c;
        sum += load_few(x, s->type, c, left) * load_few(y, s->type, c, left);
    }
    return total(sum);
}

/* rows [R, D] of tokens [T, D]; order [T]. */
void zaya_gather(const Shape *s, const int64_t *order, const void *tokens, void *rows) {
    long bytes = bytes_of(s);
#pragma omp parallel for schedule(static) num_threads(s->threads) if (s->threads > 1)
    for (long place = 0; place < s->routed; place++)
        memcpy(row(s, rows, place), row(s, tokens, order[place]), bytes);
}

/* out [T, D] of rows [R, D]; tokens without an expert take theirs from rest [T, D], or zero, and
 * all are multiplied by probability [T] of the type `exact`, if there is one. */
void zaya_scatter(const Shape *s, const int64_t *order, const void *rows, const void *rest,
                  const void *probability, long exact, void *out) {
    long bytes = bytes_of(s);
#pragma omp parallel for schedule(static) num_threads(s->threads) if (s->threads > 1)
    for (long place = 0; place < s->tokens; place++) {
        long token = order[place];
        const void *from =
            place < s->routed ? row(s, rows, place) : rest ? row(s, rest, token) : NULL;
        void *to = row(s, out, token);
        if (!from) memset(to, 0, bytes);
        else if (!probability) memcpy(to, from, bytes);
        else write_scaled(s, to, from, at(probability, exact, token));
    }
}

typedef struct {
    const void *grad, *rows, *rest, *probability;
    void *to_rows, *to_rest, *to_probability; /* to_rest may be absent */
} Tensors;

/* Of tokens with an expert nothing is written to `to_rest`. */
void zaya_scatter_backward(const Shape *s, const int64_t *order, const Tensors *x, long exact) {
#pragma omp parallel for schedule(static) num_threads(s->threads) if (s->threads > 1)
    for (long place = 0; place < s->tokens; place++) {
        long token = order[place];
        int routed = place < s->routed;
        const void *grad = row(s, x->grad, token);
        const void *from =
            routed ? row(s, x->rows, place) : x->rest ? row(s, x->rest, token) : NULL;
        void *to =
            routed ? row(s, x->to_rows, place) : x->to_rest ? row(s, x->to_rest, token) : NULL;
        if (to) write_scaled(s, to, grad, at(x->probability, exact, token));
        put(x->to_probability, exact, token, from ? product(s, grad, from) : 0);
    }
}
