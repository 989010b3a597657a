/* Which outputs of a gated layer are active for one input. */

#include "layer.h"

#ifdef _OPENMP
int omp_get_thread_num(void); /* of the OpenMP that the process has loaded */
int omp_get_num_threads(void);
#define THREAD omp_get_thread_num()
#define THREADS omp_get_num_threads()
#else
#define THREAD 0
#define THREADS 1
#endif

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

/* e^x to float32's precision; a polynomial without branches, so that loops over it become vector code. */
static inline float power(float x)
{
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: what is left of a fraction is rounded away */
    float steps = shifted - 12582912.0f;
    float r = x - steps * 0.693359375f + steps * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    union { unsigned i; float f; } scale = { (unsigned)((int)steps + 127) << 23 };
    return y * scale.f;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + power(-x)); }

static inline float clip(float x) { return x < -1.0f ? -1.0f : x > 1.0f ? 1.0f : x; }

/* Numbers [from, to) of sums that several threads share out, in whole vectors. */
typedef struct { int from, to; } Part;

static Part part(int n, int thread, int threads)
{
    int vectors = (n + LANES - 1) / LANES, to = vectors * (thread + 1) / threads * LANES;
    return (Part){ vectors * thread / threads * LANES, to < n ? to : n };
}

/* sum[j] += factor[i] * rows[index[i]][j] for the j of a part; four rows at a time: sums are read and written once for
   all of them. */
static void add_rows(float *restrict sum, const float *restrict rows, int length, Part part, const int *restrict index,
                     const float *restrict factor, int count)
{
    int i = 0, n = part.to - part.from;
    sum += part.from, rows += part.from;
    for (; i + 4 <= count; i += 4) {
        const float *a = rows + (ptrdiff_t)index[i] * length, *b = rows + (ptrdiff_t)index[i + 1] * length;
        const float *c = rows + (ptrdiff_t)index[i + 2] * length, *d = rows + (ptrdiff_t)index[i + 3] * length;
        float e = factor[i], f = factor[i + 1], g = factor[i + 2], h = factor[i + 3];
        for (int j = 0; j < n; j++) sum[j] = fused(h, d[j], fused(g, c[j], fused(f, b[j], fused(e, a[j], sum[j]))));
    }
    for (; i < count; i++) add_row(sum, rows + (ptrdiff_t)index[i] * length, factor[i], n);
}

