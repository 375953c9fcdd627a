// Replay of windows of any length, in two launches. The first computes the factors of all chunks in parallel; the
// second runs the passes, with the factors in shared memory.
//
//   chunk_factors:       blockIdx.x = slot of a chunk, blockIdx.y = head
//   state_pass, affine:  blockIdx.x = (sequence * HV + head) * v_tiles + v-tile
//
// state_pass loads a window of at most `slots` chunks once for all passes; the chunks of a longer one are streamed
// through the slots in every pass. affine computes S_1 by one pass and, from the identity and values 0, the columns of
// A, 16 a warp. Then d = S_1 - S_0, d <- A d, S <- S + d, with A [K][K] in the memory of the first slot. Outputs take
// a launch of state_pass. Warp w has columns 16 w ... of the v-tile.
//
// Shared memory, a slot: -W and Kt (16 K each at K = 128 in bf16), the decay, U (4 K every 16 columns); with outputs
// also Qe and P of one chunk. Registers: S^T KP / 2, Vn^T 32, and A or d another KP / 2.
#pragma once

#include "common/recurrence.h"
#include "cuda/arch/mma_tiles.h"
#include "cuda/arch/ptx.h"
#include "cuda/recurrence/chunk_factors.cuh"
#include "cuda/recurrence/chunk_memory.cuh"
#include "cuda/recurrence/params.h"
#include "cuda/recurrence/state_pass.cuh"
#include "cuda/recurrence/tokens.cuh"

namespace sleepkern::cuda {

// The addresses of a chunk's factors in global memory.
template <Mode MODE, int KP>
struct GlobalFactors {
  static constexpr int TILES = 2 * CHUNK * KP, QUERIES = CHUNK * KP + CHUNK * CHUNK, GROUP = 16 * CHUNK;
  Number<MODE>* tiles;
  float *chunk_decay, *U;
  Number<MODE>* queries;

  SLEEPKERN_DEVICE GlobalFactors(const ReplayParams& call, int64_t slot, int head) {
    const int64_t index = slot * call.problem.HV + head;
    tiles = static_cast<Number<MODE>*>(call.factors.tiles) + index * TILES;
    chunk_decay = call.factors.chunk_decay + index * KP;
    U = call.factors.U + index * groups_of(call.problem) * GROUP;
    queries = call.factors.queries ? static_cast<Number<MODE>*>(call.factors.queries) + index * QUERIES : nullptr;
  }
};

template <class T>
SLEEPKERN_DEVICE void copy_out(T* to, const T* from, int count) {
  for (int i = threadIdx.x; i < count * static_cast<int>(sizeof(T)) / 16; i += THREADS) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
}

// The chunk of a slot; `tokens` is 0 for a slot without a chunk.
SLEEPKERN_DEVICE Chunk chunk_of_slot(const Problem& problem, int64_t slot, int head) {
  int64_t sequence = 0;
  if (problem.offsets) {
    int64_t beyond = problem.sequences;  // binary search for the last sequence whose first slot is not after this slot
    while (beyond - sequence > 1) {
      const int64_t middle = (sequence + beyond) / 2;
      (first_slot(problem, middle) <= slot ? sequence : beyond) = middle;
    }
  } else {
    sequence = slot / ((problem.T + CHUNK - 1) / CHUNK);
  }
  const int64_t first = problem.first(sequence) + (slot - first_slot(problem, sequence)) * CHUNK;
  const int64_t left = problem.first(sequence + 1) - first;
  return {first, static_cast<int>(left < 0 ? 0 : left < CHUNK ? left : CHUNK), head};
}

template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_KERNEL(THREADS, 2)
chunk_factors_kernel(const ReplayParams call) {
  const Problem& problem = call.problem;
  const Chunk chunk = chunk_of_slot(problem, blockIdx.x, blockIdx.y);
  if (chunk.tokens == 0) return;
  const ChunkMemory<MODE, KP, CHANNEL> smem(shared_memory(), problem.want_output);
  const ChunkScratch<MODE, KP, CHANNEL>& scratch = smem.scratch;
  const GlobalFactors<MODE, KP> slot(call, blockIdx.x, chunk.head);
  const int warp = threadIdx.x >> 5, V = static_cast<int>(problem.V);

  compute_chunk_factors<MODE, KP, CHANNEL>(problem, chunk, smem.keys, smem.W, smem.P, scratch);
  for (int start = 0; start < V; start += VALUES) {
    load_tile<MODE, VALUES>(scratch.V, problem.v, chunk, static_cast<int64_t>(chunk.head) * V + start, V - start, false,
                            [](int, int, float x) { return x; });
    block_barrier();
    const int group = start / 16 + warp;
    if (warp < VALUES / 16 && group < groups_of(problem)) {
      Values U;
      factor_U<MODE, KP, CHANNEL>(scratch, warp, chunk.blocks(), U);
      store_values(U, slot.U, group);
    }
    block_barrier();
  }
  finish_keys<MODE, KP, CHANNEL>(problem, chunk, smem.keys, smem.chunk_decay, scratch.G);
  if (problem.want_output) load_queries<MODE, KP, CHANNEL>(problem, chunk, scratch.Q, scratch.G);
  block_barrier();
  copy_out(slot.tiles, smem.W, CHUNK * KP);
  copy_out(slot.tiles + CHUNK * KP, smem.keys, CHUNK * KP);
  copy_out(slot.chunk_decay, smem.chunk_decay, KP);
  if (problem.want_output) {
    copy_out(slot.queries, scratch.Q, CHUNK * KP);
    copy_out(slot.queries + CHUNK * KP, smem.P, CHUNK * CHUNK);
  }
}

// The shared memory of the second launch.
template <Mode MODE, int KP>
struct MultiChunkMemory {
  struct SmemSlot {
    Number<MODE>* tiles;  // -W, then keys
    float *chunk_decay, *U;
  };
  static constexpr int MOST = 16;  // slots

