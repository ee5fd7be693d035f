"""The last look at a reply before it leaves: nothing but what is listed here may go.

Every field has its reason. What is not listed does not leave, whoever put it there. A round without
a mechanism sends ``status``, the factors that were trained, and of ``metrics`` number of examples,
loss and seconds, as far as the policy allows (:func:`deal_core.privacy.policy.figures_allowed`).
"""

from __future__ import annotations

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from deal_core.lora.payload import LORA, PREFIX, WORSE, PayloadError
from deal_core.secure_sum.messages import ProtocolError, UnpinnedPeer, UsedUpdate
from deal_core.wire.records import BLAMES, REPLY, SECURE

RIGHT = "right answers per task, for the accuracy matrix"
RIGHT_ALL = "right answers among all labels seen so far, per task, for the same"
TESTS = "test examples (or entities, of tagged words) per task, for the accuracy matrix"
FIELDS: dict[str, dict[str, str]] = {
    "status": {
        "code": "how the request ended: a fixed word, never a text",
        "stage": "which request is answered",
        "phase": "which request is answered",
        "server_round": "which request is answered",
        BLAMES: "whose message of a secure sum was refused: follows from messages, not from data",
    },
    "site": {"client": "number of a simulated client"},
    SECURE: {REPLY: "keys, shares and a masked vector of a secure sum: only the sum can be read"},
    "metrics": {
        "num_examples": "weight in the average",
        "loss": "mean training loss, for the progress view",
        "seconds": "duration, for the progress view",
        "epsilon": "what the site's ledger composes to: not of data",
        "delta": "an epsilon means nothing without it",
        "n_delta": "delta times the number of records, where that may leave",
        "disjoint_tasks": "how epsilon composes: no record is in two tasks, as the policy says",
        "void": "whether epsilon is void for records that something left of without protection",
        "assumes_more": "whether epsilon counts on others than the settings of the run say",
        "simulation_only": "whether the noise came from a seed, so that nothing is guaranteed",
        "correct": RIGHT,
        "correct_all": RIGHT_ALL,
        "examples": TESTS,
        WORSE: "one bit: whether records that are held back are answered better without the class "
        "means of others",
    },
}
"""Record, field, and why it may leave a client. Adapters: see :func:`adapter_keys`."""
SCALE = ".scale"
"""Ending of a key for the scales of a factor in a lossy format."""

METRICS = "metrics"
"""Record of figures beside an update, and of counts."""
IN_THE_SUM = frozenset({"num_examples", "loss", "seconds"})
"""Figures that do not leave beside a masked vector: they would tell of one site."""
CODES = frozenset(
    {
        "ok",
        "no-data",
        "refused",
        "failed",
        "budget-spent",
        "policy",
        "resend",
        "version",
        "withheld",
    }
    | {error.code for error in (ProtocolError, UnpinnedPeer, UsedUpdate)}
)


def adapter_keys(request: Message) -> frozenset[str]:
    """Return the keys that an update may have: those of the adapter that was asked about, and of
    their scales in a lossy format. Others could carry a text in a name."""
    content = request.content if request.has_content() else RecordDict()
    sent = content.array_records.get(LORA, ArrayRecord())
    factors = (".lora_A.weight", ".lora_B.weight")
    names = {name for key in sent if (name := key.removesuffix(SCALE)).endswith(factors)}
    names = {name for name in names if name.startswith(PREFIX)}
    return frozenset(names | {name + SCALE for name in names})


def check_reply(reply: Message, request: Message, masked_only: bool = False) -> Message:
    """Return the reply if every record and field of it may leave.

    Args:
        reply: what a handler made.
        request: what it answers; an update has the keys of its adapter and no others, and where a
            secure sum is asked for it does not go by itself.
        masked_only: it never does.

    Raises:
        PayloadError: names the record or field that may not.
    """
    asked_for_sum = request.has_content() and SECURE in request.content
    masked = masked_only or asked_for_sum
    if asked_for_sum and _tells_of_one(reply):
        raise PayloadError("figures of an update may leave this client in a secure sum alone")
    for name, record in reply.content.items():
        counted = asked_for_sum and name == METRICS and "correct" in record
        if counted or (masked and name == LORA):
            raise PayloadError(f"record '{name}' may leave this client in a secure sum alone")
        if name == LORA and name in reply.content.array_records:
            known = adapter_keys(request)
            foreign = [key for key in record if key not in known]
        elif name in FIELDS and name not in reply.content.array_records:
            foreign = [key for key in record if key not in FIELDS[name]]
        else:
            raise PayloadError(f"record '{name}' may not leave this client")
        if foreign:
            raise PayloadError(f"field '{name}.{foreign[0]}' may not leave this client")
    records = reply.content.config_records
    if "status" not in records or records["status"].get("code") not in CODES:
        raise PayloadError("a status code that is not a fixed word")
    return reply


def _tells_of_one(reply: Message) -> bool:
    """Return whether figures of an update would leave that belong in a sum; a number of examples of
    1 is what everybody says."""
    figures = reply.content.metric_records.get(METRICS, MetricRecord())
    told = IN_THE_SUM & figures.keys()
    return bool(told - {"num_examples"}) or figures.get("num_examples", 1.0) != 1.0
