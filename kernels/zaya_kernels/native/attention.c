/* Causal attention of runs of queries over the keys of their documents, grouped heads, by blocks
 * with running sums (flash attention, arXiv 2205.14135). The queries of one key head stand beside
 * one another as rows (token, head). Scores, their maxima and sums are fp32; probabilities and
 * their gradients are rounded to the operands' type for the products that follow, as there. */
#include "gemm.h"

/* Queries times heads at once, and keys: scores of 288 KB, twice backward, for the second-level
 * cache; whole tiles of 12 rows. */
#define BLOCK_ROWS 192
#define BLOCK_KEYS 384

typedef struct {
    long heads, kv_heads, size; /* query heads, key heads, channels of a head */
    long type, threads;
    float scale;
} Shape;

typedef struct {
    long query_start, query_count, key_start, key_count;
} Segment;

typedef struct {
    const Shape *shape;
    Segment segment;
    long head, group, unit; /* key head, query heads of it, bytes of an element */
} Task;

static Operand keys_of(const Task *t, const void *x, long first) {
    long row = t->shape->kv_heads * t->shape->size;
    long at = (t->segment.key_start + first) * row + t->head * t->shape->size;
    return (Operand){(const char *)x + at * t->unit, row, 1};
}

static Operand transposed(Operand x) { return (Operand){x.data, x.column, x.row}; }

/* Row `row` of a task's queries, in a tensor of `width` elements a head. */
static long place(const Task *t, long row, long width) {
    long token = t->segment.query_start + row / t->group;
    return (token * t->shape->heads + t->head * t->group + row % t->group) * width;
}

static void gather(const Task *t, const void *x, long first, long count, void *to) {
    long size = t->shape->size, bytes = size * t->unit;
    for (long i = 0; i < count; i++)
        memcpy((char *)to + i * bytes, (const char *)x + place(t, first + i, size) * t->unit, bytes);
}

/* Keys that row `row` of a task sees. */
static long seen(const Task *t, long row) {
    return t->segment.key_count - t->segment.query_count + row / t->group + 1;
}

static Task task_of(const Shape *shape, const long *segments, long number) {
    const long *s = segments + number / shape->kv_heads * 4;
    Task t = {shape, {s[0], s[1], s[2], s[3]}, number % shape->kv_heads,
              shape->heads / shape->kv_heads, shape->type == BF16 ? 2 : 4};
    return t;
}

static inline vec power(vec x, int type) { return type == BF16 ? exp_in_brief(x) : exp_of(x); }

/* Probabilities of one row from its scores, in place and in the operands' type; the row's new
 * maximum and its share of the sum. Columns from `count` to `padded` become zero. */
static float soften(float *score, long count, long padded, float scale, float *maximum, void *to,
                    int type) {
    for (long i = count; i < padded; i++) score[i] = -INFINITY;
    vec top = all(-INFINITY), other = top;
    long i = LANES;
    for (; i < padded; i += 2 * LANES) {
        top = larger(*(vec *)(score + i - LANES), top);
        other = larger(*(vec *)(score + i), other);
    }
    if (i == padded) top = larger(*(vec *)(score + i - LANES), top);
    float best = fmaxf(*maximum, largest_of(larger(top, other)) * scale);
    vec sum = all(0);
    for (i = 0; i < padded; i += LANES) {
        vec x = power(*(vec *)(score + i) * scale - best, type);
        sum += x;
        store(to, type, i, x);
    }
    *maximum = best;
    return total(sum);
}

