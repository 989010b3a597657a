/* The layers of a deployed gated network for one input, in float32: decide, gather, convolve.
 *
 * Maps are [position][channel] (channels_last) and hold only the channels that are active. A weight is stored as
 * [block][tap][input][BLOCK outputs]: what one tile needs lies together, and a large layer is read as a stream. Two
 * functions are called from Python (native.py has the twins of the structs): `decide` chooses the active outputs of a
 * gated layer, `convolve` computes them from the active inputs. Nothing here allocates memory; callers pass a workspace,
 * and answer for sizes: lengths that do not fit a layer are not noticed here.
 */

#include <math.h>
#include <stddef.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define COLUMNS 4 /* vectors of outputs in one tile */
#elif defined(__AVX__)
#define LANES 8
#define COLUMNS 2
#else
#define LANES 4
#define COLUMNS 2
#endif
#define BLOCK 64 /* outputs that lie together in a weight */
#define PACKING (LANES / 2) /* what packing a number costs, in positions */
#define LEAST_SHARED 2e5 /* multiply-accumulates that are worth a second thread */
#define ROWS 6 /* positions in one tile: with COLUMNS they fill the registers */

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

typedef int mask __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

typedef struct {
    int inputs, outputs;   /* stored channels */
    int kernel[2], stride[2], padding[2], dilation[2];
    const float *weight;   /* [block][tap][input][BLOCK] */
    const float *scale;    /* [output] of the norm behind it, or ones */
    const float *shift;    /* [output] of the norm behind it or the bias, or zeros */
    int rectify;           /* a rectifier follows */
} Layer;

typedef struct {
    int full;                   /* channels before the static cut: what shares are shares of */
    int rectify;                /* gates are rectified (feature boosting and suppression) */
    const float *weight;        /* [input][output] of the runtime predictor */
    const float *bias;          /* [output] */
    const float *shift;         /* [output] shift of an active channel */
    const float *score;         /* [output] static score */
    const unsigned char *doubted; /* [output] outside the static top */
    const int *behind;          /* [output] outputs in rising order of static score, ties: higher index first */
    const int *column;          /* [column] the output that each column of the weight is */
    double trust;
    double keep;                /* share of `full` that may be active, where no policy decides */
} Gate;

typedef struct {
    int hidden;
    const float *recurrent;  /* [hidden][4 hidden] from the previous hidden state */
    const float *encoded;    /* [hidden][4 hidden] from the encoded input */
    const float *spent;      /* [4 hidden] */
    const float *previous;   /* [4 hidden] */
    const float *head;       /* [hidden] */
    float head_bias;
    double least, dense_macs, spent_first; /* `spent_first`: before any layer */
    int terms;               /* of the macs' closed form: sum of weight * first * second */
    const double *weight;    /* [term] */
    const double *first, *second; /* [term] with no channel of any gated layer */
} Policy;

typedef struct {
    const float *pooled;          /* [input][hidden] of the layer's own encoder */
    const float *runtime;         /* [output][hidden] */
    const float *encoder_bias;    /* [hidden] static fields folded in */
    const float *recurrent_bias;  /* [4 hidden] static fields folded in */
    float pooled_mean, pooled_factor, runtime_mean, runtime_factor;
    double even;                  /* share that the policy moves away from */
    double constant_macs;         /* of predictors up to here and what no decision changes */
    const double *first, *second; /* [term] change per active channel */
} Seat;

typedef struct {
    float *hidden, *cell;    /* [hidden] */
    double *first, *second;  /* [term] */
    double previous;         /* share asked for in the layer before */
    double spent;            /* macs so far, as a share of the dense network's */
} Memory;

/* e^x to float32's precision; a polynomial, so that loops over it become vector code. */
static inline float power(float x)
{
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float whole = x * 1.44269504f;
    int steps = (int)(whole + (whole < 0 ? -0.5f : 0.5f));
    float r = x - (float)steps * 0.693359375f + (float)steps * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    union { int i; float f; } scale = { (steps + 127) << 23 };
    return y * scale.f;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + power(-x)); }

static inline float clip(float x) { return x < -1.0f ? -1.0f : x > 1.0f ? 1.0f : x; }

