"""The compiled module. A tensor of tokens is (address, row stride in elements, type code), an array (address, type
code), any other tensor its address; 0 stands for None. csrc/common says what each field is."""

from collections.abc import Sequence
from typing import Any, ClassVar

_Rows = tuple[int, int, int]
_Array = tuple[int, int]
_States = tuple[int, int, int, int, int]
_Weights = tuple[int, float]

head_limit: int
rank_limit: int
convolution_limit: int
decode_limit: int
norm_eps: float
min_log_decay: float
type_codes: dict[str, int]
gate_codes: dict[str, int]
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

def ordinary(
    grad: bool,
    q: object,
    k: object,
    v: object,
    g: object,
    beta: object,
    state: object,
    A_log: object = None,
    dt_bias: object = None,
    /,
) -> bool: ...
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
    A_log: object = None,
    dt_bias: object = None,
    raw_decay: object = False,
    lower_bound: object = 0.0,
    beta_scale: object = 0.0,
    /,
) -> bool: ...
def try_fast_replay(
    replay: CudaReplay,
    q: object,
    k: object,
    v: object,
    g: object,
    beta: object,
    state: object,
    o: object,
    final_state: object,
    before_last: int,
    tiles: int,
    chunk_decay: int,
    U: int,
    queries: int,
    stream: int,
    /,
) -> bool: ...
def try_fast_decode(
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
    most: int,
    stream: int,
    /,
) -> bool: ...
def use_exchange_api(capsule: Any) -> bool: ...
def use_tensor_class(type: type, parameter: type) -> bool: ...
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
def forward_of_raw(
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
    raw_decay: bool,
    lower_bound: float,
    beta_scale: float,
    A_log: _Array,
    dt_bias: _Array,
    o: int,
    final_state: int,
) -> None: ...
def backward_of_raw(
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
    raw_decay: bool,
    lower_bound: float,
    beta_scale: float,
    A_log: _Array,
    dt_bias: _Array,
    do: _Rows,
    dfinal: int,
    dq: int,
    dk: int,
    key_type: int,
    dv: int,
    dg: int,
    dbeta: int,
    dstate: int,
    gate_sums: int,
) -> None: ...
def forward_keeping_states(
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
    state_every: int,
    state_count: int,
    states: int,
) -> None: ...
def backward_keeping_states(
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
    state_every: int,
    state_count: int,
    dstates: int,
) -> None: ...
def decode(
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
    raw_decay: bool,
    lower_bound: float,
    beta_scale: float,
    A_log: _Array,
    dt_bias: _Array,
    o: int,
    state_type: int,
    states: _States,
    each_token: bool,
    states_out: _States,
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
def multiplies_bf16() -> bool: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def set_isa(name: str) -> None: ...
def threads_source() -> str: ...
def peak_gflops(seconds: float) -> float: ...
def cuda_devices() -> list[dict[str, Any]]: ...

# What follows exists only in a module that was built with CUDA.

_Inputs = tuple[_Rows, ...]
"""q, k, v, g, beta as (address, distance of two tokens, type code)."""

cuda_chunk: int
cuda_widest_key: int
cuda_widest_block: int
cuda_value_tile: int

class CudaProblem:
    gate: int
    delta: bool
    normalize: bool
    scale: float
    sequences: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    def __init__(self) -> None: ...

class CudaReplay:
    problem: CudaProblem
    mode: int
    passes: int
    tol: float
    affine: bool
    token_space: bool
    single_chunk: bool
    block: int
    slots: int
    def __init__(self) -> None: ...

class CudaBlockLayer:
    recurrent: bool
    heads: int
    value_heads: int
    K: int
    V: int
    KP: int
    VP: int
    W: int
    into: int
    hidden: int
    mixer_eps: float
    mlp_eps: float
    taps: int
    gain: int
    decay_bias: float
    strength: float
    gain_eps: float
    q_gain: int
    k_gain: int
    q_eps: float
    k_eps: float
    def __init__(self) -> None: ...

class CudaBlocks:
    tiles: int
    cluster: int
    group: int
    exchange: int
    ring: int
    columns: int
    L: int
    type: int
    B: int
    d: int
    passes: int
    reinject: bool
    carry: bool
    sums: int
    def __init__(self) -> None: ...

class CudaWeightOrder:
    @property
    def stages(self) -> list[int]: ...
    def __init__(self, call: CudaBlocks, layers: list[CudaBlockLayer], hidden: list[int]) -> None: ...
    def copy_indices(self, address: int, /) -> None: ...

class CudaBlocksConstants:
    MOST_LAYERS: int
    WIDEST_MODEL: int
    WIDEST_HEAD: int
    LONGEST: int
    TAPS: int
    WARPS: int
    TILES: tuple[int, int, int]
    STAGE: int

def cuda_replay(
    replay: CudaReplay,
    *,
    inputs: _Inputs,
    offsets: int,
    state: int,
    o: int,
    final_state: int,
    residual: int,
    passes_done: int,
    before_last: int,
    tiles: int,
    chunk_decay: int,
    U: int,
    queries: int,
    stream: int,
) -> None: ...
def cuda_powers(
    *,
    heads: int,
    K: int,
    V: int,
    passes: int,
    block: int,
    A: int,
    states: int,
    start: int,
    after: int,
    stream: int,
) -> None: ...
def cuda_powers_backward(
    *,
    heads: int,
    K: int,
    V: int,
    passes: int,
    block: int,
    A: int,
    states: int,
    passes_done: int,
    last: int,
    dA: int,
    dB: int,
    dstart: int,
    stream: int,
) -> None: ...
def cuda_decode(
    problem: CudaProblem, inputs: _Inputs, states: int, bf16: bool, o: int, indices: int, stride: int, stream: int
) -> None: ...
def cuda_decode_states(
    problem: CudaProblem,
    *,
    inputs: _Inputs,
    states: int,
    bf16: bool,
    o: int,
    indices: int,
    stride: int,
    head_stride: int,
    out: int,
    out_indices: int,
    out_stride: int,
    out_token_stride: int,
    out_head_stride: int,
    stream: int,
) -> None: ...
def cuda_single_chunk_memory(*, mode: int, K: int, output: bool, channel: bool) -> int: ...
def cuda_multi_chunk_memory(*, mode: int, K: int, output: bool, block: int, slots: int) -> int: ...
def cuda_powers_memory(*, K: int, backward: bool) -> int: ...
def cuda_blocks_paired(tiles: int) -> bool: ...
def cuda_blocks(
    call: CudaBlocks,
    layers: list[CudaBlockLayer],
    carried: Sequence[tuple[int, int, int, int, int]],
    *,
    h: int,
    out: int,
    weights: int,
    stages: int,
    changes: int,
    stream: int,
) -> None: ...
def cuda_blocks_memory(call: CudaBlocks, layers: list[CudaBlockLayer]) -> int: ...

class ModuleWitness:
    """A record of a stack of modules, which says whether they are as they were."""

    def __init__(
        self,
        blocks: Sequence[Any],
        modules: Sequence[Any],
        weights: Sequence[Any],
        counters: Sequence[Any],
        names: Sequence[str],
    ) -> None: ...
    def holds(self, blocks: object) -> bool: ...

def use_tensor_attributes(tensor: type, parameter: type, storage: type) -> bool: ...
