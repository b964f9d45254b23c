// A tile of pixels with all their channels, float32, lanes = pixels: [groups][channels][16].
// Loading and storing hide the caller's layout: a sum over channels is always the same sequence of
// additions, so strides, strips and threads do not change a bit of the result.
#pragma once

#include <cstdlib>

#include "vec.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {

class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    size_t bytes = (size_t)ceil_div(max_of(floats, 1) * 4, 64) * 64;
    data_ = (float*)std::aligned_alloc(64, bytes);
    if (!data_) cpu::out_of_memory((int64_t)bytes);
    std::memset(data_, 0, bytes);
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};

// Whether the pixel at a place of [N, H, W] does.
inline bool counts(const Valid& valid, int64_t at) {
  return valid.weights ? valid.weights[at] > 0.0f : !valid.flags || valid.flags[at];
}

// How a row of W pixels is cut: a tile with all its channels should stay in the L2 cache.
struct Tiling {
  int64_t channels;  // allocated in a group, of which those beyond the image's stay zero
  int64_t pixels;    // in a tile, a multiple of 16
  int64_t group;     // floats in a group
  Tiling(int64_t W, int64_t c) {
    channels = ceil_div(c, 32) * 32;
    group = channels * 16;
    // Long runs of each channel's row let the hardware fetch ahead.
    int64_t most = channels > 512 ? 128 : 256;
    int64_t tiles = max_of(ceil_div(W, most), 1);
    pixels = max_of(ceil_div(ceil_div(W, tiles), 16) * 16, 16);
  }
  int64_t floats() const { return pixels / 16 * group; }
};

