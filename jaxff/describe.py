"""What a model file holds, in words: for `jaxff inspect`, and before a simulation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxff import pretrained
from jaxff.convert import inspect_source
from jaxff.convert.defects import describe_defects, measure_defects
from jaxff.loading import load_potential
from jaxff.potential import Potential
from jaxff.units import chemical_symbols

Rows = list[tuple[str, str]]


def describe(path: str | Path) -> dict[str, Rows]:
    """Heading -> (name, value) rows, of a pretrained model, a .safetensors file or a PyTorch checkpoint.

    Raises CheckpointError.
    """
    potential = load_potential(path)
    certificate = potential.certificate
    # a PyTorch file has no certificate; its reader tells what it found
    found = [] if certificate or Path(path).suffix.lower() == ".safetensors" else list(_source(inspect_source(path)))
    defects = [("-", line) for line in known_defects(potential)]
    if not defects:
        unknown = certificate is None and potential.config.architecture != "student"
        defects = [("-", "not measured" if unknown else "none found")]
    card = {"Card": list(_card(pretrained.read_card(str(path))))} if pretrained.is_name(path) else {}
    return {
        "Model": [("file", str(path)), *_model(potential)],
        **card,
        "Certificate": list(_certificate(certificate)) if certificate else [*found, ("certificate", "none")],
        "Known defects": defects,
    }


def known_defects(potential: Potential) -> list[str]:
    """The defects, a sentence each: from the certificate, or measured now (seconds) on a student without one."""
    certificate: Mapping[str, Any] | None = potential.certificate
    config = potential.config
    if not (certificate or {}).get("defects"):
        if config.architecture != "student":
            return []
        double = Potential(potential.params, config, dtype="float64")
        certificate = {"defects": measure_defects(double, config.cutoff, config.max_z)}
    return describe_defects(certificate)


def count_parameters(potential: Potential) -> int:
    """Trained numbers; radial centres and widths, which PyTorch keeps as buffers, aren't counted."""
    return sum(_size(tree) for name, tree in potential.params.items() if name != "radial")


def certificate_hashes(certificate: Mapping[str, Any] | None) -> dict[str, str] | None:
    """The SHA-256 of the source file and of the tensors."""
    if not certificate:
        return None
    hashes = {
        "source_sha256": certificate.get("source", {}).get("sha256"),
        "tensors_sha256": certificate.get("tensors_sha256"),
    }
    return {name: str(value) for name, value in hashes.items() if value}


def _model(potential: Potential) -> Iterator[tuple[str, str]]:
    config = potential.config
    yield "architecture", config.architecture
    yield "parameters", f"{count_parameters(potential):,}"
    yield (
        "shape",
        (f"{config.hidden_dim} channels, {config.num_interactions} interactions, {config.num_rbf} radial functions"),
    )
    yield "cutoff", f"{config.cutoff:g} Å"
    yield "elements", _elements(config.elements, config.max_z)
    yield "units", "energy eV, length Å, force eV/Å"
    if potential.closed_shell:
        yield "electrons", "neutral closed-shell molecules (radicals and ions are refused)"
    yield "boundaries", "open (periodic structures are refused)"


def _card(card: pretrained.Card) -> Iterator[tuple[str, str]]:
    yield "about", card.description
    yield "teacher", card.teacher
    yield "data", card.data
    for figure in card.errors:
        yield figure.what, figure.text
    if card.uncertainty is not None:
        yield "uncertainty", f"{card.uncertainty.scale:.3g} x the spread of {' and '.join(card.uncertainty.members)}"
    for warning in card.not_for:
        yield "not for", warning
    yield "file hash", f"SHA-256 {card.sha256}"
    yield "made", card.made


def _elements(elements: tuple[int, ...] | None, max_z: int) -> str:
    if elements is None:
        return f"{chemical_symbols[1]} to {chemical_symbols[max_z]} (every row of the embedding, 1 to {max_z})"
    return " ".join(chemical_symbols[z] for z in sorted(elements))


def _source(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "layout", str(found["layout"])
    yield "tensors", f"SHA-256 {found['tensors_sha256']}"
    for note in found["notes"]:
        yield "note", str(note)


def _certificate(certificate: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    source, check = certificate.get("source", {}), certificate.get("check", {})
    if source:
        yield "source", f"{source.get('file')} ({source.get('bytes'):,} bytes, {source.get('layout')})"
        yield "source hash", f"SHA-256 {source.get('sha256')}"
    if certificate.get("tensors_sha256"):
        yield "tensors", f"SHA-256 {certificate['tensors_sha256']}"
    for name, value in certificate.get("training", {}).items():
        if name != "config":
            yield f"training {name}", _flat(value)
    for note in certificate.get("notes", []):
        yield "note", str(note)
    if check:
        state = "passed" if check.get("passed") else "FAILED"
        yield "check", f"{state} on {len(check.get('structures', []))} structures, largest deviations:"
        for dtype in ("float64", "float32"):
            for reference, figures in check.get(dtype, {}).items():
                dE, dF = figures["largest_dE_eV"], figures["largest_dF_eV_per_A"]
                yield f"  {dtype}", f"from {reference}: {dE:.1e} eV, {dF:.1e} eV/Å"
    if certificate.get("date"):
        yield "made", str(certificate["date"])


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_flat(item)}" for name, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(tree: Any) -> int:
    return sum(map(_size, tree.values())) if isinstance(tree, Mapping) else int(np.size(tree))
