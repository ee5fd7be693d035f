"""A hub that does not answer, or that does, on this machine's loopback."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from transformers import AutoConfig

from deal_core.config.data import HubTask
from deal_core.data import hub
from deal_core.data.hub import load_split
from deal_core.data.rows import Columns
from deal_core.errors import UserError
from deal_core.models.loading import pinned, pretrained, with_revision


@pytest.fixture
def silent() -> Iterator[str]:
    """Takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def answering() -> Iterator[str]:
    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def use(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub._answers.cache_clear()  # an earlier test may have had the same port


def test_a_hub_that_keeps_silent_costs_seconds_once(
    silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, silent)
    monkeypatch.setattr(hub, "SECONDS", 0.5)
    before = hub._answers.cache_info().misses
    with pytest.raises(UserError) as model:
        pretrained(AutoConfig, "nobody/nothing")
    with pytest.raises(UserError) as data:
        load_split("ward", HubTask(path="nobody/nothing"), "train", Columns("text", "label"))
    assert hub._answers.cache_info().misses == before + 1
    assert str(model.value).startswith("model.name 'nobody/nothing': cannot load this name (")
    assert "data.hub.ward (nobody/nothing, split train): cannot be loaded (" in str(data.value)
    assert "\n" not in f"{model.value}{data.value}"


def test_any_answer_is_one(answering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, answering)
    hub.reach_hub()
    assert not constants.HF_HUB_OFFLINE


def keep_in_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of the hub in two revisions; the name means the first."""
    snapshot = folder / "models--somebody--something"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("1")
    for revision, kind in (("1", "bert"), ("2", "roberta")):
        (snapshot / "snapshots" / revision).mkdir(parents=True)
        text = json.dumps({"model_type": kind})
        (snapshot / "snapshots" / revision / "config.json").write_text(text)
    for name in (
        "huggingface_hub.constants.HF_HUB_CACHE",
        "huggingface_hub.file_download.HF_HUB_CACHE",
    ):
        monkeypatch.setattr(name, str(folder), raising=False)
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(folder), raising=False)


def test_a_revision_is_the_one_that_is_named(
    silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, silent)
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    keep_in_cache(tmp_path, monkeypatch)
    kinds = [
        pretrained(AutoConfig, f"somebody/something{named}", cache_dir=str(tmp_path)).model_type
        for named in ("", "@1", "@2")
    ]
    assert kinds == ["bert", "bert", "roberta"]
    with pytest.raises(UserError, match="'somebody/something@3': cannot load this name"):
        pretrained(AutoConfig, "somebody/something@3", cache_dir=str(tmp_path))


def test_the_commit_that_was_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what was learnt is answered with the model that it was learnt for, wherever the name
    may point by then."""
    keep_in_cache(tmp_path, monkeypatch)
    (folder,) = tmp_path.iterdir()
    commit = "0123456789abcdef0123456789abcdef01234567"
    (folder / "snapshots" / "1").rename(folder / "snapshots" / commit)
    (folder / "refs" / "main").write_text(commit)
    assert pinned("somebody/something") == f"somebody/something@{commit}"
    assert pinned("somebody/something@2") == "somebody/something@2"
    assert pinned("somebody/else") == "somebody/else"
    assert [pinned(name) for name in ("embedded:minilm", str(folder))] == [
        "embedded:minilm",
        str(folder),
    ]
    (tmp_path / "model@2").mkdir()
    at = str(tmp_path / "model@2")
    assert with_revision(at) == (at, "")  # a folder is its whole name
