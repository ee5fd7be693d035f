"""An MLP whose examples are the columns of a matrix, and whose answer is a matrix.

    ``Y' = W_2 relu(W_1 Y + b_1) + b_2``

Source: DEAL, arXiv 2509.18942, eq. 11, as the authors' second code release reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

NARROWEST, WIDEST = 128, 512
"""Of the hidden layer, which otherwise is as wide as a column is long."""


@dataclass(frozen=True, eq=False)
class MatrixMlp:
    """Attributes: ``W_1`` ``(hidden, n)``, ``b_1`` ``(hidden,)``, ``W_2`` ``(n, hidden)``, ``b_2``
    ``(n,)``."""

    hidden_weight: Tensor
    hidden_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor

    def __call__(self, matrix: Tensor) -> Tensor:
        """``(n, columns)`` to ``(n, columns)``; a matrix of zeros to its biases alone."""
        hidden = torch.relu(self.hidden_weight @ matrix + self.hidden_bias[:, None])
        return self.out_weight @ hidden + self.out_bias[:, None]


def drawn_mlp(n: int, generator: torch.Generator) -> MatrixMlp:
    """For columns of length ``n``: Kaiming-uniform weights, zero biases."""
    hidden = max(NARROWEST, min(n, WIDEST))
    return MatrixMlp(
        hidden_weight=_kaiming(hidden, n, generator),
        hidden_bias=torch.zeros(hidden),
        out_weight=_kaiming(n, hidden, generator),
        out_bias=torch.zeros(n),
    )


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    weight = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(weight, nonlinearity="relu", generator=generator)
    return weight
