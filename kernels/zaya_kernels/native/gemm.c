/* A tile of c is ROWS x 2 vectors of fp32 sums in registers. b is packed in panels of 2 vectors'
 * columns over the whole of k; a is read in place where its rows are contiguous, else packed by
 * panels of ROWS. bf16 is multiplied in pairs along k (vdpbf16ps) where the machine does that, and
 * widened while packing elsewhere. */
#include "gemm.h"

#include <stdio.h>

#if defined(__AVX512F__) || defined(__aarch64__)
#define ROWS 12
#else
#define ROWS 4
#endif
#define COLUMNS (2 * LANES)
/* Block sizes: a panel of b for the first-level cache (32 KB), a block of b (512 KB) and one of a
 * for the second. */
#define STEPS 256
#define PANELS 16
#define TILES 8
/* Rows that packing asks for before it reads them: it takes 64 bytes of each. */
#define AHEAD 32

#if defined(__AVX512BF16__)
#define PAIRED 1
#else
#define PAIRED 0
#endif

void *scratch(enum Scratch slot, size_t bytes) {
    static __thread void *held[SCRATCHES];
    static __thread size_t sizes[SCRATCHES];
    if (sizes[slot] < bytes) {
        free(held[slot]);
        sizes[slot] = (bytes + 4095) / 4096 * 4096;
        held[slot] = aligned_alloc(64, sizes[slot]);
        if (!held[slot]) {
            fprintf(stderr, "kernels: native found no memory for %zu bytes\n", sizes[slot]);
            abort();
        }
    }
    return held[slot];
}

static inline vec pair_sum(vec sum, vec a, vec b) {
#if PAIRED
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return sum + a * b;
#endif
}

/* c [rows, COLUMNS] (+)= sums over `steps` steps; a: 4-byte elements, strides in bytes. */
#define TILE(name, rows, multiply)                                                             \
    static void name(long steps, const char *a, long row, long step, const float *b, Result c) { \
        vec sum[rows][2];                                                                      \
        for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = all(0);                         \
        for (long s = 0; s < steps; s++, a += step, b += COLUMNS) {                            \
            vec left = *(const vec *)b, right = *(const vec *)(b + LANES);                     \
            _Pragma("GCC unroll 12") for (int i = 0; i < rows; i++) {                          \
                vec x = all(*(const float *)(a + i * row));                                    \
                sum[i][0] = multiply(sum[i][0], x, left);                                      \
                sum[i][1] = multiply(sum[i][1], x, right);                                     \
            }                                                                                  \
        }                                                                                      \
        if (c.type == BF16) {                                                                  \
            _Pragma("GCC unroll 12") for (int i = 0; i < rows; i++) {                          \
                store_bf16((bf16 *)c.data + i * c.row, sum[i][0]);                             \
                store_bf16((bf16 *)c.data + i * c.row + LANES, sum[i][1]);                     \
            }                                                                                  \
            return;                                                                            \
        }                                                                                      \
        if (c.accumulate)                                                                      \
            _Pragma("GCC unroll 12") for (int i = 0; i < rows; i++) {                          \
                sum[i][0] += *(vec *)((float *)c.data + i * c.row);                            \
                sum[i][1] += *(vec *)((float *)c.data + i * c.row + LANES);                    \
            }                                                                                  \
        _Pragma("GCC unroll 12") for (int i = 0; i < rows; i++) {                              \
            *(vec *)((float *)c.data + i * c.row) = sum[i][0];                                 \
            *(vec *)((float *)c.data + i * c.row + LANES) = sum[i][1];                         \
        }                                                                                      \
    }
#define FMA(sum, x, y) ((sum) + (x) * (y))
TILE(tile_4, 4, FMA)
TILE(pairs_4, 4, pair_sum)
#if ROWS == 12
TILE(tile_8, 8, FMA)
TILE(pairs_8, 8, pair_sum)
TILE(tile_12, 12, FMA)
TILE(pairs_12, 12, pair_sum)
#endif

typedef void (*Tile)(long, const char *, long, long, const float *, Result);

static Tile tile_of(long rows, int paired) {
#if ROWS == 12
    if (rows > 8) return paired ? pairs_12 : tile_12;
    if (rows > 4) return paired ? pairs_8 : tile_8;
#endif
    return paired ? pairs_4 : tile_4;
}

