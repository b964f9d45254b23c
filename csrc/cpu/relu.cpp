// ReLU of a branch and of the difference, where no pool follows; any number of pixels.
#include "branches.h"
#include "packed.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {
namespace {

template <class T, Carried kCarried>
void pixel_fwd(const ReluFwd& a, int64_t px) {
  const int64_t mask_bytes = ceil_div(a.C, 8), at = px * a.C;
  for (int64_t c = 0; c < a.C; c += 16) {
    const int64_t n = a.C - c;
    const Vf z = load_upto((const T*)a.z + at + c, n);
    const Vf dz = a.dz ? load_upto((const T*)a.dz + at + c, n) : z;
    Vf y, d;
    const Vf prediction = relu_branches<kCarried>(z, dz, y, d);
    if (a.dz) store_upto((T*)a.delta + at + c, d, n);
    if (a.y) store_upto((T*)a.y + at + c, y, n);
    if (!a.mask) continue;
    store_mask_upto(a.mask + px * mask_bytes + c / 8, ~(prediction <= fill(0.0f)), n);
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
      for (int64_t px = begin; px < end; ++px) {
        with_carried(a.dz, a.from_target, px / a.image_pixels,
                     [&](auto carried) { pixel_fwd<T, decltype(carried)::value>(a, px); });
      }
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
