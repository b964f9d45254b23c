// 3 x 3 convolutions of stride 1 with fewer multiplications than the definition's 36 for 4 results:
// 16 by Winograd's F(2 x 2, 3 x 3), 9 by F(4 x 4, 3 x 3) (Lavin and Gray, Fast Algorithms for
// Convolutional Neural Networks, CVPR 2016). Arithmetic is float32 for every dtype of the maps;
// where the weights are bfloat16, what is multiplied is rounded to it.
//
// F(2 x 2)'s input transform only subtracts and adds pixels that the result's own 3 x 3
// neighbourhood holds, so a neighbourhood of zeros gives exactly 0, and neighbourhoods that are
// equal within a tile, which is a window of the pool, give equal results: ReLU and pool find the
// signs and ties that they would find otherwise. F(4 x 4) leaves rounding errors there, from
// anywhere in its tile: it is for maps that decide nothing.
#include "tile.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {
namespace {

constexpr int kRows = kLanes == 16 ? 12 : 6;  // tiles in registers
constexpr int kColumns = 2;                   // registers of output channels
constexpr int64_t kPanel = kColumns * kLanes;
constexpr int64_t kBlock = 32;  // output channels of a block of u, see WinogradWeight
constexpr int64_t kWords = kLanes == 16 ? 192 : 96;  // input channels at a time, or pairs of them:
                                                     // CPUs with AVX-512 have 1 MB of L2 or more
constexpr int64_t kPastCache = 8 << 20;  // bytes of results from which on they go past the cache

GPL_INLINE NativeF load_native(const float* p) {
  NativeF r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
GPL_INLINE NativeF fma_native(NativeF a, NativeF b, NativeF c) {
#if defined(GPL_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(GPL_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// One dimension of F(2 x 2, 3 x 3): the points of a tile's pixels, `step` apart as they are, its
// results from the products at the points, and the points of three taps.
struct Two {
  static constexpr int kResults = 2;
  static constexpr int64_t kTiles = 48;  // of a group, which stays in the L2 cache

  static GPL_INLINE void points(const NativeF* d, int step, NativeF* out) {
    const NativeF a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
    out[0] = a - c, out[step] = b + c, out[2 * step] = c - b, out[3 * step] = b - e;
  }
  static GPL_INLINE void results(const NativeF* m, NativeF* out) {
    out[0] = m[0] + m[1] + m[2];
    out[1] = m[1] - m[2] - m[3];
  }
  static GPL_INLINE void weight(Vf g0, Vf g1, Vf g2, Vf* out) {
    const Vf half = fill(0.5f), ends = (g0 + g2) * half, middle = g1 * half;
    out[0] = g0, out[1] = ends + middle, out[2] = ends - middle, out[3] = g2;
  }
};

// Likewise of F(4 x 4, 3 x 3), at the points 0, a, -a, b, -b and infinity: docs/cpu.md.
struct Four {
  static constexpr int kResults = 4;
  static constexpr int64_t kTiles = 24;
  static constexpr float a = 0.75f, b = 1.5f, aa = a * a, bb = b * b;  // exact

  static GPL_INLINE NativeF times(float c, NativeF x, NativeF plus) {
    return fma_native(c - NativeF{}, x, plus);
  }
  static GPL_INLINE void points(const NativeF* d, int step, NativeF* out) {
    const NativeF x0 = d[0], x1 = d[step], x2 = d[2 * step], x3 = d[3 * step], x4 = d[4 * step];
    out[0] = times(aa * bb, x0, times(-aa - bb, x2, x4));
    NativeF even = times(-bb, x2, x4), odd = times(-bb, x1, x3);
    out[step] = times(a, odd, even), out[2 * step] = times(-a, odd, even);
    even = times(-aa, x2, x4), odd = times(-aa, x1, x3);
    out[3 * step] = times(b, odd, even), out[4 * step] = times(-b, odd, even);
    out[5 * step] = times(aa * bb, x1, times(-aa - bb, x3, d[5 * step]));
  }
  static GPL_INLINE void results(const NativeF* m, NativeF* out) {
    const NativeF even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const NativeF even_b = m[3] + m[4], odd_b = m[3] - m[4];
    out[0] = m[0] + even_a + even_b;
    out[1] = times(a, odd_a, b * odd_b);
    out[2] = times(aa, even_a, bb * even_b);
    out[3] = times(aa * a, odd_a, times(bb * b, odd_b, m[5]));
  }
  static GPL_INLINE void weight(Vf g0, Vf g1, Vf g2, Vf* out) {
    out[0] = g0 * fill(1 / (aa * bb)), out[5] = g2;
    pair(g0, g1, g2, a, 2 * aa * (aa - bb), out + 1);
    pair(g0, g1, g2, b, 2 * bb * (bb - aa), out + 3);
  }

 private:
  // At x and -x.
  static GPL_INLINE void pair(Vf g0, Vf g1, Vf g2, float x, float divisor, Vf* out) {
    const Vf ends = (g0 + g2 * fill(x * x)) * fill(1 / divisor), middle = g1 * fill(x / divisor);
    out[0] = ends + middle, out[1] = ends - middle;
  }
};

// Calls f(Two{}) or f(Four{}).
template <class Call>
GPL_INLINE void with_tile(int64_t tile, const Call& f) {
  if (tile == 2) {
    f(Two{});
  } else {
    f(Four{});
  }
}

// What is multiplied, in words of 32 bits: a float32, or the bfloat16 of two input channels, to
// which points are rounded.
struct Floats {
  using Element = float;
  static GPL_INLINE void put(float* to, NativeF x) { std::memcpy(to, &x, sizeof x); }
  static GPL_INLINE NativeF add(NativeF sum, float a, NativeF b) {
    return fma_native(a - NativeF{}, b, sum);
  }
};

#ifdef GPL_BF16_UNITS
// In assembly: GCC inlines no intrinsic of an instruction that the rest of this file may not use.
struct Pairs {
  using Element = BFloat16;
  static GPL_INLINE void put(BFloat16* to, NativeF x) {
    __m256i rounded;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(x));
    _mm256_storeu_si256((__m256i*)to, rounded);
  }
  static GPL_INLINE NativeF add(NativeF sum, float a, NativeF b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(_mm512_set1_ps(a)));
    return sum;
  }
};
#endif

// The same anywhere, for tests.
struct NoPairs {
  using Element = BFloat16;
  static GPL_INLINE void put(BFloat16* to, NativeF x) {
    const NativeI rounded = narrow(BFloat16{}, Vf{{x}}).v[0];
    const NativeH h = __builtin_convertvector((NativeU)rounded, NativeH);
    std::memcpy(to, &h, sizeof h);
  }
  static GPL_INLINE NativeF add(NativeF sum, float a, NativeF b) {
    const NativeI pair = (NativeI)(a - NativeF{}), pairs = (NativeI)b;
    const NativeI odd = (int32_t)0xffff0000 - NativeI{};
    sum = fma_native((NativeF)(pair << 16), (NativeF)(pairs << 16), sum);
    return fma_native((NativeF)(pair & odd), (NativeF)(pairs & odd), sum);
  }
};

// m[kRows][kPanel] += v[kRows][words] u[words][kPanel], or = where these are the first: of many
// channels, sums of sums, which round less. `next` is this call's share of the panel that will be
// read soon.
template <class Unit, int64_t kAhead>
GPL_INLINE void multiply(float* m, const float* v, const float* u, int64_t words, bool first,
                         const float* next) {
  NativeF sum[kRows][kColumns] = {};
  for (int64_t k = 0; k < words; ++k, u += kPanel, next += kAhead) {
    __builtin_prefetch(next, 0, 2);
    NativeF b[kColumns];
    GPL_UNROLL for (int j = 0; j < kColumns; ++j) b[j] = load_native(u + j * kLanes);
    GPL_UNROLL for (int r = 0; r < kRows; ++r) {
      const float a = v[r * kWords + k];
      GPL_UNROLL for (int j = 0; j < kColumns; ++j) sum[r][j] = Unit::add(sum[r][j], a, b[j]);
    }
  }
  GPL_UNROLL for (int r = 0; r < kRows; ++r) {
    GPL_UNROLL for (int j = 0; j < kColumns; ++j) {
      float* to = m + r * kBlock + j * kLanes;
      if (!first) sum[r][j] = load_native(to) + sum[r][j];
      std::memcpy(to, &sum[r][j], sizeof sum[r][j]);
    }
  }
}

// How the work is cut: into groups of tiles with v[point][tile][kDepth] of some input channels at a
// time and m[point][tile][kBlock] of a block of output channels, of all blocks where the input
// channels come in several parts. Neither the tiles of a group nor, with F(2 x 2), the rows of a
// strip change a sum: tiles begin at multiples of their size in the image's rows, and a tile's
// second row of results does not depend on its first row of pixels, nor its first on the last.
template <class F, class Unit, class Z, class T>
class Grouped {
 public:
  explicit Grouped(const Winograd& a) : a_(a) {
    blocks_ = a.C_in <= kDepth ? 1 : ceil_div(a.C_out, kBlock);
    above_ = a.row0 & (kResults - 1), rows_ = ceil_div(a.rows + above_, kResults);
    columns_ = ceil_div(a.W, kResults), tiles_ = a.N * rows_ * columns_;
    const int64_t pixel = a.C_out * element_size(a.z_dtype);
    words_ = ceil_div(a.C_in, kPair);
    past_cache_ = pixel % 64 == 0 && (uintptr_t)a.z % 64 == 0 && a.z_image_stride % kLine == 0 &&
                  a.N * a.rows * a.W * pixel > kPastCache;
  }

