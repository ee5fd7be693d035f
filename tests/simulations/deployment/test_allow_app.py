"""``deal site allow-app`` changes the list in ``site.toml``, and nothing else of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.site_file import read_site
from deal_core.errors import UserError
from simulations.deployment.site.allow_app import allow_app
from simulations.deployment.site.init import SiteRequest, init_site
from simulations.deployment.site.own_app import own_digest

OTHER = "ab" * 32
TABLE = '[apps] # code\n# allowed = ["x"]\nallowed = [ "{other}" ] # reviewed in May\n[compute]\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    init_site(SiteRequest(tmp_path / "site", tmp_path / "data", "north"))
    return tmp_path / "site"


def apps(folder: Path) -> tuple[str, ...]:
    found = read_site(folder / "site.toml").apps
    return found.allowed if found is not None else ()


def test_an_app_is_added_once_and_comments_stay(folder: Path) -> None:
    path = folder / "site.toml"
    path.chmod(0o640)
    comments = [line.split("#")[1] for line in path.read_text().splitlines() if "#" in line]
    before = read_site(path)
    assert f"allowed app {OTHER} (given by you); 2 in all" in allow_app(folder, OTHER)[0]
    assert "allowed already" in allow_app(folder, OTHER.upper())[0]
    assert apps(folder) == (own_digest(), OTHER)
    assert read_site(path).model_copy(update={"apps": before.apps}) == before
    kept = path.read_text().splitlines()
    assert [line.split("#")[1] for line in kept if "#" in line] == comments
    assert path.stat().st_mode & 0o777 == 0o640
    assert not list(path.parent.glob("*.writing"))


@pytest.mark.parametrize("table", ["", "[apps]\n", "[apps]\nallowed = []\n", TABLE])
def test_it_finds_the_table_wherever_it_is(folder: Path, table: str) -> None:
    path = folder / "site.toml"
    head, _, _ = path.read_text().partition("[apps]")
    front, compute, rest = head.partition("[compute]\n")
    assert compute
    table = table.format(other=OTHER)
    path.write_text(front + (table if table.endswith(compute) else table + compute) + rest)
    before = apps(folder)
    allow_app(folder)
    assert apps(folder) == (*before, own_digest())
    assert read_site(path).compute.keep_seconds == 900


@pytest.mark.parametrize("digest", ["abc", "g" * 64, OTHER + "0", '"]'])
def test_what_is_no_hash_is_refused(folder: Path, digest: str) -> None:
    before = (folder / "site.toml").read_bytes()
    with pytest.raises(UserError, match="not a SHA-256"):
        allow_app(folder, digest)
    assert (folder / "site.toml").read_bytes() == before


def test_a_file_that_it_does_not_understand_is_left_alone(folder: Path) -> None:
    path = folder / "site.toml"
    head, _, _ = path.read_text().partition("[apps]")
    path.write_text(f'apps = {{ allowed = ["{OTHER}"] }}\n' + head)
    before = path.read_bytes()
    with pytest.raises(UserError, match="by hand"):
        allow_app(folder)
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.writing"))


def test_a_hash_in_the_file_that_is_none_is_one_line(folder: Path) -> None:
    path = folder / "site.toml"
    path.write_text(path.read_text().replace(own_digest(), "abc"))
    with pytest.raises(UserError, match=r"site\.toml: key 'apps\.allowed\.0'"):
        read_site(path)
