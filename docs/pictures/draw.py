"""Draw the pictures of README and docs: `python docs/pictures/draw.py` writes the SVG files beside this one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tests.repo.test_layers import FLOORS  # noqa: E402

SAYS = {
    "rules": "which recurrence", "state": "what is carried", "settings": "two switches",
    "eager": "does torch watch?", "transforms": "torch.func", "addresses": "tensor memory",
    "files": "whole or not at all", "problems": "CHECK: what a call is", "backends": "COMPUTE: who",
    "dispatch": "CHOOSE: the first that can", "autograd": "RECORD: the operators", "ops": "PUBLIC: the functions",
    "nn": "modules", "testing": "inputs, tolerances, verify", "integrations": "drop-ins for other libraries",
    "sleep": "sessions over any model", "measure": "cases, peers, timing", "experiments": "tasks, training",
    "sleepkern": "the public names", "cli": "one file a command",
}  # fmt: skip
"""What a folder or file answers, by its name in FLOORS; others have no box."""
STEPS = (
    ("public", "ops/", "the equation and the shapes"),
    ("check", "problems/", "the only place that rejects input"),
    ("choose", "dispatch.py", "the first backend without a reason to refuse"),
    ("record", "autograd/", "an operator of torch, where a gradient is wanted"),
    ("compute", "backends/", "cuda, cpu, triton, chunked, reference, modules"),
)
INK, PAPER, FILL, ACCENT = "#1f2933", "#ffffff", "#eef2f7", "#2f6f9f"


def text(x: float, y: float, words: str, size: int = 13, weight: str = "normal", anchor: str = "middle") -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{INK}">'
        f"{escape(words)}</text>"
    )


def box(x: float, y: float, width: float, height: float, title: str, says: str) -> Iterator[str]:
    """A rounded box with a title and a line below it."""
    yield (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{FILL}" stroke="{ACCENT}" '
        'stroke-width="1.2"/>'
    )
    yield text(x + width / 2, y + height / 2 - 3, title, weight="bold")
    yield text(x + width / 2, y + height / 2 + 14, says, size=11)


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return (
        f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="{INK}" stroke-width="1.2" marker-end="url(#head)"/>'
    )


def page(width: int, height: int, title: str, parts: list[str]) -> str:
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-family="sans-serif">',
        f"<title>{escape(title)}</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        *parts,
        "</svg>",
        "",
    ])  # fmt: skip


def layers() -> str:
    """Each floor a row, the highest at the top; imports go downwards."""
    floors: dict[int, list[str]] = {}
    for name, floor in FLOORS.items():
        if name in SAYS:
            floors.setdefault(floor, []).append(name)
    height, parts = 46, []
    for row, floor in enumerate(sorted(floors, reverse=True)):
        y, names = 16 + row * (height + 12), floors[floor]
        per_row = 850 / len(names)
        parts.append(text(22, y + height / 2 + 4, str(floor), size=12))
        for i, name in enumerate(names):
            parts += box(44 + i * per_row, y, per_row - 10, height, name, SAYS[name])
    total = 16 + len(floors) * (height + 12)
    parts.append(arrow(900, 20, 900, total - 16))
    return page(920, total, "The floors of the package: imports go downwards", parts)


def call() -> str:
    """The five steps of a call, one under the other."""
    parts: list[str] = []
    for i, (step, place, says) in enumerate(STEPS):
        y = 16 + i * 72
        parts += box(150, y, 470, 50, f"{i + 1} {step}: {place}", says)
        if i:
            parts.append(arrow(385, y - 22, 385, y - 2))
    parts.append(
        f'<path d="M150 41H110V329H148" fill="none" stroke="{INK}" stroke-width="1.2" marker-end="url(#head)"/>'
    )
    parts.append(text(12, 181, "fast path:", size=11, anchor="start"))
    parts.append(text(12, 196, "a plain call", size=11, anchor="start"))
    return page(640, 372, "The five steps of a call", parts)


def sleep() -> str:
    """A window, N passes of the blocks over it, the state that stays, the keys that go."""
    parts: list[str] = [*box(16, 96, 170, 56, "window", "L tokens, embedded")]
    for n in range(3):
        title = ("pass 1", "pass 2", "pass N")[n]
        parts += box(236 + n * 190, 96, 150, 56, title, "all blocks, once")
        parts.append(arrow(186 + n * 190 + (0 if n == 0 else 10), 124, 234 + n * 190, 124))
    parts += box(236, 16, 530, 44, "fast weights S", "carried from pass to pass and on to the next window")
    parts += [arrow(311 + n * 190, 94, 311 + n * 190, 62) for n in range(3)]
    parts += box(236, 190, 530, 44, "keys and values", "seen in every pass, dropped after the last one")
    parts += [arrow(311 + n * 190, 188, 311 + n * 190, 154) for n in range(3)]
    return page(784, 250, "A sleep: N passes over a window before its keys and values are dropped", parts)


def window() -> str:
    """README's picture: a long text, one window of it, N passes, the state that stays, and an answer of one pass."""
    parts: list[str] = [text(16, 24, "a text of any length", size=12, anchor="start")]
    for i in range(4):
        shade = ACCENT if i == 1 else FILL
        parts.append(
            f'<rect x="{16 + i * 128}" y="34" width="120" height="30" rx="4" fill="{shade}" stroke="{ACCENT}"/>'
        )
    parts += [
        f'<text x="204" y="54" font-size="13" text-anchor="middle" fill="{PAPER}">window</text>',
        text(76, 54, "slept over", size=11),
        text(332, 54, "not read yet", size=11),
        text(460, 54, "...", size=13),
    ]
    parts += box(120, 104, 168, 62, "all blocks", "attention and recurrences")
    parts.append(arrow(204, 66, 204, 102))
    parts.append(
        f'<path d="M288 120h44a15 15 0 0 1 0 30h-42" fill="none" stroke="{INK}" stroke-width="1.6" '
        'marker-end="url(#head)"/>'
    )
    parts.append(text(356, 140, "N passes", size=13, weight="bold", anchor="start"))
    parts += box(56, 204, 148, 50, "keys and values", "dropped")
    parts += box(224, 204, 188, 50, "state S", "fast weights: they stay")
    parts += [arrow(160, 168, 136, 202), arrow(248, 168, 300, 202)]
    parts += box(520, 204, 184, 50, "an answer", "one ordinary pass")
    parts.append(arrow(412, 229, 518, 229))
    parts.append(text(465, 219, "is read by", size=11))
    return page(720, 268, "A window is run N times, its keys and values are dropped, the state stays", parts)


