"""Whether a site's tasks are as disjoint as its policy declares, before anything is released."""

from __future__ import annotations

from collections.abc import Iterator

from client.site_file import SiteFile, site_files
from deal_core.data.site import SiteSource
from deal_core.errors import UserError


def check_disjoint(site: SiteFile) -> Iterator[str]:
    """Yield that no two tasks have a record (or group) in common; nothing where the policy does not
    declare it. All training files are read.

    Raises:
        UserError: two have: the site would refuse the later of them for good, and the server would
            see that.
    """
    if site.policy is None or not site.policy.disjoint_tasks:
        return
    source = SiteSource(site_files(site.data), site.policy.unit_column)
    owner: dict[str, str] = {}
    for task in source.task_names():
        own = {example.whose for example in source.load(task).train}
        for other in dict.fromkeys(owner.values()):
            common = sum(1 for each in own if owner.get(each) == other)
            if common:
                raise UserError(
                    f"policy.disjoint_tasks: tasks '{other}' and '{task}' have {common} ids of "
                    "training records in common; separate them, or set disjoint_tasks to false"
                )
        owner.update(dict.fromkeys(own, task))
    yield f"policy.disjoint_tasks: no id is in two of {len(source.task_names())} tasks"
