"""The commit is that of the checkout that runs, and of no other repository around it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from server.checkpoint import commit


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "one")
    return tmp_path


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_hash_of_the_commit_and_whether_files_differ(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert len(head) == 40
    assert commit(checkout) == head
    git(checkout, "tag", "v1")  # a tag is no hash
    assert commit(checkout) == head
    (checkout / "file").write_text("two")
    assert commit(checkout) == f"{head}-dirty"


def test_a_folder_inside_another_repository_has_none(checkout: Path) -> None:
    inside = checkout / "site-packages"
    inside.mkdir()
    assert commit(inside) == ""
    (inside / ".git").write_text("gitdir: nowhere")
    assert commit(inside) == ""
