// Operands of matrix products: tiles in shared memory, fragments in registers, and the products of fragments.
//
// A tile [rows][columns] is stored in shared memory as cores: 8 rows of 16 bytes, 128 contiguous bytes. ldmatrix reads
// one core at a time, without bank conflicts. The cores are in row-major order.
//
// A product multiplies 16 rows of the left operand by 8 of the right, over STEP columns of both (rows are contracted
// with rows: left times right transposed). The accumulator of one product, 16 x 8, is the left fragment of the next: so
// the state and the corrected values never leave the registers. In tf32 the hardware takes columns t and t + 4 of a
// group of 8 from the lane whose accumulator has 2t and 2t + 1. So tiles of float32 are stored with even columns first.
#pragma once

#include "cuda/arch/ptx.h"

namespace sleepkern::cuda {

// The precision of products: bfloat16, or float32 that is split into two tf32 values, with three products for one.
enum class Mode { bf16, fp32x3 };

template <Mode MODE>
struct Traits {
  using Number = float;
  static constexpr int STEP = 8;
};
template <>
struct Traits<Mode::bf16> {
  using Number = uint16_t;
  static constexpr int STEP = 16;
};
template <Mode MODE>
using Number = typename Traits<MODE>::Number;
template <Mode MODE>
constexpr int STEP = Traits<MODE>::STEP;
template <Mode MODE>
constexpr int CORE_COLUMNS = STEP<MODE> / 2;

SLEEPKERN_DEVICE float from_bf16(uint16_t x) { return from_bits(static_cast<uint32_t>(x) << 16); }
SLEEPKERN_DEVICE float widen(uint16_t x) { return from_bf16(x); }
SLEEPKERN_DEVICE float widen(float x) { return x; }

// The index of element (row, column) in a tile of `columns` columns.
template <Mode MODE>
SLEEPKERN_DEVICE int at(int columns, int row, int column) {
  const int cores = (row >> 3) * (columns / CORE_COLUMNS<MODE>);
  if (MODE == Mode::bf16) return (cores + (column >> 3)) * 64 + (row & 7) * 8 + (column & 7);
  return (cores + (column >> 3) * 2 + (column & 1)) * 32 + (row & 7) * 4 + ((column & 7) >> 1);
}

template <Mode MODE>
SLEEPKERN_DEVICE Number<MODE> narrow(float x) {
  if constexpr (MODE == Mode::bf16) return static_cast<uint16_t>(pack_bf16(x, 0.0f));
  return x;
}

template <Mode MODE>
SLEEPKERN_DEVICE void store_element(Number<MODE>* tile, int columns, int row, int column, float x) {
  tile[at<MODE>(columns, row, column)] = narrow<MODE>(x);
}

// Stores two neighbours from an even column on, as accumulators hold them.
template <Mode MODE>
SLEEPKERN_DEVICE void store_pair(Number<MODE>* tile, int columns, int row, int column, float x, float y) {
  if constexpr (MODE == Mode::bf16) {
    *reinterpret_cast<uint32_t*>(tile + at<MODE>(columns, row, column)) = pack_bf16(x, y);
  } else {
    store_element<MODE>(tile, columns, row, column, x);
    store_element<MODE>(tile, columns, row, column + 1, y);
  }
}

// Stores eight neighbours from a column on that is a multiple of 8.
template <Mode MODE>
SLEEPKERN_DEVICE void store_eight(Number<MODE>* tile, int columns, int row, int column, const float (&x)[8]) {
  Number<MODE>* p = tile + at<MODE>(columns, row, column);
  if constexpr (MODE == Mode::bf16) {
    *reinterpret_cast<uint4*>(p) =
        make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
  } else {
    *reinterpret_cast<float4*>(p) = make_float4(x[0], x[2], x[4], x[6]);
    *reinterpret_cast<float4*>(p + 32) = make_float4(x[1], x[3], x[5], x[7]);
  }
}

// 16 rows and STEP columns of the left or of the right operand. `low` is the part of a value that tf32 cannot hold.
template <Mode MODE>
struct Fragment {
  uint32_t high[4];
  uint32_t low[MODE == Mode::fp32x3 ? 4 : 1];
};

// x = high + low up to 2^-21 of x. high is rounded by integer arithmetic (cvt.rna is a dozen instructions on some
// architectures), which makes 0 of a NaN; low is truncated, which keeps the NaN.
template <Mode MODE>
SLEEPKERN_DEVICE void split(Fragment<MODE>& f) {
  if constexpr (MODE == Mode::fp32x3) {
    constexpr uint32_t TF32 = 0xffffe000;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = from_bits(opaque(f.high[i]));
      f.high[i] = (as_bits(x) + 0x1000) & TF32;
      f.low[i] = as_bits(x - from_bits(f.high[i])) & TF32;
    }
  }
}

SLEEPKERN_DEVICE int lane_of_warp() { return threadIdx.x & 31; }

// Loads fragments of a tile [rows][COLUMNS] in shared memory: 16 rows from 16 * block on, STEP columns from STEP * step
// on; transposed, 16 columns and STEP rows. Each lane keeps one address; blocks and steps are constant offsets from it.
template <Mode MODE, int COLUMNS>
struct FragmentLoader {
  static constexpr int CORE = 128, CORES = COLUMNS / CORE_COLUMNS<MODE>;  // bytes; cores in a row of them
  SharedAddress base;

  // (row, column): the core of the lane's row address for ldmatrix
  SLEEPKERN_DEVICE FragmentLoader(const Number<MODE>* tile, int row, int column)
      : base(shared_address(tile) + opaque((row * CORES + column) * CORE + 16 * (lane_of_warp() & 7))) {}
  SLEEPKERN_DEVICE Fragment<MODE> load(int block, int step) const {
    Fragment<MODE> f;
    load_matrices(f.high, base + (2 * block * CORES + 2 * step) * CORE);
    split<MODE>(f);
    return f;
  }
};

