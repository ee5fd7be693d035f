"""What ``deal check`` says of prompts before a model is loaded."""

from __future__ import annotations

import json

import pytest
from transformers import Gemma3Config

from deal_core.config.experiment import ModelConfig
from deal_core.data import open_source
from deal_core.errors import UserError
from deal_core.models import max_positions
from simulations.run.data_checks import check_lengths, check_text_lengths
from tests.architectures import save


def found(experiment) -> list[tuple[str, str]]:
    return [(each.kind, each.text) for each in check_text_lengths(experiment)]


def words_of(experiment, **changes):
    return experiment.model_copy(update={"model": experiment.model.model_copy(update=changes)})


def test_a_model_without_a_chat_template_is_found_before_the_start(
    make_causal, make_experiment, tmp_path
) -> None:
    llama = make_causal(tmp_path, "llama")
    words = make_experiment("model.family=causal-lm", f'model.name="{llama}"')
    assert [kind for kind, _ in found(words) if kind == "error"] == []
    with pytest.raises(UserError, match=r"set model\.chat to false"):
        list(check_text_lengths(words_of(words, chat=True)))


def with_positions(folder, positions: int):
    """The saved model's description with so many positions."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    key = next(k for k in ("n_positions", "max_position_embeddings") if k in config)
    path.write_text(json.dumps({**config, key: positions}))
    return folder


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
    make_experiment, tmp_path, instruction, max_length, expected
) -> None:
    """A model with learnt positions would stop in the middle of a run, or of its evaluation."""
    gpt2 = with_positions(save(tmp_path, "gpt2"), 300)
    experiment = make_experiment(
        "model.family=causal-lm",
        f'model.name="{gpt2}"',
        "model.max_new_tokens=2",
        f"train.max_length={max_length}",
        "data.max_train=20",
    )
    asked = dict.fromkeys(open_source(experiment.data).task_names(), instruction)
    data = experiment.data.model_copy(update={"instructions": asked})
    words = experiment.model_copy(update={"data": data})
    about_prompts = [each for each in found(words) if "prompt" in each[1]]
    assert {kind for kind, _ in about_prompts} == {kind for kind, _ in expected}
    for kind, line in expected:
        assert all(line in message for said, message in about_prompts if said == kind)


def test_an_answer_of_a_decoder_takes_no_room_of_the_text(make_experiment, tmp_path) -> None:
    bart = with_positions(save(tmp_path, "bart"), 64)
    experiment = make_experiment(
        "model.family=seq2seq-lm",
        f'model.name="{bart}"',
        "model.max_new_tokens=40",
        "train.max_length=40",
    )
    check_lengths(experiment)
    with pytest.raises(UserError, match="the model reads 64 tokens"):
        check_lengths(words_of(experiment, max_new_tokens=65))


def test_positions_of_a_model_of_texts_and_pictures_are_those_of_its_texts(tmp_path) -> None:
    Gemma3Config(text_config={"max_position_embeddings": 77}).save_pretrained(tmp_path)
    assert max_positions(ModelConfig(family="causal-lm", name=str(tmp_path))) == 77
