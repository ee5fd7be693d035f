"""Mechanism ``record``: what becomes of a site's budget; no model is needed to keep it."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from deal_core.config.file import run_name
from deal_core.config.privacy import PrivacyConfig
from deal_core.errors import UserError
from deal_core.methods import METHODS
from deal_core.privacy.events import Budget, composed, unprotected_event
from deal_core.privacy.interface import Site
from deal_core.privacy.ledger import Ledger
from deal_core.privacy.noise import SecureNoise, SeededNoise
from deal_core.privacy.policy import (
    SPENDING,
    BudgetSpent,
    OutsidePlan,
    Policy,
    default_delta,
    figures_allowed,
    terms,
)
from deal_core.protection import (
    READ_BATCHES_ALONE,
    UNPROTECTED,
    make_mechanism,
    sums_noise_multiplier,
)
from tests.deal_core.privacy.record_requests import FEW, TASKS, Maker, ask, experiment

BOTH = frozenset({"lora_A", "lora_B"})
SAMPLED = {"task0": 160, "task1": 160, "task2": 32}
UNITS = sum(FEW.values())
DELTA = default_delta(UNITS)


def test_a_whole_run_spends_its_budget_and_not_more(site):
    """epsilon = 3 over 4 rounds and 3 tasks; one that is solved for each round is spent in each."""
    mechanism, make = make_mechanism(experiment()), Maker()
    told = [
        mechanism.update(ask(task, n, SAMPLED), site, make).figures["epsilon"]
        for task in TASKS
        for n in range(1, 5)
    ]
    delta = default_delta(sum(SAMPLED.values()))
    spent = composed(site.ledger().events(), delta)
    assert 2.99 < spent <= 3.0
    assert told[-1] == spent
    assert told == sorted(told)
    assert len({source.noise_multiplier for source in make.seen}) == 1
    assert all(source.sample_rate == min(1, 32 / len(source.data)) for source in make.seen)
    assert all(source.expected_batch == 32 for source in make.seen)
    assert all(source.steps == math.ceil(1 / source.sample_rate) for source in make.seen)
    with pytest.raises(BudgetSpent):
        mechanism.update(ask("task2", 5, SAMPLED), site, make)
    assert len(make.seen) == 12  # refused before anything was trained


def test_class_sums_beside_updates_are_a_release_each_within_the_budget(site):
    asked = ("federation.rounds=1", "federation.clients=3", "method.prototype.enabled=on")
    beside = experiment(*asked)
    mechanism, make = make_mechanism(beside), Maker()
    for task in TASKS:
        mechanism.update(ask(task, 1), site, make)
        sums = replace(ask(task, 2), phase="prototypes", sums_noise=0.61)
        mechanism.update(sums, site, make)
    events = site.ledger().events()
    noise = sums_noise_multiplier(beside, len(TASKS))
    found = [(event.sample_rate, event.steps, event.noise_multiplier) for event in events[1::2]]
    assert found == [(1.0, 1, noise)] * len(TASKS)
    assert [event.slack > 0 for event in events] == [False, True] * len(TASKS)
    assert 2.99 < composed(events, DELTA) <= 3.0


def test_the_past_of_the_ledger_counts(site):
    first, make = make_mechanism(experiment("federation.rounds=2")), Maker()
    for n in (1, 2):
        first.update(ask("task0", n), site, make)
    second = make_mechanism(experiment("federation.rounds=2", "run.seed=1"))
    for task in TASKS:
        for n in (1, 2):
            second.update(ask(task, n, request=f"second {task} {n}"), site, make)
    assert make.seen[-1].noise_multiplier > make.seen[0].noise_multiplier
    assert composed(site.ledger().events(), DELTA) <= 3.0
    smaller = make_mechanism(experiment("privacy.target_epsilon=1.0"))
    with pytest.raises(BudgetSpent):
        smaller.update(ask("task0", 1, request="third"), site, make)


def test_a_message_that_arrives_twice_is_charged_once_and_answered_the_same(site):
    mechanism, make = make_mechanism(experiment()), Maker()
    one = mechanism.update(ask("task0", 1), site, make)
    two = make_mechanism(experiment()).update(ask("task0", 1), site, make)  # another process
    assert one.figures == two.figures
    for key, value in one.arrays.items():
        assert two.arrays[key].dtype == value.dtype
        np.testing.assert_array_equal(two.arrays[key], value)
    assert len(make.seen) == len(site.ledger().events()) == 1


def test_a_crash_before_the_charge_costs_nothing_and_releases_nothing(site):
    mechanism = make_mechanism(experiment())

    def crash(source):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mechanism.update(ask("task0", 1), site, crash)
    assert site.ledger().events() == []
    assert site.ledger().answer("task0 1") is None
    mechanism.update(ask("task0", 1), site, Maker())
    assert len(site.ledger().events()) == 1


def test_only_public_figures_go_with_an_update(site):
    figures = make_mechanism(experiment()).update(ask("task0", 1), site, Maker()).figures
    assert figures.keys() == {"num_examples", "epsilon", "delta", "n_delta", "simulation_only"}
    assert figures["num_examples"] == 1.0  # not 32


@pytest.mark.parametrize("disjoint", [False, True])
def test_a_site_without_records_of_a_task_answers_like_others(site, disjoint):
    """That a record's task has no other is nobody's business."""
    records, make = {**FEW, "task1": 0}, Maker()
    place = replace(site, policy=Policy(disjoint_tasks=disjoint))
    made = make_mechanism(experiment()).update(ask("task1", 1, records), place, make)
    assert made.figures["num_examples"] == 1.0
    assert [list(batch) for batch in make.seen[0].batches()] == [[]] * make.seen[0].steps


@pytest.mark.parametrize(
    ("noise", "simulated"),
    [("auto", True), ("secure", True), ("auto", False), ("seeded", False)],
)
def test_a_real_site_never_seeds(site, noise, simulated):
    make, place = Maker(), replace(site, simulated=simulated)
    mechanism = make_mechanism(experiment(f"privacy.noise={noise}"))
    figures = mechanism.update(ask("task0", 1), place, make).figures
    seeds = simulated and noise != "secure"
    assert isinstance(make.seen[0].noise, SeededNoise if seeds else SecureNoise)
    assert figures["simulation_only"] == float(seeds)
    assert site.ledger().events()[0].simulation_only == seeds


def test_a_policy_only_tightens(site):
    tight = replace(site, policy=Policy(max_epsilon=1.0, max_delta=1e-5))
    mechanism = make_mechanism(experiment())
    plan = mechanism._solve([], FEW, UNITS, tight)
    assert (plan.epsilon, plan.delta) == (1.0, 1e-5)
    loose = mechanism._solve([], FEW, UNITS, replace(site, policy=Policy(max_epsilon=50.0)))
    assert (loose.epsilon, loose.delta) == (3.0, DELTA)


def told(site, seed=0):
    """The figures beside the first update of a run."""
    budget = f"privacy.target_epsilon={3 + 3 * seed}"
    mechanism = make_mechanism(experiment("federation.rounds=1", f"run.seed={seed}", budget))
    return mechanism.update(ask("task0", 1, request=f"seed {seed}"), site, Maker()).figures


def test_what_left_without_protection_is_told_beside_an_epsilon(site):
    site.ledger().note(unprotected_event("run", "clear-counts", ("", "evaluate", 0, 0)))
    assert "void" not in told(site)  # of test records
    site.ledger().note(unprotected_event("run", "none", ("task0", "learn", 0, 1)))
    assert told(site, 1)["void"] == 1.0
    quiet = replace(site, policy=Policy(mechanism="record", spending=False))
    assert not figures_allowed(told(quiet, 2), quiet.policy).keys() & SPENDING


def test_whom_earlier_releases_count_on_is_told_beside_an_epsilon(site):
    assert "assumes_more" not in told(site)
    event = replace(site.ledger().events()[0], assumes="all sites but 1", run="another", steps=1)
    site.ledger().charge(event, Budget(100.0, 1e-3), "another", b"x")
    assert told(site, 1)["assumes_more"] == 1.0


@pytest.mark.parametrize("method", ["ewc", "replay"])
def test_methods_that_read_earlier_records_are_refused(method):
    with pytest.raises(UserError, match=method):
        make_mechanism(experiment(f"method.name={method}"))


def test_a_method_of_which_nobody_has_said_what_its_penalty_reads_is_refused(monkeypatch):
    monkeypatch.setitem(METHODS, "new", METHODS["sequential"])
    with pytest.raises(UserError, match="'new': nothing says that its penalty reads no record"):
        make_mechanism(experiment("method.name=new"))
    assert {*READ_BATCHES_ALONE, *UNPROTECTED, "new"} == METHODS.keys()
    assert not READ_BATCHES_ALONE.keys() & UNPROTECTED.keys()


def test_what_would_make_records_depend_on_each_other_is_refused():
    with pytest.raises(UserError, match=r'privacy.mechanism = "record"'):
        make_mechanism(experiment("stream.schedule=joint"))


def test_one_factor_a_round():
    one = make_mechanism(experiment())
    assert one.trained(BOTH) == {"lora_B"}
    assert one.trained(frozenset({"lora_A"})) == {"lora_A"}  # the rule's own choice


def test_disjoint_tasks_compose_in_parallel_once_their_ids_are_checked(site):
    parallel = replace(site, policy=Policy(disjoint_tasks=True, metrics="clear"))
    mechanism, make = make_mechanism(experiment()), Maker()
    for task in ("task0", "task1"):
        for n in range(1, 5):
            mechanism.update(ask(task, n), parallel, make)
    sequential = mechanism._solve([], FEW, UNITS, site).noise_multiplier
    assert make.seen[0].noise_multiplier < 0.8 * sequential
    events = site.ledger().events()
    assert composed(events, DELTA, disjoint_tasks=True) <= 3.0 < composed(events, DELTA)
    shared = replace(ask("task2", 1), ids=lambda: ["new", "task0 7"])
    with pytest.raises(OutsidePlan):
        mechanism.update(shared, parallel, make)
    assert len(make.seen) == 8


def test_no_experiment_can_declare_a_real_sites_tasks_disjoint(site):
    mechanism = make_mechanism(experiment("privacy.disjoint_tasks=true"))
    sequential = make_mechanism(experiment())._solve([], FEW, UNITS, site)
    for policy in (None, Policy(metrics="clear")):
        real = replace(site, policy=policy, simulated=False)
        assert mechanism._solve([], FEW, UNITS, real) == sequential
    simulated = mechanism._solve([], FEW, UNITS, replace(site, policy=None, simulated=True))
    assert simulated.disjoint_tasks
    assert simulated.noise_multiplier < sequential.noise_multiplier


def test_tasks_that_were_never_compared_do_not_compose_in_parallel(site):
    """An earlier run had declared nothing: its records may be in any task."""
    make, delta = Maker(), DELTA
    first = make_mechanism(experiment("run.seed=1", "privacy.target_epsilon=1.0"))
    for n in range(1, 4):
        first.update(ask("task0", n), site, make)
    declared = replace(site, policy=Policy(disjoint_tasks=True, metrics="clear"))
    later = make_mechanism(experiment())
    for task in ("task1", "task2"):
        for n in range(1, 4):
            later.update(ask(task, n), declared, make)
    events = site.ledger().events()
    assert [event.compared for event in events] == [False] * 3 + [True] * 6
    each = [[*events[:3], *events[at : at + 3]] for at in (3, 6)]
    expected = max(composed(some, delta) for some in each)
    assert composed(events, delta, disjoint_tasks=True) == pytest.approx(expected)
    assert expected > composed(events[3:6], delta)


def test_who_takes_the_declaration_back_tells_what_all_tasks_cost(site):
    declared = replace(site, policy=Policy(disjoint_tasks=True, metrics="clear"))
    mechanism, make = make_mechanism(experiment("federation.rounds=8")), Maker()
    first = mechanism.update(ask("task0", 1), declared, make).figures
    assert first["disjoint_tasks"] == 1.0
    second = mechanism.update(
        ask("task1", 1), replace(site, policy=Policy(metrics="clear")), make
    ).figures
    assert "disjoint_tasks" not in second
    assert second["epsilon"] == composed(site.ledger().events(), second["delta"])


def test_a_policy_that_tightens_during_a_run_holds_at_once(site):
    mechanism, make = make_mechanism(experiment()), Maker()
    for n in range(1, 4):
        mechanism.update(ask("task0", n), site, make)
    spent = composed(site.ledger().events(), DELTA)
    tighter = replace(site, policy=Policy(max_epsilon=spent))
    with pytest.raises(BudgetSpent):
        mechanism.update(ask("task0", 4), tighter, make)
    assert len(make.seen) == 3


def test_fewer_records_than_a_batch_are_all_in_every_batch_and_the_divisor_stays(site):
    make, records = Maker(), {"task0": 10, "task1": 32}
    make_mechanism(experiment()).update(ask("task0", 1, records), site, make)
    source = make.seen[0]
    assert [len(batch) for batch in source.batches()] == [10]
    assert (source.sample_rate, source.expected_batch) == (1.0, 32)


def site_at(folder, **policy):
    return Site(lambda: Ledger(folder), Policy(**policy), simulated=False)


def test_a_declaration_that_the_site_has_withdrawn_is_told_with_no_kept_update(tmp_path):
    alone = "method.prototype.enabled=off"  # the budget is that of the updates
    mechanism = make_mechanism(experiment("federation.rounds=1", alone))
    limits = {"mechanism": "record", "max_epsilon": 1.0}
    declared = site_at(tmp_path, **limits, disjoint_tasks=True)
    for number in range(3):
        told = mechanism.update(ask(f"task{number}", 1), declared, Maker())
    assert told.figures["disjoint_tasks"] == 1.0
    with pytest.raises(BudgetSpent):  # of a record in all three tasks more is spent
        mechanism.update(ask("task2", 1), site_at(tmp_path, **limits), Maker())


def test_a_kept_update_tells_the_spending_of_today(tmp_path):
    mechanism, site = make_mechanism(experiment("federation.rounds=1")), site_at(tmp_path)
    first = mechanism.update(ask("task0", 1), site, Maker())
    later = mechanism.update(ask("task1", 1), site, Maker())
    again = mechanism.update(ask("task0", 1), site, Maker())
    assert first.figures["epsilon"] < later.figures["epsilon"] == again.figures["epsilon"]
    assert len(site.ledger().events()) == 2


def test_a_largest_delta_takes_the_place_of_the_default_also_where_it_is_larger():
    asks = PrivacyConfig(mechanism="record", target_delta=0.01)
    assert terms(asks, Policy(max_delta=0.005), 1000)[1] == 0.005
    for policy in (None, Policy()):
        with pytest.raises(UserError, match=r"too large for 1000 records.*0\.0001 or less"):
            terms(asks, policy, 1000)


@pytest.mark.parametrize("units", [0, 1, 2, 9, 10, 11, 99, 100, 1000, 1001, 123456, 10**7])
def test_the_default_delta_times_the_number_of_records_is_a_tenth_at_most(units):
    delta = default_delta(units)
    assert units * delta <= 0.1 < 10 * max(units, 2) * delta + 1e-12
    terms(PrivacyConfig(mechanism="record", target_delta=delta), None, units)


def test_the_name_is_the_whole_digest_and_another_for_other_settings(make_experiment):
    names = {
        run_name(make_experiment(*changed))
        for changed in ((), ("run.seed=1",), ("train.learning_rate=0.02",), ("adapter.rank=4",))
    }
    assert len(names) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", name) for name in names)
