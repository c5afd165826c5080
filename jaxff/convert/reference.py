"""The student's equations in NumPy and float64, written apart from jaxff.ops: what the certificate compares with.

Forces are complex-step derivatives, F = -Im E(R + i h) / h: with h = 1e-30 no difference of close numbers is taken,
so they are exact to rounding. Norms are therefore sqrt(sum v²) without a modulus, and comparisons look at real parts.
Equations: MLFF-Distiller's StudentForceField (after Schütt, Unke, Gastegger 2021, arXiv:2102.03150).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Complex, Float, Int

from jaxff.config import StudentConfig

STEP = 1e-30  # Å
EPSILON = 1e-8  # Å, in u = r / (d + ε)
_BATCH = 24  # coordinates that are differentiated at once
Weights = Mapping[str, Float[np.ndarray, "..."]]


def reference_energy(weights: Weights, config: StudentConfig, numbers: Any, positions: Any) -> float:
    """Energy (eV) of one open structure: numbers [N], positions [N, 3] Å; `weights` by PyTorch's names."""
    r = np.asarray(positions, np.float64)[None].astype(np.complex128)
    return float(_energies(_widened(weights), config, np.asarray(numbers), r)[0].real)


def reference_energy_and_forces(
    weights: Weights, config: StudentConfig, numbers: Any, positions: Any
) -> tuple[float, Float[np.ndarray, "N 3"]]:
    """Energy (eV) and forces -dE/dR, [N, 3] eV/Å, of one open structure."""
    z, r = np.asarray(numbers), np.asarray(positions, np.float64)
    wide = _widened(weights)
    gradient = np.zeros(r.size)
    for start in range(0, r.size, _BATCH):
        index = np.arange(start, min(start + _BATCH, r.size))
        displaced = np.repeat(r.reshape(1, -1), len(index), axis=0).astype(np.complex128)
        displaced[np.arange(len(index)), index] += 1j * STEP
        gradient[index] = _energies(wide, config, z, displaced.reshape(len(index), *r.shape)).imag / STEP
    return reference_energy(wide, config, z, r), -gradient.reshape(r.shape)


def _widened(weights: Weights) -> dict[str, Float[np.ndarray, "..."]]:
    return {name: np.asarray(value, np.float64) for name, value in weights.items()}


def _energies(
    w: Weights, config: StudentConfig, z: Int[np.ndarray, "N"], R: Complex[np.ndarray, "B N 3"]
) -> Complex[np.ndarray, "B"]:
    """E for B displacements of one structure that all have the same edges."""
    real = R[0].real
    n = len(z)
    distances = np.sqrt(((real[:, None] - real[None]) ** 2).sum(-1))
    src, dst = np.nonzero((distances <= config.cutoff) & ~np.eye(n, dtype=bool))
    arrive = np.zeros((n, len(src)), np.complex128)
    arrive[dst, np.arange(len(dst))] = 1.0  # sums over the edges that arrive at an atom
    vec = R[:, src] - R[:, dst]
    d = _norm(vec, -1)
    u = vec / (d + EPSILON)[..., None]
    phi = _radial(w, config, d)
    s = np.repeat(w["embedding.weight"][z][None], len(R), axis=0).astype(np.complex128)
    v = np.zeros((*R.shape, config.hidden_dim), np.complex128)
    for i in range(config.num_interactions):
        Ws, W1, W2 = np.split(_filters(w, f"interactions.{i}.message.rbf_to_scalar", phi), 3, axis=-1)
        ds = s[:, src] * Ws
        dv = v[:, src] * W1[:, :, None, :] + u[..., None] * W2[:, :, None, :]
        s = s + arrive @ ds
        v = v + (arrive @ dv.reshape(*dv.shape[:2], 3 * config.hidden_dim)).reshape(v.shape)
        update = f"interactions.{i}.update"
        a, g1, g2 = np.split(_mlp(w, f"{update}.update_mlp", np.concatenate([s, _norm(v, 2)], -1)), 3, axis=-1)
        s = s + a
        mixed = w[f"{update}.mixing_matrix"] @ v
        v = v * g1[:, :, None, :] + mixed * g2[:, :, None, :]
    h = _silu(_linear(w, "energy_head.0", s))
    h = _silu(_linear(w, "energy_head.2", h))
    return _linear(w, "energy_head.4", h).sum(axis=(1, 2))


def _radial(w: Weights, config: StudentConfig, d: Complex[np.ndarray, "B E"]) -> Complex[np.ndarray, "B E K"]:
    """exp(-(d - mu_k)² / w_k²) f(d), f(d) = (cos(pi d / cutoff) + 1) / 2 for d < cutoff, else 0."""
    f = np.where(d.real < config.cutoff, 0.5 * (np.cos(np.pi * d / config.cutoff) + 1.0), 0.0)
    return np.exp(-((d[..., None] - w["rbf.centers"]) ** 2) / w["rbf.widths"] ** 2) * f[..., None]


def _filters(w: Weights, name: str, phi: Complex[np.ndarray, "B E K"]) -> Complex[np.ndarray, "B E 3F"]:
    """W of all edges; an edge that isn't displaced has one value for all displacements."""
    moved = (phi.imag != 0.0).any(-1)
    W = np.repeat(_mlp(w, name, phi[:1].real), len(phi), axis=0).astype(np.complex128)
    W[moved] = _mlp(w, name, phi[moved])
    return W


def _norm(x: Complex[np.ndarray, "..."], axis: int) -> Complex[np.ndarray, "..."]:
    """sqrt(sum x²); 0 with derivative 0 where the real part vanishes."""
    square = (x * x).sum(axis)
    zero = (x.real == 0.0).all(axis)
    return np.where(zero, 0.0, np.sqrt(np.where(zero, 1.0, square)))


def _silu(x: Any) -> Any:
    """x / (1 + exp(-x)), with an exponent that never is large."""
    negative = x.real < 0.0
    e = np.exp(np.where(negative, x, -x))
    return np.where(negative, x * e, x) / (1.0 + e)


def _linear(w: Weights, name: str, x: Any) -> Any:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _mlp(w: Weights, name: str, x: Any) -> Any:
    return _linear(w, f"{name}.2", _silu(_linear(w, f"{name}.0", x)))
