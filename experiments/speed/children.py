"""Measurements in a process of their own: PyTorch beside JAX, and what only a fresh process can show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from results import what_went_wrong

TIMEOUT = 240.0  # s


def measure_in_child(
    script: str, *arguments: object, timeout: float = TIMEOUT, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The JSON on the last line that a script of this folder prints; {"error": ...} where it prints none in time."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=os.environ | (env or {}), check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": what_went_wrong(done.stderr) or f"exit code {done.returncode}"}
