/* Vectors of the CPU kernels: loads and stores of both element types, sums, dot products, exponentials.

   The order of every sum is fixed by its length alone. */

#ifndef MANYLORA_VEC_H
#define MANYLORA_VEC_H

#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
/* A block has 4 rows times 2 rank rows or vectors of columns: 8 sums, as many as it takes to keep two multipliers busy,
   and few enough for 16 registers. */
#define ROWS 4
#define ACROSS 2

#define INLINE static inline __attribute__((always_inline))
/* Sums live in registers only if the loops over them are unrolled. */
#define UNROLLED _Pragma("GCC unroll 4")

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t half_vec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int32_t int_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t bits_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

enum { FLOAT32 = 0, BFLOAT16 = 1 };

INLINE float load1(const void *p, int64_t i, int type) {
    if (type == FLOAT32) return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE vec load(const void *p, int64_t i, int type) {
    if (type == FLOAT32) return *(const vec *)((const float *)p + i);
    bits_vec bits = __builtin_convertvector(*(const half_vec *)((const uint16_t *)p + i), bits_vec) << 16;
    return (vec)bits;
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void store(void *p, int64_t i, vec value, int type) {
    if (type == FLOAT32) {
        *(vec *)((float *)p + i) = value;
    } else {
        for (int lane = 0; lane < LANES; lane++) ((uint16_t *)p)[i + lane] = to_bfloat16(value[lane]);
    }
}

INLINE void store1(void *p, int64_t i, float value, int type) {
    if (type == FLOAT32)
        ((float *)p)[i] = value;
    else
        ((uint16_t *)p)[i] = to_bfloat16(value);
}

INLINE const void *at(const void *p, int64_t i, int type) {
    return type == FLOAT32 ? (const void *)((const float *)p + i) : (const void *)((const uint16_t *)p + i);
}

#ifdef __clang__
#define SWAP(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SWAP(v, ...) __builtin_shuffle(v, (int_vec){__VA_ARGS__})
#endif

INLINE float sum(vec v) {
#if LANES == 16
    v += SWAP(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += SWAP(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += SWAP(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v += SWAP(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#else
    v += SWAP(v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += SWAP(v, 2, 3, 0, 1, 6, 7, 4, 5);
    v += SWAP(v, 1, 0, 3, 2, 5, 4, 7, 6);
#endif
    return v[0];
}

/* out[r * out_row + j] = scales[r] * <x[r], w[j]> for `count` rows and 2 others, all k long. */
INLINE void dot_block(const void *const *w, const void *const *x, const float *scales, float *out, int64_t out_row,
                      int64_t k, int count, int type) {
    vec acc[ROWS][ACROSS];
    UNROLLED
    for (int r = 0; r < count; r++)
        UNROLLED
        for (int j = 0; j < ACROSS; j++) acc[r][j] = (vec){0};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        vec u[ACROSS];
        UNROLLED
        for (int j = 0; j < ACROSS; j++) u[j] = load(w[j], i, type);
        UNROLLED
        for (int r = 0; r < count; r++) {
            vec v = load(x[r], i, type);
            UNROLLED
            for (int j = 0; j < ACROSS; j++) acc[r][j] += v * u[j];
        }
    }
    UNROLLED
    for (int r = 0; r < count; r++)
        UNROLLED
        for (int j = 0; j < ACROSS; j++) {
            float total = sum(acc[r][j]);
            for (int64_t rest = i; rest < k; rest++) total += load1(x[r], rest, type) * load1(w[j], rest, type);
            out[r * out_row + j] = total * scales[r];
        }
}

/* The same for a count that is only known now. */
INLINE void dot_rows(const void *const *w, const void *const *x, const float *scales, float *out, int64_t out_row,
                     int64_t k, int count, int type) {
    switch (count) {
    case 4: dot_block(w, x, scales, out, out_row, k, 4, type); break;
    case 3: dot_block(w, x, scales, out, out_row, k, 3, type); break;
    case 2: dot_block(w, x, scales, out, out_row, k, 2, type); break;
    default: dot_block(w, x, scales, out, out_row, k, 1, type);
    }
}

/* e^x for x <= 0, within 2 ulp; 0 below -87. 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' expf). */
INLINE vec exp_negative(vec x) {
    const vec shift = (vec){0} + 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vec n = x * 1.44269504f + shift - shift;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int_vec exponent = (__builtin_convertvector(n, int_vec) + 127) << 23;
    int_vec dropped = x < -87.0f; /* not so a NaN, which stays */
    return (vec)((int_vec)(p * (vec)exponent) & ~dropped);
}

#endif
