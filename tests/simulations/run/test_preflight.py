"""What cannot go together is refused by name before anything starts, in one line."""

import json

import pytest
from transformers import Gemma3Config

from deal_core.config.data import DataConfig, StreamConfig
from deal_core.config.experiment import Experiment, ModelConfig
from deal_core.data import open_source
from deal_core.deal.interface import statistics_of
from deal_core.errors import UserError
from deal_core.methods import method_of
from deal_core.models import max_positions
from deal_core.protection import make_mechanism
from simulations.run.data_checks import check_data, check_text_lengths
from simulations.run.model_checks import check_declared, check_names
from tests.architectures import save
from tests.simulations.run.secure_runs import POOLED
from tests.simulations.runs import IN_SUM, write_tasks

SECURE = ("aggregation.secure=true", "federation.clients=4")
PRIVATE_SUMS = (
    *("federation.clients=3", "federation.rounds=1", "aggregation.secure=true"),
    *("method.name=prototype", "method.prototype.layers=1", "method.prototype.directions=0"),
    *("train.step=server", "privacy.target_delta=1e-3"),
    *("privacy.mechanism=record", "privacy.noise_share=sum"),
)
RECORD = ("privacy.mechanism=record",)
CAUSAL = ("data.source=embedded", "model.family=causal-lm")
OWN_ORDERS = ("stream.schedule=per-client", "federation.clients=3")
REFUSED = [
    (("aggregation.rule=fedix",), r"unknown aggregation rule 'fedix'.*fedit"),
    (("model.family=decoder",), r"unknown model.family 'decoder'.*encoder-labels"),
    (("method.name=ewc", "aggregation.rule=flora"), r"'flora' .* 'ewc'; use fedit, ffa$"),
    (("adapter.client_ranks=[2, 8]",), "every round of mixed ranks begins with a fresh"),
    (("adapter.client_ranks=[16]", "aggregation.rule=flora"), "from 1 to"),
    (("aggregation.rule=ffa-a",), r"'ffa-a' learns nothing with adapter\.kind 'lora'"),
    ((*POOLED, "aggregation.rule=flora"), "'pooled' has a rule of its own"),
    (("privacy.metrics=summed",), "counts are added up"),
    (("model.family=causal-lm", "model.template=x"), r"model.template: needs \{text\} once"),
    (
        (*CAUSAL, 'data.instructions={surgery="{text} {text}"}'),
        r"data\.instructions\.surgery: needs \{text\} once",
    ),
    (('data.generation=["surgery"]', "data.source=embedded"), "use causal-lm or seq2seq-lm"),
    (
        ('data.generation=["surgery"]', "stream.schedule=joint-all-labels", *CAUSAL),
        "answers of 'surgery' are texts; set it to \"joint\"",
    ),
    (('data.measures={surgery="rouge-1"}',), r"data\.measures\.surgery: its answers are labels"),
    (("method.name=prototype",), "let 3 or more take part"),
    ((*OWN_ORDERS, "method.name=linear-probe"), "needs all clients of a task in one stage"),
    ((*OWN_ORDERS, *RECORD, "method.prototype.enabled=on"), "class sums of one task at a time"),
    # A secure sum shows no single update.
    ((*SECURE, "aggregation.rule=flora"), "rule 'flora' is no mean of factors; use fedit"),
    ((*SECURE, "aggregation.rule=fedex"), "rule 'fedex'"),
    ((*SECURE, "aggregation.robust=cosine-norm"), "'cosine-norm' judges single updates"),
    ((*SECURE, "wire.dtype=int8"), "set wire.dtype to float32"),
    ((*SECURE, "federation.clients=2"), "each knows the other's part"),
    ((*SECURE, "federation.clients_per_round=2"), "each knows the other's part"),
    ((*SECURE, "federation.participants=[0, 1]"), "each knows the other's part"),
    ((*SECURE, "stream.joins={3=1, 2=1}"), "each knows the other's part"),
    ((*SECURE, "aggregation.min_cohort=5"), "min_cohort is 5, and a round has 4 clients"),
    ((*SECURE, "privacy.colluding=3"), "leaves no two whose parts"),
    # Noise in the sum counts on every site.
    ((*IN_SUM, "aggregation.secure=false"), "aggregation.secure"),
    ((*IN_SUM, "train.step=client"), "train.step"),
    ((*IN_SUM, "privacy.target_delta=0.0"), "target_delta"),
    ((*IN_SUM, "federation.clients=2"), "3 clients"),
    ((*IN_SUM, "privacy.colluding=3"), "no two whose parts"),
    ((*IN_SUM, "privacy.dropouts=2"), "leave nobody's noise"),
    ((*IN_SUM, "federation.clients=4", "federation.clients_per_round=3"), "clients_per_round"),
    ((*IN_SUM, "federation.clients=4", "stream.joins={3=1}"), "stream.joins"),
    ((*IN_SUM, "method.update.lambda1=0.01"), "update.lambda1"),
    ((*IN_SUM, "aggregation.robust=cosine-norm"), "aggregation.robust"),
    ((*IN_SUM, "wire.dtype=int8"), "wire.dtype"),
    ((*IN_SUM, "method.name=sequential"), "lays out every task anew"),
    ((*IN_SUM, "adapter.client_ranks=[1, 2, 1]"), "client_ranks"),
    ((*IN_SUM, "adapter.kind=cores"), "unknown adapter.kind"),
    # What noise would not protect.
    ((*PRIVATE_SUMS, "federation.rounds=2"), "set federation.rounds to 1"),
    ((*PRIVATE_SUMS, "method.name=linear-probe"), "leave without noise"),
    ((*PRIVATE_SUMS, "aggregation.secure=false"), "set aggregation.secure to true"),
    (("privacy.mechanism=record", "method.name=ewc"), "does not go with method.name 'ewc'"),
    (("privacy.mechanism=record", "method.name=replay"), "does not go with method.name 'replay'"),
]


