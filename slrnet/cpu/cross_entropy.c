/* Cross-entropy of logits that are resized to the labels (bilinear, aligned corners), and its gradient at their own size.

   Four neighbours of the small map enclose a cell of pixels. Along a row of a cell a logit grows by the same step from
   pixel to pixel, so its exponential is multiplied by the same ratio; from row to row the first exponential and the
   ratio are multiplied by ratios of their own. A cell then costs four exponentials of each class, however many pixels
   it has: the others are products, and no map of all classes at the labels' size is ever in memory.

   Cells are worked on in runs of at most RUN pixels a row, whose sums over the classes stay in registers. Every row of
   cells writes where no other does, so that the result is the same to the bit for any number of threads. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define RUN 9

typedef float lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t int_lanes __attribute__((vector_size(4 * LANES)));
typedef float half __attribute__((vector_size(32)));
typedef float quarter __attribute__((vector_size(16)));

typedef struct {
    int old_height, old_width, classes, height, width;
    int blocks;                 /* of LANES classes */
    const float *logits;        /* (old_height, old_width, classes), of one image */
    const int64_t *labels;      /* (height, width), below classes */
    const float *weights;       /* (height, width) */
    float *sums, *own;          /* (height, width): sums of the exponentials, and the logits of the labels, both of
                                   logits less the largest of their pixel of the small map, resized as they are */
} image;

/* What the function returns: exponentials of logits further below the largest one than LARGEST_SPREAD would underflow. */
enum { DONE, NO_MEMORY, TOO_FAR, NO_CLASS };
static const float LARGEST_SPREAD = 80;
static const float LOG_2_HIGH = 0x1.62e4p-1f, LOG_2_LOW = 0x1.7f7d1cp-20f, ROUNDING = 0x1.8p23f;

static inline lanes all(float value) { return value - (lanes){0}; }

static inline lanes chosen(int_lanes where, lanes one, lanes other) {
    return (lanes)((where & (int_lanes)one) | (~where & (int_lanes)other));
}

/* Within a few units of the last place from -87 to 87; 0 below. */
static inline lanes exponential(lanes x) {
    int_lanes vanishing = x < -87.0f;
    x = chosen(vanishing, all(0), chosen(x > 87.0f, all(87.0f), x));
    lanes shifted = x * 0x1.715476p0f + ROUNDING, power = shifted - ROUNDING;
    lanes r = x - power * LOG_2_HIGH - power * LOG_2_LOW; /* at most log(2) / 2 */
    lanes series = all(1.0f / 5040);
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    int_lanes exponent = (int_lanes)shifted - (int_lanes)all(ROUNDING);
    return chosen(vanishing, all(0), series * (lanes)((exponent + 127) << 23));
}

static inline float total(lanes x) {
#if LANES == 16
    half parts[2];
    memcpy(parts, &x, sizeof x);
    half eight = parts[0] + parts[1];
#else
    half eight = x;
#endif
    quarter four[2];
    memcpy(four, &eight, sizeof eight);
    four[0] += four[1];
    return (four[0][0] + four[0][1]) + (four[0][2] + four[0][3]);
}

/* The first of `count` pixels that lies at or beyond a place of the `old` ones, and so in the cell that begins there. */
static int first_in(int place, int old, int count) {
    if (place == old - 1) return count; /* the last pixel belongs to the cell before it */
    return (int)(((int64_t)place * (count - 1) + old - 2) / (old - 1));
}

static float distance_into(int place, int pixel, int old, int count) {
    return (float)((double)pixel * (old - 1) / (count - 1) - place);
}

/* Exponentials at the first pixel of a run, `ratio` along its row, and what both are multiplied by in the next row. */
typedef struct {
    lanes *first, *ratio, *first_ratio, *ratio_ratio;
} run;

/* Sums over the classes at each of `n` pixels of a row; goes on to the next row. Pixels are taken in threes, whose sums
   are those of the first one's exponentials times powers of the ratio. */
