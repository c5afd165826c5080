"""Pickles that try to act: refused by name, and the marker file that each would make isn't there."""

import functools
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxff.convert import convert, inspect_source, read_student
from jaxff.convert.allowlist import resolve
from jaxff.errors import CheckpointError, HostileCheckpointError
from jaxff.loading import load_potential
from tests.torch_student import legacy_of_pickle, random_tensors, rezip, unzip, with_entry, write_student, zip_of_pickle


class Reduced:
    """Pickles as a call of `function`."""

    def __init__(self, function: object, *args: object):
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def command(marker: Path) -> str:
    return f"touch {marker}"


def code(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


def dumped(function: object, *args: object, protocol: int = 2) -> bytes:
    return pickle.dumps(Reduced(function, *args), protocol)


def stack_global(module: str, name: str, argument: str) -> bytes:
    """The names come from the memo, in parts of the pickle far from their use."""
    stored = text(name) + b"\x940" + text(module) + b"\x940"
    return b"\x80\x04" + stored + b"h\x01h\x00\x93" + text(argument) + b"\x85R."


def nested(marker: Path) -> bytes:
    inner = dumped(os.system, command(marker))
    return b"ctorch.storage\n_load_from_bytes\nB" + len(inner).to_bytes(4, "little") + inner + b"\x85R."


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "os.system": (lambda m: dumped(os.system, command(m)), "system"),
    "os.system, protocol 4": (lambda m: dumped(os.system, command(m), protocol=4), "system"),
    "os.system, by its name": (lambda m: b"cos\nsystem\n" + text(command(m)) + b"\x85R.", "os.system"),
    "nt.system": (lambda m: b"cnt\nsystem\n" + text(command(m)) + b"\x85R.", "nt.system"),
    "exec": (lambda m: dumped(exec, code(m)), "builtins.exec"),
    "exec, protocol 4": (lambda m: dumped(exec, code(m), protocol=4), "builtins.exec"),
    "eval of Python 2": (lambda m: b"c__builtin__\neval\n" + text(code(m)) + b"\x85R.", "builtins.eval"),
    "compile": (lambda m: dumped(compile, code(m), "x", "exec"), "builtins.compile"),
    "open": (lambda m: dumped(open, str(m), "w"), "open"),
    "getattr": (lambda m: dumped(getattr, "x", "join"), "builtins.getattr"),
    "__import__": (lambda m: dumped(__import__, "os"), "builtins.__import__"),
    "import_module": (lambda m: b"cimportlib\nimport_module\n" + text("os") + b"\x85R.", "importlib.import_module"),
    "Popen": (lambda m: b"csubprocess\nPopen\n((" + text("touch") + text(str(m)) + b"ltR.", "subprocess.Popen"),
    "INST": (lambda m: b"(" + text(command(m)) + b"ios\nsystem\n.", "os.system"),
    "OBJ": (lambda m: b"(cos\nsystem\n" + text(command(m)) + b"o.", "os.system"),
    "NEWOBJ": (lambda m: b"csubprocess\nPopen\n" + text(command(m)) + b"\x85\x81.", "subprocess.Popen"),
    "memoised names": (lambda m: stack_global("os", "system", command(m)), "os.system"),
    "dotted name": (lambda m: stack_global("torch", "serialization.os.system", command(m)), "os.system"),
    "dotted class": (lambda m: stack_global("builtins", "object.__subclasses__", ""), "__subclasses__"),
    "through a wrapper": (lambda m: stack_global("my_package.tools", "os.system", command(m)), "os.system"),
    "partial": (lambda m: pickle.dumps(functools.partial(os.system, command(m)), 2), "system"),
    "reduce": (lambda m: b"cfunctools\nreduce\n).", "functools.reduce"),
    "attrgetter": (lambda m: b"coperator\nattrgetter\n" + text("system") + b"\x85R.", "operator.attrgetter"),
    "nested pickle": (nested, "torch.storage._load_from_bytes"),
    "pickle.loads": (lambda m: b"cpickle\nloads\nC\x02N.\x85R.", "pickle.loads"),
    "_pickle.loads": (lambda m: b"c_pickle\nloads\nC\x02N.\x85R.", "_pickle.loads"),
    "torch.load": (lambda m: b"ctorch\nload\n" + text(str(m)) + b"\x85R.", "torch.load"),
    "torch.hub": (lambda m: b"ctorch.hub\nload\n" + text(str(m)) + b"\x85R.", "torch.hub.load"),
    "reduce_graph_module": (lambda m: b"ctorch.fx.graph_module\nreduce_graph_module\n).", "reduce_graph_module"),
    "runstring": (lambda m: b"cnumpy.testing._private.utils\nrunstring\n).", "runstring"),
    "runpy": (lambda m: b"crunpy\nrun_path\n" + text(str(m)) + b"\x85R.", "runpy.run_path"),
    "socket": (lambda m: b"csocket\nsocket\n)R.", "socket.socket"),
    "shutil": (lambda m: b"cshutil\nrmtree\n" + text(str(m)) + b"\x85R.", "shutil.rmtree"),
    "ctypes": (lambda m: b"cctypes\nCDLL\n" + text("libc.so.6") + b"\x85R.", "ctypes.CDLL"),
    "sys": (lambda m: b"csys\nexit\n)R.", "sys.exit"),
    "code object": (lambda m: b"ctypes\nCodeType\n)R.", "types.CodeType"),
    "webbrowser": (lambda m: b"cwebbrowser\nopen\n" + text("x") + b"\x85R.", "webbrowser.open"),
    "asyncio": (lambda m: b"casyncio\ncreate_subprocess_shell\n)R.", "asyncio.create_subprocess_shell"),
    "print": (lambda m: b"cbuiltins\nprint\n)R.", "builtins.print"),
    "vars": (lambda m: b"cbuiltins\nvars\n)R.", "builtins.vars"),
    "only mentioned": (lambda m: b"cos\nsystem\n0N.", "os.system"),
}


