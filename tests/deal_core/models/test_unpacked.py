"""A GGUF file unpacked: what is read from the folder is what is read from the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from deal_core.data.embedded import asset_folder, cache_folder, unpacked
from deal_core.errors import UserError
from deal_core.models.loading import pretrained

NAME = "embedded:smollm2"


def from_the_file(loader, **options):
    gguf = asset_folder("smollm2")
    return loader.from_pretrained(str(gguf.parent), gguf_file=gguf.name, **options)


@pytest.mark.slow
def test_words_configuration_and_weights_are_those_of_the_file_and_mapped():
    folder, file = pretrained(AutoTokenizer, NAME), from_the_file(AutoTokenizer)
    for text in ("A question, of 12 words?", "  <|im_start|>user\nÄrzte\n", ""):
        assert folder(text)["input_ids"] == file(text)["input_ids"]
    for name in ("eos_token_id", "pad_token_id", "bos_token_id", "chat_template"):
        assert getattr(folder, name) == getattr(file, name)
    own, original = pretrained(AutoConfig, NAME).to_dict(), from_the_file(AutoConfig).to_dict()
    differing = {"architectures", "_name_or_path", "dtype", "transformers_version"}
    assert all(own[key] == value for key, value in original.items() if key not in differing)
    weights = pretrained(AutoModelForCausalLM, NAME, dtype=torch.bfloat16).state_dict()
    plain = GgufConfig(dequantize=True)
    read = from_the_file(AutoModelForCausalLM, dtype=torch.bfloat16, quantization_config=plain)
    assert weights.keys() == read.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in read.state_dict().items())
    assert str(cache_folder("models").resolve()) in Path("/proc/self/maps").read_text()


def test_where_nothing_can_be_written_that_is_said(tmp_path, monkeypatch):
    (tmp_path / "full").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    with pytest.raises(UserError, match=r"cannot be unpacked there .* XDG_CACHE_HOME"):
        unpacked(asset_folder("smollm2"))


@pytest.mark.slow
def test_what_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpacked(asset_folder("smollm2"), "no-such-type")
    left = [path.name for path in cache_folder("models").rglob("*") if path.is_file()]
    assert left == ["no-such-type.lock"]
