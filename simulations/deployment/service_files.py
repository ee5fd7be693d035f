"""What the operating system needs: systemd units, and a reverse proxy that shows sites nothing
but the fleet interface."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from deal_core.errors import UserError
from simulations.deployment.server_folder import ServerFolder, ServerSettings

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

NGINX = """\
# Sites reach the SuperLink through this, and nothing but its fleet interface.
# The SuperLink's control interface has no password: whoever reaches it can start code at every
# site. It listens on this machine alone; never forward another path.
# Include this file in the http block of nginx.conf.
server {{
    listen {port} ssl;
    server_name {names};
    ssl_certificate     {certificate};
    ssl_certificate_key {key};
    ssl_protocols       TLSv1.2 TLSv1.3;
    # A site sends arrays in pieces of 5 MiB (Flower's), however large the adapter is.
    client_max_body_size 8m;
    proxy_request_buffering off;
    proxy_buffering off;

    location /v1/fleet/ {{
        proxy_pass https://127.0.0.1:{superlink_port};
        proxy_http_version 1.1;
        proxy_set_header Host $host;
        proxy_ssl_trusted_certificate {authority};
        proxy_ssl_verify on;
        proxy_ssl_name localhost;
        proxy_ssl_server_name on;
        proxy_read_timeout 300s;
        proxy_send_timeout 300s;
    }}
    location / {{ return 403; }}
}}
"""


def server_unit(folder: ServerFolder) -> str:
    """A systemd unit that keeps the server running; it cannot change its settings and keys."""
    fixed = (folder.settings_file, folder.authority, folder.certificate, folder.key)
    what = "Federated DEAL: server"
    return _unit(what, "deal-server", "server start", folder.path, fixed, folder.path)


def site_unit(folder: Path, data: Path) -> str:
    """A systemd unit that keeps a site running. What it runs can read the data, and write the state
    folder; it can change neither ``site.toml`` with limits and list of apps, nor the keys, nor
    anything else of this machine's."""
    what, state = "Federated DEAL: site", folder / "state"
    return _unit(what, "deal-site", "site start", folder, (data, folder), state)


def nginx_file(folder: ServerFolder, settings: ServerSettings) -> str:
    """A server block for nginx."""
    return NGINX.format(
        port=settings.port,
        names=" ".join(settings.hosts),
        certificate=_nginx(folder.certificate),
        key=_nginx(folder.key),
        authority=_nginx(folder.authority),
        superlink_port=settings.superlink_port,
    )


def _nginx(path: Path) -> str:
    """One word of nginx's, whatever a path contains but ``$``, which nginx cannot quote.

    Raises:
        UserError: the path has one.
    """
    if "$" in str(path):
        raise UserError(f"{path}: nginx cannot be told of a path with $; choose another folder")
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _unit(
    what: str, name: str, arguments: str, folder: Path, fixed: Sequence[Path], changed: Path
) -> str:
    code = Path(__file__).resolve().parents[2]
    # Below a home the strict setting would hide the folder itself.
    homes = {Path("/home"), Path("/root")}
    hidden = any(homes & set(Path(p).parents) for p in (folder, code, sys.executable))
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
    """The same in a command line, where variables are put in."""
    return _quoted(value).replace("$", "$$")


def _percent(value: Path | str) -> str:
    return str(value).replace("%", "%%")
