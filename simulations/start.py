"""The program ``deal``: from its first moment on Ctrl-C ends it with one line."""

import os
import signal
import sys
import threading
from types import FrameType

SECONDS_TO_END = 2.0


def stopped(number: int, frame: FrameType | None) -> None:
    """End; what is large may still be on its way in.

    Raises:
        SystemExit: always. A library may swallow it during its import; then a timer ends the
            process.
    """
    sys.stderr.write("stopped\n")
    timer = threading.Timer(SECONDS_TO_END, os._exit, (130,))
    timer.daemon = True
    timer.start()
    raise SystemExit(130)


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGINT, stopped)
    from simulations.cli import main as deal

    deal()


if __name__ == "__main__":
    main()
