"""What the two ``init`` commands leave behind, and what they refuse."""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

from client.site_file import read_site
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from simulations.deployment.keys import make_authority, make_server_certificate
from simulations.deployment.server.folder import (
    ServerFolder,
    ServerSettings,
    init_server,
)
from simulations.deployment.server.submit import (
    STARTS,
    check,
    resume,
    run_folder,
    submit,
)
from simulations.deployment.site.folder import init_site
from simulations.run.run_folder import record
from tests.simulations.deployment.loopback import deal, done
from tests.simulations.deployment.short_experiment import experiment_file
from tests.simulations.deployment.site_data import LABELS

TO_SOUTH = ('federation.sites=["south"]', "federation.clients=1")
HOSTS = ("federation.example.org", "192.0.2.7")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def server(tmp_path: Path) -> ServerFolder:
    folder = ServerFolder(tmp_path / "server")
    init_server(folder, ServerSettings(hosts=HOSTS))
    return folder


def test_the_server_has_private_keys_and_a_certificate_for_its_hosts(server: ServerFolder) -> None:
    assert mode(server.path) == 0o700
    for key in (server.key, server.authority_key):
        assert mode(key) == 0o600
        load_pem_private_key(key.read_bytes(), None)
    certificate = x509.load_pem_x509_certificate(server.certificate.read_bytes())
    authority = x509.load_pem_x509_certificate(server.authority.read_bytes())
    trusting = PolicyBuilder().store(Store([authority]))
    for host in (*HOSTS, "127.0.0.1", "localhost"):
        name: x509.GeneralName = x509.DNSName(host)
        if host[0].isdigit():
            name = x509.IPAddress(ipaddress.ip_address(host))
        trusting.build_server_verifier(name).verify(certificate, [])  # type: ignore[arg-type]
    with pytest.raises(VerificationError):
        trusting.build_server_verifier(x509.DNSName("other.example.org")).verify(certificate, [])


def test_another_authority_and_another_time_are_no_good() -> None:
    mine, other = make_authority(), make_authority()
    store = Store([x509.load_pem_x509_certificate(mine.certificate)])
    late = datetime.now(UTC) + timedelta(days=826)
    for authority, moment in ((other, datetime.now(UTC)), (mine, late)):
        pair = make_server_certificate(authority, ["a.example.org"])
        verifier = PolicyBuilder().store(store).time(moment)
        with pytest.raises(VerificationError):
            verifier.build_server_verifier(x509.DNSName("a.example.org")).verify(
                x509.load_pem_x509_certificate(pair.certificate), []
            )


def test_the_proxy_forwards_one_path_and_the_link_is_local(server: ServerFolder) -> None:
    nginx = (server.path / "nginx.conf").read_text()
    assert "location /v1/fleet/ {" in nginx
    assert "location / { return 403; }" in nginx
    assert "proxy_pass https://127.0.0.1:9444;" in nginx
    assert f"server_name {' '.join(HOSTS)};" in nginx
    unit = (server.path / "deal-server.service").read_text()
    assert "Restart=always" in unit
    assert f'server start "{server.path}"' in unit


@pytest.mark.parametrize("host", ["https://x.org", "x.org:9443", "a b", "-x.org", ""])
def test_a_host_that_is_none_is_refused_before_anything_is_written(
    tmp_path: Path, host: str
) -> None:
    folder = ServerFolder(tmp_path / "server")
    with pytest.raises(UserError, match="neither a host name nor an address"):
        init_server(folder, ServerSettings(hosts=(host,)))
    assert not folder.path.exists()


@pytest.mark.parametrize("address", ["localhost", "localhost:", ":9443", "a:0", "::1", "x:99999"])
def test_an_address_without_host_or_port_is_refused_before_anything_is_written(
    tmp_path: Path, address: str
) -> None:
    (tmp_path / "data").mkdir()
    site = tmp_path / "site"
    with pytest.raises(UserError, match=f"--server '{address}': write it as HOST:PORT"):
        init_site(site, tmp_path / "data", "north", address)
    assert not site.exists()
    init_site(site, tmp_path / "data", "north", "[::1]:9443")
    assert read_site(site / "site.toml").server.address == "[::1]:9443"


