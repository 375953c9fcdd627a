// Products of activations with packed weights, by the micro-kernel of tile.h; E: float, Winograd, or Pair for bfloat16.
//
// Weights lie in panels over their outputs, [n / PANEL][depth][PANEL]; activations x in panels over their rows,
// [rows / PANEL][depth][PANEL]. So either can stand on the left of a tile: with x there a tile is ROWS rows of outputs
// side by side, as row-major y wants them; with the weights there it is ROWS outputs of PANEL rows, which is a piece of
// y in panels, ready to be the next product's x.
//
// A panel of weights, DEPTH deep, stays in L1 or next to it (32 KB with 8 lanes, 64 with 16) while the panels of x, of
// which a group of rows has a handful, come past it from L2: less depth would keep it in L1 and fetch sums more often,
// which is a hundredth slower. The weights after it, which follow in memory, are asked for meanwhile.

constexpr int64_t DEPTH = 512;
// Steps of a tile between two askings: many at once would keep its own loads waiting.
constexpr int64_t STRIDE = TRIPLE;

template <class E>
struct Product {
  const E* x;                  // panels of `rows` rows
  const E* weight;             // panels of `width` outputs
  int64_t rows, width, depth;  // width: of whole panels; depth: steps
  const float* x_sums;         // [rows, up to whole panels] pair sums of x, where E is Winograd
  void* y;                     // float, row-major; or E, in panels
  int64_t stride;              // of row-major y

  // Pair sums of the weights lie behind them.
  const float* weight_sums() const { return reinterpret_cast<const float*>(weight + width * depth); }
};

// A depth in parts as even as may be, so that none is a few steps for which all sums are fetched and put away.
SLEEPKERN_INLINE int64_t part_of(int64_t depth) {
  const int64_t parts = (depth + DEPTH - 1) / DEPTH;
  return round_up((depth + parts - 1) / max_of(parts, 1), STRIDE);
}

// Asks for the weights that follow, a share of them each time; `times` in all. Two lines at once and no question
// whether they are new: a branch would cost more than a line asked for twice. Of fewer than three tiles a share is more
// than that, and the rest is left to the hardware.
struct Following {
  const char* next;
  int64_t share;

  template <class E>
  Following(const E* weights, int64_t count, int64_t times)
      : next(reinterpret_cast<const char*>(weights)),
        share((count * static_cast<int64_t>(sizeof(E)) + times - 1) / times) {}
  void step() {
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + 64, 0, 2);
    next += share;
  }
};

// How often tiles `depth` deep ask.
SLEEPKERN_INLINE int64_t askings(int64_t tiles, int64_t depth) { return tiles * (depth / STRIDE + 1); }

// Adds to a tile, asking for weights on the way.
template <int HEIGHT, class E>
SLEEPKERN_INLINE void accumulate(TileOf<HEIGHT>& t, const E* left, const E* right, int64_t depth,
                                 Following& following) {
  for (; depth >= STRIDE; depth -= STRIDE, left += STRIDE * PANEL, right += STRIDE * PANEL) {
    multiply_add<1>(t, left, right, STRIDE);
    following.step();
  }
  multiply_add<1>(t, left, right, depth);
}

// HEIGHT rows of row-major y, `add` to what is there or in its place; with pair sums where these are given.
template <int HEIGHT, class E>
SLEEPKERN_INLINE void multiply_tile(const E* x, const E* w, int64_t depth, bool add, const PairSums& sums, float* y,
                                    int64_t stride, Following& following) {
  TileOf<HEIGHT> t;
  add ? load(t, y, stride) : clear(t);
  accumulate(t, x, w, depth, following);
  if (sums.left) add_pair_sums<E>(t, sums);
  store(t, y, stride);
}

// Rows [first_row, rows) of y, row-major, from step `first` of panel number `panel` of the weights on; of a last tile
// only the quarters that hold rows are made, and no fewer than two.
template <class E>
SLEEPKERN_INLINE void multiply_rows(const Product<E>& p, int64_t panel, int64_t first_row, int64_t first, int64_t depth,
                                    bool add, float* y, int64_t stride, Following& following) {
  const E* w = p.weight + (panel * p.depth + first) * PANEL;
  for (int64_t row = first_row; row < p.rows; row += ROWS) {
    const E* x = p.x + first * PANEL + row / PANEL * PANEL * p.depth + row % PANEL;
    PairSums sums{};
    if (IS_WINOGRAD<E> && first + depth == p.depth) sums = {p.x_sums + row, p.weight_sums() + panel * PANEL};
    float* to = y + (row - first_row) * stride;
    const int64_t left = p.rows - row;
    if (left > ROWS / 4 * 3) {
      multiply_tile<ROWS>(x, w, depth, add, sums, to, stride, following);
    } else if (left > ROWS / 2) {
      multiply_tile<ROWS / 4 * 3>(x, w, depth, add, sums, to, stride, following);
    } else {
      multiply_tile<ROWS / 2>(x, w, depth, add, sums, to, stride, following);
    }
  }
}

