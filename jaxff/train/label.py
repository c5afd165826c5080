"""Labels from a teacher: many structures, several processes, each label once, whatever kills the run in between."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxff import __version__
from jaxff.errors import DataError, LabelError, StructureError
from jaxff.system import check_neutral_singlet, check_structure
from jaxff.train.ase_files import iterate_atoms, molecule_of
from jaxff.train.data import find_files, with_formulas
from jaxff.train.frames import Frame, Frames
from jaxff.train.hdf5 import SUFFIXES, read_hdf5, read_metadata, write_hdf5
from jaxff.train.journal import Journal, Label, Outcome, check_header
from jaxff.train.teachers import Teacher, make_teacher
from jaxff.units import chemical_symbols

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[int, int, int], None]

_CHUNK_SECONDS = 0.5  # of work that a process is given at once, and that a kill can lose
_CHUNK_MOST = 64
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Structure(NamedTuple):
    """What is to be labelled: numbers [N], positions [N, 3] Å, and the molecule that it is a frame of ('': unknown)."""

    numbers: Int[np.ndarray, "N"]
    positions: Float[np.ndarray, "N 3"]
    molecule: str = ""


@dataclass(frozen=True)
class Labelling:
    """What `label` did."""

    output: Path
    labels: int  # in the file now
    made: int  # in this run
    duplicates: int  # structures that came more than once
    failed: dict[str, str]  # key -> reason


def partial_path(output: str | Path) -> Path:
    """Where the labels of an unfinished run are kept: beside the output."""
    return Path(f"{output}.partial")


def read_structures(sources: Sequence[str | Path], *, any_charge: bool = False) -> Iterator[Structure]:
    """The structures of files (any format that ASE reads, all frames; HDF5 as in jaxff.train.hdf5), folders, globs.

    any_charge: take one that its file calls charged or open-shell, too; charge and spin are not handed on.
    Raises DataError: a file that can't be read; a periodic, an impossible, or such a structure (file and frame named).
    """
    for path in find_files(sources):
        if path.suffix.lower() in SUFFIXES:
            part = read_hdf5(path)
            if part.problems:
                raise DataError(f"{path}, frame {part.problems[0][0]}: {part.problems[0][1]}")
            for frame in part.frames:
                yield Structure(frame.numbers, frame.positions, frame.molecule)
            continue
        for index, (atoms, values) in enumerate(iterate_atoms(path)):
            try:
                z, r = check_structure(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
                if not any_charge:
                    charges, moments = atoms.get_initial_charges(), atoms.get_initial_magnetic_moments()
                    check_neutral_singlet({k: v for k, v in values.items() if np.ndim(v) == 0}, charges, moments)
            except StructureError as error:
                raise DataError(f"{path}, frame {index}: {error}") from None
            yield Structure(z, r, molecule_of(values))


def key_of(identity: str, numbers: Int[np.ndarray, "N"], positions: Float[np.ndarray, "N 3"]) -> bytes:
    """What names a label: SHA-256 of the teacher's identity, the numbers (i8) and the positions (f8)."""
    digest = hashlib.sha256(identity.encode() + b"\0")
    digest.update(np.ascontiguousarray(numbers, dtype="<i8").data)
    digest.update(np.ascontiguousarray(positions, dtype="<f8").data)
    return digest.digest()


