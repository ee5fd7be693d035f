"""Random models of a few thousand weights, one of each architecture, with word-level tokenisers."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from deal_core.config.experiment import ModelConfig
from deal_core.data import Example

LABELS = ("red", "blue_green", "green")
EXAMPLES = (
    Example("a b", "red"),
    Example("c c c c d", "blue_green"),
    Example("d", "green"),
    Example("a b a b a b", "red"),
)
"""Texts in the words of these models, under labels of their words."""
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
WORDS = "Classify the text . Answer with one of options Options : , Text red blue green a b c d"
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS.split()])}
IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "vocab_size": len(VOCABULARY)}
PLAIN = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
T5 = {
    **IDS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "decoder_start_token_id": 1,
}
BART = {
    **IDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
    "init_std": 0.2,
}
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("encoder-labels", "BertConfig", PLAIN),
    "roberta": ("encoder-labels", "RobertaConfig", PLAIN),
    "mpnet": ("encoder-labels", "MPNetConfig", PLAIN),
    "distilbert": (
        "encoder-labels",
        "DistilBertConfig",
        {**IDS, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    ),
    "modernbert": ("encoder-labels", "ModernBertConfig", {**PLAIN, "local_attention": 6}),
    "deberta-v2": (
        "encoder-labels",
        "DebertaV2Config",
        {
            **PLAIN,
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "type_vocab_size": 0,
            "max_relative_positions": -1,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "llama": ("causal-lm", "LlamaConfig", GROUPED),
    "qwen2": ("causal-lm", "Qwen2Config", {**GROUPED, "vocab_size": 260}),
    "qwen3": ("causal-lm", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gpt2": (
        "causal-lm",
        "GPT2Config",
        {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
    ),
    "gemma": ("causal-lm", "GemmaConfig", {**GROUPED, "head_dim": 8}),
    "gemma3": (
        "causal-lm",
        "Gemma3TextConfig",
        {**GROUPED, "head_dim": 8, "sliding_window": 6},
    ),
    "mistral": ("causal-lm", "MistralConfig", {**GROUPED, "sliding_window": 6}),
    "t5": ("seq2seq-lm", "T5Config", T5),
    "flan-t5": (
        "seq2seq-lm",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": ("seq2seq-lm", "BartConfig", BART),
    # Those that a family refuses:
    "bloom": (
        "causal-lm",
        "BloomConfig",
        {**IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
    ),
    "falcon": ("causal-lm", "FalconConfig", {**PLAIN, "alibi": False}),
    "gemma2": ("causal-lm", "Gemma2Config", {**GROUPED, "head_dim": 8}),
}
"""Name to family, class of its configuration, sizes."""
REFUSED = ("bloom", "falcon", "gemma2")
WORKING = tuple(name for name in CONFIGS if name not in REFUSED)
OF_ATTENTION = {
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
    "mpnet": ["q", "v"],
}
"""Adapted layers of those for which PEFT has no default."""
LOADERS = {
    "encoder-labels": AutoModel,
    "causal-lm": AutoModelForCausalLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
}


def save(folder: Path, name: str) -> Path:
    """Save model and tokeniser in ``folder``; equal for equal names."""
    family, kind, sizes = CONFIGS[name]
    tokenizer = by_byte() if name == "qwen2" else by_word()
    if family != "causal-lm":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>" if "t5" in name else "<s> $A </s>",
            special_tokens=[("<s>", 0), ("</s>", 2)],
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**sizes)
    LOADERS[family].from_config(config).save_pretrained(folder)
    return folder


def by_word() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def by_byte() -> Tokenizer:
    """transformers gives a Qwen2 a tokeniser of its own, whatever lies beside it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def model_config(folder: Path, name: str, **changes: Any) -> ModelConfig:
    """Return the table ``[model]`` of what :func:`save` left in ``folder``."""
    return ModelConfig(family=CONFIGS[name][0], name=str(folder), **changes)
