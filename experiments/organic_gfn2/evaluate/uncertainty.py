"""Does the committee flag the frames whose forces are wrong? ROC curve; and its calibration, on other frames.

The probability that some atom's force is off by more than 0.2 eV/Å is calibrated (jaxff.uncertainty.calibrate) on
labelled frames that are neither trained on nor held out: units of ../label.py that the training set doesn't hold.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from evaluate.common import Bar, Context, auroc, draws, figure, parameters_hash, save_figure
from evaluate.forces import predict
from jaxff.errors import ConfigError
from jaxff.loading import load_potential
from jaxff.train.data import read_frames
from jaxff.train.frames import Frames
from jaxff.train.hdf5 import checksum
from jaxff.uncertainty import LARGE_ERROR, calibrate, hazard, spread

AUROC = Bar("uncertainty: AUROC for frames with a force error above 0.2 eV/Å", "", 0.9, 0.95, high=True)
FRAMES = 1200  # to calibrate with
CHOSEN_WITH, OTHERS = "frames_mixed", "frames_mixed_others"


def calibration(context: Context) -> dict[str, Any]:
    """Scale and logistic curve, from options["labels"]: HDF5 files of other molecules; calibration.json."""
    if "labels" not in context.options:
        raise ConfigError("expected labelled frames to calibrate with (--labels), received none")
    frames, _ = read_frames(context.options["labels"], on_bad="drop")
    if len(frames) > FRAMES:
        frames = frames.select(np.sort(np.random.default_rng(0).choice(len(frames), FRAMES, replace=False)))
    of_atoms, errors, partner = _spread_and_errors(context, frames)
    scale, logistic = calibrate(of_atoms, errors)
    return {
        "headline": [],
        "calibration": {"scale": scale, "logistic": logistic},
        "partner_sha256": partner,
        "frames": len(frames),
        "molecules": len(set(frames.molecules)),
        "labels_sha256": checksum(frames),
        "force_error_mean_absolute_eV_per_A": float(errors.mean()),
    }


def measure(context: Context) -> dict[str, Any]:
    """Probability of a large error against the largest one of each frame; uncertainty.png.

    The measure was chosen with frames_mixed.h5 in view, so where frames_mixed_others.h5 is, that is what counts.
    """
    made: dict[str, Any] = {}
    if (context.reference / f"{OTHERS}.h5").exists():
        made = {"frames_it_was_chosen_with": _measure(context, CHOSEN_WITH, None)}
    counts = _measure(context, OTHERS if made else CHOSEN_WITH, _plot)
    on = f"{counts['frames']} frames of {counts['molecules']} unseen molecules, {counts['wrong']} of them wrong"
    return {"headline": [AUROC.row(counts["auroc"], on)]} | counts | made


def _measure(context: Context, file: str, plot: Any) -> dict[str, Any]:
    frames, kinds = context.frames_and_table(file)
    of_atoms, errors, partner = _spread_and_errors(context, frames)
    made = _calibration_of(context, partner)
    score = np.add.reduceat(hazard(of_atoms, tuple(made["logistic"])), frames.splits[:-1])
    worst = np.maximum.reduceat(errors, frames.splits[:-1])
    estimate = made["scale"] * np.maximum.reduceat(of_atoms, frames.splits[:-1])
    wrong = worst > LARGE_ERROR
    value = auroc(score, wrong)
    if plot is not None:
        plot(context, score, estimate, worst, kinds, value)
    return {
        "file": file,
        "frames_sha256": checksum(frames),
        "frames": len(frames),
        "molecules": len(set(frames.molecules)),
        "wrong": int(wrong.sum()),
        "auroc": value,
        "calibration": made | {"auroc": value},
        "partner_sha256": partner,
        "other_measures_auroc": {
            "largest spread": auroc(estimate, wrong),
            "atoms, spread": auroc(of_atoms, errors > LARGE_ERROR),
        },
        "rank_correlation": _rank_correlation(score, worst),
        "by_kind": {
            str(kind): {
                "frames": int((kinds == kind).sum()),
                "wrong": int(wrong[kinds == kind].sum()),
                "probability_mean": float(-np.expm1(-score[kinds == kind]).mean()),
                "largest_error_mean_eV_per_A": float(worst[kinds == kind].mean()),
                "estimated_mean_eV_per_A": float(estimate[kinds == kind].mean()),
                "auroc": auroc(score[kinds == kind], wrong[kinds == kind]),
            }
            for kind in dict.fromkeys(kinds)
        },
    }


def _spread_and_errors(context: Context, frames: Frames) -> tuple[np.ndarray, np.ndarray, str]:
    """Of all atoms, eV/Å; and the hash of the second model."""
    if context.small is None:
        raise ConfigError("expected a second model (--small) for the committee, received none")
    partner = load_potential(context.small)
    first, second = (predict(potential, frames).forces for potential in (context.single, partner))
    return spread(first, [second]), np.linalg.norm(first - frames.forces, axis=1), parameters_hash(partner.params)


def _calibration_of(context: Context, partner: str) -> dict[str, Any]:
    path = context.output / "calibration.json"
    if not path.exists():
        raise ConfigError(f"expected {path}: make it with --only calibration --labels ...")
    made = json.loads(path.read_text(encoding="utf-8"))
    received = made["model"]["parameters_sha256"], made["partner_sha256"]
    if received != (parameters_hash(context.single.params), partner):
        raise ConfigError(f"{path}: made with other models")
    return made["calibration"]


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    from scipy.stats import rankdata

    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1]) if len(x) > 1 else None


@draws
def _plot(
    context: Context, score: np.ndarray, estimate: np.ndarray, worst: np.ndarray, kinds: np.ndarray, value: float | None
) -> None:
    made, axes = figure(2)
    order = np.argsort(-score)
    wrong = worst[order] > LARGE_ERROR
    hits = np.concatenate([[0], np.cumsum(wrong) / max(1, wrong.sum())])
    alarms = np.concatenate([[0], np.cumsum(~wrong) / max(1, (~wrong).sum())])
    axes[0, 0].plot(alarms, hits)
    axes[0, 0].plot([0, 1], [0, 1], color="0.6", lw=0.8)
    title = "one kind only" if value is None else f"AUROC {value:.3f}"
    axes[0, 0].set(xlabel="false alarms", ylabel=f"found, of errors above {LARGE_ERROR:g} eV/Å", title=title)
    for kind in dict.fromkeys(kinds):
        axes[0, 1].loglog(worst[kinds == kind], estimate[kinds == kind], ".", ms=4, label=str(kind))
    bounds = float(worst.min()), float(worst.max())
    axes[0, 1].plot(bounds, bounds, color="0.6", lw=0.8)
    axes[0, 1].axvline(LARGE_ERROR, color="0.6", lw=0.8, ls=":")
    axes[0, 1].set(xlabel="largest force error of the frame / (eV/Å)", ylabel="estimated / (eV/Å)")
    axes[0, 1].legend(fontsize=7)
    save_figure(context, made, "uncertainty")
