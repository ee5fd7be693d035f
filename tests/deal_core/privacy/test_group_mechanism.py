"""Mechanism ``record`` where groups are the unit: planned, charged and told by groups, and never
added to what was released for single records."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest

from deal_core.config.file import apply_overrides, parse_experiment
from deal_core.errors import UserError
from deal_core.privacy.certificate import certificate, check_certificate
from deal_core.privacy.events import SET_ASIDE, MixedUnits, composed, unprotected_event
from deal_core.privacy.interface import LocalUpdate
from deal_core.privacy.policy import OutsidePlan, Policy, default_delta
from deal_core.protection import make_mechanism
from tests.deal_core.privacy import record_requests
from tests.deal_core.privacy.record_requests import Maker
from tests.slow import slow_but

FEW = {"task0": 16, "task1": 12}
"""Groups of a task, all in every batch: a plan is solved at once."""
SAMPLED = {"task0": 120, "task1": 16}
EACH = 4
"""Records of a group."""


def experiment(*overrides):
    given = ("privacy.mechanism=record", "privacy.unit_column=patient", "federation.rounds=3")
    return parse_experiment(apply_overrides({}, [*given, *overrides]), "test")


def ask(task, server_round, request="", each=EACH, groups=FEW):
    return record_requests.ask(task, server_round, groups, request, each)


def ask_of_records(task, server_round, request=""):
    """The same of single records."""
    records = {name: EACH * count for name, count in FEW.items()}
    return record_requests.ask(task, server_round, records, request)


def whole_run(site, *overrides, groups=FEW):
    mechanism, make = make_mechanism(experiment(*overrides)), Maker()
    for task in groups:
        for server_round in (1, 2, 3):
            mechanism.update(ask(task, server_round, groups=groups), site, make)
    return make


@pytest.mark.parametrize("target", slow_but((1, 3, 8), 8))
def test_epsilon_by_group_is_that_of_another_accountant(site, target):
    """Rates and steps are written down here from the numbers of groups, not taken from the plan."""
    from opacus.accountants import PRVAccountant

    site = replace(site, policy=Policy(max_delta=1e-3))
    given = f"privacy.target_epsilon={target}.0", "privacy.target_delta=1e-3"
    make = whole_run(site, *given, groups=SAMPLED)
    events, other = site.ledger().events(), PRVAccountant()
    assert len({event.noise_multiplier for event in events}) == 1
    for count in SAMPLED.values():
        steps = 3 * math.ceil(count / 16)
        other.history.append((events[0].noise_multiplier, 16 / count, steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = other.get_epsilon((1 - SET_ASIDE) * 1e-3, eps_error=0.001)
    assert composed(events, 1e-3) == pytest.approx(theirs, rel=0.01)
    for event, source in zip(events, make.seen, strict=True):
        count = SAMPLED[event.task]
        assert (event.sample_rate, event.steps) == (16 / count, math.ceil(count / 16))
        assert (source.sample_rate, source.steps) == (event.sample_rate, event.steps)
        assert source.expected_batch == 16
        assert len(source.groups) == count
        assert len(source.data) == EACH * count
        assert (event.unit, event.unit_column) == ("group", "patient")


def test_rate_and_delta_are_of_groups(site):
    make = Maker()
    mechanism = make_mechanism(experiment("privacy.sample_rate=0.25"))
    figures = mechanism.update(ask("task1", 1), site, make).figures
    assert figures["delta"] == default_delta(28) == 1e-3
    assert figures["n_delta"] == pytest.approx(28e-3)
    assert make.seen[0].expected_batch == 3  # of 12 groups
    assert site.ledger().events()[0].steps == 4


def test_how_many_records_a_group_has_is_no_part_of_the_plan(site):
    """Otherwise a code would tell of the records of one group."""
    mechanism, make = make_mechanism(experiment()), Maker()
    mechanism.update(ask("task0", 1), site, make)
    mechanism.update(ask("task0", 2, each=9), site, make)
    first, second = (replace(event, server_round=0) for event in site.ledger().events())
    assert first == second
    more = replace(ask("task0", 3), groups=list(range(64)))
    with pytest.raises(OutsidePlan, match="64 groups, but 16 are planned"):
        mechanism.update(more, site, make)


@pytest.mark.parametrize("numbers", [None, [], [0] * 7])
def test_records_without_a_group_are_not_read(site, numbers):
    bad = replace(ask("task0", 1), groups=numbers)
    with pytest.raises(OutsidePlan):
        make_mechanism(experiment()).update(bad, site, Maker())
    assert site.ledger().events() == []


def test_where_training_fails_the_noise_is_that_of_as_many_steps(site):
    sources = []

    def fails(source):
        sources.append(source)
        if len(source.data):
            raise RuntimeError("a record that cannot be trained on")
        return LocalUpdate({"w": np.zeros((2, 2), np.float32)}, {})

    make_mechanism(experiment()).update(ask("task0", 1), site, fails)
    assert [list(batch) for batch in sources[1].batches()] == [[]] * sources[0].steps
    assert len(site.ledger().events()) == 1


RECORD = "privacy.unit_column="
OTHER = "privacy.unit_column=ward"


@pytest.mark.parametrize(
    ("first", "second"), [(RECORD, OTHER), (OTHER, RECORD), (OTHER, "privacy.unit_column=patient")]
)
def test_what_was_released_for_another_unit_is_never_added_up(site, first, second):
    ask_of = {each: ask_of_records if each == RECORD else ask for each in (first, second)}
    make_mechanism(experiment(first)).update(ask_of[first]("task0", 1), site, Maker())
    make = Maker()
    later = make_mechanism(experiment(second))
    with pytest.raises(OutsidePlan, match="cannot be added up"):
        later.update(ask_of[second]("task0", 1, "later"), site, make)
    assert make.seen == []  # refused before anything was trained
    assert len(site.ledger().events()) == 1


def test_of_two_that_begin_at_once_with_two_units_one_is_charged(site):
    """Both have found an empty ledger; the second finds it at the charge."""
    groups, records = make_mechanism(experiment()), make_mechanism(experiment(RECORD))

    def meanwhile(source):
        records.update(ask_of_records("task1", 1, "the other"), site, Maker())
        return Maker()(source)

    with pytest.raises(MixedUnits):
        groups.update(ask("task0", 1), site, meanwhile)
    assert [event.unit for event in site.ledger().events()] == ["record"]


def test_a_ledger_that_was_mixed_all_the_same_gives_no_epsilon(site):
    make_mechanism(experiment()).update(ask("task0", 1), site, Maker())
    (event,) = site.ledger().events()
    for other in (
        replace(event, unit="record", unit_column=""),
        replace(event, unit_column="ward"),
    ):
        with pytest.raises(MixedUnits, match="cannot be added up"):
            composed([event, other], 1e-3)
    unprotected = unprotected_event("run", "none", ("task0", "learn", 0, 1))
    assert composed([event, unprotected], 1e-3) == composed([event], 1e-3)


def test_the_certificate_names_unit_and_column(site):
    whole_run(site)
    signed = certificate(site.ledger())
    statement = check_certificate(signed)
    assert (statement["unit"], statement["unit_column"]) == ("group", "patient")
    assert statement["n_delta"] == pytest.approx(28e-3)  # of 16 and 12 groups
    assert {event["unit"] for event in statement["events"]} == {"group"}
    assert statement["epsilon"] == composed(site.ledger().events(), 1e-3)


def test_disjoint_tasks_are_compared_by_group(site):
    declared = replace(site, policy=Policy(disjoint_tasks=True, unit_column="patient"))
    mechanism, make = make_mechanism(experiment()), Maker()
    mechanism.update(ask("task0", 1), declared, make)
    shared = replace(ask("task1", 1), ids=lambda: ["task0 7", "task1 1"])
    with pytest.raises(OutsidePlan, match="a group of task 'task1' is in task 'task0'"):
        mechanism.update(shared, declared, make)


def test_a_limit_that_counts_records_does_not_go_with_groups():
    with pytest.raises(UserError, match="max_train takes depends on how many a group has"):
        make_mechanism(experiment("data.max_train=100"))


def test_without_a_mechanism_a_unit_promises_nothing():
    assert make_mechanism(experiment("privacy.mechanism=none")).unit is None
