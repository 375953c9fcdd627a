"""Pack the peers of `make gpu-check` into one archive, for a GPU machine without a network.

    python -m benchmarks.gpu_check.wheels FOLDER [--python 3.12]

pip fetches flash-linear-attention, FlashQLA, TileLang with what it needs, and nvidia-cuda-nvcc; of the last the
assembler alone is kept. FOLDER/peers.tar.xz is what `make gpu-check WHEELS=FOLDER` unpacks.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGES = (
    "flash-linear-attention==0.6.0", "fla-core==0.6.0", "flash-qla==0.1.3", "tilelang==0.1.15",
    "apache-tvm-ffi>=0.1.11,<0.1.13", "torch-c-dlpack-ext", "cloudpickle", "ml-dtypes", "psutil", "tqdm",
    "z3-solver>=4.13.0,<4.15.5", "nvidia-cuda-nvcc>=13.3",
)  # fmt: skip
SYSTEMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in (34, 28, 27, 24, 17, 12)) + (
    "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64",
)  # fmt: skip
UNUSED = (
    "nvidia/cu13/include", "nvidia/cu13/bin/crt", "bin",
    "nvidia/cu13/bin/cudafe++", "nvidia/cu13/bin/nvcc", "nvidia/cu13/bin/nvlink", "nvidia/cu13/bin/fatbinary",
    "nvidia/cu13/bin/bin2c", "nvidia/cu13/bin/nvcc.profile", "nvidia/cu13/bin/__nvcc_device_query",
)  # fmt: skip
"""What no peer and no assembler needs there; the machine has an nvcc of its own."""


def main() -> int:
    """Fetch, drop what is not needed, pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the GPU machine")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        site = Path(temporary, "site")
        systems = [word for system in SYSTEMS for word in ("--platform", system)]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:",
             "--python-version", options.python, "--implementation", "cp", *systems, "--target", str(site), *PACKAGES],
            check=True,
        )  # fmt: skip
        for name in UNUSED:
            path = site / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for library in site.glob("z3/lib/libz3.so.*"):  # the same file twice, 22 MB each
            library.unlink()
            library.symlink_to("libz3.so")
        archive = options.folder / "peers.tar.xz"
        with tarfile.open(archive, "w:xz", preset=6) as packed:
            packed.add(site, arcname=".")
    print(f"{archive}: {archive.stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
