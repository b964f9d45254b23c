// The CPU's side of csrc/cuda/conv_block/hopper.cuh. Descriptors are decoded bit by bit. TMA copies
// run when every thread polls a barrier, wgmma at its wait: as late as the program allows. Until
// then a copy's destination holds NaN, and wgmma's operands may still be overwritten.
#pragma once

#include <deque>

#include "ptx_on_cpu.h"

namespace cudacpu {

struct TensorMap {
  const char* base;
  uint64_t columns, rows, pitch;  // of 16-bit elements; pitch in bytes
  uint32_t box_columns, box_rows;
};

struct TmaCopy {
  char* dst;
  TensorMap map;
  int column, row;
  uint64_t* barrier;
};

struct Wgmma {
  float* d[32];
  const uint32_t* a[32];
  uint64_t b;
  int n;
  bool bfloat16;
};

struct Async {
  std::deque<TmaCopy> copies;
  std::vector<std::vector<std::deque<Wgmma>>> groups;  // for each warp, the last one open
  long spins = 0;
  uint64_t block = 0;
};

// Of the block that this host thread runs.
inline Async& async() {
  Exec& e = exec();
  if (!e.hopper || ((Async*)e.hopper.get())->block != e.block) {
    auto a = std::make_shared<Async>();
    a->groups.assign(e.warps.size(), std::vector<std::deque<Wgmma>>(1));
    a->block = e.block;
    e.hopper = a;
  }
  return *(Async*)e.hopper.get();
}

struct MBarrier {
  uint32_t expected : 12, pending : 12, phase : 1;
  int32_t bytes;
};
static_assert(sizeof(MBarrier) == 8);

inline void settle(MBarrier& b) {
  async().spins = 0;
  if (b.pending == 0 && b.bytes == 0) {
    b.phase ^= 1;
    b.pending = b.expected;
  }
}

// The 128-byte swizzle works on addresses.
inline char* swizzled(char* p) {
  uintptr_t o = p - exec().smem;
  return exec().smem + (o ^ (o >> 7 & 7) << 4);
}

inline void run(const TmaCopy& o) {
  const TensorMap& m = o.map;
  for (uint32_t r = 0; r < m.box_rows; ++r) {
    for (uint32_t c = 0; c < m.box_columns; ++c) {
      const int64_t row = o.row + int64_t(r), column = o.column + int64_t(c);
      const bool inside =
          row >= 0 && row < (int64_t)m.rows && column >= 0 && column < (int64_t)m.columns;
      uint16_t v = 0;
      if (inside) std::memcpy(&v, m.base + row * m.pitch + column * 2, 2);
      std::memcpy(swizzled(o.dst + (r * m.box_columns + c) * 2), &v, 2);
    }
  }
  MBarrier& b = *(MBarrier*)o.barrier;
  b.bytes -= int(m.box_rows * m.box_columns * 2);
  settle(b);
}

inline void poll() {
  Async& a = async();
  if (++a.spins > 2 * exec().threads) {
    if (a.copies.empty()) fail("deadlock: every running thread polls an mbarrier");
    const size_t k = exec().order >= 2 ? exec().random() % a.copies.size() : 0;
    const TmaCopy o = a.copies[k];
    a.copies.erase(a.copies.begin() + k);
    run(o);
  }
  run_next(true);
}

inline float operand(uint16_t v, bool bfloat16) {
  return bfloat16 ? half_of<Operand::kBFloat16>(v, 0) : half_of<Operand::kFloat16>(v, 0);
}

// One warp's 16 rows of m64nNk16, a in registers, b of N columns in slabs of 64 (MN-major).
inline void run(const Wgmma& o) {
  if (o.b >> 62 != 1) fail("wgmma: only the 128-byte swizzle is emulated");
  const uint32_t start = uint32_t(o.b & 0x3fff) << 4, lead = uint32_t(o.b >> 16 & 0x3fff) << 4;
  const uint32_t stride = uint32_t(o.b >> 32 & 0x3fff) << 4;
  const int columns = o.n;
  float a[16][16], b[16 * 256], d[16 * 256];
  for (int l = 0; l < 32; ++l) {
    for (int k = 0; k < 4; ++k) {
      for (int h = 0; h < 2; ++h) {
        const uint16_t v = uint16_t(o.a[l][k] >> (16 * h));
        a[(l >> 2) + (k & 1) * 8][(l & 3) * 2 + (k >> 1) * 8 + h] = operand(v, o.bfloat16);
      }
    }
    for (int j = 0; j < columns / 8; ++j) {
      for (int h = 0; h < 4; ++h) {
        d[((l >> 2) + (h >> 1) * 8) * columns + j * 8 + (l & 3) * 2 + (h & 1)] = o.d[l][j * 4 + h];
      }
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < columns; n += 8) {  // the swizzle leaves 16 bytes together
      char* p = exec().smem + start + n / 64 * lead + n % 64 * 2 + k % 8 * 128 + k / 8 * stride;
      uint16_t v[8];
      std::memcpy(v, swizzled(p), 16);
      for (int j = 0; j < 8; ++j) b[k * columns + n + j] = operand(v[j], o.bfloat16);
    }
  }
  multiply(d, &a[0][0], b, 16, columns, 16);
  for (int l = 0; l < 32; ++l) {
    for (int j = 0; j < columns / 8; ++j) {
      for (int h = 0; h < 4; ++h) {
        o.d[l][j * 4 + h] = d[((l >> 2) + (h >> 1) * 8) * columns + j * 8 + (l & 3) * 2 + (h & 1)];
      }
    }
  }
}

}  // namespace cudacpu

