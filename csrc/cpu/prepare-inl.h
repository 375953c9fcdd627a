// prepare: the chunk factors, all that does not depend on the state. The only stage that knows the rule.
//
//   keys, readers      k^T, q^T (normalised if asked for), and times E for channel decay
//   writers            Kt = k exp(G_C - G)
//   couplings, scores  M_ij = b_i k_i.k_j exp(G_i - G_j), i > j;   P_ij = scale q_i.k_j exp(G_i - G_j), i >= j
//
// Exponents are sums of log decays between two tokens, never positive.

static void prepare_gates(const Chunk& c, Workspace& w) {
  const Problem& p = c.p;
  const bool head_decay = p.gate == Gate::head;
  double G = 0;
  for (int64_t t = 0; t < CHUNK; ++t) {
    const bool live = t < c.count;
    w.beta[t] = !live ? 0.0f : p.beta.data ? load_scalar(c.row(p.beta, t, c.head), p.beta.type, 0) : 1.0f;
    if (live && head_decay) G += load_scalar(c.row(p.g, t, c.head), p.g.type, 0);
    w.log_decay[t] = G;
  }
  for (int64_t t = 0; t < CHUNK; t += LANES) {
    alignas(64) float since_start[LANES], until_end[LANES];
    for (int l = 0; l < LANES; ++l) {
      since_start[l] = static_cast<float>(w.log_decay[t + l]);
      until_end[l] = static_cast<float>(G - w.log_decay[t + l]);
    }
    Vec E = exp_nonpositive(load(since_start));
    store(w.key_scale + t, E * load(w.beta + t));
    store(w.read_scale + t, E * p.scale);
    store(w.to_end + t, exp_nonpositive(load(until_end)));
  }
  if (p.gate != Gate::channel) {
    const float keep = exp_nonpositive(broadcast(static_cast<float>(G)))[0];
    for (int64_t d = 0; d < w.K_rows; ++d) w.keep[d] = keep;
  }
}

// Scores and couplings by one sweep over the upper triangle of (j, i): rows j of k^T against columns i of q^T and k^T.
static void prepare_grams(const Chunk& c, Workspace& w) {
  const bool readouts = c.p.o != nullptr;
  for (int64_t j = 0; j < c.padded; j += ROWS) {
    const float* left = w.keys + column_at(j, w.K);
    for (int64_t i = j / PANEL * PANEL; i < c.count; i += PANEL) {
      alignas(64) float decay[ROWS][PANEL];
      for (int r = 0; r < ROWS; ++r) {
        alignas(64) float between[PANEL];
        for (int l = 0; l < PANEL; ++l) {
          const double d = w.log_decay[i + l] - w.log_decay[j + r];
          between[l] = i + l >= j + r ? static_cast<float>(d) : -INFINITY;
        }
        SLEEPKERN_EACH_VEC store(decay[r] + n * LANES, exp_nonpositive(load(between + n * LANES)));
      }
      auto gram = [&](const float* right, const float* column_scale, float scale, float* out) {
        Tile t;
        clear(t);
        multiply_add<1>(t, left, right + i * w.K, w.K);
        SLEEPKERN_EACH_ROW SLEEPKERN_EACH_VEC {
          Vec by = column_scale ? load(column_scale + i + n * LANES) : broadcast(scale);
          t.at[r][n] *= by * load(decay[r] + n * LANES);
        }
        store(t, out + i * CHUNK + j * PANEL);
      };
      if (c.p.delta) gram(w.keys, w.beta, 0, w.couplings);
      if (readouts) gram(w.readers, nullptr, c.p.scale, w.scores);
    }
  }
}

static void prepare(const Chunk& c, Workspace& w) {
  const Problem& p = c.p;
  prepare_gates(c, w);
  if (p.gate == Gate::channel) {
    prepare_channel_decay(c, w);
    return;
  }
  const int64_t end = round_up(c.count, PANEL);
  for (int64_t t = 0; t < end; t += LANES) {
    for (int l = 0; l < LANES; ++l) load_token(c, w, p.k, t + l, w.rows + l * w.row_size);
    pack_tokens(w, w.rows, t, w.keys);
    for (int l = 0; l < LANES; ++l) {
      float* row = w.rows + l * w.row_size;
      const Vec factor = broadcast(w.to_end[t + l]);
      for (int64_t d = 0; d < w.K_rows; d += LANES) store(row + d, load(row + d) * factor);
      pack_writer(w, row, t + l);
    }
    if (!p.o) continue;
    for (int l = 0; l < LANES; ++l) load_token(c, w, p.q, t + l, w.rows + l * w.row_size);
    pack_tokens(w, w.rows, t, w.readers);
  }
  prepare_grams(c, w);
}