static void add_row(float *restrict sum, const float *restrict row, float factor, int n)
{
    for (int i = 0; i < n; i++) sum[i] += factor * row[i];
}

/* A new input. */
void begin(const Policy *p, Memory *m)
{
    memset(m->hidden, 0, sizeof(float) * p->hidden);
    memset(m->cell, 0, sizeof(float) * p->hidden);
    memcpy(m->first, p->first, sizeof(double) * p->terms);
    memcpy(m->second, p->second, sizeof(double) * p->terms);
    m->previous = 1.0;
    m->spent = p->spent_first;
}

/* The policy's share for this layer: its recurrent step on what the layer reads and scores. */
static double ask(const Policy *p, const Seat *s, const Layer *l, const float *pooled, const float *score, Memory *m)
{
    int n = p->hidden;
    float encoded[n], gates[4 * n];
    memcpy(encoded, s->encoder_bias, sizeof encoded);
    for (int i = 0; i < l->inputs; i++)
        add_row(encoded, s->pooled + (ptrdiff_t)i * n, clip((pooled[i] - s->pooled_mean) * s->pooled_factor), n);
    for (int i = 0; i < l->outputs; i++)
        add_row(encoded, s->runtime + (ptrdiff_t)i * n, clip((score[i] - s->runtime_mean) * s->runtime_factor), n);
    memcpy(gates, s->recurrent_bias, sizeof gates);
    add_row(gates, p->spent, (float)(fmin(fmax(m->spent, 0.0), 2.0) / 2.0), 4 * n);
    add_row(gates, p->previous, (float)m->previous, 4 * n);
    for (int i = 0; i < n; i++) {
        if (encoded[i] > 0) add_row(gates, p->encoded + (ptrdiff_t)i * 4 * n, encoded[i], 4 * n);
        if (m->hidden[i] != 0) add_row(gates, p->recurrent + (ptrdiff_t)i * 4 * n, m->hidden[i], 4 * n);
    }
    float action = p->head_bias;
    for (int i = 0; i < n; i++) {
        float in = sigmoid(gates[i]), keep = sigmoid(gates[n + i]), out = sigmoid(gates[3 * n + i]);
        float fresh = 2.0f * sigmoid(2.0f * gates[2 * n + i]) - 1.0f;
        m->cell[i] = keep * m->cell[i] + in * fresh;
        m->hidden[i] = out * (2.0f * sigmoid(2.0f * m->cell[i]) - 1.0f);
        action += p->head[i] * m->hidden[i];
    }
    return s->even + (double)clip(action);
}

/* What was decided changes what the next layers are told. */
static void remember(const Policy *p, const Seat *s, double asked, int active, Memory *m)
{
    double macs = s->constant_macs;
    for (int t = 0; t < p->terms; t++) {
        m->first[t] += s->first[t] * active;
        m->second[t] += s->second[t] * active;
        macs += p->weight[t] * m->first[t] * m->second[t];
    }
    m->previous = asked;
    m->spent = macs / p->dense_macs;
}

/* Equations 3 to 5 of Chen, Chen, Pan (2020) on what the static cut left; see tradeoff.py, whose `select` this is. */
static int select_active(const Gate *g, const float *score, int n, int count, int *active, int *columns)
{
    unsigned char outside[n], pruned[n];
    float key[n]; /* NaN stands first, as torch sorts it: each channel must have a place of its own */
    int order[n], only_runtime = 0, only_static = 0;
    for (int c = 0; c < n; c++) key[c] = score[c] == score[c] ? score[c] : INFINITY;
    for (int c = 0; c < n; c++) {
        int place = 0;
        for (int o = 0; o < n; o++) place += (key[o] > key[c]) | ((key[o] == key[c]) & (o < c));
        order[place] = c;
        outside[c] = place >= count;
        pruned[c] = outside[c] && g->doubted[c];
        only_runtime += outside[c] && !g->doubted[c];
        only_static += !outside[c] && g->doubted[c];
    }
    int share = (int)floor(g->trust * only_runtime + 1e-9);
    for (int place = n - 1; share > 0; place--) {
        int c = order[place];
        if (outside[c] && !g->doubted[c]) { pruned[c] = 1; share--; }
    }
    share = (int)floor((1.0 - g->trust) * only_static + 1e-9);
    for (int place = 0; share > 0; place++) {
        int c = g->behind[place];
        if (!outside[c] && g->doubted[c]) { pruned[c] = 1; share--; }
    }
    int kept = 0;
    for (int at = 0; at < n; at++) {
        if (pruned[g->column[at]]) continue;
        active[kept] = g->column[at];
        columns[kept++] = at;
    }
    return kept;
}

