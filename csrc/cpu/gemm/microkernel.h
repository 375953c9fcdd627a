// The micro-kernel: a tile of ROWS x PANEL sums in registers, whose operands are stored in panels.
//
// Every matrix X [depth, n] of a product X^T Y is stored in panels over its columns, [n / PANEL][depth][PANEL], so that
// one layout serves both sides: a column of the left operand is broadcast, a row of the right operand is loaded. Panels
// keep a sub-matrix in L1: rows of a row-major state are 512 bytes apart and would fall into few cache sets.
//
// Registers: ROWS x VECS accumulators hide the latency of fused multiply-add (4 cycles x 2 ports = 8 in flight), and
// with VECS + 1 operands fit 16 (SSE, AVX2: 4 x 2) or 32 registers (AVX-512: 8 x 2). On AVX2 98 % of peak.
//
// A chunk has 32 tokens. Work within a chunk grows with its length (2 CHUNK (K + V) flop a token beside 6 K V for the
// state), while loading and storing the state costs the same for every chunk. On AVX2 32 is faster than 64 by a tenth
// at K = V = 64 and 128.
#pragma once

#include <cstdint>

#include "cpu/simd/bf16.h"
#include "cpu/simd/vec.h"

namespace sleepkern::SLEEPKERN_ISA {
namespace {

constexpr int VECS = 2;
constexpr int PANEL = VECS * LANES;
constexpr int ROWS = LANES == 16 ? 8 : 4;
constexpr int CHUNK = 32;
static_assert(PANEL % ROWS == 0 && CHUNK % PANEL == 0, "tiles must not cross panels");

template <int HEIGHT>
struct TileOf {
  Vec at[HEIGHT][VECS];
};
using Tile = TileOf<ROWS>;

// Loops over a tile are fully unrolled; otherwise the accumulators would be in memory.
#define SLEEPKERN_EACH_OF(height, r) _Pragma("GCC unroll 8") for (int r = 0; r < height; ++r)
#define SLEEPKERN_EACH_ROW(r) SLEEPKERN_EACH_OF(ROWS, r)
#define SLEEPKERN_EACH_VEC(n) _Pragma("GCC unroll 2") for (int n = 0; n < VECS; ++n)

template <int HEIGHT>
SLEEPKERN_INLINE void clear(TileOf<HEIGHT>& t) {
  SLEEPKERN_EACH_OF(HEIGHT, r)
    SLEEPKERN_EACH_VEC(n) t.at[r][n] = Vec{};
}

// Rows of a tile are `stride` floats apart, by default those of a panel.
template <int HEIGHT>
SLEEPKERN_INLINE void load(TileOf<HEIGHT>& t, const float* from, int64_t stride = PANEL) {
  SLEEPKERN_EACH_OF(HEIGHT, r)
    SLEEPKERN_EACH_VEC(n) t.at[r][n] = load(from + r * stride + n * LANES);
}

template <int HEIGHT>
SLEEPKERN_INLINE void store(const TileOf<HEIGHT>& t, float* to, int64_t stride = PANEL) {
  SLEEPKERN_EACH_OF(HEIGHT, r)
    SLEEPKERN_EACH_VEC(n) store(to + r * stride + n * LANES, t.at[r][n]);
}

// Adds the rows at `from` to a tile.
template <int HEIGHT>
SLEEPKERN_INLINE void add(TileOf<HEIGHT>& t, const float* from, int64_t stride) {
  SLEEPKERN_EACH_OF(HEIGHT, r)
    SLEEPKERN_EACH_VEC(n) t.at[r][n] += load(from + r * stride + n * LANES);
}

// Multiplies row r of a tile by by[r].
SLEEPKERN_INLINE void scale_rows(Tile& t, const float* by) {
  SLEEPKERN_EACH_ROW(r) {
    Vec f = broadcast(by[r]);
    SLEEPKERN_EACH_VEC(n) t.at[r][n] *= f;
  }
}

// tile += sign * left^T right over `depth` steps. `left` is a panel, or another matrix with steps of WIDTH, advanced to
// the tile's first row. E is float or Bf16x2.
template <int SIGN, int WIDTH = PANEL, int HEIGHT, class E>
SLEEPKERN_INLINE void multiply_add(TileOf<HEIGHT>& t, const E* left, const E* right, int64_t depth) {
  for (int64_t d = 0; d < depth; ++d) {
    decltype(load(right)) b[VECS];
    SLEEPKERN_EACH_VEC(n) b[n] = load(right + d * PANEL + n * LANES);
    SLEEPKERN_EACH_OF(HEIGHT, r) {
      const E a = left[d * WIDTH + r];
      SLEEPKERN_EACH_VEC(n) t.at[r][n] = multiply_add<SIGN>(t.at[r][n], a, b[n]);
    }
  }
}

// Adds the part of a product at and below its diagonal: row r gains p[j][r] times row j for every j <= r. Multiplying
// by zeros above the diagonal would not do: 0 times NaN would carry a NaN to earlier tokens.
SLEEPKERN_INLINE void add_triangle(Tile& t, const float* p, const float* rows) {
  SLEEPKERN_EACH_ROW(j) {
    SLEEPKERN_EACH_ROW(r) {
      if (r >= j) {
        const Vec f = broadcast(p[j * PANEL + r]);
        SLEEPKERN_EACH_VEC(n) t.at[r][n] += f * load(rows + j * PANEL + n * LANES);
      }
    }
  }
}

SLEEPKERN_INLINE void add_triangle(Tile& t, const Bf16x2* p, const Bf16x2* rows) {
  constexpr uint32_t EARLIER = 0xffff;
  SLEEPKERN_EACH_OF(ROWS / 2, j) {
    SLEEPKERN_EACH_ROW(r) {
      if (r >= 2 * j) {
        const uint32_t seen = r > 2 * j ? ~uint32_t{0} : EARLIER;
        const BitVec f = broadcast_bits(p[j * PANEL + r].bits & seen);
        SLEEPKERN_EACH_VEC(n) t.at[r][n] = dot(t.at[r][n], f, load(rows + j * PANEL + n * LANES) & seen);
      }
    }
  }
}

// Forward substitution inside the tile: row r loses m[j][r] times row j for every j < r. m is a panel, advanced to the
// tile's rows and columns. This is exact however correlated the keys are, unlike products of the inverse's series.
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

// The offset of column `column` of a matrix in panels of `depth` rows.
SLEEPKERN_INLINE int64_t column_at(int64_t column, int64_t depth) {
  return column / PANEL * depth * PANEL + column % PANEL;
}

// Transposes a matrix in panels to panels: [columns / PANEL][depth][PANEL] to [rows / PANEL][transposed_depth][PANEL].
// rows and columns are multiples of LANES.
SLEEPKERN_STAGE void transpose_panels(const float* panels, int64_t depth, int64_t rows, int64_t columns,
                                      float* transposed, int64_t transposed_depth) {
  for (int64_t c = 0; c < columns; c += LANES) {
    for (int64_t r = 0; r < rows; r += LANES) {
      transpose(panels + column_at(c, depth) + r * PANEL, PANEL,
                transposed + column_at(r, transposed_depth) + c * PANEL, PANEL);
    }
  }
}

// Stores rows and columns [i + LANES, i + PANEL) of a gram, and zeros left of them.
template <int SIGN, class E, class Finish>
SLEEPKERN_INLINE void half_gram(const E* left, const E* right, int64_t depth, int64_t i, int64_t out_depth, float* out,
                                Finish finish) {
  Vec t[LANES] = {};
  for (int64_t d = 0; d < depth; ++d) {
    const auto b = load(right + d * PANEL);
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r) t[r] = multiply_add<SIGN>(t[r], left[d * PANEL + r], b);
  }
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r) {
    const int64_t at = i * out_depth + (i + LANES + r) * PANEL;
    store(out + at, Vec{});
    store(out + at + LANES, finish(t[r], at + LANES, i + LANES));
  }
}

