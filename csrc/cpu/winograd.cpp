// 3 x 3 convolutions of stride 1 with 16 multiplications for 4 results, where the definition has
// 36: Winograd's F(2 x 2, 3 x 3) (Lavin and Gray, Fast Algorithms for Convolutional Neural
// Networks, CVPR 2016), with results tiled as the pool's windows are. Arithmetic is float32 for
// every dtype.
//
// Its input transform only subtracts and adds pixels that the result's own 3 x 3 neighbourhood
// holds, so a neighbourhood of zeros gives exactly 0, and neighbourhoods that are equal within a
// tile give equal results: ReLU and pool find the signs and ties that they would find otherwise.
#include "tile.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {
namespace {

constexpr int64_t kPoints = 16;               // of a tile: 4 x 4 pixels, transformed
constexpr int kRows = kLanes == 16 ? 12 : 6;  // tiles in registers
constexpr int kColumns = 2;                   // registers of output channels
constexpr int64_t kPanel = kColumns * kLanes;
constexpr int64_t kBlock = 32;  // output channels of a block of u, see WinogradWeight
constexpr int64_t kTiles = 48;  // of a group, which stays in the L2 cache
constexpr int64_t kDepth = kLanes == 16 ? 192 : 96;  // input channels at a time: CPUs with AVX-512
                                                     // have an L2 cache of 1 MB or more
constexpr int64_t kPastCache = 8 << 20;  // bytes of results from which on they go past the cache
// From point to point, not by a power of two: the points of a tile lie in different cache sets.
// Constants, since the innermost loop has no registers to spare for strides.
constexpr int64_t kPointV = kTiles * kDepth + 16, kPointM = kTiles * kBlock + 16;

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

constexpr int64_t kAhead = kPanel * kRows / kTiles;  // floats of the next panel for each channel
static_assert(kAhead * kTiles == kPanel * kRows, "a group's calls ask for the whole panel");

// m[kRows][kPanel] += v[kRows][depth] u[depth][kPanel], or = where these are the first. `next` is
// this call's share of the panel that will be read soon.
GPL_INLINE void multiply(float* m, const float* v, const float* u, int64_t depth, bool first,
                         const float* next) {
  NativeF sum[kRows][kColumns];
  GPL_UNROLL for (int r = 0; r < kRows; ++r) {
    GPL_UNROLL for (int j = 0; j < kColumns; ++j) {
      sum[r][j] = first ? NativeF{} : load_native(m + r * kBlock + j * kLanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k, u += kPanel, next += kAhead) {
    __builtin_prefetch(next, 0, 2);
    NativeF b[kColumns];
    GPL_UNROLL for (int j = 0; j < kColumns; ++j) b[j] = load_native(u + j * kLanes);
    GPL_UNROLL for (int r = 0; r < kRows; ++r) {
      const NativeF a = v[r * kDepth + k] - NativeF{};
      GPL_UNROLL for (int j = 0; j < kColumns; ++j) sum[r][j] = fma_native(a, b[j], sum[r][j]);
    }
  }
  GPL_UNROLL for (int r = 0; r < kRows; ++r) {
    GPL_UNROLL for (int j = 0; j < kColumns; ++j) {
      std::memcpy(m + r * kBlock + j * kLanes, &sum[r][j], sizeof sum[r][j]);
    }
  }
}

// One column of B' d: four pixels to four points.
GPL_INLINE void to_points(Vf a, Vf b, Vf c, Vf d, Vf* out, int step) {
  out[0] = a - c, out[step] = b + c, out[2 * step] = c - b, out[3 * step] = b - d;
}

// How the work is cut: into groups of tiles with v[point][tile][kDepth] of some input channels at a
// time and m[point][tile][kBlock] of a block of output channels, of all blocks where the input
// channels come in several parts. Neither the tiles of a group nor the rows of a strip change a
// sum: tiles begin at the image's even rows, and a tile's second row of results does not depend on
// its first row of pixels, nor its first on the last.
template <class Z, class T>
class Grouped {
 public:
  explicit Grouped(const Winograd& a) : a_(a) {
    blocks_ = a.C_in <= kDepth ? 1 : ceil_div(a.C_out, kBlock);
    odd_ = a.row0 & 1, rows_ = ceil_div(a.rows + odd_, 2), columns_ = ceil_div(a.W, 2);
    tiles_ = a.N * rows_ * columns_;
    const int64_t pixel = a.C_out * element_size(a.z_dtype);
    past_cache_ = a.z_dtype == DType::kFloat32 && pixel % 64 == 0 && (uintptr_t)a.z % 64 == 0 &&
                  a.z_image_stride % 16 == 0 && a.N * a.rows * a.W * pixel > kPastCache;
  }

  void run() const {
    parallel(ceil_div(tiles_, kTiles), kTiles * 4 * a_.C_in, [&](int64_t begin, int64_t end) {
      Scratch v(kPoints * kPointV), m(blocks_ * kPoints * kPointM), zeros(kDepth);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * kTiles, count = min_of(tiles_ - first, kTiles);
        group(first, count, (const T*)zeros.get(), v.get(), m.get());
      }
      if (past_cache_) finish_past_cache();
    });
  }

 private:
  // Of its first result, in z; that row is -1 where z begins in the middle of a tile.
  struct Tile {
    int64_t n, row, column;
  };
  Tile tile(int64_t i) const {
    const int64_t row = i / columns_;
    return {row / rows_, row % rows_ * 2 - odd_, i % columns_ * 2};
  }

  void group(int64_t first, int64_t count, const T* zeros, float* v, float* m) const {
    const int64_t u_block = kPoints * a_.C_in * kBlock;
    for (int64_t c0 = 0; c0 < a_.C_in; c0 += kDepth) {
      transform_input(first, count, c0, zeros, v);
      for (int64_t b = 0; b * kBlock < a_.C_out; ++b) {
        float* sums = m + b % blocks_ * kPoints * kPointM;
        multiply_points(v, a_.u + b * u_block, c0, count, sums);
        if (c0 + kDepth >= a_.C_in) transform_output(first, count, b * kBlock, sums);
      }
    }
  }

  // The input channels from c0 on.
  void transform_input(int64_t first, int64_t count, int64_t c0, const T* zeros, float* v) const {
    const int64_t depth = min_of(a_.C_in - c0, kDepth);
    for (int64_t t = 0; t < count; ++t, v += kDepth) {
      const Tile at = tile(first + t);
      const T* image = (const T*)a_.x + at.n * a_.x_image_stride + c0;
      const T* pixel[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t h = at.row + i / 4 - a_.pad_h, w = at.column + i % 4 - 1;
        const bool inside = h >= 0 && h < a_.x_rows && w >= 0 && w < a_.W;
        pixel[i] = inside ? image + (h * a_.W + w) * a_.C_in : zeros;
      }
      for (int64_t c = 0; c < depth; c += 16) {
        Vf d[16], rows[16], out[16];
        if (c + 16 <= depth) {
          GPL_UNROLL for (int i = 0; i < 16; ++i) d[i] = load(pixel[i] + c);
        } else {
          for (int i = 0; i < 16; ++i) d[i] = load_n(pixel[i] + c, depth - c);
        }
        for (int i = 0; i < 4; ++i) {  // what the next tile does not share
          __builtin_prefetch(pixel[4 * i + 2] + c + 2 * a_.C_in);
          __builtin_prefetch(pixel[4 * i + 3] + c + 2 * a_.C_in);
        }
        GPL_UNROLL for (int j = 0; j < 4; ++j) {
          to_points(d[j], d[4 + j], d[8 + j], d[12 + j], rows + j, 4);
        }
        GPL_UNROLL for (int i = 0; i < 4; ++i) {
          const Vf* r = rows + 4 * i;
          to_points(r[0], r[1], r[2], r[3], out + 4 * i, 1);
        }
        GPL_UNROLL for (int i = 0; i < 16; ++i) store(v + i * kPointV + c, out[i]);
      }
    }
  }

  void multiply_points(const float* v, const float* u, int64_t c0, int64_t count, float* m) const {
    const int64_t depth = min_of(a_.C_in - c0, kDepth), u_point = a_.C_in * kBlock;
    for (int64_t p = 0; p < kPoints; ++p, v += kPointV, u += u_point, m += kPointM) {
      for (int64_t j = 0; j < kBlock; j += kPanel) {
        const float* panel = u + j * a_.C_in + c0 * kPanel;
        for (int64_t t = 0; t < count; t += kRows) {
          const float* next = panel + u_point + t / kRows * depth * kAhead;
          multiply(m + t * kBlock + j, v + t * kDepth, panel, depth, c0 == 0, next);
        }
      }
    }
  }

  // A block of output channels from c0 on: A' m A of each tile.
  void transform_output(int64_t first, int64_t count, int64_t c0, const float* m) const {
    const int64_t channels = min_of(a_.C_out - c0, kBlock);
    for (int64_t t = 0; t < count; ++t, m += kBlock) {
      const Tile at = tile(first + t);
      Z* z = (Z*)a_.z + at.n * a_.z_image_stride + (at.row * a_.W + at.column) * a_.C_out + c0;
      const bool inside[2] = {at.row >= 0, at.row + 1 < a_.rows}, right = at.column + 1 < a_.W;
      for (int64_t c = 0; c < channels; c += 16) {
        Vf s[2][4];
        GPL_UNROLL for (int j = 0; j < 4; ++j) {
          Vf p[4];
          GPL_UNROLL for (int i = 0; i < 4; ++i) p[i] = load(m + (i * 4 + j) * kPointM + c);
          s[0][j] = p[0] + p[1] + p[2];
          s[1][j] = p[1] - p[2] - p[3];
        }
        GPL_UNROLL for (int i = 0; i < 2; ++i) {
          if (!inside[i]) continue;
          Z* row = z + i * a_.W * a_.C_out + c;
          put(row, s[i][0] + s[i][1] + s[i][2], channels - c);
          if (right) put(row + a_.C_out, s[i][1] - s[i][2] - s[i][3], channels - c);
        }
      }
    }
  }

  GPL_INLINE void put(Z* z, Vf v, int64_t n) const {
    if (past_cache_) {
      store_past_cache(z, v);
    } else {
      store_upto(z, v, n);
    }
  }

  const Winograd& a_;
  int64_t blocks_, odd_, rows_, columns_, tiles_;
  bool past_cache_;
};

// u[block][point][panel][k][kPanel] of sixteen input channels at the lanes: out[point] = G g G'.
GPL_INLINE void weight_points(const Vf* g, Vf* out) {
  const Vf half = fill(0.5f);
  auto column = [&](Vf a, Vf b, Vf c, Vf* to, int step) {
    const Vf ends = (a + c) * half, middle = b * half;
    to[0] = a, to[step] = ends + middle, to[2 * step] = ends - middle, to[3 * step] = c;
  };
  Vf rows[12];
  GPL_UNROLL for (int j = 0; j < 3; ++j) column(g[j], g[3 + j], g[6 + j], rows + j, 3);
  GPL_UNROLL for (int i = 0; i < 4; ++i) {
    column(rows[3 * i], rows[3 * i + 1], rows[3 * i + 2], out + 4 * i, 1);
  }
}

// Lanes of input channels [k0, k0 + 16) for one output channel n; w is [N][tap][K] or, for the
// transpose, [K][tap][N] with the taps in reverse.
void weight_block(const WinogradWeight& a, int64_t b, int64_t k0) {
  const int64_t K = a.C_in, N = a.C_out, k_count = min_of(K - k0, 16);
  float* u = a.u + b * kPoints * K * kBlock;
  for (int64_t j = 0; j < kBlock; j += 16) {
    const int64_t n0 = b * kBlock + j, n_count = max_of(min_of(N - n0, 16), 0);
    Vf points[16][16];  // [point][channel of the rows]
    for (int64_t r = 0; r < 16; ++r) {
      Vf g[9], out[16];
      GPL_UNROLL for (int tap = 0; tap < 9; ++tap) {
        if (a.transposed) {
          g[tap] =
              r < k_count ? load_n(a.w + ((k0 + r) * 9 + 8 - tap) * N + n0, n_count) : fill(0.0f);
        } else {
          g[tap] = r < n_count ? load_n(a.w + ((n0 + r) * 9 + tap) * K + k0, k_count) : fill(0.0f);
        }
      }
      weight_points(g, out);
      for (int p = 0; p < 16; ++p) points[p][r] = out[p];
    }
    for (int64_t p = 0; p < kPoints; ++p) {
      Vi rows[16];
      GPL_UNROLL for (int i = 0; i < 16; ++i) rows[i] = bits(points[p][i]);
      if (!a.transposed) transpose(rows);
      for (int i = 0; i < kParts; ++i) {  // a panel may end between these registers
        const int64_t n = j + i * kLanes;
        float* panel = u + p * K * kBlock + n / kPanel * kPanel * K + n % kPanel;
        for (int64_t k = 0; k < k_count; ++k) {
          std::memcpy(panel + (k0 + k) * kPanel, &rows[k].v[i], sizeof rows[k].v[i]);
        }
      }
    }
  }
}

}  // namespace

void winograd_weight(const WinogradWeight& a) {
  const int64_t blocks = ceil_div(a.C_out, kBlock), steps = ceil_div(a.C_in, 16);
  parallel(blocks * steps, 16 * kBlock * 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) weight_block(a, i / steps, i % steps * 16);
  });
}

void winograd(const Winograd& a) {
  with_dtypes(a.z_dtype, a.dtype,
              [&](auto z, auto x) { Grouped<decltype(z), decltype(x)>(a).run(); });
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