template <Mode MODE, int COLUMNS>
struct LeftLoader : FragmentLoader<MODE, COLUMNS> {
  SLEEPKERN_DEVICE explicit LeftLoader(const Number<MODE>* tile)
      : FragmentLoader<MODE, COLUMNS>(tile, (lane_of_warp() >> 3) & 1, lane_of_warp() >> 4) {}
};

template <Mode MODE, int COLUMNS>
struct RightLoader : FragmentLoader<MODE, COLUMNS> {
  SLEEPKERN_DEVICE explicit RightLoader(const Number<MODE>* tile)
      : FragmentLoader<MODE, COLUMNS>(tile, lane_of_warp() >> 4, (lane_of_warp() >> 3) & 1) {}
};

// ldmatrix transposes cores of two-byte elements; words are loaded one by one.
template <Mode MODE, int COLUMNS, bool RIGHT>
struct TransposedLoader {
  static constexpr int CORE = 128, CORES = COLUMNS / CORE_COLUMNS<MODE>;
  SharedAddress base;

  SLEEPKERN_DEVICE explicit TransposedLoader(const Number<MODE>* tile)
      : base(shared_address(tile) + opaque(offset())) {}
  SLEEPKERN_DEVICE static int offset() {
    const int lane = lane_of_warp(), g = lane >> 2, t = lane & 3;
    if (MODE == Mode::fp32x3) return (g & 1) * CORE + 32 * t + 4 * (g >> 1);
    const int low = (lane >> 3) & 1, high = lane >> 4;
    return ((RIGHT ? low : high) * CORES + (RIGHT ? high : low)) * CORE + 16 * (lane & 7);
  }
  SLEEPKERN_DEVICE Fragment<MODE> load(int block, int step) const {
    Fragment<MODE> f;
    if constexpr (MODE == Mode::bf16) {
      load_matrices_transposed(f.high, base + (2 * step * CORES + 2 * block) * CORE);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int odd_row = RIGHT ? i & 1 : i >> 1, second = RIGHT ? i >> 1 : i & 1;
        f.high[i] = load_word(base + (step * CORES + 4 * block + 2 * second) * CORE + 16 * odd_row);
      }
    }
    split<MODE>(f);
    return f;
  }
};

// A left fragment from accumulators [16][8 * TILES]: their columns STEP * step and following.
template <Mode MODE, int TILES>
SLEEPKERN_DEVICE Fragment<MODE> left_of(const float (&acc)[TILES][4], int step) {
  Fragment<MODE> f;
  if constexpr (MODE == Mode::bf16) {
    const float (&x)[4] = acc[2 * step];
    const float (&y)[4] = acc[2 * step + 1];
    f.high[0] = pack_bf16(x[0], x[1]);
    f.high[1] = pack_bf16(x[2], x[3]);
    f.high[2] = pack_bf16(y[0], y[1]);
    f.high[3] = pack_bf16(y[2], y[3]);
  } else {
    const float (&x)[4] = acc[step];
    const float ordered[4] = {x[0], x[2], x[1], x[3]};
#pragma unroll
    for (int i = 0; i < 4; ++i) f.high[i] = as_bits(ordered[i]);
    split<MODE>(f);
  }
  return f;
}

// d += a b for one of the two halves of a right fragment.
template <Mode MODE>
SLEEPKERN_DEVICE void mma(float (&d)[4], const Fragment<MODE>& a, const Fragment<MODE>& b, int half) {
  if constexpr (MODE == Mode::bf16) {
    mma_bf16(d, a.high, b.high[2 * half], b.high[2 * half + 1]);
  } else {
    mma_tf32(d, a.low, b.high[2 * half], b.high[2 * half + 1]);
    mma_tf32(d, a.high, b.low[2 * half], b.low[2 * half + 1]);
    mma_tf32(d, a.high, b.high[2 * half], b.high[2 * half + 1]);
  }
}

// acc [16][8 * TILES] += left * right over one step, with `blocks` blocks of 16 rows of the right operand from `first`
// on.
template <Mode MODE, int TILES, class Right>
SLEEPKERN_DEVICE void multiply(float (&acc)[TILES][4], const Fragment<MODE>& left, const Right& right, int step,
                               int blocks = TILES / 2, int first = 0) {
#pragma unroll
  for (int n = 0; n < TILES / 2; ++n) {
    if (n < blocks) {
      const Fragment<MODE> f = right.load(first + n, step);
      mma<MODE>(acc[2 * n], left, f, 0);
      mma<MODE>(acc[2 * n + 1], left, f, 1);
    }
  }
}

// The row (0..15) and column of element i of product tile n of an accumulator.
SLEEPKERN_DEVICE int row_of(int i) { return (lane_of_warp() >> 2) + 8 * (i >> 1); }
SLEEPKERN_DEVICE int column_of(int n, int i) { return 8 * n + 2 * (lane_of_warp() & 3) + (i & 1); }

template <int TILES>
SLEEPKERN_DEVICE void clear(float (&acc)[TILES][4]) {
#pragma unroll
  for (int n = 0; n < TILES; ++n) {
    for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
  }
}

// Hands out shared memory in order. With a null base it only counts, by which the host finds the size.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  SLEEPKERN_BOTH T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(base + used);
    use_shared(p, count * static_cast<int64_t>(sizeof(T)));
    used += (count * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128 + GUARD;
    return p;
  }
};

}  // namespace sleepkern::cuda
