/* Forward: the model and the draw in C, in float32, compiled for one model's sizes by `library.py`.

In: weights, and tokens with their places, one a row. Out: their keys and values in the cache; logits of the rows that are
asked for. What a row gets is summed in one order, whatever the other rows are: it doesn't depend on them to the last bit.

Macros: LAYERS, HIDDEN, INTERMEDIATE, KV_HEADS, GROUP (query heads of a key/value head), HEAD_DIM, VOCABULARY, EPSILON.
Arrays begin at multiples of 64 bytes, and end behind the last whole tile of rows.

A projection [outputs, inputs] lies as panels of PANEL outputs, [panel, input, output in the panel]: each product reads
its weights once, in order. The cache is [layer, slot, key/value head, chunk], and a chunk holds CHUNK times: keys
[span, dim, time in the span], for which a query's products are vectors, then values [time, dim], padded to whole vectors.
Both are larger than a processor's own cache: while a panel or a chunk is computed with, the next one is on its way. */

#include <string.h>

#include "vectors.h"

#define PANEL 32 /* `packed_weights.py` and `compiled_model.py` lay out what is read here */
#define CHUNK 32
#define VALUE ((HEAD_DIM + 15) / 16 * 16)
#define CHUNK_SIZE (CHUNK * (HEAD_DIM + VALUE))
#define TILE (LANES == 16 ? 8 : 4) /* rows that are multiplied at once: as many as there are registers for */
#define SPANS (CHUNK / LANES)      /* vectors of a chunk's times */
#define PARTS (VALUE / LANES)      /* vectors of a value */
#define QUERIES (KV_HEADS * GROUP)
#define HEADS (QUERIES + 2 * KV_HEADS)

typedef struct {
    const float *attention_norm, *qkv, *qkv_bias, *qk_norm, *out, *out_bias;
    const float *mlp_norm, *gate_up, *gate_up_bias, *down, *down_bias;
} Layer; /* biases and qk_norm may be null */

typedef struct {
    const float *embedding, *norm, *head;
    Layer layers[LAYERS];
} Weights;

/* The first `count` numbers, -infinity in the place of the others. */
static inline Floats until(Floats x, int count) {
    Ints places;
    for (int i = 0; i < LANES; i++) places[i] = i;
    const Ints first = places < count;
    return (Floats)(((Ints)x & first) | ((Ints)((Floats){0} - INFINITY) & ~first));
}

/* ----------------------------------------------------------------------------------------------------- products */

/* Reads `ahead` meanwhile, `stride` numbers for each input. */
static inline void multiply_tile(int64_t inputs, int64_t outputs, int num_columns, const float *x, const float *panel,
                                 const float *bias, int add, const float *ahead, int64_t stride, float *out) {
    Floats sums[TILE][2] = {0};
    for (int64_t i = 0; i < inputs; i++) {
        const Floats first = *(const Floats *)(panel + i * PANEL), second = *(const Floats *)(panel + i * PANEL + LANES);
        __builtin_prefetch(ahead + i * stride);
        for (int r = 0; r < TILE; r++) {
            sums[r][0] += x[r * inputs + i] * first;
            sums[r][1] += x[r * inputs + i] * second;
        }
    }
    for (int r = 0; r < TILE; r++, out += outputs)
        for (int part = 0; part < 2; part++) {
            const int at = part * LANES;
            if (at + LANES <= num_columns) {
                Floats sum = sums[r][part];
                if (bias) sum += *(const Unaligned *)(bias + at);
                if (add) sum += *(const Unaligned *)(out + at);
                *(Unaligned *)(out + at) = sum;
            } else
                for (int i = 0; i < num_columns - at; i++)
                    out[at + i] = sums[r][part][i] + (bias ? bias[at + i] : 0) + (add ? out[at + i] : 0);
        }
}

/* out [rows, outputs] = x [rows, inputs] . weight + bias, added to what is there if `add`. Rows are filled up to a tile. */
static void multiply(int threads, int64_t rows, int64_t inputs, int64_t outputs, const float *x, const float *weight,
                     const float *bias, int add, float *out) {
    const int64_t stride = PANEL / ((rows + TILE - 1) / TILE); /* so that all rows together read one panel ahead */
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t column = 0; column < outputs; column += 2 * LANES) {
        const float *panel = weight + column / PANEL * PANEL * inputs;
        const int num_columns = outputs - column < 2 * LANES ? outputs - column : 2 * LANES;
        for (int64_t row = 0; row < rows; row += TILE)
            multiply_tile(inputs, outputs, num_columns, x + row * inputs, panel + column % PANEL,
                          bias ? bias + column : 0, add, panel + (PANEL + row / TILE * stride) * inputs, stride,
                          out + row * outputs + column);
    }
}

