/* Cross-entropy of logits that are resized to the labels (bilinear, aligned corners), and its gradient at their own size.

   Four neighbors of the small map enclose a cell of pixels. Along a row of a cell, a logit grows by the same step from
   pixel to pixel, so its exponential is multiplied by a constant ratio. From row to row, the first exponential and this
   ratio are multiplied by ratios of their own. A cell of any size then costs four exponentials for each class; the
   others are products, and no map of all classes at the labels' size is ever in memory.

   Cells are split into runs of at most RUN pixels a row, whose sums over the classes stay in registers. Each row of
   cells writes to its own memory, so the result has the same bits for any number of threads. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define RUN 9
#define INLINE static inline __attribute__((always_inline))
#define APART static __attribute__((noinline)) /* inlined into one function, these run out of registers */

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t int_lanes __attribute__((vector_size(4 * LANES)));

typedef struct {
    int old_height, old_width, classes, height, width;
    int blocks;            /* of LANES classes */
    const float *logits;   /* (old_height, old_width, classes), of one image; at each pixel, the largest one is 0 */
    const int64_t *labels; /* (height, width), below classes */
    const float *weights;  /* (height, width) */
    float *sums, *own;     /* (height, width): sums of exponentials, 1 to begin with, and the labels' logits */
} image;

/* Rows `top` to `bottom` and columns `left` to `right` of the pixels in a cell, which is at `row` and `column`. */
typedef struct {
    int row, column, top, bottom, left, right;
    float distances[RUN]; /* of the columns from the left neighbors */
} cell;

/* Exponentials at the first pixel of a run and the `ratio` along its row; the factors of both from row to row. */
typedef struct {
    lanes *first, *ratio, *first_ratio, *ratio_ratio;
} run;

/* Weights of a row's pixels: `shares` is weight over sum, `right` is that times the pixel's distance from the left
   neighbors, `below` is the row's distance from the upper neighbors. */
typedef struct {
    float shares[RUN], right[RUN], below;
} row_weights;

/* Memory of one thread: two rows of neighbors and of their gradients, (old_width, blocks) each. */
typedef struct {
    lanes *neighbors[2], *gradients[2];
    run start, moving;
    row_weights *weights;
} workspace;

static const float LOG_2_HIGH = 0x1.62e4p-1f, LOG_2_LOW = 0x1.7f7d1cp-20f, ROUNDING = 0x1.8p23f;

static inline lanes all(float value) { return value - (lanes){0}; }

static inline lanes chosen(int_lanes where, lanes one, lanes other) {
    return (lanes)((where & (int_lanes)one) | (~where & (int_lanes)other));
}

/* Accurate to a few units in the last place from -87 to 87; 0 below. */
static inline lanes exponential(lanes x) {
    static const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    int_lanes vanishing = x < -87.0f;
    x = chosen(vanishing, all(0), chosen(x > 87.0f, all(87.0f), x));
    lanes shifted = x * 0x1.715476p0f + ROUNDING, power = shifted - ROUNDING;
    lanes r = x - power * LOG_2_HIGH - power * LOG_2_LOW; /* at most log(2) / 2 */
    lanes series = all(1.0f / 5040);
    for (int i = 0; i < 7; i++) series = series * r + factors[i];
    int_lanes exponent = (int_lanes)shifted - (int_lanes)all(ROUNDING);
    return chosen(vanishing, all(0), series * (lanes)((exponent + 127) << 23));
}

