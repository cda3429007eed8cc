/* A box of an RGB image, resized (bilinear, antialiased) and mirrored, with exactly the bytes that PyTorch makes.

   Like PyTorch, this resizes rows to bytes first and columns second, with weights of 16 bits. It resizes two rows at a
   time and interleaves them as words, because one instruction adds up products of pairs. It keeps only as many rows as
   the columns' filter reaches, so they stay in the first-level cache, and writes the result to its place in the batch.
   It prefetches the image, because a decoder's stores may have bypassed the caches. */

#ifdef __AVX2__ /* other processors get no kernel */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define CHANNELS 3
#define INLINE static inline __attribute__((always_inline))
#define LINE 64    /* bytes of a cache line */
#define MARGIN 256 /* most bytes that are read or written beyond a row */
#define AHEAD 4    /* rows to prefetch ahead; twice as many in the result */
#if defined __AVX512VBMI__ && defined __AVX512VNNI__
#define AT_ONCE 5 /* pixels whose bytes fill 15 of a register's 16 sums */
#define BOTH(weights) _mm512_set1_epi32(*(const int_pair *)(weights))
#else
#define BOTH(weights) _mm256_set1_epi32(*(const int_pair *)(weights))
#endif

typedef int32_t __attribute__((may_alias)) int_pair; /* two weights of 16 bits */
enum { DONE, NO_MEMORY, MOST_BITS = 22 };

/* Pixel i of a resized side is the sum of weights[i * taps + j] times the old pixel first[i] + j, over 2^bits. */
typedef struct {
    int taps, bits; /* `taps` is even; taps of weight 0 may lie outside the image */
    int *first;
    int16_t *weights;
} filter;

/* How to resize two rows: step k makes `pixels` pixels from the bytes that begin at starts[k]. For each pair of taps it
   has the bytes' weights and, for steps of several pixels, their places. */
typedef struct {
    int pixels, steps, pairs;
    int *starts;
    uint8_t *picks;
    int16_t *weights;
} program;

static int rounded(int count, int unit) { return (count + unit - 1) / unit * unit; }

static void *space(size_t count, size_t size) { return aligned_alloc(LINE, (count * size / LINE + 2) * LINE); }

/* Triangles as wide as the distance between resized pixels or old ones, whichever is larger. With `even`, each begins
   at an even pixel. */
static int make_filter(filter *f, int old, int size, int even) {
    double scale = (double)old / size, support = scale > 1 ? scale : 1, largest = 0;
    int most = rounded((int)ceil(support) * 2 + 2, 2), widest = 1;
    f->first = space(size, sizeof *f->first);
    f->weights = space((size_t)size * most, sizeof *f->weights);
    double *exact = space((size_t)size * most, sizeof *exact);
    if (!f->first || !f->weights || !exact) {
        free(exact);
        return NO_MEMORY;
    }
    memset(exact, 0, (size_t)size * most * sizeof *exact);
    for (int i = 0; i < size; i++) {
        double center = scale * (i + 0.5), total = 0, *own = exact + (size_t)i * most;
        int first = (int)(center - support + 0.5), end = (int)(center + support + 0.5);
        first = first > 0 ? first : 0;
        end = end < old ? end : old;
        f->first[i] = even ? first / 2 * 2 : first;
        for (int j = first - f->first[i]; j < end - f->first[i]; j++) {
            double distance = fabs((f->first[i] + j - center + 0.5) / support);
            own[j] = distance < 1 ? 1 - distance : 0;
            total += own[j];
            if (own[j] > 0 && j >= widest) widest = j + 1;
        }
        for (int j = 0; j < end - f->first[i]; j++) {
            own[j] /= total;
            largest = own[j] > largest ? own[j] : largest;
        }
    }
    /* As many bits as the largest weight allows. */
    for (f->bits = 0; f->bits < MOST_BITS; f->bits++)
        if ((int)(0.5 + largest * (1 << (f->bits + 1))) >= 1 << 15) break;
    f->taps = rounded(widest, 2);
    for (int i = 0; i < size; i++)
        for (int j = 0; j < f->taps; j++)
            f->weights[(size_t)i * f->taps + j] = (int16_t)(0.5 + exact[(size_t)i * most + j] * (1 << f->bits));
    free(exact);
    return DONE;
}

