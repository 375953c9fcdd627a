// Products of activations with packed weights, by the micro-kernel of tile.h.
//
// Weights lie in panels over their outputs, [n / PANEL][depth][PANEL]; activations x in panels over their rows,
// [rows / PANEL][depth][PANEL]. So either can stand on the left of a tile: with x there a tile is 4 rows of outputs
// side by side, as row-major y wants them; with the weights there it is 4 outputs of PANEL rows, which is a piece of y
// in panels, ready to be the next product's x.
//
// A panel of weights, DEPTH deep, stays in L1 (16 KB with 8 lanes) while the panels of x, of which a group of rows has
// a handful, come past it from L2. The weights after it, which follow in memory, are asked for meanwhile.

constexpr int64_t DEPTH = 256;

struct Product {
  const float* x;                      // panels of `rows` rows
  const float* weight;                 // panels of `width` outputs
  int64_t rows, padded, width, depth;  // rows, and those up to a whole panel; width: of whole panels, too
  float* y;
  int64_t stride;  // of row-major y
};

// Asks for the weights that follow, a share of them with each tile.
struct Following {
  const float* next;
  int64_t share;

  Following(const float* weights, int64_t count, int64_t tiles) : next(weights), share(count / tiles) {}
  void step() {
    constexpr int64_t LINE = 64 / sizeof(float);
    for (int64_t n = 0; n < share; n += LINE, next += LINE) __builtin_prefetch(next, 0, 2);
  }
};

// y = x w, or y += x w: all rows of panel number `panel` of the weights, row-major.
template <bool ADD>
SLEEPKERN_STAGE void multiply_panel(const Product& p, int64_t panel) {
  for (int64_t first = 0; first < p.depth; first += DEPTH) {
    const int64_t depth = min_of(DEPTH, p.depth - first);
    const float* w = p.weight + (panel * p.depth + first) * PANEL;
    Following following(w + depth * PANEL, depth * PANEL, (p.rows + ROWS - 1) / ROWS);
    for (int64_t row = 0; row < p.rows; row += ROWS) {
      following.step();
      const float* x = p.x + row / PANEL * PANEL * p.depth + first * PANEL + row % PANEL;
      float* y = p.y + row * p.stride + panel * PANEL;
      Tile t;
      clear(t);
      if (ADD || first > 0) {
        SLEEPKERN_EACH_ROW(r)
          SLEEPKERN_EACH_VEC(n) t.at[r][n] = load(y + r * p.stride + n * LANES);
      }
      multiply_add<1>(t, x, w, depth);
      SLEEPKERN_EACH_ROW(r)
        SLEEPKERN_EACH_VEC(n) store(y + r * p.stride + n * LANES, t.at[r][n]);
    }
  }
}

SLEEPKERN_INLINE Vec squared_relu(Vec z) {
  return z * reinterpret_cast<Vec>(reinterpret_cast<BitVec>(z) & reinterpret_cast<BitVec>(z > Vec{}));
}

// OUTPUTS outputs of VECTORS vectors of rows, a piece of y in panels.
template <int OUTPUTS, int VECTORS>
SLEEPKERN_INLINE void turned_tile(const float* w, const float* x, int64_t depth, bool begun, bool last, float* y) {
  Vec t[OUTPUTS][VECTORS];
#pragma GCC unroll 16
  for (int r = 0; r < OUTPUTS; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < VECTORS; ++n) t[r][n] = begun ? load(y + r * PANEL + n * LANES) : Vec{};
  }
  for (int64_t d = 0; d < depth; ++d) {
#pragma GCC unroll 16
    for (int r = 0; r < OUTPUTS; ++r) {
      const Vec a = broadcast(w[d * PANEL + r]);
#pragma GCC unroll 2
      for (int n = 0; n < VECTORS; ++n) t[r][n] += a * load(x + d * PANEL + n * LANES);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < OUTPUTS; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < VECTORS; ++n) store(y + r * PANEL + n * LANES, last ? squared_relu(t[r][n]) : t[r][n]);
  }
}

// y = relu(x w)^2, in panels. Of a last panel that is at most half full only that half is made.
SLEEPKERN_STAGE void multiply_squared_relu(const Product& p, int64_t panel) {
  for (int64_t first = 0; first < p.depth; first += DEPTH) {
    const int64_t depth = min_of(DEPTH, p.depth - first);
    const bool begun = first > 0, last = first + depth == p.depth;
    const float* w = p.weight + (panel * p.depth + first) * PANEL;
    Following following(w + depth * PANEL, depth * PANEL, p.padded / ROWS);
    for (int64_t row = 0; row < p.rows; row += PANEL) {
      const float* x = p.x + row * p.depth + first * PANEL;
      float* y = p.y + row * p.width + panel * PANEL * PANEL;
      const bool half = p.rows - row <= LANES;
      for (int64_t i = 0; i < PANEL; i += half ? 2 * ROWS : ROWS) {
        following.step();
        if (half) {
          turned_tile<2 * ROWS, 1>(w + i, x, depth, begun, last, y + i * PANEL);
        } else {
          turned_tile<ROWS, VECS>(w + i, x, depth, begun, last, y + i * PANEL);
        }
      }
    }
  }
}

// LANES rows of n numbers, `stride` apart, each times factor[row], to their columns of x. Rows with factor 0 need not
// be there.
SLEEPKERN_STAGE void pack_rows(const float* rows, int64_t stride, int64_t n, const float* factor, float* x,
                               int64_t row) {
  float* to = x + row / PANEL * n * PANEL + row % PANEL;
  alignas(64) float block[LANES * LANES];
  for (int64_t d = 0; d < n; d += LANES) {
    const int64_t width = min_of(LANES, n - d);
    for (int l = 0; l < LANES; ++l) {
      if (width < LANES) store(block + l * LANES, Vec{});
      if (width < LANES) copy_tail(block + l * LANES, rows + l * stride + d, width);
      const float* from = width < LANES ? block + l * LANES : rows + l * stride + d;
      store(block + l * LANES, factor[l] == 0 ? Vec{} : load(from) * factor[l]);
    }
    if (width == LANES) {
      transpose(block, LANES, to + d * PANEL, PANEL);
    } else {
      for (int64_t c = 0; c < width; ++c) {
        for (int l = 0; l < LANES; ++l) to[(d + c) * PANEL + l] = block[l * LANES + c];
      }
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

void pack_matrix(const float* matrix, int64_t n, int64_t depth, const float* scale, float* packed) {
  for (int64_t i = 0; i < round_up(n, PANEL); ++i) {
    float* to = packed + column_at(i, depth);
    for (int64_t d = 0; d < depth; ++d) {
      to[d * PANEL] = i < n ? matrix[i * depth + d] * (scale ? scale[d] : 1.0f) : 0.0f;
    }
  }
}
