// A step's forward for sm_90a in the difference form: 3 x 3 convolution of the carried map and of
// delta, ReLU, 2 x 2 max pool and code. Output channels are wgmma's rows, pixels its columns.
//
// The halo: for 64 input channels and each column of taps one box of pixels comes by TMA, two rows
// higher than the tile and 8 pixels wide, so that a row of them is one 1024-byte block of the
// swizzle: the three rows of taps read the same box, each a block later. Nine taps cost three
// boxes.
//
// One thread brings boxes and weights; two warpgroups multiply, each 64 channels by 16 rows of 8
// pixels of both maps, which share the weights. A window of the pool lies in one thread.
//
// Opt-in: conv_block_fwd_sm90.cu says when it runs.
#pragma once

#include "../element.cuh"
#include "hopper.cuh"

namespace gpl_fast::cuda {

constexpr int kHaloWidth = 8, kHaloRows = 16;  // pixels of a warpgroup
constexpr int kHaloThreads = 384, kHaloConsumers = 256;
constexpr int kRowBytes = kHaloWidth * 128;  // of a row of pixels, 64 channels each

// Shared memory: two stages of [the carried map | delta | weights of three taps], then what each
// warpgroup puts out. With 64 channels the warpgroups have other rows, with 128 other channels.
template <int kChannels>
struct HaloLayout {
  static constexpr bool kSplitsRows = kChannels == 64;
  static constexpr int kRows = kSplitsRows ? 2 * kHaloRows : kHaloRows;
  static constexpr int kMap = (kRows + 2) * kRowBytes;
  static constexpr int kSlab = 64 * 128, kTap = kChannels / 64 * kSlab;  // 64 x 64 weights; a tap
  static constexpr int kStages = 2, kStage = 2 * kMap + 3 * kTap;
  static constexpr int kPooled = kHaloRows / 2 * kHaloWidth / 2;  // pixels that a warpgroup stores
  static constexpr int kPitch = 64 * 2 + 16, kMapOut = kPooled * kPitch, kCodeOut = kPooled * 32;
  static constexpr int kOut = 2 * kMapOut + kCodeOut;
  static constexpr int kBytes = kStages * kStage + 2 * kOut;
};

struct HaloArgs {
  ConvBlockFwd conv;
  int64_t tiles_w, tiles, channel_tiles;  // tiles: of an image
};

struct HaloTile {
  int n, h0, w0, c0;
  int64_t program;  // of the image

  template <int kChannels>
  static __device__ HaloTile of_block(const HaloArgs& a) {
    const unsigned programs = (unsigned)(a.tiles * a.channel_tiles);
    const unsigned n = blockIdx.x / programs, program = blockIdx.x - n * programs;
    // Neighbours have the same pixels, which are in the L2 cache.
    const int tile = (int)(program / (unsigned)a.channel_tiles);
    const int row = tile / (int)a.tiles_w;
    return {(int)n, row * HaloLayout<kChannels>::kRows, (tile - row * (int)a.tiles_w) * kHaloWidth,
            (int)(program - tile * a.channel_tiles) * kChannels, program};
  }
};

struct HaloBarriers {
  uint64_t full[2], empty[2];
};

// One thread: 64 input channels after the other, of each the three columns of taps.
template <int kChannels>
__device__ void bring_halo(const HaloArgs& a, const HaloTile& t, const TensorMap* map,
                           const TensorMap* delta, const TensorMap* weights, unsigned char* stages,
                           HaloBarriers& bars) {
  using L = HaloLayout<kChannels>;
  const int C_in = (int)a.conv.C_in, h = t.h0 - (int)a.conv.pad_h;
  int at = 0, phase = 1;
  for (int c = 0; c < C_in; c += 64) {
    for (int column = 0; column < 3; ++column) {
      unsigned char* stage = stages + at * L::kStage;
      ptx::mbarrier_wait(bars.empty + at, phase);
      ptx::mbarrier_expect(bars.full + at, L::kStage);
      ptx::tma_load(stage, map, bars.full + at, c, t.w0 + column - 1, h, t.n);
      ptx::tma_load(stage + L::kMap, delta, bars.full + at, c, t.w0 + column - 1, h, t.n);
      for (int row = 0; row < 3; ++row) {
        for (int s = 0; s < kChannels / 64; ++s) {
          ptx::tma_load(stage + 2 * L::kMap + row * L::kTap + s * L::kSlab, weights, bars.full + at,
                        t.c0 + s * 64, (row * 3 + column) * C_in + c);
        }
      }
      if (++at == L::kStages) at = 0, phase ^= 1;
    }
  }
}

// The products of a stage, of its first 16 kSteps input channels: of each 16 rows of weights and 32
// bytes of pixels.
template <class T, int kChannels, int kSteps>
__device__ __forceinline__ void multiply_stage(uint64_t w, uint64_t a, uint64_t d, float (&z)[64],
                                               float (&dz)[64]) {
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
  ptx::wgmma_fence();
#pragma unroll
  for (int row = 0; row < 3; ++row) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int of_w = (row * HaloLayout<kChannels>::kTap + k * 16 * 128) >> 4;
      const int of_map = (row * kRowBytes + k * 32) >> 4;
      ptx::wgmma_shared<kBFloat16, 128>(z, w + of_w, a + of_map);
      ptx::wgmma_shared<kBFloat16, 128>(dz, w + of_w, d + of_map);
    }
  }
  ptx::wgmma_commit();
}