def token() -> str:
    """One token of the recurrence with delta."""
    steps = (
        ("decay", "S <- exp(g) S"),
        ("predict", "p = S^T k"),
        ("subtract", "u = b (v - p)"),
        ("write", "S <- S + k u^T"),
        ("read", "o = scale S^T q"),
    )
    parts: list[str] = []
    for i, (step, says) in enumerate(steps):
        parts += box(16 + i * 150, 30, 128, 52, step, says)
        if i:
            parts.append(arrow(16 + i * 150 - 22, 56, 16 + i * 150 - 2, 56))
    parts.append(text(16 + 150 + 139, 106, "only with delta", size=11))
    parts.append(f'<path d="M166 92h278" stroke="{ACCENT}" stroke-width="1.2"/>')
    return page(768, 118, "One token: decay, predict, subtract, write, read", parts)


def chunk() -> str:
    """Chunk factors of all chunks at once, then the state pass."""
    parts: list[str] = [text(16, 22, "all chunks at once", size=12, anchor="start")]
    for i in range(3):
        x = 96 + i * 210
        parts += box(x, 32, 150, 46, "C tokens", "q, k, v, g, beta")
        parts += box(x, 100, 150, 46, "chunk factors", "U, W, P, decays")
        parts.append(arrow(x + 75, 79, x + 75, 98))
        parts += box(x, 200, 150, 52, "Vn = U - W S", "O = Qe S + P Vn")
        parts.append(arrow(x + 75, 147, x + 75, 198))
        parts.append(arrow(x - 58 if i else 46, 226, x - 2, 226))
        parts.append(text(x - 30, 218, "S", weight="bold"))
        parts.append(arrow(x + 75, 253, x + 75, 276))
        parts.append(text(x + 88, 272, "O", size=12, anchor="start"))
    parts.append(arrow(96 + 2 * 210 + 152, 226, 96 + 2 * 210 + 206, 226))
    parts.append(text(96 + 2 * 210 + 180, 218, "S", weight="bold"))
    parts.append(text(16, 168, "the state pass:", size=12, anchor="start"))
    parts.append(text(16, 184, "one after the other", size=12, anchor="start"))
    return page(736, 290, "Chunk factors of all chunks at once, then the state from chunk to chunk", parts)


PICTURES = {
    "layers.svg": layers, "call.svg": call, "sleep.svg": sleep, "window.svg": window, "token.svg": token,
    "chunk.svg": chunk,
}  # fmt: skip

if __name__ == "__main__":
    for file, draw in PICTURES.items():
        (HERE / file).write_text(draw())
