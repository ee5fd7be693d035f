"""A server that bends messages and run config, and nothing else, against a real site with a policy.

Each test is one way in which the promise of epsilon could be broken by messages alone.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.resources import PROBE_TEXTS
from deal_core.privacy.accounting.ledger_event import composed
from deal_core.privacy.mechanisms import record as record_mechanism
from deal_core.privacy.mechanisms.private_gradients import PrivateGradients
from tests.client.real_site import LABELS, RealSite, asked, code, rows, start, update
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")

PUBLIC = ("method.consolidation.data=public", "method.consolidation.public_path=/etc/public")


@pytest.fixture
def site(tmp_path) -> RealSite:
    return RealSite(tmp_path)


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """Positions of the data that each private step has read."""
    seen: list[int] = []
    original = PrivateGradients.accumulate

    def watched(self, module, objective, batch):
        seen.extend(batch)
        return original(self, module, objective, batch)

    monkeypatch.setattr(PrivateGradients, "accumulate", watched)
    return seen


def test_an_honest_request_is_answered_and_charged(site):
    """The attacks below fail for their own reasons, not because nothing works here."""
    reply = site.answer(asked(), {})
    assert code(reply) == "ok"
    assert [event.task for event in site.events] == ["surgery"]
    assert set(reply.content) == {"status", "lora", "metrics"}


def test_a_second_run_of_the_same_settings_is_planned_on_its_own(tmp_path):
    """It spends on top of the first, and its noise is solved for that."""
    policy = 'mechanism = "record"\nmax_epsilon = 1.0\nmetrics = "noised"\n'
    site, experiment = RealSite(tmp_path, policy), asked("privacy.metrics=noised")
    assert code(site.answer(experiment, {}, run="run-1")) == "ok"
    evaluation = {"task": "", "tasks": ["laboratory"], "learnt": ["laboratory"]}
    for stage in (-1, 0):
        site.answer(experiment, {**evaluation, "stage": stage}, run="run-1", kind="evaluate")
    reply = site.answer(experiment, {}, run="run-2")
    assert code(reply) == "ok"
    updates = [event for event in site.events if event.task == "surgery"]
    assert len({event.run for event in updates}) == len(site.ledger.plans()) == 2
    assert updates[1].noise_multiplier > 1.05 * updates[0].noise_multiplier
    counts = [event for event in site.events if event.mechanism == "counts"]
    assert {event.run for event in counts} == {updates[0].run}
    assert reply.content["metrics"]["epsilon"] > composed(site.events, updates[1].delta)


def test_what_the_site_changes_in_its_file_makes_no_request_new(tmp_path):
    """Asked again after its data have moved, it gives what it charged, and pays once."""
    experiment = asked()
    first = RealSite(tmp_path).answer(experiment, {})
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = RealSite(tmp_path, data_lines="cache_tokens = true\n")
    (tmp_path / "site.toml").write_text(
        (tmp_path / "site.toml").read_text().replace('path = "data"', 'path = "moved"')
    )
    again = moved.answer(experiment, {})
    assert torch.equal(update(first), update(again))
    assert len(moved.events) == len(moved.ledger.plans()) == 1


def test_a_tighter_clipping_bound_holds_at_once(tmp_path):
    experiment = asked("privacy.max_grad_norm=10.0")
    assert code(RealSite(tmp_path).answer(experiment, {})) == "ok"
    tighter = RealSite(tmp_path, 'mechanism = "record"\nmax_epsilon = 1.0\nmax_grad_norm = 1.0\n')
    assert code(tighter.answer(experiment, {"server_round": 2})) == "policy"


OPEN = 'mechanism = "none"\nmetrics = "clear"\nshare_num_examples = true\n'


@pytest.mark.parametrize(
    ("stricter", "ends"),
    [
        ('mechanism = "record"\nmax_epsilon = 1.0\n', "policy"),
        ('mechanism = "none"\nsecure_aggregation = "required"\n', "policy"),
        ('mechanism = "none"\nmax_rank = 1\n', "policy"),
        ('mechanism = "none"\nmin_records = 100\n', "no-data"),
    ],
)
def test_an_update_that_was_kept_does_not_outlive_a_stricter_policy(tmp_path, stricter, ends):
    """It was made and never sent; the site has thought better of it; the server asks again."""
    site, experiment = RealSite(tmp_path, OPEN), asked("privacy.mechanism=none")
    assert code(site.answer(experiment, {})) == "ok"
    assert list((tmp_path / "state").rglob("update-*.safetensors"))
    reply = RealSite(tmp_path, stricter).answer(experiment, {})
    assert code(reply) == ends
    assert set(reply.content) == {"status"}


TRUSTING = 'mechanism = "client"\ntrusted_server = true\n'


@pytest.mark.parametrize("stricter", ['mechanism = "client"\n', TRUSTING + "max_epsilon = 1.0\n"])
def test_who_no_longer_trusts_the_server_sends_nothing_that_it_kept(tmp_path, stricter):
    trusted = ("privacy.mechanism=client", "privacy.trusted_server=true")
    experiment = asked(*trusted, "privacy.metrics=none")
    assert code(RealSite(tmp_path, TRUSTING).answer(experiment, {})) == "ok"
    reply = RealSite(tmp_path, stricter).answer(experiment, {})
    assert code(reply) == "policy"
    assert set(reply.content) == {"status"}


def test_figures_that_were_kept_leave_as_the_policy_of_today_says(tmp_path):
    experiment = asked("privacy.mechanism=none")
    first = RealSite(tmp_path, OPEN).answer(experiment, {})
    assert {"loss", "seconds"} <= set(first.content["metrics"])
    assert first.content["metrics"]["num_examples"] == 40
    again = RealSite(tmp_path, 'mechanism = "none"\n').answer(experiment, {})
    assert set(again.content["metrics"]) == {"num_examples"}
    assert again.content["metrics"]["num_examples"] == 1
    one, two = (update(reply) for reply in (first, again))  # the same one, not trained again
    assert torch.equal(one, two)


def test_spending_that_was_kept_leaves_as_the_policy_of_today_says(tmp_path):
    private = 'mechanism = "record"\nmax_epsilon = 1.0\n'
    told = {"epsilon", "delta", "noise_floor"}
    first = RealSite(tmp_path, private + "share_num_examples = true\n").answer(asked(), {})
    assert told <= set(first.content["metrics"])
    again = RealSite(tmp_path, private + "spending = false\n").answer(asked(), {})
    assert set(again.content["metrics"]) == set(first.content["metrics"]) - told
    one, two = (update(reply) for reply in (first, again))  # the same one, charged once
    assert torch.equal(one, two)


@pytest.mark.parametrize("tasks", [["laboratory"], ["surgery"], ["surgery", "laboratory", "skin"]])
def test_a_public_phase_reads_no_private_record(tmp_path, tasks):
    public = tmp_path / "public.txt"
    public.write_text("a public text\nanother public text\n")
    site = RealSite(tmp_path, data_lines=f'public_path = "{public}"\n')
    experiment = asked(*PUBLIC)
    assert code(site.answer(experiment, {"phase": "consolidate"})) == "ok"
    assert site.events == []
    reply = site.answer(experiment, {"phase": "consolidate", "tasks": tasks})
    assert code(reply) == "refused"
    assert set(reply.content) == {"status"}
    assert site.events == []


def test_what_a_public_phase_learns_follows_from_no_private_record(tmp_path):
    public = tmp_path / "public.txt"
    public.write_text("a public text\nanother public text\n")
    learnt = []
    for name, count in (("one", 40), ("other", 12)):
        (tmp_path / name).mkdir()
        data = {task: rows(task, count) for task in LABELS}
        line = f'public_path = "{public}"\n'
        site = RealSite(tmp_path / name, data=data, data_lines=line)
        reply = site.answer(asked(*PUBLIC), {"phase": "consolidate"})
        assert code(reply) == "ok"
        learnt.append(update(reply))
    assert torch.equal(*learnt)
    assert bool(learnt[0].any())


def test_a_site_shares_no_pass_between_records(tmp_path, monkeypatch):
    """Beside others a record's numbers are rounded otherwise."""
    from deal_core.models.encoder import EncoderLabels

    shared, embed = [], EncoderLabels._embed

    def watched(self, ids, layers=1):
        shared.append(len(ids))
        return embed(self, ids, layers)

    monkeypatch.setattr(EncoderLabels, "_embed", watched)
    site = RealSite(tmp_path, 'mechanism = "record"\nmetrics = "noised"\n')
    experiment = asked("privacy.metrics=noised", "privacy.sample_rate=1.0")
    assert code(site.answer(experiment, {"seen": ["laboratory"]})) == "ok"
    evaluate = {"task": "", "stage": -1, "server_round": 0, "tasks": ["surgery"]}
    assert code(site.answer(experiment, evaluate, kind="evaluate")) == "ok"
    assert len(shared) > 40
    assert max(shared) <= len(PROBE_TEXTS)  # constant texts alone share a pass


