import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from client import gate
from client import requests as wire
from client.egress import FIELDS, check_reply
from deal_core.lora.payload import PayloadError
from simulations.engines.worker_pool import assume_identity
from tests.client.real_site import LABELS, RealSite, code
from tests.client.real_site import small as asked

KEY = "base_model.model.layer.lora_B.weight"
SUMS = Array(np.zeros(4))


def request_with(*keys):
    """A request about an adapter with these keys."""
    arrays = {key: Array(np.zeros((2, 2), np.float32)) for key in keys}
    with assume_identity(1, 1):
        return Message(RecordDict({"lora": ArrayRecord(arrays)}), 2, "train")


def reply_with(**records):
    content = RecordDict(
        {
            "status": ConfigRecord({"code": "ok", "stage": 0, "server_round": 1}),
            "lora": ArrayRecord({KEY: Array(np.zeros((2, 2), np.float32))}),
            "metrics": MetricRecord({"num_examples": 3, "loss": 0.5, "seconds": 1.0}),
            **records,
        }
    )
    with assume_identity(1, 1):
        return Message(content, 2, "train")


def test_an_update_may_leave():
    reply = reply_with()
    assert check_reply(reply, request_with(KEY)) is reply


@pytest.mark.parametrize(
    "records",
    [
        {"notes": ConfigRecord({"text": "patient 17"})},
        {"retained": ArrayRecord({KEY: Array(np.zeros((2, 2), np.float32))})},
        {"lora": ArrayRecord({"classifier.weight": Array(np.zeros((2, 2), np.float32))})},
        {"lora": ArrayRecord({KEY + ".grad": Array(np.zeros((2, 2), np.float32))})},
        {"metrics": MetricRecord({"label_counts": [3, 4]})},
        {"metrics": ArrayRecord({"loss": Array(np.zeros((2, 2), np.float32))})},
        {"status": ConfigRecord({"code": "ok", "why": "patient 17"})},
        {"status": ConfigRecord({"code": "KeyError: patient 17"})},
        {"counts": ConfigRecord({"code": "ok", "correct": [1], "labels": ["patient 17"]})},
        *({"lora": ArrayRecord({key: SUMS})} for key in ("0.count", "0.sum", "0.class_sums")),
        *({name: ArrayRecord({KEY: SUMS})} for name in ("sums", "class_sums", "0.class_sums")),
    ],
)
def test_nothing_else_may(records):
    with pytest.raises(PayloadError) as refusal:
        check_reply(reply_with(**records), request_with(KEY, "classifier.weight", "0.count"))
    assert "patient" not in str(refusal.value)


def masked(*names):
    """A reply to a request for a masked update, with these records beside it, and the request."""
    reply = reply_with(
        secure=ConfigRecord({"reply": b"masked"}), metrics=MetricRecord({"num_examples": 1.0})
    )
    if "lora" not in names:
        del reply.content["lora"]
    if "sums" in names:
        reply.content["sums"] = ArrayRecord({"0.count": Array(np.zeros(4))})
    request = request_with(KEY)
    request.content["secure"] = ConfigRecord({"request": b"mask"})
    return reply, request


def test_a_masked_vector_may_leave_and_nothing_unmasked_beside_it():
    reply, request = masked()
    assert check_reply(reply, request) is reply
    with pytest.raises(PayloadError, match="'lora' may leave this client in a secure sum"):
        check_reply(*masked("lora"))
    with pytest.raises(PayloadError, match="'sums' may not leave this client"):
        check_reply(*masked("sums"))


def test_where_the_policy_wants_masks_no_update_leaves_without_whatever_is_asked():
    reply, request = reply_with(), request_with(KEY)
    assert check_reply(reply, request, masked_only=False) is reply
    with pytest.raises(PayloadError, match="in a secure sum alone"):
        check_reply(reply, request, masked_only=True)


@pytest.mark.parametrize("said", ["patient 17 has cancer", "layer.0.attention"])
def test_no_text_leaves_inside_a_key(said):
    """A key of the right form names a layer of the adapter that was asked about, or does not go."""
    array = Array(np.zeros((2, 2), np.float32))
    for key in (f"base_model.model.{said}.lora_B.weight", f"base_model.model.{said}.lora_B.scale"):
        with pytest.raises(PayloadError):
            check_reply(reply_with(lora=ArrayRecord({KEY: array, key: array})), request_with(KEY))
    lossy = reply_with(lora=ArrayRecord({KEY: array, f"{KEY}.scale": array}))
    assert check_reply(lossy, request_with(KEY)) is lossy


def test_every_field_that_may_leave_has_its_reason():
    """The list itself: a field that is added here must be added with a reason there."""
    assert {f"{record}.{field}" for record, fields in FIELDS.items() for field in fields} == {
        "status.code",
        "status.stage",
        "status.phase",
        "status.server_round",
        "status.blames",
        "site.client",
        "secure.reply",
        "metrics.num_examples",
        "metrics.loss",
        "metrics.seconds",
        "metrics.epsilon",
        "metrics.delta",
        "metrics.n_delta",
        "metrics.disjoint_tasks",
        "metrics.void",
        "metrics.assumes_more",
        "metrics.simulation_only",
        "metrics.correct",
        "metrics.correct_all",
        "metrics.examples",
        "metrics.worse",
    }
    for fields in FIELDS.values():
        assert all(len(reason.split()) >= 3 for reason in fields.values())


def test_what_a_handler_makes_is_looked_at_before_it_leaves(tmp_path, monkeypatch):
    made = wire.update_reply

    def chatty(message, *rest):
        reply = made(message, *rest)
        reply.content["notes"] = ConfigRecord({"text": "patient 17"})
        return reply

    monkeypatch.setattr(wire, "update_reply", chatty)
    reply = RealSite(tmp_path, 'mechanism = "none"\n').answer(asked("privacy.mechanism=none"), {})
    assert (code(reply), set(reply.content)) == ("refused", {"status"})


def test_where_only_masks_may_leave_the_last_look_keeps_an_update(tmp_path, monkeypatch):
    monkeypatch.setitem(gate.REFUSALS, "masks", ())
    site = RealSite(tmp_path, 'mechanism = "none"\nsecure_aggregation = "required"\n')
    reply = site.answer(asked("privacy.mechanism=none"), {})
    assert (code(reply), set(reply.content)) == ("refused", {"status"})


EVALUATION = {"task": "", "stage": -1, "server_round": 0, "tasks": list(LABELS)}


@pytest.mark.parametrize(
    ("kind", "mechanism", "instruction", "ends"),
    [
        ("evaluate", "record", EVALUATION, "withheld"),  # counts stay by default
        ("train", "none", {}, "policy"),
        ("train", "record", {"task": "no such task"}, "refused"),
        ("train", "record", {"rank": 0}, "refused"),
    ],
)
def test_the_log_has_a_reason_for_what_a_site_declines_and_all_that_is_known_of_a_fault(
    tmp_path, kind, mechanism, instruction, ends
):
    site = RealSite(tmp_path)
    reply = site.answer(asked(f"privacy.mechanism={mechanism}"), instruction, kind=kind)
    assert code(reply) == ends
    event = site.log()[-1]
    assert event["event"] == f"request_{ends}"
    fault = instruction == {"rank": 0}
    assert ("traceback" in event) == ("error" in event) == fault
    assert bool(event.get("reason")) != fault
    assert "Refusal" not in str(event)
