"""A learnt model that answers, text by text, as the evaluation does; and its calibration."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from deal_core.atomic_write import atomic_write
from deal_core.config.experiment import AdapterConfig, ModelConfig, TrainConfig
from deal_core.data import Example
from deal_core.data.tags import marked
from deal_core.errors import UserError, choose
from deal_core.inference.folder import AdapterFolder, Answer, Inference, Written, read_inference
from deal_core.lora.adapter import Adapter, LoraFactors, split
from deal_core.lora.kinds import kind_of
from deal_core.lora.payload import PREFIX
from deal_core.lora.state import Component, State
from deal_core.models import load_model, skeleton
from deal_core.models.generating import GeneratingModel
from deal_core.models.interface import Encoded, LanguageModel, text_alone
from deal_core.models.loading import best_device
from deal_core.models.tokens import TokenLabels
from deal_core.training.evaluation import (
    AnswerSpace,
    Scorer,
    answer_space,
    base_embeddings,
    by_heads,
    by_name,
    finite_scores,
    route,
    tagged,
)
from deal_core.training.hardware import compute_dtype
from deal_core.training.loop import evaluation_batches, load_state


@dataclass(frozen=True)
class Predictor:
    """A base model with all adapters (``state``), and the label heads of tasks."""

    inference: Inference
    model: LanguageModel
    heads: Mapping[str, Tensor]
    state: State
    temperatures: Mapping[str, float] = field(default_factory=dict)
    """Task ("": none is named) to what scores are divided by before their softmax."""

    def answer(self, text: str, task: str = "") -> Answer | Written:
        """Return the answer to one text, computed alone, so that it depends on no other; see
        :meth:`answers`."""
        return self.answers([text], task)[0]

    def answers(self, texts: Sequence[str], task: str = "") -> list[Answer | Written]:
        """Return for each text its label, among those of the ``task``, or, where none is named, of
        all tasks learnt; what the model writes where the task has no labels; or the text, entities
        marked. Texts share passes, as in evaluations, which changes scores by rounding.

        Raises:
            UserError: unknown task; or none, and the family scores labels of one task at a time.
        """
        if not texts or not self.state.components:
            return self._answered(texts, task, task) if texts else []
        routed = [task] * len(texts) if task else self._routed(texts)
        found: dict[int, Answer | Written] = {}
        for own in dict.fromkeys(routed):
            load_state(self.model, self.state.view(self.state.place_of(own)))
            places = [place for place, other in enumerate(routed) if other == own]
            answers = self._answered([texts[place] for place in places], own, task)
            found.update(zip(places, answers, strict=True))
        return [found[place] for place in range(len(texts))]

    def _answered(self, texts: Sequence[str], task: str, named: str) -> list[Answer | Written]:
        """``named``: the task that was asked for; empty: none was."""
        space, labels = self._space(task)
        instruction, written = self.inference.instruction(task), not labels
        if isinstance(self.model, TokenLabels):
            data = self.model.encode([Example(text, "") for text in texts], labels)
            pairs = zip(texts, tagged(self.model, data, labels), strict=True)
            return [Written(task, marked(text, tags)) for text, tags in pairs]
        found: dict[int, Answer | Written] = {}
        if isinstance(self.model, GeneratingModel) and written:
            asked = [Example(text, "", target=text) for text in texts]
            data = self.model.encode(asked, (), instruction)
            for batch in evaluation_batches(data):
                answers = self.model.write([data[place] for place in batch])
                found.update(zip(batch, (Written(task, each) for each in answers), strict=True))
            return [found[place] for place in range(len(data))]
        data = self.model.encode([Example(text, labels[0]) for text in texts], labels, instruction)
        score = self._scorer(data, space, task)
        chosen = list(space.own) if task else list(range(len(space.columns)))
        temperature = self.temperatures.get(named, 1.0)
        for batch in evaluation_batches(data):
            for place, row in zip(batch, finite_scores(score, batch).double().cpu(), strict=True):
                found[place] = answer_among(row, space, chosen, temperature)
        return [found[place] for place in range(len(data))]

    def check(self, task: str) -> None:
        """Check that a task, or none, can be answered for.

        Raises:
            UserError: as :meth:`answer`.
        """
        if task or not self.state.components:
            self._space(task)
        else:
            self._routes()

    def _routed(self, texts: Sequence[str]) -> list[str]:
        heads = self._routes()
        data = self.model.encode([Example(text, "") for text in texts], ())
        alone = [text_alone(each) for each in data]
        return route(base_embeddings(self.model, alone, self.inference.head_layers), heads)

    def _routes(self) -> dict[str, Tensor]:
        heads = {task: head for task, head in self.heads.items() if task in self.inference.learnt}
        if not heads:
            raise UserError("the run has no router; name a task with --task")
        return heads

    def _space(self, task: str) -> tuple[AnswerSpace, tuple[str, ...]]:
        """Return the columns that are scored, and the labels that a prompt names."""
        inference, learnt = self.inference, self.inference.learnt
        if task:
            labels = choose("task", task, inference.all_tasks)
            others = learnt if self.model.has_label_logits else {}
            return answer_space(task, labels, others), labels
        if not self.model.has_label_logits or isinstance(self.model, TokenLabels):
            raise UserError(
                f"model.family '{inference.model.family}' scores the labels of one task at a time; "
                f"name it with --task ({', '.join(inference.all_tasks)})"
            )
        if not learnt:
            raise UserError("no task has been learnt; name one with --task")
        first = next(iter(learnt))
        return answer_space(first, learnt[first], learnt), learnt[first]

    def _scorer(self, data: Sequence[Encoded], space: AnswerSpace, task: str) -> Scorer:
        names = by_name(self.model, data, [label for _, label in space.columns])
        if not self.heads or (task and task not in self.heads):
            return names
        texts = [text_alone(each) for each in data] if self.state.components else data
        vectors = base_embeddings(self.model, texts, self.inference.head_layers)
        weight = self.inference.names_weight
        return by_heads(vectors, space, self.heads, names, weight)


def answer_among(
    scores: Tensor, space: AnswerSpace, chosen: Sequence[int], temperature: float = 1.0
) -> Answer:
    """Return the answer among the ``chosen`` columns of a space; a class has the largest score of
    its columns. ``scores``: ``(columns,)``, float64."""
    best: dict[int, int] = {}
    for column in chosen:
        before = best.setdefault(space.classes[column], column)
        if scores[column] > scores[before]:
            best[space.classes[column]] = column
    columns = sorted(best.values())
    logs = torch.log_softmax(scores[columns] / temperature, dim=0)
    shares = logs.exp()
    order = torch.sort(scores[columns], descending=True, stable=True).indices.tolist()
    first, second = columns[order[0]], columns[order[1]] if len(order) > 1 else None
    task, label = space.columns[first]
    return Answer(
        task,
        label,
        float(shares[order[0]]),
        None if second is None else space.columns[second][1],
        None if second is None else float(shares[order[1]]),
        {space.columns[k][1]: log for k, log in zip(columns, logs.tolist(), strict=True)},
    )


def load_predictor(folder: AdapterFolder, base: str = "") -> Predictor:
    """Return a model ready to answer; only the adapter folder and the base model are read, which is
    ``base`` (a folder or a name on the hub), or, where that is empty, the one that the run named.

    Raises:
        UserError: a file is missing or damaged, or the base model cannot be loaded or is another.
    """
    inference = read_inference(folder)
    model_config = inference.model.model_copy(update={"name": base} if base else {})
    adapter, adapter_config = checked_adapter(folder, inference, model_config)
    state = as_evaluated(adapter, inference)
    dtype = compute_dtype(TrainConfig(precision=inference.precision), best_device())
    model = load_model(model_config, adapter_config, inference.max_length, dtype)
    load_state(model, state)
    return Predictor(inference, model, read_heads(folder), state, read_temperatures(folder))


def checked_adapter(
    folder: AdapterFolder, inference: Inference, model: ModelConfig
) -> tuple[Adapter, AdapterConfig]:
    """Return all adapters of a run as one, and how a base model is made ready for them; no weight
    of that is read.

    Raises:
        UserError: a file is missing or damaged, or the base model is not there, or is another.
    """
    adapter = read_adapter(folder)
    if not inference.current_rank <= adapter.rank:
        raise UserError(f"{folder.inference}: current_rank is larger than the adapter's rank")
    config = AdapterConfig(
        kind=inference.adapter_kind,
        rank=max(1, inference.current_rank),
        target_modules=tuple(sorted(adapter.layers)),
    )
    base = skeleton(model)
    kind_of(config).add_layers(base)
    layers = dict(base.named_modules())
    if not all(
        name in layers and set(layers[name].weight.shape) == set(shape)
        for name, shape in adapter.shapes.items()
    ):
        raise UserError(
            f"{folder.weights}: was learnt for another base model than '{model.name}'; "
            "name that with --model"
        )
    return adapter, config


def read_heads(folder: AdapterFolder) -> dict[str, Tensor]:
    """Return task to its label head; :class:`UserError`: damaged."""
    return _tensors(folder.heads) if folder.heads.exists() else {}


def as_evaluated(adapter: Adapter, inference: Inference) -> State:
    """Return the adapter in the parts that evaluations compute it in, so that answers agree to the
    bit where ``current_scaling`` is a power of two."""
    merged, beside = split(adapter, adapter.rank - inference.current_rank)
    scaling = inference.current_scaling
    layers = {n: LoraFactors(f.A, f.B / scaling) for n, f in beside.layers.items()}
    components = tuple(Component(own.tasks, own.rank) for own in inference.components)
    return State(Adapter(layers, scaling), merged, components=components)


def read_adapter(folder: AdapterFolder) -> Adapter:
    """Return all adapters of a run as one (scaling 1).

    Raises:
        UserError: missing, damaged, or not of this project's form.
    """
    if not folder.weights.exists():
        raise UserError(
            f"{folder.path}: no {folder.weights.name}; a merged export has none: name the run "
            "folder"
        )
    tensors = _tensors(folder.weights)
    down, up = ".lora_A.weight", ".lora_B.weight"
    names = [key.removesuffix(down) for key in tensors if key.endswith(down)]
    layers = {
        name.removeprefix(PREFIX): LoraFactors(tensors[name + down], tensors[name + up])
        for name in names
        if name + up in tensors
    }
    if not layers or 2 * len(layers) != len(tensors):
        raise UserError(f"{folder.weights}: holds other tensors than LoRA factors")
    return Adapter(layers)


def _tensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); run the experiment again") from None


# Probabilities that mean what they say: a temperature for each task, found on held-out rows with
# right answers (Guo et al., arXiv 1706.04599). It stays beside the adapter, on the machine whose
# rows they are: no export and no site is given it.
BINS = 15
"""Of confidence, of equal width."""
TEMPERATURES = torch.logspace(-2, 4, 601, dtype=torch.float64).tolist()
"""Those that are tried: steps of 2.3 %."""


def confidences_and_hits(
    logits: Sequence[Sequence[float]], targets: Sequence[int], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return of each row the probability of its likeliest answer, and whether that is the right
    one; ``logits``: log probabilities of all answers, ``targets``: the place of the right one."""
    confidences, places = (_table(logits) / temperature).softmax(1).max(1)
    return confidences, places == torch.tensor([*targets])


