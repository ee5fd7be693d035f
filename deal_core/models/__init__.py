"""Model families behind one narrow interface (:mod:`deal_core.models.interface`); a family is a
file and a line in ``FAMILIES``.

Whatever asks about a model raises :class:`UserError` where its family or its name is unknown.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from peft import TaskType

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.errors import choose
from deal_core.lora.attach import attach, lora_layers
from deal_core.models import loading
from deal_core.models.decoders import CausalLM, Seq2SeqLM, causal_prompts, seq2seq_prompts
from deal_core.models.encoder import SequenceClassifier, load_encoder, load_own_loss, with_head
from deal_core.models.generating import load_generating
from deal_core.models.interface import LanguageModel
from deal_core.models.prompt import PromptTokens, require_distinct
from deal_core.models.tokens import TokenClassifier, TokenLabels


@dataclass(frozen=True)
class Family:
    """One model family."""

    load: Callable[[ModelConfig, AdapterConfig, int, torch.dtype], LanguageModel]
    """Model, adapter, ``max_length``, type of the frozen weights -> a ready model."""
    task_type: TaskType
    """PEFT's name of the family."""
    auto_class: str
    """The class of transformers that loads its base models."""
    has_label_logits: bool
    """Of its models (:class:`LanguageModel`)."""
    prompts: Callable[[Any, Any, ModelConfig, int], PromptTokens] | None = None
    """Tokeniser, the base model's own settings, model, ``max_length`` -> what makes the prompts;
    None: a text is read alone."""
    layers: Callable[[Any, AdapterConfig], AdapterConfig] = lambda base, adapter: adapter
    """Base model, adapter -> the adapter with the layers that are adapted where it names none."""
    tags: bool = False
    """Whether its models answer with a tag for each word, and not with a label."""


FAMILIES: Mapping[str, Family] = {
    "encoder-labels": Family(load_encoder, TaskType.FEATURE_EXTRACTION, "AutoModel", True),
    "causal-lm": Family(
        partial(load_generating, CausalLM, "AutoModelForCausalLM", causal_prompts),
        *(TaskType.CAUSAL_LM, "AutoModelForCausalLM", False),
        prompts=causal_prompts,
    ),
    "seq2seq-lm": Family(
        partial(load_generating, Seq2SeqLM, "AutoModelForSeq2SeqLM", seq2seq_prompts),
        *(TaskType.SEQ_2_SEQ_LM, "AutoModelForSeq2SeqLM", False),
        prompts=seq2seq_prompts,
    ),
    "sequence-classification": Family(
        partial(load_encoder, make=SequenceClassifier, loader="AutoModelForSequenceClassification"),
        *(TaskType.FEATURE_EXTRACTION, "AutoModelForSequenceClassification", True),
        layers=with_head,
    ),
    "token-labels": Family(
        partial(load_encoder, make=TokenLabels),
        *(TaskType.FEATURE_EXTRACTION, "AutoModel", True),
        tags=True,
    ),
    "token-classification": Family(
        partial(load_encoder, make=TokenClassifier, loader="AutoModelForTokenClassification"),
        *(TaskType.FEATURE_EXTRACTION, "AutoModelForTokenClassification", True),
        layers=with_head,
        tags=True,
    ),
    "own-loss": Family(load_own_loss, TaskType.FEATURE_EXTRACTION, "AutoModel", True),
}


def family_of(model: ModelConfig) -> Family:
    """Return the family of a model; :class:`UserError`: unknown, the message lists the known."""
    return choose("model.family", model.family, FAMILIES, "models")


def load_model(
    model: ModelConfig, adapter: AdapterConfig, max_length: int, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """Return ``model`` with a zero adapter on the best device, its frozen weights in ``dtype``.

    Raises:
        UserError: weights are missing, or altered, or the family cannot read such a model.
    """
    return family_of(model).load(model, adapter, max_length, dtype)


def adapter_shapes(model: ModelConfig, adapter: AdapterConfig) -> dict[str, tuple[int, int]]:
    """Return layer name to ``(d_out, d_in)`` of every adapted layer, without reading weights."""
    base, family = skeleton(model), family_of(model)
    loading.require_fixed_places(base, model.name)
    module = attach(base, family.layers(base, adapter), family.task_type)
    return {
        name: (layer.out_features, layer.in_features) for name, layer in lora_layers(module).items()
    }


def auto_class(model: ModelConfig) -> Any:
    """Return the class of transformers that loads base models of its family."""
    return getattr(transformers, family_of(model).auto_class)


def skeleton(model: ModelConfig) -> Any:
    """Return the base model without weights (meta device): enough to know its layers."""
    if model.name.startswith(loading.GIVEN):
        return loading.copy_of(loading.given(model.name).base, "meta")
    config = _config(model)
    with torch.device("meta"):
        return auto_class(model).from_config(config)


def _config(model: ModelConfig) -> Any:
    return loading.pretrained(transformers.AutoConfig, model.name)


def check_weights(model: ModelConfig) -> None:
    """Check that a checkpoint has all weights that the family needs, without reading them; of an
    embedded one, whose hash is known, nothing is asked.

    Raises:
        UserError: weights are missing.
    """
    if not model.name.startswith(loading.EMBEDDED):
        loading.pretrained(auto_class(model), model.name, device_map="meta")


def has_label_logits(model: ModelConfig) -> bool:
    """Return whether one forward pass scores any number of labels, so that accuracy among all
    labels seen costs nothing more."""
    return family_of(model).has_label_logits


def check_label_tokens(model: ModelConfig, labels: Sequence[str]) -> None:
    """Check that a model that answers in words can tell labels apart; no weights are read.

    Raises:
        UserError: it cannot.
    """
    if not has_label_logits(model):
        require_distinct(loading.pretrained(transformers.AutoTokenizer, model.name), labels)


def max_positions(model: ModelConfig) -> int:
    """Return how many tokens the model can read at once, 0 where nothing bounds them; no weights
    are read."""
    return int(getattr(_config(model).get_text_config(), "max_position_embeddings", 0) or 0)


def embedding_size(model: ModelConfig, layers: int = 1) -> int:
    """Return the length of a text's embedding of so many of the last layers, or of all where there
    are fewer; no weights are read. Of an encoder-decoder they are the encoder's."""
    whole = _config(model)
    config = whole.get_text_config(encoder=True if whole.is_encoder_decoder else None)
    size: int = config.hidden_size * math.ceil(min(max(layers, 1), config.num_hidden_layers) / 2)
    return size


def decodes_apart(model: ModelConfig) -> bool:
    """Return whether a decoder of its own writes answers, so that they take no room of the
    prompt."""
    return family_of(model).task_type == TaskType.SEQ_2_SEQ_LM
