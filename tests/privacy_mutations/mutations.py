"""Deliberate weakenings of the mechanisms, each with the check that refutes it."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from deal_core.privacy import dpsgd, events, record, record_gradients
from deal_core.privacy.accountant import DpEvent
from deal_core.privacy.dpsgd import ClippedSum, PrivateGradients
from deal_core.privacy.events import LedgerEvent
from deal_core.privacy.noise import SecureNoise, SeededNoise
from deal_core.privacy.record import RecordMechanism
from deal_core.randomness import seeded
from tests.privacy_mutations import checks

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Mutation:
    """Attributes: what is weakened; how; the check of :mod:`checks` that notices."""

    name: str
    apply: Callable[[Patch], None]
    noticed_by: Callable[..., None]


MUTATIONS: list[Mutation] = []


def weakens(name: str, noticed_by: Callable[..., None]):
    """Register a weakening."""

    def register(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTATIONS.append(Mutation(name, apply, noticed_by))
        return apply

    return register


@weakens("rate doubled after step 1", checks.check_rate_of_every_step)
def rate_doubled_after_the_first_step(patch: Patch) -> None:
    def batches(self):
        for step in range(self.steps):
            rate = self.sample_rate * (1 if step == 0 else 2)
            yield (self.noise.uniform(len(self.data)) <= rate).nonzero().flatten().tolist()

    patch.setattr(PrivateGradients, "batches", batches)


@weakens("every record in every step", checks.check_rate_of_every_step)
def every_record_in_every_step(patch: Patch) -> None:
    patch.setattr(dpsgd, "require_sampled", lambda *given: None)
    patch.setattr(
        PrivateGradients,
        "batches",
        lambda self: iter([list(range(len(self.data)))] * self.steps),
    )


@weakens("shuffled batches of one size", checks.check_rate_of_every_step)
def sampled_by_shuffling(patch: Patch) -> None:
    """Batches of one size: what an epoch of ordinary training draws, and amplification does not
    cover."""

    def batches(self):
        size = round(self.sample_rate * len(self.data))
        for step in range(self.steps):
            order = torch.randperm(len(self.data), generator=seeded("shuffle", step)).tolist()
            yield order[:size]

    patch.setattr(PrivateGradients, "batches", batches)


def _with_bound(patch: Patch, bound_of) -> None:
    """Clip records to another bound."""
    original = dpsgd.clipped_gradients

    def clipped(module, objective, examples, groups, bound, step):
        own = bound_of(lambda: original(module, objective, examples, groups, bound, step), bound)
        return original(module, objective, examples, groups, own, step)

    patch.setattr(dpsgd, "clipped_gradients", clipped)


@weakens("clipping off", checks.check_neighbours)
def clipping_off(patch: Patch) -> None:
    _with_bound(patch, lambda found, bound: 1e9)


@weakens("bound from the batch's median norm above 3 examples", checks.check_neighbours)
def bound_from_the_median_of_a_large_pass(patch: Patch) -> None:
    def median(found, bound):
        norms = found().norms
        return float(np.median(norms)) if len(norms) > 3 else bound

    _with_bound(patch, median)


@weakens("every factor clipped by itself", checks.check_neighbours)
def every_factor_clipped_by_itself(patch: Patch) -> None:
    original = ClippedSum.add

    def add(self, gradient):
        for name, values in gradient.items():
            original(self, {name: values})

    patch.setattr(ClippedSum, "add", add)


@weakens("the sum clipped, not its parts", checks.check_neighbours)
def the_sum_clipped_and_not_its_parts(patch: Patch) -> None:
    """All are shortened alike, so that together they are as long as bounds are."""
    original = dpsgd.clipped_gradients

    def clipped(module, objective, examples, groups, bound, step):
        found = original(module, objective, examples, groups, 1e9, step)
        scale = min(1.0, len(found.norms) * bound / max(sum(found.norms), 1e-30))
        found.total = {key: (scale * total).round().long() for key, total in found.total.items()}
        return found

    patch.setattr(dpsgd, "clipped_gradients", clipped)


@weakens("rows of a pass mixed", checks.check_company)
def rows_of_a_pass_mixed(patch: Patch) -> None:
    """What a record adds depends on those beside it: each has the mean of its pass."""
    original = record_gradients.one_pass

    def mixed(module, width, rows):
        found = original(module, width, rows)
        mean = {key: sum(own[key] for own in found) / len(found) for key in found[0]}
        return [mean] * len(found)

    patch.setattr(record_gradients, "one_pass", mixed)
    patch.setattr(record_gradients, "widths_apart", lambda module: record_gradients.WIDTHS)


@weakens("rows not tried out", checks.check_company)
def rows_not_tried_out(patch: Patch) -> None:
    """Passes of one row are rounded otherwise on some machines: taken without a look."""
    original = record_gradients.one_pass

    def rounded(module, width, rows):
        scale = 1 + 2.0**-20 * len(rows)  # as another product would, in the last digits
        return [
            {k: scale * own for k, own in each.items()} for each in original(module, width, rows)
        ]

    patch.setattr(record_gradients, "one_pass", rounded)
    patch.setattr(record_gradients, "widths_apart", lambda module: record_gradients.WIDTHS)


def _noise(patch: Patch, change) -> None:
    original = SecureNoise.normal

    def normal(self, shape):
        self.__dict__["calls"] = self.__dict__.get("calls", -1) + 1
        return change(self, original(self, shape))

    patch.setattr(SecureNoise, "normal", normal)


@weakens("noise halved", checks.check_noise)
def noise_halved(patch: Patch) -> None:
    _noise(patch, lambda self, drawn: drawn / 2)


@weakens("noise divided by the batch", checks.check_noise)
def noise_divided_by_the_batch(patch: Patch) -> None:
    _noise(patch, lambda self, drawn: drawn / 12)


@weakens("one draw for all layers of a shape", checks.check_noise)
def one_draw_for_all_layers_of_a_shape(patch: Patch) -> None:
    def shared(self, drawn):
        kept = self.__dict__.setdefault("kept", {})
        first = self.__dict__.get("first", tuple(drawn.shape))
        self.__dict__["first"] = first
        if self.calls % 4 == 0:  # the tiny model has four factors that learn
            kept.clear()
        return kept.setdefault(tuple(drawn.shape), drawn)

    _noise(patch, shared)


@weakens("the same noise in every step", checks.check_noise)
def the_same_noise_in_every_step(patch: Patch) -> None:
    def repeated(self, drawn):
        kept = self.__dict__.setdefault("kept", {})
        return kept.setdefault((self.calls % 4, tuple(drawn.shape)), drawn)

    _noise(patch, repeated)


@weakens("no noise in one factor", checks.check_noise)
def no_noise_in_one_factor(patch: Patch) -> None:
    _noise(patch, lambda self, drawn: drawn * (self.calls % 4 != 3))


@weakens("an AES key of 32 bits", checks.check_key)
def a_key_of_32_bits(patch: Patch) -> None:
    def init(self):
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        key, start = os.urandom(32)[:4] * 8, os.urandom(16)
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(start)).encryptor()

    patch.setattr(SecureNoise, "__init__", init)


@weakens("divided by the batch that was drawn", checks.check_denominator)
def divided_by_who_was_drawn(patch: Patch) -> None:
    original = PrivateGradients.accumulate

    def accumulate(self, module, objective, batch):
        self.expected_batch = max(1, len(batch))
        return original(self, module, objective, batch)

    patch.setattr(PrivateGradients, "accumulate", accumulate)


@weakens("half of the steps charged", checks.check_ledger)
def half_of_the_steps_charged(patch: Patch) -> None:
    original = RecordMechanism._event

    def event(self, *given):
        whole = original(self, *given)
        return replace(whole, steps=max(1, whole.steps // 2))

    patch.setattr(RecordMechanism, "_event", event)
    honest = RecordMechanism._gradients

    def gradients(self, ask, charged, data):
        return replace(honest(self, ask, charged, data), steps=2 * charged.steps)

    patch.setattr(RecordMechanism, "_gradients", gradients)


@weakens("budget solved for each round", checks.check_ledger)
def every_round_planned_by_itself(patch: Patch) -> None:
    """The commonest error of the field: the budget is spent again in every round."""
    original = RecordMechanism._solve

    def plan(self, ask, site):
        return original(self, [], {ask.task: len(ask.data)}, len(ask.data), site)

    patch.setattr(RecordMechanism, "_plan", plan)
    patch.setattr("deal_core.privacy.ledger.require_within", lambda events, budget: None)


@weakens("accountant: rate squared", checks.check_ledger)
def sampling_counted_twice(patch: Patch) -> None:
    patch.setattr(
        LedgerEvent,
        "spent",
        property(lambda e: DpEvent(e.sample_rate**2, e.noise_multiplier, e.steps)),
    )


@weakens("the loss leaves", checks.check_ledger)
def the_loss_leaves(patch: Patch) -> None:
    original = RecordMechanism._figures
    patch.setattr(
        RecordMechanism, "_figures", lambda self, *given: {**original(self, *given), "loss": 0.5}
    )


@weakens("a failed training says so", checks.check_charge_comes_first)
def a_failed_training_says_so(patch: Patch) -> None:
    patch.setattr(record, "trained_or_noise", lambda train, gradients: train(gradients(True)))


@weakens("planned records not looked at", checks.check_planned_records)
def what_was_planned_is_not_looked_at(patch: Patch) -> None:
    patch.setattr(record, "require_planned", lambda *given: None)


@weakens("seeded noise at a real site", checks.check_ledger)
def seeded_noise_at_a_real_site(patch: Patch) -> None:
    patch.setattr(record, "SecureNoise", lambda: SeededNoise(seeded("always the same")))


@weakens("charged after it has left", checks.check_charge_comes_first)
def charged_after_it_has_left(patch: Patch) -> None:
    """The answer does not wait for the ledger."""

    def charged(self, made, ask, site, event, budget):
        answer = save(dict(made.arrays))
        with suppress(OSError):  # it will be written later
            site.ledger().charge(event, budget, ask.request, answer)
        return answer

    patch.setattr(RecordMechanism, "_charged", charged)


@weakens("groups: clipped record by record", checks.check_group_neighbours)
def groups_clipped_record_by_record(patch: Patch) -> None:
    """The guarantee of a record, told as a group's: twenty records move the sum twenty-fold."""
    original = dpsgd.clipped_gradients

    def by_record(module, objective, examples, groups, bound, step):
        return original(module, objective, examples, range(len(groups)), bound, step)

    patch.setattr(dpsgd, "clipped_gradients", by_record)


