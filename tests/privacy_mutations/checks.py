"""What must hold of the mechanisms, each as one statement that is tested on the real code.

A check raises AssertionError where it does not hold. ``test_mutations.py`` runs each on the code as
it is, and on weakened code, which it must refute.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from deal_core.config.experiment import AdapterConfig, ModelConfig, TrainConfig
from deal_core.config.file import apply_overrides, parse_experiment
from deal_core.deal.objective import Plain
from deal_core.lora.attach import factors_in, learning_factors, set_trainable
from deal_core.models import load_model
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy import dpsgd
from deal_core.privacy import noise as noise_module
from deal_core.privacy.dpsgd import PrivateGradients, clipped_gradients, require_sampled
from deal_core.privacy.interface import LocalUpdate, RecordId, Site, UpdateRequest
from deal_core.privacy.ledger import Ledger
from deal_core.privacy.policy import BudgetSpent, OutsidePlan
from deal_core.protection import make_mechanism
from deal_core.randomness import seeded
from deal_core.training.loop import run_local_steps
from tests.deal_core.privacy.record_requests import ask
from tests.deal_core.privacy.steps import LABELS, Silence, dealt, gradients, texts
from tests.sizes import ENCODER

B_ONLY = frozenset({"lora_B"})
RECORDS = 48


ROUNDED = 1 + 1e-5
"""What float32 makes of a noised sum."""


def source(data: Sequence[Encoded], noise: object, **changes: object) -> PrivateGradients:
    """Private gradients of 40 steps, of a quarter of the records in the mean."""
    given = {"sample_rate": 0.25, "steps": 40, "expected_batch": 12}
    return gradients(data, noise, **{**given, **changes})


def released(model: LanguageModel, steps: PrivateGradients, batch: list[int]) -> dict:
    """What a step hands to the optimiser, by factor, float64."""
    set_trainable(model.module, B_ONLY)
    steps.accumulate(model.module, Plain(model, LABELS, steps.data), batch)
    factors = learning_factors(model.module)
    taken = {name: factor.grad.double().clone() for name, factor in factors.items()}
    for factor in factors.values():
        factor.grad = None
    return taken


def flat(parts: dict) -> torch.Tensor:
    return torch.cat([parts[name].flatten() for name in sorted(parts)])


def check_rate_of_every_step(model: LanguageModel) -> None:
    """A training takes, in each of its steps, a sample of the rate that is charged."""
    sizes: list[list[int]] = []
    for repeat in range(4):
        steps = source(texts(RECORDS), noise_module.SeededNoise(seeded("rate", repeat)))
        taken: list[int] = []

        def counted(module, objective, examples, *rest, taken=taken):
            taken.append(len(examples))
            return clipped_gradients(module, objective, examples[:0], *rest)  # none tells no less

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dpsgd, "clipped_gradients", counted)
            run_local_steps(model, Plain(model, LABELS, steps.data), steps, B_ONLY, TrainConfig())
        sizes.append(taken)
    drawn = np.array(sizes, float)
    assert drawn.shape == (4, 40)
    expected, spread = 12.0, math.sqrt(RECORDS * 0.25 * 0.75)
    for part in (drawn[:, :10], drawn[:, 10:], drawn):
        assert abs(part.mean() - expected) < 5 * spread / math.sqrt(part.size)
    assert abs(drawn.std() / spread - 1) < 0.35


def check_neighbours(model: LanguageModel) -> None:
    """One record among many moves the sum by at most the clipping bound, exactly."""
    data, everybody = texts(20), list(range(20))
    alone = source(data, Silence(), max_grad_norm=10.0, expected_batch=1)
    norms = sorted(float(flat(released(model, alone, [i])).norm()) for i in everybody)
    for bound in (norms[0] / 10, norms[10], 2 * norms[-1]):
        quiet = source(data, Silence(), max_grad_norm=bound, expected_batch=1, sample_rate=1.0)
        whole = flat(released(model, quiet, everybody))
        for left_out in range(0, 20, 3):
            batch = [i for i in everybody if i != left_out]
            without = flat(released(model, quiet, batch))
            assert float((whole - without).norm()) <= bound * ROUNDED
    # and below the bound a gradient is what it is: nothing else clips
    quiet = source(data, Silence(), max_grad_norm=2 * norms[-1], expected_batch=1)
    assert float(flat(released(model, quiet, [4])).norm()) == pytest.approx(
        float(flat(released(model, alone, [4])).norm()), rel=1e-4
    )


def check_company(model: LanguageModel) -> None:
    """A record adds the same to the bit whoever else is drawn; of an encoder, which reads several
    in a pass."""
    encoder = load_model(ModelConfig(name=str(ENCODER)), AdapterConfig(), 32, torch.float32)
    set_trainable(encoder.module, B_ONLY)
    objective, bound = Plain(encoder, LABELS, texts(12)), 1e3  # which no gradient has
    for factor in factors_in(encoder.module).values():
        factor.data = 0.1 * torch.randn(factor.shape, generator=seeded("company"))

    def total(examples: list[int]) -> dict[str, torch.Tensor]:
        given = (objective, examples, range(12), bound, bound * 2.0**-40)
        return clipped_gradients(encoder.module, *given).total

    whole = total([*range(12)])
    assert all(bool(part.any()) for part in whole.values())
    for left_out in (0, 7):
        rest, alone = total([n for n in range(12) if n != left_out]), total([left_out])
        assert all(torch.equal(whole[key] - rest[key], alone[key]) for key in whole)


def check_noise(model: LanguageModel) -> None:
    """Every entry of every factor in every step has noise of its own of multiplier times bound."""
    data = texts(8)
    quiet = released(model, source(data, Silence()), [0, 1, 2])
    loud = source(data, noise_module.SecureNoise())
    draws = [
        {k: 12 * (v - quiet[k]) for k, v in released(model, loud, [0, 1, 2]).items()}
        for _ in range(30)
    ]
    for name in quiet:
        entries = torch.cat([draw[name].flatten() for draw in draws])
        error = 5 / math.sqrt(2 * entries.numel())
        assert abs(float(entries.std()) / (1.3 * 0.7) - 1) < error
        assert abs(float(entries.mean())) < 5 * 1.3 * 0.7 / math.sqrt(entries.numel())
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, part in quiet.items():
        shapes.setdefault(tuple(part.shape), []).append(name)
    for alike in shapes.values():
        for first, second in pairwise(alike):
            assert _correlation([d[first] for d in draws], [d[second] for d in draws]) < 5
    for name in quiet:
        steps = [draw[name] for draw in draws]
        assert _correlation(steps[:-1], steps[1:]) < 5


def _correlation(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """In units of its own standard error."""
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in (first, second))
    return abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) * math.sqrt(a.numel())


def check_denominator(model: LanguageModel) -> None:
    """The sum is divided by a number that does not depend on who was drawn."""
    data = texts(8)
    sums = [
        flat(released(model, source(data, Silence(), max_grad_norm=1e-3), batch))
        for batch in ([0], [0, 1, 2, 3])
    ]
    ones = [
        flat(released(model, source(data, Silence(), max_grad_norm=1e-3), [i])) for i in range(4)
    ]
    torch.testing.assert_close(sums[1], sum(ones), rtol=1e-4, atol=1e-9)


def check_key(model: LanguageModel) -> None:
    """Every bit of the stream's key is drawn from the system: another byte, another stream."""
    drawn: list[int] = []

    def streams(changed: tuple[int, int] | None) -> np.ndarray:
        calls = 0

        def urandom(count: int) -> bytes:
            nonlocal calls
            material = bytearray((7 * i + calls + 1) % 256 for i in range(count))
            if changed is not None and changed[0] == calls:
                material[changed[1]] ^= 0x80
            drawn.append(count)
            calls += 1
            return bytes(material)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "urandom", urandom)
            return noise_module.SecureNoise().uniform(64).numpy()

    honest = streams(None)
    assert max(drawn) >= 32
    key = drawn.index(max(drawn))
    for byte in range(32):
        assert not np.array_equal(streams((key, byte)), honest)