def refused(path: Path, marker: Path, name: str) -> None:
    target = path.with_name("out.safetensors")
    for use in (lambda: convert(path, target), lambda: load_potential(path), lambda: inspect_source(path)):
        with pytest.raises(HostileCheckpointError) as caught:
            use()
        assert name in str(caught.value)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert not target.exists()


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_pickles(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    make, asked = HOSTILE[name]
    body = make(marker)
    path = tmp_path / "x.pt"
    refused(zip_of_pickle(path, body), marker, asked)
    refused(legacy_of_pickle(path, body), marker, asked)
    path.write_bytes(body)  # a plain pickle, of whatever protocol
    refused(path, marker, asked)


def test_the_same_pickles_act_when_run(tmp_path: Path) -> None:
    """The examples are real: run by pickle itself, the marker appears."""
    for name in ("os.system", "exec", "open", "INST", "OBJ", "memoised names"):
        marker = tmp_path / name.replace(" ", "")
        made = pickle.loads(HOSTILE[name][0](marker))
        if name == "open":
            made.close()
        assert marker.exists(), name


def test_hostile_entry_in_a_good_checkpoint(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    evil = b"cos\nsystem\n" + text(command(marker)) + b"\x85R"
    refused(with_entry(tmp_path / "x.pt", "optimizer", evil), marker, "os.system")
    refused(with_entry(tmp_path / "x.pt", "deep", b"](}" + text("a") + evil + b"sle"), marker, "os.system")


def test_other_members_are_not_read(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    members = unzip(write_student(tmp_path / "x.pt").read_bytes())
    members["archive/extra.pkl"] = dumped(os.system, command(marker))
    members["archive/code/__torch__.py"] = code(marker).encode()
    members["archive/data/99"] = dumped(os.system, command(marker))
    params, _, _ = read_student(rezip(tmp_path / "x.pt", members))
    assert (params["embedding"]["table"] == random_tensors()["embedding.weight"]).all()
    assert not marker.exists()


def test_other_classes_are_inert(tmp_path: Path) -> None:
    path = with_entry(
        tmp_path / "x.pt", "trainer", b"cthis_module.isnt_there\nTrainer\n)\x81}" + text("a") + b"K\x01sb"
    )
    params, _, notes = read_student(path)
    assert (params["embedding"]["table"] == random_tensors()["embedding.weight"]).all()
    assert notes == ["objects of other modules were ignored: this_module.isnt_there.Trainer"]


@pytest.mark.parametrize(
    "opcodes",
    [
        *(b"\x82\x01", b"Pfile\n", b"\x97", b"\x98", b"R", b"b", b"t", b"s", b"0", b"2", b"\x93", b"N\x85R"),
        *(b"K\x01K\x02a", b"K\x01K\x02b", b"h\x07", b"NQ", b"(K\x01u", b"\x80\x63", b"cos system\n", b"c\n\n"),
        *(b"NN\x93", b"\xff", b")NR"),
    ],
)
def test_nonsense_pickles(tmp_path: Path, opcodes: bytes) -> None:
    for write in (zip_of_pickle, legacy_of_pickle):
        with pytest.raises(CheckpointError, match="damaged"):
            read_student(write(tmp_path / "x.pt", opcodes + b"."))


def test_names_that_a_real_trainer_uses_are_no_offence() -> None:
    for name in (
        "collections.OrderedDict", "pathlib.PosixPath", "argparse.Namespace", "datetime.datetime", "enum.Enum",
        "torch.nn.modules.linear.Linear", "torch.nn.functional.silu", "torch.optim.adamw.AdamW", "numpy.float64",
        "numpy._core.multiarray.scalar", "mlff_distiller.training.config.TrainingConfig", "__main__.Config",
        "torch.optim.lr_scheduler.LambdaLR", "types.SimpleNamespace", "logging.Logger", "omegaconf.DictConfig",
        "uuid.UUID", "builtins.ValueError", "torch.tanh", "typing.Any", "collections.Counter",
        "functools.partial", "numpy.random._pickle.__randomstate_ctor", "torch.bfloat16",
    ):  # fmt: skip
        resolve("x.pt", *name.rsplit(".", 1))
