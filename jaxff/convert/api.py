"""What the converter does for a user: read, convert, write back, look inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxff.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from jaxff.config import StudentConfig
from jaxff.convert.archive import open_archive
from jaxff.convert.layouts import Student, find_student
from jaxff.convert.names import from_tree, to_tree
from jaxff.convert.torch_writer import torch_archive
from jaxff.errors import CheckpointError
from jaxff.files import atomic_write

NATIVE = ".safetensors"


def convert(src: str | Path, dst: str | Path, *, certify: bool = True, to_torch: bool = False) -> Checkpoint:
    """Converts a PyTorch checkpoint of the student, in any layout, into jaxff's file; returns what was written.

    Nothing in `src` is run, and PyTorch isn't needed. `certify` compares the result with an independent float64
    implementation (and with PyTorch, where it is installed) and measures the model's defects; both are stored in the
    file's certificate. `to_torch` goes the other way: from jaxff's file to a checkpoint in the class's own layout.

    Raises CheckpointError, with nothing written, where `src` can't be used; HostileCheckpointError where its pickle
    asks for something that acts.
    """
    if to_torch:
        return write_torch(src, dst)
    _check_paths(src, dst)
    if Path(dst).suffix.lower() != NATIVE:
        raise CheckpointError(f"{dst}: expected the name of a {NATIVE} file to write")
    if Path(src).suffix.lower() == NATIVE:
        raise CheckpointError(f"{src}: expected a PyTorch checkpoint, received a {NATIVE} file")
    student = _student(src)
    certificate = None
    if certify:
        from jaxff.convert.certificate import certify as make_certificate

        certificate = make_certificate(src, student.tensors, student.config, student.layout, student.notes)
    checkpoint = Checkpoint(to_tree(student.tensors), student.config, certificate)
    _written(dst, lambda: save_checkpoint(dst, checkpoint.params, checkpoint.config, certificate))
    return checkpoint


def read_student(path: str | Path) -> tuple[dict[str, Any], StudentConfig, list[str]]:
    """(parameter tree, configuration, notes) of a PyTorch checkpoint, in memory. Raises CheckpointError."""
    student = _student(path)
    return to_tree(student.tensors), student.config, student.notes


def write_torch(src: str | Path, dst: str | Path) -> Checkpoint:
    """Writes the student in jaxff's file `src` as a checkpoint in the class's own save layout.

    {model_state_dict, config, num_parameters}, readable by torch.load(weights_only=True); every tensor keeps its bits,
    its dtype and its name. PyTorch isn't needed. Raises CheckpointError, for `painn` too, which has no such class.
    """
    _check_paths(src, dst)
    if Path(dst).suffix.lower() == NATIVE:
        raise CheckpointError(f"{dst}: expected the name of a PyTorch file (.pt) to write")
    checkpoint = load_checkpoint(src)
    config = checkpoint.config
    if not isinstance(config, StudentConfig):
        raise CheckpointError(
            f"{src}: only the student can be written for PyTorch; this is the architecture {config.architecture}"
        )
    data = torch_archive(from_tree(checkpoint.params, config), config)
    _written(dst, lambda: _write(dst, data))
    return checkpoint


def inspect_source(path: str | Path) -> dict[str, Any]:
    """What a PyTorch checkpoint holds, without converting it. Raises CheckpointError.

    Keys: architecture, config (dict), elements (largest and smallest atomic number with an embedding row, as text),
    parameters (their number), layout, notes, tensors_sha256.
    """
    from jaxff.convert.certificate import tensors_hash

    student = _student(path)
    return {
        "architecture": student.config.architecture,
        "config": student.config.model_dump(mode="json"),
        "elements": f"1 to {student.config.max_z} (rows of the embedding)",
        "parameters": sum(array.size for array in student.tensors.values()),
        "layout": student.layout,
        "notes": student.notes,
        "tensors_sha256": tensors_hash(student.tensors, student.config),
    }


def _student(path: str | Path) -> Student:
    return find_student(str(path), open_archive(path))


def _check_paths(src: str | Path, dst: str | Path) -> None:
    source, target = Path(src), Path(dst)
    if not source.exists():
        raise CheckpointError(f"{source}: no such file")
    if target.exists() and target.samefile(source):
        raise CheckpointError(f"{target}: expected another file to write than the one to read")
    if target.is_dir():
        raise CheckpointError(f"{target}: expected a file to write, this is a folder")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target}: cannot be written: the folder {target.parent} does not exist")


def _write(dst: str | Path, data: bytes) -> None:
    with atomic_write(dst) as temporary:
        temporary.write_bytes(data)


def _written(dst: str | Path, write: Any) -> None:
    try:
        write()
    except OSError as error:
        raise CheckpointError(f"{dst}: cannot be written ({error.strerror or error})") from None
