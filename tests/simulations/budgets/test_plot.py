"""``budgets.png``: what stands on the figure, and where."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from matplotlib.container import ErrorbarContainer

from simulations.budgets.curve_names import curve_names
from simulations.budgets.plot import figure_of
from simulations.budgets.results import Budgets, Mean, Point, Sweep

NAMES = ["noise in the sum", "noise at each site"]
"""What their curves are called."""
FREE = {"deal": 0.9, "deal-noise-site": 0.9}
"""As ``--noise sum,site`` names its settings, to their accuracy without privacy: whose noise it
would be makes no difference."""
TRUST = {"deal": "all sites but 1", "deal-noise-site": "nobody outside the client is trusted"}


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
        assumes="" if free else TRUST.get(method, ""),
        simulation_only=not free,
    )


def budgets(*epsilons: str, free: Mapping[str, float] = FREE) -> Budgets:
    """Settings of ``free``; under a budget one is better than the other."""
    return of(
        [
            point(method, epsilon, level if epsilon == "inf" else 0.8 - 0.2 * n + 0.01 * k)
            for n, (method, level) in enumerate(free.items())
            for k, epsilon in enumerate(epsilons)
        ]
    )


def of(points: list[Point]) -> Budgets:
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
    title, meaning, *_ = figure.get_suptitle().split("\n")
    assert title == "private: what privacy costs"
    assert meaning == (
        "epsilon at delta <= 0.0001 per record, over all rounds and tasks; simulation only"
    )


def test_whom_an_epsilon_counts_on_stands_beside_the_name_of_its_curve(figure):
    assert figure.get_suptitle().split("\n")[2:] == [
        "noise in the sum: all sites but 1",
        "noise at each site: nobody outside the client is trusted",
    ]
    alone = figure_of(budgets("1", "8", "inf", free={"deal": 0.9}))
    assert alone.get_suptitle().split("\n")[2:] == ["all sites but 1"]  # so it is of all there is
    mixed = figure_of(budgets("1", "inf", free={"deal": 0.9, "lwf": 0.9}))
    assert mixed.get_suptitle().split("\n")[2:] == ["deal: all sites but 1"]


def test_budgets_are_ticks_and_no_privacy_is_infinity_right_of_them(figure):
    for panel in figure.axes:
        assert ticks(panel) == {"1": 1.0, "8": 8.0, "∞": 16.0}


def test_without_runs_without_privacy_there_is_no_infinity():
    for panel in figure_of(budgets("1", "8")).axes:
        assert ticks(panel) == {"1": 1.0, "8": 8.0}


def named(panel) -> list[str]:
    return sorted(text.get_text() for text in panel.get_legend().get_texts())


def test_each_curve_is_named_once_and_zero_shot_where_it_is_drawn(figure):
    for number, panel in enumerate(figure.axes):
        expected = [*NAMES, "without privacy", *(["zero-shot"] if number == 0 else [])]
        assert named(panel) == sorted(expected)


def curves_of(panel) -> list[ErrorbarContainer]:
    return [c for c in panel.containers if isinstance(c, ErrorbarContainer)]


def test_curves_have_their_values_and_their_intervals(figure):
    *curves, _ = curves_of(figure.axes[0])
    drawn = [c.lines[0].get_ydata().tolist() for c in curves]
    assert drawn == [pytest.approx(values) for values in ([80.0, 81.0], [60.0, 61.0])]
    assert [c.get_label() for c in curves] == NAMES
    bars = curves[0].lines[2][0].get_segments()
    assert [segment[:, 1].tolist() for segment in bars] == [
        pytest.approx([79.0, 81.0]),
        pytest.approx([80.0, 82.0]),
    ]


def across(panel) -> dict[str, float]:
    """Names of the lines that go from end to end, to their heights."""
    lines = [line for line in panel.lines if list(line.get_xdata()) == [0, 1]]
    return {line.get_label(): line.get_ydata()[0] for line in lines}


def test_without_privacy_is_one_line_and_its_point_at_infinity(figure):
    for panel, level in zip(figure.axes, (90.0, 3.0, 80.0), strict=True):
        lines = {name: y for name, y in across(panel).items() if name != "zero-shot"}
        assert lines == {"without privacy": pytest.approx(level)}
        *curves, free = curves_of(panel)
        assert len(curves) == len(NAMES)
        assert free.lines[0].get_xydata().tolist() == [[16.0, pytest.approx(level)]]
        (bar,) = free.lines[2][0].get_segments()
        assert bar[:, 1].tolist() == pytest.approx([level - 1, level + 1])


def test_methods_that_reach_different_levels_without_privacy_have_a_line_each():
    panel = figure_of(budgets("1", "8", "inf", free={"deal": 0.9, "lwf": 0.7})).axes[0]
    lines = {"deal, without privacy": 90.0, "lwf, without privacy": 70.0}
    assert across(panel) == pytest.approx({**lines, "zero-shot": 50.0})
    assert named(panel) == sorted(["deal", "lwf", *lines, "zero-shot"])
    inks = {c.get_label(): c.lines[0].get_color() for c in curves_of(panel)}
    for line in panel.lines:
        if line.get_label() in lines:
            assert line.get_color() == inks[line.get_label().partition(",")[0]]


def test_a_line_of_one_of_two_curves_has_its_name():
    """While the other's run is not over."""
    points = [p for p in budgets("1", "inf").points if (p.method, p.epsilon) != ("deal", "inf")]
    lines = across(figure_of(of(points)).axes[0])
    assert lines == pytest.approx({"noise at each site, without privacy": 90.0, "zero-shot": 50.0})


@pytest.mark.parametrize(("forgotten", "above"), [(0.0, 1.0), (0.002, 1.0), (0.05, 5.0)])
def test_little_forgetting_does_not_look_like_much(forgotten, above):
    """A point on both sides at least."""
    one = Mean(mean=forgotten, half_width=None, n=1)
    points = [p.model_copy(update={"forgetting": one}) for p in budgets("1", "inf").points]
    bottom, top = figure_of(of(points)).axes[1].get_ylim()
    assert bottom == -1
    assert above <= top < 1.1 * above


def test_without_privacy_alone_nothing_is_said_of_epsilon():
    figure = figure_of(budgets("inf"))
    assert figure.get_suptitle() == "private: what privacy costs\n"
    assert ticks(figure.axes[0]) == {"∞": 2.0}
    assert named(figure.axes[0]) == ["without privacy", "zero-shot"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (["deal"], ["deal"]),
        (["deal-noise-site"], ["deal-noise-site"]),
        (["deal", "deal-noise-sum"], NAMES[::-1]),
        (["deal-noise-site", "deal", "private-sums"], [*NAMES[::-1], "private-sums"]),
        (
            ["deal", "deal-noise-site", "lwf", "lwf-noise-site"],
            [f"{method}, {name}" for method in ("deal", "lwf") for name in NAMES],
        ),
        (["much-noise-here", "much"], ["much-noise-here", "much"]),
    ],
)
def test_both_shares_of_the_noise_are_called_what_they_are(settings, names):
    """Where one alone is drawn, a setting has its own name."""
    assert curve_names(settings) == dict(zip(settings, names, strict=True))
