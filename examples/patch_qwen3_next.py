"""A model of transformers on sleepkern's kernels: same weights, same code, same answers, and how much faster it reads.

    python examples/patch_qwen3_next.py

The model is Qwen3-Next in small, with random weights; with `from_pretrained` it would be yours.
"""

import time

import torch
from transformers import AutoModelForCausalLM, Qwen3NextConfig

import sleepkern

torch.set_num_threads(1)
torch.manual_seed(0)
config = Qwen3NextConfig(
    vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=64, linear_value_head_dim=64,
    num_experts=2, num_experts_per_tok=1, moe_intermediate_size=128, pad_token_id=0,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config).eval()
text = torch.randint(1, 256, (1, 512))


def read() -> tuple[torch.Tensor, float]:
    """Logits of the text, and the seconds of the faster of two runs."""
    took = []
    for _ in range(2):
        start = time.perf_counter()
        logits = model(text).logits
        took.append(time.perf_counter() - start)
    return logits, min(took)


with torch.no_grad():
    stock, slow = read()
    with sleepkern.patch(model):
        print("replaced:", *sorted(sleepkern.patched(model)), sep="\n  ")
        patched, fast = read()
        first = model.generate(text[:, :64], max_new_tokens=8, do_sample=False)
    second = model.generate(text[:, :64], max_new_tokens=8, do_sample=False)

error = float((patched - stock).norm() / stock.norm())
print(f"512 tokens: stock {1e3 * slow:.0f} ms, patched {1e3 * fast:.0f} ms; relative difference of logits {error:.1e}")
assert error < 1e-5 and torch.equal(first, second), "the patched model says something else"
