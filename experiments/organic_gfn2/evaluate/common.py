"""What all figures share: the held-out molecules, the reference folder, result files, plots."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ParamSpec

import jax
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import atomic_masses, covalent_radii
from jaxtyping import Float, Int

import jaxff
from jaxff.checkpoint import flatten
from jaxff.errors import DataError
from jaxff.files import atomic_write
from jaxff.loading import load_potential
from jaxff.potential import Potential
from jaxff.train.frames import Frames
from jaxff.train.hdf5 import read_hdf5, read_metadata
from jaxff.versions import installed

HELD_OUT = Path(__file__).parents[1] / "molecules" / "held_out.csv"
P = ParamSpec("P")
BOND = 1.25  # of the sum of covalent radii: closer atoms are bonded


@dataclass(frozen=True)
class Bar:
    """What must be reached, and what should be; `low` is good unless `high`."""

    what: str
    unit: str
    bar: float | None = None
    aim: float | None = None
    high: bool = False

    def row(self, value: float | None, on: str) -> dict[str, Any]:
        """The figure for a result file and a card."""
        row: dict[str, Any] = {"what": self.what, "value": value, "unit": self.unit, "on": on}
        for name, bound in (("bar", self.bar), ("aim", self.aim)):
            if bound is not None:
                met = value is not None and (value >= bound if self.high else value <= bound)
                row |= {name: bound, f"{name}_reached": met}
        return row


@dataclass(frozen=True)
class Context:
    """What is evaluated, against what, and where the results go."""

    model: str
    reference: Path
    output: Path
    small: str | None = None  # the second member of the committee
    limit: int | None = None  # molecules at most, for tests
    options: dict[str, Any] = field(default_factory=dict)  # of single figures

    @cached_property
    def single(self) -> Potential:
        """The model in float32, as users have it."""
        return load_potential(self.model, dtype="float32")

    @cached_property
    def double(self) -> Potential:
        """The model in float64, without the fused engine."""
        return load_potential(self.model, dtype="float64", engine="xla")

    def frames(self, name: str) -> Frames:
        """The labelled frames `name`.h5 of the reference folder; with `limit`, those of the first molecules."""
        return self.frames_and_table(name)[0]

    def frames_and_table(self, name: str) -> tuple[Frames, np.ndarray]:
        """The frames, and what the reference says about each (temperature, angle)."""
        path = self.reference / f"{name}.h5"
        frames, about = read_hdf5(path).frames, read_metadata(path)[1]["about"]
        kept = np.array([self.knows(frame.numbers) for frame in frames], bool)
        if self.limit is not None:
            kept &= np.isin(frames.molecules, list(dict.fromkeys(frames.molecules[kept]))[: self.limit])
        if not kept.any():
            raise DataError(f"expected frames in {path} that the model knows, found none")
        return frames.select(kept), about[kept]

    def knows(self, numbers: Int[np.ndarray, "N"]) -> bool:
        """Whether the model was made for all of these elements."""
        config = self.single.config
        return bool(
            (numbers <= config.max_z).all() and (not config.elements or np.isin(numbers, config.elements).all())
        )

    def tell(self, text: str) -> None:
        """Progress, for whoever watches."""
        print(text, flush=True)


Measure = Callable[[Context], dict[str, Any]]


def write_result(context: Context, name: str, result: dict[str, Any]) -> Path:
    """`name`.json: {headline: rows, ...} with the model, device and versions. Returns the path."""
    config = context.single.config
    stamp = {
        "figure": name,
        "model": {
            "file": Path(context.model).name,
            "parameters_sha256": parameters_hash(context.single.params),
            "config": config.model_dump(mode="json"),
        },
        "reference": json.loads((context.reference / "reference.json").read_text(encoding="utf-8")).get("sha256"),
        "device": jax.devices()[0].device_kind,
        "engine": context.single.engine,
        "versions": {"jaxff": jaxff.__version__} | installed("jax", "jaxlib", "numpy", "ase"),
    }
    path = context.output / f"{name}.json"
    with atomic_write(path) as temporary:
        text = json.dumps(stamp | result, indent=1, ensure_ascii=False, allow_nan=False, default=_plain)
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def parameters_hash(params: Any) -> str:
    """SHA-256 of the parameters in float32, by name: what a card compares its figures' model with."""
    digest = hashlib.sha256()
    for name, value in sorted(flatten(params)):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value, dtype="<f4").tobytes())
    return digest.hexdigest()


def molecules(kind: str) -> dict[str, str]:
    """Name -> SMILES of the held-out molecules of a set: small, drug or torsion."""
    with HELD_OUT.open(encoding="utf-8", newline="") as file:
        return {row["name"]: row["smiles"] for row in csv.DictReader(file) if row["set"] == kind}


