"""The fused engine, the GPU's interpreted and the CPU's, against the models that it must equal; which is chosen."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxff import interop, kernels, models
from jaxff.errors import ConfigError
from jaxff.ops import accumulate_forces
from jaxff.potential import Potential
from jaxff.tabulate import tabulate
from tests.kernels import GPU, ROUTES
from tests.structures import CONFIGS as SMALL
from tests.structures import STUDENT, pairs_in_layout, random_params, random_structure

CONFIGS = {name: config.model_copy(update={"hidden_dim": 16}) for name, config in SMALL.items()}
NAMES = list(CONFIGS)
# the interpreted kernels of one architecture, where they would be compiled and run for long; both of a GPU
NAMES_ROUTES = [(name, ROUTES[-1]) for name in ("student", "painn")] + ([] if GPU else [("painn", ROUTES[0])])


def fused_potential(config: Any, route: Any) -> Potential:
    """A float32 potential whose kernels run by this route."""
    potential = Potential(random_params(config), config, engine="fused")
    assert potential._fused.route == ROUTES[-1]
    potential._fused = kernels.prepare(potential._tree, config, route)
    return potential


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", ["all", "slots"])
@pytest.mark.parametrize("name", NAMES)
def test_against_models(name: str, layout: str, route: Any) -> None:
    """Energies, forces with unequal weights of the atoms, padding; float32 against float64 on the same tables."""
    config = CONFIGS[name]
    numbers, positions = random_structure(7)
    numbers = np.pad(numbers, (0, 2))
    vectors, pairs = pairs_in_layout(positions, config.cutoff, layout, padding=2)
    tree, _ = tabulate(random_params(config), config, 64)
    weights = np.linspace(1.0, 2.0, 9)

    def run(module: Any, tree: Any, dtype: Any) -> Any:
        w = jnp.asarray(weights, dtype)

        def energies(r: Any) -> Any:
            e = module.atomic_energies(tree, config, numbers, r, pairs)
            return jnp.sum(w * e), e

        gradients, e = jax.grad(energies, has_aux=True)(jnp.asarray(vectors, dtype))
        return e, accumulate_forces(gradients, pairs)

    energies, forces = jax.jit(lambda: run(models, models.cast(tree, np.dtype("float64")), jnp.float64))()
    fused = kernels.prepare(models.cast(tree, np.dtype("float32")), config, route)
    fused_energies, fused_forces = jax.jit(lambda: run(kernels, fused, jnp.float32))()
    assert fused_forces.dtype == np.float32
    np.testing.assert_allclose(fused_energies, energies, atol=5e-6)
    np.testing.assert_allclose(fused_forces, forces, atol=5e-6 * max(1, np.abs(forces).max()))
    assert np.all(fused_forces[7:] == 0)


@pytest.mark.parametrize(("name", "route"), NAMES_ROUTES)
def test_potential(name: str, route: Any) -> None:
    """The explicit chain, padded, all pairs and lists; forces sum to zero."""
    config = CONFIGS[name]
    potential, exact = fused_potential(config, route), Potential(random_params(config), config, dtype="float64")
    for num_atoms in (1, 4, 36):  # 1 and 4 are padded alike
        structure = random_structure(num_atoms, closest=1.1)
        energies, forces = potential.evaluate(*structure)
        expected_energies, expected_forces = exact.evaluate(*structure)
        scale = max(1, np.abs(expected_forces).max())
        np.testing.assert_allclose(energies, expected_energies, atol=1e-5)
        np.testing.assert_allclose(forces, expected_forces, atol=1e-5 * scale)
        assert np.abs(forces.sum(axis=0)).max() < 1e-5 * scale


@pytest.mark.parametrize("within", [True, False])
def test_float64_decides_at_the_cutoff(within: bool) -> None:
    """Two atoms as far apart as the cutoff but for 1e-9 of it: float32 has some within that are beyond, and others.

    The student's filters don't end at zero there.
    """
    config = SMALL["student"]
    fused, exact = fused_potential(config, ROUTES[-1]), Potential(random_params(config), config, dtype="float64")
    directions = np.random.default_rng(0).normal(size=(2000, 3))
    directions *= config.cutoff / np.linalg.norm(directions, axis=1)[:, None]
    apart = directions * (1 - 1e-9 if within else 1 + 1e-9)
    rounded = np.sqrt(np.sum(apart.astype(np.float32) ** 2, axis=1))
    beyond = np.flatnonzero(rounded > config.cutoff)
    assert len(beyond) > 20
    alone = exact.energy_and_forces([6, 8], [[0, 0, 0], [2 * config.cutoff, 0, 0]])[0]
    for vector in [*apart[beyond[:9]], *apart[:9]]:
        structure = [6, 8], np.stack([np.zeros(3), vector])
        energy = exact.energy_and_forces(*structure)[0]
        assert (abs(energy - alone) > 1e-3) == within
        np.testing.assert_allclose(fused.energy_and_forces(*structure)[0], energy, atol=1e-5)


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
@pytest.mark.parametrize("listed", [False, True])
def test_jax_md_energies_first_and_second_order(listed: bool) -> None:
    """jax.grad and jacrev(grad) of the jax-md energies, whose transposed gathers rely on antisymmetric gradients."""
    with jax.numpy_dtype_promotion("standard"):
        from jax_md import space

    config = CONFIGS["painn"]
    potential, exact = fused_potential(config, ROUTES[-1]), Potential(random_params(config), config, dtype="float64")
    numbers, positions = random_structure(6, closest=1.1)
    displacement, _ = space.free()

    def energy_of(potential: Potential) -> Any:
        if not listed:
            return interop.jax_md.energy(potential, numbers, displacement)
        neighbor_fn, energy = interop.jax_md.energy_neighbor_list(
            displacement, 20.0, potential, numbers, disable_cell_list=True
        )
        neighbors = neighbor_fn.allocate(jnp.asarray(positions))
        return lambda r: energy(r, neighbor=neighbors)

    def orders(potential: Potential) -> Any:
        energy = energy_of(potential)
        r = jnp.asarray(positions, potential.dtype)
        return jax.jit(lambda r: (energy(r), jax.grad(energy)(r), jax.jacrev(jax.grad(energy))(r)))(r)

    with jax.numpy_dtype_promotion("standard"):
        results = orders(potential), orders(exact)
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-4 * max(1, np.abs(expected).max()), rtol=0)


def test_choice_of_engine() -> None:
    params = random_params(STUDENT)
    assert Potential(params, STUDENT).engine == "fused"
    assert Potential(params, STUDENT, filters="exact").engine == "xla"
    assert Potential(params, STUDENT, dtype="float64").engine == "xla"
    with pytest.warns(UserWarning, match="float32"):
        Potential(params, STUDENT, dtype="float64", engine="fused")
    with pytest.warns(UserWarning, match="tabulated filters"):
        Potential(params, STUDENT, engine="fused", filters="exact")
    with pytest.raises(ConfigError, match="magic"):
        Potential(params, STUDENT, filters="magic")


@pytest.mark.skipif(GPU, reason="Numba's kernels run on a CPU")
@pytest.mark.parametrize("setting", ["missing", "switched off"])
def test_without_numba(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA serves; where the kernels were asked for, a warning says why they don't."""
    if setting == "missing":
        monkeypatch.setitem(sys.modules, "jaxff.kernels.native", None)
        monkeypatch.delattr(kernels, "native", raising=False)
    else:
        monkeypatch.setattr("numba.config.DISABLE_JIT", True)
    params = random_params(STUDENT)
    assert Potential(params, STUDENT).engine == "xla"
    with pytest.warns(UserWarning, match="the fused engine is not used: .*native|.*NUMBA_DISABLE_JIT"):
        assert Potential(params, STUDENT, engine="fused").engine == "xla"


