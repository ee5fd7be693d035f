"""Tracker ``tensorboard``: event files. ``python -m server.tracking.tensorboard FOLDER NAME``."""

from __future__ import annotations

import json
import sys

from server.tracking.lines import figures, lines, settings


def main(folder: str) -> None:
    """Write all figures as scalars, and the settings as a text.

    Args:
        folder: of the event files.
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder, flush_secs=10)
    writer.add_text("settings", f"```json\n{json.dumps(settings(), indent=1)}\n```")
    for line in lines():
        step, values = figures(line)
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1])
