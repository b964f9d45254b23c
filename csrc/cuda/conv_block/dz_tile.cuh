// dZ of eq. (3), a tile of pixels and a chunk of channels in shared memory, expanded from dy and
// the code or mask while it is loaded. dZ itself is never in memory.
//
// Opt-in: runs in every kernel of conv_block_bwd; conv_block_bwd.cu says when that is.
#pragma once

#include "../element.cuh"
#include "ptx.cuh"

namespace gpl_fast::cuda {

constexpr int kTileH = 8, kTileW = 16;  // pixels of dx that a block makes
constexpr int kPixelBytes = 128;        // of a pixel's chunk of channels in shared memory
constexpr int kUnits = kPixelBytes / 16;

__host__ __device__ inline int dz_bytes(int K) {
  return (kTileH + K - 1) * (kTileW + K - 1) * kPixelBytes;
}

// The taps of one axis that meet the rows of dx with h % stride == phase, by flipped index: first,
// first + stride, ... Tap i of them reads row h / stride + offset + i of dZ.
struct Taps {
  int first, count, offset;
};

__host__ __device__ inline Taps taps_of(int K, int stride, int phase) {
  const int reach = K / 2, first = stride == 1 ? 0 : (reach + phase) % 2;
  return {first, (K - first + stride - 1) / stride, (phase - reach + first) / stride};
}

// Where a block works: rows stride (i0 + i) + phase_h of image n, i < kTileH, columns likewise.
struct Tile {
  int n, i0, j0, phase_h, phase_w;
  Taps rows, columns;
};

// One unit (16 bytes of channels) of dy and where it goes: bit e of byte q = element e belongs to
// position q of its window.
template <class Bits>
struct DzItem {
  Vec<Bits, 16 / sizeof(Bits)> v;
  uint32_t keep;
};

template <class T>
class DzTile {
 public:
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
  using Item = DzItem<Bits>;
  static constexpr int kUnit = 16 / sizeof(T), kChunk = kUnit * kUnits;

  __device__ DzTile(const ConvBlockBwd& a, const Tile& t, bool aligned, bool tf32)
      : a_(a), n_(t.n), aligned_(aligned), tf32_(tf32), shift_(a.pool == Pool::kNone ? 0 : 1) {
    row0_ = t.i0 + t.rows.offset, column0_ = t.j0 + t.columns.offset;
    rows_ = kTileH + t.rows.count - 1, columns_ = kTileW + t.columns.count - 1;
    cell_row0_ = row0_ >> shift_, cell_column0_ = column0_ >> shift_;
    cell_columns_ = ((column0_ + columns_ - 1) >> shift_) - cell_column0_ + 1;
    const int cell_rows = ((row0_ + rows_ - 1) >> shift_) - cell_row0_ + 1;
    items_ = cell_rows * cell_columns_ * kUnits;
    conv_w_ = (int)((a.W + a.stride - 1) / a.stride);
    grid_w_ = conv_w_ >> shift_;
    const int conv_h = (int)((a.H + a.stride - 1) / a.stride), grid_h = conv_h >> shift_;
    first_row_ = max((int)a.dy_strip.row0, 0);
    last_row_ = min((int)(a.dy_strip.row0 + a.dy_strip.rows), grid_h);
  }

  __device__ int items() const { return items_; }
  __device__ int columns() const { return columns_; }

