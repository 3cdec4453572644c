/* Vectors of LANES float32 numbers, those of GCC and Clang: as long as the processor's. Longer ones are slow: GCC keeps them
   in memory. */

#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4)));

/* e^x up to x = 88, by the polynomial of Cephes: x = n ln 2 + r, |r| <= ln 2 / 2. 0 below -87; NaN stays NaN. */
static inline Floats exp_of(Floats x) {
    const float round = 12582912.0f; /* 1.5 * 2^23: what is added to it loses its fraction */
    Floats n = x * 1.44269504f + round;
    n -= round;
    Floats r = x - n * 0.693359375f - n * -2.12194440e-4f;
    Floats sum = 1.9875691500e-4f * r + 1.3981999507e-3f;
    sum = sum * r + 8.3334519073e-3f;
    sum = sum * r + 4.1665795894e-2f;
    sum = sum * r + 1.6666665459e-1f;
    sum = sum * r + 5.0000001201e-1f;
    sum = sum * (r * r) + r + 1.0f;
    Floats power = (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
    return (Floats)((Ints)(sum * power) & ~(x < -87.0f));
}

static inline Floats larger(Floats a, Floats b) {
    Ints first = a > b;
    return (Floats)(((Ints)a & first) | ((Ints)b & ~first));
}

static inline float largest_of(Floats x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
}

static inline float sum_of(Floats x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}
