"""A compiled training step, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxff.models.parameters import Params
from jaxff.train.batches import Batch
from jaxff.train.step import State, Steps, split_frozen

Step = Callable[[State, Params, Batch], State]


def start(steps: Steps, params: Params) -> tuple[State, Params]:
    """The first state and the frozen parameters, on the devices."""
    trained, frozen = split_frozen(params)
    return steps.replicate(steps.first_state(trained)), steps.replicate(frozen)


def compiled(steps: Steps, params: Params, batch: Batch) -> tuple[Step, float]:
    """The training step, compiled ahead, and the seconds that this took, tracing counted in."""
    state, frozen = start(steps, params)
    begin = time.perf_counter()
    step = steps.train.lower(state, frozen, batch).compile()
    return step, time.perf_counter() - begin


def turn_by_turn(runs: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, dict[str, Any]]:
    """Milliseconds a call: median, least and most over the rounds, each of `calls` calls; after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            for _ in range(calls - 1):
                run()
            jax.block_until_ready(run())
            if turn:
                times[name].append(1e3 * (time.perf_counter() - begin) / calls)
    return {name: {"ms": float(np.median(row)), "least": min(row), "most": max(row)} for name, row in times.items()}


class Course:
    """A training that goes on step by step over given batches, in turn."""

    def __init__(self, step: Step, steps: Steps, params: Params, batches: list[Batch]) -> None:
        self.step, self.batches, self.done = step, batches, 0
        self.state, self.frozen = start(steps, params)

    def __call__(self) -> State:
        """One more step."""
        batch = self.batches[self.done % len(self.batches)]
        self.state, self.done = self.step(self.state, self.frozen, batch), self.done + 1
        return self.state
