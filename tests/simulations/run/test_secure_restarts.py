"""Server and clients that end in any exchange of a secure sum and start again: the same sum."""

import pytest

from client import requests
from client.gate import Refusal
from client.secure_exchanges import STATE, USED, SecureStore
from deal_core.secure_sum.site_state import SiteState
from simulations.engines.inprocess import InProcessGrid
from tests.simulations.run.secure_runs import EXCHANGES, SHORT, client_of, exchange_of, rounds
from tests.simulations.runs import same as same_arrays
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")

CLIENTS = 4
SETTINGS = (
    *SHORT,
    f"federation.clients={CLIENTS}",
    "federation.rounds=2",
    "federation.deadline_seconds=0.3",
    "aggregation.rule=ffa",
)


class Crash(BaseException):
    """A client's process ends."""


class CrashingGrid(InProcessGrid):
    """Loses the reply of a client whose process ends."""

    def _execute(self, request):
        try:
            return super()._execute(request)
        except Crash:
            return None


@pytest.fixture
def experiment(make_experiment):
    return make_experiment(*SETTINGS)


@pytest.fixture(scope="module")
def whole(make_experiment, tmp_path_factory, one_model):
    """Two rounds of which nothing is cut off."""
    return rounds(make_experiment(*SETTINGS), tmp_path_factory.mktemp("whole"), last=2)


def same(one, two):
    return same_arrays(one.factors, two.factors)


def ending(exchange, number=2):
    """End the server with the so-manyeth reply of an exchange, before it has seen it."""
    left = {"replies": number}

    def see(reply):
        left["replies"] -= exchange_of(reply) == exchange
        if exchange_of(reply) == exchange and left["replies"] == 0:
            raise KeyboardInterrupt
        return reply

    return see


@pytest.mark.parametrize("exchange", slow_but(EXCHANGES, "mask"))
def test_a_server_that_starts_again_goes_on_with_the_same_round(
    experiment, whole, tmp_path, exchange
):
    with pytest.raises(KeyboardInterrupt):
        rounds(experiment, tmp_path / "run", ending(exchange))
    resumed = rounds(experiment, tmp_path / "run", last=2)
    assert resumed.told("summed", "sites") == [CLIENTS, CLIENTS]
    assert resumed.told("client_failed", "client") == []
    assert same(resumed, whole)