@pytest.mark.parametrize("schedule", ["synchronous", "per-client"])
@pytest.mark.parametrize("tasks", [["laboratory"], ["laboratory"] * 20, ["surgery", "laboratory"]])
def test_a_mechanism_learns_the_one_task_that_it_charges(site, read, tasks, schedule):
    reply = site.answer(asked(f"stream.schedule={schedule}"), {"tasks": tasks})
    assert code(reply) == "refused"
    assert site.events == []
    assert read == []


def test_every_record_is_read_at_most_once_a_step(site, monkeypatch):
    """Whatever is handed to the mechanism: two positions that hold one record are noticed."""
    from client.resources import Workbench

    original = Workbench.task

    def doubled(self, task, client):
        data = original(self, task, client)
        twice = {"train": [*data.train, *data.train], "record_ids": [*data.record_ids] * 2}
        return type(data)(**{**vars(data), **twice})

    monkeypatch.setattr(Workbench, "task", doubled)
    reply = site.answer(asked(), {})
    assert code(reply) == "policy"
    assert site.events == []


def test_more_records_than_were_planned_are_not_read(site):
    """The plan's rate and number of steps are those of so many records."""
    assert code(site.answer(asked(), {})) == "ok"
    more = RealSite(site.folder, data={**site.data, "surgery": rows("surgery", 400)})
    from client.app import _workbench

    _workbench.cache_clear()
    assert code(more.answer(asked(), {"server_round": 2})) == "policy"
    assert len(more.events) == 1


