"""What ``deal check`` says of prompts before a model is loaded."""

from __future__ import annotations

import pytest

from deal_core.errors import UserError
from simulations.run.text_lengths import check_text_lengths


def test_a_model_without_a_chat_template_is_found_before_the_start(
    make_causal, make_experiment, tmp_path
) -> None:
    llama = make_causal(tmp_path, "llama")
    words = make_experiment("model.family=causal-lm", f'model.name="{llama}"')
    assert [found for found in check_text_lengths(words) if found.kind == "error"] == []
    chat = words.model_copy(update={"model": words.model.model_copy(update={"chat": True})})
    with pytest.raises(UserError, match=r"set model\.chat to false"):
        list(check_text_lengths(chat))
