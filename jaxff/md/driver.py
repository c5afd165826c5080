"""One whole simulation: check, relax, draw velocities, integrate, write, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from ase import Atoms

from jaxff.errors import ConfigError, SimulationError
from jaxff.files import atomic_write
from jaxff.interop.ase import check_atoms
from jaxff.md.config import MDConfig, dump_config
from jaxff.md.log import HEADER, Series, log_lines
from jaxff.md.output import Output
from jaxff.md.progress import Progress, Status, ns_per_day
from jaxff.md.relax import Relaxation, relax
from jaxff.md.report import Summary, describe_model, energy_conservation, plot_energies, versions
from jaxff.md.simulate import Simulation
from jaxff.md.structures import check_start
from jaxff.md.trajectory import AppendedFile, FrameFormatter, Frames
from jaxff.md.velocities import draw_momenta
from jaxff.potential import Potential

Ending = tuple[Literal["completed", "interrupted", "failed"], str | None]


def run(
    potential: Potential,
    atoms: Atoms,
    config: MDConfig | None = None,
    output: str | Path = "run",
    *,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
    overwrite: bool = False,
    known_defects: Sequence[str] = (),
) -> Summary:
    """Simulate `atoms`; trajectory.xyz, log.csv, config.yaml, summary.json and energy.png go to `output`.

    `progress` is told a Status after each block; `stop` is asked then, and a true answer ends the run early
    with everything written (status "interrupted"). `known_defects` go into the summary.

    Raises StructureError or ConfigError before anything is written; SimulationError when the output folder
    already holds a run (unless `overwrite`), or when the simulation explodes: what was written until then
    stays, and the summary says "failed".
    """
    config = _resolved(config or MDConfig(), potential)
    out = Output(Path(output))
    out.check(overwrite)
    check_atoms(potential, atoms)
    check_start(atoms)
    relaxation = None
    if config.relax:
        atoms, relaxation = relax(potential, atoms, config.relax_fmax, config.relax_steps)
    momenta = draw_momenta(atoms, config.temperature_K, config.seed, config.remove_rotation)
    simulation = Simulation(potential, atoms, momenta, config)
    first = simulation.first_frame()
    out.prepare(dump_config(config))
    recorder = _Recorder(simulation, config, len(atoms), progress)
    failure: SimulationError | None = None
    ending: Ending = ("completed", None)
    formatter = FrameFormatter(atoms)
    with AppendedFile(out.trajectory) as trajectory, AppendedFile(out.log, HEADER) as log:

        def write(frames: Frames) -> None:
            for text in formatter.frames(frames):
                trajectory.append(text)
            log.append(log_lines(frames))
            recorder.add(frames)

        write(first)
        try:
            for frames in simulation.run(config.steps):
                write(frames)
                if stop is not None and stop() and recorder.step < config.steps:
                    ending = ("interrupted", f"stopped after step {recorder.step} of {config.steps}")
                    break
        except SimulationError as error:
            failure = SimulationError(f"{error}; {out.folder} holds what came before")
            ending = ("failed", str(error))
    summary = _summary(potential, atoms, config, recorder, relaxation, ending, tuple(known_defects))
    out.write(out.summary, summary.model_dump_json(indent=2) + "\n")
    with atomic_write(out.picture) as temporary:
        title = f"{summary.formula}, {config.ensemble.upper()}, {config.timestep_fs:g} fs, {summary.dtype}"
        plot_energies(temporary, recorder.series, title, len(atoms), summary.conservation)
    if failure is not None:
        raise failure
    return summary


@dataclass
class _Recorder:
    """Keeps the series and the clock, and tells `progress`."""

    simulation: Simulation
    config: MDConfig
    atoms: int
    progress: Progress | None
    series: Series = field(default_factory=Series)
    step: int = 0
    seconds: float = 0.0
    _begin: float = field(default_factory=time.perf_counter)
    _compiled_before: float = -1.0

    def add(self, frames: Frames) -> None:
        """Take these frames in."""
        if self._compiled_before < 0:
            self._compiled_before = self.simulation.compile_seconds
        self.series.append(frames)
        self.step = int(frames.step[-1])
        # compiling within the loop isn't simulating
        compiled = self.simulation.compile_seconds - self._compiled_before
        self.seconds = time.perf_counter() - self._begin - compiled
        if self.progress is not None and self.step:
            total = self.series.total
            speed = self.speed or 0.0
            self.progress(
                Status(
                    step=self.step,
                    steps=self.config.steps,
                    steps_per_second=speed,
                    ns_per_day=ns_per_day(speed, self.config.timestep_fs),
                    temperature_K=float(frames.temperature[-1]),
                    energy_error_meV_per_atom=float(total[-1] - total[0]) * 1e3 / self.atoms,
                )
            )

    @property
    def speed(self) -> float | None:
        """Steps per second, writing included and compiling not."""
        return self.step / self.seconds if self.step and self.seconds > 0 else None


def _resolved(config: MDConfig, potential: Potential) -> MDConfig:
    # what the potential was loaded with, made explicit for config.yaml
    dtype = np.dtype(potential.dtype).name
    if config.dtype not in (None, dtype):
        raise ConfigError(f"expected a potential loaded with dtype {config.dtype}, received one of {dtype}")
    return config.model_copy(update={"dtype": dtype, "engine": config.engine or potential.engine})


def _summary(
    potential: Potential,
    atoms: Atoms,
    config: MDConfig,
    recorder: _Recorder,
    relaxation: Relaxation | None,
    ending: Ending,
    known_defects: tuple[str, ...],
) -> Summary:
    series, simulation = recorder.series, recorder.simulation
    conserved = config.ensemble == "nve"
    return Summary(
        status=ending[0],
        message=ending[1],
        formula=atoms.get_chemical_formula(),
        atoms=len(atoms),
        ensemble=config.ensemble,
        steps=config.steps,
        steps_completed=recorder.step,
        frames=len(series.time_fs),
        timestep_fs=config.timestep_fs,
        time_ps=recorder.step * config.timestep_fs * 1e-3,
        seed=config.seed,
        temperature_K=config.temperature_K,
        temperature_mean_K=float(series.temperature.mean()),
        temperature_std_K=float(series.temperature.std()),
        degrees_of_freedom=simulation.degrees_of_freedom,
        energy_start_eV=float(series.total[0]),
        energy_end_eV=float(series.total[-1]),
        conservation=energy_conservation(series.time_fs, series.total, len(atoms)) if conserved else None,
        relaxation=asdict(relaxation) if relaxation else None,
        steps_per_second=recorder.speed,
        ns_per_day=ns_per_day(recorder.speed, config.timestep_fs) if recorder.speed else None,
        compile_seconds=simulation.compile_seconds,
        wall_seconds=recorder.seconds,
        neighbor_list=len(atoms) > config.neighbor_list_above,
        reallocations=simulation.reallocations,
        dtype=np.dtype(potential.dtype).name,
        engine=potential.engine,
        device=jax.devices()[0].device_kind,
        model=describe_model(potential),
        known_defects=known_defects,
        versions=versions(),
    )
