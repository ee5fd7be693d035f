from dataclasses import replace

import torch

from client.runtime import ClientRuntime
from deal_core.deal.distillation import make_teacher
from deal_core.models.encoder import EncoderLabels
from deal_core.training.evaluation import base_embeddings
from deal_core.training.public_subspace import principal, text_vectors


def prototype(make_experiment, *overrides):
    """A runtime whose clients add up whole vectors."""
    asked = ("method.name=prototype", "method.prototype.directions=0", *overrides)
    return ClientRuntime(make_experiment("data.max_train=8", "data.max_test=6", *asked))


def test_vectors_are_those_of_the_part_and_layers_asked_for_and_made_once(
    make_experiment, monkeypatch
):
    runtime = prototype(make_experiment)
    share, four = runtime.task("laboratory", 0), runtime.statistics
    found = runtime.vectors(share, "train", four), runtime.vectors(share, "test", four)
    for vectors, data in zip(found, (share.train, share.test), strict=True):
        assert torch.equal(vectors, base_embeddings(runtime.model, data, 4))
    monkeypatch.setattr("client.runtime.base_embeddings", lambda *args: torch.zeros(0, 768))
    assert runtime.vectors(share, "train", four) is found[0]
    assert runtime.vectors(share, "test", four) is found[1]
    assert not runtime.vectors(share, "train", replace(four, layers=1)).numel()  # made anew


def test_vectors_are_coordinates_in_directions_of_public_texts(make_experiment, tmp_path):
    path = tmp_path / "public.txt"
    path.write_text("".join(f"Sentence {n} of {n % 5} words\n" for n in range(30)))
    asked = ("method.prototype.directions=7", f'data.public_path="{path}"')
    runtime = prototype(make_experiment, *asked)
    share = runtime.task("laboratory", 0)
    vectors = runtime.vectors(share, "train", runtime.statistics)
    labels = runtime.labels(runtime.tasks[0])
    public = text_vectors(runtime.model, path.read_text().splitlines(), 4, labels)
    expected = principal(public, 7).project(base_embeddings(runtime.model, share.train, 4))
    assert torch.equal(vectors, expected)
    assert vectors.shape == (len(share.train), 7)


def test_where_records_are_protected_each_text_is_embedded_and_taught_alone(
    make_experiment, monkeypatch
):
    """Company changes how numbers are rounded, so what is made of one record would depend on all
    the others, and on those that a step has not drawn."""
    passes = []
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
        runtime = prototype(make_experiment)
        protecting = ClientRuntime(make_experiment(f"privacy.mechanism={mechanism}")).mechanism
        runtime.__dict__["mechanism"] = protecting
        assert runtime.subspace  # of public texts, which may be embedded together
        shares = [runtime.task("laboratory", client) for client in range(2)]
        share = max(shares, key=lambda each: len(each.train))
        protected = runtime.mechanism.unit is not None
        assert protected == alone
        passes.clear()
        runtime.vectors(share, "train", runtime.statistics)
        make_teacher(runtime.model, share.train, share.labels, [("Skin", "Eye")], alone)
        assert (set(passes) == {1}) == alone
        assert sum(passes) >= 2 * len(share.train)