@weakens("groups: clipped pass by pass", checks.check_group_neighbours)
def groups_clipped_in_pieces(patch: Patch) -> None:
    """A group of many records is clipped anew after every three, and counts as many times."""
    original = dpsgd.clipped_gradients

    def in_parts(module, objective, examples, groups, bound, *rest):
        whole = original(module, objective, [], groups, bound, *rest)
        for start in range(0, len(examples), 3):
            own = original(module, objective, examples[start : start + 3], groups, bound, *rest)
            for key, part in own.total.items():
                whole.total[key] = whole.total[key] + part if key in whole.total else part
        return whole

    patch.setattr(dpsgd, "clipped_gradients", in_parts)


@weakens("groups: clipping off", checks.check_group_neighbours)
def groups_unclipped(patch: Patch) -> None:
    _with_bound(patch, lambda found, bound: 1e9)


@weakens("groups: bound times the number of records", checks.check_group_neighbours)
def groups_summed_after_a_clipped_mean(patch: Patch) -> None:
    """The mean is clipped, and the number of records multiplied back."""

    original = dpsgd.clipped_gradients

    def weighted(module, objective, examples, groups, *rest):
        whole = original(module, objective, [], groups, *rest)
        for number in dict.fromkeys(groups[i] for i in examples):
            members = [i for i in examples if groups[i] == number]
            for key, part in original(module, objective, members, groups, *rest).total.items():
                own = len(members) * part
                whole.total[key] = whole.total[key] + own if key in whole.total else own
        return whole

    patch.setattr(dpsgd, "clipped_gradients", weighted)


