/* Attention over packed sequences, forward and backward, in float32, compiled for one head size by `compiled_attention.py`.

In: queries, keys and values of flat tokens, and which of them are a prompt and the responses to it. Out: for each token and
query head the softmax-weighted sum of values, and the logarithm of the sum of its exponentials, from which the backward
pass computes the weights again. A unit of work is a prompt with its responses and one key/value head: units share nothing
that is written, and a unit is summed in one order, so results don't depend on the number of threads.

    segment   the queries of a prompt, or of one response; its keys are those of its prompt, then its own
    block     up to BLOCK queries of a segment, all whose scores exist at once

Macros: HEAD_DIM. Rows of a workspace are padded with zeros: of numbers of a head to WIDTH, of queries and keys to whole
tiles. */

#include <omp.h>
#include <string.h>

#include "vectors.h"

#define COLUMNS (2 * LANES) /* of a tile */
#define TILE (LANES < 16 ? 4 : 8) /* its rows: where vectors are shorter, there are half as many of them */
#define ROUND_UP(n, step) (((n) + (step) - 1) / (step) * (step))
#define BLOCK 32
#define WIDTH ROUND_UP(HEAD_DIM, COLUMNS)

/* Numbers of a head, a row each; rows of tokens are `stride` apart. */
typedef struct {
    float *data;
    int64_t stride;
} Heads;

typedef struct {
    int64_t prompt, num_prompt, own, num_own; /* tokens: the first, and how many */
} Segment;

typedef struct {
    int64_t width; /* keys, rounded up to whole tiles */
    float *queries, *grads;               /* [BLOCK, WIDTH] */
    float *weights, *grad_weights;        /* [BLOCK, width] */
    float *keys_across, *values_across;   /* [HEAD_DIM, width] */
    float *keys, *values;                 /* [width, WIDTH] */
    float *grad_keys, *grad_values;       /* [width, WIDTH] */
} Workspace;

/* The product of a few rows with a few columns: its sums stay in registers.
   out [TILE, COLUMNS] = a . b, added to what is there if `add`; a [TILE, depth] by its two strides, b [depth, COLUMNS]. */
static __attribute__((noinline)) void multiply(int64_t depth, const float *a, int64_t a_row, int64_t a_deep, const float *b,
                                               int64_t b_row, float *out, int64_t out_row, int add) {
    Floats sums[TILE][2] = {0};
    for (int64_t i = 0; i < depth; i++, b += b_row) {
        const Floats first = *(const Floats *)b, second = *(const Floats *)(b + LANES);
        for (int r = 0; r < TILE; r++) {
            const float factor = a[r * a_row + i * a_deep];
            sums[r][0] += factor * first;
            sums[r][1] += factor * second;
        }
    }
    for (int r = 0; r < TILE; r++, out += out_row) {
        *(Floats *)out = add ? *(Floats *)out + sums[r][0] : sums[r][0];
        *(Floats *)(out + LANES) = add ? *(Floats *)(out + LANES) + sums[r][1] : sums[r][1];
    }
}

/* ------------------------------------------------------------------------------------------------------- copies */

static void read_rows(int64_t count, Heads from, int64_t token, float *to) {
    for (int64_t i = 0; i < count; i++)
        memcpy(to + i * WIDTH, from.data + (token + i) * from.stride, HEAD_DIM * sizeof(float));
}

/* A segment's keys or values, as rows and as columns; `across` may be null. */
static void read_segment(Segment of, Heads from, int64_t width, float *rows, float *across) {
    const int64_t count = of.num_prompt + of.num_own;
    memset(rows + count * WIDTH, 0, (width - count) * WIDTH * sizeof(float));
    read_rows(of.num_prompt, from, of.prompt, rows);
    read_rows(of.num_own, from, of.own, rows + of.num_prompt * WIDTH);
    if (across)
        for (int64_t t = 0; t < width; t++)
            for (int d = 0; d < HEAD_DIM; d++) across[d * width + t] = rows[t * WIDTH + d];
}

static void write_rows(int64_t count, const float *from, Heads to, int64_t token, int add) {
    for (int64_t i = 0; i < count; i++)
        for (int d = 0; d < HEAD_DIM; d++) {
            float *into = to.data + (token + i) * to.stride + d;
            *into = from[i * WIDTH + d] + (add ? *into : 0);
        }
}

static void read_block(int64_t count, Heads from, int64_t token, float *to) {
    memset(to + count * WIDTH, 0, (BLOCK - count) * WIDTH * sizeof(float));
    read_rows(count, from, token, to);
}

/* ------------------------------------------------------------------------------------------------------- passes */

/* Keys that some query of the tile sees which begins with the block's query `row`, in whole tiles. */
static inline int64_t seen(Segment of, int64_t block, int64_t row) {
    const int64_t behind_last = of.num_prompt + block + row + TILE, count = of.num_prompt + of.num_own;
    return behind_last < count ? behind_last : count;
}

