// Huge pages, where the system grants them, save page faults on first touch and TLB misses later.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace sleepkern {

constexpr int64_t HUGE_PAGE = int64_t{1} << 21;

// Requests huge pages for memory that is about to be written whole. The first touch of 64 MB in small pages takes as
// long as a third of the forward that fills it. This is advice only: pages that are already mapped stay as they are.
static inline void prefer_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const int64_t whole = (static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory) - first) + bytes) / HUGE_PAGE;
  if (memory && whole > 0) madvise(reinterpret_cast<void*>(first), whole * HUGE_PAGE, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace sleepkern
