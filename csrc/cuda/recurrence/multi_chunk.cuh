// Replay of windows of any length, in two launches. The first computes the factors of all chunks in parallel; the
// second runs the passes, with the factors in shared memory.
//
//   chunk_factors:       blockIdx.x = slot of a chunk, blockIdx.y = head
//   state_pass, affine:  blockIdx.x = (sequence * HV + head) * value_blocks + v-tile
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
struct Slot {
  static constexpr int TILES = 2 * CHUNK * KP, QUERIES = CHUNK * KP + CHUNK * CHUNK, GROUP = 16 * CHUNK;
  Number<MODE>* tiles;
  float *gamma, *U;
  Number<MODE>* queries;

  SLEEPKERN_DEVICE Slot(const Call& c, int64_t slot, int head) {
    const int64_t index = slot * c.p.HV + head;
    tiles = static_cast<Number<MODE>*>(c.factors.tiles) + index * TILES;
    gamma = c.factors.gamma + index * KP;
    U = c.factors.U + index * groups_of(c.p) * GROUP;
    queries = c.factors.queries ? static_cast<Number<MODE>*>(c.factors.queries) + index * QUERIES : nullptr;
  }
};

template <class T>
SLEEPKERN_DEVICE void copy_out(T* to, const T* from, int count) {
  for (int i = threadIdx.x; i < count * static_cast<int>(sizeof(T)) / 16; i += THREADS) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
}

// The chunk of a slot; `tokens` is 0 for a slot without a chunk.
SLEEPKERN_DEVICE Chunk chunk_of_slot(const Problem& p, int64_t slot, int head) {
  int64_t sequence = 0;
  if (p.offsets) {
    int64_t beyond = p.sequences;  // binary search for the last sequence whose first slot is not after this slot
    while (beyond - sequence > 1) {
      const int64_t middle = (sequence + beyond) / 2;
      (first_slot(p, middle) <= slot ? sequence : beyond) = middle;
    }
  } else {
    sequence = slot / ((p.T + CHUNK - 1) / CHUNK);
  }
  const int64_t first = p.first(sequence) + (slot - first_slot(p, sequence)) * CHUNK;
  const int64_t left = p.first(sequence + 1) - first;
  return {first, static_cast<int>(left < 0 ? 0 : left < CHUNK ? left : CHUNK), head};
}

template <Mode MODE, int KP, bool CHANNEL>
SLEEPKERN_KERNEL(THREADS, 2)
prepare_kernel(const Call c) {
  const Problem& p = c.p;
  const Chunk chunk = chunk_of_slot(p, blockIdx.x, blockIdx.y);
  if (chunk.tokens == 0) return;
  const ChunkMemory<MODE, KP, CHANNEL> m(shared_memory(), p.reads);
  const Workspace<MODE, KP, CHANNEL>& scratch = m.scratch;
  const Slot<MODE, KP> slot(c, blockIdx.x, chunk.head);
  const int warp = threadIdx.x >> 5, V = static_cast<int>(p.V);

  prepare_chunk<MODE, KP, CHANNEL>(p, chunk, m.keys, m.W, m.P, scratch);
  for (int start = 0; start < V; start += VALUES) {
    load_tile<MODE, VALUES>(scratch.V, p.v, chunk, static_cast<int64_t>(chunk.head) * V + start, V - start, false,
                            [](int, int, float x) { return x; });
    block_barrier();
    const int group = start / 16 + warp;
    if (warp < VALUES / 16 && group < groups_of(p)) {
      Values U;
      write_factor<MODE, KP, CHANNEL>(scratch, warp, chunk.blocks(), U);
      store_values(U, slot.U, group);
    }
    block_barrier();
  }
  finish_keys<MODE, KP, CHANNEL>(p, chunk, m.keys, m.gamma, scratch.G);
  if (p.reads) load_queries<MODE, KP, CHANNEL>(p, chunk, scratch.Q, scratch.G);
  block_barrier();
  copy_out(slot.tiles, m.W, CHUNK * KP);
  copy_out(slot.tiles + CHUNK * KP, m.keys, CHUNK * KP);
  copy_out(slot.gamma, m.gamma, KP);
  if (p.reads) {
    copy_out(slot.queries, scratch.Q, CHUNK * KP);
    copy_out(slot.queries + CHUNK * KP, m.P, CHUNK * CHUNK);
  }
}

