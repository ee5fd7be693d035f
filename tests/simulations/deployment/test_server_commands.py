"""What the commands of the server's side make, refuse and print; Flower's answers are made up."""

import ipaddress
import json
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from rich.console import Console
from typer.testing import CliRunner

from client.site_file import read_site
from deal_core.config.experiment import Experiment
from deal_core.config.file import run_name
from deal_core.errors import UserError
from server.folder import RunFolder, exclusive_lock
from simulations.cli import app
from simulations.deployment import keys, service
from simulations.deployment.keys import expiry, make_key_pair
from simulations.deployment.server import folder as serving
from simulations.deployment.server import submit as submitting
from simulations.deployment.server.folder import ServerFolder, ServerSettings
from simulations.deployment.server.status import RunState, next_step, status
from simulations.deployment.server.submit import STARTS, check, resume, run_folder, stop, submit
from simulations.deployment.site.folder import agreed_labels, init_site
from simulations.run.simulate import record, recorded
from tests.simulations.deployment.loopback import LABELS, experiment_file

HOSTS = ("federation.example.org", "192.0.2.7")
SITES = {"source": "sites", "labels": {"triage": ["a", "b"]}}
OF_A_FOLDER = r"deal (?:submit|status|stop|server (?:add-site|remove-site))\b"
"""Commands that look for the server in the folder that they are called from, but for ``--dir``."""


class Flower:
    """Its answers to everything that these commands ask, and what was asked."""

    def __init__(self):
        self.asked = []

    def ask(self, *words):
        self.asked.append(words)
        time.sleep(0.1)
        known = {"run-id": 7, "runs": [{"status": "running"}], "nodes": []}
        return {"node-id": len(self.asked), **known}

    def connect(self, *words):
        """The real one writes a file."""


@pytest.fixture
def server(tmp_path):
    folder = ServerFolder(tmp_path / "the server")
    serving.init_server(folder, ServerSettings(hosts=HOSTS))
    folder.flower = Flower()
    return folder


@pytest.fixture
def foreground(monkeypatch):
    """Nothing is started."""
    monkeypatch.setattr(service, "supervise", lambda *given: 0)
    monkeypatch.setattr(service, "require_idle", lambda *given: None)


def key(tmp_path, name):
    path = tmp_path / f"{name}.pub"
    path.write_bytes(make_key_pair(name).public)
    return path


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def error(call):
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_the_server_has_private_keys_and_a_certificate_for_its_hosts(server):
    assert mode(server.path) == 0o700
    for secret in (server.key, server.authority_key):
        assert mode(secret) == 0o600
        load_pem_private_key(secret.read_bytes(), None)
    certificate = x509.load_pem_x509_certificate(server.certificate.read_bytes())
    authority = x509.load_pem_x509_certificate(server.authority.read_bytes())
    trusting = PolicyBuilder().store(Store([authority]))
    for host in (*HOSTS, "127.0.0.1", "localhost"):
        name = x509.DNSName(host)
        if host[0].isdigit():
            name = x509.IPAddress(ipaddress.ip_address(host))
        trusting.build_server_verifier(name).verify(certificate, [])
    with pytest.raises(VerificationError):
        trusting.build_server_verifier(x509.DNSName("other.example.org")).verify(certificate, [])


def test_a_host_or_an_address_that_is_none_is_refused(tmp_path):
    folder = ServerFolder(tmp_path / "made")
    for host in ("https://x.org", "x.org:9443", "a b", "-x.org", ""):
        with pytest.raises(UserError, match="neither a host name nor an address"):
            serving.init_server(folder, ServerSettings(hosts=(host,)))
    for address in ("localhost", "localhost:", ":9443", "a:0", "::1", "x:99999"):
        with pytest.raises(UserError, match=f"--server '{address}': write it as HOST:PORT"):
            init_site(folder.path, tmp_path, "north", address)
    assert not folder.path.exists()


def test_a_server_and_a_site_are_made_once(server, tmp_path):
    before = server.authority_key.read_bytes()
    with pytest.raises(UserError, match="holds a server already"):
        serving.init_server(server, ServerSettings(hosts=HOSTS))
    assert server.authority_key.read_bytes() == before
    site = tmp_path / "site"
    init_site(site, tmp_path, "north", "[::1]:9443")
    assert (mode(site / "site.key"), mode(site)) == (0o600, 0o700)
    secret = (site / "site.key").read_bytes()
    with pytest.raises(UserError, match="holds a site already"):
        init_site(site, tmp_path, "north")
    assert (site / "site.key").read_bytes() == secret
    own = read_site(site / "site.toml")
    assert (own.site.name, own.server.address) == ("north", "[::1]:9443")
    assert own.data.labels == {}
    policy = own.policy
    assert policy is not None
    assert (policy.mechanism, policy.max_epsilon, policy.metrics) == ("record", 8.0, "none")
    assert (policy.share_num_examples, policy.share_sums, policy.spending) == (False, False, True)