static void forward_block(const Task *t, const void *q, const void *k, const void *v, void *out,
                          float *lse, long first, long rows) {
    long size = t->shape->size, unit = t->unit;
    int type = t->shape->type;
    char *memory = scratch(SCRATCH_CALLER, BLOCK_ROWS * (size * (unit + 4) + BLOCK_KEYS * 8 + 8));
    float *scores = (float *)memory, *sums = scores + BLOCK_ROWS * BLOCK_KEYS;
    float *top = sums + BLOCK_ROWS * size, *norm = top + BLOCK_ROWS;
    char *queries = (char *)(norm + BLOCK_ROWS), *weights = queries + BLOCK_ROWS * size * unit;
    gather(t, q, first, rows, queries);
    for (long i = 0; i < rows; i++) top[i] = -INFINITY, norm[i] = 0;
    long end = seen(t, first + rows - 1);
    for (long start = 0; start < end; start += BLOCK_KEYS) {
        long keys = end - start < BLOCK_KEYS ? end - start : BLOCK_KEYS;
        long width = (keys + LANES - 1) / LANES * LANES;
        gemm(rows, keys, size, (Operand){queries, size, 1}, transposed(keys_of(t, k, start)), type,
             (Result){scores, width, FP32, 0}, 1);
        for (long i = 0; i < rows; i++) {
            long count = seen(t, first + i) - start;
            count = count < 0 ? 0 : count < keys ? count : keys;
            float before = top[i];
            if (!count) {
                memset(weights + i * width * unit, 0, width * unit);
                continue;
            }
            float more = soften(scores + i * width, count, width, t->shape->scale, top + i,
                                weights + i * width * unit, type);
            float shrink = start ? expf(before - top[i]) : 0;
            norm[i] = norm[i] * shrink + more;
            if (start && shrink != 1)
                for (long c = 0; c < size; c++) sums[i * size + c] *= shrink;
        }
        gemm(rows, size, keys, (Operand){weights, width, 1}, keys_of(t, v, start), type,
             (Result){sums, size, FP32, start > 0}, 1);
    }
    for (long i = 0; i < rows; i++) {
        char *to = (char *)out + place(t, first + i, size) * unit;
        float share = 1 / norm[i];
        for (long c = 0; c < size; c++) {
            if (type == BF16) ((bf16 *)to)[c] = narrow(sums[i * size + c] * share);
            else ((float *)to)[c] = sums[i * size + c] * share;
        }
        lse[place(t, first + i, 1)] = top[i] + logf(norm[i]);
    }
}

/* Runs of BLOCK_ROWS rows of all segments and key heads, the long ones of a segment last. */
void zaya_attention(const long *segments, long count, const Shape *shape, const void *q,
                    const void *k, const void *v, void *out, float *lse) {
    long tasks = count * shape->kv_heads;
#pragma omp parallel for schedule(dynamic) num_threads(shape->threads) if (shape->threads > 1)
    for (long number = 0; number < tasks; number++) {
        Task t = task_of(shape, segments, number);
        long rows = t.segment.query_count * t.group;
        long step = BLOCK_ROWS / t.group * t.group;
        for (long first = 0; first < rows; first += step)
            forward_block(&t, q, k, v, out, lse, first, rows - first < step ? rows - first : step);
    }
}

typedef struct {
    const void *q, *k, *v, *out, *grad;
    const float *lse;
    void *to_q, *to_k, *to_v;
    long shared; /* keys belong to several segments: theirs are fp32 sums, zero at first */
} Tensors;

/* Memory of one block of queries against one of keys. */
typedef struct {
    float *scores, *slopes, *to_queries, *to_keys, *to_values, *mean, *lse;
    char *queries, *grad, *weights, *grad_weights;
} Room;

static Room room_of(const Task *t) {
    long size = t->shape->size, rows = t->segment.query_count * t->group;
    size_t floats = 2 * BLOCK_ROWS * BLOCK_KEYS + rows * (size + 2) + 2 * BLOCK_KEYS * size;
    size_t typed = 2 * rows * size + 2 * BLOCK_ROWS * BLOCK_KEYS;
    Room r;
    r.scores = scratch(SCRATCH_CALLER, floats * 4 + typed * t->unit);
    r.slopes = r.scores + BLOCK_ROWS * BLOCK_KEYS;
    r.to_keys = r.slopes + BLOCK_ROWS * BLOCK_KEYS;
    r.to_values = r.to_keys + BLOCK_KEYS * size;
    r.to_queries = r.to_values + BLOCK_KEYS * size;
    r.mean = r.to_queries + rows * size;
    r.lse = r.mean + rows;
    r.queries = (char *)(r.lse + rows);
    r.grad = r.queries + rows * size * t->unit;
    r.weights = r.grad + rows * size * t->unit;
    r.grad_weights = r.weights + BLOCK_ROWS * BLOCK_KEYS * t->unit;
    return r;
}

/* Probabilities and gradients of scores of one block, in the operands' type. */
static void slopes_of(const Task *t, Room r, long first, long rows, long start, long keys,
                      long width) {
    long unit = t->unit;
    int type = t->shape->type;
    float scale = t->shape->scale;
    for (long i = 0; i < rows; i++) {
        long count = seen(t, first + i) - start;
        count = count < 0 ? 0 : count < keys ? count : keys;
        float *score = r.scores + i * width, *slope = r.slopes + i * width;
        float lse = r.lse[first + i], mean = r.mean[first + i];
        char *weight = r.weights + i * width * unit, *grad = r.grad_weights + i * width * unit;
        for (long j = count; j < width; j++) score[j] = -INFINITY, slope[j] = 0;
        for (long j = 0; j < width; j += LANES) {
            vec p = power(*(vec *)(score + j) * scale - lse, type);
            store(weight, type, j, p);
            store(grad, type, j, p * (*(vec *)(slope + j) - mean) * scale);
        }
    }
}