// The shared memory of the second launch.
template <Mode MODE, int KP>
struct ReplayMemory {
  struct Place {
    Number<MODE>* tiles;  // -W, then keys
    float *gamma, *U;
  };
  static constexpr int MOST = 16;  // slots

  Arena arena;
  Arrival* arrivals;  // those of the slots, then that of queries
  float* sums;
  Place first;
  int stride;  // bytes from slot to slot
  Number<MODE>* queries;

  SLEEPKERN_BOTH ReplayMemory(char* base, int block, int slots, bool reads)
      : arena{base}, arrivals(arena.take<Arrival>(MOST + 1)), sums(arena.take<float>(SUMS)) {
    const int64_t before = arena.used;
    first = take(block);
    stride = static_cast<int>(arena.used - before);
    for (int i = 1; i < slots; ++i) take(block);
    queries = reads ? arena.take<Number<MODE>>(Slot<MODE, KP>::QUERIES) : nullptr;
  }

  SLEEPKERN_BOTH Place take(int block) {
    auto* tiles = arena.take<Number<MODE>>(Slot<MODE, KP>::TILES);
    auto* gamma = arena.take<float>(KP);
    return {tiles, gamma, arena.take<float>(block / 16 * Slot<MODE, KP>::GROUP)};
  }
  SLEEPKERN_DEVICE Place at(int slot) const {
    const int bytes = slot * stride;
    auto moved = [bytes](auto* p) { return reinterpret_cast<decltype(p)>(reinterpret_cast<char*>(p) + bytes); };
    return {moved(first.tiles), moved(first.gamma), moved(first.U)};
  }
};

// The chunks of one sequence and head, in the order of the passes: load n copies chunk n % chunks to slot n % slots. A
// resident window is loaded once.
template <Mode MODE, int KP>
struct Stream {
  const Call& c;
  const ReplayMemory<MODE, KP>& m;
  int64_t first;  // first slot of the sequence in global memory
  int head, chunks, column;
  bool resident;
  int wanted;  // number of loads in all passes
  int asked = 0, seen = 0, reads = 0;

  SLEEPKERN_DEVICE void ask() {
    const int place = asked % c.slots;
    const auto to = m.at(place);
    const Slot<MODE, KP> from(c, first + asked % chunks, head);
    const int left = groups_of(c.p) - column / 16, groups = left < c.block / 16 ? left : c.block / 16;
    const int values = groups * Slot<MODE, KP>::GROUP * static_cast<int>(sizeof(float));
    const int tiles = Slot<MODE, KP>::TILES * static_cast<int>(sizeof(Number<MODE>));
    const int gamma = KP * static_cast<int>(sizeof(float));
    Arrival* arrival = m.arrivals + place;
    copy_begin(arrival, tiles + gamma + values);
    copy_part(arrival, to.tiles, from.tiles, tiles);
    copy_part(arrival, to.gamma, from.gamma, gamma);
    copy_part(arrival, to.U, from.U + static_cast<int64_t>(column / 16) * Slot<MODE, KP>::GROUP, values);
    copy_end(arrival);
    ++asked;
  }
  SLEEPKERN_DEVICE void fill() {
    while (asked < wanted && asked < seen + c.slots) ask();
  }
  SLEEPKERN_DEVICE typename ReplayMemory<MODE, KP>::Place next() const {
    const int place = resident ? seen % chunks : seen % c.slots;
    // mutant: no-wait-for-a-copy
    // mutant: wait-for-the-wrong-phase
    if (seen < asked) copy_wait(m.arrivals + place, seen / c.slots & 1);
    return m.at(place);
  }
  SLEEPKERN_DEVICE void done() {
    ++seen;
    if (resident) return;
    // mutant: no-barrier-before-a-slot-is-refilled
    block_barrier();  // all warps have read the slot
    fill();
  }
  // Loads Qe and P of chunk i, for which there is one slot.
  SLEEPKERN_DEVICE void load_queries(int i) {
    const Slot<MODE, KP> from(c, first + i, head);
    Arrival* arrival = m.arrivals + ReplayMemory<MODE, KP>::MOST;
    const int bytes = Slot<MODE, KP>::QUERIES * static_cast<int>(sizeof(Number<MODE>));
    // mutant: no-barrier-before-queries-are-loaded
    block_barrier();  // all warps have read those of the chunk before
    copy_begin(arrival, bytes);
    copy_part(arrival, m.queries, from.queries, bytes);
    copy_end(arrival);
    copy_wait(arrival, reads++ & 1);
  }
};

