"""A GGUF file unpacked: what is read from the folder is what is read from the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from deal_core.data.embedded import asset_folder
from deal_core.models import loading
from deal_core.models.fast.text_cache import cache_folder
from deal_core.models.fast.unpacked import unpacked
from deal_core.models.loading import pretrained

NAME = "embedded:smollm2"
TEXTS = ["A question, of 12 words?", "  <|im_start|>user\nÄrzte\n", ""]


@pytest.fixture
def from_the_file(monkeypatch):
    """As where nothing can be unpacked."""

    def read(loader, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "unpacked", lambda *_: None)
            loading._read_once.cache_clear()
            found = pretrained(loader, NAME, **options)
        loading._read_once.cache_clear()
        return found

    return read


@pytest.mark.slow
def test_words_and_configuration_are_those_of_the_file(from_the_file):
    folder, file = pretrained(AutoTokenizer, NAME), from_the_file(AutoTokenizer)
    assert folder(TEXTS)["input_ids"] == file(TEXTS)["input_ids"]
    for name in ("eos_token_id", "pad_token_id", "bos_token_id", "chat_template"):
        assert getattr(folder, name) == getattr(file, name)
    own, original = pretrained(AutoConfig, NAME), from_the_file(AutoConfig)
    differing = {"architectures", "_name_or_path", "dtype", "transformers_version"}
    kept = {k: v for k, v in original.to_dict().items() if k not in differing}
    assert {k: v for k, v in own.to_dict().items() if k in kept} == kept


@pytest.mark.slow
def test_where_nothing_can_be_written_the_file_itself_is_read(tmp_path, monkeypatch):
    (tmp_path / "full").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    assert unpacked(asset_folder("smollm2")) is None
    loading._read_once.cache_clear()
    assert pretrained(AutoConfig, NAME).vocab_size == 49152


@pytest.mark.slow
def test_what_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert unpacked(asset_folder("smollm2"), "no-such-type") is None
    left = [path.name for path in cache_folder("models").rglob("*") if path.is_file()]
    assert left == ["no-such-type.lock"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_those_of_the_file_and_mapped(dtype, from_the_file):
    folder = pretrained(AutoModelForCausalLM, NAME, dtype=dtype).state_dict()
    file = from_the_file(AutoModelForCausalLM, dtype=dtype).state_dict()
    assert folder.keys() == file.keys()
    assert all(torch.equal(folder[name], file[name]) for name in file)
    assert str(cache_folder("models").resolve()) in Path("/proc/self/maps").read_text()
