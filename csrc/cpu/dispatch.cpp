// Which implementation runs: listed best first, chosen once.
#include <atomic>
#include <cstring>

#include "implementation.h"

namespace sleepkern {

namespace baseline {
extern const Implementation table;
}
#ifdef SLEEPKERN_X86
namespace avx2 {
extern const Implementation table;
}
namespace avx512 {
extern const Implementation table;
}
static const Implementation* const ALL[] = {&avx512::table, &avx2::table, &baseline::table};
#else
static const Implementation* const ALL[] = {&baseline::table};
#endif

static std::atomic<const Implementation*> in_use{nullptr};

int implementations(const Implementation** list, int capacity) {
  int n = 0;
  for (const Implementation* one : ALL) {
    if (n < capacity && one->supported()) list[n++] = one;
  }
  return n;
}

const Implementation& implementation() {
  const Implementation* chosen = in_use.load(std::memory_order_relaxed);
  if (!chosen) {
    implementations(&chosen, 1);
    in_use.store(chosen, std::memory_order_relaxed);
  }
  return *chosen;
}

bool set_implementation(const char* name) {
  for (const Implementation* one : ALL) {
    if (std::strcmp(one->name, name) == 0 && one->supported()) {
      in_use.store(one, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

void forward(const Problem& problem) {
  const int64_t heads = problem.sequences * problem.HV;
  const int64_t tokens = problem.offsets ? problem.T : problem.sequences * problem.T;
  // A share of work under about 20 microseconds costs more to hand out than to do: a token-head costs about 8 K V flop.
  const double flop = 8.0 * problem.K * problem.V * (tokens + 1) * problem.HV / heads;
  const int64_t grain = static_cast<int64_t>(1e6 / flop) + 1;
  struct Context {
    const Problem& problem;
    const Implementation& isa;
  } context{problem, implementation()};
  auto body = [](int64_t begin, int64_t end, void* c) {
    const Context& context = *static_cast<Context*>(c);
    context.isa.forward(context.problem, begin, end);
  };
  parallel_for(heads, grain, body, &context);
}

}  // namespace sleepkern
