// Sixteen floats at a time, whatever the machine's register width is. The sources of this folder
// are compiled once for each instruction set into its own namespace (GPL_CPU_NAMESPACE), so nothing
// here may be an inline function of another namespace: the linker would keep just one copy.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../stages.h"

#define GPL_INLINE inline __attribute__((always_inline))
#define GPL_UNROLL _Pragma("GCC unroll 16")

namespace gpl_fast {
namespace GPL_CPU_NAMESPACE {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define GPL_AVX512 1
#ifdef GPL_FAST_BF16
#define GPL_BF16_UNITS 1  // the compiler knows them, cpu::bfloat16_unit() whether they are there
#endif
constexpr int kLanes = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define GPL_AVX2 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kParts = 16 / kLanes;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

typedef float NativeF __attribute__((vector_size(kLanes * 4)));
typedef int32_t NativeI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t NativeU __attribute__((vector_size(kLanes * 4)));
typedef uint64_t NativeQ __attribute__((vector_size(kLanes * 4)));
typedef uint16_t NativeH __attribute__((vector_size(kLanes * 2)));
typedef uint8_t NativeB __attribute__((vector_size(kLanes / 2)));

struct Vf {
  NativeF v[kParts];
};
struct Vi {  // also the result of a comparison: 0 or -1
  NativeI v[kParts];
};

#define GPL_EACH_PART GPL_UNROLL for (int i = 0; i < kParts; ++i)
#define GPL_BINARY(R, A, op)                 \
  GPL_INLINE R operator op(A a, A b) {       \
    R r;                                     \
    GPL_EACH_PART r.v[i] = a.v[i] op b.v[i]; \
    return r;                                \
  }
GPL_BINARY(Vf, Vf, +)
GPL_BINARY(Vf, Vf, -)
GPL_BINARY(Vf, Vf, *)
GPL_BINARY(Vf, Vf, /)
GPL_BINARY(Vi, Vf, >)
GPL_BINARY(Vi, Vf, <)
GPL_BINARY(Vi, Vf, <=)
GPL_BINARY(Vi, Vf, !=)
GPL_BINARY(Vi, Vi, ==)
GPL_BINARY(Vi, Vi, >)
GPL_BINARY(Vi, Vi, &)
GPL_BINARY(Vi, Vi, |)
GPL_BINARY(Vi, Vi, ^)
#undef GPL_BINARY

// Integers wrap around.
GPL_INLINE Vi operator+(Vi a, Vi b) {
  GPL_EACH_PART a.v[i] = (NativeI)((NativeU)a.v[i] + (NativeU)b.v[i]);
  return a;
}
GPL_INLINE Vi operator-(Vi a, Vi b) {
  GPL_EACH_PART a.v[i] = (NativeI)((NativeU)a.v[i] - (NativeU)b.v[i]);
  return a;
}
GPL_INLINE Vi operator~(Vi a) {
  GPL_EACH_PART a.v[i] = ~a.v[i];
  return a;
}
GPL_INLINE Vi shift_left(Vi a, int n) {
  GPL_EACH_PART a.v[i] = (NativeI)((NativeU)a.v[i] << n);
  return a;
}
GPL_INLINE Vi shift_right(Vi a, int n) {
  GPL_EACH_PART a.v[i] = (NativeI)((NativeU)a.v[i] >> n);
  return a;
}
GPL_INLINE Vf fill(float x) {
  Vf r;
  GPL_EACH_PART r.v[i] = x - NativeF{};
  return r;
}
GPL_INLINE Vi fill_i(int32_t x) {
  Vi r;
  GPL_EACH_PART r.v[i] = x - NativeI{};
  return r;
}
GPL_INLINE Vi bits(Vf a) {
  Vi r;
  GPL_EACH_PART r.v[i] = (NativeI)a.v[i];
  return r;
}
GPL_INLINE Vf from_bits(Vi a) {
  Vf r;
  GPL_EACH_PART r.v[i] = (NativeF)a.v[i];
  return r;
}
GPL_INLINE Vf to_float(Vi a) {
  Vf r;
  GPL_EACH_PART r.v[i] = __builtin_convertvector(a.v[i], NativeF);
  return r;
}
GPL_INLINE Vf select(Vi mask, Vf a, Vf b) {
  GPL_EACH_PART a.v[i] = mask.v[i] ? a.v[i] : b.v[i];
  return a;
}
GPL_INLINE Vi select(Vi mask, Vi a, Vi b) {
  GPL_EACH_PART a.v[i] = mask.v[i] ? a.v[i] : b.v[i];
  return a;
}

// a * b + c, fused where the machine can: the sources are compiled with -ffp-contract=off.
GPL_INLINE Vf fma(Vf a, Vf b, Vf c) {
  Vf r;
#if defined(GPL_AVX512)
  r.v[0] = _mm512_fmadd_ps(a.v[0], b.v[0], c.v[0]);
#elif defined(GPL_AVX2)
  GPL_EACH_PART r.v[i] = _mm256_fmadd_ps(a.v[i], b.v[i], c.v[i]);
#else
  GPL_EACH_PART r.v[i] = a.v[i] * b.v[i] + c.v[i];
#endif
  return r;
}

// The larger one; b where either is NaN.
GPL_INLINE Vf larger(Vf a, Vf b) {
  Vf r;
#if defined(GPL_AVX512)
  r.v[0] = _mm512_max_ps(a.v[0], b.v[0]);
#elif defined(GPL_AVX2)
  GPL_EACH_PART r.v[i] = _mm256_max_ps(a.v[i], b.v[i]);
#else
  GPL_EACH_PART r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
#endif
  return r;
}

// ReLU that lets NaN through.
GPL_INLINE Vf relu(Vf a) { return larger(fill(0.0f), a); }

// The sixteen lanes' top bits, lane 0 in bit 0.
GPL_INLINE uint32_t lane_mask(Vi a) {
#if defined(GPL_AVX512)
  return _mm512_movepi32_mask((__m512i)a.v[0]);
#elif defined(GPL_AVX2)
  return (uint32_t)_mm256_movemask_ps((__m256)a.v[0]) | (uint32_t)_mm256_movemask_ps((__m256)a.v[1])
                                                            << 8;
#else
  uint32_t r = 0;
  for (int i = 0; i < 16; ++i) r |= (uint32_t)(a.v[i / kLanes][i % kLanes] < 0) << i;
  return r;
#endif
}

// Bit i of `mask` into lane i: 0 or -1.
GPL_INLINE Vi lanes_of(uint32_t mask) {
  Vi r;
#if defined(GPL_AVX512)
  r.v[0] = (NativeI)_mm512_movm_epi32((__mmask16)mask);
#else
  GPL_EACH_PART {
    NativeI bit;
    for (int j = 0; j < kLanes; ++j) bit[j] = 1 << (i * kLanes + j);
    r.v[i] = (((int32_t)mask - NativeI{}) & bit) == bit;
  }
#endif
  return r;
}

// A register at a time: of all sixteen at once GCC makes a copy on the stack, in 16-byte pieces,
// and reading those back as registers of 32 bytes stalls.
GPL_INLINE Vf load(const float* p) {
  Vf r;
  GPL_EACH_PART std::memcpy(&r.v[i], p + i * kLanes, sizeof r.v[i]);
  return r;
}
GPL_INLINE Vi load_i(const int32_t* p) {
  Vi r;
  GPL_EACH_PART std::memcpy(&r.v[i], p + i * kLanes, sizeof r.v[i]);
  return r;
}
GPL_INLINE Vi load_u16(const void* p) {
  Vi r;
  GPL_EACH_PART {
    NativeH h;
    std::memcpy(&h, (const uint16_t*)p + i * kLanes, sizeof h);
    r.v[i] = (NativeI) __builtin_convertvector(h, NativeU);
  }
  return r;
}
GPL_INLINE void store(float* p, Vf a) {
  GPL_EACH_PART std::memcpy(p + i * kLanes, &a.v[i], sizeof a.v[i]);
}
GPL_INLINE void store_i(int32_t* p, Vi a) {
  GPL_EACH_PART std::memcpy(p + i * kLanes, &a.v[i], sizeof a.v[i]);
}
GPL_INLINE void store_u16(void* p, Vi a) {
  GPL_EACH_PART {
    NativeH h = __builtin_convertvector((NativeU)a.v[i], NativeH);
    std::memcpy((uint16_t*)p + i * kLanes, &h, sizeof h);
  }
}

// bfloat16 in the low half of each lane <-> float, round to nearest even.
GPL_INLINE Vf widen(BFloat16, Vi h) { return from_bits(shift_left(h, 16)); }
GPL_INLINE Vi narrow(BFloat16, Vf a) {
  Vi u = bits(a);
  Vi odd = shift_right(u, 16) & fill_i(1);
  return select(a != a, fill_i(0x7fc0), shift_right(u + fill_i(0x7fff) + odd, 16));
}

// float16 likewise; the integer form is F. Giesen's.
GPL_INLINE Vf widen(Float16, Vi h) {
#if defined(GPL_AVX512)
  Vf r;
  r.v[0] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)h.v[0]));
  return r;