def test_the_labels_come_from_the_experiment_of_the_consortium(tmp_path):
    init = ["site", "init", str(tmp_path / "site"), "--data", str(tmp_path)]
    init += ["--name", "north", "--experiment", str(experiment_file(tmp_path / "two-tasks.toml"))]
    CliRunner().invoke(app, init)
    site = read_site(tmp_path / "site" / "site.toml")
    assert site.data.labels == {task: tuple(labels) for task, labels in LABELS.items()}
    with pytest.raises(UserError, match=r'experiment of a consortium has data\.source = "sites"'):
        agreed_labels(Experiment())


def test_the_proxy_forwards_one_path_and_limits_what_is_sent(tmp_path):
    server = ServerFolder(tmp_path / 'a server; # {1} "x" \\')
    serving.init_server(server, ServerSettings(hosts=HOSTS))
    written = (server.path / "nginx.conf").read_text()
    assert "location /v1/fleet/ {" in written
    assert "location / { return 403; }" in written
    assert written.count("location ") == 2
    assert "proxy_pass https://127.0.0.1:9444;" in written
    assert f"server_name {' '.join(HOSTS)};" in written
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
        serving.init_server(ServerFolder(tmp_path / "a$b"), ServerSettings(hosts=HOSTS))
    assert not (tmp_path / "a$b").exists()


def nginx_words(text):
    """The words of a configuration, read by nginx's rules for quotes and comments."""
    text = re.sub(r"(?m)^\s*#.*$", "", text)
    words = re.findall(r'"((?:\\.|[^"\\])*)"|([^\s;{}"]+)|[;{}]', text)
    return [re.sub(r"\\(.)", r"\1", quoted) if quoted else bare for quoted, bare in words]


