// The threads are torch's. Its pool is reached through a C symbol that torch >= 2.10 exports, which is looked up in the
// process and not linked. So torch.set_num_threads applies here too, and no second pool competes for the cores. Without
// that symbol OpenMP runs the loop; its run-time library is torch's if torch is imported first.
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <exception>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/runtime/thread_pool.h"

namespace sleepkern {

using Body = void (*)(int64_t, int64_t, void*);
using TorchParallelFor = int32_t (*)(int64_t, int64_t, int64_t, Body, void*);

static void* torch_symbol(const char* name) {
  void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_NOW);
  return library ? dlsym(library, name) : nullptr;
}

static TorchParallelFor torch_parallel_for() {
  static const auto found = reinterpret_cast<TorchParallelFor>(torch_symbol("torch_parallel_for"));
  return found;
}

const char* thread_source() {
  if (torch_parallel_for()) return "torch";
#ifdef _OPENMP
  return "openmp";
#else
  return "none";
#endif
}

int64_t thread_count() {
  using Count = int32_t (*)(uint32_t*);
  static const auto torch_count = reinterpret_cast<Count>(torch_symbol("torch_get_num_threads"));
  uint32_t threads = 0;
  if (torch_parallel_for() && torch_count && torch_count(&threads) == 0) return threads;
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

static void run_on_openmp(int64_t n, int64_t grain, Body body, void* context) {
#ifdef _OPENMP
  const int64_t shares = std::min<int64_t>(omp_get_max_threads(), (n + grain - 1) / grain);
#pragma omp parallel for num_threads(shares) schedule(static, 1)
  for (int64_t s = 0; s < shares; ++s) body(n * s / shares, n * (s + 1) / shares, context);
#else
  (void)grain;
  body(0, n, context);
#endif
}

// An exception must not cross a C frame or an OpenMP region. So the first one is kept, and parallel_for throws it.
struct Guarded {
  Body body;
  void* context;
  std::exception_ptr error;
  std::atomic<bool> failed{false};

  static void run(int64_t begin, int64_t end, void* self) {
    Guarded& g = *static_cast<Guarded*>(self);
    try {
      g.body(begin, end, g.context);
    } catch (...) {
      if (!g.failed.exchange(true)) g.error = std::current_exception();
    }
  }
};

void parallel_for(int64_t n, int64_t grain, Body body, void* context) {
  if (n <= grain) return body(0, n, context);
  Guarded guarded{body, context, nullptr};
  if (TorchParallelFor on_torch = torch_parallel_for()) {
    on_torch(0, n, grain, Guarded::run, &guarded);
  } else {
    run_on_openmp(n, grain, Guarded::run, &guarded);
  }
  if (guarded.error) std::rethrow_exception(guarded.error);
}

}  // namespace sleepkern
