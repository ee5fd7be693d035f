"""The analytic head: earlier class means follow a linear drift, and what no data can give is
refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import MethodConfig, PrototypeConfig
from deal_core.errors import UserError
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.payload import PayloadError
from deal_core.lora.state import State
from deal_core.methods import EmbeddedTask, Tensors, make_method, phases_of
from deal_core.methods.deal import analytic_head as head
from deal_core.methods.shared import class_sums
from deal_core.randomness import seeded

SIZE, LABELS = 10, 3
CONFIG = PrototypeConfig(enabled=True, drift_ridge=1e-4)


def records(seed: int, examples: int = 300) -> tuple[Tensor, Tensor]:
    generator = seeded("drift", seed)
    x = normalize(torch.randn(examples, SIZE, generator=generator).double(), dim=1)
    return x, torch.randint(LABELS, (examples,), generator=generator)


def rotation() -> Tensor:
    """Unit vectors stay unit vectors under it."""
    square = torch.randn(SIZE, SIZE, generator=seeded("rotation")).double()
    return torch.linalg.qr(square)[0]


def sums(now: Tensor, start: Tensor, y: Tensor) -> Tensors:
    found = head.collect(EmbeddedTask(now, lambda: start, y, LABELS))
    assert {n: tuple(v.shape) for n, v in found.items()} == dict(head.shapes(LABELS, SIZE))
    head.check(found)
    return found


def start() -> State:
    shapes = {"layer": (SIZE, SIZE)}
    return State(zero_adapter(shapes, 2, 1.0), zero_adapter(shapes, 2))


def test_earlier_sums_follow_a_linear_drift_that_only_later_texts_have_shown():
    (x, y), (z, w) = records(0), records(1)
    turned = rotation()
    first = head.absorb_drifted(start(), {"skin": sums(x, x, y)}, CONFIG)
    later = {"eye": sums(z @ turned.T, z, w)}
    after = head.absorb_drifted(first, later, CONFIG)
    seen = class_sums.collect(EmbeddedTask(x @ turned.T, lambda: x, y, LABELS))
    torch.testing.assert_close(after.sums["sum/skin"], seen["sum"], rtol=1e-3, atol=5e-2)
    both = seen["gram"] + later["eye"]["gram"]
    torch.testing.assert_close(after.sums["gram"], both, rtol=1e-3, atol=5e-2)
    stays = PrototypeConfig(enabled=True, drift_ridge=0.0)
    wrong = head.absorb_drifted(first, later, stays)
    assert (wrong.sums["sum/skin"] - seen["sum"]).norm() > 0.5 * seen["sum"].norm()
    assert torch.equal(wrong.sums["sum/skin"], first.sums["sum/skin"])


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_the_map_is_the_same_however_the_records_are_divided(parts):
    z, w = records(2)
    turned = rotation()
    whole = head.drift({"eye": sums(z @ turned.T, z, w)}, 0.1)
    split: Tensors = {}
    for k in range(parts):
        for name, value in sums((z @ turned.T)[k::parts], z[k::parts], w[k::parts]).items():
            split[name] = split.get(name, 0) + value
    torch.testing.assert_close(head.drift({"eye": split}, 0.1), whole, rtol=1e-9, atol=1e-9)


def test_where_nothing_has_moved_the_map_is_the_identity():
    z, w = records(3)
    eye = torch.eye(SIZE).double()
    torch.testing.assert_close(head.drift({"eye": sums(z, z, w)}, 0.1), eye)
    few = sums(z[:3] @ rotation().T, z[:3], w[:3])
    much = head.drift({"eye": few}, 1e6)  # shrunk to what is known: nothing
    torch.testing.assert_close(much, eye, rtol=1e-4, atol=1e-4)


SPOILT = {
    "start of more records": lambda s: s | {"start_gram": 2 * s["start_gram"]},
    "products of other vectors": lambda s: s | {"cross": s["cross"].roll(1, 0)},
    "vast products": lambda s: s | {"cross": 1e6 * s["cross"]},
    "long sums": lambda s: s | {"sum": 3 * s["sum"]},
}


@pytest.mark.parametrize("kind", SPOILT)
def test_products_that_no_data_can_have_are_refused(kind):
    z, w = records(4)
    z = normalize(z + 2.0 * torch.arange(SIZE).double(), dim=1)
    good = sums(z @ rotation().T, z, w)
    with pytest.raises(PayloadError):
        head.check(SPOILT[kind](good))


def method_with(**keys: object):
    return make_method(MethodConfig.model_validate(keys), AdapterConfig())


def test_the_phase_is_there_where_it_is_wanted():
    assert "prototypes" not in phases_of(method_with())
    phase = phases_of(method_with(prototype={"enabled": True}))["prototypes"]
    assert (phase.rounds, phase.statistics.once) == (1, True)
    with pytest.raises(UserError, match=r"method\.prototype\.enabled"):
        method_with(prototype={"enabled": True}, consolidation={"data": "private"})


@pytest.mark.parametrize("keys", [{}, {"warm_start_rank": 1}, {"retention": {"enabled": False}}])
def test_heads_and_sums_outlive_the_ends_of_tasks(keys):
    method = method_with(prototype={"enabled": True}, **keys)
    heads, kept = {"skin": torch.ones(2, 3)}, {"gram": torch.ones(4)}
    shapes = {"layer": (40, 50)}
    state = State(zero_adapter(shapes, 8, 2.0), zero_adapter(shapes, 16), None, 0, heads, kept)
    for task in range(3):
        state = method.end_task(method.begin_task(state, seeded(task)))
        assert state.heads is heads
        assert state.sums is kept
