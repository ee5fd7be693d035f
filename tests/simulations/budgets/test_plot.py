"""``budgets.png``: what stands on the figure, and where."""

from __future__ import annotations

import pytest
from matplotlib.container import ErrorbarContainer

from simulations.budgets.plot import figure_of
from simulations.budgets.results import Budgets, Mean, Point, Sweep

LEVELS = {"deal": 0.8, "deal-noise-site": 0.6}
"""As ``--noise sum,site`` names its curves, to their accuracies."""


def mean(value: float) -> Mean:
    return Mean(mean=value, half_width=0.01, n=3)


def point(method: str, epsilon: str, accuracy: float) -> Point:
    free = epsilon == "inf"
    return Point(
        method=method,
        epsilon=epsilon,
        seeds=[0, 1, 2],
        zero_shot=mean(0.5),
        average_accuracy=mean(accuracy),
        forgetting=mean(0.03),
        worst_client=mean(accuracy - 0.1),
        gain_retained=None,
        spent=None if free else float(epsilon),
        delta=None if free else 1e-4,
        unit=None if free else "record",
        simulation_only=not free,
    )


def budgets(*epsilons: str) -> Budgets:
    points = [
        point(method, epsilon, level + 0.01 * k)
        for method, level in LEVELS.items()
        for k, epsilon in enumerate(epsilons)
    ]
    sweep = Sweep(runs=4, epsilon=9.0, delta=1e-4, unit="record", without_privacy=2)
    return Budgets(
        experiment="private", wanted=len(points), finished=len(points), points=points, sweep=sweep
    )


@pytest.fixture(scope="module")
def figure():
    return figure_of(budgets("1", "8", "inf"))


def ticks(panel) -> dict[str, float]:
    names = [label.get_text() for label in panel.get_xticklabels()]
    return dict(zip(names, panel.get_xticks().tolist(), strict=True))


def test_every_panel_says_what_it_shows(figure):
    assert [panel.get_title() for panel in figure.axes] == [
        "Average accuracy (%)",
        "Forgetting (points)",
        "Accuracy of the worst client (%)",
    ]
    for panel in figure.axes:
        assert panel.get_xlabel() == "Privacy budget: epsilon"
        assert panel.get_xscale() == "log"
    title, meaning = figure.get_suptitle().split("\n")
    assert title == "private: what privacy costs"
    assert meaning == (
        "epsilon at delta <= 0.0001 per record, over all rounds and tasks; simulation only"
    )


def test_budgets_are_ticks_and_no_privacy_is_infinity_right_of_them(figure):
    for panel in figure.axes:
        assert ticks(panel) == {"1": 1.0, "8": 8.0, "∞": 16.0}


def test_without_runs_without_privacy_there_is_no_infinity():
    for panel in figure_of(budgets("1", "8")).axes:
        assert ticks(panel) == {"1": 1.0, "8": 8.0}


def test_each_curve_is_named_once_and_zero_shot_where_it_is_drawn(figure):
    for number, panel in enumerate(figure.axes):
        names = [text.get_text() for text in panel.get_legend().get_texts()]
        assert sorted(names) == sorted([*LEVELS, *(["zero-shot"] if number == 0 else [])])


def test_curves_have_their_values_and_their_intervals(figure):
    panel = figure.axes[0]
    curves = [c for c in panel.containers if isinstance(c, ErrorbarContainer)]
    drawn = [c.lines[0].get_ydata().tolist() for c in curves]
    # of each method what is private, and by itself what is not
    assert drawn == [
        pytest.approx(values) for values in ([80.0, 81.0], [82.0], [60.0, 61.0], [62.0])
    ]
    assert [c.get_label() for c in curves[::2]] == list(LEVELS)
    free = [c.lines[0].get_xdata().tolist() for c in curves[1::2]]
    assert free == [[16.0], [pytest.approx(16.0 * 1.03)]]
    bars = curves[0].lines[2][0].get_segments()
    assert [segment[:, 1].tolist() for segment in bars] == [
        pytest.approx([79.0, 81.0]),
        pytest.approx([80.0, 82.0]),
    ]


def test_dots_lead_on_from_the_largest_budget_to_no_privacy(figure):
    dotted = [
        line.get_xydata().tolist()
        for line in figure.axes[0].lines
        if line.get_linestyle() == ":" and line.get_label() != "zero-shot"
    ]
    assert dotted == [
        [[8.0, 81.0], [16.0, 82.0]],
        [pytest.approx([8.0 * 1.03, 61.0]), pytest.approx([16.0 * 1.03, 62.0])],
    ]


def test_without_privacy_alone_nothing_is_said_of_epsilon():
    figure = figure_of(budgets("inf"))
    assert figure.get_suptitle() == "private: what privacy costs\n"
    assert ticks(figure.axes[0]) == {"∞": 2.0}
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert sorted(names) == sorted([*LEVELS, "zero-shot"])