SECRET = "appendectomy"


def neighbours(tmp_path, text: str) -> tuple[RealSite, RealSite]:
    """A site, and the same site with one more record."""
    (tmp_path / "without").mkdir()
    (tmp_path / "with").mkdir()
    more = {**{t: rows(t) for t in LABELS}, "surgery": [*rows("surgery"), (text, "Surgery")]}
    return RealSite(tmp_path / "without"), RealSite(tmp_path / "with", data=more)


@pytest.mark.parametrize(
    ("loud", "end"), [(1e2, "ok"), (1e4, "refused"), (1e19, "refused"), (3e38, "refused")]
)
def test_an_adapter_beyond_the_bound_is_refused_before_a_record_is_read(tmp_path, loud, end):
    sites = neighbours(tmp_path, f"{SECRET} case")
    assert {code(site.answer(asked(), {}, start(asked(), loud))) for site in sites} == {end}


def test_no_code_tells_of_a_word_that_a_crafted_model_stumbles_over(tmp_path, monkeypatch):
    """The strongest form: the model itself gives NaN, or fails, where a chosen word occurs."""
    from deal_core.models.encoder import EncoderLabels

    original = EncoderLabels._embed

    def stumbling(fault):
        def embed(self, token_ids, layers=1):
            found = [SECRET_TOKEN in ids for ids in token_ids]
            if any(found) and fault == "raise":
                raise RuntimeError("an overflow")
            vectors = original(self, token_ids, layers)
            # what a batch-mate does to the arithmetic may reach the whole pass
            return vectors * torch.nan if any(found) else vectors

        return embed

    from deal_core.config.experiment import Experiment
    from deal_core.models import load_model

    config = Experiment()
    model = load_model(config.model, config.adapter, 16)
    SECRET_TOKEN = model.tokens([SECRET])[0][1]
    answers = {}
    for fault in ("nan", "raise"):
        monkeypatch.setattr(EncoderLabels, "_embed", stumbling(fault))
        for name in ("train", "evaluate"):
            (folder := tmp_path / fault / name).mkdir(parents=True)
            for site in neighbours(folder, f"{SECRET} case"):
                policy = site.policy + 'metrics = "noised"\n'
                own = RealSite(site.folder, policy=policy, data=site.data)
                train = {"task": "surgery"}
                evaluate = {"task": "", "stage": -1, "server_round": 0, "tasks": ["surgery"]}
                given = train if name == "train" else evaluate
                reply = own.answer(asked("privacy.metrics=noised"), given, kind=name)
                answers.setdefault((fault, name), []).append((code(reply), len(own.events)))
    assert set(map(str, answers.values())) == {str([("ok", 1), ("ok", 1)])}


