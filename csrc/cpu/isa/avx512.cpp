// AVX-512: sixteen lanes and 32 registers. SLEEPKERN_EMULATE_AVX512 (a CMake option for tests) compiles the same source
// for AVX2 with two registers a vector, so that a machine without AVX-512 can test it.
#define SLEEPKERN_ISA avx512
#define SLEEPKERN_LANES 16
#ifdef SLEEPKERN_EMULATE_AVX512
#define SLEEPKERN_SUPPORTED (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#else
#define SLEEPKERN_SUPPORTED                                                                                         \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && \
   __builtin_cpu_supports("avx512vl"))
#endif
#define SLEEPKERN_ADDERS __builtin_cpu_is("amd")
#include "cpu/isa/kernels.h"