@pytest.mark.parametrize(("overrides", "line"), REFUSED)
def test_what_does_not_go_together_is_refused_in_one_line(make_experiment, overrides, line):
    experiment = make_experiment("data.source=embedded", *overrides)
    private_sums = overrides[: len(PRIVATE_SUMS)] == PRIVATE_SUMS
    with pytest.raises(UserError, match=line) as refused:
        (make_mechanism if private_sums else check_names)(experiment)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "overrides",
    [
        (*SECURE, "aggregation.rule=fedit"),
        (*SECURE, "aggregation.rule=ffa"),
        (*SECURE, *POOLED),
        (*POOLED, "aggregation.rule=ffa-a"),
        IN_SUM,
        (*OWN_ORDERS, "method.name=prototype"),
        (*OWN_ORDERS, *RECORD, "method.prototype.enabled=auto"),
        ("federation.clients=3", "method.name=linear-probe"),
    ],
)
def test_what_goes_together_is_let_be(make_experiment, overrides):
    check_names(make_experiment(*overrides))


def test_deal_goes_without_the_class_sums_of_two_clients(make_experiment):
    deal = make_experiment("federation.clients=2", "method.prototype.enabled=auto")
    check_names(deal)
    assert statistics_of(method_of(deal)) is None


def test_a_round_of_too_few_for_a_sum_is_told_before_the_start(make_experiment):
    orders = 'stream.orders={0=["surgery", "laboratory"], 1=["laboratory"], 2=["surgery"]}'
    experiment = make_experiment(*OWN_ORDERS, *RECORD, "aggregation.secure=true", orders)
    (found,) = check_data(experiment)
    assert "in round 1 of stage 2 1 of 3 clients work (0), and a sum is of 3 or more" in found.text
    alike = experiment.model_copy(update={"stream": StreamConfig()})
    assert not list(check_data(alike))


