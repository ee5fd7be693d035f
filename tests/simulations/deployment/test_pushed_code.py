"""A server that pushes code of its own: real processes; nothing of it is unpacked or run."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from simulations.deployment.server import submit
from simulations.deployment.site.clientapp import digest_of
from tests.simulations.deployment.loopback import SLOW, Federation, federation
from tests.simulations.deployment.pushed_app import COMMENT, MARKER, changed_app
from tests.simulations.deployment.short_experiment import experiment_file
from tests.simulations.deployment.site_data import divide

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 * SLOW)]
FLOWERS_OWN = ("flower/", "log.jsonl", "supernode.log", "site.pid", "site.lock")
"""Of a site's state folder, what every start changes."""


def push(fed: Federation, app: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """``deal submit`` on a server whose checkout has been changed."""
    with monkeypatch.context() as patched:
        patched.setattr(submit, "BUNDLE", app)
        said = submit.submit(fed.folder, submit.Submission(str(path)))
    return said[0].split()[1]


def kept(site: Path) -> dict[str, bytes]:
    """Whatever lies at the site but Flower's own."""
    files = {str(path.relative_to(site)): path for path in site.rglob("*") if path.is_file()}
    own = {name: path for name, path in files.items() if not name.startswith("state/")}
    state = {n: p for n, p in files.items() if n.startswith("state/")}
    own |= {n: p for n, p in state.items() if not n[len("state/") :].startswith(FLOWERS_OWN)}
    return {name: path.read_bytes() for name, path in own.items()}


def test_a_changed_app_gets_nothing_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, marker = tmp_path / "data", tmp_path / "marker"
    divide(data, {"north": ".csv"})
    path = experiment_file(tmp_path / "pushed.toml", ["surgery"], deadline=120, connect=30)
    harmless = changed_app(tmp_path / "harmless", COMMENT)
    harmful = changed_app(tmp_path / "harmful", MARKER.format(path=str(marker)))

    def marked() -> list[str]:
        return marker.read_text().splitlines() if marker.exists() else []

    with federation(tmp_path) as fed:
        fed.add("north", data / "north", path)
        home = str(fed.site("north") / "state" / "flower")
        unpacked = Path(home) / "apps"
        before = kept(fed.site("north"))
        fed.start_site("north")
        for app in (harmless, harmful):
            digest = digest_of(build_fab_from_disk(app))
            run = push(fed, app, path, monkeypatch)
            stopped = fed.wait_event(run, "run_stopped", 240)
            assert not [e for e in stopped if e["event"] == "client_finished"]
            refused = [e["app"] for e in fed.log("north") if e["event"] == "app_refused"]
            assert refused[-1] == digest
            assert not unpacked.exists()
        assert {e["event"] for e in fed.log("north")} == {"app_refused"}
        assert home not in marked()
        assert kept(fed.site("north")) == before
