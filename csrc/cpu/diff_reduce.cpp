// The sum over each sample, ||delta||^2 unless it says otherwise: float32 within a block of fixed
// size, float64 across blocks in order.
#include "criterion.h"
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
  double sum = 0.0;
  for (int k = 0; k < 4; ++k) sum = sum_of(lanes[k], sum);
  return sum;
}

// The same of another criterion or with weights, and the seed; n: whole pixels of weighted
// channels.
template <class T, Criterion kCriterion>
double seeded_sum(const T* delta, const float* weight, T* seed, int64_t channels, int64_t n) {
  const int64_t run = weight ? channels : n;
  Vf lanes = fill(0.0f);
  for (int64_t first = 0; first < n; first += run) {
    for (int64_t c = 0; c < run; c += 16) {
      const int64_t left = run - c;
      const Vf d = load_upto(delta + first + c, left);
      const Vf w = weight ? load_upto(weight + c, left) : fill(1.0f);
      const Vf s = w * slope<kCriterion>(d);
      lanes = fma(s, d, lanes);
      if (seed) store_upto(seed + first + c, s, left);
    }
  }
  return sum_of(lanes);
}

template <class T>
double any_sum(const DiffReduceFwd& a, int64_t image, int64_t at, int64_t n) {
  const T* delta = (const T*)a.delta + image * a.M + at;
  if (a.criterion == Criterion::kL2 && !a.weight && !a.seed) return block_sum(delta, n);
  T* seed = a.seed ? (T*)a.seed + image * a.M + at : nullptr;
  return a.criterion == Criterion::kL2
             ? seeded_sum<T, Criterion::kL2>(delta, a.weight, seed, a.C, n)
             : seeded_sum<T, Criterion::kL1>(delta, a.weight, seed, a.C, n);
}

}  // namespace

void diff_reduce_fwd(const DiffReduceFwd& a) {
  const int64_t block = a.weight ? max_of(kBlock / max_of(a.C, 1), 1) * a.C : kBlock;
  const int64_t blocks = ceil_div(a.M, block);
  Scratch scratch(2 * a.N * blocks);
  double* partial = (double*)scratch.get();  // [N, blocks]
  parallel(a.N * blocks, block, [&](int64_t begin, int64_t end) {
    with_dtype(a.dtype, [&](auto tag) {
      using T = decltype(tag);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i % blocks * block;
        partial[i] = any_sum<T>(a, i / blocks, at, min_of(block, a.M - at));
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