def _table(logits: Sequence[Sequence[float]]) -> Tensor:
    """A row each; those with fewer answers, as a router's, end in impossible ones."""
    rows = [torch.tensor([*row], dtype=torch.float64) for row in logits]
    return pad_sequence(rows, batch_first=True, padding_value=-torch.inf)


def gap(confidences: Tensor, hits: Tensor) -> float:
    """Return the expected calibration error (ECE), 0 to 1: how far, on average, confidence is from
    the share of right answers among those of like confidence."""
    bins = (confidences * BINS).long().clamp(max=BINS - 1)
    sums = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, confidences - hits.double())
    return float(sums.abs().sum()) / max(1, len(hits))


def best_temperature(logits: Sequence[Sequence[float]], targets: Sequence[int]) -> float:
    """Return the temperature under which the right answers are likeliest."""
    table, wanted = _table(logits), torch.tensor([*targets])
    return min(TEMPERATURES, key=lambda t: float(cross_entropy(table / t, wanted)))


def calibrate(logits: list[list[float]], targets: list[int]) -> tuple[float, float, float]:
    """Return the temperature that is best for one half of the rows, drawn by an equal seed each
    time, and the calibration error of the other half without and with it."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).tolist()

    def rows(places: list[int]) -> tuple[list[list[float]], list[int]]:
        return [logits[place] for place in places], [targets[place] for place in places]

    fitted, held_back = rows(order[::2]), rows(order[1::2])
    found = best_temperature(*fitted)
    before, after = (gap(*confidences_and_hits(*held_back, each)) for each in (1.0, found))
    return found, before, after


def read_temperatures(folder: AdapterFolder) -> Mapping[str, float]:
    """Return task to its temperature; none where there is no calibration.

    Raises:
        UserError: damaged.
    """
    if not folder.calibration.exists():
        return {}
    try:
        found = json.loads(folder.calibration.read_text(encoding="utf-8"))
        return {str(task): float(value) for task, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder.calibration}: cannot be read ({error}); remove it, and calibrate again"
        ) from None


def write_temperature(folder: AdapterFolder, task: str, temperature: float) -> None:
    """Keep the temperature of a task beside those of others."""
    kept = {**read_temperatures(folder), task: round(temperature, 6)}
    atomic_write(folder.calibration, json.dumps(kept, indent=1) + "\n")
