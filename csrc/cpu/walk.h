// The tiles of a strip, and what is fetched while one of them is computed.
#pragma once

#include "tile.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {

// Where a tile lies: image, row of the image, row of the strip, first column, width.
struct Place {
  int64_t n, h, r, w, pixels;
  bool inside;  // the row is one of the image's
};

// The tiles of those rows of N strips that this thread gets.
class Walk {
 public:
  Walk(const Strip& strip, int64_t H, int64_t W, const Tiling& t, Items& rows)
      : strip_(strip), H_(H), W_(W), step_(t.pixels), rows_(rows), row_(rows.next()), w_(0) {}
  bool done() const { return row_ >= rows_.n; }
  Place here() const {
    const int64_t r = row_ % strip_.rows, h = strip_.row0 + r;
    return {row_ / strip_.rows, h, r, w_, min_of(W_ - w_, step_), h >= 0 && h < H_};
  }
  void advance() {
    w_ += step_;
    if (w_ >= W_) skip_row();
  }
  void skip_row() { w_ = 0, row_ = rows_.next(); }

 private:
  Strip strip_;
  int64_t H_, W_, step_;
  Items& rows_;
  int64_t row_, w_;
};

// Cache lines that will be written or read soon, asked for one by one in the gaps of an arithmetic
// loop: rows of pixels start anywhere, which is too irregular for the hardware's own fetching.
struct Lines {
  const char *next = nullptr, *end = nullptr;

  void want(const void* begin, int64_t bytes) {
    next = (const char*)begin;
    end = next + bytes;
  }
  GPL_INLINE void step() {
    if (next >= end) return;
    __builtin_prefetch(next, 1);
    next += 64;
  }
};

// f(c) for every channel.
template <class F>
GPL_INLINE void each_channel(int64_t C, Lines& lines, const F& f) {
  Lines local = lines;
  for (int64_t c = 0; c < C; ++c) {
    f(c);
    local.step();
  }
  lines = local;
}

// The tile at a place of a caller's [N, C, H, W] image.
inline void load_image(float* tile, const Tiling& t, const void* image, DType dtype,
                       const Strides& s, int64_t C, const Place& at) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* src = (const T*)image + at.n * s.n + at.h * s.h + at.w * s.w;
    load_tile(tile, t, src, s.c, s.w, C, at.pixels);
  });
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