def test_what_others_add_does_not_depend_on_a_record_that_gives_no_number(random_adapter):
    """A pass with a NaN in it would take its batch-mates along: a record would count many times."""
    from deal_core.config.experiment import Experiment
    from deal_core.lora.attach import read, set_trainable, write
    from deal_core.methods.shared.plain import Plain
    from deal_core.models import load_model
    from deal_core.models.interface import Encoded
    from tests.deal_core.training.clipped import clipped_gradients

    config = Experiment()
    model = load_model(config.model, config.adapter, 16, torch.float32)
    write(model.module, random_adapter(read(model.module).shapes, 8, 0.01, seed=5))
    data = [Encoded(tuple(ids), 0) for ids in model.tokens(["one text", "another", "a third one"])]
    plain = Plain(model, ["a", "b"], data)

    class Stumbling:
        def example_losses(self, batch):
            losses = plain.example_losses(batch)
            return losses * torch.nan if 2 in batch else losses

    sums = []
    for objective, part in ((plain, [0, 1]), (Stumbling(), [0, 1, 2])):
        factors = set_trainable(model.module, frozenset({"lora_B"}))
        clipped_gradients(model.module, objective, part, 0.5)
        sums.append(torch.cat([f.grad.flatten() for f in factors]))
        for factor in factors:
            factor.grad = None
    assert float(sums[0].norm()) > 0
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "labels",
    [
        {**LABELS, "surgery": ("Radiology",)},
        {**LABELS, "surgery": ("Surgery", "Radiology")},
        {task: LABELS[task] for task in ("laboratory", "skin")},
        {**LABELS, "undeclared": ("A", "B")},
    ],
)
def test_label_spaces_are_the_sites(site, labels):
    """Where the server leaves one out, an error told which sites have rows of it."""
    reply = site.answer(asked(labels=labels), {})
    assert code(reply) in ("policy", "refused")
    assert site.events == []


@pytest.mark.parametrize(
    "row",
    slow_but(
        [("odd case", "Unheard of"), ("half a character \ud800", "Surgery")],
        ("half a character \ud800", "Surgery"),
    ),
)
def test_a_row_that_cannot_be_used_changes_no_answer_and_is_counted_here_alone(tmp_path, row):
    from client.app import _workbench

    codes = []
    for name, extra in (("without", []), ("with", [row])):
        (tmp_path / name).mkdir()
        data = {**{t: rows(t) for t in LABELS}, "surgery": [*rows("surgery"), *extra]}
        site = RealSite(tmp_path / name, data=data)
        _workbench.cache_clear()
        codes.append(code(site.answer(asked(), {})))
        left_out = [line for line in site.log() if line["event"] == "rows_left_out"]
        assert [line["rows"] for line in left_out] == ([2] if extra else [])  # train and test
    assert codes == ["ok", "ok"]