#define GRID_CONSTANT const

namespace gpl_fast::cuda {

using cudacpu::TensorMap;

inline TensorMap tensor_map(const void* p, bool, int64_t rows, int64_t columns, int box_rows,
                            int box_columns) {
  if (box_rows > 256 || box_columns * 2 > 128 || columns * 2 % 16 || (uintptr_t)p % 16) {
    throw std::runtime_error("cuda_on_cpu: bad tensor map");
  }
  return {(const char*)p,        (uint64_t)columns,     (uint64_t)rows,
          (uint64_t)columns * 2, (uint32_t)box_columns, (uint32_t)box_rows};
}

namespace ptx {

using cudacpu::async;
using cudacpu::collective;
using cudacpu::exec;
using cudacpu::fail;
using cudacpu::MBarrier;
using cudacpu::me;

inline void mbarrier_init(uint64_t* b, int count) {
  MBarrier m{};
  m.expected = m.pending = count;
  std::memcpy(b, &m, 8);
}
inline void mbarrier_arrive(uint64_t* b) {
  MBarrier& m = *(MBarrier*)b;
  if (m.pending == 0) fail("mbarrier: more arrivals than it counts");
  m.pending--;
  cudacpu::settle(m);
}
inline void mbarrier_expect(uint64_t* b, int bytes) {
  ((MBarrier*)b)->bytes += bytes;
  mbarrier_arrive(b);
}
inline void mbarrier_wait(uint64_t* b, int parity) {
  while (int(((MBarrier*)b)->phase) == parity) cudacpu::poll();
  async().spins = 0;
}
inline void fence_mbarrier_init() {}
inline void tma_load(void* dst, const TensorMap* map, uint64_t* barrier, int column, int row) {
  if ((uintptr_t)dst & 127) fail("TMA: the destination is not 128-byte aligned");
  std::memset(dst, 0xFF, map->box_rows * map->box_columns * 2);
  async().copies.push_back({(char*)dst, *map, column, row, barrier});
  exec().counters.tma++;
}
inline uint64_t wgmma_descriptor(const void* p, uint32_t lead, uint32_t stride) {
  const uint64_t at = (const char*)p - exec().smem;
  if (at >> 18) fail("wgmma: an operand outside of dynamic shared memory");
  return at >> 4 | uint64_t(lead >> 4) << 16 | uint64_t(stride >> 4) << 32 | 1ull << 62;
}
inline void wgmma_fence() {}
template <bool kBFloat16, int N>
void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  struct Argument {
    float* d;
    const uint32_t* a;
    uint64_t b;
  } x{d, a, b};
  collective("wgmma", ~0u, x, [](void** s, uint32_t) {
    cudacpu::Wgmma o{};
    o.b = ((Argument*)s[0])->b, o.n = N, o.bfloat16 = kBFloat16;
    for (int l = 0; l < 32; ++l) {
      auto& q = *(Argument*)s[l];
      if (q.b != o.b) fail("wgmma: descriptors differ within a warp");
      o.d[l] = q.d, o.a[l] = q.a;
    }
    async().groups[me().warp].back().push_back(o);
    exec().counters.mma += N / 8;
  });
}
inline void wgmma_commit() {
  int none = 0;
  collective("wgmma.commit", ~0u, none,
             [](void**, uint32_t) { async().groups[me().warp].emplace_back(); });
}
template <int kKeep>
void wgmma_wait() {
  int none = 0;
  collective("wgmma.wait", ~0u, none, [](void**, uint32_t) {
    auto& groups = async().groups[me().warp];
    while ((int)groups.size() - 1 > kKeep) {
      for (auto& o : groups[0]) cudacpu::run(o);
      groups.erase(groups.begin());
    }
  });
}
// The products in flight read and write these behind the compiler's back.
template <int N>
void keep_in_place(float (&d)[N]) {
  asm volatile("" ::"r"(&d[0]) : "memory");
}
template <int N>
void registers_give() {}
template <int N>
void registers_take() {}

}  // namespace ptx
}  // namespace gpl_fast::cuda
