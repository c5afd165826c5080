"""How fast a training step of `organic` is, in float32 and with less, on one device and on several.

    python experiments/training_speed/run.py precision -o precision.json             on a GPU
    python experiments/training_speed/run.py devices --count 2 -o devices.json       on several

precision: time of a step, gradients against float64, short trainings from random parameters. devices: the same dozen
steps with the batch on one device and spread over several. Results are written as they come.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import jax
import several
import trial
from workload import organic

from jaxff.files import atomic_write
from jaxff.versions import versions_with


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("precision", "devices"))
    parser.add_argument("-o", "--output", type=Path, required=True, help="result file")
    parser.add_argument("--count", type=int, default=2, help="devices: so many")
    parser.add_argument("--steps", type=int, default=1500, help="precision: of each training")
    parser.add_argument("--seeds", type=int, default=2, help="precision: trainings of each kind")
    parser.add_argument("--rounds", type=int, default=9, help="of timing")
    parser.add_argument("--calls", type=int, default=20, help="steps in a round")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": versions_with("jax", "jaxlib", "optax", "numpy"),
    }

    def keep(more: dict[str, Any]) -> None:
        result.update(more)
        with atomic_write(options.output) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(", ".join(more), "kept", flush=True)

    if options.what == "precision":
        trial.measure(organic(options.steps), keep, options.rounds, options.calls, options.seeds)
    else:
        several.measure(organic(10_000, warmup=0), keep, options.count, options.rounds, options.calls)


if __name__ == "__main__":
    main()
