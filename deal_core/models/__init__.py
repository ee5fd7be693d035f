"""Model families behind one narrow interface; a family is a file and a line in ``FAMILIES``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import TaskType

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.errors import UserError, choose
from deal_core.lora.attach import attach, lora_layers
from deal_core.models.causal import causal_prompts, load_causal
from deal_core.models.encoder import (
    encoder_label_vectors,
    load_encoder,
)
from deal_core.models.generating import GeneratingModel
from deal_core.models.interface import (
    Encoded,
    ForwardOutput,
    LabelVectors,
    LanguageModel,
)
from deal_core.models.loading import check_bits, pretrained
from deal_core.models.loading import check_weights as check_checkpoint
from deal_core.models.prompt import PromptTokens, require_distinct
from deal_core.models.seq2seq import load_seq2seq, seq2seq_prompts
from deal_core.models.stateless import require_fixed_places


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        load: model, adapter, ``max_length``, type of the frozen weights -> a ready model.
        task_type: PEFT's name of the family.
        has_label_logits: of its models (:class:`LanguageModel`).
        label_vectors: model -> vectors of names of labels; None: the family has none.
        prompts: tokeniser, the base model's own settings, model, ``max_length`` -> what makes the
            prompts; None: a text is read alone.
    """

    load: Callable[[ModelConfig, AdapterConfig, int, torch.dtype], LanguageModel]
    task_type: TaskType
    has_label_logits: bool
    label_vectors: Callable[[ModelConfig], LabelVectors] | None = None
    prompts: Callable[[Any, Any, ModelConfig, int], PromptTokens] | None = None


FAMILIES: Mapping[str, Family] = {
    "encoder-labels": Family(
        load_encoder,
        TaskType.FEATURE_EXTRACTION,
        True,
        encoder_label_vectors,
    ),
    "causal-lm": Family(
        load_causal,
        TaskType.CAUSAL_LM,
        False,
        prompts=causal_prompts,
    ),
    "seq2seq-lm": Family(
        load_seq2seq,
        TaskType.SEQ_2_SEQ_LM,
        False,
        prompts=seq2seq_prompts,
    ),
}


def load_model(
    model: ModelConfig, adapter: AdapterConfig, max_length: int, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Return ``model`` with a zero adapter on the best device, its frozen weights in ``dtype``.

    Raises:
        UserError: unknown family or name, missing or altered weights.
    """
    return choose("model.family", model.family, FAMILIES).load(model, adapter, max_length, dtype)


def adapter_shapes(model: ModelConfig, adapter: AdapterConfig) -> dict[str, tuple[int, int]]:
    """Return layer name to ``(d_out, d_in)`` of every adapted layer, without reading weights.

    Raises:
        UserError: as :func:`load_model`.
    """
    family = choose("model.family", model.family, FAMILIES)
    base = skeleton(model)
    require_fixed_places(base, model.name)
    module = attach(base, adapter, family.task_type)
    return {
        name: (layer.out_features, layer.in_features) for name, layer in lora_layers(module).items()
    }


def label_vectors(model: ModelConfig) -> LabelVectors:
    """Return the frozen vectors of names of labels; weights are read.

    Raises:
        UserError: unknown family or name, or a family without.
    """
    make = choose("model.family", model.family, FAMILIES).label_vectors
    if make is None:
        raise UserError(f"model.family '{model.family}' has no vectors of label names")
    return make(model)


def auto_class(task_type: TaskType) -> Any:
    """Return the class of transformers that loads base models of a family of this type."""
    import transformers

    names = {
        TaskType.FEATURE_EXTRACTION: "AutoModel",
        TaskType.CAUSAL_LM: "AutoModelForCausalLM",
        TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    }
    return getattr(transformers, names.get(task_type, "AutoModel"))


def skeleton(model: ModelConfig) -> Any:
    """Return the base model without weights (meta device): enough to know its layers.

    Raises:
        UserError: unknown family or name.
    """
    from transformers import AutoConfig

    loader = auto_class(choose("model.family", model.family, FAMILIES).task_type)
    config = pretrained(AutoConfig, model.name)
    with torch.device("meta"):
        return loader.from_config(config)


def check_weights(model: ModelConfig) -> None:
    """Check that a checkpoint has all weights that the family needs, without reading them.

    Raises:
        UserError: unknown family or name, or weights are missing.
    """
    family = choose("model.family", model.family, FAMILIES)
    check_checkpoint(auto_class(family.task_type), model.name)


def has_label_logits(model: ModelConfig) -> bool:
    """Return whether one forward pass scores any number of labels, so that accuracy among all
    labels seen costs nothing more; no weights are read.

    Raises:
        UserError: unknown family.
    """
    return choose("model.family", model.family, FAMILIES).has_label_logits


def check_label_tokens(model: ModelConfig, labels: Sequence[str]) -> None:
    """Check that a model that answers in words can tell labels apart; no weights are read.

    Raises:
        UserError: it cannot, or its name is unknown.
    """
    from transformers import AutoTokenizer

    if not has_label_logits(model):
        require_distinct(pretrained(AutoTokenizer, model.name), labels)


def max_positions(model: ModelConfig) -> int:
    """Return how many tokens the model can read at once, 0 where nothing bounds them; no weights
    are read.

    Raises:
        UserError: unknown name.
    """
    from transformers import AutoConfig

    config = pretrained(AutoConfig, model.name).get_text_config()
    return int(getattr(config, "max_position_embeddings", 0) or 0)


def embedding_size(model: ModelConfig, layers: int = 1) -> int:
    """Return the length of a text's embedding of so many of the last layers, or of all where there
    are fewer; no weights are read. Of an encoder-decoder they are the encoder's.

    Raises:
        UserError: unknown name.
    """
    from transformers import AutoConfig

    whole = pretrained(AutoConfig, model.name)
    config = whole.get_text_config(encoder=True if whole.is_encoder_decoder else None)
    size: int = config.hidden_size * math.ceil(min(layers, config.num_hidden_layers) / 2)
    return size


def decodes_apart(model: ModelConfig) -> bool:
    """Return whether a decoder of its own writes answers, so that they take no room of the prompt.

    Raises:
        UserError: unknown family.
    """
    family = choose("model.family", model.family, FAMILIES)
    return family.task_type == TaskType.SEQ_2_SEQ_LM


__all__ = [
    "FAMILIES",
    "Encoded",
    "Family",
    "ForwardOutput",
    "GeneratingModel",
    "LabelVectors",
    "LanguageModel",
    "adapter_shapes",
    "auto_class",
    "check_bits",
    "check_label_tokens",
    "check_weights",
    "decodes_apart",
    "embedding_size",
    "has_label_logits",
    "label_vectors",
    "load_model",
    "max_positions",
    "skeleton",
]