def test_tasks_that_share_records_are_not_disjoint(make_experiment, tmp_path):
    rows = [{"text": f"{each} of it", "label": f"{each in 'ace'}"} for each in "abcdefgh"]
    tasks = dict.fromkeys(("laboratory", "surgery"), rows)
    data = (*write_tasks(tmp_path, tasks), *RECORD, "data.max_train=0")
    list(check_data(make_experiment(*data)))
    with pytest.raises(UserError, match="a record of client 0 is in tasks 'laboratory' and 'surg"):
        list(check_data(make_experiment(*data, "privacy.disjoint_tasks=true")))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"labels": {"surgery": ("b", "a")}}, "has the labels of its data"),
        ({"source": "hub", "labels": {"t": ("b", "a")}}, "has the labels of its data"),
        ({"generation": ("surgery",)}, "answers are labels"),
        ({"source": "files", "labels": {"t": ("a",)}, "generation": ("t",)}, "leave it out of one"),
        ({"path": "mine"}, r'data\.path = "mine" is read with data\.source = "files"'),
    ],
)
def test_answers_and_folders_that_nothing_would_read_are_refused(settings, line):
    with pytest.raises(UserError, match=line):
        check_declared(Experiment(data=DataConfig(**settings)))


def with_positions(folder, positions):
    """The saved model's description with so many positions."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    key = next(k for k in ("n_positions", "max_position_embeddings") if k in config)
    path.write_text(json.dumps({**config, key: positions}))
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return with_positions(save(tmp_path_factory.mktemp("model"), "gpt2"), 300)


@pytest.mark.parametrize(
    ("instruction", "max_length", "expected"),
    [
        ("Answer.", 40, []),
        ("Answer.", 296, [("warning", "lower train.max_length to ")]),
        ("Answer well. " * 400, 40, [("error", "shorten its instruction or its labels")]),
    ],
    ids=["fits", "beside-a-longer-text", "alone-too-long"],
)
def test_a_prompt_that_the_model_cannot_read_is_an_error(
    make_experiment, gpt2, instruction, max_length, expected
):
    """A model with learnt positions would stop in the middle of a run, or of its evaluation."""
    experiment = make_experiment(
        "model.family=causal-lm",
        f'model.name="{gpt2}"',
        "model.max_new_tokens=2",
        f"train.max_length={max_length}",
        "data.max_train=20",
    )
    asked = dict.fromkeys(open_source(experiment.data).task_names(), instruction)
    data = experiment.data.model_copy(update={"instructions": asked})
    found = check_text_lengths(experiment.model_copy(update={"data": data}))
    about_prompts = [(each.kind, each.text) for each in found if "prompt" in each.text]
    assert {kind for kind, _ in about_prompts} == {kind for kind, _ in expected}
    for kind, line in expected:
        assert all(line in message for said, message in about_prompts if said == kind)


@pytest.mark.parametrize(("name", "together"), [("gpt2", True), ("bart", False)])
def test_an_answer_takes_room_of_the_text_in_a_decoder_alone(
    make_experiment, tmp_path, name, together
):
    """An encoder-decoder writes it beside the text."""
    model = with_positions(save(tmp_path, name), 64)
    family = "causal-lm" if together else "seq2seq-lm"

    def asked(tokens):
        words = (f"model.family={family}", f'model.name="{model}"', "train.max_length=40")
        return make_experiment(*words, f"model.max_new_tokens={tokens}")

    most = 24 if together else 64
    check_names(asked(most))
    with pytest.raises(UserError, match="the model reads 64 tokens"):
        check_names(asked(most + 1))


def test_positions_of_a_model_of_texts_and_pictures_are_those_of_its_texts(tmp_path):
    Gemma3Config(text_config={"max_position_embeddings": 77}).save_pretrained(tmp_path)
    assert max_positions(ModelConfig(family="causal-lm", name=str(tmp_path))) == 77
