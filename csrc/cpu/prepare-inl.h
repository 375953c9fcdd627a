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

// decay[r][l] = exp(G_i - G_j) of rows j + r and columns i + l; 0 for i < j. The differences are taken in double.
// Behind the tile's last row R it is a product, exp(G_i - R) exp(R - G_j): few exponentials. Among the tile's own
// tokens it is taken as it is.
SLEEPKERN_INLINE void decay_block(const Workspace& w, int64_t j, int64_t i, float (&decay)[ROWS][PANEL]) {
  const double *G = w.log_decay, R = G[j + ROWS - 1];
  alignas(64) float columns[PANEL], rows[LANES] = {};
  for (int l = 0; l < PANEL; ++l) columns[l] = static_cast<float>(G[i + l] - R);
  for (int64_t l = 0; l < j + ROWS - i; ++l) columns[l] = -INFINITY;
  for (int r = 0; r < ROWS; ++r) rows[r] = static_cast<float>(R - G[j + r]);
  store(rows, exp_nonpositive(load(rows)));
  SLEEPKERN_EACH_VEC(n) {
    const Vec by_column = exp_nonpositive(load(columns + n * LANES));
    SLEEPKERN_EACH_ROW(r) store(decay[r] + n * LANES, by_column * rows[r]);
  }
  if (i > j) return;
  constexpr int OWN = ROWS * ROWS;
  alignas(64) float own[OWN];
  for (int x = 0; x < OWN; ++x) own[x] = static_cast<float>(G[j + x % ROWS] - G[j + x / ROWS]);
  for (int x = 0; x < OWN; x += LANES) {
    for (int l = x; l < x + LANES; ++l) own[l] = l % ROWS < l / ROWS ? -INFINITY : own[l];
    store(own + x, exp_nonpositive(load(own + x)));
  }
  for (int r = 0; r < ROWS; ++r) copy_tail(decay[r] + j - i, own + r * ROWS, ROWS);
}

// Rows j .. j + ROWS of left^T right, columns i .. i + PANEL, times the decay and a factor a column.
SLEEPKERN_INLINE void gram_block(const Workspace& w, const float* right, int64_t j, int64_t i,
                                 const float (&decay)[ROWS][PANEL], const Vec (&by)[VECS], float* out) {
  Tile t;
  clear(t);
  multiply_add<1>(t, w.keys + column_at(j, w.K), right + i * w.K, w.K);
  SLEEPKERN_EACH_ROW(r)
    SLEEPKERN_EACH_VEC(n) t.at[r][n] *= by[n] * load(decay[r] + n * LANES);
  store(t, out + i * CHUNK + j * PANEL);
}

// Scores and couplings by one sweep over the upper triangle of (j, i).
SLEEPKERN_STAGE void prepare_grams(const Chunk& c, Workspace& w) {
  Vec scale[VECS], beta[VECS];
  SLEEPKERN_EACH_VEC(n) scale[n] = broadcast(c.p.scale);
  for (int64_t i = 0; i < c.count; i += PANEL) {
    SLEEPKERN_EACH_VEC(n) beta[n] = load(w.beta + i + n * LANES);
    for (int64_t j = 0; j < min_of(i + PANEL, c.padded); j += ROWS) {
      alignas(64) float decay[ROWS][PANEL];
      decay_block(w, j, i, decay);
      if (w.decays) std::memcpy(w.decays + i * CHUNK + j * PANEL, decay, sizeof(decay));
      if (c.p.delta) gram_block(w, w.keys, j, i, decay, beta, w.couplings);
      if (c.p.reads) gram_block(w, w.readers, j, i, decay, scale, w.scores);
    }
  }
}

SLEEPKERN_STAGE void prepare(const Chunk& c, Workspace& w) {
  const Problem& p = c.p;
  prepare_gates(c, w);
  if (p.gate == Gate::channel) {
    prepare_channel_decay(c, w);
    return;
  }
  const int64_t end = round_up(c.count, PANEL);
  for (int64_t t = 0; t < end; t += LANES) {
    for (int l = 0; l < LANES; ++l) w.key_norm[t + l] = load_token(c, w, p.k, t + l, w.rows + l * w.row_size);
    pack_tokens(w, w.rows, t, w.keys);
    for (int l = 0; l < LANES; ++l) {
      float* row = w.rows + l * w.row_size;
      if (w.keys_turned) pack_row(w, row, t + l, w.keys_turned);
      const Vec factor = broadcast(w.to_end[t + l]);
      for (int64_t d = 0; d < w.K_rows; d += LANES) store(row + d, load(row + d) * factor);
      pack_row(w, row, t + l, w.writers);
    }
    if (!p.reads) continue;
    for (int l = 0; l < LANES; ++l) w.reader_norm[t + l] = load_token(c, w, p.q, t + l, w.rows + l * w.row_size);
    pack_tokens(w, w.rows, t, w.readers);
    for (int l = 0; w.readers_turned && l < LANES; ++l) pack_row(w, w.rows + l * w.row_size, t + l, w.readers_turned);
  }
  prepare_grams(c, w);
}
