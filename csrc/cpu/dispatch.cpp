// Picks, once a process, the widest build of the kernels that this machine can run.
#include <cstdlib>
#include <cstring>
#ifdef GPL_FAST_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../stages.h"

namespace gpl_fast {

#define GPL_FAST_DECLARE(stage, Args) void stage(const Args& args);
namespace cpu_default {
GPL_FAST_STAGES(GPL_FAST_DECLARE)
}
#ifdef GPL_FAST_X86
namespace cpu_avx2 {
GPL_FAST_STAGES(GPL_FAST_DECLARE)
}
namespace cpu_avx512 {
GPL_FAST_STAGES(GPL_FAST_DECLARE)
}
#endif
#undef GPL_FAST_DECLARE

namespace cpu {
namespace {

enum class Capability { kDefault, kAvx2, kAvx512 };

// GPL_FAST_CPU_CAPABILITY=default|avx2|avx512 lowers it, for tests.
Capability detect() {
  Capability found = Capability::kDefault;
#ifdef GPL_FAST_X86
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2")) {
    found = Capability::kAvx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512cd")) {
      found = Capability::kAvx512;
    }
  }
#endif
  const char* cap = std::getenv("GPL_FAST_CPU_CAPABILITY");
  if (cap && !std::strcmp(cap, "default")) return Capability::kDefault;
  if (cap && !std::strcmp(cap, "avx2") && found > Capability::kAvx2) return Capability::kAvx2;
  return found;
}

Capability current() {
  static const Capability capability = detect();
  return capability;
}

#ifdef GPL_FAST_X86
struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  Registers(unsigned leaf, unsigned subleaf) {
    __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx);  // leaves zeros where there is none
  }
};

// AMX's tiles are usable where the system saves them, bits 17 and 18 of XCR0, and gives them to a
// process that asks.
bool has_tiles() {
#if defined(GPL_FAST_BF16) && defined(__linux__)
  const bool os_xsave = Registers(1, 0).ecx >> 27 & 1, tiles = Registers(7, 0).edx >> 24 & 1;
  if (!os_xsave || !tiles) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return (low >> 17 & 3) == 3 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// vdpbf16ps does twice the work of a fused multiply-add; Intel's CPUs do it at half the rate.
Bfloat16Unit detect_bfloat16() {
  const bool amx_bf16 = Registers(7, 0).edx >> 22 & 1, pairs = Registers(7, 1).eax >> 5 & 1;
  if (current() != Capability::kAvx512) return Bfloat16Unit::kNone;
  if (amx_bf16 && has_tiles()) return Bfloat16Unit::kMatrix;
#ifdef GPL_FAST_BF16
  if (pairs && __builtin_cpu_is("amd")) return Bfloat16Unit::kPairs;
#endif
  return Bfloat16Unit::kNone;
}
#endif

}  // namespace

Bfloat16Unit bfloat16_unit() {
#ifdef GPL_FAST_X86
  static const Bfloat16Unit found = detect_bfloat16();
  return found;
#else
  return Bfloat16Unit::kNone;
#endif
}

const char* capability() {
  const char* const names[] = {"default", "avx2", "avx512"};
  return names[(int)current()];
}

#ifdef GPL_FAST_X86
#define GPL_FAST_FORWARD(stage, Args)                                     \
  void stage(const Args& args) {                                          \
    if (current() == Capability::kAvx512) return cpu_avx512::stage(args); \
    if (current() == Capability::kAvx2) return cpu_avx2::stage(args);     \
    return cpu_default::stage(args);                                      \
  }
#else
#define GPL_FAST_FORWARD(stage, Args) \
  void stage(const Args& args) { return cpu_default::stage(args); }
#endif
GPL_FAST_STAGES(GPL_FAST_FORWARD)
#undef GPL_FAST_FORWARD

}  // namespace cpu
}  // namespace gpl_fast