  void run() const {
    const int64_t cost = kTiles * kResults * kResults * a_.C_in;
    share(ceil_div(tiles_, kTiles), cost, [&](Items& groups) {
      Scratch v(kPoints * kPointV), m(blocks_ * kPoints * kPointM), zeros(kDepth);
      for (int64_t i = groups.next(); i < groups.n; i = groups.next()) {
        const int64_t first = i * kTiles, count = min_of(tiles_ - first, kTiles);
        group(first, count, (const T*)zeros.get(), v.get(), m.get());
      }
      if (past_cache_) finish_past_cache();
    });
  }

 private:
  using Element = typename Unit::Element;
  static constexpr int kResults = F::kResults, kSide = kResults + 2, kPoints = kSide * kSide;
  static constexpr int kPair = kChannelsPerLane<Element>;
  static constexpr int64_t kTiles = F::kTiles, kDepth = kWords * kPair;
  // Results at a time: those of a cache line, since half a line is slow to write past the cache.
  static constexpr int64_t kLine = 64 / sizeof(Z);
  // From point to point, not by a power of two: the points of a tile lie in different cache sets.
  // Constants, since the innermost loop has no registers to spare for strides.
  static constexpr int64_t kPointV = kTiles * kWords + 16, kPointM = kTiles * kBlock + 16;
  static constexpr int64_t kAhead = kPanel * kRows / kTiles;  // words of the next panel, a word
  static_assert(kAhead * kTiles == kPanel * kRows, "a group's calls ask for the whole panel");

