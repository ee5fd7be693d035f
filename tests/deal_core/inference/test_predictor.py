"""The answer among scores: the columns of the evaluation, with a second and shares."""

import json

import pytest
import torch

from deal_core.errors import UserError
from deal_core.inference.folder import AdapterFolder, find_adapter, read_inference
from deal_core.inference.predictor import answer_among, best_temperature, confidences_and_hits, gap
from deal_core.training.evaluation import answer_space

LEARNT = {"heart": ("old", "new"), "skin": ("rash", "old")}


def among(scores, task=""):
    space = answer_space("skin", LEARNT["skin"], LEARNT)
    chosen = space.own if task else range(len(space.columns))
    return answer_among(torch.tensor(scores).double(), space, list(chosen))


def test_the_best_and_the_second_with_their_shares():
    answer = among([0.0, 2.0, 1.0, -9.0])
    assert (answer.task, answer.label, answer.runner_up) == ("heart", "new", "rash")
    shares = torch.softmax(torch.tensor([0.0, 2.0, 1.0]).double(), dim=0)
    assert answer.probability == pytest.approx(float(shares[1]))
    assert answer.runner_up_probability == pytest.approx(float(shares[2]))


def test_one_word_in_two_tasks_is_one_class_with_the_larger_score():
    answer = among([0.5, 0.4, 0.0, 0.6])
    assert (answer.task, answer.label, answer.runner_up) == ("skin", "old", "new")
    shares = torch.softmax(torch.tensor([0.6, 0.4, 0.0]).double(), dim=0)
    assert answer.probability == pytest.approx(float(shares[0]))


def test_a_task_that_is_told_leaves_the_others_out():
    answer = among([9.0, 9.0, 0.0, 0.2], task="skin")
    assert (answer.task, answer.label, answer.runner_up) == ("skin", "old", "rash")


def test_a_file_of_another_version_or_none(tmp_path):
    folder = AdapterFolder(tmp_path)
    folder.inference.write_text(json.dumps({"schema_version": 9}))
    with pytest.raises(UserError, match="of schema version 9, not 1"):
        read_inference(find_adapter(tmp_path))
    folder.inference.write_text("{")
    with pytest.raises(UserError, match=r"inference.json: not valid"):
        read_inference(find_adapter(tmp_path))


def test_a_temperature_undoes_scores_that_are_too_large_by_a_factor():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    targets = logits.softmax(1).multinomial(1, generator=generator)[:, 0].tolist()
    loud = (7 * logits).log_softmax(1).tolist()
    found = best_temperature(loud, targets)
    assert found == pytest.approx(7, rel=0.1)
    assert gap(*confidences_and_hits(loud, targets)) > 0.15
    assert gap(*confidences_and_hits(loud, targets, found)) < 0.03


def test_the_error_is_the_mean_distance_of_confidence_from_the_share_of_right_answers():
    confidences = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.5], dtype=torch.float64)
    hits = torch.tensor([True, True, False, False, True])
    assert gap(confidences, hits) == pytest.approx((4 * 0.4 + 0.5) / 5)
