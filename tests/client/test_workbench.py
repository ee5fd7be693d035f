from __future__ import annotations

from dataclasses import replace

import torch

from client.resources import Workbench
from deal_core.config.experiment import Experiment
from deal_core.deal.distillation import make_teacher
from deal_core.models.encoder import EncoderLabels
from deal_core.training.evaluation import base_embeddings
from deal_core.training.public_subspace import principal, text_vectors


def test_what_a_client_worked_out_for_a_task_ends_with_the_task():
    bench = Workbench(Experiment())
    one, two = "laboratory", "surgery"
    first = bench.learning(0, one)
    assert bench.learning(0, one) is first
    assert bench.learning(1, one) is not first
    assert bench.learning(0, two) is not first
    assert bench.learning(0, one) is not first  # it was dropped


def prototype(make_experiment, *overrides: str):
    """A bench whose clients add up whole vectors."""
    asked = ("method.name=prototype", "method.prototype.directions=0", *overrides)
    return Workbench(make_experiment("data.max_train=8", "data.max_test=6", *asked))


def test_vectors_are_those_of_the_part_and_layers_asked_for_and_made_once(
    make_experiment, monkeypatch
):
    bench = prototype(make_experiment)
    share, four = bench.task("laboratory", 0), bench.statistics
    found = bench.vectors(share, "train", four), bench.vectors(share, "test", four)
    for vectors, data in zip(found, (share.train, share.test), strict=True):
        assert torch.equal(vectors, base_embeddings(bench.model, data, 4))
    monkeypatch.setattr("client.resources.base_embeddings", lambda *args: torch.zeros(0, 768))
    assert bench.vectors(share, "train", four) is found[0]
    assert bench.vectors(share, "test", four) is found[1]
    assert not bench.vectors(share, "train", replace(four, layers=1)).numel()  # made anew


def test_vectors_are_coordinates_in_directions_of_public_texts(make_experiment, tmp_path):
    path = tmp_path / "public.txt"
    path.write_text("".join(f"Sentence {n} of {n % 5} words\n" for n in range(30)))
    asked = ("method.prototype.directions=7", f'data.public_path="{path}"')
    bench = prototype(make_experiment, *asked)
    share = bench.task("laboratory", 0)
    vectors = bench.vectors(share, "train", bench.statistics)
    labels = bench.labels(bench.tasks[0])
    public = text_vectors(bench.model, path.read_text().splitlines(), 4, labels)
    expected = principal(public, 7).project(base_embeddings(bench.model, share.train, 4))
    assert torch.equal(vectors, expected)
    assert vectors.shape == (len(share.train), 7)


def test_where_records_are_protected_each_text_is_embedded_and_taught_alone(
    make_experiment, monkeypatch
):
    """Company changes how numbers are rounded, so what is made of one record would depend on all
    the others, and on those that a step has not drawn."""
    passes: list[int] = []
    embed, train = EncoderLabels.embed, EncoderLabels.forward_train

    def embedded(self, batch, layers=1):
        passes.append(len(batch))
        return embed(self, batch, layers)

    def taught(self, batch, *rest):
        passes.append(len(batch))
        return train(self, batch, *rest)

    monkeypatch.setattr(EncoderLabels, "embed", embedded)
    monkeypatch.setattr(EncoderLabels, "forward_train", taught)
    for mechanism, alone in (("none", False), ("record", True)):
        bench = prototype(make_experiment)
        protecting = Workbench(make_experiment(f"privacy.mechanism={mechanism}")).mechanism
        bench.__dict__["mechanism"] = protecting
        assert bench.subspace  # of public texts, which may be embedded together
        shares = [bench.task("laboratory", client) for client in range(2)]
        share = max(shares, key=lambda each: len(each.train))
        protected = bench.mechanism.unit is not None
        assert protected == alone
        passes.clear()
        bench.vectors(share, "train", bench.statistics)
        make_teacher(bench.model, share.train, share.labels, [("Skin", "Eye")], alone)
        assert (set(passes) == {1}) == alone
        assert sum(passes) >= 2 * len(share.train)
