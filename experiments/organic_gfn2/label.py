"""Make the label set: geometries of sampling.py for the molecules of molecules/train.csv, labelled with GFN2-xTB.

    python experiments/organic_gfn2/label.py -o labels/ --processes 15

One unit of work is 25 molecules and 4 clusters; a unit becomes one HDF5 file, whole or not at all. Units hold random
draws of the list, so that any number of them is a fair data set: stop when there are enough, start again for more.
Everything follows from the seed below and the unit's number. labels.json lists what is there, with a checksum.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import csv
import functools
import hashlib
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxff.files import atomic_write
from jaxff.train.frames import Frame, Frames
from jaxff.train.hdf5 import read_metadata, write_hdf5
from jaxff.train.teachers import Teacher, make_teacher

if TYPE_CHECKING:
    from sampling import Label

SEED = 20261124
TEACHER = "tblite:GFN2-xTB"
MOLECULES_PER_UNIT, CLUSTERS_PER_UNIT = 25, 4
HERE = Path(__file__).parent


def molecules() -> list[str]:
    with (HERE / "molecules" / "train.csv").open(encoding="utf-8", newline="") as file:
        return [row["smiles"] for row in csv.DictReader(file)]


def units() -> int:
    return -(-len(molecules()) // MOLECULES_PER_UNIT)


def make_unit(unit: int, teacher: Teacher) -> Frames:
    """All labels of one unit; molecules without a conformer or a force field give none."""
    from sampling import sample, sample_cluster

    smiles = molecules()
    frames: list[Frame] = []
    for index in range(unit * MOLECULES_PER_UNIT, min((unit + 1) * MOLECULES_PER_UNIT, len(smiles))):
        _add(frames, [smiles[index]], sample(smiles[index], SEED + index, teacher))
    rng = np.random.default_rng([SEED, 3, unit])
    for index in range(CLUSTERS_PER_UNIT):
        parts = _cluster(smiles, rng)
        _add(frames, parts, sample_cluster(parts, SEED + unit * CLUSTERS_PER_UNIT + index, teacher))
    return Frames.of(frames)


def _add(frames: list[Frame], parts: list[str], labels: Iterator[Label]) -> None:
    """Adds the labels of one molecule or cluster; RDKit's failures on odd molecules end them."""
    from rdkit import Chem

    numbers = np.concatenate([[a.GetAtomicNum() for a in Chem.AddHs(Chem.MolFromSmiles(s)).GetAtoms()] for s in parts])
    name = ".".join(sorted(parts))
    with contextlib.suppress(ValueError, RuntimeError):
        for label in labels:
            frames.append(Frame(numbers, label.positions, label.energy, label.forces, name))


def _cluster(smiles: list[str], rng: np.random.Generator) -> list[str]:
    """Waters, a molecule with waters, or two molecules: up to about 45 atoms."""
    kind = rng.integers(3)
    if kind == 0:
        return ["O"] * int(rng.integers(2, 9))
    picked: list[str] = []
    while len(picked) < (1 if kind == 1 else 2):
        candidate = smiles[int(rng.integers(len(smiles)))]
        if len(candidate) <= (24 if kind == 1 else 14):
            picked.append(candidate)
    return picked + ["O"] * (int(rng.integers(1, 4)) if kind == 1 else 0)


@functools.cache
def teacher() -> Teacher:
    """The teacher, one in each process."""
    return make_teacher(TEACHER)


def start_worker() -> None:
    """Lets the training beside go first."""
    os.nice(5)


def _work(task: tuple[int, Path]) -> tuple[int, int]:
    unit, path = task
    frames = make_unit(unit, teacher())
    write_hdf5(path, frames, {"teacher": TEACHER, "versions": teacher().versions, "seed": SEED, "unit": unit})
    return unit, len(frames)


def write_manifest(folder: Path) -> dict[str, Any]:
    """labels.json: units, their checksums, one checksum over all."""
    files = sorted(folder.glob("unit_*.h5"))
    entries = {path.stem: str(read_metadata(path)[0]["sha256"]) for path in files}
    manifest = {
        "teacher": TEACHER,
        "seed": SEED,
        "units": len(entries),
        "molecules_sha256": hashlib.sha256((HERE / "molecules" / "train.csv").read_bytes()).hexdigest(),
        "sha256": hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest(),
    }
    with atomic_write(folder / "labels.json") as temporary:
        temporary.write_text(json.dumps(manifest | {"checksums": entries}, indent=1) + "\n", encoding="utf-8")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the label set")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--first", type=int, default=0, help="number of the first unit")
    parser.add_argument("--units", type=int, default=units(), help="so many units; default: all")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop after so many; units under way are lost"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    wanted = range(options.first, min(options.first + options.units, units()))
    missing = [(u, p) for u in wanted if not (p := options.output / f"unit_{u:05d}.h5").exists()]
    columns = (
        TextColumn("labels"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[frames]} frames"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    context = multiprocessing.get_context("spawn")
    with Progress(*columns) as progress, context.Pool(options.processes, start_worker) as pool:
        bar = progress.add_task("labels", total=len(missing), frames=0)
        frames = 0
        for _, count in pool.imap_unordered(_work, missing):
            frames += count
            progress.update(bar, advance=1, frames=frames)
            if time.monotonic() > end:
                pool.terminate()
                break
    manifest = write_manifest(options.output)
    print(f"{manifest['units']} units in {options.output}, SHA-256 {manifest['sha256']}")


if __name__ == "__main__":
    main()
