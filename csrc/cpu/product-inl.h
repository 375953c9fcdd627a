// Products of activations with packed weights, by the micro-kernel of tile.h; E: float, or Pair for bfloat16.
//
// Weights lie in panels over their outputs, [n / PANEL][depth][PANEL]; activations x in panels over their rows,
// [rows / PANEL][depth][PANEL]. So either can stand on the left of a tile: with x there a tile is ROWS rows of outputs
// side by side, as row-major y wants them; with the weights there it is ROWS outputs of PANEL rows, which is a piece of
// y in panels, ready to be the next product's x.
//
// A panel of weights, DEPTH deep, stays in L1 (16 KB with 8 lanes) while the panels of x, of which a group of rows has
// a handful, come past it from L2. The weights after it, which follow in memory, are asked for meanwhile.

constexpr int64_t DEPTH = 256;
constexpr int64_t STRIDE = 16;  // steps of a tile between two askings: many at once would keep its own loads waiting

template <class E>
struct Product {
  const E* x;                          // panels of `rows` rows
  const E* weight;                     // panels of `width` outputs
  int64_t rows, padded, width, depth;  // rows, and those up to a whole panel; width: of whole panels, too; depth: steps
  void* y;                             // float, row-major; or E, in panels
  int64_t stride;                      // of row-major y
};

// Asks for the weights that follow, a share of them each time; `times` in all.
struct Following {
  const char* next;
  int64_t share;