@pytest.fixture
def on_disk():
    """systemd takes no folder below /dev, where those of tests may lie."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)


def test_units_confine_what_they_run_and_systemd_takes_them(on_disk):
    server = ServerFolder(on_disk / 'a "server" at 50%n')
    serving.init_server(server, ServerSettings(hosts=HOSTS))
    data, site, plain = on_disk / "the data $HOME 50%n", on_disk / 'a "$HOME"', on_disk / "site"
    data.mkdir()
    init_site(site, data, "north")
    init_site(plain, on_disk, "north")
    unit = (plain / "deal-site.service").read_text()
    for line in (
        "Restart=always",
        "ProtectSystem=strict",
        "NoNewPrivileges=yes",
        f'ReadWritePaths="{plain / "state"}"',
        f'ReadOnlyPaths="{on_disk}" "{plain}"',
        f"User={plain.owner()}",
        "CapabilityBoundingSet=",
    ):
        assert line in unit.splitlines()
    assert f'-m simulations.cli site start "{plain}"' in unit
    assert (plain / "state").is_dir()  # a unit with a missing path does not start
    if shutil.which("systemd-analyze"):
        for path in (server.path / "deal-server.service", site / "deal-site.service"):
            told = subprocess.run(
                ["systemd-analyze", "verify", str(path)], capture_output=True, text=True
            )
            assert (told.returncode, told.stdout + told.stderr) == (0, "")


def test_sites_are_added_at_the_same_time_and_each_has_one_name_and_key(server, tmp_path):
    public = {name: key(tmp_path, name) for name in ("north", "south", "west")}
    with ThreadPoolExecutor(3) as pool:
        for name, path in public.items():
            pool.submit(serving.add_site, server, name, path)
    assert set(serving.registered(server)) == set(public)
    secret = tmp_path / "site.key"
    secret.write_bytes(make_key_pair("north").private)
    for name, path, said in (
        ("north", key(tmp_path, "other"), "is registered already; for a new key first deal server"),
        ("alias", public["north"], "this key is that of 'north'"),
        ("alias", secret, "this is a private key, which must stay at its site"),
    ):
        assert said in error(lambda name=name, path=path: serving.add_site(server, name, path))
    written = [json.loads(line) for line in server.events.path.read_text().splitlines()]
    assert {each["site"] for each in written if each["event"] == "site_added"} == set(public)


def test_a_list_that_cannot_be_written_leaves_no_key_behind(server, tmp_path, monkeypatch):
    def full(path, sites):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serving, "_write", full)
    with pytest.raises(UserError, match="No space left"):
        serving.add_site(server, "north", key(tmp_path, "north"))
    assert [words[1] for words in server.flower.asked] == ["register", "unregister"]
    assert serving.registered(server) == {}


def test_what_cannot_be_submitted_is_one_line(server, tmp_path):
    with pytest.raises(UserError, match=r'a run with sites has data\.source = "sites"'):
        check(Experiment())
    seeded = Experiment(privacy={"mechanism": "record", "noise": "seeded"}, data=SITES)
    with pytest.raises(UserError, match=r"privacy\.noise is 'seeded'.*gives no protection"):
        check(seeded)
    with pytest.raises(UserError, match=r"no server.toml; make one with deal server init"):
        submit(ServerFolder(tmp_path), "quickstart")
    assert not any(server.runs.iterdir())


def test_a_run_goes_on_without_a_site_that_has_left(server, monkeypatch):
    three = {"sites": ["north", "south", "west"], "clients": 3, "quorum": 0.5}
    record(Experiment(data=SITES, federation=three, run={"out": str(server.runs / "one")}))
    going = []
    monkeypatch.setattr(submitting, "_start", lambda at, asked, done: going.append(asked))
    server.sites.write_text(json.dumps({name: {} for name in ("north", "south", "east")}))
    resume(server, "one")
    assert going[0].federation.sites == ("north", "south", "west")
    assert going[0].run.resume
    resume(server, "one", ("federation.deadline_seconds=9000", "federation.quorum=0.4"))
    patience = [(each.federation.deadline_seconds, each.federation.quorum) for each in going]
    assert patience == [(3600.0, 0.5), (9000.0, 0.4)]
    assert run_name(going[0]) == run_name(going[1])  # what was answered is not charged again
    assert recorded(server.runs / "one").federation == going[1].federation
    with pytest.raises(UserError, match="settings that it was started with, but for federation"):
        resume(server, "one", ("federation.rounds=9",))
    server.sites.write_text('{"north": {}}')
    with pytest.raises(UserError, match="site 'south' is not registered"):
        resume(server, "one")


def started(server, name, *starts):
    """The folder of a run that Flower was given under these numbers, at these times."""
    run = server.runs / name
    run.mkdir()
    lines = [json.dumps({"run": number, "time": at}) + "\n" for number, at in starts]
    (run / STARTS).write_text("".join(lines))
    return run


def test_the_latest_run_is_the_one_that_was_started_last(server):
    one, _ = started(server, "one", ("1", 0.0)), started(server, "two", ("2", 1.0))
    (one / "report.html").write_text("written later")
    assert run_folder(server, "").name == "two"


def test_a_run_that_was_continued_a_moment_ago_is_not_continued_again(server, monkeypatch):
    run = started(server, "one", ("7", 1.0))
    for found in ("running", "pending", "finished:failed", "unknown", ""):
        monkeypatch.setattr(submitting, "flower_status", lambda *given, found=found: found)
        lives = found in ("running", "pending")
        with pytest.raises(UserError, match="a moment ago") if lives else nullcontext():
            submitting._require_ended(server, run, "")


def test_the_start_that_lives_is_stopped_and_not_one_that_failed_after_it(server, monkeypatch):
    started(server, "one", ("7", 1.0), ("8", 1.0))
    found = {"7": "running", "8": "finished:failed"}
    monkeypatch.setattr(submitting, "flower_status", lambda folder, number: found[number])
    stop(server, "one")
    assert server.flower.asked[0][:2] == ("stop", "7")


@pytest.mark.usefixtures("foreground")
def test_a_certificate_that_expires_is_told_at_the_start_and_by_status(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(keys, "SERVER_DAYS", 20)
    folder = ServerFolder(tmp_path / "server")
    serving.init_server(folder, ServerSettings(hosts=HOSTS))
    folder.flower = Flower()
    serving.start_server(folder)
    status(folder, "", Console(width=200), as_json=False)
    said = f"warning: {folder.certificate}: expires on "
    assert capsys.readouterr().out.count(said) == 2
    assert expiry(datetime.now(UTC) - timedelta(days=3)).startswith("expired on ")
    assert expiry(datetime.now(UTC) + timedelta(days=90)) == ""


def test_a_server_that_cannot_start_says_why_and_nothing_else(server, capsys):
    with (
        exclusive_lock(server.pid.with_suffix(".lock")),
        pytest.raises(UserError, match="runs already"),
    ):
        serving.start_server(server)
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("foreground")
def test_what_is_printed_names_the_folder(server, tmp_path, monkeypatch, capsys):
    """Every command that is printed works when it is pasted, from any folder."""
    monkeypatch.setattr(submitting, "BUNDLE", tmp_path)
    serving.start_server(server)
    added = "\n".join(serving.add_site(server, "north", key(tmp_path, "north")))
    assert all(part in added for part in ("localhost:9444", f"{HOSTS[0]}:9443", "without a proxy"))
    status(server, "", Console(width=200), as_json=False)
    begun = submit(server, str(experiment_file(tmp_path / "two-tasks.toml")))
    run = run_folder(server, "")
    with exclusive_lock(RunFolder(run).launching):
        again = error(lambda: resume(server, run.name))
    states = [next_step(server, run.name, RunState(phase=each)) for each in ("running", "stopped")]
    ended = [*stop(server, run.name), *serving.remove_site(server, "north")]
    said = "\n".join([capsys.readouterr().out, added, *begun, again, *states, *ended])
    said += error(lambda: submit(server, "quickstart"))
    found = list(re.finditer(OF_A_FOLDER, said))
    assert len(found) > 12
    for each in found:
        rest = re.split(r"deal |; |\n", said[each.end() :])[0]
        assert f" --dir {shlex.quote(str(server.path))}" in rest, said[each.start() :]