static int make_program(program *p, const filter *f, int size, int mirrored) {
    p->pixels = 1;
#ifdef AT_ONCE
    p->pixels = AT_ONCE;
    for (int i = 0; i < size; i++) { /* a step's bytes must fit one register */
        int last = i + AT_ONCE < size ? i + AT_ONCE - 1 : size - 1;
        if (CHANNELS * (f->first[last] - f->first[i] + f->taps) > LINE) p->pixels = 1;
    }
#endif
    p->pairs = f->taps / 2;
    p->steps = rounded(size, p->pixels) / p->pixels;
    int sums = p->pixels == 1 ? 4 : 16;
    size_t places = (size_t)p->steps * p->pairs * sums;
    p->starts = space(p->steps, sizeof *p->starts);
    p->picks = space(places, 4);
    p->weights = space(places, 2 * sizeof *p->weights);
    if (!p->starts || !p->picks || !p->weights) return NO_MEMORY;
    memset(p->picks, 0, 4 * places);
    memset(p->weights, 0, 2 * places * sizeof *p->weights);
    for (int k = 0; k < p->steps; k++) {
        int begin = k * p->pixels, end = begin + p->pixels < size ? begin + p->pixels : size;
        int start = f->first[mirrored ? size - end : begin];
        p->starts[k] = CHANNELS * start;
        for (int i = begin; i < end; i++) {
            int from = mirrored ? size - 1 - i : i, shift = CHANNELS * (f->first[from] - start);
            for (int q = 0; q < p->pairs; q++)
                for (int c = 0; c < CHANNELS; c++) {
                    size_t place = ((size_t)k * p->pairs + q) * sums + CHANNELS * (i - begin) + c;
                    p->picks[4 * place] = (uint8_t)(shift + 2 * CHANNELS * q + c);
                    p->picks[4 * place + 2] = (uint8_t)(shift + 2 * CHANNELS * q + c + CHANNELS);
                    memcpy(p->weights + 2 * place, f->weights + (size_t)from * f->taps + 2 * q, 4);
                }
        }
    }
    return DONE;
}

#ifdef AT_ONCE
INLINE void resize_several(const uint8_t *a, const uint8_t *b, const program *p, int pairs, int bits, uint16_t *out) {
    const __m512i half = _mm512_set1_epi32(1 << (bits - 1)), upper = _mm512_set1_epi32(0xff << 16);
    const __m512i to_upper = _mm512_set1_epi32(16 - bits);
    const __m128i shift = _mm_cvtsi32_si128(bits);
    const __mmask64 every_other = 0x5555555555555555;
    const uint8_t *picks = p->picks;
    const int16_t *weights = p->weights;
    for (int k = 0; k < p->steps; k++, out += 2 * CHANNELS * AT_ONCE) {
        __m512i of_a = _mm512_loadu_si512(a + p->starts[k]), of_b = _mm512_loadu_si512(b + p->starts[k]);
        __m512i sum_a = half, sum_b = half;
        for (int q = 0; q < pairs; q++, picks += 64, weights += 32) {
            __m512i pick = _mm512_load_si512(picks), weight = _mm512_load_si512(weights);
            sum_a = _mm512_dpwssd_epi32(sum_a, _mm512_maskz_permutexvar_epi8(every_other, pick, of_a), weight);
            sum_b = _mm512_dpwssd_epi32(sum_b, _mm512_maskz_permutexvar_epi8(every_other, pick, of_b), weight);
        }
        sum_a = _mm512_srl_epi32(sum_a, shift), sum_b = _mm512_rolv_epi32(sum_b, to_upper);
        _mm512_storeu_si512(out, _mm512_ternarylogic_epi32(sum_a, sum_b, upper, 0xf8)); /* a | b & upper */
    }
}
#endif

INLINE void resize_one(const uint8_t *a, const uint8_t *b, const program *p, int pairs, int bits, uint16_t *out) {
    const __m128i pick = _mm_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1);
    const __m256i picks = _mm256_broadcastsi128_si256(pick), half = _mm256_set1_epi32(1 << (bits - 1));
    const __m128i shift = _mm_cvtsi32_si128(bits);
    const int16_t *weights = p->weights;
    for (int k = 0; k < p->steps; k++, out += 2 * CHANNELS) {
        __m256i sum = half;
        for (int q = 0; q < pairs; q++, weights += 8) {
            int at = p->starts[k] + 2 * CHANNELS * q;
            __m128i of_a = _mm_loadl_epi64((const __m128i *)(a + at)), of_b = _mm_loadl_epi64((const __m128i *)(b + at));
            __m256i pair = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(of_a), of_b, 1), picks);
            __m256i weight = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)weights));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pair, weight));
        }
        sum = _mm256_srl_epi32(sum, shift);
        __m128i upper = _mm_slli_epi32(_mm256_extracti128_si256(sum, 1), 16);
        _mm_storeu_si128((__m128i *)out, _mm_or_si128(_mm256_castsi256_si128(sum), upper));
    }
}

/* Resizes two rows to interleaved words. The number of taps for factors of 1 to 2 is common, and compiled separately. */
static void resize_two(const uint8_t *a, const uint8_t *b, const program *p, int bits, uint16_t *out) {
#ifdef AT_ONCE
    if (p->pixels == AT_ONCE && p->pairs == 2) return resize_several(a, b, p, 2, bits, out);
    if (p->pixels == AT_ONCE) return resize_several(a, b, p, p->pairs, bits, out);
#endif
    if (p->pairs == 2) return resize_one(a, b, p, 2, bits, out);
    resize_one(a, b, p, p->pairs, bits, out);
}