// z and dz of a warpgroup's 64 channels and 128 pixels.
template <class T, int kChannels>
__device__ __forceinline__ void multiply_halo(int C_in, int group, unsigned char* ring,
                                              HaloBarriers& bars, float (&z)[64], float (&dz)[64]) {
  using L = HaloLayout<kChannels>;
  const int first_row = L::kSplitsRows ? group * kHaloRows : 0, slab = L::kSplitsRows ? 0 : group;
#pragma unroll
  for (int i = 0; i < 64; ++i) z[i] = dz[i] = 0.0f;
  ptx::keep_in_place(z);
  ptx::keep_in_place(dz);
  int at = 0, phase = 0;
  for (int i = 0; i < (C_in + 63) / 64 * 3; ++i) {
    unsigned char* stage = ring + at * L::kStage;
    const uint64_t w =
        ptx::wgmma_descriptor(stage + 2 * L::kMap + slab * L::kSlab, L::kSlab, 8 * 128);
    const uint64_t a = ptx::wgmma_descriptor(stage + first_row * kRowBytes, 0, kRowBytes);
    const uint64_t d = ptx::wgmma_descriptor(stage + L::kMap + first_row * kRowBytes, 0, kRowBytes);
    ptx::mbarrier_wait(bars.full + at, phase);
    if (C_in - i / 3 * 64 > 32) {
      multiply_stage<T, kChannels, 4>(w, a, d, z, dz);
    } else {
      multiply_stage<T, kChannels, 2>(w, a, d, z, dz);
    }
    // These go on while the stage before them, whose products are done, is filled again.
    ptx::wgmma_wait<1>();
    if (i > 0 && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(bars.empty + (at ^ 1));
    if (++at == L::kStages) at = 0, phase ^= 1;
  }
  ptx::wgmma_wait<0>();
  ptx::keep_in_place(z);
  ptx::keep_in_place(dz);
}

__device__ __forceinline__ float relu_of(float z) { return z <= 0.0f ? 0.0f : z; }
// Where a later position of a window wins over an earlier one: NaN wins, as in PyTorch.
__device__ __forceinline__ bool first_of(float value, float best) {
  return value > best || value != value;
}

// Eq. (6) and the pool of a window, positions row-major: twin of gpl_fast/kernels/branches.py.
struct HaloWindow {
  float y, delta;
  int code;

  __device__ __forceinline__ HaloWindow(const float (&z)[4], const float (&d)[4],
                                        bool from_target) {
    float best = from_target ? z[0] + d[0] : z[0], other = from_target ? best : z[0] - d[0];
    float carried = z[0], z_other = z[0], d_other = d[0];
    code = 0;
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      const float p = from_target ? z[i] + d[i] : z[i], o = from_target ? p : z[i] - d[i];
      if (first_of(o, other)) other = o, z_other = z[i], d_other = d[i];
      if (first_of(z[i], carried)) carried = z[i];
      if (first_of(p, best)) best = p, code = i;
    }
    if (best <= 0.0f) code = 4;
    y = relu_of(carried);
    const bool off = other <= 0.0f;
    if (from_target) {
      delta = off ? 0.0f - y : (z_other - y) + d_other;
    } else {
      delta = off ? y : (y - z_other) + d_other;
    }
  }
};

// What a warpgroup puts out, on its way through shared memory: pixels by 64 channels.
template <class T, int kChannels>
class HaloOutput {
 public:
  using L = HaloLayout<kChannels>;

  __device__ HaloOutput(const HaloArgs& a, const HaloTile& t, int group, unsigned char* out)
      : a_(a.conv),
        n_(t.n),
        thread_(threadIdx.x % 128),
        out_(out + group * L::kOut),
        row0_(t.h0 + (L::kSplitsRows ? group * kHaloRows : 0)),
        column0_(t.w0),
        c0_(t.c0 + (L::kSplitsRows ? 0 : group * 64)),
        from_target_(a.conv.from_target[t.n]) {}

