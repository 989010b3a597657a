/* A convolution (or linear layer) of the active inputs with the weights of the active outputs. */

#include "layer.h"

#define PACKING LANES /* what packing a number costs, in positions */
#define LEAST_SHARED 2e5 /* multiply-accumulates that are worth a second thread */
#define ROWS 6 /* positions in a tile of COLUMNS vectors: together they fill the registers */
#define FEW 16 /* positions for which a weight is read once, or little more */
#define AHEAD 2 /* inputs */
#define MOST 12 /* positions in a tile of fewer vectors */

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* a b + c by lane. Not left to the compiler: tuned for some processors, it fuses in one tile and not in the next. */
static inline __attribute__((always_inline)) vec fused_by_lane(float a, vec b, vec c)
{
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps(_mm512_set1_ps(a), (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

typedef struct {
    const float *x;        /* padded input, [row][column][channel] */
    const int *rows;       /* [channel] where each input's row of the weight begins */
    const int *taps;       /* [tap] where each tap's pixel lies, from the first */
    int channels, kernels;
    ptrdiff_t tap;         /* floats between two taps of the weight */
    const float *scale, *shift;
    int rectify, outputs;
    float *y;
    /* Of the tile: its columns that are active outputs, and which outputs they are. */
    unsigned wanted[COLUMNS];          /* a bit per lane */
    int first, count;                  /* outputs first ... first + count - 1 */
    unsigned char column[COLUMNS * LANES]; /* [count] where each lies */
} Job;

/* Norm, gate and rectifier on the sums of one tile; active columns are written side by side. */
static inline __attribute__((always_inline)) void finish(const Job *job, const vec *sum, int m, int n, int position)
{
    float *y = job->y + (ptrdiff_t)position * job->outputs + job->first;
    const float *scale = job->scale + job->first, *shift = job->shift + job->first;
#if defined(__AVX512F__)
    __m512 zero = _mm512_setzero_ps();
    for (int v = 0; v < n; v++) {
        int width = __builtin_popcount(job->wanted[v]);
        __mmask16 wanted = (__mmask16)job->wanted[v], front = (__mmask16)((1u << width) - 1);
        __m512 factor = _mm512_maskz_loadu_ps(front, scale), term = _mm512_maskz_loadu_ps(front, shift);
        for (int r = 0; r < m; r++) {
            __m512 value = _mm512_maskz_compress_ps(wanted, (__m512)sum[r * n + v]);
            value = _mm512_fmadd_ps(value, factor, term);
            if (job->rectify) value = _mm512_max_ps(zero, value); /* in this order it keeps what is not a number */
            _mm512_mask_storeu_ps(y + (ptrdiff_t)r * job->outputs, front, value);
        }
        y += width, scale += width, shift += width;
    }
#else
    for (int r = 0; r < m; r++, y += job->outputs) {
        float row[COLUMNS * LANES]; /* a copy, or the sums would live in memory */
        for (int v = 0; v < n; v++) *(vec *)(row + v * LANES) = sum[r * n + v];
        for (int j = 0; j < job->count; j++) {
            float value = fused(row[job->column[j]], scale[j], shift[j]);
            y[j] = job->rectify && value < 0 ? 0 : value;
        }
    }
#endif
}

/* One tile: M x N vectors of sums stay in registers while inputs and taps go by. `resident` goes through the inputs of
   one tap after the other; `streamed`, for maps so small that the weight is read once, through the taps of one input
   after the other, as they lie in memory, and asks for the next inputs in time: no prefetcher knows which those are. */
#define MULTIPLY(M, N)                                                                                     \
    do {                                                                                                   \
        vec b[N];                                                                                          \
        for (int v = 0; v < N; v++) b[v] = *(const vec *)(row + v * LANES);                                \
        for (int m = 0; m < M; m++)                                                                        \
            for (int v = 0; v < N; v++) sum[m * N + v] = fused_by_lane(a[m][i], b[v], sum[m * N + v]);     \
    } while (0)
#define TILE(M, N)                                                                                         \
    static void resident_##M##_##N(const Job *job, const float *weights, const int *from, int position)    \
    {                                                                                                      \
        vec sum[M * N];                                                                                    \
        for (int s = 0; s < M * N; s++) sum[s] = (vec){0};                                                 \
        for (int k = 0; k < job->kernels; k++) {                                                           \
            const float *weight = weights + k * job->tap, *a[M];                                           \
            for (int m = 0; m < M; m++) a[m] = job->x + from[m] + job->taps[k];                            \
            for (int i = 0; i < job->channels; i++) {                                                      \
                const float *row = weight + job->rows[i];                                                  \
                MULTIPLY(M, N);                                                                            \
            }                                                                                              \
        }                                                                                                  \
        finish(job, sum, M, N, position);                                                                  \
    }                                                                                                      \
    static void streamed_##M##_##N(const Job *job, const float *weights, const int *from, int position)    \
    {                                                                                                      \
        vec sum[M * N];                                                                                    \
        const float *x[M], *a[M];                                                                          \
        for (int m = 0; m < M; m++) x[m] = job->x + from[m];                                               \
        for (int s = 0; s < M * N; s++) sum[s] = (vec){0};                                                 \
        for (int i = 0; i < job->channels; i++) {                                                          \
            const float *row = weights + job->rows[i];                                                     \
            const float *next = weights + job->rows[i + AHEAD < job->channels ? i + AHEAD : i];            \
            for (int k = 0; k < job->kernels; k++, row += job->tap, next += job->tap) {                    \
                for (int v = 0; v < N; v++) __builtin_prefetch(next + v * LANES);                          \
                for (int m = 0; m < M; m++) a[m] = x[m] + job->taps[k];                                    \
                MULTIPLY(M, N);                                                                            \
            }                                                                                              \
        }                                                                                                  \
        finish(job, sum, M, N, position);                                                                  \
    }

#define NARROW(M) TILE(M, 1) TILE(M, 2)
NARROW(6) NARROW(4) NARROW(2) NARROW(1)
TILE(12, 1)
typedef void (*Tile)(const Job *, const float *, const int *, int);
#if COLUMNS == 4
#define WIDE(M) TILE(M, 3) TILE(M, 4)
WIDE(6) WIDE(4) WIDE(2) WIDE(1)
TILE(12, 2) TILE(8, 3)
#define ENTRY(KIND, M) [M] = { KIND##_##M##_1, KIND##_##M##_2, KIND##_##M##_3, KIND##_##M##_4 }
#define TALL(KIND) [8] = { NULL, NULL, KIND##_8_3, NULL }, [12] = { KIND##_12_1, KIND##_12_2, NULL, NULL }
#else
#define ENTRY(KIND, M) [M] = { KIND##_##M##_1, KIND##_##M##_2 }
#define TALL(KIND) [12] = { KIND##_12_1, NULL }
#endif
#define ENTRIES(KIND) { ENTRY(KIND, 1), ENTRY(KIND, 2), ENTRY(KIND, 4), ENTRY(KIND, 6), TALL(KIND) }
static const Tile RESIDENT[MOST + 1][COLUMNS] = ENTRIES(resident), STREAMED[MOST + 1][COLUMNS] = ENTRIES(streamed);

/* How many positions the next tile of so many vectors takes. */
static int height_of(int left, int vectors)
{
    static const int HEIGHTS[] = { 12, 8, 6, 4, 2, 1 };
    int h = 0;
    while (HEIGHTS[h] > left || !RESIDENT[HEIGHTS[h]][vectors - 1]) h++;
    return HEIGHTS[h];
}

/* Floats of workspace that a thread may need to convolve a map of this size. */
long convolve_space(const Layer *l, int height, int width)
{
    long border = (long)(height + 2 * l->padding[0]) * (width + 2 * l->padding[1]) * l->inputs;
    long packed = (long)l->kernel[0] * l->kernel[1] * l->inputs * BLOCK + 2 * LANES;
    return l->inputs + border + packed;
}

/* What a convolution is; each thread works out its own part of it. */
typedef struct {
    const Layer *layer;
    const float *x;
    int height, width, pitch;
    const int *source, *inputs;
    int channels;
    const int *chosen;
    int outputs;
    const float *scale, *shift;
    float *y;
    int high, wide, out_wide, positions; /* of the input with its border, and of the output */
    int padded, packs;
} Task;

/* Lines [from, to) of the input with zeros around it, only the channels that are read. */
static void draw_border(const Task *t, float *border, int from, int to)
{
    int above = t->layer->padding[0], margin = t->layer->padding[1] * t->channels, n = t->width * t->channels;
    for (int r = from; r < to; r++) {
        float *line = border + (ptrdiff_t)r * t->wide * t->channels;
        if (r < above || r >= above + t->height) {
            memset(line, 0, sizeof(float) * t->wide * t->channels);
            continue;
        }
        memset(line, 0, sizeof(float) * margin);
        memset(line + margin + n, 0, sizeof(float) * margin);
        const float *in = t->x + (ptrdiff_t)(r - above) * t->width * t->pitch;
        line += margin;
        if (!t->source) memcpy(line, in, sizeof(float) * n);
        else
            for (int c = 0; c < t->width; c++, in += t->pitch, line += t->channels)
                for (int i = 0; i < t->channels; i++) line[i] = in[t->source[i]];
    }
}

/* Active inputs' rows of the weight, of each the outputs chosen[from] to chosen[to - 1], `row` floats apart. */
static void pack(const Task *t, float *packed, int from, int to, int row)
{
    const Layer *l = t->layer;
    int taps = l->kernel[0] * l->kernel[1], n;
    for (int first = from; first < to; first += n, packed += n) { /* a block of the weight after the other */
        int block = t->chosen[first] / BLOCK;
        for (n = 0; first + n < to && t->chosen[first + n] / BLOCK == block; n++) {}
        const float *weight = l->weight + (ptrdiff_t)block * taps * l->inputs * BLOCK;
        const int *chosen = t->chosen + first;
#if defined(__AVX512F__)
        __mmask16 wanted[BLOCK / LANES] = {0};
        for (int j = 0; j < n; j++) wanted[chosen[j] % BLOCK / LANES] |= 1u << chosen[j] % LANES;
#endif
        for (int i = 0; i < t->channels; i++) {
            int ahead = i + AHEAD < t->channels ? i + AHEAD : i;
            const float *in = weight + (ptrdiff_t)(t->inputs ? t->inputs[i] : i) * taps * BLOCK;
            const float *next = weight + (ptrdiff_t)(t->inputs ? t->inputs[ahead] : ahead) * taps * BLOCK;
            for (int k = 0; k < taps; k++, in += BLOCK, next += BLOCK) {
                float *out = packed + ((ptrdiff_t)k * t->channels + i) * row;
                for (int v = 0; v < BLOCK; v += LANES) __builtin_prefetch(next + v);
#if defined(__AVX512F__)
                float *to_ = out;
                for (int v = 0; v < BLOCK / LANES; v++) {
                    if (!wanted[v]) continue;
                    int width = __builtin_popcount(wanted[v]);
                    __m512 front = _mm512_maskz_compress_ps(wanted[v], _mm512_loadu_ps(in + v * LANES));
                    _mm512_mask_storeu_ps(to_, (__mmask16)((1u << width) - 1), front);
                    to_ += width;
                }
#else
                for (int j = 0; j < n; j++) out[j] = in[chosen[j] % BLOCK];
#endif
            }
        }
    }
}

/* The outputs from `first` on, below `limit`, that are columns [column, column + vectors * LANES). */
static void take(Job *job, const int *chosen, int first, int limit, int column, int vectors)
{
    memset(job->wanted, 0, sizeof job->wanted);
    job->first = first;
    for (job->count = 0; first + job->count < limit; job->count++) {
        int c = (chosen ? chosen[first + job->count] : first + job->count) - column;
        if (c >= vectors * LANES) break;
        job->column[job->count] = (unsigned char)c;
        job->wanted[c / LANES] |= 1u << c % LANES;
    }
}

/* The outputs that `take` took, at positions [start, end). */
static void sweep(const Task *t, const Job *job, const float *weights, int vectors, int start, int end)
{
    const Layer *l = t->layer;
    int streams = !t->packs && t->positions <= FEW; /* however threads share them: sums keep their order */
    while (vectors > 1 && !job->wanted[vectors - 1]) vectors--;
    for (int p = start, n; p < end; p += n) {
        int at[MOST];
        n = height_of(end - p, vectors);
        for (int m = 0; m < n; m++)
            at[m] = ((p + m) / t->out_wide * l->stride[0] * t->wide + (p + m) % t->out_wide * l->stride[1]) * t->channels;
        (streams ? STREAMED : RESIDENT)[n][vectors - 1](job, weights, at, p);
    }
}

/* Positions [start, end) of outputs [from, to), with a workspace that no other thread uses. */
static void work(const Task *t, float *space, int start, int end, int from, int to)
{
    const Layer *l = t->layer;
    int taps = l->kernel[0] * l->kernel[1], wide = t->wide * t->channels;
    int *rows = (int *)space, offsets[taps];
    float *border = space + l->inputs, *packed = border + (t->padded ? (ptrdiff_t)t->high * wide : 0);
    packed += -((size_t)packed / sizeof(float)) & (LANES - 1);
    if (t->padded) {
        int last = (end - 1) / t->out_wide * l->stride[0] + (l->kernel[0] - 1) * l->dilation[0];
        draw_border(t, border, start / t->out_wide * l->stride[0], last + 1);
    }
    for (int k = 0; k < taps; k++)
        offsets[k] = k / l->kernel[1] * l->dilation[0] * wide + k % l->kernel[1] * l->dilation[1] * t->channels;
    Job job = { .x = t->padded ? border : t->x, .rows = rows, .taps = offsets, .channels = t->channels, .kernels = taps,
                .scale = t->scale, .shift = t->shift, .rectify = l->rectify, .outputs = t->outputs, .y = t->y };
    if (t->packs) {
        /* As many outputs as a block at a time: what is packed is used before it leaves the cache. */
        for (int strip = from; strip < to; strip += BLOCK) {
            int limit = strip + BLOCK < to ? strip + BLOCK : to;
            int row = (limit - strip + LANES - 1) / LANES * LANES;
            pack(t, packed, strip, limit, row);
            job.tap = (ptrdiff_t)row * t->channels;
            for (int i = 0; i < t->channels; i++) rows[i] = i * row;
            for (int first = strip; first < limit; first += job.count) {
                int vectors = (limit - first + LANES - 1) / LANES;
                vectors = vectors < COLUMNS ? vectors : COLUMNS;
                take(&job, NULL, first, limit, first, vectors);
                sweep(t, &job, packed + (first - strip), vectors, start, end);
            }
        }
        return;
    }
    job.tap = BLOCK;
    for (int i = 0; i < t->channels; i++) rows[i] = (t->inputs ? t->inputs[i] : i) * taps * BLOCK;
    for (int first = from; first < to; first += job.count) {
        /* From the vector of the first output to the end of the block: what is not active there is computed, too. */
        int column = (t->chosen ? t->chosen[first] : first) / LANES * LANES, left = (BLOCK - column % BLOCK) / LANES;
        int vectors = left < COLUMNS ? left : COLUMNS;
        take(&job, t->chosen, first, to, column, vectors);
        sweep(t, &job, l->weight + (ptrdiff_t)(column / BLOCK) * taps * l->inputs * BLOCK + column % BLOCK, vectors, start, end);
    }
}

/* Convolve the active inputs with the weights of the active outputs.
 *
 * x: [height][width][pitch]; `source` names the channels of x that are read (NULL: all `channels` of them, as they lie).
 * inputs: [channels] the stored input that each channel is, or NULL for all.
 * chosen: [outputs] the columns of the weight that are computed, rising, or NULL for all.
 * scale, shift: [outputs].  y: [out height][out width][outputs].
 * space: `convolve_space` floats for each thread.
 */
void convolve(const Layer *l, const float *x, int height, int width, int pitch, const int *source, const int *inputs,
              int channels, const int *chosen, int outputs, const float *scale, const float *shift, float *y,
              float *space, int threads)
{
    int high = height + 2 * l->padding[0], wide = width + 2 * l->padding[1];
    int out_high = (high - l->dilation[0] * (l->kernel[0] - 1) - 1) / l->stride[0] + 1;
    int out_wide = (wide - l->dilation[1] * (l->kernel[1] - 1) - 1) / l->stride[1] + 1;
    int positions = out_high * out_wide;
    if (outputs == l->outputs) chosen = NULL;
    /* Packing a weight costs about a cycle a number, computing it a cycle for every LANES positions: where few positions
       or few inactive outputs do not pay for it, all columns are computed and the active ones kept. */
    int packs = chosen && (ptrdiff_t)positions * (l->outputs - outputs) > (ptrdiff_t)PACKING * outputs;
    Task task = { l, x, height, width, pitch, source, inputs, channels, chosen, outputs, scale, shift, y, high, wide,
                  out_wide, positions, l->padding[0] || l->padding[1] || source, packs };
    int computed = chosen && !packs ? l->outputs : outputs;
    if ((double)positions * computed * channels * l->kernel[0] * l->kernel[1] < LEAST_SHARED) threads = 1;
    if (threads < 2) {
        work(&task, space, 0, positions, 0, outputs);
        return;
    }
    /* Threads share neither packed weights nor borders: fetching them from another core's cache costs more than making
       them twice. They divide what is larger, the weight or the map. */
    long room = convolve_space(l, height, width);
    int vectors = (outputs + LANES - 1) / LANES, strips = (positions + ROWS - 1) / ROWS;
    int by_outputs = vectors >= threads && l->kernel[0] * l->kernel[1] * computed > height * width;
    int parts = by_outputs ? vectors : strips, size = by_outputs ? LANES : ROWS;
    int limit = by_outputs ? outputs : positions;
    int used = threads < parts ? threads : parts;
#pragma omp parallel for schedule(static, 1) num_threads(used)
    for (int n = 0; n < used; n++) {
        int from = (int)((long)parts * n / used) * size, to = (int)((long)parts * (n + 1) / used) * size;
        to = to < limit ? to : limit;
        if (by_outputs) work(&task, space + n * room, 0, positions, from, to);
        else work(&task, space + n * room, from, to, 0, outputs);
    }
}