  // Of its first result, in z; that row is negative where z begins in the middle of a tile.
  struct Tile {
    int64_t n, row, column;
  };
  Tile tile(int64_t i) const {
    const int64_t row = i / columns_;
    return {row / rows_, row % rows_ * kResults - above_, i % columns_ * kResults};
  }

  void group(int64_t first, int64_t count, const T* zeros, float* v, float* m) const {
    const int64_t u_block = kPoints * words_ * kBlock;
    for (int64_t c0 = 0; c0 < a_.C_in; c0 += kDepth) {
      transform_input(first, count, c0, zeros, (Element*)v);
      for (int64_t b = 0; b * kBlock < a_.C_out; ++b) {
        float* sums = m + b % blocks_ * kPoints * kPointM;
        multiply_points(v, (const float*)a_.u + b * u_block, c0, count, sums);
        if (c0 + kDepth >= a_.C_in) transform_output(first, count, b * kBlock, sums);
      }
    }
  }

  // The input channels from c0 on.
  void transform_input(int64_t first, int64_t count, int64_t c0, const T* zeros, Element* v) const {
    const int64_t depth = min_of(a_.C_in - c0, kDepth);
    for (int64_t t = 0; t < count; ++t, v += kDepth) {
      const Tile at = tile(first + t);
      const T* image = (const T*)a_.x + at.n * a_.x_image_stride + c0;
      const T* pixel[kPoints];
      for (int64_t i = 0; i < kPoints; ++i) {
        const int64_t h = at.row + i / kSide - a_.pad_h, w = at.column + i % kSide - 1;
        const bool inside = h >= 0 && h < a_.x_rows && w >= 0 && w < a_.W;
        pixel[i] = inside ? image + (h * a_.W + w) * a_.C_in : zeros;
      }
      for (int64_t c = 0; c < depth; c += 16) {
        NativeF d[kParts][kPoints], columns[kParts][kPoints];
        for (int i = 0; i < kPoints; ++i) {
          const T* p = pixel[i] + c;
          const Vf x = c + 16 <= depth ? load(p) : load_n(p, depth - c);
          GPL_UNROLL for (int k = 0; k < kParts; ++k) d[k][i] = x.v[k];
          // What the next tile does not share.
          if (i % kSide >= kSide - kResults) __builtin_prefetch(p + kResults * a_.C_in);
        }
        GPL_UNROLL for (int k = 0; k < kParts; ++k) {
          for (int j = 0; j < kSide; ++j) F::points(d[k] + j, kSide, columns[k] + j);
          for (int i = 0; i < kSide; ++i) {
            NativeF out[kSide];
            F::points(columns[k] + i * kSide, 1, out);
            Element* to = v + i * kSide * kPointV * kPair + c + k * kLanes;
            GPL_UNROLL for (int j = 0; j < kSide; ++j) Unit::put(to + j * kPointV * kPair, out[j]);
          }
        }
      }
    }
  }

