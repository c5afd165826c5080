"""Put a trained model into jaxff/pretrained, with a card whose figures come from the result files, never from a hand.

    python experiments/organic_gfn2/ship.py organic-small runs/small/best.safetensors --results results/small
    python experiments/organic_gfn2/ship.py organic runs/base/best.safetensors --results results/base

The model is marked as one for neutral closed-shell molecules. Results of other parameters are refused. A committee
with organic-small goes onto the card where results/uncertainty.json has its calibration.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from evaluate.common import parameters_hash

from jaxff import pretrained
from jaxff.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from jaxff.config import PainnConfig
from jaxff.errors import CheckpointError, ConfigError
from jaxff.units import chemical_symbols

DESCRIPTION = "PaiNN ({channels} channels, {interactions} layers, {cutoff:g} Å) of organic molecules, after GFN2-xTB"
TEACHER = "GFN2-xTB (tblite)"
NOT_FOR = (
    "ions, radicals, excited or triplet states (refused where they can be recognised)",
    "elements other than {elements} (refused)",
    "breaking and forming bonds: reactions, and anything far from the bonded molecules of the training set",
    "crystals and liquids: trained on single molecules, dimers and small clusters, without periodic boundaries",
    "interactions beyond the cutoff of {cutoff:g} Å: there is no long-range electrostatics and no dispersion tail",
    "being more right than its teacher: GFN2-xTB's own errors come on top of those above",
)
FIGURES = ("forces", "geometry", "frequencies", "torsions", "stability", "nve", "uncertainty")


def ship(name: str, model: Path, results: Path, partner: str = "organic-small") -> pretrained.Card:
    """Copies `model` to jaxff/pretrained/`name`.safetensors and writes its card.

    Raises CheckpointError for a model of other kinds, ConfigError for results that are missing or of other parameters.
    """
    checkpoint = load_checkpoint(model)
    config = checkpoint.config
    if not isinstance(config, PainnConfig) or config.elements is None:
        raise CheckpointError(f"{model}: expected a painn model with a list of elements, received {config}")
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), checkpoint.params)
    found = dict(_results(results, parameters_hash(params)))
    words = {
        "channels": config.hidden_dim,
        "interactions": config.num_interactions,
        "cutoff": config.cutoff,
        "elements": " ".join(chemical_symbols[z] for z in config.elements),
    }
    calibration = _calibration(name, partner, found.get("uncertainty"))
    target = pretrained.FOLDER / f"{name}.safetensors"
    config = config.model_copy(update={"closed_shell": True})
    if not _is_shipped(target, params, config, checkpoint.certificate):
        save_checkpoint(target, params, config, checkpoint.certificate)
    rows = [row for result in found.values() for row in result["headline"] if row["value"] is not None]
    return pretrained.write_card(
        target,
        description=DESCRIPTION.format(**words),
        teacher=TEACHER,
        data=_data(checkpoint),
        errors=[{key: row[key] for key in ("what", "value", "unit", "on")} for row in rows],
        not_for=[text.format(**words) for text in NOT_FOR],
        uncertainty=calibration,
        made=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def _is_shipped(target: Path, params: Any, config: PainnConfig, certificate: dict[str, Any] | None) -> bool:
    """Whether the file holds just this; written again, it would have another checksum (its header's order varies)."""
    if not target.exists():
        return False
    old = load_checkpoint(target)
    same = old.config == config and old.certificate == certificate
    return same and parameters_hash(old.params) == parameters_hash(params)


def _results(folder: Path, expected: str) -> Iterator[tuple[str, dict[str, Any]]]:
    paths = [folder / f"{figure}.json" for figure in FIGURES]
    if not paths[0].exists():
        raise ConfigError(f"{folder}: expected results of evaluate/run.py, found no {paths[0].name}")
    for figure, path in zip(FIGURES, paths, strict=True):
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            received = result["model"]["parameters_sha256"]
            if received != expected:
                raise ConfigError(
                    f"{path}: expected figures of the parameters {expected[:12]}, received {received[:12]}"
                )
            yield figure, result


def _calibration(name: str, partner: str, result: dict[str, Any] | None) -> dict[str, Any] | None:
    """The card's committee; the partner must be the model that the scale was measured with."""
    if result is None or name == partner:
        return None
    shipped = parameters_hash(load_checkpoint(pretrained.model_path(partner)).params)
    if shipped != result["partner_sha256"]:
        raise ConfigError(
            f"uncertainty.json: expected a committee with the {partner} that ships, {shipped[:12]},"
            f" received one with {result['partner_sha256'][:12]}"
        )
    return {"members": [name, partner], **result["calibration"]}


def _data(checkpoint: Checkpoint) -> str:
    """What the model file itself says of its training."""
    training = (checkpoint.certificate or {}).get("training", {})
    counts = training.get("data", {}).get("train")
    if not counts:
        return "not recorded"
    return (
        f"{counts['frames']:,} labelled frames of {counts['molecules']:,} molecules and clusters, {training['step']:,}"
        f" steps (experiments/organic_gfn2; SHA-256 {training['data_sha256'][:16]})"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="organic or organic-small")
    parser.add_argument("model", type=Path, help="the trained .safetensors")
    parser.add_argument("--results", type=Path, required=True, help="folder of evaluate/run.py")
    parser.add_argument("--partner", default="organic-small", help="the second model of the committee")
    options = parser.parse_args()
    print(ship(options.name, options.model, options.results, options.partner).model_dump_json(indent=2))


if __name__ == "__main__":
    main()
