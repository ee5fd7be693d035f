"""``deal export --push``: what arrives at a hub, and what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import HfApi

from deal_core.errors import UserError
from simulations.use.export import ExportRequest, export
from tests.simulations.use.finished_runs import examples


class Hub(ThreadingHTTPServer):
    """A hub that keeps what is sent to it, as far as an upload needs one.

    Attributes:
        created: bodies of the requests for a new repository.
        files: name to content of what was committed to ``me/mine``.
        tokens: with which all of that was asked.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()

    def answer(self, path: str, body: bytes) -> dict[str, Any] | None:
        """None: no such address."""
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": "https://huggingface.co/me/mine", "id": "me/mine"}
        if path == "/api/models/me/mine/preupload/main":
            named = [file["path"] for file in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": path, **mode} for path in named]}
        if path == "/api/models/me/mine/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[line["value"]["path"]] = content
            return {"commitUrl": "https://huggingface.co/me/mine/commit/0", "commitOid": "0"}
        return {} if path == "/api/validate-yaml" else None


class HubRequest(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Hub)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/api/validate-yaml":
            self.server.tokens.add(self.headers["Authorization"])
        found = self.server.answer(self.path, body)
        content = json.dumps(found).encode()
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *said: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def local_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Signed in at a hub on this machine."""
    with Hub() as server:
        monkeypatch.setenv("HF_TOKEN", "hf_mine")
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_push_makes_a_private_repository_and_sends_the_folder(encoder, tmp_path, local_hub):
    said = export(ExportRequest(str(encoder), str(tmp_path / "mine"), push="me/mine"))
    assert said[-1] == (
        "uploaded to me/mine; a new repository is private, one that was there keeps its visibility"
    )
    (created,) = local_hub.created
    assert (created["organization"], created["name"]) == ("me", "mine")
    assert created["visibility"] == "private"
    written = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    assert local_hub.files == written
    assert written.keys() == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "inference.json",
        "label_embeddings.safetensors",
    }
    assert local_hub.tokens == {"Bearer hf_mine"}


def test_a_pushed_map_is_used_with_the_base_model_of_the_hub(pooled, tmp_path, local_hub):
    export(ExportRequest(str(pooled / "run"), str(tmp_path / "mine"), push="me/mine"))
    assert {"pooled_map.safetensors", "label_embeddings.safetensors"} < local_hub.files.keys()
    assert not {"adapter_config.json", "base"} & local_hub.files.keys()
    (code,) = examples(local_hub.files["README.md"].decode())
    assert 'AutoModel.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")' in code
    assert 'load_file("pooled_map.safetensors")' in code


def test_nobody_is_signed_in(encoder, tmp_path, hub):
    hub("")
    with pytest.raises(UserError, match="no Hugging Face token; run `hf auth login`"):
        export(ExportRequest(str(encoder), str(tmp_path / "mine"), push="me/mine"))
    assert not (tmp_path / "mine").exists()


def test_no_network(encoder, tmp_path, hub, monkeypatch):
    hub("hf_none")

    def nowhere(*arguments, **options):
        return HfApi(endpoint="http://127.0.0.1:9", token="hf_none")

    monkeypatch.setattr("huggingface_hub.HfApi", nowhere)
    with pytest.raises(UserError, match="--push me/mine: not uploaded") as error:
        export(ExportRequest(str(encoder), str(tmp_path / "mine"), push="me/mine"))
    assert "\n" not in str(error.value)
    config = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert not (tmp_path / "mine" / "base").exists()


def test_an_adapter_that_nobody_else_could_load_is_not_uploaded(encoder, tmp_path, hub):
    hub("hf_none")
    base = ExportRequest(str(encoder), str(tmp_path / "mine"), push="me/mine", base=str(tmp_path))
    with pytest.raises(UserError, match="is not on the hub as it was used"):
        export(base)