  void multiply_points(const float* v, const float* u, int64_t c0, int64_t count, float* m) const {
    const int64_t from = c0 / kPair, words = min_of(words_ - from, kWords);
    const int64_t u_point = words_ * kBlock;
    for (int64_t p = 0; p < kPoints; ++p, v += kPointV, u += u_point, m += kPointM) {
      for (int64_t j = 0; j < kBlock; j += kPanel) {
        const float* panel = u + j * words_ + from * kPanel;
        for (int64_t t = 0; t < count; t += kRows) {
          const float* next = panel + u_point + t / kRows * words * kAhead;
          multiply<Unit, kAhead>(m + t * kBlock + j, v + t * kWords, panel, words, c0 == 0, next);
        }
      }
    }
  }

  // A block of output channels from c0 on.
  void transform_output(int64_t first, int64_t count, int64_t c0, const float* m) const {
    const int64_t channels = min_of(a_.C_out - c0, kBlock);
    for (int64_t t = 0; t < count; ++t, m += kBlock) {
      const Tile at = tile(first + t);
      Z* z = (Z*)a_.z + at.n * a_.z_image_stride + (at.row * a_.W + at.column) * a_.C_out + c0;
      const int64_t right = min_of(a_.W - at.column, kResults);
      for (int64_t c = 0; c < channels; c += kLine) {
        NativeF columns[kLine / kLanes][kResults * kSide];
        for (int k = 0; k < kLine / kLanes; ++k) {
          for (int j = 0; j < kSide; ++j) {
            NativeF p[kSide];
            GPL_UNROLL for (int i = 0; i < kSide; ++i) {
              p[i] = load_native(m + (i * kSide + j) * kPointM + c + k * kLanes);
            }
            NativeF out[kResults];
            F::results(p, out);
            GPL_UNROLL for (int i = 0; i < kResults; ++i) columns[k][i * kSide + j] = out[i];
          }
        }
        for (int i = 0; i < kResults; ++i) {
          if (at.row + i < 0 || at.row + i >= a_.rows) continue;
          Vf out[kResults][kLine / 16];
          GPL_UNROLL for (int k = 0; k < kLine / kLanes; ++k) {
            NativeF row[kResults];
            F::results(columns[k] + i * kSide, row);
            GPL_UNROLL for (int j = 0; j < kResults; ++j) {
              out[j][k / kParts].v[k % kParts] = row[j];
            }
          }
          Z* to = z + i * a_.W * a_.C_out + c;
          GPL_UNROLL for (int j = 0; j < kResults; ++j) {
            if (j < right) put(to + j * a_.C_out, out[j], channels - c);
          }
        }
      }
    }
  }

  // A pixel's next n channels, or kLine.
  GPL_INLINE void put(Z* z, const Vf* v, int64_t n) const {
    for (int i = 0; i < kLine / 16; ++i, z += 16, n -= 16) {
      if (past_cache_) {
        store_past_cache(z, v[i]);
      } else if (n > 0) {
        store_upto(z, v[i], n);
      }
    }
  }

