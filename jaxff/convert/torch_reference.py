"""The student as a PyTorch module of our own, with the published tensor names. PyTorch is imported on call only."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from jaxff.config import StudentConfig

EPSILON = 1e-8  # Å, in u = r / (d + ε)


def torch_is_installed() -> bool:
    """Whether PyTorch can be imported; it is not imported here."""
    return importlib.util.find_spec("torch") is not None


def torch_student(config: StudentConfig, tensors: Mapping[str, np.ndarray] | None = None) -> Any:
    """StudentForceField of a configuration, in float64 with `tensors` (PyTorch's names), or fresh in float32."""
    import torch

    model = student_class()(config.hidden_dim, config.num_interactions, config.num_rbf, config.cutoff, config.max_z)
    if tensors is not None:
        model = model.double()
        model.load_state_dict({name: torch.tensor(np.asarray(x, np.float64)) for name, x in tensors.items()})
    return model


def torch_energy_and_forces(model: Any, numbers: Any, positions: Any) -> tuple[float, np.ndarray]:
    """Energy (eV) and forces [N, 3] (eV/Å) by autograd, in the model's dtype."""
    import torch

    dtype = model.embedding.weight.dtype
    r = torch.tensor(np.asarray(positions), dtype=dtype, requires_grad=True)
    energy = model(torch.tensor(np.asarray(numbers), dtype=torch.int64), r)
    (gradient,) = torch.autograd.grad(energy, r, allow_unused=True)
    forces = np.zeros(r.shape) if gradient is None else -gradient.detach().numpy()
    return float(energy.detach()), forces


@cache
def student_class() -> Any:
    """The module's class; made on the first call, so that PyTorch stays optional."""
    import torch
    from torch import nn

    class RadialBasis(nn.Module):
        def __init__(self, K: int, cutoff: float) -> None:
            super().__init__()
            self.cutoff = cutoff
            self.register_buffer("centers", torch.linspace(0.0, cutoff, K))
            self.register_buffer("widths", torch.full((K,), cutoff / K))

        def forward(self, d: torch.Tensor) -> torch.Tensor:
            f = torch.where(d < self.cutoff, 0.5 * (torch.cos(torch.pi * d / self.cutoff) + 1.0), 0.0 * d)
            gauss = torch.exp(-((d[:, None] - self.centers) ** 2) / self.widths**2)  # type: ignore[operator]
            return gauss * f[:, None]

    class Message(nn.Module):
        def __init__(self, F: int, K: int) -> None:
            super().__init__()
            self.rbf_to_scalar = nn.Sequential(nn.Linear(K, F), nn.SiLU(), nn.Linear(F, 3 * F))

    class Update(nn.Module):
        def __init__(self, F: int) -> None:
            super().__init__()
            self.update_mlp = nn.Sequential(nn.Linear(2 * F, F), nn.SiLU(), nn.Linear(F, 3 * F))
            self.mixing_matrix = nn.Parameter(torch.eye(3) + 0.1 * torch.randn(3, 3))

    class Interaction(nn.Module):
        def __init__(self, F: int, K: int) -> None:
            super().__init__()
            self.message = Message(F, K)
            self.update = Update(F)

        def forward(
            self, s: torch.Tensor, v: torch.Tensor, phi: torch.Tensor, u: torch.Tensor, edges: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            src, dst = edges
            Ws, W1, W2 = self.message.rbf_to_scalar(phi).chunk(3, dim=1)
            s = s.index_add(0, dst, s[src] * Ws)
            message = v[src] * W1[:, None, :] + u[:, :, None] * W2[:, None, :]
            v = v.index_add(0, dst, message)
            norm = torch.linalg.vector_norm(v, dim=1)
            a, g1, g2 = self.update.update_mlp(torch.cat([s, norm], dim=1)).chunk(3, dim=1)
            mixed = torch.einsum("ck,nkf->ncf", self.update.mixing_matrix, v)
            return s + a, v * g1[:, None, :] + mixed * g2[:, None, :]

    class StudentForceField(nn.Module):
        def __init__(self, F: int, L: int, K: int, cutoff: float, max_z: int) -> None:
            super().__init__()
            self.hidden_dim, self.num_interactions, self.num_rbf = F, L, K
            self.cutoff, self.max_z = cutoff, max_z
            self.embedding = nn.Embedding(max_z + 1, F)
            self.rbf = RadialBasis(K, cutoff)
            self.interactions = nn.ModuleList([Interaction(F, K) for _ in range(L)])
            layers = [nn.Linear(F, F // 2), nn.SiLU(), nn.Linear(F // 2, F // 4), nn.SiLU(), nn.Linear(F // 4, 1)]
            self.energy_head = nn.Sequential(*layers)

        def forward(self, numbers: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            n = positions.shape[0]
            with torch.no_grad():
                distance = torch.linalg.vector_norm(positions[:, None] - positions[None], dim=-1)
                inside = (distance <= self.cutoff) & ~torch.eye(n, dtype=torch.bool)
                edges = inside.nonzero().T
            r = positions[edges[0]] - positions[edges[1]]
            d = torch.linalg.vector_norm(r, dim=1)
            u = r / (d + EPSILON)[:, None]
            phi = self.rbf(d)
            s = self.embedding(numbers)
            v = torch.zeros((n, 3, self.hidden_dim), dtype=positions.dtype)
            for interaction in self.interactions:
                s, v = interaction(s, v, phi, u, edges)
            return self.energy_head(s).sum()

    return StudentForceField
