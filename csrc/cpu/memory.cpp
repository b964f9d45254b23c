// Fresh memory, before it is written in an order that the system's page faults do not like, and the
// error where there is none.
#include "../stages.h"

#include <stdexcept>
#include <string>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace gpl_fast {
namespace cpu {

#if defined(__linux__)
namespace {

constexpr int kPopulateWrite = 23;   // MADV_POPULATE_WRITE of Linux 5.14, newer than many headers
constexpr int64_t kPiece = 4 << 20;  // bytes that a thread maps at a time; less is not worth a call

struct Range {
  uintptr_t begin, end;
};

}  // namespace

void populate(void* data, int64_t bytes) {
  if (bytes < kPiece) return;
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  Range range = {((uintptr_t)data + page - 1) / page * page,
                 ((uintptr_t)data + (uintptr_t)bytes) / page * page};
  auto body = [](int64_t begin, int64_t end, void* ctx) {
    const Range& all = *(const Range*)ctx;
    const uintptr_t first = all.begin + (uintptr_t)(begin * kPiece);
    const uintptr_t last = all.begin + (uintptr_t)(end * kPiece);
    // Where the system does not know it, the pages come as they are written.
    (void)madvise((void*)first, (last < all.end ? last : all.end) - first, kPopulateWrite);
  };
  const int64_t pieces = ((int64_t)(range.end - range.begin) + kPiece - 1) / kPiece;
  parallel_for(pieces, 1, body, &range);
}
#else
void populate(void*, int64_t) {}
#endif

void out_of_memory(int64_t bytes) {
  throw std::runtime_error(
      "gpl_fast: out of memory: " + std::to_string(bytes) +
      " bytes for the scratch memory of a thread could not be allocated; "
      "expected as much as a row of pixels with all their channels takes: free "
      "memory, or use fewer threads (torch.set_num_threads)");
}

}  // namespace cpu
}  // namespace gpl_fast
