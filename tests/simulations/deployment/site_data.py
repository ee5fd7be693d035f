"""Real questions, divided among sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

LABELS = {"laboratory": ["Pathology", "Pharmacology"], "surgery": ["Radiology", "Surgery"]}
SITES = {"north": ".csv", "south": ".jsonl", "west": ".parquet"}

Rows = Sequence[Mapping[str, str]]


def questions(train: int = 18, test: int = 9) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Task to split to rows of real questions, so many of a label, always in the same order;
    where there are too few tests, training rows that nobody trains on are some."""
    from deal_core.config.data import DataConfig
    from deal_core.data import open_source

    source = open_source(DataConfig(tasks=tuple(LABELS)))
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    for task, labels in LABELS.items():
        data = source.load(task)
        rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
        for label in labels:
            known, kept = ([e for e in s if e.label == label] for s in (data.train, data.test))
            for split, examples in (
                ("train", known[:train]),
                ("test", [*kept, *known[train:]][:test]),
            ):
                rows[split] += [{"text": e.text, "label": label} for e in examples]
        found[task] = rows
    return found


def write_rows(path: Path, rows: Rows) -> None:
    import pandas as pd

    table = pd.DataFrame(list(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_parquet(path)


def divide(folder: Path, sites: Mapping[str, str] = SITES, train: int = 18, test: int = 9) -> None:
    """``folder/SITE/TASK/SPLIT`` in a format for each site, and ``folder/all`` with a column
    that says whose row it is."""
    for task, splits in questions(train, test).items():
        for split, rows in splits.items():
            whole = []
            for k, (site, suffix) in enumerate(sites.items()):
                own = rows[k :: len(sites)]
                write_rows(folder / site / task / f"{split}{suffix}", own)
                whole += [{**row, "site": site} for row in own]
            write_rows(folder / "all" / task / f"{split}.jsonl", whole)
