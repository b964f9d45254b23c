// ReLU of the target and of the difference, where no pool follows; any number of pixels.
#include "packed.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {
namespace {

template <class T, bool kDiff>
void fwd(const ReluFwd& a, int64_t begin, int64_t end) {
  const int64_t mask_bytes = ceil_div(a.C, 8);
  for (int64_t px = begin; px < end; ++px) {
    const int64_t at = px * a.C;
    for (int64_t c = 0; c < a.C; c += 16) {
      const int64_t n = a.C - c;
      Vf z = load_upto((const T*)a.z + at + c, n), y = relu(z), prediction = z;
      if (kDiff) {
        Vf dz = load_upto((const T*)a.dz + at + c, n);
        prediction = z + dz;
        // delta+ = relu(z + dz) - relu(z); dz itself where both are positive               (6)
        Vf d = select(prediction <= fill(0.0f), fill(0.0f), (z - y) + dz);
        Vf lost = select(prediction <= fill(0.0f), y, fill(0.0f));
        store_upto((T*)a.delta + at + c, d - lost, n);
      }
      if (a.y) store_upto((T*)a.y + at + c, y, n);
      if (a.mask) {
        Vi on = ~(prediction <= fill(0.0f));
        store_mask_upto(a.mask + px * mask_bytes + c / 8, on, n);
      }
    }
  }
}

template <class T>
void bwd(const ReluBwd& a, int64_t begin, int64_t end) {
  const int64_t mask_bytes = ceil_div(a.C, 8);
  for (int64_t px = begin; px < end; ++px) {
    const int64_t at = px * a.C;
    for (int64_t c = 0; c < a.C; c += 16) {
      const int64_t n = a.C - c;
      Vi on = load_mask_upto(a.mask + px * mask_bytes + c / 8, n);
      Vf dy = load_upto((const T*)a.dy + at + c, n);
      store_upto((T*)a.dz + at + c, select(on, dy, fill(0.0f)), n);
    }
  }
}

}  // namespace

void relu_fwd(const ReluFwd& a) {
  parallel(a.pixels, a.C, [&](int64_t begin, int64_t end) {
    with_dtype(a.dtype, [&](auto tag) {
      using T = decltype(tag);
      a.dz ? fwd<T, true>(a, begin, end) : fwd<T, false>(a, begin, end);
    });
  });
}

void relu_bwd(const ReluBwd& a) {
  parallel(a.pixels, a.C, [&](int64_t begin, int64_t end) {
    with_dtype(a.dtype, [&](auto tag) { bwd<decltype(tag)>(a, begin, end); });
  });
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