@pytest.mark.parametrize(
    "limit",
    slow_but(
        ["data.max_train=1", "data.max_train=20", "data.train_share=0.3", "data.max_test=1"],
        "data.max_train=1",
        "data.max_test=1",
    ),
)
def test_no_experiment_takes_records_of_a_real_site_away(site, monkeypatch, limit):
    """A subset that is drawn again is another one for a neighbour; one record is an open book."""
    planned = []
    original = record_mechanism.RecordMechanism._gradients

    def watched(self, ask, *given):
        planned.append(len(ask.data))
        return original(self, ask, *given)

    monkeypatch.setattr(record_mechanism.RecordMechanism, "_gradients", watched)
    reply = site.answer(asked(limit), {})
    assert code(reply) == "ok"
    assert set(planned) == {40}
    assert site.events[0].delta == 1e-3  # of 120 records, whatever was asked


@pytest.mark.parametrize("tasks", [["surgery"] * 2, ["surgery"] * 2000, ["surgery", "skin"] * 2])
def test_counts_of_a_task_are_told_once_a_charge(tmp_path, tasks):
    site = RealSite(tmp_path, policy='mechanism = "record"\nmetrics = "noised"\n')
    experiment = asked("privacy.metrics=noised")
    evaluate = {"task": "", "stage": -1, "server_round": 0}
    reply = site.answer(experiment, {**evaluate, "tasks": tasks}, kind="evaluate")
    assert code(reply) == "refused"
    assert code(site.answer(experiment, {"piggybacked_evaluation": tasks})) == "refused"
    assert site.events == []


def test_noise_on_counts_covers_a_record_that_is_in_every_test_set(tmp_path):
    site = RealSite(tmp_path, policy='mechanism = "record"\nmetrics = "noised"\n')
    evaluate = {"task": "", "stage": -1, "server_round": 0, "tasks": list(LABELS)}
    reply = site.answer(asked("privacy.metrics=noised"), evaluate, kind="evaluate")
    assert code(reply) == "ok"
    (event,) = site.events
    assert event.max_grad_norm == pytest.approx((3 * len(LABELS)) ** 0.5)


def test_a_charge_names_the_task_whose_records_were_read(tmp_path, monkeypatch):
    """Under disjoint tasks the ledger is true of every record."""
    policy = 'mechanism = "record"\nmax_epsilon = 3.0\ndisjoint_tasks = true\n'
    site = RealSite(tmp_path, policy=policy)
    experiment, seen = asked("privacy.target_epsilon=3.0"), []
    original = record_mechanism.RecordMechanism._gradients

    def watched(self, ask, *given):
        seen.append((ask.task, {each.task for each in ask.record_ids}))
        return original(self, ask, *given)

    monkeypatch.setattr(record_mechanism.RecordMechanism, "_gradients", watched)
    for stage, task in enumerate(LABELS):
        for read in (task, "surgery"):
            given = {"task": task, "stage": stage, "tasks": [read]}
            assert code(site.answer(experiment, given)) == "refused"
        assert code(site.answer(experiment, {"task": task, "stage": stage})) == "ok"
    assert {task for task, _ in seen} == set(LABELS)
    assert all(read == {task} for task, read in seen)
    assert composed(site.events, site.events[0].delta, disjoint_tasks=True) <= 3.0


@pytest.mark.parametrize(
    "other",
    slow_but(
        [
            "privacy.target_epsilon=0.5",
            "train.learning_rate=0.02",
            "method.name=sequential",
            "same",
        ],
        "train.learning_rate=0.02",
        "same",
    ),
)
def test_another_run_gets_an_answer_of_its_own(site, other):
    """Also one of equal seed and adapters: the first run's update belongs to the first run."""
    first = site.answer(asked("privacy.target_epsilon=0.9"), {}, run="run-1")
    again = site.answer(asked("privacy.target_epsilon=0.9"), {}, run="run-1")
    np.testing.assert_array_equal(update(first), update(again))
    assert len(site.events) == 1
    settings = ("privacy.target_epsilon=0.9",) if other == "same" else (other,)
    second = site.answer(asked(*settings), {}, run="run-2")
    if code(second) == "ok":
        assert not torch.equal(update(second), update(first))
        assert len(site.events) == 2
    else:
        assert code(second) == "budget-spent"


