from __future__ import annotations

import stat

import pytest
from transformers import AutoTokenizer

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.data import Example
from deal_core.data.embedded import asset_folder
from deal_core.models import load_model
from deal_core.models.fast.text_cache import FEWEST, TokenCache, cache_folder, tokeniser_name

TEXTS = [f"question {number} of the exam" for number in range(FEWEST)]


class Lengths:
    """A tokeniser that counts how often it is asked for a text."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        self.asked += len(texts)
        return [[len(text), ord(text[-1])] for text in texts]


def test_a_text_is_tokenised_once_and_by_no_later_process(tmp_path):
    first, second = Lengths(), Lengths()
    cache = TokenCache(first, "tokeniser")
    cache.prepare(TEXTS, tmp_path)
    assert cache(TEXTS[:3]) == Lengths()(TEXTS[:3])
    assert first.asked == FEWEST
    later = TokenCache(second, "tokeniser")
    later.prepare(TEXTS, tmp_path)
    assert later(TEXTS) == cache(TEXTS)
    assert second.asked == 0
    assert later(["another"]) == [[7, ord("r")]]


@pytest.mark.parametrize(
    ("name", "texts"), [("other", TEXTS), ("tokeniser", [*TEXTS[:-1], "changed"])]
)
def test_another_tokeniser_or_text_finds_nothing(tmp_path, name, texts):
    TokenCache(Lengths(), "tokeniser").prepare(TEXTS, tmp_path)
    tokenise = Lengths()
    TokenCache(tokenise, name).prepare(texts, tmp_path)
    assert tokenise.asked == FEWEST


@pytest.mark.parametrize("content", [b"", b"ARROW1 and then nothing", None])
def test_a_damaged_or_unwritable_cache_is_no_error(tmp_path, content):
    folder = tmp_path / "tokens"
    if content is None:
        folder.touch()  # no folder can be made here
    else:
        TokenCache(Lengths(), "tokeniser").prepare(TEXTS, folder)
        next(folder.iterdir()).write_bytes(content)
    tokenise = Lengths()
    cache = TokenCache(tokenise, "tokeniser")
    cache.prepare(TEXTS, folder)
    assert cache(TEXTS) == Lengths()(TEXTS)
    assert tokenise.asked == FEWEST


def test_only_the_user_can_read_it_and_few_or_unnamed_leave_no_file(tmp_path):
    folder = tmp_path / "tokens"
    TokenCache(Lengths(), "").prepare(TEXTS, folder)
    TokenCache(Lengths(), "tokeniser").prepare(TEXTS[1:], folder)
    TokenCache(Lengths(), "tokeniser").prepare(TEXTS, None)
    assert not folder.exists()
    TokenCache(Lengths(), "tokeniser").prepare(TEXTS, folder)
    (file,) = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_name_holds_all_that_decides():
    tokenizer = AutoTokenizer.from_pretrained(str(asset_folder("minilm")))
    assert tokeniser_name(tokenizer, 32) == tokeniser_name(tokenizer, 32)
    assert tokeniser_name(tokenizer, 32) != tokeniser_name(tokenizer, 64)
    assert tokeniser_name(object(), 32) == ""


def test_a_model_encodes_the_same_from_the_cache():
    examples = [Example(text, "a") for text in TEXTS]
    models = [load_model(ModelConfig(), AdapterConfig(), 6) for _ in range(2)]
    expected = models[0].encode(examples, ["a"])
    for model in models:
        model.tokens.prepare(TEXTS, cache_folder())
        assert model.encode(examples, ["a"]) == expected
    assert max(len(item.tokens) for item in expected) == 6