/* RMS norm: x / sqrt(|x|^2 / size + EPSILON) * weight. */
static void norm(int64_t rows, int64_t size, const float *x, const float *weight, float *out) {
    for (int64_t row = 0; row < rows; row++, x += size, out += size) {
        Floats squares = {0};
        float rest = 0;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) {
            const Floats part = *(const Unaligned *)(x + i);
            squares += part * part;
        }
        for (; i < size; i++) rest += x[i] * x[i];
        const float scale = 1 / sqrtf((sum_of(squares) + rest) / size + EPSILON);
        for (i = 0; i < size; i++) out[i] = x[i] * scale * weight[i];
    }
}

/* SwiGLU: silu(gate) * up, of [rows, gate | up]. */
static void gate(int64_t rows, const float *gate_up, float *out) {
    const Floats lowest = (Floats){0} - 88.0f;
    for (int64_t row = 0; row < rows; row++, gate_up += 2 * INTERMEDIATE, out += INTERMEDIATE) {
        const float *up = gate_up + INTERMEDIATE;
        int64_t i = 0;
        for (; i + LANES <= INTERMEDIATE; i += LANES) {
            const Floats gates = *(const Unaligned *)(gate_up + i);
            *(Unaligned *)(out + i) = gates / (1 + exp_of(-larger(gates, lowest))) * *(const Unaligned *)(up + i);
        }
        for (; i < INTERMEDIATE; i++) out[i] = gate_up[i] / (1 + expf(-gate_up[i])) * up[i];
    }
}

/* ---------------------------------------------------------------------------------------------------- attention */

/* Rotate queries and keys by the angle of their position, and write keys and values to the cache.

   heads [queries | keys | values, HEAD_DIM] of a row, rotation [HEAD_DIM / 2 complex numbers], chunks of a slot */
static void write_row(const Layer *layer, int64_t num_chunks, int64_t position, const float *rotation, float *heads,
                      float *chunks) {
    for (int h = 0; h < HEADS - KV_HEADS; h++) {
        float *head = heads + h * HEAD_DIM;
        if (layer->qk_norm) norm(1, HEAD_DIM, head, layer->qk_norm + h * HEAD_DIM, head);
        float rotated[HEAD_DIM];
        for (int d = 0; d < HEAD_DIM; d += 2) {
            rotated[d] = head[d] * rotation[d] - head[d + 1] * rotation[d + 1];
            rotated[d + 1] = head[d] * rotation[d + 1] + head[d + 1] * rotation[d];
        }
        memcpy(head, rotated, sizeof rotated);
    }
    for (int h = 0; h < KV_HEADS; h++) {
        const float *key = heads + (QUERIES + h) * HEAD_DIM, *value = key + KV_HEADS * HEAD_DIM;
        float *chunk = chunks + (h * num_chunks + position / CHUNK) * CHUNK_SIZE;
        float *keys = chunk + position % CHUNK / LANES * LANES * HEAD_DIM + position % LANES;
        float *values = chunk + CHUNK * HEAD_DIM + position % CHUNK * VALUE;
        for (int d = 0; d < HEAD_DIM; d++) {
            keys[d * LANES] = key[d];
            values[d] = value[d];
        }
    }
}

/* The softmax-weighted sum of values, as far as it is known, for each query of a key/value head. */
typedef struct {
    float largest[GROUP];
    Floats total[GROUP], sum[GROUP][PARTS];
} Attended;

