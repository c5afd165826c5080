"""The models that ship with jaxff, each a .safetensors file with its card (.json) beside it.

The card says what the model was made from, how wrong it is, what it must not be used for, and the file's SHA-256,
which is verified whenever the model is loaded by its name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field

from jaxff.checkpoint import flatten, load_checkpoint
from jaxff.config import Settings, parse_settings
from jaxff.errors import CheckpointError, ConfigError
from jaxff.files import atomic_write
from jaxff.units import chemical_symbols

__all__ = ["DEFAULT", "Calibration", "Card", "Figure", "is_name", "model_path", "names", "read_card", "write_card"]

DEFAULT = "organic"
FOLDER = Path(__file__).parent


class Figure(Settings):
    """One measured figure, as a script in experiments/ left it."""

    what: str
    value: float
    unit: str
    on: str = Field("", description="the molecules or frames that it was measured on")

    @property
    def text(self) -> str:
        """Value, unit and what it was measured on."""
        return f"{self.value:.3g} {self.unit}".rstrip() + (f" ({self.on})" if self.on else "")


class Calibration(Settings):
    """How the spread of a committee becomes an error of the forces (jaxff.uncertainty)."""

    members: tuple[str, ...] = Field(min_length=2, description="pretrained models; the first one gives the forces")
    scale: float = Field(gt=0.0, description="mean force error / mean spread")
    logistic: tuple[float, float] | None = Field(None, description="a, b of the probability of an error above 0.2 eV/Å")
    auroc: float | None = Field(None, description="of that probability, on frames of molecules never trained on")


class Card(Settings):
    """What a model is, and is not, good for."""

    name: str
    description: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the .safetensors file")
    size: int = Field(description="bytes")
    parameters: int
    cutoff: float = Field(description="Å")
    elements: tuple[str, ...]
    teacher: str
    data: str
    errors: tuple[Figure, ...] = ()
    not_for: tuple[str, ...] = ()
    uncertainty: Calibration | None = None
    made: str = Field(description="date")


def names() -> list[str]:
    """The pretrained models' names, the default one first."""
    found = sorted(path.stem for path in FOLDER.glob("*.safetensors") if path.with_suffix(".json").exists())
    return sorted(found, key=lambda name: name != DEFAULT)


def is_name(text: str | Path) -> bool:
    """Whether `text` is the name of a pretrained model."""
    return str(text) in names()


def model_path(name: str) -> Path:
    """The file of a pretrained model, its checksum verified. Raises CheckpointError."""
    path, card = FOLDER / f"{name}.safetensors", read_card(name)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != card.sha256:
        raise CheckpointError(
            f"pretrained model {name}: expected SHA-256 {card.sha256}, as its card says, received {found}:"
            " the file was changed or is damaged, install jaxff again"
        )
    return path


def read_card(name: str) -> Card:
    """The card of a pretrained model. Raises CheckpointError."""
    if not is_name(name):
        raise CheckpointError(f"no pretrained model {name!r} (there are: {', '.join(names()) or 'none'})")
    try:
        return parse_settings(Card, json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")), f"{name}.json")
    except (ConfigError, ValueError) as error:
        raise CheckpointError(f"pretrained model {name}: its card can't be read ({error})") from None


def write_card(model: str | Path, **fields: Any) -> Card:
    """Writes the card of the .safetensors file `model` beside it.

    Name, size, checksum, parameters, cutoff and elements are those of the file; `fields` are the others of Card.
    Raises CheckpointError where the file isn't a model, ConfigError where a field doesn't fit.
    """
    path = Path(model)
    checkpoint = load_checkpoint(path)
    data = path.read_bytes()
    config = checkpoint.config
    elements = config.elements or tuple(range(1, config.max_z + 1))
    of_the_file = {
        "name": path.stem,
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
        "parameters": sum(array.size for _, array in flatten(checkpoint.params)),
        "cutoff": config.cutoff,
        "elements": [chemical_symbols[z] for z in elements],
    }
    card = parse_settings(Card, {**fields, **of_the_file}, f"the card of {path.name}")
    with atomic_write(path.with_suffix(".json")) as temporary:
        temporary.write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return card
