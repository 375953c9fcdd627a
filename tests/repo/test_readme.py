"""README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from helpers.hf_models import build

README = Path(__file__).resolve().parents[2] / "README.md"


def test_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 3
    names = {"model": build("qwen3_next"), "ids": torch.randint(1, 64, (1, 1100))}
    names["question"] = torch.tensor([[1, 2, 3]])
    names |= {"questions": torch.tensor([[1, 2, 3], [0, 4, 5]]), "mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    for block in blocks:
        exec(block, names)
    assert names["session"].position == 1024 and names["r"].final_state.shape == names["S"].shape