@pytest.mark.skipif(GPU, reason="Numba's kernels run on a CPU")
@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="needs a user who may not write everywhere")
def test_without_a_folder_for_numbas_cache(tmp_path: Path) -> None:
    """Compiled anew, then."""
    code = "import jaxff; p = jaxff.load_potential('organic-small'); print(p.engine, p.energy([8, 1, 1], np.eye(3)))"
    environment = {**os.environ, "HOME": str(tmp_path / "none"), "NUMBA_CACHE_DIR": "/proc"}
    command = [sys.executable, "-c", f"import numpy as np; {code}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("fused")


def test_first_calls_from_several_threads() -> None:
    """XLA refuses a name that is registered twice. A process of its own: here the kernels are known already."""
    code = """
import threading
from concurrent.futures import ThreadPoolExecutor
import jaxff
together = threading.Barrier(4)
potential = jaxff.load_potential("organic-small")
def call(k):
    together.wait()
    return potential.energy([1] * 2 * k, [[2 * i, 0, 0] for i in range(2 * k)])
with ThreadPoolExecutor(4) as pool:
    print(potential.engine, len(list(pool.map(call, range(1, 5)))))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["fused", "4"], result.stderr


@pytest.mark.parametrize(("name", "route"), NAMES_ROUTES)
def test_a_batch_of_molecules(name: str, route: Any) -> None:
    """vmap, which takes other kernels, in a compiled loop as in a simulation, gives what each molecule gives."""
    with jax.numpy_dtype_promotion("standard"):
        from jax_md import space

    potential = fused_potential(CONFIGS[name], route)
    numbers, positions = random_structure(5, closest=1.1)
    energy = interop.jax_md.energy(potential, numbers, space.free()[0])
    molecules = jnp.asarray([positions, 1.1 * positions], jnp.float32)

    def descend(r: Any) -> Any:
        return jax.lax.fori_loop(0, 2, lambda _, x: x - 1e-3 * jax.grad(energy)(x), r)

    with jax.numpy_dtype_promotion("standard"):
        batch, single = jax.jit(jax.vmap(descend))(molecules), [jax.jit(descend)(r) for r in molecules]
    np.testing.assert_allclose(batch, np.stack(single), atol=1e-5)


def test_the_same_bits_again_and_again() -> None:
    """Also where XLA puts arrays without rows anywhere: loops that ask whether arrays overlap sum in another order."""
    config = STUDENT.model_copy(update={"hidden_dim": 128})
    potential, structure = Potential(random_params(config), config, engine="fused"), random_structure(9, closest=1.1)
    results = {potential.evaluate(*structure)[1].tobytes() for _ in range(3000)}
    assert len(results) == 1
