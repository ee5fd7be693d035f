"""The adapter that a run leaves at a site: sent, checked, kept, fetched."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from client.app import make_app
from client.resident_worker import INSIDE
from client.site_file import NODE_KEY
from deal_core.wire.records import DIGEST, RECORD, digest_of, read_folder
from server import export as handover
from server.clients import Roster
from server.folder import EventLog
from simulations.engines.worker_pool import assume_identity
from tests.client.real_site import RealSite, asked, code
from tests.run_configs import placed

FILES = {"inference.json": b"{}", "adapter_model.safetensors": b"\x00\x01"}


@pytest.fixture
def site(tmp_path):
    """Has worked in one run."""
    site = RealSite(tmp_path / "site")
    (site.folder / "state" / "runs" / "run-1").mkdir(parents=True)
    return site


def test_of_a_run_in_which_the_site_has_not_worked_nothing_is_kept(site):
    assert send(site, content(FILES), run="run-2") == "refused"
    assert [path.name for path in (site.folder / "state" / "runs").iterdir()] == ["run-1"]


def content(files, digest=""):
    arrays = {name: Array(np.frombuffer(data, np.uint8)) for name, data in files.items()}
    record = ConfigRecord({"sha256": digest or digest_of(files)})
    return RecordDict({RECORD: ArrayRecord(arrays), DIGEST: record})


def send(site, records, run="run-1", kind=handover.KIND):
    config = placed(asked(), f"/srv/runs/{run}")
    node = {NODE_KEY: str(site.folder / "site.toml"), INSIDE: True}
    with assume_identity(7, 1):
        message = Message(records, 1, kind, ttl=60.0)
        return code(make_app()(message, Context(7, 1, node, RecordDict(), config)))


def kept(site):
    """The adapter that lies at the site, and is what its digest says."""
    run = site.folder / "state" / "runs" / "run-1"
    files = read_folder(run / "adapter")
    assert (run / "adapter.sha256").read_text().strip() == digest_of(files)
    return files


def test_what_was_sent_is_kept_under_its_digest(site):
    assert send(site, content(FILES)) == "ok"
    assert kept(site) == FILES
    assert send(site, content({"README.md": b"later"})) == "ok"  # of the run, resumed
    assert kept(site) == {"README.md": b"later"}
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
def test_anything_else_is_refused_and_nothing_is_written(site, records):
    assert send(site, content(FILES)) == "ok"
    before = {p: p.read_bytes() for p in site.folder.rglob("*") if p.is_file()}
    assert send(site, records) == "refused"
    after = {p: p.read_bytes() for p in site.folder.rglob("*") if p.is_file()}
    assert {p for p in after if after[p] != before.get(p)} == {site.folder / "state/log.jsonl"}
    assert kept(site) == FILES


def test_a_simulated_client_keeps_none(tmp_path):
    config = placed(asked(), str(tmp_path))
    with assume_identity(7, 1):
        message = Message(content(FILES), 1, handover.KIND)
        context = Context(7, 1, {"partition-id": 0}, RecordDict(), config)
        assert code(make_app()(message, context)) == "refused"
    assert list(tmp_path.iterdir()) == []


class Line(SimpleNamespace):
    """A grid to one real site."""

    def push_messages(self, messages):
        self.sent = messages
        return [str(number) for number in range(len(messages))]

    def pull_messages(self, ids):
        ended = send(self.site, self.sent[0].content)
        reply = SimpleNamespace(
            metadata=SimpleNamespace(reply_to_message_id="0"),
            has_error=lambda: False,
            has_content=lambda: True,
            content=RecordDict({"status": ConfigRecord({"code": ended})}),
        )
        return [reply]


def handed_over(grid, folder, tmp_path):
    events = tmp_path / "metrics.jsonl"
    with assume_identity(7, 1):
        handover.hand_over(
            grid,
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
    assert kept(site) == FILES
