// What an ISA file offers, and how one is chosen.
#pragma once

#include <cstdint>

#include "common/blocks.h"
#include "common/mixer_ops.h"
#include "common/recurrence.h"

namespace sleepkern {

struct Implementation {
  const char* name;
  bool (*supported)();
  // Units [begin, end) of the sequences * HV * blocks of a problem: the heads, each cut into `blocks` blocks of value
  // columns, which are independent.
  void (*forward)(const Problem&, int64_t blocks, int64_t begin, int64_t end);
  // Key heads [begin, end) of the sequences * H of a problem.
  void (*backward)(const Problem&, const Gradients&, int64_t begin, int64_t end);
  // Heads [begin, end) of the sequences * HV of a problem.
  void (*replay)(const Problem&, const Replay&, int64_t begin, int64_t end);
  // Tokens [begin, end) of the flattened batch.
  void (*convolve)(const Convolution&, int64_t begin, int64_t end);
  // `channels` of all tokens from `channel` on, at most a block.
  void (*convolve_backward)(const Convolution&, const ConvolutionGradients&, int64_t channel, int64_t channels);
  // Rows [begin, end) of the batch.
  void (*convolve_step)(const ConvolutionStep&, int64_t begin, int64_t end);
  // Tokens [begin, end).
  void (*gated_norm)(const GatedNorm&, int64_t begin, int64_t end);
  // One of the parts of the tokens.
  void (*gated_norm_backward)(const GatedNorm&, const GatedNormGradients&, int64_t part);
  // Sequences of a stack of blocks through all passes; shared: the threads share each step of it. changes [passes][2].
  void (*run_group)(const Blocks&, int64_t first, int64_t sequences, bool shared, double* changes);
  // Weights of a product in panels of panel_width outputs, and the floats that they take.
  void (*pack_weight)(const float* matrix, int64_t n, int64_t depth, Form form, void* packed);
  int64_t (*packed_size)(int64_t n, int64_t depth, Form form);
  int64_t panel_width;
  bool (*adders)();  // whether additions run beside multiplications, so that Winograd's product pays
  bool pairs;        // whether products can take bfloat16
  // Floating-point operations a second that one core reaches from registers, measured for some seconds.
  double (*peak)(double seconds);
};

// Best first; those this machine can run.
int implementations(const Implementation** list, int capacity);
// The one in use: the best, unless another was set by name (returns false for an unknown or unsupported name).
const Implementation& implementation();
bool set_implementation(const char* name);

void forward(const Problem& problem);
void backward(const Problem& problem, const Gradients& gradients);
void replay(const Problem& problem, const Replay& replay);

}  // namespace sleepkern
