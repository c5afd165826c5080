"""Which names a checkpoint's pickle may ask for.

Three answers: plain data and tensor machinery are understood; classes of other modules become inert records,
reported in a note; anything that acts (runs code, opens files, starts processes, reaches attributes) makes the
file hostile. Nothing is ever imported, so this list is about honesty, not about safety: a file that asks for
os.system is refused even though it would get nothing.
"""

from __future__ import annotations

import sys

from jaxff.convert.records import DTYPE_ALIASES, ITEM_SIZE, STORAGE_DTYPE, Global, printable
from jaxff.errors import CheckpointError, HostileCheckpointError

# pickle protocols 0 to 2 write Python 2's names
_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}

_BUILTINS = frozenset(
    {
        "set",
        "frozenset",
        "slice",
        "complex",
        "bytearray",
        "bytes",
        "dict",
        "list",
        "tuple",
        "int",
        "float",
        "str",
        "bool",
        "object",
        "range",
        "type",
        "NoneType",
        "Ellipsis",
        "NotImplemented",
        "long",
        "unicode",
        "basestring",
        "xrange",
    }
)

# standard library modules whose classes hold data (CamelCase names, and these)
_DATA_MODULES: dict[str, frozenset[str]] = {
    "collections": frozenset({"defaultdict", "deque"}),
    "collections.abc": frozenset(),
    "datetime": frozenset({"date", "datetime", "time", "timedelta", "timezone", "tzinfo"}),
    "decimal": frozenset(),
    "fractions": frozenset(),
    "uuid": frozenset(),
    "enum": frozenset(),
    "numbers": frozenset(),
    "types": frozenset(),
    "argparse": frozenset(),
    "pathlib": frozenset(),
    "pathlib._local": frozenset(),
    "copyreg": frozenset({"_reconstructor", "__newobj__", "__newobj_ex__"}),
    "_codecs": frozenset({"encode"}),
    "functools": frozenset({"partial"}),
    "itertools": frozenset({"count", "repeat", "cycle", "chain"}),
    "random": frozenset(),
    "logging": frozenset({"getLogger"}),
    "time": frozenset({"struct_time"}),
    "re": frozenset({"_compile"}),
    "typing": frozenset(),
    "dataclasses": frozenset(),
    "inspect": frozenset({"_empty"}),
    "ipaddress": frozenset(),
    "zoneinfo": frozenset({"ZoneInfo._unpickle"}),
    "array": frozenset({"array", "_array_reconstructor"}),
}
_NOT_DATA = frozenset(
    {"FunctionType", "CodeType", "LambdaType", "MethodType", "BuiltinFunctionType", "SystemRandom", "ModuleType"}
    | {"FileHandler", "FileType"}
)

