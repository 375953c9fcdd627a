// Decode: a few tokens on the state in the caller's layout, row-major [K, V]. The time is that of the state's bytes. So
// each token reads the state twice (the second time from L2) and writes it once, row after row, an order that the
// hardware prefetches:
//
//   u = (a S)^T k,  y = (a S)^T q;   e = b (v - [delta] u);   o = scale (y + (q.k) e);   S <- a S + k e^T
//
// The elements E of a state are float, or Bf16 with half the bytes. All sums are those of floats.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/recurrence.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/pack_tokens.h"
#include "cpu/recurrence/raw_gates.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

constexpr int DECODE_ROWS = 4;
#define SLEEPKERN_EACH_DECODE_ROW(r) _Pragma("GCC unroll 4") for (int r = 0; r < DECODE_ROWS; ++r)

struct DecodeToken {
  const float* k;          // [K], then zeros up to a whole vector, as the next three
  const float* decay;      // a
  const float* decayed_k;  // a k
  const float* decayed_q;  // a q
  float b, qk;
};

template <class E>
constexpr Type STATE_TYPE = std::is_same_v<E, Bf16> ? Type::bfloat16 : Type::float32;

// A v-tile of the state: `columns` value columns, a multiple of LANES. `next` is the distance from it to the state that
// is decoded next, in elements.
template <class E>
struct StateColumns {
  E* data;
  int64_t rows, stride, columns, next;

  // Beyond the last row this is the last row again, which is multiplied by zero.
  E* row(int64_t d) const { return data + min_of(d, rows - 1) * stride; }
};

template <class E>
SLEEPKERN_STAGE void decode_read(const DecodeToken& x, const StateColumns<E>& s, float* u, float* y) {
  for (int64_t n = 0; n < s.columns; n += LANES) {
    store(u + n, Vec{});
    store(y + n, Vec{});
  }
  for (int64_t d = 0; d < s.rows; d += DECODE_ROWS) {
    const E* rows[DECODE_ROWS];
    Vec k[DECODE_ROWS], q[DECODE_ROWS];
    SLEEPKERN_EACH_DECODE_ROW(r) {
      rows[r] = s.row(d + r);
      k[r] = broadcast(x.decayed_k[d + r]);
      q[r] = broadcast(x.decayed_q[d + r]);
    }
    for (int64_t n = 0; n < s.columns; n += LANES) {
      Vec prediction = load(u + n), output = load(y + n);
      SLEEPKERN_EACH_DECODE_ROW(r) {
        const Vec at = load(rows[r] + n);
        prediction += k[r] * at;
        output += q[r] * at;
      }
      store(u + n, prediction);
      store(y + n, output);
    }
  }
}

template <class E>
SLEEPKERN_STAGE void decode_write(const DecodeToken& x, const StateColumns<E>& s, const float* e) {
  const int64_t next = s.next;  // where no state follows, the prefetch has no effect
  for (int64_t d = 0; d < s.rows; d += DECODE_ROWS) {
    E* rows[DECODE_ROWS];
    Vec k[DECODE_ROWS], a[DECODE_ROWS];
    const bool whole = d + DECODE_ROWS <= s.rows;
    SLEEPKERN_EACH_DECODE_ROW(r) {
      rows[r] = s.row(d + r);
      k[r] = broadcast(x.k[d + r]);
      a[r] = broadcast(x.decay[d + r]);
    }
    for (int64_t n = 0; n < s.columns; n += LANES) {
      const Vec write = load(e + n);
      SLEEPKERN_EACH_DECODE_ROW(r) {
        if (whole || d + r < s.rows) store(rows[r] + n, a[r] * load(rows[r] + n) + k[r] * write);
        __builtin_prefetch(rows[r] + n + next, 0, 2);
      }
    }
  }
}

// Replaces v by o. u and y are scratch for a row of columns.
template <class E>
SLEEPKERN_INLINE void decode_tile(const DecodeToken& x, bool delta, float scale, const StateColumns<E>& s, float* u,
                                  float* y, float* v) {
  decode_read(x, s, u, y);
  for (int64_t n = 0; n < s.columns; n += LANES) {
    const Vec value = load(v + n), e = (delta ? value - load(u + n) : value) * x.b;
    store(u + n, e);
    store(v + n, (load(y + n) + e * x.qk) * scale);
  }
  decode_write(x, s, u);
}

// Computes one token. Columns that fill no vector are converted to floats in `spare`, [K][LANES], and back.
template <class E>
static void decode_columns(const DecodeToken& x, const Problem& problem, E* state, int64_t next, float* v, float* u,
                           float* y, float* spare) {
  const int64_t whole = problem.V / LANES * LANES, width = problem.V - whole;
  const StateColumns<E> columns{state, problem.K, problem.V, whole, next};
  if (whole) decode_tile(x, problem.delta, problem.scale, columns, u, y, v);
  if (width == 0) return;
  for (int64_t d = 0; d < problem.K; ++d) {
    store(spare + d * LANES, Vec{});
    load_row(state + d * problem.V + whole, STATE_TYPE<E>, width, spare + d * LANES);
  }
  const StateColumns<float> rest{spare, problem.K, LANES, LANES, 0};
  decode_tile(x, problem.delta, problem.scale, rest, u, y, v + whole);
  for (int64_t d = 0; d < problem.K; ++d)
    store_row(spare + d * LANES, STATE_TYPE<E>, width, state + d * problem.V + whole);
}

// Decodes token t of a chunk on a contiguous state [K, V] in place, from which the next state is `next` elements away.
template <class E>
SLEEPKERN_STAGE void decode_token(const Chunk& chunk, Workspace& work, int64_t t, E* state, int64_t next) {
  const Problem& problem = chunk.problem;
  const int64_t size = problem.v.type == Type::float32 ? 4 : 2;
  float *k = work.rows, *q = k + work.row_size, *decay = q + work.row_size, *v = decay + work.row_size;
  load_token(chunk, work, problem.k, t, k);
  if (problem.want_output) {
    load_token(chunk, work, problem.q, t, q);
  } else {
    std::memset(q, 0, work.row_size * sizeof(float));
  }
  std::memset(decay, 0, work.row_size * sizeof(float));
  if (problem.gate == Gate::channel)
    load_row(chunk.row(problem.g, t, chunk.head * problem.K), problem.g.type, problem.K, decay);
  float g = problem.gate == Gate::head ? load_scalar(chunk.row(problem.g, t, chunk.head), problem.g.type, 0) : 0.0f;
  float b = problem.beta.data ? load_scalar(chunk.row(problem.beta, t, chunk.head), problem.beta.type, 0) : 1.0f;
  if (problem.raw_decay || problem.beta_scale != 0) make_token_gates(problem, chunk.head, g, decay, b);
  Vec qk{};
  float *decayed_k = work.keys, *decayed_q = work.q_panels;
  for (int64_t d = 0; d < problem.K; d += LANES) {
    const Vec a = exp_nonpositive(load(decay + d) + g);
    store(decay + d, a);
    store(decayed_k + d, a * load(k + d));
    store(decayed_q + d, a * load(q + d));
    qk += load(k + d) * load(q + d);
  }
  load_row(chunk.row(problem.v, t, chunk.head * problem.V), problem.v.type, problem.V, v);
  decode_columns({k, decay, decayed_k, decayed_q, b, sum(qk)}, problem, state, next, v, work.gram_kk, work.gram_qk,
                 work.k_tails);
  if (problem.want_output)
    store_row(v, problem.v.type, problem.V,
              static_cast<char*>(problem.o) + ((chunk.first + t) * problem.HV + chunk.head) * problem.V * size);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
