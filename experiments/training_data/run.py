"""Memory and speed of what feeds a training run: data sets of several sizes, read, checked, split, packed, shuffled.

    python experiments/training_data/run.py -o experiments/training_data/results/cpu.json

Each data set is made of 24 atoms a frame, written as HDF5 to a temporary folder, and trained on by `jaxff train`'s own
loop in a process of its own, whose steps do nothing: what is left is the loader. `--code DIR` takes another version of
jaxff, from its checkout, under the key `--name`; results are added to the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ATOMS, EACH = 24, 100  # atoms of a frame, frames of a molecule
ELEMENTS = np.array([6, 7, 8])


def make(path: Path, count: int, compressed: bool) -> None:
    """Frames in the layout of jaxff.train.hdf5, written in pieces: blocks of 2 x 2 x 6 atoms, shaken."""
    import h5py

    rng = np.random.default_rng(0)
    grid = 1.45 * np.stack(np.meshgrid(np.arange(2), np.arange(2), np.arange(6), indexing="ij"), -1).reshape(-1, 3)
    options: dict[str, Any] = {"compression": "gzip", "compression_opts": 1, "shuffle": True} if compressed else {}
    splits = ATOMS * np.arange(count + 1)
    with h5py.File(path, "w") as file:
        numbers = file.create_dataset("structures/atomic_numbers", (ATOMS * count,), np.int64, **options)
        positions = file.create_dataset("structures/positions", (ATOMS * count, 3), np.float64, **options)
        forces = file.create_dataset("labels/forces", (ATOMS * count, 3), np.float32, **options)
        energies = file.create_dataset("labels/energy", (count,), np.float64)
        file["structures/atomic_numbers_splits"] = file["labels/forces_splits"] = splits
        file["structures/molecules"] = [f"molecule {b // EACH}" for b in range(count)]
        for first in range(0, count, 10 * EACH):
            some = min(10 * EACH, count - first)
            z = np.repeat(rng.choice(ELEMENTS, (-(-some // EACH), ATOMS)), EACH, axis=0)[:some]
            f = rng.normal(0.0, 1.0, (some, ATOMS, 3))
            own = slice(ATOMS * first, ATOMS * (first + some))
            numbers[own] = z.reshape(-1)
            positions[own] = (grid + rng.normal(0.0, 0.08, (some, ATOMS, 3))).reshape(-1, 3)
            forces[own] = (f - f.mean(axis=1, keepdims=True)).reshape(-1, 3)
            energies[first : first + some] = -1000.0 * z.sum(axis=1) + rng.normal(0.0, 1.0, some)


def memory(what: str) -> float:
    """MB of this process: VmRSS, or VmHWM, its largest so far."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return round(int(text.split(f"{what}:")[1].split()[0]) / 1024, 1)


def measure(path: Path, output: Path, steps: int, batch_size: int) -> dict[str, Any]:
    """Peak memory and times of a run whose steps do nothing."""
    from jaxff.train import loop
    from jaxff.train.config import TrainConfig

    times: list[float] = []
    digests: list[float] = []

    class Idle(loop.Steps):
        def __init__(self, *settings: Any) -> None:
            super().__init__(*settings)
            self.train = self._count

        def put(self, batch: Any) -> Any:
            return batch

        def _count(self, state: Any, frozen: Any, batch: Any) -> Any:
            times.append(time.perf_counter())
            if len(times) <= 50:
                digests.append(float(np.sum(batch.positions, dtype=np.float64) + np.sum(batch.senders)))
            return state._replace(step=state.step + 1)

    loop.Steps = Idle  # type: ignore[misc]
    loop._Run._events = lambda self, step: False  # type: ignore[method-assign]
    loop._Run.save = lambda self, step: None  # type: ignore[method-assign]
    loop._Run._finish = lambda self, step, status: run.append(self)  # type: ignore[method-assign]
    run: list[Any] = []
    model = {"architecture": "painn", "hidden_dim": 4, "num_interactions": 1, "num_rbf": 4, "cutoff": 5.0, "max_z": 8}
    settings = {"steps": steps, "batch_size": batch_size, "devices": 1}
    config = TrainConfig.model_validate({"model": model, "data": {"train": [str(path)]}, "run": settings})
    import optax  # noqa: F401  (what all runs import is no part of the data's memory)
    import orbax.checkpoint  # noqa: F401

    before, start = memory("VmRSS"), time.perf_counter()
    loop.train(config, output)
    warm = times[steps // 2 :]
    packed = batch_size * (len(warm) - 1) / (warm[-1] - warm[0])
    return {
        "frames": len(run[0].dataset.frames),
        "steps": len(times),
        "MB_before": before,
        "MB_peak": memory("VmHWM"),
        "MB_while_training": memory("VmRSS"),
        "seconds_to_first_batch": round(times[0] - start, 2),
        "frames_per_s": round(packed),
        "frames_per_cpu_s": round(packing(run[0])),
        "data_sha256": run[0].dataset.checksum,
        "references": [float(x) for x in run[0].references if x],
        "batches": [float(x).hex() for x in digests[:5]] + [float(sum(digests)).hex()],
    }


def packing(run: Any, batches: int = 1500) -> float:
    """Frames that one thread reads and packs in a second of its own, which others on the machine don't change."""
    groups = list(run.packer.groups(np.random.default_rng(0).permutation(run.dataset.train)))[:batches]
    start = time.thread_time()
    for group in groups:
        run.packer.pack(group)
    return sum(len(ids) for group in groups for ids in group) / (time.thread_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--frames", type=int, nargs="+", default=[30_000, 100_000, 300_000])
    parser.add_argument("--compressed", action="store_true", help="gzip, in chunks")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--code", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--name", default="now")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.output, options.steps, options.batch_size)))
        return
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    for count in options.frames:
        with tempfile.TemporaryDirectory(dir=options.output.parent) as folder:
            path = Path(folder) / "frames.h5"
            make(path, count, options.compressed)
            command = [sys.executable, __file__, "--one", str(path), "-o", str(Path(folder) / "run")]
            command += ["--steps", str(options.steps), "--batch-size", str(options.batch_size)]
            environment = os.environ | {"PYTHONPATH": str(options.code), "JAX_PLATFORMS": "cpu"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout)
        print(json.dumps(row), flush=True)
        results.setdefault(options.name, {})[f"{count}{' gzip' if options.compressed else ''}"] = row
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
