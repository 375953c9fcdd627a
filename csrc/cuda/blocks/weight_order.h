// The order of the weights of a stack of blocks in the streams of kernel.cuh: for each warp of each CTA the fragments
// of 16 outputs x 16 terms that it multiplies by in one pass, in whole stages (weight_stream.cuh). The host computes
// it.
//
// The order is a list of indices into [0, w_0, w_1, ...]: a zero, then all weights of all layers, each [outputs,
// terms]: q k v, for gated DeltaNet gate and rates, out, up, down. It depends on cluster, columns, exchange and tiles
// of a call, but not on group and ring.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/blocks/params.h"
#include "cuda/recurrence/params.h"

namespace sleepkern::cuda {

struct WeightOrder {
  std::vector<std::vector<int32_t>> streams;  // [cluster * WARPS] indices of each warp
  std::vector<int32_t> stages;                // [cluster * WARPS][2]: the first stage of a warp, and how many
};

// The outputs and terms of a weight in one CTA: w[o][t] has the index outputs[o] + terms[t]. A negative entry is
// padding.
struct LocalWeight {
  std::vector<int32_t> outputs, terms;

  int32_t index(int o, int t) const { return outputs[o] < 0 || terms[t] < 0 ? 0 : outputs[o] + terms[t]; }
};

// One product of a warp: one n-group of 16 outputs or two, over the steps first, first + stride, ... of 16 terms.
struct WarpTask {
  int warp, one, other;  // other: -1 means none
  int first = 0, stride = 1;
};

// The tasks of `product`, which takes WARPS n-groups and the WARPS n-groups after them at a time.
inline std::vector<WarpTask> product_tasks(int groups) {
  std::vector<WarpTask> tasks;
  for (int start = 0; start < groups; start += 2 * WARPS) {
    for (int warp = 0; warp < WARPS && start + warp < groups; ++warp) {
      const int other = start + warp + WARPS;
      tasks.push_back({warp, start + warp, other < groups ? other : -1});
    }
  }
  return tasks;
}

// The tasks of find_rates, where warps share the steps of each n-group.
inline std::vector<WarpTask> rates_tasks(const BlocksParams& call, int groups) {
  std::vector<WarpTask> tasks;
  for (int group = 0; group < groups; ++group) {
    for (int warp = 0; warp < call.splits(); ++warp) tasks.push_back({warp, group, -1, warp, call.splits()});
  }
  return tasks;
}

// The n-groups of 16 columns of h in exchange n, in the order in which add_product sends them: one for each CTA, then
// the next one for each.
inline std::vector<int> exchange_groups(const BlocksParams& call, int n) {
  std::vector<int> groups;
  for (int i = 0; i < call.exchange_size(n); ++i) {
    groups.push_back(i % call.cluster * call.own_groups() + n * call.exchange + i / call.cluster);
  }
  return groups;
}

// The tasks of add_product: a warp's second n-group belongs to the same exchange or to the next one.
inline std::vector<WarpTask> exchange_tasks(const BlocksParams& call) {
  std::vector<WarpTask> tasks;
  for (int n = 0; n < call.exchanges(); ++n) {
    std::vector<int> one = exchange_groups(call, n), other;
    if (call.pairs_in_exchange()) {
      other.assign(one.begin() + std::min<int64_t>(WARPS, one.size()), one.end());
      one.resize(std::min<int64_t>(WARPS, one.size()));
    } else if (paired(call.tiles) && n + 1 < call.exchanges()) {
      other = exchange_groups(call, ++n);
    }
    for (size_t warp = 0; warp < one.size(); ++warp) {
      tasks.push_back({static_cast<int>(warp), one[warp], warp < other.size() ? other[warp] : -1});
    }
  }
  return tasks;
}

// Appends a fragment in the lanes' order of a right operand (arch/mma_tiles.h): element (output, term) is in lane
// (output % 8) * 4 + (term % 8) / 2, whose words are ordered by halves of the outputs, then of the terms.
inline void append_fragment(std::vector<int32_t>& stream, const LocalWeight& w, int group, int step) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int word = 0; word < 4; ++word) {
      const int output = 16 * group + 8 * (word >> 1) + (lane >> 2), term = 16 * step + 8 * (word & 1) + 2 * (lane & 3);
      stream.push_back(w.index(output, term));
      stream.push_back(w.index(output, term + 1));
    }
  }
}

inline void append_tasks(std::vector<int32_t>* streams, const LocalWeight& w, const std::vector<WarpTask>& tasks) {
  constexpr size_t NUMBERS = STAGE / sizeof(uint16_t);
  const int steps = static_cast<int>(w.terms.size()) / 16;
  for (const WarpTask& task : tasks) {
    std::vector<int32_t>& stream = streams[task.warp];
    for (int step = task.first; step < steps; step += task.stride) {
      append_fragment(stream, w, task.one, step);
      if (task.other >= 0) append_fragment(stream, w, task.other, step);
    }
    stream.resize((stream.size() + NUMBERS - 1) / NUMBERS * NUMBERS);
  }
}

