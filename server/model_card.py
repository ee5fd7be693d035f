"""The model card of an adapter folder: what it is, how good, how private; Markdown for people."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from deal_core.atomic_write import atomic_write
from deal_core.errors import choose
from deal_core.inference.folder import AdapterFolder, Inference
from deal_core.lora.kinds import KINDS, rule_of
from deal_core.methods import KEEP_TEXTS
from deal_core.models.loading import with_revision
from deal_core.privacy.events import GROUP
from deal_core.training.text_overlap import TEXT_MEASURES
from server.results import VOID, Privacy, Results, rounded_up

TITLE = "# Adapter of a federated run"
NOT_HERE = ", its weights are not in this folder"
HERE = ", its weights are in `{}`"
PEFT = "library_name: peft\n"
LORA = "- lora\n"


def write_card(folder: Path, results: Results, inference: Inference) -> None:
    """Write ``README.md`` of an adapter folder."""
    atomic_write(AdapterFolder(folder).card, model_card(results, inference))


def model_card(results: Results, inference: Inference) -> str:
    """Return the card. It holds what ``results.json`` and ``inference.json`` hold, and the date."""
    parts = [
        _front_matter(inference),
        TITLE,
        as_text(results.config.description),
        "\n".join(_facts(results, inference)),
        "## Tasks",
        "\n".join(_tasks(results, inference)),
        _experts(inference),
        "## Measures",
        "\n".join(_measures(results)),
        "## Privacy",
        privacy_lines(results),
        "## Use",
        _use(inference),
        "## Versions",
        ", ".join(f"{name} {number}" for name, number in inference.versions.items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def merged_card(card: str, use: str, heads: bool = False) -> str:
    """Return the card of an adapter as that of base model and adapter in one.

    Args:
        card: of the adapter folder.
        use: the section on use.
        heads: it has class means, which are in no merged model.
    """
    title = "# Base model and adapter of a federated run, merged"
    if heads:
        title += (
            "\n\n**Every accuracy below is of the adapter with class means, which this checkpoint "
            "does not have. By names or words alone, as it answers, it was not measured, and may "
            "be several points less.**"
        )
    text = card.replace(PEFT, "library_name: transformers\n", 1)
    return with_use(text.replace(TITLE, title, 1).replace(NOT_HERE, "", 1), use)


def with_base(card: str, folder: str) -> str:
    """Return the card of a folder that has the base model in it, in a folder of its own."""
    return card.replace(NOT_HERE, HERE.format(folder), 1)


def with_use(card: str, use: str) -> str:
    """Return the card with another section on use."""
    before, heading, after = card.partition("## Versions\n")
    kept = before.partition("## Use\n")[0]
    return f"{kept}## Use\n\n{use}\n\n{heading}{after}"


def hub_name(inference: Inference) -> str:
    """Return the base model's name on the Hugging Face hub, without a revision; empty where it is a
    folder."""
    name = with_revision(inference.upstream or inference.model.name)[0]
    is_hub = name.count("/") <= 1 and not name.startswith((".", "/", "~", "embedded:"))
    return name if is_hub and not Path(name).exists() else ""


def _front_matter(inference: Inference) -> str:
    """Return what the hub reads."""
    base = hub_name(inference)
    peft, lora = (PEFT, LORA) if _is_for_peft(inference) else ("", "")
    named = f"base_model: {base}\n" if base else ""
    return f"---\n{peft}{named}tags:\n{lora}- federated-learning\n---"


def _is_for_peft(inference: Inference) -> bool:
    """Whether PEFT alone loads the adapter."""
    return choose("adapter_kind", inference.adapter_kind, KINDS).map_behind is None


def _facts(results: Results, inference: Inference) -> list[str]:
    config = results.config
    rule = rule_of(config.adapter, config.aggregation)
    upstream = f" (from {inference.upstream})" if inference.upstream else ""
    rounds = sum(stage.rounds for stage in results.stages)
    texts = "; clients kept texts" if config.method.name in KEEP_TEXTS else ""
    return [
        f"- Base model: `{inference.model.name}`{upstream}, family `{inference.model.family}`; "
        f"frozen{_bits(inference)}{NOT_HERE}",
        f"- Method: `{config.method.name}`{texts}; aggregation rule: `{rule}`, "
        f"robust step: `{config.aggregation.robust}`",
        f"- Clients: {config.federation.clients}; rounds of learning: {rounds} in "
        f"{len(results.stages)} stages, schedule `{config.stream.schedule}`; seed {results.seed}",
        f"- Engine: `{results.engine}`; written {datetime.now(UTC):%Y-%m-%d}",
    ]


def as_text(words: str) -> str:
    """Return somebody's words as one line that opens no section, no tag and no link of its own."""
    line = " ".join(words.split())
    line = line.replace("\\", "\\\\")
    return line.replace("<", "&lt;").replace("[", "\\[").lstrip("#")


