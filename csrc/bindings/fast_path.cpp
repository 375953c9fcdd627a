#include "bindings/fast_path.h"

#include <cmath>
#include <cstring>
#include <initializer_list>

namespace sleepkern {
namespace {

using dlpack::Tensor;

bool type_of(const Tensor& t, Type& type) {
  if (t.type.lanes != 1) return false;
  const bool brain = t.type.code == dlpack::BFLOAT && t.type.bits == 16;
  const bool half = t.type.code == dlpack::FLOAT && t.type.bits == 16;
  type = brain ? Type::bfloat16 : half ? Type::float16 : Type::float32;
  return brain || half || (t.type.code == dlpack::FLOAT && t.type.bits == 32);
}

bool has_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  if (t.dimensions != static_cast<int32_t>(shape.size())) return false;
  int d = 0;
  for (int64_t size : shape) {
    if (t.shape[d++] != size) return false;
  }
  return true;
}

// Whether dimensions from `first` on are contiguous.
bool dense(const Tensor& t, int first) {
  int64_t expected = 1;
  for (int d = t.dimensions - 1; d >= first; --d) {
    if (t.shape[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

const char* address(const Tensor& t) { return static_cast<const char*>(t.data) + t.offset; }

// The first byte of a tensor that is not empty, and the byte after its last.
struct Range {
  const char *begin, *end;

  Range(const Tensor& t) : begin(address(t)), end(begin) {
    int64_t last = 0;
    for (int d = 0; d < t.dimensions; ++d) last += (t.shape[d] - 1) * t.strides[d];
    end += (last + 1) * (t.type.bits / 8);
  }
  bool meets(const Range& other) const { return begin < other.end && other.begin < end; }
};

// Whether writes to the state's memory cannot change another tensor of the call.
bool apart(const PlainCall& c, const Problem& p) {
  if (p.state != p.final_state) return true;
  const Range written(*c.final_state);
  for (const Tensor* t : {c.q, c.k, c.v, c.g, c.beta, c.raw.A_log, c.raw.dt_bias}) {
    if (t && written.meets(Range(*t))) return false;
  }
  return true;
}

// Whether a tensor has memory. A wrapper's tensor has address 0, and one in a freed storage has its offset as address.
// Systems map no memory at such low addresses.
bool has_memory(const Tensor& t) { return reinterpret_cast<uintptr_t>(address(t)) >= 65536; }

// Reads a tensor [B, T, ...] as Rows; false if its tokens are not one row stride apart over the whole batch.
bool rows(const Tensor& t, Rows& out) {
  const int64_t B = t.shape[0], T = t.shape[1];
  if (!type_of(t, out.type) || !dense(t, 2)) return false;
  if (B != 1 && T != 1 && t.strides[0] != T * t.strides[1]) return false;
  if (!has_memory(t)) return false;
  out.data = address(t);
  out.stride = T > 1 ? t.strides[1] : t.strides[0];
  return true;
}

// Whether the value of these bits is above 0: no sign, not 0, not NaN.
template <class Bits>
bool positive(Bits x, Bits infinity) {
  return x != 0 && x <= infinity;
}

template <class Bits>
bool any_positive_of(const void* row, int64_t width, Bits infinity) {
  bool found = false;
  for (int64_t i = 0; i < width; ++i) {
    Bits x;
    std::memcpy(&x, static_cast<const char*>(row) + i * sizeof(Bits), sizeof(Bits));  // at any address
    found |= positive<Bits>(x, infinity);
  }
  return found;
}

bool any_positive(const Rows& x, int64_t tokens, int64_t width) {
  bool found = false;
  for (int64_t t = 0; t < tokens; ++t) {
    const char* row = static_cast<const char*>(x.data) + t * x.stride * (x.type == Type::float32 ? 4 : 2);
    if (x.type == Type::float32) {
      found |= any_positive_of<uint32_t>(row, width, 0x7f800000u);
    } else {
      found |= any_positive_of<uint16_t>(row, width, x.type == Type::bfloat16 ? 0x7f80u : 0x7c00u);
    }
  }
  return found;
}

bool states(const Tensor& t, const Problem& p, Type expected, float*& data) {
  Type type;
  data = reinterpret_cast<float*>(const_cast<char*>(address(t)));
  return has_memory(t) && type_of(t, type) && type == expected && has_shape(t, {p.sequences, p.HV, p.K, p.V}) &&
         dense(t, 0);
}

// Reads a contiguous tensor of `size` elements, [size] or [rows, size / rows]; absent where there is none.
bool parameter(const Tensor* t, int64_t size, int64_t rows, Array& out) {
  if (!t) return true;
  if (!type_of(*t, out.type) || !dense(*t, 0) || !has_memory(*t)) return false;
  out.data = address(*t);
  return has_shape(*t, {size}) || (rows != size && has_shape(*t, {rows, size / rows}));
}

bool raw_gates(const PlainCall& c, Problem& p) {
  const int64_t channels = p.gate == Gate::channel ? p.K : 1;
  p.raw_decay = c.raw.raw_decay;
  p.lower_bound = static_cast<float>(c.raw.lower_bound);
  p.beta_scale = static_cast<float>(c.raw.beta_scale);
  if ((p.beta_scale != 0 && !c.beta) || (p.raw_decay && p.gate == Gate::none)) return false;
  return parameter(c.raw.A_log, p.HV, p.HV, p.A_log) && parameter(c.raw.dt_bias, p.HV * channels, p.HV, p.dt_bias);
}

bool gates(const PlainCall& c, bool read_values, Problem& p) {
  if ((c.g == nullptr) != (p.gate == Gate::none) || (p.delta && !c.beta)) return false;
  const int64_t B = p.sequences, T = p.T;
  if (c.g) {
    const bool channel = p.gate == Gate::channel;
    if (!(channel ? has_shape(*c.g, {B, T, p.HV, p.K}) : has_shape(*c.g, {B, T, p.HV}))) return false;
    if (!rows(*c.g, p.g)) return false;
    if (read_values && !c.raw.raw_decay && any_positive(p.g, B * T, channel ? p.HV * p.K : p.HV)) return false;
  }
  return !c.beta || (has_shape(*c.beta, {B, T, p.HV}) && rows(*c.beta, p.beta));
}

bool output(const Tensor& o, Problem& p) {
  Rows found;
  if (!p.want_output || !rows(o, found) || found.type != p.v.type) return false;
  p.o = const_cast<void*>(found.data);
  return has_shape(o, {p.sequences, p.T, p.HV, p.V}) && dense(o, 0);
}

}  // namespace

bool is_plain(const PlainCall& c, int32_t device_type, Problem& p, Type* state_type) {
  for (const Tensor* t : {c.q, c.k, c.v, c.g, c.beta, c.state, c.o, c.final_state, c.raw.A_log, c.raw.dt_bias}) {
    if (t && (t->device.type != device_type || t->device.id != c.k->device.id)) return false;
  }
  if (c.k->dimensions != 4 || c.v->dimensions != 4) return false;
  p.gate = c.gate;
  p.delta = c.delta;
  p.normalize = c.normalize;
  p.want_output = c.q != nullptr;
  p.sequences = c.k->shape[0];
  p.T = c.k->shape[1];
  p.H = c.k->shape[2];
  p.K = c.k->shape[3];
  p.HV = c.v->shape[2];
  p.V = c.v->shape[3];
  for (int64_t size : {p.sequences, p.T, p.H, p.HV, p.K, p.V}) {
    if (size < 1) return false;
  }
  if (p.HV % p.H != 0 || p.K > HEAD_LIMIT || p.V > HEAD_LIMIT) return false;
  p.scale = static_cast<float>(std::isnan(c.scale) ? 1 / std::sqrt(static_cast<double>(p.K)) : c.scale);
  if (!has_shape(*c.v, {p.sequences, p.T, p.HV, p.V}) || !rows(*c.k, p.k) || !rows(*c.v, p.v)) return false;
  if (c.q && (!has_shape(*c.q, {p.sequences, p.T, p.H, p.K}) || !rows(*c.q, p.q) || p.q.type != p.k.type)) return false;
  if (p.v.type != p.k.type || !gates(c, device_type == dlpack::CPU, p) || !raw_gates(c, p)) return false;
  float* state = nullptr;
  Type type = Type::float32;
  const bool bf16 = state_type && type_of(*c.final_state, type) && type == Type::bfloat16;
  type = bf16 ? Type::bfloat16 : Type::float32;
  if (state_type) *state_type = type;
  if (c.state && !states(*c.state, p, type, state)) return false;
  p.state = state;
  if (!states(*c.final_state, p, type, p.final_state) || !apart(c, p)) return false;
  if (bf16 && p.state != p.final_state) return false;
  return c.o == nullptr ? c.q == nullptr : output(*c.o, p);
}

}  // namespace sleepkern