/* Choose the active outputs of a gated layer for one input.
 *
 * x: [positions][channels] what the layer reads; inputs: the stored input that each channel is, or NULL for all.
 * policy, seat, memory: NULL where the gate's own share holds.
 * active, columns, scale, shift: [outputs] the answer: active outputs in the order of the weight's columns, those columns,
 * and what the norm and the gate do to each.
 * space: 2 * inputs + outputs floats.
 * Returns the number of active outputs.
 */
int decide(const Layer *l, const Gate *g, const Policy *policy, const Seat *seat, Memory *memory, const float *x,
           int positions, const int *inputs, int channels, int *active, int *columns, float *scale, float *shift,
           float *space)
{
    float *sum = space, *pooled = sum + l->inputs, *score = pooled + l->inputs;
    memset(space, 0, sizeof(float) * 2 * l->inputs);
    for (int p = 0; p < positions; p++) add_row(sum, x + (ptrdiff_t)p * channels, 1.0f, channels);
    for (int i = 0; i < channels; i++) pooled[inputs ? inputs[i] : i] = sum[i] / (float)positions;
    memcpy(score, g->bias, sizeof(float) * l->outputs);
    for (int i = 0; i < l->inputs; i++)
        if (pooled[i] != 0) add_row(score, g->weight + (ptrdiff_t)i * l->outputs, pooled[i], l->outputs);
    if (g->rectify)
        for (int c = 0; c < l->outputs; c++) score[c] = score[c] < 0 ? 0 : score[c];
    double asked = g->keep;
    if (policy) asked = fmin(fmax(ask(policy, seat, l, pooled, score, memory), policy->least), 1.0);
    int count = (int)nearbyint(asked * g->full);
    count = count < 1 ? 1 : count > g->full ? g->full : count;
    int kept = select_active(g, score, l->outputs, count, active, columns);
    if (policy) remember(policy, seat, asked, kept, memory);
    for (int j = 0; j < kept; j++) {
        int c = active[j];
        float gate = score[c] * g->score[c];
        if (score[c] < 0 && g->score[c] < 0) gate = -gate;
        scale[j] = l->scale[c] * gate;
        shift[j] = l->shift[c] * gate + g->shift[c];
    }
    return kept;
}

typedef struct {
    const float *x;        /* padded input, [row][column][channel] */
    const int *rows;       /* [channel] where each input's row of the weight begins */
    const int *taps;       /* [tap] where each tap's pixel lies, from the first */
    int channels, kernels;
    ptrdiff_t tap;         /* floats between two taps of the weight */
    const float *scale, *shift;
    int rectify;
    const int *chosen;     /* columns that are written, or NULL for all */
    int outputs;
    float *y;
} Job;

/* Norm, gate and rectifier on one position's sums, where they are no whole vectors or not all wanted. */
static void finish(const Job *job, const float *sum, int wide, int position, int column)
{
    float *y = job->y + (ptrdiff_t)position * job->outputs;
    if (job->chosen) { /* every column was computed: pick those that are active */
        for (int j = 0; j < job->outputs; j++) {
            int c = job->chosen[j] - column;
            if (c < 0 || c >= wide) continue;
            float value = sum[c] * job->scale[j] + job->shift[j];
            y[j] = job->rectify && value < 0 ? 0 : value;
        }
        return;
    }
    int n = job->outputs - column < wide ? job->outputs - column : wide;
    const float *scale = job->scale + column, *shift = job->shift + column;
    y += column;
    for (int j = 0; j < n; j++) {
        float value = sum[j] * scale[j] + shift[j];
        y[j] = job->rectify && value < 0 ? 0 : value;
    }
}

