"""A base model as a run computes with it: type, attention, bits of its weights."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from deal_core.config.experiment import ModelConfig
from deal_core.errors import UserError
from deal_core.lora.quantized import compute_whole
from deal_core.models.loading import pretrained
from deal_core.models.stateless import require_fixed_places

PACKAGE = "bitsandbytes"


def load_base_model(loader: Any, model: ModelConfig, dtype: torch.dtype, attention: str) -> Any:
    """Return the frozen base model.

    Args:
        loader: ``AutoModel...``.
        model: name, and bits of a weight.
        dtype: of activations, and of weights that keep all their bits.
        attention: one that transformers knows.

    Raises:
        UserError: see :func:`~deal_core.models.loading.pretrained`, :func:`check_bits`,
            :func:`~deal_core.models.stateless.require_fixed_places`.
    """
    check_bits(model)
    options = {"dtype": dtype, "attn_implementation": attention}
    base = pretrained(loader, model.name, **options, **_quantization(model.bits, dtype))
    compute_whole(base)
    require_fixed_places(base, model.name)
    return base


def check_bits(model: ModelConfig) -> None:
    """Check that the package is installed that ``model.bits`` needs; it is not imported.

    Raises:
        UserError: it is missing.
    """
    if model.bits and find_spec(PACKAGE) is None:
        raise UserError(
            f"model.bits = {model.bits} needs {PACKAGE}, which is not installed; run "
            "pip install --editable '.[quantized]' in the checkout, or leave model.bits out"
        )


def _quantization(bits: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return what ``from_pretrained`` is told. Source of the 4-bit form: QLoRA, arXiv 2305.14314
    (NormalFloat, constants quantized once more)."""
    if not bits:
        return {}
    from transformers import BitsAndBytesConfig

    if bits == 8:
        eight = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
        return {"quantization_config": eight}
    four = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": four}