def group_source(sizes: Sequence[int], noise: object, **changes: object) -> PrivateGradients:
    """Private gradients of groups of these sizes; records of a group lie apart."""
    numbers = dealt(sizes)
    given = {"sample_rate": 1.0, "expected_batch": 1, **changes}
    return source(texts(len(numbers)), noise, groups=numbers, **given)


def check_group_neighbours(model: LanguageModel) -> None:
    """A group more, of 1 or of 20 records, moves the sum by at most the clipping bound, exactly."""
    others = (3, 1, 7, 2)
    for size, bound in ((1, 0.05), (20, 1e-3), (20, 0.05)):
        quiet = group_source((*others, size), Silence(), max_grad_norm=bound)
        sums = [
            flat(released(model, quiet, quiet.groups.batch(drawn)))
            for drawn in ([0, 1, 2, 3, 4], [0, 1, 2, 3], [4], [])
        ]
        assert float((sums[0] - sums[1]).norm()) <= bound * ROUNDED
        assert float(sums[2].norm()) <= bound * ROUNDED
        assert not sums[3].any()
    # and below the bound a group's gradient is the mean of its records': nothing else clips
    wide = group_source((3, 1, 7, 2), Silence(), max_grad_norm=10.0)
    members = wide.groups.members[2]
    alone = source(wide.data, Silence(), max_grad_norm=10.0, expected_batch=1)
    mean = sum(flat(released(model, alone, [i])) for i in members) / len(members)
    whole = flat(released(model, wide, wide.groups.batch([2])))
    torch.testing.assert_close(whole, mean, rtol=1e-4, atol=1e-8)


