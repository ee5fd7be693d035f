"""``deal export --push``: what is uploaded to a hub, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi

from deal_core.errors import UserError
from simulations.use.export import ExportRequest, export
from tests.simulations.use.finished_runs import examples


class LocalHub:
    """In the place of a hub's interface: keeps what is asked of it."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, name: str, **options: Any) -> SimpleNamespace:
        self.created.append({"name": name, **options})
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, repo_id: str, folder_path: Path) -> None:
        assert repo_id == "me/mine"
        self.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}


@pytest.fixture
def local_hub(monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """Signed in at a hub on this machine."""
    local = LocalHub()
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: local)
    return local


def test_a_push_makes_a_private_repository_and_sends_the_folder(encoder, tmp_path, local_hub):
    said = export(ExportRequest(str(encoder), str(tmp_path / "mine"), push="me/mine"))
    assert said[-1] == (
        "uploaded to me/mine; a new repository is private, one that was there keeps its visibility"
    )
    assert local_hub.created == [{"name": "me/mine", "private": True, "exist_ok": True}]
    assert local_hub.files.keys() == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "inference.json",
        "label_embeddings.safetensors",
    }
    config = json.loads(local_hub.files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"


def test_a_pushed_map_is_used_with_the_base_model_of_the_hub(pooled, tmp_path, local_hub):
    export(ExportRequest(str(pooled / "run"), str(tmp_path / "mine"), push="me/mine"))
    assert {"pooled_map.safetensors", "label_embeddings.safetensors"} < local_hub.files.keys()
    assert not {"adapter_config.json", "base"} & local_hub.files.keys()
    (code,) = examples(local_hub.files["README.md"].decode())
    assert 'AutoModel.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")' in code


def test_without_a_token_network_or_public_base_nothing_is_sent(
    encoder, tmp_path, hub, monkeypatch
):
    asked = ExportRequest(str(encoder), str(tmp_path / "mine"), push="me/mine")
    hub("")
    with pytest.raises(UserError, match="no Hugging Face token; run `hf auth login`"):
        export(asked)
    assert not (tmp_path / "mine").exists()
    hub("hf_none")
    own = ExportRequest(str(encoder), asked.to, push="me/mine", base=str(tmp_path))
    with pytest.raises(UserError, match="is not on the hub as it was used"):
        export(own)
    nowhere = HfApi(endpoint="http://127.0.0.1:9", token="hf_none")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: nowhere)
    with pytest.raises(UserError, match="--push me/mine: not uploaded") as error:
        export(asked)
    assert "\n" not in str(error.value)
    assert (tmp_path / "mine" / "adapter_config.json").exists()
