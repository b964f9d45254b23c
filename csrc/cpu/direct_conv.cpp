// K x K convolutions of stride 1 in bfloat16 by the definition, for CPUs that multiply its matrices
// (AMX) or pairs (AVX512_BF16): 32 pixels of a row times 32 output channels at a time. Sums are
// float32 and stay so until they are stored, which no operator of ATen's offers.
#include "tile.h"

#ifdef GPL_BF16_UNITS
// For functions alone: nothing else of this file may run where the unit is missing.
#define GPL_AMX_TARGET __attribute__((target("amx-tile,amx-bf16")))
#define GPL_PAIRS_TARGET __attribute__((target("avx512bf16")))
#endif

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {
namespace {

constexpr int64_t kPixels = 32;     // of a block: two registers of the unit
constexpr int64_t kOutputs = 32;    // of a block, likewise
constexpr int64_t kDepth = 32;      // input channels of a register
constexpr int64_t kSteps = 2;       // registers of input channels that are gone through at a time
constexpr int64_t kColumns = 128;   // pixels of a task's rows
constexpr int64_t kRows = 8;        // of a task, fewer where its sums would leave the L2 cache
constexpr int64_t kSums = 1 << 19;  // bytes of these
constexpr int64_t kBlock = kPixels * kOutputs;  // also the elements of two registers of weights
constexpr int64_t kPastCache = 8 << 20;  // bytes of results from which on they go past the cache

// What a block's sums are made of: for every tap and step, 32 pixels' channels, 64 bytes each, and
// 32 outputs' weights, in pairs of input channels.
struct Products {
  const BFloat16* x;  // of the first tap and step
  const BFloat16* u;
  int64_t taps, row, plane, steps;  // taps to a side; elements from row to row, step to step
  float* sums;                      // [pixels / 16][outputs / 16][16][16]
  bool first;                       // sums begin
  int64_t pixels;                   // that are wanted
};

#ifdef GPL_BF16_UNITS
class MatrixUnit {
 public:
  static constexpr int64_t kTogether = 16;  // pixels: it takes a multiple of them

  GPL_AMX_TARGET static void configure() {
    struct Shape {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static const Shape shape;  // GCC says that the instruction reads eight bytes of it
    _tile_loadconfig(&shape);
  }
  GPL_AMX_TARGET static void release() { _tile_release(); }

  GPL_AMX_TARGET static void add(const Products& a) {
    constexpr int64_t kRegister = 16 * kDepth;
    float* const sums = a.sums;
    const bool half = a.pixels <= 16;
    if (a.first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, sums, 64);
      _tile_loadd(1, sums + 256, 64);
      if (!half) {
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
      }
    }
    const BFloat16* u = a.u;
    for (int64_t i = 0; i < a.taps; ++i) {
      for (int64_t j = 0; j < a.taps; ++j) {
        const BFloat16* x = a.x + i * a.row + j * kDepth;
        for (int64_t k = 0; k < a.steps; ++k, x += a.plane, u += kBlock) {
          _tile_loadd(4, x, 64);
          _tile_loadd(6, u, 64);
          _tile_loadd(7, u + kRegister, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          if (half) continue;
          _tile_loadd(5, x + kRegister, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if (half) return;
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
};

class PairUnit {
 public:
  static constexpr int64_t kTogether = 8;  // times two registers of outputs

  static void configure() {}
  static void release() {}

  GPL_PAIRS_TARGET static void add(const Products& a) {
    for (int64_t p = 0; p < a.pixels; p += kTogether) add(a, p);
  }

 private:
  GPL_PAIRS_TARGET static void add(const Products& a, int64_t pixel) {
    float* const sums = a.sums + pixel / 16 * 512 + pixel % 16 * 16;
    __m512 sum[kTogether][2];
    GPL_UNROLL for (int m = 0; m < kTogether; ++m) {
      GPL_UNROLL for (int n = 0; n < 2; ++n) {
        sum[m][n] = a.first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + n * 256 + m * 16);
      }
    }
    const BFloat16* u = a.u;
    for (int64_t i = 0; i < a.taps; ++i) {
      for (int64_t j = 0; j < a.taps; ++j) {
        const BFloat16* x = a.x + i * a.row + (j + pixel) * kDepth;
        for (int64_t k = 0; k < a.steps; ++k, x += a.plane, u += kBlock) {
          for (int64_t c = 0; c < kDepth; c += 2) {
            const __m512bh low = (__m512bh)_mm512_loadu_si512(u + c * 16);
            const __m512bh high = (__m512bh)_mm512_loadu_si512(u + (kDepth + c) * 16);
            GPL_UNROLL for (int m = 0; m < kTogether; ++m) {
              int32_t pair;
              std::memcpy(&pair, x + m * kDepth + c, sizeof pair);
              const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
              sum[m][0] = _mm512_dpbf16_ps(sum[m][0], both, low);
              sum[m][1] = _mm512_dpbf16_ps(sum[m][1], both, high);
            }
          }
        }
      }
    }
    GPL_UNROLL for (int m = 0; m < kTogether; ++m) {
      GPL_UNROLL for (int n = 0; n < 2; ++n) _mm512_storeu_ps(sums + n * 256 + m * 16, sum[m][n]);
    }
  }
};
#endif

// The same anywhere, for tests.
class NoUnit {
 public:
  static constexpr int64_t kTogether = 16;

  static void configure() {}
  static void release() {}

  static void add(const Products& a) {
    for (int64_t half = 0; half < (a.pixels <= 16 ? 1 : 2); ++half) {
      for (int64_t n = 0; n < 2; ++n) add(a, half * 16, n);
    }
  }

 private:
  static void add(const Products& a, int64_t pixel, int64_t n) {
    float* const sums = a.sums + (pixel / 16 * 2 + n) * 256;
    Vf sum[16];
    for (int m = 0; m < 16; ++m) sum[m] = a.first ? fill(0.0f) : load(sums + m * 16);
    const BFloat16* u = a.u + n * 16 * kDepth;
    for (int64_t i = 0; i < a.taps; ++i) {
      for (int64_t j = 0; j < a.taps; ++j) {
        const BFloat16* x = a.x + i * a.row + (j + pixel) * kDepth;
        for (int64_t k = 0; k < a.steps; ++k, x += a.plane, u += kBlock) {
          for (int64_t c = 0; c < kDepth; c += 2) {
            const Vi pair = load_i((const int32_t*)(u + c * 16));
            const Vf even = widen(BFloat16{}, pair);
            const Vf odd = from_bits(pair & fill_i((int32_t)0xffff0000));
            for (int m = 0; m < 16; ++m) {
              sum[m] = fma(fill(value(x[m * kDepth + c])), even, sum[m]);
              sum[m] = fma(fill(value(x[m * kDepth + c + 1])), odd, sum[m]);
            }
          }
        }
      }
    }
    for (int m = 0; m < 16; ++m) store(sums + m * 16, sum[m]);
  }
  static GPL_INLINE float value(BFloat16 h) {
    const uint32_t bits = (uint32_t)h.bits << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
};

// A task is a few rows of up to kColumns pixels, of all output channels or of some: its pixels'
// channels, 64 at a time, are laid out as the unit reads them, with zeros around the image. Where
// rows are so short that ends of blocks would be wasted, all of a task's rows are one line, with
// the pixels between them computed for nothing. No sum depends on how the work is cut.
template <class Unit, class Z, class T>
class Direct {
 public:
  explicit Direct(const DirectConv& a) : a_(a) {
    blocks_ = ceil_div(a.C_out, kOutputs), parts_ = ceil_div(a.C_in, kSteps * kDepth);
    row_blocks_ = ceil_div(min_of(a.W, kColumns), kPixels);
    const int64_t a_row = row_blocks_ * kBlock * blocks_ * 4;
    rows_ = parts_ == 1 ? kRows : min_of(max_of(kSums / a_row, 1), kRows);
    down_ = ceil_div(a.rows, rows_), across_ = ceil_div(a.W, kColumns);
    // Few pixels: their outputs are shared out too.
    const int64_t tasks = a.N * down_ * across_;
    some_ = ceil_div(blocks_, min_of(blocks_, max_of(64 / max_of(tasks, 1), 1)));
    width_ = min_of(a.W, kColumns) + a.K - 1, plane_ = (rows_ + a.K - 1) * width_ * kDepth;
    const int64_t rows = min_of(rows_, a.rows);
    one_line_ = across_ == 1 && whole_groups(rows * width_ - a.K + 1) < rows * whole_groups(a.W);
    const int64_t pixel = a.C_out * element_size(a.z_dtype);
    past_cache_ = pixel % 64 == 0 && (uintptr_t)a.z % 64 == 0 && a.z_image_stride % kLine == 0 &&
                  a.N * a.rows * a.W * pixel > kPastCache;
  }

  void run() const {
    const int64_t shares = ceil_div(blocks_, some_), tasks = a_.N * down_ * across_ * shares;
    share(tasks, rows_ * kColumns * a_.C_in, [&](Items& items) {
      // A block's last pixels may lie behind the last row.
      Scratch x((kSteps * plane_ + kPixels * kDepth) / 2);
      Scratch sums(parts_ == 1 ? kBlock : rows_ * row_blocks_ * some_ * kBlock);
      Unit::configure();
      for (int64_t i = items.next(); i < items.n; i = items.next()) {
        const int64_t at = i / shares, strip = at / across_;
        const int64_t row = strip % down_ * rows_, column = at % across_ * kColumns;
        const int64_t begin = i % shares * some_;
        const Task task = {strip / down_,
                           row,
                           column,
                           min_of(a_.rows - row, rows_),
                           min_of(a_.W - column, kColumns),
                           begin,
                           min_of(blocks_ - begin, some_)};
        for (int64_t part = 0; part < parts_; ++part) {
          lay_out(task, part, (BFloat16*)x.get());
          multiply(task, part, (const BFloat16*)x.get(), sums.get());
        }
      }
      Unit::release();
      if (past_cache_) finish_past_cache();
    });
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(Z);

  struct Task {
    int64_t n, row, column, rows, columns, block, blocks;
  };

  static int64_t whole_groups(int64_t pixels) {
    return ceil_div(pixels, Unit::kTogether) * Unit::kTogether;
  }

  // x[step][row][column][kDepth] of the part's channels.
  void lay_out(const Task& task, int64_t part, BFloat16* x) const {
    const T* image = (const T*)a_.x + task.n * a_.x_image_stride;
    const int64_t c0 = part * kSteps * kDepth, c1 = min_of(a_.C_in, c0 + kSteps * kDepth);
    for (int64_t r = 0; r < task.rows + a_.K - 1; ++r) {
      const int64_t h = task.row + r - a_.pad_h;
      for (int64_t p = 0; p < task.columns + a_.K - 1; ++p) {
        const int64_t w = task.column + p - a_.K / 2;
        const bool inside = h >= 0 && h < a_.x_rows && w >= 0 && w < a_.W;
        const T* from = image + (h * a_.W + w) * a_.C_in;
        BFloat16* to = x + (r * width_ + p) * kDepth;
        for (int64_t c = c0; c < c1; c += kDepth, to += plane_) {
          copy(to, from + c, inside ? min_of(c1 - c, kDepth) : 0);
          // The next part's: pixels of many channels lie too far apart to be fetched unasked.
          if (inside && c1 < a_.C_in) __builtin_prefetch(from + c + kSteps * kDepth, 0, 2);
        }
      }
    }
  }
  // kDepth channels, those from n on zeros.
  static GPL_INLINE void copy(BFloat16* to, const BFloat16* from, int64_t n) {
    store_i((int32_t*)to, n ? load_bytes(from, 2 * n) : fill_i(0));
  }
  static GPL_INLINE void copy(BFloat16* to, const float* from, int64_t n) {
    for (int64_t c = 0; c < kDepth; c += 16) {
      store(to + c, c < n ? load_upto(from + c, n - c) : fill(0.0f));
    }
  }

  void multiply(const Task& task, int64_t part, const BFloat16* x, float* sums) const {
    const int64_t taps = a_.K * a_.K, steps = ceil_div(a_.C_in, kDepth);
    const int64_t some = min_of(steps - part * kSteps, kSteps);
    for (int64_t b = 0; b < task.blocks; ++b) {
      const int64_t block = task.block + b;
      const BFloat16* u = (const BFloat16*)a_.u + (block * steps + part * kSteps) * taps * kBlock;
      const int64_t lines = one_line_ ? 1 : task.rows;
      const int64_t length = one_line_ ? task.rows * width_ - a_.K + 1 : task.columns;
      for (int64_t r = 0; r < lines; ++r) {
        for (int64_t p = 0; p < length; p += kPixels) {
          const int64_t pixels = min_of(length - p, kPixels);
          const BFloat16* from = x + (r * width_ + p) * kDepth;
          Unit::add({from, u, a_.K, width_ * kDepth, plane_, some, sums, part == 0, pixels});
          if (part + 1 == parts_) put(task, block, r, p, pixels, sums);
          if (parts_ > 1) sums += kBlock;
        }
      }
    }
  }

  // From pixel p of line r on.
  void put(const Task& task, int64_t block, int64_t r, int64_t p, int64_t pixels,
           const float* sums) const {
    const int64_t c = block * kOutputs, left = a_.C_out - c;
    int64_t column = p % width_;
    Z* z = (Z*)a_.z + task.n * a_.z_image_stride +
           ((task.row + r + p / width_) * a_.W + task.column + min_of(column, task.columns)) *
               a_.C_out +
           c;
    for (int64_t i = 0; i < pixels; ++i, ++column) {
      if (column == width_) column = 0;
      if (column >= task.columns) continue;  // between two rows
      const float* from = sums + i / 16 * 512 + i % 16 * 16;
      if (past_cache_) {
        store_past_cache(z, load(from));
        if (left > 16) store_past_cache(z + 16, load(from + 256));
      } else {
        store_upto(z, load(from), left);
        if (left > 16) store_upto(z + 16, load(from + 256), left - 16);
      }
      z += a_.C_out;
    }
  }

  const DirectConv& a_;
  int64_t blocks_, parts_, row_blocks_, rows_, down_, across_, some_, width_, plane_;
  bool one_line_, past_cache_;
};

// Of 16 outputs from n0 and kDepth input channels from k0.
void weight_register(const DirectWeight& a, int64_t tap, int64_t n0, int64_t k0, BFloat16* u) {
  const BFloat16* w = (const BFloat16*)a.w;
  const int64_t taps = a.K * a.K;
  const int64_t n_count = max_of(min_of(a.C_out - n0, 16), 0);
  const int64_t k_count = min_of(a.C_in - k0, kDepth);
  Vi pairs[16];
  for (int64_t i = 0; i < 16; ++i) {
    if (a.transposed) {
      const BFloat16* even = w + ((k0 + 2 * i) * taps + taps - 1 - tap) * a.C_out + n0;
      const Vf low = load_upto(even, 2 * i < k_count ? n_count : 0);
      const Vf high = load_upto(even + taps * a.C_out, 2 * i + 1 < k_count ? n_count : 0);
      pairs[i] = narrow(BFloat16{}, low) | bits(high);
    } else {
      const BFloat16* from = w + ((n0 + i) * taps + tap) * a.C_in + k0;
      pairs[i] = i < n_count ? load_bytes(from, 2 * k_count) : fill_i(0);
    }
  }
  if (!a.transposed) transpose(pairs);
  for (int64_t i = 0; i < 16; ++i) store_i((int32_t*)(u + i * 32), pairs[i]);
}

}  // namespace

// u[block][part][tap][step][outputs / 16][pairs of input channels][16][2]
void direct_weight(const DirectWeight& a) {
  const int64_t steps = ceil_div(a.C_in, kDepth), taps = a.K * a.K;
  parallel(ceil_div(a.C_out, kOutputs) * steps, taps * kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / steps, step = i % steps, part = step / kSteps;
      const int64_t some = min_of(steps - part * kSteps, kSteps);
      BFloat16* u =
          (BFloat16*)a.u + (block * steps + part * kSteps) * taps * kBlock + step % kSteps * kBlock;
      for (int64_t tap = 0; tap < taps; ++tap, u += some * kBlock) {
        for (int64_t n = 0; n < kOutputs; n += 16) {
          weight_register(a, tap, block * kOutputs + n, step * kDepth, u + n * kDepth);
        }
      }
    }
  });
}

void direct_conv(const DirectConv& a) {
  const auto run = [&](auto z, auto x) {
#ifdef GPL_BF16_UNITS
    const cpu::Bfloat16Unit unit = cpu::bfloat16_unit();
    if (unit == cpu::Bfloat16Unit::kMatrix) {
      return Direct<MatrixUnit, decltype(z), decltype(x)>(a).run();
    }
    if (unit == cpu::Bfloat16Unit::kPairs) {
      return Direct<PairUnit, decltype(z), decltype(x)>(a).run();
    }
#endif
    Direct<NoUnit, decltype(z), decltype(x)>(a).run();
  };
  if (a.dtype == DType::kFloat32) {
    run(float{}, float{});
  } else if (a.z_dtype == DType::kFloat32) {
    run(float{}, BFloat16{});
  } else {
    run(BFloat16{}, BFloat16{});
  }
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