@pytest.mark.slow
def test_a_server_that_ends_when_the_sum_is_known_and_not_kept_gets_it_again(
    experiment, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("server.wire.sendable", lambda state: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            rounds(experiment, tmp_path / "run")
    assert same(rounds(experiment, tmp_path / "run", last=2), whole)


def crashing(monkeypatch, client, exchange, point):
    """End a client's process once, in an exchange, before or after its state is written."""
    now = {"exchange": "", "client": ""}
    keep = SecureStore.keep

    def kept(store, state):
        hit = store.folder.name == client and now["exchange"] == exchange
        if hit and point == "before":
            now["exchange"] = "over"
            raise Crash
        keep(store, state)
        if hit:
            now["exchange"] = "over"
            raise Crash

    monkeypatch.setattr(SecureStore, "keep", kept)
    push = InProcessGrid._execute

    def executed(grid, request):
        if now["exchange"] != "over":
            now["exchange"] = exchange_of(request)
        return push(grid, request)

    monkeypatch.setattr(InProcessGrid, "_execute", executed)
    return now


@pytest.mark.slow
@pytest.mark.parametrize("point", ["before", "after"])
@pytest.mark.parametrize("exchange", EXCHANGES[1:])
def test_a_client_that_starts_again_costs_one_reply(
    experiment, tmp_path, monkeypatch, exchange, point
):
    crashing(monkeypatch, "2", exchange, point)
    ran = rounds(experiment, tmp_path / "run", last=2, grid_of=CrashingGrid)
    first = CLIENTS if exchange in ("confirm", "unmask") else CLIENTS - 1
    assert ran.told("summed", "sites") == [first, CLIENTS]


@pytest.mark.parametrize("point", slow_but(["before", "after"], "after"))
@pytest.mark.parametrize("exchange", slow_but(EXCHANGES, "unmask"))
def test_where_both_start_again_the_sum_is_the_same(
    experiment, whole, tmp_path, monkeypatch, exchange, point
):
    """The client ends in the exchange, and the server before it is over: it asks once more."""
    crashing(monkeypatch, "2", exchange, point)
    with pytest.raises(KeyboardInterrupt):
        rounds(experiment, tmp_path / "run", ending(exchange, 3), grid_of=CrashingGrid)
    resumed = rounds(experiment, tmp_path / "run", last=2)
    assert resumed.told("summed", "sites") == [CLIENTS, CLIENTS]
    assert same(resumed, whole)


def test_a_client_that_ends_between_its_two_records_masks_no_second_time(
    experiment, whole, tmp_path, monkeypatch
):
    """That the update is in a sum is written first: else another round could have it too."""
    keep = SecureStore.keep_used

    def crash(store, used):
        keep(store, used)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(SecureStore, "keep_used", crash)
        with pytest.raises(ValueError, match="the quorum is"):
            rounds(experiment, tmp_path / "run", grid_of=CrashingGrid)
    assert all((tmp_path / f"run/sites/{k}" / USED).exists() for k in range(CLIENTS))
    assert same(rounds(experiment, tmp_path / "run", last=2), whole)


def test_a_client_that_has_lost_its_state_sits_the_run_out(experiment, tmp_path):
    rounds(experiment, tmp_path / "run")
    (tmp_path / "run" / "sites" / "1" / STATE).unlink()
    ran = rounds(experiment, tmp_path / "run", last=2)
    assert ran.told("client_failed", "client") == ["1"]
    assert ran.told("client_failed", "reason") == ["client reports 'refused'"]
    assert ran.told("summed", "sites") == [CLIENTS - 1]
    assert ran.told("announced", "client") == []  # a new key of it would be refused by its peers
    assert not (tmp_path / "run" / "sites" / "1" / STATE).exists()


@pytest.mark.slow
def test_a_damaged_state_is_not_replaced_by_a_new_one(experiment, tmp_path):
    rounds(experiment, tmp_path / "run")
    path = tmp_path / "run" / "sites" / "1" / STATE
    path.write_bytes(path.read_bytes()[:-7])
    damaged = path.read_bytes()
    ran = rounds(experiment, tmp_path / "run", last=2)
    assert ran.told("client_failed", "reason") == ["client reports 'protocol'"]
    assert ran.told("summed", "sites") == [CLIENTS - 1]
    assert path.read_bytes() == damaged


@pytest.mark.slow
def test_a_round_that_the_server_has_forgotten_is_lost_and_the_run_goes_on(experiment, tmp_path):
    """An older checkpoint and no record of the round: its updates are in a sum already."""
    with pytest.raises(KeyboardInterrupt):
        rounds(experiment, tmp_path / "run", ending("announce"))
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    before = checkpoint.read_bytes()
    first = rounds(experiment, tmp_path / "run")
    checkpoint.write_bytes(before)
    for record in (tmp_path / "run" / "secure").glob("*.round"):
        record.unlink()
    again = rounds(experiment, tmp_path / "run", last=2)
    assert again.told("client_idle", "code").count("masked") == CLIENTS
    assert len(again.told("round_lost", "reason")) == 1
    assert again.told("summed", "sites") == [CLIENTS]
    assert first.told("summed", "sites") == [CLIENTS]


def test_a_number_of_a_round_is_used_once_whatever_the_clock_says(
    experiment, tmp_path, monkeypatch
):
    rounds(experiment, tmp_path / "run")
    monkeypatch.setattr("server.secure_aggregation.time.time_ns", lambda: 5_000)
    ran = rounds(experiment, tmp_path / "run", last=2)
    assert ran.told("summed", "sites") == [CLIENTS]


@pytest.fixture
def one_has_no_data(monkeypatch):
    """Client 1 prepares, is asked, and has nothing to learn from."""
    original = requests.local_update

    def update(granted, *given):
        if granted.client.number == 1:
            raise Refusal("no-data", "none")
        return original(granted, *given)

    monkeypatch.setattr(requests, "local_update", update)


@pytest.mark.slow
@pytest.mark.usefixtures("one_has_no_data")
def test_whoever_takes_no_part_is_not_counted_on_again(make_experiment, tmp_path):
    """A client without data that prepared and sent nothing would be a dropout in every round."""
    ran = rounds(make_experiment(*SETTINGS, "federation.rounds=3"), tmp_path / "run", last=2)
    idle = [e["client"] for e in ran.events if e.get("code") == "no-data"]
    assert idle == ["1"]
    cohorts = [(e["sites"], e["cohort"]) for e in ran.events if e["event"] == "summed"]
    assert cohorts == [(CLIENTS - 1, CLIENTS), (CLIENTS - 1, CLIENTS - 1)]
    assert "1" not in ran.told("client_finished", "client")


@pytest.mark.usefixtures("one_has_no_data")
def test_too_few_for_those_who_may_collude_lose_the_round_and_not_the_run(
    make_experiment, tmp_path
):
    """Without the one that has no data three are left, and two of them may collude."""
    few = ("federation.clients=4", "privacy.colluding=2", "federation.rounds=3")
    ran = rounds(make_experiment(*SETTINGS, *few), tmp_path / "run", last=2)
    first, second = ran.told("round_lost", "reason")
    assert "3 of 4 sites survived" in first
    assert second == "3 clients can be asked, and a sum is of 4 or more"
    assert not ran.told("client_failed", "client")


def test_the_state_is_on_the_disk_before_a_reply_leaves(experiment, tmp_path):
    """Of each reply, to the byte, in the file that a restart would read."""
    run, exchanges = tmp_path / "run", set()

    def see(reply):
        if exchange_of(reply):
            exchanges.add(exchange_of(reply))
            sent = reply.content["secure"]["reply"]
            kept = SiteState.from_bytes((run / "sites" / client_of(reply) / STATE).read_bytes())
            answers = [each.reply for held in kept.rounds for each in held.answered]
            assert sent in (kept.announcement, *answers)
        return reply

    rounds(experiment, run, see)
    assert exchanges == set(EXCHANGES)
