// conv_block_bwd for sm_90a. The first warpgroup produces: its first warp brings the weights by
// TMA, the others expand dZ. The other two consume: half a tile of pixels each, a row of 16 to a
// warp, dZ from registers and the weights from shared memory by wgmma.
//
// Opt-in: runs where conv_block_bwd_sm90.cu says.
#pragma once

#include "conv_block.cuh"
#include "hopper.cuh"

namespace gpl_fast::cuda {

constexpr int kExpanders = 96, kConsumers = 256, kHopperThreads = 128 + kConsumers;
constexpr int kConsumerWarps = kConsumers / 32;
constexpr int kSlabBytes = 64 * kPixelBytes;  // 64 rows of 64 channels of the weights

// Shared memory: ring of weights | two dZ tiles | rows of dx, a warp's each | sums.
template <int BN>
struct HopperRing {
  static constexpr int kSlabs = (BN + 63) / 64, kStageBytes = kSlabs * kSlabBytes;
  static constexpr int kStages = BN == 256 ? 3 : 4, kRing = kStages * kStageBytes;
};
template <int BN, bool kLogits>
struct HopperLayout : HopperRing<BN> {
  static constexpr int kPiece = BN < 64 ? BN : 64, kPieces = (BN + 63) / 64;  // of a row of dx
  using Dx = DxRows<kPiece, kLogits>;
  static constexpr int kDx = Dx::bytes(kTileW), kLanes = 32 / kTileW;
  static constexpr int kSums = kTileW * kLanes * (int)sizeof(LogitsSums);
  static int bytes(int K) {
    return HopperLayout::kRing + 2 * dz_bytes(K) + kConsumerWarps * (kDx + kSums) + 16;
  }
};

// Place and phase in a ring of n.
struct RingPlace {
  int at = 0, phase = 0;
  __device__ void advance(int n) {
    if (++at == n) at = 0, phase ^= 1;
  }
};

template <int kStages>
struct HopperBarriers {
  uint64_t full[kStages], empty[kStages], dz_full[2], dz_empty[2];

  __device__ void init() {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(full + s, 1);
      ptx::mbarrier_init(empty + s, kConsumerWarps);
    }
    for (int s = 0; s < 2; ++s) {
      ptx::mbarrier_init(dz_full + s, kExpanders);
      ptx::mbarrier_init(dz_empty + s, kConsumerWarps);
    }
    ptx::fence_mbarrier_init();
  }
};

// One thread: all stages of all tiles of classes, in order.
template <int BN>
__device__ void bring_weights(const ConvBlockArgs& a, const Tile& t, const TensorMap* weights,
                              int n0, int chunks, unsigned char* ring,
                              HopperBarriers<HopperRing<BN>::kStages>& bars) {
  using L = HopperRing<BN>;
  const int stride = (int)a.conv.stride;
  RingPlace r;
  for (int tile = 0; tile < a.class_tiles; ++tile) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      for (int i = 0; i < t.rows.count; ++i) {
        for (int j = 0; j < t.columns.count; ++j) {
          const int tap = (t.rows.first + i * stride) * (int)a.conv.K +  //
                          t.columns.first + j * stride;
          ptx::mbarrier_wait(bars.empty + r.at, r.phase ^ 1);
          ptx::mbarrier_expect(bars.full + r.at, L::kStageBytes);
          for (int s = 0; s < L::kSlabs; ++s) {
            ptx::tma_load(ring + r.at * L::kStageBytes + s * kSlabBytes, weights, bars.full + r.at,
                          n0 + tile * BN + s * 64, tap * (int)a.out_pad + chunk * 64);
          }
          r.advance(L::kStages);
        }
      }
    }
  }
}

// 96 threads: all chunks of dZ, again for each tile of classes where there are several.
template <int BN, class T>
__device__ void expand_dz(const ConvBlockArgs& a, const Tile& t, int chunks, int thread,
                          unsigned char* dz, HopperBarriers<HopperRing<BN>::kStages>& bars) {
  const DzTile<T> tile(a.conv, t, a.aligned, false);
  const int times = chunks == 1 ? 1 : a.class_tiles;
  RingPlace r;
  for (int k = 0; k < times * chunks; ++k) {
    ptx::mbarrier_wait(bars.dz_empty + r.at, r.phase ^ 1);
    unsigned char* to = dz + r.at * dz_bytes((int)a.conv.K);
    for (int i = thread; i < tile.items(); i += kExpanders) {
      tile.store(tile.load(i, k % chunks), i, to);
    }
    ptx::mbarrier_arrive(bars.dz_full + r.at);
    r.advance(2);
  }
}

