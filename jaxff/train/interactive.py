"""A training run at a terminal: a progress bar, and signals as a question that the loop asks at each step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from jaxff.train.loop import Status

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def until_signalled(note: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C or SIGTERM came; `note` is told what happens then.

    A second one raises KeyboardInterrupt at once. For the main thread only, as all signal handlers.
    """
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        note("writing a checkpoint (Ctrl-C again: leave at once)")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[Status], None]]:
    """A bar on `console` that follows the statuses it is given."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(bar_width=12),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[info]}"),
        TimeRemainingColumn(compact=True),
    )
    waiting = console.status("reading and compiling ...")
    bars = Progress(*columns, console=console)
    task = bars.add_task("", total=None, info="")

    def show(status: Status) -> None:
        waiting.stop()
        bars.start()
        bars.update(task, total=status.steps, completed=status.step, info=_info(status))

    waiting.start()
    try:
        yield show
    finally:
        waiting.stop()
        if bars.live.is_started:
            bars.stop()


def _info(status: Status) -> str:
    parts = []
    if status.loss is not None and status.frames_per_s is not None:
        parts.append(f"loss {status.loss:.3g} · {status.frames_per_s:.0f} frames/s")
    if status.valid_force_mae is not None and status.valid_energy_mae is not None:
        parts.append(f"valid {status.valid_force_mae:.1f} meV/Å {status.valid_energy_mae:.2f} meV/atom")
    return " · ".join(parts)


def outcome(summary: dict, folder: Path) -> list[tuple[str, str]]:
    """The summary as (name, value) rows for a terminal."""
    data = summary["data"]
    counts = ", ".join(f"{data[name]['frames']} {name}" for name in data)
    rows = [("frames", f"{counts} ({data['train']['molecules']} molecules to train on)")]
    rows += [("trained", f"{summary['step']} of {summary['of_steps']} steps ({summary['status']})")]
    if summary["skipped_steps"]:
        rows += [("skipped", f"{summary['skipped_steps']} steps whose gradient wasn't finite")]
    for name, errors in (("validation", summary["best"]["validation"]), ("test", summary["test"])):
        if errors:
            energy, force = errors["energy_mae_meV_per_atom"], errors["force_mae_meV_per_A"]
            best = f" (step {summary['best']['step']})" if name == "validation" else ""
            rows += [(name, f"energy {energy:.3g} meV/atom, forces {force:.3g} meV/Å, mean absolute{best}")]
    files = ("best.safetensors", "last.safetensors", "metrics.csv", "curve.png", "summary.json")
    return [*rows, ("results", f"{folder}/: {', '.join(name for name in files if (folder / name).exists())}")]