/* The weights of a block's rows: e^(score * scale - log), 0 for keys behind the query. Where `logs`, the logarithm of each
   row's sum of exponentials, isn't known, it is found on the way. */
static void weigh(Segment of, int64_t block, int64_t count, float scale, const Workspace *in, float *logs, int known) {
    const int64_t width = in->width;
    for (int64_t row = 0; row < count; row += TILE) {
        const int64_t num_keys = ROUND_UP(seen(of, block, row), COLUMNS);
        for (int64_t key = 0; key < num_keys; key += COLUMNS)
            multiply(HEAD_DIM, in->queries + row * WIDTH, WIDTH, 1, in->keys_across + key, width,
                     in->weights + row * width + key, width, 0);
        for (int64_t r = row; r < row + TILE; r++) {
            float *weights = in->weights + r * width;
            const int64_t last = r < count ? of.num_prompt + block + r : -1;
            Floats largest = (Floats){0} - INFINITY, total = {0};
            for (int64_t key = last + 1; key < num_keys; key++) weights[key] = -INFINITY;
            for (int64_t key = 0; key < num_keys; key += LANES) {
                *(Floats *)(weights + key) *= scale;
                largest = larger(*(Floats *)(weights + key), largest);
            }
            const float less = r >= count ? 0 : known ? logs[r] : largest_of(largest);
            for (int64_t key = 0; key < num_keys; key += LANES) {
                *(Floats *)(weights + key) = exp_of(*(Floats *)(weights + key) - less);
                total += *(Floats *)(weights + key);
            }
            if (known || r >= count) continue;
            const float sum = sum_of(total);
            for (int64_t key = 0; key < num_keys; key += LANES) *(Floats *)(weights + key) *= 1 / sum;
            logs[r] = less + logf(sum);
        }
    }
}

static void segment_forward(Segment of, float scale, const Workspace *in, Heads queries, Heads out, float *logs,
                            int64_t log_stride) {
    float logs_of_block[BLOCK];
    for (int64_t block = 0; block < of.num_own; block += BLOCK) {
        const int64_t count = of.num_own - block < BLOCK ? of.num_own - block : BLOCK;
        read_block(count, queries, of.own + block, in->queries);
        weigh(of, block, count, scale, in, logs_of_block, 0);
        for (int64_t row = 0; row < count; row += TILE)
            for (int d = 0; d < WIDTH; d += COLUMNS)
                multiply(seen(of, block, row), in->weights + row * in->width, in->width, 1, in->values + d, WIDTH,
                         in->queries + row * WIDTH + d, WIDTH, 0); /* in the place of queries, which are used */
        write_rows(count, in->queries, out, of.own + block, 0);
        for (int64_t i = 0; i < count; i++) logs[(of.own + block + i) * log_stride] = logs_of_block[i];
    }
}

static void segment_backward(Segment of, float scale, const Workspace *in, Heads queries, Heads out, const float *logs,
                             int64_t log_stride, Heads grad_out, Heads grad_queries) {
    const int64_t width = in->width, num_keys = of.num_prompt + of.num_own;
    float logs_of_block[BLOCK], along[BLOCK] = {0};
    for (int64_t block = 0; block < of.num_own; block += BLOCK) {
        const int64_t count = of.num_own - block < BLOCK ? of.num_own - block : BLOCK;
        read_block(count, queries, of.own + block, in->queries);
        read_block(count, grad_out, of.own + block, in->grads);
        for (int64_t i = 0; i < count; i++) {
            const float *result = out.data + (of.own + block + i) * out.stride;
            logs_of_block[i] = logs[(of.own + block + i) * log_stride];
            along[i] = 0;
            for (int d = 0; d < HEAD_DIM; d++) along[i] += result[d] * in->grads[i * WIDTH + d];
        }
        weigh(of, block, count, scale, in, logs_of_block, 1);
        const int64_t rows = ROUND_UP(count, TILE);
        for (int64_t key = 0; key < num_keys; key += TILE) { /* a key's gradients are of the queries that see it */
            int64_t first = key - of.num_prompt - block;
            first = first < 0 ? 0 : first / TILE * TILE;
            if (first >= rows) break;
            for (int d = 0; d < WIDTH; d += COLUMNS)
                multiply(rows - first, in->weights + first * width + key, 1, width, in->grads + first * WIDTH + d, WIDTH,
                         in->grad_values + key * WIDTH + d, WIDTH, 1);
        }
        for (int64_t row = 0; row < count; row += TILE) {
            const int64_t end = ROUND_UP(seen(of, block, row), COLUMNS);
            for (int64_t key = 0; key < end; key += COLUMNS)
                multiply(HEAD_DIM, in->grads + row * WIDTH, WIDTH, 1, in->values_across + key, width,
                         in->grad_weights + row * width + key, width, 0);
            for (int64_t r = row; r < row + TILE; r++)
                for (int64_t key = 0; key < end; key += LANES) {
                    Floats *grad = (Floats *)(in->grad_weights + r * width + key);
                    *grad = *(Floats *)(in->weights + r * width + key) * (*grad - along[r]) * scale;
                }
        }
        for (int64_t key = 0; key < num_keys; key += TILE) {
            int64_t first = key - of.num_prompt - block;
            first = first < 0 ? 0 : first / TILE * TILE;
            if (first >= rows) break;
            for (int d = 0; d < WIDTH; d += COLUMNS)
                multiply(rows - first, in->grad_weights + first * width + key, 1, width,
                         in->queries + first * WIDTH + d, WIDTH, in->grad_keys + key * WIDTH + d, WIDTH, 1);
        }
        for (int64_t row = 0; row < count; row += TILE)
            for (int d = 0; d < WIDTH; d += COLUMNS)
                multiply(seen(of, block, row), in->grad_weights + row * width, width, 1, in->keys + d, WIDTH,
                         in->grads + row * WIDTH + d, WIDTH, 0); /* in the place of gradients, which are used */
        write_rows(count, in->grads, grad_queries, of.own + block, 0);
    }
}