  template <class E>
  Following(const E* weights, int64_t count, int64_t times)
      : next(reinterpret_cast<const char*>(weights)),
        share((count * static_cast<int64_t>(sizeof(E)) + times - 1) / times) {}
  void step() {
    for (const char* end = next + share; next < end; next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// How often tiles `depth` deep ask.
SLEEPKERN_INLINE int64_t askings(int64_t tiles, int64_t depth) { return tiles * ((depth + STRIDE - 1) / STRIDE); }

// y = x w, or y += x w: all rows of panel number `panel` of the weights, row-major.
template <bool ADD, class E>
SLEEPKERN_STAGE void multiply_panel(const Product<E>& p, int64_t panel) {
  for (int64_t first = 0; first < p.depth; first += DEPTH) {
    const int64_t depth = min_of(DEPTH, p.depth - first);
    const E* w = p.weight + (panel * p.depth + first) * PANEL;
    Following following(w + depth * PANEL, depth * PANEL, askings((p.rows + ROWS - 1) / ROWS, depth));
    for (int64_t row = 0; row < p.rows; row += ROWS) {
      const E* x = p.x + row / PANEL * PANEL * p.depth + first * PANEL + row % PANEL;
      float* y = static_cast<float*>(p.y) + row * p.stride + panel * PANEL;
      Tile t;
      clear(t);
      if (ADD || first > 0) {
        SLEEPKERN_EACH_ROW(r)
          SLEEPKERN_EACH_VEC(n) t.at[r][n] = load(y + r * p.stride + n * LANES);
      }
      for (int64_t d = 0; d < depth; d += STRIDE) {
        following.step();
        multiply_add<1>(t, x + d * PANEL, w + d * PANEL, min_of(STRIDE, depth - d));
      }
      SLEEPKERN_EACH_ROW(r)
        SLEEPKERN_EACH_VEC(n) store(y + r * p.stride + n * LANES, t.at[r][n]);
    }
  }
}

SLEEPKERN_INLINE Vec squared_relu(Vec z) {
  return z * reinterpret_cast<Vec>(reinterpret_cast<BitVec>(z) & reinterpret_cast<BitVec>(z > Vec{}));
}

// OUTPUTS outputs of VECTORS vectors of rows, a piece of y in panels: the squares of what is positive, if last.
template <int OUTPUTS, int VECTORS, class E>
SLEEPKERN_INLINE void turned_tile(const E* w, const E* x, int64_t depth, bool begun, bool last, E* y,
                                  Following& following) {
  Vec t[OUTPUTS][VECTORS];
#pragma GCC unroll 16
  for (int r = 0; r < OUTPUTS; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < VECTORS; ++n) {
      t[r][n] = begun ? reinterpret_cast<Vec>(load(y + r * PANEL + n * LANES)) : Vec{};
    }
  }
  for (int64_t d = 0; d < depth; ++d) {
    if (d % STRIDE == 0) following.step();
#pragma GCC unroll 16
    for (int r = 0; r < OUTPUTS; ++r) {
      const E a = w[d * PANEL + r];
#pragma GCC unroll 2
      for (int n = 0; n < VECTORS; ++n) t[r][n] = multiply_add<1>(t[r][n], a, load(x + d * PANEL + n * LANES));
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < OUTPUTS; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < VECTORS; ++n) {
      if constexpr (!IS_PAIR<E>) {
        store(y + r * PANEL + n * LANES, last ? squared_relu(t[r][n]) : t[r][n]);
      } else if (r % 2 == 0) {
        store(y + r / 2 * PANEL + n * LANES, interleave(squared_relu(t[r][n]), squared_relu(t[r + 1][n])));
      }
    }
  }
}

// y = relu(x w)^2, in panels. Of a last panel that is at most half full only that half is made. Unfinished sums of
// floats lie in y meanwhile; in pairs they would lose digits, so those go through the whole depth at once.
template <class E>
SLEEPKERN_STAGE void multiply_squared_relu(const Product<E>& p, int64_t panel) {
  const int64_t most = IS_PAIR<E> ? p.depth : DEPTH;
  for (int64_t first = 0; first < p.depth; first += most) {
    const int64_t depth = min_of(most, p.depth - first);
    const bool begun = first > 0, last = first + depth == p.depth;
    const E* w = p.weight + (panel * p.depth + first) * PANEL;
    Following following(w + depth * PANEL, depth * PANEL, askings(p.padded / ROWS, depth));
    for (int64_t row = 0; row < p.rows; row += PANEL) {
      const E* x = p.x + row * p.depth + first * PANEL;
      E* y = static_cast<E*>(p.y) + row * steps<E>(p.width) + steps<E>(panel * PANEL) * PANEL;
      const bool half = p.rows - row <= LANES;
      for (int64_t i = 0; i < PANEL; i += half ? 2 * ROWS : ROWS) {
        if (half) {
          turned_tile<2 * ROWS, 1>(w + i, x, depth, begun, last, y + steps<E>(i) * PANEL, following);
        } else {
          turned_tile<ROWS, VECS>(w + i, x, depth, begun, last, y + steps<E>(i) * PANEL, following);
        }
      }
    }
  }
}

// Up to LANES numbers of a row, times its factor, zeros behind them. A row with factor 0 need not be there.
SLEEPKERN_INLINE void scaled_part(const float* row, int64_t n, float factor, float* out) {
  if (n >= LANES) return store(out, factor == 0 ? Vec{} : load(row) * factor);
  store(out, Vec{});
  for (int64_t i = 0; factor != 0 && i < n; ++i) out[i] = row[i] * factor;
}

// LANES rows of n numbers, `stride` apart, each times factor[row], to their columns of x.
template <class E>
SLEEPKERN_STAGE void pack_rows(const float* rows, int64_t stride, int64_t n, const float* factor, E* x, int64_t row) {
  const int64_t depth = steps<E>(n);
  E* to = x + row / PANEL * depth * PANEL + row % PANEL;
  constexpr int64_t WIDTH = IS_PAIR<E> ? 2 * LANES : LANES;
  alignas(64) float block[LANES * LANES], part[WIDTH], turned[LANES * LANES];
  for (int64_t d = 0; d < depth; d += LANES) {
    const int64_t at = d * WIDTH / LANES;
    for (int l = 0; l < LANES; ++l) {
      for (int64_t i = 0; i < WIDTH; i += LANES) {
        scaled_part(rows + l * stride + at + i, n - at - i, factor[l], part + i);
      }
      if constexpr (IS_PAIR<E>) {
        store(block + l * LANES, reinterpret_cast<Vec>(load_pairs(part)));
      } else {
        store(block + l * LANES, load(part));
      }
    }
    transpose(block, LANES, turned, LANES);
    for (int64_t c = 0; c < min_of(LANES, depth - d); ++c) {
      store(reinterpret_cast<float*>(to + (d + c) * PANEL), load(turned + c * LANES));
    }
  }
}

// (mean of squares + eps)^-1/2 of n numbers.
SLEEPKERN_INLINE float rms_factor(const float* row, int64_t n, float eps) {
  Vec squares{};
  int64_t d = 0;
  for (; d + LANES <= n; d += LANES) squares += load(row + d) * load(row + d);
  float total = sum(squares);
  for (; d < n; ++d) total += row[d] * row[d];
  return 1 / std::sqrt(total / n + eps);
}

template <class E>
SLEEPKERN_INLINE void pack_outputs(const float* matrix, int64_t n, int64_t depth, const float* scale, E* packed) {
  auto weight = [&](int64_t i, int64_t d) {
    return i < n && d < depth ? matrix[i * depth + d] * (scale ? scale[d] : 1.0f) : 0.0f;
  };
  for (int64_t i = 0; i < round_up(n, PANEL); ++i) {
    E* to = packed + column_at(i, steps<E>(depth));
    for (int64_t d = 0; d < steps<E>(depth); ++d) {
      if constexpr (IS_PAIR<E>) {
        to[d * PANEL] = {interleave(broadcast(weight(i, 2 * d)), broadcast(weight(i, 2 * d + 1)))[0]};
      } else {
        to[d * PANEL] = weight(i, d);
      }
    }
  }
}

void pack_matrix(const float* matrix, int64_t n, int64_t depth, const float* scale, bool pairs, void* packed) {
  if (DOTS && pairs) {
    pack_outputs(matrix, n, depth, scale, static_cast<Pair*>(packed));
  } else {
    pack_outputs(matrix, n, depth, scale, static_cast<float*>(packed));
  }
}
