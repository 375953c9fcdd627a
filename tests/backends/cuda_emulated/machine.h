// Runs the threads of a cluster of blocks as fibers on one CPU thread; cuda_on_cpu.h says what for.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <unordered_map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace cuda_on_cpu {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
enum class Order { forward, backward, random };

struct Options {
  Order order = Order::forward;
  unsigned seed = 0;
  int capability = 90;  // from 90 on copies are made by one thread
  bool early_copies = false;
};
inline Options options;

struct Fiber;
struct Gathering {  // fibers that wait for each other
  int expected = 0;
  std::vector<Fiber*> waiting;
};
struct Exchange {  // of a warp: each lane leaves words, the last one to come computes
  Gathering here;
  unsigned round = 0;
  uint32_t words[2][32][12];
};
struct Copy {
  void* to;
  const void* from;
  int bytes;
};
struct Phase {  // of an Mbarrier
  int expected = 0, missing = 0, parity = 0;
  int64_t bytes = 0;  // announced and not yet copied
  std::vector<Copy> copies;
  std::vector<Fiber*> waiting;
};
struct Fiber {
  void* stack_pointer = nullptr;
  int thread = 0;      // of the cluster
  unsigned round = 0;  // of the cluster's barrier, when it arrived there
};
class Ready {  // a set of threads
 public:
  bool empty() const { return count_ == 0; }
  void insert(int thread) {
    words_[thread / 64] |= uint64_t{1} << thread % 64;
    ++count_;
  }
  void erase(int thread) {
    words_[thread / 64] &= ~(uint64_t{1} << thread % 64);
    --count_;
  }
  int first_from(int start) const {  // and on from 0
    uint64_t word = words_[start / 64] & ~uint64_t{0} << start % 64;
    int i = start / 64;
    while (word == 0) word = words_[i = (i + 1) % WORDS];
    return 64 * i + __builtin_ctzll(word);
  }
  int last() const {
    int i = WORDS - 1;
    while (words_[i] == 0) --i;
    return 64 * i + 63 - __builtin_clzll(words_[i]);
  }

 private:
  static constexpr int WORDS = 4096 / 64;
  uint64_t words_[WORDS] = {};
  int count_ = 0;
};
struct Machine {
  std::vector<char> stacks;
  std::vector<std::vector<char>> shared;  // of each block of the cluster
  std::vector<Fiber> fibers;
  Ready ready;
  std::vector<Exchange> warps;
  std::vector<Gathering> blocks;
  Gathering cluster;
  int cluster_arrived = 0;
  unsigned cluster_round = 0;
  std::unordered_map<void*, Phase> phases;
  std::function<void()> body;
  std::mt19937 random;
  Fiber* current = nullptr;
  void* main_stack = nullptr;
  int alive = 0;
  unsigned first_block = 0;  // of the cluster
  Index thread_index, block_index, block_size, grid_size;
};
inline Machine machine;

extern "C" void cuda_on_cpu_switch(void** save, void* load);
#if !defined(__x86_64__)
#error "the fibers' switch is written for x86-64"
#endif
asm(R"(.text
.weak cuda_on_cpu_switch
cuda_on_cpu_switch:
 push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
 mov %rsp,(%rdi); mov %rsi,%rsp
 pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
 ret
)");

[[noreturn]] inline void give_up(const char* why) {
  std::fprintf(stderr, "cuda_on_cpu: %s (block %u, %u)\n", why, machine.block_index.x, machine.block_index.y);
  std::abort();
}

// Of the running thread's block, in its cluster.
inline int rank() { return machine.current->thread / static_cast<int>(machine.block_size.x); }

// Of the fibers that can go on, the next one.
inline Fiber* choose() {
  Machine& m = machine;
  const int start = options.order == Order::random ? static_cast<int>(m.random() % m.fibers.size()) : 0;
  m.current = &m.fibers[options.order == Order::backward ? m.ready.last() : m.ready.first_from(start)];
  m.ready.erase(m.current->thread);
  m.thread_index.x = m.current->thread % m.block_size.x;
  m.block_index.x = m.first_block + m.current->thread / m.block_size.x;
  return m.current;
}