def check_group_samples(model: LanguageModel) -> None:
    """Groups are drawn whole, each by itself, at the rate that is charged, whatever their size."""
    sizes = [1, 1, 1, 1, 8, 2, 1, 3] * 4
    noise = noise_module.SeededNoise(seeded("group rate"))
    steps = group_source(sizes, noise, sample_rate=0.25, steps=1500)
    drawn = np.zeros((1500, len(sizes)))
    for step, batch in enumerate(steps.batches()):
        require_sampled(batch, steps.record_ids, steps.groups, 0.25)
        taken = {steps.groups.numbers[i] for i in batch}
        assert sorted(batch) == sorted(i for n in taken for i in steps.groups.members[n])
        drawn[step, list(taken)] = 1
    error = 5 * math.sqrt(0.25 * 0.75 / 1500)
    assert np.abs(drawn.mean(axis=0) - 0.25).max() < error
    spread = math.sqrt(len(sizes) * 0.25 * 0.75)
    assert abs(drawn.sum(axis=1).std() / spread - 1) < 0.15


def check_units_apart(model: LanguageModel, folder: Path) -> None:
    """What is charged says whose it is, and records and groups are never added up."""
    by_group = experiment("privacy.unit_column=patient", "privacy.target_epsilon=50.0")
    by_record = experiment("privacy.target_epsilon=50.0")
    site, groups = site_in(folder), {"task0": 50, "task1": 5}
    make_mechanism(by_group).update(ask("task0", 1, groups, each=3), site, made)
    (event,) = site.ledger().events()
    assert (event.unit, event.unit_column) == ("group", "patient")
    assert event.sample_rate == 16 / 50
    with pytest.raises(OutsidePlan):
        make_mechanism(by_record).update(asked("task0", 2), site, made)
    assert len(site.ledger().events()) == 1


TASKS = {"task0": 225, "task1": 150, "task2": 40}


def experiment(*overrides: str):
    given = ("privacy.mechanism=record", "privacy.target_epsilon=3.0", "federation.rounds=4")
    return parse_experiment(apply_overrides({}, [*given, *overrides]), "test")


def asked(task: str, server_round: int) -> UpdateRequest:
    return ask(task, server_round, TASKS)


def site_in(folder: Path) -> Site:
    return Site(lambda: Ledger(folder), None, simulated=False)


def made(gradients) -> LocalUpdate:
    return LocalUpdate({"w": np.zeros((2, 2), np.float32)}, {"num_examples": 99, "loss": 0.5})


def check_ledger(model: LanguageModel, folder: Path) -> None:
    """Every round is charged with what it did; a run fits its budget by another accountant too."""
    from opacus.accountants import PRVAccountant

    mechanism, site = make_mechanism(experiment()), site_in(folder)
    sources: list[PrivateGradients] = []

    def make(gradients) -> LocalUpdate:
        sources.append(gradients)
        return made(gradients)

    for task in TASKS:
        for server_round in range(1, 5):
            figures = mechanism.update(asked(task, server_round), site, make).figures
            assert figures["num_examples"] == 1.0
            assert "loss" not in figures
    events = site.ledger().events()
    assert len(events) == len(sources) == 12
    for event, step in zip(events, sources, strict=True):
        assert event.steps == step.steps
        assert event.sample_rate == step.sample_rate
        assert event.noise_multiplier == step.noise_multiplier
        assert isinstance(step.noise, noise_module.SecureNoise)
    other = PRVAccountant()
    for event in events:
        other.history.append((event.noise_multiplier, event.sample_rate, event.steps))
    assert other.get_epsilon(events[0].delta) <= 3.0 * 1.01
    with pytest.raises(BudgetSpent):
        mechanism.update(asked("task2", 5), site, make)
    assert len(site.ledger().events()) == 12


def check_charge_comes_first(model: LanguageModel, folder: Path) -> None:
    """Where the ledger cannot be written nothing leaves; where training fails, it is charged."""
    site = site_in(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "charge", _no_space)
        with pytest.raises(OSError, match="no space"):
            make_mechanism(experiment()).update(asked("task0", 1), site, made)

    def fails(gradients) -> LocalUpdate:
        if len(gradients.data):
            raise RuntimeError("a record that cannot be trained on")
        return made(gradients)

    try:
        left = make_mechanism(experiment()).update(asked("task0", 2), site, fails)
    except RuntimeError:
        pytest.fail("the answer tells that something has failed")
    assert left.figures["num_examples"] == 1.0
    assert len(site.ledger().events()) == 1


def _no_space(*given: object) -> bytes:
    raise OSError("no space left")


def check_planned_records(model: LanguageModel, folder: Path) -> None:
    """Other records than the planned ones are not read."""
    mechanism, site = make_mechanism(experiment()), site_in(folder)
    mechanism.update(asked("task0", 1), site, made)
    honest = asked("task0", 2)
    twice = replace(honest, record_ids=[honest.record_ids[0]] * len(honest.record_ids))
    more = ask("task0", 2, {**TASKS, "task0": 400})
    foreign = replace(honest, record_ids=[RecordId("task1", row) for row in range(TASKS["task0"])])
    for other in (twice, more, foreign):
        with pytest.raises(OutsidePlan, match=r"twice|are planned|another task"):
            mechanism.update(other, site, _not_trained)


def _not_trained(gradients: object) -> LocalUpdate:
    pytest.fail("records were handed out")