/* Reads the chunk `next` meanwhile. */
static inline void attend_chunk(Attended *so_far, const float *queries, const Floats *chunk, int num_times,
                                const Floats *next) {
    const Floats *values = chunk + SPANS * HEAD_DIM;
    Floats scores[GROUP][SPANS] = {0};
    for (int d = 0; d < HEAD_DIM; d++)
        for (int span = 0; span < SPANS; span++) {
            __builtin_prefetch(next + span * HEAD_DIM + d);
            for (int g = 0; g < GROUP; g++)
                scores[g][span] += queries[g * HEAD_DIM + d] * chunk[span * HEAD_DIM + d];
        }
    for (int g = 0; g < GROUP; g++) {
        Floats highest = (Floats){0} - INFINITY;
        for (int span = 0; span < SPANS; span++) {
            scores[g][span] = until(scores[g][span], num_times - span * LANES);
            highest = larger(highest, scores[g][span]);
        }
        const float largest = fmaxf(so_far->largest[g], largest_of(highest));
        if (largest > so_far->largest[g]) {
            const float factor = expf(so_far->largest[g] - largest);
            so_far->largest[g] = largest;
            so_far->total[g] *= factor;
            for (int i = 0; i < PARTS; i++) so_far->sum[g][i] *= factor;
        }
        Floats total = {0};
        for (int span = 0; span < SPANS; span++) total += scores[g][span] = exp_of(scores[g][span] - largest);
        so_far->total[g] += total;
    }
    const float(*probs)[CHUNK] = (const float(*)[CHUNK])scores;
    next += SPANS * HEAD_DIM;
    for (int t = 0; t < num_times; t++) {
        for (int i = 0; i < PARTS; i++) __builtin_prefetch(next + t * PARTS + i);
        for (int g = 0; g < GROUP; g++)
            for (int i = 0; i < PARTS; i++) so_far->sum[g][i] += probs[g][t] * values[t * PARTS + i];
    }
    for (int i = num_times * PARTS; i < CHUNK * PARTS; i++) __builtin_prefetch(next + i);
}

/* Attend to the first `num_times` of a head's chunks with the queries [GROUP, HEAD_DIM]; `next` are read after these. */
static void attend(int64_t num_times, const float *queries, const float *chunks, const float *next, float *out) {
    Attended all = {0};
    for (int g = 0; g < GROUP; g++) all.largest[g] = -INFINITY;
    for (; num_times > 0; num_times -= CHUNK, chunks += CHUNK_SIZE)
        attend_chunk(&all, queries, (const Floats *)chunks, num_times < CHUNK ? num_times : CHUNK,
                     (const Floats *)(num_times > CHUNK ? chunks + CHUNK_SIZE : next));
    for (int g = 0; g < GROUP; g++) {
        const float total = sum_of(all.total[g]);
        for (int i = 0; i < PARTS; i++) all.sum[g][i] /= total;
        memcpy(out + g * HEAD_DIM, all.sum[g], 4 * HEAD_DIM);
    }
}

/* All heads of a row; `next` are the chunks of the row behind it. */
static void attend_row(int64_t num_chunks, int64_t num_times, const float *heads, const float *chunks, const float *next,
                       float *out) {
    const int64_t size = num_chunks * CHUNK_SIZE;
    for (int h = 0; h < KV_HEADS; h++, chunks += size)
        attend(num_times, heads + h * GROUP * HEAD_DIM, chunks, h + 1 < KV_HEADS ? chunks + size : next,
               out + h * GROUP * HEAD_DIM);
}

/* Write the rows [heads], and attend with them. A row's tokens before it must be written when it attends; one thread
   attends at once, with what it has just written at hand. own: the layer's cache; rotations as in `forward`. */
static void attention(int64_t threads, int64_t rows, const Layer *layer, int64_t num_chunks, const int64_t *slots,
                      const int64_t *positions, const float *rotations, float *heads, float *own, float *attended) {
    const int64_t size = KV_HEADS * num_chunks * CHUNK_SIZE, last = rows - 1;
    for (int64_t first = 0; threads > 1 && first < rows; first++)
        write_row(layer, num_chunks, positions[first], rotations + positions[first] * HEAD_DIM,
                  heads + first * HEADS * HEAD_DIM, own + slots[first] * size);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        float *row_heads = heads + row * HEADS * HEAD_DIM, *chunks = own + slots[row] * size;
        if (threads == 1)
            write_row(layer, num_chunks, positions[row], rotations + positions[row] * HEAD_DIM, row_heads, chunks);
        attend_row(num_chunks, positions[row] + 1, row_heads, chunks, own + slots[row < last ? row + 1 : last] * size,
                   attended + row * QUERIES * HEAD_DIM);
    }
}

/* -------------------------------------------------------------------------------------------------- whole model */

/* Tokens at positions of slots, a row each; logits [rows_out, VOCABULARY] behind the rows `out`. A slot's rows are its
   next tokens: each attends to all that are written. rotations [position, HEAD_DIM / 2] are complex.
   workspace: rows, filled up to a tile, times 2 HIDDEN + (HEADS + QUERIES) HEAD_DIM + 3 INTERMEDIATE. */
