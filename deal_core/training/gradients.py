"""How the steps of a local training get the gradient of the data: the seam under which a privacy
mechanism puts its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import nn

from deal_core.models.interface import Encoded, LanguageModel
from deal_core.training.objective import Objective

Probes = Sequence[Encoded]
"""Constant texts, tokenised: what is found on them tells nothing of any record."""


class Gradients(Protocol):
    """How the steps of one local training get the gradient of the data.

    Attributes:
        data: the examples that may be read; nothing else of the client's is.
    """

    @property
    def data(self) -> Sequence[Encoded]:
        """The examples that may be read."""

    def batches(self) -> Iterable[Sequence[int]]:
        """Return batches of positions in the client's data, one for each step."""

    def rehearse(self, module: nn.Module, objective: Objective, probes: int) -> None:
        """Take the gradient of an objective over so many constant texts, and drop it: a model that
        cannot be trained privately fails here, before any record is read.

        Raises:
            UnsafeModel, ValueError: it cannot.
        """

    def accumulate(self, module: nn.Module, objective: Objective, batch: Sequence[int]) -> float:
        """Add the batch's gradient to the factors', without the objective's penalty.

        Returns:
            The mean loss of the batch; 0 where it must not be known.
        """

    def stepped(self, module: nn.Module) -> None:
        """The optimiser has moved what it moves.

        Raises:
            RuntimeError: something that would fail silently has failed.
        """

    def finished(self, model: LanguageModel, labels: Sequence[str], probes: Probes) -> None:
        """The last step is done.

        Args:
            model: holds the adapter as it will be released.
            labels: of the task.
            probes: constant texts on which the model may be looked at.

        Raises:
            RuntimeError: as :meth:`stepped`.
        """
