// Decode: a few tokens on the state in the caller's layout, row-major [K, V]. The time is that of the state's bytes. So
// each token reads the state twice (the second time from L2) and writes it once, row after row, an order that the
// hardware prefetches:
//
//   u = (a S)^T k,  y = (a S)^T q;   e = b (v - [delta] u);   o = scale (y + (q.k) e);   S <- a S + k e^T
#pragma once

#include <cstdint>
#include <cstring>

#include "common/recurrence.h"
#include "cpu/recurrence/buffers.h"
#include "cpu/recurrence/pack_tokens.h"
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

// A v-tile of the state: `columns` value columns, a multiple of LANES.
struct StateColumns {
  float* data;
  int64_t rows, stride, columns;

  // Beyond the last row this is the last row again, which is multiplied by zero.
  float* row(int64_t d) const { return data + min_of(d, rows - 1) * stride; }
};

SLEEPKERN_STAGE void decode_read(const DecodeToken& x, const StateColumns& s, float* u, float* y) {
  for (int64_t n = 0; n < s.columns; n += LANES) {
    store(u + n, Vec{});
    store(y + n, Vec{});
  }
  for (int64_t d = 0; d < s.rows; d += DECODE_ROWS) {
    const float* rows[DECODE_ROWS];
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

SLEEPKERN_STAGE void decode_write(const DecodeToken& x, const StateColumns& s, const float* e) {
  const int64_t next =
      s.rows * s.stride;  // the next head's state follows this one; after the last head the prefetch has no effect
  for (int64_t d = 0; d < s.rows; d += DECODE_ROWS) {
    float* rows[DECODE_ROWS];
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
SLEEPKERN_INLINE void decode_tile(const DecodeToken& x, bool delta, float scale, const StateColumns& s, float* u,
                                  float* y, float* v) {
  decode_read(x, s, u, y);
  for (int64_t n = 0; n < s.columns; n += LANES) {
    const Vec value = load(v + n), e = (delta ? value - load(u + n) : value) * x.b;
    store(u + n, e);
    store(v + n, (load(y + n) + e * x.qk) * scale);
  }
  decode_write(x, s, u);
}

// Computes one token. Columns that fill no vector are copied to `spare`, [K][LANES], and back.
static void decode_columns(const DecodeToken& x, const Problem& p, float* state, float* v, float* u, float* y,
                           float* spare) {
  const int64_t whole = p.V / LANES * LANES, width = p.V - whole;
  if (whole) decode_tile(x, p.delta, p.scale, {state, p.K, p.V, whole}, u, y, v);
  if (width == 0) return;
  for (int64_t d = 0; d < p.K; ++d) {
    store(spare + d * LANES, Vec{});
    copy_tail(spare + d * LANES, state + d * p.V + whole, width);
  }
  decode_tile(x, p.delta, p.scale, {spare, p.K, LANES, LANES}, u, y, v + whole);
  for (int64_t d = 0; d < p.K; ++d) copy_tail(state + d * p.V + whole, spare + d * LANES, width);
}

SLEEPKERN_STAGE void decode_token(const Chunk& c, Workspace& w, int64_t t, float* state) {
  const Problem& p = c.p;
  const int64_t size = p.v.type == Type::float32 ? 4 : 2;
  float *k = w.rows, *q = k + w.row_size, *decay = q + w.row_size, *v = decay + w.row_size;
  load_token(c, w, p.k, t, k);
  if (p.want_output) {
    load_token(c, w, p.q, t, q);
  } else {
    std::memset(q, 0, w.row_size * sizeof(float));
  }
  std::memset(decay, 0, w.row_size * sizeof(float));
  if (p.gate == Gate::channel) load_row(c.row(p.g, t, c.head * p.K), p.g.type, p.K, decay);
  const float g = p.gate == Gate::head ? load_scalar(c.row(p.g, t, c.head), p.g.type, 0) : 0.0f;
  Vec qk{};
  float *decayed_k = w.keys, *decayed_q = w.q_panels;
  for (int64_t d = 0; d < p.K; d += LANES) {
    const Vec a = exp_nonpositive(load(decay + d) + g);
    store(decay + d, a);
    store(decayed_k + d, a * load(k + d));
    store(decayed_q + d, a * load(q + d));
    qk += load(k + d) * load(q + d);
  }
  load_row(c.row(p.v, t, c.head * p.V), p.v.type, p.V, v);
  const float b = p.beta.data ? load_scalar(c.row(p.beta, t, c.head), p.beta.type, 0) : 1.0f;
  decode_columns({k, decay, decayed_k, decayed_q, b, sum(qk)}, p, state, v, w.gram_kk, w.gram_qk, w.k_tails);
  if (p.want_output)
    store_row(v, p.v.type, p.V, static_cast<char*>(p.o) + ((c.first + t) * p.HV + c.head) * p.V * size);
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
