"""Second round: frames that the model itself visits in dynamics, labelled by the teacher, so that holes are closed.

    python experiments/organic_gfn2/active.py --model run/last.safetensors -o labels/ --molecules 1200 --round 1

Molecules are drawn from molecules/train.csv by the round's seed. Each is heated to 300, 600 or 1000 K from an MMFF
minimum by Langevin dynamics with the model, many at once (on the GPU where there is one); every frame of the list below
is labelled. Frames whose contacts or forces lie out of bounds are left out. One HDF5 file for each chunk of molecules.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from label import SEED, TEACHER, molecules, start_worker, teacher, write_manifest

from jaxff.train.frames import Frame, Frames
from jaxff.train.hdf5 import write_hdf5

TIMESTEP, FRICTION = 1.0, 0.01  # fs, 1/fs
FIRST, EVERY = 200, 150  # steps before the first frame, and between two


def start(task: tuple[str, int]) -> tuple[str, np.ndarray, np.ndarray] | None:
    """SMILES, numbers and positions of an MMFF minimum; None where RDKit fails, as it does on odd molecules."""
    from sampling import Mechanics, embed

    smiles, seed = task
    try:
        molecule, (first, *_) = embed(smiles, 1, seed)
        mechanics = Mechanics(molecule)
        return smiles, mechanics.numbers, mechanics.minimize(first, 200)
    except (ValueError, RuntimeError):
        return None


def work(task: tuple[Path, dict[str, Any], list[tuple[str, np.ndarray, np.ndarray]]]) -> int:
    """Labels the frames of a chunk and writes them."""
    from sampling import Checked

    path, attributes, chunk = task
    frames = [
        Frame(numbers, label.positions, label.energy, label.forces, smiles)
        for smiles, numbers, trajectory in chunk
        for r in trajectory
        for label in Checked(numbers, teacher())(r)
    ]
    write_hdf5(path, Frames.of(frames), {"teacher": TEACHER, **attributes})
    return len(frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--round", type=int, default=1)
    parser.add_argument("--molecules", type=int, default=1200)
    parser.add_argument("--frames", type=int, default=10)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([SEED, 4, options.round])
    everything = molecules()
    chosen = rng.choice(len(everything), options.molecules, replace=False)
    tasks = [(everything[i], int(rng.integers(2**31))) for i in chosen]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, start_worker) as pool:
        starts = [found for found in pool.imap(start, tasks, 8) if found is not None]
        trajectories = simulate(options.model, starts, options.frames, rng)
        attributes = {"round": options.round, "model": Path(options.model).name, "seed": SEED}
        chunks = [
            (options.output / f"unit_round{options.round}_{i:04d}.h5", attributes, chunk)
            for i, chunk in enumerate(pieces(trajectories, 20))
        ]
        total = sum(pool.imap_unordered(work, chunks))
    manifest = write_manifest(options.output)
    print(json.dumps({"molecules": len(starts), "frames": total, "sha256": manifest["sha256"]}))


def pieces(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size`, the last one shorter."""
    return (items[i : i + size] for i in range(0, len(items), size))


def simulate(
    model: str, starts: list[tuple[str, np.ndarray, np.ndarray]], frames: int, rng: np.random.Generator
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """SMILES, numbers and trajectories [frames, N, 3] Å of all molecules, in groups of like size."""
    from dynamics import Dynamics

    from jaxff import load_potential

    potential = load_potential(model)
    starts = sorted(starts, key=lambda found: len(found[1]))
    trajectories = []
    for group in pieces(starts, -(-len(starts) // 4)):
        run = Dynamics(potential, [numbers for _, numbers, _ in group], TIMESTEP, FRICTION)
        kelvin = rng.choice([300.0, 300.0, 600.0, 1000.0], len(group))
        state = run.start([positions for _, _, positions in group], kelvin, int(rng.integers(2**31)))
        seen = []
        for steps in [FIRST, *[EVERY] * (frames - 1)]:
            state = run.run(state, kelvin, steps)
            seen.append(np.asarray(state.positions, np.float64))
        for b, (smiles, numbers, _) in enumerate(group):
            trajectories.append((smiles, numbers, np.stack([r[b, : len(numbers)] for r in seen])))
    rng.shuffle(trajectories)
    return trajectories


if __name__ == "__main__":
    main()