/* One tile: ROWS x COLUMNS vectors of sums stay in registers while inputs and taps go by. */
#define TILE(M, N)                                                                                         \
    static void tile_##M##_##N(const Job *job, const float *weights, const int *from, int position, int column) \
    {                                                                                                      \
        vec sum[M][N];                                                                                     \
        for (int m = 0; m < M; m++)                                                                        \
            for (int v = 0; v < N; v++) sum[m][v] = (vec){0};                                              \
        for (int k = 0; k < job->kernels; k++) {                                                           \
            const float *weight = weights + k * job->tap, *a[M];                                          \
            for (int m = 0; m < M; m++) a[m] = job->x + from[m] + job->taps[k];                            \
            for (int i = 0; i < job->channels; i++) {                                                      \
                const float *row = weight + job->rows[i];                                                  \
                vec b[N];                                                                                  \
                for (int v = 0; v < N; v++) b[v] = *(const vec *)(row + v * LANES);                        \
                for (int m = 0; m < M; m++)                                                                \
                    for (int v = 0; v < N; v++) sum[m][v] += a[m][i] * b[v];                               \
            }                                                                                              \
        }                                                                                                  \
        if (!job->chosen && job->outputs - column >= N * LANES) {                                          \
            const float *scale = job->scale + column, *shift = job->shift + column;                        \
            for (int m = 0; m < M; m++) {                                                                  \
                float *y = job->y + (ptrdiff_t)(position + m) * job->outputs + column;                     \
                for (int v = 0; v < N; v++) {                                                              \
                    vec value = sum[m][v] * *(const vec *)(scale + v * LANES) + *(const vec *)(shift + v * LANES); \
                    *(vec *)(y + v * LANES) = job->rectify ? (vec)((mask)value & ~(value < 0)) : value;    \
                }                                                                                          \
            }                                                                                              \
            return;                                                                                        \
        }                                                                                                  \
        for (int m = 0; m < M; m++) {                                                                      \
            float row[N * LANES]; /* a copy, or the sums would live in memory */                           \
            for (int v = 0; v < N; v++) *(vec *)(row + v * LANES) = sum[m][v];                             \
            finish(job, row, N * LANES, position + m, column);                                             \
        }                                                                                                  \
    }

#define TILES(M) TILE(M, 1) TILE(M, 2)
TILES(6) TILES(4) TILES(2) TILES(1)
#if COLUMNS == 4
#define MORE(M) TILE(M, 3) TILE(M, 4)
MORE(6) MORE(4) MORE(2) MORE(1)
#define ENTRY(M) { tile_##M##_1, tile_##M##_2, tile_##M##_3, tile_##M##_4 }
#else
#define ENTRY(M) { tile_##M##_1, tile_##M##_2 }
#endif

typedef void (*Tile)(const Job *, const float *, const int *, int, int);
static const Tile TILE_OF[ROWS + 1][COLUMNS] = { [1] = ENTRY(1), [2] = ENTRY(2), [4] = ENTRY(4), [ROWS] = ENTRY(6) };