void forward(int64_t threads, int64_t rows, int64_t rows_out, int64_t num_slots, int64_t num_chunks,
             const int64_t *tokens, const int64_t *slots, const int64_t *positions, const int64_t *out,
             const Weights *weights, const float *rotations, float *cache, float *workspace, float *logits) {
    const int64_t whole = (rows + TILE - 1) / TILE * TILE;
    float *x = workspace, *normed = x + whole * HIDDEN, *heads = normed + whole * HIDDEN;
    float *attended = heads + whole * HEADS * HEAD_DIM, *gate_up = attended + whole * QUERIES * HEAD_DIM;
    float *gated = gate_up + whole * 2 * INTERMEDIATE;
    for (int64_t i = 0; i < whole * HIDDEN; i++)
        x[i] = i < rows * HIDDEN ? weights->embedding[tokens[i / HIDDEN] * HIDDEN + i % HIDDEN] : 0;
    for (int index = 0; index < LAYERS; index++) {
        const Layer *layer = weights->layers + index;
        float *own = cache + index * num_slots * KV_HEADS * num_chunks * CHUNK_SIZE;
        norm(rows, HIDDEN, x, layer->attention_norm, normed);
        multiply(threads, rows, HIDDEN, HEADS * HEAD_DIM, normed, layer->qkv, layer->qkv_bias, 0, heads);
        attention(threads, rows, layer, num_chunks, slots, positions, rotations, heads, own, attended);
        multiply(threads, rows, QUERIES * HEAD_DIM, HIDDEN, attended, layer->out, layer->out_bias, 1, x);
        norm(rows, HIDDEN, x, layer->mlp_norm, normed);
        multiply(threads, rows, HIDDEN, 2 * INTERMEDIATE, normed, layer->gate_up, layer->gate_up_bias, 0, gate_up);
        gate(rows, gate_up, gated);
        multiply(threads, rows, INTERMEDIATE, HIDDEN, gated, layer->down, layer->down_bias, 1, x);
    }
    for (int64_t row = 0; row < rows_out; row++)
        norm(1, HIDDEN, x + out[row] * HIDDEN, weights->norm, normed + row * HIDDEN);
    multiply(threads, rows_out, HIDDEN, VOCABULARY, normed, weights->head, 0, 0, logits);
}

/* -------------------------------------------------------------------------------------------------------- draws */

/* e^((logits - largest) / temperature) of the LANES tokens from `first` on; 0 behind the last one. */
static inline Floats weights_of(const float *logits, int first, float temperature, float largest) {
    Floats scaled;
    for (int i = 0; i < LANES; i++) scaled[i] = first + i < VOCABULARY ? logits[first + i] / temperature : -INFINITY;
    return exp_of(scaled - largest);
}

/* A token by the inverse of the cumulative distribution, and its log-prob: see `sampling.py`. */
static int draw(const float *logits, float temperature, double uniform, int greedy, float *logprob) {
    int token = 0;
    for (int i = 1; i < VOCABULARY; i++)
        if (logits[i] > logits[token]) token = i;
    const float largest = logits[token] / temperature;
    double total = 0, before = 0;
    for (int i = 0; i < VOCABULARY; i += LANES) total += sum_of(weights_of(logits, i, temperature, largest));
    const double target = uniform * total;
    for (int i = 0; i < VOCABULARY && !greedy; i += LANES) {
        const Floats weights = weights_of(logits, i, temperature, largest);
        const double behind = before + sum_of(weights);
        if (behind > target) {
            /* Should the sum in order be less than that of the vector, the last possible token is drawn. */
            for (int j = 0; j < LANES && before <= target; j++)
                if (weights[j] > 0) before += weights[j], token = i + j;
            break;
        }
        before = behind;
    }
    *logprob = logits[token] / temperature - largest - logf(total);
    return token;
}

/* Columns of `batch.py`, an entry for each slot; those behind `num_sampled` have `max_tokens`. */
typedef struct {
    const int64_t *active;
    int64_t *token, *position, *num_sampled;
    const float *temperature;
    const uint8_t *greedy;
    const double *uniforms;
    int32_t *tokens;
    float *logprobs;
} Batch;

/* Draw the next token of each of these slots, a row of logits each, and append it. Returns the sum of the log-probs. */
double sample(int64_t rows, int64_t max_tokens, const float *logits, const int64_t *slots, const Batch *batch) {
    double sum = 0;
    for (int64_t row = 0; row < rows; row++, logits += VOCABULARY) {
        const int64_t slot = slots[row], next = slot * max_tokens + batch->num_sampled[slot];
        float *logprob = batch->logprobs + next;
        const int token =
            draw(logits, batch->temperature[slot], batch->uniforms[next], batch->greedy[slot], logprob);
        batch->tokens[next] = batch->token[slot] = token;
        batch->position[slot] += batch->active[slot];
        batch->num_sampled[slot] += batch->active[slot];
        sum += *logprob;
    }
    return sum;
}
