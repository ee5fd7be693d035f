"""A server that pushes code of its own: real processes; nothing of it is unpacked or run at a site,
which answers with what is installed there."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.deployment.server import submit
from simulations.deployment.site.programs import own_app
from tests.simulations.deployment.loopback import SLOW, federation
from tests.simulations.deployment.pushed_app import MARKER, changed_app
from tests.simulations.deployment.short_experiment import experiment_file
from tests.simulations.deployment.site_data import divide

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900 * SLOW)]


def test_a_changed_app_is_not_run_at_a_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, marker = tmp_path / "data", tmp_path / "marker"
    divide(data, {"north": ".csv"})
    path = experiment_file(tmp_path / "pushed.toml", ["surgery"], deadline=30)
    monkeypatch.setattr(
        submit, "BUNDLE", changed_app(tmp_path / "harmful", MARKER.format(path=str(marker)))
    )
    with federation(tmp_path) as fed:
        fed.add("north", data / "north", path)
        home = fed.site("north") / "state" / "flower"
        fed.start_site("north")
        run = submit.submit(fed.folder, str(path))[0].split()[1]
        fed.wait_event(run, "run_finished", 240)
        homes = marker.read_text().splitlines()  # the server has imported it
        assert str(home) not in homes
        assert str(fed.folder.flower.path) in homes
        (unpacked,) = (home / "apps").iterdir()
        assert own_app().hash_str[:8] in unpacked.name
        assert str(marker) not in (unpacked / "deal_app.py").read_text()
