"""The base model of an export: loaded, saved beside it, and where others find it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deal_core.errors import choose
from deal_core.inference.folder import Inference
from deal_core.models.loading import EMBEDDED, TO_THE_BIT, quiet, with_revision
from server.model_card import hub_name
from simulations.use.export_card import BASE


def load_base(inference: Inference) -> tuple[Any, Any]:
    """Return base model, float32, and tokeniser, as transformers loads them.

    Raises:
        UserError: they cannot be loaded.
    """
    import torch
    from transformers import AutoTokenizer

    from deal_core.models import FAMILIES, auto_class
    from deal_core.models.loading import pretrained

    name = inference.model.name
    family = choose("model.family", inference.model.family, FAMILIES)
    loader = auto_class(family.task_type)
    base = pretrained(loader, name, dtype=torch.float32)
    if getattr(base, "hf_quantizer", None) is not None:
        base = unquantized(loader, base)
    return base, pretrained(AutoTokenizer, name)


def unquantized(loader: Any, model: Any) -> Any:
    """Return an ordinary model of the same float weights: transformers saves none that was read
    from a quantized file.

    Args:
        loader: class of transformers that makes it.
        model: its weights are decoded already (GGUF).
    """
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    plain = loader.from_config(type(model.config).from_dict(settings))
    plain.load_state_dict(model.state_dict())
    return plain.float().eval()


def public_base(inference: Inference) -> str:
    """Return the hub name under which others find the very base model; empty: there is none."""
    name = inference.model.name
    return hub_name(inference) if not name.startswith(EMBEDDED) or name in TO_THE_BIT else ""


def local_base(inference: Inference, to: Path) -> str:
    """Return where this machine finds the base model; an embedded one is written beside."""
    name = inference.model.name
    if name.startswith(EMBEDDED):
        base, tokenizer = load_base(inference)
        save_model(base, tokenizer, to / BASE)
        return str(to / BASE)
    return str(Path(name).resolve()) if Path(name).is_dir() else with_revision(name)[0]


def base_from(to: Path, base: str) -> str:
    """Return where the base model lies, seen from the export."""
    return BASE if base == str(to / BASE) else base


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model and its tokeniser as transformers does."""
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def auto_class_name(inference: Inference) -> str:
    """Return the name of the class of transformers that loads the base model."""
    from deal_core.models import FAMILIES, auto_class

    family = choose("model.family", inference.model.family, FAMILIES)
    name: str = auto_class(family.task_type).__name__
    return name
