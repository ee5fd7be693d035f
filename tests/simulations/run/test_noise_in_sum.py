"""Runs whose noise is in a secure sum: the real apps, the sites' own ledgers, what leaves."""

import base64
import json
import math
from collections import Counter
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from scipy.optimize import brentq
from scipy.stats import norm

from deal_core.config.experiment import PrivacyConfig
from deal_core.data import open_source
from deal_core.errors import UserError
from deal_core.models import load_model
from deal_core.privacy.accountant import DpEvent, epsilon_of
from deal_core.privacy.certificate import certificate, check_certificate
from deal_core.privacy.distributed_noise import trust_in_sum
from deal_core.privacy.events import KEEPER_ALONE, Budget
from deal_core.privacy.ledger import Ledger
from deal_core.privacy.policy import Policy
from deal_core.protection import common_noise_multiplier, make_mechanism, shares_of
from server.results import read_results
from simulations.engines.inprocess import FIRST_CLIENT_NODE
from simulations.report.ledger import verify
from tests.ledger_events import ledger_event
from tests.simulations.runs import IN_SUM, LoseOneUpdate, at, learnt_adapter, run_in_process
from tests.sizes import TINY_MODEL

pytestmark = pytest.mark.usefixtures("one_model")

FEW = ("data.max_train=12", "data.max_test=4", "train.max_length=8", TINY_MODEL[0])


