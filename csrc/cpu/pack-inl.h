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

// One token's q or k as floats, zero beyond K and beyond the sequence.
SLEEPKERN_INLINE void load_as_it_is(const Chunk& c, const Workspace& w, const Rows& x, int64_t t, float* out) {
  const int64_t K = w.K;
  const bool live = t < c.count;
  for (int64_t d = live ? round_up(K, LANES) : 0; d < w.row_size; d += LANES) store(out + d, Vec{});
  if (!live) return;
  load_row(c.row(x, t, c.key_head() * K), x.type, K, out);
  clear_beyond(out, K);
}

SLEEPKERN_INLINE float squared_length(const Workspace& w, const float* row) {
  Vec square{};
  for (int64_t d = 0; d < w.K; d += LANES) square += load(row + d) * load(row + d);
  return sum(square);
}

constexpr float SHRINK = 0x1p-70f;

// What makes a row's length 1, from its square. Where the square leaves float32, the row is first multiplied by SHRINK,
// which is exact.
SLEEPKERN_INLINE float normalising(const Workspace& w, float* row, float& square) {
  if (square <= std::numeric_limits<float>::max()) return 1.0f / std::sqrt(square + 1e-6f);
  for (int64_t d = 0; d < w.K; d += LANES) store(row + d, load(row + d) * SHRINK);
  square = squared_length(w, row);
  return 1.0f / std::sqrt(square);
}

// The same, normalised if asked for; returns the factor.
SLEEPKERN_INLINE float load_token(const Chunk& c, const Workspace& w, const Rows& x, int64_t t, float* out) {
  load_as_it_is(c, w, x, t, out);
  if (!c.p.normalize || t >= c.count) return 1.0f;
  const float given = squared_length(w, out);
  float square = given;
  const float factor = normalising(w, out, square);
  for (int64_t d = 0; d < w.K; d += LANES) store(out + d, load(out + d) * factor);
  return square == given ? factor : factor * SHRINK;
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

SLEEPKERN_INLINE void pack_tokens(const Workspace& w, const float* rows, int64_t t, Pair* panels) {
  const int64_t depth = steps<Pair>(w.K);
  Pair* columns = panels + column_at(t, depth);
  alignas(64) float block[LANES * LANES], turned[LANES * LANES];  // of bits; a transpose moves them as they are
  for (int64_t d = 0; d < depth; d += LANES) {
    for (int l = 0; l < LANES; ++l) {
      store(block + l * LANES, reinterpret_cast<Vec>(load_pairs(rows + l * w.row_size + 2 * d)));
    }
    transpose(block, LANES, turned, LANES);
    for (int64_t c = 0; c < min_of(LANES, depth - d); ++c) {
      store(columns + (d + c) * PANEL, reinterpret_cast<BitVec>(load(turned + c * LANES)));
    }
  }
}

// Token t's row to the turned form, [K_rows / PANEL][CHUNK][PANEL].
SLEEPKERN_INLINE void pack_row(const Workspace& w, const float* row, int64_t t, float* turned) {
  for (int64_t d = 0; d < w.K_rows; d += PANEL) {
    float* to = turned + d * CHUNK + t * PANEL;
    SLEEPKERN_EACH_VEC(n) store(to + n * LANES, load(row + d + n * LANES));
  }
}

// LANES rows, from token t on.
SLEEPKERN_INLINE void pack_rows(const Workspace& w, const float* rows, int64_t t, float* turned) {
  for (int l = 0; l < LANES; ++l) pack_row(w, rows + l * w.row_size, t + l, turned);
}

SLEEPKERN_INLINE void pack_rows(const Workspace& w, const float* rows, int64_t t, Pair* turned) {
  for (int l = 0; l < LANES; l += 2) {
    const float* row = rows + l * w.row_size;
    for (int64_t d = 0; d < w.K_rows; d += PANEL) {
      Pair* to = turned + d * CHUNK / 2 + (t + l) / 2 * PANEL;
      SLEEPKERN_EACH_VEC(n) {
        const float* at = row + d + n * LANES;
        store(to + n * LANES, interleave(load(at), load(at + w.row_size)));
      }
    }
  }
}

// Asks for the rows of the chunk to come, one now and then between the tiles of the one at hand. Rows lie a whole token
// apart, each on a page of its own, which the hardware does not foresee; and asked for all at once they would keep the
// loads of the chunk at hand waiting.
struct Ahead {
  struct Tensor {
    const char* row;
    int64_t rows, stride, bytes;
  };
  Tensor tensors[12];  // k, v, q, g, o or its gradient, their gradients, states
  int64_t count = 0, tensor = 0, total = 0, turns, due = 0;

  // `turns`: how often step is called until the chunk at hand is done.
  explicit Ahead(int64_t turns) : turns(turns) {}

  // Rows of n numbers of a chunk's tokens.
  void add(const Chunk& c, const Rows& x, int64_t offset, int64_t n) {
    if (!x.data || c.count <= 0) return;
    const int64_t size = x.type == Type::float32 ? 4 : 2;
    add(c.row(x, 0, offset), c.count, x.stride * size, n * size);
  }

  void add(const void* first, int64_t rows, int64_t stride, int64_t bytes) {
    tensors[count++] = {static_cast<const char*>(first), rows, stride, bytes};
    total += rows;
  }

  // A head's state as the caller keeps it.
  void add_state(const Problem& p, const float* states, int64_t unit) {
    const int64_t bytes = p.V * static_cast<int64_t>(sizeof(float));
    add(states + unit * p.K * p.V, p.K, bytes, bytes);
  }

  void add_inputs(const Chunk& c) {
    const Problem& p = c.p;
    add(c, p.k, c.key_head() * p.K, p.K);
    add(c, p.v, c.head * p.V, p.V);
    if (p.reads) add(c, p.q, c.key_head() * p.K, p.K);
    if (p.gate == Gate::channel) add(c, p.g, c.head * p.K, p.K);
  }

  void step() {
    for (due += total; due >= turns && tensor < count; due -= turns) {
      Tensor& x = tensors[tensor];
      for (int64_t b = 0; b < x.bytes; b += 64) __builtin_prefetch(x.row + b, 0, 2);
      x.row += x.stride;
      if (--x.rows == 0) ++tensor;
    }
  }
};
