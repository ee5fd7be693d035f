"""Clients and a strategy around models that a program passes."""

import doctest
import json
from functools import partial

import pytest
import torch
import transformers
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp.strategy import Strategy
from peft import IA3Config, LoraConfig, get_peft_model

from client.site_file import NODE_KEY
from deal_core.config.file import to_run_config
from deal_core.data import Example, load_for_clients
from deal_core.data.embedded import asset_folder
from deal_core.data.partition import partition
from deal_core.models.loading import GIVEN
from deal_core.wire.records import REQUEST, SECURE
from simulations.api import (
    Deal,
    DealClient,
    DealStrategy,
    RecordDP,
    UserError,
    experiment,
    load_run,
    nouns,
    patch,
    simulate,
)
from simulations.engines.inprocess import InProcessGrid
from simulations.engines.worker_pool import assume_identity
from tests.architectures import CONFIGS, LOADERS, save
from tests.client.real_site import LABELS, RealSite, asking, code, message_of, start, update
from tests.client.real_site import rows as site_rows
from tests.run_configs import placed
from tests.simulations.runs import assert_same_run, at, learnt_adapter, simulated

pytestmark = pytest.mark.filterwarnings("ignore:task")  # those of tests are small

TASKS = {"colours": ("red", "blue"), "words": ("green", "options")}
NAMES = [label for labels in TASKS.values() for label in labels]
SMALL = {"train.max_length": 16, "train.batch_size": 4, "run.threads": 1, "adapter.rank": 2}
TEXTS = ("a b", "c d c", "a a d", "b c")
OFF = Deal(distillation=0, future=0, class_means="off")


def rows(client):
    """A few rows of each task."""
    made = {}
    for task, labels in TASKS.items():
        train = [(text + " a" * client, labels[k % 2]) for k, text in enumerate(TEXTS)]
        made[task] = {"train": train * 2, "test": train[:2]}
    return made


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """``objects("bert")``: a model with an adapter, and its tokeniser."""

    def make(name, loader=None, peft=True, **more):
        folder = save(tmp_path_factory.mktemp(name), name)
        torch.manual_seed(1)
        transformers.logging.set_verbosity_error()
        model = (loader or LOADERS[CONFIGS[name][0]]).from_pretrained(folder, **more)
        if peft:
            model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4))
        return model, transformers.AutoTokenizer.from_pretrained(folder)

    return make


@pytest.fixture(scope="module")
def bert(objects):
    return objects("bert")


def strategy(*parts, **more):
    return DealStrategy(*parts, clients=2, rounds=1, overrides=SMALL, **more)


def run_of(passed, out, asked=None, **own):
    return simulate(
        lambda number: DealClient(*passed, rows(number), **own), asked or strategy(), TASKS, out=out
    )


