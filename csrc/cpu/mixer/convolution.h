// The short convolution, token after token over at most CHANNELS channels. A token reads its own row and the W - 1 rows
// before it, which are still in L1, so memory is read once.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/mixer_ops.h"
#include "cpu/simd/activation.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// w[j] multiplies x_(t-j); the last row is the bias.
struct Taps {
  alignas(64) float w[CONVOLUTION_LIMIT + 1][CHANNELS];
};

// Loads the taps of channels [first, first + n), with zeros up to a whole vector.
static void load_taps(const Convolution& c, int64_t first, int64_t n, Taps& taps) {
  std::memset(&taps, 0, sizeof taps);
  for (int64_t d = 0; d < n; ++d) {
    for (int64_t j = 0; j < c.W; ++j)
      taps.w[j][d] = load_scalar(c.weight.data, c.weight.type, (first + d + 1) * c.W - 1 - j);
    if (c.bias.data) taps.w[c.W][d] = load_scalar(c.bias.data, c.bias.type, first + d);
  }
}

// The inputs of channels [channel, channel + n) of one sequence. Rows t = 1 - W ... -1 are those of `past`, or zeros.
struct Inputs {
  const Convolution& c;
  int64_t sequence, channel, n, count;

  Inputs(const Convolution& c, int64_t sequence, int64_t channel, int64_t n)
      : c(c), sequence(sequence), channel(channel), n(n), count(c.first(sequence + 1) - c.first(sequence)) {}

  int64_t size() const { return bytes_of(c.x.type); }
  int64_t kept(int64_t t) const { return ((sequence * (c.W - 1) + t + c.W - 1) * c.D + channel) * size(); }
  int64_t dense(int64_t t) const { return ((c.first(sequence) + t) * c.D + channel) * size(); }
  const void* row(int64_t t) const {
    static const float zeros[CHANNELS] = {};
    if (t >= 0) {
      return static_cast<const char*>(c.x.data) + ((c.first(sequence) + t) * c.x.stride + channel) * size();
    }
    return c.past ? static_cast<const char*>(c.past) + kept(t) : static_cast<const void*>(zeros);
  }
};

template <Type TYPE, int W>
SLEEPKERN_STAGE void convolve_row(const Taps& taps, const Inputs& x, int64_t t) {
  const void* rows[W];
  for (int j = 0; j < W; ++j) rows[j] = x.row(t - j);
  void* y = static_cast<char*>(x.c.y) + x.dense(t);
  const int64_t whole = x.n / LANES * LANES;
  const bool silu = x.c.silu;
  for (int64_t d = 0; d < whole; d += LANES) {
    Vec z = load(taps.w[W] + d);
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) z += load(taps.w[j] + d) * load_as<TYPE>(rows[j], d);
    store_as<TYPE>(y, d, silu ? z * sigmoid(z) : z);
  }
  if (whole == x.n) return;
  Vec z = load(taps.w[W] + whole);
  for (int j = 0; j < W; ++j) z += load(taps.w[j] + whole) * load_part<TYPE>(rows[j], whole, x.n - whole);
  store_part<TYPE>(y, whole, x.n - whole, silu ? z * sigmoid(z) : z);
}

// Tokens [begin, end) of the flattened batch.
template <Type TYPE, int W>
void convolve_tokens(const Convolution& c, int64_t begin, int64_t end) {
  if (begin == end) return;  // T may be 0
  Taps taps;
  for (int64_t channel = 0; channel < c.D; channel += CHANNELS) {
    const int64_t n = min_of(CHANNELS, c.D - channel);
    load_taps(c, channel, n, taps);
    int64_t sequence = c.offsets ? 0 : begin / c.T;
    for (int64_t token = begin; token < end; ++sequence) {
      const Inputs x(c, sequence, channel, n);
      const int64_t first = c.first(sequence), stop = min_of(end, first + x.count);
      for (; token < stop; ++token) convolve_row<TYPE, W>(taps, x, token - first);
    }
  }
}

