from __future__ import annotations

from pathlib import Path

import pytest

from simulations.study.outcome import AmongAll, Outcome
from simulations.study.page import markdown
from simulations.study.results import CellResult, StudyResults
from simulations.study.study_file import Study, StudyFile, load_study
from simulations.study.tables import (
    ALL_LABELS,
    age_table,
    arms_table,
    best_of,
    significance,
)

STUDY = """
description = "What is compared"
seeds = [0, 1]
candidate = "deal"
[arms.weak]
[arms.good]
label = "Good | old"
[arms.deal]
label = "DEAL"
[arms.replay]
reference = true
note = "not private"
[arms.joint]
bound = "joint"
"""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    path = tmp_path / "mine.toml"
    path.write_text(STUDY)
    return load_study(str(path))


def cell(
    arm: str,
    seed: int,
    matrix: list[list[float]],
    setting: str = "",
    order: str = "",
    zero_shot: tuple[float, float] = (0.1, 0.3),
) -> CellResult:
    in_turn = len(matrix) > 1
    found = Outcome(
        tasks=["a", "b"],
        accuracy_matrix=matrix,
        begun=[0, int(in_turn)],
        learnt=[0, int(in_turn)],
        zero_shot=dict(zip("ab", zero_shot, strict=True)),
        average_accuracy=sum(matrix[-1]) / 2,
        learning_accuracy=(matrix[0][0] + matrix[-1][1]) / 2,
        backward_transfer=matrix[1][0] - matrix[0][0] if in_turn else None,
        forward_transfer=matrix[0][1] - 0.3 if in_turn else None,
        forgetting=matrix[0][0] - matrix[1][0] if in_turn else None,
        worst_client=0.5,
        seconds=65.0,
        peak_rss_bytes=800_000_000,
        bytes_up=1.5e6,
        bytes_down=3e6,
    )
    bound = "joint" if arm == "joint" else ""
    place = {"arm": arm, "order": order, "setting": setting, "seed": seed}
    return CellResult.model_validate({**place, "bound": bound, "settings": {}, "outcome": found})


CELLS = [
    cell("weak", 0, [[0.8, 0.3], [0.4, 0.8]]),
    cell("good", 0, [[0.8, 0.3], [0.6, 0.8]]),
    cell("deal", 0, [[0.8, 0.3], [0.7, 0.8]]),
    cell("replay", 0, [[0.8, 0.3], [0.8, 0.9]]),
    cell("joint", 0, [[0.9, 0.9]]),
    cell("weak", 1, [[0.9, 0.3], [0.5, 0.8]]),
    cell("good", 1, [[0.9, 0.3], [0.7, 0.8]]),
    cell("deal", 1, [[0.9, 0.3], [0.84, 0.8]]),
]


def rows(lines: list[str]) -> dict[str, list[str]]:
    """First cell of every row of a table to the others."""
    split = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines if "|" in line]
    return {first: others for first, *others in split[2:]}


def test_arms_have_means_intervals_and_marks(study: Study) -> None:
    table = rows(list(arms_table(study, CELLS)))
    # 0.75 and 0.82: standard error 0.035, t(0.975, 1) = 12.706
    assert table["DEAL"][:3] == ["2", "78.5 ± 44.5", "-8.0 ± 25.4"]
    assert table["replay (not private)"][:3] == ["1", "85.0", "+0.0"]  # one cell: no interval
    assert table["joint (bound)"] == ["1", "90.0", "–", "–", "–", "90.0", "50.0"]
    assert table["zero-shot (bound)"][:2] == ["2", "20.0 ± 0.0"]
    assert list(table)[1:] == [
        "weak",
        "Good \\| old",
        "DEAL",
        "replay (not private)",
        "joint (bound)",
    ]


def test_accuracy_among_all_labels_stands_beside_where_it_is_known(study: Study) -> None:
    found = AmongAll(
        accuracy_matrix=[[0.8, 0.0], [0.1, 0.3]],
        average_accuracy=0.2,
        backward_transfer=-0.7,
        forgetting=0.7,
    )
    told = [
        c.model_copy(update={"outcome": c.outcome.model_copy(update={"class_incremental": found})})
        for c in CELLS[:1]
    ]
    table = rows(list(arms_table(study, [*told, *CELLS[1:]])))
    assert table["weak"][:3] == ["2", "62.5 ± 31.8", "20.0 (1)"]
    assert table["DEAL"][:3] == ["2", "78.5 ± 44.5", "–"]


def test_an_order_cannot_change_zero_shot(study: Study) -> None:
    """Nothing was learnt: the same texts, hence one value for each seed. Orders of other tasks have
    values of their own."""
    matrix = [[0.8, 0.3], [0.4, 0.8]]
    places = [(seed, order) for seed in (0, 1) for order in "ABC"]
    cells = [cell("weak", seed, matrix, order=order) for seed, order in places]
    assert rows(list(arms_table(study, cells)))["zero-shot (bound)"][0] == "2"
    third = cells[0].outcome.model_copy(update={"zero_shot": {"a": 0.1, "b": 0.3, "c": 0.5}})
    longer = cell("weak", 0, matrix, order="D").model_copy(update={"outcome": third})
    lines = list(arms_table(study, [*cells, longer]))
    assert rows(lines)["zero-shot (bound)"][0] == "3"


def test_the_best_baseline_is_never_the_candidate_nor_a_reference(study: Study) -> None:
    table = "\n".join(significance(study, CELLS))
    assert "have in common, is Good" in table
    assert "| replay (not private) | DEAL | 1 | +10.0 | – |" in table
    assert "| DEAL | replay" not in table
    assert "joint" not in table
    # on the seed that both have, weak is ahead; its hard seed 1 is no fault of its own
    assert best_of({"weak": {0: 0.9, 1: 0.5}, "good": {0: 0.8}}) == "weak"


