"""The kernels take a sound assembler on a Hopper, theirs alone is replaced, and no cache mixes two of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier, Thread
from types import SimpleNamespace
from typing import Any

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas, get_ptxas_version  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sleepkern.backends.triton import assembler, ptxas  # noqa: E402
from sleepkern.backends.triton.plan_table import PLAIN_HOPPER  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OLD, NEW = (ptxas.tool(str(TOOLS / name), "triton") for name in ("ptxas", "ptxas-blackwell"))
HOPPER = (9, 0)
CACHES = (
    ptxas.assembler_of, ptxas.packaged_assembler, ptxas.capability_of_plans, assembler.compile_options,
    get_ptxas_version,
)  # fmt: skip

both = pytest.mark.skipif(
    OLD is None or NEW is None or not ptxas.numbers(OLD.version) < (13,) <= ptxas.numbers(NEW.version),
    reason="needs an assembler of CUDA 12 and one of CUDA 13, as Triton 3.9 has",
)


@triton.jit
def twice_kernel(p_x, C: tl.constexpr):
    at = tl.arange(0, C)
    tl.store(p_x + at, 2 * tl.load(p_x + at))


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


@pytest.fixture
def packaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ptxas.Assembler:
    """The newer of Triton's assemblers stands in for the package's, and Triton takes its older one for Hopper."""
    assert OLD is not None and NEW is not None
    own, stand_in = OLD._replace(version="12.8"), NEW._replace(version="13.5.37", source=ptxas.PACKAGE)
    monkeypatch.setattr(ptxas, "triton_assembler", lambda capability: own)
    monkeypatch.setattr(ptxas, "packaged_assembler", lambda: stand_in)
    monkeypatch.setattr(assembler, "packaged_assembler", lambda: stand_in)
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", OLD.path)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return stand_in


def compiled(C: int, options: Any) -> Any:
    source = ASTSource(fn=twice_kernel, signature={"p_x": "*fp32", "C": "constexpr"}, constexprs={(1,): C})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"ptx_version": 86, **options})


def assembled_by(kernel: Any) -> str:
    """The release of ptxas that machine code names; "" of those before 13, which name none."""
    found = re.search(rb"release (\d+\.\d+)", kernel.asm["cubin"])
    return "" if found is None else found[1].decode()


def release(chosen: ptxas.Assembler) -> str:
    """12.9 of 12.9.86."""
    return ".".join(chosen.version.split(".")[:2])


def a_package(folder: Path, version: str) -> None:
    """An installed nvidia-cuda-nvcc whose ptxas is a script that says this version."""
    script, info = folder / "nvidia" / "cu13" / "bin" / "ptxas", folder / "nvidia_cuda_nvcc-13.5.37.dist-info"
    script.parent.mkdir(parents=True)
    script.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version[:4]}, V{version}'\n")
    script.chmod(0o755)
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: nvidia-cuda-nvcc\nVersion: 13.5.37\n")
    (info / "RECORD").write_text("nvidia/cu13/bin/ptxas,,\nnvidia_cuda_nvcc-13.5.37.dist-info/METADATA,,\n")


@pytest.mark.parametrize(
    ("own", "packaged", "source", "plans"),
    [
        ("12.8", "13.5.37", ptxas.PACKAGE, 90), ("12.8", "13.2.1", "triton", PLAIN_HOPPER),
        ("12.8", None, "triton", PLAIN_HOPPER), ("13.4", "13.5.37", "triton", 90),
    ],
)  # fmt: skip
def test_the_package_is_taken_where_triton_is_not_sound(
    own: str, packaged: str | None, source: str, plans: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packaged is not None:
        a_package(tmp_path, packaged)
        monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ptxas, "triton_assembler", lambda capability: ptxas.Assembler("ptxas", own, "triton"))
    assert ptxas.assembler_of(HOPPER).source == source
    assert ptxas.assembler_of((8, 0)).source == "triton"
    assert ptxas.capability_of_plans(HOPPER) == plans
    assert bool(assembler.compile_options(HOPPER)) == (source == ptxas.PACKAGE)
    assert not assembler.compile_options((8, 0)) and not assembler.compile_options((10, 0))
    assert not assembler.compile_options((0, 0))  # the interpreter's, which knows no such option


def test_the_assembler_of_triton_is_that_of_the_device() -> None:
    for capability in ((8, 0), HOPPER, (10, 0)):
        assert ptxas.triton_assembler(capability).path == get_ptxas(10 * capability[0]).path


def test_a_ptxas_that_does_not_run_is_none(tmp_path: Path) -> None:
    assert ptxas.tool(str(tmp_path / "ptxas"), "triton") is None


@both
def test_marked_kernels_alone_are_assembled_anew(packaged: ptxas.Assembler) -> None:
    assert OLD is not None and NEW is not None
    before = knobs.runtime.add_stages_inspection_hook
    with assembler.assembling(HOPPER) as options:
        ours, theirs = compiled(64, options), compiled(64, {})
        assert (assembled_by(ours), assembled_by(theirs)) == (release(NEW), "")
        assert ours.hash != theirs.hash  # so no cache takes one for the other
        assert assembled_by(compiled(64, options)) == release(NEW)
    assert knobs.runtime.add_stages_inspection_hook is before
    assert assembled_by(compiled(64, {})) == ""


@both
def test_a_marked_kernel_that_escapes_the_hook_is_an_error(packaged: ptxas.Assembler, capfd: Any) -> None:
    with pytest.raises(Exception, match="sleepkern-assembler"):
        compiled(32, assembler.compile_options(HOPPER))


@both
def test_another_version_than_the_mark_names_is_an_error(
    packaged: ptxas.Assembler, monkeypatch: pytest.MonkeyPatch
) -> None:
    with assembler.assembling(HOPPER) as options:
        monkeypatch.setattr(assembler, "packaged_assembler", lambda: packaged._replace(version="13.6"))
        with pytest.raises(RuntimeError, match=r"got .*13\.6.*expected version 13\.5\.37"):
            compiled(16, options)


@both
def test_a_hook_of_others_still_runs(packaged: ptxas.Assembler, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    other = lambda *arguments: seen.append(len(arguments)) or ("key", "hash")  # noqa: E731
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", other)
    with assembler.assembling(HOPPER) as options:
        compiled(128, options)
        assert 5 in seen
    assert knobs.runtime.add_stages_inspection_hook is other


@both
def test_threads_hold_it_together(packaged: ptxas.Assembler) -> None:
    """The first that ends does not take the hook from the second."""
    assert NEW is not None
    together, found = Barrier(2), []

    def hold(C: int, first: bool) -> None:
        with assembler.assembling(HOPPER) as options:
            together.wait(60)
            if not first:
                together.wait(60)
                found.append(assembled_by(compiled(C, options)))
        if first:
            together.wait(60)

    threads = [Thread(target=hold, args=(256, True)), Thread(target=hold, args=(512, False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [release(NEW)]
    assert knobs.runtime.add_stages_inspection_hook is None or "TRITON_INTERPRET" in os.environ


@pytest.mark.parametrize("capability", [HOPPER, (8, 0)])
def test_a_launch_takes_the_options_of_its_tile_and_device(
    packaged: ptxas.Assembler, capability: tuple[int, int]
) -> None:
    from sleepkern.backends.triton.launch import Job
    from sleepkern.backends.triton.plan_table import Tile

    seen: list[tuple[Any, bool]] = []
    job: Any = object.__new__(Job)
    job.capability = capability
    job.arguments = lambda *_, **__: {}
    hooked = lambda: knobs.runtime.add_stages_inspection_hook is not None  # noqa: E731
    job.recording = SimpleNamespace(launch=lambda kernel, grid, given, options: seen.append((options, hooked())))
    for warp_groups in (True, False):
        job.launch(SimpleNamespace(arg_names=()), (1,), Tile(64, 16, 4, 3, warp_groups=warp_groups))
    usual, plain = {"num_warps": 4, "num_stages": 3}, {}
    if capability == HOPPER:
        usual, plain = usual | {"ptx_options": assembler.MARK + "13.5.37"}, {"arch": "sm80"}
    assert seen == [(usual, capability == HOPPER), (usual | plain, capability == HOPPER)]
