"""A client refuses what it was not made for, and then says so and nothing else."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.numpy import save_file

from client.app import make_app
from client.state import RetainedMissing, load_retained, save_retained
from deal_core.config.file import to_run_config
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.state import State
from deal_core.models import adapter_shapes
from deal_core.randomness import seeded
from deal_core.wire.instruction import Instruction
from deal_core.wire.records import record_digest
from server.strategy import start_state
from simulations.engines.inprocess import CLIENT_FAILED, FIRST_CLIENT_NODE, InProcessGrid
from simulations.engines.worker_pool import assume_identity
from tests.client.real_site import message_of

Spoil = Callable[[RecordDict], None]


@pytest.fixture(scope="module")
def experiment(make_experiment):
    return make_experiment("data.max_train=16", "data.max_test=16")


@pytest.fixture(scope="module")
def state(experiment):
    """What a server sends: ``A`` random, ``B`` zero."""
    start = start_state(experiment, adapter_shapes(experiment.model, experiment.adapter))
    generator, layers = seeded("guard"), {}
    for name, factors in start.current.layers.items():
        a = factors.A.normal_(0.0, 0.1, generator=generator)
        layers[name] = LoraFactors(a, factors.B)
    return State(Adapter(layers, start.current.scaling), start.retained)


def asking(experiment, state, folder):
    """Return what sends the real app a request, spoilt on its way, and returns the reply."""
    own = experiment.run.model_copy(update={"out": str(folder)})
    config = to_run_config(experiment.model_copy(update={"run": own}))
    grid = InProcessGrid(make_app(), config, experiment.federation.clients)
    ranks = {"rank": state.current.rank, "retained_rank": state.retained.rank}
    train = {"task": "surgery", "server_round": 1, "trained": ("lora_A", "lora_B")}
    evaluate = {"task": "", "server_round": 0, "tasks": ("surgery",), "trained": ()}

    def send(spoil, kind="train", renamed=True, **fields):
        asked = {"stage": 0, **(train if kind == "train" else evaluate), **fields}
        with assume_identity(1, 1):
            instruction = Instruction(**asked, **ranks)
            message = message_of(experiment, state, instruction, kind, FIRST_CLIENT_NODE)
            message.content = RecordDict({n: _copied(r) for n, r in message.content.items()})
            spoil(message.content)
            if renamed:
                _rename(message.content)
            return next(iter(grid.send_and_receive([message])))

    return send


@pytest.fixture(scope="module")
def ask(experiment, state, tmp_path_factory):
    return asking(experiment, state, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def ask_probe(experiment, state, tmp_path_factory):
    """The app of a run with label heads, and requests that have some."""
    method = experiment.method.model_copy(update={"name": "linear-probe"})
    heads = {"laboratory": torch.zeros(4, 385), "surgery": torch.ones(4, 385)}
    probing = experiment.model_copy(update={"method": method})
    return asking(probing, replace(state, heads=heads), tmp_path_factory.mktemp("probe"))


def _rename(content):
    """A server that spoils the retained adapter can name it rightly."""
    if "retained" in content.array_records and "instruction" in content.config_records:
        content["instruction"]["retained_digest"] = record_digest(content.array_records["retained"])


def _copied(record):
    return type(record)(dict(record))


def first(content, name="lora"):
    return next(iter(content[name]))


def array(name, change):
    def spoil(content):
        key = first(content, name)
        content[name][key] = Array(np.ascontiguousarray(change(content[name][key].numpy())))

    return spoil


def instructed(**fields):
    """Change fields of the instruction; None takes one away."""

    def spoil(content):
        new = {**content["instruction"], **fields}
        content["instruction"] = ConfigRecord({k: v for k, v in new.items() if v is not None})

    return spoil


def added(name, record):
    return lambda content: content.__setitem__(name, record)


def extra_key(content):
    content["lora"]["classifier.weight"] = Array(np.zeros((2, 2), np.float32))


def padded(content):
    key = first(content)
    good = content["lora"][key]
    content["lora"][key] = Array(good.dtype, good.shape, good.stype, good.data + b"x")


REFUSED = {
    "extra text": added("code", ConfigRecord({"run": "print(data)"})),
    "extra arrays": added("base", ArrayRecord({"w": Array(np.zeros((2, 2), np.float32))})),
    "extra figures": added("metrics", MetricRecord({"x": 1.0})),
    "no instruction": lambda content: content.pop("instruction") and None,
    "instruction of another kind": added("instruction", MetricRecord({"rank": 8})),
    "adapter of another kind": added("lora", ConfigRecord({"x": 1})),
    "transposed": array("lora", lambda a: a.T),
    "broadcastable": array("lora", lambda a: a[:1]),
    "wrong retained shape": array("retained", lambda a: a[:-1]),
    "float64": array("lora", lambda a: a.astype(np.float64)),
    "NaN": array("lora", lambda a: np.full_like(a, np.nan)),
    "extra key": extra_key,
    "missing key": lambda content: content["lora"].pop(first(content)) and None,
    "padded": padded,
    "another rank": instructed(rank=4),
    "rank zero": instructed(rank=0),
    "rows that were not sent": instructed(residual_rank=1),
    "rows that would fill the memory": instructed(retained_rank=10**9),
    "fewer rows than are told": instructed(retained_rows=2),
    "unknown field": instructed(records=["train", "labels"]),
    "a request for texts": instructed(send="texts"),
    "a request for another record": instructed(reply="dataset"),
    "unknown phase": instructed(phase="send texts"),
    "phase of another method": instructed(phase="probe"),
    "more apart than there is": instructed(num_reference_directions=65),
    "no round": instructed(server_round=None),
    "round as text": instructed(server_round="one"),
    "no task": instructed(task=None),
}


@pytest.mark.parametrize("message_type", ["train", "evaluate"])
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_and_nothing_else(ask, kind, message_type):
    reply = ask(REFUSED[kind], message_type)
    assert {name: dict(record) for name, record in reply.content.items()} == {
        "status": {"code": "refused"}
    }


@pytest.mark.parametrize("trained", [["classifier"], ["base_layer"], ["lora_A", "embeddings"]])
def test_other_parameters_are_never_sent(ask, trained):
    reply = ask(instructed(trained=trained))
    assert list(reply.content) == ["status"]
    assert reply.content["status"]["code"] in ("refused", "failed")


@pytest.mark.parametrize("message_type", ["query", "query.data", "train.texts", "evaluate.all"])
def test_nobody_answers_a_request_of_another_name(ask, message_type):
    reply = ask(lambda content: None, message_type)
    assert not reply.has_content()
    assert reply.error.code == CLIENT_FAILED


def test_a_spoilt_request_is_refused_also_after_a_good_one(ask):
    """What was decoded for one request serves another only if that is the same to the byte."""

    def one_value(content):
        record = content.array_records["retained"]
        key = next(iter(record))
        values = record[key].numpy().copy()
        values[0, 0] = np.nan
        record[key] = Array(values)

    def good(content):
        pass

    for spoil, code in ((good, "ok"), (one_value, "refused"), (good, "ok")):
        assert ask(spoil).content.config_records["status"]["code"] == code


def test_a_retained_adapter_of_another_name_is_refused(ask):
    spoil = array("retained", lambda a: a + 1.0)
    assert ask(spoil, renamed=False).content["status"]["code"] == "refused"
    assert ask(spoil).content["status"]["code"] == "ok"


def test_a_stored_adapter_that_was_damaged_is_as_none(tmp_path):
    record = ArrayRecord({"base_model.model.q.lora_A.weight": Array(np.ones((1, 3), np.float32))})
    save_retained(tmp_path, record)
    digest = record_digest(record)
    assert record_digest(load_retained(tmp_path, digest)) == digest
    whole = (tmp_path / "retained.safetensors").read_bytes()
    for headers in ("[]", "3", '{"w": 1}', '{"w": [1, 2, 3]}', "{"):
        save_file(
            {"w": np.zeros(2, np.uint8)}, tmp_path / "retained.safetensors", {"headers": headers}
        )
        with pytest.raises(RetainedMissing):
            load_retained(tmp_path, digest)
    (tmp_path / "retained.safetensors").write_bytes(whole[:-1] + b"!")
    with pytest.raises(RetainedMissing):
        load_retained(tmp_path, digest)


def test_two_records_of_other_content_have_other_names():
    """Also where the bytes of one could be read as a header of the other."""
    one = ArrayRecord(
        {
            "a": Array("float32", (1,), "raw", b"\0" * 4),
            "b": Array("float32", (1,), "raw", b"\0" * 4),
        }
    )
    length = (4).to_bytes(8, "little").decode("latin-1")
    forged = "a float32 (1,) raw " + length + "\0" * 4 + "b"
    two = ArrayRecord({forged: Array("float32", (1,), "raw", b"\0" * 4)})
    assert record_digest(one) != record_digest(two)


def test_who_lacks_the_retained_adapter_says_so_and_who_has_it_needs_no_second_one(ask):
    def left_out(content):
        del content["retained"]

    def unknown(content):
        left_out(content)
        content["instruction"]["retained_digest"] = "0" * 64

    assert ask(lambda content: None).content["status"]["code"] == "ok"
    assert ask(left_out).content["status"]["code"] == "ok"
    reply = ask(unknown)
    assert {name: dict(record) for name, record in reply.content.items()} == {
        "status": {"code": "resend"}
    }


def test_the_same_request_unspoilt_is_answered(ask):
    assert set(ask(lambda content: None).content) == {"status", "lora", "metrics"}
    assert set(ask(lambda content: None, "evaluate").content) == {"status", "metrics"}


HEADS = {
    "a label more": array("heads", lambda a: np.concatenate([a, a[:1]])),
    "an entry less": array("heads", lambda a: a[:, 1:]),
    "float64": array("heads", lambda a: a.astype(np.float64)),
    "NaN": array("heads", lambda a: np.full_like(a, np.nan)),
    "out of bounds": array("heads", lambda a: np.full_like(a, 1e20)),
    "of a task of another run": lambda content: content["heads"].__setitem__(
        "gossip", content["heads"]["surgery"]
    ),
    "of another kind": added("heads", ConfigRecord({"surgery": "x"})),
    "extra arrays": added("base", ArrayRecord({"w": Array(np.zeros((2, 2), np.float32))})),
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_that_do_not_fit_are_refused(ask_probe, kind):
    reply = ask_probe(HEADS[kind], "evaluate")
    assert {name: dict(record) for name, record in reply.content.items()} == {
        "status": {"code": "refused"}
    }


def test_good_heads_are_answered_with_counts(ask_probe):
    assert set(ask_probe(lambda content: None, "evaluate").content) == {"status", "metrics"}


@pytest.mark.parametrize("phase", ["learn", "probe"])
def test_sums_are_not_given_to_who_asks_without_masks(ask_probe, phase):
    reply = ask_probe(lambda content: None, phase=phase)
    assert {name: dict(record) for name, record in reply.content.items()} == {
        "status": {"code": "refused"}
    }


def test_heads_for_a_method_that_has_none_are_refused(ask):
    head = ArrayRecord({"surgery": Array(np.zeros((4, 385), np.float32))})
    assert dict(ask(added("heads", head)).content["status"]) == {"code": "refused"}
