"""The operators by themselves: forward, gradients, decode, replay, torch.compile; and a CUDA graph where a GPU is.

python examples/own_kernel_call.py
"""

import torch

import sleepkern

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, K, V = 2, 300, 4, 64, 64


def inputs(tokens: int) -> list[torch.Tensor]:
    """q, k, v, g, beta of so many tokens. Keys are normalised in the kernel, so beta may be up to 2."""
    q, k, v = (torch.randn(B, tokens, H, n, device=device) for n in (K, K, V))
    return [q, k, v, -torch.rand(B, tokens, H, device=device), torch.rand(B, tokens, H, device=device)]


# Which kernel a call takes, and why not the others. Nothing is computed.
print(sleepkern.explain("gated_delta_rule", *inputs(T)), "\n")

# Forward and gradients of every tensor, the initial state included.
x = [t.requires_grad_() for t in inputs(T)]
start = torch.zeros(B, H, K, V, device=device, requires_grad=True)
o, S = sleepkern.gated_delta_rule(*x, initial_state=start, output_final_state=True, use_qk_l2norm_in_kernel=True)
grads = torch.autograd.grad(o.square().mean() + S.square().mean(), [*x, start])
print("gradients:", ", ".join(f"{float(g.norm()):.1e}" for g in grads))

# A text in two parts is the text at once: the state carries over.
with torch.no_grad():
    left, right = [t[:, :200] for t in x], [t[:, 200:] for t in x]
    _, half = sleepkern.gated_delta_rule(*left, output_final_state=True, use_qk_l2norm_in_kernel=True)
    rest, _ = sleepkern.gated_delta_rule(*right, initial_state=half, use_qk_l2norm_in_kernel=True)
    assert torch.allclose(rest, o[:, 200:], atol=1e-4)

    # Decode: the state is updated where it is.
    state = S.detach().clone()
    step, same = sleepkern.recurrent_step(*inputs(1), state, use_qk_l2norm_in_kernel=True)
    assert same is state and step.shape == (B, 1, H, V)

    # Replay: the window N times, which costs less than N calls.
    _, k, v, g, beta = inputs(64)
    slept = sleepkern.sleep_ingest(k, v, g, beta, passes=8, use_qk_l2norm_in_kernel=True)
    print(f"replay: {slept.passes} passes by {slept.method}")

# torch.compile sees one operator, so that the graph has no break. The backend here only captures, it needs no compiler.
compiled = torch.compile(sleepkern.gated_delta_rule, fullgraph=True, backend="eager")
assert torch.allclose(compiled(*x, use_qk_l2norm_in_kernel=True)[0], o, atol=1e-5)

# A CUDA graph takes the host's time out of short calls. Nothing in a call waits for the device: grids follow from
# shapes, and cu_seqlens and state_indices are read there. Warm up first, so that Triton compiles outside of the graph.
if device == "cuda":
    fixed, stream, graph = [t.detach() for t in x], torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), torch.no_grad():
        sleepkern.gated_delta_rule(*fixed, use_qk_l2norm_in_kernel=True)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph), torch.no_grad():
        out, _ = sleepkern.gated_delta_rule(*fixed, use_qk_l2norm_in_kernel=True)
    fixed[2].mul_(2)  # other inputs at the same addresses
    graph.replay()
    assert torch.allclose(out, 2 * o, rtol=1e-2, atol=1e-2)
