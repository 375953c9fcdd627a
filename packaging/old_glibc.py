"""Stub libraries that give a link the symbol versions of an older glibc.

glibc 2.34 moved pthread_create, dlopen and their like from libpthread, libdl and librt into libc, under the new version
GLIBC_2.34. A module linked on such a system therefore requires glibc 2.34, although the functions are the same. The
libc of today still has them under their first version, for programs linked before. This program reads these versions
from libc and writes three stub libraries with the old names. A module linked with the stubs names the old version,
and runs on both: an older system has these libraries, and a newer one keeps empty ones.

    python packaging/old_glibc.py --compiler g++ --newest 2.28 --out FOLDER    # prints the stubs' paths
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections import defaultdict
from pathlib import Path

LIBRARIES = {
    "pthread_": "libpthread.so.0",
    "__pthread_": "libpthread.so.0",
    "sem_": "libpthread.so.0",
    "dl": "libdl.so.2",
    "shm_": "librt.so.1",
}
"""The library that had a function in an older glibc, by the first letters of its name."""


def version_key(version: str) -> tuple[int, ...]:
    """GLIBC_2.3.4 as (2, 3, 4)."""
    return tuple(int(part) for part in version.removeprefix("GLIBC_").split("."))


def versions(libc: str) -> dict[str, dict[str, bool]]:
    """Versions of each function of libc; True marks the one that a link takes today."""
    listed = subprocess.run(["readelf", "-W", "--dyn-syms", libc], capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, bool]] = defaultdict(dict)
    for name, default, version in re.findall(r" (\w+)(@@?)(GLIBC_[\d.]+)", listed):
        found[name][version] = default == "@@"
    return found


def stubs(libc: str, newest: str) -> dict[str, dict[str, list[str]]]:
    """For each stub library, the names of each version: functions whose version of today is newer than `newest`."""
    limit = version_key(newest)
    out: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, known in versions(libc).items():
        library = next((lib for start, lib in LIBRARIES.items() if name.startswith(start)), None)
        older = [version for version in known if version_key(version) <= limit]
        if library and older and any(default and version_key(v) > limit for v, default in known.items()):
            out[library][max(older, key=version_key)].append(name)
    return out


def build(compiler: str, library: str, names: dict[str, list[str]], folder: Path) -> Path:
    """A shared library whose functions do nothing; only the linker reads it."""
    source, script, target = folder / f"{library}.c", folder / f"{library}.map", folder / library
    source.write_text("".join(f"void {name}(void) {{}}\n" for group in names.values() for name in group))
    script.write_text("".join(f"{version} {{ {'; '.join(group)}; }};\n" for version, group in sorted(names.items())))
    options = ["-shared", "-fPIC", "-fno-builtin", "-nostdlib", f"-Wl,-soname,{library}"]
    command = [compiler, "-x", "c", "-w", *options, f"-Wl,--version-script={script}", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", default="g++")
    parser.add_argument("--newest", default="2.28", help="newest version of glibc that the module may require")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    command = [options.compiler, "-print-file-name=libc.so.6"]
    libc = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    options.out.mkdir(parents=True, exist_ok=True)
    built = [build(options.compiler, lib, names, options.out) for lib, names in stubs(libc, options.newest).items()]
    print(";".join(map(str, built)), end="")


if __name__ == "__main__":
    main()
