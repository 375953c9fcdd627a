// All kernels, compiled once per ISA. The including file defines SLEEPKERN_ISA (namespace and name), SLEEPKERN_LANES
// (floats per vector), SLEEPKERN_SUPPORTED (whether the machine has the instructions) and SLEEPKERN_ADDERS (whether its
// additions run beside its multiplications). Everything but the table has internal linkage in that namespace.
#pragma once

#include "cpu/blocks/group.h"
#include "cpu/gemm/gemm.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/gemm/peak.h"
#include "cpu/mixer/convolution.h"
#include "cpu/mixer/gated_norm.h"
#include "cpu/recurrence/backward.h"
#include "cpu/recurrence/decode_states.h"
#include "cpu/recurrence/forward.h"
#include "cpu/replay/replay.h"
#include "cpu/runtime/implementation.h"
#include "cpu/simd/bf16.h"

#define SLEEPKERN_STRING_(x) #x
#define SLEEPKERN_STRING(x) SLEEPKERN_STRING_(x)

namespace sleepkern::SLEEPKERN_ISA {

bool supported() { return SLEEPKERN_SUPPORTED; }
bool adders() { return SLEEPKERN_ADDERS; }
extern const Implementation table;
const Implementation table = {
    SLEEPKERN_STRING(SLEEPKERN_ISA),
    supported,
    forward_tasks,
    backward_heads,
    decode_heads,
    replay_heads,
    convolve,
    convolve_backward,
    convolve_step,
    gated_norm,
    gated_norm_backward,
    run_group,
    pack_matrix,
    packed_size,
    PANEL,
    adders,
    DOTS,
    peak,
};

}  // namespace sleepkern::SLEEPKERN_ISA
