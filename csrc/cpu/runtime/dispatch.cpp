// The choice of an implementation: the list has the best first, and the choice is made once.
#include <atomic>
#include <cstring>

#include "cpu/runtime/huge_pages.h"
#include "cpu/runtime/implementation.h"
#include "cpu/runtime/thread_pool.h"

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
namespace avx512bf16 {
extern const Implementation table;
}
static const Implementation* const ALL[] = {&avx512bf16::table, &avx512::table, &avx2::table, &baseline::table};
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

// Calls run(begin, end) on ranges of tasks of equal work, on several threads; a value head costs `flop_per_token` a
// token. Work of less than about 20 microseconds costs more to hand out than to do.
template <class Run>
static void over_tasks(const Problem& problem, int64_t tasks, double flop_per_token, Run run) {
  const int64_t tokens = problem.offsets ? problem.T : problem.sequences * problem.T;
  const double flop = flop_per_token * problem.HV * (tokens + 1) / tasks;
  const int64_t grain = static_cast<int64_t>(1e6 / flop) + 1;
  auto body = [](int64_t begin, int64_t end, void* run) { (*static_cast<Run*>(run))(begin, end); };
  parallel_for(tasks, grain, body, &run);
}

static void huge_pages_for_output(const Problem& p, void* output, int64_t elements_per_token, Type type) {
  const int64_t tokens = p.offsets ? p.T : p.sequences * p.T;
  prefer_huge_pages(output, tokens * elements_per_token * (type == Type::float32 ? 4 : 2));
}

static void huge_pages_for_states(const Problem& p, int64_t count, float* states) {
  prefer_huge_pages(states, count * p.HV * p.K * p.V * static_cast<int64_t>(sizeof(float)));
}

void forward(const Problem& p) {
  if (p.sequences == 0) return;
  const Implementation& isa = implementation();
  huge_pages_for_output(p, p.o, p.HV * p.V, p.v.type);
  huge_pages_for_states(p, p.sequences, p.final_state);
  if (p.kept) huge_pages_for_states(p, p.kept->before(p.sequences, p.T), p.kept->states);
  // With fewer heads than threads a head is cut into v-tiles. Each v-tile computes the chunk factors again, an eighth
  // of the work at K = V = 128.
  const int64_t heads = p.sequences * p.HV, threads = thread_count();
  const int64_t v_tiles = heads < threads && p.longest() > DECODE_LIMIT ? (threads + heads - 1) / heads : 1;
  over_tasks(p, heads * v_tiles, 8.0 * p.K * p.V,
             [&](int64_t begin, int64_t end) { isa.forward(p, v_tiles, begin, end); });
}

void backward(const Problem& p, const Gradients& out) {
  if (p.sequences == 0) return;
  const Implementation& isa = implementation();
  huge_pages_for_output(p, out.dq, p.H * p.K, out.key_type);
  huge_pages_for_output(p, out.dk, p.H * p.K, out.key_type);
  huge_pages_for_output(p, out.dv, p.HV * p.V, p.v.type);
  huge_pages_for_states(p, p.sequences, out.dstate);
  if (p.gate == Gate::channel) huge_pages_for_output(p, out.dg, p.HV * p.K, p.g.type);
  over_tasks(p, p.sequences * p.H, 20.0 * p.K * p.V,
             [&](int64_t begin, int64_t end) { isa.backward(p, out, begin, end); });
}

void decode(const Problem& p, const DecodeStates& states) {
  if (p.sequences == 0) return;
  const Implementation& isa = implementation();
  over_tasks(p, p.sequences * p.HV, 8.0 * p.K * p.V,
             [&](int64_t begin, int64_t end) { isa.decode(p, states, begin, end); });
}

void replay(const Problem& p, const Replay& r) {
  if (p.sequences == 0) return;
  const Implementation& isa = implementation();
  huge_pages_for_states(p, p.sequences, p.final_state);
  over_tasks(p, p.sequences * p.HV, 4.0 * p.K * p.V * r.passes,
             [&](int64_t begin, int64_t end) { isa.replay(p, r, begin, end); });
}

}  // namespace sleepkern