#elif defined(GPL_AVX2)
  Vf r;
  GPL_EACH_PART {
    NativeH n = __builtin_convertvector((NativeU)h.v[i], NativeH);
    r.v[i] = _mm256_cvtph_ps((__m128i)n);
  }
  return r;
#else
  Vi o = shift_left(h & fill_i(0x7fff), 13);
  Vi exponent = o & fill_i(0x0f800000);
  o = o + fill_i(112 << 23);
  Vi special = o + fill_i(112 << 23);
  Vi denormal = bits(from_bits(o + fill_i(1 << 23)) - from_bits(fill_i(113 << 23)));
  o = select(exponent == fill_i(0x0f800000), special, select(exponent == fill_i(0), denormal, o));
  return from_bits(o | shift_left(h & fill_i(0x8000), 16));
#endif
}
GPL_INLINE Vi narrow(Float16, Vf a) {
#if defined(GPL_AVX512)
  Vi r;
  r.v[0] = (NativeI)_mm512_cvtepu16_epi32(_mm512_cvtps_ph(a.v[0], _MM_FROUND_TO_NEAREST_INT));
  return r;
#elif defined(GPL_AVX2)
  Vi r;
  GPL_EACH_PART {
    NativeH n = (NativeH)_mm256_cvtps_ph(a.v[i], _MM_FROUND_TO_NEAREST_INT);
    r.v[i] = (NativeI) __builtin_convertvector(n, NativeU);
  }
  return r;
#else
  Vi sign = bits(a) & fill_i((int32_t)0x80000000), f = bits(a) ^ sign;
  Vi odd = shift_right(f, 13) & fill_i(1);
  Vi normal = shift_right(f + fill_i((int32_t)0xc8000fff) + odd, 13);
  Vi magic = fill_i(126 << 23);
  Vi denormal = bits(from_bits(f) + from_bits(magic)) - magic;
  Vi special = select(f > fill_i(255 << 23), fill_i(0x7e00), fill_i(0x7c00));
  Vi o =
      select(f > fill_i((143 << 23) - 1), special, select(fill_i(113 << 23) > f, denormal, normal));
  return o | shift_right(sign, 16);
#endif
}

