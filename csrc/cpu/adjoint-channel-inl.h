// Gradients through the grams of channel decay: the dyadic split of channel-inl.h, backwards.
//
//   dq_i  += sum_j dP_ij k_j exp(G_i - G_j)         z_i += sum_j dM_ij k_j exp(G_i - G_j)
//   dk-_j += sum_i (dP_ij q_i + b_i dM_ij k_i) exp(G_i - G_j)
//
// At each level the factor is exp(G_i - R) exp(R - G_j), one of them on the operand, the other on the result.

// rows of k or q times the level's factors, turned.
static void turn_decayed(const Workspace& w, const float* rows, int64_t end, float* turned) {
  for (int64_t t = 0; t < end; ++t) {
    for (int64_t d = 0; d < w.row_size; d += LANES) {
      store(w.rows + d, load(rows + t * w.row_size + d) * load(w.factors + t * w.row_size + d));
    }
    pack_row(w, w.rows, t, turned);
  }
}

// The tile's rows times the factors of tokens t .. t + ROWS, added to theirs of `out`.
SLEEPKERN_INLINE void add_decayed(const Workspace& w, const Tile& tile, int64_t t, int64_t d, float* out) {
  SLEEPKERN_EACH_ROW(r) {
    const float* factor = w.factors + (t + r) * w.row_size + d;
    float* to = out + d * CHUNK + (t + r) * PANEL;
    SLEEPKERN_EACH_VEC(n) {
      store(to + n * LANES, load(to + n * LANES) + tile.at[r][n] * load(factor + n * LANES));
    }
  }
}

// One product of the split: tokens [start, start + h) as j, [start + h, start + 2h) as i, of one key panel at d. The
// second half may end with the chunk's tokens.
SLEEPKERN_STAGE void adjoint_level(const Chunk& c, const Workspace& w, const Adjoint& a, int64_t start, int64_t h,
                                   int64_t d) {
  const int64_t middle = start + h, behind = min_of(middle + h, c.padded);
  const float *k = w.level_keys + d * CHUNK, *q = w.level_readers + d * CHUNK;
  for (int64_t i = middle; i < behind; i += ROWS) {
    const int64_t gram = column_at(i, CHUNK) + start * PANEL;
    Tile t;
    if (c.p.reads) {
      clear(t);
      multiply_add<1>(t, a.dscores + gram, k + start * PANEL, h);
      add_decayed(w, t, i, d, a.dreaders);
    }
    if (c.p.delta) {
      clear(t);
      multiply_add<1>(t, a.dcouplings + gram, k + start * PANEL, h);
      add_decayed(w, t, i, d, a.dheld);
    }
  }
  for (int64_t j = start; j < middle; j += ROWS) {
    const int64_t gram = column_at(j, CHUNK) + middle * PANEL;
    Tile t;
    clear(t);
    if (c.p.reads) multiply_add<1>(t, a.dscores_turned + gram, q + middle * PANEL, behind - middle);
    if (c.p.delta) multiply_add<1>(t, a.dcouplings_turned + gram, k + middle * PANEL, behind - middle);
    add_decayed(w, t, j, d, a.dkeys);
  }
}

// Pairs j <= i of BASE neighbouring tokens, directly, of LANES channels from d on.
SLEEPKERN_INLINE void adjoint_base(const Chunk& c, const Workspace& w, const Adjoint& a, int64_t start, int64_t d) {
  const int64_t column = d / PANEL * PANEL * CHUNK + d % PANEL;
  for (int64_t j = start; j < start + BASE; ++j) {
    const Vec k = load(w.key_rows + j * w.row_size + d);
    Vec decay = broadcast(1.0f), dk{};
    for (int64_t i = j; i < start + BASE; ++i) {
      if (i > j) decay = flush_subnormal(decay * load(w.gates + i * w.row_size + d));
      const int64_t gram = column_at(i, CHUNK) + j * PANEL, to = column + i * PANEL;
      if (c.p.reads) {
        const Vec f = decay * a.dscores[gram];
        store(a.dreaders + to, load(a.dreaders + to) + f * k);
        dk += f * load(w.reader_rows + i * w.row_size + d);
      }
      if (c.p.delta && i > j) {
        const Vec f = decay * a.dcouplings[gram];
        store(a.dheld + to, load(a.dheld + to) + f * k);
        dk += f * w.beta[i] * load(w.key_rows + i * w.row_size + d);
      }
    }
    store(a.dkeys + column + j * PANEL, load(a.dkeys + column + j * PANEL) + dk);
  }
}

SLEEPKERN_STAGE void adjoint_channel_grams(const Chunk& c, const Workspace& w, const Adjoint& a) {
  const int64_t end = round_up(c.count, PANEL);
  for (int64_t h = CHUNK / 2; h >= BASE; h /= 2) {
    if (h >= c.padded) continue;
    split_decay(w, h);
    turn_decayed(w, w.key_rows, end, w.level_keys);
    if (c.p.reads) turn_decayed(w, w.reader_rows, end, w.level_readers);
    for (int64_t start = 0; start + h < c.padded; start += 2 * h) {
      for (int64_t d = 0; d < w.K_rows; d += PANEL) adjoint_level(c, w, a, start, h, d);
    }
  }
  for (int64_t start = 0; start < c.padded; start += BASE) {
    for (int64_t d = 0; d < w.K_rows; d += LANES) adjoint_base(c, w, a, start, d);
  }
}
