"""What an aggregation rule is: client updates in, one adapter (and what it cannot hold) out.

Notation (docs/method.md, section 7): client ``i`` sends ``A_i`` (``r_i x d_in``) and ``B_i``
(``d_out x r_i``) of every adapted layer, with scaling ``s_i = lora_alpha / r_i`` and a weight;
``p_i`` are the weights divided by their sum. The ideal update of a layer, which every rule is
measured against, is ``sum_i p_i s_i B_i A_i`` (M23); the error is (M24). Tensors are float32, on
the CPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter

LORA_A = "lora_A"
LORA_B = "lora_B"
BOTH = frozenset({LORA_A, LORA_B})

NUMERICAL = (ValueError, ArithmeticError, RuntimeError)
"""What linear algebra raises where numbers are beyond it: numpy's LinAlgError is a ValueError,
torch's a RuntimeError, as is a number that does not fit its type."""


class AggregationFailed(ValueError):
    """An update, or a whole round, that is of no use: one line, without a value of anybody's."""


@dataclass(frozen=True)
class ClientUpdate:
    """One client's reply of a round."""

    client: str
    adapter: Adapter
    """Both factors of every layer after local training; a factor that is not trained in the round
    is the one the round started from."""
    weight: float
    """Positive and finite; only its share of the sum over clients matters."""


@dataclass(frozen=True)
class Aggregate:
    """The result of a round."""

    current: Adapter
    """What the next round starts from."""
    residual: Adapter | None
    """What the rank of ``current`` cannot hold: ``current + residual`` is the ideal update."""
    error: float | None
    """``||current + residual - ideal||_F / ||ideal||_F`` over all layers together: 0 is exact, 1 is
    as wrong as no update at all; None: not known."""
    excluded: tuple[str, ...] = ()
    """Clients whose update a robust rule left out."""


class Aggregation(Protocol):
    """One round in progress."""

    def add(self, update: ClientUpdate) -> None:
        """Take one update; the round is unchanged when this raises.

        Raises:
            ValueError: the weight is not positive and finite, or the adapter does not fit the round
                (layers, shapes, scaling, a changed frozen factor). Numbers were checked on arrival.
        """

    def finish(self) -> Aggregate:
        """Return the aggregate. Call once.

        Raises:
            ValueError: no update was added.
            RuntimeError, ArithmeticError: the numbers are beyond linear algebra; see
                :func:`finished`.
        """


@dataclass(frozen=True)
class Rule:
    """How client updates become one adapter; an immutable value without state."""

    trained: frozenset[str]
    """The factors that clients train and send."""
    begin: Callable[[Adapter], Aggregation]
    """From what every client begins with to a round in progress."""
    mixed_ranks: bool = False
    """Whether clients of different ranks may take part in one round."""


def check_update(
    update: ClientUpdate, before: Adapter, trained: frozenset[str], mixed_ranks: bool = False
) -> None:
    """Refuse an update that does not fit a round which started from ``before``; ``mixed_ranks``:
    accept any rank, the same in every layer, and any scaling.

    Raises:
        ValueError: see :meth:`Aggregation.add`; the message names client, layer and fault.
    """
    who, adapter = f"client {update.client}", update.adapter
    if not (math.isfinite(update.weight) and update.weight > 0):
        raise ValueError(f"{who}: weight {update.weight} is not positive and finite")
    if adapter.layers.keys() != before.layers.keys():
        raise ValueError(f"{who}: layers differ from the round's")
    if not math.isfinite(adapter.scaling):
        raise ValueError(f"{who}: scaling is not finite")
    if not mixed_ranks and adapter.scaling != before.scaling:
        raise ValueError(f"{who}: scaling {adapter.scaling}, the round has {before.scaling}")
    for name, start in before.layers.items():
        factors = adapter.layers[name]
        rank = adapter.rank if mixed_ranks else start.A.shape[0]
        given = tuple(factors.A.shape), tuple(factors.B.shape)
        expected = (rank, start.A.shape[1]), (start.B.shape[0], rank)
        if given != expected or rank == 0:
            raise ValueError(
                f"{who}, layer {name}: lora_A {given[0]} and lora_B {given[1]}, expected "
                f"{expected[0]} and {expected[1]}"
            )
        if LORA_A not in trained and not _same(factors.A, start.A):
            raise ValueError(f"{who}, layer {name}: lora_A changed, but the round trains lora_B")
        if LORA_B not in trained and not _same(factors.B, start.B):
            raise ValueError(f"{who}, layer {name}: lora_B changed, but the round trains lora_A")


def _same(first: Tensor, second: Tensor) -> bool:
    return first is second or torch.equal(first, second)


def finished(aggregation: Aggregation) -> Aggregate:
    """Return the aggregate of a round, every number of it finite.

    Raises:
        AggregationFailed: it could not be computed, or is not finite.
        UserError: what the rule says to the user, as it is.
    """
    try:
        aggregate = aggregation.finish()
    except (AggregationFailed, UserError):
        raise
    except NUMERICAL as fault:
        raise AggregationFailed(one_line(fault)) from fault
    require_finite("the new adapter", aggregate.current)
    require_finite("its residual", aggregate.residual)
    if not math.isfinite(aggregate.error or 0.0):
        raise AggregationFailed("the aggregation error is not finite")
    return aggregate


def require_finite(what: str, adapter: Adapter | None) -> None:
    """Check every number of an adapter; AggregationFailed names ``what``, and the layer."""
    if adapter is None:
        return
    for name, factors in adapter.layers.items():
        if not (factors.A.isfinite().all() and factors.B.isfinite().all()):
            raise AggregationFailed(f"{what} is not finite ({name})")


def one_line(fault: Exception) -> str:
    """Return the kind of a fault and the first line of what it says, for the log."""
    kind = type(fault).__name__.lstrip("_")
    return f"{kind}: {str(fault).partition(chr(10))[0][:200]}"
