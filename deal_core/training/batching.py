"""Batches of similar length: less padding, same examples. A batch is a list of positions.

Where single records are protected each has a pass of its own, and failures are isolated, so that
they cannot affect others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from deal_core.models.interface import Encoded

WINDOW = 32
"""Batches that are sorted by length together: wide enough to save padding, narrow enough
to keep batches random."""
EVALUATION_TOKENS = 4096
"""Without gradients no activations are kept, so a pass may be larger."""
EVALUATION_WASTE = 512
"""Padding in one pass that costs as much as another pass would (measured)."""


def training_batches(
    data: Sequence[Encoded], batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """Return one epoch: every example once, shuffled, in batches of similar length; the last of a
    window may have fewer than ``batch_size``."""
    order = torch.randperm(len(data), generator=generator).tolist()
    together = WINDOW * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), together):
        part = sorted(order[start : start + together], key=lambda i: len(data[i].tokens))
        batches.extend(part[i : i + batch_size] for i in range(0, len(part), batch_size))
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in shuffled]


def evaluation_batches(data: Sequence[Encoded], alone: bool = False) -> list[list[int]]:
    """Return every example once, sorted by length, in passes of equal cost; ``alone``: each in a
    pass of its own, so that not even rounding, which others in a pass change, depends on others."""
    if alone:
        return [[position] for position in range(len(data))]
    ordered = sorted(range(len(data)), key=lambda i: len(data[i].tokens))
    return within_budget(data, ordered, EVALUATION_TOKENS, EVALUATION_WASTE)


def within_budget(
    data: Sequence[Encoded],
    batch: Sequence[int],
    tokens: int,
    waste: int | None = None,
) -> list[list[int]]:
    """Return the passes of a batch of positions in the data, at least one each, in the order given:
    of so many ``tokens`` at most, padding included, and so many tokens of padding (``waste``)."""
    passes: list[list[int]] = []
    longest = real = 0
    for position in batch:
        length = len(data[position].tokens)
        longest, real = max(longest, length), real + length
        taken = (len(passes[-1]) + 1) * longest if passes else real
        if passes and taken <= tokens and (waste is None or taken - real <= waste):
            passes[-1].append(position)
        else:
            passes.append([position])
            longest = real = length
    return passes


Result = TypeVar("Result")
log = logging.getLogger(__name__)


def contained(work: Callable[[], Result], alone: bool) -> Result | None:
    """Return what the work gives.

    Where it is about one protected record ``alone``, a failure is None: the caller goes on as if
    the record were not there, so that the failure changes nothing about the others. The site's own
    log has it; nobody else learns that it occurred.

    Raises:
        Exception: that of the work, where it is about several records.
    """
    if not alone:
        return work()
    try:
        return work()
    except Exception:
        log.exception("a record cannot be computed with; it has no part in what is released")
        return None


class Cache:
    """In this process only: a restarted one computes it again."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, Any]] = {}

    def get_or_compute(self, name: str, basis: object, make: Callable[[], Any]) -> Any:
        """Return what ``make`` gave for this ``basis`` (equal when all it depends on is); what
        it gave for the basis before is forgotten."""
        kept = self._kept.get(name)
        if kept is None or kept[0] != basis:
            kept = self._kept[name] = (basis, make())
        return kept[1]