def label(
    structures: Iterable[Any],
    teacher: str,
    output: str | Path,
    *,
    processes: int = 1,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> Labelling:
    """Labels `structures` by the teacher of a spec (jaxff.train.teachers) into the HDF5 file `output`.

    structures: Structure, (numbers, positions) or (numbers, positions, molecule) each. Labels that an earlier run made,
    finished or killed, are taken from `output` and from the journal beside it (`partial_path`); the rest is made here.
    `output` appears when all are there: in the order of `structures`, each structure once, after what was in it before
    and isn't asked for now. A structure at which the teacher fails is left out; /metadata names its key and the
    reason, and it is tried again with `retry_failed` only.

    processes: 1 computes in this process; more are spawned, with one thread each (a script that calls this needs
    `if __name__ == "__main__":`). progress: told how many of how many are done, and how many failed.

    Raises ConfigError for a teacher that can't be made; DataError: no structures, an output or journal of another
    teacher or in use, a process that died, no label at all; OSError where writing fails.
    """
    if processes < 1:
        raise DataError(f"expected at least one process, received {processes}")
    target = Path(output)
    if target.suffix.lower() not in SUFFIXES:
        raise DataError(f"{target}: expected the name of an output to end in {' or '.join(SUFFIXES)}")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: the folder {target.parent} does not exist")
    own = make_teacher(teacher)
    wanted, duplicates = _by_key(structures, own.identity)
    if not wanted:
        raise DataError("expected structures to label, received none")
    with Journal(partial_path(target), _header(own)) as journal:
        try:
            before, done = _finished(target, own)  # once locked: another run may have ended just now
        except DataError:
            if not journal.outcomes:
                journal.remove()
            raise
        done |= journal.outcomes
        todo = [key for key in wanted if key not in done or (retry_failed and isinstance(done[key], str))]
        count = len(wanted) - len(todo)
        failed = sum(isinstance(done[key], str) for key in wanted.keys() - set(todo))
        with closing(_outcomes(own, [(key, wanted[key]) for key in todo], processes)) as outcomes:
            for key, outcome in outcomes:
                journal.append(key, outcome)
                done[key] = outcome
                count, failed = count + 1, failed + isinstance(outcome, str)
                if progress is not None:
                    progress(count, len(wanted), failed)
        result = {key: structure for key, structure in before.items() if key not in wanted} | wanted
        # a file that has all this already stays as it is
        labels = _write(target, own, result, done) if todo or result.keys() != before.keys() else len(before)
        if journal.outcomes.keys() <= result.keys() | {
            key for key, outcome in done.items() if isinstance(outcome, str)
        }:
            journal.remove()  # else it holds labels of structures that weren't asked for now
    reasons = {key.hex(): outcome for key in wanted if isinstance(outcome := done[key], str)}
    made = sum(not isinstance(done[key], str) for key in todo)
    return Labelling(target, labels, made, duplicates, reasons)


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A bar on `console` that shows labels done, their rate, the time left and failures."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
        TimeRemainingColumn(compact=True),
    )
    with Bars(*columns, console=console) as bars:
        task = bars.add_task("", total=None, info="")
        start: list[tuple[float, int]] = []

        def show(done: int, total: int, failed: int) -> None:
            start.append((time.monotonic(), done - 1)) if not start else None
            seconds = time.monotonic() - start[0][0]
            rate = f"{(done - start[0][1]) / seconds:.3g}/s" if seconds > 1.0 else ""
            bars.update(task, completed=done, total=total, info=f"{rate} · {failed} failed" if failed else rate)

        yield show


def _by_key(structures: Iterable[Any], identity: str) -> tuple[dict[bytes, Structure], int]:
    """The structures by their keys, in order, each once; and how many came again."""
    found: dict[bytes, Structure] = {}
    count = 0
    for count, given in enumerate(structures, 1):  # noqa: B007
        structure = Structure(*given)
        z, r = check_structure(structure.numbers, structure.positions)
        found.setdefault(key_of(identity, z, r), Structure(z, r, structure.molecule))
    return found, count - len(found)


def _header(teacher: Teacher) -> dict[str, Any]:
    return {"teacher": teacher.identity, "versions": teacher.versions}


def _finished(path: Path, teacher: Teacher) -> tuple[dict[bytes, Structure], dict[bytes, Outcome]]:
    """Structures and outcomes of a finished run, or nothing where there is none."""
    if not path.exists():
        return {}, {}
    attributes, tables = read_metadata(path)
    if "teacher_identity" not in attributes:
        raise DataError(f"{path}: exists, and is no output of `jaxff label`")
    found = {"teacher": attributes["teacher_identity"], "versions": json.loads(attributes["versions"])}
    check_header(path, found, _header(teacher))
    structures, outcomes = {}, {}
    for frame in read_hdf5(path).frames:
        key = key_of(teacher.identity, frame.numbers, frame.positions)
        structures[key] = Structure(frame.numbers, frame.positions, frame.molecule)
        outcomes[key] = Label(frame.energy, frame.forces)
    failed = zip(tables["failed_keys"], tables["failed_reasons"], strict=True)
    return structures, outcomes | {bytes.fromhex(key): reason for key, reason in failed}


