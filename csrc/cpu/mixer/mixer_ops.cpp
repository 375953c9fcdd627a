// Short convolution and gated norm: the threads' shares of their work.
#include "common/mixer_ops.h"

#include <algorithm>
#include <cstring>

#include "cpu/runtime/huge_pages.h"
#include "cpu/runtime/implementation.h"
#include "cpu/runtime/thread_pool.h"

namespace sleepkern {

namespace {

constexpr int64_t SHARE = 16384;  // elements that are worth handing to a thread: some 10 microseconds

template <class Run>
void over(int64_t n, int64_t numbers_each, Run run) {
  auto body = [](int64_t begin, int64_t end, void* run) { (*static_cast<Run*>(run))(begin, end); };
  parallel_for(n, SHARE / std::max<int64_t>(numbers_each, 1) + 1, body, &run);
}

int64_t bytes_of(Type type) { return type == Type::float32 ? 4 : 2; }

}  // namespace

// Copies the last W - 1 inputs of each sequence: tokens, and the end of `past` where there are too few tokens.
void keep_last(const Convolution& c) {
  const int64_t kept = c.W - 1, row = c.D * bytes_of(c.x.type);
  for (int64_t n = 0; n < c.sequences; ++n) {
    const int64_t first = c.first(n), count = c.first(n + 1) - first;
    for (int64_t i = 0; i < kept; ++i) {
      char* to = static_cast<char*>(c.last) + (n * kept + i) * row;
      const int64_t t = count - kept + i;
      if (t >= 0) {
        std::memcpy(to, static_cast<const char*>(c.x.data) + (first + t) * c.x.stride * bytes_of(c.x.type), row);
      } else if (c.past) {
        std::memcpy(to, static_cast<const char*>(c.past) + (n * kept + kept + t) * row, row);
      } else {
        std::memset(to, 0, row);
      }
    }
  }
}

void convolve(const Convolution& c) {
  const Implementation& isa = implementation();
  prefer_huge_pages(c.y, c.tokens() * c.D * bytes_of(c.x.type));
  over(c.tokens(), c.D, [&](int64_t begin, int64_t end) { isa.convolve(c, begin, end); });
  keep_last(c);
}

void convolve_backward(const Convolution& c, const ConvolutionGradients& g) {
  const Implementation& isa = implementation();
  prefer_huge_pages(g.dx, c.tokens() * c.D * bytes_of(c.x.type));
  // Each tile of channels is one thread's, since its sums run over all tokens.
  const int64_t block = std::clamp<int64_t>(c.D / (2 * thread_count()) / 64 * 64, 64, CHANNELS);
  over((c.D + block - 1) / block, block * c.tokens(), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) isa.convolve_backward(c, g, n * block, std::min(block, c.D - n * block));
  });
}

void convolve_step(const ConvolutionStep& s) {
  const Implementation& isa = implementation();
  over(s.B, s.D, [&](int64_t begin, int64_t end) { isa.convolve_step(s, begin, end); });
}

void gated_norm(const GatedNorm& p) {
  const Implementation& isa = implementation();
  prefer_huge_pages(p.y, p.tokens * p.heads * p.V * bytes_of(p.x.type));
  over(p.tokens, p.heads * p.V, [&](int64_t begin, int64_t end) { isa.gated_norm(p, begin, end); });
}

void gated_norm_backward(const GatedNorm& p, const GatedNormGradients& g) {
  const Implementation& isa = implementation();
  prefer_huge_pages(g.dx, p.tokens * p.heads * p.V * bytes_of(p.x.type));
  prefer_huge_pages(g.dgate, p.tokens * p.heads * p.V * bytes_of(p.gate.type));
  over(g.parts, p.tokens * p.heads * p.V / g.parts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) isa.gated_norm_backward(p, g, part);
  });
}

}  // namespace sleepkern
