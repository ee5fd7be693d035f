"""Label heads on the wire: exact, or near at int8; what no code makes is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor
from torch.nn.functional import normalize

from deal_core.lora.payload import PayloadError
from deal_core.randomness import seeded
from deal_core.wire.heads import pack_heads, read_heads, tasks_in

SIZE = 24
Arrays = dict[str, np.ndarray]


def heads() -> dict[str, Tensor]:
    """Of few values and of large ones; with a huge bias, and a row of zeros."""
    generator = seeded("heads")
    large = 30 * torch.randn(4, SIZE + 1, generator=generator)
    large[1, -1] = -1e9
    large[2, :-1] = 0.0
    return {"skin": large, "eye": torch.randn(3, SIZE + 1, generator=generator)}


def record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({key: Array(value) for key, value in arrays.items()})


def shapes(own: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    return {task: (head.shape[0], head.shape[1]) for task, head in own.items()}


def travelled(own: dict[str, Tensor], rounded: bool) -> dict[str, Tensor]:
    return read_heads(record(pack_heads(own, rounded)), shapes(own), rounded)


@pytest.mark.parametrize("rounded", [False, True])
def test_shapes_and_order_of_the_tasks_are_those_that_were_sent(rounded):
    arrays = pack_heads(heads(), rounded)
    assert tasks_in(record(arrays), rounded) == ("skin", "eye")
    found = travelled(heads(), rounded)
    assert shapes(found) == shapes(heads())
    assert all(head.dtype == torch.float32 for head in found.values())


def test_exact_heads_arrive_to_the_bit():
    assert all(torch.equal(head, heads()[task]) for task, head in travelled(heads(), False).items())


def test_rounded_weights_are_within_half_a_step_of_their_row_and_biases_are_exact():
    found = travelled(heads(), True)
    for task, head in heads().items():
        assert torch.equal(found[task][..., -1], head[..., -1])
        largest = head[..., :-1].abs().amax(dim=-1, keepdim=True)
        assert bool(((found[task] - head)[..., :-1].abs() <= 1.0001 * largest / 254).all())
    again = travelled(found, True)
    for task, head in found.items():  # what was rounded once stays, but for float32
        torch.testing.assert_close(again[task], head, rtol=1e-6, atol=0)


def test_a_rounded_head_costs_a_quarter_and_scores_nearly_the_same():
    own = heads()
    size = {rounded: sum(a.nbytes for a in pack_heads(own, rounded).values()) for rounded in (0, 1)}
    assert size[1] < 0.4 * size[0]  # of so short rows scales and biases are a good part
    x = normalize(torch.randn(500, SIZE, generator=seeded("x")), dim=1)
    exact, near = (x @ each["eye"][:, :-1].T for each in (own, travelled(own, True)))
    assert 0 < float((near - exact).std()) < 0.01 * float(exact.std())


def changed(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {**arrays, key: change(arrays[key])}


def without(key: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {k: v for k, v in arrays.items() if k != key}


BAD: dict[str, tuple[bool, Callable[[Arrays], Arrays]]] = {
    "a label more": (False, changed("eye", lambda a: np.concatenate([a, a[:1]]))),
    "float64": (False, changed("eye", lambda a: a.astype(np.float64))),
    "not finite": (False, changed("eye", lambda a: np.full_like(a, np.nan))),
    "huge": (False, changed("eye", lambda a: np.full_like(a, 1e11))),
    "no biases": (True, without("bias/eye")),
    "no scales": (True, without("eye.scale")),
    "weights of float32": (True, changed("eye", lambda a: a.astype(np.float32))),
    "a row that no code makes": (True, changed("eye", lambda a: a // 2)),
    "a code out of range": (True, changed("eye", lambda a: np.full_like(a, -128))),
    "codes without a scale": (True, changed("eye.scale", lambda a: 0 * a)),
    "one code fewer": (True, changed("eye", lambda a: a[:, :-1])),
    "a negative scale": (True, changed("eye.scale", lambda a: -a)),
    "an infinite scale": (True, changed("eye.scale", lambda a: np.full_like(a, np.inf))),
    "a huge scale": (True, changed("eye.scale", lambda a: np.full_like(a, 1e9))),
    "a huge bias": (True, changed("bias/eye", lambda a: np.full_like(a, -1e11))),
    "a key too many": (True, lambda arrays: {**arrays, "nose": arrays["eye"]}),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_head_is_refused(kind):
    rounded, spoil = BAD[kind]
    spoilt = record(spoil(pack_heads(heads(), rounded)))
    with pytest.raises(PayloadError):
        read_heads(spoilt, shapes(heads()), rounded)


@pytest.mark.parametrize("rounded", [False, True])
def test_a_message_does_not_choose_the_form(rounded):
    with pytest.raises(PayloadError):
        read_heads(record(pack_heads(heads(), not rounded)), shapes(heads()), rounded)
