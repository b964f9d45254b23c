// The net's gradient, NHWC -> the logits' gradient in the caller's layout; the cross-entropy's
// gradient goes into the same write. y' is computed again from x and lse.
#include "activation.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {
namespace {

constexpr int64_t kCachedBytes = 16 << 20;

struct Pixels {
  int64_t image, at, n;  // at: the first one's place in an [N, H, W] tensor
};

// The cross-entropy's part of a group's gradient:
// s (p_c (w_t (1 - e) + e/C sum w) - e/C w_c) - [c = t] s (1 - e) w_t
class CrossEntropyGrad {
 public:
  CrossEntropyGrad(const SoftmaxBwd& a, const Pixels& px, float weights)
      : labels_(label_weights(a.ce, px.at, px.n, a.C)), weight_(a.ce.class_weight) {
    const float e = a.ce.label_smoothing, s = a.ce_scale[px.image];
    counted_ = labels_.counted();
    mask_ = labels_.mask;
    on_p_ = fill(s) * fma(load(labels_.weight), fill(1.0f - e), fill(e / (float)a.C * weights));
    on_weight_ = s * e / (float)a.C;
    on_label_ = fill(s * (1.0f - e)) * load(labels_.weight);
    label_ = load_i(labels_.label);
  }

  GPL_INLINE Vf at(Vf p, int64_t c) const {
    Vf g = p * on_p_ - fill(on_weight_ * (weight_ ? weight_[c] : 1.0f));
    g = g - select(label_ == fill_i((int32_t)c), on_label_, fill(0.0f));
    return select(counted_, g * mask_, fill(0.0f));
  }