@pytest.mark.parametrize(
    ("name", "privacy"), [("bert", None), ("llama", RecordDP(epsilon=8, delta=1e-3)), ("t5", None)]
)
def test_a_model_that_is_passed_is_federated(objects, tmp_path, name, privacy):
    model, tokenizer = objects(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    done = run_of((model, tokenizer), tmp_path / "run", privacy=privacy)
    assert done.results.tasks == list(TASKS)
    adapter = done.results.config.adapter
    assert (adapter.rank, adapter.lora_alpha) == (2, 4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    learnt = load_run(tmp_path / "run", model, tokenizer)
    assert learnt.predict(["a b"], "colours") == done.predict(["a b"], "colours")
    if privacy is None:
        assert done.results.privacy.mechanism == "none"
    else:
        assert set(done.results.privacy.epsilon) == {"0", "1"}
        assert all(0 < value <= 8 for value in done.results.privacy.epsilon.values())


def test_the_door_learns_what_the_command_learns_to_the_bit(tmp_path):
    """The quickstart with few rows, class means included."""
    few = {
        "data.tasks": ["laboratory", "surgery"],
        "data.max_train": 24,
        "data.max_test": 12,
        "federation.clients": 3,
        "federation.rounds": 1,
        "train.max_length": 8,
        "adapter.first_layer": 4,
        "method.prototype.directions": 0,
        "run.threads": 1,
        "run.workers": 1,
    }
    config = experiment("quickstart", few)
    simulated(config, tmp_path / "command")
    shares = {
        task: partition(load_for_clients(config, task), config.data.partition, 3, config.run.seed)
        for task in config.data.tasks
    }
    weights = asset_folder("minilm")
    model = transformers.AutoModel.from_pretrained(weights)
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights)

    def client(number):
        own = {task: (s[number].train, s[number].test) for task, s in shares.items()}
        return DealClient(model, tokenizer, own)

    tasks = {task: s[0].labels for task, s in shares.items()}
    door = simulate(client, DealStrategy(config=config), tasks, out=tmp_path / "door")
    assert door.results.config.data.source.startswith(GIVEN)
    assert_same_run(tmp_path / "door", tmp_path / "command")


def test_anybodys_server_app_and_flowers_own_loop_play_the_same_run(bert, tmp_path):
    seen = []

    def mod(message, context, app):
        seen.append(message.metadata.message_type)
        return app(message, context)

    clients = [DealClient(*bert, rows(number), mods=[mod]) for number in range(2)]

    def answer(message, context):
        return clients[int(context.node_config["partition-id"])](message, context)

    run_of(bert, tmp_path / "simulated")
    with assume_identity(1, 1):
        result = strategy(*bert, TASKS, out=tmp_path / "own").start(InProcessGrid(answer, {}, 2))
        walked = strategy(*bert, TASKS, out=tmp_path / "walked")
        found = Strategy.start(walked, InProcessGrid(answer, {}, 2), ArrayRecord(), 2)
    assert {"query.hello", "train", "evaluate"} <= set(seen)
    own = load_run(tmp_path / "own").results
    assert_same_run(tmp_path / "own", tmp_path / "simulated")
    assert dict(result.evaluate_metrics_clientapp[2]) == dict(
        zip(own.tasks, own.accuracy_matrix[-1], strict=True)
    )
    for number, stage in enumerate(own.accuracy_matrix, start=1):
        assert list(found.evaluate_metrics_clientapp[number].values()) == stage


def headed(objects, kind, names):
    """A model with a head of these outputs."""
    named = {"id2label": dict(enumerate(names)), "label2id": {n: k for k, n in enumerate(names)}}
    loader = getattr(transformers, f"AutoModelFor{kind}Classification")
    return objects("bert", loader, peft=False, **named)


def test_a_head_for_all_labels_learns_with_the_encoder(objects, tmp_path):
    model = headed(objects, "Sequence", NAMES)
    asked = strategy(config={"train": {"learning_rate": 0.02}, "federation": {"local_epochs": 6}})
    done = run_of(model, tmp_path / "run", asked)
    assert done.results.config.model.family == "sequence-classification"
    assert "base_model.model.classifier.lora_B.weight" in learnt_adapter(tmp_path / "run")
    assert done.results.accuracy_matrix[0][0] == 1.0


TAGGED = {"colours": ("red",), "words": ("green",)}


def tagged_rows(client):
    """Rows whose word ``b`` is an entity of the task."""
    made = {}
    for task, (label,) in TAGGED.items():
        texts = [(f"{text} a" + " a" * client).split() for text in TEXTS]
        train = [
            {"tokens": words, "tags": [f"B-{label}" if w == "b" else "O" for w in words]}
            for words in texts
        ]
        made[task] = {"train": train * 4, "test": train}
    return made


@pytest.mark.parametrize("private", [False, True])
def test_a_head_for_all_tags_finds_entities(objects, tmp_path, private):
    tags = ["O", *(f"{b}-{label}" for (label,) in TAGGED.values() for b in "BI")]
    model = headed(objects, "Token", tags)
    asked = DealStrategy(
        tasks=TAGGED,
        method=OFF,
        overrides={**SMALL, "train.learning_rate": 0.03, "federation.local_epochs": 8},
        privacy=RecordDP(epsilon=8, delta=1e-3) if private else None,
        clients=2,
        rounds=2,
        out=tmp_path / "run",
    )
    run = simulate(lambda n: DealClient(*model, tagged_rows(n)), asked, TAGGED)
    assert run.results.config.model.family == "token-classification"
    assert set(run.results.measures.values()) == {"entity-f1"}
    assert "base_model.model.classifier.lora_B.weight" in learnt_adapter(tmp_path / "run")
    if not private:
        assert run.results.accuracy_matrix[0][0] == 1.0


def test_tags_that_cannot_be_are_refused_in_one_line(bert):
    bad = {"tokens": ["a", "b"], "tags": ["O"]}
    with pytest.raises(UserError, match="task 'words', row 0: 2 words and 1 tags"):
        DealClient(*bert, {"words": {"train": [bad], "test": []}})


def loss(model, batch, tokenizer):
    """How far a text's mean state is from zero, or from one, by its label's place."""
    return (states(model, batch, tokenizer) - targets(batch)).square()


def targets(batch):
    places = {label: float(k) for labels in TASKS.values() for k, label in enumerate(labels)}
    return torch.tensor([places[example.label] for example in batch])


def states(model, batch, tokenizer):
    read = [tokenizer(example.text, return_tensors="pt")["input_ids"] for example in batch]
    return torch.stack([model(input_ids=ids).last_hidden_state.mean() for ids in read])


def predict(model, batch, labels, tokenizer):
    return [labels[int(value > 0.5)] for value in states(model, batch, tokenizer)]


def functions(tokenizer):
    return {
        "loss": partial(loss, tokenizer=tokenizer),
        "predict": partial(predict, tokenizer=tokenizer),
    }


def test_a_pair_of_functions_is_federated(bert, tmp_path):
    done = run_of(bert, tmp_path / "run", **functions(bert[1]), method=OFF)
    assert done.results.config.model.family == "own-loss"
    assert any(value.any() for key, value in learnt_adapter(tmp_path / "run").items())
    assert done.predict(["a b"], "words")[0].label in TASKS["words"]


@pytest.mark.parametrize(
    ("asked", "own", "reason"),
    [
        (strategy(), {"functions": True}, "cannot do distillation: it gives no logits"),
        (
            strategy(method=Deal(distillation=0, future=0, class_means="on")),
            {"functions": True},
            "cannot do class means: it has no embedding",
        ),
        (
            strategy(method=OFF, privacy=RecordDP()),
            {"functions": True},
            r"cannot do privacy\.mechanism 'record': its loss may read several records",
        ),
        (
            strategy(),
            {"functions": True, "privacy": RecordDP()},
            "RecordDP and a model with a loss of its own: its loss may",
        ),
        (strategy(), {"trainer": object(), "privacy": RecordDP()}, "RecordDP: a Trainer's own"),
        (strategy(privacy=RecordDP()), {"trainer": object()}, "RecordDP: a Trainer's own"),
        (
            strategy(method="sequential"),
            {"method": Deal()},
            r"method\.name is 'sequential', and this client's 'deal'",
        ),
        (strategy(), {"loss": loss}, "loss and predict belong together"),
        (strategy(), {"rows": {"colours": "text"}}, "a pair of lists of rows"),
        (strategy(), {"rows": {"colours": ([("a", 1)], [])}}, r"row 0: should be \(text, answer\)"),
        (
            strategy(),
            {"rows": {"colours": ([("a", "pink")] * 4, [("a", "red")]), "words": ([], [])}},
            "training row 0: its label 'pink' is not one of red, blue",
        ),
        (strategy(method="deel"), {}, "unknown method.name 'deel'"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(bert, tmp_path, asked, own, reason):
    own = dict(own)
    given = own.pop("rows", rows(0))
    if own.pop("functions", False):
        own |= functions(bert[1])
    with pytest.raises(UserError, match=reason):
        simulate(lambda n: DealClient(*bert, given, **own), asked, TASKS, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_model_that_cannot_be_followed_is_one_line(objects):
    plain, tokenizer = objects("bert", peft=False)
    learnt, _ = objects("bert")
    next(p for n, p in learnt.named_parameters() if "lora_B" in n).data.fill_(1.0)
    other, _ = objects("bert", peft=False)
    spans, _ = objects("bert", transformers.AutoModelForQuestionAnswering, peft=False)
    for model, reason in {
        torch.nn.Linear(2, 2): "pass a PeftModel or a PreTrainedModel",
        learnt: "has learnt something already",
        get_peft_model(plain, IA3Config(target_modules=["value"], feedforward_modules=[])): "IA3",
        get_peft_model(other, LoraConfig(use_rslora=True)): r"LoraConfig\.use_rslora is set",
        spans: "no family trains a BertForQuestionAnswering",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            DealClient(model, tokenizer, {})
        assert "\n" not in str(caught.value)
    headed = objects("bert", transformers.AutoModelForSequenceClassification, peft=False)
    with pytest.raises(UserError, match="'red' has no output in the model's head"):
        strategy(*headed, TASKS).experiment  # noqa: B018
    pair = [DealClient(*headed, {}), DealClient(*objects("bert"), {})]
    with pytest.raises(UserError, match="the clients have different models"):
        simulate(pair.__getitem__, strategy(), TASKS)
    with pytest.raises(UserError, match="pass model, tokenizer and tasks"):
        strategy().experiment  # noqa: B018


OWN = {task: LABELS[task] for task in ("laboratory", "surgery")}


def own_rows(count=40):
    return {task: (site_rows(task, count), site_rows(task, count)) for task in OWN}


def asked_of_a_site(bert, folder, privacy=None):
    sites = {**SMALL, "federation.sites": ["north"], "federation.clients": 1}
    made = DealStrategy(*bert, OWN, rounds=1, overrides=sites, privacy=privacy)
    return at(made.experiment, folder / "server")


def test_a_site_keeps_its_gate_ledger_and_budget(bert, tmp_path):
    site = RealSite(tmp_path, 'mechanism = "record"\nmax_epsilon = 3.0\nmetrics = "clear"\n')
    app = DealClient(*bert, own_rows(), privacy=RecordDP(epsilon=1.0, delta=1e-3))
    assert code(site.answer(asked_of_a_site(bert, tmp_path), {}, app=app)) == "policy"
    asked = asked_of_a_site(bert, tmp_path, RecordDP(epsilon=8.0))
    first = site.answer(asked, {}, app=app)
    assert code(first) == "ok"
    assert len(site.events) == 1
    assert 0 < first.content["metrics"]["epsilon"] <= 1.0  # the client's own demand
    again = site.answer(asked, {}, app=app)
    assert torch.equal(update(again), update(first))
    assert len(site.events) == 1  # charged once
    other = DealClient(*bert, own_rows(), method="sequential")
    assert code(site.answer(asked, {}, app=other)) == "policy"


def test_a_demand_for_a_large_delta_loosens_no_site(bert, tmp_path):
    site = RealSite(tmp_path, 'mechanism = "record"\n')
    asked = asked_of_a_site(bert, tmp_path, RecordDP(delta=0.05))
    assert code(site.answer(asked, {}, app=DealClient(*bert, own_rows()))) == "policy"
    app = DealClient(*bert, own_rows(), privacy=RecordDP(delta=0.05))
    assert code(site.answer(asked, {}, app=app)) == "ok"
    assert site.events[0].delta == 1e-3  # of 80 records


@pytest.mark.parametrize(
    "row",
    [("one more case", "Oncology"), (" ", "Surgery"), ("half \ud800", "Surgery"), Example("a", "")],
)
def test_a_row_that_a_site_cannot_use_harms_itself_alone(bert, tmp_path, row):
    site, own = RealSite(tmp_path), own_rows()
    own["surgery"] = ([*own["surgery"][0], row], own["surgery"][1])
    asked = asked_of_a_site(bert, tmp_path, RecordDP())
    assert code(site.answer(asked, {}, app=DealClient(*bert, own))) == "ok"
    left_out = [line for line in site.log() if line["event"] == "rows_left_out"]
    assert [(line["task"], line["rows"]) for line in left_out] == [("surgery", 1)]


def test_disjoint_tasks_are_of_rows_that_say_whose_they_are(bert, tmp_path):
    """Else two people with one text would decide which tasks the site refuses."""
    site = RealSite(tmp_path, 'mechanism = "record"\ndisjoint_tasks = true\n')
    asked, own = asked_of_a_site(bert, tmp_path, RecordDP()), own_rows()
    named = {
        task: tuple(
            [Example(*row, id=f"{task} {n}") for n, row in enumerate(side)] for side in both
        )
        for task, both in own.items()
    }
    named["surgery"][0].extend(Example(*row) for row in site_rows("surgery", 8))
    assert code(site.answer(asked, {}, app=DealClient(*bert, named))) == "ok"
    assert [line["rows"] for line in site.log() if line["event"] == "rows_left_out"] == [8]


def test_whose_rows_a_site_reads_is_its_own_word(bert, tmp_path):
    site = RealSite(tmp_path)
    asked = asked_of_a_site(bert, tmp_path, RecordDP())
    data = asked.data.model_copy(update={"source": f"{GIVEN}0"})
    asked = asked.model_copy(update={"data": data})
    assert code(site.answer(asked, {}, app=DealClient(*bert, own_rows(24)))) == "ok"
    (plan,) = site.ledger.plans().values()
    assert [work["records"] for work in json.loads(plan)["work"]] == [24, 24]  # its files have 40


def test_what_a_site_declares_holds_at_once(bert, tmp_path):
    site, app = RealSite(tmp_path), DealClient(*bert, own_rows())
    asked = asked_of_a_site(bert, tmp_path, RecordDP())
    assert code(site.answer(asked, {}, app=app)) == "ok"
    RealSite(tmp_path, declared={"laboratory": LABELS["laboratory"]})
    assert code(site.answer(asked, {"server_round": 2}, app=app)) == "policy"


def answered(bert, own, folder):
    """What a client says that demands privacy, asked for an update of ``words``."""
    made = strategy(*bert, TASKS, privacy=RecordDP(delta=1e-3)).experiment
    app, state = DealClient(*bert, own, privacy=RecordDP(delta=1e-3)), start(made)
    asks = asking(state).model_copy(update={"task": "words"})
    with assume_identity(7, 1):
        config = to_run_config(at(made, folder))
        context = Context(7, 1, {"partition-id": 0}, RecordDict(), config)
        reply = app(message_of(made, state, asks), context)
    assert code(reply) == "ok"
    return reply


def test_a_client_that_demands_privacy_draws_its_noise_itself(bert, tmp_path):
    """The server, which names the seed, could take seeded noise away."""
    replies = [answered(bert, rows(0), tmp_path / name) for name in ("one", "two")]
    assert {each.content["metrics"]["simulation_only"] for each in replies} == {0}
    assert not torch.equal(*map(update, replies))


def test_labels_that_a_server_leaves_out_end_no_request_of_a_client_that_demands_privacy(
    bert, tmp_path
):
    """Whether one row has such a label would show, whatever epsilon is."""
    own = rows(0)
    own["words"]["train"] = [*own["words"]["train"], ("b c", "amber")]
    answered(bert, own, tmp_path)


IN_SUM = {
    "privacy.noise_share": "sum",
    "privacy.colluding": 0,
    "aggregation.secure": True,
    "aggregation.rule": "ffa",
    "train.step": "server",
}
"""Of a client's noise one share of three: who poses as the two others sees the rest of none."""


@pytest.mark.parametrize("table", ["no site", "no policy", "policy", "sum"])
def test_a_client_that_demands_privacy_makes_all_noise_itself(bert, tmp_path, table):
    """Unless the policy of its site shares it: whoever asks could pose as all others of a sum."""
    RealSite(tmp_path, 'noise_share = "sum"\ncolluding = 0\n' if table == "sum" else "")
    if table == "no policy":
        written = (tmp_path / "site.toml").read_text().partition("[policy]")[0]
        (tmp_path / "site.toml").write_text(written)
    sites = {} if table == "no site" else {"federation.sites": ["north", "b", "c"]}
    overrides = {**SMALL, **sites, **IN_SUM, "federation.clients": 3}
    privacy = RecordDP(delta=1e-5)
    asked = at(
        DealStrategy(
            *bert, OWN, rounds=1, overrides=overrides, method=OFF, privacy=privacy
        ).experiment,
        tmp_path / "server",
    )
    node = {"partition-id": 0} if table == "no site" else {NODE_KEY: str(tmp_path / "site.toml")}
    with assume_identity(7, 1):
        state, config = start(asked), placed(asked, "/srv/runs/run-1")
        message = message_of(asked, state, asking(state))
        message.content[SECURE] = ConfigRecord({REQUEST: b"of a mask"})
        app = DealClient(*bert, own_rows(), privacy=privacy)
        reply = app(message, Context(7, 1, node, RecordDict(), config))
    assert code(reply) == ("refused" if table == "sum" else "policy")  # that is no request


@pytest.mark.parametrize(
    "given", [{"epsilon": 0}, {"epsilon": float("nan")}, {"delta": 1}, {"max_grad_norm": 0}]
)
def test_a_demand_that_limits_nothing_is_none(given):
    with pytest.raises(UserError, match="epsilon and max_grad_norm should be above 0"):
        RecordDP(**given)


def test_the_settings_of_a_run_stay_what_its_first_message_said(bert):
    app, codes = DealClient(*bert, rows(0)), []
    context = Context(7, 1, {"partition-id": 0}, RecordDict(), {})
    with assume_identity(7, 1):
        for asked in (strategy(*bert, TASKS), strategy(*bert, TASKS, method="sequential")):
            record = ConfigRecord(to_run_config(asked.experiment))
            content = RecordDict({"hello": ConfigRecord(), "experiment": record})
            codes.append(code(app(Message(content, 1, "query.hello"), context)))
    assert codes == ["ok", "refused"]


def trainer_of(passed, folder, steps):
    class Count(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            steps.append(state.global_step)

    arguments = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
    )
    model, tokenizer = passed
    return transformers.Trainer(model, arguments, processing_class=tokenizer, callbacks=[Count()])


def test_a_trainer_takes_the_steps_of_rounds(objects, tmp_path):
    steps = []
    passed = objects("llama")
    done = simulate(
        lambda number: patch(trainer_of(passed, tmp_path / "trainer", steps), rows(number)),
        strategy(),
        TASKS,
        out=tmp_path / "run",
    )
    assert steps == [1, 2] * 4  # two clients, two tasks, eight rows in batches of four
    assert done.results.aggregation_error
    assert any(value.any() for key, value in learnt_adapter(done.folder).items() if "lora_B" in key)
    with pytest.raises(UserError, match="the trainer has no tokeniser"):
        patch(trainer_of((passed[0], None), tmp_path / "trainer", []), rows(0))
    made = trainer_of(passed, tmp_path / "trainer", [])
    made.optimizer = torch.optim.SGD(made.model.parameters(), 0.1)
    with pytest.raises(UserError, match="the trainer's optimiser is of other parameters"):
        patch(made, rows(0))


def test_the_examples_of_the_nouns_run():
    assert doctest.testmod(nouns) == doctest.TestResults(0, 2)
