"""``requirements.lock``: every dependency by version and hash, and not where it comes from."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
ENTRY = re.compile(
    r"([a-z0-9][a-z0-9._-]*)==([0-9][0-9a-z.]*)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)"
)
BUILD = ("hatchling>=1.27", "editables")
"""What ``pip install --no-build-isolation --editable`` needs."""


def test_every_dependency_and_what_it_needs_is_pinned_by_version_and_hashes():
    text = (ROOT / "requirements.lock").read_text()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    entries = [ENTRY.fullmatch(block) for block in re.split(r"\n(?=\S)", body.strip())]
    assert None not in entries
    lock = {canonicalize_name(entry[1]): entry[2] for entry in entries if entry}
    assert len(lock) > 100
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [Requirement(line) for line in (*project["dependencies"], *BUILD)]
    for wanted in declared:
        assert wanted.specifier.contains(lock[canonicalize_name(wanted.name)]), wanted
    extras = {canonicalize_name(wanted.name): wanted.extras for wanted in declared}
    looked_at = 0
    for name in lock:
        try:
            installed = version(name).split("+")[0]
        except PackageNotFoundError:  # torch of PyPI needs CUDA's libraries; another need not
            continue
        if installed != lock[name]:  # a later version may need more
            continue
        looked_at += 1
        for need in map(Requirement, requires(name) or []):
            for extra in ("", *extras.get(name, ())):
                if need.marker is None or need.marker.evaluate({"extra": extra}):
                    assert canonicalize_name(need.name) in lock, f"{name} needs {need}"
    assert looked_at > 20
