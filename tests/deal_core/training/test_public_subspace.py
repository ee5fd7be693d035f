"""Public directions: the same at every site, and a head in them scores as its lifted one."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from deal_core.config.data import DataConfig
from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import public_texts
from deal_core.errors import UserError
from deal_core.models import load_model
from deal_core.randomness import seeded
from deal_core.training import public_subspace as subspaces
from deal_core.training.public_subspace import lifted, principal, public_subspace

TEXTS, SIZE, NUMBER = 300, 20, 7
LABELS = ("Heart", "Eye")
SENTENCES = ("A murmur in systole", "Blurred vision", "Pain in one knee", "A rash after rain")


def texts(seed=0):
    """Unit vectors with a common mean, more alike in some directions than in others."""
    generator = seeded("public texts", seed)
    spread = torch.linspace(2.0, 0.1, SIZE)
    turn = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
    return normalize((spread * torch.randn(TEXTS, SIZE, generator=generator)) @ turn + 0.5, dim=1)


def test_directions_are_those_of_most_variance_and_the_weak_are_longer():
    found = principal(texts(), NUMBER)
    x = texts().double().numpy()
    left = x - x.mean(0)
    _, lengths, rows = np.linalg.svd(left, full_matrices=False)
    columns = found.directions.numpy()
    variance = lengths[:NUMBER] ** 2
    scale = (variance / variance.mean() + 0.1) ** -0.25
    np.testing.assert_allclose(columns.T @ columns, np.diag(scale**2), atol=1e-10)
    along = np.abs((columns.T * rows[:NUMBER]).sum(1))
    np.testing.assert_allclose(along, scale, atol=1e-8)
    np.testing.assert_allclose(found.centre.numpy(), x.mean(0), atol=1e-12)
    length = np.linalg.norm(left @ columns, axis=1)
    assert found.radius == pytest.approx(np.quantile(length, 0.9))
    plain = principal(texts(), NUMBER, power=0.0).directions.numpy()
    np.testing.assert_allclose(plain, columns / scale, atol=1e-10)


@pytest.mark.parametrize("number", [TEXTS, NUMBER + 1, NUMBER - 2])
def test_sites_whose_machines_round_otherwise_add_up_the_same_coordinates(number):
    """Also where there are fewer public texts than directions, as of a task's few labels."""
    x = texts()[:number]
    other = x + 1e-8 * torch.randn(x.shape, generator=seeded("rounding"))
    records = texts(1)
    here, there = (principal(own, NUMBER).project(records) for own in (x, other))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-3)


def test_a_lifted_head_scores_embeddings_as_the_head_scores_their_coordinates():
    subspace, x = principal(texts(), NUMBER), texts(1)
    head = torch.randn(4, NUMBER + 1, generator=seeded("head"))
    whole = lifted(head, subspace.centre, subspace.scaled)
    assert whole.shape == (4, SIZE + 1)
    narrow = subspace.project(x) @ head[:, :-1].T + head[:, -1]
    wide = x @ whole[:, :-1].T + whole[:, -1]
    torch.testing.assert_close(wide, narrow, rtol=1e-4, atol=1e-4 * float(narrow.std()))


def test_without_directions_embeddings_are_what_they_are():
    subspace, x = principal(texts(), 0), texts(1)
    assert torch.equal(subspace.project(x), x)
    head = torch.randn(4, SIZE + 1, generator=seeded("head"))
    assert torch.equal(lifted(head, subspace.centre, subspace.scaled), head)


def test_another_process_reads_the_same_directions_to_the_bit(minilm, tmp_path, monkeypatch):
    def asked(folder, names=LABELS, layers=2):
        return public_subspace(minilm, SENTENCES, layers, 2, names, folder)

    made = asked(tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(subspaces, "text_vectors", None)  # nothing is made again
        again = asked(tmp_path / "cache")
    fresh = asked(None)
    for one in (again, fresh):
        assert torch.equal(one.directions, made.directions)
        assert torch.equal(one.centre, made.centre)
        assert one.radius == made.radius
    assert not torch.equal(asked(tmp_path / "cache", layers=1).centre, made.centre)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    file.write_bytes(b"broken")
    assert torch.equal(asked(tmp_path / "cache").directions, made.directions)


SPACES = (("Heart", "Eye"), (), ("Eye", "Skin"))


def test_public_texts_are_those_of_the_file_that_all_have(tmp_path):
    (tmp_path / "public.txt").write_text("one\ntwo\none\n")
    config = DataConfig(public_path=str(tmp_path / "public.txt"))
    assert public_texts(config, SPACES) == ("one", "two")
    with pytest.raises(UserError, match=r"data\.public_path"):
        public_texts(DataConfig(public_path=str(tmp_path / "none.txt")), SPACES)


def test_public_texts_are_embedded_ones_or_names_of_labels(monkeypatch):
    embedded = public_texts(DataConfig(), SPACES)
    assert len(set(embedded)) == len(embedded) > 1000
    assert embedded == public_texts(DataConfig(), ())

    def missing(name):
        raise UserError("not installed")

    monkeypatch.setattr("deal_core.data.asset_folder", missing)
    assert public_texts(DataConfig(), SPACES) == ("Heart", "Eye", "Skin")


def test_texts_that_are_cut_elsewhere_have_other_directions(tmp_path):
    centres = []
    for length in (16, 2):
        model = load_model(ModelConfig(), AdapterConfig(), length)
        found = public_subspace(model, SENTENCES, 2, 2, LABELS, tmp_path)
        again = public_subspace(model, SENTENCES, 2, 2, LABELS, None)
        assert torch.equal(found.centre, again.centre)
        centres.append(found.centre)
    assert not torch.equal(*centres)
