// The CPU's side of csrc/cuda/conv_block/hopper.cuh. Descriptors are decoded bit by bit. TMA copies
// run when every thread polls a barrier, wgmma at its wait: as late as the program allows. Until
// then a copy's destination holds NaN, and wgmma's operands may still be overwritten.
#pragma once

#include <deque>

#include "ptx_on_cpu.h"

namespace cudacpu {

constexpr int kMapDims = 4;

struct TensorMap {  // the dimensions from the innermost on
  const char* base;
  int64_t size[kMapDims], pitch[kMapDims];  // of 16-bit elements; in bytes
  int box[kMapDims];

  int bytes() const { return box[0] * box[1] * box[2] * box[3] * 2; }
};

struct TmaCopy {
  char* dst;
  TensorMap map;
  std::array<int, kMapDims> at;
  uint64_t* barrier;
};

struct Wgmma {
  float* d[32];
  const uint32_t* a[32];  // null: of shared memory, by its descriptor
  uint64_t a_shared, b;
  int n, row;  // row: of the warp's first
  bool bfloat16;
};

struct Async {
  std::deque<TmaCopy> copies;
  std::vector<std::vector<std::deque<Wgmma>>> groups;  // for each warp, the last one open
  long spins = 0;                                      // since anything came further
  uint64_t progress = 0;                               // the Exec's, at the last poll
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
  for (int i = 0; i < m.bytes() / 2; ++i) {
    const char* from = m.base;
    bool inside = true;
    for (int k = 0, rest = i; k < kMapDims; rest /= m.box[k++]) {
      const int64_t at = o.at[k] + rest % m.box[k];
      inside = inside && at >= 0 && at < m.size[k];
      from += at * m.pitch[k];
    }
    uint16_t v = 0;
    if (inside) std::memcpy(&v, from, 2);
    std::memcpy(swizzled(o.dst + i * 2), &v, 2);
  }
  MBarrier& b = *(MBarrier*)o.barrier;
  b.bytes -= m.bytes();
  settle(b);
}

inline void poll() {
  Async& a = async();
  if (a.progress != exec().progress) a.progress = exec().progress, a.spins = 0;
  // In a random order the one thread that would go on may be long in coming.
  const long enough = (a.copies.empty() && exec().order >= 2 ? 64 : 2) * exec().threads;
  if (++a.spins > enough) {
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

// An operand in shared memory by its descriptor, all with the 128-byte swizzle.
struct Operand16 {
  uint32_t start, lead, stride;

  explicit Operand16(uint64_t d)
      : start(uint32_t(d & 0x3fff) << 4),
        lead(uint32_t(d >> 16 & 0x3fff) << 4),
        stride(uint32_t(d >> 32 & 0x3fff) << 4) {
    if (d >> 62 != 1) fail("wgmma: only the 128-byte swizzle is emulated");
    if (stride % 1024) fail("wgmma: eight rows of 128 bytes are no whole swizzle");
  }
  // Eight elements that the swizzle leaves together: from (m, k) on along m, in slabs of 64; from
  // (m, k) on along k.
  const uint16_t* along_m(int m, int k) const {
    return at(start + m / 64 * lead + m % 64 * 2 + k % 8 * 128 + k / 8 * stride);
  }
  const uint16_t* along_k(int m, int k) const {
    return at(start + m / 8 * stride + m % 8 * 128 + k * 2);
  }

 private:
  static const uint16_t* at(uint32_t offset) {
    if (offset + 16 > exec().smem_bytes) fail("wgmma: an operand outside of shared memory");
    return (const uint16_t*)swizzled(exec().smem + offset);
  }
};

// One warp's 16 rows of m64nNk16. a in registers: b's columns contiguous, in slabs of 64; a in
// shared memory: its rows contiguous, and b's along k.
inline void run(const Wgmma& o) {
  const Operand16 of_b(o.b);
  const int columns = o.n;
  float a[16][16], b[16 * 256], d[16 * 256];
  for (int l = 0; l < 32; ++l) {
    for (int k = 0; k < 4 && !o.a_shared; ++k) {
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
  for (int k = 0; k < 16 && o.a_shared; ++k) {
    for (int m = 0; m < 16; m += 8) {
      const uint16_t* v = Operand16(o.a_shared).along_m(o.row + m, k);
      for (int j = 0; j < 8; ++j) a[m + j][k] = operand(v[j], o.bfloat16);
    }
  }
  for (int n = 0; n < columns && o.a_shared; ++n) {
    for (int k = 0; k < 16; k += 8) {
      const uint16_t* v = of_b.along_k(n, k);
      for (int j = 0; j < 8; ++j) b[(k + j) * columns + n] = operand(v[j], o.bfloat16);
    }
  }
  for (int k = 0; k < 16 && !o.a_shared; ++k) {
    for (int n = 0; n < columns; n += 8) {
      const uint16_t* v = of_b.along_m(n, k);
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

template <class Kernel>
bool compiled_for_sm90a(Kernel) {
  return true;
}

inline TensorMap checked(const TensorMap& m) {
  bool good = m.box[0] * 2 <= 128 && (uintptr_t)m.base % 16 == 0;
  for (int k = 0; k < cudacpu::kMapDims; ++k) {
    good = good && m.box[k] <= 256 && m.size[k] > 0 && (k == 0 || m.pitch[k] % 16 == 0);
  }
  if (!good) throw std::runtime_error("cuda_on_cpu: bad tensor map");
  return m;
}
inline TensorMap tensor_map(const void* p, bool, int64_t rows, int64_t columns, int box_rows,
                            int box_columns) {
  return checked(
      {(const char*)p, {columns, rows, 1, 1}, {2, columns * 2}, {box_columns, box_rows, 1, 1}});
}
inline TensorMap tensor_map(const void* p, bool, const MapShape& s, int box_h, int box_w,
                            int box_c) {
  return checked({(const char*)p,
                  {s.c, s.w, s.h, s.n},
                  {2, s.c * 2, s.w * s.c * 2, s.image_stride * 2},
                  {box_c, box_w, box_h, 1}});
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
inline void tma_load(void* dst, const TensorMap* map, uint64_t* barrier,
                     std::array<int, cudacpu::kMapDims> at) {
  if ((uintptr_t)dst & 127) fail("TMA: the destination is not 128-byte aligned");
  std::memset(dst, 0xFF, map->bytes());
  async().copies.push_back({(char*)dst, *map, at, barrier});
  exec().counters.tma++;
}
inline void tma_load(void* dst, const TensorMap* map, uint64_t* barrier, int column, int row) {
  tma_load(dst, map, barrier, {column, row, 0, 0});
}
inline void tma_load(void* dst, const TensorMap* map, uint64_t* barrier, int c, int w, int h,
                     int n) {
  tma_load(dst, map, barrier, {c, w, h, n});
}
inline uint64_t wgmma_descriptor(const void* p, uint32_t lead, uint32_t stride) {
  const uint64_t at = (const char*)p - exec().smem;
  if (at >> 18) fail("wgmma: an operand outside of dynamic shared memory");
  return at >> 4 | uint64_t(lead >> 4) << 16 | uint64_t(stride >> 4) << 32 | 1ull << 62;
}
inline void wgmma_fence() {}
struct WgmmaArgument {
  float* d;
  const uint32_t* a;
  uint64_t a_shared, b;
};
template <bool kBFloat16, int N>
void wgmma(WgmmaArgument x) {
  collective("wgmma", ~0u, x, [](void** s, uint32_t) {
    const auto& first = *(WgmmaArgument*)s[0];
    cudacpu::Wgmma o{};
    o.a_shared = first.a_shared, o.b = first.b, o.n = N, o.row = me().warp % 4 * 16;
    o.bfloat16 = kBFloat16;
    for (int l = 0; l < 32; ++l) {
      auto& q = *(WgmmaArgument*)s[l];
      if (q.b != o.b || q.a_shared != o.a_shared) fail("wgmma: descriptors differ within a warp");
      o.d[l] = q.d, o.a[l] = q.a;
    }
    async().groups[me().warp].back().push_back(o);
    exec().counters.mma += N / 8;
  });
}
template <bool kBFloat16, int N>
void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  wgmma<kBFloat16, N>({d, a, 0, b});
}
template <bool kBFloat16, int N>
void wgmma_shared(float (&d)[N / 2], uint64_t a, uint64_t b) {
  wgmma<kBFloat16, N>({d, nullptr, a, b});
}
inline void barrier_sync(int id, int threads) { cudacpu::barrier(id, threads); }
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
