// The functions of an ISA file, and the choice of one file.
#pragma once

#include <cstdint>

#include "common/blocks.h"
#include "common/decode.h"
#include "common/mixer_ops.h"
#include "common/recurrence.h"

namespace sleepkern {

struct Implementation {
  const char* name;
  bool (*supported)();
  // Tasks [begin, end) of the sequences * HV * v_tiles of a problem: each head is cut into `v_tiles` independent
  // v-tiles.
  void (*forward)(const Problem&, int64_t v_tiles, int64_t begin, int64_t end);
  // Key heads [begin, end) of the sequences * H of a problem.
  void (*backward)(const Problem&, const Gradients&, int64_t begin, int64_t end);
  // Heads [begin, end) of the sequences * HV of a problem, whose states are in DecodeStates.
  void (*decode)(const Problem&, const DecodeStates&, int64_t begin, int64_t end);
  // Heads [begin, end) of the sequences * HV of a problem.
  void (*replay)(const Problem&, const Replay&, int64_t begin, int64_t end);
  // Tokens [begin, end) of the flattened batch.
  void (*convolve)(const Convolution&, int64_t begin, int64_t end);
  // `channels` channels of all tokens from `channel` on, at most CHANNELS.
  void (*convolve_backward)(const Convolution&, const ConvolutionGradients&, int64_t channel, int64_t channels);
  // Rows [begin, end) of the batch.
  void (*convolve_step)(const ConvolutionStep&, int64_t begin, int64_t end);
  // Tokens [begin, end).
  void (*gated_norm)(const GatedNorm&, int64_t begin, int64_t end);
  // One part of the tokens (GatedNormGradients::parts).
  void (*gated_norm_backward)(const GatedNorm&, const GatedNormGradients&, int64_t part);
  // Runs sequences through all passes of a stack of blocks. shared: the threads share each step. changes is
  // [passes][2].
  void (*run_group)(const Blocks&, int64_t first, int64_t sequences, bool shared, double* changes);
  // Packs weights of a product into panels of panel_width outputs; packed_size says how many floats they take.
  void (*pack_weight)(const float* matrix, int64_t n, int64_t depth, Form form, void* packed);
  int64_t (*packed_size)(int64_t n, int64_t depth, Form form);
  int64_t panel_width;
  bool (*adders)();  // whether additions run beside multiplications, which makes Winograd's product faster
  bool bf16;         // whether the machine has products of bfloat16
  // Floating-point operations a second that one core reaches on registers, measured for `seconds`.
  double (*peak)(double seconds);
};

// The implementations that this machine can run, best first.
int implementations(const Implementation** list, int capacity);
// The implementation in use: the best one, unless set_implementation chose another. set_implementation returns false
// for a name that is unknown or unsupported.
const Implementation& implementation();
bool set_implementation(const char* name);

void forward(const Problem& problem);
void backward(const Problem& problem, const Gradients& gradients);
void decode(const Problem& problem, const DecodeStates& states);
void replay(const Problem& problem, const Replay& replay);

}  // namespace sleepkern
