"""Does dynamics stay whole? Unseen molecules at 300 and 600 K, every bond watched; resumable, made for a GPU.

Langevin dynamics (BAOAB, 2 fs, friction 0.01/fs) of all molecules at once in float32, from the teacher's minima;
hydrogen weighs 4 amu, so that 2 fs are as fine as 1 fs else, while the ensemble of positions stays the same. Every 50
steps each molecule is looked at: a bond beyond 1.5 times its length at the start, a new contact closer than 1.15
times the sum of covalent radii, positions that are not finite, or more than ten times the kinetic energy end it.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase.data import covalent_radii
from ase.units import kB
from dynamics import Dynamics, State

from evaluate.common import Bar, Context, bonds, draws, figure, save_figure
from jaxff.files import atomic_write
from jaxff.neighbors import bucket

WHOLE = {
    300: Bar("molecules whole in dynamics at 300 K", "of 100", 100, 100, high=True),
    600: Bar("molecules whole in dynamics at 600 K", "of 50", 48, 50, high=True),
}
MOLECULES = {300: 100, 600: 50}
TIMESTEP, FRICTION, EVERY, HYDROGEN = 2.0, 0.01, 50, 4.0  # fs, 1/fs, steps, amu
GROUPS = 6  # of molecules of like size
STRETCH, CONTACT, HOT = 1.5, 1.15, 10.0
WORDS = ("whole", "a bond broke", "a new bond", "exploded")


@dataclass
class Group:
    """Molecules that share a padded size: their dynamics, what is watched, and what was seen."""

    dynamics: Dynamics
    rows: np.ndarray  # which of all runs
    kelvin: np.ndarray
    lengths: np.ndarray  # [B, n, n] Å at the start where bonded, else 0
    nearest: np.ndarray  # [B, n, n] Å: not bonded atoms come no closer
    state: State | None = None

    def __post_init__(self) -> None:
        self.look = jax.jit(self._look)

    def _look(self, state: State) -> tuple[jax.Array, jax.Array]:
        """The word for each molecule now, and the largest bond length over that at the start."""
        r = state.positions
        d = jnp.sqrt(((r[:, :, None] - r[:, None]) ** 2).sum(-1))
        bonded = self.lengths > 0
        strain = jnp.where(bonded, d / jnp.where(bonded, self.lengths, 1), 0).max((1, 2))
        close = (d < self.nearest).any((1, 2))
        kinetic = 0.5 * (self.dynamics.masses * state.velocities**2).sum((1, 2))
        limit = np.asarray(HOT * 1.5 * kB * self.kelvin * self.dynamics.counts, self.dynamics.potential.dtype)
        lost = ~(jnp.isfinite(r).all((1, 2)) & (kinetic < limit))
        return jnp.where(lost, 3, jnp.where(strain > STRETCH, 1, jnp.where(close, 2, 0))), strain


def measure(context: Context) -> dict[str, Any]:
    """How many are whole at the end; goes on where a run with the same options stopped. stability.png.

    options: ps (100), groups (6), seconds (stop after so many, but not before one block; "complete" is then false).
    """
    total = round(context.options.get("ps", 100.0) * 1000 / TIMESTEP)
    deadline = time.monotonic() + context.options.get("seconds", float("inf"))
    names, kelvin, groups = _groups(context)
    journal = context.output / "stability_state.npz"
    step, word, first, strain = _resume(journal, groups, len(names), context)
    with ThreadPoolExecutor() as pool:  # no steps: all groups are compiled at once
        list(pool.map(lambda group: group.dynamics.run(group.state, group.kelvin, 0), groups))
    begin, start = time.monotonic(), step
    while step < total and (step == start or time.monotonic() < deadline):
        for group in groups:
            group.state = group.dynamics.run(group.state, group.kelvin, min(EVERY, total - step))
        step += min(EVERY, total - step)
        seen = [group.look(group.state) for group in groups]
        for group, found in zip(groups, seen, strict=True):
            now, largest = map(np.asarray, found)
            fresh = (word[group.rows] == 0) & (now > 0)
            first[group.rows[fresh]] = step * TIMESTEP / 1000
            word[group.rows] = np.where(word[group.rows] == 0, now, word[group.rows])
            whole = word[group.rows] == 0
            strain[group.rows[whole]] = np.maximum(strain[group.rows[whole]], largest[whole])
        if step % (100 * EVERY) == 0 or step == total:
            _save(journal, groups, step, word, first, strain, context)
            pace = (time.monotonic() - begin) / (step - start)
            context.tell(f"{step * TIMESTEP / 1000:g} ps, {1e3 * pace:.2f} ms a step, {(word == 0).sum()} whole")
    _save(journal, groups, step, word, first, strain, context)
    headline = []
    for temperature, count in MOLECULES.items():
        own = kelvin == temperature
        row = WHOLE[temperature].row(
            int((word[own] == 0).sum()), f"{own.sum()} runs of {step * TIMESTEP / 1000:g} ps, float32"
        )
        unfinished = {"bar_reached": None, "aim_reached": None} if step < total or own.sum() < count else {}
        headline.append(row | {"unit": f"of {own.sum()}"} | unfinished)
    result = {
        "headline": headline,
        "complete": step >= total,
        "ps": step * TIMESTEP / 1000,
        "ms_per_step": 1e3 * (time.monotonic() - begin) / (step - start) if step > start else None,
        "runs": [
            {
                "molecule": name,
                "kelvin": int(t),
                "status": WORDS[w],
                "at_ps": float(at) if w else None,
                "largest_bond_ratio": float(s),
            }
            for name, t, w, at, s in zip(names, kelvin, word, first, strain, strict=True)
        ],
    }
    draw(context, result)
    return result


def _groups(context: Context) -> tuple[list[str], np.ndarray, list[Group]]:
    """All runs, grouped by size, so that little is padding."""
    frames = context.frames("drug")
    chosen = [(b, t) for t, count in MOLECULES.items() for b in range(len(frames))[:count]]
    kelvin = np.array([t for _, t in chosen])
    sizes = np.array([bucket(len(frames[b].numbers)) for b, _ in chosen])
    parts = np.array_split(np.argsort(sizes, kind="stable"), min(context.options.get("groups", GROUPS), len(chosen)))
    groups = []
    for seed, rows in enumerate(parts):
        own = [frames[chosen[row][0]] for row in rows]
        dynamics = Dynamics(context.single, [frame.numbers for frame in own], TIMESTEP, FRICTION, HYDROGEN)
        watched = [_watched(frame.numbers, frame.positions, dynamics.places) for frame in own]
        group = Group(dynamics, rows, kelvin[rows].astype(np.float32), *map(np.stack, zip(*watched, strict=True)))
        group.state = dynamics.start([frame.positions for frame in own], kelvin[rows], seed)
        groups.append(group)
    return [frames[b].molecule for b, _ in chosen], kelvin, groups


def _watched(numbers: np.ndarray, positions: np.ndarray, places: int) -> tuple[np.ndarray, np.ndarray]:
    n = len(numbers)
    pairs = bonds(numbers, positions)
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    lengths = np.zeros((places, places), np.float32)
    lengths[pairs[:, 0], pairs[:, 1]] = distance[pairs[:, 0], pairs[:, 1]]
    radii = covalent_radii[numbers]
    nearest = np.zeros((places, places), np.float32)
    nearest[:n, :n] = np.triu(CONTACT * (radii[:, None] + radii[None]), 1)
    nearest[pairs[:, 0], pairs[:, 1]] = 0
    return lengths, nearest


def _save(path: Path, groups: list[Group], step: int, word: Any, first: Any, strain: Any, context: Context) -> None:
    arrays: dict[str, Any] = {"step": step, "word": word, "first": first, "strain": strain, "about": _about(context)}
    for g, group in enumerate(groups):
        assert group.state is not None
        for name, value in group.state._asdict().items():
            arrays[f"{name}_{g}"] = np.asarray(jax.random.key_data(value) if name == "key" else value)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _resume(path: Path, groups: list[Group], count: int, context: Context) -> tuple[int, Any, Any, Any]:
    """Step, words, times and strains; from the journal where it belongs to this model and these groups."""
    if path.exists():
        with np.load(path) as saved:
            if str(saved["about"]) == _about(context):
                for g, group in enumerate(groups):
                    fields = {name: jnp.asarray(saved[f"{name}_{g}"]) for name in State._fields}
                    group.state = State(**fields | {"key": jax.random.wrap_key_data(fields["key"])})
                context.tell(f"goes on at {int(saved['step']) * TIMESTEP / 1000:g} ps")
                return int(saved["step"]), saved["word"].copy(), saved["first"].copy(), saved["strain"].copy()
    return 0, np.zeros(count, int), np.zeros(count), np.zeros(count)


def _about(context: Context) -> str:
    from evaluate.common import parameters_hash

    settings = context.limit, context.options.get("groups", GROUPS), TIMESTEP, HYDROGEN
    return f"{parameters_hash(context.single.params)} {settings}"


@draws
def draw(context: Context, result: dict[str, Any]) -> None:
    """stability.png of a result."""
    made, axes = figure()
    for temperature in MOLECULES:
        own = [run for run in result["runs"] if run["kelvin"] == temperature]
        whole = sum(run["status"] == WORDS[0] for run in own)
        label = f"{temperature} K: {whole} of {len(own)} whole"
        ratios = [run["largest_bond_ratio"] for run in own]
        axes[0, 0].hist(ratios, bins=np.linspace(1, STRETCH, 51).tolist(), alpha=0.6, label=label)
    axes[0, 0].axvline(STRETCH, color="0.6", lw=0.8, ls=":")
    axes[0, 0].set(xlabel="largest bond length / that at the start", ylabel="molecules")
    axes[0, 0].legend(fontsize=7)
    save_figure(context, made, "stability")
