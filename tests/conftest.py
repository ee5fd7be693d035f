"""Shared: small real models and one short real run.

Heavy libraries load inside the fixtures: pytest-xdist reads this file in a process that runs no
test, before the others start.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from deal_core.config.experiment import AdapterConfig, Experiment, ModelConfig
from deal_core.config.file import apply_overrides, parse_experiment
from tests.forked import Forker
from tests.sizes import ENCODER, save_encoder

if TYPE_CHECKING:
    from deal_core.lora.adapter import Adapter, Shapes
    from deal_core.models.interface import LanguageModel

SHORT = [
    'data.tasks=["laboratory", "surgery"]',
    "data.max_train=16",
    "data.max_test=16",
    "federation.clients=2",
    "federation.rounds=2",
    "train.max_length=16",
    "train.batch_size=8",  # some clients take several steps a round
    "run.threads=1",
    "run.workers=1",
    "method.prototype.enabled=off",  # most tests are of rounds that train
]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays: to look for garbage in it takes longer than the imports."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    """What is frozen would be told as a leak of torch's bindings when the process ends."""
    gc.unfreeze()


def experiment_with(*overrides: str) -> Experiment:
    return parse_experiment(apply_overrides({}, [*SHORT, *overrides]), "test")


@pytest.fixture(scope="session")
def make_experiment() -> Callable[..., Experiment]:
    """The embedded model and data, two small tasks: seconds, not minutes."""
    return experiment_with


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's caches alone. Those that run side by side unpack a model once."""
    own = tmp_path_factory.mktemp("cache")
    if "PYTEST_XDIST_WORKER" in os.environ:
        models = tmp_path_factory.getbasetemp().parent / "models"
        models.mkdir(exist_ok=True)
        (own / "federated-deal").mkdir()
        (own / "federated-deal" / "models").symlink_to(models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(own))
        yield


@pytest.fixture(scope="session", autouse=True)
def tiny_encoder() -> Iterator[None]:
    """The model of :data:`tests.sizes.TINY`."""
    save_encoder()
    yield
    shutil.rmtree(ENCODER.parent)


@pytest.fixture(scope="session", autouse=True)
def one_thread_from_the_start() -> None:
    """As :func:`one_thread`, for what is made once for several tests."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """In every test, whatever the one before has set: tests run side by side, their matrices are
    small, and threads that wait for each other on a busy machine cost 100 times more."""
    import torch

    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Forker:
    """``fork("simulations.cli", ...)``: a real process that need not import everything again."""
    return Forker(tmp_path_factory.mktemp("forked"))


@pytest.fixture(scope="session")
def minilm() -> LanguageModel:
    """The embedded encoder; tests that write adapters leave none behind for others to rely on."""
    from deal_core.models import load_model

    config = Experiment()
    return load_model(config.model, config.adapter, config.train.max_length)


@cache
def load_once() -> Callable[..., Any]:
    """``load_model`` that keeps the last two."""
    from deal_core.models import load_model

    return lru_cache(maxsize=2)(load_model)


@pytest.fixture(scope="module")
def one_model() -> Iterator[None]:
    """Runs of other settings get the base model that was loaded for the runs before, as the next
    run of equal settings would: loading it anew is all that this saves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("client.runtime.load_model", load_once())
        yield


@pytest.fixture(scope="session")
def shapes() -> Shapes:
    """Of the layers of the embedded encoder that are adapted by default."""
    from deal_core.models import adapter_shapes

    return adapter_shapes(ModelConfig(), AdapterConfig())


def tiny_causal(folder: Path, kind: str) -> Path:
    """Save a random Llama or GPT-2 of a few thousand weights with a word-level tokeniser."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

    words = "Classify the text . Answer with one of options Options : , Text red blue green a b c d"
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", *words.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>"
    ).save_pretrained(folder)
    size = len(vocabulary)
    config = {
        "llama": LlamaConfig(
            vocab_size=size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=1,
            eos_token_id=0,
        ),
        "gpt2": GPT2Config(
            vocab_size=size, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=0
        ),
    }[kind]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["t5", "flan-t5", "bart"])
def seq2seq_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from tests.architectures import save

    return save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def causal_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def make_causal() -> Callable[[Path, str], Path]:
    """``make_causal(folder, "llama" | "gpt2")``."""
    return tiny_causal


@pytest.fixture(scope="session")
def small_adapter() -> AdapterConfig:
    return AdapterConfig(rank=4, retained_rank=6, lora_alpha=8.0)


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., Adapter]:
    """``random_adapter(shapes, rank, scaling, seed)``: normal factors, equal for equal seeds."""
    import torch

    from deal_core.lora.adapter import Adapter, LoraFactors

    def draw(shapes: Shapes, rank: int, scaling: float, seed: int) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        return Adapter(
            {
                name: LoraFactors(
                    torch.randn(rank, d_in, generator=generator),
                    torch.randn(d_out, rank, generator=generator),
                )
                for name, (d_out, d_in) in shapes.items()
            },
            scaling,
        )

    return draw
