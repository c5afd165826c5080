"""The study of experiments/training_speed in small: every part gives figures that make sense."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxff.train.batches import Shape

pytestmark = pytest.mark.usefixtures("compile_quickly")
FOLDER = Path(__file__).parents[1] / "experiments" / "training_speed"
SCRIPTS = ("workload", "precisions", "timing", "trial", "several")
SMALL = {"hidden_dim": 8, "num_interactions": 1, "num_rbf": 4}
SHAPE = Shape(2, 128, 2048)


@pytest.fixture(scope="module")
def study() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        before = {name: sys.modules.pop(name, None) for name in SCRIPTS}
        patch.syspath_prepend(str(FOLDER))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def test_less_precision_is_less_right(study: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    work = study.workload.organic(2, 1, SMALL, SHAPE)
    small = work.random(1), None
    monkeypatch.setattr(study.trial, "trained", lambda: small)
    kept: dict[str, Any] = {}
    study.trial.measure(work, kept.update, rounds=1, calls=2, seeds=1)
    assert {row["ms"] > 0 for row in kept["step"].values()} == {True}
    for rows in kept["gradient"].values():
        errors = [rows[name]["relative"] for name in ("float32", "tf32 products", "bf16 products")]
        assert errors[0] < 1e-5 < errors[1] < errors[2] < 0.1
        assert rows["bf16 products and messages"]["relative"] < 0.1 < rows["other_batch"]["relative"]
    for name in study.trial.TRAINED:
        (training,) = kept["training"][name]
        assert training["skipped"] == 0
        assert training["valid_force_mae_meV_per_A"] > 0


def test_two_devices_do_as_one() -> None:
    code = f"""
import json
from several import measure
from workload import Shape, organic
kept = {{}}
measure(organic(100, 0, {SMALL}, Shape{tuple(SHAPE)}), kept.update, count=2, rounds=1, calls=1)
print(json.dumps(kept))
"""
    path = os.pathsep.join((str(FOLDER), os.environ.get("PYTHONPATH", "")))
    virtual = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | virtual, capture_output=True, text=True, check=True
    )
    kept = json.loads(done.stdout)
    assert 0 < kept["largest_relative_difference"]["several devices"] < 1e-5
    assert kept["largest_relative_difference"]["one device, again"] == 0
    assert kept["losses"]["several devices"][-1] < kept["losses"]["several devices"][0]
