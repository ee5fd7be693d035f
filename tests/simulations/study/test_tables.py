"""The tables of a study, from cells that are made up."""

import pytest

from deal_core.errors import UserError
from server.results import Privacy
from simulations.output import Table
from simulations.study.grid import Study, StudyFile, load_study
from simulations.study.outcome import Measures, Outcome
from simulations.study.results import CellResult, require_same_rows
from simulations.study.tables import (
    CLASS_IL,
    age_table,
    arms_table,
    best_of,
    budget_table,
    meanings,
    mixed_measures,
    setting_tables,
    significance,
    sweep_text,
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
def study(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(STUDY)
    return load_study(str(path))


def cell(arm, seed, matrix, setting="", order="", zero_shot=(0.1, 0.3)):
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


def rows(table):
    """First cell of every row of a table to the others."""
    assert table is not None
    return {first: others for first, *others in table.rows}


def parts(study, cells, *more):
    """Paragraphs and rows of the differences."""
    found = list(significance(study, cells, *more))
    tables = [part for part in found if isinstance(part, Table)]
    texts = [part for part in found if isinstance(part, str)]
    return texts, [row for table in tables for row in table.rows]


def test_arms_have_means_intervals_and_marks(study):
    table = rows(arms_table(study, CELLS))
    # 0.75 and 0.82: standard error 0.035, t(0.975, 1) = 12.706
    assert table["DEAL"][:3] == ["2", "78.5 ± 44.5", "-8.0 ± 25.4"]
    assert table["replay (not private)"][:3] == ["1", "85.0", "+0.0"]  # one cell: no interval
    assert table["joint (bound)"] == ["1", "90.0", "–", "–", "–", "90.0", "50.0"]
    assert table["zero-shot (bound)"][:2] == ["2", "20.0"]  # equal: no interval
    names = ["weak", "Good | old", "DEAL", "replay (not private)", "joint (bound)"]
    assert list(table)[1:] == names


def test_the_best_contestant_is_in_bold_and_neither_bound_nor_reference(study):
    made = arms_table(study, CELLS)
    bold = {(made.rows[y][0], made.columns[x]) for y, x in made.best}
    assert ("DEAL", "Task-IL accuracy") in bold
    assert ("DEAL", "forgetting") in bold  # of which less is better
    assert not [row for row, _ in bold if "replay" in row or "bound" in row]
    assert arms_table(study, CELLS[:1]).best == frozenset()  # one alone is no best


def test_overlap_of_texts_is_not_passed_off_as_accuracy():
    assert mixed_measures(CELLS) == ""
    settings = {"": {"data.generation": '["notes"]'}}
    assert "texts in: notes." in mixed_measures(
        [CELLS[0].model_copy(update={"settings": settings})]
    )


def counted(cell, value):
    """The cell, which has counted among all labels too."""
    found = {"accuracy_matrix": [[value]], "average_accuracy": value}
    more = Measures(**found, backward_transfer=None, forgetting=None)
    outcome = cell.outcome.model_copy(update={"class_incremental": more})
    return cell.model_copy(update={"outcome": outcome})


def test_class_il_accuracy_stands_beside_where_it_is_known(study):
    table = rows(arms_table(study, [counted(CELLS[0], 0.2), *CELLS[1:]]))
    assert table["weak"][:3] == ["2", "62.5 ± 31.8", "20.0 (1)"]
    assert table["DEAL"][:3] == ["2", "78.5 ± 44.5", "–"]


def test_an_order_cannot_change_zero_shot(study):
    """Nothing was learnt: the same texts, hence one value for each seed. Orders of other tasks have
    values of their own."""
    matrix = [[0.8, 0.3], [0.4, 0.8]]
    places = [(seed, order) for seed in (0, 1) for order in "ABC"]
    cells = [cell("weak", seed, matrix, order=order) for seed, order in places]
    assert rows(arms_table(study, cells))["zero-shot (bound)"][0] == "2"
    third = cells[0].outcome.model_copy(update={"zero_shot": {"a": 0.1, "b": 0.3, "c": 0.5}})
    longer = cell("weak", 0, matrix, order="D").model_copy(update={"outcome": third})
    assert rows(arms_table(study, [*cells, longer]))["zero-shot (bound)"][0] == "3"


def test_the_best_baseline_is_never_the_candidate_nor_a_reference(study):
    (text,), found = parts(study, CELLS)
    assert "have in common, is Good" in text
    assert ("replay (not private)", "DEAL: candidate", "1", "+10.0", "–") in found
    assert not [row for row in found if row[1].startswith("replay") or "joint" in row[0]]
    # on the seed that both have, weak is ahead; its hard seed 1 is no fault of its own
    assert best_of({"weak": {0: 0.9, 1: 0.5}, "good": {0: 0.8}}) == ("weak", True)


def test_differences_are_paired_by_seed_order_and_precision(study):
    # 0.75 - 0.70 and 0.82 - 0.75: 6 points, standard error 1, t(0.975, 1) = 12.706
    assert ("DEAL", "Good | old: best baseline", "2", "+6.0 ± 12.7", "0.105") in parts(
        study, CELLS
    )[1]
    assert ("weak", "DEAL: candidate", "1", "-15.0", "–") in parts(study, CELLS[:3])[1]
    assert parts(study, CELLS[:1]) == (["One arm alone: nothing to compare."], [])
    other = {"": {"train.precision": "bfloat16"}}
    mixed = [c.model_copy(update={"settings": other}) if c is CELLS[-1] else c for c in CELLS]
    assert {row[2] for row in parts(study, mixed)[1] if row[0] == "DEAL"} == {"1"}
    cells = [
        cell("good", 0, [[0.8, 0.3], [0.4, 0.8]], order="forth"),
        cell("good", 0, [[0.8, 0.3], [0.5, 0.8]], order="back"),
        cell("deal", 0, [[0.8, 0.3], [0.6, 0.8]], order="back"),
    ]
    assert ("DEAL", "Good | old: best baseline", "1", "+5.0", "–") in parts(study, cells)[1]


def test_class_il_differences_are_of_the_cells_that_have_counted_that(study):
    values = {("deal", 0): 0.6, ("deal", 1): 0.7, ("good", 0): 0.5, ("weak", 0): 0.4}
    cells = [counted(c, values[c.arm, c.seed]) if (c.arm, c.seed) in values else c for c in CELLS]
    found = parts(study, cells, CLASS_IL)[1]
    best = ("DEAL", "Good | old: best baseline", "1", "+10.0", "–")
    assert [row for row in found if row[0] == "DEAL"] == [best]
    assert not [row for row in found if "replay" in row[0]]


def test_an_arm_without_a_pair_is_named_and_the_fallback_said(study):
    """A reader must not take the comparison for one of all."""
    matrix = [[0.5, 0.1], [0.4, 0.6]]
    told = [cell("deal", 0, matrix), cell("good", 0, matrix), cell("weak", 1, matrix)]
    texts, _ = parts(study, told)
    assert "by each one's own cells" in texts[0]
    assert texts[1] == "Not compared, for want of a pair: weak."
    (text,), _ = parts(study, [*told, cell("weak", 0, matrix)])
    assert "by the cells that all have in common" in text


def test_forgetting_by_age(study):
    table = rows(age_table(study, CELLS))
    assert table["DEAL"] == ["82.5", "77.0"]  # R[j][j]: 80, 80, 90, 80; R[j+1][j]: 70, 84
    assert "joint (bound)" not in table


def test_settings_have_an_overview_and_every_arm_its_best(study):
    file = StudyFile.model_validate({**study.file.model_dump(), "settings": {"s1": {}, "s2": {}}})
    tuned = Study(study.name, study.path, file)
    cells = [
        cell("weak", 0, [[0.8, 0.3], [0.4, 0.8]], "s1"),
        cell("weak", 0, [[0.8, 0.3], [0.5, 0.9]], "s2"),
        cell("deal", 0, [[0.8, 0.3], [0.9, 0.9]], "s1"),
    ]
    best, every = map(rows, setting_tables(tuned, cells))
    assert every == {"weak": ["60.0", "70.0"], "DEAL": ["90.0", "–"]}
    assert best == {"weak": ["s2", "70.0", "1", "2"], "DEAL": ["s1", "90.0", "1", "1"]}


@pytest.mark.parametrize(
    ("seed", "settings", "other"),
    [
        (0, {}, True),
        (0, {"data.path": "elsewhere"}, True),  # where rows lie and whose they are excuses nothing
        (0, {"data.tasks": "elsewhere"}, True),
        (0, {"data.partition.kind": "elsewhere"}, True),
        (0, {"data.max_train": 7}, False),
        (1, {}, False),
    ],
)
def test_cells_that_are_compared_were_found_on_the_same_rows(seed, settings, other):
    first = CELLS[0].model_copy(update={"rows": {"heart": "1"}, "settings": {"": {}}})
    changed = {"arm": "other", "rows": {"heart": "2"}, "settings": {"": settings}, "seed": seed}
    beside = first.model_copy(update=changed)
    require_same_rows([first, first.model_copy(update={"rows": {}})])
    if not other:
        require_same_rows([first, beside])
        return
    with pytest.raises(UserError, match="rows of task 'heart' are others in the cell other"):
        require_same_rows([first, beside])


PRIVATE = Privacy(
    mechanism="record", unit="record", delta=1e-5, epsilon={"0": 0.9, "1": 1.0}, assumes="nobody"
)


def under(setting, seed, reached, spent=None):
    found = cell("deal", seed, [[0.8, 0.3], [reached, reached]], setting)
    return found.model_copy(
        update={"privacy": spent, "settings": {"": {"train.precision": "float32"}}}
    )


UNDER_BUDGETS = [
    under("eps-1", 0, 0.4, PRIVATE),
    under("eps-1", 1, 0.5, PRIVATE.model_copy(update={"epsilon": {"0": 0.5}})),
    under("eps-inf", 0, 0.8),
    under("eps-inf", 1, 0.6),
]


def test_a_row_for_every_budget_that_has_run(tmp_path):
    (tmp_path / "mine.toml").write_text('epsilons = "1,8,inf"\nseeds = [0, 1]\n[arms.deal]\n')
    study = load_study(str(tmp_path / "mine.toml"))
    table = rows(budget_table(study, "deal", UNDER_BUDGETS))
    assert list(table) == ["1", "inf (no privacy)"]
    # zero-shot is 0.2: 0.2 of 0.6, and 0.3 of 0.4
    assert table["1"][5] == "54.2 ± 264.7"
    assert table["1"][6] == "1"
    assert table["inf (no privacy)"][1] == "70.0 ± 127.1"
    assert table["inf (no privacy)"][5:] == ["100.0", "–"]


def test_an_epsilon_comes_with_its_delta_unit_extent_and_trust():
    (text,) = meanings(UNDER_BUDGETS)
    assert text.startswith("Spent: epsilon at delta = 1e-05 per record, over all")
    seeded = PRIVATE.model_copy(update={"simulation_only": True})
    assert "simulation only" in meanings([under("eps-1", 0, 0.4, seeded)])[0]


def test_a_sweep_is_a_release_for_each_of_its_runs():
    text = sweep_text(UNDER_BUDGETS)
    assert "the 2 private runs of this sweep would together spend at most epsilon = 1.5" in text
    assert "The 2 runs without privacy protect nothing" in text
    assert sweep_text(UNDER_BUDGETS[2:]).startswith("No private run has finished")