// Sums of a tile of channels: dz of the last W tokens, the taps' gradients, and those of the tokens since the last
// flush. So a long sum is a sum of short ones.
struct ConvolutionSums {
  alignas(64) float dz[CONVOLUTION_LIMIT][CHANNELS];
  alignas(64) float recent[CONVOLUTION_LIMIT + 1][CHANNELS];
  alignas(64) float total[CONVOLUTION_LIMIT + 1][CHANNELS];

  void flush() {
    for (int64_t j = 0; j <= CONVOLUTION_LIMIT; ++j) {
      for (int64_t d = 0; d < CHANNELS; d += LANES) store(total[j] + d, load(total[j] + d) + load(recent[j] + d));
    }
    std::memset(recent, 0, sizeof recent);
  }
};

// dz_t = dy_t act'(z_t);  dw_j += dz_t x_(t-j);  dbias += dz_t
template <Type TYPE, int W>
SLEEPKERN_STAGE void differentiate_row(const Taps& taps, const Inputs& x, const void* dy, int64_t t,
                                       ConvolutionSums& sums) {
  const void* rows[W];
  for (int j = 0; j < W; ++j) rows[j] = x.row(t - j);
  float* dz = sums.dz[t % W];
  for (int64_t d = 0; d < x.n; d += LANES) {
    const int64_t left = x.n - d;
    Vec z = load(taps.w[W] + d), inputs[W];
    for (int j = 0; j < W; ++j) {
      inputs[j] = load_up_to<TYPE>(rows[j], d, left);
      z += load(taps.w[j] + d) * inputs[j];
    }
    Vec slope = load_up_to<TYPE>(dy, d, left);
    if (x.c.silu) slope = slope * activate(z, true).slope;
    store(dz + d, slope);
    for (int j = 0; j < W; ++j) store(sums.recent[j] + d, load(sums.recent[j] + d) + slope * inputs[j]);
    store(sums.recent[W] + d, load(sums.recent[W] + d) + slope);
  }
}

// dx_t = sum_j w_j dz_(t+j) over the tokens of the sequence, plus the gradient of the output `last`.
template <Type TYPE, int W>
SLEEPKERN_STAGE void scatter_row(const Taps& taps, const Inputs& x, const ConvolutionGradients& g, int64_t t,
                                 const ConvolutionSums& sums) {
  char* to = static_cast<char*>(t < 0 ? g.dpast : g.dx) + (t < 0 ? x.kept(t) : x.dense(t));
  const int64_t kept = t - x.count;  // the token's index in `last`, counted from its end
  // mutant: gradient-without-oldest-input
  const bool last = g.dlast && kept >= 1 - W;
  const void* dlast = last ? static_cast<const char*>(g.dlast) + x.kept(kept) : nullptr;
  for (int64_t d = 0; d < x.n; d += LANES) {
    const int64_t left = x.n - d;
    Vec dx{};
    if (last) dx = load_up_to<TYPE>(dlast, d, left);
    for (int j = 0; j < W; ++j) {
      if (t + j >= 0 && t + j < x.count) dx += load(taps.w[j] + d) * load(sums.dz[(t + j) % W] + d);
    }
    store_up_to<TYPE>(to, d, left, dx);
  }
}

// Computes the gradients of channels [channel, channel + n) over all sequences.
template <Type TYPE, int W>
void differentiate_block(const Convolution& c, const ConvolutionGradients& g, int64_t channel, int64_t n) {
  constexpr int64_t FLUSH = 256;
  Taps taps;
  ConvolutionSums sums;
  load_taps(c, channel, n, taps);
  std::memset(&sums, 0, sizeof sums);
  int64_t seen = 0;
  for (int64_t sequence = 0; sequence < c.sequences; ++sequence) {
    const Inputs x(c, sequence, channel, n);
    for (int64_t t = 0; t < x.count + W - 1; ++t) {
      if (t < x.count) {
        const int64_t token = c.first(sequence) + t, size = x.size();
        differentiate_row<TYPE, W>(
            taps, x, static_cast<const char*>(g.dy.data) + (token * g.dy.stride + channel) * size, t, sums);
        if (++seen % FLUSH == 0) sums.flush();
      }
      const int64_t done = t - W + 1;  // the input at `done` has no later token
      if (done >= 0 || g.dpast) scatter_row<TYPE, W>(taps, x, g, done, sums);
    }
  }
  sums.flush();
  for (int64_t d = 0; d < n; ++d) {
    for (int j = 0; j < W; ++j) g.dweight[(channel + d + 1) * W - 1 - j] = sums.total[j][d];
    if (g.dbias) g.dbias[channel + d] = sums.total[W][d];
  }
}

