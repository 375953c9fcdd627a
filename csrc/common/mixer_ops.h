// What stands around the recurrence in a mixer: the short convolution before it, the gated norm after it. The C++ face
// of sleepkern/problems/mixer.py; all is checked there.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace sleepkern {

constexpr int64_t CHANNELS = 512;  // of a convolution at a time: with taps and four rows 20 KB

// z_t = bias + sum_j w_(W-1-j) x_(t-j);  y_t = silu(z_t) or z_t, each channel for itself.
struct Convolution {
  int64_t sequences, T, D, W;
  const int64_t* offsets;  // [sequences + 1] token offsets when packed, else nullptr
  bool silu;
  Rows x;            // [tokens, D]
  Array weight;      // [D, W]
  Array bias;        // [D]
  const void* past;  // [sequences, W - 1, D] inputs before the first token, in x's type; nullptr means 0
  void* y;           // [tokens, D] in x's type
  void* last;        // [sequences, W - 1, D] the last inputs, past ones included, in x's type

  constexpr int64_t first(int64_t sequence) const { return offsets ? offset_at(offsets, sequence) : sequence * T; }
  constexpr int64_t tokens() const { return first(sequences); }
};

struct ConvolutionGradients {
  Rows dy;            // [tokens, D]
  const void* dlast;  // [sequences, W - 1, D] in x's type, nullptr means 0
  void* dx;           // [tokens, D] in x's type
  void* dpast;        // [sequences, W - 1, D] in x's type, nullptr when not wanted
  float* dweight;     // [D, W]
  float* dbias;       // [D], nullptr when not wanted
};

// One token; the state, the last W inputs of each channel side by side as decoders keep them, moves on by it.
struct ConvolutionStep {
  int64_t B, D, W;
  bool silu;
  Rows x;        // [B, D]
  Array weight;  // [D, W]
  Array bias;    // [D]
  void* state;   // [B, D, W] in x's type
  void* y;       // [B, D] in x's type
};

// y = w x r act(gate), r = (mean x^2 + eps)^-1/2; gate first: y = w u r, u = x act(gate), r of u. Over the last V.
struct GatedNorm {
  int64_t tokens, heads, V;
  bool silu;        // else sigmoid
  bool gate_first;  // Mamba-2's
  float eps;
  Rows x, gate;  // [tokens, heads, V]
  Array weight;  // [V], or [heads, V] if weight_heads
  bool weight_heads;
  void* y;  // [tokens, heads, V] in x's type

  int64_t weights() const { return (weight_heads ? heads : 1) * V; }
};

struct GatedNormGradients {
  Rows dy;         // [tokens, heads, V]
  void* dx;        // [tokens, heads, V] in x's type
  void* dgate;     // the same in the gate's type
  int64_t parts;   // of the tokens, each with a sum of its own, so that the sums do not depend on the threads
  float* dweight;  // [parts, weights()]
};

void convolve(const Convolution& convolution);
void convolve_backward(const Convolution& convolution, const ConvolutionGradients& gradients);
void convolve_step(const ConvolutionStep& step);
void gated_norm(const GatedNorm& norm);
void gated_norm_backward(const GatedNorm& norm, const GatedNormGradients& gradients);

// The last inputs of each sequence to `last`.
void keep_last(const Convolution& convolution);

}  // namespace sleepkern
