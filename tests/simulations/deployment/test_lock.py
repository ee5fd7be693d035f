"""``requirements.lock``: every dependency by version and hash, and not where it comes from."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
ENTRY = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9._-]*)==(?P<version>[^ ;\\\n]+) \\\n(?P<hashes>[^a-z#]+.*)", re.S
)
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?")
BUILD = ("hatchling>=1.27", "editables")
"""What ``pip install --no-build-isolation --editable`` needs."""


def entries() -> dict[str, tuple[str, list[str]]]:
    """Package to version and lines of hashes."""
    text = (ROOT / "requirements.lock").read_text()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    found = {}
    for block in re.split(r"\n(?=\S)", body.strip()):
        entry = ENTRY.fullmatch(block)
        assert entry is not None, block[:80]
        found[canonicalize_name(entry["name"])] = (entry["version"], entry["hashes"].splitlines())
    return found


@pytest.fixture(scope="module")
def lock() -> dict[str, tuple[str, list[str]]]:
    return entries()


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in (*project["dependencies"], *BUILD)]


@pytest.mark.parametrize("wanted", declared(), ids=str)
def test_every_dependency_is_pinned_within_its_range(wanted: Requirement, lock) -> None:
    version, _ = lock[canonicalize_name(wanted.name)]
    assert wanted.specifier.contains(version)


def test_every_file_is_known_by_its_hash_and_by_nothing_else(lock) -> None:
    assert len(lock) > 100
    for name, (version, hashes) in lock.items():
        assert hashes, name
        assert all(HASH.fullmatch(line) for line in hashes), name
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), name  # no build of one index alone
    assert "//" not in (ROOT / "requirements.lock").read_text()


def test_what_the_dependencies_need_is_pinned_as_well(lock) -> None:
    """By their own metadata, where they are installed here."""
    extras = {canonicalize_name(wanted.name): wanted.extras for wanted in declared()}
    looked_at = 0
    for name in lock:
        try:
            lines = requires(name) or []
        except PackageNotFoundError:  # torch of PyPI needs CUDA's libraries; another need not
            continue
        looked_at += 1
        for need in map(Requirement, lines):
            for extra in ("", *extras.get(name, ())):
                if need.marker is None or need.marker.evaluate({"extra": extra}):
                    assert canonicalize_name(need.name) in lock, f"{name} needs {need}"
    assert looked_at > 80


def test_the_guide_names_the_versions_that_are_pinned(lock) -> None:
    guide = (ROOT / "docs" / "DEPLOYMENT.md").read_text()
    (line,) = re.findall(r"tests ran with these versions: ([^.]*(?:\.[0-9][^.]*)*)\.\n", guide)
    named = dict(re.findall(r"([a-z-]+) ([0-9.]+[0-9])", line.replace("\n", " ")))
    assert named.pop("python") == "3.11"
    assert {name: lock[name][0] for name in named} == named
    assert {"flwr", "torch", "transformers", "peft", "opacus", "cryptography"} <= set(named)