// What a consumer warp carries from one tile of classes to the next.
struct ConsumerState {
  RingPlace weights, dz;
};

// One tile of channels of the warp's 16 pixels of dx.                                          (4)
template <int BN, class T>
__device__ void multiply_row(const ConvBlockArgs& a, const Tile& t, int chunks, bool have_dz,
                             bool keep_dz, unsigned char* ring, unsigned char* dz, int warp,
                             HopperBarriers<HopperRing<BN>::kStages>& bars, ConsumerState& state,
                             float (&acc)[BN / 2]) {
  using L = HopperRing<BN>;
  const int lane = threadIdx.x & 31, columns = kTileW + t.columns.count - 1;
  const int taps = t.rows.count * t.columns.count, total = taps * chunks;
#pragma unroll
  for (int i = 0; i < BN / 2; ++i) acc[i] = 0.0f;
  int row = 0, column = 0, tap = 0;
  for (int k = 0; k < total; ++k) {
    if (tap == 0 && !have_dz) ptx::mbarrier_wait(bars.dz_full + state.dz.at, state.dz.phase);
    unsigned char* tile = dz + state.dz.at * dz_bytes((int)a.conv.K);
    const int pixel = (warp + row) * columns + column + (lane & 15);
    uint32_t pixels[4][4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      ptx::ldmatrix_x4(pixels[q], DzTile<T>::unit_at(tile, pixel, q * 2 + (lane >> 4)));
    }
    if (++column == t.columns.count) column = 0, ++row;
    if (++tap == taps) {
      row = tap = 0;
      if (!keep_dz) {
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(bars.dz_empty + state.dz.at);
        state.dz.advance(2);
      }
    }
    ptx::mbarrier_wait(bars.full + state.weights.at, state.weights.phase);
    const uint64_t b = ptx::wgmma_descriptor(ring + state.weights.at * L::kStageBytes, kSlabBytes,
                                             8 * kPixelBytes);
    ptx::keep_in_place(acc);
    ptx::wgmma_fence();
#pragma unroll
    for (int q = 0; q < 4; ++q) {  // 16 rows of 128 bytes a step
      ptx::wgmma<std::is_same_v<T, __nv_bfloat16>, BN>(acc, pixels[q], b + q * 128);
    }
    ptx::wgmma_commit();
    // While this warpgroup waits, the other one's products run.
    ptx::wgmma_wait<0>();
    ptx::keep_in_place(acc);
    if (lane == 0) ptx::mbarrier_arrive(bars.empty + state.weights.at);
    state.weights.advance(L::kStages);
  }
}

// Channels [64 piece, 64 piece + kPiece) of the warp's accumulators -> its rows of dx.
template <int BN, class L>
__device__ void stage_piece(const float (&acc)[BN / 2], int piece, float* dx) {
  const int lane = threadIdx.x & 31, row = lane / 4, column = lane % 4 * 2;
  __syncwarp();
#pragma unroll
  for (int p = 0; p < L::kPieces; ++p) {
    if (p != piece) continue;
#pragma unroll
    for (int j = p * 8; j < BN / 8 && j < p * 8 + 8; ++j) {
#pragma unroll
      for (int q = 0; q < 4; q += 2) {
        L::Dx::put(dx, row + q / 2 * 8, column + (j - p * 8) * 8, acc[j * 4 + q],
                   acc[j * 4 + q + 1]);
      }
    }
  }
  __syncwarp();
}

template <int BN, class T>
__device__ void store_row(const ConvBlockArgs& a, const Tile& t, int n0, int row,
                          const float (&acc)[BN / 2], float* dx) {
  using L = HopperLayout<BN, false>;
  const int lane = threadIdx.x & 31;
#pragma unroll 1
  for (int piece = 0; piece < L::kPieces; ++piece) {
    stage_piece<BN, L>(acc, piece, dx);
    const int groups = min(L::kPiece, BN - piece * 64) / 8;
    for (int k = lane; k < kTileW * groups; k += 32) {
      const int pixel = k / groups, c = k % groups * 8;
      float channels[8];
      L::Dx::eight(dx, pixel, c, k, channels);
      store_dx<T>(a, t.n, place_of(a, t, row, pixel), n0 + piece * 64 + c, channels);
    }
  }
}

// Eq. (5) for the warp's pixels: once for a tile of classes, and at the end where they are several.
template <int BN>
class LogitsRow {
 public:
  using L = HopperLayout<BN, true>;

