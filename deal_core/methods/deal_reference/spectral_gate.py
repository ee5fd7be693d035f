"""A learned gate on a spectrum: heat kernels at several scales.

    ``s'_k = relu( s_k sum_j g_jk phi_j(s_k) phi_j(-s_k) )``,
    ``phi_j(s) = exp(-(s - c_j)^2 / (2 w_j))``,

with centres ``c``, squared widths ``w`` and gains ``g``, all learned. The two kernels multiply to
``exp(-(s^2 + c_j^2) / w_j)``: with gains of 1 the strongest directions pass least. Source: DEAL,
arXiv 2509.18942, eq. 8 and 10, as the authors' second code release reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 1e-6
"""Of a squared width: a flat spectrum has no width of its own."""


@dataclass(frozen=True, eq=False)
class Gate:
    """Attributes: ``centres`` and ``log_widths`` (of the squared widths), both ``(kernels,)``, and
    ``gains``, ``(kernels, directions)``."""

    centres: Tensor
    log_widths: Tensor
    gains: Tensor

    def __call__(self, s: Tensor) -> Tensor:
        """Return the singular values behind the gate, ``(directions,)``.

        A flat spectrum, or one far above its own range, passes as zeros; gains of 0 let nothing
        through.
        """
        widths = self.log_widths.exp().clamp(min=SMALLEST)
        exponents = (s.square() + self.centres.square()[:, None]) / widths[:, None]
        return torch.relu(s * (self.gains * torch.exp(-exponents)).sum(dim=0))


def open_gate(s: Tensor, kernels: int) -> Gate:
    """Return the gate that a task begins with: centres spread evenly over the spectrum ``s``,
    widths ``j / kernels`` of its range, gains 1."""
    lowest, reach = s.min(), s.max() - s.min()
    steps = torch.arange(1, kernels + 1, dtype=s.dtype) / kernels
    return Gate(
        centres=lowest + reach * torch.linspace(0, 1, kernels, dtype=s.dtype),
        log_widths=(steps * reach).square().clamp(min=SMALLEST).log(),
        gains=torch.ones(kernels, s.numel(), dtype=s.dtype),
    )
