"""The contestant ``trainer`` with a language model: PEFT LoRA and the Hugging Face Trainer, as
their documentation shows. The base model is in the precision of ours; logits are computed at every
token, as transformers does, and have a loss at those of the answer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from deal_core.config.experiment import AdapterConfig, ModelConfig
from deal_core.models.loading import best_device, pretrained
from simulations.bench.prompts import Prompted, prompted, questions
from simulations.bench.step_trainer import Stopwatch, quiet_trainer, training_arguments
from simulations.bench.workloads import Turn, Workload

IGNORED = -100
"""A label that has no loss."""
Row = dict[str, list[int]]


def lora_config() -> LoraConfig:
    """Return an adapter of the default rank in all layers."""
    adapter = AdapterConfig()
    return LoraConfig(
        r=adapter.rank, lora_alpha=int(adapter.lora_alpha), task_type=TaskType.CAUSAL_LM
    )


def plain_model(name: str, precision: str) -> Any:
    """Return the base model as transformers loads it, on the best device."""
    dtype = getattr(torch, precision)
    return pretrained(AutoModelForCausalLM, name, dtype=dtype).to(best_device())


def row(item: Prompted) -> Row:
    """Return an example as :func:`collate` takes it: only the answer has a loss."""
    return {
        "input_ids": [*item.prompt, *item.answer],
        "labels": [*[IGNORED] * len(item.prompt), *item.answer],
    }


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Return a batch, padded on the right."""
    longest = max(len(each["input_ids"]) for each in rows)

    def padded(key: str, value: int) -> torch.Tensor:
        return torch.tensor([[*r[key], *[value] * (longest - len(r[key]))] for r in rows])

    real = [[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in rows]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", IGNORED),
        "attention_mask": torch.tensor(real),
    }


class CausalTrainerWork:
    """One model that keeps learning, window after window."""

    def __init__(self, workload: Workload, precision: str, name: str) -> None:
        asked = questions(workload.total, workload.tokens, workload.options)
        tokenizer = pretrained(AutoTokenizer, name)
        config = ModelConfig(family="causal-lm", name=name)
        train, self._held_out = (
            prompted(tokenizer, config, examples, asked.labels, workload.tokens)
            for examples in (asked.train, asked.held_out)
        )
        self._turn = Turn(workload, [row(item) for item in train])
        self._arguments = training_arguments(workload.batch_size, precision, "random")
        self._watch = Stopwatch()
        torch.manual_seed(0)
        self._model = get_peft_model(plain_model(name, precision), lora_config())

    def window(self) -> Mapping[str, float]:
        """One epoch over the next examples."""
        data = self._turn.next()
        quiet_trainer(self._model, self._arguments, data, collate, self._watch).train()
        return {"work": len(data), "seconds": self._watch.seconds}

    def report(self) -> Mapping[str, float]:
        """Threads, and the mean loss of an answer that was not trained on."""
        self._model.eval()
        losses = []
        for item in self._held_out:
            ids = torch.tensor([[*item.prompt, *item.answer]], device=self._model.device)
            with torch.no_grad():
                logits = self._model(input_ids=ids).logits[0, len(item.prompt) - 1 : -1].float()
            losses.append(cross_entropy(logits, ids[0, len(item.prompt) :]))
        return {"threads": torch.get_num_threads(), "loss": float(torch.stack(losses).mean())}


def causal_trainer_work(workload: Workload, precision: str, name: str) -> CausalTrainerWork:
    """Set up in a process of its own."""
    warnings.simplefilter("ignore")  # upstream's own
    return CausalTrainerWork(workload, precision, name)
