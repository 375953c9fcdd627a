// AVX2: eight lanes with fused multiply-add.
#define SLEEPKERN_ISA avx2
#define SLEEPKERN_LANES 8
#define SLEEPKERN_SUPPORTED (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#define SLEEPKERN_ADDERS false
#include "cpu/isa/kernels.h"