// Stores the upper triangle, rows j and columns i >= j, of sign * left^T right over `depth` steps, in panels of
// out_depth rows. Both operands have `count` columns, up to a whole panel. finish(vector, its offset in `out`, its
// first column) returns the vector that is stored. In a panel on the diagonal the lower half has only zeros in its
// first vector, so there a tile is half as wide and LANES high.
template <int SIGN, class E, class Finish>
SLEEPKERN_INLINE void upper_gram(const E* left, const E* right, int64_t depth, int64_t count, int64_t out_depth,
                                 float* out, Finish finish) {
  for (int64_t i = 0; i < count; i += PANEL) {
    const E* columns = right + i * depth;
    for (int64_t j = 0; j < min_of(i + LANES, round_up(count, ROWS)); j += ROWS) {
      Tile t;
      clear(t);
      multiply_add<SIGN>(t, left + column_at(j, depth), columns, depth);
      SLEEPKERN_EACH_ROW(r) {
        SLEEPKERN_EACH_VEC(n) {
          const int64_t at = i * out_depth + (j + r) * PANEL + n * LANES;
          store(out + at, finish(t.at[r][n], at, i + n * LANES));
        }
      }
    }
    if (i + LANES < count) half_gram<SIGN>(left + i * depth + LANES, columns + LANES, depth, i, out_depth, out, finish);
  }
}

// Converts an even number of rows of a panel to bf16x2, two rows in one.
SLEEPKERN_INLINE void rows_to_bf16x2(const float* rows, int64_t count, Bf16x2* pairs) {
  for (int64_t t = 0; t < count; t += 2) {
    SLEEPKERN_EACH_VEC(n) {
      const float* row = rows + t * PANEL + n * LANES;
      store(pairs + t / 2 * PANEL + n * LANES, interleave(load(row), load(row + PANEL)));
    }
  }
}

}  // namespace
}  // namespace sleepkern::SLEEPKERN_ISA