@weakens("groups: records drawn", checks.check_group_samples)
def records_drawn_where_groups_are_charged(patch: Patch) -> None:
    patch.setattr(dpsgd, "require_sampled", lambda *given: None)
    patch.setattr(checks, "require_sampled", lambda *given: None)

    def batches(self):
        for _ in range(self.steps):
            drawn = (self.noise.uniform(len(self.data)) <= self.sample_rate).nonzero()
            yield sorted(drawn.flatten().tolist(), key=lambda i: self.groups.numbers[i])

    patch.setattr(PrivateGradients, "batches", batches)


@weakens("groups: large ones drawn more often", checks.check_group_samples)
def large_groups_drawn_more_often(patch: Patch) -> None:
    """Records are drawn, and each brings its group along."""

    def batches(self):
        for _ in range(self.steps):
            drawn = (self.noise.uniform(len(self.data)) <= self.sample_rate).nonzero()
            groups = {self.groups.numbers[i] for i in drawn.flatten().tolist()}
            yield self.groups.batch(sorted(groups))

    patch.setattr(PrivateGradients, "batches", batches)


@weakens("groups: added up with records", checks.check_units_apart)
def units_added_up(patch: Patch) -> None:
    patch.setattr(events, "common_unit", lambda units: None)


@weakens("groups: charged as records", checks.check_units_apart)
def groups_charged_as_records(patch: Patch) -> None:
    patch.setattr(RecordMechanism, "unit", property(lambda self: "record"))