  __device__ Item load(int item, int chunk) const {
    const int cell = item / kUnits, at = cell / cell_columns_;
    const int i = cell_row0_ + at, j = cell_column0_ + cell - at * cell_columns_;
    const int c = chunk * kChunk + item % kUnits * kUnit;
    Item r = {};
    if (i < first_row_ || i >= last_row_ || j < 0 || j >= grid_w_ || c >= a_.C_out) return r;
    const int64_t cell_at = (int64_t)(i - a_.dy_strip.row0) * grid_w_ + j;
    const T* dy = (const T*)a_.dy + n_ * a_.dy_image_stride + cell_at * a_.C_out + c;
    if (aligned_) {
      r.v = *(const Vec<Bits, kUnit>*)dy;
    } else {
#pragma unroll
      for (int e = 0; e < kUnit; ++e) r.v.v[e] = c + e < a_.C_out ? ((const Bits*)dy)[e] : Bits(0);
    }
    if (a_.pool == Pool::kMax) {
      r.keep = windows_won(i, j, c);
    } else if (a_.pool == Pool::kAvg) {
      scale(r, 0.25f);
#pragma unroll
      for (int q = 0; q < 4; ++q) r.keep |= mask(2 * i + q / 2, 2 * j + q % 2, c) << (8 * q);
    } else {
      r.keep = a_.code ? mask(i, j, c) : 0xffu;
    }
    if constexpr (sizeof(T) == 4) {
      if (tf32_) {
#pragma unroll
        for (int e = 0; e < kUnit; ++e) r.v.v[e] = ptx::to_tf32(__uint_as_float(r.v.v[e]));
      }
    }
    return r;
  }

  // dz[2i+p, 2j+q] = dy[i, j] where (p, q) won, a quarter of it where it was positive (avg)    (3)
  __device__ void store(const Item& r, int item, unsigned char* tile) const {
    const int cell = item / kUnits, unit = item % kUnits, at = cell / cell_columns_;
    const int i = ((cell_row0_ + at) << shift_) - row0_;
    const int j = ((cell_column0_ + cell - at * cell_columns_) << shift_) - column0_;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int row = i + q / 2, column = j + q % 2;
      if (q > 0 && shift_ == 0) return;
      if (row < 0 || row >= rows_ || column < 0 || column >= columns_) continue;
      Vec<Bits, kUnit> out;
#pragma unroll
      for (int e = 0; e < kUnit; ++e) out.v[e] = r.keep >> (8 * q + e) & 1 ? r.v.v[e] : Bits(0);
      ptx::store_shared(unit_at(tile, row * columns_ + column, unit), out);
    }
  }

  // Swizzled: a unit of eight neighbouring pixels touches all banks.
  static __device__ unsigned char* unit_at(unsigned char* tile, int pixel, int unit) {
    return tile + pixel * kPixelBytes + ((unit ^ (pixel & 7)) << 4);
  }

 private:
  __device__ uint32_t windows_won(int i, int j, int c) const {
    const int64_t bytes = (a_.C_out + 1) / 2;
    const uint8_t* code =
        a_.code + n_ * a_.code_image_stride + ((int64_t)i * grid_w_ + j) * bytes + c / 2;
    uint32_t winners = 0, keep = 0;
    if (aligned_) {
      winners = kUnit == 8 ? *(const uint32_t*)code : *(const uint16_t*)code;
    } else {
#pragma unroll
      for (int b = 0; b < kUnit / 2; ++b) {
        if (c / 2 + b < bytes) winners |= (uint32_t)code[b] << (8 * b);
      }
    }
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      const uint32_t winner = winners >> (4 * e) & 15;
      if (winner < 4) keep |= 1u << (8 * winner + e);
    }
    return keep;
  }

  __device__ uint32_t mask(int h, int w, int c) const {
    const uint8_t* byte = a_.code + n_ * a_.code_image_stride +
                          ((int64_t)h * conv_w_ + w) * ((a_.C_out + 7) / 8) + c / 8;
    return (uint32_t)*byte >> (c % 8) & 0xff;
  }

  static __device__ void scale(Item& r, float factor) {
#pragma unroll
    for (int e = 0; e < kUnit; ++e) {
      T x;
      memcpy((void*)&x, &r.v.v[e], sizeof x);
      x = narrow<T>(widen(x) * factor);
      memcpy(&r.v.v[e], &x, sizeof x);
    }
  }

  const ConvBlockBwd& a_;
  int n_;
  bool aligned_, tf32_;
  int shift_, row0_, column0_, rows_, columns_, cell_row0_, cell_column0_, cell_columns_, items_;
  int conv_w_, grid_w_, first_row_, last_row_;
};

}  // namespace gpl_fast::cuda
