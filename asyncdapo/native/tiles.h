/* The product of a few rows with a few columns, from which larger products are made: its sums stay in registers. */

#include <string.h>

#include "vectors.h"

#define COLUMNS (2 * LANES) /* of a tile */
#define TILE (LANES < 16 ? 4 : 8) /* its rows: where vectors are shorter, there are half as many of them */
#define ROUND_UP(n, step) (((n) + (step) - 1) / (step) * (step))

/* out [TILE, COLUMNS] = a . b, added to what is there if `add`; a [TILE, depth] by its two strides, b [depth, COLUMNS]. */
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
