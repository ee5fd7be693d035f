"""A LoRA factor made from the one a task began with: its gated spectrum, through an MLP.

    ``Y' = MLP(U diag(gate(s)) V^T)``,  ``Y = U diag(s) V^T``

``Y`` is fixed for the task; gate and MLP learn. DEAL, arXiv 2509.18942, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from deal_core.methods.deal_reference.matrix_mlp import MatrixMlp, drawn_mlp
from deal_core.methods.deal_reference.spectral_gate import Gate, open_gate


@dataclass(frozen=True, eq=False)
class FactorMap:
    """Attributes: the thin SVD of the fixed factor, ``(n, k)``, ``(k,)`` and ``(k, columns)``, and
    what learns."""

    U: Tensor
    s: Tensor
    Vh: Tensor
    gate: Gate
    mlp: MatrixMlp

    def factor(self) -> Tensor:
        """Return ``Y'``, of the shape of ``Y``, with gradient to what learns."""
        return self.mlp((self.U * self.gate(self.s)) @ self.Vh)

    def retaining(self) -> list[Tensor]:
        """Return the paper's ``theta_1``: what the gate has learned."""
        return [getattr(self.gate, field.name) for field in fields(self.gate)]

    def updating(self) -> list[Tensor]:
        """Return the paper's ``theta_2``: what the MLP has learned."""
        return [getattr(self.mlp, field.name) for field in fields(self.mlp)]

    def named(self) -> dict[str, Tensor]:
        """Everything that learns, by ``gate.NAME`` and ``mlp.NAME``."""
        return {
            f"{part}.{field.name}": getattr(learned, field.name)
            for part, learned in (("gate", self.gate), ("mlp", self.mlp))
            for field in fields(learned)
        }

    def at(self, values: Mapping[str, Tensor], device: torch.device) -> FactorMap:
        """Return the same map with these values (see :meth:`named`) where there are any, on
        ``device``."""

        def own(part: str, learned: Gate | MatrixMlp) -> dict[str, Tensor]:
            names = [field.name for field in fields(learned)]
            found = {n: values.get(f"{part}.{n}", getattr(learned, n)) for n in names}
            return {name: value.detach().to(device, copy=True) for name, value in found.items()}

        return FactorMap(
            self.U.to(device),
            self.s.to(device),
            self.Vh.to(device),
            replace(self.gate, **own("gate", self.gate)),
            replace(self.mlp, **own("mlp", self.mlp)),
        )


def fresh_map(start: Tensor, kernels: int, generator: torch.Generator) -> FactorMap:
    """Return the map that a task begins with: an open gate, a drawn MLP. The MLP is no identity,
    and what ``start`` knew is gone until it is learned again.

    Args:
        start: ``Y``, a factor in PEFT's layout; the MLP works on its columns.
        kernels: of the gate.
        generator: draws the MLP.
    """
    U, s, Vh = (part.float() for part in torch.linalg.svd(start.double(), full_matrices=False))
    return FactorMap(U, s, Vh, open_gate(s, kernels), drawn_mlp(start.shape[0], generator))
