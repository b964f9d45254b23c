// The difference form: a map z of one branch, and dz, the prediction's less the target's.
#pragma once

#include <type_traits>

#include "vec.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {

enum class Carried { kAlone, kPrediction, kTarget };  // the branch of z; alone: there is no dz

template <Carried kCarried>
struct Branches {
  Vf prediction, target;  // the target's is not used where z is alone
  GPL_INLINE Branches(Vf z, Vf dz)
      : prediction(kCarried == Carried::kTarget ? z + dz : z),
        target(kCarried == Carried::kPrediction ? z - dz : z) {}
};

// relu(prediction) - relu(target), of which r is the carried branch's; z, dz and the sum are those
// of the other branch. Exactly dz where r is z.                                                (6)
template <Carried kCarried>
GPL_INLINE Vf relu_difference(Vf r, Vf z_other, Vf dz_other, Vf other) {
  const Vi off = other <= fill(0.0f);
  if (kCarried == Carried::kTarget) {
    return select(off, fill(0.0f) - r, (z_other - r) + dz_other);
  }
  return select(off, r, (r - z_other) + dz_other);
}

// y = relu of the carried branch, d = the difference of both; returns the prediction's z.
template <Carried kCarried>
GPL_INLINE Vf relu_branches(Vf z, Vf dz, Vf& y, Vf& d) {
  const Branches<kCarried> b(z, dz);
  y = relu(z);
  d = relu_difference<kCarried>(y, z, dz, kCarried == Carried::kTarget ? b.prediction : b.target);
  return b.prediction;
}

// Calls body(std::integral_constant<Carried, ...>) for image n.
template <class Body>
GPL_INLINE void with_carried(const void* dz, const uint8_t* from_target, int64_t n, Body body) {
  if (!dz) {
    body(std::integral_constant<Carried, Carried::kAlone>());
  } else if (from_target[n]) {
    body(std::integral_constant<Carried, Carried::kTarget>());
  } else {
    body(std::integral_constant<Carried, Carried::kPrediction>());
  }
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
