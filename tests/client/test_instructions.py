"""Whatever instruction and run config a server sends, what a real site's policy promises holds.

After each: what was read is what was planned, by the mechanism that the policy names; the ledger is
charged if and only if something of the data has left; and a site with another record in its place
ends the request alike, with a first step that differs by no more than the clipping bound allows.
"""

import resource
import time
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import client.app
from deal_core.errors import UserError
from deal_core.lora.attach import learning_factors
from deal_core.privacy import record as record_mechanism
from deal_core.privacy.dpsgd import PrivateGradients
from deal_core.privacy.events import composed
from deal_core.privacy.noise import SecureNoise, SeededNoise
from deal_core.privacy.record import NoMechanism, RecordMechanism
from deal_core.randomness import seeded
from tests.client.instructions import HONEST, POLICIES, Bent, histories
from tests.client.real_site import LABELS, RealSite, asked, code, rows, start
from tests.slow import slow_but

SECRET = "Maria K., born 1961-04-03"
CODES = {"ok", "no-data", "refused", "failed", "budget-spent", "policy", "withheld"}


class HalfSilent(SecureNoise):
    """A real site's noise with next to no normals: what is left is what the noise would hide. Not
    none at all: a step from a gradient of zeros has to change something."""

    def __init__(self):
        super().__init__()
        self._drawn = SeededNoise(seeded("half silent"))
        self._normals = SeededNoise(seeded("nearly silent"))

    def uniform(self, count):
        return self._drawn.uniform(count)

    def normal(self, shape):
        return 1e-6 * self._normals.normal(shape)


@dataclass
class Seen:
    """What happened inside the site during a request."""

    mechanisms: list[object] = field(default_factory=list)
    sources: list[object] = field(default_factory=list)
    first_sum: torch.Tensor | None = None


@pytest.fixture(scope="module")
def watch():
    """The site's mechanisms, as they are, with a witness."""
    seen = Seen()
    with pytest.MonkeyPatch.context() as patch:
        for mechanism in (record_mechanism.RecordMechanism, NoMechanism):
            patch.setattr(mechanism, "update", _watched(mechanism.update, seen))
        patch.setattr(PrivateGradients, "accumulate", _summed(PrivateGradients.accumulate, seen))
        patch.setattr(record_mechanism, "SecureNoise", HalfSilent)
        models = {}
        patch.setattr(client.app, "_runtime", _one_model(client.app._runtime, models))
        yield seen


def _watched(original, seen):
    def update(mechanism, request, site, train):
        seen.mechanisms.append(mechanism)

        def training(gradients):
            seen.sources.append(gradients)
            return train(gradients)

        return original(mechanism, request, site, training)

    return update


def _summed(original, seen):
    def accumulate(self, module, objective, batch):
        assert len({self.record_ids[i] for i in batch}) == len(batch)
        loss = original(self, module, objective, batch)
        if seen.first_sum is None:
            factors = learning_factors(module)
            flat = [factors[name].grad.flatten().double() for name in sorted(factors)]
            seen.first_sum = torch.cat(flat) * self.expected_batch
        return loss

    return accumulate


def _one_model(original, models):
    """Loading the base model anew for every config is all that this saves."""

    def runtime(settings_, site):
        runtime = original.__wrapped__(settings_, site)
        config = runtime.experiment
        key = config.adapter, config.train.max_length
        if key not in models:
            models[key] = runtime.model
        runtime.__dict__["model"] = models[key]
        return runtime

    return runtime


LABELS_OF = {
    "all": LABELS,
    "less": {**LABELS, "surgery": ("Surgery",)},
    "fewer tasks": {"surgery": LABELS["surgery"]},
    "more": {**LABELS, "undeclared": ("A", "B")},
}


def ask(site, case, seen):
    """Send it; what left, what happened inside, and what was written into the ledger."""
    seen.mechanisms, seen.sources, seen.first_sum = [], [], None
    before = len(site.events)
    experiment = asked(
        "train.precision=float32",
        "train.max_length=16",
        *case.config,
        labels=LABELS_OF[case.labels],
    )
    fields = {**case.fields, "task": ""} if case.kind == "evaluate" else case.fields
    reply = site.answer(experiment, fields, start(experiment, case.loud), case.run, case.kind)
    return reply, Seen(seen.mechanisms, seen.sources, seen.first_sum), site.events[before:]


def check(site, case, reply, seen, new, earlier):
    """What the policy promises, after ``earlier`` replies of the site."""
    assert code(reply) in CODES
    assert SECRET not in str(reply.content)
    update_left = "lora" in reply.content.array_records
    demanded = object if case.policy == "open" else RecordMechanism
    for mechanism, source in zip(seen.mechanisms, seen.sources, strict=False):
        assert isinstance(mechanism, demanded)
        if demanded is RecordMechanism:
            check_source(site, case, source)
    counts = counts_in(reply)
    charged = [event for event in new if event.phase != "evaluate"]
    counted = [event for event in new if event.phase == "evaluate"]
    if update_left and not seen.sources:
        assert charged == []  # kept from the first time: the same to the byte
        assert values(reply) in [values(each) for each in earlier]
    elif update_left:
        assert len(charged) == 1
        assert charged[0].task == case.fields["task"]
        assert charged[0].protected == (case.policy != "open" or charged[0].mechanism != "none")
        assert not charged[0].simulation_only
    else:
        assert charged == []
    if counts and not counted:  # likewise
        assert counts in [counts_in(each) for each in earlier]
    else:
        assert bool(counted) == bool(counts)
    if case.policy in ("strict", "disjoint", "groups"):
        assert not counts
    if case.policy != "open":
        assert all(event.protected for event in new)
        # of 120 records, or of 30 groups
        assert all(event.delta <= (1e-2 if case.policy == "groups" else 1e-3) for event in new)
        unit = ("group", "patient") if case.policy == "groups" else ("record", "")
        assert {(event.unit, event.unit_column) for event in new} <= {unit}
        events = site.events
        if events:
            delta = max(event.delta for event in events)  # the policy's: runs may ask for less
            assert composed(events, delta, case.policy == "disjoint") <= 1 + 1e-6


