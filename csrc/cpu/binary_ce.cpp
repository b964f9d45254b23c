// The binary cross-entropy of logits with labels of single elements: its sums by row, and its
// gradient, which is added to the perceptual one.
#include "activation.h"
#include "elements.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {
namespace {

// Channels whose losses are summed in float32.
constexpr int64_t kFloatSums = 16;

// Of a class: an element's loss is on_0 softplus(x) + on_1 softplus(-x), each by its label 0 or 1.
class ClassTerms {
 public:
  ClassTerms(const BinaryCe& ce, int64_t c) {
    const float w = ce.class_weight ? ce.class_weight[c] : 1.0f;
    const float p = w * (ce.pos_weight ? ce.pos_weight[c] : 1.0f), e = 0.5f * ce.label_smoothing;
    on_0_[0] = w * (1.0f - e), on_0_[1] = w * e;
    on_1_[0] = p * e, on_1_[1] = p * (1.0f - e);
  }
  GPL_INLINE Vf on_0(Vf label) const { return of(on_0_, label); }
  GPL_INLINE Vf on_1(Vf label) const { return of(on_1_, label); }

 private:
  static GPL_INLINE Vf of(const float* by_label, Vf label) {
    return select(label != fill(1.0f), fill(by_label[0]), fill(by_label[1]));
  }
  float on_0_[2], on_1_[2];
};

GPL_INLINE Vf exp_of_minus_abs(Vf x) { return exp<true>(fill(0.0f) - larger(x, fill(0.0f) - x)); }

// log(1 + e) of 0 <= e <= 1, exact relative to itself: 2 artanh(e / (2 + e)).
GPL_INLINE Vf log1p(Vf e) {
  const Vf s = e / (fill(2.0f) + e), z = s * s;
  Vf p = fma(z, fill(1.0f / 15), fill(1.0f / 13));
  p = fma(p, z, fill(1.0f / 11));
  p = fma(p, z, fill(1.0f / 9));
  p = fma(p, z, fill(1.0f / 7));
  p = fma(p, z, fill(1.0f / 5));
  p = fma(p, z, fill(1.0f / 3));
  return fma(p * z, s, s) * fill(2.0f);
}

// weight y, where an infinite y of no weight is nothing.
GPL_INLINE Vf weighted(Vf weight, Vf y) {
  return select(weight != fill(0.0f), weight * y, fill(0.0f));
}

GPL_INLINE Vf loss(const ClassTerms& terms, Vf x, Vf label) {
  const Vf zero = fill(0.0f), rest = log1p(exp_of_minus_abs(x));
  const Vf of_0 = rest + larger(zero, x), of_1 = rest + larger(zero, zero - x);
  return weighted(terms.on_0(label), of_0) + weighted(terms.on_1(label), of_1);
}

GPL_INLINE Vf slope(const ClassTerms& terms, Vf x, Vf label) {
  const Vf one = fill(1.0f), e = exp_of_minus_abs(x), larger_one = one / (one + e);
  const Vf smaller = e * larger_one;
  const Vi positive = x > fill(0.0f);
  const Vf y = select(positive, larger_one, smaller), rest = select(positive, smaller, larger_one);
  return terms.on_0(label) * y - terms.on_1(label) * rest;
}

GPL_INLINE double sum_of(Vf v) {
  float each[16];
  store(each, v);
  double sum = 0.0;
  for (int i = 0; i < 16; ++i) sum += (double)each[i];
  return sum;
}

// Adds the losses of a group of 16 pixels, and how many elements count, to the row's.
void group_fwd(const BinaryCe& a, Vf mask, const float* x, const float* labels, double* sums) {
  for (int64_t c0 = 0; c0 < a.C; c0 += kFloatSums) {
    Vf losses = fill(0.0f), counted = losses;
    for (int64_t c = c0; c < min_of(c0 + kFloatSums, a.C); ++c) {
      const Vf label = load(labels + c * 16);
      const Vi there = counts(label);
      const Vf here = loss(ClassTerms(a, c), load(x + c * 16), label);
      losses = losses + select(there, here, fill(0.0f));
      counted = counted + select(there, fill(1.0f), fill(0.0f));
    }
    sums[0] += sum_of(losses * mask);
    sums[1] += sum_of(counted * mask);
  }
}

// In place: the gradient with this one's; a scale of null: without.
void group_bwd(const BinaryCeBwd& a, const float* scale, Vf mask, const float* x,
               const float* labels, float* dx) {
  const Vf by = scale ? fill(*scale) * mask : mask;
  for (int64_t c = 0; c < a.C; ++c) {
    const Vf label = load(labels + c * 16), before = load(dx + c * 16);
    Vf g = before;
    if (scale) g = before + by * slope(ClassTerms(a, c), load(x + c * 16), label);
    store(dx + c * 16, select(counts(label), g, a.clear ? fill(0.0f) : before));
  }
}

Vf mask_of(const BinaryCe& a, int64_t px, int64_t n) {
  return a.mask ? weight_lanes(a.mask, px, n) : fill(1.0f);
}

void rows_fwd(const BinaryCeFwd& a, const Tiling& tiling, Items& rows) {
  Scratch x(tiling.floats()), labels(tiling.floats());
  double sums[2] = {0.0, 0.0};
  for (Walk walk(a.strip, a.H, a.W, tiling, rows); !walk.done();) {
    const Place at = walk.here();
    walk.advance();
    if (!at.inside) continue;
    load_image(x.get(), tiling, a.x, a.x_dtype, a.x_strides, a.C, at);
    load_elements(labels.get(), tiling, a.labels, a.labels_strides, a.C, at);
    if (at.w == 0) sums[0] = sums[1] = 0.0;
    const int64_t first = (at.n * a.H + at.h) * a.W + at.w;
    for (int64_t p = 0; p < at.pixels; p += 16) {
      const int64_t group = p / 16 * tiling.group;
      const Vf mask = mask_of(a, first + p, min_of(at.pixels - p, 16));
      group_fwd(a, mask, x.get() + group, labels.get() + group, sums);
    }
    double* out = a.sums + (at.n * a.H + at.h) * 2;
    out[0] = sums[0], out[1] = sums[1];
  }
}

void rows_bwd(const BinaryCeBwd& a, const Tiling& tiling, Items& rows) {
  Scratch x(a.scale ? tiling.floats() : 0), labels(tiling.floats()), dx(tiling.floats());
  const Strides& s = a.dx_strides;
  for (Walk walk(a.strip, a.H, a.W, tiling, rows); !walk.done();) {
    const Place at = walk.here();
    walk.advance();
    if (!at.inside) continue;
    if (a.scale) load_image(x.get(), tiling, a.x, a.x_dtype, a.x_strides, a.C, at);
    load_elements(labels.get(), tiling, a.labels, a.labels_strides, a.C, at);
    load_image(dx.get(), tiling, a.dx, a.x_dtype, s, a.C, at);
    const int64_t first = (at.n * a.H + at.h) * a.W + at.w;
    for (int64_t p = 0; p < at.pixels; p += 16) {
      const int64_t group = p / 16 * tiling.group;
      const Vf mask = mask_of(a, first + p, min_of(at.pixels - p, 16));
      group_bwd(a, a.scale ? a.scale + at.n : nullptr, mask, x.get() + (a.scale ? group : 0),
                labels.get() + group, dx.get() + group);
    }
    with_dtype(a.x_dtype, [&](auto tag) {
      using T = decltype(tag);
      T* out = (T*)a.dx + at.n * s.n + at.h * s.h + at.w * s.w;
      store_tile(out, s.c, s.w, dx.get(), tiling, a.C, at.pixels, false);
    });
  }
}

}  // namespace

void binary_ce_fwd(const BinaryCeFwd& a) {
  const Tiling tiling(a.W, a.C);
  share(a.N * a.strip.rows, a.W * a.C, [&](Items& rows) { rows_fwd(a, tiling, rows); });
}

void binary_ce_bwd(const BinaryCeBwd& a) {
  const Tiling tiling(a.W, a.C);
  share(a.N * a.strip.rows, a.W * a.C, [&](Items& rows) { rows_bwd(a, tiling, rows); });
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