  const Winograd& a_;
  int64_t blocks_, above_, rows_, columns_, tiles_, words_;
  bool past_cache_;
};

// Channels of a word each.
GPL_INLINE void pair(float, Vi*) {}
GPL_INLINE void pair(BFloat16 h, Vi* rows) {
  GPL_UNROLL for (int i = 0; i < 8; ++i) {
    const Vi even = narrow(h, from_bits(rows[2 * i])), odd = narrow(h, from_bits(rows[2 * i + 1]));
    rows[i] = even | shift_left(odd, 16);
  }
}

// u[block][point][panel][word of input channels][kPanel] of a block and of input channels
// [k0, k0 + 16); w is [N][tap][K] or, for the transpose, [K][tap][N] with the taps in reverse.
template <class F, class U, class T>
void weight_block(const WinogradWeight& a, int64_t b, int64_t k0) {
  constexpr int kSide = F::kResults + 2, kPoints = kSide * kSide;
  constexpr int kPair = kChannelsPerLane<U>;
  const int64_t K = a.C_in, N = a.C_out, k_count = min_of(K - k0, 16), words = ceil_div(K, kPair);
  const T* w = (const T*)a.w;
  int32_t* u = (int32_t*)a.u + b * kPoints * words * kBlock;
  for (int64_t j = 0; j < kBlock; j += 16) {
    const int64_t n0 = b * kBlock + j, n_count = max_of(min_of(N - n0, 16), 0);
    Vf points[kPoints][16];  // [point][channel of the rows]
    for (int64_t r = 0; r < 16; ++r) {
      Vf g[9], columns[3][kSide], row[kSide];
      GPL_UNROLL for (int tap = 0; tap < 9; ++tap) {
        if (a.transposed) {
          g[tap] =
              r < k_count ? load_n(w + ((k0 + r) * 9 + 8 - tap) * N + n0, n_count) : fill(0.0f);
        } else {
          g[tap] = r < n_count ? load_n(w + ((n0 + r) * 9 + tap) * K + k0, k_count) : fill(0.0f);
        }
      }
      for (int j = 0; j < 3; ++j) F::weight(g[j], g[3 + j], g[6 + j], columns[j]);
      for (int i = 0; i < kSide; ++i) {
        F::weight(columns[0][i], columns[1][i], columns[2][i], row);
        for (int j = 0; j < kSide; ++j) points[i * kSide + j][r] = row[j];
      }
    }
    for (int64_t p = 0; p < kPoints; ++p) {
      Vi rows[16];
      GPL_UNROLL for (int i = 0; i < 16; ++i) rows[i] = bits(points[p][i]);
      if (!a.transposed) transpose(rows);
      pair(U{}, rows);
      for (int i = 0; i < kParts; ++i) {  // a panel may end between these registers
        const int64_t n = j + i * kLanes;
        int32_t* panel = u + (p * kBlock + n / kPanel * kPanel) * words + n % kPanel;
        for (int64_t k = 0; k < k_count; k += kPair) {
          std::memcpy(panel + (k0 + k) / kPair * kPanel, &rows[k / kPair].v[i], sizeof(NativeI));
        }
      }
    }
  }
}

}  // namespace

void winograd_weight(const WinogradWeight& a) {
  const int64_t blocks = ceil_div(a.C_out, kBlock), steps = ceil_div(a.C_in, 16);
  const auto run = [&](auto f, auto u, auto w) {
    const int64_t cost = 16 * kBlock * (a.tile + 2) * (a.tile + 2);
    parallel(blocks * steps, cost, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        weight_block<decltype(f), decltype(u), decltype(w)>(a, i / steps, i % steps * 16);
      }
    });
  };
  with_tile(a.tile, [&](auto f) {
    if (a.u_dtype == DType::kBFloat16) {
      run(f, BFloat16{}, BFloat16{});
    } else if (a.dtype == DType::kBFloat16) {
      run(f, float{}, BFloat16{});
    } else {
      run(f, float{}, float{});
    }
  });
}

void winograd(const Winograd& a) {
  with_tile(a.tile, [&](auto f) {
    const auto run = [&](auto unit, auto z, auto x) {
      Grouped<decltype(f), decltype(unit), decltype(z), decltype(x)>(a).run();
    };
    const auto run_pairs = [&](auto unit) {
      if (a.dtype == DType::kFloat32) {
        run(unit, float{}, float{});
      } else if (a.z_dtype == DType::kFloat32) {
        run(unit, float{}, BFloat16{});
      } else {
        run(unit, BFloat16{}, BFloat16{});
      }
    };
    if (a.u_dtype == DType::kFloat32) {
      with_dtypes(a.z_dtype, a.dtype, [&](auto z, auto x) { run(Floats{}, z, x); });
      return;
    }
#ifdef GPL_BF16_UNITS
    if (cpu::bfloat16_unit() == cpu::Bfloat16Unit::kPairs) return run_pairs(Pairs{});
#endif
    run_pairs(NoPairs{});
  });
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
