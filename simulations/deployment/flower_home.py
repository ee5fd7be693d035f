"""How Flower's programs are started: a private home, an empty folder, nothing phoned home."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deal_core.errors import UserError
from simulations.engines.flower_environment import flower_environment
from simulations.engines.flower_sandbox import program
from simulations.output.toml import toml_lines

CONNECTION = "deal"
"""Name of the SuperLink in the private Flower configuration."""
COMMAND_SECONDS = 120.0


@dataclass(frozen=True)
class FlowerHome:
    """A folder of Flower's own below the server's or site's."""

    path: Path

    @property
    def empty(self) -> Path:
        """Working directory: nothing in it can be imported instead of the app."""
        return self.path / "empty"

    def make(self) -> None:
        """Make the folders."""
        self.empty.mkdir(parents=True, exist_ok=True)

    def environment(self) -> dict[str, str]:
        """Return the environment for every program of Flower's; this checkout comes first among
        what it imports, but for an app, which Flower puts before it."""
        code = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
        return {**flower_environment(self.path), "PYTHONPATH": paths}

    def connect(self, address: str, certificate: Path) -> None:
        """Write the connection that ``flwr`` uses."""
        self.make()
        lines = toml_lines({"address": address, "root-certificates": str(certificate)})
        (self.path / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n{lines}',
            encoding="utf-8",
        )

    def ask(self, *arguments: str) -> dict[str, Any]:
        """Return what ``flwr ARGUMENTS --format json`` says.

        Raises:
            UserError: Flower refuses, or the SuperLink does not answer.
        """
        self.make()
        command = [program("flwr"), *arguments, "--format", "json"]
        try:
            done = subprocess.run(
                command,
                cwd=self.empty,
                env=self.environment(),
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"flwr {arguments[0]}: no answer after {COMMAND_SECONDS:g} s; "
                "is the server running (deal server start)?"
            ) from None
        answer = _json_in(done.stdout)
        if not answer.get("success"):
            said = str(answer.get("error-message") or done.stderr or done.stdout)
            reason = " ".join(said.split())[-300:] or f"exit code {done.returncode}"
            raise UserError(
                f"flwr {arguments[0]}: {reason} (is the server running? deal server start)"
            )
        return answer


def _json_in(text: str) -> dict[str, Any]:
    """Return the JSON object in an output that may have lines before it."""
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
