"""The contestant ``trainer``: PEFT LoRA with the Hugging Face Trainer, as its documentation
shows; and PEFT LoRA with Opacus, which the Trainer does not drive."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from deal_core.config.experiment import AdapterConfig, ModelConfig, TrainConfig
from deal_core.models.loading import pretrained
from simulations.bench.workloads import Turn, Workload, texts

MAX_GRAD_NORM = NOISE_MULTIPLIER = 1.0
Row = dict[str, Any]


class LabelEncoder(nn.Module):
    """The same model as a user of PEFT would write it: cosine of text and label, cross-entropy."""

    def __init__(self, labels: Sequence[str], attention: str = "sdpa") -> None:
        super().__init__()
        adapter, model = AdapterConfig(), ModelConfig()
        base = pretrained(AutoModel, model.name, attn_implementation=attention)
        words = pretrained(AutoTokenizer, model.name)(list(labels), padding=True)
        self.scale = model.logit_scale
        with torch.no_grad():
            ids, mask = (torch.tensor(words[key]) for key in ("input_ids", "attention_mask"))
            self.names = normalize(pooled(base(ids, attention_mask=mask), mask), dim=1)
        lora = LoraConfig(
            r=adapter.rank,
            lora_alpha=int(adapter.lora_alpha),
            target_modules=["query", "value"],
            task_type=TaskType.FEATURE_EXTRACTION,
        )
        self.encoder = get_peft_model(base, lora)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Any]:
        """Loss and logits, as the Trainer wants them."""
        out = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        logits = self.scale * normalize(pooled(out, attention_mask), dim=1).float() @ self.names.T
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def pooled(out: Any, mask: Tensor) -> Tensor:
    """Mean over the real tokens."""
    states: Tensor = out.last_hidden_state.float()
    return (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


class Stopwatch(TrainerCallback):
    """From the start of training to the end of its last step: what ``train()`` does before and
    after is not counted."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Read the clock: the last step's reading stands."""
        self.seconds = time.perf_counter() - self.started


def training_arguments(batch_size: int, precision: str, strategy: str) -> TrainingArguments:
    """Return the Trainer's arguments: one epoch, and nothing that is written."""
    return TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not torch.cuda.is_available(),
        bf16=precision == "bfloat16",
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        learning_rate=TrainConfig().learning_rate,
        lr_scheduler_type="constant",
        train_sampling_strategy=strategy,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        label_names=["labels"],
    )


def quiet_trainer(
    model: Any, arguments: TrainingArguments, data: Any, collate: Any, watch: Stopwatch
) -> Trainer:
    """Return a Trainer that prints nothing and reads the clock."""
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=collate,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class TrainerWork:
    """One model that keeps learning, window after window."""

    def __init__(self, workload: Workload, precision: str, strategy: str) -> None:
        loaded = texts(workload)
        self._turn = Turn(workload, [row(*example) for example in loaded.train])
        self._test = [row(*example) for example in loaded.test]
        tokenizer = pretrained(AutoTokenizer, ModelConfig().name)
        self._arguments = training_arguments(workload.batch_size, precision, strategy)
        self._collate = DataCollatorWithPadding(tokenizer)
        self._watch = Stopwatch()
        torch.manual_seed(0)
        self._model = LabelEncoder(loaded.labels)

    def window(self) -> Mapping[str, float]:
        """One epoch over the next examples."""
        data = self._turn.next()
        trainer = self._trainer(data)
        trainer.train()
        return {"work": len(data), "seconds": self._watch.seconds}

    def report(self) -> Mapping[str, float]:
        """Accuracy on questions that were not trained on."""
        test: Any = self._test
        predicted: Any = self._trainer(test).predict(test)
        right = predicted.predictions.argmax(1) == predicted.label_ids
        return {"accuracy": float(right.mean())}

    def _trainer(self, data: Any) -> Trainer:
        return quiet_trainer(self._model, self._arguments, data, self._collate, self._watch)


class OpacusWork:
    """PEFT LoRA and Opacus' hooks in a plain loop, padded batches in random order."""

    def __init__(self, workload: Workload) -> None:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        loaded = texts(workload)
        self._turn = Turn(workload, [row(*example) for example in loaded.train])
        self._collate = DataCollatorWithPadding(pretrained(AutoTokenizer, ModelConfig().name))
        self._batch_size = workload.batch_size
        torch.manual_seed(0)
        self._model = GradSampleModule(LabelEncoder(loaded.labels).train())
        learning = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = DPOptimizer(
            torch.optim.AdamW(learning, lr=TrainConfig().learning_rate, fused=True),
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=MAX_GRAD_NORM,
            expected_batch_size=workload.batch_size,
        )

    def window(self) -> Mapping[str, float]:
        """One epoch over the next examples."""
        data = self._turn.next()
        order = torch.randperm(len(data)).tolist()
        for start in range(0, len(order), self._batch_size):
            batch = self._collate([data[i] for i in order[start : start + self._batch_size]])
            self._model(**batch)["loss"].backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        return {"work": len(data)}

    def report(self) -> Mapping[str, float]:
        """Return no figure beside the time."""
        return {}


def row(tokens: Sequence[int], target: int) -> Row:
    """An example as the Trainer's collator takes it."""
    return {"input_ids": list(tokens), "attention_mask": [1] * len(tokens), "labels": target}


def trainer_work(workload: Workload, precision: str, strategy: str = "random") -> TrainerWork:
    """Set up in a process of its own."""
    warnings.simplefilter("ignore")  # upstream's own
    return TrainerWork(workload, precision, strategy)


def opacus_work(workload: Workload) -> OpacusWork:
    """Set up in a process of its own."""
    warnings.simplefilter("ignore")
    return OpacusWork(workload)
