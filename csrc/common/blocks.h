// A stack of hybrid blocks, run several times over a window: the C++ face of sleepkern/sleep/blocks.py, where all is
// checked. Weights are packed once (pack_weight), the norm before a product multiplied into it.
#pragma once

#include <cstdint>
#include <vector>

#include "common/mixer_ops.h"

namespace sleepkern {

// How the operands of products with weights are taken.
enum class Form {
  plain,     // floats, by multiply-adds
  winograd,  // floats, a part of them by Winograd's inner product, see csrc/cpu/gemm/winograd.h
  bfloat16   // rounded to it, two neighbours of the depth in the place of a float
};

// Packed weights over `balance`, by which what they are multiplied with is multiplied, so that the two are of one size;
// a power of two, 1 where the form does not ask for it.
struct Weights {
  const void* packed;
  float balance;
};

// h <- h + mixer(norm h);  h <- h + down relu(up (norm h))^2
struct Layer {
  bool recurrent;      // gated DeltaNet, else attention
  Weights into;        // [d -> into_width]: q, k, v, then of gated DeltaNet gate, decay, strength
  int64_t into_width;  // before padding
  Weights out;         // [mixed -> d]
  Weights up;          // [d -> hidden], times the root of down's balance, which so is in what leaves the square
  const void* down;    // packed [hidden -> d]
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
  int64_t kept;                  // tokens before the window whose keys and values are still there
  const float *keys, *values;    // [B, H, kept, d / H]
  float *all_keys, *all_values;  // [B, H, kept + L, d / H] those and the window's, after the last pass

  int64_t channels() const { return 2 * H * K + HV * V; }
};

struct Blocks {
  int64_t B, L, d;
  int64_t passes;
  bool reinject;  // a pass starts from rmsnorm(h) + what the first one started from, else from h
  Form form;
  bool carry;  // convolutions of a later pass see the window's own end before it, else what preceded the window
  std::vector<Layer> layers;
  float* h;         // [B, L, d], in place
  double* changes;  // [passes][2] sums of squares over all states: of a pass's change, and after it
  Interrupt* interrupt;
};

void sleep_blocks(const Blocks& blocks);

// A matrix [n, depth] as the weights of a product: outputs rounded up to whole panels of panel_width(),
// [panels, depth, panel_width()], in packed_size floats. Form::bfloat16 only where multiplies_pairs().
int64_t panel_width();
bool multiplies_pairs();
bool adds_beside_products();  // whether Form::winograd is the faster one here
int64_t packed_size(int64_t n, int64_t depth, Form form);
void pack_weight(const float* matrix, int64_t n, int64_t depth, Form form, void* packed);

}  // namespace sleepkern