template <class T>
GPL_INLINE Vf load(const T* p) {
  return widen(T{}, load_u16(p));
}
template <class T>
GPL_INLINE void store(T* p, Vf a) {
  store_u16(p, narrow(T{}, a));
}

// The first n lanes only; the others load as zero.
template <class T>
GPL_INLINE Vf load_n(const T* p, int64_t n) {
  T a[16] = {};
  std::memcpy(a, p, (size_t)n * sizeof(T));
  return load(a);
}
template <class T>
GPL_INLINE void store_n(T* p, Vf v, int64_t n) {
  T a[16];
  store(a, v);
  std::memcpy(p, a, (size_t)n * sizeof(T));
}
template <class T>
GPL_INLINE Vf load_upto(const T* p, int64_t n) {
  return n >= 16 ? load(p) : load_n(p, n);
}
template <class T>
GPL_INLINE void store_upto(T* p, Vf v, int64_t n) {
  if (n >= 16) {
    store(p, v);
  } else {
    store_n(p, v, n);
  }
}

// e^x: at most 2 ulp, 0 below the smallest normal number, NaN stays NaN; inf above 88.4 unless
// kNotPositive promises that there is no such x.
template <bool kNotPositive>
GPL_INLINE Vf exp(Vf x) {
  const Vf lowest = fill(-87.33654f), magic = fill(12582912.0f);
  Vf c = larger(lowest, x);
  if (!kNotPositive) c = select(c > fill(88.8f), fill(88.8f), c);
  Vf t = fma(c, fill(1.44269504f), magic);  // x / ln 2, rounded to an integer in the low bits
  Vf n = t - magic;
  Vf r = fma(n, fill(2.12194440e-4f), fma(n, fill(-0.693359375f), c));
  Vf p = fma(r, fill(1.9875691500e-4f), fill(1.3981999507e-3f));
  p = fma(p, r, fill(8.3334519073e-3f));
  p = fma(p, r, fill(4.1665795894e-2f));
  p = fma(p, r, fill(1.6666665459e-1f));
  p = fma(p, r, fill(5.0000001201e-1f));
  p = fma(p * r, r, r) + fill(1.0f);
#if defined(GPL_AVX512)
  __mmask16 normal = _mm512_cmp_ps_mask(x.v[0], lowest.v[0], _CMP_NLT_UQ);
  p.v[0] = _mm512_maskz_scalef_ps(normal, p.v[0], n.v[0]);
  return p;
#else
  Vf scale = from_bits(shift_left(bits(t) + fill_i(127), 23));
  return select(x < lowest, fill(0.0f), p * scale);
#endif
}

