#!/usr/bin/env python3
"""make dist: one executable file with hive.py, its help and paho-mqtt inside.

For machines where nothing can be installed.  Run it with a Python that has paho-mqtt.  The same
sources and the same Python give the same bytes, wherever and whenever: the entries' order, times
and modes are fixed, and nothing is compressed, because zlib differs from machine to machine.

Beside each source lies what this Python compiled of it: without that a start takes twice as long.
Another version of Python cannot read it, and takes the source (zipimport does so by itself).
"""

from __future__ import annotations

import importlib.metadata
import os
import py_compile
import sys
import tempfile
import zipfile
from pathlib import Path

import paho.mqtt.client

ROOT = Path(__file__).resolve().parent.parent
LICENCES = ("LICENSE.txt", "edl-v10", "epl-v20")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can tell

MAIN = b"""\
import sys

if sys.version_info < (3, 11):
    sys.exit("hive: Python 3.11 or newer is needed, and this is " + sys.version.split()[0])

from hive import main

sys.exit(main())
"""


def paho_files() -> dict[str, bytes]:
    """What importing paho's client imports of paho, and its licences."""
    package = importlib.metadata.distribution("paho-mqtt")
    home = Path(paho.mqtt.client.__file__).parents[2]
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "paho"]
    files = [Path(str(module.__file__)) for module in modules]
    licences = [Path(str(file.locate())) for file in package.files or () if file.name in LICENCES]
    if len(licences) != len(LICENCES):
        sys.exit(f"dist: paho-mqtt {package.version} is here without its licences; try: make clean")
    return {file.relative_to(home).as_posix(): file.read_bytes() for file in files + licences}


def compiled(name: str, source: bytes) -> bytes:
    """What a .pyc holds that is never compared with its source (PEP 552)."""
    with tempfile.TemporaryDirectory() as scratch:
        file, made = Path(scratch, "source.py"), Path(scratch, "source.pyc")
        file.write_bytes(source)
        never = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(file), str(made), name, True, 0, never)
        return made.read_bytes()


def entries() -> dict[str, bytes]:
    """Name and bytes of each file, in the order in which they are written."""
    sources = {"hive.py": (ROOT / "hive.py").read_bytes(), **paho_files()}
    made = {"__main__.py": MAIN, **dict(sorted(sources.items()))}
    for topic in sorted((ROOT / "contrib" / "help").glob("*.md")):
        made[f"help/{topic.name}"] = topic.read_bytes()
    for name, source in sorted(sources.items()):
        if name.endswith(".py"):
            made[f"{name}c"] = compiled(name, source)
    return made


def main() -> None:
    target = ROOT / "dist" / "hive"
    target.parent.mkdir(exist_ok=True)
    unfinished = target.with_name(f"hive.{os.getpid()}")
    with unfinished.open("wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in entries().items():
                entry = zipfile.ZipInfo(name, EPOCH)
                entry.create_system, entry.external_attr = 3, 0o644 << 16  # as on Unix
                archive.writestr(entry, content)
    unfinished.chmod(0o755)
    unfinished.replace(target)
    print(f"made {target} ({target.stat().st_size // 1024} KiB)")


if __name__ == "__main__":
    main()
