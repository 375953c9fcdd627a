// Decode on states that are anywhere: rows of a pool, of float32 or bfloat16, updated in place or kept after each
// token.
//
// One token in place is decoded where its state is. Any other head is computed on a copy of floats, which stays in L2:
// the state is read once from memory, and each state that is kept is written once.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/decode.h"
#include "common/recurrence.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/decode.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/runtime/arena.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// Sets the outputs of one head of a sequence without a state to 0.
static void clear_outputs(const Chunk& tokens) {
  const Problem& problem = tokens.problem;
  const int64_t bytes = problem.V * (problem.v.type == Type::float32 ? 4 : 2);
  for (int64_t t = tokens.first; t < tokens.first + tokens.count; ++t)
    std::memset(static_cast<char*>(problem.o) + (t * problem.HV + tokens.head) * bytes, 0, bytes);
}

// Decodes on a copy of the state.
static void decode_copy(const Chunk& tokens, const DecodeStates& states, Workspace& work, const void* from,
                        int64_t sequence) {
  const Problem& problem = tokens.problem;
  const int64_t size = problem.K * problem.V;
  float* state = work.states;
  load_row(from, states.type, size, state);
  for (int64_t t = 0; t < tokens.count; ++t) {
    decode_token(tokens, work, t, state, 0);
    if (!states.each_token && t + 1 < tokens.count) continue;
    void* to = states.at(states.to, states.each_token ? tokens.first + t : sequence, tokens.head);
    if (to) store_row(state, states.type, size, to);
  }
}

template <class E>
static void decode_heads_of(const Problem& problem, const DecodeStates& states, int64_t begin, int64_t end) {
  Workspace& work = thread_local_arrays<Workspace>(problem, false);
  const bool in_place = !states.each_token;
  for (int64_t bh = begin; bh < end; ++bh) {
    const int64_t sequence = bh / problem.HV, first = problem.first(sequence);
    const Chunk tokens(problem, first, problem.first(sequence + 1) - first, bh % problem.HV);
    E* state = static_cast<E*>(states.at(states.from, sequence, tokens.head));
    if (!state) {
      if (problem.want_output) clear_outputs(tokens);
    } else if (in_place && tokens.count == 1) {
      const auto* after = static_cast<const E*>(
          bh + 1 < end ? states.at(states.from, (bh + 1) / problem.HV, (bh + 1) % problem.HV) : state);
      const auto bytes = reinterpret_cast<intptr_t>(after ? after : state) - reinterpret_cast<intptr_t>(state);
      decode_token(tokens, work, 0, state, bytes / static_cast<int64_t>(sizeof(E)));
    } else {
      decode_copy(tokens, states, work, state, sequence);
    }
  }
}

// Computes heads [begin, end) of sequences * HV.
void decode_heads(const Problem& problem, const DecodeStates& states, int64_t begin, int64_t end) {
  if (states.type == Type::bfloat16) return decode_heads_of<Bf16>(problem, states, begin, end);
  decode_heads_of<float>(problem, states, begin, end);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
