// A stack of hybrid blocks that runs several times over a window. sleepkern/problems/blocks.py describes and checks the
// call. Weights are packed once (pack_weight), with the gain of the norm before a product multiplied in.
#pragma once

#include <cstdint>
#include <vector>

#include "common/mixer_ops.h"

namespace sleepkern {

// The type of the operands of products with weights.
enum class Form {
  plain,     // float32, by multiply-adds
  winograd,  // float32, partly by Winograd's inner product, see csrc/cpu/gemm/winograd.h
  bfloat16   // bfloat16, two neighbours of the depth in one word (bf16x2)
};

// Packed weights, divided by `balance`; the other operand is multiplied by it, so that both are of one size. It is a
// power of two, and 1 where the form needs none.
struct Weights {
  const void* packed;
  float balance;
};

// h <- h + mixer(norm h);  h <- h + down relu(up (norm h))^2
struct Layer {
  bool recurrent;      // gated DeltaNet, else attention
  Weights into;        // [d -> into_width]: q, k, v; with gated DeltaNet also gate, decay, beta
  int64_t into_width;  // before padding
  Weights out;         // [mixed -> d]
  Weights up;          // [d -> hidden], times the root of down's balance: the square of relu then holds that balance
  const void* down;    // packed [hidden -> d], divided by its balance
  int64_t hidden;
  float mixer_eps, mlp_eps;
  int64_t H;  // heads

  // Gated DeltaNet.
  int64_t HV, K, V, W;
  float decay_bias, strength;  // g = log sigmoid(decay + decay_bias), beta = strength sigmoid(.)
  Array taps;                  // [2 H K + HV V, W] short convolution
  Array gain;                  // [V] gated norm
  float gain_eps;
  const float* past;  // [B, W - 1, 2 H K + HV V] inputs of the convolution before the window
  float* last;        // the same after it
  float* state;       // [B, HV, K, V] fast weights, in place

  // Attention.
  const float *q_gain, *k_gain;  // [d / H] norms of q and k
  float q_eps, k_eps;
  int64_t kept;                  // tokens before the window whose keys and values are still cached
  const float *keys, *values;    // [B, H, kept, d / H]
  float *all_keys, *all_values;  // [B, H, kept + L, d / H] the cached ones and the window's, written by the last pass

  int64_t channels() const { return 2 * H * K + HV * V; }
};

struct Blocks {
  int64_t B, L, d;
  int64_t passes;
  bool reinject;  // a later pass starts from rmsnorm(h) + the input of the first pass, else from h
  Form form;
  bool carry;  // in a later pass the window's own end precedes it for the convolutions, else the tokens before the
               // window
  std::vector<Layer> layers;
  float* h;         // [B, L, d], in place
  double* changes;  // [passes][2] sums of squares over all states: of a pass's change, and of the states after the pass
  Interrupt* interrupt;
};

void sleep_blocks(const Blocks& blocks);

// pack_weight packs a matrix [n, depth] as the weights of a product: [panels, depth, panel_width()], with n rounded up
// to whole panels of panel_width() outputs, in packed_size() floats. Form::bfloat16 needs multiplies_bf16().
int64_t panel_width();
bool multiplies_bf16();
bool adds_beside_products();  // whether Form::winograd is faster than Form::plain here
int64_t packed_size(int64_t n, int64_t depth, Form form);
void pack_weight(const float* matrix, int64_t n, int64_t depth, Form form, void* packed);

}  // namespace sleepkern
