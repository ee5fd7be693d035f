"""Weighted means by one secure sum: weight times value, and the weight, in one vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deal_core.secure_sum.layout import Layout, SumField, finest_scale
from deal_core.secure_sum.protocol_error import ProtocolError

WEIGHT = "weight"
"""Name of the field that holds the weight."""


def weighted_layout(
    shapes: Mapping[str, tuple[int, ...]],
    largest: float,
    most_weight: float,
    bits: int,
    sites: int,
) -> Layout:
    """Return a layout for weighted values and their weight, each on the finest grid that fits.

    Args:
        shapes: name of an array -> its shape.
        largest: bound on the absolute value of every entry, before it is weighted.
        most_weight: bound on a weight.
        bits: of a ring word.
        sites: most that are summed.
    """
    bound = largest * most_weight
    scale = finest_scale(bound, sites, bits)
    fields = [SumField(name, shape, bound, scale) for name, shape in shapes.items()]
    weight = SumField(WEIGHT, (), most_weight, finest_scale(most_weight, sites, bits))
    return Layout((*fields, weight), bits, sites)


def weighted_values(values: Mapping[str, ArrayLike], weight: float) -> dict[str, NDArray[Any]]:
    """Return what one site adds: weight times value, and the weight; float64."""
    products = {name: weight * np.asarray(value, np.float64) for name, value in values.items()}
    return {**products, WEIGHT: np.asarray(weight, np.float64)}


def weighted_means(sums: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return the means over all sites, by their weights.

    Raises:
        ProtocolError: the weights sum to nothing.
    """
    total = float(sums[WEIGHT])
    if total <= 0:
        raise ProtocolError("the weights of all sites sum to nothing: there is no mean")
    return {name: each / total for name, each in sums.items() if name != WEIGHT}
