// AVX-512 with products of bfloat16 (Zen 4, Cooper Lake, Sapphire Rapids and later). With SLEEPKERN_EMULATE_AVX512 (see
// avx512.cpp) shifts and multiplications make the products.
#define SLEEPKERN_ISA avx512bf16
#define SLEEPKERN_LANES 16
#define SLEEPKERN_BFLOAT16_DOT
#ifdef SLEEPKERN_EMULATE_AVX512
#define SLEEPKERN_SUPPORTED (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#else
#define SLEEPKERN_SUPPORTED                                                                                         \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && \
   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16"))
#endif
#define SLEEPKERN_ADDERS __builtin_cpu_is("amd")
#include "cpu/isa/kernels.h"