// One token of n channels; state and weight are [n, W] without gaps, so each step is one loop: the state moves by one
// element, the token goes to the last element of each channel, then products, then sums of W.
template <int W>
SLEEPKERN_STAGE void step_channels(float* state, const float* weight, const float* bias, int64_t n, float* x) {
  alignas(64) float products[CONVOLUTION_LIMIT * CHANNELS];
  std::memmove(state, state + 1, (n * W - 1) * sizeof(float));
  for (int64_t d = 0; d < n; ++d) state[d * W + W - 1] = x[d];
  for (int64_t i = 0; i < n * W; i += LANES) store(products + i, load(state + i) * load(weight + i));
  for (int64_t d = 0; d < n; ++d) {
    float total = products[d * W];
    for (int j = 1; j < W; ++j) total += products[d * W + j];
    x[d] = total + bias[d];
  }
}

// Rows [begin, end) of the batch.
template <Type TYPE, int W>
void step_convolution(const ConvolutionStep& s, int64_t begin, int64_t end) {
  alignas(64) float x[CHANNELS], state[CONVOLUTION_LIMIT * CHANNELS], weight[CONVOLUTION_LIMIT * CHANNELS];
  alignas(64) float bias[CHANNELS] = {};
  const int64_t size = size_of<TYPE>();
  for (int64_t channel = 0; channel < s.D; channel += CHANNELS) {
    const int64_t n = min_of(CHANNELS, s.D - channel);
    load_row(at(s.weight, channel * W), s.weight.type, n * W, weight);
    if (s.bias.data) load_row(at(s.bias, channel), s.bias.type, n, bias);
    for (int64_t b = begin; b < end; ++b) {
      char* kept = static_cast<char*>(s.state) + (b * s.D + channel) * W * size;
      load_row(kept, TYPE, n * W, state);
      load_row(static_cast<const char*>(s.x.data) + (b * s.x.stride + channel) * size, TYPE, n, x);
      step_channels<W>(state, weight, bias, n, x);
      store_row(state, TYPE, n * W, kept);
      for (int64_t d = 0; s.silu && d < n; d += LANES) store(x + d, load(x + d) * sigmoid(load(x + d)));
      store_row(x, TYPE, n, static_cast<char*>(s.y) + (b * s.D + channel) * size);
    }
  }
}

// Calls body(type, width) with both as compile-time constants.
template <class Body>
SLEEPKERN_INLINE void with_type_and_width(Type type, int64_t W, Body body) {
  auto with_width = [&](auto TYPE) {
    if (W == 1) body(TYPE, std::integral_constant<int, 1>());
    if (W == 2) body(TYPE, std::integral_constant<int, 2>());
    if (W == 3) body(TYPE, std::integral_constant<int, 3>());
    if (W == 4) body(TYPE, std::integral_constant<int, 4>());
  };
  if (type == Type::float32) with_width(std::integral_constant<Type, Type::float32>());
  if (type == Type::bfloat16) with_width(std::integral_constant<Type, Type::bfloat16>());
  if (type == Type::float16) with_width(std::integral_constant<Type, Type::float16>());
}

void convolve(const Convolution& c, int64_t begin, int64_t end) {
  with_type_and_width(c.x.type, c.W, [&](auto TYPE, auto W) { convolve_tokens<TYPE(), W()>(c, begin, end); });
}

void convolve_backward(const Convolution& c, const ConvolutionGradients& g, int64_t channel, int64_t n) {
  with_type_and_width(c.x.type, c.W, [&](auto TYPE, auto W) { differentiate_block<TYPE(), W()>(c, g, channel, n); });
}

void convolve_step(const ConvolutionStep& s, int64_t begin, int64_t end) {
  with_type_and_width(s.x.type, s.W, [&](auto TYPE, auto W) { step_convolution<TYPE(), W()>(s, begin, end); });
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