_TENSOR_FUNCTIONS = frozenset(
    {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"}
    | {"_rebuild_parameter_with_state", "_rebuild_sparse_tensor", "_rebuild_meta_tensor_no_storage"}
    | {"_rebuild_qtensor", "_rebuild_wrapper_subclass", "_rebuild_nested_tensor", "_rebuild_sparse_csr_tensor"}
    | {"_rebuild_device_tensor_from_numpy", "_rebuild_device_tensor_from_cpu_tensor", "_set_obj_state"}
)
_PLAIN_TORCH: dict[str, frozenset[str]] = {
    "torch": frozenset({"device", "Size", "Tensor", "Generator"} | set(ITEM_SIZE) | set(DTYPE_ALIASES))
    | frozenset(STORAGE_DTYPE),
    "torch.cuda": frozenset(STORAGE_DTYPE),
    "torch.storage": frozenset(STORAGE_DTYPE),
    "torch._utils": _TENSOR_FUNCTIONS,
    "torch._tensor": frozenset({"_rebuild_from_type", "_rebuild_from_type_v2"}),
    "torch.nn.parameter": frozenset({"Parameter", "Buffer", "UninitializedParameter"}),
    "torch.serialization": frozenset({"_get_layout", "_get_memory_format"}),
    "torch.jit._pickle": frozenset({"build_intlist", "build_doublelist", "build_boollist", "build_tensorlist"})
    | frozenset({"restore_type_tag", "build_tensor_from_id"}),
}
_PURE_NAMES = frozenset(  # functions that a module may keep as its activation
    {"relu", "tanh", "sigmoid", "softplus", "exp", "log", "sin", "cos", "sqrt", "square", "abs", "selu", "celu", "erf"}
)
_PURE_TORCH = ("torch.nn.functional", "torch._C._nn", "torch.nn.init")  # functions of numbers

_NUMPY_MULTIARRAY = frozenset({"scalar", "_reconstruct"})
_NUMPY_PLAIN: dict[str, frozenset[str]] = {
    "numpy": frozenset({"ndarray", "dtype", "matrix", "bool", "bool_", "str_", "bytes_", "void", "datetime64"})
    | frozenset(f"{kind}{bits}" for kind in ("float", "int", "uint", "complex") for bits in (8, 16, 32, 64, 128)),
    "numpy.core.multiarray": _NUMPY_MULTIARRAY,
    "numpy._core.multiarray": _NUMPY_MULTIARRAY,
    "numpy.core.numeric": frozenset({"_frombuffer"}),
    "numpy._core.numeric": frozenset({"_frombuffer"}),
    "numpy.random._pickle": frozenset(
        {"__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor"}
    ),
}  # fmt: skip

# packages whose purpose is to run or load things, beside the standard library
_ACTING_PACKAGES = frozenset(
    {
        "commands",
        "cPickle",
        "popen2",
        "imp",
        "exceptions",
        "nt",
        "posix",
        "joblib",
        "dill",
        "cloudpickle",
        "pip",
        "setuptools",
        "pkg_resources",
        "six",
        "IPython",
        "distutils",
        "asyncore",
        "smtpd",
        "numba",
        "cffi",
        "pexpect",
        "paramiko",
        "fabric",
        "invoke",
        "ptyprocess",
    }
) | frozenset({"_posixsubprocess", "_winapi", "_io", "_ctypes", "_pickle", "_socket", "_imp", "_operator"})
_ACTING_PARTS = frozenset(
    {"os", "nt", "posix", "sys", "subprocess", "builtins", "__builtin__", "ctypes", "importlib", "runpy", "pty"}
)
_ACTING_NAMES = frozenset(
    {
        "eval",
        "exec",
        "execfile",
        "compile",
        "open",
        "getattr",
        "setattr",
        "delattr",
        "globals",
        "locals",
        "vars",
        "input",
        "breakpoint",
        "system",
        "popen",
        "import_module",
        "loads",
        "load",
        "load_module",
        "run_module",
        "run_path",
        "attrgetter",
        "itemgetter",
        "methodcaller",
        "apply",
        "Popen",
        "check_output",
        "check_call",
        "spawn",
        "fork",
        "call_function",
        "runstring",
        "rmtree",
        "unlink",
        "remove",
    }
)
_MACHINERY = frozenset({"torch", "numpy"})
_HARMLESS_DUNDERS = frozenset({"__main__", "__mp_main__", "__torch__", "__newobj__", "__newobj_ex__"})


def resolve(path: str, module: str, name: str) -> tuple[Global, bool]:
    """The inert global for `module.name`, and whether it is one that the reader knows.

    Raises HostileCheckpointError where the name acts, CheckpointError where it is no name at all.
    """
    module = _PYTHON2.get(module, module)
    if not module or not name or len(module) + len(name) > 1000:
        raise CheckpointError(f"{path}: damaged: its pickle refers to a class without a usable name")
    found = Global(module, name)
    if module == "__torch__" or module.startswith("__torch__."):
        return found, True
    if name in _plain_names(module):
        return found, True
    if _acts(module, name):
        raise HostileCheckpointError(
            f"{path}: hostile: its pickle asks for {printable(found.full_name)}, which acts; nothing in it was run"
        )
    root = module.partition(".")[0]
    return found, root in _MACHINERY or root in sys.stdlib_module_names


def _plain_names(module: str) -> frozenset[str]:
    if module == "builtins":
        return _BUILTINS
    return _PLAIN_TORCH.get(module) or _NUMPY_PLAIN.get(module) or _DATA_MODULES.get(module) or frozenset()


def _acts(module: str, name: str) -> bool:
    parts, names = module.split("."), name.split(".")
    root = parts[0]
    is_class = names[-1].lstrip("_")[:1].isupper()
    if module == "builtins":
        return not name.endswith(("Error", "Warning", "Exception"))
    if root in _ACTING_PACKAGES or _mentions_action(parts, names):
        return True
    if root in sys.stdlib_module_names:
        data_class = module in _DATA_MODULES and is_class and name not in _NOT_DATA
        return len(names) > 1 or not (data_class or module == "math")
    if root in _MACHINERY:
        pure = module in _PURE_TORCH or (module == root and name in _PURE_NAMES)
        return not (is_class or (pure and len(names) == 1))
    return False


def _mentions_action(parts: list[str], names: list[str]) -> bool:
    """Whether a part of a dotted name acts, or reaches behind the scenes: a name can be a walk over attributes."""
    every = {*parts, *names}
    hidden = any(p.startswith("__") and p.endswith("__") and p not in _HARMLESS_DUNDERS for p in every)
    return hidden or not every.isdisjoint(_ACTING_PARTS) or not _ACTING_NAMES.isdisjoint(names)
