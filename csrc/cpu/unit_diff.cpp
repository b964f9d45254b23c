// Features of two branches over their norms: the sum of what their difference costs, and its
// gradient. A pixel's channels stay in the cache while they are read three times.
#include <cmath>

#include "criterion.h"
#include "tile.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {
namespace {

constexpr int64_t kBlock = 64;  // pixels whose sum is one partial sum

GPL_INLINE Vf read(DType dtype, const void* p, int64_t at, int64_t n) {
  if (dtype == DType::kFloat32) return load_upto((const float*)p + at, n);
  if (dtype == DType::kBFloat16) return load_upto((const BFloat16*)p + at, n);
  return load_upto((const Float16*)p + at, n);
}

GPL_INLINE void write(DType dtype, void* p, int64_t at, Vf v, int64_t n) {
  if (dtype == DType::kFloat32) return store_upto((float*)p + at, v, n);
  if (dtype == DType::kBFloat16) return store_upto((BFloat16*)p + at, v, n);
  store_upto((Float16*)p + at, v, n);
}

// A norm, and one over the norm and the eps that stands outside: 0 where the norm is.
struct Norm {
  double root, inverse;
  Norm(const UnitDiffFwd& a, Vf squares)
      : root(std::sqrt(sum_of(squares) + (a.eps_inside ? (double)a.eps : 0.0))),
        inverse(root != 0.0 ? 1.0 / (root + (a.eps_inside ? 0.0 : (double)a.eps)) : 0.0) {}
};

// Three rows of floats, for a pixel's channels up to a multiple of 16: those beyond are 0.
struct Pixel {
  float *prediction, *target, *delta;
};

// The pixel's features in both branches, and sums over them.
GPL_INLINE void load_pixel(const UnitDiffFwd& a, int64_t n, int64_t px, const Pixel& pixel, Vf& pp,
                           Vf& tt, Vf& change) {
  for (int64_t c = 0; c < a.C; c += 16) {
    const int64_t left = a.C - c, at = px * a.C + c;
    const Vf p = read(a.dtype, a.y, n * a.y_image_stride + at, left);
    const Vf t = read(a.target_dtype, a.target, n * a.target_image_stride + at, left);
    const Vf d = p - t;
    pp = fma(p, p, pp), tt = fma(t, t, tt), change = fma(d, p + t, change);
    store(pixel.prediction + c, p), store(pixel.target + c, t), store(pixel.delta + c, d);
  }
}

// n(p) - n(t) = (d - n(t) (R' - R)) / (R' + eps) = (d - n(p) (R' - R)) / (R + eps): over the larger
// norm, so that nothing cancels.
template <Criterion kCriterion>
double pixel_sum(const UnitDiffFwd& a, int64_t n, int64_t px, const Pixel& pixel) {
  Vf pp = fill(0.0f), tt = fill(0.0f), change = fill(0.0f);
  load_pixel(a, n, px, pixel, pp, tt, change);
  const Norm prediction(a, pp), target(a, tt);
  const double both = prediction.root + target.root;
  const double moved = both != 0.0 ? sum_of(change) / both : 0.0;
  const bool larger = prediction.root >= target.root;
  const Vf of_target = fill(larger ? (float)(target.inverse * moved) : 0.0f);
  const Vf of_prediction = fill(larger ? 0.0f : (float)(prediction.inverse * moved));
  const Vf over_larger = fill((float)(larger ? prediction.inverse : target.inverse));
  Vf value = fill(0.0f), along = fill(0.0f);
  for (int64_t c = 0; c < a.C; c += 16) {
    const Vf p = load(pixel.prediction + c), t = load(pixel.target + c);
    const Vf u = (load(pixel.delta + c) - t * of_target - p * of_prediction) * over_larger;
    const Vf w = a.weight ? load_upto(a.weight + c, a.C - c) : fill(1.0f);
    const Vf s = w * slope<kCriterion>(u);
    value = fma(s, u, value);
    along = fma(s, p, along);
    store(pixel.delta + c, s);
  }
  if (a.seed) {
    // What of s points along the prediction's features does not change them over their norm.
    const bool alive = prediction.root != 0.0;
    const double share = alive ? sum_of(along) * prediction.inverse / prediction.root : 0.0;
    const Vf over = fill((float)prediction.inverse), length = fill((float)share);
    for (int64_t c = 0; c < a.C; c += 16) {
      const Vf s = load(pixel.delta + c) - load(pixel.prediction + c) * length;
      write(a.seed_dtype, a.seed, n * a.seed_image_stride + px * a.C + c, s * over, a.C - c);
    }
  }
  return sum_of(value);
}

double block_sum(const UnitDiffFwd& a, int64_t n, int64_t first, const Pixel& pixel) {
  const int64_t last = min_of(first + kBlock, a.pixels);
  double sum = 0.0;
  for (int64_t px = first; px < last; ++px) {
    const double distance = a.criterion == Criterion::kL2
                                ? pixel_sum<Criterion::kL2>(a, n, px, pixel)
                                : pixel_sum<Criterion::kL1>(a, n, px, pixel);
    if (a.distances) a.distances[n * a.distances_image_stride + px] = (float)distance;
    sum += distance;
  }
  return sum;
}

}  // namespace

void unit_diff_fwd(const UnitDiffFwd& a) {
  const int64_t blocks = ceil_div(a.pixels, kBlock), channels = ceil_div(a.C, 16) * 16;
  Scratch scratch(2 * a.N * blocks);
  double* partial = (double*)scratch.get();  // [N, blocks]
  parallel(a.N * blocks, kBlock * a.C, [&](int64_t begin, int64_t end) {
    Scratch rows(3 * channels);
    float* row = rows.get();
    const Pixel pixel = {row, row + channels, row + 2 * channels};
    for (int64_t i = begin; i < end; ++i) {
      partial[i] = block_sum(a, i / blocks, i % blocks * kBlock, pixel);
    }
  });
  for (int64_t n = 0; n < a.N; ++n) {
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; ++b) sum += partial[n * blocks + b];
    a.sum[n] = sum;
  }
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
