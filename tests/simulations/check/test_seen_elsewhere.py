from __future__ import annotations

from deal_core.data import Example, TaskData
from simulations.check.rows import SeenElsewhere


def test_test_rows_that_another_task_trains_on_are_counted() -> None:
    rows = tuple(Example(f"text {n}", "ab"[n % 2]) for n in range(10))
    other = (Example("text 0", "b"), Example("text 9", "a"))
    found = SeenElsewhere()
    found.add(TaskData("ward", ("a", "b"), rows[:4], rows[4:6]))
    found.add(TaskData("clinic", ("a", "b"), rows[4:8], rows[:1] + other))
    assert [line.partition(";")[0] for line in found.lines()] == [
        "task 'ward': 2 of 2 test rows are training rows of task 'clinic', answers included",
        "task 'clinic': 1 of 3 test rows are training rows of task 'ward', answers included",
    ]


def test_rows_on_both_sides_of_one_task_are_not_its_matter() -> None:
    found = SeenElsewhere()
    found.add(TaskData("ward", ("a",), (Example("x", "a"),), (Example("x", "a"),)))
    assert not list(found.lines())