 private:
  LabelWeights labels_;
  const float* weight_;
  Vi counted_, label_;
  Vf on_p_, on_label_, mask_;
  float on_weight_;
};

// In place: e^((x - lse) / T), with the sums over the channels. The sum of the values is 1 up to
// the rounding of lse, which is absolute and so not small for large logits: dividing by it removes
// that.
struct Sums {
  Vf inverse, dot;  // 1 / sum y, sum y dy / sum y
};
Sums probabilities(float* x, const float* dy, const float* lse, int64_t n, int64_t C, float inv_t,
                   Lines& lines) {
  const Vf shift = load_upto(lse, n);
  Vf sum = fill(0.0f), dot = fill(0.0f);
  each_channel(C, lines, [&](int64_t c) __attribute__((always_inline)) {
    Vf y = exp<true>((load(x + c * 16) - shift) * fill(inv_t));
    sum = sum + y;
    if (dy) dot = fma(y, load(dy + c * 16), dot);
    store(x + c * 16, y);
  });
  const Vf inverse = fill(1.0f) / sum;
  return {inverse, dot * inverse};
}

// In place: x becomes scale y' (dy - sum y' dy) / T                                           (5)
void softmax_group(const SoftmaxBwd& a, const Pixels& px, float* x, const float* dy, Vi keep,
                   Vf scale, const CrossEntropyGrad* ce, Lines& lines) {
  const Sums sums = probabilities(x, dy, a.lse + px.at, px.n, a.C, a.inv_t, lines);
  const Vf inv_t = fill(a.inv_t);
  for (int64_t c = 0; c < a.C; ++c) {
    Vf y = load(x + c * 16) * sums.inverse;
    // 1 / T comes last: it may be huge where the rest is 0.
    Vf g = select(keep, scale * y * (load(dy + c * 16) - sums.dot) * inv_t, fill(0.0f));
    if (ce) g = g + ce->at(y, c);
    store(x + c * 16, g);
  }
}

// In place: x becomes scale act'(x / T) dy / T, where act' is 1 for none                        (5)
void elementwise_group(const SoftmaxBwd& a, float* x, const float* dy, Vi keep, Vf scale) {
  const Vf inv_t = fill(a.inv_t);
  for (int64_t c = 0; c < a.C; ++c) {
    Vf g = scale * load(dy + c * 16);
    squashing(a.activation, [&](auto act) __attribute__((always_inline)) {
      g = g * act.slope(load(x + c * 16) * inv_t);
    });
    store(x + c * 16, select(keep, g * inv_t, fill(0.0f)));
  }
}

// The net's part of a group; x: logits in, gradient out.
void net_group(const SoftmaxBwd& a, const Pixels& px, float* x, const float* dy,
               const CrossEntropyGrad* ce, Lines& lines) {
  if (!dy) {
    std::memset(x, 0, (size_t)(a.C * 16) * sizeof(float));
    return;
  }
  const Vi keep = valid_lanes(a.valid, px.at, px.n);
  Vf scale = fill(a.scale[px.image]);
  if (a.valid.weights) scale = scale * weight_lanes(a.valid.weights, px.at, px.n);
  if (a.activation == Activation::kSoftmax) {
    softmax_group(a, px, x, dy, keep, scale, ce, lines);
  } else {
    elementwise_group(a, x, dy, keep, scale);
  }
}

// One group of 16 pixels, in place. own: [C][16] of scratch.
void group_bwd(const SoftmaxBwd& a, const Pixels& px, float* x, const float* dy, float* own,
               float weights, Lines& lines) {
  if (!a.ce.labels) return net_group(a, px, x, dy, nullptr, lines);
  const CrossEntropyGrad ce(a, px, weights);
  if (dy && !a.ce.own_lse) return net_group(a, px, x, dy, &ce, lines);
  // The cross-entropy's probabilities are not the activation's.
  std::memcpy(own, x, (size_t)(a.C * 16) * sizeof(float));
  const Vf inverse = probabilities(own, nullptr, a.ce_lse + px.at, px.n, a.C, 1.0f, lines).inverse;
  net_group(a, px, x, dy, nullptr, lines);
  for (int64_t c = 0; c < a.C; ++c) {
    store(x + c * 16, load(x + c * 16) + ce.at(load(own + c * 16) * inverse, c));
  }
}

void rows_bwd(const SoftmaxBwd& a, const Tiling& tiling, float weights, Items& rows) {
  Scratch x_tile(tiling.floats()), dy_group(a.dy ? tiling.group : 0),
      own(a.ce.labels ? tiling.group : 0);
  float *x = x_tile.get(), *dy = a.dy ? dy_group.get() : nullptr;
  Lines lines;
  const Strides& s = a.dx_strides;
  const bool past_cache = a.N * a.C * a.H * a.W * element_size(a.x_dtype) > kCachedBytes;
  for (Walk walk(a.strip, a.H, a.W, tiling, rows); !walk.done();) {
    const Place at = walk.here();
    walk.advance();
    if (!at.inside) continue;
    load_image(x, tiling, a.x, a.x_dtype, a.x_strides, a.C, at);
    for (int64_t p = 0; p < at.pixels; p += 16) {
      const Pixels px = {at.n, (at.n * a.H + at.h) * a.W + at.w + p, min_of(at.pixels - p, 16)};
      const int64_t group = p / 16 * tiling.group;
      if (dy) {
        with_dtype(a.dtype, [&](auto tag) {
          using T = decltype(tag);
          const int64_t first = (at.r * a.W + at.w + p) * a.c_pad;
          const T* src = (const T*)a.dy + at.n * a.dy_image_stride + first;
          if (a.c_pad == 1) {
            store(dy, load_upto(src, px.n));
          } else {
            load_channels(dy, src, a.c_pad, a.C, px.n);
          }
          lines.want(src + 16 * a.c_pad, px.n * a.c_pad * (int64_t)sizeof(T));
        });
      }
      group_bwd(a, px, x + group, dy, own.get(), weights, lines);
    }
    with_dtype(a.x_dtype, [&](auto tag) {
      using T = decltype(tag);
      store_tile((T*)a.dx + at.n * s.n + at.h * s.h + at.w * s.w, s.c, s.w, x, tiling, a.C,
                 at.pixels, past_cache);
    });
  }
  finish_past_cache();
}

}  // namespace

void softmax_bwd(const SoftmaxBwd& a) {
  const Tiling tiling(a.W, max_of(a.C, a.dy ? a.c_pad : 0));
  const float weights = a.ce.labels ? class_weight_sum(a.ce, a.C) : 0.0f;
  share(a.N * a.strip.rows, a.W * a.C, [&](Items& rows) { rows_bwd(a, tiling, weights, rows); });
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
