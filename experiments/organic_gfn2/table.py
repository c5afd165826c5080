"""The table of all figures, from results/, written into the READMEs between its marks.

python experiments/organic_gfn2/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxff.files import atomic_write

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- table.py -->", "<!-- end -->"
MODELS = ("organic", "organic-small", "student")


def rows() -> dict[str, dict[str, dict[str, Any]]]:
    """What was measured -> model -> row, in the order of the result files."""
    order = ("forces", "geometry", "frequencies", "torsions", "stability", "nve", "invariance", "uncertainty")
    order += ("speed", "speed_h100")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for model in MODELS:
        for figure in order:
            path = RESULTS / model / f"{figure}.json"
            if path.exists():
                for row in json.loads(path.read_text(encoding="utf-8"))["headline"]:
                    found.setdefault(row["what"], {})[model] = row
    return found


def table() -> str:
    """Markdown."""
    lines = ["| what | on | bar (aim) | " + " | ".join(MODELS) + " |", "|---|---|---|" + "---|" * len(MODELS)]
    for what, by_model in rows().items():
        first = next(iter(by_model.values()))
        bar = f"{first['bar']:g} ({first['aim']:g})" if "bar" in first else ""
        values = [
            f"{_short(by_model[m]['value'])} {by_model[m]['unit']}".rstrip() if m in by_model else "" for m in MODELS
        ]
        lines.append(f"| {what} | {first['on']} | {bar} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def main() -> None:
    """Rewrites the READMEs."""
    for path in (RESULTS.parent / "README.md", RESULTS.parents[2] / "README.md"):
        before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise SystemExit(f"{path}: expected the marks {BEGIN} and {END}")
        with atomic_write(path) as temporary:
            temporary.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
