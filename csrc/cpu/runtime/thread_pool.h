// The threads that share the work of a call.
#pragma once

#include <cstdint>

namespace sleepkern {

// Calls body(begin, end, context) on ranges of [0, n) on torch's threads, as many as torch.set_num_threads set.
void parallel_for(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
const char* thread_source();
int64_t thread_count();

}  // namespace sleepkern