// Transposes kLanes rows of a register each.
GPL_INLINE void transpose_block(NativeI* r) {
#if defined(GPL_AVX512)
  __m512i* a = (__m512i*)r;
  __m512i t[16];
  GPL_UNROLL for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  GPL_UNROLL for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  GPL_UNROLL for (int i = 0; i < 4; ++i) {
    __m512i p = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    __m512i q = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    __m512i s = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    __m512i u = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    a[i] = _mm512_shuffle_i32x4(p, s, 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(q, u, 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(p, s, 0xdd);
    a[i + 12] = _mm512_shuffle_i32x4(q, u, 0xdd);
  }
#elif defined(GPL_AVX2)
  __m256i* a = (__m256i*)r;
  __m256i t[8];
  GPL_UNROLL for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  GPL_UNROLL for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  GPL_UNROLL for (int i = 0; i < 4; ++i) {
    __m256i p = a[i];
    a[i] = _mm256_permute2x128_si256(p, a[i + 4], 0x20);
    a[i + 4] = _mm256_permute2x128_si256(p, a[i + 4], 0x31);
  }
#elif defined(__clang__)
  NativeI p = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
  NativeI q = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
  NativeI s = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
  NativeI u = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  r[0] = __builtin_shufflevector(p, s, 0, 1, 4, 5);
  r[1] = __builtin_shufflevector(p, s, 2, 3, 6, 7);
  r[2] = __builtin_shufflevector(q, u, 0, 1, 4, 5);
  r[3] = __builtin_shufflevector(q, u, 2, 3, 6, 7);
#else
  const NativeI low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, even = {0, 1, 4, 5}, odd = {2, 3, 6, 7};
  NativeI p = __builtin_shuffle(r[0], r[1], low), q = __builtin_shuffle(r[0], r[1], high);
  NativeI s = __builtin_shuffle(r[2], r[3], low), u = __builtin_shuffle(r[2], r[3], high);
  r[0] = __builtin_shuffle(p, s, even);
  r[1] = __builtin_shuffle(p, s, odd);
  r[2] = __builtin_shuffle(q, u, even);
  r[3] = __builtin_shuffle(q, u, odd);
#endif
}

GPL_INLINE void transpose(Vi* r) {
  Vi out[16];
  GPL_UNROLL for (int row = 0; row < kParts; ++row) {
    GPL_UNROLL for (int col = 0; col < kParts; ++col) {
      NativeI block[kLanes];
      GPL_UNROLL for (int i = 0; i < kLanes; ++i) block[i] = r[row * kLanes + i].v[col];
      transpose_block(block);
      GPL_UNROLL for (int i = 0; i < kLanes; ++i) out[col * kLanes + i].v[row] = block[i];
    }
  }
  GPL_UNROLL for (int i = 0; i < 16; ++i) r[i] = out[i];
}

// The first `bytes` (at most 64) of sixteen 32-bit lanes; the others load as zero.
GPL_INLINE Vi load_bytes(const void* p, int64_t bytes) {
  Vi r;
#if defined(GPL_AVX512)
  __mmask64 m = bytes >= 64 ? ~(__mmask64)0 : (((__mmask64)1 << bytes) - 1);
  r.v[0] = (NativeI)_mm512_maskz_loadu_epi8(m, p);
#else
  if (bytes >= 64) return load_i((const int32_t*)p);
  r = fill_i(0);
  std::memcpy(&r, p, (size_t)bytes);
#endif
  return r;
}
GPL_INLINE void store_bytes(void* p, Vi a, int64_t bytes) {
#if defined(GPL_AVX512)
  __mmask64 m = bytes >= 64 ? ~(__mmask64)0 : (((__mmask64)1 << bytes) - 1);
  _mm512_mask_storeu_epi8(p, m, (__m512i)a.v[0]);
#else
  if (bytes >= 64) {
    store_i((int32_t*)p, a);
  } else {
    std::memcpy(p, &a, (size_t)bytes);
  }
#endif
}

// A 32-bit lane holds one float, or two neighbouring channels of a 16-bit type.
template <class T>
constexpr int kChannelsPerLane = (int)(4 / sizeof(T));

GPL_INLINE Vi pack(float, const float* rows) { return bits(load(rows)); }
template <class T>
GPL_INLINE Vi pack(T, const float* rows) {
  return narrow(T{}, load(rows)) | shift_left(narrow(T{}, load(rows + 16)), 16);
}
GPL_INLINE Vi pack(BFloat16, const float* rows) {
  Vf lo = load(rows), hi = load(rows + 16);
  Vi u = bits(hi);
  Vi odd = shift_right(u, 16) & fill_i(1);
  u = select(hi != hi, fill_i(0x7fc00000), u + fill_i(0x7fff) + odd);
  return narrow(BFloat16{}, lo) | (u & fill_i((int32_t)0xffff0000));
}
GPL_INLINE void unpack(float, Vi a, float* rows) { store(rows, from_bits(a)); }
template <class T>
GPL_INLINE void unpack(T, Vi a, float* rows) {
  store(rows, widen(T{}, a & fill_i(0xffff)));
  store(rows + 16, widen(T{}, shift_right(a, 16)));
}

// dst[p * pixel_stride + c] = group[c][p] for p < n, c < C, rounded to T.
template <class T>
GPL_INLINE void store_channels(T* dst, int64_t pixel_stride, int64_t C, const float* group,
                               int64_t n) {
  constexpr int kPack = kChannelsPerLane<T>;
  for (int64_t c = 0; c < C; c += 16 * kPack) {
    Vi r[16];
    GPL_UNROLL for (int i = 0; i < 16; ++i) r[i] = pack(T{}, group + (c + i * kPack) * 16);
    transpose(r);
    int64_t bytes = min_of((C - c) * (int64_t)sizeof(T), 64);
    if (n == 16) {
      GPL_UNROLL for (int p = 0; p < 16; ++p) store_bytes(dst + p * pixel_stride + c, r[p], bytes);
    } else {
      for (int64_t p = 0; p < n; ++p) store_bytes(dst + p * pixel_stride + c, r[p], bytes);
    }
  }
}

// The reverse; lanes n..15 become zero.
template <class T>
GPL_INLINE void load_channels(float* group, const T* src, int64_t pixel_stride, int64_t C,
                              int64_t n) {
  constexpr int kPack = kChannelsPerLane<T>;
  for (int64_t c = 0; c < C; c += 16 * kPack) {
    int64_t bytes = min_of((C - c) * (int64_t)sizeof(T), 64);
    Vi r[16];
    if (n == 16) {
      GPL_UNROLL for (int p = 0; p < 16; ++p) r[p] = load_bytes(src + p * pixel_stride + c, bytes);
    } else {
      for (int64_t p = 0; p < 16; ++p) {
        r[p] = p < n ? load_bytes(src + p * pixel_stride + c, bytes) : fill_i(0);
      }
    }
    transpose(r);
    GPL_UNROLL for (int i = 0; i < 16; ++i) unpack(T{}, r[i], group + (c + i * kPack) * 16);
  }
}

// A large image's channels lie on pages of their own, where the hardware's fetching starts anew.
constexpr int64_t kRowsAhead = 8;

// tile[g][c][p] = src[c * sc + (16 g + p) * sw] for 16 g + p < n.
template <class T>
void load_tile(float* tile, const Tiling& t, const T* src, int64_t sc, int64_t sw, int64_t C,
               int64_t n) {
  if (sw == 1) {
    for (int64_t c = 0; c < C; ++c) {
      const T* row = src + c * sc;
      float* out = tile + c * 16;
      int64_t p = 0;
      for (; p + 16 <= n; p += 16, out += t.group) {
        __builtin_prefetch(row + kRowsAhead * sc + p);
        store(out, load(row + p));
      }
      if (p < n) store(out, load_n(row + p, n - p));
    }
  } else if (sc == 1) {
    for (int64_t p = 0; p < n; p += 16) {
      load_channels(tile + p / 16 * t.group, src + p * sw, sw, C, min_of(n - p, 16));
    }
  } else {
    for (int64_t p = 0; p < n; ++p) {
      float* out = tile + p / 16 * t.group + p % 16;
      for (int64_t c = 0; c < C; ++c) {
        T a[16] = {src[c * sc + p * sw]};
        out[c * 16] = load(a).v[0][0];
      }
    }
  }
}

// dst[c * sc + (16 g + p) * sw] = tile[g][c][p] for 16 g + p < n. past_cache: the result is larger
// than what a cache holds, so do not read what is overwritten anyway; needs finish_past_cache().
template <class T>
void store_tile(T* dst, int64_t sc, int64_t sw, const float* tile, const Tiling& t, int64_t C,
                int64_t n, bool past_cache) {
  if (sw == 1) {
    for (int64_t c = 0; c < C; ++c) {
      T* row = dst + c * sc;
      const float* in = tile + c * 16;
      int64_t p = 0;
      if (past_cache && (uintptr_t)row % 64 == 0) {
        for (; p + 16 <= n; p += 16, in += t.group) store_past_cache(row + p, load(in));
      }
      for (; p + 16 <= n; p += 16, in += t.group) store(row + p, load(in));
      if (p < n) store_n(row + p, load(in), n - p);
    }
  } else if (sc == 1) {
    for (int64_t p = 0; p < n; p += 16) {
      store_channels(dst + p * sw, sw, C, tile + p / 16 * t.group, min_of(n - p, 16));
    }
  } else {
    for (int64_t p = 0; p < n; ++p) {
      const float* in = tile + p / 16 * t.group + p % 16;
      for (int64_t c = 0; c < C; ++c) {
        float one[16] = {in[c * 16]};
        store_n(dst + c * sc + p * sw, load(one), 1);
      }
    }
  }
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