  __device__ LogitsRow(const ConvBlockArgs& a, const Tile& t, int row, float weights, float* dx,
                       LogitsSums* sums)
      : a_(a),
        share_(share_of(a.logits, threadIdx.x & 31, 32, kTileW)),
        pixel_(pixel_of(a, t, row, share_.pixel, weights)),
        dx_(dx),
        slots_(sums + share_.pixel * L::kLanes),
        summed_(needs_sums(a.logits)),
        in_place_(summed_ && a.class_tiles > 1) {}

  __device__ void tile(int n0, const float (&acc)[BN / 2]) {
    if (summed_) {
      each(n0, acc,
           [&](int c, float dy) { pixel_.add(own_, c, in_place_ ? pixel_.put_dy(c, dy) : dy); });
    }
    if (in_place_) return;
    const LogitsSums sums = total();
    each(n0, acc, [&](int c, float dy) { pixel_.finish(sums, c, dy); });
  }

  __device__ void finish() {
    if (!in_place_) return;
    const LogitsSums sums = total();
    for (int c = share_.lane; c < (int)a_.logits.C && pixel_.inside(); c += share_.lanes) {
      pixel_.finish(sums, c, pixel_.take_dy(c));
    }
  }

 private:
  static __device__ LogitsPixel pixel_of(const ConvBlockArgs& a, const Tile& t, int row, int column,
                                         float weights) {
    const Place p = place_of(a, t, row, column);
    return LogitsPixel(a.logits, t.n, p.h, p.w, p.in_image, weights);
  }

  __device__ LogitsSums total() {
    __syncwarp();
    slots_[share_.lane] = own_;
    __syncwarp();
    return total_of(slots_, L::kLanes);
  }

  template <class F>
  __device__ void each(int n0, const float (&acc)[BN / 2], const F& f) {
#pragma unroll 1
    for (int piece = 0; piece < L::kPieces; ++piece) {
      stage_piece<BN, L>(acc, piece, dx_);
      const int first = n0 + piece * 64, columns = min(L::kPiece, (int)a_.logits.C - first);
      for (int c = share_.lane; c < columns && pixel_.inside(); c += share_.lanes) {
        f(first + c, L::Dx::at(dx_, share_.pixel, c));
      }
    }
  }

  const ConvBlockArgs& a_;
  Share share_;
  LogitsPixel pixel_;
  float* dx_;
  LogitsSums* slots_;
  bool summed_, in_place_;
  LogitsSums own_ = {};
};

template <class T, int BN, bool kLogits>
__global__ void __launch_bounds__(kHopperThreads, 1)
    conv_block_bwd_sm90_kernel(const ConvBlockArgs a, GRID_CONSTANT TensorMap weights) {
#if defined(CUDA_ON_CPU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = HopperLayout<BN, kLogits>;
  DYN_SMEM(smem);
  __shared__ HopperBarriers<L::kStages> bars;
  unsigned char *ring = smem, *dz = ring + L::kRing;
  unsigned char* rows = dz + 2 * dz_bytes((int)a.conv.K);
  int channel_tile;
  const Tile t = tile_of_block(a, channel_tile);
  const int n0 = channel_tile * BN, chunks = (int)(a.conv.C_out + 63) / 64;
  const bool one_chunk = chunks == 1, any = t.rows.count * t.columns.count > 0;
  if (threadIdx.x == 0) bars.init();
  float class_weight_sum = 0.0f;
  if constexpr (kLogits) {
    class_weight_sum =
        class_weights(a.logits, (float*)(rows + kConsumerWarps * (L::kDx + L::kSums)));
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    ptx::registers_give<72>();
    if (threadIdx.x == 0 && any) bring_weights<BN>(a, t, &weights, n0, chunks, ring, bars);
    if (threadIdx.x >= 32 && any) {
      expand_dz<BN, T>(a, t, chunks, threadIdx.x - 32, dz, bars);
    }
    return;
  }
  ptx::registers_take<216>();
  const int warp = threadIdx.x / 32 - 4;
  float* dx = (float*)(rows + warp * (L::kDx + L::kSums));
  ConsumerState state;
  float acc[BN / 2];
  if constexpr (kLogits) {
    LogitsRow<BN> logits(a, t, warp, class_weight_sum, dx, (LogitsSums*)((char*)dx + L::kDx));
    for (int tile = 0; tile < a.class_tiles; ++tile) {
      multiply_row<BN, T>(a, t, chunks, tile > 0 && one_chunk, one_chunk, ring, dz, warp, bars,
                          state, acc);
      logits.tile(tile * BN, acc);
    }
    logits.finish();
  } else {
    multiply_row<BN, T>(a, t, chunks, false, one_chunk, ring, dz, warp, bars, state, acc);
    store_row<BN, T>(a, t, n0, warp, acc, dx);
  }
#endif
}

}  // namespace gpl_fast::cuda