def _bits(inference: Inference) -> str:
    bits = inference.model.bits
    return f", weights of {bits} bits (bitsandbytes)" if bits else ""


def _tasks(results: Results, inference: Inference) -> list[str]:
    """A row for each task; accuracies at the end of the run."""
    own = results.accuracy_matrix[-1] if results.accuracy_matrix else []
    among = results.class_incremental
    among_all = among.accuracy_matrix[-1] if among is not None else []
    lines = ["| task | labels | accuracy, task told | among all labels |", "|---|---|---:|---:|"]
    for j, task in enumerate(inference.tasks):
        answers, kind = ", ".join(task.labels) or "answers are texts", ""
        measure = results.measures.get(task.name, "accuracy")
        if measure != "accuracy":
            kind = f" ({TEXT_MEASURES[measure].title})"
        cells = [task.name, answers, _percent(own, j) + kind, _percent(among_all, j)]
        lines.append("| " + " | ".join(as_text(cell).replace("|", "\\|") for cell in cells) + " |")
    return lines


def _experts(inference: Inference) -> str:
    """Return what the accuracies are of, where label heads answer."""
    if not inference.head_layers:
        return ""
    if not inference.names_weight:
        return "Measured with the label heads of `heads.safetensors` alone."
    others = "names of labels" if inference.pooling == "mean" else "the likelihood of words"
    beside = f"class means (`heads.safetensors`) beside {others}"
    return f"Measured with {beside}; without them it may be less."


def _percent(row: list[float], place: int) -> str:
    return f"{100 * row[place]:.1f} %" if place < len(row) else "not known"


def _measures(results: Results) -> list[str]:
    rows = [
        ("average accuracy", results.average_accuracy, "%"),
        ("backward transfer", results.backward_transfer, "points"),
        ("forward transfer", results.forward_transfer, "points"),
        ("forgetting", results.forgetting, "points"),
    ]
    among = results.class_incremental
    if among is not None:
        rows += [
            ("average accuracy among all labels", among.average_accuracy, "%"),
            ("backward transfer among all labels", among.backward_transfer, "points"),
        ]
    known = [f"- {name}: {100 * x:.1f} {unit}" for name, x, unit in rows if x is not None]
    return known or ["Not known: counts of right answers were kept by clients, or lost."]


def privacy_lines(results: Results) -> str:
    """Return what is guaranteed, to whom, and over what; or that nothing is."""
    privacy = results.privacy
    if privacy.mechanism == "none":
        return (
            "**None.** No text left its client, but nothing formal keeps the adapter from telling "
            "of the records that it was trained on. Share it as you would share them."
        )
    if not privacy.epsilon or privacy.delta is None or privacy.unit is None:
        return f"Mechanism `{privacy.mechanism}`; no guarantee was recorded."
    return "\n".join(_guarantee(privacy, results))


def _guarantee(privacy: Privacy, results: Results) -> list[str]:
    largest = max(privacy.epsilon.values())
    lines = [
        f"- epsilon <= {rounded_up(largest, 3)} at delta = {rounded_up(privacy.delta or 0.0, 3)}, "
        f"largest over {privacy.tellers}",
        f"- Unit: one {_unit(privacy)}; composed over {privacy.extent}",
        f"- Assumed honest: {privacy.trust}",
    ]
    if privacy.void:
        lines.append(f"- **{VOID[0].upper()}{VOID[1:]}**")
    if privacy.simulation_only:
        lines.append("- **Simulation only**: the noise came from a seed, so nothing is guaranteed")
    if privacy.metrics in ("clear", "summed") and results.accuracy_matrix:
        lines.append("- The accuracies above are of test records, without noise: outside of it")
    return lines


def _unit(privacy: Privacy) -> str:
    """Return what one unit is; a group in words: readers of a card have no documents at hand."""
    if privacy.unit != GROUP:
        return str(privacy.unit)
    return f"group, all records of a client with one value of '{privacy.unit_column}'"


def _use(inference: Inference) -> str:
    task = "" if inference.pooling == "mean" else f" --task {inference.tasks[0].name}"
    readers = "PEFT and transformers" if _is_for_peft(inference) else "transformers"
    return (
        f'```\ndeal predict . "a text"{task}\n'
        f"deal export . --to DIR              # for {readers}, without this project\n```"
    )
