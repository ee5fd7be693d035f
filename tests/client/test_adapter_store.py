"""The adapter that a run leaves at a site: sent, checked, kept, fetched."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from client.app import make_app
from client.resident_worker import INSIDE
from client.site_file import NODE_KEY
from deal_core.errors import UserError
from deal_core.wire.records import DIGEST, RECORD, digest_of
from server import export as handover
from server.clients import Roster
from server.folder import EventLog
from simulations.deployment.site.fetch import fetch_adapter
from simulations.engines.flower_identity import assume_identity
from tests.client.real_site import RealSite, asked, code
from tests.run_configs import placed

FILES = {"inference.json": b"{}", "adapter_model.safetensors": b"\x00\x01"}


@pytest.fixture
def site(tmp_path) -> RealSite:
    """Has worked in one run."""
    site = RealSite(tmp_path / "site")
    (site.folder / "state" / "runs" / "run-1").mkdir(parents=True)
    return site


def test_of_a_run_in_which_the_site_has_not_worked_nothing_is_kept(site):
    assert send(site, content(FILES), run="run-2") == "refused"
    assert [path.name for path in (site.folder / "state" / "runs").iterdir()] == ["run-1"]


def content(files: dict[str, bytes], digest: str = "") -> RecordDict:
    arrays = {name: Array(np.frombuffer(data, np.uint8)) for name, data in files.items()}
    record = ConfigRecord({"sha256": digest or digest_of(files)})
    return RecordDict({RECORD: ArrayRecord(arrays), DIGEST: record})


def send(site: RealSite, records: RecordDict, run: str = "run-1", kind: str = handover.KIND) -> str:
    config = placed(asked(), f"/srv/runs/{run}")
    node = {NODE_KEY: str(site.folder / "site.toml"), INSIDE: True}
    with assume_identity(7, 1):
        message = Message(records, 1, kind, ttl=60.0)
        return code(make_app()(message, Context(7, 1, node, RecordDict(), config)))


def test_what_was_sent_can_be_fetched(site, tmp_path):
    assert send(site, content(FILES)) == "ok"
    lines = fetch_adapter(site.folder, "", tmp_path / "mine")
    assert {p.name: p.read_bytes() for p in (tmp_path / "mine").iterdir()} == FILES
    assert digest_of(FILES) in " ".join(lines)
    with pytest.raises(UserError, match="is there already"):
        fetch_adapter(site.folder, "run-1", tmp_path / "mine")
    assert send(site, content({"README.md": b"later"})) == "ok"  # of the run, resumed
    fetch_adapter(site.folder, "run-1", tmp_path / "later")
    assert [p.name for p in (tmp_path / "later").iterdir()] == ["README.md"]
    assert [line["event"] for line in site.log()] == ["arrived", "answered"] * 2


@pytest.mark.parametrize(
    "records",
    [
        content({"../../site.toml": b"x"}),
        content({"site.toml": b"x"}),
        content({**FILES, "model.py": b"x"}),
        content(FILES, digest="0" * 64),
        content({"README.md": b""}),
        RecordDict(
            {RECORD: ArrayRecord({"README.md": Array(np.zeros(3))}), DIGEST: ConfigRecord()}
        ),
        RecordDict({DIGEST: ConfigRecord({"sha256": "0"})}),
        RecordDict({**content(FILES), "more": ConfigRecord()}),
    ],
)
def test_anything_else_is_refused_and_nothing_is_written(site, records, tmp_path):
    assert send(site, content(FILES)) == "ok"
    before = {p: p.read_bytes() for p in site.folder.rglob("*") if p.is_file()}
    assert send(site, records) == "refused"
    after = {p: p.read_bytes() for p in site.folder.rglob("*") if p.is_file()}
    assert {p for p in after if after[p] != before.get(p)} == {site.folder / "state/log.jsonl"}
    fetch_adapter(site.folder, "", tmp_path / "mine")


def test_a_simulated_client_keeps_none(tmp_path):
    config = placed(asked(), str(tmp_path))
    with assume_identity(7, 1):
        message = Message(content(FILES), 1, handover.KIND)
        context = Context(7, 1, {"partition-id": 0}, RecordDict(), config)
        assert code(make_app()(message, context)) == "refused"
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_not_there_or_was_changed(site, tmp_path):
    with pytest.raises(UserError, match="no finished run has left an adapter here"):
        fetch_adapter(site.folder, "", tmp_path / "mine")
    send(site, content(FILES))
    with pytest.raises(UserError, match="run 'run-2': has left no adapter here"):
        fetch_adapter(site.folder, "run-2", tmp_path / "mine")
    (site.folder / "state/runs/run-1/adapter/inference.json").write_text("[]")
    with pytest.raises(UserError, match="was changed since it came"):
        fetch_adapter(site.folder, "", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


class Line(SimpleNamespace):
    """A grid to one real site."""

    def push_messages(self, messages: list[Message]) -> list[str]:
        self.sent = messages
        return [str(number) for number in range(len(messages))]

    def pull_messages(self, ids: list[str]) -> list[Any]:
        ended = send(self.site, self.sent[0].content)
        reply = SimpleNamespace(
            metadata=SimpleNamespace(reply_to_message_id="0"),
            has_error=lambda: False,
            has_content=lambda: True,
            content=RecordDict({"status": ConfigRecord({"code": ended})}),
        )
        return [reply]


def handed_over(grid: object, folder: Path, tmp_path: Path) -> list[dict[str, Any]]:
    events = tmp_path / "metrics.jsonl"
    with assume_identity(7, 1):
        handover.hand_over(
            grid,  # type: ignore[arg-type]
            Roster(("0", "1"), lambda: {"0": 5}),
            folder,
            EventLog(events),
            5.0,
        )
    return [json.loads(line) for line in events.read_text().splitlines()]


def test_the_server_notes_who_has_it(site, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / "other.txt").write_text("stays")
    sent, missing = handed_over(Line(site=site), folder, tmp_path)
    assert (sent["event"], sent["clients"]) == ("adapter_sent", ["0"])
    assert sent["sha256"] == digest_of(FILES)
    assert (missing["client"], missing["reason"]) == ("1", "not connected")
    fetch_adapter(site.folder, "", tmp_path / "mine")
    assert {p.name: p.read_bytes() for p in (tmp_path / "mine").iterdir()} == FILES


def test_a_broken_line_is_an_event(tmp_path):
    (only,) = handed_over(None, tmp_path, tmp_path)
    assert only["event"] == "adapter_missing"
