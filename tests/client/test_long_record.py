"""A record that a machine dies of: it must die whether or not it has that record."""

from types import SimpleNamespace

import pytest

from client.identity import Client, ClientRequest
from client.local_training import class_sums
from client.runtime import ClientRuntime
from deal_core.data import Example
from deal_core.deal.interface import LocalTask, TaskPrompt
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.state import State
from deal_core.models.encoder import EncoderLabels
from deal_core.privacy.distributed_noise import NoisySum
from deal_core.privacy.noise import SecureNoise
from deal_core.wire.instruction import Instruction
from tests.client.real_site import LABELS, RealSite, asked, rows

pytestmark = pytest.mark.usefixtures("one_model")

LONG = "laboratory " * 60, LABELS["laboratory"][0]
POLICY = (
    'mechanism = "record"\nmax_epsilon = 9.0\nnoise_share = "sum"\n'
    "server_vouches_for_peers = true\n"
)


class OutOfMemory(BaseException):
    """Ends the process: nothing catches it."""


@pytest.fixture
def small_machine(monkeypatch):
    """Memory for texts of 24 tokens, where the run allows 32."""
    embed = EncoderLabels._embed

    def dies(self, token_ids, layers=1):
        if max(map(len, token_ids)) > 24:
            raise OutOfMemory
        return embed(self, token_ids, layers)

    monkeypatch.setattr(EncoderLabels, "_embed", dies)


ASKED = {
    "training": (),
    "pooled": ("adapter.kind=pooled",),
}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("record", [(), (LONG,)], ids=["without", "with"])
def test_it_dies_without_the_record_as_well(name, record, tmp_path, small_machine):
    experiment = asked("train.max_length=32", "privacy.target_epsilon=1", *ASKED[name])
    laboratory = [*rows("laboratory"), *record]
    data = {task: laboratory if task == "laboratory" else rows(task) for task in LABELS}
    site = RealSite(tmp_path, policy=POLICY, data=data)
    with pytest.raises(OutOfMemory):
        site.answer(experiment, {})
    assert site.events == []


def test_nothing_of_a_record_is_held_while_the_next_is_read(make_causal, tmp_path):
    """What the lower layers make of texts is kept elsewhere: where records are protected memory
    would depend on those before, and the longest had been tried with none of it."""
    llama = make_causal(tmp_path, "llama")
    model = ("model.family=causal-lm", f'model.name="{llama}"', "adapter.rank=2")
    for mechanism, kept in (("none", 3), ("record", 0)):  # one process may hold one model
        words = asked(*model, "adapter.first_layer=1", f"privacy.mechanism={mechanism}")
        runtime = ClientRuntime(words)
        labels = runtime.labels("laboratory")
        texts = [Example(f"the text {word}", labels[0]) for word in ("a", "b b")]
        before = len(runtime.model._lower._known)  # of what a model is tried out with
        runtime.model.scores(runtime.model.encode(texts, labels), labels)
        assert len(runtime.model._lower._known) == (before + kept if kept else 0)


def test_it_is_rehearsed_with_the_words_of_the_task_and_of_earlier_ones(
    make_causal, tmp_path, monkeypatch
):
    """An instruction is the server's: as long as it likes."""
    llama = make_causal(tmp_path, "llama")
    words = "Answer with one of the options . " * 9
    experiment = asked(
        *("model.family=causal-lm", f'model.name="{llama}"', "run.threads=1", "adapter.rank=2"),
        f'data.instructions={{laboratory="{words}", skin="{words * 2}"}}',
    )
    runtime, lengths = ClientRuntime(experiment), []
    labels = runtime.labels("laboratory")
    asks = {task: runtime.instruction(task) for task in ("surgery", "skin")}
    prompts = [TaskPrompt(runtime.labels(task), words) for task, words in asks.items()]
    model, own = runtime.model, runtime.instruction("laboratory")
    state = State(*[zero_adapter({"layer": (4, 4)}, 1)] * 2)
    task = LocalTask(model, state, (), labels, (), prompts=prompts, instruction=own)

    class Gradients:
        def rehearse(self, module, objective, probes):
            lengths.append(max(len(objective.data[n].tokens) for n in range(probes)))

    def objective(local):
        asks, data = local.prompts if len(local.prompts) == 1 else (), local.data
        texts = [model.answered(data, p.labels, p.instruction) for p in asks]
        return SimpleNamespace(data=[item for own in texts for item in own] or data)

    runtime.rehearse_gradients(objective, task, frozenset({"lora_B"}), Gradients())
    record = Example("word " * 99, labels[-1])
    own = len(runtime.model.encode([record], labels, runtime.instruction("laboratory"))[0].tokens)
    assert lengths[0] >= own
    assert lengths[2] > lengths[0] > lengths[1]  # skin has the longest instruction, surgery none


def test_sums_of_no_record_need_the_memory_of_the_longest(small_machine, tmp_path):
    """What is charged where a sum of records fails is a sum of none: it must fail as well."""
    runtime = ClientRuntime(asked("train.max_length=32", "method.name=prototype", "run.threads=1"))
    statistics = runtime.statistics
    assert statistics is not None
    asks = Instruction(task="laboratory", stage=0, server_round=1, rank=1, retained_rank=1)
    hidden = {"sample_rate": 1.0, "noise_multiplier": 1.0, "max_grad_norm": 1.0}
    nothing = NoisySum((), (), 3, **hidden, noise=SecureNoise())
    state = State(*[zero_adapter({"layer": (4, 4)}, 1)] * 2)
    asked_for = ClientRequest(
        Client(0, tmp_path, runtime.experiment), runtime, asks, runtime.phases["learn"], state
    )
    with pytest.raises(OutOfMemory):
        class_sums(asked_for, statistics, nothing, ())
