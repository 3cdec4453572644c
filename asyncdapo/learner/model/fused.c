/* What a block computes number by number, each in one pass over memory, forward and backward, in float32.

In: arrays in order, of rows or of single numbers. Out: arrays of the same sizes. A row is summed in one order, and rows
in blocks of ROWS, so results don't depend on the number of threads. */

#include <omp.h>
#include <string.h>

#include "vectors.h"

#define ROWS 64

/* Up to LANES numbers, 0 in the place of the others. */
static inline Floats read(const float *from, int64_t count) {
    Floats x = {0};
    if (count >= LANES) return *(const Unaligned *)from;
    memcpy(&x, from, count * sizeof(float));
    return x;
}

static inline void write(float *to, int64_t count, Floats x) {
    if (count >= LANES)
        *(Unaligned *)to = x;
    else
        memcpy(to, &x, count * sizeof(float));
}

/* RMS norm: x * scale * weight, scale = 1 / sqrt(|x|^2 / size + epsilon), which is kept for the backward pass. */
void norm(int64_t threads, int64_t rows, int64_t size, double epsilon, const float *x, const float *weight, float *scales,
          float *out) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *of = x + row * size;
        Floats squares = {0};
        for (int64_t i = 0; i < size; i += LANES) {
            const Floats part = read(of + i, size - i);
            squares += part * part;
        }
        scales[row] = 1 / sqrtf(sum_of(squares) / size + epsilon);
        for (int64_t i = 0; i < size; i += LANES)
            write(out + row * size + i, size - i, read(of + i, size - i) * scales[row] * read(weight + i, size - i));
    }
}

/* grad_weights [blocks of ROWS, size], zeros: their sum is the weight's gradient. */
void norm_back(int64_t threads, int64_t rows, int64_t size, const float *x, const float *weight, const float *scales,
               const float *grad, float *grad_x, float *grad_weights) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < rows; block += ROWS)
        for (int64_t row = block; row < rows && row < block + ROWS; row++) {
            const float *of = x + row * size, *from = grad + row * size;
            float *sums = grad_weights + block / ROWS * size;
            Floats along = {0};
            for (int64_t i = 0; i < size; i += LANES) {
                const Floats product = read(of + i, size - i) * read(from + i, size - i);
                along += product * read(weight + i, size - i);
                write(sums + i, size - i, read(sums + i, size - i) + product * scales[row]);
            }
            const float less = sum_of(along) * scales[row] * scales[row] / size;
            for (int64_t i = 0; i < size; i += LANES) {
                const Floats own = read(from + i, size - i) * read(weight + i, size - i);
                write(grad_x + row * size + i, size - i, (own - read(of + i, size - i) * less) * scales[row]);
            }
        }
}

/* 1 / (1 + e^-x) */
static inline Floats sigmoid(Floats x) { return 1 / (1 + exp_of(-larger(x, (Floats){0} - 88.0f))); }

/* SwiGLU: silu(gate) * up. */
void swiglu(int64_t threads, int64_t count, const float *gate, const float *up, float *out) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats gates = read(gate + i, count - i);
        write(out + i, count - i, gates * sigmoid(gates) * read(up + i, count - i));
    }
}

void swiglu_back(int64_t threads, int64_t count, const float *gate, const float *up, const float *grad, float *grad_gate,
                 float *grad_up) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats gates = read(gate + i, count - i), grads = read(grad + i, count - i), open = sigmoid(gates);
        write(grad_up + i, count - i, grads * gates * open);
        write(grad_gate + i, count - i, grads * read(up + i, count - i) * open * (1 + gates * (1 - open)));
    }
}

/* Each head's (first, second) half becomes (first * cos - second * sin, second * cos + first * sin), or, `back`, what the
   transposed map makes of it. x [token, head, 2 half]; cos, sin [token, 2 half]. */
void rotate(int64_t threads, int64_t tokens, int64_t heads, int64_t half, int64_t back, const float *x, const float *cos,
            const float *sin, float *out) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = token * heads; head < (token + 1) * heads; head++)
            for (int64_t i = 0; i < half; i += LANES) {
                const int64_t count = half - i, first = 2 * head * half + i, angle = 2 * token * half + i;
                const Floats a = read(x + first, count), b = read(x + first + half, count);
                Floats sin_a = read(sin + angle, count), sin_b = read(sin + angle + half, count);
                if (back) {
                    const Floats of_a = sin_a;
                    sin_a = -sin_b, sin_b = -of_a;
                }
                write(out + first, count, a * read(cos + angle, count) - b * sin_a);
                write(out + first + half, count, b * read(cos + angle + half, count) + a * sin_b);
            }
}
