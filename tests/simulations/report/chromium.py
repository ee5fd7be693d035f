"""A headless Chromium, driven through its own pipe: no driver has to be installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--no-sandbox",  # it opens our own files alone
)
END = b"\0"


def find_chromium() -> str:
    """The browser that ``CHROMIUM`` names, or one in the path; empty: there is none."""
    named = os.environ.get("CHROMIUM", "")
    return named or next((found for name in NAMES if (found := shutil.which(name))), "")


@dataclass
class Tab:
    """One page. ``faults`` are messages of its console; ``requests`` are addresses asked for."""

    to: IO[bytes]
    answers: IO[bytes]
    session: str = ""
    number: int = 0
    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    loaded: bool = False

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol; return its result."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + END)
        self.to.flush()
        while (told := self._next()).get("id") != self.number:
            self._hear(told)
        assert "error" not in told, (method, told)
        return dict(told["result"])

    def open(self, path: Path) -> None:
        """Open a file, and wait until all of it is there."""
        self.faults.clear()
        self.requests.clear()
        self.loaded = False
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self._hear(self._next())

    def evaluate(self, script: str) -> Any:
        """The value of an expression, or of its promise, in the page."""
        told = self.ask(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def window(self, width: int, scheme: str = "light") -> None:
        """A window of this width, and a reader who prefers this scheme."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.ask("Emulation.setEmulatedMedia", features=[feature])

    def _next(self) -> dict[str, Any]:
        read = bytearray()
        while not read.endswith(END):
            byte = self.answers.read(1)
            assert byte, "the browser has ended"
            read += byte
        return dict(json.loads(read[:-1]))

    def _hear(self, event: dict[str, Any]) -> None:
        method, told = event.get("method", ""), event.get("params", {})
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Log.entryAdded":
            self.faults.append(told["entry"]["text"])
        elif method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
            self.faults.append(json.dumps(told))


@contextmanager
def opened(program: str, profile: Path) -> Iterator[Tab]:
    """A browser with one empty tab, ended with the block."""
    read_ours, write_theirs = os.pipe()
    read_theirs, write_ours = os.pipe()
    script = f'exec "$0" "$@" 3<&{read_theirs} 4>&{write_theirs}'
    process = subprocess.Popen(
        ["bash", "-c", script, program, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(read_theirs, write_theirs),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_theirs)
    os.close(write_theirs)
    with os.fdopen(write_ours, "wb") as to, os.fdopen(read_ours, "rb") as answers:
        try:
            tab = Tab(to, answers)
            target = tab.ask("Target.createTarget", url="about:blank")["targetId"]
            tab.session = tab.ask("Target.attachToTarget", targetId=target, flatten=True)[
                "sessionId"
            ]
            for domain in ("Page", "Runtime", "Log", "Network"):
                tab.ask(f"{domain}.enable")
            yield tab
        finally:
            process.kill()
            process.wait()