  // Returns the sum of the squares of what becomes delta, of the thread's windows.
  __device__ float pool(const float (&z)[64], const float (&dz)[64]) const {
    const int lane = thread_ % 32, column = lane % 4;
    float squares = 0.0f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int channel = thread_ / 32 * 16 + lane / 4 + h * 8;
      const float bias = a_.bias ? a_.bias[c0_ + channel] : 0.0f;
#pragma unroll
      for (int i = 0; i < kHaloRows / 2; ++i) {
        float window[4], difference[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const int64_t row = a_.row0 + row0_ + 2 * i + q / 2;
          const bool inside = row >= 0 && row < a_.image_rows;
          const int at = (2 * i + q / 2) * 4 + h * 2 + q % 2;
          window[q] = inside ? z[at] + bias : 0.0f;
          difference[q] = inside ? dz[at] : 0.0f;
        }
        const HaloWindow w(window, difference, from_target_);
        const int pixel = i * (kHaloWidth / 2) + column;
        const T delta = narrow<T>(w.delta);
        ptx::store_shared(map_at(0, pixel, channel), narrow<T>(w.y));
        ptx::store_shared(map_at(1, pixel, channel), delta);
        const int next = __shfl_xor_sync(~0u, w.code, 4);  // of the neighbouring channel
        if (channel % 2 == 0) {
          ptx::store_shared(code_at(pixel, channel / 2), (uint8_t)(w.code | next << 4));
        }
        if (live(pixel)) squares = fmaf(widen(delta), widen(delta), squares);
      }
    }
    return squares;
  }

  // 16 bytes of a pixel at a time, when all of the block is there.
  __device__ void store() const {
    using Piece = Vec<uint32_t, 4>;
    for (int i = thread_; i < L::kPooled * 8; i += 128) {
      const int pixel = i / 8, c = i % 8 * 8;
      if (!live(pixel)) continue;
      const int64_t at = pixel_at(pixel) * a_.C_out + c0_ + c;
      if (a_.y) {
        *(Piece*)((T*)a_.y + n_ * a_.y_image_stride + at) =
            ptx::load_shared<Piece>(map_at(0, pixel, c));
      }
      if (a_.delta) {
        *(Piece*)((T*)a_.delta + n_ * a_.delta_image_stride + at) =
            ptx::load_shared<Piece>(map_at(1, pixel, c));
      }
    }
    for (int i = thread_; a_.code && i < L::kPooled * 2; i += 128) {
      const int pixel = i / 2, byte = i % 2 * 16;
      if (!live(pixel)) continue;
      const int64_t at = pixel_at(pixel) * (a_.C_out / 2) + c0_ / 2 + byte;
      *(Piece*)(a_.code + n_ * a_.code_image_stride + at) =
          ptx::load_shared<Piece>(code_at(pixel, byte));
    }
  }

 private:
  __device__ unsigned char* map_at(int map, int pixel, int channel) const {
    return out_ + map * L::kMapOut + pixel * L::kPitch + channel * 2;
  }
  __device__ unsigned char* code_at(int pixel, int byte) const {
    return out_ + 2 * L::kMapOut + pixel * 32 + byte;
  }
  __device__ int pooled_row(int pixel) const { return row0_ / 2 + pixel / (kHaloWidth / 2); }
  __device__ int pooled_column(int pixel) const { return column0_ / 2 + pixel % (kHaloWidth / 2); }
  __device__ bool live(int pixel) const {
    return pooled_row(pixel) < a_.rows / 2 && pooled_column(pixel) < a_.W / 2;
  }
  __device__ int64_t pixel_at(int pixel) const {
    return pooled_row(pixel) * (a_.W / 2) + pooled_column(pixel);
  }

  const ConvBlockFwd& a_;
  int64_t n_;
  int thread_;
  unsigned char* out_;
  int row0_, column0_, c0_;
  bool from_target_;
};

template <class T, int kChannels>
__global__ void __launch_bounds__(kHaloThreads, 1)
    conv_block_fwd_sm90_kernel(const HaloArgs a, GRID_CONSTANT TensorMap map,
                               GRID_CONSTANT TensorMap delta, GRID_CONSTANT TensorMap weights) {
#if defined(CUDA_ON_CPU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = HaloLayout<kChannels>;
  DYN_SMEM(smem);
  __shared__ HaloBarriers bars;
  __shared__ float squares[kHaloConsumers / 32];
  const HaloTile t = HaloTile::of_block<kChannels>(a);
  if (threadIdx.x == 0) {
    for (int s = 0; s < L::kStages; ++s) {
      ptx::mbarrier_init(bars.full + s, 1);
      ptx::mbarrier_init(bars.empty + s, kHaloConsumers / 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::registers_give<40>();
    if (threadIdx.x == 0) bring_halo<kChannels>(a, t, &map, &delta, &weights, smem, bars);
    return;
  }
  ptx::registers_take<232>();
  const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 - 4;
  float z[64], dz[64];
  multiply_halo<T, kChannels>((int)a.conv.C_in, group, smem, bars, z, dz);
  const HaloOutput<T, kChannels> out(a, t, group, smem + L::kStages * L::kStage);
  float sum = out.pool(z, dz);
#pragma unroll
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  if (threadIdx.x % 32 == 0) squares[warp] = sum;
  ptx::barrier_sync(1, kHaloConsumers);
  out.store();
  if (threadIdx.x != 128 || !a.conv.partial) return;
  sum = 0.0f;
  for (int i = 0; i < kHaloConsumers / 32; ++i) sum += squares[i];
  a.conv.partial[t.n * a.tiles * a.channel_tiles + t.program] = sum;
#endif
}

}  // namespace gpl_fast::cuda
