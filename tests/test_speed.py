"""The benchmarks of experiments/speed in small: every kind of row, parts of a step, pictures, and what goes wrong."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxff import kernels, models
from jaxff.config import PainnConfig, StudentConfig
from jaxff.kernels.cuda import engine, launch, one, several, tiles
from jaxff.potential import Potential

pytestmark = pytest.mark.usefixtures("compile_quickly")
FOLDER = Path(__file__).parents[1] / "experiments" / "speed"
SCRIPTS = (
    "results",
    "children",
    "systems",
    "rows",
    "sizes",
    "first_step",
    "plot",
    "breakdown",
    "run",
    "registers",
    "fusions",
    "stages",
    "counters",
    "tune",
    "check",
    "rounding",
    "variants",
)
SMALL = {"hidden_dim": 16, "num_interactions": 2, "num_rbf": 6}


@pytest.fixture(scope="module")
def speed() -> Iterator[SimpleNamespace]:
    """The scripts, with small models and few turns, under JAX's own settings; other studies have a run, too."""
    before = {name: sys.modules.pop(name, None) for name in SCRIPTS}
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        patch.syspath_prepend(str(FOLDER))
        scripts = SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
        configs = {"student": StudentConfig(**SMALL), "painn": PainnConfig(**SMALL)}
        patch.setattr(scripts.rows, "CONFIGS", configs)
        for module in (scripts.sizes, scripts.breakdown):
            patch.setattr(module, "steps_for", lambda atoms: 2)
            patch.setattr(module, "CALLS", 2)
        yield scripts
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def run_script(module: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    module.main()


def test_a_run_writes_rows_and_picture(
    speed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows in other processes first; one that runs out of memory and one that fails say so and don't end the run."""
    rows = ["size-3:painn:xla-exact", "size-130:painn:autodiff", "energy-3:painn:xla-exact"]
    rows += ["vjp-3:painn:xla-exact", "nve-3:painn:xla-exact", "large:painn:xla-exact", "size-4:student:torch"]

    def large(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    def nve(*_: Any) -> None:
        raise ValueError("first\nlast line")

    monkeypatch.setattr(speed.run, "CPU_ROWS", rows)
    monkeypatch.setattr(speed.run, "large", large)
    monkeypatch.setattr(speed.run, "nve", nve)
    monkeypatch.setattr(speed.run, "torch_is_installed", lambda: True)
    in_child = {"median_us": 5.0, "fastest_us": 4.0, "slowest_us": 6.0}
    monkeypatch.setattr(speed.run, "measure_in_child", lambda *arguments: in_child | {"asked": list(arguments)})
    run_script(speed.run, monkeypatch, "-o", tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    measured = report["rows"]
    assert list(measured) == [rows[-1], *rows[:-1]]
    assert measured[rows[-1]]["asked"] == ["torch_rows.py", "eager", 4]
    assert measured["large:painn:xla-exact"] == {"error": "out of memory"}
    assert measured["nve-3:painn:xla-exact"] == {"error": "last line"}
    for name in rows[:2]:
        row = measured[name]
        assert row["finite"], name
        assert row["fastest_us"] <= row["median_us"] <= row["slowest_us"]
        assert row["compile_s"] > 0
    for name, (more, less) in {
        rows[2]: ("energy_and_forces", "energy"),
        rows[3]: ("autodiff", "explicit"),
    }.items():
        row = measured[name]
        assert row["time_ratio"] == row[more]["median_us"] / row[less]["median_us"]
        assert row["memory_ratio"] == row[more]["temporaries_MB"] / row[less]["temporaries_MB"]
    assert report["versions"]["jax"] == jax.__version__
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "[7/7" in capsys.readouterr().out


def test_rows_come_in_the_order_asked_for(speed: SimpleNamespace) -> None:
    names = speed.run.chosen(True, ["vjp-21", "nve-21:painn", "compile"], None)
    assert [name.partition("-")[0] for name in names] == ["compile"] * 3 + ["vjp"] * 4 + ["nve"] * 4
    assert speed.run.chosen(True, ["size-9:"], ["fused"]) == ["size-9:student:fused", "size-9:painn:fused"]


def test_each_limit_is_compared_with_the_others_as_they_are(
    speed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first value of each is what the library has."""
    limits = {name: getattr(kernels, name) for name in speed.tune.LIMITS}
    assert limits == {name: values[0] for name, (_, values) in speed.tune.LIMITS.items()}
    seen = []
    monkeypatch.setattr(speed.tune, "size", lambda *_: seen.append([getattr(kernels, name) for name in limits]))
    for name, value in limits.items():
        monkeypatch.setattr(kernels, name, value)  # so that it is as before in the end
    run_script(speed.tune, monkeypatch, "-o", tmp_path / "out.json", "--limits", "size-96:painn", "size-2000:painn")
    assert seen == [[128, 1024], [64, 1024], [128, 1024], [128, 2048]]


def test_seconds_bound_a_run(speed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed.run, "attempt", lambda name: {"error": name})
    run_script(speed.run, monkeypatch, "-o", tmp_path / "out.json", "--only", "vjp", "--seconds", -1)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("run", ["-o", "out.json", "--only", "size-4"], "received 'size-4'"),
        ("run", ["-o", "out.json", "--engines", "fast"], "received 'fast'"),
        ("run", ["-o", "out.json", "--only", "batch-16"], "can be measured on this device"),
        ("run", ["-o", "nowhere/out.json"], "can't be written"),
        ("run", ["-o", "."], "received the folder"),
        ("breakdown", ["-o", "out.json", "painn:autodiff:21"], "received 'painn:autodiff:21'"),
        ("breakdown", ["-o", "out.json", "painn:xla-exact:one"], "received 'painn:xla-exact:one'"),
        ("fusions", ["-o", "out.json", "painn:21"], "received painn:21"),
        ("tune", ["-o", "out.json", "--limits", "size-7"], "received 'size-7'"),
        ("plot", ["-o", "out.png", "missing.json"], "expected a result file"),
        ("plot", ["-o", "out.png", "empty.json"], "found none"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    speed: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    script: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit) as ending:
        run_script(getattr(speed, script), monkeypatch, *arguments)
    assert ending.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_explicit_rules_and_autodiff_see_the_same_energy(speed: SimpleNamespace) -> None:
    p = speed.rows.problem(130)

    def evaluated(engine: str) -> Any:
        return jax.jit(jax.value_and_grad(p.energy("painn", engine)))(p.positions, p.pairs)

    (energy, gradient), (plain_energy, plain_gradient) = evaluated("xla-exact"), evaluated("autodiff")
    np.testing.assert_allclose(energy, plain_energy, rtol=1e-5)
    np.testing.assert_allclose(gradient, plain_gradient, atol=2e-5 * np.abs(gradient).max())
    assert np.abs(gradient).max() > 0


def test_a_box_has_all_its_pairs_once_in_both_directions(speed: SimpleNamespace) -> None:
    b = speed.systems.box(130)
    assert b.positions.shape == (130, 3)
    vectors = b.positions[b.senders] - b.positions[b.receivers] + b.shifts
    assert np.linalg.norm(vectors, axis=1).max() <= 5.0
    images = b.side * np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), -1).reshape(-1, 1, 1, 3)
    distances = np.linalg.norm(b.positions[:, None] - b.positions[None] + images, axis=-1)
    assert len(b.senders) == (distances <= 5.0).sum() - 130
    pairs = set(zip(b.senders, b.receivers, strict=True))
    assert {(j, i) for i, j in pairs} == pairs


@pytest.mark.parametrize("architecture", ["student", "painn"])
@pytest.mark.parametrize("engine", ["xla-exact", "fused"])
def test_parts_of_a_step(
    speed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, architecture: str, engine: str
) -> None:
    """Both directions of all parts are found; none depends on what a step doesn't use."""
    if engine == "fused":
        model = Potential(speed.rows.potential(architecture, "xla-table").params, speed.rows.CONFIGS[architecture])
        model._fused = kernels.prepare(speed.rows.potential(architecture, "xla-table")._tree, model.config)
        monkeypatch.setattr(speed.breakdown, "potential", lambda *_: model)
    parts = speed.breakdown.traced_parts(architecture, engine, speed.rows.problem(3))
    names = " ".join(part.name for part in parts)
    for what in ("pairs", "filters", "message", "update", "readout", "message, backward", "update, backward"):
        assert set(what.split(", ")) <= set(names.replace(",", "").split())
    interactions = sum(part.count for part in parts if "message" in part.name and "backward" not in part.name)
    assert interactions == SMALL["num_interactions"]
    assert sum(part.count for part in parts if part.name.startswith("message") and "backward" in part.name) == 2
    for part in parts:
        assert part.kept, part.name
        assert all(isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) for x in part.arrays)


def test_stages(
    speed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda_kernels_run_here: None
) -> None:
    """Clocks of the three kernels that do all of a molecule, or of several: each block is always in some stage."""
    made = {}
    for name, width in (("student", 64), ("painn", 32)):
        config = speed.rows.CONFIGS[name].model_copy(update={"hidden_dim": width})
        plain = Potential(models.init_params(config, jax.random.key(0)), config, engine="fused")._fused.plain
        made[name] = SimpleNamespace(config=config, engine="fused", _fused=kernels.prepare(plain, config, cuda=True))
    monkeypatch.setattr(speed.stages, "potential", lambda name, engine: made[name])
    monkeypatch.setattr(speed.stages, "LAUNCHES", 1)
    for module in (one, several):
        monkeypatch.setattr(module, "multiprocessors", lambda: 12)  # three groups of atoms, or six
    monkeypatch.setattr(launch, "most_shared", lambda: 227 * 1024)
    rows = {"painn:4": 8, "student:7": 12, "painn:2x3": 4}
    run_script(speed.stages, monkeypatch, *rows, "-o", tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["stages"]
    assert (tmp_path / "out.png").exists()
    for row, blocks in rows.items():
        parts = report[row]["stages"]
        assert report[row]["blocks"] == blocks
        assert {"pairs", "message", "update", "readout", "message, backward", "pairs, backward"} <= set(parts)
        assert ("gate" in parts and "vectors, backward" in parts) == row.startswith("painn")
        np.testing.assert_allclose(sum(part["mean"] for part in parts.values()), report[row]["cycles"])
        assert all(part["fewest"] > 0 for part in parts.values())
    with pytest.raises(SystemExit, match="2"):
        run_script(speed.stages, monkeypatch, "student:2x3", "-o", tmp_path / "none.json")


LOG = """==PROF== Connected to process 1
"ID","Kernel Name","Block Size","Grid Size","gpu__time_duration.sum","lts__t_bytes.sum","{issue}"
"","","","","ns","byte","%"
"0","message","(512, 1, 1)","(132, 1, 1)","247,328","1707080864","47.2"
"1","join","(1024, 1, 1)","(131, 1, 1)","4128","8495904","16.9"
"""


def test_counters(speed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    log, out = tmp_path / "log.csv", tmp_path / "out.json"
    log.write_text(LOG.format(issue=speed.counters.METRICS["issue_slots_percent"][0]), encoding="utf-8")
    run_script(speed.counters, monkeypatch, "painn:10648", "--read", log, "-o", out)
    message, join = json.loads(out.read_text(encoding="utf-8"))["kernels"]["painn:10648"]
    assert message == {
        "kernel": "message",
        "blocks": 132,
        "us": pytest.approx(247.328),
        "MB_through_L2": pytest.approx(1707.080864),
        "issue_slots_percent": 47.2,
    }
    assert join["blocks"] == 131
    assert "painn:10648: 251 us in 2 kernels" in capsys.readouterr().out
    log.write_text("==PROF== nothing\n", encoding="utf-8")
    monkeypatch.setenv("PATH", "")
    for arguments in (["--read", log], ["--read", tmp_path / "none.csv"], []):
        with pytest.raises(SystemExit, match="2"):
            run_script(speed.counters, monkeypatch, "painn:10648", *arguments)


def test_breakdown(speed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The parts and the rest are the step; the picture is there."""
    run_script(speed.breakdown, monkeypatch, "student:xla-exact:3", "-o", tmp_path / "out.json")
    (one,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["breakdowns"].values()
    assert list(one["parts"])[:5] == ["pairs", "filters", "message", "update", "readout"]
    assert list(one["parts"])[-1] == "integrator"
    total = sum(part["median_us"] for part in one["parts"].values())
    np.testing.assert_allclose(total + one["rest_us"], one["step_us"])
    assert (tmp_path / "out.png").exists()


def test_a_loop_makes_every_result_in_every_turn(speed: SimpleNamespace) -> None:
    """Work is neither hoisted out of the loop nor left out, and the arguments move no bit."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)
    once = lambda arrays: [arrays[0] @ arrays[0], arrays[1] + 1]  # noqa: E731
    compiled = jax.jit(lambda arrays: speed.breakdown.looped(once, 2, 5, arrays)).lower([x, jnp.arange(3)]).compile()
    for product, numbers in compiled([x, jnp.arange(3)]):
        np.testing.assert_allclose(product, x @ x, rtol=1e-6)
        np.testing.assert_array_equal(numbers, [1, 2, 3])
    entry = compiled.as_text().partition("ENTRY")[2]
    assert "while(" in entry
    assert "dot(" not in entry


def test_first_steps_run_without_and_with_a_cache(speed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    found = speed.first_step.measure("painn", "xla-exact", 3)
    assert all(seconds > 0 for seconds in found.values())
    assert found["compile_s"] < found["first_step_s"]
    asked = []

    def child(*_: Any, env: dict[str, str]) -> dict[str, float]:
        asked.append(env.get("JAX_COMPILATION_CACHE_DIR"))
        return {"first_step_s": 1.0}

    monkeypatch.setattr(speed.first_step, "measure_in_child", child)
    assert list(speed.first_step.measure_row("painn", "xla-exact", 3)) == ["cold", "filling", "warm", "atoms"]
    assert asked[0] is None
    assert asked[1] == asked[2] is not None
    monkeypatch.setattr(speed.first_step, "measure_in_child", lambda *_, env: {"error": "out of memory"})
    assert speed.first_step.measure_row("painn", "xla-exact", 3) == {"error": "cold: out of memory"}


def test_rounding(speed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Numbers as near as bits allow, with slope 1; messages of few bits change forces, while they are asked for."""
    rounding = speed.rounding
    x = jnp.array([1.0, 1 / 3, -2e-5, 0.0])
    assert (abs(rounding.rounded(x, 8) - x) <= 2.0**-8 * abs(x)).all()
    np.testing.assert_array_equal(jax.grad(lambda x: rounding.rounded(x, 8).sum())(x), 1)
    small, structures = speed.rows.potential("painn", "xla-exact"), speed.check.rattled_molecules()
    monkeypatch.setattr(rounding, "potential", lambda: small)
    with rounding.messages_of(None, (False, False)):
        expected = rounding.forces(structures)
    with rounding.messages_of(6, (True, True)):
        coarse = rounding.forces(structures)
    for got, forces, wanted in zip(rounding.forces(structures), coarse, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert 1e-6 < np.abs(forces - wanted).max() / np.abs(wanted).max() < 0.2
    tabulated = speed.rows.potential("painn", "xla-table")
    halves, plain = (rounding.forces(structures, x) for x in (rounding.with_halves(tabulated), tabulated))
    for got, wanted in zip(halves, plain, strict=True):
        assert 0 < np.abs(got - wanted).max() < 3e-6 * np.abs(wanted).max()
    monkeypatch.setattr(rounding, "BITS", (16,))
    monkeypatch.setattr(rounding.jaxff, "load_potential", lambda *_, **__: tabulated)
    monkeypatch.setattr(rounding, "drift", lambda potential, atoms, blocks: ({"steps": blocks}, atoms.positions))
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    monkeypatch.setattr(
        sys, "argv", ["rounding.py", "-o", str(tmp_path / "out.json"), "--frames", "0", "--blocks", "3"]
    )
    rounding.main()
    rows = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["rows"]
    of_bits = ["forces, xu, v to 16 bits", "nve, xu, v to 16 bits", "forces, xs, xu, v to 16 bits"]
    assert list(rows) == ["nve", "forces, filters of halves", *of_bits]


def test_variants(speed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """Sources and constants of a variant, while it is used; forces differ from the first one's by nothing, here."""
    variants, own = speed.variants, launch.read("pairs.cu")
    (tmp_path / "pairs.cu").write_text("other")
    variant = variants.parsed(f"{tmp_path},tiles.UNITS=4,engine.STAGES=5")
    before = tiles.UNITS, engine.STAGES
    with variants.using(variant):
        assert launch.read("pairs.cu", "join.cu") == f"other\n{launch.read('join.cu')}"
        assert (tiles.UNITS, engine.STAGES) == (4, 5)
    assert launch.read("pairs.cu") == own
    assert before == (tiles.UNITS, engine.STAGES)
    found = variants.race("painn", 3, {".": variants.parsed("."), "other": variant}, 2, False)
    for row in found.values():
        assert row["fastest_us"] <= row["median_us"]
        assert row["max_dF"] == 0
    broken = variants.Variant({}, {"tiles.NONE": 1})
    assert list(variants.race("painn", 3, {"broken": broken}, 2, False)["broken"]) == ["error"]
    out = tmp_path / "out.json"
    monkeypatch.setattr(variants, "device", lambda: (False, "cpu"))
    for arguments, message in (
        (["painn:3", "--variants", "."], "expected a GPU"),
        (["painn", "--variants", "."], "received painn"),
        (["painn:3", "--variants", f"{tmp_path}/nothing"], "a folder with .cu files"),
        (["painn:3", "--variants", ".,tiles.NAME=3"], "received tiles.NAME=3"),
        (["painn:3", "--variants", ".,UNITS=3"], "received UNITS=3"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_script(variants, monkeypatch, *arguments, "-o", out)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_child_that_fails_says_why(speed: SimpleNamespace) -> None:
    assert "No such file" in speed.children.measure_in_child("missing.py")["error"]
    assert "not done after" in speed.children.measure_in_child("first_step.py", timeout=0.01)["error"]


def test_pictures_take_rows_of_several_files(speed: SimpleNamespace, tmp_path: Path) -> None:
    row = {"median_us": 2.0, "fastest_us": 1.0, "slowest_us": 3.0}
    one = {"device": "A", "rows": {"size-9:student:fused": row, "nve-3:student:fused": row, "batch-3:painn:fused": row}}
    two = {"rows": {"size-9:student:fused": row | {"median_us": 2.5}, "size-3:painn:torch": {"error": "out of memory"}}}
    series = speed.plot.size_series([one, two])
    assert list(series) == [("student", "fused")]
    assert [(n, found["median_us"]) for n, found in series["student", "fused"]] == [(3, 2.0), (9, 2.5)]
    speed.plot.draw_sizes([one, two | {"device": "A"}], tmp_path / "out.png")
    assert (tmp_path / "out.png").exists()


def test_pytorch_with_fixed_edges_is_the_student(speed: SimpleNamespace) -> None:
    """Energy and gradient are those of the student as it ships; a step moves the atoms; without a GPU, rows say so."""
    torch = pytest.importorskip("torch")
    from jaxff.convert.torch_reference import torch_student

    torch_rows = importlib.import_module("torch_rows")
    torch.manual_seed(0)
    student = torch_student(StudentConfig(**SMALL)).double()
    model, positions = torch_rows.fixed_edges(student, 9, "cpu")
    positions.requires_grad_(True)
    numbers = torch.tensor(speed.systems.structure(9)[0], dtype=torch.int64)
    energies = [model(positions), student(numbers, positions)]
    gradients = [torch.autograd.grad(energy, positions)[0] for energy in energies]
    torch.testing.assert_close(*energies)
    torch.testing.assert_close(*gradients)
    before = positions.detach().clone()
    step, facts = torch_rows._step(model, positions, torch.zeros_like(positions), "cpu")
    step()
    assert facts["compile_s"] > 0
    torch.testing.assert_close(torch.sign(before - positions), torch.sign(gradients[0]))
    row = torch_rows.eager(torch_student(StudentConfig(**SMALL)), 130, "cpu")
    assert row["finite"]
    assert row["fastest_us"] <= row["median_us"] <= row["slowest_us"]


def test_registers(
    speed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernels of a step as Triton is to have them; without Triton, and of a wrong row, one line and code 2."""
    try:
        found = speed.registers.lowered("student", 5)
    except RuntimeError as error:  # some releases lower for a GPU only where one is
        pytest.skip(str(error))
    assert [kernel.name for kernel in found][-1] == "first_transpose"
    assert all("tt.func" in kernel.text for kernel in found)
    monkeypatch.setattr(speed.registers, "find_spec", lambda _: None)
    for row, message in (("student:5", "pip install triton"), ("student:many", "received student:many")):
        with pytest.raises(SystemExit) as stop:
            run_script(speed.registers, monkeypatch, row, "-o", tmp_path / "out.json")
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_kernels_of_a_module(speed: SimpleNamespace) -> None:
    """Of a loop's body alone, the longest, without what is no kernel."""
    text = """HloModule jit_block

%fused_add (p.0: f32[3,21]) -> f32[3,21] {
  %p.0 = f32[3,21]{1,0} parameter(0)
  ROOT %add.1 = f32[3,21]{1,0} add(%p.0, %p.0)
}

%short (arg.1: (s32[])) -> (s32[]) {
  %gte = s32[] get-tuple-element(%arg.1), index=0
  ROOT %loop_add_fusion.9 = (s32[]) fusion(%gte), kind=kLoop, calls=%fused_add
}

%region_0.23 (arg.2: (s32[], f32[3,21])) -> (s32[], f32[3,21]) {
  %arg.2 = (s32[], f32[3,21]{1,0}) parameter(0)
  %gte.1 = f32[3,21]{1,0} get-tuple-element(%arg.2), index=1
  %loop_add_fusion = f32[3,21]{1,0} fusion(%gte.1), metadata={op_name="jit(block)/jit(step_fn)/jvp()/add"}
  %bitcast.1 = f32[21,3]{0,1} bitcast(%loop_add_fusion)
  %jaxff_cuda.0 = (f32[21,128]{1,0}, f32[21,384]{1,0}) custom-call(%bitcast.1), custom_call_target="any"
  %while.2 = (s32[]) while(%gte.1), condition=%c, body=%short
  ROOT %tuple.1 = (s32[], f32[3,21]{1,0}) tuple(%gte.1, %loop_add_fusion)
}

ENTRY %main.1 (x: f32[3,21]) -> f32[3,21] {
  %copy.1 = f32[3,21]{1,0} copy(%x)
  ROOT %while.1 = (s32[], f32[3,21]{1,0}) while(%copy.1), condition=%c.1, body=%region_0.23
}
"""
    assert speed.fusions.kernels_of(text) == [
        {"name": "loop_add_fusion", "result": "f32[3,21]", "of": "jvp()/add"},
        {"name": "jaxff_cuda.0", "result": "(f32[21,128], f32[21,384])", "of": ""},
    ]
