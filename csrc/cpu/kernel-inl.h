// Everything, compiled once per ISA. The including file defines SLEEPKERN_ISA (namespace and name), SLEEPKERN_LANES
// (floats per vector), SLEEPKERN_SUPPORTED and SLEEPKERN_ADDERS (whether the machine has it, and whether its additions
// run beside its multiplications). All but the table has internal linkage in that namespace.
#pragma once

#include "cpu/backward-inl.h"
#include "cpu/blocks-inl.h"
#include "cpu/convolution-inl.h"
#include "cpu/dot-inl.h"
#include "cpu/forward-inl.h"
#include "cpu/implementation.h"
#include "cpu/norm-inl.h"
#include "cpu/peak-inl.h"
#include "cpu/product-inl.h"
#include "cpu/replay-heads-inl.h"
#include "cpu/tile.h"

#define SLEEPKERN_STRING_(x) #x
#define SLEEPKERN_STRING(x) SLEEPKERN_STRING_(x)

namespace sleepkern::SLEEPKERN_ISA {

bool supported() { return SLEEPKERN_SUPPORTED; }
bool adders() { return SLEEPKERN_ADDERS; }
extern const Implementation table;
const Implementation table = {
    SLEEPKERN_STRING(SLEEPKERN_ISA),
    supported,
    forward_units,
    backward_heads,
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
