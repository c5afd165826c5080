"""What NVRTC compiled, kept for the next process: JAX's persistent cache has only what XLA compiled.

Files lie in $JAXFF_CACHE_DIR, or in `jaxff` where the user's caches are ($XDG_CACHE_HOME, ~/.cache); with an empty
JAXFF_CACHE_DIR nothing is kept, nor where files can't be written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from jaxff.files import atomic_write

DIGEST = 32  # bytes before what is kept: its SHA-256


def kept(key: object, make: Callable[[], bytes]) -> bytes:
    """make(), or what it returned before for this key, of which repr says all; damaged files are made again."""
    folder = _folder()
    if folder is None:
        return make()
    path = folder / sha256(repr(key).encode()).hexdigest()
    with suppress(OSError):
        content = path.read_bytes()
        if content[:DIGEST] == sha256(content[DIGEST:]).digest():
            return content[DIGEST:]
    made = make()
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(sha256(made).digest() + made)
    return made


def _folder() -> Path | None:
    named = os.environ.get("JAXFF_CACHE_DIR")
    if named is not None:
        return Path(named) if named else None
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # there is no home
        return None
    return Path(caches) / "jaxff"
