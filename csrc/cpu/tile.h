// The micro-kernel: a tile of ROWS x PANEL numbers in registers, fed from panels.
//
// Every matrix X [depth, n] of a product X^T Y is stored in panels over its columns, [n / PANEL][depth][PANEL], so that
// one layout serves both sides: as left operand a column is broadcast, as right operand a row is loaded. Panels are
// what keeps a block in L1: rows of a row-major state lie 512 bytes apart and would fall into few cache sets.
//
// Registers: ROWS x VECS accumulators hide the latency of fused multiply-add (4 cycles x 2 ports = 8 in flight), and
// with VECS + 1 operands fit 16 (SSE, AVX2: 4 x 2) or 32 registers (AVX-512: 8 x 2). On AVX2 98 % of peak.
//
// A chunk of 32 tokens: work within a chunk grows with its length (2 CHUNK (K + V) flop a token beside 6 K V for the
// state), while the state's way through registers costs the same a chunk. On AVX2 32 beats 64 by a tenth at K = V = 64,
// 128.

constexpr int VECS = 2;
constexpr int PANEL = VECS * LANES;
constexpr int ROWS = LANES == 16 ? 8 : 4;
constexpr int CHUNK = 32;
static_assert(PANEL % ROWS == 0 && CHUNK % PANEL == 0, "tiles must not cross panels");

struct Tile {
  Vec at[ROWS][VECS];
};

// Loops over a tile are unrolled whole, or the accumulators would live in memory.
#define SLEEPKERN_EACH_ROW(r) _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; ++r)
#define SLEEPKERN_EACH_VEC(n) _Pragma("GCC unroll 2") for (int n = 0; n < VECS; ++n)

SLEEPKERN_INLINE void clear(Tile& t) {
  SLEEPKERN_EACH_ROW(r)
    SLEEPKERN_EACH_VEC(n) t.at[r][n] = Vec{};
}

SLEEPKERN_INLINE void load(Tile& t, const float* panel) {
  SLEEPKERN_EACH_ROW(r)
    SLEEPKERN_EACH_VEC(n) t.at[r][n] = load(panel + r * PANEL + n * LANES);
}

SLEEPKERN_INLINE void store(const Tile& t, float* panel) {
  SLEEPKERN_EACH_ROW(r)
    SLEEPKERN_EACH_VEC(n) store(panel + r * PANEL + n * LANES, t.at[r][n]);
}

// Row r times by[r].
SLEEPKERN_INLINE void scale_rows(Tile& t, const float* by) {
  SLEEPKERN_EACH_ROW(r) {
    Vec f = broadcast(by[r]);
    SLEEPKERN_EACH_VEC(n) t.at[r][n] *= f;
  }
}

// tile += sign * left^T right; left is a panel advanced to the tile's first row.
template <int SIGN>
SLEEPKERN_INLINE void multiply_add(Tile& t, const float* left, const float* right, int64_t depth) {
  for (int64_t d = 0; d < depth; ++d) {
    Vec b[VECS];
    SLEEPKERN_EACH_VEC(n) b[n] = load(right + d * PANEL + n * LANES);
    SLEEPKERN_EACH_ROW(r) {
      Vec a = broadcast(left[d * PANEL + r]);
      SLEEPKERN_EACH_VEC(n) {
        if constexpr (SIGN > 0) {
          t.at[r][n] += a * b[n];
        } else {
          t.at[r][n] -= a * b[n];
        }
      }
    }
  }
}

// Forward substitution inside the tile: row r loses m[j][r] times row j for every j < r; m is a panel advanced to the
// tile's rows and columns. Exact however correlated the keys are, unlike products of the inverse's series.
SLEEPKERN_INLINE void substitute(Tile& t, const float* m) {
  SLEEPKERN_EACH_ROW(j) {
    SLEEPKERN_EACH_ROW(r) {
      if (r > j) {
        Vec f = broadcast(m[j * PANEL + r]);
        SLEEPKERN_EACH_VEC(n) t.at[r][n] -= f * t.at[j][n];
      }
    }
  }
}

// Backward substitution with the transpose: row r loses m[i][r] times row i for every i > r.
SLEEPKERN_INLINE void substitute_back(Tile& t, const float* m) {
  SLEEPKERN_EACH_ROW(n) {
    const int i = ROWS - 1 - n;
    SLEEPKERN_EACH_ROW(r) {
      if (r < i) {
        Vec f = broadcast(m[i * PANEL + r]);
        SLEEPKERN_EACH_VEC(x) t.at[r][x] -= f * t.at[i][x];
      }
    }
  }
}

// Where column `column` of a matrix in panels of `depth` rows starts.
SLEEPKERN_INLINE int64_t column_at(int64_t column, int64_t depth) {
  return column / PANEL * depth * PANEL + column % PANEL;
}

// The transpose, in panels, of a matrix in panels: [columns / PANEL][depth][PANEL] to
// [rows / PANEL][turned_depth][PANEL]. rows and columns are multiples of LANES.
SLEEPKERN_STAGE void turn(const float* panels, int64_t depth, int64_t rows, int64_t columns, float* turned,
                          int64_t turned_depth) {
  for (int64_t c = 0; c < columns; c += LANES) {
    for (int64_t r = 0; r < rows; r += LANES) {
      transpose(panels + column_at(c, depth) + r * PANEL, PANEL, turned + column_at(r, turned_depth) + c * PANEL,
                PANEL);
    }
  }
}
