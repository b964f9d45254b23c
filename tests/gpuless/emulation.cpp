// The GPU that the emulation plays, and what it counted, for Python's ctypes.
#include "cuda_on_cpu.h"

extern "C" {

// The GPU's compute capability and KiB of shared memory.
void play(int capability, size_t shared_kib) {
  cudacpu::played_capability = capability;
  cudacpu::shared_limit = shared_kib << 10;
}

// Whether accesses to shared memory are counted, which takes a while.
void count_shared(bool on) { cudacpu::counts_shared = on; }

// Of the last launch, in the order of operators.py's COUNTERS.
void counters(uint64_t* out) {
  const cudacpu::Counters& t = cudacpu::total;
  for (uint64_t count : {t.mma, t.ldmatrix, t.ldmatrix_phases, t.cp_async, t.tma, t.barriers,
                         t.shared, t.shared_phases, uint64_t(cudacpu::dynamic_shared)}) {
    *out++ = count;
  }
}
}
