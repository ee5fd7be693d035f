"""The tasks and labels of ``site.toml``, compared with those of the consortium's experiment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from client.site_file import SiteFile
from deal_core.config.experiment import Experiment
from deal_core.data.sites import SitesSource
from deal_core.errors import UserError
from simulations.deployment.site.init import label_lines

Labels = Mapping[str, tuple[str, ...]]


def agreed_labels(experiment: Experiment) -> dict[str, tuple[str, ...]]:
    """Return task to labels, of every task that the experiment trains.

    Raises:
        UserError: it is no experiment for sites, or it names no labels.
    """
    if experiment.data.source != "sites":
        raise UserError(
            f"data.source is '{experiment.data.source}'; the experiment of a consortium has "
            'data.source = "sites" and [data.labels] with TASK = ["label", ...]'
        )
    labels = experiment.data.labels
    return {task: labels.get(task, ()) for task in SitesSource(experiment.data).task_names()}


def compare_labels(site: SiteFile, agreed: Labels) -> Iterator[str]:
    """Yield a line for each task on which both agree, or that is the site's alone.

    Raises:
        UserError: labels are missing or differ; the lines to be written stand in it.
    """
    own = site.data.labels
    for task in own:
        if task not in agreed:
            yield f"task '{task}' of [data.labels]: not in this experiment"
        elif own[task] == agreed[task]:
            shown = (
                f"labels as agreed ({', '.join(own[task])})" if own[task] else "answers are texts"
            )
            yield f"task '{task}': {shown}"
    differ = {task: labels for task, labels in agreed.items() if own.get(task) != labels}
    if not differ:
        return
    words = [f"'{task}' {'differs' if task in own else 'is missing'}" for task in differ]
    raise UserError(
        f"[data.labels] of site.toml: {', '.join(words)}; this site takes part in no such task. "
        "If the consortium has agreed on it, write there:\n"
        f"{'' if own else '[data.labels]' + chr(10)}{label_lines(differ)}".rstrip()
    )


def declared_labels(site: SiteFile) -> Iterator[str]:
    """Yield a line with the tasks that the site takes part in.

    Raises:
        UserError: there is none.
    """
    if not site.data.labels:
        raise UserError(
            "[data.labels] of site.toml: not there, so this site takes part in no task; deal site "
            "check --experiment FILE prints the lines to add"
        )
    yield f"takes part in: {', '.join(site.data.labels)}"
