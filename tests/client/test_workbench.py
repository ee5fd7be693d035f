from __future__ import annotations

import torch

from client.resources import Workbench
from deal_core.config.experiment import Experiment
from deal_core.models.encoder import EncoderLabels
from deal_core.training.embedding import base_embeddings
from deal_core.training.teacher import make_teacher


def test_what_a_client_worked_out_for_a_task_ends_with_the_task():
    bench = Workbench(Experiment())
    one, two = "laboratory", "surgery"
    first = bench.learning(0, one)
    assert bench.learning(0, one) is first
    assert bench.learning(1, one) is not first
    assert bench.learning(0, two) is not first
    assert bench.learning(0, one) is not first  # it was dropped


def test_embeddings_are_those_of_the_part_and_layers_asked_for_and_made_once(
    make_experiment, monkeypatch
):
    bench = Workbench(make_experiment("data.max_train=8", "data.max_test=6"))
    share = bench.task("laboratory", 0)
    found = bench.embeddings(share, "train", 4), bench.embeddings(share, "test", 4)
    for vectors, data in zip(found, (share.train, share.test), strict=True):
        assert torch.equal(vectors, base_embeddings(bench.model, data, 4))
    monkeypatch.setattr("client.resources.base_embeddings", lambda *args: torch.zeros(0))
    assert bench.embeddings(share, "train", 4) is found[0]
    assert bench.embeddings(share, "test", 4) is found[1]
    assert not bench.embeddings(share, "train", 1).numel()  # other layers are made anew


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
        bench = Workbench(
            make_experiment("data.max_train=8", "data.max_test=6", f"privacy.mechanism={mechanism}")
        )
        shares = [bench.task("laboratory", client) for client in range(2)]
        share = max(shares, key=lambda each: len(each.train))
        protected = bench.mechanism.unit is not None
        assert protected == alone
        passes.clear()
        bench.embeddings(share, "train", 1)
        make_teacher(bench.model, share.train, share.labels, [("Skin", "Eye")], alone)
        assert (set(passes) == {1}) == alone
        assert sum(passes) >= 2 * len(share.train)
