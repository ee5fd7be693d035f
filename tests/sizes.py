"""Sizes of short runs, to be added to those of :func:`tests.conftest.experiment_with`."""

import json
import os
import string
import tempfile
from pathlib import Path

ENOUGH_TO_LEARN = ("data.max_train=32", "data.max_test=32")
"""So that what is learnt shows in the accuracy."""
QUIET = ("method.prototype.directions=0", "method.prototype.noise_multiplier=0")
"""Class sums of whole embeddings without noise: no public text is read."""
TWO_LAYERS = 'adapter.target_modules=["4.attention.self.value", "5.attention.self.value"]'
"""Of the default's twelve: where it does not matter how many are adapted."""
ENCODER = Path(tempfile.gettempdir()) / f"federated-deal-tests-{os.getpid()}" / "encoder"
"""A tiny model, made before the first test; of this process and all that it starts."""
WIDTH = 32
"""Of its vectors."""
TINY_MODEL = (
    f'model.name="{ENCODER}"',
    'adapter.target_modules=["0.attention.self.value", "1.attention.self.value"]',
)
TINY = ("data.max_train=12", "data.max_test=6", "train.max_length=8", *TINY_MODEL)
"""A tenth of the time, where it matters only whether two runs are the same."""


def save_encoder(folder: Path = ENCODER) -> None:
    """Save a random BERT of two layers that reads texts letter by letter."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_lowercase + string.digits
    special = {part: f"[{part.upper()}]" for part in ("pad", "unk", "cls", "sep", "mask")}
    words = [*special.values(), *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "vocab_size": len(words)}
    config = {
        **{"model_type": "bert", "architectures": ["BertModel"], "type_vocab_size": 2, **sizes},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64},
    }
    named = {f"{kind}_token": word for kind, word in special.items()}
    files = {
        "config.json": config,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **named},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    layer = {f"attention.self.{part}": (WIDTH, WIDTH) for part in ("query", "key", "value")}
    layer |= {"attention.output.dense": (WIDTH, WIDTH), "output.dense": (WIDTH, 64)}
    layer |= {"attention.output.LayerNorm": (WIDTH,), "output.LayerNorm": (WIDTH,)}
    layer |= {"intermediate.dense": (64, WIDTH)}
    shapes: dict[str, tuple[int, ...]] = {"embeddings.LayerNorm": (WIDTH,)}
    shapes |= {f"encoder.layer.{n}.{name}": own for n in range(2) for name, own in layer.items()}
    shapes |= {"pooler.dense": (WIDTH, WIDTH)}
    draw, weights = np.random.default_rng(0), {}
    for name, count in (("word", len(words)), ("position", 64), ("token_type", 2)):
        weights[f"embeddings.{name}_embeddings.weight"] = draw.normal(0, 0.2, (count, WIDTH))
    for name, shape in shapes.items():
        norm = len(shape) == 1
        weights[f"{name}.weight"] = np.ones(shape) if norm else draw.normal(0, 0.2, shape)
        weights[f"{name}.bias"] = np.zeros(shape[0])
    arrays = {name: value.astype(np.float32) for name, value in weights.items()}
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
