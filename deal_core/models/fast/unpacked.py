"""A GGUF file as the folder of an ordinary checkpoint: made once, and kept in the user's cache.

Every process would take 17 seconds to read the embedded file, and memory for its weights several
times over. Those of the folder are mapped: that takes 0.2 seconds, and processes share them.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from deal_core.data.embedded import cache_folder, made_once, sha256_of

WORDS = "words"
"""Folder of the tokeniser and the configuration."""
READERS = ("transformers", "gguf")
"""Packages whose versions decide what is made of a file."""


def unpacked(gguf: Path, dtype: str = "") -> Path:
    """Return a folder that ``from_pretrained`` reads; it is made where it is missing, by a process
    of its own, whose memory goes with it.

    Args:
        gguf: the file.
        dtype: of the weights (``bfloat16``); empty: the tokeniser and the configuration alone.

    Raises:
        UserError: it cannot be made.
    """
    named = [sha256_of(gguf), *map(version, READERS)]
    key = hashlib.sha256(" ".join(named).encode()).hexdigest()[:40]
    folder = cache_folder("models") / key / (dtype or WORDS)
    return made_once(folder, lambda beside: _in_a_process(gguf, beside, dtype))


def _in_a_process(gguf: Path, folder: Path, dtype: str) -> None:
    subprocess.run(
        [sys.executable, "-P", "-m", __name__, str(gguf), str(folder), dtype],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


def unpack(gguf: Path, folder: Path, dtype: str) -> None:
    """Write to ``folder`` what :func:`unpacked` returns."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    if dtype:
        # As plain weights: products with packed ones are computed in float32, and much slower.
        plain = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, quantization_config=plain
        )
        model.save_pretrained(folder)
        return
    AutoConfig.from_pretrained(**where).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
