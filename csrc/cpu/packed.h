// Packed winners (4 bits an element) and masks (1 bit an element) of 16 neighbouring channels.
#pragma once

#include "vec.h"

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {

// Lanes 0..15, each in [0, 16), into 8 bytes: even channels in the low nibbles.
GPL_INLINE void store_nibbles(uint8_t* p, Vi code) {
  GPL_EACH_PART {
    NativeQ q = (NativeQ)code.v[i];
    NativeB b = __builtin_convertvector((q | (q >> 28)) & 0xff, NativeB);
    std::memcpy(p + i * (kLanes / 2), &b, sizeof b);
  }
}
GPL_INLINE Vi load_nibbles(const uint8_t* p) {
  Vi r;
  GPL_EACH_PART {
    NativeB b;
    std::memcpy(&b, p + i * (kLanes / 2), sizeof b);
    NativeQ q = __builtin_convertvector(b, NativeQ);
    r.v[i] = (NativeI)((q | (q << 28)) & 0x0000000f0000000full);
  }
  return r;
}

// The first n channels: ceil(n / 2) or ceil(n / 8) bytes, what is beyond channel n - 1 is zero.
GPL_INLINE void store_nibbles_upto(uint8_t* p, Vi code, int64_t n) {
  if (n >= 16) return store_nibbles(p, code);
  uint8_t bytes[8];
  store_nibbles(bytes, code & lanes_of((1u << n) - 1));
  std::memcpy(p, bytes, (size_t)((n + 1) / 2));
}
GPL_INLINE Vi load_nibbles_upto(const uint8_t* p, int64_t n) {
  if (n >= 16) return load_nibbles(p);
  uint8_t bytes[8] = {};
  std::memcpy(bytes, p, (size_t)((n + 1) / 2));
  return load_nibbles(bytes);
}
GPL_INLINE void store_mask_upto(uint8_t* p, Vi mask, int64_t n) {
  uint32_t m = lane_mask(mask);
  if (n < 16) m &= (1u << n) - 1;
  p[0] = (uint8_t)m;
  if (n > 8) p[1] = (uint8_t)(m >> 8);
}
GPL_INLINE Vi load_mask_upto(const uint8_t* p, int64_t n) {
  return lanes_of(p[0] | (n > 8 ? (uint32_t)p[1] << 8 : 0u));
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
