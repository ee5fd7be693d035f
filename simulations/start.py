"""The program ``deal``: from its first moment on Ctrl-C ends it with one line."""

from __future__ import annotations

import signal
import sys
from types import FrameType


def stopped(number: int, frame: FrameType | None) -> None:
    """End; what is large may still be on its way in."""
    sys.stderr.write("stopped\n")
    raise SystemExit(130)


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGINT, stopped)
    from simulations.cli import main as deal

    deal()


if __name__ == "__main__":
    main()