@pytest.fixture(scope="module")
def finished(make_experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sum")
    experiment = make_experiment(*IN_SUM, *FEW)
    left = set()
    answered = Counter()

    def see(reply):
        left.update(reply.content.array_records)
        if {"secure", "metrics"} <= set(reply.content):
            client = str(reply.metadata.src_node_id - FIRST_CLIENT_NODE)
            answered[client] += 1
            charged = len(Ledger(folder / "sites" / client).events())
            assert charged == answered[client], "an update left before it was charged"
        return reply

    events = run_in_process(at(experiment, folder), see)
    assert set(answered) == set("012")
    return experiment, folder, events, left


def test_no_array_leaves_a_client(finished):
    """Only masked bytes do: an update, or a gradient sum, would be an array."""
    assert finished[3] == set()


def test_every_site_charges_the_common_noise_before_it_answers(finished):
    experiment, folder, events, _ = finished
    multiplier = common_noise_multiplier(experiment, 2)
    for client in "012":
        held = Ledger(folder / "sites" / client).events()
        assert [(e.task, e.server_round, e.steps) for e in held] == [
            (task, number, 1) for task in experiment.data.tasks for number in (1, 2)
        ]
        assert {e.noise_multiplier for e in held} == {multiplier}
        assert all(e.slack > 0 and "all sites but 1" in e.assumes for e in held)
    assert sum(event["event"] == "round_lost" for event in events) == 0


def test_whom_an_epsilon_counts_on_stands_beside_it_in_all_that_a_site_shows(finished):
    folder = finished[1] / "sites" / "0"
    (trust,) = {event.assumes for event in Ledger(folder).events()}
    signed = certificate(Ledger(folder))
    assert check_certificate(signed)["assumes"] == f"assumed honest: {trust}"
    out = StringIO()
    verify(str(folder), "", Console(file=out, width=200), False)
    assert trust in out.getvalue().replace("\n", " ")
    assert "nobody" not in out.getvalue()


@pytest.mark.parametrize(
    ("lie", "named"),
    [
        ({"assumes": KEEPER_ALONE}, "its 'assumes' is not"),
        ({"simulation_only": False}, "its 'simulation_only' is not"),
        ({"unit": "client"}, "its 'unit' is not"),
        ({"composed_over": "everything"}, "its 'composed_over' is not"),
        ({"delta": 1e-9}, "its 'delta' is not"),
        ({"epsilon": 0.1}, "its 'epsilon' is not"),
        ({"entries": 1}, "its 'entries' is not"),
        ({"unprotected": 5}, "its 'unprotected' is not"),
        ({"version": 4}, "of version 4, and this is version 7"),
    ],
)
def test_a_certificate_that_tells_what_its_events_do_not_is_none(finished, lie, named):
    ledger = Ledger(finished[1] / "sites" / "0")
    statement = certificate(ledger)["statement"] | lie
    key = Ed25519PrivateKey.generate()
    sealed = key.sign(json.dumps(statement, sort_keys=True).encode())
    parts = {"public_key": key.public_key().public_bytes_raw(), "signature": sealed}
    forged = {name: base64.b64encode(part).decode() for name, part in parts.items()}
    with pytest.raises(UserError, match=named):
        check_certificate({"statement": statement, **forged})


def test_a_site_that_takes_keys_from_the_server_counts_on_it_in_that():
    privacy = PrivacyConfig(mechanism="record", noise_share="sum")
    vouched = Policy(mechanism="record", noise_share="sum", server_vouches_for_peers=True)
    told = trust_in_sum(privacy, vouched)
    assert told.startswith(trust_in_sum(privacy))
    assert "the server, which passes on the keys of sites, poses as none" in told
    assert trust_in_sum(privacy, Policy(noise_share="sum")) == trust_in_sum(privacy)


def test_epsilon_is_that_of_an_independent_accountant(finished):
    """Four Gaussian mechanisms without sampling are one of half the noise, of which delta is known
    in closed form (Balle & Wang, ICML 2018, theorem 8)."""
    experiment, folder, _, _ = finished
    results = read_results(folder)
    multiplier = common_noise_multiplier(experiment, 2) / 2

    def delta(epsilon):
        first = norm.cdf(1 / (2 * multiplier) - epsilon * multiplier)
        return first - math.exp(epsilon) * norm.cdf(-1 / (2 * multiplier) - epsilon * multiplier)

    expected = brentq(lambda epsilon: delta(epsilon) - 1e-3, 1e-6, 50.0)
    for epsilon in results.privacy.epsilon.values():
        assert epsilon == pytest.approx(expected, rel=0.01)
        assert epsilon <= experiment.privacy.target_epsilon
    assert "may pool what they know with the server" in results.privacy.assumes


def test_the_model_moves_along_label_directions_alone(finished):
    experiment, folder, *_ = finished
    learnt = learnt_adapter(folder)
    assert set(learnt) == {f"base_model.model.pooled.lora_{f}.weight" for f in "AB"}
    A, B = (learnt[f"base_model.model.pooled.lora_{f}.weight"].astype(float) for f in "AB")
    encoder = load_model(experiment.model, experiment.adapter, 8)
    source = open_source(experiment.data)
    labels = [source.load(task).labels for task in experiment.data.tasks]
    names = [encoder.label_vectors(own).cpu().double().numpy() for own in labels]
    spanned = np.concatenate([own - own.mean(0) for own in names])
    rank = np.linalg.matrix_rank(spanned, tol=1e-5)
    basis = np.linalg.svd(spanned, full_matrices=False)[2][:rank]
    moved = B @ A
    assert np.abs(moved).max() > 0
    assert np.linalg.norm(moved - basis.T @ (basis @ moved)) < 1e-4 * np.linalg.norm(moved)


def test_a_lost_site_costs_the_round_and_not_the_run(make_experiment, tmp_path):
    """Its share of the noise is counted on: the others reveal nothing."""
    asked = ("federation.deadline_seconds=0.2", "federation.quorum=0.3")
    experiment = make_experiment(*IN_SUM, *FEW, *asked)
    events = run_in_process(at(experiment, tmp_path), LoseOneUpdate())
    rounds = [event for event in events if event["event"] == "round_lost"]
    assert len(rounds) == 1
    assert "below" in rounds[0]["reason"]
    assert read_results(tmp_path).average_accuracy is not None


@pytest.mark.slow
def test_a_site_with_a_past_that_leaves_no_room_takes_no_part(make_experiment, tmp_path):
    experiment = at(make_experiment(*IN_SUM, "federation.quorum=0.3"), tmp_path)
    spent = ledger_event(
        sample_rate=1.0, noise_multiplier=0.5, steps=1, delta=1e-3, simulation_only=True
    )
    Ledger(tmp_path / "sites" / "1").charge(spent, Budget(100.0, 1e-3), "earlier", b"")
    events = run_in_process(experiment)
    assert {e["client"] for e in events if e["event"] == "client_idle"} == {"1"}
    lost = [e for e in events if e["event"] == "round_lost"]
    assert len(lost) == 4  # of two tasks; without its share no sum is ever made
    assert len(Ledger(tmp_path / "sites" / "1").events()) == 1
    assert len(Ledger(tmp_path / "sites" / "0").events()) == 2  # it is counted on once a task


def test_the_common_noise_meets_the_target_and_of_its_own_it_is_whole(make_experiment):
    own = make_experiment(*IN_SUM, "privacy.noise_share=site")
    make_mechanism(own)
    assert (shares_of(own), shares_of(make_experiment(*IN_SUM))) == (1, 2)
    experiment = make_experiment(*IN_SUM, "privacy.target_epsilon=2.0")
    multiplier = common_noise_multiplier(experiment, 2)
    assert 1.9 < epsilon_of([DpEvent(1.0, multiplier, 4)], 1e-3) <= 2.0


def test_files_of_a_site_are_its_own(finished):
    _, folder, _, _ = finished
    paths = list(Path(folder).glob("sites/*/secure-sum.*"))
    assert paths
    assert [path for path in paths if path.stat().st_mode & 0o077] == []