/* Rows of 4-byte elements to columns: to[s * width + i] = from[i * row + s]. */
static void transpose_block(const char *from, long row, float *to, long width) {
    vec x[LANES], y[LANES];
    for (int i = 0; i < LANES; i++) x[i] = *(const vec *)(from + i * row);
    _Pragma("GCC unroll 4") for (int round = 1; round < LANES; round *= 2) {
        _Pragma("GCC unroll 8") for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = SHUFFLE(x[i], x[i + LANES / 2], LOW_LANES);
            y[2 * i + 1] = SHUFFLE(x[i], x[i + LANES / 2], HIGH_LANES);
        }
        memcpy(x, y, sizeof x);
    }
    for (int i = 0; i < LANES; i++) *(vec *)(to + i * width) = x[i];
}

static inline uint32_t pair(const bf16 *x, long column, long s, long k) {
    uint32_t low = x[2 * s * column];
    return 2 * s + 1 < k ? low | (uint32_t)x[(2 * s + 1) * column] << 16 : low;
}

/* One element of the packed form. */
static inline float element(Operand x, int type, long i, long s, long k) {
    float out;
    if (type == FP32) return ((const float *)x.data)[i * x.row + s * x.column];
    const bf16 *at = (const bf16 *)x.data + i * x.row;
    if (!PAIRED) return widen(at[s * x.column]);
    uint32_t bits = pair(at, x.column, s, k);
    memcpy(&out, &bits, 4);
    return out;
}

