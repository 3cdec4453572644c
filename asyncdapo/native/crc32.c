/* CRC-32 by multiplication without carries: https://www.intel.com/content/dam/www/public/us/en/documents/white-papers/
   fast-crc-computation-generic-polynomials-pclmulqdq-paper.pdf. Numbers are polynomials, their bits in reverse order. */

#include <immintrin.h>
#include <stdint.h>

/* What must be added to the bytes `distance` behind these 16, so that the CRC of all is that of what is left. `powers`
   are x^(8 * distance + 32) and x^(8 * distance - 32), modulo the polynomial of CRC-32. */
static inline __m128i carried(__m128i bytes, __m128i powers) {
    return _mm_xor_si128(_mm_clmulepi64_si128(bytes, powers, 0x00), _mm_clmulepi64_si128(bytes, powers, 0x11));
}

/* `rest`, 16 bytes, is added to the first 16 of the data, which are 64 bytes a block; then it becomes the 16 bytes whose
   CRC, begun at 0, is that of the data. */
void fold(int64_t num_blocks, const __m128i *data, __m128i *rest) {
    const __m128i over_64 = _mm_set_epi64x(0x1c6e41596, 0x154442bd4), over_16 = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);
    __m128i lanes[4];
    for (int lane = 0; lane < 4; lane++) lanes[lane] = _mm_loadu_si128(data + lane);
    lanes[0] = _mm_xor_si128(lanes[0], _mm_loadu_si128(rest));
    for (int64_t block = 1; block < num_blocks; block++)
        for (int lane = 0; lane < 4; lane++)
            lanes[lane] = _mm_xor_si128(carried(lanes[lane], over_64), _mm_loadu_si128(data + 4 * block + lane));
    __m128i left = lanes[0];
    for (int lane = 1; lane < 4; lane++) left = _mm_xor_si128(carried(left, over_16), lanes[lane]);
    _mm_storeu_si128(rest, left);
}
