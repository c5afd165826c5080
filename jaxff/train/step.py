"""The state of a training run on the devices, and the compiled steps that act on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxff import models
from jaxff.config import PainnConfig, StudentConfig
from jaxff.errors import ConfigError
from jaxff.models.parameters import Params
from jaxff.train.batches import Batch
from jaxff.train.config import OptimizerConfig, ScheduleConfig, TrainConfig
from jaxff.train.loss import Sums, by_element, counts, loss_sums, predict, total_loss

FROZEN = ("reference", "radial")  # element references; the student's radial centres and widths


class State(NamedTuple):
    """Everything that a step changes. Sums run since the last row of the log."""

    step: Any  # int32
    params: Params
    ema: Params
    optimizer: Any
    rate_scale: Any  # of the learning rate, by the plateau rule
    skipped: Any  # int32, steps whose loss or gradient wasn't finite
    skipped_in_a_row: Any  # int32
    sums: Sums


def split_frozen(params: Params) -> tuple[Params, Params]:
    """Parameters that are trained, and those that aren't."""
    trained = {name: tree for name, tree in params.items() if name not in FROZEN}
    return trained, {name: tree for name, tree in params.items() if name in FROZEN}


def learning_rate(t: Array, optimizer: OptimizerConfig, schedule: ScheduleConfig, steps: int) -> Array:
    """The rate of step t (a float), a pure function: linear warm-up, then cosine to the final rate, or constant."""
    peak, warmup = optimizer.learning_rate, schedule.warmup_steps
    rate = jnp.full_like(t, peak)
    if schedule.kind == "cosine":
        progress = jnp.clip((t - warmup) / max(steps - warmup, 1), 0, 1)
        final = min(schedule.final_learning_rate, peak)
        rate = final + (peak - final) * 0.5 * (1 + jnp.cos(math.pi * progress))
    return rate * jnp.minimum((t + 1) / max(warmup, 1), 1)


