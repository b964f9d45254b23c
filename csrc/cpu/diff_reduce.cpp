// ||delta||^2 of each sample: float32 within a block of fixed size, float64 across blocks in order.
#include "tile.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {
namespace {

constexpr int64_t kBlock = 4096;

template <class T>
double block_sum(const T* delta, int64_t n) {
  Vf lanes[4] = {fill(0.0f), fill(0.0f), fill(0.0f), fill(0.0f)};
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    GPL_UNROLL for (int k = 0; k < 4; ++k) {
      Vf d = load(delta + i + 16 * k);
      lanes[k] = fma(d, d, lanes[k]);
    }
  }
  for (; i < n; i += 16) {
    Vf d = load_upto(delta + i, n - i);
    lanes[0] = fma(d, d, lanes[0]);
  }
  float each[16];
  double sum = 0.0;
  for (int k = 0; k < 4; ++k) {
    store(each, lanes[k]);
    for (int j = 0; j < 16; ++j) sum += (double)each[j];
  }
  return sum;
}

}  // namespace

void diff_reduce_fwd(const DiffReduceFwd& a) {
  const int64_t blocks = ceil_div(a.M, kBlock);
  Scratch scratch(2 * a.N * blocks);
  double* partial = (double*)scratch.get();  // [N, blocks]
  parallel(a.N * blocks, kBlock, [&](int64_t begin, int64_t end) {
    with_dtype(a.dtype, [&](auto tag) {
      using T = decltype(tag);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i % blocks * kBlock;
        const T* delta = (const T*)a.delta + i / blocks * a.M + at;
        partial[i] = block_sum(delta, min_of(kBlock, a.M - at));
      }
    });
  });
  for (int64_t n = 0; n < a.N; ++n) {
    double sum = 0.0;
    for (int64_t b = 0; b < blocks; ++b) sum += partial[n * blocks + b];
    a.sum[n] = sum;
  }
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