@pytest.mark.parametrize(("asks", "delta"), [("0.9", 1e-3), ("0.0", 1e-3), ("0.00001", 1e-5)])
def test_the_server_sets_no_large_delta(site, asks, delta):
    site.answer(asked(f"privacy.target_delta={asks}"), {})
    assert site.events[0].delta == pytest.approx(delta)


CLIENT = ("privacy.mechanism=client", "privacy.target_epsilon=500")


@pytest.mark.parametrize("asks", ["0.9", "0.0"])
def test_the_server_sets_no_large_delta_of_a_whole_client(tmp_path, asks):
    site = RealSite(tmp_path, policy='mechanism = "client"\n')
    experiment = asked(*CLIENT, "privacy.trusted_server=false", f"privacy.target_delta={asks}")
    assert code(site.answer(experiment, {})) == "ok"
    assert site.events[0].delta <= 1e-5


def test_whether_the_server_is_trusted_is_the_sites_to_say(tmp_path):
    site = RealSite(tmp_path, policy='mechanism = "client"\n')
    assert code(site.answer(asked(*CLIENT, "privacy.trusted_server=true"), {})) == "policy"
    assert site.events == []
    (tmp_path / "trusting").mkdir()
    policy = 'mechanism = "client"\ntrusted_server = true\n'
    trusting = RealSite(tmp_path / "trusting", policy=policy)
    assert code(trusting.answer(asked(*CLIENT, "privacy.trusted_server=true"), {})) == "ok"
    assert [event.mechanism for event in trusting.events] == ["trusted-server"]


def test_what_a_client_has_spent_stays_where_the_policy_says_so(tmp_path):
    site = RealSite(tmp_path, policy='mechanism = "client"\nspending = false\n')
    reply = site.answer(asked(*CLIENT, "privacy.trusted_server=false"), {})
    assert code(reply) == "ok"
    told = reply.content.metric_records["metrics"].keys()
    assert not {"epsilon", "delta"} & set(told)


NONE = ("privacy.mechanism=none",)


def test_unprotected_releases_are_in_the_ledger(tmp_path):
    from deal_core.privacy.accounting.certificate import certificate, check_certificate

    site = RealSite(tmp_path, policy='metrics = "clear"\n')
    assert code(site.answer(asked(*NONE), {})) == "ok"
    evaluate = {"task": "", "stage": 0, "server_round": 0, "tasks": ["surgery"]}
    assert code(site.answer(asked(*NONE), evaluate, kind="evaluate")) == "ok"
    assert [event.mechanism for event in site.events] == ["none", "clear-counts"]
    assert not any(event.protected for event in site.events)
    statement = check_certificate(certificate(site.ledger))
    assert statement["unprotected"] == 2
    assert statement["epsilon"] is None
    assert "void" in statement["composed_over"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("adapter.rank=64",), "policy"),
        (('adapter.target_modules=["0.attention.output.dense"]',), "policy"),
        (("adapter.rank=16",), "ok"),
    ],
)
def test_an_unprotected_update_carries_only_so_much(tmp_path, overrides, expected):
    site = RealSite(tmp_path, policy='metrics = "none"\n')
    experiment = asked(*NONE, *overrides)
    assert code(site.answer(experiment, {})) == expected
    assert len(site.events) == (expected == "ok")


def test_an_unprotected_update_is_of_many_records_or_none(tmp_path):
    few = {**{t: rows(t) for t in LABELS}, "surgery": rows("surgery", 5)}
    site = RealSite(tmp_path, policy='metrics = "none"\n', data=few)
    assert code(site.answer(asked(*NONE), {})) == "no-data"
    assert site.events == []


def test_the_number_of_records_cannot_be_read_from_the_noise_floor(site):
    reply = site.answer(asked(), {})
    assert "noise_floor" not in reply.content.metric_records["metrics"]
