"""The local step beside the Hugging Face Trainer with PEFT: the embedded encoder, and a language
model. All learn a LoRA adapter of the default rank from the same medical questions."""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn

from deal_core.config.data import DataConfig
from deal_core.config.experiment import AdapterConfig, ModelConfig, TrainConfig
from deal_core.data import Example
from deal_core.data.embedded_tasks import TASKS, EmbeddedTasks
from deal_core.deal.objective import Plain
from deal_core.lora.adapter import orthogonal_init, zero_adapter
from deal_core.lora.attach import read, write
from deal_core.models import load_model
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.models.loading import best_device, locate, pretrained, quiet
from deal_core.models.prompt import INSTRUCTION, read_template, words
from deal_core.randomness import seeded
from deal_core.training.hardware import compute_dtype, keep_memory
from deal_core.training.loop import NonPrivateGradients, run_local_steps
from measuring import Contestant, Figures, Window, measured

MINILM, SMOLLM2 = ModelConfig().name, "embedded:smollm2"
KNOWN = tuple(label for labels in TASKS.values() for label in labels)
LONGEST = 512
FACTORS = frozenset({"lora_A", "lora_B"})
SIZES = {
    "small": (((12, 2, 4),), ((12, 2, 4, 5),)),
    "usual": (((0, 8, 8),), ((32, 2, 2, 3),)),
    "full": (
        ((0, 16, 512), (32, 16, 256), (64, 16, 128), (128, 16, 64), (256, 16, 32), (128, 32, 64)),
        ((64, 16, 32, 14), (64, 8, 16, 3), (128, 8, 8, 3), (256, 8, 8, 3)),
    ),
}
"""Of encoder and language model: tokens, batch, examples and options of each table."""


@dataclass(frozen=True)
class Case:
    """What all contestants of a table learn. Attributes: base model, tokens of every text (0: as
    it is), examples of an optimiser step and of a window (each has the same), labels."""

    name: str
    tokens: int
    batch_size: int
    examples: int
    options: int = 3

    @property
    def causal(self) -> bool:
        """Whether it is a language model."""
        return self.name != MINILM

    @property
    def title(self) -> str:
        """Of the table."""
        texts = f"{self.tokens or 'real'} tokens, {self.options} options"
        return f"{self.name}: {texts}, batch {self.batch_size}"


def questions(case: Case, labels: Sequence[str] = KNOWN) -> tuple[list[Example], Sequence[str]]:
    """Return examples and their labels; a text is repeated to as many words as it has tokens."""
    task = EmbeddedTasks(DataConfig()).load(next(iter(TASKS)))
    labels, examples = labels[: case.options], []
    for number in range(case.examples):
        example = task.train[number % len(task.train)]
        times = case.tokens // max(1, len(example.text.split())) + 1
        label = example.label if example.label in labels else labels[0]
        examples.append(Example(" ".join([example.text] * times), label))
    return examples, labels


def fresh_model(case: Case, dtype: torch.dtype, first_layer: int = 0) -> LanguageModel:
    """Return a model with a new adapter, as a client has it."""
    config = ModelConfig(family="causal-lm" if case.causal else "encoder-labels", name=case.name)
    adapter = AdapterConfig(first_layer=first_layer)
    model = load_model(config, adapter, case.tokens or LONGEST, dtype)
    before = read(model.module)
    zero = zero_adapter(before.shapes, 1)
    write(model.module, orthogonal_init(zero, before.rank, before.scaling, seeded(0, "bench")))
    return model


def ordinary(data: Sequence[Encoded], config: TrainConfig) -> Any:
    """Return the gradients of an epoch."""
    return NonPrivateGradients(data, 1, config, seeded("bench"))


def deal_step(
    case: Case,
    dtype: torch.dtype,
    first_layer: int = 0,
    factors: frozenset[str] = FACTORS,
    gradients: Callable[[Sequence[Encoded], TrainConfig], Any] = ordinary,
) -> Window:
    """Return what a client does with a task, an epoch a window."""
    keep_memory()
    model = fresh_model(case, dtype, first_layer)
    examples, labels = questions(case)
    data = model.encode(examples, labels)
    objective, config = Plain(model, labels, data), TrainConfig(batch_size=case.batch_size)

    def window() -> dict[str, float]:
        source = gradients(data, config)
        step = (model, objective, source, factors, config)
        return {"work": len(data), **measured(lambda: run_local_steps(*step))}

    return window


