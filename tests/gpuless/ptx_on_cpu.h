// The CPU's side of csrc/cuda/conv_block/ptx.cuh: mma.sync, ldmatrix, cp.async with their fragment
// layouts.
#pragma once

#include "cuda_on_cpu.h"

namespace cudacpu {

enum class Operand { kBFloat16, kFloat16, kTF32 };

template <Operand kOperand>
float half_of(uint32_t r, int h) {
  if constexpr (kOperand == Operand::kBFloat16) {
    return std::bit_cast<float>(h ? r & 0xffff0000u : r << 16);
  } else {
    return __half2float(__ushort_as_half((unsigned short)(h ? r >> 16 : r)));
  }
}

// The tensor core reads the upper 19 bits.
inline float tf32(uint32_t r) { return std::bit_cast<float>(r & 0xffffe000u); }

// D [rows, columns] += A [rows, depth] B [depth, columns]. No kernel's address comes here: nothing
// for a sanitizer, which would take most of its time for it.
[[gnu::noinline, gnu::optimize("O3"), gnu::no_sanitize("address", "undefined")]] inline void
multiply(float* __restrict__ D, const float* A, const float* B, int rows, int columns, int depth) {
  for (int i = 0; i < rows; ++i) {
    for (int k = 0; k < depth; ++k) {
      const float v = A[i * depth + k];
      for (int j = 0; j < columns; ++j) D[i * columns + j] += v * B[k * columns + j];
    }
  }
}

struct MmaArgument {
  float* d;
  const uint32_t *a, *b;
};

// MI x NJ mma's of one k step as one collective: m16n8k16 of 16-bit operands, m16n8k8 of TF32.
template <Operand kOperand, int MI, int NJ>
void mma_tile(float (&d)[MI][NJ][4], const uint32_t (&a)[MI][4], const uint32_t (&b)[NJ][2]) {
  constexpr bool kWide = kOperand == Operand::kTF32;
  constexpr int kDepth = kWide ? 8 : 16, kHalves = kWide ? 1 : 2;
  MmaArgument x{&d[0][0][0], &a[0][0], &b[0][0]};
  collective("mma", ~0u, x, [](void** s, uint32_t m) {
    if (m != ~0u) fail("mma with exited lanes");
    exec().counters.mma += MI * NJ;
    alignas(64) float A[MI * 16][kDepth], B[kDepth][NJ * 8], D[MI * 16][NJ * 8];
    auto value = [](uint32_t r, int h) {
      if constexpr (kWide) {
        return tf32(r);
      } else {
        return half_of<kOperand>(r, h);
      }
    };
    for (int l = 0; l < 32; ++l) {
      auto& q = *(MmaArgument*)s[l];
      const int g = l >> 2, t = (l & 3) * kHalves, col = (l & 3) * 2;
      for (int h = 0; h < kHalves; ++h) {
        for (int i = 0; i < MI * 4; ++i) {
          const int k = i & 3;
          A[i / 4 * 16 + g + (k & 1) * 8][t + (k >> 1) * kDepth / 2 + h] = value(q.a[i], h);
        }
        for (int j = 0; j < NJ * 2; ++j) {
          B[t + (j & 1) * kDepth / 2 + h][j / 2 * 8 + g] = value(q.b[j], h);
        }
      }
      for (int i = 0; i < MI; ++i) {
        for (int j = 0; j < NJ; ++j) {
          for (int k = 0; k < 4; ++k) {
            D[i * 16 + g + (k >> 1) * 8][j * 8 + col + (k & 1)] = q.d[(i * NJ + j) * 4 + k];
          }
        }
      }
    }
    multiply(&D[0][0], &A[0][0], &B[0][0], MI * 16, NJ * 8, kDepth);
    for (int l = 0; l < 32; ++l) {
      auto& q = *(MmaArgument*)s[l];
      const int g = l >> 2, col = (l & 3) * 2;
      for (int i = 0; i < MI; ++i) {
        for (int j = 0; j < NJ; ++j) {
          for (int k = 0; k < 4; ++k) {
            q.d[(i * NJ + j) * 4 + k] = D[i * 16 + g + (k >> 1) * 8][j * 8 + col + (k & 1)];
          }
        }
      }
    }
  });
}

struct LdmatrixArgument {
  uint32_t* r;
  const char* p;
};

template <int kCount, bool kTrans>
void ldmatrix(uint32_t* r, const void* p) {
  LdmatrixArgument x{r, (const char*)p};
  collective(kTrans ? "ldmatrix.trans" : "ldmatrix", ~0u, x, [](void** s, uint32_t m) {
    if (m != ~0u) fail("ldmatrix with exited lanes");
    exec().counters.ldmatrix += kCount;
    uint16_t M[kCount][8][8];
    for (int q = 0; q < kCount; ++q) {
      int hits[8] = {}, worst = 0;
      for (int i = 0; i < 8; ++i) {
        const char* row = ((LdmatrixArgument*)s[q * 8 + i])->p;
        if ((uintptr_t)row & 15) fail("ldmatrix: a row's address is not 16-byte aligned");
        std::memcpy(M[q][i], row, 16);
        worst = std::max(worst, ++hits[(uintptr_t)row >> 4 & 7]);
      }
      exec().counters.ldmatrix_phases += worst;
    }
    for (int l = 0; l < 32; ++l) {
      for (int q = 0; q < kCount; ++q) {
        const int i = l >> 2, j = (l & 3) * 2;
        const uint16_t lo = kTrans ? M[q][j][i] : M[q][i][j];
        const uint16_t hi = kTrans ? M[q][j + 1][i] : M[q][i][j + 1];
        ((LdmatrixArgument*)s[l])->r[q] = lo | uint32_t(hi) << 16;
      }
    }
  });
}

template <class T>
T load_shared(const void* p, int line = __builtin_LINE()) {
  shared_access(p, sizeof(T), line);
  return *(const T*)p;
}
template <class T>
void store_shared(void* p, const T& v, int line = __builtin_LINE()) {
  shared_access(p, sizeof(T), line);
  *(T*)p = v;
}

// Zeros where !read. The copy happens at the wait; until then the place holds NaN.
inline void cp_async16(void* dst, const void* src, bool read) {
  if (((uintptr_t)dst | (read ? (uintptr_t)src : 0)) & 15) {
    fail("cp.async: an address is not 16-byte aligned");
  }
  exec().counters.cp_async++;
  std::memset(dst, 0xFF, 16);
  me().copies.back().push_back({dst, read ? src : nullptr});
}
inline void cp_async_commit() { me().copies.emplace_back(); }

// All but the newest `keep` committed groups are complete.
inline void cp_async_wait(int keep) {
  auto& groups = me().copies;
  const int done = int(groups.size()) - 1 - keep;
  for (int i = 0; i < done; ++i) {
    for (const Copy& c : groups[i]) {
      if (c.src) {
        std::memcpy(c.dst, c.src, 16);
      } else {
        std::memset(c.dst, 0, 16);
      }
    }
  }
  if (done > 0) groups.erase(groups.begin(), groups.begin() + done);
}

}  // namespace cudacpu

namespace gpl_fast::cuda::ptx {

using cudacpu::load_shared;
using cudacpu::Operand;
using cudacpu::store_shared;

template <Operand kOperand, int MI, int NJ>
void mma_tile(float (&d)[MI][NJ][4], const uint32_t (&a)[MI][4], const uint32_t (&b)[NJ][2]) {
  cudacpu::mma_tile<kOperand, MI, NJ>(d, a, b);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* p) { cudacpu::ldmatrix<4, false>(r, p); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* p) { cudacpu::ldmatrix<4, true>(r, p); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* p) { cudacpu::ldmatrix<2, true>(r, p); }
inline void cp_async16(void* shared, const void* global, bool read) {
  cudacpu::cp_async16(shared, global, read);
}
inline void cp_async_commit() { cudacpu::cp_async_commit(); }
template <int kKeep>
void cp_async_wait() {
  cudacpu::cp_async_wait(kKeep);
}
// Round to nearest, ties away from zero.
inline uint32_t to_tf32(float x) { return (std::bit_cast<uint32_t>(x) + 0x1000u) & 0xffffe000u; }

}  // namespace gpl_fast::cuda::ptx
