"""Pictures of result files: step time against atoms (run.py), parts of a step (breakdown.py), and stages (stages.py).

    python experiments/speed/plot.py RESULT.json [MORE.json ...] -o PICTURE.png

Rows of several files of one device go into one picture; a row that stands in two of them is the later file's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from results import check_output, read, refuse

from jaxff.files import atomic_write

# Estimated for one H200 in float32 (the project's figures): a large system's update layers, about 1 MFLOP/atom, and
# 0.6 MB/atom of gathered features through the L2 cache are 0.1 µs an atom and step; a small molecule is a dozen
# dependent kernels, 20 µs at least.
LIMIT_PER_ATOM, LIMIT_FLOOR = 0.1, 20.0  # µs
LINES = {  # engine: (label, colour, marker)
    "fused": ("explicit, fused kernels", "C3", "o"),
    "xla-table": ("explicit, XLA, tables", "C0", "s"),
    "xla-exact": ("explicit, XLA, exact filters", "C9", "D"),
    "autodiff": ("jax.grad of the plain equations", "C2", "^"),
    "torch": ("PyTorch eager, autograd, edges anew", "C7", "v"),
    "torch-graph": ("PyTorch, fixed edges, compiled, CUDA graph", "C4", "P"),
}
Series = dict[tuple[str, str], list[tuple[int, dict[str, Any]]]]


def size_series(reports: Sequence[dict[str, Any]]) -> Series:
    """(architecture, engine) -> [(atoms, row)], ascending; rows with an error are left out."""
    series: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for name, row in [x for report in reports for x in report.get("rows", {}).items()]:
        what, architecture, engine = name.split(":")
        kind, _, atoms = what.partition("-")
        if kind in ("size", "nve") and "error" not in row:  # of a molecule, both are the same
            series.setdefault((architecture, engine), {})[int(atoms)] = row
    return {key: sorted(points.items(), key=lambda point: point[0]) for key, points in series.items()}


def draw_sizes(reports: Sequence[dict[str, Any]], path: Path) -> None:
    """Median step time with its extremes against atoms, an axis for each architecture, the limit as a dashed line."""
    series = size_series(reports)
    architectures = list(dict.fromkeys(architecture for architecture, _ in series))
    made, axes = _figure(len(architectures), 5.2, 5.0)
    for axis, architecture in zip(axes, architectures, strict=True):
        for engine, (label, colour, marker) in LINES.items():
            points = series.get((architecture, engine), [])
            if not points:
                continue
            atoms = [n for n, _ in points]
            median, fastest, slowest = (
                np.array([row[f"{key}_us"] for _, row in points]) for key in ("median", "fastest", "slowest")
            )
            if engine == "torch-graph" and not all(row.get("compiled") for _, row in points):
                label = "PyTorch, fixed edges, CUDA graph, compiled where it could be"  # noqa: PLW2901
            axis.errorbar(
                atoms, median, (median - fastest, slowest - median), color=colour, marker=marker, markersize=4,
                linewidth=1.2, capsize=2, label=label,
            )  # fmt: skip
        x = np.geomspace(3, 1e5, 200)
        axis.plot(x, np.maximum(LIMIT_FLOOR, LIMIT_PER_ATOM * x), "k--", linewidth=1, label="estimated limit, H200")
        axis.set(xscale="log", yscale="log", xlabel="atoms", ylabel="time of a step, µs", title=architecture)
        axis.grid(alpha=0.3, which="both", linewidth=0.4)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    made.suptitle(", ".join(dict.fromkeys(report["device"] for report in reports)), fontsize=9)
    _save(made, path)


def draw_breakdowns(breakdowns: dict[str, Any], device: str, path: Path) -> None:
    """Horizontal bars: microseconds of each part of a step, and the rest that no part explains."""
    good = {name: one for name, one in breakdowns.items() if "error" not in one}
    made, axes = _figure(len(good), 5.2, 4.2)
    for axis, (name, one) in zip(axes, good.items(), strict=True):
        bars = {part: entry["median_us"] for part, entry in one["parts"].items()} | {"rest": one["rest_us"]}
        colours = ["C1" if "backward" in part else "C7" if part == "rest" else "C0" for part in bars]
        places = axis.barh(list(bars), list(bars.values()), color=colours)
        axis.bar_label(places, fmt="%.1f", padding=2, fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.16)
        axis.axvline(0, color="k", linewidth=0.6)
        axis.set(xlabel="µs a step", title=f"{name}: {one['step_us']:.1f} µs a step")
    made.suptitle(device, fontsize=9)
    _save(made, path)


def draw_stages(stages: dict[str, Any], device: str, path: Path) -> None:
    """Horizontal bars: cycles of each stage of a kernel, from the block with the fewest to the one with the most."""
    made, axes = _figure(len(stages), 4.4, 4.2)
    for axis, (name, one) in zip(axes, stages.items(), strict=True):
        of = one["stages"]
        mean, fewest, most = (np.array([stage[key] for stage in of.values()]) for key in ("mean", "fewest", "most"))
        colours = ["C1" if "backward" in stage else "C0" for stage in of]
        axis.barh(list(of), mean, color=colours, xerr=(mean - fewest, most - mean), error_kw={"linewidth": 0.8})
        axis.invert_yaxis()
        axis.set(xlabel="cycles", title=f"{name}: {one['cycles']:,.0f} cycles")
    made.suptitle(device, fontsize=9)
    _save(made, path)


def draw_where_possible(draw: Callable[..., None], *args: Any) -> None:
    """draw(*args), or a line that says why not."""
    if find_spec("matplotlib") is None:
        print("no matplotlib here, no picture: plot.py makes it later", flush=True)
    else:
        draw(*args)


def _figure(columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure without a display, and its axes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 8}):
        made = Figure(figsize=(width * max(columns, 1), height), layout="constrained")
        FigureCanvasAgg(made)
        return made, made.subplots(1, max(columns, 1), squeeze=False)[0][:columns]


def _save(made: Any, path: Path) -> None:
    with atomic_write(path) as temporary:
        made.savefig(temporary, format="png", dpi=140)


def main() -> None:
    """Draw what the files hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    check_output(args.output)
    reports = [read(path) for path in args.results]
    breakdowns = {name: one for report in reports for name, one in report.get("breakdowns", {}).items()}
    stages = {name: one for report in reports for name, one in report.get("stages", {}).items()}
    if stages:
        draw_stages(stages, reports[0].get("device", ""), args.output)
    elif breakdowns:
        draw_breakdowns(breakdowns, reports[0].get("device", ""), args.output)
    elif size_series(reports):
        draw_sizes(reports, args.output)
    else:
        refuse(f"expected size rows, breakdowns or stages in {' '.join(map(str, args.results))}, found none")


if __name__ == "__main__":
    main()