class TeacherCalculator(Calculator):
    """A callable (numbers, positions) -> (energy eV, forces eV/Å) for ASE's optimisers."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012  (as ASE has it)

    def __init__(self, teacher: Callable[[Any, Any], tuple[float, np.ndarray]]) -> None:
        super().__init__()
        self.teacher = teacher

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = ()) -> None:
        """Fill `results`. Called by ASE."""
        super().calculate(atoms, properties, system_changes)
        energy, forces = self.teacher(self.atoms.numbers, self.atoms.positions)
        self.results = {"energy": energy, "forces": np.asarray(forces, np.float64)}


def relaxed(
    calculator: Any, numbers: Any, positions: Any, fmax: float, steps: int = 500
) -> tuple[Float[np.ndarray, "N 3"], bool]:
    """Positions at the minimum that ASE's BFGS finds, and whether it converged."""
    from ase.optimize import BFGS

    atoms = Atoms(numbers=numbers, positions=positions, calculator=calculator)
    converged = BFGS(atoms, logfile=None).run(fmax=fmax, steps=steps)  # type: ignore[arg-type]
    return atoms.positions.copy(), bool(converged)


def bonds(numbers: Any, positions: Any, factor: float = BOND) -> Int[np.ndarray, "K 2"]:
    """Pairs i < j closer than `factor` times the sum of their covalent radii."""
    radii = covalent_radii[np.asarray(numbers)]
    distance = np.linalg.norm(np.asarray(positions)[:, None] - np.asarray(positions)[None], axis=-1)
    return np.argwhere(np.triu(distance < factor * (radii[:, None] + radii[None]), 1))


def frequencies(
    numbers: Any, positions: Float[np.ndarray, "N 3"], hessian: Float[np.ndarray, "3N 3N"]
) -> Float[np.ndarray, "M"]:
    """Harmonic wavenumbers in /cm, ascending, negative for imaginary ones; rigid motion is projected out.

    hessian: eV/Å². M = 3N - 6, 3N - 5 for a linear molecule.
    """
    from ase.units import invcm

    mass = np.repeat(atomic_masses[np.asarray(numbers)], 3)
    centred = positions - np.average(positions, axis=0, weights=mass[::3])
    rigid = [np.tile(axis, len(centred)) for axis in np.eye(3)]
    rigid += [np.cross(axis, centred).ravel() for axis in np.eye(3)]
    vectors, sizes, _ = np.linalg.svd((np.array(rigid) * np.sqrt(mass)).T, full_matrices=True)
    inner = vectors[:, int((sizes > 1e-3 * sizes[0]).sum()) :]
    weighted = inner.T @ ((hessian + hessian.T) / 2 / np.sqrt(np.outer(mass, mass))) @ inner
    # eV/(amu Å²): ω in 1/ASE time, and ASE's energy unit makes ħ ω of it
    from ase.units import _amu, _e, _hbar

    squares = np.linalg.eigvalsh(weighted)
    quantum = _hbar * 1e10 / np.sqrt(_e * _amu)  # eV for ω = 1
    return np.sign(squares) * np.sqrt(np.abs(squares)) * quantum / invcm


def auroc(score: Sequence[float] | np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve: how often a positive has the larger score, ties halved; None without both kinds."""
    from scipy.stats import rankdata

    positive = np.asarray(positive, bool)
    wanted, rest = int(positive.sum()), int((~positive).sum())
    if not wanted or not rest:
        return None
    return float((rankdata(score)[positive].sum() - wanted * (wanted + 1) / 2) / (wanted * rest))


def draws(plot: Callable[P, None]) -> Callable[P, None]:
    """Leaves the picture out where matplotlib is missing, as on a bare GPU machine: run.py --draw makes it later."""

    @functools.wraps(plot)
    def perhaps(*args: P.args, **kwargs: P.kwargs) -> None:
        if find_spec("matplotlib") is None:
            print("no matplotlib here, no picture", flush=True)
        else:
            plot(*args, **kwargs)

    return perhaps


def figure(columns: int = 1, rows: int = 1, width: float = 4.5, height: float = 4.0) -> tuple[Any, Any]:
    """A figure without a display, and its axes in an array [rows, columns]."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9}):
        made = Figure(figsize=(width * columns, height * rows), layout="constrained")
        FigureCanvasAgg(made)
        return made, made.subplots(rows, columns, squeeze=False)


def save_figure(context: Context, made: Any, name: str) -> None:
    """`name`.png, whole or not at all."""
    with atomic_write(context.output / f"{name}.png") as temporary:
        made.savefig(temporary, format="png", dpi=120)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"not JSON: {type(value).__name__}")