def test_a_server_and_a_site_are_made_once(server: ServerFolder, tmp_path: Path) -> None:
    before = server.authority_key.read_bytes()
    with pytest.raises(UserError, match="holds a server already"):
        init_server(server, ServerSettings(hosts=HOSTS))
    assert server.authority_key.read_bytes() == before
    (tmp_path / "data").mkdir()
    request = (tmp_path / "site", tmp_path / "data", "north")
    said = "\n".join(init_site(*request))
    assert "send" in said
    assert mode(tmp_path / "site" / "site.key") == 0o600
    assert mode(tmp_path / "site") == 0o700
    assert read_site(tmp_path / "site" / "site.toml").site.name == "north"
    key = (tmp_path / "site" / "site.key").read_bytes()
    with pytest.raises(UserError, match="holds a site already"):
        init_site(*request)
    assert (tmp_path / "site" / "site.key").read_bytes() == key


def test_the_sites_unit_confines_the_code_it_is_sent(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    init_site(tmp_path / "site", tmp_path / "data", "north")
    unit = (tmp_path / "site" / "deal-site.service").read_text()
    for line in (
        "ProtectSystem=strict",
        "NoNewPrivileges=yes",
        f'ReadWritePaths="{tmp_path / "site" / "state"}"',
        f'ReadOnlyPaths="{tmp_path / "data"}" "{tmp_path / "site"}"',
        f"User={(tmp_path / 'site').owner()}",
        "CapabilityBoundingSet=",
    ):
        assert line in unit.splitlines()
    assert unit.count("ReadWritePaths") == 1
    assert (tmp_path / "site" / "state").is_dir()  # a unit with a missing path does not start


def test_a_new_site_has_the_safe_policy(
    tmp_path: Path,
) -> None:
    (tmp_path / "data").mkdir()
    labels = {"surgery": ("Radiology", "Surgery")}
    init_site(tmp_path / "site", tmp_path / "data", "north", labels=labels)
    site = read_site(tmp_path / "site" / "site.toml")
    assert site.policy is not None
    policy = site.policy
    assert (policy.mechanism, policy.max_epsilon, policy.metrics) == ("record", 8.0, "none")
    assert (policy.share_num_examples, policy.spending) == (False, True)
    assert site.data.labels == labels
    init_site(tmp_path / "other", tmp_path / "data", "south")
    assert read_site(tmp_path / "other" / "site.toml").data.labels == {}
    assert "# [data.labels]" in (tmp_path / "other" / "site.toml").read_text()


def test_the_labels_come_from_the_experiment_of_the_consortium(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    init = ["site", "init", str(tmp_path / "site"), "--data", str(tmp_path / "data")]
    init += ["--name", "north", "--experiment"]
    refused = deal(*init, "quickstart")
    assert refused.returncode == 2
    assert 'the experiment of a consortium has data.source = "sites"' in refused.stderr
    assert not (tmp_path / "site").exists()
    done(*init, str(experiment_file(tmp_path / "two-tasks.toml")))
    site = read_site(tmp_path / "site" / "site.toml")
    assert site.data.labels == {task: tuple(labels) for task, labels in LABELS.items()}


def test_the_proxy_takes_any_path_and_limits_what_is_sent(tmp_path: Path) -> None:
    server = ServerFolder(tmp_path / 'a server; # {1} "x" \\')
    init_server(server, ServerSettings(hosts=HOSTS))
    written = (server.path / "nginx.conf").read_text()
    words = nginx_words(written)
    for directive, path in (
        ("ssl_certificate", server.certificate),
        ("ssl_certificate_key", server.key),
        ("proxy_ssl_trusted_certificate", server.authority),
    ):
        assert words[words.index(directive) + 1] == str(path)
    (limit,) = re.findall(r"client_max_body_size (\d+)m;", written)
    assert FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE * 1.25 < int(limit) * 2**20 < 2**25
    with pytest.raises(UserError, match="nginx takes no path"):
        init_server(ServerFolder(tmp_path / "a$b"), ServerSettings(hosts=HOSTS))
    assert not (tmp_path / "a$b").exists()
    if shutil.which("nginx"):
        http = f'pid {tmp_path}/nginx.pid; events {{}} http {{ include "{tmp_path}/*.server"; }}'
        (tmp_path / "it.server").write_text(written)
        (tmp_path / "nginx.conf").write_text(http)
        command = ["nginx", "-t", "-q", "-e", "stderr", "-c", str(tmp_path / "nginx.conf")]
        told = subprocess.run(command, capture_output=True, text=True)
        assert (told.returncode, told.stderr) == (0, "")


def nginx_words(text: str) -> list[str]:
    """The words of a configuration, read by nginx's rules for quotes and comments."""
    text = re.sub(r"(?m)^\s*#.*$", "", text)
    words = re.findall(r'"((?:\\.|[^"\\])*)"|([^\s;{}"]+)|[;{}]', text)
    return [re.sub(r"\\(.)", r"\1", quoted) if quoted else bare for quoted, bare in words]


@pytest.fixture
def on_disk() -> Iterator[Path]:
    """systemd takes no folder below /dev, where those of tests may lie."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_takes_the_units_as_they_are(on_disk: Path) -> None:
    server = ServerFolder(on_disk / 'a "server" at 50%n')
    init_server(server, ServerSettings(hosts=HOSTS))
    data = on_disk / "the data $HOME 50%n"
    data.mkdir()
    site = on_disk / 'a "site" at 50%n $HOME'
    init_site(site, data, "north")
    for unit in (server.path / "deal-server.service", site / "deal-site.service"):
        told = subprocess.run(
            ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True
        )
        assert (told.returncode, told.stdout + told.stderr) == (0, "")


def test_what_cannot_be_submitted_is_one_line(server: ServerFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no site is registered"):
        submit(server, "quickstart")
    with pytest.raises(UserError, match="site 'south' is not registered"):
        submit(server, "quickstart", TO_SOUTH)
    with pytest.raises(UserError, match=r'a run with sites has data\.source = "sites"'):
        check(Experiment())
    privacy = {"mechanism": "record", "noise": "seeded"}
    seeded = Experiment(privacy=privacy, data={"source": "sites"})
    with pytest.raises(UserError, match=r"privacy\.noise is 'seeded'.*protects nobody"):
        check(seeded)
    with pytest.raises(UserError, match="no run yet"):
        resume(server, "no-such-run")
    with pytest.raises(UserError, match=r"no server.toml; make one with deal server init"):
        submit(ServerFolder(tmp_path), "quickstart")
    assert not any(server.runs.iterdir())


AGREED = {
    "data": {"source": "sites", "labels": {"triage": ["a", "b"]}},
    "federation": {"sites": ["north", "south", "west"], "clients": 3, "quorum": 0.5},
    "run": {"engine": "deployment"},
}


def test_a_run_goes_on_without_a_site_that_has_left(
    server: ServerFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = Experiment.model_validate({**AGREED, "run": {"out": str(server.runs / "one")}})
    record(experiment)
    going: list[Experiment] = []
    monkeypatch.setattr(
        "simulations.deployment.server.submit._start", lambda at, asked, done: going.append(asked)
    )
    server.sites.write_text(json.dumps({name: {} for name in ("north", "south", "east")}))
    resume(server, "one")
    assert going[0].federation.sites == ("north", "south", "west")
    assert going[0].run.resume
    server.sites.write_text('{"north": {}}')
    with pytest.raises(UserError, match="site 'south' is not registered"):
        resume(server, "one")


def test_the_latest_run_is_the_one_that_was_started_last(server: ServerFolder) -> None:
    for time, name in enumerate(("one", "two")):
        folder = server.runs / name
        folder.mkdir(parents=True)
        (folder / STARTS).write_text(json.dumps({"run": time, "time": float(time)}) + "\n")
    (server.runs / "one" / "report.html").write_text("written later")
    assert run_folder(server, "").name == "two"


def test_a_stage_that_finds_no_room_is_refused_before_a_run(server: ServerFolder) -> None:
    full = {"method": {"name": "olora"}, "adapter": {"rank": 300}}
    labels = {"triage": ["a", "b"], "ward": ["c", "d"]}
    with pytest.raises(UserError, match="no room for"):
        check(
            Experiment.model_validate(
                {**AGREED, **full, "data": {"source": "sites", "labels": labels}}
            )
        )
