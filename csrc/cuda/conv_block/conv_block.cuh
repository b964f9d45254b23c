// What the kernels of conv_block_bwd share: their arguments, the place of a block, and the way of a
// tile of dx from shared memory to global.
//
// Opt-in: runs in every kernel of conv_block_bwd; conv_block_bwd.cu says when that is.
#pragma once

#include "dz_tile.cuh"
#include "logits_pixel.cuh"

namespace gpl_fast::cuda {

struct ConvBlockArgs {
  ConvBlockBwd conv;
  SoftmaxBwd logits;                    // where conv.logits is set
  int tiles_h, tiles_w, channel_tiles;  // channel_tiles: of blocks, 1 with logits
  int class_tiles;                      // that one block walks over, 1 without logits
  int64_t out_pad, in_pad;              // channels of the packed weight
  int dz_tiles;                         // in shared memory
  bool aligned, dx_aligned, tf32;
};

ConvBlockArgs conv_block_args(const ConvBlockBwd& a, int channels);
int64_t conv_block_count(const ConvBlockArgs& a);

// False where it has no kernel for it: float32, or none of sm_90a was compiled.
bool conv_block_bwd_sm90(const ConvBlockBwd& a, cudaStream_t stream);

__device__ __forceinline__ Tile tile_of_block(const ConvBlockArgs& a, int& channel_tile) {
  int b = (int)blockIdx.x;
  const int stride = (int)a.conv.stride;
  channel_tile = b % a.channel_tiles, b /= a.channel_tiles;
  Tile t;
  t.j0 = b % a.tiles_w * kTileW, b /= a.tiles_w;
  t.i0 = b % a.tiles_h * kTileH, b /= a.tiles_h;
  t.phase_w = b % stride, b /= stride;
  t.phase_h = b % stride, t.n = b / stride;
  if (stride == 1) t.i0 += (int)a.conv.strip.row0;
  t.rows = taps_of((int)a.conv.K, stride, t.phase_h);
  t.columns = taps_of((int)a.conv.K, stride, t.phase_w);
  return t;
}

// The pixel (i, j) of a tile in dx.
struct Place {
  int h, w;
  bool in_strip, in_image;
};
__device__ __forceinline__ Place place_of(const ConvBlockArgs& a, const Tile& t, int i, int j) {
  Place p;
  p.h = (int)a.conv.stride * (t.i0 + i) + t.phase_h;
  p.w = (int)a.conv.stride * (t.j0 + j) + t.phase_w;
  p.in_strip = p.w < a.conv.W && p.h < a.conv.strip.row0 + a.conv.strip.rows;
  p.in_image = p.in_strip && p.h >= 0 && p.h < a.conv.H;
  return p;
}

// Pixels x C channels of dx on their way through shared memory. A warp puts its fragments in; out
// come a pixel's channels eight at a time or, for the logits, a channel of many pixels or some of
// few. Both without bank conflicts, by a pitch or by a swizzle.
template <int C, bool kLogits>
struct DxRows {
  static constexpr int kPitch = kLogits ? C : C + 8;  // in elements; C is a multiple of 32

  __host__ __device__ static constexpr int bytes(int pixels) { return pixels * kPitch * 4; }

  static __device__ __forceinline__ int place(int pixel, int c) {
    // Its lowest five bits, in the order in which the patterns above use up the banks.
    if constexpr (kLogits) {
      c ^= (pixel & 3) << 3 | (pixel & 4) | (pixel >> 2 & 2) | (pixel >> 4 & 1);
    }
    return pixel * kPitch + c;
  }
  // Channels c and c + 1, c even.
  static __device__ __forceinline__ void put(float* rows, int pixel, int c, float first,
                                             float second) {
    const bool swapped = kLogits && (pixel >> 4 & 1);
    Vec<float, 2> both;
    both.v[0] = swapped ? second : first, both.v[1] = swapped ? first : second;
    ptx::store_shared(rows + (place(pixel, c) & ~1), both);
  }
  static __device__ __forceinline__ float at(const float* rows, int pixel, int c) {
    return ptx::load_shared<float>(rows + place(pixel, c));
  }
  // Eight channels from c on; `thread` of those that read neighbouring ones together.
  static __device__ __forceinline__ void eight(const float* rows, int pixel, int c, int thread,
                                               float (&out)[8]) {
    static_assert(!kLogits);
    const float* from = rows + place(pixel, c);
    const int order = thread >> 2 & 1;  // the halves of every second four threads, swapped
    const auto first = ptx::load_shared<Vec<float, 4>>(from + order * 4);
    const auto second = ptx::load_shared<Vec<float, 4>>(from + (order ^ 1) * 4);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      out[e] = order ? second.v[e] : first.v[e];
      out[e + 4] = order ? first.v[e] : second.v[e];
    }
  }
};

// Eight channels of the tile; pixels outside the image become zeros.
template <class T>
__device__ __forceinline__ void store_dx(const ConvBlockArgs& a, int n, const Place& p, int c,
                                         const float (&row)[8]) {
  if (!p.in_strip || c >= a.conv.C_in) return;
  T* dx = (T*)a.conv.dx + n * a.conv.dx_image_stride +
          ((p.h - a.conv.strip.row0) * a.conv.W + p.w) * a.conv.C_in + c;
  constexpr int kUnit = 16 / sizeof(T);
#pragma unroll
  for (int u = 0; u < 8 / kUnit; ++u) {
    Vec<T, kUnit> out;
#pragma unroll
    for (int e = 0; e < kUnit; ++e) out.v[e] = narrow<T>(p.in_image ? row[u * kUnit + e] : 0.0f);
    if (a.dx_aligned) {
      *(Vec<T, kUnit>*)(dx + u * kUnit) = out;
    } else {
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        if (c + u * kUnit + e < a.conv.C_in) dx[u * kUnit + e] = out.v[e];
      }
    }
  }
}

// A thread's pixel among those that a group of threads has in shared memory, and its first channel;
// it goes on in steps of `lanes`. Neighbours in the caller's memory go to neighbouring threads.
struct Share {
  int pixel, lane, lanes;
};
__device__ __forceinline__ Share share_of(const SoftmaxBwd& a, int thread, int threads,
                                          int pixels) {
  const int lanes = threads / pixels;
  if (a.dx_strides.c == 1) return {thread / lanes, thread % lanes, lanes};
  return {thread % pixels, thread / pixels, lanes};
}

// The total over the lanes of a pixel, in fixed order: slots [lanes].
__device__ __forceinline__ LogitsSums total_of(const LogitsSums* slots, int lanes) {
  LogitsSums t = slots[0];
  for (int l = 1; l < lanes; ++l) {
    t.y_dy += slots[l].y_dy, t.y += slots[l].y, t.p += slots[l].p;
  }
  return t;
}

}  // namespace gpl_fast::cuda