def test_differences_are_paired_by_seed(study: Study) -> None:
    found = [line for line in significance(study, CELLS) if line.startswith("| DEAL | Good")]
    # 0.75 - 0.70 and 0.82 - 0.75: 6 points, standard error 1, t(0.975, 1) = 12.706
    assert found == ["| DEAL | Good \\| old | 2 | +6.0 ± 12.7 | 0.105 |"]
    one_seed = [line for line in significance(study, CELLS[:3]) if line.startswith("| weak | DEAL")]
    assert one_seed == ["| weak | DEAL | 1 | -15.0 | – |"]
    assert list(significance(study, CELLS[:1])) == ["One arm alone: nothing to compare."]


def test_differences_among_all_labels_are_of_the_cells_that_have_counted_that(study: Study) -> None:
    def among_all(cell: CellResult, value: float) -> CellResult:
        found = {"accuracy_matrix": [[value]], "average_accuracy": value}
        more = AmongAll(**found, backward_transfer=None, forgetting=None)
        outcome = cell.outcome.model_copy(update={"class_incremental": more})
        return cell.model_copy(update={"outcome": outcome})

    values = {("deal", 0): 0.6, ("deal", 1): 0.7, ("good", 0): 0.5, ("weak", 0): 0.4}
    cells = [among_all(c, values[c.arm, c.seed]) if (c.arm, c.seed) in values else c for c in CELLS]
    lines = list(significance(study, cells, ALL_LABELS))
    assert [line for line in lines if line.startswith("| DEAL")] == [
        "| DEAL | Good \\| old | 1 | +10.0 | – |"
    ]
    assert not [line for line in lines if "replay" in line]
    results = StudyResults(study="mine", description="", wanted=10, defaults={}, cells=cells)
    assert "## Differences among all labels" in markdown(study, results)
    without = results.model_copy(update={"cells": CELLS})
    assert "among all labels" not in markdown(study, without)


def test_runs_of_different_precision_are_no_pair(study: Study) -> None:
    other = {"": {"train.precision": "bfloat16"}}
    changed = [c.model_copy(update={"settings": other}) if c.seed else c for c in CELLS]
    assert rows(list(significance(study, changed)))["DEAL"][1] == "2"
    mixed = [c.model_copy(update={"settings": other}) if c is CELLS[-1] else c for c in CELLS]
    assert rows(list(significance(study, mixed)))["DEAL"][1] == "1"


def test_an_arm_without_a_pair_is_named_and_the_fallback_said(study: Study) -> None:
    """A reader must not take the comparison for one of all."""
    matrix = [[0.5, 0.1], [0.4, 0.6]]
    told = [cell("deal", 0, matrix), cell("good", 0, matrix), cell("weak", 1, matrix)]
    lines = list(significance(study, told))
    assert "by each one's own cells" in lines[0]
    assert lines[-1] == "Not compared, for want of a pair: weak."
    lines = list(significance(study, [*told, cell("weak", 0, matrix)]))
    assert "by the cells that all have in common" in lines[0]
    assert not lines[-1].startswith("Not compared")


def test_forgetting_by_age(study: Study) -> None:
    table = rows(list(age_table(study, CELLS)))
    assert table["DEAL"] == ["82.5", "77.0"]  # R[j][j]: 80, 80, 90, 80; R[j+1][j]: 70, 84
    assert "joint (bound)" not in table


def test_every_table_has_as_many_cells_in_every_row(study: Study) -> None:
    results = StudyResults(study="mine", description="", wanted=10, defaults={}, cells=CELLS)
    width = 0
    for line in markdown(study, results).splitlines():
        count = line.replace("\\|", "").count("|")
        assert count in (0, width) or width == 0, line
        width = count


def test_settings_have_an_overview_and_every_arm_its_best(study: Study) -> None:
    file = StudyFile.model_validate({**study.file.model_dump(), "settings": {"s1": {}, "s2": {}}})
    tuned = Study(study.name, study.path, file)
    cells = [
        cell("weak", 0, [[0.8, 0.3], [0.4, 0.8]], "s1"),
        cell("weak", 0, [[0.8, 0.3], [0.5, 0.9]], "s2"),
        cell("deal", 0, [[0.8, 0.3], [0.9, 0.9]], "s1"),
    ]
    results = StudyResults(study="mine", description="", wanted=10, defaults={}, cells=cells)
    text = markdown(tuned, results)
    assert "| weak | 60.0 | 70.0 |\n| DEAL | 90.0 | – |" in text
    assert "| weak | s2 | 70.0 | 1 | 2 |\n| DEAL | s1 | 90.0 | 1 | 1 |" in text
    assert text.index("## Setting s1") < text.index("## Setting s2")
    # within a setting, only its own cells
    assert "DEAL" not in text[text.index("## Setting s2") :]


def test_orders_are_pairs_of_their_own(study: Study) -> None:
    cells = [
        cell("good", 0, [[0.8, 0.3], [0.4, 0.8]], order="forth"),
        cell("good", 0, [[0.8, 0.3], [0.5, 0.8]], order="back"),
        cell("deal", 0, [[0.8, 0.3], [0.6, 0.8]], order="back"),
    ]
    found = [line for line in significance(study, cells) if line.startswith("| DEAL | Good")]
    assert found == ["| DEAL | Good \\| old | 1 | +5.0 | – |"]