/* Makes a row of the result from pairs of rows. */
INLINE void mix(const uint16_t *const *rows, const int16_t *weights, int pairs, int bits, int count, uint8_t *out) {
    const __m128i shift = _mm_cvtsi32_si128(bits);
#ifdef AT_ONCE
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int k = 0; k < count; k += 64) {
        __m512i sums[4];
        for (int h = 0; h < 4; h++) sums[h] = _mm512_set1_epi32(1 << (bits - 1));
        for (int q = 0; q < pairs; q++)
            for (int h = 0; h < 4; h++)
                sums[h] = _mm512_dpwssd_epi32(sums[h], _mm512_loadu_si512(rows[q] + 2 * k + 32 * h), BOTH(weights + 2 * q));
        for (int h = 0; h < 4; h++) sums[h] = _mm512_srl_epi32(sums[h], shift);
        __m512i words[2] = {_mm512_packus_epi32(sums[0], sums[1]), _mm512_packus_epi32(sums[2], sums[3])};
        __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words[0], words[1]));
        _mm512_mask_storeu_epi8(out + k, _bzhi_u64(-1, count - k < 64 ? count - k : 64), bytes);
    }
#else
    for (int k = 0; k < count; k += 8) {
        __m256i sum = _mm256_set1_epi32(1 << (bits - 1));
        for (int q = 0; q < pairs; q++) {
            __m256i pair = _mm256_loadu_si256((const __m256i *)(rows[q] + 2 * k));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pair, BOTH(weights + 2 * q)));
        }
        sum = _mm256_srl_epi32(sum, shift);
        __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
        int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
        if (count - k >= 8) memcpy(out + k, &bytes, 8);
        else memcpy(out + k, &bytes, count - k);
    }
#endif
}

/* `image` has `bytes` bytes in rows of row_bytes; `out` gets size x size pixels. Returns DONE or NO_MEMORY. */
int crop(const uint8_t *image, int64_t bytes, int64_t row_bytes, int top, int left, int height, int width, int size,
         int mirrored, uint8_t *out) {
    filter columns = {0}, rows = {0};
    program steps = {0};
    uint8_t *padded = NULL;
    uint16_t *resized = NULL;
    const uint16_t **taken = NULL;
    int state = NO_MEMORY;
    if (make_filter(&columns, width, size, 0) || make_filter(&rows, height, size, 1) ||
        make_program(&steps, &columns, size, mirrored)) goto end;
    int pairs = rows.taps / 2, stride = rounded(2 * CHANNELS * size * sizeof *resized + MARGIN, LINE) / sizeof *resized;
    int own = CHANNELS * width, read = own + CHANNELS * columns.taps + MARGIN;
    resized = space(pairs, stride * sizeof *resized);
    padded = space(2, read);
    taken = space(pairs, sizeof *taken);
    if (!resized || !padded || !taken) goto end;

    image += top * row_bytes + CHANNELS * left;
    bytes -= top * row_bytes + CHANNELS * left;
    int made = 0;
    for (int i = 0; i < size; i++) {
        int first = rows.first[i] / 2;
        for (made = made > first ? made : first; made < first + pairs && 2 * made < height; made++) {
            const uint8_t *two[2];
            for (int h = 0; h < 2; h++) {
                int row = 2 * made + h < height ? 2 * made + h : height - 1;
                two[h] = image + row * row_bytes;
                if (row * row_bytes + read > bytes) two[h] = memcpy(padded + h * read, two[h], own);
            }
            if (2 * made + 1 + AHEAD < height)
                for (int64_t at = 0; at < row_bytes + own; at += LINE)
                    __builtin_prefetch(image + (2 * made + AHEAD) * row_bytes + at, 0);
            resize_two(two[0], two[1], &steps, columns.bits, resized + made % pairs * (size_t)stride);
        }
        for (int q = 0; q < pairs; q++) taken[q] = resized + (first + q) % pairs * (size_t)stride;
        const int16_t *weights = rows.weights + (size_t)i * rows.taps;
        uint8_t *to = out + (size_t)i * CHANNELS * size;
        if (i + 2 * AHEAD < size)
            for (int64_t at = 0; at < CHANNELS * size; at += LINE)
                __builtin_prefetch(to + 2 * AHEAD * CHANNELS * size + at, 1);
        if (pairs == 2) mix(taken, weights, 2, rows.bits, CHANNELS * size, to);
        else mix(taken, weights, pairs, rows.bits, CHANNELS * size, to);
    }
    state = DONE;
end:
    free(columns.first), free(columns.weights), free(rows.first), free(rows.weights);
    free(steps.starts), free(steps.picks), free(steps.weights);
    free(resized), free(padded), free(taken);
    return state;
}
#endif
