// ReLU and 2x2 pooling of the target and of the difference, with the prediction's winners packed to
// 4 bits (max) or its signs to 1 bit (average); and the way back, row by row of the full
// resolution.
#include "packed.h"
#include "tile.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {
namespace {

constexpr int kNoWinner = 4;

// Up to 16 channels of one window: at[i] = the offset of position i, row-major.
template <class T, bool kDiff>
GPL_INLINE void max_window(const T* z, const T* dz, const int64_t* at, int64_t n, T* y, T* delta,
                           uint8_t* code) {
  Vf target = load_upto(z + at[0], n);     // max z
  Vf z_win = target, dz_win = fill(0.0f);  // z and dz where the prediction won
  Vf best = target;                        // max z + dz
  Vi winner = fill_i(0);
  if (kDiff) {
    dz_win = load_upto(dz + at[0], n);
    best = z_win + dz_win;
  }
  GPL_UNROLL for (int i = 1; i < 4; ++i) {
    Vf zi = load_upto(z + at[i], n), p = zi, dzi;
    if (kDiff) {
      dzi = load_upto(dz + at[i], n);
      p = zi + dzi;
      target = select((zi > target) | (zi != zi), zi, target);
    }
    // the first winner, as PyTorch; NaN wins
    Vi wins = (p > best) | (p != p);
    best = select(wins, p, best);
    winner = select(wins, fill_i(i), winner);
    if (kDiff) {
      z_win = select(wins, zi, z_win);
      dz_win = select(wins, dzi, dz_win);
    }
  }
  const Vi off = best <= fill(0.0f);
  if (kDiff) {
    // delta+ = relu(max(z + dz)) - relu(max z); dz itself where both have the same winner  (6)
    Vf r = relu(target);
    store_upto(delta, select(off, fill(0.0f) - r, (z_win - r) + dz_win), n);
    if (y) store_upto(y, r, n);
  } else if (y) {
    store_upto(y, relu(best), n);
  }
  if (code) store_nibbles_upto(code, select(off, fill_i(kNoWinner), winner), n);
}

template <class T, bool kDiff>
void max_row(const ReluPoolFwd& a, int64_t n, int64_t i) {
  const int64_t w = a.W / 2, code_bytes = ceil_div(a.C, 2);
  const T* z = (const T*)a.z + n * a.z_image_stride + 2 * i * a.W * a.C;
  const T* dz = kDiff ? (const T*)a.dz + n * a.dz_image_stride + 2 * i * a.W * a.C : nullptr;
  T* y = a.y ? (T*)a.y + n * a.y_image_stride + i * w * a.C : nullptr;
  T* delta = kDiff ? (T*)a.delta + n * a.delta_image_stride + i * w * a.C : nullptr;
  uint8_t* code = a.code ? a.code + n * a.code_image_stride + i * w * code_bytes : nullptr;
  for (int64_t j = 0; j < w; ++j) {
    for (int64_t c = 0; c < a.C; c += 16) {
      const int64_t first = 2 * j * a.C + c, row = a.W * a.C;
      const int64_t at[4] = {first, first + a.C, first + row, first + row + a.C};
      const int64_t out = j * a.C + c;
      max_window<T, kDiff>(z, dz, at, a.C - c, y ? y + out : nullptr, kDiff ? delta + out : nullptr,
                           code ? code + j * code_bytes + c / 2 : nullptr);
    }
  }
}

// One full-resolution row: its masks, and its half of the windows into sums ([w, C] float, or
// null).
template <class T, bool kDiff>
void avg_row(const ReluPoolFwd& a, int64_t n, int64_t h, bool add, float* y_sum, float* delta_sum) {
  const int64_t mask_bytes = ceil_div(a.C, 8);
  const T* z = (const T*)a.z + n * a.z_image_stride + h * a.W * a.C;
  const T* dz = kDiff ? (const T*)a.dz + n * a.dz_image_stride + h * a.W * a.C : nullptr;
  uint8_t* mask = a.code ? a.code + n * a.code_image_stride + h * a.W * mask_bytes : nullptr;
  for (int64_t x = 0; x < a.W; ++x) {
    for (int64_t c = 0; c < a.C; c += 16) {
      const int64_t channels = a.C - c, at = x * a.C + c, out = x / 2 * a.C + c;
      Vf zi = load_upto(z + at, channels), y = relu(zi), p = zi, d = fill(0.0f);
      if (kDiff) {
        Vf dzi = load_upto(dz + at, channels);
        p = zi + dzi;
        d = select(p <= fill(0.0f), fill(0.0f) - y, (zi - y) + dzi);
      }
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

template <class T, bool kDiff>
void avg_rows(const ReluPoolFwd& a, int64_t n, int64_t i, float* y_sum, float* delta_sum) {
  const int64_t row = a.W / 2 * a.C;
  if (i == a.H / 2) return avg_row<T, kDiff>(a, n, 2 * i, false, nullptr, nullptr);
  avg_row<T, kDiff>(a, n, 2 * i, false, y_sum, delta_sum);
  avg_row<T, kDiff>(a, n, 2 * i + 1, true, y_sum, delta_sum);
  if (a.y) store_quarter((T*)a.y + n * a.y_image_stride + i * row, y_sum, row);
  if (kDiff) store_quarter((T*)a.delta + n * a.delta_image_stride + i * row, delta_sum, row);
}

template <class T, bool kDiff>
void fwd(const ReluPoolFwd& a, int64_t rows, int64_t begin, int64_t end) {
  const int64_t sums = a.pool == Pool::kAvg ? a.W / 2 * a.C : 0;
  Scratch y_sum(sums), delta_sum(kDiff ? sums : 0);
  for (int64_t k = begin; k < end; ++k) {
    if (a.pool == Pool::kMax) {
      max_row<T, kDiff>(a, k / rows, k % rows);
    } else {
      avg_rows<T, kDiff>(a, k / rows, k % rows, y_sum.get(), delta_sum.get());
    }
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
    with_dtype(a.dtype, [&](auto tag) {
      using T = decltype(tag);
      a.dz ? fwd<T, true>(a, rows, begin, end) : fwd<T, false>(a, rows, begin, end);
    });
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