static Workspace cut(float *memory, int64_t width) {
    Workspace in = {.width = width};
    float **parts[] = {&in.queries, &in.grads, &in.weights, &in.grad_weights, &in.keys_across,
                       &in.values_across, &in.keys, &in.values, &in.grad_keys, &in.grad_values};
    const int64_t sizes[] = {BLOCK * WIDTH, BLOCK * WIDTH, BLOCK * width, BLOCK * width, HEAD_DIM * width,
                             HEAD_DIM * width, WIDTH * width, WIDTH * width, WIDTH * width, WIDTH * width};
    for (int i = 0; i < 10; i++) *parts[i] = memory, memory += sizes[i];
    return in;
}

/* Both passes. `segments` [num_bundles + 1] begin at `firsts`; each bundle's first is its prompt alone, `num_prompt` 0.
   Tensors are [token, head, HEAD_DIM], logs [token, query head]. memory [threads, size], zeros: `cut` at the widest segment.
   Without grad_out it is the forward pass, which writes out and logs; with it, out and logs are read, and gradients of
   keys and values are added to zeros. */
void attend(int64_t threads, int64_t num_bundles, int64_t kv_heads, int64_t group, int64_t size, double scale,
            const int64_t *firsts, const Segment *segments, float *queries, float *keys, float *values, float *out,
            float *logs, float *memory, float *grad_out, float *grad_queries, float *grad_keys, float *grad_values) {
    const int64_t of_keys = kv_heads * HEAD_DIM, of_queries = group * of_keys;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t bundle = 0; bundle < num_bundles; bundle++)
        for (int64_t head = 0; head < kv_heads; head++) {
            float *own = memory + size * omp_get_thread_num();
            for (int64_t at = firsts[bundle]; at < firsts[bundle + 1]; at++) {
                const Segment of = segments[at];
                const int64_t width = ROUND_UP(of.num_prompt + of.num_own, COLUMNS);
                const Workspace in = cut(own, width);
                const Heads key = {keys + head * HEAD_DIM, of_keys}, value = {values + head * HEAD_DIM, of_keys};
                read_segment(of, key, width, in.keys, in.keys_across);
                read_segment(of, value, width, in.values, grad_out ? in.values_across : 0);
                if (grad_out) memset(in.grad_keys, 0, 2 * width * WIDTH * sizeof(float));
                for (int64_t q = head * group; q < (head + 1) * group; q++) {
                    const Heads query = {queries + q * HEAD_DIM, of_queries}, result = {out + q * HEAD_DIM, of_queries};
                    if (!grad_out) {
                        segment_forward(of, scale, &in, query, result, logs + q, kv_heads * group);
                        continue;
                    }
                    const Heads grad = {grad_out + q * HEAD_DIM, of_queries};
                    const Heads grad_query = {grad_queries + q * HEAD_DIM, of_queries};
                    segment_backward(of, scale, &in, query, result, logs + q, kv_heads * group, grad, grad_query);
                }
                if (!grad_out) continue;
                const Heads grad_key = {grad_keys + head * HEAD_DIM, of_keys};
                const Heads grad_value = {grad_values + head * HEAD_DIM, of_keys};
                write_rows(of.num_prompt, in.grad_keys, grad_key, of.prompt, 1);
                write_rows(of.num_prompt, in.grad_values, grad_value, of.prompt, 1);
                write_rows(of.num_own, in.grad_keys + of.num_prompt * WIDTH, grad_key, of.own, 1);
                write_rows(of.num_own, in.grad_values + of.num_prompt * WIDTH, grad_value, of.own, 1);
            }
        }
}