// Appends first + scale * i for i < count, then padding up to `whole` entries.
inline void append_padded(std::vector<int32_t>& to, int32_t first, int32_t scale, int count, int whole) {
  for (int i = 0; i < whole; ++i) to.push_back(i < count ? first + scale * i : -1);
}

// One layer in one CTA. `hidden` is that of the model, `first` the index of the layer's first weight.
class LayerOrder {
 public:
  LayerOrder(const BlocksParams& call, const BlockLayer& layer, int hidden, int cta_rank, int32_t first)
      : call(call), layer(layer), hidden(hidden), cta_rank(cta_rank), first(first) {}

  int32_t append(std::vector<int32_t>* streams) const {
    const int keys = call.cluster * layer.heads * layer.K, values = call.cluster * layer.value_heads * layer.V;
    const int32_t gate = first + (2 * keys + values) * call.d, rates = gate + (layer.recurrent ? values * call.d : 0);
    const int32_t out = rates + call.cluster * layer.rates() * call.d, up = out + call.d * values,
                  down = up + hidden * call.d;
    LocalWeight into{{}, columns(1)};
    heads(into.outputs, first, layer.heads, layer.K, layer.KP, call.d);
    heads(into.outputs, first + keys * call.d, layer.heads, layer.K, layer.KP, call.d);
    heads(into.outputs, first + 2 * keys * call.d, layer.value_heads, layer.V, layer.VP, call.d);
    if (layer.recurrent) heads(into.outputs, gate, layer.value_heads, layer.V, layer.VP, call.d);
    append_tasks(streams, into, product_tasks(layer.into / 16));
    if (layer.recurrent) append_tasks(streams, rates_weight(rates), rates_tasks(call, (layer.rates() + 15) / 16));
    LocalWeight mixed{columns(values), {}};
    heads(mixed.terms, out, layer.value_heads, layer.V, layer.VP, 1);
    append_tasks(streams, mixed, exchange_tasks(call));
    LocalWeight wider{{}, columns(1)}, narrower{columns(hidden), {}};
    const int own = std::clamp(hidden - cta_rank * layer.hidden, 0, layer.hidden);
    append_padded(wider.outputs, up + cta_rank * layer.hidden * call.d, call.d, own, layer.hidden);
    append_tasks(streams, wider, product_tasks(layer.hidden / 16));
    append_padded(narrower.terms, down + cta_rank * layer.hidden, 1, own, layer.hidden);
    append_tasks(streams, narrower, exchange_tasks(call));
    return down + call.d * hidden;
  }

 private:
  // The columns of h of all CTAs.
  std::vector<int32_t> columns(int32_t scale) const {
    std::vector<int32_t> of;
    append_padded(of, 0, scale, call.d, call.cluster * call.columns);
    return of;
  }
  // This CTA's heads of a weight that begins at `start`, each padded to a multiple of 16.
  void heads(std::vector<int32_t>& to, int32_t start, int count, int width, int padded, int32_t scale) const {
    for (int head = 0; head < count; ++head) {
      append_padded(to, start + (cta_rank * count + head) * width * scale, scale, width, padded);
    }
  }
  LocalWeight rates_weight(int32_t start) const {
    LocalWeight w{{}, columns(1)};
    const int heads = layer.value_heads;
    append_padded(w.outputs, start + cta_rank * heads * call.d, call.d, heads, heads);
    append_padded(w.outputs, start + (call.cluster + cta_rank) * heads * call.d, call.d, heads,
                  (layer.rates() + 15) / 16 * 16 - heads);
    return w;
  }

  const BlocksParams& call;
  const BlockLayer& layer;
  int hidden, cta_rank;
  int32_t first;
};

// hidden [depth] has the hidden columns of each layer in the model.
inline WeightOrder weight_order(const BlocksParams& call, const std::vector<int>& hidden) {
  WeightOrder order;
  order.streams.resize(call.cluster * WARPS);
  int32_t first = 1;
  for (int i = 0; i < call.depth; ++i) {
    int32_t next = first;
    for (int cta_rank = 0; cta_rank < call.cluster; ++cta_rank) {
      next = LayerOrder(call, call.layers[i], hidden.at(i), cta_rank, first)
                 .append(order.streams.data() + cta_rank * WARPS);
    }
    first = next;
  }
  int32_t stage = 0;
  for (const std::vector<int32_t>& stream : order.streams) {
    const int32_t count = static_cast<int32_t>(stream.size() * sizeof(uint16_t) / STAGE);
    order.stages.insert(order.stages.end(), {stage, count});
    stage += count;
  }
  return order;
}

}  // namespace sleepkern::cuda
