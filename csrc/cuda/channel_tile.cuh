// Shared memory for maps whose channels lie side by side, where a lane has a pixel of its own.
#pragma once

#include "conv_block/ptx.cuh"
#include "element.cuh"

namespace gpl_fast::cuda {

constexpr int kLanes = 32, kUnit = 8;  // pixels, and channels of each, that a warp takes at a time

// The channels of 32 pixels, in units. A pixel begins 16 bytes later after every whole 128 bytes:
// neither 16 bytes each of eight pixels nor neighbours within a pixel meet in a bank.
template <class T>
class ChannelTile {
 public:
  static constexpr int kPiece = 16 / sizeof(T), kPieces = kUnit / kPiece;

  __device__ ChannelTile(unsigned char* at, int channels)
      : at_(at),
        pitch_((channels + kUnit - 1) / kUnit * kPieces),
        shift_(pitch_ % 8 == 0   ? 0
               : pitch_ % 4 == 0 ? 1
               : pitch_ % 2 == 0 ? 2
                                 : 3) {}

  static int64_t bytes(int64_t channels) {
    return kLanes * (ceil_div(channels, kUnit) * kPieces + 1) * 16;
  }

  __device__ unsigned char* at(int pixel, int c) const {
    return at_ + (pixel * pitch_ + (pixel >> shift_)) * 16 + c * (int)sizeof(T);
  }

  // Channels [c, c + 8) of a pixel.
  __device__ __forceinline__ void read(int pixel, int c, float (&v)[kUnit]) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const auto words = ptx::load_shared<Vec<uint32_t, 4>>(at(pixel, c));
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        v[q * 2] = __uint_as_float(words.v[q] << 16);
        v[q * 2 + 1] = __uint_as_float(words.v[q] & 0xffff0000u);
      }
    } else {
#pragma unroll
      for (int q = 0; q < kPieces; ++q) {
        const auto piece = ptx::load_shared<Vec<T, kPiece>>(at(pixel, c) + q * 16);
#pragma unroll
        for (int e = 0; e < kPiece; ++e) v[q * kPiece + e] = widen(piece.v[e]);
      }
    }
  }
  __device__ __forceinline__ void write(int pixel, int c, const float (&v)[kUnit]) const {
#pragma unroll
    for (int q = 0; q < kPieces; ++q) {
      Vec<T, kPiece> piece;
#pragma unroll
      for (int e = 0; e < kPiece; ++e) piece.v[e] = narrow<T>(v[q * kPiece + e]);
      ptx::store_shared(at(pixel, c) + q * 16, piece);
    }
  }

 private:
  unsigned char* at_;
  int pitch_, shift_;
};

// The warps that have the same 32 pixels.
struct Team {
  int warp, log2_warps, lane;

  // f(place, pixel, i) for the items i of every pixel, place = of(pixel), null for none. Lanes lie
  // along the items, of as many pixels as there is room for.
  template <int kAtOnce, class Of, class F>
  __device__ __forceinline__ void each(int items, const Of& of, const F& f) const {
    const int shift = 32 - __clz(min(items, kLanes) - 1), across = 1 << shift;
    const int first = (warp << (5 - shift)) + (lane >> shift);
#pragma unroll 1
    for (int pixel = first; pixel < kLanes; pixel += 1 << (log2_warps + 5 - shift)) {
      auto* place = of(pixel);
      if (!place) continue;
#pragma unroll kAtOnce
      for (int i = lane & (across - 1); i < items; i += across) f(place, pixel, i);
    }
  }

  // 16 bytes at a time, of `pixels` that lie `pitch` channels apart; wait for them with
  // cp_async_wait and the block.
  template <class T>
  __device__ __forceinline__ void copy_pieces(const ChannelTile<T>& tile, int channels,
                                              const T* from, int64_t pitch, int pixels) const {
    constexpr int kPiece = ChannelTile<T>::kPiece;
    const unsigned pieces = (channels + kPiece - 1) / kPiece, lanes = kLanes << log2_warps;
    const int step_pixels = lanes / pieces, step_pieces = lanes - step_pixels * pieces;
    const unsigned thread = warp * kLanes + lane;
    int pixel = thread / pieces, piece = thread - pixel * pieces;
    const int64_t step = step_pixels * pitch + step_pieces * kPiece;
    const int64_t carry = pitch - (int)pieces * kPiece;
    from += pixel * pitch + piece * kPiece;
#pragma unroll 1
    while (pixel < pixels) {
      ptx::cp_async16(tile.at(pixel, piece * kPiece), from, true);
      pixel += step_pixels, piece += step_pieces, from += step;
      if (piece >= (int)pieces) piece -= pieces, from += carry, ++pixel;
    }
  }
  template <class T, class Of>
  __device__ __forceinline__ void copy_in(const ChannelTile<T>& tile, int channels,
                                          const Of& of) const {
    each<4>(channels, of, [&](const T* from, int pixel, int i) {
      ptx::store_shared(tile.at(pixel, i), from[i]);
    });
  }
  template <class T, class Of>
  __device__ __forceinline__ void copy_out(const ChannelTile<T>& tile, int channels,
                                           const Of& of) const {
    each<4>(channels, of,
            [&](T* to, int pixel, int i) { to[i] = ptx::load_shared<T>(tile.at(pixel, i)); });
  }
};

}  // namespace gpl_fast::cuda
