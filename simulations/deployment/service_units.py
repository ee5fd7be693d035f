"""systemd units that keep a server or a site running, and let it change nothing but its state."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

UNIT = """\
# {what}
# sudo cp {file} /etc/systemd/system/ && sudo systemctl enable --now {name}
[Unit]
Description={what}
After=network-online.target
Wants=network-online.target

[Service]
User={user}
ExecStart={python} -m simulations.cli {arguments}
WorkingDirectory={plain_folder}
Environment={environment}
Restart=always
RestartSec=5
KillMode=mixed
UMask=0077
CapabilityBoundingSet=
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome={home}
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
LockPersonality=yes
ReadOnlyPaths={fixed}
ReadWritePaths={changed}
[Install]
WantedBy=multi-user.target
"""


def service_unit(
    what: str, name: str, arguments: str, folder: Path, fixed: Sequence[Path], changed: Path
) -> str:
    """Return the text of a systemd unit.

    Args:
        what: one line for people.
        name: of the unit.
        arguments: of ``deal``; ``folder`` follows.
        folder: of ``deal server init`` or ``deal site init``; its owner runs the service.
        fixed: what the service may read only.
        changed: the one folder that it may write.
    """
    code = Path(__file__).resolve().parents[2]
    # Below a home the strict setting would hide the folder itself.
    homes = {Path("/home"), Path("/root")}
    places = [folder, code, Path(sys.executable), *fixed]
    hidden = any(homes & set(place.parents) for place in places)
    return UNIT.format(
        what=what,
        name=name,
        file=f"{name}.service",
        user=_owner(folder),
        python=_argument(sys.executable),
        arguments=f"{arguments} {_argument(folder)}",
        fixed=" ".join(_quoted(path) for path in fixed),
        changed=_quoted(changed),
        plain_folder=_percent(folder),
        environment=_quoted(f"PYTHONPATH={code}"),
        home="read-only" if hidden else "yes",
    )


def _owner(folder: Path) -> str:
    """Who made the folder: neither server nor site needs more than that."""
    try:
        return folder.owner()
    except KeyError:
        return str(folder.stat().st_uid)


def _quoted(value: Path | str) -> str:
    """As systemd reads it back: one word, whatever a path contains."""
    text = _percent(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _argument(value: Path | str) -> str:
    """Return the same in a command line, where variables are put in."""
    return _quoted(value).replace("$", "$$")


def _percent(value: Path | str) -> str:
    return str(value).replace("%", "%%")
