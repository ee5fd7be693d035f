"""One program in the foreground: its end, its hanging, and the wish to stop it."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deal_core.errors import UserError
from server.folder import exclusive_lock
from simulations.deployment import service
from simulations.deployment.service import require_idle, supervise
from simulations.deployment.site import folder as site_folder
from simulations.deployment.site.folder import HANDSHAKE
from simulations.engines.flower import FlowerHome, members
from tests.simulations.deployment.loopback import wait_for


def run(tmp_path, script, fatal=""):
    home = FlowerHome(tmp_path / "flower")
    log, pid = tmp_path / "log", tmp_path / "it.pid"
    code = supervise(["bash", "-c", script], home, log, pid, fatal)
    assert pid.exists() == (code != 0)  # who ends unasked leaves word that it was there
    assert members(home.path) == []
    return code


def test_an_end_that_nobody_asked_for_is_a_failure(tmp_path):
    assert run(tmp_path, "exit 0") == 1
    assert run(tmp_path, "exit 3") == 3


def test_a_signal_ends_it_in_order(tmp_path):
    over = threading.Event()

    def ask():
        """Once it is listened for: before, the signal would end this process."""
        while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            if over.wait(0.05):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        assert run(tmp_path, "exec sleep 60") == 0
    finally:
        over.set()
        asking.join()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_full_disk_leaves_no_program_behind(tmp_path):
    home, nowhere = FlowerHome(tmp_path / "flower"), tmp_path / "it.pid"
    nowhere.mkdir()  # its number cannot be written
    with pytest.raises(OSError, match="directory"):
        supervise(["bash", "-c", "exec sleep 60"], home, tmp_path / "log", nowhere, "")
    assert members(home.path) == []


def test_one_that_hangs_after_its_last_word_is_ended(tmp_path, monkeypatch):
    """The words come in two pieces; those of an earlier start do not count."""
    monkeypatch.setattr(service, "HUNG_SECONDS", 0.5)
    (tmp_path / "log").write_text(f"{HANDSHAKE}\n")
    assert run(tmp_path, "sleep 1; exit 3", HANDSHAKE) == 3
    begun = time.monotonic()
    words = f"printf '{HANDSHAKE[:9]}'; sleep 0.5; echo '{HANDSHAKE[9:]}.'; sleep 60"
    assert run(tmp_path, words, HANDSHAKE) == -signal.SIGKILL
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("was_in", [True, False])
def test_a_site_that_was_in_waits_for_a_certificate_that_has_expired_to_be_renewed(
    tmp_path, monkeypatch, capsys, was_in
):
    """Twice it has expired; then the server is another one, which no waiting mends."""
    monkeypatch.setattr(site_folder, "RETRY_SECONDS", 0.1)
    (tmp_path / "data").mkdir()
    site_folder.init_site(tmp_path / "site", tmp_path / "data", "north", "localhost:9443")
    site = site_folder.read_site(tmp_path / "site" / "site.toml")
    if was_in:
        (Path(site.site.state) / "site.pid").touch()
    script = (
        f"echo again >> {tmp_path / 'starts'}; echo '{HANDSHAKE}'\n"
        f"echo -n '{site_folder.UNKNOWN}'\n"
        f"[ $(wc -l < {tmp_path / 'starts'}) -gt 2 ] || echo ': {site_folder.EXPIRED}'\nexit 1"
    )
    why = "vouches for" if was_in else "its administrator has to renew it"
    with pytest.raises(UserError, match=why):
        site_folder._keep_going(site, ["bash", "-c", script])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (2 if was_in else 0)
    assert all("its certificate has expired" in line for line in said)


def test_a_log_has_no_colours_and_the_one_before_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("deal_core.atomic_write.LARGEST_LOG", 80)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    run(tmp_path, r"printf '\033[92mINFO\033[0m : one\n'; yes | head -30; echo last $no_proxy")
    whole = (tmp_path / "log.1").read_text() + (tmp_path / "log").read_text()
    assert "\x1b" not in whole
    assert re.match(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO \[flwr\] one\n", whole)
    assert whole.endswith("y\nlast 127.0.0.1,localhost\n")  # a proxy is for the server alone
    assert (tmp_path / "log").stat().st_size < 100


def test_nobody_runs_it_twice_and_who_does_is_named(tmp_path):
    with (
        exclusive_lock(tmp_path / "it.lock"),
        pytest.raises(UserError, match=rf"runs already \(process {os.getpid()}: .*python"),
    ):
        run(tmp_path, "true")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"port {port} is in use \(process {os.getpid()}: .*python"
        ):
            require_idle(tmp_path / "it.pid", port)
    require_idle(tmp_path / "it.pid", port)


def test_a_killed_parent_takes_what_it_has_started_with_it(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from simulations.deployment.service import supervise\n"
        "from simulations.engines.flower import FlowerHome\n"
        "folder = Path(sys.argv[1]); home = FlowerHome(folder / 'flower')\n"
        "supervise(['sleep', '600'], home, folder / 'log', folder / 'it.pid')\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    home = tmp_path / "flower"
    try:
        wait_for("a child", lambda: members(home), 120)
    finally:
        parent.kill()
        parent.wait()
    wait_for("its end", lambda: not members(home), 20)