// y = x w, or y += x w: all rows of panel number `panel` of the weights, row-major.
template <bool ADD, class E>
SLEEPKERN_STAGE void multiply_panel(const Product<E>& p, int64_t panel) {
  const int64_t part = part_of(p.depth);
  for (int64_t first = 0; first < p.depth; first += part) {
    const int64_t depth = min_of(part, p.depth - first);
    const E* next = p.weight + (panel * p.depth + first + depth) * PANEL;
    Following following(next, depth * PANEL, askings((p.rows + ROWS - 1) / ROWS, depth));
    float* y = static_cast<float*>(p.y) + panel * PANEL;
    multiply_rows(p, panel, 0, first, depth, ADD || first > 0, y, p.stride, following);
  }
}

SLEEPKERN_INLINE Vec squared_relu(Vec z) {
  return z * reinterpret_cast<Vec>(reinterpret_cast<BitVec>(z) & reinterpret_cast<BitVec>(z > Vec{}));
}

// ROWS outputs of PANEL rows, a piece of y in panels; the squares of what is positive, if last.
template <class E>
SLEEPKERN_INLINE void turned_tile(const E* w, const E* x, int64_t depth, const PairSums& sums, bool begun, bool last,
                                  E* y, Following& following) {
  Tile t;
  if constexpr (!IS_PAIR<E>) {
    begun ? load(t, reinterpret_cast<float*>(y)) : clear(t);
  } else {
    clear(t);
  }
  accumulate(t, w, x, depth, following);
  if (last) {
    add_pair_sums<E>(t, sums);
    SLEEPKERN_EACH_ROW(r)
      SLEEPKERN_EACH_VEC(n) t.at[r][n] = squared_relu(t.at[r][n]);
  }
  if constexpr (!IS_PAIR<E>) {
    store(t, reinterpret_cast<float*>(y));
  } else {
    SLEEPKERN_EACH_OF(ROWS / 2, r)
      SLEEPKERN_EACH_VEC(n) store(y + r * PANEL + n * LANES, interleave(t.at[2 * r][n], t.at[2 * r + 1][n]));
  }
}

// Up to LANES numbers of a row, times its factor, zeros behind them. A row with factor 0 need not be there.
SLEEPKERN_INLINE void scaled_part(const float* row, int64_t n, float factor, float* out) {
  if (n >= LANES) return store(out, factor == 0 ? Vec{} : load(row) * factor);
  store(out, Vec{});
  for (int64_t i = 0; factor != 0 && i < n; ++i) out[i] = row[i] * factor;
}

// LANES steps of a row, each number times factor, as bits.
template <class E>
SLEEPKERN_INLINE Vec scaled_steps(const float* row, float factor) {
  if constexpr (IS_PAIR<E>) {
    return reinterpret_cast<Vec>(pair_neighbours(load(row) * factor, load(row + LANES) * factor));
  } else {
    return load(row) * factor;
  }
}

// LANES rows of n numbers, `stride` apart, each times factor[row], to their columns of x.
template <class E>
SLEEPKERN_STAGE void pack_rows(const float* rows, int64_t stride, int64_t n, const float* factor, E* x, int64_t row) {
  const int64_t depth = steps<E>(n);
  float* to = reinterpret_cast<float*>(x + row / PANEL * depth * PANEL + row % PANEL);
  constexpr int64_t WIDTH = IS_PAIR<E> ? 2 * LANES : LANES;
  bool all_there = true;
  for (int l = 0; l < LANES; ++l) all_there = all_there && factor[l] != 0;
  for (int64_t d = 0; d < depth; d += LANES) {
    const int64_t at = d * WIDTH / LANES;
    Vec block[LANES];
    if (all_there && at + WIDTH <= n) {
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) block[l] = scaled_steps<E>(rows + l * stride + at, factor[l]);
    } else {
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) {
        alignas(64) float part[WIDTH];
        for (int64_t i = 0; i < WIDTH; i += LANES) {
          scaled_part(rows + l * stride + at + i, n - at - i, factor[l], part + i);
        }
        block[l] = scaled_steps<E>(part, 1.0f);
      }
    }
    transpose(block);
#pragma GCC unroll 16
    for (int c = 0; c < LANES; ++c) {
      if (c < depth - d) store(to + (d + c) * PANEL, block[c]);
    }
  }
}

