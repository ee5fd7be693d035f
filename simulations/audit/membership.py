"""``deal audit --membership``: how well anybody can tell who is in what leaves the sites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from textwrap import wrap

from rich.console import Console

from deal_core.errors import at_home
from server.results import Strict
from simulations.audit.sums_told import Told, embedded, told_of_sums
from simulations.output.console import print_line, print_page, require_one_kind
from simulations.output.files import head, row, write_texts
from simulations.run.experiment import Request, load_experiment
from simulations.run.preflight import preflight

FILE = "membership.json"
EXPLANATION = (
    "AUC: probability that a record of the sum scores above one that is not in it; 0.5 is chance. "
    "TPR: share of members found where 0.1 % of the others are taken for members. The attacker "
    "knows the label, the number of records, the noise, and other records of the label that are "
    "in no sum; its score is the likelihood ratio of the sum with and without the record. "
    "Expected: by the closed form, from size and noise alone. Noise: deviation in each entry, in "
    "units of what a record adds at most."
)


class MembershipAudit(Strict):
    """Schema of ``membership.json``."""

    schema_version: int = 1
    experiment: str
    directions: int
    told: list[Told]


@dataclass(frozen=True)
class MembershipRequest:
    """Attributes: as of :class:`~simulations.audit.command.AuditRequest`."""

    experiment: str = "quickstart"
    out: str = ""
    overrides: tuple[str, ...] = ()
    seed: int = 0


def membership_folder(request: MembershipRequest) -> Path:
    """Return the folder of figures."""
    return at_home(request.out or f"runs/membership-{Path(request.experiment).stem}").resolve()


def run_membership(request: MembershipRequest, console: Console) -> int:
    """Attack, and write what was found.

    Returns:
        The exit code, 0.

    Raises:
        UserError: bad input, or an experiment without class sums.
    """
    out = membership_folder(request)
    require_one_kind(out, FILE)
    experiment = load_experiment(Request(request.experiment, str(out), request.overrides))
    with console.status("checking the experiment and its data"):
        preflight(experiment)
    with console.status("embedding texts") as status:
        data = embedded(experiment, request.seed)
        told = told_of_sums(experiment, data, request.seed, status.update)
    name = Path(request.experiment).stem
    audit = MembershipAudit(experiment=name, directions=data[0].shape[1], told=told)
    page = membership_page(audit)
    write_texts(out, {FILE: audit.model_dump_json(indent=1) + "\n", "membership.md": page})
    print_page(console, page)
    print_line(console, f"figures in {out / FILE}, table in {out / 'membership.md'}")
    return 0


def membership_page(audit: MembershipAudit) -> str:
    """Return the whole page."""
    text = f"Class sums have {audit.directions} directions. {EXPLANATION}"
    lines = [f"# Membership in {audit.experiment}", "", *wrap(text, 100), ""]
    return "\n".join([*lines, *told_table(audit.told)]) + "\n"


def told_table(told: Sequence[Told]) -> Iterator[str]:
    """Yield a row for each size of what somebody sees under some noise."""
    yield from head("seen", "noise", "records", "AUC", "expected", "TPR at 0.1 % FPR")
    for (seen, noise), rows in groupby(told, lambda each: (each.seen, each.noise)):
        for each in rows:
            yield row(
                seen,
                noise + (f" ({each.deviation:.2f})" if each.deviation else ""),
                str(each.records),
                f"{each.auc:.2f}",
                f"{each.expected:.2f}",
                "n too small" if each.found is None else f"{100 * each.found:.1f} %",
            )