class Steps:
    """The compiled functions of a run, over all devices of a mesh: `train`, `evaluate`, `energies`.

    A batch's leading axis D is spread over the mesh; parameters are replicated; sums and gradients are added up.
    """

    def __init__(self, model: PainnConfig | StudentConfig, config: TrainConfig) -> None:
        self.model, self.config = models.jit_key(model), config
        self.mesh = _mesh(config.run.devices)
        self.devices = self.mesh.size
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.spread = NamedSharding(self.mesh, PartitionSpec("batch"))
        self.dtype = np.dtype(config.run.dtype)
        self._transform = _transform(config.optimizer)
        self.train = jax.jit(self._train, donate_argnums=0, out_shardings=self.replicated)
        self.energies = jax.jit(self._energies, out_shardings=self.replicated)
        self.evaluate = jax.jit(self._evaluate, out_shardings=self.replicated)

    def put(self, batch: Batch) -> Batch:
        """A batch of NumPy arrays on the devices."""
        with self.precision():
            return jax.device_put(batch, self.spread)

    def replicate(self, tree: Any) -> Any:
        """A tree of NumPy arrays on all devices."""
        with self.precision():
            return jax.device_put(tree, self.replicated)

    def precision(self) -> Any:
        """A context in which JAX computes in this run's dtype, in this thread."""
        return jax.enable_x64(self.dtype == np.float64)

    def first_state(self, params: Params) -> State:
        """The state before the first step, as NumPy arrays; params: those that are trained."""
        trained = jax.tree.map(lambda x: np.asarray(x, self.dtype), params)
        with self.precision():
            optimizer = jax.tree.map(np.asarray, self._transform.init(trained))
        zero = np.zeros((), np.int32)
        return State(zero, trained, trained, optimizer, np.ones((), self.dtype), zero, zero, self.no_sums())

    def no_sums(self) -> dict[str, Any]:
        """Sums of nothing."""
        names = ["loss", "norm", "rate", "steps", "energy_absolute", "force_absolute", "frames", "components"]
        return {name: np.zeros((), self.dtype) for name in names}

    def _sharded(self, function: Any) -> Any:
        """(trained, frozen, batch) -> tree summed over devices, as a function of the whole batch."""
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("batch")),
            out_specs=PartitionSpec(),
            check_vma=False,
        )

    def _train(self, state: State, frozen: Params, batch: Batch) -> State:
        config = self.config

        def local(params: Params, frozen: Params, shard: Batch) -> tuple[Sums, Params]:
            own = jax.tree.map(lambda x: x[0], shard)
            totals = jax.lax.psum(counts(own, config.loss), "batch")

            def objective(trained: Params) -> tuple[Array, Sums]:
                sums = loss_sums(*predict({**trained, **frozen}, self.model, own), own, config.loss)
                return total_loss(sums, totals, config.loss), sums

            (loss, sums), gradient = jax.value_and_grad(objective, has_aux=True)(params)
            summed, gradient = jax.lax.psum((sums | {"loss": loss}, gradient), "batch")
            return summed | totals, gradient

        sums, gradient = self._sharded(local)(state.params, frozen, batch)
        norm = _global_norm(gradient)
        good = jnp.isfinite(sums["loss"]) & jnp.isfinite(norm)
        t = state.step.astype(self.dtype)
        rate = state.rate_scale * learning_rate(t, config.optimizer, config.schedule, config.run.steps)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, optimizer = self._transform.update(gradient, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        done = (state.step - state.skipped).astype(self.dtype)
        decay = jnp.minimum(jnp.asarray(config.optimizer.ema_decay, self.dtype), (1 + done) / (10 + done))
        ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
        keep = partial(jax.tree.map, lambda new, old: jnp.where(good, new, old))
        row = {name: sums[name] for name in state.sums if name in sums}
        row |= {"norm": norm, "steps": jnp.ones_like(norm)}
        added = {name: state.sums[name] + row[name] for name in row} | {"rate": rate}
        bad = (~good).astype(jnp.int32)
        return State(
            state.step + 1,
            keep(params, state.params),
            keep(ema, state.ema),
            keep(optimizer, state.optimizer),
            state.rate_scale,
            state.skipped + bad,
            (state.skipped_in_a_row + bad) * bad,
            keep(added, state.sums),
        )

    def _energies(self, params: Params, frozen: Params, batch: Batch) -> Array:
        """Energies of the frames, [D, B] eV."""

        def local(trained: Params, frozen: Params, shard: Batch) -> Array:
            own = jax.tree.map(lambda x: x[0], shard)
            energies, _ = predict({**trained, **frozen}, self.model, own)
            return jax.lax.all_gather(energies, "batch")

        return self._sharded(local)(params, frozen, batch)

    def _evaluate(self, params: Params, frozen: Params, batch: Batch) -> Sums:
        config = self.config.loss

        def local(trained: Params, frozen: Params, shard: Batch) -> Sums:
            own = jax.tree.map(lambda x: x[0], shard)
            energies, forces = predict({**trained, **frozen}, self.model, own)
            sums = loss_sums(energies, forces, own, config) | counts(own, config)
            return jax.lax.psum(sums | by_element(forces, own, self.model.max_z), "batch")

        return self._sharded(local)(params, frozen, batch)


def _mesh(devices: int | None) -> Mesh:
    found = jax.devices()
    if devices is not None and devices > len(found):
        raise ConfigError(f"run.devices: expected at most {len(found)} (all there are), received {devices}")
    return Mesh(np.array(found[:devices]), ("batch",))


def _transform(config: OptimizerConfig) -> Any:
    """Clipping, Adam and decoupled decay; the rate is multiplied outside, since the plateau rule changes it."""
    import optax

    chain = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    chain.append(optax.scale_by_adam(config.beta1, config.beta2))
    if config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=_kernels))
    return optax.chain(*chain)


def _kernels(params: Params) -> Params:
    """True for the leaves that weight decay acts on."""

    def mark(tree: Any, name: str) -> Any:
        if isinstance(tree, Mapping):
            return {key: mark(value, key) for key, value in tree.items()}
        return name.startswith("kernel")

    return mark(params, "")


def _global_norm(tree: Any) -> Array:
    return jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree)))