/* The places of what is not zero, and what stands there; returns how many. */
static int nonzero(const float *values, int n, int *index, float *factor)
{
    int count = 0;
    for (int i = 0; i < n; i++) {
        index[count] = i;
        factor[count] = values[i];
        count += values[i] != 0;
    }
    return count;
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

/* The recurrent step (LSTM): what the gates make of the memory. */
static void recall(const float *restrict gates, float *restrict cell, float *restrict hidden, int n)
{
    for (int i = 0; i < n; i++) {
        float in = sigmoid(gates[i]), keep = sigmoid(gates[n + i]), out = sigmoid(gates[3 * n + i]);
        float fresh = 2.0f * sigmoid(2.0f * gates[2 * n + i]) - 1.0f;
        cell[i] = keep * cell[i] + in * fresh;
        hidden[i] = out * (2.0f * sigmoid(2.0f * cell[i]) - 1.0f);
    }
}

/* What the policy's layers add up: its own encoding of what it sees, and the gates of its recurrent step. */
typedef struct {
    float *encoded, *gates; /* [hidden], [4 hidden] */
} Draft;

/* One thread's part of the gates: what the policy remembers. */
static void remembered(const Policy *p, const Seat *s, const Memory *m, Draft d, Part part)
{
    int n = part.to - part.from, index[p->hidden];
    float factor[p->hidden];
    memcpy(d.gates + part.from, s->recurrent_bias + part.from, sizeof(float) * n);
    add_row(d.gates + part.from, p->spent + part.from, (float)(fmin(fmax(m->spent, 0.0), 2.0) / 2.0), n);
    add_row(d.gates + part.from, p->previous + part.from, (float)m->previous, n);
    add_rows(d.gates, p->recurrent, 4 * p->hidden, part, index, factor, nonzero(m->hidden, p->hidden, index, factor));
}

/* One thread's part of the encoding: what the layer reads and scores. */
static void encoded(const Policy *p, const Seat *s, const Layer *l, const float *pooled, const float *score, Draft d,
                    Part part)
{
    int n = p->hidden, most = l->inputs > l->outputs ? l->inputs : l->outputs, index[most];
    float factor[most];
    memcpy(d.encoded + part.from, s->encoder_bias + part.from, sizeof(float) * (part.to - part.from));
    /* The bias holds what an input that is not active would add. */
    float none = clip((0 - s->pooled_mean) * s->pooled_factor);
    for (int i = 0; i < l->inputs; i++) factor[i] = clip((pooled[i] - s->pooled_mean) * s->pooled_factor) - none;
    add_rows(d.encoded, s->pooled, n, part, index, factor, nonzero(factor, l->inputs, index, factor));
    for (int i = 0; i < l->outputs; i++) factor[i] = clip((score[i] - s->runtime_mean) * s->runtime_factor);
    add_rows(d.encoded, s->runtime, n, part, index, factor, nonzero(factor, l->outputs, index, factor));
    for (int i = part.from; i < part.to; i++) d.encoded[i] = d.encoded[i] < 0 ? 0 : d.encoded[i];
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

/* order: the channels in falling order of their values; of equal ones the lower index stands first. Radix sort. */
static void rank(const float *values, int n, int *order)
{
    unsigned key[n];
    int other[n], ends[4][256] = {{0}}, *from = order, *to = other;
    for (int c = 0; c < n; c++) {
        float value = values[c] + 0.0f; /* zeros have one sign */
        unsigned bits;
        memcpy(&bits, &value, sizeof bits);
        bits = bits >> 31 ? bits : ~bits & 0x7fffffffu;
        key[c] = value == value ? bits : 0; /* what is not a number stands first, as torch sorts it */
        from[c] = c;
        for (int digit = 0; digit < 4; digit++) ends[digit][key[c] >> 8 * digit & 255]++;
    }
    for (int digit = 0; digit < 4; digit++) {
        int *place = ends[digit], start = 0;
        for (int k = 0; k < 256; k++) {
            int count = place[k];
            place[k] = start;
            start += count;
        }
        for (int i = 0; i < n; i++) to[place[key[from[i]] >> 8 * digit & 255]++] = from[i];
        int *swap = from;
        from = to;
        to = swap;
    }
}

/* Equations 3 to 5 of Chen, Chen, Pan (2020) on what the static cut left; see tradeoff.py, whose `select` this is. */
static int select_active(const Gate *g, const float *score, int n, int count, int *active, int *columns)
{
    unsigned char outside[n], pruned[n];
    int order[n], only_runtime = 0, only_static = 0;
    rank(score, n, order);
    for (int place = 0; place < n; place++) {
        int c = order[place];
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

/* Sums over positions; positions of few channels are taken several at a time, to fill the vectors.
 *
 * sum: channels + BLOCK floats.
 */
static void add_up(const float *x, int positions, int channels, float *sum)
{
    int together = channels < BLOCK ? BLOCK / channels + 1 : 1, n = together * channels, p = 0;
    memset(sum, 0, sizeof(float) * n);
    for (; p + together <= positions; p += together) add_row(sum, x + (ptrdiff_t)p * channels, 1.0f, n);
    for (; p < positions; p++) add_row(sum, x + (ptrdiff_t)p * channels, 1.0f, channels);
    for (int k = 1; k < together; k++) add_row(sum, sum + k * channels, 1.0f, channels);
}

/* Choose the active outputs of a gated layer for one input.
 *
 * x: [positions][channels] what the layer reads; inputs: the stored input that each channel is, or NULL for all.
 * policy, seat, memory: NULL where the gate's own share holds.
 * active, columns, scale, shift: [outputs] the answer: active outputs in the order of the weight's columns, those columns,
 * and what the norm and the gate do to each.
 * space: inputs + outputs + (channels of x) + BLOCK floats.
 * Returns the number of active outputs.
 */
int decide(const Layer *l, const Gate *g, const Policy *policy, const Seat *seat, Memory *memory, const float *x,
           int positions, const int *inputs, int channels, int *active, int *columns, float *scale, float *shift,
           float *space, int threads)
{
    float *pooled = space, *score = pooled + l->inputs, *sum = score + l->outputs, factor[l->inputs];
    int index[l->inputs], n = policy ? policy->hidden : 1;
    float encoding[n], gates[4 * n];
    Draft draft = { encoding, gates };
    add_up(x, positions, channels, sum);
    memset(pooled, 0, sizeof(float) * l->inputs);
    for (int i = 0; i < channels; i++) pooled[inputs ? inputs[i] : i] = sum[i] / (float)positions;
    int read = nonzero(pooled, l->inputs, index, factor);
    memcpy(score, g->bias, sizeof(float) * l->outputs);
    /* Each thread has a part of every sum, so that it finds its part of the policy in its own cache again. */
    threads = policy && threads > 1 ? threads : 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int thread = THREAD, all = THREADS;
        Part mine = part(l->outputs, thread, all);
        add_rows(score, g->weight, l->outputs, mine, index, factor, read);
        if (g->rectify)
            for (int c = mine.from; c < mine.to; c++) score[c] = score[c] < 0 ? 0 : score[c];
        if (policy) {
            remembered(policy, seat, memory, draft, part(4 * n, thread, all));
#pragma omp barrier
            encoded(policy, seat, l, pooled, score, draft, part(n, thread, all));
#pragma omp barrier
            int place[n];
            float value[n];
            add_rows(gates, policy->encoded, 4 * n, part(4 * n, thread, all), place, value,
                     nonzero(encoding, n, place, value));
        }
    }
    double asked = g->keep;
    if (policy) {
        float action = policy->head_bias;
        recall(gates, memory->cell, memory->hidden, n);
        for (int i = 0; i < n; i++) action += policy->head[i] * memory->hidden[i];
        asked = fmin(fmax(seat->even + (double)clip(action), policy->least), 1.0);
    }
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

