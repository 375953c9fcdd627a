"""Low-rank adapters on a hybrid model, trained through its sleeps: the model's own weights stay as they are.

    python examples/lora_on_a_hybrid.py

The adapters are 15 lines of this file. Those of peft work alike: a session takes a model that peft has wrapped.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen3NextConfig

import sleepkern
from sleepkern.sleep import SleepSession

WINDOW, PASSES = 16, 2


class LoRA(nn.Module):
    """W x + B (A x): B starts at 0, so that the model first says what it said before."""

    def __init__(self, inner: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.inner = inner
        self.a = nn.Parameter(torch.randn(rank, inner.in_features) / inner.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(inner.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + F.linear(F.linear(x, self.a), self.b)


def adapt(model: nn.Module, names: tuple[str, ...]) -> list[nn.Parameter]:
    """Put adapters around the linear layers of these names, freeze all else, and give the adapters' parameters."""
    model.requires_grad_(False)
    found = [(m, name) for m in model.modules() for name in names if isinstance(getattr(m, name, None), nn.Linear)]
    for module, name in found:
        setattr(module, name, LoRA(getattr(module, name)))
    return [p for p in model.parameters() if p.requires_grad]


torch.set_num_threads(1)  # tensors this small are faster on one
torch.manual_seed(0)
config = Qwen3NextConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32, pad_token_id=0,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config)
before = {name: p.clone() for name, p in model.named_parameters()}
adapters = adapt(model, ("in_proj_qkvz", "out_proj", "q_proj", "v_proj", "o_proj"))
print(f"{len(adapters)} tensors train, {sum(p.numel() for p in adapters)} of {sum(map(torch.numel, before.values()))}")

text = torch.randint(1, 64, (4, 3 * WINDOW))  # one text, which the adapters learn by heart
optimizer = torch.optim.AdamW(adapters, lr=1e-2, weight_decay=0.0)
losses = []
with sleepkern.patch(model):
    for _ in range(8):
        session = SleepSession(model, WINDOW, PASSES, checkpoint=True).ingest(text[:, : 2 * WINDOW])  # two sleeps
        logits = session.read(text[:, 2 * WINDOW :])  # one ordinary pass
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 2 * WINDOW + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
print("loss:", " ".join(f"{x:.2f}" for x in losses))

own = {name.replace(".inner.", "."): p for name, p in model.named_parameters()}
assert all(torch.equal(own[name], p) for name, p in before.items()), "a weight of the model has changed"
assert losses[-1] < losses[0]