static void backward_block(const Task *t, const Tensors *x, Room r, long first, long rows,
                           long start, long keys) {
    long size = t->shape->size, width = (keys + LANES - 1) / LANES * LANES;
    int type = t->shape->type;
    Operand queries = {r.queries + first * size * t->unit, size, 1};
    Operand grad = {r.grad + first * size * t->unit, size, 1};
    Operand weights = {r.weights, width, 1}, grad_weights = {r.grad_weights, width, 1};
    gemm(rows, keys, size, queries, transposed(keys_of(t, x->k, start)), type,
         (Result){r.scores, width, FP32, 0}, 1);
    gemm(rows, keys, size, grad, transposed(keys_of(t, x->v, start)), type,
         (Result){r.slopes, width, FP32, 0}, 1);
    slopes_of(t, r, first, rows, start, keys, width);
    /* Transposed: the products over queries turn the few columns and not the scores. */
    gemm(size, keys, rows, transposed(grad), weights, type,
         (Result){r.to_values, BLOCK_KEYS, FP32, 1}, 1);
    gemm(size, keys, rows, transposed(queries), grad_weights, type,
         (Result){r.to_keys, BLOCK_KEYS, FP32, 1}, 1);
    gemm(rows, size, keys, grad_weights, keys_of(t, x->k, start), type,
         (Result){r.to_queries + first * size, size, FP32, start > 0}, 1);
}

static void backward_task(const Task *t, const Tensors *x) {
    long size = t->shape->size, rows = t->segment.query_count * t->group;
    long step = BLOCK_ROWS / t->group * t->group, row = t->shape->kv_heads * size;
    int type = t->shape->type;
    Room r = room_of(t);
    gather(t, x->q, 0, rows, r.queries);
    gather(t, x->grad, 0, rows, r.grad);
    for (long i = 0; i < rows; i++) {
        vec dots = all(0);
        long from = place(t, i, size);
        for (long c = 0; c < size; c += LANES)
            dots += load_few(x->grad, type, from + c, size - c) *
                    load_few(x->out, type, from + c, size - c);
        r.mean[i] = total(dots), r.lse[i] = x->lse[place(t, i, 1)];
    }
    for (long start = 0; start < t->segment.key_count; start += BLOCK_KEYS) {
        long left = t->segment.key_count - start, keys = left < BLOCK_KEYS ? left : BLOCK_KEYS;
        memset(r.to_keys, 0, 2 * BLOCK_KEYS * size * sizeof(float));
        for (long first = 0; first < rows; first += step) {
            long count = rows - first < step ? rows - first : step;
            long reach = seen(t, first + count - 1) - start;
            if (reach > 0)
                backward_block(t, x, r, first, count, start, reach < keys ? reach : keys);
        }
        for (long j = 0; j < keys; j++)
            for (long c = 0; c < size; c++) {
                long to = (t->segment.key_start + start + j) * row + t->head * size + c;
                float for_k = r.to_keys[c * BLOCK_KEYS + j], for_v = r.to_values[c * BLOCK_KEYS + j];
                if (x->shared) {
                    ((float *)x->to_k)[to] += for_k, ((float *)x->to_v)[to] += for_v;
                } else {
                    put(x->to_k, type, to, for_k), put(x->to_v, type, to, for_v);
                }
            }
    }
    for (long i = 0; i < rows; i++)
        for (long c = 0; c < size; c++)
            put(x->to_q, type, place(t, i, size) + c, r.to_queries[i * size + c]);
}

/* Gradients; those of keys in no segment are left as they are. Segments that share keys are taken
 * one after another, so that sums have one order. */
void zaya_attention_backward(const long *segments, long count, const Shape *shape,
                             const Tensors *tensors) {
    long together = tensors->shared ? count : 1, tasks = count * shape->kv_heads / together;
#pragma omp parallel for schedule(dynamic) num_threads(shape->threads) if (shape->threads > 1)
    for (long number = 0; number < tasks; number++)
        for (long i = 0; i < together; i++) {
            Task t = task_of(shape, segments, number + i * shape->kv_heads);
            backward_task(&t, tensors);
        }
}
