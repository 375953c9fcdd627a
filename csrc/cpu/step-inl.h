// A few tokens on the state as the caller keeps it, row-major [K, V]: decode. Bound by the bytes of the state, so each
// token reads it twice (the second time from L1) and writes it once, in blocks of BLOCK value columns:
//
//   u = (a S)^T k,  y = (a S)^T q;   e = b (v - [delta] u);   o = scale (y + (q.k) e);   S <- a S + k e^T

constexpr int STEP_VECS = 4;
constexpr int64_t BLOCK = STEP_VECS * LANES;

struct StepToken {
  const float* k;          // [K]
  const float* decay;      // [K] a
  const float* decayed_k;  // [K] a k
  const float* decayed_q;  // [K] a q
  float b, qk;
};

#define SLEEPKERN_EACH_COLUMN(n) _Pragma("GCC unroll 4") for (int n = 0; n < W; ++n)

// One block of W vectors of value columns of one token; v becomes o.
template <int W>
SLEEPKERN_INLINE void step_block(const StepToken& x, bool delta, float scale, int64_t K, float* state, int64_t stride,
                                 float* v) {
  Vec u[W], y[W];
  SLEEPKERN_EACH_COLUMN(n) u[n] = y[n] = Vec{};
  for (int64_t d = 0; d < K; ++d) {
    const Vec k = broadcast(x.decayed_k[d]), q = broadcast(x.decayed_q[d]);
    SLEEPKERN_EACH_COLUMN(n) {
      const Vec s = load(state + d * stride + n * LANES);
      u[n] += k * s;
      y[n] += q * s;
    }
  }
  Vec e[W];
  SLEEPKERN_EACH_COLUMN(n) {
    const Vec value = load(v + n * LANES);
    e[n] = (delta ? value - u[n] : value) * x.b;
    store(v + n * LANES, (y[n] + e[n] * x.qk) * scale);
  }
  for (int64_t d = 0; d < K; ++d) {
    const Vec k = broadcast(x.k[d]), a = broadcast(x.decay[d]);
    SLEEPKERN_EACH_COLUMN(n) {
      float* at = state + d * stride + n * LANES;
      store(at, a * load(at) + k * e[n]);
    }
  }
}

static void step_columns(const StepToken& x, const Problem& p, float* state, float* v, float* spare) {
  int64_t first = 0;
  for (; first + BLOCK <= p.V; first += BLOCK) {
    step_block<STEP_VECS>(x, p.delta, p.scale, p.K, state + first, p.V, v + first);
  }
  for (; first + LANES <= p.V; first += LANES) {
    step_block<1>(x, p.delta, p.scale, p.K, state + first, p.V, v + first);
  }
  const int64_t width = p.V - first;
  if (width == 0) return;
  for (int64_t d = 0; d < p.K; ++d) {
    store(spare + d * LANES, Vec{});
    copy_tail(spare + d * LANES, state + d * p.V + first, width);
  }
  step_block<1>(x, p.delta, p.scale, p.K, spare, LANES, v + first);
  for (int64_t d = 0; d < p.K; ++d) copy_tail(state + d * p.V + first, spare + d * LANES, width);
}

SLEEPKERN_STAGE void step_token(const Chunk& c, Workspace& w, int64_t t, float* state) {
  const Problem& p = c.p;
  const int64_t size = p.v.type == Type::float32 ? 4 : 2;
  float *k = w.rows, *q = k + w.row_size, *decay = q + w.row_size, *v = decay + w.row_size;
  load_token(c, w, p.k, t, k);
  if (p.reads) {
    load_token(c, w, p.q, t, q);
  } else {
    std::memset(q, 0, w.row_size * sizeof(float));
  }
  std::memset(decay, 0, w.row_size * sizeof(float));
  if (p.gate == Gate::channel) load_row(c.row(p.g, t, c.head * p.K), p.g.type, p.K, decay);
  const float g = p.gate == Gate::head ? load_scalar(c.row(p.g, t, c.head), p.g.type, 0) : 0.0f;
  Vec qk{};
  float *decayed_k = w.keys, *decayed_q = w.readers;
  for (int64_t d = 0; d < p.K; d += LANES) {
    const Vec a = exp_nonpositive(load(decay + d) + g);
    store(decay + d, a);
    store(decayed_k + d, a * load(k + d));
    store(decayed_q + d, a * load(q + d));
    qk += load(k + d) * load(q + d);
  }
  load_row(c.row(p.v, t, c.head * p.V), p.v.type, p.V, v);
  const float b = p.beta.data ? load_scalar(c.row(p.beta, t, c.head), p.beta.type, 0) : 1.0f;
  step_columns({k, decay, decayed_k, decayed_q, b, sum(qk)}, p, state, v, w.writers);
  if (p.reads) store_row(v, p.v.type, p.V, static_cast<char*>(p.o) + ((c.first + t) * p.HV + c.head) * p.V * size);
}
