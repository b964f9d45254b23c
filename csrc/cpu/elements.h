// Labels of single elements, uint8 [N, C, H, W]: 0, 1, or 2 where one does not count.
#pragma once

#include "walk.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {

constexpr float kIgnored = 2.0f;

// The tile at a place, as floats; pixels beyond it do not count. Rows are contiguous.
inline void load_elements(float* tile, const Tiling& t, const void* labels, const Strides& s,
                          int64_t C, const Place& at) {
  const uint8_t* row = (const uint8_t*)labels + at.n * s.n + at.h * s.h + at.w;
  for (int64_t c = 0; c < C; ++c, row += s.c) {
    float* out = tile + c * 16;
    int64_t p = 0;
    for (; p + 16 <= at.pixels; p += 16, out += t.group) {
      for (int64_t i = 0; i < 16; ++i) out[i] = (float)row[p + i];
    }
    if (p == at.pixels) continue;
    for (int64_t i = 0; i < 16; ++i) out[i] = p + i < at.pixels ? (float)row[p + i] : kIgnored;
  }
}

GPL_INLINE Vi counts(Vf label) { return label != fill(kIgnored); }

// 1 where a label is.
GPL_INLINE Vf is_one(Vf label) { return select(label != fill(1.0f), fill(0.0f), fill(1.0f)); }

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
