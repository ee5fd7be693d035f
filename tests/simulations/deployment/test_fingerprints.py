"""Fingerprints on both ends, pins in ``site.toml``, and whether secure sums could be made here."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client.site_file import read_site
from deal_core.config.data import DataConfig
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from simulations.deployment.keys import (
    fingerprint_of_line,
    make_authority,
    make_key_pair,
    read_public_key,
)
from simulations.deployment.server import folder as serving
from simulations.deployment.server.folder import (
    ServerFolder,
    ServerSettings,
    init_server,
)
from simulations.deployment.site.check import Report, check_site
from simulations.deployment.site.folder import init_site

LABELS = {"triage": ("a", "b")}
OTHERS = {name: make_key_pair(name) for name in ("south", "west", "east")}
SECURE = {"secure": True, "min_cohort": 3}


def shown(name: str) -> str:
    return fingerprint_of_line(OTHERS[name].public.decode())


@pytest.fixture
def site(tmp_path: Path) -> Path:
    data = tmp_path / "data" / "triage"
    data.mkdir(parents=True)
    rows = [json.dumps({"text": f"case {n}", "label": "ab"[n % 2]}) for n in range(6)]
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    authority = tmp_path / "given.crt"
    authority.write_bytes(make_authority().certificate)
    folder = tmp_path / "site"
    init_site(folder, data.parent, "north", "here:1", authority, labels=LABELS)
    return folder


def own(site: Path) -> str:
    return fingerprint_of_line(read_public_key(site / "site.pub"))


def pin(site: Path, *names: str, policy: str = "") -> None:
    """Write pins, as the comment in the file says, and a line of policy."""
    path = site / "site.toml"
    lines = "".join(f'{name} = "{shown(name)}"\n' for name in names)
    text = path.read_text().replace("[policy]", f"[peers]\n{lines}\n[policy]\n{policy}", 1)
    for key in ("secure_aggregation", "min_cohort", "colluding"):
        if policy.startswith(f"{key} "):  # instead of the line that init has written
            head, _, rest = text.rpartition(f"\n{key} ")
            text = head + rest[rest.index("\n") :]
    path.write_text(text)


def checked(site: Path, *, sites: tuple[str, ...] = (), **aggregation: object) -> Report:
    experiment = None
    if aggregation:
        experiment = Experiment(
            data=DataConfig(source="sites", labels=LABELS),
            aggregation=aggregation,
            federation={"sites": sites},
            privacy={"mechanism": "record"},
        )
    return check_site(site, experiment, offline=True)


def secure_line(report: Report) -> str:
    (line,) = [each for each in (*report.lines, *report.problems) if each.startswith("secure sums")]
    return line


def test_a_site_is_told_its_fingerprint_at_once_and_at_every_check(tmp_path: Path, site: Path):
    said = init_site(tmp_path / "other", tmp_path / "data", "south")
    assert f"fingerprint of this site's key: {own(tmp_path / 'other')}" in said
    assert any("by telephone" in line for line in said)
    assert any(own(site) in line for line in checked(site).lines)
    if shutil.which("ssh-keygen"):
        keygen = ["ssh-keygen", "-lf", str(site / "site.pub")]
        told = subprocess.run(keygen, capture_output=True, text=True, check=True).stdout
        assert own(site) in told


@pytest.mark.parametrize("text", ["SHA256:short", "MD5:12:34", ""])
def test_a_pin_that_is_no_fingerprint_is_one_line_with_the_cure(site: Path, text: str):
    path = site / "site.toml"
    path.write_text(path.read_text().replace("[policy]", f'[peers]\nwest = "{text}"\n[policy]', 1))
    with pytest.raises(UserError, match=r"peers\.west: .* is no fingerprint; write what deal site"):
        read_site(path)


def test_whether_sums_could_be_made_is_one_line(site: Path):
    report = checked(site)
    assert report.problems == []  # nobody has asked for them
    assert "not possible here: no site is pinned; write the fingerprints" in secure_line(report)
    pin(site, "south", "west")
    line = secure_line(checked(site))
    assert line == (
        "secure sums: allowed by the policy, with south, west (pinned), of 3 sites or more, 1 of "
        "them working with the server"
    )


def test_where_they_are_asked_for_and_could_not_be_made_that_is_wrong(site: Path):
    (problem,) = checked(site, **SECURE).problems
    assert problem.startswith("secure sums: no site is pinned")
    pin(site, "south", "west")
    sites = ("north", "south", "west", "east")
    (problem,) = checked(site, sites=sites, **SECURE).problems
    assert "no key of east is pinned" in problem
    assert checked(site, sites=sites[:3], **SECURE).problems == []


def test_a_policy_that_asks_for_more_than_the_experiment_is_wrong(site: Path):
    pin(site, "south", "west", "east", policy="min_cohort = 4\n")
    (problem,) = checked(site, **SECURE).problems
    assert "policy.min_cohort is 4, and aggregation.min_cohort of the experiment 3" in problem
    assert checked(site, secure=True, min_cohort=4).problems == []


def test_pins_of_fewer_sites_than_a_sum_has_are_too_few(site: Path):
    pin(site, "south")
    assert "1 other sites are pinned, and a sum is of 3" in secure_line(checked(site))


def test_a_policy_that_requires_them_makes_pins_a_must_and_other_experiments_wrong(site: Path):
    pin(site, policy='secure_aggregation = "required"\n')
    (problem,) = checked(site).problems
    assert problem.startswith("secure sums: no site is pinned")
    (problem,) = checked(site, secure=False).problems
    assert "aggregation.secure of the experiment is false" in problem


@pytest.fixture
def server(tmp_path: Path) -> ServerFolder:
    folder = ServerFolder(tmp_path / "server")
    init_server(folder, ServerSettings(hosts=("example.org",)))
    asked: list[tuple[str, ...]] = []

    class Flower:
        @staticmethod
        def ask(*words: str) -> dict[str, str]:
            asked.append(words)
            time.sleep(0.2)
            return {"node-id": str(len(asked))}

    Flower.asked = asked
    folder.flower = Flower
    return folder


def key_of(folder: Path, name: str) -> Path:
    path = folder / f"{name}.pub"
    path.write_bytes(make_key_pair(name).public)
    return path


def test_two_sites_that_are_added_at_the_same_time_are_both_there(
    server: ServerFolder, site: Path, tmp_path: Path
):
    keys = {name: key_of(tmp_path, name) for name in ("north", "south", "west")}
    with ThreadPoolExecutor(3) as pool:
        for name, key in keys.items():
            pool.submit(serving.add_site, server, name, key)
    assert set(serving.registered(server)) == set(keys)
    said = serving.add_site(server, "own", site / "site.pub")
    assert any(own(site) in line and "by telephone" in line for line in said)


def test_a_list_that_cannot_be_written_leaves_no_key_behind(
    server: ServerFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(path: Path, sites: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serving, "_write", full)
    with pytest.raises(UserError, match="No space left"):
        serving.add_site(server, "north", key_of(tmp_path, "north"))
    assert [words[1] for words in server.flower.asked] == ["register", "unregister"]
    assert serving.registered(server) == {}
