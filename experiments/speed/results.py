"""Result files and what stands in them: device, versions, rows that failed; one line for input that is wrong."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

import jaxff
from jaxff.files import atomic_write
from jaxff.versions import installed

PROBE = "import jax; d = jax.devices()[0]; print(d.platform, d.device_kind, sep='|')"
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-md", "torch", "triton", "numpy")


def refuse(message: str) -> NoReturn:
    """One line, and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def check_output(path: Path) -> None:
    """Refuses a path that can't be written, before anything is measured."""
    if path.is_dir():
        refuse(f"expected a file to write, received the folder {path}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        refuse(f"{path} can't be written: expected {path.parent} to be a folder with write access")


def write(path: Path, report: Mapping[str, Any]) -> None:
    """The report as JSON, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """A report; refuses what isn't one."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        refuse(f"{path}: expected a result file, received {error}")


def device(own_process: bool = True) -> tuple[bool, str]:
    """Whether JAX runs on a GPU, and the device's name; asked of another process, JAX takes no memory of it here."""
    if own_process:
        kind, name = jax.devices()[0].platform, jax.devices()[0].device_kind
    else:
        probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
        kind, name = probe.stdout.splitlines()[-1].split("|")
    return kind == "gpu", name if kind == "gpu" else platform.processor() or platform.machine()


def stamp(device_name: str) -> dict[str, Any]:
    """What a result file begins with."""
    return {
        "device": device_name,
        "versions": {"jaxff": jaxff.__version__, "python": platform.python_version()} | installed(*PACKAGES),
    }


def matched(pattern: re.Pattern[str], rows: Sequence[str], like: str) -> dict[str, re.Match[str]]:
    """What the pattern finds in each row; refuses a row that it doesn't fit, with what it should be like."""
    found = {}
    for row in rows:
        match = pattern.fullmatch(row)
        if match is None:
            refuse(f"expected rows like {like}, received {row}")
        found[row] = match
    return found


def what_went_wrong(text: str) -> str:
    """The last line of an error, or "out of memory", whoever ran out of it."""
    lower = text.lower()
    if "out of memory" in lower or "resource_exhausted" in lower:
        return "out of memory"
    return (text.strip().splitlines() or [""])[-1][:400]


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for the screen."""

    def short(value: Any) -> Any:
        if isinstance(value, Mapping):
            return rounded(value)
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return {name: short(value) for name, value in row.items()}


def check_prefixes(prefixes: Iterable[str], names: Sequence[str]) -> None:
    """Refuse the first prefix that no row's name begins with."""
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            refuse(f"expected rows as {names[0]} or a beginning of one, received {prefix!r}")
