"""Exact integer shares, and subsets that keep the share of each label."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol, TypeVar


class Labelled(Protocol):
    """Anything with a label."""

    @property
    def label(self) -> str:
        """The label by which examples are counted."""


L = TypeVar("L", bound=Labelled)


def by_label(examples: Sequence[Labelled]) -> dict[str, list[int]]:
    """Return the indices of each label's examples; labels sorted, indices ascending."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        found[example.label].append(index)
    return {label: found[label] for label in sorted(found)}


def rounded_up(share: float, count: int) -> int:
    """Return ``share * count``, rounded up: of the number as it is written, since the float product
    of 0.07 and 100 is above 7."""
    return math.ceil(Fraction(str(share)) * count)


def largest_remainder(weights: Sequence[int], total: int, ties: random.Random) -> list[int]:
    """Return integers in proportion to ``weights`` that sum to ``total``.

    Equal remainders are served in an order drawn from ``ties``. Weights of zero get
    nothing, unless all are zero: then all count the same.
    """
    if not any(weights):
        weights = [1] * len(weights)
    whole = sum(weights)
    shares = [weight * total // whole for weight in weights]
    order = list(range(len(weights)))
    ties.shuffle(order)
    # Integer remainders: no float rounding decides who is served.
    order.sort(key=lambda index: weights[index] * total % whole, reverse=True)
    for index in order[: total - sum(shares)]:
        shares[index] += 1
    return shares


def stratified(examples: tuple[L, ...], limit: int) -> tuple[L, ...]:
    """Return at most ``limit`` examples, each label in its share, in their old order.

    The draw depends on the examples alone, on no seed. 0: no limit. From ``limit`` =
    number of labels on, every label keeps at least one example; below, some labels go.
    """
    if not 0 < limit < len(examples):
        return examples
    rng = random.Random("stratified")
    indices = by_label(examples)
    sizes = [len(group) for group in indices.values()]
    floor = 1 if limit >= len(sizes) else 0
    extra = largest_remainder([size - floor for size in sizes], limit - floor * len(sizes), rng)
    kept: set[int] = set()
    for group, more in zip(indices.values(), extra, strict=True):
        kept.update(rng.sample(group, floor + more))
    return tuple(examples[index] for index in sorted(kept))
