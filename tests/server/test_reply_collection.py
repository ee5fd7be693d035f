"""The deadline of a round is for those who are silent, not for a machine that was asleep."""

import math
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server import clients, wire
from simulations.engines.inprocess import FIRST_CLIENT_NODE, InProcessGrid
from simulations.engines.worker_pool import assume_identity

CLIENTS = 4
HOUR = 3600.0


@pytest.mark.parametrize("silent", [(), ("2",)])
def test_a_machine_that_sleeps_through_a_deadline_loses_nobody(now, silent):
    """Each client computes while the clock leaps; who gives no answer at all is still named."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        now[0] += HOUR
        return Message(RecordDict(), reply_to=message)

    def deliver(reply):
        client = str(reply.metadata.src_node_id - FIRST_CLIENT_NODE)
        return None if client in silent else reply

    grid = InProcessGrid(app, {}, CLIENTS)
    grid.interceptor = deliver
    with assume_identity(1, 1):
        requests = {
            str(k): Message(RecordDict(), FIRST_CLIENT_NODE + k, "train") for k in range(CLIENTS)
        }
        found = {reply.client: reply.fault for reply in wire.collect(grid, requests, 60.0)}
    assert found == {str(k): wire.LATE if str(k) in silent else "" for k in range(CLIENTS)}


def test_an_error_of_flower_is_told_in_words(now):
    """That of an app that raises, and a code that nobody knows here."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        raise ValueError

    grid = InProcessGrid(app, {}, 1)
    with assume_identity(1, 1):
        request = {"0": Message(RecordDict(), FIRST_CLIENT_NODE, "train")}
        (found,) = wire.collect(grid, request, 60.0)
        unknown = Message(Error(99, ""), reply_to=request["0"])
        (other,) = wire.matched({request["0"].metadata.message_id: "0"}, [unknown])
    assert found.fault == f"{wire.FLOWER_ERRORS[2]} (flower error 2)"
    assert other.fault == "no answer (flower error 99)"


def test_a_client_beyond_those_of_the_experiment_is_named(now):
    app = ClientApp()

    @app.query("hello")
    def hello(message, context):
        number = message.metadata.dst_node_id - FIRST_CLIENT_NODE
        return Message(RecordDict({"site": ConfigRecord({"client": number})}), reply_to=message)

    with assume_identity(1, 1):
        grid = InProcessGrid(app, {}, 3)
        assert list(clients.find_clients(grid, 3, 60.0)) == ["0", "1", "2"]
        with pytest.raises(
            UserError, match=r"client '2' is connected, and .* is 2 \(from 0\); raise"
        ):
            clients.find_clients(grid, 2, 60.0)


def test_a_flood_of_second_replies_does_not_hold_a_round_up(now):
    """Only what is waited for counts as an answer."""
    (one, flood), (two, _) = exchange("one"), exchange("two")
    grid = SimpleNamespace(
        push_messages=lambda messages: ["one", "two"], pull_messages=lambda ids: [flood]
    )
    found = list(wire.collect(grid, {"1": one, "2": two}, 60.0))
    assert 60 <= now[0] < 62
    assert [(reply.client, reply.fault) for reply in found] == [("1", ""), ("2", wire.LATE)]


STEP = SimpleNamespace(round=1, stage=0, phase="learn", server_round=1, kind="round")
END = "the deadline of 240 s"


def exchange(name="request"):
    """A request of this name, and the reply to it."""
    with assume_identity(1, 1):
        request = Message(RecordDict(), 1, "train")
        reply = Message(RecordDict(), reply_to=request)
    request.metadata.__dict__["_message_id"] = name
    reply.metadata.__dict__["_reply_to_message_id"] = name
    return request, reply


def asking(pull, late=(), **federation):
    """Two sites that are asked, and what is written of them; ``pull`` gives replies."""
    named = {"sites": ("north", "south"), "deadline_seconds": 240.0, **federation}
    written = []
    events = SimpleNamespace(
        write=lambda event, **fields: written.append({"event": event} | fields)
    )
    grid, config = SimpleNamespace(pull_messages=pull), Experiment(federation=named)
    return clients.Clients(grid, config, None, events, late=dict(late)), written


@pytest.mark.parametrize(("after", "said"), [(271.0, 31), (-math.inf, 0), (math.nan, 0)])
def test_a_reply_after_the_deadline_is_named_in_the_next_round_and_dropped(now, after, said):
    """Whatever a site says of when that was."""
    (first, late), (second, _) = exchange("first"), exchange("second")
    late.metadata.created_at = first.metadata.created_at + after
    here, written = asking(lambda ids: [late] if "first" in ids else [])
    sent = clients.Sent(STEP, None, dict.fromkeys("01"), {"0": first, "1": second})
    assert {reply.fault for reply in here.replies(sent, [])} == {f"no reply before {END}"}
    assert written == []
    list(here.replies(sent, []))
    (event,) = written
    assert (event["event"], event["client"]) == ("reply_late", "0")
    assert event["reason"] == f"answered {said} s after {END}"


@pytest.mark.parametrize(
    ("takes", "sites", "said"),
    [(180.0, ("north", "south"), ""), (231.0, ("north", "south"), "9 s before"), (231.0, (), "")],
)
def test_a_site_that_nearly_misses_the_deadline_is_named(now, takes, sites, said):
    """The next round may not fit; its reply counts."""
    request, reply = exchange()

    def arriving():
        now[0] += takes
        yield reply

    here, written = asking(None, clients=2, sites=sites)
    sent = clients.Sent(STEP, None, {"0": None}, {"0": request})
    (found,) = here.replies(sent, arriving())
    assert found.message is reply
    told = [(event["event"], event["client"], event["reason"]) for event in written]
    assert told == ([("reply_slow", "0", f"answered {said} {END}")] if said else [])


@pytest.mark.parametrize("comes", [40.0, 300.0])
def test_a_run_that_ends_for_want_of_a_reply_says_how_late_it_was(now, comes):
    """Its next part needs a longer deadline; who stays silent is waited for a minute."""
    request, late = exchange()
    end = request.metadata.created_at + 240.0
    late.metadata.created_at = end + 31.0
    here, written = asking(
        lambda ids: [late] if now[0] >= comes and "request" in ids else [],
        late={"request": ("0", end)},
        quorum=1.0,
    )
    with pytest.raises(UserError, match="the quorum is 2") as ended:
        here.require_quorum(1, 2, STEP)
    told = f"north answered 31 s after {END}: a longer federation.deadline_seconds"
    assert (told in str(ended.value)) == (comes < 60)
    assert [event["event"] for event in written] == ["reply_late"] * (comes < 60)
    assert now[0] <= 61
