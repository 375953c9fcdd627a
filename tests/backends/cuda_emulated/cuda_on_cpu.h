// Runs CUDA kernels on the CPU, for tests: what csrc/cuda/arch/ptx.h gives on a GPU, with the threads of a block, or of
// all blocks of a cluster, as fibers.
//
// A fiber runs until it waits: for a cluster, a block, a warp, or a copy. Of those that can go on the first, the last
// (so one warp runs far ahead of the others), or any goes on; so code that lacks a barrier reads what is not there yet
// in at least one order. Copies take place as late as allowed or at once, by choice. Shared memory starts as NaN, and
// under AddressSanitizer only what an Arena handed out may be touched.
//
// What it cannot show: races within one thread order, bank conflicts, and an error in its own reading of the PTX manual
// that the kernels share (fragments of mma and ldmatrix).
#pragma once

#include <algorithm>
#include <cmath>

#include "machine.h"

#define SLEEPKERN_DEVICE inline
#define SLEEPKERN_BOTH inline
#define SLEEPKERN_KERNEL(threads, blocks) inline void
#define SLEEPKERN_CONSTANT const

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

namespace cuda_on_cpu {

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

inline char* shared_memory_of(int rank) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(cuda_on_cpu::machine.shared.at(rank).data());
  return reinterpret_cast<char*>((address + 127) / 128 * 128);
}
inline char* shared_memory() { return shared_memory_of(cuda_on_cpu::rank()); }

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
inline float quotient(float x, float y) { return x / y; }
inline float log_of(float x) { return std::log(x); }

[[noreturn]] inline void trap() { std::abort(); }
inline void block_barrier() {
  cuda_on_cpu::gather(cuda_on_cpu::machine.blocks[cuda_on_cpu::rank()], [] {});
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
inline float shuffle_from(float x, int lane) {  // each lane asks for one of its own choice
  uint32_t words[2] = {as_bits(x), static_cast<uint32_t>(lane)};
  cuda_on_cpu::exchange(words, 2, [](uint32_t (*w)[12]) {
    uint32_t given[32];
    for (int l = 0; l < 32; ++l) given[l] = w[l][0];
    for (int l = 0; l < 32; ++l) w[l][0] = given[w[l][1] & 31];
  });
  return from_bits(words[0]);
}

struct Mbarrier {
  uint64_t bits;
};

inline void mbarrier_create(Mbarrier* a, int threads) {
  const int count = cuda_on_cpu::options.capability >= 90 ? 1 : threads;
  cuda_on_cpu::machine.phases[a] = {count, count, 0, 0, {}, {}};
}

inline void mbarrier_create(Mbarrier* a) { mbarrier_create(a, static_cast<int>(blockDim.x)); }

inline void copy_begin(Mbarrier* a, int bytes) {
  if (cuda_on_cpu::options.capability < 90 || threadIdx.x != 0) return;
  cuda_on_cpu::Phase& p = cuda_on_cpu::machine.phases.at(a);
  p.bytes += bytes;
  --p.missing;
}

inline void copy_part(Mbarrier* a, void* to, const void* from, int bytes) {
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

inline void copy_end(Mbarrier* a) {
  cuda_on_cpu::Phase& p = cuda_on_cpu::machine.phases.at(a);
  if (cuda_on_cpu::options.capability < 90) --p.missing;
  if (cuda_on_cpu::options.capability < 90 || threadIdx.x == 0) cuda_on_cpu::try_to_end(p, !p.waiting.empty());
}

inline void warp_copy(Mbarrier* a, void* to, const void* from, int bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16 != 0) {
    cuda_on_cpu::give_up("a copy that is not aligned to 16 bytes");
  }
  cuda_on_cpu::Phase& p = cuda_on_cpu::machine.phases.at(a);
  const bool bulk = cuda_on_cpu::options.capability >= 90;
  const int lane = threadIdx.x & 31;
  if (bulk && lane != 0) return;
  for (int at = bulk ? 0 : lane * 16; at < bytes; at += bulk ? bytes : 32 * 16) {
    const int part = bulk ? bytes : 16;
    p.copies.push_back({static_cast<char*>(to) + at, static_cast<const char*>(from) + at, part});
    p.bytes += part;
  }
  --p.missing;
  cuda_on_cpu::try_to_end(p, !p.waiting.empty());
}

inline void warp_prefetch(const void* from, int bytes) {
  for (int at = (threadIdx.x & 31) * 128; at < bytes; at += 32 * 128) {
    volatile char line = static_cast<const char*>(from)[at];  // AddressSanitizer sees what is not there
    static_cast<void>(line);
  }
}

inline void copy_wait(Mbarrier* a, int parity) {
  cuda_on_cpu::Phase& p = cuda_on_cpu::machine.phases.at(a);
  if (p.parity == parity) cuda_on_cpu::try_to_end(p, true);
  if (p.parity != parity) return;
  p.waiting.push_back(cuda_on_cpu::machine.current);
  cuda_on_cpu::leave(cuda_on_cpu::machine.current);
}

constexpr bool CLUSTERS = true;  // for all that a kernel leaves out where it has none

inline void cluster_arrive() {
  cuda_on_cpu::Machine& m = cuda_on_cpu::machine;
  if (cuda_on_cpu::options.capability < 90 && m.shared.size() > 1) {
    cuda_on_cpu::give_up("clusters need compute capability 9.0");
  }
  m.current->round = m.cluster_round;
  if (++m.cluster_arrived < m.cluster.expected) return;
  m.cluster_arrived = 0;
  ++m.cluster_round;
  cuda_on_cpu::release(m.cluster.waiting);
}
inline void cluster_wait() {
  cuda_on_cpu::Machine& m = cuda_on_cpu::machine;
  if (m.current->round != m.cluster_round) return;
  m.cluster.waiting.push_back(m.current);
  cuda_on_cpu::leave(m.current);
}

using RemoteAddress = char*;
inline RemoteAddress remote_address(const void* p, int rank) {
  if (rank < 0 || rank >= static_cast<int>(cuda_on_cpu::machine.shared.size())) {
    cuda_on_cpu::give_up("a rank that is not in the cluster");
  }
  return shared_memory_of(rank) + (static_cast<const char*>(p) - shared_memory());
}
template <class T>
void store_remote(RemoteAddress at, T x) {
  std::memcpy(at, &x, sizeof x);
}

}  // namespace sleepkern::cuda
