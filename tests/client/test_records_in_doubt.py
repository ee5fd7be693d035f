"""One record that is odd, long, loud or unusable: nothing that leaves tells of it."""

import pytest
import torch

from deal_core.privacy import record as record_mechanism
from deal_core.privacy.dpsgd import PrivateGradients
from tests.client.real_site import LABELS, RealSite, code, rows, start
from tests.client.real_site import small as asked
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")


@pytest.fixture
def site(tmp_path):
    return RealSite(tmp_path)


SECRET = "appendectomy"


def neighbours(tmp_path, text):
    """A site, and the same site with one more record."""
    (tmp_path / "without").mkdir()
    (tmp_path / "with").mkdir()
    more = {**{t: rows(t) for t in LABELS}, "surgery": [*rows("surgery"), (text, "Surgery")]}
    return RealSite(tmp_path / "without"), RealSite(tmp_path / "with", data=more)


@pytest.mark.parametrize(
    ("loud", "end"),
    [
        pytest.param(1e2, "ok", marks=pytest.mark.slow),
        (1e4, "refused"),
        (1e19, "refused"),
        (3e38, "refused"),
    ],
)
def test_an_adapter_beyond_the_bound_is_refused_before_a_record_is_read(
    tmp_path, monkeypatch, loud, end
):
    steps, accumulate = [], PrivateGradients.accumulate

    def watched(self, *given):
        steps.append(len(self.data))
        return accumulate(self, *given)

    monkeypatch.setattr(PrivateGradients, "accumulate", watched)
    for site in neighbours(tmp_path, f"{SECRET} case"):
        assert code(site.answer(asked(), {}, start(asked(), loud))) == end
        assert len(site.events) == (end == "ok")
    assert bool(steps) == (end == "ok")


@pytest.mark.parametrize("fault", slow_but(["nan", "raise"], "nan"))
def test_no_code_tells_of_a_word_that_a_crafted_model_stumbles_over(tmp_path, monkeypatch, fault):
    """The strongest form: the model itself gives NaN, or fails, where a chosen word occurs."""
    from deal_core.models.encoder import EncoderLabels

    original = EncoderLabels._embed

    def stumbling(self, token_ids, layers=1):
        found = [SECRET_TOKEN in ids for ids in token_ids]
        if any(found) and fault == "raise":
            raise RuntimeError("an overflow")
        vectors = original(self, token_ids, layers)
        # what a batch-mate does to the arithmetic may reach the whole pass
        return vectors * torch.nan if any(found) else vectors

    from deal_core.config.experiment import Experiment
    from deal_core.models import load_model

    config = Experiment()
    model = load_model(config.model, config.adapter, 16)
    SECRET_TOKEN = model.tokens([SECRET])[0][1]
    monkeypatch.setattr(EncoderLabels, "_embed", stumbling)
    _, site = neighbours(tmp_path, f"{SECRET} case")
    assert code(site.answer(asked(), {"task": "surgery"})) == "ok"  # as without the word
    assert len(site.events) == 1


def test_what_others_add_does_not_depend_on_a_record_that_gives_no_number(random_adapter):
    """A pass with a NaN in it would take its batch-mates along: a record would count many times."""
    from deal_core.config.experiment import Experiment
    from deal_core.deal.objective import Plain
    from deal_core.lora.attach import read, set_trainable, write
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
    from client.app import _runtime

    data = {**{t: rows(t) for t in LABELS}, "surgery": [*rows("surgery"), row]}
    site = RealSite(tmp_path, data=data)
    _runtime.cache_clear()
    assert code(site.answer(asked(), {})) == "ok"  # as without the row
    left_out = [line["rows"] for line in site.log() if line["event"] == "rows_left_out"]
    assert left_out == [2]  # train and test


@pytest.mark.parametrize(
    "limit",
    slow_but(
        ["data.max_train=1", "data.max_train=20", "data.max_test=1"],
        "data.max_train=1",
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
    assert site.events[0].delta == 1e-4  # of 120 records, whatever was asked
