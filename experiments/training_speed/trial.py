"""Does less than float32 pay in training? Time of a step, gradients against float64, and what short trainings reach."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import jax
import numpy as np
from precisions import VARIANTS, patched
from timing import Course, Step, compiled, start, turn_by_turn
from workload import Workload, trained

from jaxff import models
from jaxff.models.parameters import Params
from jaxff.train.batches import Batch, Position, Prefetch, stream
from jaxff.train.loss import counts, loss_sums, predict, total_loss
from jaxff.train.step import Steps, split_frozen

EXACT = "float64"
TIMED_BATCHES = 8
TRAINED = ("float32", "bf16 products", "bf16 products and messages")
Keep = Callable[[dict[str, Any]], None]


def measure(work: Workload, keep: Keep, rounds: int, calls: int, seeds: int) -> None:
    """Everything for one device; `keep` takes what is known so far."""
    config = work.config.model_copy(update={"run": work.config.run.model_copy(update={"devices": 1})})
    steps = {name: Steps(config.model, config) for name in VARIANTS}
    packer = work.packer(work.store())
    own = steps["float32"]
    some = list(islice(stream(packer, work.train, 0, Position()), TIMED_BATCHES))
    batches = [own.put(made.batch) for made in some]
    keep({"batch": work.shape._asdict() | filled(some), "training_frames": len(work.train)})

    random = work.random()
    made: dict[str, Step] = {}
    seconds = {}
    for name, variant in VARIANTS.items():
        with patched(*variant):
            made[name], seconds[name] = compiled(steps[name], random, batches[0])
    courses = {name: Course(step, steps[name], random, batches) for name, step in made.items()}
    times = turn_by_turn(courses, rounds, calls)
    for name, row in times.items():
        row |= {"float32_over_this": times["float32"]["ms"] / row["ms"], "compile_s": seconds[name]}
    keep({"step": times, "rounds": rounds, "steps_a_round": calls})
    keep({"gradient": gradients(work)})

    trainings: dict[str, list[dict[str, Any]]] = {name: [] for name in TRAINED}
    for seed in range(seeds):
        for name in TRAINED:
            trainings[name].append(train(work, steps[name], made[name], own, seed))
            keep({"training": {"steps": config.run.steps, "validation_frames": len(work.valid), **trainings}})


def filled(works: Iterable[Any]) -> dict[str, float]:
    """How much of the batches isn't padding, on average."""
    batches = [work.batch for work in works]
    return {
        "real_frames": float(np.mean([(batch.atoms > 0).sum() for batch in batches])),
        "real_atoms": float(np.mean([(batch.numbers > 0).sum() for batch in batches])),
        "real_pairs": float(np.mean([(batch.receivers != batch.numbers.shape[1] - 1).sum() for batch in batches])),
    }


def gradients(work: Workload) -> dict[str, Any]:
    """Of a batch's loss with respect to the parameters, and forces, against float64: with trained and first parameters.

    relative: |g - g64| / |g64|; cosine between both; other_batch: the same for float32 and another batch, what a step's
    gradient scatters by anyway.
    """
    config, loss = models.jit_key(work.config.model), work.config.loss

    def value(trained: Params, frozen: Params, one: Batch) -> Any:
        energies, forces = predict({**trained, **frozen}, config, one)
        return total_loss(loss_sums(energies, forces, one, loss), counts(one, loss), loss), forces

    given, references = trained()
    params = {"trained": split_frozen(given), "random": split_frozen(work.random())}
    labels = {"trained": references, "random": None}

    def packed(kind: str, dtype: Any = np.float32, seed: int = 0) -> Batch:
        """The first batch of an order of frames."""
        packer = work.packer(work.store(dtype, labels[kind]))
        return jax.tree.map(lambda x: x[0], next(stream(packer, work.train, seed, Position())).batch)

    lowered = {}
    for name, variant in VARIANTS.items():
        with patched(*variant):
            lowered[name] = jax.jit(jax.grad(value, has_aux=True)).lower(*params["random"], packed("random"))
    with jax.enable_x64(True):
        wide = {kind: jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for kind, tree in params.items()}
        lowered[EXACT] = jax.jit(jax.grad(value, has_aux=True)).lower(*wide["random"], packed("random", np.float64))
    with ThreadPoolExecutor() as pool:
        ready = dict(zip(lowered, pool.map(lambda low: low.compile(), lowered.values()), strict=True))
    rows: dict[str, Any] = {}
    for kind, trees in params.items():
        batch, exact, other = packed(kind), packed(kind, np.float64), packed(kind, seed=1)
        with jax.enable_x64(True):
            true, true_forces = jax.tree.map(np.asarray, ready[EXACT](*wide[kind], exact))
        rows[kind] = {}
        for name in VARIANTS:
            found, forces = ready[name](*trees, batch)
            apart = np.abs(np.asarray(forces, np.float64) - true_forces)[exact.numbers > 0]
            rows[kind][name] = compared(found, true) | {"forces_apart_meV_per_A": 1e3 * float(apart.mean())}
        rows[kind]["other_batch"] = compared(ready["float32"](*trees, other)[0], true)
    return rows


def compared(found: Any, true: Any) -> dict[str, float]:
    """The distance of two trees, and the cosine of the angle between them."""
    a, b = (np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)]) for t in (found, true))
    size = np.linalg.norm(b)
    return {"relative": float(np.linalg.norm(a - b) / size), "cosine": float(a @ b / (np.linalg.norm(a) * size))}


def train(work: Workload, steps: Steps, step: Step, judge: Steps, seed: int) -> dict[str, Any]:
    """A whole short training; errors of the averaged parameters on the held-out frames, all in float32 by `judge`."""
    state, frozen = start(steps, work.random(seed))
    packer = work.packer(work.store())
    begin = time.perf_counter()
    with Prefetch(stream(packer, work.train, seed, Position()), steps.put) as works:
        for _ in range(work.config.run.steps):
            state = step(state, frozen, next(works).batch)
        jax.block_until_ready(state.params)
    seconds = time.perf_counter() - begin
    sums: dict[str, float] = {}
    for group in packer.groups(work.valid):
        found = judge.evaluate(state.ema, frozen, judge.put(packer.pack(group)))
        for name in ("force_absolute", "energy_absolute", "frames", "components"):
            sums[name] = sums.get(name, 0.0) + float(found[name])
    return {
        "seed": seed,
        "seconds": seconds,
        "skipped": int(state.skipped),
        "training_force_mae_meV_per_A": 1e3 * float(state.sums["force_absolute"] / state.sums["components"]),
        "valid_force_mae_meV_per_A": 1e3 * sums["force_absolute"] / sums["components"],
        "valid_energy_mae_meV_per_atom": 1e3 * sums["energy_absolute"] / sums["frames"],
    }
