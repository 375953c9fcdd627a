// The operators of a mixer around its recurrence: the short convolution before it and the gated RMS norm after it.
// sleepkern/problems/mixer.py describes and checks the calls.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace sleepkern {

constexpr int64_t CHANNELS = 512;  // channels that a convolution takes at a time: taps and four rows of them are 20 KB

// For each channel z_t = bias + sum_j w_(W-1-j) x_(t-j); y_t = silu(z_t) or z_t.
struct Convolution {
  int64_t sequences, T, D, W;
  const int64_t* offsets;  // [sequences + 1] token offsets when packed, else nullptr
  bool silu;
  Rows x;            // [tokens, D]
  Array weight;      // [D, W]
  Array bias;        // [D]
  const void* past;  // [sequences, W - 1, D] inputs before the first token, in x's type; nullptr means 0
  void* y;           // [tokens, D] in x's type
  void* last;        // [sequences, W - 1, D] the last W - 1 inputs, of `past` too where T < W - 1, in x's type

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

// One token of a decode. The state holds the last W inputs of each channel side by side, and takes this token in.
struct ConvolutionStep {
  int64_t B, D, W;
  bool silu;
  Rows x;        // [B, D]
  Array weight;  // [D, W]
  Array bias;    // [D]
  void* state;   // [B, D, W] in x's type
  void* y;       // [B, D] in x's type
};

// y = w x r act(gate), r = (mean x^2 + eps)^-1/2; With gate_first y = w u r, u = x act(gate), and r is that of u. Means
// are over the last dimension, V.
struct GatedNorm {
  int64_t tokens, heads, V;
  bool silu;        // act is silu, else sigmoid
  bool gate_first;  // Mamba-2's
  float eps;
  Rows x, gate;  // [tokens, heads, V]
  Array weight;  // [V], or [heads, V] if weight_heads
  bool weight_heads;
  void* y;  // [tokens, heads, V] in x's type

  int64_t weights() const { return (weight_heads ? heads : 1) * V; }
};

struct GatedNormGradients {
  Rows dy;      // [tokens, heads, V]
  void* dx;     // [tokens, heads, V] in x's type
  void* dgate;  // the same in the gate's type
  int64_t
      parts;  // the tokens are cut into so many parts; each has its own sum, so the sums do not depend on the threads
  float* dweight;  // [parts, weights()]
};

void convolve(const Convolution& convolution);
void convolve_backward(const Convolution& convolution, const ConvolutionGradients& gradients);
void convolve_step(const ConvolutionStep& step);
void gated_norm(const GatedNorm& norm);
void gated_norm_backward(const GatedNorm& norm, const GatedNormGradients& gradients);

// Copies the last inputs of each sequence to `last`.
void keep_last(const Convolution& convolution);

}  // namespace sleepkern