#if PAIRED
/* Pairs of the `left` elements of two rows, zeros up to `width`; LANES of them or less. */
static inline void interleave(const bf16 *even, const bf16 *odd, long left, float *to, long width) {
    __mmask16 given = left < LANES ? (1 << left) - 1 : 0xffff;
    __mmask16 wanted = width < LANES ? (1 << width) - 1 : 0xffff;
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(given, even));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(given, odd));
    _mm512_mask_storeu_epi32(to, wanted, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

/* The same of the first `count` of `width` columns of x, over `steps` steps. */
static inline void pack_pairs(Operand x, long count, long steps, float *to, long width) {
    const bf16 *even = x.data;
    for (long s = 0; s < steps; s++, even += 2 * x.column, to += width) {
        const bf16 *odd = even + x.column;
        ask_for(even, AHEAD * x.column * 2, 1), ask_for(odd, AHEAD * x.column * 2, 1);
        for (long i = 0; i < width; i += LANES)
            interleave(even + i, odd + i, count < i ? 0 : count - i, to + i, width - i);
    }
}
#endif

/* Panel of `count` <= width rows of x [., steps], starting at row `first` and step `begin`:
 * to[steps][width], zeros in missing rows. For b, x is its transpose. */
static inline __attribute__((always_inline)) void pack(
    Operand x, int type, long first, long count, long begin, long steps, long k, float *to,
    const long width) {
    long s = 0, unit = type == BF16 ? 2 : 4, group = PAIRED && type == BF16 ? 2 : 1;
    x.data = (const char *)x.data + (first * x.row + begin * group * x.column) * unit;
    k -= begin * group;
    long full = k / group < steps ? k / group : steps, whole = count < width ? 0 : full;
    if (x.column == 1 && (type == FP32 || PAIRED) && width % LANES == 0) {
        for (; s + LANES <= whole; s += LANES)
            for (long i = 0; i < width; i += LANES)
                transpose_block(
                    (const char *)x.data + i * x.row * unit + s * 4, x.row * unit,
                    to + s * width + i, width);
    } else if (x.row == 1 && type == FP32) {
        for (; s < whole; s++)
            memcpy(to + s * width, (const float *)x.data + s * x.column, width * 4);
    }
#if PAIRED
    else if (x.row == 1)
        pack_pairs(x, count, s = full, to, width);
#endif
    for (; s < steps; s++)
        for (long i = 0; i < width; i++)
            to[s * width + i] = i < count ? element(x, type, i, s, k) : 0.0f;
}

static void *place(Result c, long i, long j) {
    return (char *)c.data + (i * c.row + j) * (c.type == BF16 ? 2 : 4);
}

/* The part of a tile that c has. */
static void store_part(const float *tile, Result c, long rows, long columns) {
    for (long i = 0; i < rows; i++, tile += COLUMNS)
        for (long j = 0; j < columns; j += LANES) {
            vec sum = *(const vec *)(tile + j);
            if (c.accumulate) sum += load_few(c.data, FP32, i * c.row + j, columns - j);
            store_few(c.data, c.type, i * c.row + j, columns - j, sum);
        }
}

typedef struct {
    long m, n, k, steps; /* steps along k */
    Operand a, b;
    int type;
} Product;

/* Steps [begin, end) of columns [start, stop) of c. */
static void block_of(Product p, long start, long stop, long begin, long end, Result c) {
    long steps = end - begin, unit = p.type == BF16 ? 2 : 4, size = steps * COLUMNS;
    int paired = PAIRED && p.type == BF16;
    int in_place = p.a.column == 1 && (p.type == FP32 || (PAIRED && p.k % 2 == 0));
    long panels = (stop - start + COLUMNS - 1) / COLUMNS;
    float *right = scratch(SCRATCH_RIGHT, panels * size * 4);
    float *left = scratch(SCRATCH_LEFT, TILES * ROWS * steps * 4);
    float part[ROWS * COLUMNS];
    Result apart = {part, COLUMNS, FP32, 0};
    Operand turned = {p.b.data, p.b.column, p.b.row};
    for (long j = 0; j < panels; j++) {
        long first = start + j * COLUMNS, count = stop - first < COLUMNS ? stop - first : COLUMNS;
        pack(turned, p.type, first, count, begin, steps, p.k, right + j * size, COLUMNS);
    }
    for (long top = 0; top < p.m; top += TILES * ROWS) {
        long bottom = p.m - top < TILES * ROWS ? p.m : top + TILES * ROWS;
        for (long i = top; i < bottom; i += ROWS) {
            long rows = bottom - i < ROWS ? bottom - i : ROWS;
            if (!in_place || rows % 4)
                pack(p.a, p.type, i, rows, begin, steps, p.k, left + (i - top) * steps, ROWS);
        }
        for (long j = 0; j < panels; j++) {
            long first = start + j * COLUMNS;
            long width = stop - first < COLUMNS ? stop - first : COLUMNS;
            for (long i = top; i < bottom; i += ROWS) {
                long rows = bottom - i < ROWS ? bottom - i : ROWS, row = 4, step = ROWS * 4;
                const char *from = (const char *)(left + (i - top) * steps);
                if (in_place && rows % 4 == 0) {
                    row = p.a.row * unit, step = 4;
                    from = (const char *)p.a.data + i * row + begin * 4;
                }
                for (long l = 0; l < rows; l++) __builtin_prefetch(place(c, i + l, first), 1);
                Result to = {place(c, i, first), c.row, c.type, c.accumulate};
                int whole = width == COLUMNS && rows % 4 == 0;
                tile_of(rows, paired)(steps, from, row, step, right + j * size, whole ? to : apart);
                if (!whole) store_part(part, to, rows, width);
            }
        }
    }
}

/* Columns [start, stop) of c, by blocks of k that the caches hold. */
static void columns_of(Product p, long start, long stop, Result c) {
    Result sums = c;
    int apart = c.type == BF16 && p.steps > STEPS;
    if (apart) {
        sums.row = stop - start, sums.type = FP32;
        sums.data = (float *)scratch(SCRATCH_SUMS, p.m * sums.row * 4) - start;
    }
    for (long begin = 0; begin == 0 || begin < p.steps; begin += STEPS) {
        long end = p.steps - begin < STEPS ? p.steps : begin + STEPS;
        block_of(p, start, stop, begin, end, sums);
        sums.accumulate = 1;
    }
    for (long i = 0; apart && i < p.m; i++)
        for (long j = start; j < stop; j++)
            ((bf16 *)c.data)[i * c.row + j] = narrow(((float *)sums.data)[i * sums.row + j]);
}

void gemm(long m, long n, long k, Operand a, Operand b, int type, Result c, int threads) {
    if (!m || !n) return;
    Product p = {m, n, k, PAIRED && type == BF16 ? (k + 1) / 2 : k, a, b, type};
    long panels = (n + COLUMNS - 1) / COLUMNS, share = (panels + threads - 1) / threads;
    long block = share < PANELS ? share : PANELS;
    long blocks = (panels + block - 1) / block;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && blocks > 1)
    for (long j = 0; j < blocks; j++) {
        long start = j * block * COLUMNS, stop = start + block * COLUMNS;
        columns_of(p, start, stop < n ? stop : n, c);
    }
}

void zaya_gemm(
    long m, long n, long k, const void *a, long a_row, long a_column, const void *b, long b_row,
    long b_column, long type, void *c, long c_row, long c_type, long accumulate, long threads) {
    Operand left = {a, a_row, a_column}, right = {b, b_row, b_column};
    Result out = {c, c_row, c_type, accumulate};
    gemm(m, n, k, left, right, type, out, threads);
}