/* Floats of workspace that a thread may need to convolve a map of this size. */
long convolve_space(const Layer *l, int height, int width)
{
    long border = (long)(height + 2 * l->padding[0]) * (width + 2 * l->padding[1]) * l->inputs;
    long packed = (long)l->kernel[0] * l->kernel[1] * l->inputs * (l->outputs + LANES) + 2 * LANES;
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
    int padded, packs, columns;          /* columns are computed; where a weight is not packed, more than `outputs` */
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
        float *out = packed;
        for (int k = 0; k < taps; k++)
            for (int i = 0; i < t->channels; i++, out += row) {
                const float *in = weight + ((ptrdiff_t)k * l->inputs + (t->inputs ? t->inputs[i] : i)) * BLOCK;
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

/* Positions [start, end) of columns [from, to), with a workspace that no other thread uses. */
static void work(const Task *t, float *space, int start, int end, int from, int to)
{
    const Layer *l = t->layer;
    int taps = l->kernel[0] * l->kernel[1], width = to - from, wide = t->wide * t->channels;
    int row = t->packs ? (width + LANES - 1) / LANES * LANES : BLOCK;
    int *rows = (int *)space, offsets[taps];
    float *border = space + l->inputs, *packed = border + (t->padded ? (ptrdiff_t)t->high * wide : 0);
    packed += -((size_t)packed / sizeof(float)) & (LANES - 1);
    if (t->padded) {
        int last = (end - 1) / t->out_wide * l->stride[0] + (l->kernel[0] - 1) * l->dilation[0];
        draw_border(t, border, start / t->out_wide * l->stride[0], last + 1);
    }
    if (t->packs) pack(t, packed, from, to, row);
    for (int i = 0; i < t->channels; i++) rows[i] = (t->packs || !t->inputs ? i : t->inputs[i]) * row;
    for (int k = 0; k < taps; k++)
        offsets[k] = k / l->kernel[1] * l->dilation[0] * wide + k % l->kernel[1] * l->dilation[1] * t->channels;
    Job job = { t->padded ? border : t->x, rows, offsets, t->channels, taps,
                (ptrdiff_t)row * (t->packs ? t->channels : l->inputs), t->scale, t->shift, l->rectify,
                t->packs ? NULL : t->chosen, t->outputs, t->y };
    for (int column = from, next = 0; column < to;) {
        int limit = t->packs ? to : (column / BLOCK + 1) * BLOCK, left = (to < limit ? to : limit) - column;
        int vectors = left >= COLUMNS * LANES ? COLUMNS : (left + LANES - 1) / LANES;
        const float *weights = t->packs ? packed + column - from
                                        : l->weight + (ptrdiff_t)(column / BLOCK) * taps * l->inputs * BLOCK + column % BLOCK;
        if (job.chosen) { /* no active output among these columns: often, as they are sorted by expected score */
            while (next < t->outputs && t->chosen[next] < column) next++;
            if (next == t->outputs || t->chosen[next] >= column + vectors * LANES) {
                column += vectors * LANES;
                continue;
            }
        }
        for (int p = start; p < end;) {
            int n = end - p >= ROWS ? ROWS : end - p >= 4 ? 4 : end - p >= 2 ? 2 : 1, at[ROWS];
            for (int m = 0; m < n; m++)
                at[m] = (p + m) / t->out_wide * l->stride[0] * wide
                        + (p + m) % t->out_wide * l->stride[1] * t->channels;
            TILE_OF[n][vectors - 1](&job, weights, at, p, column);
            p += n;
        }
        column += vectors * LANES;
    }
}

/* Convolve the active inputs with the weights of the active outputs.
 *
 * x: [height][width][pitch]; `source` names the channels of x that are read (NULL: all `channels` of them, as they lie).
 * inputs: [channels] the stored input that each channel is, or NULL for all.
 * chosen: [outputs] the outputs that are computed, or NULL for all.
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
    int columns = chosen && !packs ? l->outputs : outputs;
    Task task = { l, x, height, width, pitch, source, inputs, channels, chosen, outputs, scale, shift, y, high, wide,
                  out_wide, positions, l->padding[0] || l->padding[1] || source, packs, columns };
    if ((double)positions * columns * channels * l->kernel[0] * l->kernel[1] < LEAST_SHARED) threads = 1;
    if (threads < 2) {
        work(&task, space, 0, positions, 0, columns);
        return;
    }
    /* Threads share neither packed weights nor borders: fetching them from another core's cache costs more than making
       them twice. They divide what is larger, the weight or the map. */
    long room = convolve_space(l, height, width);
    int vectors = (columns + LANES - 1) / LANES, strips = (positions + ROWS - 1) / ROWS;
    int by_columns = vectors >= threads && l->kernel[0] * l->kernel[1] * columns > height * width;
    int parts = by_columns ? vectors : strips, size = by_columns ? LANES : ROWS;
    int limit = by_columns ? columns : positions;
    int used = threads < parts ? threads : parts;
#pragma omp parallel for schedule(static, 1) num_threads(used)
    for (int n = 0; n < used; n++) {
        int from = (int)((long)parts * n / used) * size, to = (int)((long)parts * (n + 1) / used) * size;
        to = to < limit ? to : limit;
        if (by_columns) work(&task, space + n * room, 0, positions, from, to);
        else work(&task, space + n * room, from, to, 0, columns);
    }
}
