// Converts tokens of the caller's tensors to float rows and to panels.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "common/recurrence.h"
#include "cpu/gemm/microkernel.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/simd/bf16.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

// Tokens [first, first + count) of one head of one sequence; rows beyond count have k = v = q = b = g = 0.
struct Chunk {
  const Problem& problem;
  int64_t first, count, head, padded;  // padded: count rounded up to whole tiles

  Chunk(const Problem& problem, int64_t first, int64_t count, int64_t head)
      : problem(problem), first(first), count(count), head(head), padded(round_up(count, ROWS)) {}

  const void* row(const Rows& x, int64_t token, int64_t offset) const {
    const int64_t size = x.type == Type::float32 ? 4 : 2;
    return static_cast<const char*>(x.data) + ((first + token) * x.stride + offset) * size;
  }
  int64_t key_head() const { return head / (problem.HV / problem.H); }
};

// Sets the last, partial vector of a row to zero beyond n.
SLEEPKERN_INLINE void clear_beyond(float* row, int64_t n) {
  for (int64_t d = n; d % LANES != 0; ++d) row[d] = 0;
}

// One token's q or k as floats, zero beyond K and beyond the sequence.
SLEEPKERN_INLINE void load_as_it_is(const Chunk& chunk, const Workspace& work, const Rows& x, int64_t t, float* out) {
  const int64_t K = work.K;
  const bool live = t < chunk.count;
  for (int64_t d = live ? round_up(K, LANES) : 0; d < work.row_size; d += LANES) store(out + d, Vec{});
  if (!live) return;
  load_row(chunk.row(x, t, chunk.key_head() * K), x.type, K, out);
  clear_beyond(out, K);
}

SLEEPKERN_INLINE float squared_length(const Workspace& work, const float* row) {
  Vec square{};
  for (int64_t d = 0; d < work.K; d += LANES) square += load(row + d) * load(row + d);
  return sum(square);
}

constexpr float SHRINK = 0x1p-70f;

// The factor that gives a row length 1, from the square of its length. Where the square overflows float32, the row is
// first multiplied by SHRINK, which is exact.
SLEEPKERN_INLINE float normalising(const Workspace& work, float* row, float& square) {
  if (square <= std::numeric_limits<float>::max()) return 1.0f / std::sqrt(square + static_cast<float>(NORM_EPS));
  for (int64_t d = 0; d < work.K; d += LANES) store(row + d, load(row + d) * SHRINK);
  square = squared_length(work, row);
  return 1.0f / std::sqrt(square);
}

// One token's q or k, normalised if the problem says so; returns the factor.
SLEEPKERN_INLINE float load_token(const Chunk& chunk, const Workspace& work, const Rows& x, int64_t t, float* out) {
  load_as_it_is(chunk, work, x, t, out);
  if (!chunk.problem.normalize || t >= chunk.count) return 1.0f;
  const float given = squared_length(work, out);
  float square = given;
  const float factor = normalising(work, out, square);
  for (int64_t d = 0; d < work.K; d += LANES) store(out + d, load(out + d) * factor);
  return square == given ? factor : factor * SHRINK;
}

// Packs LANES token rows as columns of a matrix in panels of K rows.
SLEEPKERN_INLINE void pack_tokens(const Workspace& work, const float* rows, int64_t t, float* panels) {
  float* columns = panels + column_at(t, work.K);
  for (int64_t d = 0; d + LANES <= work.K; d += LANES) {
    transpose(rows + d, work.row_size, columns + d * PANEL, PANEL);
  }
  for (int64_t d = work.K / LANES * LANES; d < work.K; ++d) {
    for (int l = 0; l < LANES; ++l) columns[d * PANEL + l] = rows[l * work.row_size + d];
  }
}

SLEEPKERN_INLINE void pack_tokens(const Workspace& work, const float* rows, int64_t t, Bf16x2* panels) {
  const int64_t depth = steps<Bf16x2>(work.K);
  Bf16x2* columns = panels + column_at(t, depth);
  alignas(64) float block[LANES * LANES], transposed[LANES * LANES];  // words of bits; a transpose moves them unchanged
  for (int64_t d = 0; d < depth; d += LANES) {
    for (int l = 0; l < LANES; ++l) {
      store(block + l * LANES, reinterpret_cast<Vec>(load_bf16x2(rows + l * work.row_size + 2 * d)));
    }
    transpose(block, LANES, transposed, LANES);
    for (int64_t n = 0; n < min_of(LANES, depth - d); ++n) {
      store(columns + (d + n) * PANEL, reinterpret_cast<BitVec>(load(transposed + n * LANES)));
    }
  }
}

// Packs token t's row in the transposed form, [K_rows / PANEL][CHUNK][PANEL].
SLEEPKERN_INLINE void pack_row(const Workspace& work, const float* row, int64_t t, float* transposed) {
  for (int64_t d = 0; d < work.K_rows; d += PANEL) {
    float* to = transposed + d * CHUNK + t * PANEL;
    SLEEPKERN_EACH_VEC(n) store(to + n * LANES, load(row + d + n * LANES));
  }
}

// Packs LANES rows in that form, from token t on.
SLEEPKERN_INLINE void pack_rows(const Workspace& work, const float* rows, int64_t t, float* transposed) {
  for (int l = 0; l < LANES; ++l) pack_row(work, rows + l * work.row_size, t + l, transposed);
}

SLEEPKERN_INLINE void pack_rows(const Workspace& work, const float* rows, int64_t t, Bf16x2* transposed) {
  for (int l = 0; l < LANES; l += 2) {
    const float* row = rows + l * work.row_size;
    for (int64_t d = 0; d < work.K_rows; d += PANEL) {
      Bf16x2* to = transposed + d * CHUNK / 2 + (t + l) / 2 * PANEL;
      SLEEPKERN_EACH_VEC(n) {
        const float* at = row + d + n * LANES;
        store(to + n * LANES, interleave(load(at), load(at + work.row_size)));
      }
    }
  }
}

// Multiplies each token's row of one panel by its factor.
SLEEPKERN_INLINE void scale_tokens(const Chunk& chunk, const float* rows, const float* by, float* out) {
  for (int64_t t = 0; t < chunk.padded; ++t) {
    SLEEPKERN_EACH_VEC(n) store(out + t * PANEL + n * LANES, load(rows + t * PANEL + n * LANES) * by[t]);
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