  Arena arena;
  Mbarrier* mbarriers;  // those of the slots, then that of queries
  float* sums;
  SmemSlot first;
  int stride;  // bytes from slot to slot
  Number<MODE>* queries;

  SLEEPKERN_BOTH MultiChunkMemory(char* base, int v_tile, int slots, bool want_output)
      : arena{base}, mbarriers(arena.take<Mbarrier>(MOST + 1)), sums(arena.take<float>(SUMS)) {
    const int64_t before = arena.used;
    first = take(v_tile);
    stride = static_cast<int>(arena.used - before);
    for (int i = 1; i < slots; ++i) take(v_tile);
    queries = want_output ? arena.take<Number<MODE>>(GlobalFactors<MODE, KP>::QUERIES) : nullptr;
  }

  SLEEPKERN_BOTH SmemSlot take(int v_tile) {
    auto* tiles = arena.take<Number<MODE>>(GlobalFactors<MODE, KP>::TILES);
    auto* chunk_decay = arena.take<float>(KP);
    return {tiles, chunk_decay, arena.take<float>(v_tile / 16 * GlobalFactors<MODE, KP>::GROUP)};
  }
  SLEEPKERN_DEVICE SmemSlot at(int slot) const {
    const int bytes = slot * stride;
    auto moved = [bytes](auto* at) { return reinterpret_cast<decltype(at)>(reinterpret_cast<char*>(at) + bytes); };
    return {moved(first.tiles), moved(first.chunk_decay), moved(first.U)};
  }
};

// The chunks of one sequence and head, in the order of the passes: load n copies chunk n % chunks to slot n % slots. A
// resident window is loaded once.
template <Mode MODE, int KP>
struct ChunkStream {
  const ReplayParams& call;
  const MultiChunkMemory<MODE, KP>& smem;
  int64_t first;  // first slot of the sequence in global memory
  int head, chunks, column;
  bool resident;
  int loads;  // number of loads in all passes
  int issued = 0, consumed = 0, query_loads = 0;

  SLEEPKERN_DEVICE void issue() {
    const int slot = issued % call.slots;
    const auto to = smem.at(slot);
    const GlobalFactors<MODE, KP> from(call, first + issued % chunks, head);
    const int left = groups_of(call.problem) - column / 16, groups = left < call.v_tile / 16 ? left : call.v_tile / 16;
    const int values = groups * GlobalFactors<MODE, KP>::GROUP * static_cast<int>(sizeof(float));
    const int tiles = GlobalFactors<MODE, KP>::TILES * static_cast<int>(sizeof(Number<MODE>));
    const int chunk_decay = KP * static_cast<int>(sizeof(float));
    Mbarrier* mbarrier = smem.mbarriers + slot;
    copy_begin(mbarrier, tiles + chunk_decay + values);
    copy_part(mbarrier, to.tiles, from.tiles, tiles);
    copy_part(mbarrier, to.chunk_decay, from.chunk_decay, chunk_decay);
    copy_part(mbarrier, to.U, from.U + static_cast<int64_t>(column / 16) * GlobalFactors<MODE, KP>::GROUP, values);
    copy_end(mbarrier);
    ++issued;
  }
  SLEEPKERN_DEVICE void fill() {
    while (issued < loads && issued < consumed + call.slots) issue();
  }
  SLEEPKERN_DEVICE typename MultiChunkMemory<MODE, KP>::SmemSlot next() const {
    const int slot = resident ? consumed % chunks : consumed % call.slots;
    // mutant: no-wait-for-a-copy
    // mutant: wait-for-the-wrong-phase
    if (consumed < issued) copy_wait(smem.mbarriers + slot, consumed / call.slots & 1);
    return smem.at(slot);
  }
  SLEEPKERN_DEVICE void done() {
    ++consumed;
    if (resident) return;
    // mutant: no-barrier-before-a-slot-is-refilled
    block_barrier();  // all warps have read the slot
    fill();
  }
  // Loads Qe and P of chunk i, for which there is one slot.
  SLEEPKERN_DEVICE void load_queries(int i) {
    const GlobalFactors<MODE, KP> from(call, first + i, head);
    Mbarrier* mbarrier = smem.mbarriers + MultiChunkMemory<MODE, KP>::MOST;
    const int bytes = GlobalFactors<MODE, KP>::QUERIES * static_cast<int>(sizeof(Number<MODE>));
    // mutant: no-barrier-before-queries-are-loaded
    block_barrier();  // all warps have read those of the chunk before
    copy_begin(mbarrier, bytes);
    copy_part(mbarrier, smem.queries, from.queries, bytes);
    copy_end(mbarrier);
    copy_wait(mbarrier, query_loads++ & 1);
  }
};

// The sequence, head and v-tile of a CTA, for both methods.
struct HeadTile {
  int64_t bh, sequence, tokens;
  int head, chunks;
  int first, column;  // first value column of the CTA and of the warp
  int column_or_end;  // `column`, or V for a warp without columns
  bool active;

