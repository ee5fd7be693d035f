"""``deal bench secure``: bytes and time of secure aggregation, for growing numbers of sites."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from simulations.bench.figures import figures_to
from simulations.bench.scale_fit import power
from simulations.bench.secure_round import LEGS, SecureCase, SecureCost, measure_secure


@dataclass(frozen=True)
class Sizes:
    """All combinations are measured; ``dropped`` is the share of sites that drop out."""

    sites: tuple[int, ...] = (10, 30, 100)
    vector_bytes: tuple[int, ...] = (1 << 20,)
    dropped: tuple[float, ...] = (0.0, 1 / 3)
    bits: tuple[int, ...] = (32, 64)


QUICK = Sizes((4, 8), (1 << 12,), (0.0, 0.3), (32,))


@dataclass(frozen=True)
class Row:
    """One line of the result."""

    case: SecureCase
    cost: SecureCost

    @property
    def bytes_ratio(self) -> float:
        """What a site sends over its update as plain float32."""
        return self.cost.bytes_up / self.case.vector_bytes

    def as_json(self) -> dict[str, Any]:
        """Flat; seconds and bytes."""
        cost = asdict(self.cost)
        legs = {f"site_seconds_{leg}": spent for leg, spent in cost.pop("site_seconds").items()}
        return {
            **asdict(self.case),
            **cost,
            **legs,
            "site_seconds": self.cost.masking_seconds,
            "bytes_ratio": self.bytes_ratio,
        }


def bench(sizes: Sizes, console: Console, out: str = "") -> None:
    """Measure, print the table and the growth, and, with ``out``, write both as JSON.

    Raises:
        UserError: ``out`` cannot be written; nothing was measured.
    """
    write = figures_to(out)
    work = cases(sizes)
    rows = list(track(rows_of(work), "measuring", len(work), console=Console(stderr=True)))
    console.print(table(rows))
    growth = exponents(rows)
    for line in growth:
        console.print(
            f"{line['bits']} bits, dropped {line['dropped']:.0%}: a round grows as "
            f"sites^{line['round']:.2f}, a site's work as sites^{line['site']:.2f}",
            soft_wrap=True,
        )
    console.print(
        "Processor seconds, one core. Site: all of its work in a round; round: all sites and the "
        "server, one after another. MB: of a site in a round. Setup: once a run.",
        soft_wrap=True,
    )
    write({"growth": growth, "rows": [row.as_json() for row in rows]})


def cases(sizes: Sizes) -> list[SecureCase]:
    """Every combination, the small ones first."""
    return [
        SecureCase(sites, vector_bytes, math.floor(share * sites), bits)
        for bits in sizes.bits
        for share in sizes.dropped
        for vector_bytes in sizes.vector_bytes
        for sites in sizes.sites
    ]


def rows_of(work: Sequence[SecureCase]) -> Iterator[Row]:
    """Measure one case after the other."""
    for case in work:
        yield Row(case, measure_secure(case))


def exponents(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Return the powers of the number of sites that fit the seconds, a line a kind of case."""
    kinds: dict[tuple[int, int, bool], list[Row]] = {}
    for row in rows:
        kind = row.case.bits, row.case.vector_bytes, row.case.dropped > 0
        kinds.setdefault(kind, []).append(row)
    lines = []
    for (bits, vector_bytes, _), same in kinds.items():
        sites = [float(row.case.sites) for row in same]
        line = {
            "bits": bits,
            "vector_bytes": vector_bytes,
            "dropped": same[-1].case.dropped / same[-1].case.sites,
            "round": power(sites, [row.cost.round_seconds for row in same]),
            "site": power(sites, [row.cost.masking_seconds for row in same]),
        }
        lines.append(line)
    return lines


def table(rows: Sequence[Row]) -> Table:
    """One line a case."""
    drawn = Table(title="Secure aggregation, all sites and the server in one process")
    names = ("sites", "dropped", "bits", "MB plain", "MB up", "ratio", "MB down")
    times = (*(f"{leg} ms" for leg in LEGS), "site ms", "server s", "round s", "setup ms", "exact")
    for name in (*names, *times):
        drawn.add_column(name, justify="right")
    for row in rows:
        case, cost = row.case, row.cost
        drawn.add_row(
            *(str(case.sites), str(case.dropped), str(case.bits)),
            f"{case.vector_bytes / 1e6:.3f}",
            f"{cost.bytes_up / 1e6:.3f}",
            f"{row.bytes_ratio:.3f}",
            f"{cost.bytes_down / 1e6:.3f}",
            *(f"{1e3 * cost.site_seconds[leg]:.2f}" for leg in LEGS),
            f"{1e3 * cost.masking_seconds:.1f}",
            f"{cost.server_seconds:.3f}",
            f"{cost.round_seconds:.3f}",
            f"{1e3 * cost.setup_seconds:.0f}",
            "yes" if cost.exact else "NO",
        )
    return drawn