static inline __attribute__((always_inline)) void add_up(const run *at, int blocks, int n, float *sums) {
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

/* What `n` pixels of each of some rows weigh in a cell: `shares` is weight over sum, `right` that times the pixel's
   distance from the left neighbours, `below` the row's from the upper ones. */
typedef struct {
    float shares[RUN], right[RUN], below;
} row_weights;

/* Adds what one block of classes weighs at the pixels of a run to its four neighbours' gradients [upper, lower][left,
   right]. The sum over a row's pixels is a polynomial in the ratio. */
static inline __attribute__((always_inline)) void spread(
    const run *at, int b, int n, const row_weights *weights, int rows, lanes *const gradients[2][2]
) {
    lanes first = at->first[b], ratio = at->ratio[b], first_ratio = at->first_ratio[b], ratio_ratio = at->ratio_ratio[b];
    lanes whole[2] = {all(0), all(0)}, low[2] = {all(0), all(0)}; /* left and right neighbours, both rows and the lower */
    for (int row = 0; row < rows; row++) {
        const row_weights *of = weights + row;
        lanes sum = all(of->shares[n - 1]), right = all(of->right[n - 1]);
        for (int k = n - 2; k >= 0; k--) {
            sum = sum * ratio + of->shares[k];
            right = right * ratio + of->right[k];
        }
        sum *= first;
        right *= first;
        first *= first_ratio;
        ratio *= ratio_ratio;
        lanes columns[2] = {sum - right, right};
        for (int side = 0; side < 2; side++) {
            whole[side] += columns[side];
            low[side] += columns[side] * of->below;
        }
    }
    for (int side = 0; side < 2; side++) {
        gradients[0][side][b] += whole[side] - low[side];
        gradients[1][side][b] += low[side];
    }
}

/* Calls a function with the number of pixels as a constant, so that what is kept for each stays in a register. */
#define WITH_CONSTANT(n, call)                                                                                         \
    switch (n) {                                                                                                       \
    case 1: { enum { N = 1 }; call; break; }                                                                           \
    case 2: { enum { N = 2 }; call; break; }                                                                           \
    case 3: { enum { N = 3 }; call; break; }                                                                           \
    case 4: { enum { N = 4 }; call; break; }                                                                           \
    case 5: { enum { N = 5 }; call; break; }                                                                           \
    case 6: { enum { N = 6 }; call; break; }                                                                           \
    case 7: { enum { N = 7 }; call; break; }                                                                           \
    case 8: { enum { N = 8 }; call; break; }                                                                           \
    default: { enum { N = RUN }; call; }                                                                               \
    }

static int counts(const image *of, int top, int bottom, int left, int right) {
    for (int y = top; y < bottom; y++)
        for (int x = left; x < right; x++)
            if (of->weights[(int64_t)y * of->width + x] != 0) return 1;
    return 0;
}

/* Pixels `left` to `right` of rows `top` to `bottom`, which lie in one cell and are at most RUN a row. */
static void pixels_of_a_cell(
    const image *of, int row, int column, int top, int bottom, int left, int right, lanes *const neighbours[2],
    lanes *const gradients[2], const run *start, const run *moving, row_weights *weights
) {
    int blocks = of->blocks, n = right - left;
    const lanes *corner[2][2];
    lanes *slopes[2][2];
    for (int line = 0; line < 2; line++) {
        for (int side = 0; side < 2; side++) {
            corner[line][side] = neighbours[line] + (column + side) * blocks;
            slopes[line][side] = gradients[line] + (column + side) * blocks;
        }
    }
    float down = (float)(of->old_height - 1) / (of->height - 1), across = (float)(of->old_width - 1) / (of->width - 1);
    float x = distance_into(column, left, of->old_width, of->width);
    float y = distance_into(row, top, of->old_height, of->height);
    for (int b = 0; b < blocks; b++) {
        lanes above = corner[0][1][b] - corner[0][0][b], beneath = corner[1][1][b] - corner[1][0][b];
        lanes begin = corner[0][0][b] + above * x, twist = beneath - above;
        lanes step = corner[1][0][b] + beneath * x - begin;
        moving->first[b] = start->first[b] = exponential(begin + step * y);
        moving->ratio[b] = start->ratio[b] = exponential((above + twist * y) * across);
        start->first_ratio[b] = exponential(step * down);
        start->ratio_ratio[b] = exponential(twist * (down * across));
    }
    float distances[RUN];
    for (int k = 0; k < n; k++) distances[k] = distance_into(column, left + k, of->old_width, of->width);
    for (int line = top; line < bottom; line++) {
        int64_t place = (int64_t)line * of->width + left;
        row_weights *own = weights + (line - top);
        WITH_CONSTANT(n, add_up(moving, blocks, N, of->sums + place))
        for (int k = 0; k < n; k++) {
            own->shares[k] = of->weights[place + k] / of->sums[place + k];
            own->right[k] = own->shares[k] * distances[k];
        }
        own->below = distance_into(row, line, of->old_height, of->height);
    }
    WITH_CONSTANT(n, for (int b = 0; b < blocks; b++) spread(start, b, N, weights, bottom - top, slopes))
}

/* The labels' own logits, and what the weights take from their gradients: pixels of one label in a row at a time. */
static void labels_of_a_cell(
    const image *of, int row, int column, int top, int bottom, int left, int right, lanes *const neighbours[2],
    lanes *const gradients[2]
) {
    int64_t start = (int64_t)column * of->blocks * LANES, next = (int64_t)of->blocks * LANES;
    const float *upper = (const float *)neighbours[0] + start, *lower = (const float *)neighbours[1] + start;
    float *above = (float *)gradients[0] + start, *beneath = (float *)gradients[1] + start;
    float distances[right - left];
    for (int x = left; x < right; x++) distances[x - left] = distance_into(column, x, of->old_width, of->width);
    for (int y = top; y < bottom; y++) {
        float below = distance_into(row, y, of->old_height, of->height);
        const int64_t *labels = of->labels + (int64_t)y * of->width;
        const float *weights = of->weights + (int64_t)y * of->width;
        float *own = of->own + (int64_t)y * of->width;
        for (int x = left; x < right;) {
            int64_t here = labels[x], beside = here + next;
            float first = upper[here] + (lower[here] - upper[here]) * below;
            float step = upper[beside] + (lower[beside] - upper[beside]) * below - first;
            float sum = 0, on_right = 0;
            for (; x < right && labels[x] == here; x++) {
                own[x] = first + step * distances[x - left];
                sum += weights[x];
                on_right += weights[x] * distances[x - left];
            }
            float on_left = sum - on_right;
            beneath[here] -= on_left * below;
            above[here] -= on_left - on_left * below;
            beneath[beside] -= on_right * below;
            above[beside] -= on_right - on_right * below;
        }
    }
}

/* Copies a pixel's logits, the largest one taken off; says whether all are near it (which what is no number is not). */
static int shifted(const float *logits, int classes, int blocks, lanes *to) {
    float *values = (float *)to;
    memcpy(values, logits, classes * sizeof(float));
    for (int k = classes; k < blocks * LANES; k++) values[k] = logits[0];
    lanes most = to[0], least = to[0], sum = to[0] - to[0];
    for (int b = 0; b < blocks; b++) {
        most = chosen(to[b] > most, to[b], most);
        least = chosen(to[b] < least, to[b], least);
        sum += to[b];
    }
    float largest = most[0], smallest = least[0];
    for (int lane = 1; lane < LANES; lane++) {
        largest = most[lane] > largest ? most[lane] : largest;
        smallest = least[lane] < smallest ? least[lane] : smallest;
    }
    for (int b = 0; b < blocks; b++) to[b] -= largest;
    for (int k = classes; k < blocks * LANES; k++) values[k] = -1e4f; /* its exponential is 0 */
    float check = total(sum);
    return largest - smallest < LARGEST_SPREAD && check == check;
}

/* One row of cells; `gradient` (2, old_width, classes) is written, `room` has 6 + 4 old_width times `blocks`,
   `weights` a place for each of its rows of pixels. */
static int row_of_cells(const image *of, int row, float *gradient, lanes *room, row_weights *weights) {
    int blocks = of->blocks, line = of->old_width * blocks, near = 1;
    run start = {room, room + blocks, room + 2 * blocks, room + 3 * blocks};
    run moving = {room + 4 * blocks, room + 5 * blocks, start.first_ratio, start.ratio_ratio};
    lanes *neighbours[2] = {room + 6 * blocks, room + 6 * blocks + line};
    lanes *gradients[2] = {neighbours[1] + line, neighbours[1] + 2 * line};
    memset(gradients[0], 0, 2 * line * sizeof(lanes));
    const float *logits = of->logits + (int64_t)row * of->old_width * of->classes;
    for (int i = 0; i < 2 * of->old_width; i++)
        near &= shifted(logits + (int64_t)i * of->classes, of->classes, blocks, neighbours[0] + (int64_t)i * blocks);
    if (!near) return TOO_FAR;
    int top = first_in(row, of->old_height, of->height), bottom = first_in(row + 1, of->old_height, of->height);
    for (int64_t i = (int64_t)top * of->width; i < (int64_t)bottom * of->width; i++)
        if (of->labels[i] < 0 || of->labels[i] >= of->classes) return NO_CLASS;
    for (int column = 0; column < of->old_width - 1; column++) {
        int end = first_in(column + 1, of->old_width, of->width);
        for (int left = first_in(column, of->old_width, of->width); left < end; left += RUN) {
            int right = left + RUN < end ? left + RUN : end;
            if (counts(of, top, bottom, left, right))
                pixels_of_a_cell(of, row, column, top, bottom, left, right, neighbours, gradients, &start, &moving, weights);
            else
                for (int y = top; y < bottom; y++)
                    for (int x = left; x < right; x++) of->sums[(int64_t)y * of->width + x] = 1;
        }
    }
    for (int column = 0; column < of->old_width - 1; column++) {
        int left = first_in(column, of->old_width, of->width), right = first_in(column + 1, of->old_width, of->width);
        if (left < right) labels_of_a_cell(of, row, column, top, bottom, left, right, neighbours, gradients);
    }
    for (int i = 0; i < 2 * of->old_width; i++)
        memcpy(gradient + (int64_t)i * of->classes, gradients[0] + (int64_t)i * blocks, of->classes * sizeof(float));
    return DONE;
}

/* Images as `image` has them, one after the other; gradients (images, old_height, old_width, classes) are written, with
   `parts` (images, old_height - 1, 2, old_width, classes): what each row of cells adds to the rows of neighbours above
   and below it. Heights and widths are at least 2. */
int cross_entropy(
    int threads, int images, int old_height, int old_width, int classes, int height, int width, const float *logits,
    const int64_t *labels, const float *pixel_weights, float *sums, float *own, float *parts, float *gradients
) {
    int blocks = (classes + LANES - 1) / LANES, rows = old_height - 1, result = DONE;
    size_t needed = sizeof(lanes) * blocks * (6 + 4 * (size_t)old_width);
    size_t most = (height - 1) / rows + 2; /* rows of pixels in a cell */
    int64_t pixels = (int64_t)height * width, line = (int64_t)old_width * classes;
#pragma omp parallel num_threads(threads)
    {
        lanes *room = aligned_alloc(sizeof(lanes), needed);
        row_weights *weights = malloc(most * sizeof(row_weights));
#pragma omp for schedule(dynamic)
        for (int i = 0; i < images * rows; i++) {
            int n = i / rows, ended = NO_MEMORY;
            image of = {
                old_height, old_width, classes, height, width, blocks, logits + n * old_height * line,
                labels + n * pixels, pixel_weights + n * pixels, sums + n * pixels, own + n * pixels,
            };
            if (room && weights) ended = row_of_cells(&of, i % rows, parts + i * 2 * line, room, weights);
            if (ended != DONE) {
#pragma omp atomic write
                result = ended;
            }
        }
        free(weights);
        free(room);
#pragma omp for
        for (int i = 0; i < images * old_height; i++) {
            int n = i / old_height, row = i % old_height;
            const float *below = parts + (int64_t)(n * rows + row) * 2 * line, *above = below - line;
            for (int64_t j = 0; j < line; j++)
                gradients[i * line + j] = (row < rows ? below[j] : 0) + (row > 0 ? above[j] : 0);
        }
    }
    return result;
}
