"""Sums on the wire: exact in float32, near at int8; what no code makes is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor
from torch.nn.functional import normalize

from deal_core.config.method import PrototypeConfig
from deal_core.lora.payload import PayloadError
from deal_core.methods import EmbeddedTask, SumsOnWire
from deal_core.methods.shared import class_sums
from deal_core.methods.shared.prototypes import class_statistics
from deal_core.randomness import seeded
from deal_core.wire.sums import pack_sums, read_sums

LABELS, SIZE = 5, 48


def embedded(examples: int, seed: int = 0, labels: int = LABELS) -> EmbeddedTask:
    """Unit vectors around a common mean and one of each label; the last label has none."""
    generator = seeded("sums", seed)
    y = torch.randint(labels - 1, (examples,), generator=generator)
    means = 0.5 * torch.randn(labels, SIZE, generator=generator)
    common = torch.randn(SIZE, generator=generator)
    x = common + means[y] + torch.randn(examples, SIZE, generator=generator)
    return EmbeddedTask(normalize(x, dim=1), y, labels)


def form_at(dtype: str) -> SumsOnWire:
    return class_statistics(PrototypeConfig()).at(dtype)


EXACT, ROUNDED = form_at("float32"), form_at("int8")


def packed(sums: list[dict[str, Tensor]], form: SumsOnWire) -> dict[str, np.ndarray]:
    return pack_sums([form.pack(each) for each in sums], form.codes)


def travelled(sums: list[dict[str, Tensor]], form: SumsOnWire) -> list[dict[str, Tensor]]:
    """What arrives, not unpacked yet."""
    record = ArrayRecord({key: Array(value) for key, value in packed(sums, form).items()})
    return read_sums(record, [form.shapes(LABELS, SIZE)] * len(sums), form.codes)


@pytest.mark.parametrize("examples", [1, 7, 300])
def test_the_error_of_rounded_sums_is_within_the_stated_bounds(examples):
    for seed in range(5):
        (sums,) = parts = [class_sums.collect(embedded(examples, seed))]
        (found,) = travelled(parts, ROUNDED)
        assert torch.equal(found["count"], sums["count"])
        largest = ROUNDED.pack(sums)["sum"].abs().amax(dim=1) + 1e-6
        error = ROUNDED.unpack(found)["sum"] - sums["sum"]
        assert bool((error.abs().amax(dim=1) <= 1.0001 * largest / 254).all())
        assert bool((error.norm(dim=1) <= 1.0001 * SIZE**0.5 * largest / 254).all())
        assert not found["sum"][-1].any()
        whole, rounded = (
            class_sums.symmetric(each["scatter"], SIZE) for each in (ROUNDED.pack(sums), found)
        )
        torch.testing.assert_close(rounded.diagonal(), whole.diagonal(), rtol=1e-6, atol=1e-12)
        lengths = rounded.diagonal().sqrt()
        off = (rounded - whole).abs()
        assert bool((off <= 1.0001 / 254 * lengths[:, None] * lengths + 1e-6).all())
        assert float(off.norm()) <= float(whole.trace()) / 254 + 1e-6


def test_an_error_of_the_class_sums_leaves_the_scatter_alone():
    """What the server makes of them has the scatter that was sent, whatever the sums became."""
    sums = class_sums.collect(embedded(300))
    (sent,) = travelled([sums], ROUNDED)
    found = ROUNDED.unpack(sent)
    gram = class_sums.symmetric(found["gram"], SIZE)
    within = class_sums.scatter(found["count"], found["sum"], gram)
    torch.testing.assert_close(within, class_sums.symmetric(sent["scatter"], SIZE))
    assert (found["sum"] - sums["sum"]).abs().max() > 1e-3


def test_what_all_embeddings_have_in_common_costs_no_precision():
    """Embeddings of real models point nearly one way; labels differ in the rest."""
    task = embedded(300)
    together = torch.nn.functional.normalize(0.02 * task.embeddings + task.embeddings[:1], dim=1)
    sums = class_sums.collect(replace(task, embeddings=together))
    (sent,) = travelled([sums], ROUNDED)
    error = (ROUNDED.unpack(sent)["sum"] - sums["sum"]).abs().amax(dim=1)
    assert bool((error < 0.04 / 254 * sums["sum"].abs().amax(dim=1) + 1e-5).all())


@pytest.mark.parametrize("examples", [1, 2, 7, 60, 1000])
def test_rounded_sums_of_data_pass_the_check(examples):
    """Of few records above all: their scatter has no eigenvalue but 0 in most directions."""
    for seed in range(10):
        (found,) = travelled([class_sums.collect(embedded(examples, seed))], ROUNDED)
        ROUNDED.check(found)


def test_without_codes_they_are_what_float32_makes_of_them():
    parts = [class_sums.collect(embedded(20, seed)) for seed in range(2)]
    for sums, found in zip(parts, travelled(parts, EXACT), strict=True):
        for name, value in sums.items():
            assert torch.equal(found[name], value.float().double())
            assert found[name].dtype == torch.float64


def test_rounded_sums_are_a_quarter_of_the_bytes():
    parts = [class_sums.collect(embedded(20))]
    exact, rounded = (
        sum(array.nbytes for array in packed(parts, form).values()) for form in (EXACT, ROUNDED)
    )
    floats = LABELS + LABELS + 2 * SIZE  # counts, scales, diagonal, the sum over all labels
    codes = LABELS * SIZE + SIZE * (SIZE - 1) // 2
    assert rounded == 4 * floats + codes
    assert exact == 4 * (LABELS + LABELS * SIZE + SIZE * (SIZE + 1) // 2)
    assert rounded < 0.35 * exact


def test_a_task_of_which_a_client_has_no_record_stays_zero():
    nothing = {n: torch.zeros(s).double() for n, s in class_sums.shapes(LABELS, SIZE).items()}
    parts = [class_sums.collect(embedded(20)), nothing]
    _, found = travelled(parts, ROUNDED)
    assert not any(bool(value.any()) for value in ROUNDED.unpack(found).values())


HOSTILE = {
    "code out of range": ("0.sum", lambda a: np.full_like(a, -128)),
    "correlation out of range": ("0.scatter", lambda a: np.full_like(a, -128)),
    "negative scale": ("0.sum.scale", lambda a: -a),
    "scale of a larger row": ("0.sum", lambda a: (a // 2).astype(np.int8)),
    "codes without a scale": ("0.sum.scale", lambda a: 0 * a),
    "scale that is no number": ("0.sum.scale", lambda a: np.full_like(a, np.nan)),
    "negative diagonal": ("0.scatter.diagonal", lambda a: -a),
    "infinite diagonal": ("0.scatter.diagonal", lambda a: np.full_like(a, np.inf)),
    "codes as floats": ("0.scatter", lambda a: a.astype(np.float32)),
    "one code fewer": ("0.scatter", lambda a: a[:-1]),
    "matrix": ("0.scatter", lambda a: a[:, None]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_no_code_makes_is_refused(kind):
    key, spoil = HOSTILE[kind]
    arrays = packed([class_sums.collect(embedded(20))], ROUNDED)
    arrays[key] = np.ascontiguousarray(spoil(arrays[key]))
    record = ArrayRecord({name: Array(value) for name, value in arrays.items()})
    with pytest.raises(PayloadError):
        read_sums(record, [ROUNDED.shapes(LABELS, SIZE)], ROUNDED.codes)


@pytest.mark.parametrize(("sent", "agreed"), [(EXACT, ROUNDED), (ROUNDED, EXACT)])
def test_a_message_does_not_choose_its_own_form(sent, agreed):
    arrays = packed([class_sums.collect(embedded(20))], sent)
    record = ArrayRecord({name: Array(value) for name, value in arrays.items()})
    with pytest.raises(PayloadError):
        read_sums(record, [agreed.shapes(LABELS, SIZE)], agreed.codes)
