// ReLU and 2x2 pooling of a branch and of the difference, with the prediction's winners packed to
// 4 bits (max) or its signs to 1 bit (average); and the way back, row by row of the full
// resolution.
#include "branches.h"
#include "packed.h"
#include "tile.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {
namespace {

constexpr int kNoWinner = 4;

// Up to 16 channels of one window: at[i] = the offset of position i, row-major.
template <class Z, class T, Carried kCarried>
GPL_INLINE void max_window(const Z* z, const Z* dz, const int64_t* at, int64_t n, T* y, T* delta,
                           uint8_t* code) {
  constexpr bool kDiff = kCarried != Carried::kAlone, kTarget = kCarried == Carried::kTarget;
  Vf best, target, z_other, dz_other;  // the largest of each branch; z and dz at the other one's
  Vi winner = fill_i(0);
  GPL_UNROLL for (int i = 0; i < 4; ++i) {
    const Vf zi = load_upto(z + at[i], n), dzi = kDiff ? load_upto(dz + at[i], n) : zi;
    const Branches<kCarried> b(zi, dzi);
    if (i == 0) {
      best = b.prediction, target = b.target, z_other = zi, dz_other = dzi;
      continue;
    }
    // the first winner, as PyTorch; NaN wins
    const Vi wins = (b.prediction > best) | (b.prediction != b.prediction);
    best = select(wins, b.prediction, best);
    winner = select(wins, fill_i(i), winner);
    if (kDiff) {
      const Vi target_wins = (b.target > target) | (b.target != b.target);
      target = select(target_wins, b.target, target);
      z_other = select(kTarget ? wins : target_wins, zi, z_other);
      dz_other = select(kTarget ? wins : target_wins, dzi, dz_other);
    }
  }
  const Vf r = relu(kTarget ? target : best);
  if (kDiff) {
    const Vf d = relu_difference<kCarried>(r, z_other, dz_other, kTarget ? best : target);
    store_upto(delta, d, n);
  }
  if (y) store_upto(y, r, n);
  if (code) {
    store_nibbles_upto(code, select(best <= fill(0.0f), fill_i(kNoWinner), winner), n);
  }
}

template <class Z, class T, Carried kCarried>
void max_row(const ReluPoolFwd& a, int64_t n, int64_t i) {
  const int64_t w = a.W / 2, code_bytes = ceil_div(a.C, 2);
  const Z* z = (const Z*)a.z + n * a.z_image_stride + 2 * i * a.W * a.C;
  const Z* dz = a.dz ? (const Z*)a.dz + n * a.dz_image_stride + 2 * i * a.W * a.C : nullptr;
  T* y = a.y ? (T*)a.y + n * a.y_image_stride + i * w * a.C : nullptr;
  T* delta = a.dz ? (T*)a.delta + n * a.delta_image_stride + i * w * a.C : nullptr;
  uint8_t* code = a.code ? a.code + n * a.code_image_stride + i * w * code_bytes : nullptr;
  for (int64_t j = 0; j < w; ++j) {
    for (int64_t c = 0; c < a.C; c += 16) {
      const int64_t first = 2 * j * a.C + c, row = a.W * a.C;
      const int64_t at[4] = {first, first + a.C, first + row, first + row + a.C};
      const int64_t out = j * a.C + c;
      max_window<Z, T, kCarried>(z, dz, at, a.C - c, y ? y + out : nullptr,
                                 delta ? delta + out : nullptr,
                                 code ? code + j * code_bytes + c / 2 : nullptr);
    }
  }
}

// One full-resolution row: its masks, and its half of the windows into sums ([w, C] float, or
// null).
template <class Z, Carried kCarried>
void avg_row(const ReluPoolFwd& a, int64_t n, int64_t h, bool add, float* y_sum, float* delta_sum) {
  constexpr bool kDiff = kCarried != Carried::kAlone;
  const int64_t mask_bytes = ceil_div(a.C, 8);
  const Z* z = (const Z*)a.z + n * a.z_image_stride + h * a.W * a.C;
  const Z* dz = kDiff ? (const Z*)a.dz + n * a.dz_image_stride + h * a.W * a.C : nullptr;
  uint8_t* mask = a.code ? a.code + n * a.code_image_stride + h * a.W * mask_bytes : nullptr;
  for (int64_t x = 0; x < a.W; ++x) {
    for (int64_t c = 0; c < a.C; c += 16) {
      const int64_t channels = a.C - c, at = x * a.C + c, out = x / 2 * a.C + c;
      const Vf zi = load_upto(z + at, channels), dzi = kDiff ? load_upto(dz + at, channels) : zi;
      Vf y, d;
      const Vf p = relu_branches<kCarried>(zi, dzi, y, d);
      if (mask) store_mask_upto(mask + x * mask_bytes + c / 8, ~(p <= fill(0.0f)), channels);
      if (!y_sum || x >= a.W / 2 * 2) continue;
      if (add || x % 2) {
        y = load_upto(y_sum + out, channels) + y;
        if (kDiff) d = load_upto(delta_sum + out, channels) + d;
      }
      store_upto(y_sum + out, y, channels);
      if (kDiff) store_upto(delta_sum + out, d, channels);
    }
  }
}

template <class T>
void store_quarter(T* dst, const float* sum, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    store_upto(dst + i, load_upto(sum + i, n - i) * fill(0.25f), n - i);
  }
}

