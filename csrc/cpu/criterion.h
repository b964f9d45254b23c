// What is summed over differences: the seed s of each, its slope, and s d.
#pragma once

#include "vec.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {

// Half the derivative of d^2, or that of |d|: 0 at 0. Times d it is the criterion's value.
template <Criterion kCriterion>
GPL_INLINE Vf slope(Vf d) {
  if (kCriterion == Criterion::kL2) return d;
  const Vf zero = fill(0.0f);
  return select(d > zero, fill(1.0f), select(d < zero, fill(-1.0f), d));
}

// The lanes in order, added to a sum.
GPL_INLINE double sum_of(Vf lanes, double sum = 0.0) {
  float each[16];
  store(each, lanes);
  for (int j = 0; j < 16; ++j) sum += (double)each[j];
  return sum;
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
