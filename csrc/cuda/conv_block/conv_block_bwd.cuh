// conv_block_bwd for sm_80 and later: cp.async ring for the weights, ldmatrix, mma.sync (or FMA).
//
// Opt-in by a measured row of the layer (conv_block_bwd.cu); on compute capability 9.0 it runs what
// conv_block_bwd_sm90.cu leaves to it. True float32 (FMA) runs only where a caller asks for the
// operator itself.
#pragma once

#include "conv_block.cuh"
#include "conv_tile.cuh"

namespace gpl_fast::cuda {

// Shared memory: dZ tiles | ring of weights, later the tile of dx | sums of the logits' pixels.
template <Math kMath, int BN, bool kLogits>
struct Layout {
  using S = Shape<kMath, BN>;
  using Dx = DxRows<BN, kLogits>;
  static constexpr int kPixels = S::kWarpsM * kTileW;  // of dx in shared memory at a time
  static constexpr int kLanes = S::kThreads / kPixels;
  static constexpr int kRing = S::kStages * S::kStageBytes > Dx::bytes(kPixels)
                                   ? S::kStages * S::kStageBytes
                                   : Dx::bytes(kPixels);
  static constexpr int kSums = kTileH * kTileW * kLanes * (int)sizeof(LogitsSums);

  static int bytes(const ConvBlockBwd& a, int dz_tiles) {
    return dz_tiles * dz_bytes((int)a.K) + kRing + (kLogits ? kSums + 16 : 0);
  }
};

// Counts through the stages of a tile of dx: halves of a chunk, taps, chunks.
struct Cursor {
  int half = 0, column = 0, row = 0, chunk = 0;
  __device__ void advance(const Tile& t) {
    if (++half < 2) return;
    half = 0;
    if (++column < t.columns.count) return;
    column = 0;
    if (++row < t.rows.count) return;
    row = 0, ++chunk;
  }
};

template <Math kMath, int BN>
__device__ void load_stage(const ConvBlockArgs& a, const Tile& t, const Cursor& at, int n0,
                           unsigned char* stage) {
  using S = Shape<kMath, BN>;
  const int stride = (int)a.conv.stride;
  const int tap = (t.rows.first + at.row * stride) * (int)a.conv.K +  //
                  t.columns.first + at.column * stride;
  const int64_t row0 = tap * a.out_pad + (at.chunk * S::kHalves + at.half) * S::kRows;
  const typename S::T* w = (const typename S::T*)a.conv.w + row0 * a.in_pad + n0;
  for (int i = threadIdx.x; i < S::kRows * S::kRowUnits; i += S::kThreads) {
    const int row = i / S::kRowUnits, unit = i % S::kRowUnits, c = unit * S::kUnit;
    const bool inside = n0 + c < a.in_pad;
    const void* src = inside ? (const void*)(w + row * a.in_pad + c) : a.conv.w;
    ptx::cp_async16(stage + weight_unit<S>(row, unit), src, inside);
  }
}

// dx of a tile, in the accumulators.                                                           (4)
template <Math kMath, int BN>
__device__ void multiply_tile(const ConvBlockArgs& a, const Tile& t, int n0, bool have_dz,
                              unsigned char* dz, unsigned char* ring, WarpTile<kMath, BN>& warp) {
  using S = Shape<kMath, BN>;
  using Dz = DzTile<typename S::T>;
  const int tid = threadIdx.x, lane = tid & 31, warp_m = tid / 32 / S::kWarpsN;
  const int warp_n = tid / 32 % S::kWarpsN;
  const int steps = t.rows.count * t.columns.count * S::kHalves;
  const int chunks = (int)((a.conv.C_out + Dz::kChunk - 1) / Dz::kChunk), total = steps * chunks;
  warp.clear();
  if (total == 0) return;
  const Dz tile(a.conv, t, a.aligned, a.tf32);
  const int tile_bytes = dz_bytes((int)a.conv.K);

  // (1) the first chunk of dZ, the first stages of the weights
  Cursor ahead;
#pragma unroll
  for (int s = 0; s < S::kStages - 1; ++s) {
    if (s < total) load_stage<kMath, BN>(a, t, ahead, n0, ring + s * S::kStageBytes);
    ptx::cp_async_commit();
    ahead.advance(t);
  }
  if (!have_dz) {
    for (int i = tid; i < tile.items(); i += S::kThreads) tile.store(tile.load(i, 0), i, dz);
  }

  // (2) the next chunk is expanded in equal parts beside the products of this one, or after them
  // where shared memory holds one tile of dZ only
  const bool two = a.dz_tiles == 2;
  const int share = (tile.items() + S::kThreads * steps - 1) / (S::kThreads * steps);
  Cursor at;
  for (int k = 0, step = 0; k < total; ++k) {
    ptx::cp_async_wait<S::kStages - 2>();
    __syncthreads();
    if (k + S::kStages - 1 < total) {
      const int stage = (k + S::kStages - 1) % S::kStages;
      load_stage<kMath, BN>(a, t, ahead, n0, ring + stage * S::kStageBytes);
      ahead.advance(t);
    }
    ptx::cp_async_commit();

    unsigned char* now = dz + (two ? at.chunk & 1 : 0) * tile_bytes;
    unsigned char* next = dz + (~at.chunk & 1) * tile_bytes;
    int item = step * share * S::kThreads + tid;
    const int end = min(tile.items(), (step + 1) * share * S::kThreads);
    const bool expand = two && at.chunk + 1 < chunks && item < end;
    typename Dz::Item dy;
    if (expand) dy = tile.load(item, at.chunk + 1);
    const int pixel = (warp_m * S::MI + at.row) * tile.columns() + at.column;
    warp.multiply(now, pixel, tile.columns(), at.half, ring + k % S::kStages * S::kStageBytes,
                  warp_n, lane);
    if (expand) {
      tile.store(dy, item, next);
      for (item += S::kThreads; item < end; item += S::kThreads) {
        tile.store(tile.load(item, at.chunk + 1), item, next);
      }
    }
    step = step + 1 == steps ? 0 : step + 1;
    at.advance(t);
    if (step == 0 && !two && at.chunk < chunks) {
      __syncthreads();
      for (int i = tid; i < tile.items(); i += S::kThreads) {
        tile.store(tile.load(i, at.chunk), i, dz);
      }
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// Rows i of all the warps' accumulators -> dx in shared memory.
template <class L, Math kMath, int BN>
__device__ void stage_rows(const WarpTile<kMath, BN>& warp, int i, float* dx) {
  using S = Shape<kMath, BN>;
  const int lane = threadIdx.x & 31, id = threadIdx.x / 32;
  const int row = id / S::kWarpsN * kTileW + lane / 4;
  const int column = id % S::kWarpsN * S::NJ * 8 + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < S::MI; ++m) {
    if (m != i) continue;
#pragma unroll
    for (int j = 0; j < S::NJ; ++j) {
#pragma unroll
      for (int q = 0; q < 4; q += 2) {
        const float (&acc)[4] = warp.acc[m][j];
        L::Dx::put(dx, row + q / 2 * 8, column + j * 8, acc[q], acc[q + 1]);
      }
    }
  }
}

template <class L, Math kMath, int BN>
__device__ void store_tile(const ConvBlockArgs& a, const Tile& t, int n0,
                           const WarpTile<kMath, BN>& warp, float* dx) {
  using S = Shape<kMath, BN>;
#pragma unroll 1
  for (int i = 0; i < S::MI; ++i) {
    stage_rows<L>(warp, i, dx);
    __syncthreads();
    for (int k = threadIdx.x; k < L::kPixels * (BN / 8); k += S::kThreads) {
      const int pixel = k / (BN / 8), c = k % (BN / 8) * 8;
      const Place p = place_of(a, t, pixel / kTileW * S::MI + i, pixel % kTileW);
      float row[8];
      L::Dx::eight(dx, pixel, c, k, row);
      store_dx<typename S::T>(a, t.n, p, n0 + c, row);
    }
    __syncthreads();
  }
}

template <Math kMath, int BN>
__global__ void __launch_bounds__(Shape<kMath, BN>::kThreads, 1)
    conv_block_bwd_kernel(const ConvBlockArgs a) {
  DYN_SMEM(smem);
  int channel_tile;
  const Tile t = tile_of_block(a, channel_tile);
  unsigned char* ring = smem + a.dz_tiles * dz_bytes((int)a.conv.K);
  WarpTile<kMath, BN> warp;
  multiply_tile<kMath, BN>(a, t, channel_tile * BN, false, smem, ring, warp);
  store_tile<Layout<kMath, BN, false>>(a, t, channel_tile * BN, warp, (float*)ring);
}

// The first block. Up to BN classes: dy' stays in registers. More: two passes in place, the first
// over tiles of classes; a pixel's sums take dy' as stored.
template <Math kMath, int BN>
__global__ void __launch_bounds__(Shape<kMath, BN>::kThreads, 1)
    conv_block_logits_bwd_kernel(const ConvBlockArgs a) {
  using S = Shape<kMath, BN>;
  using L = Layout<kMath, BN, true>;
  DYN_SMEM(smem);
  int none;
  const Tile t = tile_of_block(a, none);
  const bool one_chunk = a.conv.C_out <= DzTile<typename S::T>::kChunk;
  unsigned char* ring = smem + a.dz_tiles * dz_bytes((int)a.conv.K);
  float* dx = (float*)ring;
  LogitsSums* sums = (LogitsSums*)(ring + L::kRing);  // [MI][kPixels][kLanes]
  const float weights = class_weights(a.logits, (float*)(ring + L::kRing + L::kSums));
  const Share share = share_of(a.logits, threadIdx.x, S::kThreads, L::kPixels);
  const bool summed = needs_sums(a.logits), in_place = summed && a.class_tiles > 1;
  auto pixel_of = [&](int i) {
    const Place p = place_of(a, t, share.pixel / kTileW * S::MI + i, share.pixel % kTileW);
    return LogitsPixel(a.logits, t.n, p.h, p.w, p.in_image, weights);
  };
  auto slots = [&](int i) { return sums + (i * L::kPixels + share.pixel) * L::kLanes; };

  // (1) each tile of classes
  WarpTile<kMath, BN> warp;
  for (int tile = 0; tile < a.class_tiles; ++tile) {
    const int n0 = tile * BN, columns = min(BN, (int)a.logits.C - n0);
    multiply_tile<kMath, BN>(a, t, n0, tile > 0 && one_chunk, smem, ring, warp);
#pragma unroll 1
    for (int i = 0; i < S::MI; ++i) {
      stage_rows<L>(warp, i, dx);
      const LogitsPixel px = pixel_of(i);
      LogitsSums own = {};
      if (tile > 0 && summed) own = slots(i)[share.lane];
      __syncthreads();
      auto dy = [&](int c) { return L::Dx::at(dx, share.pixel, c); };
      if (summed && px.inside()) {
        for (int c = share.lane; c < columns; c += share.lanes) {
          px.add(own, n0 + c, in_place ? px.put_dy(n0 + c, dy(c)) : dy(c));
        }
      }
      if (summed) slots(i)[share.lane] = own;
      if (!in_place) {
        __syncthreads();
        const LogitsSums total = summed ? total_of(slots(i), L::kLanes) : LogitsSums{};
        for (int c = share.lane; c < columns && px.inside(); c += share.lanes) {
          px.finish(total, n0 + c, dy(c));
        }
      }
      __syncthreads();
    }
  }
  if (!in_place) return;

  // (2) each pixel
#pragma unroll 1
  for (int i = 0; i < S::MI; ++i) {
    const LogitsPixel px = pixel_of(i);
    const LogitsSums total = total_of(slots(i), L::kLanes);
    for (int c = share.lane; c < (int)a.logits.C && px.inside(); c += share.lanes) {
      px.finish(total, c, px.take_dy(c));
    }
  }
}

}  // namespace gpl_fast::cuda
