// Software prefetch of the next chunk while the current one is computed.
#pragma once

#include <cstdint>

#include "common/recurrence.h"
#include "cpu/recurrence/pack_tokens.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// Prefetches the rows of the next chunk, one between two tiles of the current chunk. The hardware prefetcher does not
// follow these rows: they are a whole token apart, each on a page of its own. A burst of prefetches would delay the
// loads of the current chunk.
struct PrefetchSchedule {
  struct Tensor {
    const char* row;
    int64_t rows, stride, bytes;
  };
  Tensor tensors[12];  // k, v, q, g, o or its gradient, their gradients, states
  int64_t count = 0, tensor = 0, total = 0, steps, due = 0;

  // `steps` says how often step is called until the current chunk is done.
  explicit PrefetchSchedule(int64_t steps) : steps(steps) {}

  // Adds rows of n elements of a chunk's tokens.
  void add(const Chunk& chunk, const Rows& x, int64_t offset, int64_t n) {
    if (!x.data || chunk.count <= 0) return;
    const int64_t size = x.type == Type::float32 ? 4 : 2;
    add(chunk.row(x, 0, offset), chunk.count, x.stride * size, n * size);
  }

  void add(const void* first, int64_t rows, int64_t stride, int64_t bytes) {
    tensors[count++] = {static_cast<const char*>(first), rows, stride, bytes};
    total += rows;
  }

  // Adds a head's state in the caller's layout.
  void add_state(const Problem& problem, const float* states, int64_t bh) {
    const int64_t bytes = problem.V * static_cast<int64_t>(sizeof(float));
    add(states + bh * problem.K * problem.V, problem.K, bytes, bytes);
  }

  void add_inputs(const Chunk& chunk) {
    const Problem& problem = chunk.problem;
    add(chunk, problem.k, chunk.key_head() * problem.K, problem.K);
    add(chunk, problem.v, chunk.head * problem.V, problem.V);
    if (problem.want_output) add(chunk, problem.q, chunk.key_head() * problem.K, problem.K);
    if (problem.gate == Gate::channel) add(chunk, problem.g, chunk.head * problem.K, problem.K);
  }

  void step() {
    for (due += total; due >= steps && tensor < count; due -= steps) {
      Tensor& x = tensors[tensor];
      for (int64_t b = 0; b < x.bytes; b += 64) __builtin_prefetch(x.row + b, 0, 2);
      x.row += x.stride;
      if (--x.rows == 0) ++tensor;
    }
  }
};

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
