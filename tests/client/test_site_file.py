"""The site decides; and nothing of a fault but a code leaves it."""

import json
import multiprocessing
import os
import stat
import subprocess
import time

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client import resident_worker
from client.app import make_app
from client.gate import Refusal
from client.identity import Client, as_the_site_decides, client_of, file_of
from client.site_file import NODE_KEY, read_site
from deal_core.config.experiment import show_device
from deal_core.config.file import PACKAGE, parse_experiment
from deal_core.errors import UserError
from simulations.engines.worker_pool import assume_identity
from tests.run_configs import placed

SECRET = "Maria K., born 1961-04-03"
TOML = """\
[site]
name = "north"
[server]
address = "127.0.0.1:9443"
[data]
path = "data"
text_column = "complaint"
label_column = "ward"
id_column = "patient"
[data.labels]
triage = ["Surgery", "Skin"]
elsewhere = ["Yes", "No"]
[data.files.triage]
label_text = { "1" = "Surgery" }
[compute]
device = "cpu"
threads = 3
keep_seconds = 0
[policy]
max_epsilon = 2.0
"""


@pytest.fixture
def site_file(tmp_path):
    path = tmp_path / "site.toml"
    path.write_text(TOML)
    (tmp_path / "data" / "triage").mkdir(parents=True)
    return path


def experiment(**tables):
    data = {
        "source": "sites",
        "path": "/etc",
        "text_column": "password",
        "label_column": "user",
        "files": {"triage": {"text_column": "shadow"}},
        "hub": {"x": {"path": "evil/set"}},
        "labels": {"triage": ["Surgery", "Skin"]},
        "max_train": 5,
        "max_test": 5,
    }
    federation = {"sites": ["south", "north"], "clients": 2}
    return parse_experiment({"data": data, "federation": federation, **tables}, "test")


def test_no_path_and_no_column_of_the_servers_is_used(site_file):
    site = read_site(site_file)
    decided = as_the_site_decides(experiment(), site)
    data = decided.data
    assert data.source == "site"
    assert data.path == str(site_file.parent / "data")
    assert (data.text_column, data.label_column) == ("complaint", "ward")
    assert data.id_column == "patient"
    assert data.files["triage"].label_text == {"1": "Surgery"}
    assert data.hub == {}
    assert decided.run.threads == 3
    assert data.tasks == ("triage",)
    assert data.labels == {"triage": ("Surgery", "Skin"), "elsewhere": ("Yes", "No")}
    assert (data.max_train, data.max_test) == (0, 0)
    told = decided.model_dump_json()
    for word in ("/etc", "password", "shadow", "evil"):
        assert word not in told
    assert site.policy is not None
    assert site.policy.max_epsilon == 2.0


def test_answers_that_are_texts_are_agreed_on_as_labels_are(site_file):
    """Columns are the site's; the words of a prompt are the experiment's, and are compared with
    those that the site names."""
    tables = 'target_column = "reply"\n[data.instructions]\nletters = "Answer."\n[data.labels]'
    text = TOML.replace('elsewhere = ["Yes", "No"]', "letters = []")
    text = text.replace("[data.labels]", tables)
    site_file.write_text(text)
    site = read_site(site_file)

    def decided(**changes):
        asked = experiment()
        more = {"labels": {"letters": (), "triage": ("Surgery", "Skin")}, "target_column": "salary"}
        more["instructions"] = {"letters": "Answer."}
        data = asked.data.model_copy(update={**more, "generation": ("letters",), **changes})
        return as_the_site_decides(asked.model_copy(update={"data": data}), site)

    data = decided(instructions={"letters": "Answer.", "triage": "Where to?"}).data
    assert (data.generation, data.target_column) == (("letters",), "reply")
    assert decided(measures={"letters": "exact-match"}).data.measure("letters") == "exact-match"
    assert data.instructions == {"letters": "Answer.", "triage": "Where to?"}
    with pytest.raises(UserError, match="answers are texts by"):
        decided(generation=("letters", "triage"))
    with pytest.raises(UserError, match="has another instruction than"):
        decided(instructions={})


def test_models_and_public_texts_need_the_sites_consent(site_file):
    site = read_site(site_file)
    asked = experiment(model={"name": "bert"})
    public = asked.data.model_copy(update={"public_path": "/etc/passwd"})
    asked = asked.model_copy(update={"data": public})
    bert = site.model_copy(update={"models": {"bert": "/srv/bert"}})
    with pytest.raises(Refusal, match=r"set data\.public_path in site\.toml"):
        as_the_site_decides(asked, bert)
    own = site.data.model_copy(update={"public_path": "/srv/public.txt"})
    decided = as_the_site_decides(asked, bert.model_copy(update={"data": own}))
    assert decided.data.public_path == "/srv/public.txt"
    assert decided.model.name == "/srv/bert"