// Where outputs of panel number `panel` of the weights lie in a panel of rows of y.
template <class E>
SLEEPKERN_INLINE E* outputs_at(const Product<E>& p, int64_t row, int64_t panel) {
  return static_cast<E*>(p.y) + row * steps<E>(p.width) + steps<E>(panel * PANEL) * PANEL;
}

// y = relu(x w)^2, in panels, of whole panels of rows. Unfinished sums of floats lie in y meanwhile; in pairs they
// would lose digits, so those go through the whole depth at once.
template <class E>
SLEEPKERN_STAGE void square_whole_panels(const Product<E>& p, int64_t panel) {
  const int64_t part = IS_PAIR<E> ? p.depth : part_of(p.depth), whole = p.rows / PANEL * PANEL;
  for (int64_t first = 0; first < p.depth; first += part) {
    const int64_t depth = min_of(part, p.depth - first);
    const bool begun = first > 0, last = first + depth == p.depth;
    const E* w = p.weight + (panel * p.depth + first) * PANEL;
    Following following(w + depth * PANEL, depth * PANEL, askings(whole / ROWS, depth));
    for (int64_t row = 0; row < whole; row += PANEL) {
      E* y = outputs_at(p, row, panel);
      for (int64_t i = 0; i < PANEL; i += ROWS) {
        PairSums sums{};
        if (IS_WINOGRAD<E>) sums = {p.weight_sums() + panel * PANEL + i, p.x_sums + row};
        const E* x = p.x + row * p.depth + first * PANEL;
        turned_tile(w + i, x, depth, sums, begun, last, y + steps<E>(i) * PANEL, following);
      }
    }
  }
}

// The same of the rows after them, which turned would be taken for a whole panel: made row-major and turned then.
template <class E>
SLEEPKERN_STAGE void square_last_rows(const Product<E>& p, int64_t panel) {
  const int64_t first_row = p.rows / PANEL * PANEL, rows = p.rows - first_row;
  alignas(64) float block[PANEL * PANEL], factor[PANEL];
  const E* w = p.weight + panel * p.depth * PANEL;
  Following following(w + p.depth * PANEL, first_row > 0 ? 0 : p.depth * PANEL,
                      askings((rows + ROWS - 1) / ROWS, p.depth));
  multiply_rows(p, panel, first_row, 0, p.depth, false, block, PANEL, following);
  for (int64_t i = 0; i < rows * PANEL; i += LANES) store(block + i, squared_relu(load(block + i)));
  for (int64_t row = 0; row < PANEL; ++row) factor[row] = row < rows ? 1.0f : 0.0f;
  for (int64_t row = 0; row < PANEL; row += LANES) {
    pack_rows(block + row * PANEL, PANEL, PANEL, factor + row, outputs_at(p, first_row, panel), row);
  }
}

template <class E>
SLEEPKERN_INLINE void multiply_squared_relu(const Product<E>& p, int64_t panel) {
  if (p.rows >= PANEL) square_whole_panels(p, panel);
  if (p.rows % PANEL) square_last_rows(p, panel);
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
SLEEPKERN_INLINE void pack_outputs(const float* matrix, int64_t n, int64_t depth, E* packed) {
  auto weight = [&](int64_t i, int64_t d) { return i < n && d < depth ? matrix[i * depth + d] : 0.0f; };
  const int64_t width = round_up(n, PANEL);
  for (int64_t i = 0; i < width; ++i) {
    E* to = packed + column_at(i, steps<E>(depth));
    for (int64_t d = 0; d < steps<E>(depth); ++d) {
      if constexpr (IS_PAIR<E>) {
        to[d * PANEL] = {interleave(broadcast(weight(i, 2 * d)), broadcast(weight(i, 2 * d + 1)))[0]};
      } else {
        to[d * PANEL] = {weight(i, d)};
      }
    }
  }
  if constexpr (IS_WINOGRAD<E>) {
    float* sums = reinterpret_cast<float*>(packed + width * depth);
    for (int64_t i = 0; i < width; i += LANES) store(sums + i, pair_sums(packed + column_at(i, depth), depth));
  }
}

int64_t packed_size(int64_t n, int64_t depth, Form form) {
  const int64_t width = round_up(n, PANEL);
  if (form == Form::bfloat16) return width * steps<Pair>(depth);
  return width * (form == Form::winograd ? depth + 1 : depth);
}

void pack_matrix(const float* matrix, int64_t n, int64_t depth, Form form, void* packed) {
  switch (form) {
    case Form::plain:
      return pack_outputs(matrix, n, depth, static_cast<float*>(packed));
    case Form::winograd:
      return pack_outputs(matrix, n, depth, static_cast<Winograd*>(packed));
    case Form::bfloat16:
      if (DOTS) pack_outputs(matrix, n, depth, static_cast<Pair*>(packed));
  }
}