def check_source(site, case, source):
    """A private training reads the planned records of the one task that it is charged to."""
    assert isinstance(source, PrivateGradients)
    assert isinstance(source.noise, SecureNoise)
    task = case.fields["task"]
    rows_read = {each.row for each in source.record_ids}
    assert all(each.task == task for each in source.record_ids)
    assert len(rows_read) == len(source.record_ids) == len(source.data)
    assert len(source.data) == len(site.data[task])
    if case.policy == "groups":
        assert len(source.groups) == 10
    else:
        assert len(source.groups) == len(source.data)
    assert source.noise_multiplier > 0.1


def counts_in(reply):
    """Counts of right answers that left; empty: none did."""
    metrics = reply.content.metric_records.get("metrics", {})
    beside = reply.content.config_records.get("counts", {})
    found = metrics if "correct" in metrics else beside
    return [list(found[name]) for name in ("correct", "correct_all", "examples") if name in found]


def values(reply):
    """The bytes of an update."""
    record = reply.content.array_records.get("lora", {})
    return {key: array.data for key, array in record.items()}


def neighbours(folder, policy):
    """Two sites that differ by what is in one record of one task."""
    sites = []
    for name, text in (("one", "surgery case seen on ward 3"), ("other", f"{SECRET} 1e400 \x00")):
        (folder / name).mkdir(parents=True)
        data = {task: rows(task) for task in LABELS}
        data["surgery"][1] = text, "Surgery"  # a row that the first sample draws
        sites.append(RealSite(folder / name, policy=POLICIES[policy], data=data, each=4))
    return sites[0], sites[1]


def play(folder, cases, seen):
    """The same requests to two neighbours, one after the other."""
    one, other = neighbours(folder, cases[0].policy)
    earlier = {}
    for case in cases:
        try:
            answers = [(site, *ask(site, case, seen)) for site in (one, other)]
        except UserError:
            return  # a config that no server could send: it cannot be parsed
        for site, reply, inside, new in answers:
            before = earlier.setdefault(site.folder, [])
            check(site, case, reply, inside, new, before)
            before.append(reply)
        (_, first, inside, _), (_, second, beside, _) = answers
        assert code(first) == code(second)
        assert set(first.content) == set(second.content)
        if inside.first_sum is not None and beside.first_sum is not None:
            bound = inside.sources[0].max_grad_norm
            # one record in another's place: two bounds
            difference = float((inside.first_sum - beside.first_sum).norm())
            assert difference <= 2 * bound * (1 + 1e-6)


OPTIONS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=2, **OPTIONS)
@given(cases=histories())
def test_no_instruction_breaks_what_a_site_promises(watch, tmp_path_factory, cases):
    play(tmp_path_factory.mktemp("sites"), cases, watch)


TIGHT = ("privacy.max_grad_norm=0.01", "privacy.sample_rate=1.0")
SURGERY = {"task": "surgery"}


def test_what_is_promised_without_a_mechanism_is_looked_at(watch, tmp_path):
    case = Bent("train", SURGERY, HONEST["open"], "all", 0.0, "run-1", "open")
    play(tmp_path, [case], watch)
    assert watch.sources


@pytest.mark.parametrize("policy", slow_but(["strict", "groups"], "strict"))
def test_one_record_moves_the_first_sum_by_its_bound_and_no_more(
    watch, tmp_path, monkeypatch, policy
):
    """All records are drawn and clipped; with looser clipping the same comparison fails."""
    config = (*HONEST.get(policy, ("privacy.mechanism=record",)), *TIGHT)
    case = Bent("train", SURGERY, config, "all", 0.0, "run-1", policy)
    moved = moved_by_one_record(tmp_path / "as-it-is", case, watch)
    assert 0.1 * 0.01 < moved <= 2 * 0.01 * (1 + 1e-6)
    bound = "deal_core.privacy.dpsgd.clipping_bound"
    monkeypatch.setattr(bound, lambda norm, entries, bits: 1e3)
    assert moved_by_one_record(tmp_path / "unclipped", case, watch) > 10 * 0.01


def moved_by_one_record(folder, case, seen):
    """How far the first sums of two neighbours are apart."""
    sums = [ask(site, case, seen)[1].first_sum for site in neighbours(folder, case.policy)]
    return float((sums[0] - sums[1]).norm())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_instruction_of_many_breaks_what_a_site_promises(watch, tmp_path_factory):
    """At least 500 instructions; time and memory of the worst are printed."""
    taken = []

    @settings(max_examples=280, **OPTIONS)
    @given(cases=histories())
    def many(cases):
        for _ in cases:
            taken.append(0.0)
        began = time.monotonic()
        play(tmp_path_factory.mktemp("sites"), cases, watch)
        taken[-1] = time.monotonic() - began

    many()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(taken)} instructions, the longest history {max(taken):.1f} s, peak {peak:.0f} MB")
    assert len(taken) >= 500
