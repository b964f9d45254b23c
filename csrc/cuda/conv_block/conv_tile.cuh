// A warp's part of dx = dZ w: one stage of the weights' ring times what the taps reach of the dZ
// tile. Accumulators have mma's layout in every kind of arithmetic.
//
// Opt-in: runs in conv_block_bwd's kernels for sm_80 and later (conv_block_bwd.cuh says when).
#pragma once

#include "dz_tile.cuh"
#include "ptx.cuh"

namespace gpl_fast::cuda {

enum class Math { kBFloat16, kFloat16, kTF32, kFloat32 };

template <Math kMath>
using Element = std::conditional_t<kMath == Math::kBFloat16, __nv_bfloat16,
                                   std::conditional_t<kMath == Math::kFloat16, __half, float>>;

template <Math kMath>
constexpr ptx::Operand kOperand = kMath == Math::kBFloat16  ? ptx::Operand::kBFloat16
                                  : kMath == Math::kFloat16 ? ptx::Operand::kFloat16
                                                            : ptx::Operand::kTF32;

// A block's warps lie kWarpsM x kWarpsN over its 128 pixels x BN channels.
template <Math kMath, int BN>
struct Shape {
  using T = Element<kMath>;
  static constexpr int kWarpsM = BN == 32 ? 4 : 2, kWarpsN = BN == 32 ? 1 : BN == 64 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int MI = kTileH / kWarpsM, NJ = BN / kWarpsN / 8;
  static constexpr int kHalves = 2;  // stages for a chunk of channels
  static constexpr int kUnit = 16 / sizeof(T), kRows = kUnit * kUnits / kHalves;
  static constexpr int kRowUnits = BN / kUnit, kPitch = (BN * (int)sizeof(T) + 127) / 128 * 128;
  static constexpr int kStageBytes = kRows * kPitch, kStages = BN > 128 ? 3 : 4;
};

// Swizzled so that the fragments below are read without bank conflicts.
template <class S>
__device__ __forceinline__ int weight_unit(int row, int unit) {
  return row * S::kPitch + ((unit ^ (S::kUnit == 8 ? row & 7 : (row & 3) << 1)) << 4);
}

template <Math kMath, int BN>
struct WarpTile {
  using S = Shape<kMath, BN>;
  using Tile = DzTile<typename S::T>;
  float acc[S::MI][S::NJ][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < S::MI; ++i) {
#pragma unroll
      for (int j = 0; j < S::NJ; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) acc[i][j][k] = 0.0f;
      }
    }
  }

  // pixel: in the dZ tile, of the warp's first pixel at this tap. half: of the chunk.
  __device__ void multiply(unsigned char* dz, int pixel, int columns, int half,
                           const unsigned char* weights, int warp_n, int lane) {
    const int first_column = warp_n * S::NJ * 8;
    if constexpr (kMath == Math::kFloat32) {
      multiply_scalar(dz, pixel, columns, half, weights, first_column, lane);
    } else {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        uint32_t a[S::MI][4], b[S::NJ][2];
#pragma unroll
        for (int i = 0; i < S::MI; ++i) {
          const int row = pixel + i * columns + (lane & 15);
          ptx::ldmatrix_x4(a[i], Tile::unit_at(dz, row, half * 4 + k * 2 + (lane >> 4)));
        }
        if constexpr (kMath == Math::kTF32) {
          load_weights_tf32(b, k, weights, first_column, lane);
        } else {
          load_weights(b, k, weights, first_column / 8, lane);
        }
        ptx::mma_tile<kOperand<kMath>, S::MI, S::NJ>(acc, a, b);
      }
    }
  }

 private:
  __device__ void load_weights(uint32_t (&b)[S::NJ][2], int k, const unsigned char* weights,
                               int first_unit, int lane) {
    const int row = k * 16 + (lane & 15);
#pragma unroll
    for (int j = 0; j + 1 < S::NJ; j += 2) {
      uint32_t q[4];
      ptx::ldmatrix_x4_trans(q, weights + weight_unit<S>(row, first_unit + j + (lane >> 4)));
      b[j][0] = q[0], b[j][1] = q[1], b[j + 1][0] = q[2], b[j + 1][1] = q[3];
    }
    if constexpr (S::NJ % 2 == 1) {
      ptx::ldmatrix_x2_trans(b[S::NJ - 1], weights + weight_unit<S>(row, first_unit + S::NJ - 1));
    }
  }

  __device__ void load_weights_tf32(uint32_t (&b)[S::NJ][2], int k, const unsigned char* weights,
                                    int first_column, int lane) {
#pragma unroll
    for (int j = 0; j < S::NJ; ++j) {
      const int column = first_column + j * 8 + lane / 4;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = k * 8 + h * 4 + lane % 4;
        const unsigned char* unit = weights + weight_unit<S>(row, column / 4);
        b[j][h] = ptx::to_tf32(ptx::load_shared<float>(unit + column % 4 * 4));
      }
    }
  }

  __device__ void multiply_scalar(unsigned char* dz, int pixel, int columns, int half,
                                  const unsigned char* weights, int first_column, int lane) {
    for (int k = 0; k < 4; ++k) {
      Vec<float, 4> a[S::MI][2];
#pragma unroll
      for (int i = 0; i < S::MI; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = pixel + i * columns + lane / 4 + h * 8;
          a[i][h] = *(const Vec<float, 4>*)Tile::unit_at(dz, row, half * 4 + k);
        }
      }
      // Four products are added before they join the sum, whose rounding is then half as large.
#pragma unroll
      for (int j = 0; j < S::NJ; ++j) {
        const int column = first_column + j * 8 + lane % 4 * 2;
        Vec<float, 2> b[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const unsigned char* unit = weights + weight_unit<S>(k * 4 + e, column / 4);
          b[e] = *(const Vec<float, 2>*)(unit + column % 4 * 4);
        }
#pragma unroll
        for (int i = 0; i < S::MI; ++i) {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            float sum = a[i][q / 2].v[0] * b[0].v[q % 2];
#pragma unroll
            for (int e = 1; e < 4; ++e) sum = fmaf(a[i][q / 2].v[e], b[e].v[q % 2], sum);
            acc[i][j][q] += sum;
          }
        }
      }
    }
  }
};

}  // namespace gpl_fast::cuda