def trainer_step(case: Case, dtype: torch.dtype) -> Window:
    """Return PEFT with the Trainer, as their documentation shows, an epoch a window."""
    warnings.simplefilter("ignore")  # upstream's own
    torch.manual_seed(0)
    model, rows, collate = causal_parts(case, dtype) if case.causal else encoder_parts(case)
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not torch.cuda.is_available(),
        bf16=dtype == torch.bfloat16,
        per_device_train_batch_size=case.batch_size,
        num_train_epochs=1,
        learning_rate=TrainConfig().learning_rate,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        label_names=["labels"],
    )

    def window() -> dict[str, float]:
        trainer = transformers.Trainer(model, arguments, collate, rows)
        trainer.remove_callback(transformers.PrinterCallback)
        return {"work": len(rows), "seconds": trainer.train().metrics["train_runtime"]}

    return window


def lora(kind: TaskType, **where: Any) -> LoraConfig:
    """Return PEFT's settings of an adapter like ours."""
    config = AdapterConfig()
    return LoraConfig(r=config.rank, lora_alpha=int(config.lora_alpha), task_type=kind, **where)


def encoder_parts(case: Case) -> tuple[nn.Module, list[Any], Any]:
    """Return the model with a head on the labels, its examples, and what makes a batch of them."""
    examples, labels = questions(case)
    tokenizer = pretrained(transformers.AutoTokenizer, case.name)
    texts = [each.text for each in examples]
    ids = tokenizer(texts, truncation=True, max_length=case.tokens or LONGEST)["input_ids"]
    rows = [
        {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels.index(e.label)}
        for tokens, e in zip(ids, examples, strict=True)
    ]
    kind, place = transformers.AutoModelForSequenceClassification, locate(case.name)[0]
    with quiet():
        base = kind.from_pretrained(place, num_labels=len(labels))
    model = get_peft_model(base, lora(TaskType.SEQ_CLS, target_modules=["query", "value"]))
    return model, rows, transformers.DataCollatorWithPadding(tokenizer)


def causal_parts(case: Case, dtype: torch.dtype) -> tuple[nn.Module, list[Any], Any]:
    """Return the model with its base in our precision, its examples, of which answers alone have a
    loss, and what makes a batch of them."""
    tokenizer = pretrained(transformers.AutoTokenizer, case.name)
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    rows = [
        {
            "input_ids": [*prompt, *answer],
            "attention_mask": [1] * (len(prompt) + len(answer)),
            "labels": [*[-100] * len(prompt), *answer],
        }
        for prompt, answer in prompts(case, tokenizer, *questions(case))
    ]
    model = get_peft_model(plain_causal(case.name, dtype), lora(TaskType.CAUSAL_LM))
    return model, rows, transformers.DataCollatorForSeq2Seq(tokenizer)


def plain_causal(name: str, dtype: torch.dtype) -> Any:
    """Return the language model as transformers loads it."""
    return pretrained(transformers.AutoModelForCausalLM, name, dtype=dtype).to(best_device())


def prompts(
    case: Case, tokenizer: Any, examples: Sequence[Example], labels: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """Return tokens of prompt and answer of every example, as the family ``causal-lm`` has them."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    config = ModelConfig()
    before, after = read_template(config.template).around(INSTRUCTION, labels)
    marks = tokenizer.bos_token_id, tokenizer.eos_token_id
    start, end = ([] if mark is None else [mark] for mark in marks)
    return [
        (
            [*start, *ids(before), *ids(each.text)[: case.tokens], *ids(after)],
            [*ids(f" {words(each.label)}"), *end],
        )
        for each in examples
    ]


def usual_precision() -> torch.dtype:
    """Return the precision that a run has here."""
    return compute_dtype(TrainConfig(), best_device())


def contestants(case: Case) -> list[Contestant]:
    """Return who is compared: the Trainer, of an encoder in float32, comes first."""
    usual = usual_precision()
    precisions = [usual] if case.causal else list(dict.fromkeys([torch.float32, usual]))
    found = [
        Contestant(f"{name}, {str(dtype)[6:]}", make, (case, dtype))
        for dtype in precisions
        for name, make in (("Trainer", trainer_step), ("deal", deal_step))
    ]
    if case.causal:
        half = pretrained(transformers.AutoConfig, case.name).num_hidden_layers // 2
        upper = (case, precisions[0], half)
        found.append(Contestant("deal, lower half cached, not adapted", deal_step, upper))
    return found


def main(given: Sequence[str] | None = None, causal: str = SMOLLM2) -> None:
    """Measure and show case by case."""
    figures = Figures("step", __doc__, given)
    for name, sizes in zip((MINILM, causal), SIZES[figures.size], strict=True):
        for size in sizes:
            case = Case(name, *size)
            figures.race(case.title, contestants(case))


if __name__ == "__main__":
    main()