// ln x for normal x > 0; NaN stays NaN.
GPL_INLINE Vf log(Vf x) {
  Vi u = bits(x) - fill_i(0x3f3504f3);  // centred on sqrt(1/2)
  Vi e = shift_right(u + fill_i(127 << 23), 23) - fill_i(127);
  Vf f = from_bits((u & fill_i(0x007fffff)) + fill_i(0x3f3504f3)) - fill(1.0f);
  Vf n = to_float(e), z = f * f;
  Vf p = fma(f, fill(7.0376836292e-2f), fill(-1.1514610310e-1f));
  p = fma(p, f, fill(1.1676998740e-1f));
  p = fma(p, f, fill(-1.2420140846e-1f));
  p = fma(p, f, fill(1.4249322787e-1f));
  p = fma(p, f, fill(-1.6668057665e-1f));
  p = fma(p, f, fill(2.0000714765e-1f));
  p = fma(p, f, fill(-2.4999993993e-1f));
  p = fma(p, f, fill(3.3333331174e-1f));
  p = fma(p * f, z, n * fill(-2.12194440e-4f));
  p = fma(z, fill(-0.5f), p);
  return select(x != x, x, fma(n, fill(0.693359375f), f + p));
}

// Sixteen values to an address that 16 of them divide, not through the cache.
GPL_INLINE void store_past_cache(float* p, Vf a) {
#if defined(GPL_AVX512)
  _mm512_stream_ps(p, a.v[0]);
#elif defined(GPL_AVX2)
  GPL_EACH_PART _mm256_stream_ps(p + i * kLanes, a.v[i]);
#else
  store(p, a);
#endif
}
template <class T>
GPL_INLINE void store_past_cache(T* p, Vf a) {
  const Vi h = narrow(T{}, a);
#if defined(GPL_AVX512)
  _mm256_stream_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)h.v[0]));
#elif defined(GPL_AVX2)
  GPL_EACH_PART {
    _mm_stream_si128((__m128i*)(p + i * kLanes),
                     (__m128i) __builtin_convertvector((NativeU)h.v[i], NativeH));
  }
#else
  store_u16(p, h);
#endif
}
GPL_INLINE void finish_past_cache() {
#if defined(GPL_AVX512) || defined(GPL_AVX2)
  _mm_sfence();
#endif
}

GPL_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
GPL_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
GPL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(T{}) with the storage type of `dtype`.
template <class F>
GPL_INLINE void with_dtype(DType dtype, const F& f) {
  if (dtype == DType::kFloat32) {
    f(float{});
  } else if (dtype == DType::kBFloat16) {
    f(BFloat16{});
  } else {
    f(Float16{});
  }
}

// Calls f(Z{}, T{}): T of `dtype`, Z of `z_dtype`, which is the same or float32.
template <class F>
GPL_INLINE void with_dtypes(DType z_dtype, DType dtype, const F& f) {
  with_dtype(dtype, [&](auto tag) {
    if (z_dtype == dtype) {
      f(tag, tag);
    } else {
      f(float{}, tag);
    }
  });
}

GPL_INLINE int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// f(begin, end) over [0, n), a call a thread; it gets 32768 elements or more of `cost` an item.
template <class F>
GPL_INLINE void parallel(int64_t n, int64_t cost, const F& f) {
  auto body = [](int64_t begin, int64_t end, void* ctx) { (*(const F*)ctx)(begin, end); };
  parallel_for(n, max_of(1, 32768 / max_of(cost, 1)), body, (void*)&f);
}

// The numbers from 0 to n - 1 for threads that ask for one after the other.
struct Items {
  int64_t n, taken;
  int64_t next() { return __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED); }  // n or more: the end
};

// f(Items&) in as many threads: for items of much work, since cores are not equally fast.
template <class F>
GPL_INLINE void share(int64_t n, int64_t cost, const F& f) {
  Items items = {n, 0};
  parallel(n, cost, [&](int64_t, int64_t) { f(items); });
}

}  // namespace GPL_CPU_NAMESPACE
}  // namespace gpl_fast