def test_where_peers_are_pinned_the_server_vouches_for_none(site_file):
    vouched = TOML.replace("[policy]\n", "[policy]\nserver_vouches_for_peers = true\n")
    for pinned, vouches in (("", True), (f'[peers]\nwest = "SHA256:{"A" * 43}"\n', False)):
        site_file.write_text(vouched + pinned)
        client = Client(0, site_file.parent, experiment(), read_site(site_file))
        policy = client.site.policy
        assert policy is not None
        assert policy.server_vouches_for_peers == vouches


def context(site_file, out="/srv/server/runs/run-1", **tables):
    config = placed(experiment(**tables), out)
    return Context(7, 1, {NODE_KEY: str(site_file)}, RecordDict(), config)


def found(asked):
    return client_of(asked, file_of(asked))


def test_a_site_knows_its_number_and_its_own_folder(site_file):
    client = found(context(site_file))
    assert client.number == 1
    assert client.folder == site_file.parent / "state" / "runs" / "run-1"


@pytest.mark.parametrize("out", ["/srv/..", "/srv/.hidden", "", "/srv/a b", "/srv/" + "x" * 65])
def test_the_name_of_a_run_cannot_lead_out_of_the_state_folder(site_file, out):
    with pytest.raises(UserError, match="the name of the run"):
        found(context(site_file, out))


def test_a_run_for_others_is_refused(site_file):
    site_file.write_text(TOML.replace('"north"', '"east"'))
    with pytest.raises(UserError, match="the run is for south, north, and this site is 'east'"):
        found(context(site_file))


@pytest.mark.parametrize("theirs", ["0" * 64, ""])
def test_a_run_of_another_release_is_refused_with_a_code(site_file, theirs):
    asked = context(site_file)
    asked.run_config[PACKAGE] = theirs
    with pytest.raises(Refusal, match="install the same release at both") as refused:
        found(asked)
    assert refused.value.code == "version"
    with assume_identity(7, 1):
        reply = make_app()(Message(RecordDict(), 1, "query.hello"), asked)
    assert dict(reply.content.config_records["status"]) == {"code": "version"}


def ask(site_file, kind, content, ttl=None):
    with assume_identity(7, 1):
        return make_app()(Message(content, 1, kind, ttl=ttl), context(site_file))


@pytest.mark.parametrize("kind", ["train", "evaluate", "query.hello"])
@pytest.mark.parametrize("broken", [False, True], ids=["fault", "no site.toml"])
def test_the_server_gets_a_code_and_the_sites_log_the_rest(site_file, monkeypatch, kind, broken):
    def fails(*_):
        raise RuntimeError(f"row 7: {SECRET}")

    monkeypatch.setattr("client.app.client_of", fails)
    if broken:
        site_file.unlink()
    instruction = ConfigRecord({"task": "triage", "stage": 0, "server_round": 2})
    reply = ask(site_file, kind, RecordDict({"instruction": instruction}))
    assert {name: dict(record) for name, record in reply.content.items()} == {
        "status": {"code": "failed"}
    }
    assert not reply.has_error()
    log = site_file.parent / "state" / "log.jsonl"
    if broken:
        assert not log.exists()
        return
    arrived, line = [json.loads(line) for line in log.read_text().splitlines()]
    assert arrived["event"] == "arrived"
    assert line["event"] == "request_failed"
    assert SECRET in line["error"]
    assert "RuntimeError" in line["traceback"]
    assert (line["task"], line["server_round"]) == ("triage", "2")


