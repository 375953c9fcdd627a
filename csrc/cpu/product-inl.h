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

enum class Finish {
  rows,          // y = x w, row-major
  rows_added,    // y += x w, row-major
  squared_relu,  // y = relu(x w)^2, in panels
};

struct Product {
  const float* x;                      // panels of `rows` rows
  const float* weight;                 // panels of `width` outputs
  int64_t rows, padded, width, depth;  // rows, and those up to a whole panel; width: of whole panels, too
  float* y;
  int64_t stride;  // of row-major y
};

// One tile's place in y: row-major, or in panels.
struct Place {
  float* data;
  int64_t stride;

  void load(Tile& t) const {
    SLEEPKERN_EACH_ROW(r)
      SLEEPKERN_EACH_VEC(n) t.at[r][n] = SLEEPKERN_ISA::load(data + r * stride + n * LANES);
  }
  void store(const Tile& t) const {
    SLEEPKERN_EACH_ROW(r)
      SLEEPKERN_EACH_VEC(n) SLEEPKERN_ISA::store(data + r * stride + n * LANES, t.at[r][n]);
  }
};

// All rows of panel number `panel` of the weights.
template <Finish FINISH>
SLEEPKERN_STAGE void multiply_panel(const Product& p, int64_t panel) {
  constexpr bool TURNED = FINISH == Finish::squared_relu;
  for (int64_t first = 0; first < p.depth; first += DEPTH) {
    const int64_t depth = min_of(DEPTH, p.depth - first);
    const int64_t tiles = TURNED ? p.padded / ROWS : (p.rows + ROWS - 1) / ROWS, share = depth * PANEL / tiles;
    const bool last = first + depth == p.depth;
    const float* w = p.weight + (panel * p.depth + first) * PANEL;
    const float* ahead = w + depth * PANEL;
    for (int64_t row = 0; row < p.padded; row += PANEL) {
      const float* x = p.x + row * p.depth + first * PANEL;
      for (int64_t i = 0; i < (TURNED ? PANEL : min_of(PANEL, p.rows - row)); i += ROWS) {
        for (int64_t n = 0; n < share; n += 64 / sizeof(float), ahead += 64 / sizeof(float)) {
          __builtin_prefetch(ahead, 0, 2);
        }
        const Place y = TURNED ? Place{p.y + row * p.width + (panel * PANEL + i) * PANEL, PANEL}
                               : Place{p.y + (row + i) * p.stride + panel * PANEL, p.stride};
        Tile t;
        if (first > 0 || FINISH == Finish::rows_added) {
          y.load(t);
        } else {
          clear(t);
        }
        multiply_add<1>(t, (TURNED ? w : x) + i, TURNED ? x : w, depth);
        if (TURNED && last) {
          SLEEPKERN_EACH_ROW(r)
            SLEEPKERN_EACH_VEC(n) {
              const Vec z = t.at[r][n], positive = reinterpret_cast<Vec>(reinterpret_cast<BitVec>(z) &
                                                                         reinterpret_cast<BitVec>(z > Vec{}));
              t.at[r][n] = positive * z;
            }
        }
        y.store(t);
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
