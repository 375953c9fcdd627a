// A stack of blocks over a batch of windows: the groups of sequences, and the threads' shares.
#include "common/blocks.h"

#include <algorithm>
#include <vector>

#include "cpu/runtime/implementation.h"
#include "cpu/runtime/thread_pool.h"

namespace sleepkern {

// The rows that go through all layers together; each weight that is loaded is used for all of them. At d = 256 their h
// takes 200 KB and the widest product (4 d) 800 KB, which stay in L2. At d = 512 the latter passes through L3, which
// costs less than using half as many rows.
constexpr int64_t GROUP_ROWS = 192;

void sleep_blocks(const Blocks& call) {
  const Implementation& isa = implementation();
  const int64_t threads = std::max<int64_t>(thread_count(), 1), fit = std::max<int64_t>(GROUP_ROWS / call.L, 1);
  // The number of groups is a multiple of the threads, so that all threads are busy to the end. If there are fewer
  // groups than threads, the threads share the steps of each group.
  int64_t groups = (call.B + fit - 1) / fit;
  groups = std::min(call.B, (groups + threads - 1) / threads * threads);
  const bool shared = groups < threads;
  std::vector<double> changes(groups * call.passes * 2);
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = call.B * group / groups, after = call.B * (group + 1) / groups;
      isa.run_group(call, first, after - first, shared, changes.data() + group * call.passes * 2);
    }
  };
  using Run = decltype(run);
  if (shared) {
    run(0, groups);
  } else {
    parallel_for(
        groups, 1, [](int64_t begin, int64_t end, void* self) { (*static_cast<Run*>(self))(begin, end); }, &run);
  }
  std::fill(call.changes, call.changes + call.passes * 2, 0.0);
  for (size_t i = 0; i < changes.size(); ++i) call.changes[i % (call.passes * 2)] += changes[i];
}

int64_t panel_width() { return implementation().panel_width; }

bool multiplies_bf16() { return implementation().bf16; }

bool adds_beside_products() { return implementation().adders(); }

int64_t packed_size(int64_t n, int64_t depth, Form form) { return implementation().packed_size(n, depth, form); }

void pack_weight(const float* matrix, int64_t n, int64_t depth, Form form, void* packed) {
  implementation().pack_weight(matrix, n, depth, form, packed);
}

}  // namespace sleepkern
