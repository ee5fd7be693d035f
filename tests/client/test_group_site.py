"""A real site whose policy names a unit column: groups are what it protects, and no message, run
config or column of the server's can make it anything else."""

import json

import pytest
import torch
from pydantic import ValidationError

from client.app import _runtime
from deal_core.privacy.dpsgd import PrivateGradients
from deal_core.privacy.events import composed
from deal_core.privacy.policy import Policy
from tests.client.real_site import LABELS, RealSite, code, start
from tests.client.real_site import small as asked
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")

POLICY = 'mechanism = "record"\nmax_epsilon = 1.0\nunit_column = "patient"\n'
GROUPS = "privacy.unit_column=person_in_the_words_of_the_consortium"


@pytest.fixture
def site(tmp_path):
    """40 records of each task, of ten patients."""
    return RealSite(tmp_path, policy=POLICY, each=4)


@pytest.fixture
def sources(monkeypatch):
    """What trained."""
    seen = []
    original = PrivateGradients.batches

    def watched(self):
        seen.append(self)
        return original(self)

    monkeypatch.setattr(PrivateGradients, "batches", watched)
    return seen


@pytest.mark.parametrize(
    "column",
    slow_but(["person", "text", "label", "patient", "../../etc/passwd"], "label"),
)
def test_an_experiment_about_groups_is_answered_and_charged_by_group(site, sources, column):
    """Of the site's own column, whatever the server calls it."""
    reply = site.answer(asked(f"privacy.unit_column={column}"), {})
    assert code(reply) == "ok"
    (event,) = site.events
    assert (event.unit, event.unit_column) == ("group", "patient")  # the site's own column
    assert (event.sample_rate, event.delta) == (0.8, 1e-3)  # of 10 and of 30 groups
    (source,) = sources
    assert (len(source.data), len(source.groups)) == (40, 10)
    told = reply.content.metric_records["metrics"]
    assert told["epsilon"] == composed(site.events, told["delta"])
    assert not any("p1" in str(value) or "patient" in str(value) for value in told.values())
    assert set(reply.content) == {"status", "lora", "metrics"}


EVALUATE = {"task": "", "stage": -1, "server_round": 0, "tasks": list(LABELS)}


@pytest.mark.parametrize(
    "config",
    [
        (),
        ("privacy.metrics=clear",),
        ("privacy.mechanism=none",),
        (GROUPS, "privacy.mechanism=none"),
    ],
)
def test_no_run_config_makes_single_records_the_unit(tmp_path, sources, config):
    site = RealSite(tmp_path, policy=POLICY, each=4)
    assert code(site.answer(asked(*config), {})) == "policy"
    experiment = asked(*config)
    assert code(site.answer(experiment, EVALUATE, kind="evaluate")) in ("policy", "withheld")
    assert (site.events, sources) == ([], [])


@pytest.mark.parametrize("policy", ['mechanism = "record"\n', 'metrics = "clear"\n'])
def test_a_site_that_names_no_column_is_asked_about_groups_in_vain(tmp_path, sources, policy):
    """The server's own word for the column, were it right, is not looked up."""
    site = RealSite(tmp_path, policy=policy, each=4)
    experiment = asked("privacy.unit_column=patient")
    assert code(site.answer(experiment, {})) == "policy"
    assert code(site.answer(experiment, EVALUATE, kind="evaluate")) == "policy"
    assert (site.events, sources) == ([], [])
    assert [line for line in site.log() if "policy.unit_column" in str(line)]


def test_no_instruction_names_a_unit(site):
    for field in ("unit_column", "unit", "groups"):
        assert code(site.answer(asked(GROUPS), {field: "label"})) == "refused"
    assert site.events == []


def test_a_ledger_of_records_is_not_gone_on_with_groups(tmp_path):
    before = RealSite(tmp_path, each=4)
    assert code(before.answer(asked("privacy.target_epsilon=0.4"), {})) == "ok"
    _runtime.cache_clear()
    after = RealSite(tmp_path, policy=POLICY, each=4)
    assert code(after.answer(asked(GROUPS), {}, run="run-2")) == "policy"
    assert [event.unit for event in after.events] == ["record"]
    assert any("cannot be added up" in str(line) for line in after.log())


def test_a_row_that_is_nobodys_changes_no_answer(site):
    """It is left out by itself, and counted here."""
    for split in ("train", "test"):
        path = site.folder / "data" / "surgery" / f"{split}.jsonl"
        odd = {"text": "whose?", "label": "Surgery", "patient": ""}
        path.write_text(path.read_text() + json.dumps(odd) + "\n")
    _runtime.cache_clear()
    assert code(site.answer(asked(GROUPS), {})) == "ok"
    left_out = [line["rows"] for line in site.log() if line["event"] == "rows_left_out"]
    assert left_out == [2]


class Quiet:
    """The noise of the mechanism without its normals."""

    def normal(self, shape):
        return torch.zeros(shape, dtype=torch.float64)

    def uniform(self, count):
        return torch.zeros(count, dtype=torch.float64)


@pytest.mark.parametrize("size", slow_but([1, 50], 50))
def test_a_patient_more_moves_what_a_site_would_send_by_at_most_the_bound(
    tmp_path, monkeypatch, size
):
    """Two sites, one with a patient more, of 1 or of 50 records: through files, messages, model and
    mechanism, up to the noise."""
    sums = []
    original = PrivateGradients.accumulate

    def accumulate(self, module, objective, batch):
        object.__setattr__(self, "noise", Quiet())
        loss = original(self, module, objective, batch)
        if self.data:
            grads = [p.grad.flatten().double() for p in module.parameters() if p.grad is not None]
            sums.append(torch.cat(grads) * self.expected_batch)
        return loss

    monkeypatch.setattr(PrivateGradients, "accumulate", accumulate)
    everybody = PrivateGradients.batches

    def batches(self):
        object.__setattr__(self, "noise", Quiet())
        return everybody(self)

    monkeypatch.setattr(PrivateGradients, "batches", batches)
    config = asked(
        GROUPS, "privacy.sample_rate=1.0", "train.precision=float32", "privacy.max_grad_norm=0.01"
    )
    for name, more in (("without", 0), ("with", size)):
        (tmp_path / name).mkdir()
        site = RealSite(tmp_path / name, policy=POLICY.replace("1.0", "9.0"), each=4)
        path = site.folder / "data" / "surgery" / "train.jsonl"
        extra = [
            {"text": f"ward note {n} of a rare disease", "label": "Surgery", "patient": "new"}
            for n in range(more)
        ]
        path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in extra))
        _runtime.cache_clear()
        assert code(site.answer(config, {}, start(config))) == "ok"
    (event,) = site.events
    assert event.steps == 1
    without, with_more = sums
    assert float(without.norm()) > 0.01
    assert 0.005 < float((with_more - without).norm()) <= 0.01


def test_a_policy_with_a_unit_column_demands_the_mechanism(tmp_path, sources):
    site = RealSite(tmp_path, policy='unit_column = "patient"\n', each=4)
    assert code(site.answer(asked(GROUPS, "privacy.mechanism=none"), {})) == "policy"
    assert site.events == []
    with pytest.raises(ValidationError, match="max_epsilon is a budget, and under mechanism"):
        Policy(mechanism="none", max_epsilon=3.0)
    with pytest.raises(ValidationError, match="should be 0, or at least 1e-09"):
        Policy(max_delta=1e-11)
    with pytest.raises(ValidationError, match="unit_column makes groups of records"):
        Policy(mechanism="none", unit_column="patient")
