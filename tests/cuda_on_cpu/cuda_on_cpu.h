// Runs CUDA kernels on the CPU, for tests: what csrc/cuda/ptx.h gives on a GPU, with the threads of a block as fibers.
//
// A fiber runs until it waits: for a block, a warp, or a copy. Of those that can go on the first, the last (so one warp
// runs far ahead of the others), or any goes on; so code that lacks a barrier reads what is not there yet in at least
// one order. Copies take place as late as allowed or at once, by choice. Shared memory starts as NaN, and under
// AddressSanitizer only what an Arena handed out may be touched.
//
// What it cannot show: races within one thread order, bank conflicts, and an error in its own reading of the PTX manual
// that the kernels share (fragments of mma and ldmatrix).
#pragma once

#include <algorithm>
#include <cmath>
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

#define SLEEPKERN_DEVICE inline
#define SLEEPKERN_BOTH inline
#define SLEEPKERN_KERNEL(threads, blocks) inline void

struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

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
struct Phase {  // of an Arrival
  int expected = 0, missing = 0, parity = 0;
  int64_t bytes = 0;  // announced and not yet copied
  std::vector<Copy> copies;
  std::vector<Fiber*> waiting;
};
struct Fiber {
  void* stack_pointer = nullptr;
  int thread = 0;
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
  static constexpr int WORDS = 1024 / 64;
  uint64_t words_[WORDS] = {};
  int count_ = 0;
};
struct Machine {
  std::vector<char> shared, stacks;
  std::vector<Fiber> fibers;
  Ready ready;
  std::vector<Exchange> warps;
  Gathering block;
  std::unordered_map<void*, Phase> phases;
  std::function<void()> body;
  std::mt19937 random;
  Fiber* current = nullptr;
  void* main_stack = nullptr;
  int alive = 0;
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

// Of the fibers that can go on, the next one.
inline Fiber* choose() {
  Machine& m = machine;
  const int start = options.order == Order::random ? static_cast<int>(m.random() % m.fibers.size()) : 0;
  m.current = &m.fibers[options.order == Order::backward ? m.ready.last() : m.ready.first_from(start)];
  m.ready.erase(m.current->thread);
  m.thread_index.x = m.current->thread;
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

// End the phase if all arrivals are in; copies may be forced to take place now.
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

inline void run_block(int threads, size_t shared) {
  constexpr size_t STACK = 256 << 10;
  Machine& m = machine;
  if (!m.shared.empty()) ASAN_UNPOISON_MEMORY_REGION(m.shared.data(), m.shared.size());
  m.shared.assign(shared + 128, static_cast<char>(0xFF));
  ASAN_POISON_MEMORY_REGION(m.shared.data(), m.shared.size());
  if (m.stacks.size() < STACK * threads) m.stacks.resize(STACK * threads);
  ASAN_UNPOISON_MEMORY_REGION(m.stacks.data(), m.stacks.size());
  m.fibers.assign(threads, {});
  m.warps.assign((threads + 31) / 32, {});
  for (Exchange& w : m.warps) w.here.expected = 32;
  m.block = {threads, {}};
  m.phases.clear();
  m.ready = {};
  m.alive = threads;
  for (int i = 0; i < threads; ++i) {
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

inline void launch(Index grid, int threads, size_t shared, std::function<void()> body) {
  Machine& m = machine;
  m.body = std::move(body);
  m.grid_size = grid;
  m.block_size = {static_cast<unsigned>(threads), 1, 1};
  m.random.seed(options.seed);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      m.block_index = {x, y, 0};
      run_block(threads, shared);
    }
  }
}

inline float bf16_half(uint32_t x, int high) {
  const uint32_t bits = high ? x & 0xffff0000u : x << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline float tf32(uint32_t x) {  // the hardware reads no more than 10 bits of the mantissa
  x &= 0xffffe000u;
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}

// d += a b of a warp: lane words are d (4), a (4), b (2).
template <int STEP, class Left, class Right>
void product(uint32_t (*w)[12], Left left, Right right) {
  float a[16][STEP], b[STEP][8];
  for (int r = 0; r < 16; ++r) {
    for (int k = 0; k < STEP; ++k) a[r][k] = left(w, r, k);
  }
  for (int k = 0; k < STEP; ++k) {
    for (int c = 0; c < 8; ++c) b[k][c] = right(w, k, c);
  }
  for (int r = 0; r < 16; ++r) {
    float sum[8] = {};
    for (int k = 0; k < STEP; ++k) {
      for (int c = 0; c < 8; ++c) sum[c] += a[r][k] * b[k][c];
    }
    for (int c = 0; c < 8; ++c) {
      uint32_t* word = &w[(r & 7) * 4 + c / 2][(r >> 3) * 2 + (c & 1)];
      float d;
      std::memcpy(&d, word, 4);
      d += sum[c];
      std::memcpy(word, &d, 4);
    }
  }
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::machine.thread_index)
#define blockIdx (cuda_on_cpu::machine.block_index)
#define blockDim (cuda_on_cpu::machine.block_size)
#define gridDim (cuda_on_cpu::machine.grid_size)

namespace sleepkern::cuda {

constexpr int GUARD = 128;

inline char* shared_memory() {
  const uintptr_t address = reinterpret_cast<uintptr_t>(cuda_on_cpu::machine.shared.data());
  return reinterpret_cast<char*>((address + 127) / 128 * 128);
}

inline void use_shared(const void* p, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) > (1 << 30)) ASAN_UNPOISON_MEMORY_REGION(p, bytes);  // not the host's null base
}

using SharedAddress = const char*;
inline SharedAddress shared_address(const void* p) { return static_cast<const char*>(p); }
template <class T>
T opaque(T x) {
  return x;
}
inline uint32_t load_word(SharedAddress at) {
  uint32_t x;
  std::memcpy(&x, at, 4);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void mma_words(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16) {
  uint32_t words[10];
  std::memcpy(words, d, 16);
  std::memcpy(words + 4, a, 16);
  words[8] = b0;
  words[9] = b1;
  cuda_on_cpu::exchange(words, 10, [bf16](uint32_t (*w)[12]) {
    using cuda_on_cpu::bf16_half, cuda_on_cpu::tf32;
    if (bf16) {
      cuda_on_cpu::product<16>(
          w,
          [](auto* w, int r, int k) {
            return bf16_half(w[(r & 7) * 4 + (k & 7) / 2][4 + (r >> 3) + 2 * (k >> 3)], k & 1);
          },
          [](auto* w, int k, int c) { return bf16_half(w[c * 4 + (k & 7) / 2][8 + (k >> 3)], k & 1); });
    } else {
      cuda_on_cpu::product<8>(
          w, [](auto* w, int r, int k) { return tf32(w[(r & 7) * 4 + (k & 3)][4 + (r >> 3) + 2 * (k >> 2)]); },
          [](auto* w, int k, int c) { return tf32(w[c * 4 + (k & 3)][8 + (k >> 2)]); });
    }
  });
  std::memcpy(d, words, 16);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_words(d, a, b0, b1, true); }
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_words(d, a, b0, b1, false);
}

inline void load_matrices_of(uint32_t (&r)[4], SharedAddress row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    cuda_on_cpu::give_up("ldmatrix: a row that is not aligned to 16 bytes");
  uint32_t words[4] = {};
  std::memcpy(words, &row, 8);
  cuda_on_cpu::exchange(words, 4, [transposed](uint32_t (*w)[12]) {
    const char* rows[32];
    for (int l = 0; l < 32; ++l) std::memcpy(&rows[l], w[l], 8);
    for (int l = 0; l < 32; ++l) {
      for (int m = 0; m < 4; ++m) {
        if (!transposed) {
          std::memcpy(&w[l][m], rows[8 * m + l / 4] + 4 * (l % 4), 4);
        } else {
          uint16_t pair[2];
          for (int i = 0; i < 2; ++i) std::memcpy(&pair[i], rows[8 * m + 2 * (l % 4) + i] + 2 * (l / 4), 2);
          std::memcpy(&w[l][m], pair, 4);
        }
      }
    }
  });
  std::memcpy(r, words, 16);
}
inline void load_matrices(uint32_t (&r)[4], SharedAddress row) { load_matrices_of(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) { load_matrices_of(r, row, true); }

inline uint32_t round_bits(float x, int dropped) {  // to nearest, ties to even
  const uint32_t bits = as_bits(x);
  if (x != x) return bits | 0x00400000u;
  return bits + ((1u << (dropped - 1)) - 1) + ((bits >> dropped) & 1);
}
inline uint32_t pack_bf16(float low, float high) {
  return (round_bits(low, 16) >> 16) | (round_bits(high, 16) & 0xffff0000u);
}
inline float from_half(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}
inline uint16_t to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

inline float decayed(float x) { return std::exp(x); }

inline void block_barrier() {
  cuda_on_cpu::gather(cuda_on_cpu::machine.block, [] {});
}
inline void warp_barrier() {
  cuda_on_cpu::gather(cuda_on_cpu::warp().here, [] {});
}

template <class Source>
float shuffle(float x, Source source) {
  uint32_t word = as_bits(x);
  cuda_on_cpu::exchange(&word, 1, [source](uint32_t (*w)[12]) {
    uint32_t given[32];
    for (int l = 0; l < 32; ++l) given[l] = w[l][0];
    for (int l = 0; l < 32; ++l) w[l][0] = given[source(l)];
  });
  return from_bits(word);
}
inline float shuffle_xor(float x, int mask) {
  return shuffle(x, [mask](int l) { return l ^ mask; });
}
inline float shuffle_up(float x, int lanes) {
  return shuffle(x, [lanes](int l) { return l >= lanes ? l - lanes : l; });
}
inline float shuffle_from(float x, int lane) {
  return shuffle(x, [lane](int) { return lane; });
}

struct Arrival {
  uint64_t bits;
};

inline void arrival_create(Arrival* a) {
  const int count = cuda_on_cpu::options.capability >= 90 ? 1 : static_cast<int>(blockDim.x);
  cuda_on_cpu::machine.phases[a] = {count, count, 0, 0, {}, {}};
}

inline void copy_begin(Arrival* a, int bytes) {
  if (cuda_on_cpu::options.capability < 90 || threadIdx.x != 0) return;
  cuda_on_cpu::Phase& p = cuda_on_cpu::machine.phases.at(a);
  p.bytes += bytes;
  --p.missing;
}

inline void copy_part(Arrival* a, void* to, const void* from, int bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16 != 0) {
    cuda_on_cpu::give_up("a copy that is not aligned to 16 bytes");
  }
  cuda_on_cpu::Phase& p = cuda_on_cpu::machine.phases.at(a);
  if (cuda_on_cpu::options.capability >= 90) {
    if (threadIdx.x == 0) p.copies.push_back({to, from, bytes});
  } else {
    for (int at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16) {
      p.copies.push_back({static_cast<char*>(to) + at, static_cast<const char*>(from) + at, 16});
      p.bytes += 16;
    }
  }
  if (cuda_on_cpu::options.early_copies) cuda_on_cpu::finish_copies(p);
}

inline void copy_end(Arrival* a) {
  cuda_on_cpu::Phase& p = cuda_on_cpu::machine.phases.at(a);
  if (cuda_on_cpu::options.capability < 90) --p.missing;
  if (cuda_on_cpu::options.capability < 90 || threadIdx.x == 0) cuda_on_cpu::try_to_end(p, !p.waiting.empty());
}

inline void copy_fence() {}

inline void copy_wait(Arrival* a, int parity) {
  cuda_on_cpu::Phase& p = cuda_on_cpu::machine.phases.at(a);
  if (p.parity == parity) cuda_on_cpu::try_to_end(p, true);
  if (p.parity != parity) return;
  p.waiting.push_back(cuda_on_cpu::machine.current);
  cuda_on_cpu::leave(cuda_on_cpu::machine.current);
}

}  // namespace sleepkern::cuda
