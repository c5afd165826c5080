"""All figures of a model, each in a JSON file with its picture, and a table of them all (summary.json, on the screen).

    python experiments/organic_gfn2/evaluate/run.py --model best.safetensors --small small.safetensors -o results/
    python experiments/organic_gfn2/evaluate/run.py --model organic -o results/ --only stability,nve    on a GPU

The reference folder is that of reference.py; neither tblite nor rdkit is needed here. A figure that fails is told
and does not keep the others from being made. --student evaluates the published student, too, into results/student/.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluate import forces, geometry, invariance, nve, speed, stability, torsions, uncertainty, vibrations
from evaluate.common import Context, Measure, write_result
from jaxff.files import atomic_write

FIGURES: dict[str, Measure] = {
    "forces": forces.measure,
    "geometry": geometry.measure,
    "frequencies": vibrations.measure,
    "torsions": torsions.measure,
    "stability": stability.measure,
    "nve": nve.measure,
    "invariance": invariance.measure,
    "calibration": uncertainty.calibration,
    "uncertainty": uncertainty.measure,
    "speed": speed.measure,
}
OF_THE_STUDENT = ("forces", "geometry", "torsions", "invariance", "nve")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a .safetensors file, or a pretrained name")
    parser.add_argument("--small", help="second model of the committee; without it, no uncertainty")
    parser.add_argument("--labels", nargs="+", help="files of labelled frames that calibrate the uncertainty")
    parser.add_argument("--student", help="the published student's checkpoint")
    parser.add_argument("--reference", type=Path, default=Path(__file__).parents[1] / "reference")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", help=f"some of {','.join(FIGURES)}")
    parser.add_argument("--skip", default="", help="some of them not")
    parser.add_argument("--draw", action="store_true", help="only pictures, of stability and nve, from their results")
    parser.add_argument("--limit", type=int, help="so many molecules of each set: a quick look, not a result")
    parser.add_argument("--ps", type=float, default=100.0, help="stability: ps in all")
    parser.add_argument("--seconds", type=float, help="stability: stop after so many, to be continued by the next call")
    parser.add_argument("--nve-ps", type=float, default=20.0, help="nve: ps")
    parser.add_argument("--nve-molecules", type=int, default=10, help="nve: so many")
    parser.add_argument("--nve-atoms", type=int, default=1000, help="nve: atoms of the largest of them")
    parser.add_argument("--speed-molecules", type=int, default=6, help="speed: so many, of all sizes")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(FIGURES)
    unknown = [name for name in [*names, *filter(None, options.skip.split(","))] if name not in FIGURES]
    if unknown:
        parser.error(f"expected figures of {', '.join(FIGURES)}, received {unknown[0]}")
    names = [name for name in names if name not in options.skip.split(",")]
    settings: dict[str, Any] = {"ps": options.ps, "nve_ps": options.nve_ps}
    settings |= {"nve_molecules": options.nve_molecules, "nve_atoms": options.nve_atoms}
    settings["speed_molecules"] = options.speed_molecules
    if options.seconds is not None:
        settings["seconds"] = options.seconds
    context = Context(options.model, options.reference, options.output, options.small, options.limit, settings)
    if options.draw:
        for module in (stability, nve):
            path = options.output / f"{module.__name__.rpartition('.')[2]}.json"
            if path.exists():
                module.draw(context, json.loads(path.read_text(encoding="utf-8")))
        return
    if options.labels:
        settings["labels"] = options.labels
    if not options.only:
        absent = [] if options.small and options.labels else ["calibration"]
        absent += [] if options.small else ["uncertainty"]
        names = [name for name in names if name not in absent]
    failed = evaluate(context, names)
    if options.student:
        student = Context(options.student, options.reference, options.output / "student", None, options.limit, settings)
        failed += evaluate(student, [name for name in names if name in OF_THE_STUDENT])
    sys.exit(1 if failed else 0)


def evaluate(context: Context, names: list[str]) -> list[str]:
    """Makes the figures `names`, prints and sums up what there is in the folder. Returns those that failed."""
    context.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        begin = time.monotonic()
        try:
            result = FIGURES[name](context)
        except Exception as error:  # noqa: BLE001  (one figure must not take the others down)
            traceback.print_exc()
            context.tell(f"{name}: FAILED, {error}")
            failed.append(name)
            continue
        write_result(context, name, result | {"seconds": round(time.monotonic() - begin, 1)})
        for row in result["headline"]:
            context.tell(f"{name}: {line(row)}")
    summarize(context.output)
    return failed


def summarize(folder: Path) -> list[dict[str, Any]]:
    """summary.json: the headline rows of all result files in a folder."""
    rows: list[dict[str, Any]] = []
    for name in FIGURES:
        path = folder / f"{name}.json"
        if path.exists():
            rows += json.loads(path.read_text(encoding="utf-8"))["headline"]
    with atomic_write(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return rows


def line(row: dict[str, Any]) -> str:
    """A headline row in words."""
    value = "-" if row["value"] is None else f"{row['value']:.4g}"
    met = row.get("aim_reached"), row.get("bar_reached")
    state = {(True, True): "aim reached", (False, True): "bar reached", (None, None): "not finished"}
    bound = f"  [bar {row['bar']:g}, aim {row['aim']:g}: {state.get(met, 'BAR MISSED')}]" if "bar" in row else ""
    return f"{row['what']}: {value} {row['unit']}  ({row['on']}){bound}"


if __name__ == "__main__":
    main()
