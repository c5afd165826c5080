"""How a running simulation is doing, and a progress bar that shows it."""

# ruff: noqa: N815  (units keep their capital letters: temperature_K, meV)

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Status:
    """Told after each block."""

    step: int
    steps: int
    steps_per_second: float
    ns_per_day: float
    temperature_K: float
    energy_error_meV_per_atom: float  # total energy minus its value at the start


Progress = Callable[[Status], None]


def ns_per_day(steps_per_second: float, timestep_fs: float) -> float:
    """Simulated nanoseconds in a day."""
    return steps_per_second * timestep_fs * 86_400e-6


@contextmanager
def progress_bar(console: Console, steps: int, conserved: bool = True, relaxing: bool = False) -> Iterator[Progress]:
    """A bar on `console` that follows the statuses it is given; ΔE is shown where energy is `conserved`."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(bar_width=12),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[info]}"),
        TimeRemainingColumn(compact=True),
    )
    waiting = console.status("relaxing and compiling ..." if relaxing else "compiling ...")
    bars = Progress(*columns, console=console)
    task = bars.add_task("", total=steps, info="")

    def show(status: Status) -> None:
        waiting.stop()
        bars.start()
        error = f" · ΔE {status.energy_error_meV_per_atom:+.2g} meV/atom" if conserved else ""
        speed = f"{status.steps_per_second:.0f} steps/s · {status.ns_per_day:.3g} ns/day"
        bars.update(task, completed=status.step, info=f"{speed} · {status.temperature_K:.0f} K{error}")

    waiting.start()
    try:
        yield show
    finally:
        waiting.stop()
        if bars.live.is_started:
            bars.stop()
