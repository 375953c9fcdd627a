// The machine's operations below C++, with all inline assembly. With SLEEPKERN_CUDA_ON_CPU the same functions come from
// tests/backends/cuda_emulated, which runs a CTA's threads as fibers, so that the sources can be tested without a GPU.
#pragma once

#include <cstdint>

#ifdef SLEEPKERN_CUDA_ON_CPU
#include <cuda_on_cpu.h>
#else
#include <cuda_runtime.h>

#define SLEEPKERN_DEVICE __device__ __forceinline__
#define SLEEPKERN_BOTH __host__ __device__ __forceinline__
#define SLEEPKERN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SLEEPKERN_CONSTANT const __grid_constant__  // an argument that is read from constant memory

namespace sleepkern::cuda {

constexpr int GUARD = 0;  // bytes between two arrays of shared memory; the emulator checks accesses to them

SLEEPKERN_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

SLEEPKERN_BOTH void use_shared(const void*, int64_t) {}  // the emulator: these bytes may be accessed

using SharedAddress = uint32_t;
SLEEPKERN_DEVICE SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}

// The same value, but unknown to the compiler. Otherwise the compiler computes all addresses of a loop, hundreds of
// them, before the loop, and runs out of registers.
SLEEPKERN_DEVICE uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
SLEEPKERN_DEVICE int opaque(int x) { return static_cast<int>(opaque(static_cast<uint32_t>(x))); }
template <class T>
SLEEPKERN_DEVICE T* opaque(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}

// Products: d (16 x 8) += a (16 x 16 or 16 x 8) b, operands in the fragments of the PTX manual.
SLEEPKERN_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

SLEEPKERN_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8 and receives the four
// bytes at 4 (l % 4) of row l / 4 of each.
SLEEPKERN_DEVICE void load_matrices(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// The same for the transposes of matrices of 8 x 8 two-byte elements.
SLEEPKERN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

SLEEPKERN_DEVICE uint32_t load_word(SharedAddress at) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
  return x;
}

// bf16x2 of two values, rounded to nearest.
SLEEPKERN_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

SLEEPKERN_DEVICE float from_half(uint16_t x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
  return wide;
}

SLEEPKERN_DEVICE uint16_t to_half(float x) {
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return half;
}

// exp of a value that is not positive. Its relative error grows with |x|, and its absolute error vanishes with the
// result.
SLEEPKERN_DEVICE float decayed(float x) { return __expf(x); }

// Approximations with an error of a few units in the last place.
SLEEPKERN_DEVICE float quotient(float x, float y) { return __fdividef(x, y); }
SLEEPKERN_DEVICE float log_of(float x) { return __logf(x); }

SLEEPKERN_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }
SLEEPKERN_DEVICE float from_bits(uint32_t x) { return __uint_as_float(x); }

SLEEPKERN_DEVICE void trap() { __trap(); }
SLEEPKERN_DEVICE void block_barrier() { __syncthreads(); }
SLEEPKERN_DEVICE void warp_barrier() { __syncwarp(); }
SLEEPKERN_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
SLEEPKERN_DEVICE float shuffle_up(float x, int lanes) { return __shfl_up_sync(0xffffffffu, x, lanes); }
SLEEPKERN_DEVICE float shuffle_from(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

// Asynchronous copies from global to shared memory. A phase of an mbarrier ends when all copies that a CTA issued
// between copy_begin and copy_end are complete. From compute capability 9.0 on one thread issues them to the bulk copy
// engine; before, every thread copies its share. All addresses and sizes are multiples of 16 bytes.
struct Mbarrier {
  uint64_t bits;
};

#if __CUDA_ARCH__ >= 900
constexpr bool BULK = true;
#else
constexpr bool BULK = false;
#endif

// Called by one thread, before a block_barrier; `threads` threads will issue copies together.
SLEEPKERN_DEVICE void mbarrier_create(Mbarrier* a, int threads) {
  const int count = BULK ? 1 : threads;
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(a)), "r"(count) : "memory");
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
SLEEPKERN_DEVICE void mbarrier_create(Mbarrier* a) { mbarrier_create(a, blockDim.x); }

// All threads of the CTA call the next three functions.
SLEEPKERN_DEVICE void copy_begin(Mbarrier* a, int bytes) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(a)), "r"(bytes) : "memory");
  }
#endif
}

SLEEPKERN_DEVICE void copy_part(Mbarrier* a, void* to, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(a))
                 : "memory");
  }
#else
  for (int at = threadIdx.x * 16; at < bytes; at += blockDim.x * 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(static_cast<char*>(to) + at)),
                 "l"(static_cast<const char*>(from) + at)
                 : "memory");
  }
#endif
}

SLEEPKERN_DEVICE void copy_end(Mbarrier* a) {
#if __CUDA_ARCH__ < 900
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(a)) : "memory");
#endif
}

// A whole phase, by the threads of one warp, for an mbarrier of 32 threads.
SLEEPKERN_DEVICE void warp_copy(Mbarrier* a, void* to, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
  if ((threadIdx.x & 31) == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(a)), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(a))
                 : "memory");
  }
#else
  for (int at = (threadIdx.x & 31) * 16; at < bytes; at += 32 * 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(static_cast<char*>(to) + at)),
                 "l"(static_cast<const char*>(from) + at)
                 : "memory");
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(a)) : "memory");
#endif
}

// Prefetches memory into L2 that will be copied later, by the threads of one warp, a line each.
SLEEPKERN_DEVICE void warp_prefetch(const void* from, int bytes) {
  for (int at = (threadIdx.x & 31) * 128; at < bytes; at += 32 * 128) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(from) + at));
  }
}

// Waits for the end of the phase of this parity: 0 for the first, then 1, 0, ...
SLEEPKERN_DEVICE void copy_wait(Mbarrier* a, int parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{ .reg .pred p;\n"
#if __CUDA_ARCH__ >= 900
        "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
#else
        "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
#endif
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(a)), "r"(parity)
        : "memory");
  }
}

// Clusters: CTAs that can access each other's shared memory. Before compute capability 9.0 a cluster has one CTA.
constexpr bool CLUSTERS = BULK;

// A store before cluster_arrive is visible to all threads of the cluster after cluster_wait. All threads call both.
SLEEPKERN_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
SLEEPKERN_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The address of this CTA's p in the CTA of number cta_rank of the cluster.
using RemoteAddress = uint32_t;
SLEEPKERN_DEVICE RemoteAddress remote_address(const void* p, int cta_rank) {
  RemoteAddress at = shared_address(p);
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(p)), "r"(cta_rank));
#endif
  return at;
}

#if __CUDA_ARCH__ >= 900
#define SLEEPKERN_CLUSTER "::cluster"
#else
#define SLEEPKERN_CLUSTER ""
#endif
SLEEPKERN_DEVICE void store_remote(RemoteAddress at, uint4 x) {
  asm volatile("st.shared" SLEEPKERN_CLUSTER ".v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}
SLEEPKERN_DEVICE void store_remote(RemoteAddress at, float x) {
  asm volatile("st.shared" SLEEPKERN_CLUSTER ".f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
}

}  // namespace sleepkern::cuda
#endif
