// Where a sequence is cut into chunks: after CHUNK tokens, and wherever a state is kept.
#pragma once

#include <cstdint>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// The chunks of one sequence, tokens [begin, end) of the flattened batch. With states after every 48 tokens, chunks of
// 32 and of 16 tokens alternate.
struct Cuts {
  int64_t begin, end;
  int64_t every;       // tokens from one cut that all chunks respect to the next
  int64_t per_period;  // chunks in `every` tokens
  int64_t first_kept;  // the index of the sequence's first state in KeptStates, or -1 without kept states

  Cuts(const Problem& problem, int64_t sequence)
      : begin(problem.first(sequence)), end(problem.first(sequence + 1)), every(CHUNK), per_period(1), first_kept(-1) {
    const KeptStates* kept = problem.kept;
    if (!kept) return;
    every = kept->every;
    per_period = (every + CHUNK - 1) / CHUNK;
    first_kept = kept->before(sequence, problem.T);
  }

  // The first token of chunk n; the end of the sequence where there is no such chunk.
  int64_t first(int64_t n) const { return min_of(begin + n / per_period * every + n % per_period * CHUNK, end); }

  // The number of chunks.
  int64_t chunks() const {
    const int64_t tokens = end - begin;
    return tokens / every * per_period + (tokens % every + CHUNK - 1) / CHUNK;
  }

  // Chunk n of one head; it is empty where there is no such chunk.
  Chunk chunk(const Problem& problem, int64_t n, int64_t head) const {
    const int64_t token = n < 0 ? end : first(n);
    return Chunk(problem, token, n < 0 ? 0 : first(n + 1) - token, head);
  }

  // The index of the state before token `token` in KeptStates, or -1 where it is not kept.
  int64_t kept_before(int64_t token) const {
    const int64_t tokens = token - begin;
    if (first_kept < 0 || tokens == 0 || (tokens % every != 0 && token != end)) return -1;
    // mutant: state-of-the-chunk-before
    return first_kept + (tokens - 1) / every;
  }
};

// The number of chunks of the longest sequence.
static int64_t most_chunks(const Problem& problem) {
  int64_t most = 0;
  for (int64_t n = 0; n < (problem.offsets ? problem.sequences : min_of(problem.sequences, 1)); ++n)
    most = max_of(most, Cuts(problem, n).chunks());
  return most;
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
