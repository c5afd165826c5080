"""The PyTorch student on the same systems, each row in a process of its own: JAX keeps most of a GPU's memory.

    python experiments/speed/torch_rows.py eager 21      prints one line of JSON

eager: the student as it ships, edges anew in every call, forces by autograd. graph: edges fixed, torch.compile of the
energy, and an NVE step (forces by autograd, kick, drift) as one CUDA graph that is replayed; where the compiler fails,
the graph of the plain operations, and the row says so. On a CPU there is no graph, and the row says that. float32
products without TF32, PyTorch's default.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from systems import CUTOFF, OPEN_LIMIT, box, structure
from torch import nn

from jaxff.config import StudentConfig
from jaxff.convert.torch_reference import EPSILON, torch_student
from jaxff.units import fs

CALLS, SECONDS = 30, 1.0  # most calls that are timed one by one, and about how long they may take
REPLAYS = 5  # loops of graph steps that are timed
TIMESTEP, MASS = 0.01 * fs, 12.0


class FixedEdges(nn.Module):
    """The student's energy (eV) as a function of positions [N, 3] Å alone: numbers [N], edges [2, E] and shifts [E, 3]

    stay. The layers are those of `student`.
    """

    numbers: torch.Tensor
    edges: torch.Tensor
    shifts: torch.Tensor

    def __init__(self, student: Any, numbers: Any, edges: Any, shifts: Any) -> None:
        super().__init__()
        self.student = student
        for name, value in (("numbers", numbers), ("edges", edges), ("shifts", shifts)):
            self.register_buffer(name, value)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        source, target = self.edges
        r = positions[source] - positions[target] + self.shifts
        d = torch.linalg.vector_norm(r, dim=1)
        u, phi = r / (d + EPSILON)[:, None], self.student.rbf(d)
        s = self.student.embedding(self.numbers)
        v = positions.new_zeros((len(s), 3, self.student.hidden_dim))
        for interaction in self.student.interactions:
            s, v = interaction(s, v, phi, u, (source, target))
        return self.student.energy_head(s).sum()


def fixed_edges(student: Any, atoms: int, device: str) -> tuple[FixedEdges, torch.Tensor]:
    """The model of a system with its edges, and its positions: all of a molecule's, or a periodic box's."""
    if atoms <= OPEN_LIMIT:
        numbers, positions = structure(atoms)
        distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
        edges = np.stack(np.nonzero((distance <= CUTOFF) & ~np.eye(atoms, dtype=bool)))
        shifts = np.zeros((edges.shape[1], 3))
    else:
        b = box(atoms)
        numbers, positions, shifts, edges = b.numbers, b.positions, b.shifts, np.stack([b.senders, b.receivers])
    dtype = student.embedding.weight.dtype
    buffers = (torch.tensor(numbers, dtype=torch.int64), torch.tensor(edges, dtype=torch.int64))
    model = FixedEdges(student, *buffers, torch.tensor(shifts, dtype=dtype)).to(device)
    return model.requires_grad_(False), torch.tensor(positions, dtype=dtype, device=device)


def eager(student: Any, atoms: int, device: str) -> dict[str, Any]:
    """Energy and forces a call, as the student ships (open boundaries, in a box, too); microseconds."""
    numbers, positions = structure(atoms) if atoms <= OPEN_LIMIT else (box(atoms).numbers, box(atoms).positions)
    with torch.device(device):  # the student makes its arrays on the default device
        model = student.to(device).requires_grad_(False)
        z = torch.tensor(numbers, dtype=torch.int64)
        r = torch.tensor(positions, dtype=model.embedding.weight.dtype, requires_grad=True)

        def once() -> torch.Tensor:
            return torch.autograd.grad(model(z, r), r)[0]

        forces, facts = _first(once, device)
        seconds: list[float] = []
        while len(seconds) < 3 or (len(seconds) < CALLS and sum(seconds) < SECONDS):
            seconds.append(_seconds(once, device))
    return _spread(seconds, 1) | facts | {"finite": bool(torch.isfinite(forces).all()), "atoms": atoms}


def graph(student: Any, atoms: int, device: str) -> dict[str, Any]:
    """An NVE step with fixed edges, compiled and replayed as a CUDA graph; microseconds."""
    model, positions = fixed_edges(student, atoms, device)
    state = positions.requires_grad_(True), torch.zeros_like(positions)  # kept here: the graph holds no tensors
    try:
        step, facts = _step(torch.compile(model), *state, device)
        how: dict[str, Any] = {"compiled": True}
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the compiler trips over, the plain operations can be measured
        step, facts = _step(model, *state, device)
        how = {"compiled": False, "why": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    one = _seconds(step, device)
    steps = max(1, min(400, int(0.2 / max(one, 1e-9))))

    def loop() -> None:
        for _ in range(steps):
            step()

    seconds = [_seconds(loop, device) for _ in range(REPLAYS)]
    finite = bool(torch.isfinite(positions).all())
    row = _spread(seconds, steps) | facts | how | {"cuda_graph": device == "cuda", "finite": finite}
    return row | {"atoms": atoms, "edges": len(model.shifts)}


def _step(
    model: Callable[..., Any], r: torch.Tensor, velocities: torch.Tensor, device: str
) -> tuple[Callable[[], None], dict[str, Any]]:
    """A step that moves positions and velocities in place, captured on a GPU, and what its first call took."""

    def step() -> None:
        (gradient,) = torch.autograd.grad(model(r), r)
        with torch.no_grad():
            velocities.sub_(gradient, alpha=TIMESTEP / MASS)
            r.add_(velocities, alpha=TIMESTEP)

    _, facts = _first(step, device)
    return (_captured(step) if device == "cuda" else step), facts


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture wants everything warm on a stream beside the default one
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return captured.replay


def _first(once: Callable[[], Any], device: str) -> tuple[Any, dict[str, Any]]:
    """The result of the first call, its seconds, and the most memory beyond what there was, MB (on a GPU)."""
    if device != "cuda":
        start = time.perf_counter()
        result = once()
        return result, {"compile_s": time.perf_counter() - start}
    torch.cuda.synchronize()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    result = once()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    once()
    torch.cuda.synchronize()
    return result, {"compile_s": first, "temporaries_MB": (torch.cuda.max_memory_allocated() - before) / 1e6}


def _seconds(once: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    once()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _spread(seconds: list[float], steps: int) -> dict[str, float]:
    values = {"median_us": np.median(seconds), "fastest_us": min(seconds), "slowest_us": max(seconds)}
    return {name: float(value) * 1e6 / steps for name, value in values.items()}


def measure(mode: str, atoms: int) -> dict[str, Any]:
    """A row, or {"error": "out of memory"}."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    student = torch_student(StudentConfig()).eval()
    try:
        return {"eager": eager, "graph": graph}[mode](student, atoms, device)
    except torch.OutOfMemoryError:
        return {"error": "out of memory", "atoms": atoms}


if __name__ == "__main__":
    row = measure(sys.argv[1], int(sys.argv[2]))
    print(json.dumps(row))