// The sequence, head and v-tile of a CTA, for both methods.
struct Lane {
  int64_t index, sequence, tokens;
  int head, chunks, first, column,
      seen;  // first value columns of the CTA and of the warp; `seen` is `column`, or V for a warp without columns
  bool active;

  SLEEPKERN_DEVICE explicit Lane(const Call& c)
      : index(blockIdx.x / c.value_blocks),
        sequence(index / c.p.HV),
        tokens(c.p.first(sequence + 1) - c.p.first(sequence)),
        head(static_cast<int>(index % c.p.HV)),
        chunks(static_cast<int>((tokens + CHUNK - 1) / CHUNK)),
        first(static_cast<int>(blockIdx.x % c.value_blocks) * c.block) {
    const int warp = threadIdx.x >> 5, V = static_cast<int>(c.p.V);
    column = first + 16 * warp;
    active = 16 * warp < c.block && column < V;
    seen = active ? column : V;
  }
  SLEEPKERN_DEVICE int64_t state(const Problem& p) const { return index * p.K * p.V; }
  SLEEPKERN_DEVICE Chunk chunk(const Problem& p, int i) const {
    const int64_t left = tokens - int64_t{CHUNK} * i;
    return {p.first(sequence) + int64_t{CHUNK} * i, static_cast<int>(left < CHUNK ? left : CHUNK), head};
  }
};

template <Mode MODE, int KP>
SLEEPKERN_DEVICE ReplayMemory<MODE, KP> replay_memory(const Call& c, bool reads) {
  const ReplayMemory<MODE, KP> m(shared_memory(), c.block, c.slots, reads);
  if (threadIdx.x == 0) {
    for (int i = 0; i < c.slots; ++i) arrival_create(m.arrivals + i);
    if (reads) arrival_create(m.arrivals + ReplayMemory<MODE, KP>::MOST);
  }
  block_barrier();
  return m;
}

// Runs all passes by wy.
template <Mode MODE, int KP>
SLEEPKERN_KERNEL(THREADS, 1)
state_pass_kernel(const Call c) {
  const Problem& p = c.p;
  const Lane lane(c);
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V), warp = threadIdx.x >> 5;
  const ReplayMemory<MODE, KP> m = replay_memory<MODE, KP>(c, p.reads);
  const bool resident = lane.chunks <= c.slots, stops = c.stops();
  float* final = p.final_state + lane.state(p);
  Stream<MODE, KP> stream{c,          m,        first_slot(p, lane.sequence),           lane.head, lane.chunks,
                          lane.first, resident, lane.chunks * (resident ? 1 : c.passes)};
  State<KP> S;
  load_state<KP>(S, p.state ? p.state + lane.state(p) : nullptr, K, V, lane.seen);
  stream.fill();
  int made = 0;
  int last = stops ? -1 : c.passes - 1;  // the pass that is read out
