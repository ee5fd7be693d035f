"""Runs under client-level privacy: by the real apps, with a trusted server and without."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from flwr.app import Message

from client.app import make_app
from deal_core.config.run_config import to_run_config
from deal_core.errors import UserError
from deal_core.privacy.accounting.ledger import Ledger
from deal_core.privacy.accounting.ledger_event import composed
from server.results import read_results
from server.run import run
from simulations.engines.flower_identity import assume_identity
from simulations.engines.inprocess import InProcessGrid
from simulations.run.live_view import plain_lines
from simulations.run.progress import Progress
from simulations.run.summary import privacy_text
from tests.simulations.runs import run_in_process

pytestmark = pytest.mark.usefixtures("one_model")

CLIENT = ("privacy.mechanism=client", "privacy.target_delta=1e-3", "train.precision=float32")


@pytest.fixture(scope="module")
def trusted(make_experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trusted")
    experiment = make_experiment(*CLIENT, "privacy.noise=seeded", f'run.out="{folder}"')
    figures: set[str] = set()

    def see(reply: Message) -> Message:
        if "lora" in reply.content.array_records:
            figures.update(reply.content.metric_records["metrics"])
        return reply

    return experiment, folder, run_in_process(experiment, see), figures


def test_the_results_say_what_the_servers_ledger_holds(trusted):
    _, folder, _, _ = trusted
    privacy = read_results(folder).privacy
    assert (privacy.mechanism, privacy.unit, privacy.delta) == ("client", "client", 1e-3)
    events = Ledger(folder / "privacy").events()
    assert len(events) == 4  # 2 tasks, 2 rounds
    spent = composed(events, 1e-3)
    assert privacy.epsilon == {"0": spent, "1": spent}
    assert 7.9 < spent <= 8.0
    assert privacy.simulation_only
    text = privacy_text(privacy)
    for part in ("epsilon", "delta", "per client", "all rounds and tasks", "simulation only"):
        assert part in text


def test_epsilon_is_never_shown_without_what_it_means(trusted):
    state, shown = Progress(), []
    for event in trusted[2]:
        state = state.update(event)
        shown += [line for line in plain_lines(event, state) if "epsilon" in line]
    assert len(shown) == 4
    for line in shown:
        for part in ("delta", "per client", "all rounds and tasks", "simulation only"):
            assert part in line


def test_a_trusting_client_sends_its_update_and_nothing_that_describes_it(trusted):
    assert trusted[3] == {"num_examples"}
    weights = {e["num_examples"] for e in trusted[2] if e["event"] == "client_finished"}
    assert weights == {1.0}


def test_a_run_goes_on_with_the_ledger_that_it_had_or_not_at_all(trusted, tmp_path):
    """A folder copied without it: what was released would be forgotten, and epsilon begin anew."""
    experiment, folder, _, _ = trusted
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("privacy"))
    changed = experiment.run.model_copy(update={"out": str(copy), "resume": True})
    with pytest.raises(UserError, match=r"privacy: holds fewer releases than the run has made"):
        run_in_process(experiment.model_copy(update={"run": changed}))


def test_stopped_after_the_charge_it_releases_the_same_mean_again(
    trusted, make_experiment, tmp_path, monkeypatch
):
    experiment, folder, _, _ = trusted
    changed = experiment.run.model_copy(update={"out": str(tmp_path)})
    again = experiment.model_copy(update={"run": changed})

    def stop(event: dict) -> None:
        if event["event"] == "round_finished" and event["server_round"] == 2:
            raise KeyboardInterrupt

    grid = InProcessGrid(make_app(), to_run_config(again), 2)
    with assume_identity(1, 1), pytest.raises(KeyboardInterrupt):
        run(grid, again, stop)
    assert len(Ledger(tmp_path / "privacy").events()) == 2  # charged, not yet handed out
    resumed = again.model_copy(update={"run": changed.model_copy(update={"resume": True})})
    run_in_process(resumed)
    assert read_results(tmp_path).privacy == read_results(folder).privacy
    assert read_results(tmp_path).accuracy_matrix == read_results(folder).accuracy_matrix
    assert len(Ledger(tmp_path / "privacy").events()) == 4


def test_a_round_that_draws_nobody_is_noise_and_is_charged(make_experiment, tmp_path):
    experiment = make_experiment(
        *CLIENT,
        "privacy.noise=seeded",
        f'run.out="{tmp_path}"',
        'data.tasks=["laboratory"]',
        "federation.clients=3",
        "federation.clients_per_round=1",
        "federation.rounds=6",
        "data.max_train=12",
        "data.max_test=12",
    )
    events = run_in_process(experiment)
    drawn = [e["clients"] for e in events if e["event"] == "round_started"]
    assert 0 in drawn
    assert len(set(drawn)) > 1
    charged = Ledger(tmp_path / "privacy").events()
    assert len(charged) == 6
    assert {e.sample_rate for e in charged} == {1 / 3}
    assert read_results(tmp_path).privacy.epsilon.keys() == {"0", "1", "2"}


def test_without_trust_every_client_adds_its_own_noise_and_charges_itself(
    make_experiment, tmp_path
):
    sent: list[np.ndarray] = []

    def see(reply: Message) -> Message:
        if "lora" in reply.content.array_records:
            arrays = [a.numpy() for a in reply.content.array_records["lora"].values()]
            sent.append(np.concatenate([a.ravel() for a in arrays]))
        return reply

    experiment = make_experiment(
        *CLIENT,
        "privacy.trusted_server=false",
        "federation.rounds=1",
        'data.tasks=["laboratory"]',
        f'run.out="{tmp_path}"',
    )
    run_in_process(experiment, see)
    privacy = read_results(tmp_path).privacy
    assert privacy.unit == "client"
    for client in "01":
        charged = Ledger(tmp_path / "sites" / client).events()
        assert [(e.mechanism, e.unit, e.sample_rate) for e in charged] == [
            ("client", "client", 1.0)
        ]
        assert privacy.epsilon[client] == composed(charged, 1e-3)
        assert 7.9 < privacy.epsilon[client] <= 8.0
        # noise of both neighbours' distance: 2 * multiplier * bound; the update is far below it
        noise = 2 * charged[0].noise_multiplier
        assert [float(each.std()) for each in sent] == pytest.approx([noise] * 2, rel=0.02)
    assert abs(np.corrcoef(*sent)[0, 1]) < 0.05  # each its own draw
    assert not Ledger(tmp_path / "privacy").path.exists()
