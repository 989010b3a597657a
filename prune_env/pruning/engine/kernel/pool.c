/* Pooling: [height][width][channels] -> [out height][out width][channels]. */

#include "layer.h"

/* What a window holds of a map's axis. */
static int window(int at, int stride, int padding, int size, int length, int *end)
{
    int start = at * stride - padding;
    *end = start + size < length ? start + size : length;
    return start > 0 ? start : 0;
}

/* The largest value of each window; what is not a number stays so. */
void pool_largest(const float *x, int height, int width, int channels, const int *kernel, const int *stride,
                  const int *padding, int out_high, int out_wide, float *restrict y)
{
    for (int r = 0; r < out_high; r++)
        for (int c = 0; c < out_wide; c++, y += channels) {
            int bottom, right, top = window(r, stride[0], padding[0], kernel[0], height, &bottom);
            int left = window(c, stride[1], padding[1], kernel[1], width, &right);
            for (int j = 0; j < channels; j++) y[j] = -INFINITY;
            for (int i = top; i < bottom; i++)
                for (int k = left; k < right; k++) {
                    const float *in = x + ((ptrdiff_t)i * width + k) * channels;
                    for (int j = 0; j < channels; j++) y[j] = in[j] > y[j] || in[j] != in[j] ? in[j] : y[j];
                }
        }
}

/* The mean of the whole map. */
void pool_mean(const float *x, int positions, int channels, float *restrict y)
{
    memset(y, 0, sizeof(float) * channels);
    for (int p = 0; p < positions; p++) add_row(y, x + (ptrdiff_t)p * channels, 1.0f, channels);
    for (int j = 0; j < channels; j++) y[j] /= (float)positions;
}
