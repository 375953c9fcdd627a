// The baseline has four lanes: SSE2 on x86-64, NEON on 64-bit Arm, and whatever the compiler generates elsewhere.
#define SLEEPKERN_ISA baseline
#define SLEEPKERN_LANES 4
#define SLEEPKERN_SUPPORTED true
#define SLEEPKERN_ADDERS false
#include "cpu/isa/kernels.h"
