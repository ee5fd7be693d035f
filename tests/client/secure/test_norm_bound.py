"""A bound on how far a site may move a layer: under masks the site itself keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from deal_core.lora.payload import LORA
from tests.client.secure.sites import RUN, SiteGrid, experiment_of, grid_of, make_sites
from tests.simulations.run.secure_runs import rounds

pytestmark = pytest.mark.usefixtures("one_model")

Factors = Mapping[str, NDArray[np.float32]]


def played(folder: Path, *overrides: str) -> tuple[list[Factors], Factors, Factors]:
    """One round of sites that train ``lora_B`` alone: what each has learnt, as it lies on its own
    disk, what all began from, and what the round has made of it."""
    grids: list[SiteGrid] = []

    class Kept(SiteGrid):
        def __init__(self, *arguments, **named) -> None:
            super().__init__(*arguments, **named)
            grids.append(self)

    folder.mkdir()
    sites = make_sites(folder)
    ran = rounds(experiment_of(sites, *overrides), folder / RUN, grid_of=grid_of(sites, Kept))
    assert ran.told("summed", "sites") == [len(sites)]
    sent = grids[0].asked["mask", 0].content[LORA]
    learnt = [load_file(next(site.state.glob("update-0-1.safetensors"))) for site in sites]
    return learnt, {key: sent[key].numpy() for key in sent}, ran.factors


def lengths(learnt: Factors, start: Factors, scaling: float) -> dict[str, float]:
    """Norm of ``s (B' - B) A`` by the key of B: linear in what is learnt, since A stands still."""
    return {
        key: float(
            np.linalg.norm(scaling * (value - start[key]) @ start[key.replace("lora_B", "lora_A")])
        )
        for key, value in learnt.items()
    }


def test_a_sites_long_change_is_cut_to_the_bound_before_it_is_masked(tmp_path):
    scaling = 2.0  # adapter.lora_alpha over adapter.rank
    learnt, start, _ = played(tmp_path / "free")
    far = np.array([list(lengths(one, start, scaling).values()) for one in learnt])
    bound = float(np.median(far))

    learnt, start, after = played(tmp_path / "bounded", f"aggregation.norm_bound={bound!r}")
    far = [lengths(one, start, scaling) for one in learnt]
    cut = [length > bound for one in far for length in one.values()]
    assert 0 < sum(cut) < len(cut)
    for key in learnt[0]:
        changes = [one[key].astype(np.float64) - start[key] for one in learnt]
        kept = [
            change * min(1.0, bound / length[key])
            for change, length in zip(changes, far, strict=True)
        ]
        moved = after[key] - start[key]
        np.testing.assert_allclose(moved, np.mean(kept, axis=0), atol=1e-6)
        assert np.abs(moved - np.mean(changes, axis=0)).max() > 1e-4
