// The binary cross-entropy's gradient of one element, and who has which elements.
#pragma once

#include "element.cuh"

namespace gpl_fast::cuda {

constexpr int kPixels = 4;               // of a thread, where pixels lie side by side
constexpr int kSide = 32;                // of a tile of channels and pixels, where channels do
constexpr float kPerLog2 = 1.44269504f;  // log2(e)

// The gradient by x at an element that counts: on_0 sigmoid(x) - on_1 sigmoid(-x), as in csrc/cpu.
__device__ __forceinline__ float binary_slope(const BinaryCe& ce, float x, bool one, int64_t c) {
  const float w = ce.class_weight ? ce.class_weight[c] : 1.0f;
  const float p = w * (ce.pos_weight ? ce.pos_weight[c] : 1.0f), e = 0.5f * ce.label_smoothing;
  const float t = exp2_approx(-fabsf(x) * kPerLog2), larger = 1.0f / (1.0f + t),
              smaller = t * larger;
  const float y = x > 0.0f ? larger : smaller, rest = x > 0.0f ? smaller : larger;
  return w * (one ? e : 1.0f - e) * y - p * (one ? 1.0f - e : e) * rest;
}

template <class X>
__device__ __forceinline__ void binary_element(const BinaryCeBwd& a, int64_t n, int64_t c,
                                               int64_t h, int64_t w, uint8_t label) {
  X* dx =
      (X*)a.dx + n * a.dx_strides.n + c * a.dx_strides.c + h * a.dx_strides.h + w * a.dx_strides.w;
  if (label > 1) {
    if (a.clear) *dx = narrow<X>(0.0f);
    return;
  }
  if (!a.scale) return;
  const Strides& s = a.x_strides;
  const float x = widen(((const X*)a.x)[n * s.n + c * s.c + h * s.h + w * s.w]);
  const float by = a.scale[n] * (a.mask ? a.mask[(n * a.H + h) * a.W + w] : 1.0f);
  *dx = narrow<X>(widen(*dx) + by * binary_slope(a, x, label == 1, c));
}

// A block has kThreads * kPixels pixels of one plane's rows.
template <class X>
__global__ void __launch_bounds__(kThreads) binary_ce_planes_kernel(BinaryCeBwd a, int64_t tiles) {
  const int64_t plane = blockIdx.x / tiles, n = plane / a.C, c = plane - n * a.C;
  const int64_t first = (blockIdx.x - plane * tiles) * (kThreads * kPixels) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const int64_t px = first + i * kThreads;
    if (px >= a.strip.rows * a.W) return;
    const int64_t r = px / a.W, h = a.strip.row0 + r, w = px - r * a.W;
    if (h < 0 || h >= a.H) continue;
    const Strides& s = a.labels_strides;
    binary_element<X>(a, n, c, h, w, a.labels[n * s.n + c * s.c + h * s.h + w]);
  }
}

// A block has kSide pixels of a row and, step by step, all channels: labels are read along the
// pixels and used along the channels.
template <class X>
__global__ void __launch_bounds__(kThreads)
    binary_ce_channels_kernel(BinaryCeBwd a, int64_t tiles) {
  __shared__ uint8_t labels[kSide][kSide + 4];
  const int64_t row = blockIdx.x / tiles, n = row / a.strip.rows;
  const int64_t h = a.strip.row0 + row - n * a.strip.rows, w0 = (blockIdx.x - row * tiles) * kSide;
  if (h < 0 || h >= a.H) return;
  const int lane = threadIdx.x % kSide, warp = threadIdx.x / kSide;
  const Strides& s = a.labels_strides;
  for (int64_t c0 = 0; c0 < a.C; c0 += kSide) {
    for (int i = warp; i < kSide; i += kThreads / kSide) {
      if (c0 + i < a.C && w0 + lane < a.W) {
        labels[i][lane] = a.labels[n * s.n + (c0 + i) * s.c + h * s.h + w0 + lane];
      }
    }
    __syncthreads();
    for (int i = warp; i < kSide; i += kThreads / kSide) {
      if (c0 + lane < a.C && w0 + i < a.W)
        binary_element<X>(a, n, c0 + lane, h, w0 + i, labels[lane][i]);
    }
    __syncthreads();
  }
}

}  // namespace gpl_fast::cuda
