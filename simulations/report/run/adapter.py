"""What was learnt, as an adapter: its size and its spectrum."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from simulations.report.charts.drawings import Axis, Curve, lines
from simulations.report.page.blocks import (
    Block,
    Cell,
    Facts,
    Figure,
    Section,
    Table,
    Text,
    decimal,
    whole,
)
from simulations.report.run.record import RunRecord
from simulations.report.run.spectrum import Spectrum

SHARES = (0.5, 0.9, 0.99)
"""Of the squared length of an update."""
FLOOR = 1e-6
"""Singular values below this part of the largest are rounding, and not drawn."""


def adapter(run: RunRecord) -> Section:
    """Return the section."""
    return Section("adapter", "Learnt adapter", tuple(_blocks(run)))


def _blocks(run: RunRecord) -> Iterator[Block]:
    spectrum = run.spectrum
    if spectrum is None:
        yield Text("There is no adapter file; it is written when a run has finished.")
        return
    yield Facts(tuple(_facts(run, spectrum)))
    if any(layer.norm for layer in spectrum.layers):
        yield _figure(spectrum)
    else:
        yield Text("The adapter is zero: the base model answers as it was.")


def _facts(run: RunRecord, spectrum: Spectrum) -> Iterator[tuple[str, Cell]]:
    config = run.experiment.adapter
    yield "adapted layers", whole(len(spectrum.layers))
    yield "rank in the file", whole(spectrum.rank)
    if spectrum.current_rank is not None:
        current = spectrum.current_rank
        yield "of it retained", whole(max(0, spectrum.rank - current))
        yield "of it current", whole(current)
    yield "rank a task is learnt with", whole(config.rank)
    yield "rank kept between tasks, at most", whole(config.retained_rank)


def _figure(spectrum: Spectrum) -> Figure:
    """The median and the range over layers, each divided by its largest value."""
    longest = max(len(layer.values) for layer in spectrum.layers)
    whole_rows = np.full((len(spectrum.layers), longest), np.nan)
    for i, layer in enumerate(spectrum.layers):
        if layer.norm:
            whole_rows[i, : len(layer.values)] = np.array(layer.values) / layer.values[0]
    whole_rows[whole_rows < FLOOR] = np.nan
    kept = [column for column in whole_rows.T if not np.isnan(column).all()]
    middle, low, high = (
        tuple(float(each(column)) for column in kept)
        for each in (np.nanmedian, np.nanmin, np.nanmax)
    )
    places = tuple(float(i) for i in range(1, len(kept) + 1))
    curve = Curve("median over layers", places, middle, low, high)
    axis = Axis("direction", "singular value / largest", from_zero=True)
    return Figure(
        "Singular values of the learnt update, in each layer divided by the largest. Band: from "
        "the smallest to the largest over layers. A steep fall says that a smaller rank would do.",
        lines("spectrum", f"Singular values over {len(kept)} directions", [curve], axis),
        _table(spectrum),
    )


def _table(spectrum: Spectrum) -> Table:
    rows = tuple(
        (
            layer.layer,
            decimal(layer.norm),
            decimal(layer.values[0]),
            *(whole(layer.directions(share)) for share in SHARES),
        )
        for layer in spectrum.layers
    )
    shares = (f"directions for {100 * share:.0f} %" for share in SHARES)
    columns = ("layer", "length of the update", "largest value", *shares)
    return Table("Spectrum of each layer", columns, rows)
