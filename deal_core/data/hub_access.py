"""Whether the Hugging Face hub can be reached: asked once, before a library that would try for
minutes."""

from __future__ import annotations

import ssl
import threading
from functools import lru_cache
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

SECONDS = 8.0
"""For the hub's answer, all in all."""


def hub_address() -> str:
    """Return the address of the hub (``HF_ENDPOINT``)."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def hub_answers() -> bool:
    """Return whether the hub answers, whatever it says; False where ``HF_HUB_OFFLINE`` is set. It
    is asked once a process."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(hub_address())


@lru_cache(maxsize=4)
def _answers(address: str) -> bool:
    answered = threading.Event()

    def ask() -> None:
        try:
            urlopen(Request(address, method="HEAD"), timeout=SECONDS).close()
        except HTTPError:
            pass  # an answer
        except OSError as error:
            # Of a certificate the libraries judge, which may know others.
            if not isinstance(getattr(error, "reason", error), ssl.SSLError):
                return
        answered.set()

    # In a thread: a name server that keeps silent knows no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return answered.is_set()


def has_model(name: str, revision: str | None = None) -> bool:
    """Return whether a model of the hub is in this machine's cache; at least its description.
    Without a revision: the latest that this machine knows."""
    return bool(_description(name, revision))


def commit_of(name: str) -> str:
    """Return the commit of a hub's model that this machine's cache has under the name; empty:
    none."""
    found = _description(name)
    return Path(found).parent.name if found else ""


def _description(name: str, revision: str | None = None) -> str:
    """The file in the cache that describes a model; empty: none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # no name of the hub
        return ""
    return found if isinstance(found, str) else ""


def has_data_set(name: str) -> bool:
    """Return whether a data set of the hub is in this machine's cache, in some form."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    owner, slash, own = name.rpartition("/")
    folder = f"{owner}___{camelcase_to_snakecase(own)}" if slash else camelcase_to_snakecase(own)
    return (Path(config.HF_DATASETS_CACHE) / folder).is_dir()


def no_answer() -> str:
    """Return the reason in words."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "not on this machine, and HF_HUB_OFFLINE is set"
    return f"not on this machine, and {hub_address()} gives no answer"
