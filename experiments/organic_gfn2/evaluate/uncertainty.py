"""Does the committee's spread flag the frames whose forces are wrong? ROC curve, and the scale that calibrates it."""

from __future__ import annotations

from typing import Any

import numpy as np

from evaluate.common import Bar, Context, auroc, draws, figure, parameters_hash, save_figure
from evaluate.forces import predict
from jaxff.errors import ConfigError
from jaxff.loading import load_potential
from jaxff.uncertainty import spread

AUROC = Bar("uncertainty: AUROC for frames with a force error above 0.2 eV/Å", "", 0.9, 0.95, high=True)
LARGE = 0.2  # eV/Å


def measure(context: Context) -> dict[str, Any]:
    """Largest spread against largest force error of each frame of frames_mixed.h5; uncertainty.png.

    calibration: the scale, mean force error / mean spread over all atoms of the frames of dynamics, as a card takes it.
    """
    if context.small is None:
        raise ConfigError("expected a second model (--small) for the committee, received none")
    frames, kinds = context.frames_and_table("frames_mixed")
    first = predict(context.single, frames).forces
    partner = load_potential(context.small)
    second = predict(partner, frames).forces
    of_atoms = spread(first, [second])
    errors = np.linalg.norm(first - frames.forces, axis=1)
    score, worst = (np.maximum.reduceat(x, frames.splits[:-1]) for x in (of_atoms, errors))
    wrong = worst > LARGE
    value = auroc(score, wrong)
    thermal = np.char.endswith(kinds.astype(str), " K")[frames.frame_of_atom]
    scale = float(errors[thermal].mean() / of_atoms[thermal].mean())
    _plot(context, score * scale, worst, kinds, value)
    on = f"{len(frames)} frames of {len(set(frames.molecules))} unseen molecules, {int(wrong.sum())} of them wrong"
    return {
        "headline": [AUROC.row(value, on)],
        "calibration": {"scale": scale, "auroc": value},
        "partner_sha256": parameters_hash(partner.params),
        "atoms_auroc": auroc(of_atoms, errors > LARGE),
        "rank_correlation": _rank_correlation(score, worst),
        "by_kind": {
            str(kind): {
                "frames": int((kinds == kind).sum()),
                "wrong": int(wrong[kinds == kind].sum()),
                "largest_error_mean_eV_per_A": float(worst[kinds == kind].mean()),
                "estimated_mean_eV_per_A": float(scale * score[kinds == kind].mean()),
                "auroc": auroc(score[kinds == kind], wrong[kinds == kind]),
            }
            for kind in dict.fromkeys(kinds)
        },
    }


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    from scipy.stats import rankdata

    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1]) if len(x) > 1 else None


@draws
def _plot(context: Context, estimate: np.ndarray, worst: np.ndarray, kinds: np.ndarray, value: float | None) -> None:
    made, axes = figure(2)
    order = np.argsort(-estimate)
    wrong = worst[order] > LARGE
    hits = np.concatenate([[0], np.cumsum(wrong) / max(1, wrong.sum())])
    alarms = np.concatenate([[0], np.cumsum(~wrong) / max(1, (~wrong).sum())])
    axes[0, 0].plot(alarms, hits)
    axes[0, 0].plot([0, 1], [0, 1], color="0.6", lw=0.8)
    title = "one kind only" if value is None else f"AUROC {value:.3f}"
    axes[0, 0].set(xlabel="false alarms", ylabel=f"found, of errors above {LARGE:g} eV/Å", title=title)
    for kind in dict.fromkeys(kinds):
        axes[0, 1].loglog(worst[kinds == kind], estimate[kinds == kind], ".", ms=4, label=str(kind))
    bounds = float(worst.min()), float(worst.max())
    axes[0, 1].plot(bounds, bounds, color="0.6", lw=0.8)
    axes[0, 1].axvline(LARGE, color="0.6", lw=0.8, ls=":")
    axes[0, 1].set(xlabel="largest force error of the frame / (eV/Å)", ylabel="estimated / (eV/Å)")
    axes[0, 1].legend(fontsize=7)
    save_figure(context, made, "uncertainty")
