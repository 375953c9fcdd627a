// prepare: the chunk factors, all that does not depend on the state. The only stage that knows the rule.
//
//   keys, readers      k^T, q^T (normalised if asked for), and times E for channel decay
//   writers            Kt = k exp(G_C - G)
//   couplings, scores  M_ij = b_i k_i.k_j exp(G_i - G_j), i > j;   P_ij = scale q_i.k_j exp(G_i - G_j), i >= j
//
// Exponents are sums of log decays between two tokens, never positive.

// exp of it is 0 in every type; -inf itself would make differences of G into NaN.
constexpr float FORGET = -1e4f;

SLEEPKERN_STAGE void prepare_gates(const Chunk& c, Workspace& w) {
  const Problem& p = c.p;
  const bool head_decay = p.gate == Gate::head;
  double G = 0;
  for (int64_t t = 0; t < CHUNK; ++t) {
    const bool live = t < c.count;
    w.beta[t] = !live ? 0.0f : p.beta.data ? load_scalar(c.row(p.beta, t, c.head), p.beta.type, 0) : 1.0f;
    if (live && head_decay) {
      const float g = load_scalar(c.row(p.g, t, c.head), p.g.type, 0);
      G += g < FORGET ? FORGET : g;
    }
    w.log_decay[t] = G;
  }
  for (int64_t t = 0; t < CHUNK; t += LANES) {
    alignas(64) float since_start[LANES], until_end[LANES];
    for (int l = 0; l < LANES; ++l) {
      since_start[l] = static_cast<float>(w.log_decay[t + l]);
      until_end[l] = static_cast<float>(G - w.log_decay[t + l]);
    }
    Vec E = exp_nonpositive(load(since_start));
    store(w.since_start + t, E);
    store(w.key_scale + t, E * load(w.beta + t));
    store(w.read_scale + t, E * p.scale);
    store(w.to_end + t, exp_nonpositive(load(until_end)));
  }
  if (p.gate != Gate::channel) {
    const float keep = exp_nonpositive(broadcast(static_cast<float>(G)))[0];
    for (int64_t d = 0; d < w.K_rows; ++d) w.keep[d] = keep;
  }
}

// exp(G_i - G_j) of row j and LANES columns from i on; 0 for i < j. The differences are taken in double.
SLEEPKERN_INLINE Vec decay_row(const double* G, int64_t j, int64_t i) {
  const Vec span = narrow(load_double(G + i) - G[j]);
  const BitVec later = reinterpret_cast<BitVec>(lane_numbers() >= static_cast<int32_t>(j - i));
  const Vec decay = exp_nonpositive(reinterpret_cast<Vec>(reinterpret_cast<BitVec>(span) & later));
  return reinterpret_cast<Vec>(reinterpret_cast<BitVec>(decay) & later);
}

// The decay between any two tokens. Of columns behind a row's own vector R is the last token of that: a product,
// exp(G_i - R) exp(R - G_j), takes fewer exponentials.
SLEEPKERN_STAGE void prepare_decays(const Chunk& c, Workspace& w) {
  const double* G = w.log_decay;
  const int64_t end = round_up(c.count, PANEL);
  auto place = [&](int64_t j, int64_t i) { return w.decays + column_at(i, CHUNK) + j * PANEL; };
  for (int64_t own = 0; own < end; own += LANES) {
    const double R = G[own + LANES - 1];
    alignas(64) float until[LANES];
    store(until, exp_nonpositive(narrow(R - load_double(G + own))));
    for (int64_t j = own; j < own + LANES; ++j) {
      for (int64_t i = own / PANEL * PANEL; i < own; i += LANES) store(place(j, i), Vec{});
      store(place(j, own), decay_row(G, j, own));
    }
    for (int64_t i = own + LANES; i < end; i += LANES) {
      const Vec since = exp_nonpositive(narrow(load_double(G + i) - R));
      for (int64_t j = own; j < own + LANES; ++j) store(place(j, i), since * until[j - own]);
    }
  }
}

// Scores and couplings.
template <class E>
SLEEPKERN_STAGE void prepare_grams(const Chunk& c, Workspace& w) {
  const Operands<E> x = operands<E>(w, 0);
  const int64_t depth = steps<E>(w.K);
  const Vec scale = broadcast(c.p.scale);
  auto finish = [&](const float* by) {
    return
        [&w, by, scale](Vec x, int64_t at, int64_t i) { return x * load(w.decays + at) * (by ? load(by + i) : scale); };
  };
  if (c.p.delta) upper_gram<1>(x.keys, x.keys, depth, c.count, CHUNK, w.couplings, finish(w.beta));
  if (!c.p.reads) return;
  upper_gram<1>(x.keys, x.readers, depth, c.count, CHUNK, w.scores, finish(nullptr));
  if constexpr (IS_PAIR<E>) {
    for (int64_t i = 0; i < c.count; i += PANEL) {
      pair_rows(w.scores + i * CHUNK, min_of(i + PANEL, c.padded), w.score_pairs + i * CHUNK / 2);
    }
  }
}

// E: float, or Pair where products take bfloat16.
template <class E>
SLEEPKERN_STAGE void prepare(const Chunk& c, Workspace& w) {
  const Problem& p = c.p;
  auto panels = [](float* x) { return reinterpret_cast<E*>(x); };
  prepare_gates(c, w);
  if (p.gate == Gate::channel) {
    prepare_channel_decay(c, w);
    return;
  }
  const int64_t end = round_up(c.count, PANEL);
  for (int64_t t = 0; t < end; t += LANES) {
    for (int l = 0; l < LANES; ++l) w.key_norm[t + l] = load_token(c, w, p.k, t + l, w.rows + l * w.row_size);
    pack_tokens(w, w.rows, t, panels(w.keys));
    if (w.keys_turned) pack_rows(w, w.rows, t, w.keys_turned);
    for (int l = 0; l < LANES; ++l) {
      float* row = w.rows + l * w.row_size;
      const Vec factor = broadcast(w.to_end[t + l]);
      for (int64_t d = 0; d < w.K_rows; d += LANES) store(row + d, load(row + d) * factor);
    }
    pack_rows(w, w.rows, t, panels(w.writers));
    if (!p.reads) continue;
    for (int l = 0; l < LANES; ++l) w.reader_norm[t + l] = load_token(c, w, p.q, t + l, w.rows + l * w.row_size);
    pack_tokens(w, w.rows, t, panels(w.readers));
    if (w.readers_turned) pack_rows(w, w.rows, t, w.readers_turned);
  }
  prepare_decays(c, w);
  prepare_grams<E>(c, w);
}
