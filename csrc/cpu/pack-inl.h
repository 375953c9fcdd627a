// Tokens of the caller's tensors to float rows and to panels.

// Tokens [first, first + count) of one head of one sequence; rows beyond count are taken as k = v = q = b = g = 0.
struct Chunk {
  const Problem& p;
  int64_t first, count, head, padded;  // padded: count rounded up to whole tiles

  Chunk(const Problem& p, int64_t first, int64_t count, int64_t head)
      : p(p), first(first), count(count), head(head), padded(round_up(count, ROWS)) {}

  const void* row(const Rows& x, int64_t token, int64_t offset) const {
    const int64_t size = x.type == Type::float32 ? 4 : 2;
    return static_cast<const char*>(x.data) + ((first + token) * x.stride + offset) * size;
  }
  int64_t key_head() const { return head / (p.HV / p.H); }
};

// Zero the last, partial vector of a row beyond n.
SLEEPKERN_INLINE void clear_beyond(float* row, int64_t n) {
  for (int64_t d = n; d % LANES != 0; ++d) row[d] = 0;
}

// One token's q or k as floats, normalised if asked for, zero beyond K and beyond the sequence; returns the factor.
SLEEPKERN_INLINE float load_token(const Chunk& c, const Workspace& w, const Rows& x, int64_t t, float* out) {
  const int64_t K = w.K;
  const bool live = t < c.count;
  for (int64_t d = live ? round_up(K, LANES) : 0; d < w.row_size; d += LANES) store(out + d, Vec{});
  if (!live) return 1.0f;
  load_row(c.row(x, t, c.key_head() * K), x.type, K, out);
  clear_beyond(out, K);
  if (!c.p.normalize) return 1.0f;
  Vec square{};
  for (int64_t d = 0; d < K; d += LANES) square += load(out + d) * load(out + d);
  const float factor = 1.0f / std::sqrt(sum(square) + 1e-6f);
  for (int64_t d = 0; d < K; d += LANES) store(out + d, load(out + d) * factor);
  return factor;
}

// LANES token rows to their columns of a matrix in panels of K rows.
SLEEPKERN_INLINE void pack_tokens(const Workspace& w, const float* rows, int64_t t, float* panels) {
  float* columns = panels + column_at(t, w.K);
  for (int64_t d = 0; d + LANES <= w.K; d += LANES) {
    transpose(rows + d, w.row_size, columns + d * PANEL, PANEL);
  }
  for (int64_t d = w.K / LANES * LANES; d < w.K; ++d) {
    for (int l = 0; l < LANES; ++l) columns[d * PANEL + l] = rows[l * w.row_size + d];
  }
}

// A token's row to the turned form, [K_rows / PANEL][CHUNK][PANEL].
SLEEPKERN_INLINE void pack_row(const Workspace& w, const float* row, int64_t t, float* turned) {
  for (int64_t d = 0; d < w.K_rows; d += PANEL) {
    float* to = turned + d * CHUNK + t * PANEL;
    SLEEPKERN_EACH_VEC(n) store(to + n * LANES, load(row + d + n * LANES));
  }
}

SLEEPKERN_INLINE void prefetch(const void* data, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(data) + b, 0, 2);
}

// Ask for share `part` of `parts` of a chunk's rows and of its head's state. Rows lie a whole token apart, each on a
// page of its own, which the hardware does not foresee; asked for during the turn before, they cost little.
SLEEPKERN_STAGE void prefetch_share(const Chunk& c, const float* state, int64_t state_size, int64_t part,
                                    int64_t parts) {
  const Problem& p = c.p;
  auto fetch = [&](const Rows& x, int64_t t, int64_t offset, int64_t n) {
    if (x.data) prefetch(c.row(x, t, offset), n * (x.type == Type::float32 ? 4 : 2));
  };
  for (int64_t t = c.count * part / parts; t < c.count * (part + 1) / parts; ++t) {
    fetch(p.k, t, c.key_head() * p.K, p.K);
    fetch(p.v, t, c.head * p.V, p.V);
    if (p.reads) fetch(p.q, t, c.key_head() * p.K, p.K);
    if (p.gate == Gate::channel) fetch(p.g, t, c.head * p.K, p.K);
  }
  const int64_t size = state_size / parts;
  prefetch(state + part * size, size * sizeof(float));
}