template <class Z, class T, Carried kCarried>
void avg_rows(const ReluPoolFwd& a, int64_t n, int64_t i, float* y_sum, float* delta_sum) {
  const int64_t row = a.W / 2 * a.C;
  if (i == a.H / 2) return avg_row<Z, kCarried>(a, n, 2 * i, false, nullptr, nullptr);
  avg_row<Z, kCarried>(a, n, 2 * i, false, y_sum, delta_sum);
  avg_row<Z, kCarried>(a, n, 2 * i + 1, true, y_sum, delta_sum);
  if (a.y) store_quarter((T*)a.y + n * a.y_image_stride + i * row, y_sum, row);
  if (a.dz) store_quarter((T*)a.delta + n * a.delta_image_stride + i * row, delta_sum, row);
}

template <class Z, class T>
void fwd(const ReluPoolFwd& a, int64_t rows, int64_t begin, int64_t end) {
  const int64_t sums = a.pool == Pool::kAvg ? a.W / 2 * a.C : 0;
  Scratch y_sum(sums), delta_sum(a.dz ? sums : 0);
  for (int64_t k = begin; k < end; ++k) {
    with_carried(a.dz, a.from_target, k / rows, [&](auto tag) {
      constexpr Carried kCarried = decltype(tag)::value;
      if (a.pool == Pool::kMax) {
        max_row<Z, T, kCarried>(a, k / rows, k % rows);
      } else {
        avg_rows<Z, T, kCarried>(a, k / rows, k % rows, y_sum.get(), delta_sum.get());
      }
    });
  }
}

// dz[2i+p, 2j+q] = dy[i, j] where (p, q) won, a quarter of it where it was positive (avg)    (3)
template <class T>
void bwd_row(const ReluPoolBwd& a, int64_t n, int64_t r) {
  const int64_t h = a.strip.row0 + r, w = a.W / 2, row = a.W * a.C;
  T* dz = (T*)a.dz + n * a.dz_image_stride + r * row;
  if (h < 0 || h >= a.H / 2 * 2) {
    std::memset(dz, 0, (size_t)row * sizeof(T));
    return;
  }
  const bool max = a.pool == Pool::kMax;
  const int64_t pixel_bytes = ceil_div(a.C, max ? 2 : 8);
  const T* dy = (const T*)a.dy + n * a.dy_image_stride + h / 2 * w * a.C;
  const uint8_t* code =
      a.code + n * a.code_image_stride + (max ? h / 2 * w : h * a.W) * pixel_bytes;
  for (int64_t j = 0; j < w; ++j) {
    T* out = dz + 2 * j * a.C;
    for (int64_t c = 0; c < a.C; c += 16) {
      const int64_t m = a.C - c;
      Vf g = load_upto(dy + j * a.C + c, m);
      Vi left, right;
      if (max) {
        Vi winner = load_nibbles_upto(code + j * pixel_bytes + c / 2, m);
        left = winner == fill_i(h % 2 * 2);
        right = winner == fill_i(h % 2 * 2 + 1);
      } else {
        g = g * fill(0.25f);
        left = load_mask_upto(code + 2 * j * pixel_bytes + c / 8, m);
        right = load_mask_upto(code + (2 * j + 1) * pixel_bytes + c / 8, m);
      }
      store_upto(out + c, select(left, g, fill(0.0f)), m);
      store_upto(out + a.C + c, select(right, g, fill(0.0f)), m);
    }
  }
  if (a.W % 2) std::memset(dz + (row - a.C), 0, (size_t)a.C * sizeof(T));
}

}  // namespace

void relu_pool_fwd(const ReluPoolFwd& a) {
  // With masks an odd last row counts as a row of windows without output.
  const int64_t rows = a.pool == Pool::kMax ? a.H / 2 : (a.H + 1) / 2;
  parallel(a.N * rows, 2 * a.W * a.C, [&](int64_t begin, int64_t end) {
    with_dtypes(a.z_dtype, a.dtype,
                [&](auto z, auto y) { fwd<decltype(z), decltype(y)>(a, rows, begin, end); });
  });
}

void relu_pool_bwd(const ReluPoolBwd& a) {
  parallel(a.N * a.strip.rows, a.W * a.C, [&](int64_t begin, int64_t end) {
    with_dtype(a.dtype, [&](auto tag) {
      for (int64_t i = begin; i < end; ++i) {
        bwd_row<decltype(tag)>(a, i / a.strip.rows, i % a.strip.rows);
      }
    });
  });
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