@pytest.mark.parametrize("keep", [0, 60])
def test_what_a_site_keeps_is_its_owners_alone_whoever_starts_it(site_file, monkeypatch, keep):
    """A plain SuperNode, say: ``deal site start`` has made the folder before."""
    site_file.write_text(TOML.replace("keep_seconds = 0", f"keep_seconds = {keep}"))
    monkeypatch.setattr("client.resident_worker.subprocess.Popen", lambda *_, **__: None)
    before = os.umask(0o022)
    try:
        ask(site_file, "train", RecordDict())
    finally:
        os.umask(before)
    assert stat.S_IMODE((site_file.parent / "state").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("device", "shown"), [("cpu", ""), ("cuda:1", "1"), ("cuda", "0,1"), ("auto", "0,1")]
)
def test_torch_sees_the_device_that_the_site_lends(site_file, monkeypatch, device, shown):
    site_file.write_text(TOML.replace('device = "cpu"', f'device = "{device}"'))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    show_device(read_site(site_file).compute.device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_process_that_cannot_be_started_costs_no_answer_and_tells_nothing(site_file, kind):
    """By default a process that stays does the work; what fails before it is asked is in no
    handler's hands yet, and Flower would send its text to the server."""
    site_file.write_text(TOML.replace("keep_seconds = 0\n", ""))
    in_the_way = site_file.parent / "state" / "worker"
    in_the_way.parent.mkdir()
    in_the_way.write_text("")
    reply = ask(site_file, kind, RecordDict())
    assert not reply.has_error()
    assert dict(reply.content["status"]) == {"code": "refused"}  # as here, without that process
    log = (in_the_way.parent / "log.jsonl").read_text()
    assert "FileExistsError" in log


@pytest.mark.slow
def test_the_process_that_stays_answers_and_keeps_its_faults(site_file, monkeypatch):
    """The real one: it lives on between requests, is replaced when it is dead, and ends."""
    started, popen = list[subprocess.Popen[bytes]](), subprocess.Popen

    def start(*given, **named):
        started.append(popen(*given, **named))
        return started[-1]

    monkeypatch.setattr("client.resident_worker.subprocess.Popen", start)
    site_file.write_text(TOML.replace("keep_seconds = 0", "keep_seconds = 60"))
    try:
        for _ in range(2):
            reply = ask(site_file, "train", RecordDict())
            assert dict(reply.content.config_records["status"]) == {"code": "refused"}
        (first,) = started  # the second request found it alive
        assert first.poll() is None
        folder = site_file.parent / "state" / "worker"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        first.kill()
        first.wait()
        site_file.write_text(TOML.replace("keep_seconds = 0", "keep_seconds = 2"))
        assert ask(site_file, "train", RecordDict()).content["status"]["code"] == "refused"
        _, second = started
        assert second.wait(60) == 0  # nobody asks: it ends
    finally:
        for each in started:
            each.kill()
            each.wait()
    log = (site_file.parent / "state" / "log.jsonl").read_text()
    assert log.count("request_refused") == 3
    assert "PayloadError" in log


def test_a_request_that_expires_in_the_process_that_stays_is_not_begun_anew(site_file, monkeypatch):
    """It was frozen, say; the site is to be free for the next request."""
    site_file.write_text(TOML.replace("keep_seconds = 0", "keep_seconds = 2"))
    near, frozen = multiprocessing.Pipe()
    monkeypatch.setattr("client.resident_worker._connect", lambda address: near)
    monkeypatch.setattr("client.resident_worker.LATE_SECONDS", 0.0)
    monkeypatch.setattr("client.app.client_of", pytest.fail)
    with frozen:
        reply = ask(site_file, "train", RecordDict(), ttl=0.5)
        assert frozen.poll()  # it had the request
    assert dict(reply.content.config_records["status"]) == {"code": "failed"}


def test_a_worker_that_reads_nothing_is_waited_for_no_longer_than_the_message_is_valid():
    near, frozen = multiprocessing.Pipe()
    begun = time.monotonic()
    with near, frozen, pytest.raises(TimeoutError):
        resident_worker._send_within(near, 0.3, b"x" * 10_000_000)
    assert 0.25 < time.monotonic() - begun < 5


def test_the_process_that_stays_does_not_work_on_what_has_expired():
    """It waited in the queue; an update would be charged, and nobody would take it."""
    near, far = multiprocessing.Pipe()
    with assume_identity(1, 1), near, far:
        message = Message(RecordDict(), 1, "train", ttl=10.0)
        message.metadata.__dict__["_created_at"] = time.time() - 11
        near.send((message, Context(1, 1, {}, RecordDict(), {})))
        resident_worker.answer(pytest.fail, far)
        reply = near.recv()
    assert dict(reply.content.config_records["status"]) == {"code": "failed"}


def test_where_the_sites_file_cannot_be_read_nothing_leaves(site_file):
    site_file.write_text("[site")
    reply = ask(site_file, "query.hello", RecordDict())
    assert {name: dict(record) for name, record in reply.content.items()} == {
        "status": {"code": "failed"}
    }


def test_site_toml_names_its_faults(site_file):
    site_file.write_text(TOML + "max_epsilo = 1\n")
    with pytest.raises(UserError, match=r"unknown key 'policy.max_epsilo'; did you mean 'max_eps"):
        read_site(site_file)
    site_file.write_text(TOML + "[dat]\n")
    with pytest.raises(UserError, match="unknown key 'dat'; did you mean 'data'"):
        read_site(site_file)
    site_file.write_text(TOML.replace('name = "north"', 'name = "../north"'))
    with pytest.raises(UserError, match=r"site.name '../north' should be letters"):
        read_site(site_file)


def test_a_log_on_a_full_disk_stops_no_reply(site_file):
    state = site_file.parent / "state"
    state.mkdir()
    (state / "log.jsonl").symlink_to("/dev/full")
    reply = ask(site_file, "train", RecordDict())
    assert not reply.has_error()
    assert dict(reply.content.config_records["status"]) == {"code": "refused"}


def test_which_rows_have_tags_for_words_is_the_sites_word(site_file):
    """Of a task that is not in the run, too: its records count."""
    told = '[data.measures]\nelsewhere = "entity-f1"\n[data.labels]'
    site_file.write_text(TOML.replace("[data.labels]", told))
    site = read_site(site_file)

    def decided(**measures):
        asked = experiment()
        data = asked.data.model_copy(update={"measures": measures})
        return as_the_site_decides(asked.model_copy(update={"data": data}), site).data

    assert decided().tagged("elsewhere")
    assert decided(elsewhere="rouge-1").tagged("elsewhere")
    assert not decided().tagged("triage")
    with pytest.raises(Refusal, match=r"\[data\.measures\] has \"entity-f1\""):
        decided(triage="entity-f1")
