/* Vectors of the width the machine has, by GCC's and clang's vector extensions. */
#ifndef ZAYA_VECTORS_H
#define ZAYA_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define LOW_LANES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_LANES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define LANES 8
#define LOW_LANES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_LANES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LANES 4
#define LOW_LANES 0, 4, 1, 5
#define HIGH_LANES 2, 6, 3, 7
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint16_t bf16;

/* GCC has clang's name only since version 12. */
#if defined(__clang__)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (words){__VA_ARGS__})
#endif

enum { FP32 = 0, BF16 = 1 };

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

/* To the nearest bf16, ties to even; NaN stays NaN. */
static inline bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return (bf16)((bits >> 16) | 0x40);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline vec load_bf16(const bf16 *x) {
    words bits = __builtin_convertvector(*(const halves *)x, words) << 16;
    return (vec)bits;
}

static inline void store_bf16(bf16 *to, vec x) {
#if defined(__AVX512BF16__)
    __m256bh out = _mm512_cvtneps_pbh((__m512)x);
    memcpy(to, &out, 32);
#else
    words bits = (words)x;
    words even = (bits >> 16) & 1;
    words nan = x != x;
    words out = (((bits + 0x7fff + even) & ~nan) | ((bits | 0x400000) & nan)) >> 16;
    *(halves *)to = __builtin_convertvector(out, halves);
#endif
}

/* Asks for `bytes` at `ahead` bytes from `x`, which may lie outside of everything. */
static inline void ask_for(const void *x, long ahead, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch((void *)((uintptr_t)x + ahead + i));
}

/* By its bits: 0 + x would be an addition, and no copy of -0 or of a pair of bf16. */
static inline vec all(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    words zero = {0};
    return (vec)(zero + bits);
}

static inline float total(vec x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

static inline vec choose(words where, vec yes, vec no) {
    return (vec)(((words)yes & where) | ((words)no & ~where));
}

/* The larger of two; b where one is NaN. */
static inline vec larger(vec a, vec b) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}

static inline float largest_of(vec x) {
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
}

/* e^x to 2 units in the last place, 0 below -87 and infinite above 88 (AVX-512: -104 and 88.7); NaN
 * stays. */
static inline vec exp_of(vec x) {
#if defined(__AVX512F__)
    x = larger(all(-105), (vec)_mm512_min_ps((__m512)all(89), (__m512)x));
    vec whole = (vec)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);
#else
    words small = x < all(-87.0f), large = x > all(88.0f);
    x = choose(small, all(-87.0f), x);
    vec shifted = x * 1.44269504f + 12582912.0f; /* 1.5 x 2^23: rounds to an integer */
    vec whole = shifted - 12582912.0f;
#endif
    x = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec sum = x * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * x + 8.3334519073e-3f;
    sum = sum * x + 4.1665795894e-2f;
    sum = sum * x + 1.6666665459e-1f;
    sum = sum * x + 0.5f;
    sum = sum * x * x + x + 1.0f;
#if defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)sum, (__m512)whole);
#else
    vec power = (vec)(((words)shifted << 23) + ((words)all(1)));
    return choose(large, all(INFINITY), choose(small, all(0), sum * power));
#endif
}

/* e^x of x below 88 for what is rounded to bf16: to 4e-6 of it while |x| < 16; 0 below -87
 * (AVX-512: -104). */
static inline vec exp_in_brief(vec x) {
    x = larger(all(-151), x * 1.44269504f);
#if defined(__AVX512F__)
    vec whole = (vec)_mm512_roundscale_ps((__m512)x, 0);
#else
    words small = x < all(-126);
    vec shifted = x + 12582912.0f, whole = shifted - 12582912.0f;
#endif
    x -= whole;
    vec sum = x * 9.5701013e-3f + 5.5917859e-2f;
    sum = sum * x + 0.24024744f;
    sum = sum * x + 0.69312179f;
    sum = sum * x + 0.99999928f;
#if defined(__AVX512F__)
    return (vec)_mm512_scalef_ps((__m512)sum, (__m512)whole);
#else
    return choose(small, all(0), sum * (vec)(((words)shifted << 23) + ((words)all(1))));
#endif
}

/* Elements of a tensor of `type`, a vector from i on or one. */
static inline vec load(const void *x, int type, long i) {
    return type == BF16 ? load_bf16((const bf16 *)x + i) : *(const vec *)((const float *)x + i);
}

static inline void store(void *x, int type, long i, vec value) {
    if (type == BF16) store_bf16((bf16 *)x + i, value);
    else *(vec *)((float *)x + i) = value;
}

static inline float at(const void *x, int type, long i) {
    return type == BF16 ? widen(((const bf16 *)x)[i]) : ((const float *)x)[i];
}

static inline void put(void *x, int type, long i, float value) {
    if (type == BF16) ((bf16 *)x)[i] = narrow(value);
    else ((float *)x)[i] = value;
}

/* A vector of the `left` elements from i on, zero beyond them. */
INLINE vec load_few(const void *x, int type, long i, long left) {
    if (left >= LANES) return load(x, type, i);
    float few[LANES] = {0};
    for (long l = 0; l < left; l++) few[l] = at(x, type, i + l);
    return *(const vec *)few;
}

INLINE void store_few(void *x, int type, long i, long left, vec value) {
    if (left >= LANES) store(x, type, i, value);
    else
        for (long l = 0; l < left; l++) put(x, type, i + l, value[l]);
}

#endif
