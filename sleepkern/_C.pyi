"""The compiled module. A tensor of tokens is (address, row stride in elements, type code), an array (address, type
code), any other tensor its address; 0 stands for None. csrc/common says what each field is."""

from collections.abc import Sequence
from typing import Any, ClassVar

_Rows = tuple[int, int, int]
_Array = tuple[int, int]
_Weights = tuple[int, float]

head_limit: int
rank_limit: int
convolution_limit: int
has_cuda: bool

class Form:
    """How the operands of products with weights are taken."""

    plain: ClassVar[Form]
    winograd: ClassVar[Form]
    bfloat16: ClassVar[Form]
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    def __init__(self, value: int) -> None: ...

class Layer:
    """Sizes and addresses of one block."""

    recurrent: bool
    into: _Weights
    into_width: int
    out: _Weights
    up: _Weights
    down: int
    hidden: int
    mixer_eps: float
    mlp_eps: float
    H: int
    HV: int
    K: int
    V: int
    W: int
    decay_bias: float
    strength: float
    taps: int
    gain: int
    gain_eps: float
    past: int
    last: int
    state: int
    q_gain: int
    k_gain: int
    q_eps: float
    k_eps: float
    kept: int
    keys: int
    values: int
    all_keys: int
    all_values: int
    def __init__(self) -> None: ...
    def copy(self) -> Layer: ...

def ordinary(grad: bool, q: object, k: object, v: object, g: object, beta: object, state: object, /) -> bool: ...
def try_fast_path(
    gate: int,
    delta: bool,
    normalize: bool,
    scale: float,
    q: object,
    k: object,
    v: object,
    g: object,
    beta: object,
    state: object,
    o: object,
    final_state: object,
    /,
) -> bool: ...
def use_exchange_api(capsule: Any) -> bool: ...
def use_tensor_class(type: type) -> bool: ...
def forward(
    *,
    gate: int,
    delta: bool,
    normalize: bool,
    scale: float,
    sequences: int,
    T: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    offsets: int,
    q: _Rows,
    k: _Rows,
    v: _Rows,
    g: _Rows,
    beta: _Rows,
    state: int,
    o: int,
    final_state: int,
) -> None: ...
def backward(
    *,
    gate: int,
    delta: bool,
    normalize: bool,
    scale: float,
    sequences: int,
    T: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    offsets: int,
    q: _Rows,
    k: _Rows,
    v: _Rows,
    g: _Rows,
    beta: _Rows,
    state: int,
    do: _Rows,
    dfinal: int,
    dq: int,
    dk: int,
    key_type: int,
    dv: int,
    dg: int,
    dbeta: int,
    dstate: int,
) -> None: ...
def replay(
    *,
    gate: int,
    delta: bool,
    normalize: bool,
    scale: float,
    sequences: int,
    T: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    offsets: int,
    q: _Rows,
    k: _Rows,
    v: _Rows,
    g: _Rows,
    beta: _Rows,
    state: int,
    final_state: int,
    rank: bool,
    passes: int,
    tol: float,
    before: int,
    residual: int,
    passes_done: int,
) -> None: ...
def convolve(
    *,
    sequences: int,
    T: int,
    D: int,
    W: int,
    offsets: int,
    silu: bool,
    x: _Rows,
    weight: _Array,
    bias: _Array,
    past: int,
    y: int,
    last: int,
) -> None: ...
def convolve_backward(
    *,
    sequences: int,
    T: int,
    D: int,
    W: int,
    offsets: int,
    silu: bool,
    x: _Rows,
    weight: _Array,
    bias: _Array,
    past: int,
    dy: _Rows,
    dlast: int,
    dx: int,
    dpast: int,
    dweight: int,
    dbias: int,
) -> None: ...
def convolve_step(
    *, B: int, D: int, W: int, silu: bool, x: _Rows, weight: _Array, bias: _Array, state: int, y: int
) -> None: ...
def gated_norm(
    *,
    tokens: int,
    heads: int,
    V: int,
    silu: bool,
    gate_first: bool,
    eps: float,
    x: _Rows,
    gate: _Rows,
    weight: _Array,
    weight_heads: bool,
    y: int,
) -> None: ...
def gated_norm_backward(
    *,
    tokens: int,
    heads: int,
    V: int,
    silu: bool,
    gate_first: bool,
    eps: float,
    x: _Rows,
    gate: _Rows,
    weight: _Array,
    weight_heads: bool,
    dy: _Rows,
    dx: int,
    dgate: int,
    parts: int,
    dweight: int,
) -> None: ...
def sleep_blocks(
    *,
    B: int,
    L: int,
    d: int,
    passes: int,
    reinject: bool,
    carry: bool,
    form: Form,
    layers: Sequence[Layer],
    h: int,
    changes: int,
) -> None: ...
def pack_weight(matrix: int, n: int, depth: int, form: Form, packed: int) -> None: ...
def packed_size(n: int, depth: int, form: Form) -> int: ...
def prefer_huge_pages(memory: int, bytes: int) -> None: ...
def panel_width() -> int: ...
def adds_beside_products() -> bool: ...
def multiplies_pairs() -> bool: ...
def step_limit() -> int: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def threads_source() -> str: ...
def peak_gflops(seconds: float) -> float: ...
def cuda_devices() -> list[dict[str, Any]]: ...

# What follows exists only in a module that was built with CUDA.

cuda_chunk: int
cuda_widest_key: int
cuda_widest_block: int
cuda_value_tile: int
cuda_blocks_layers: int

def cuda_replay(*arguments: Any) -> None: ...
def cuda_powers(*arguments: Any) -> None: ...
def cuda_adjoint(*arguments: Any) -> None: ...
def cuda_step(*arguments: Any) -> None: ...
def cuda_window_memory(mode: int, width: int, reads: bool, channel: bool, /) -> int: ...
def cuda_replay_memory(mode: int, width: int, reads: bool, block: int, slots: int, /) -> int: ...
def cuda_chain_memory(width: int, adjoint: bool, /) -> int: ...
def cuda_blocks(call: dict[str, Any], layers: Sequence[dict[str, Any]], stream: int, /) -> None: ...
def cuda_blocks_memory(call: dict[str, Any], layers: Sequence[dict[str, Any]], /) -> int: ...