static inline float total(lanes x) {
    float sums[LANES];
    memcpy(sums, &x, sizeof x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

/* The first of `count` pixels at or after position `place` of `old`. The last pixel belongs to the last cell. */
static int first_in(int place, int old, int count) {
    return place == old - 1 ? count : (int)(((int64_t)place * (count - 1) + old - 2) / (old - 1));
}

static float distance_into(int place, int pixel, int old, int count) {
    return (float)((double)pixel * (old - 1) / (count - 1) - place);
}

/* Sums over the classes at each of `n` pixels of a row, then moves to the next row. Pixels are taken in threes, whose
   exponentials are those of the first one times powers of the ratio. */
INLINE void add_up(const run *at, int blocks, int n, float *sums) {
    lanes partial[RUN];
    for (int k = 0; k < n; k++) partial[k] = all(0);
    for (int b = 0; b < blocks; b++) {
        lanes value = at->first[b], ratio = at->ratio[b], square = ratio * ratio;
        at->first[b] = value * at->first_ratio[b];
        at->ratio[b] = ratio * at->ratio_ratio[b];
        for (int k = 0; k < n; k += 3) {
            partial[k] += value;
            if (k + 1 < n) partial[k + 1] += value * ratio;
            if (k + 2 < n) partial[k + 2] += value * square;
            value *= square * ratio;
        }
    }
    for (int k = 0; k < n; k++) sums[k] = total(partial[k]);
}

/* Adds the gradient of one block of classes over a run's pixels to the four neighbors' [upper, lower][left, right]. The
   sum over a row's pixels is a polynomial in the ratio. */
INLINE void spread(const run *at, int b, int n, const row_weights *of, int rows, lanes *const gradients[2][2]) {
    lanes first = at->first[b], ratio = at->ratio[b], first_ratio = at->first_ratio[b], ratio_ratio = at->ratio_ratio[b];
    lanes both[2] = {all(0), all(0)}, lower[2] = {all(0), all(0)}; /* of the left and the right neighbors */
    for (; rows > 0; rows--, of++) {
        lanes sum = all(of->shares[n - 1]), right = all(of->right[n - 1]);
        for (int k = n - 2; k >= 0; k--) {
            sum = sum * ratio + of->shares[k];
            right = right * ratio + of->right[k];
        }
        sum *= first, right *= first;
        first *= first_ratio, ratio *= ratio_ratio;
        lanes left = sum - right;
        both[0] += left, both[1] += right;
        lower[0] += left * of->below, lower[1] += right * of->below;
    }
    for (int side = 0; side < 2; side++) {
        gradients[0][side][b] += both[side] - lower[side];
        gradients[1][side][b] += lower[side];
    }
}

/* Makes the number of pixels a constant N in a call, so that what is kept for each pixel stays in a register. */
#define CASE(n, call) case n: { enum { N = n }; call; break; }
#define WITH_CONSTANT(n, call)                                                                                         \
    switch (n) {                                                                                                       \
        CASE(1, call) CASE(2, call) CASE(3, call) CASE(4, call) CASE(5, call)                                          \
        CASE(6, call) CASE(7, call) CASE(8, call) default: CASE(RUN, call)                                             \
    }

APART void pixels_of_a_cell(const image *of, const workspace *in, cell at) {
    int blocks = of->blocks, n = at.right - at.left;
    const run *start = &in->start, *moving = &in->moving;
    lanes *corner[2][2], *slopes[2][2];
    for (int i = 0; i < 4; i++) {
        corner[i / 2][i % 2] = in->neighbors[i / 2] + (at.column + i % 2) * blocks;
        slopes[i / 2][i % 2] = in->gradients[i / 2] + (at.column + i % 2) * blocks;
    }
    float down = (float)(of->old_height - 1) / (of->height - 1), across = (float)(of->old_width - 1) / (of->width - 1);
    float y = distance_into(at.row, at.top, of->old_height, of->height);
    for (int b = 0; b < blocks; b++) {
        lanes above = corner[0][1][b] - corner[0][0][b], beneath = corner[1][1][b] - corner[1][0][b];
        lanes begin = corner[0][0][b] + above * at.distances[0], twist = beneath - above;
        lanes step = corner[1][0][b] + beneath * at.distances[0] - begin;
        moving->first[b] = start->first[b] = exponential(begin + step * y);
        moving->ratio[b] = start->ratio[b] = exponential((above + twist * y) * across);
        start->first_ratio[b] = exponential(step * down);
        start->ratio_ratio[b] = exponential(twist * (down * across));
    }
    for (int line = at.top; line < at.bottom; line++) {
        int64_t place = (int64_t)line * of->width + at.left;
        row_weights *own = in->weights + (line - at.top);
        WITH_CONSTANT(n, add_up(moving, blocks, N, of->sums + place))
        for (int k = 0; k < n; k++) {
            own->shares[k] = of->weights[place + k] / of->sums[place + k];
            own->right[k] = own->shares[k] * at.distances[k];
        }
        own->below = distance_into(at.row, line, of->old_height, of->height);
    }
    WITH_CONSTANT(n, for (int b = 0; b < blocks; b++) spread(start, b, N, in->weights, at.bottom - at.top, slopes))
}

/* The labels' logits, and the part of the gradient that is due to them; pixels of one label in a row at a time. Returns
   whether a pixel of the cell has weight. */
APART int labels_of_a_cell(const image *of, const workspace *in, cell at) {
    int64_t next = (int64_t)of->blocks * LANES, start = at.column * next;
    const float *upper = (const float *)in->neighbors[0] + start, *lower = (const float *)in->neighbors[1] + start;
    float *above = (float *)in->gradients[0] + start, *beneath = (float *)in->gradients[1] + start;
    int weighted = 0;
    for (int y = at.top; y < at.bottom; y++) {
        float below = distance_into(at.row, y, of->old_height, of->height);
        const int64_t *labels = of->labels + (int64_t)y * of->width;
        const float *weights = of->weights + (int64_t)y * of->width;
        float *own = of->own + (int64_t)y * of->width;
        for (int x = at.left; x < at.right;) {
            int64_t here = labels[x], beside = here + next;
            float first = upper[here] + (lower[here] - upper[here]) * below;
            float step = upper[beside] + (lower[beside] - upper[beside]) * below - first;
            float sum = 0, on_right = 0;
            for (; x < at.right && labels[x] == here; x++) {
                own[x] = first + step * at.distances[x - at.left];
                sum += weights[x];
                on_right += weights[x] * at.distances[x - at.left];
                weighted |= weights[x] != 0;
            }
            float on_left = sum - on_right;
            beneath[here] -= on_left * below;
            above[here] -= on_left - on_left * below;
            beneath[beside] -= on_right * below;
            above[beside] -= on_right - on_right * below;
        }
    }
    return weighted;
}

/* One row of cells; writes `gradient` (2, old_width, classes). */
static void row_of_cells(const image *of, const workspace *in, int row, float *gradient) {
    int64_t pixels = 2 * of->old_width, blocks = of->blocks;
    memset(in->gradients[0], 0, pixels * blocks * sizeof(lanes));
    const float *logits = of->logits + (int64_t)row * of->old_width * of->classes;
    for (int64_t i = 0; i < pixels; i++) {
        float *to = memcpy(in->neighbors[0] + i * blocks, logits + i * of->classes, of->classes * sizeof(float));
        for (int k = of->classes; k < blocks * LANES; k++) to[k] = -1e4f; /* the exponential is 0 */
    }
    int top = first_in(row, of->old_height, of->height), bottom = first_in(row + 1, of->old_height, of->height);
    for (int column = 0; column < of->old_width - 1; column++) {
        int end = first_in(column + 1, of->old_width, of->width);
        for (int left = first_in(column, of->old_width, of->width); left < end; left += RUN) {
            cell at = {row, column, top, bottom, left, left + RUN < end ? left + RUN : end, {0}};
            for (int k = 0; k < RUN; k++)
                at.distances[k] = distance_into(column, left + k, of->old_width, of->width);
            if (labels_of_a_cell(of, in, at)) pixels_of_a_cell(of, in, at);
        }
    }
    for (int64_t i = 0; i < pixels; i++)
        memcpy(gradient + i * of->classes, in->gradients[0] + i * blocks, of->classes * sizeof(float));
}

/* Tensors of several images, as `image` describes them. Writes `gradients` (images, old_height - 1, 2, old_width,
   classes): what each row of cells adds to the rows of neighbors above and below it. Heights and widths are at least 2.
   Returns whether there is memory for a few rows. */
int cross_entropy(
    int threads, int images, int old_height, int old_width, int classes, int height, int width, const float *logits,
    const int64_t *labels, const float *weights, float *sums, float *own, float *gradients
) {
    int blocks = (classes + LANES - 1) / LANES, rows = old_height - 1, enough = 1;
    size_t most = (height - 1) / rows + 2; /* rows of pixels in a cell */
    int64_t pixels = (int64_t)height * width, line = (int64_t)old_width * classes, wide = (int64_t)old_width * blocks;
#pragma omp parallel num_threads(threads) reduction(&& : enough)
    {
        size_t places = 6 * blocks + 4 * wide + most * sizeof(row_weights) / sizeof(lanes) + 1;
        lanes *room = aligned_alloc(sizeof(lanes), sizeof(lanes) * places), *end = room + 6 * blocks;
        enough = room != NULL;
        run start = {room, room + blocks, room + 2 * blocks, room + 3 * blocks};
        run moving = {room + 4 * blocks, room + 5 * blocks, start.first_ratio, start.ratio_ratio};
        workspace in = {{end, end + wide}, {end + 2 * wide, end + 3 * wide}, start, moving, (row_weights *)(end + 4 * wide)};
#pragma omp for schedule(dynamic)
        for (int i = 0; i < images * rows; i++) {
            int n = i / rows;
            image of = {
                old_height, old_width, classes, height, width, blocks, logits + n * old_height * line,
                labels + n * pixels, weights + n * pixels, sums + n * pixels, own + n * pixels,
            };
            if (room) row_of_cells(&of, &in, i % rows, gradients + i * 2 * line);
        }
        free(room);
    }
    return enough;
}
