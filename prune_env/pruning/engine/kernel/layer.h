/* What the functions of the kernel share: one input of a deployed gated network, in float32.
 *
 * Maps are [position][channel] (channels_last) and hold only the channels that are active. A weight is stored as
 * [block][input][tap][BLOCK outputs]: what one tile needs lies together, and a large layer is read as a stream. Three
 * functions are called from Python (native.py has the twins of the structs): `decide` chooses the active outputs of a
 * gated layer, `convolve` computes them from the active inputs, `pool` makes a map smaller. Nothing allocates memory;
 * callers pass a workspace, and answer for sizes: lengths that do not fit a layer are not noticed here.
 */

#ifndef PRUNE_ENV_LAYER_H
#define PRUNE_ENV_LAYER_H

#include <math.h>
#include <stddef.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define COLUMNS 4 /* vectors of outputs in one tile */
#elif defined(__AVX__)
#include <immintrin.h>
#define LANES 8
#define COLUMNS 2
#else
#define LANES 4
#define COLUMNS 2
#endif
#define BLOCK 64 /* outputs that lie together in a weight */

typedef struct {
    int inputs, outputs;   /* stored channels */
    int kernel[2], stride[2], padding[2], dilation[2];
    const float *weight;   /* [block][input][tap][BLOCK] */
    const float *scale;    /* [output] of the norm behind it, or ones */
    const float *shift;    /* [output] of the norm behind it or the bias, or zeros */
    int rectify;           /* a rectifier follows */
} Layer;

/* a b + c, rounded once wherever the processor can: left to the compiler, vector code and what is left over behind it
   may round differently, and which is which would depend on how threads share a sum. */
static inline float fused(float a, float b, float c)
{
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

/* sum[0 .. n) += factor * row[0 .. n) */
static inline void add_row(float *restrict sum, const float *restrict row, float factor, int n)
{
    for (int i = 0; i < n; i++) sum[i] = fused(factor, row[i], sum[i]);
}

#endif
