"""A small model learns to look things up in a window that it no longer sees, through the passes of its sleep.

    python examples/train_a_sleeper.py

A window has the edges `x f(x)` of a cycle of 5 nodes. The model sleeps over it, its keys and values are dropped, and it
is asked for f(x) of four nodes. So whatever it answers, it has written into its fast weights.
"""

import torch
from torch.nn import functional as F

from sleepkern.nn import SleepLM
from sleepkern.sleep import SleepSession

NODES, PASSES, BATCH, STEPS = 5, 2, 64, 75


def problems(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Windows [count,2 NODES], questions [count,4], answers [count,4]."""
    order = torch.stack([torch.randperm(NODES) for _ in range(count)])
    follows = torch.empty_like(order).scatter_(1, order, order.roll(-1, 1))
    edges = torch.stack([torch.randperm(NODES) for _ in range(count)])
    windows = torch.stack([edges, follows.gather(1, edges)], dim=2).flatten(1)
    asked = torch.stack([torch.randperm(NODES)[:4] for _ in range(count)])
    return windows, asked, follows.gather(1, asked)


def answers(model: SleepLM, windows: torch.Tensor, asked: torch.Tensor, train: bool) -> torch.Tensor:
    """Logits [count,4,NODES] after a sleep. With `checkpoint`, gradients go back through every pass."""
    session = SleepSession(model, window=2 * NODES, passes=PASSES, feedback="reinject", checkpoint=train)
    return session.ingest(windows).read(asked)


torch.set_num_threads(1)  # tensors this small are faster on one
torch.manual_seed(0)
model = SleepLM(vocabulary=NODES, width=64, heads=2, blocks=2, window=2 * NODES)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
for step in range(1, STEPS + 1):
    windows, asked, right = problems(BATCH)
    loss = F.cross_entropy(answers(model, windows, asked, train=True).flatten(0, 1), right.flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if step % 15 == 0:
        print(f"step {step:3d}: loss {loss.item():.3f}")

windows, asked, right = problems(256)
share = (answers(model, windows, asked, train=False).argmax(-1) == right).float().mean().item()
print(f"right answers after the window is gone: {share:.2f}; by chance {1 / (NODES - 1):.2f}")
