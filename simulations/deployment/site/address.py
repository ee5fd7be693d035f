"""The address of a server, as its administrator gives it to the sites."""

from __future__ import annotations

from deal_core.errors import UserError


def host_and_port(address: str, place: str) -> tuple[str, int]:
    """Return the host, an IPv6 address without its brackets, and the port.

    Args:
        address: ``HOST:PORT``.
        place: where it was written, for the message.

    Raises:
        UserError: a part is missing, or the port is none.
    """
    host, _, port = address.rpartition(":")
    bare = ":" in host and not (host.startswith("[") and host.endswith("]"))
    number = int(port) if port.isascii() and port.isdigit() else 0
    if not host or bare or not 0 < number < 65536:
        raise UserError(
            f"{place} '{address}': write it as HOST:PORT, as the server's administrator gives it"
            f"{' (an IPv6 address in brackets)' if bare else ''}"
        )
    return host.strip("[]"), number