// Leave this fiber for one that can go on, or for the launch when all are done.
inline void leave(Fiber* from) {
  Machine& m = machine;
  if (m.alive == 0) {
    cuda_on_cpu_switch(&from->stack_pointer, m.main_stack);
    return;
  }
  if (m.ready.empty()) give_up("deadlock: every thread waits; a barrier in a branch, or a copy nobody asked for");
  Fiber* to = choose();
  if (to != from) cuda_on_cpu_switch(&from->stack_pointer, to->stack_pointer);
}

inline void release(std::vector<Fiber*>& waiting) {
  for (const Fiber* fiber : waiting) machine.ready.insert(fiber->thread);
  waiting.clear();
}

// Wait until all have come; the last one runs `then` first.
template <class Then>
void gather(Gathering& g, Then then) {
  Fiber* me = machine.current;
  g.waiting.push_back(me);
  if (static_cast<int>(g.waiting.size()) == g.expected) {
    then();
    release(g.waiting);
  }
  leave(me);
}

inline Exchange& warp() { return machine.warps[machine.current->thread / 32]; }
inline int lane() { return machine.current->thread % 32; }

// Every lane leaves `count` words and reads the results where it left them.
template <class Compute>
void exchange(uint32_t* words, int count, Compute compute) {
  Exchange& w = warp();
  const unsigned round = w.round % 2;
  auto& mine = w.words[round][lane()];
  std::memcpy(mine, words, count * 4);
  gather(w.here, [&] {
    ++w.round;
    compute(w.words[round]);
  });
  std::memcpy(words, mine, count * 4);
}

inline void finish_copies(Phase& p) {
  for (const Copy& c : p.copies) {
    std::memcpy(c.to, c.from, c.bytes);
    p.bytes -= c.bytes;
  }
  p.copies.clear();
}

// End the phase if all mbarriers are in; copies may be forced to take place now.
inline void try_to_end(Phase& p, bool force) {
  if (p.missing > 0) return;
  if (force || options.early_copies) finish_copies(p);
  if (p.bytes != 0 || !p.copies.empty()) return;
  p.missing = p.expected;
  p.parity ^= 1;
  release(p.waiting);
}

inline void entry() {
  machine.body();
  --machine.alive;
  leave(machine.current);
}

inline void run_cluster(int blocks, int threads, size_t shared) {
  constexpr size_t STACK = 256 << 10;
  Machine& m = machine;
  const int all = blocks * threads;
  for (std::vector<char>& memory : m.shared) {
    if (!memory.empty()) ASAN_UNPOISON_MEMORY_REGION(memory.data(), memory.size());
  }
  m.shared.resize(blocks);
  for (std::vector<char>& memory : m.shared) {
    memory.assign(shared + 128, static_cast<char>(0xFF));
    ASAN_POISON_MEMORY_REGION(memory.data(), memory.size());
  }
  if (m.stacks.size() < STACK * all) m.stacks.resize(STACK * all);
  ASAN_UNPOISON_MEMORY_REGION(m.stacks.data(), m.stacks.size());
  m.fibers.assign(all, {});
  m.warps.assign((all + 31) / 32, {});
  for (Exchange& w : m.warps) w.here.expected = 32;
  m.blocks.assign(blocks, {threads, {}});
  m.cluster = {all, {}};
  m.cluster_arrived = 0;
  m.phases.clear();
  m.ready = {};
  m.alive = all;
  for (int i = 0; i < all; ++i) {
    m.fibers[i].thread = i;
    const uintptr_t top = (reinterpret_cast<uintptr_t>(m.stacks.data() + STACK * (i + 1)) & ~uintptr_t{15}) - 8;
    void** p = reinterpret_cast<void**>(top);
    *--p = reinterpret_cast<void*>(&entry);
    for (int saved = 0; saved < 6; ++saved) *--p = nullptr;
    m.fibers[i].stack_pointer = p;
    m.ready.insert(i);
  }
  cuda_on_cpu_switch(&m.main_stack, choose()->stack_pointer);
}

inline void launch(Index grid, int threads, size_t shared, std::function<void()> body, int cluster = 1) {
  Machine& m = machine;
  m.body = std::move(body);
  m.grid_size = grid;
  m.block_size = {static_cast<unsigned>(threads), 1, 1};
  m.random.seed(options.seed);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; x += cluster) {
      m.block_index = {x, y, 0};
      m.first_block = x;
      run_cluster(cluster, threads, shared);
    }
  }
}

}  // namespace cuda_on_cpu