def _write(path: Path, teacher: Teacher, structures: dict[bytes, Structure], done: dict[bytes, Outcome]) -> int:
    """The labels of `structures` as a file, in their order; how many they are."""
    labelled = {key: outcome for key in structures if not isinstance(outcome := done[key], str)}
    failed = sorted((key.hex(), outcome) for key, outcome in done.items() if isinstance(outcome, str))
    if not labelled:
        raise DataError(f"the teacher {teacher.spec} failed at every one of {len(failed)} structures: {failed[0][1]}")
    frames = Frames.of([_frame(structures[key], outcome) for key, outcome in labelled.items()])
    attributes = {
        "teacher": teacher.spec,
        "teacher_identity": teacher.identity,
        "versions": json.dumps(teacher.versions, sort_keys=True),
        "jaxff": __version__,
        "count": len(frames),
        "failed": len(failed),
        "keys_sha256": hashlib.sha256(b"".join(labelled)).hexdigest(),
    }
    tables = {"failed_keys": [key for key, _ in failed], "failed_reasons": [reason for _, reason in failed]}
    write_hdf5(path, replace(frames, molecules=with_formulas(frames)), attributes, tables)
    return len(frames)


def _frame(structure: Structure, outcome: Label) -> Frame:
    return Frame(structure.numbers, structure.positions, outcome.energy, outcome.forces, structure.molecule)


def _outcomes(
    teacher: Teacher, todo: list[tuple[bytes, Structure]], processes: int
) -> Generator[tuple[bytes, Outcome]]:
    """The labels of `todo` as they come, or why there is none."""
    if processes > 1 and len(todo) > 1:
        yield from _by_processes(teacher.spec, todo, min(processes, len(todo)))
        return
    for key, structure in todo:
        yield key, _outcome(teacher, structure)


def _outcome(teacher: Teacher, structure: Structure) -> Outcome:
    try:
        energy, forces = teacher(structure.numbers, structure.positions)
    except (LabelError, StructureError) as error:
        from ase.formula import Formula

        symbols = [chemical_symbols[z] for z in structure.numbers]
        return f"{structure.molecule or Formula.from_list(symbols).format('hill')}: {error}"
    return Label(energy, forces.astype(np.float32))


def _by_processes(spec: str, todo: list[tuple[bytes, Structure]], processes: int) -> Generator[tuple[bytes, Outcome]]:
    """Gives each process a chunk of the work whenever it has none, sized by how long the last one took."""
    spawn = multiprocessing.get_context("spawn")
    workers: dict[Any, Any] = {}
    waiting = iter(todo)
    at_work: dict[Any, list[bytes]] = {}
    try:
        with _one_thread_each():
            for _ in range(processes):
                mine, theirs = spawn.Pipe()
                worker = spawn.Process(target=_work, args=(spec, theirs), daemon=True)
                with _deaf_to_ctrl_c():  # inherited: until a process can ignore it by itself, it would die loudly
                    worker.start()
                theirs.close()  # so that the end of the worker is the end of the pipe
                workers[mine] = worker
        sizes = dict.fromkeys(workers, 1)
        for pipe in workers:
            at_work[pipe] = _give(pipe, waiting, 1)
        while any(at_work.values()):
            ready: list[Any] = wait([pipe for pipe, keys in at_work.items() if keys])
            for pipe in ready:
                outcomes, seconds = pipe.recv()
                keys = at_work[pipe]
                fitting = int(sizes[pipe] * _CHUNK_SECONDS / max(seconds, 1e-3))
                sizes[pipe] = max(1, min(fitting, 2 * sizes[pipe], _CHUNK_MOST))
                at_work[pipe] = _give(pipe, waiting, sizes[pipe])
                yield from zip(keys, outcomes, strict=True)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        for worker in workers.values():
            worker.join(1.0)
        codes = sorted({worker.exitcode for worker in workers.values() if worker.exitcode is not None})
        raise DataError(
            f"a process of the teacher {spec} died (exit code {', '.join(map(str, codes))}; too little memory?); "
            f"run again to go on from here, perhaps with fewer processes"
        ) from None
    finally:
        for pipe, worker in workers.items():
            pipe.close()
            worker.terminate()
        for worker in workers.values():
            worker.join()


def _give(pipe: Any, waiting: Iterator[tuple[bytes, Structure]], size: int) -> list[bytes]:
    """Sends a process its next chunk; the keys of it, none where no work is left."""
    chunk = list(islice(waiting, size))
    if chunk:
        pipe.send([structure for _, structure in chunk])
    return [key for key, _ in chunk]


def _work(spec: str, pipe: Connection) -> None:
    """A process: labels what comes, until the other end of the pipe is gone, whether closed or killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to handle
    teacher = make_teacher(spec)
    with suppress(EOFError, OSError):
        while True:
            structures = pipe.recv()
            start = time.monotonic()
            outcomes = [_outcome(teacher, structure) for structure in structures]
            pipe.send((outcomes, time.monotonic() - start))


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """SIGINT is ignored within, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes that start within inherit one thread for their numerical libraries."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
