"""``python -m simulations.deployment.site.superexec DIGEST ...``: Flower's SuperExec, which starts
this project's :mod:`clientapp` for a message to a ClientApp, and no other program."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flwr.supercore.constant import TaskType

if TYPE_CHECKING:
    from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult


@dataclass(frozen=True)
class ClientAppExecutor:
    """Flower's interface of an executor.

    Attributes:
        allowed: SHA-256 of the app that may run.
    """

    allowed: str

    def get_eligible_capacity(
        self, supported_task_types: set[TaskType], **where: Any
    ) -> tuple[set[TaskType], set[str]]:
        """Only messages to ClientApps are taken from the SuperNode."""
        return supported_task_types & {TaskType.CLIENT_APP}, set()

    def wait_for_capacity(self, task_type: TaskType | None = None, **where: Any) -> None:
        """There is room always: the SuperNode hands out one message at a time."""

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start a process for one message; its token is told where no other user can read it."""
        from flwr.supercore.superexec.executor import LaunchResult

        if spec.task_type != TaskType.CLIENT_APP:
            return LaunchResult.failed("this site runs ClientApps only")
        process = subprocess.Popen(self.command(spec), stdin=subprocess.PIPE)
        assert process.stdin is not None
        with process.stdin as channel:
            channel.write(spec.token.encode())
        return LaunchResult.accepted()

    def command(self, spec: ExecutionSpec) -> list[str]:
        """Return the process for one message."""
        return [
            *(sys.executable, "-P", "-m", "simulations.deployment.site.clientapp", self.allowed),
            *("--insecure", "--runtime-api-address", spec.runtime_api_address),
            *(("--parent-pid", str(spec.parent_pid)) if spec.parent_pid is not None else ()),
        ]

    def reconcile(self) -> None:
        """Do nothing: no process is kept between messages."""

    def close(self) -> None:
        """Do nothing: nothing is kept open."""


def main() -> None:
    """Start processes until the SuperNode ends."""
    executor = ClientAppExecutor(sys.argv.pop(1))
    flower: Any = importlib.import_module("flwr.supercore.superexec.run_superexec")
    if not callable(flower.get_executor):
        raise TypeError("this Flower makes its executor in another way")
    flower.get_executor = lambda *given, **named: executor
    from flwr.supercore.cli import flower_superexec

    flower_superexec()


if __name__ == "__main__":
    main()
