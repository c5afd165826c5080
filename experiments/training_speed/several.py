"""One batch on one device, and spread over several: the same losses to rounding, and how long a step takes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import jax
import numpy as np
from timing import Course, compiled, start, turn_by_turn
from workload import Workload

from jaxff.errors import ConfigError
from jaxff.train.batches import Batch, Packer, Position, stream
from jaxff.train.step import Steps

CURVE = 12  # steps
TIMED_BATCHES = 8


def measure(work: Workload, keep: Callable[[dict[str, Any]], None], count: int, rounds: int, calls: int) -> None:
    """Curves and times; `keep` takes what is known so far.

    The whole batch (`count` usual ones) goes to one device and to `count`; one usual batch goes to one device.
    """
    if count > jax.device_count():
        raise ConfigError(f"expected --count of at most {jax.device_count()} (all there are), received {count}")
    store, params = work.store(), work.random()
    one, many = (
        Steps(work.config.model, work.config.model_copy(update={"run": run}))
        for run in (work.config.run.model_copy(update={"devices": devices}) for devices in (1, count))
    )
    spread = work.packer(store, count)
    whole, usual = work.packer(store, 1, count), work.packer(store)
    works = list(islice(stream(spread, work.train, 0, Position()), max(CURVE, TIMED_BATCHES)))
    batches: dict[str, tuple[Steps, list[Batch]]] = {
        "one device, one batch": (one, [one.put(usual.pack(made.frames[:1])) for made in works]),
        "one device, all batches": (one, [one.put(_as_one(whole, made.frames)) for made in works]),
        "several devices, a batch each": (many, [many.put(made.batch) for made in works]),
    }
    keep({"devices": count, "batch": work.shape._asdict()})
    made, seconds = {}, {}
    for name, (steps, own) in batches.items():
        made[name], seconds[name] = compiled(steps, params, own[0])

    def curve(name: str) -> list[float]:
        steps, own = batches[name]
        state, frozen = start(steps, params)
        losses = []
        for batch in own[:CURVE]:
            state = made[name](state._replace(sums=steps.replicate(steps.no_sums())), frozen, batch)
            losses.append(float(state.sums["loss"]))
        return losses

    _, same, spread_out = batches
    curves = {"one device": curve(same), "one device, again": curve(same), "several devices": curve(spread_out)}
    first = np.array(curves["one device"])
    apart = {name: float(np.max(np.abs(np.array(row) - first) / first)) for name, row in curves.items()}
    keep({"losses": curves, "largest_relative_difference": apart})
    courses = {name: Course(made[name], steps, params, own) for name, (steps, own) in batches.items()}
    times = turn_by_turn(courses, rounds, calls)
    ratio = times["one device, all batches"]["ms"] / times["several devices, a batch each"]["ms"]
    weak = times["one device, one batch"]["ms"] / times["several devices, a batch each"]["ms"]
    for name, row in times.items():
        row["compile_s"] = seconds[name]
    keep({"step": times, "speedup_of_the_same_batch": ratio, "efficiency_of_a_batch_each": weak})


def _as_one(packer: Packer, group: list[np.ndarray]) -> Batch:
    return packer.pack([np.concatenate(group)])