#pragma unroll 1
  while (true) {
    const bool read = p.reads && made == last;
    if (stops && !read) store_state<KP>(S, final, K, V, lane.seen);
    if (stops && read) load_state<KP>(S, final, K, V, lane.seen);  // the state before the last pass, which runs again
#pragma unroll 1
    for (int i = 0; i < lane.chunks; ++i) {
      const Chunk chunk = lane.chunk(p, i);
      const auto at = stream.next();
      if (read) stream.load_queries(i);
      if (lane.active) {
        Values values;
        load_values(values, at.U, warp);
        correct<MODE, KP>(values, S, at.tiles, chunk.blocks());
        if (read) read_out<MODE, KP>(S, values, m.queries, m.queries + CHUNK * KP, p, chunk, lane.column);
        advance<MODE, KP>(S, values, at.tiles + CHUNK * KP, at.gamma, chunk.blocks());
      }
      stream.done();
    }
    ++made;
    if (read) break;
    if (stops) {
      const float step = square_step<KP>(S, final, K, V, lane.seen);
      if (converged(c, lane.index, m.sums, made, step, square_sum<KP>(S)) || made == c.passes) {
        if (!p.reads) break;
        last = made;  // this pass runs again, with outputs, from the state before it; it is not counted twice
      }
    } else if (made == c.passes) {
      break;
    }
  }
  if (lane.active) store_state<KP>(S, final, K, V, lane.column);
}

// Runs all passes by affine, without outputs. With outputs state_pass_kernel runs the last pass, from the state before
// it, which this kernel stores in call.before.
template <Mode MODE, int KP>
SLEEPKERN_KERNEL(THREADS, 1)
affine_kernel(const Call c) {
  const Problem& p = c.p;
  const Lane lane(c);
  const int K = static_cast<int>(p.K), V = static_cast<int>(p.V), warp = threadIdx.x >> 5;
  const ReplayMemory<MODE, KP> m = replay_memory<MODE, KP>(c, false);
  const float* initial = p.state ? p.state + lane.state(p) : nullptr;
  float* final = (p.reads ? c.before : p.final_state) + lane.state(p);
  const bool stops = c.stops();
  const int passes = c.passes - (p.reads && !stops ? 1 : 0);
  Stream<MODE, KP> stream{c, m, first_slot(p, lane.sequence), lane.head, lane.chunks, lane.first, false, lane.chunks};
  State<KP> S, d;  // d: first 16 columns of A
  load_state<KP>(S, initial, K, V, lane.seen);
#pragma unroll
  for (int n = 0; n < KP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[n][i] = column_of(n, i) == 16 * warp + row_of(i) ? 1.0f : 0.0f;
  }
  stream.fill();
#pragma unroll 1
  for (int i = 0; i < lane.chunks; ++i) {
    const auto at = stream.next();
    const int blocks = lane.chunk(p, i).blocks();
    Values values;
    if (lane.active) {
      load_values(values, at.U, warp);
      correct<MODE, KP>(values, S, at.tiles, blocks);
      advance<MODE, KP>(S, values, at.tiles + CHUNK * KP, at.gamma, blocks);
    }
    if (16 * warp < KP) {
      clear(values);
      correct<MODE, KP>(values, d, at.tiles, blocks);
      advance<MODE, KP>(d, values, at.tiles + CHUNK * KP, at.gamma, blocks);
    }
    stream.done();
  }
  block_barrier();
  Number<MODE>* A = m.first.tiles;
  if (16 * warp < KP) {
#pragma unroll
    for (int n = 0; n < KP / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) put<MODE>(A, KP, column_of(n, i), 16 * warp + row_of(i), d[n][i]);
    }
  }
  block_barrier();
  load_state<KP>(d, initial, K, V, lane.seen);
#pragma unroll
  for (int n = 0; n < KP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[n][i] = S[n][i] - d[n][i];
  }
  constexpr bool PARKED = MODE == Mode::exact;  // S is stored in memory while d is transformed
  int made = 1;
#pragma unroll 1
  for (;; ++made) {
    if (stops && converged(c, lane.index, m.sums, made, square_sum<KP>(d), square_sum<KP>(S))) break;
    if (made == passes) break;
    if (PARKED) store_state<KP>(S, final, K, V, lane.seen);
    if (lane.active) transform<MODE, KP>(d, A);
    if (PARKED) load_state<KP>(S, final, K, V, lane.seen);
#pragma unroll
    for (int n = 0; n < KP / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) S[n][i] += d[n][i];
    }
  }
  const float back = stops && p.reads ? 1.0f : 0.0f;  // the last pass runs again, with outputs
#pragma unroll
  for (int n = 0; n < KP / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) S[n][i] -= back * d[n][i];
  }
  if (lane.active) store_state<KP>(S, final, K, V, lane.column);
}

}  // namespace sleepkern::cuda