  SLEEPKERN_DEVICE explicit HeadTile(const ReplayParams& call)
      : bh(blockIdx.x / call.v_tiles),
        sequence(bh / call.problem.HV),
        tokens(call.problem.first(sequence + 1) - call.problem.first(sequence)),
        head(static_cast<int>(bh % call.problem.HV)),
        chunks(static_cast<int>((tokens + CHUNK - 1) / CHUNK)),
        first(static_cast<int>(blockIdx.x % call.v_tiles) * call.v_tile) {
    const int warp = threadIdx.x >> 5, V = static_cast<int>(call.problem.V);
    column = first + 16 * warp;
    active = 16 * warp < call.v_tile && column < V;
    column_or_end = active ? column : V;
  }
  SLEEPKERN_DEVICE int64_t state(const Problem& problem) const { return bh * problem.K * problem.V; }
  SLEEPKERN_DEVICE Chunk chunk(const Problem& problem, int i) const {
    const int64_t left = tokens - int64_t{CHUNK} * i;
    return {problem.first(sequence) + int64_t{CHUNK} * i, static_cast<int>(left < CHUNK ? left : CHUNK), head};
  }
};

template <Mode MODE, int KP>
SLEEPKERN_DEVICE MultiChunkMemory<MODE, KP> init_memory(const ReplayParams& call, bool want_output) {
  const MultiChunkMemory<MODE, KP> smem(shared_memory(), call.v_tile, call.slots, want_output);
  if (threadIdx.x == 0) {
    for (int i = 0; i < call.slots; ++i) mbarrier_create(smem.mbarriers + i);
    if (want_output) mbarrier_create(smem.mbarriers + MultiChunkMemory<MODE, KP>::MOST);
  }
  block_barrier();
  return smem;
}

// Runs all passes by wy.
template <Mode MODE, int KP>
SLEEPKERN_KERNEL(THREADS, 1)
state_pass_kernel(const ReplayParams call) {
  const Problem& problem = call.problem;
  const HeadTile tile(call);
  const int K = static_cast<int>(problem.K), V = static_cast<int>(problem.V), warp = threadIdx.x >> 5;
  const MultiChunkMemory<MODE, KP> smem = init_memory<MODE, KP>(call, problem.want_output);
  const bool resident = tile.chunks <= call.slots, stops = call.stops();
  float* final = problem.final_state + tile.state(problem);
  ChunkStream<MODE, KP> stream{call,       smem,     first_slot(problem, tile.sequence),        tile.head, tile.chunks,
                               tile.first, resident, tile.chunks * (resident ? 1 : call.passes)};
  State<KP> S;
  load_state<KP>(S, problem.state ? problem.state + tile.state(problem) : nullptr, K, V, tile.column_or_end);
  stream.fill();
  int passes_done = 0;
  int last = stops ? -1 : call.passes - 1;  // the pass that is read out
#pragma unroll 1
  while (true) {
    const bool last_pass = problem.want_output && passes_done == last;
    if (stops && !last_pass) store_state<KP>(S, final, K, V, tile.column_or_end);
    if (stops && last_pass)
      load_state<KP>(S, final, K, V, tile.column_or_end);  // the state before the last pass, which runs again
#pragma unroll 1
    for (int i = 0; i < tile.chunks; ++i) {
      const Chunk chunk = tile.chunk(problem, i);
      const auto at = stream.next();
      if (last_pass) stream.load_queries(i);
      if (tile.active) {
        Values values;
        load_values(values, at.U, warp);
        correct<MODE, KP>(values, S, at.tiles, chunk.blocks());
        if (last_pass)
          chunk_output<MODE, KP>(S, values, smem.queries, smem.queries + CHUNK * KP, problem, chunk, tile.column);
        advance<MODE, KP>(S, values, at.tiles + CHUNK * KP, at.chunk_decay, chunk.blocks());
      }
      stream.done();
    }
    ++passes_done;
    if (last_pass) break;
    if (stops) {
      const float step = square_step<KP>(S, final, K, V, tile.column_or_end);
      if (converged(call, tile.bh, smem.sums, passes_done, step, square_sum<KP>(S)) || passes_done == call.passes) {
        if (!problem.want_output) break;
        last = passes_done;  // this pass runs again, with outputs, from the state before it; it is not counted twice
      }
    } else if (passes_done == call.passes) {
      break;
    }
  }
  if (tile.active) store_state<KP>(S, final, K, V, tile.column);
}

// Runs all passes by affine, without outputs. With outputs state_pass_kernel runs the last pass, from the state before
// it, which this kernel stores in call.before.
template <Mode MODE, int KP>
SLEEPKERN_KERNEL(THREADS, 1)
affine_kernel(const ReplayParams call) {
  const Problem& problem = call.problem;
  const HeadTile tile(call);
  const int K = static_cast<int>(problem.K), V = static_cast<int>(problem.V), warp = threadIdx.x >> 5;
  const MultiChunkMemory<MODE, KP> smem = init_memory<MODE, KP>(call, false);
  const float* initial = problem.state ? problem.state + tile.state(problem) : nullptr;
  float* final = (problem.want_output ? call.before : problem.final_state) + tile.state(problem);
  const bool stops = call.stops();
  const int passes = call.passes - (problem.want_output && !stops ? 1 : 0);
  ChunkStream<MODE, KP> stream{
      call, smem, first_slot(problem, tile.sequence), tile.head, tile.chunks, tile.first, false, tile.chunks};
  State<KP> S, d;  // d: first 16 columns of A
  load_state<KP>(S, initial, K, V, tile.column_or_end);
#pragma unroll
  for (int n = 0; n < KP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[n][i] = column_of(n, i) == 16 * warp + row_of(i) ? 1.0f : 0.0f;
  }
  stream.fill();
#pragma unroll 1
  for (int i = 0; i < tile.chunks; ++i) {
    const auto at = stream.next();
    const int blocks = tile.chunk(problem, i).blocks();
    Values values;
    if (tile.active) {
      load_values(values, at.U, warp);
      correct<MODE, KP>(values, S, at.tiles, blocks);
      advance<MODE, KP>(S, values, at.tiles + CHUNK * KP, at.chunk_decay, blocks);
    }
    if (16 * warp < KP) {
      clear(values);
      correct<MODE, KP>(values, d, at.tiles, blocks);
      advance<MODE, KP>(d, values, at.tiles + CHUNK * KP, at.chunk_decay, blocks);
    }
    stream.done();
  }
  block_barrier();
  Number<MODE>* A = smem.first.tiles;
  if (16 * warp < KP) {
#pragma unroll
    for (int n = 0; n < KP / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) store_element<MODE>(A, KP, column_of(n, i), 16 * warp + row_of(i), d[n][i]);
    }
  }
  block_barrier();
  load_state<KP>(d, initial, K, V, tile.column_or_end);
#pragma unroll
  for (int n = 0; n < KP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[n][i] = S[n][i] - d[n][i];
  }
  constexpr bool PARKED = MODE == Mode::fp32x3;  // S is stored in memory while d is transformed
  int passes_done = 1;
#pragma unroll 1
  for (;; ++passes_done) {
    if (stops && converged(call, tile.bh, smem.sums, passes_done, square_sum<KP>(d), square_sum<KP>(S))) break;
    if (passes_done == passes) break;
    if (PARKED) store_state<KP>(S, final, K, V, tile.column_or_end);
    if (tile.active) transform<MODE, KP>(d, A);
    if (PARKED) load_state<KP>(S, final, K, V, tile.column_or_end);
#pragma unroll
    for (int n = 0; n < KP / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) S[n][i] += d[n][i];
    }
  }
  const float back = stops && problem.want_output ? 1.0f : 0.0f;  // the last pass runs again, with outputs
#pragma unroll
  for (int n = 0; n < KP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) S[n][i] -= back * d[n][i];
  }
  if (tile.active) store_state<KP>(S, final, K, V, tile.column);
}

}  // namespace sleepkern::cuda
