"""Send requests, take replies as they come, stop at the deadline."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from deal_core.errors import UserError

LATE = "no reply before the deadline"
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Reply:
    """One client's answer: a message, or the reason why there is none.

    Attributes:
        dropped: a further reply to a request that is answered already; it changes nothing.
    """

    client: str
    message: Message | None
    fault: str = ""
    dropped: bool = False


def collect(
    grid: Grid, requests: Mapping[str, Message], deadline_seconds: float
) -> Iterator[Reply]:
    """Yield each reply as it arrives, after a request was pushed to every client.

    The deadline ends the wait for those that are silent. What is there when the server looks is
    taken: a machine that was suspended, or computes all clients itself, loses nobody by it.

    Every client is answered for exactly once: those that are silent at the deadline come
    last, with a fault. A second reply of a client is yielded as dropped, beside that; one to a
    request of an earlier round is not seen at all.

    Args:
        grid: Flower's, or one that runs in this process.
        requests: client name to message.
        deadline_seconds: from now.
    """
    names = list(requests)
    message_ids = list(grid.push_messages(list(requests.values()))) if requests else []
    pushed = dict(zip(names, message_ids, strict=True))
    asked = {message_id: name for name, message_id in pushed.items() if message_id}
    waiting = dict(asked)
    for name, message_id in pushed.items():
        if not message_id:  # the node is gone since it was looked up
            yield Reply(name, None, "not connected")
    end, quiet = time.monotonic() + deadline_seconds, False
    while waiting:
        left = len(waiting)
        for message in grid.pull_messages(list(waiting)):
            message_id = message.metadata.reply_to_message_id
            client = waiting.pop(message_id, None)
            if client is None:
                if message_id in asked:
                    yield Reply(asked[message_id], None, "a second reply", dropped=True)
                continue
            if message.has_error():
                yield Reply(client, None, f"flower error {message.error.code}")
            else:
                yield Reply(client, message)
        silent = len(waiting) == left  # whatever else may have come
        if silent and quiet and time.monotonic() >= end:
            break
        quiet = silent
        if silent:
            time.sleep(POLL_SECONDS)
    for client in waiting.values():
        yield Reply(client, None, LATE)


def find_clients(grid: Grid, expected: int, deadline_seconds: float) -> dict[str, int]:
    """Wait for ``expected`` nodes, and ask each who it is.

    Names are stable across runs and restarts, node ids are not; so everything that is seeded
    or stored goes by name.

    Returns:
        Client name to node id, in the order of the names as numbers.

    Raises:
        UserError: fewer nodes than expected at the deadline, one beyond them, or two with one name.
    """
    end = time.monotonic() + deadline_seconds
    nodes = sorted(grid.get_node_ids())
    while len(nodes) < expected:
        if time.monotonic() > end:
            raise UserError(
                f"only {len(nodes)} of {expected} clients are connected after "
                f"{deadline_seconds:g} s; start the others or lower federation.clients"
            )
        time.sleep(POLL_SECONDS)
        nodes = sorted(grid.get_node_ids())
    requests = {
        str(node): Message(RecordDict({"hello": ConfigRecord()}), node, HELLO) for node in nodes
    }
    found: dict[str, int] = {}
    for reply in collect(grid, requests, max(1.0, end - time.monotonic())):
        if reply.dropped:
            continue
        if reply.message is None:
            raise UserError(f"a client did not say who it is ({reply.fault}); see its log")
        try:
            name = str(int(reply.message.content.config_records["site"]["client"]))  # type: ignore[arg-type]
        except (LookupError, TypeError, ValueError):
            raise UserError("a client did not say who it is (no number); see its log") from None
        if int(name) >= expected:
            raise UserError(
                f"client '{name}' is connected, and federation.clients is {expected} (from 0); "
                "raise it, or stop that client"
            )
        if name in found:
            raise UserError(f"two clients call themselves '{name}'; give each its own number")
        found[name] = int(reply.client)
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


HELLO = f"{MessageType.QUERY}.hello"
