"""The two containers of torch.save: a zip archive, and the older sequence of pickles and raw storages.

Sizes are checked before anything is read, and only the storages that are asked for are.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any, Protocol

from jaxff.convert.builders import storage_of
from jaxff.convert.machine import Machine
from jaxff.convert.records import ITEM_SIZE, Storage, printable
from jaxff.errors import CheckpointError, HostileCheckpointError

MAX_FILE = 4 * 2**30
MAX_PICKLE = 256 * 2**20
MAX_MEMBERS = 100_000
# deflate reaches 1000:1; weights compress by a tenth, and a fresh optimizer's zeros are small
EXPANSION_FLOOR = 16 * 2**20
EXPANSION_RATIO = 8

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    zlib.error,
    struct.error,
    OSError,
    ValueError,
    OverflowError,
    IndexError,
)


class Archive(Protocol):
    """An opened checkpoint: its root object, and its storages by key."""

    root: Any
    machine: Machine
    kind: str
    torchscript: bool
    big_endian: bool

    def storage(self, storage: Storage) -> bytes: ...


def open_archive(path: str | Path) -> Archive:
    """The archive in `path`, its pickle read into inert records. Raises CheckpointError."""
    name = str(path)
    try:
        size = Path(path).stat().st_size
        if not Path(path).is_file():
            raise CheckpointError(f"{name}: expected a checkpoint file, this is a folder or a device")
        if size > MAX_FILE:
            raise CheckpointError(f"{name}: has {size} bytes; expected {MAX_FILE} at most")
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read ({error.strerror or error})") from None
    if not data:
        raise CheckpointError(f"{name}: not a checkpoint: the file is empty")
    if data[:4] == b"PK\x03\x04":
        return ZipArchive(name, data)
    if data[:1] == b"\x80":
        return LegacyArchive(name, data)
    _refuse(name, data)
    raise CheckpointError(f"{name}: not a checkpoint of torch.save: {_looks_like(data)}")


def _refuse(name: str, data: bytes) -> None:
    """Raises HostileCheckpointError where `data` is a pickle of protocol 0 or 1 that asks for something that acts."""
    try:
        Machine(name).load(io.BytesIO(data))
    except HostileCheckpointError:
        raise
    except CheckpointError:
        return


def _looks_like(data: bytes) -> str:
    if data[:4] == b"\x89HDF":
        return "it is an HDF5 file"
    if data[257:262] == b"ustar":
        return "it is a tar file, PyTorch's format before 0.1.10, which is not supported"
    if data[8:9] == b"{":
        return "it looks like a safetensors file (name it .safetensors)"
    if b"onnx" in data[:200].lower() or data[:1] == b"\x08":
        return "it looks like an ONNX export, which is not supported"
    return "it starts neither as a zip archive nor as a pickle"


class ZipArchive:
    """The zip archive of torch.save (since 1.6) and of torch.jit.save: <top>/data.pkl, <top>/data/<key>."""

    kind = "zip"

    def __init__(self, path: str, data: bytes):
        self.path = path
        self._read: dict[str, bytes] = {}
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
            self._members = self._listed(self._zip.infolist(), len(data))
        except _ZIP_ERRORS as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: damaged or truncated: not a complete zip archive ({error})") from None
        self._unchecked = not any(info.CRC for info in self._members.values())
        self._top = self._find_top()
        self.torchscript = f"{self._top}constants.pkl" in self._members
        self.big_endian = self._byteorder() == "big"
        self.machine = Machine(path, lambda pid: storage_of(self.machine, pid))
        self.root = self.machine.load(io.BytesIO(self._member("data.pkl", MAX_PICKLE)))

    def storage(self, storage: Storage) -> bytes:
        if storage.key not in self._read:
            self._read[storage.key] = self._member(f"data/{storage.key}", MAX_FILE)
        return self._read[storage.key]

    def _listed(self, infos: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
        if len(infos) > MAX_MEMBERS:
            raise CheckpointError(f"{self.path}: has {len(infos)} members; expected {MAX_MEMBERS} at most")
        members = {info.filename: info for info in infos}
        if len(members) != len(infos):
            raise CheckpointError(f"{self.path}: damaged: two members of the archive have one name")
        expanded = sum(info.file_size for info in infos)
        limit = EXPANSION_FLOOR + EXPANSION_RATIO * size
        if expanded > limit:
            raise CheckpointError(
                f"{self.path}: expands beyond reason: {size} bytes that claim to hold {expanded};"
                f" expected {limit} at most"
            )
        return members

    def _find_top(self) -> str:
        tops = [n.removesuffix("data.pkl") for n in self._members if n == "data.pkl" or n.endswith("/data.pkl")]
        tops = [top for top in tops if top.count("/") <= 1]
        if len(tops) != 1:
            raise CheckpointError(
                f"{self.path}: not a checkpoint of torch.save: a zip archive with {len(tops) or 'no'} data.pkl"
            )
        return tops[0]

    def _byteorder(self) -> str:
        if f"{self._top}byteorder" not in self._members:
            return "little"
        text = self._member("byteorder", 64).decode("ascii", "replace").strip()
        if text not in ("little", "big"):
            raise CheckpointError(f"{self.path}: expected the byte order 'little' or 'big', received {text!r}")
        return text

    def _member(self, name: str, limit: int) -> bytes:
        info = self._members.get(self._top + name)
        name = printable(name)
        if info is None:
            raise CheckpointError(f"{self.path}: damaged: its member {name} is missing")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CheckpointError(f"{self.path}: its member {name} is compressed in a way that PyTorch does not write")
        if info.file_size > limit:
            raise CheckpointError(
                f"{self.path}: its member {name} has {info.file_size} bytes; expected {limit} at most"
            )
        if self._unchecked:  # torch.serialization.set_crc32_options(False) leaves zeros
            info = copy(info)
            del info.CRC
        try:
            with self._zip.open(info) as member:
                content = member.read(info.file_size)
        except _ZIP_ERRORS as error:
            raise CheckpointError(f"{self.path}: damaged: its member {name} can't be read ({error})") from None
        if len(content) != info.file_size:
            raise CheckpointError(f"{self.path}: damaged or truncated: its member {name} is incomplete")
        return content


class LegacyArchive:
    """torch.save before 1.6: pickles of magic number, protocol, system, object and keys; then raw storages.

    Numbers of the storages are always written in little-endian order.
    """

    kind = "legacy"
    torchscript = False
    big_endian = False

    def __init__(self, path: str, data: bytes):
        self.path = path
        self._data = memoryview(data)
        self._dtypes: dict[str, str] = {}
        stream = io.BytesIO(data)
        plain = Machine(path)
        if plain.load(stream) != LEGACY_MAGIC:
            raise CheckpointError(f"{path}: not a checkpoint of torch.save: a pickle without its magic number")
        version, system = plain.load(stream), plain.load(stream)
        if version != 1001 or not isinstance(system, dict):
            raise CheckpointError(f"{path}: not a checkpoint of torch.save: its header is of another version")
        self.machine = Machine(path, self._persistent)
        self.root = self.machine.load(stream)
        keys = Machine(path).load(stream)
        self._places = self._locate(keys, stream.tell())

    def storage(self, storage: Storage) -> bytes:
        if storage.key not in self._places:
            raise CheckpointError(f"{self.path}: damaged: its storage {printable(storage.key, 40)} is missing")
        start, end = self._places[storage.key]
        return bytes(self._data[start:end])

    def _persistent(self, pid: Any) -> Any:
        storage = storage_of(self.machine, pid)
        if isinstance(storage, Storage):
            self._dtypes[storage.key] = storage.dtype
        return storage

    def _locate(self, keys: Any, position: int) -> Mapping[str, tuple[int, int]]:
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise CheckpointError(f"{self.path}: damaged: it lacks the list of its storages")
        places = {}
        for key in keys:
            if key not in self._dtypes or position + 8 > len(self._data):
                raise CheckpointError(f"{self.path}: damaged or truncated: its storages are incomplete")
            (numel,) = struct.unpack_from("<q", self._data, position)
            start = position + 8
            position = start + numel * ITEM_SIZE[self._dtypes[key]]
            if numel < 0 or position > len(self._data):
                raise CheckpointError(f"{self.path}: damaged or truncated: its storages are incomplete")
            places[key] = (start, position)
        return places
