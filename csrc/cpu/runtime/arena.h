// Memory of one thread, in which a stage lays out its arrays. It is kept for the next call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/runtime/huge_pages.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// Hands out arrays from one piece of memory, each on its own cache line. Without memory it only counts.
struct ArenaCursor {
  float* memory;
  int64_t used = 0;

  float* operator()(int64_t n) {
    float* here = memory && n ? memory + used : nullptr;
    used += round_up(n, 16);
    return here;
  }
};

// Allocates huge pages where the system grants them. A stage that streams them does not miss the TLB, and its speed
// does not depend on where small pages fall in L2.
static float* allocate(int64_t floats) {
  const int64_t bytes = round_up(floats * static_cast<int64_t>(sizeof(float)), HUGE_PAGE);
  void* memory = std::aligned_alloc(HUGE_PAGE, bytes);
  if (!memory) throw std::bad_alloc();
  prefer_huge_pages(memory, bytes);
  return static_cast<float*>(memory);
}

// The T of this thread, laid out by lay_out(T&, args..., ArenaCursor&). Its memory grows to the largest problem so far
// and is kept for the next call.
template <class T, class... Args>
static T& thread_local_arrays(const Args&... args) {
  struct Owner {
    T arrays{};
    float* memory = nullptr;
    int64_t capacity = 0;
    ~Owner() { std::free(memory); }
  };
  static thread_local Owner owner;
  ArenaCursor count{nullptr};
  lay_out(owner.arrays, args..., count);
  if (count.used > owner.capacity) {
    std::free(owner.memory);
    owner.memory = nullptr;
    owner.capacity = 0;
    owner.memory = allocate(count.used);
    owner.capacity = count.used;
  }
  ArenaCursor take{owner.memory};
  lay_out(owner.arrays, args..., take);
  return owner.arrays;
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
