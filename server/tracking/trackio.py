"""Tracker ``trackio``: an SQLite file. ``python -m server.tracking.trackio FOLDER NAME``.

Trackio takes its folder from ``TRACKIO_DIR``, once a process: see :mod:`server.tracking.tracker`.
"""

from __future__ import annotations

import sys

from server.tracking.lines import figures, lines, settings

PROJECT = "federated-deal"


def main(name: str) -> None:
    """Write all figures as metrics of one run, which goes on where there is one already.

    Args:
        name: of the run.
    """
    import trackio

    trackio.init(
        PROJECT,
        name=name,
        config=settings(),
        resume="allow",
        embed=False,
        auto_log_cpu=False,
        auto_log_gpu=False,
    )
    for line in lines():
        step, values = figures(line)
        if values:
            trackio.log(dict(values), step=step)
    trackio.finish()


if __name__ == "__main__":
    main(sys.argv[2])
