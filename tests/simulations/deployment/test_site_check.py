"""What ``deal site check`` tells a site before it serves; nothing of it needs a server."""

import json
import re
import socket
import ssl
import threading

import pytest
from typer.testing import CliRunner

from client.identity import as_the_site_decides
from client.site_file import read_site
from deal_core.config.data import DataConfig
from deal_core.config.experiment import Experiment
from deal_core.data.files import SiteSource
from deal_core.errors import UserError
from deal_core.privacy.policy import Policy
from simulations.cli import app
from simulations.deployment import keys
from simulations.deployment.site import folder as folder_module
from simulations.deployment.site.check import (
    MOST_SKEW,
    check_clock,
    check_connection,
    check_site,
    check_sums,
    what_leaves,
)
from simulations.deployment.site.folder import init_site, start_site
from simulations.run.experiment import Request, load_experiment

AGREED = {"triage": ("a", "b")}
GOOD = [{"text": f"case {n}", "label": "ab"[n % 2]} for n in range(6)]
OTHERS = {name: keys.make_key_pair(name) for name in ("south", "west", "east")}
SECURE = {"secure": True, "min_cohort": 3}
TWO = ("south", "west")


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path):
    for split in ("train", "test"):
        jsonl(tmp_path / "data" / "triage" / f"{split}.jsonl", GOOD)
    return tmp_path / "data"


@pytest.fixture
def site(tmp_path, data):
    authority = tmp_path / "given.crt"
    authority.write_bytes(keys.make_authority().public)
    init_site(tmp_path / "site", data, "north", "127.0.0.1:1", authority, AGREED)
    return tmp_path / "site"


def asked(labels=AGREED, **tables):
    """An experiment that the policy of ``deal site init`` allows, but for ``tables``."""
    data = DataConfig(source="sites", labels=labels)
    return Experiment(**{"data": data, "privacy": {"mechanism": "record"}} | tables)


def checked(site, experiment=None):
    return check_site(site, experiment, offline=True)


def change(site, old, new):
    text = (site / "site.toml").read_text()
    assert old in text
    (site / "site.toml").write_text(text.replace(old, new, 1))


def undeclared(site):
    """Without labels, as ``deal site init`` writes it without an experiment."""
    head, _, rest = (site / "site.toml").read_text().partition("[data.labels]")
    (site / "site.toml").write_text(head + rest[rest.index("[compute]") :])


def test_a_good_site_counts_per_task_and_label_and_says_what_leaves(site):
    report = checked(site)
    assert (report.problems, report.warnings) == ([], [])
    said = "\n".join(report.lines)
    assert "task 'triage': 6 train, 6 test; train: a 3, b 3" in said
    assert "would leave" in said
    assert "case" not in said
    printed = CliRunner().invoke(app, ["site", "check", str(site), "--offline"]).output
    assert "ok     key " in printed
    assert "\nnote   secure sums: not possible here: no site is pinned" in printed


def test_all_that_is_wrong_with_a_task_is_told_beside_what_is_right(site, data):
    wrong = [{"text": " ", "label": "a"}, {"text": "case", "label": "z"}]
    jsonl(data / "triage" / "train.jsonl", [*GOOD, wrong[0], *GOOD, *wrong])
    report = checked(site, asked())
    assert "'z' is no label of the task (they are: a, b)" in report.problems[0]
    assert "task 'triage': 12 train, 6 test; train: a 6, b 6" in "\n".join(report.lines)
    assert "task 'triage': 2 rows have no text or no answer, and are left out" in report.warnings


def test_rows_that_are_held_out_are_those_that_the_site_holds_out(site, data):
    (data / "triage" / "test.jsonl").unlink()
    rows = [{"text": f"case {n}", "label": "ab"[n % 2]} for n in range(40)]
    jsonl(data / "triage" / "train.jsonl", rows)
    change(site, "[data]", "[data]\nsplit = 0.3")
    decided = as_the_site_decides(asked(), read_site(site / "site.toml"))
    own = SiteSource(decided.data).load("triage")
    said = "\n".join(checked(site).lines)
    assert f"task 'triage': {len(own.train)} train, {len(own.test)} test" in said


def test_the_labels_of_an_experiment_are_compared(site):
    report = checked(site, asked({"triage": ("a", "beta"), "later": ("x", "y")}))
    differ, row, _ = report.problems  # of train and of test
    assert "[data.labels] of site.toml: 'triage' differs, 'later' is missing" in differ
    assert "row 2: 'b' is no label of the task (they are: a, beta" in row
    assert any("'later': no folder; this site sits it out" in line for line in report.lines)
    undeclared(site)
    (problem,) = checked(site).problems
    assert "takes part in no task; deal site check --experiment FILE prints the lines" in problem


@pytest.mark.parametrize("declared", [True, False])
def test_the_lines_that_are_printed_make_the_labels_agree(site, declared):
    """Also with names that TOML must quote."""
    labels = AGREED | {'a "rare" task': ("x, y", "z]")}
    if not declared:
        undeclared(site)
    (problem,) = checked(site, asked(labels)).problems
    lines = problem.partition(":\n")[2]
    assert lines.startswith("[data.labels]\n") == (not declared)
    where = '"triage" = ["a", "b"]\n' if declared else "[compute]"
    change(site, where, f"{where}{lines}\n" if declared else f"{lines}\n{where}")
    assert read_site(site / "site.toml").data.labels == labels
    assert checked(site, asked(labels)).problems == []


def test_class_sums_leave_with_noise_or_not_at_all(site):
    own = read_site(site / "site.toml")

    def said(policy, experiment):
        line, *told = check_sums(own.model_copy(update={"policy": policy}), experiment)
        assert ["the smallest label (3 records)" in each for each in told] == [
            True for _ in told if "leave under" in line
        ]
        return line

    clear = {"privacy": {"mechanism": "none"}, "federation": {"clients": 3, "sites": tuple("abc")}}
    agreed = asked(**clear)
    assert "stay here" in said(Policy(), agreed)
    noised = "class sums leave under masks, once for each task, with a noise multiplier of 0.61"
    assert said(Policy(share_sums=True), agreed) == noised
    for name, message in (
        ("prototype", r"keeps class sums \(policy.share_sums\)"),
        ("linear-probe", "exact sums tell who is in them"),
    ):
        with pytest.raises(UserError, match=message):
            said(Policy(), asked(**clear, method={"name": name}))
    shipped = load_experiment(Request("private-sums"))
    private = shipped.model_copy(update={"data": agreed.data})
    assert own.policy is not None
    charged = "class sums leave under masks, with noise, charged"
    assert said(own.policy, private) == charged
    weak = private.privacy.model_copy(update={"target_epsilon": 200.0})
    with pytest.raises(UserError, match="keeps class sums"):
        said(Policy(mechanism="record"), private.model_copy(update={"privacy": weak}))
    for policy, told in (
        (Policy(mechanism="record", share_sums=True), "with noise, charged"),
        (Policy(share_sums=True), "with noise, once for each task"),
        (Policy(), "none leaves"),
    ):
        lines = what_leaves(own.model_copy(update={"policy": policy}))
        (line,) = (line for line in lines if line.startswith("class sums"))
        assert told in line
        (bit,) = (line for line in lines if line.startswith("one bit"))
        assert bit.endswith("leaves") == ("once" in told)


@pytest.mark.parametrize("text", ["", "<html>not found</html>"])
def test_keys_and_connection_are_problems_that_hide_nothing_else(site, text):
    (problem,) = check_site(site).problems
    assert problem.startswith("127.0.0.1:1: no connection")
    (site / "ca.crt").write_text(text)
    (site / "site.key").chmod(0o644)
    report = check_site(site)
    assert "others can read this private key; run chmod 600" in report.problems[0]
    assert any("task 'triage'" in line for line in report.lines)
    (site / "site.key").chmod(0o600)
    assert any("ca.crt: no certificate" in line for line in check_site(site).problems)


def test_a_server_is_reached_through_the_proxy_of_a_hospital(tmp_path, data, monkeypatch):
    """And an end of its certificate that is near is told."""
    monkeypatch.setattr(keys, "SERVER_DAYS", 20)
    authority = keys.make_authority()
    server = keys.make_server_certificate(authority, ["server.invalid"])  # nobody resolves it
    files = {"ca.crt": authority.public, "server.pem": server.private + server.public}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    asked_for = []

    def serve(listener):
        near, _ = listener.accept()
        with near:
            asked_for.append(near.recv(4096).decode().splitlines()[0])
            near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            with context.wrap_socket(near, server_side=True) as inner:
                inner.recv(4096)
                inner.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        folder = tmp_path / "site"
        init_site(folder, data, "north", "server.invalid:9443", tmp_path / "ca.crt", AGREED)
        reached, expires = check_connection(read_site(folder / "site.toml"))
    assert reached == "server server.invalid:9443: reached, certificate valid"
    assert "its certificate expires on" in expires
    assert asked_for[0].startswith("CONNECT server.invalid:9443 ")


@pytest.mark.parametrize("skew", [MOST_SKEW + 1, -MOST_SKEW - 1])
def test_clocks_that_differ_are_named(skew):
    word = "behind" if skew > 0 else "ahead of"
    with pytest.raises(UserError, match=f"the clock here is 11 s {word} the server's.*NTP"):
        list(check_clock(skew))
    assert list(check_clock(skew / 2)) == ["clock: agrees with the server's"]


def test_half_a_line_of_the_log_hides_no_other(site):
    """A full disk, or a loss of power, has left it."""
    said = json.dumps({"event": "verdict", "worse": True, "tasks": ["triage"]})
    (site / "state" / "log.jsonl").write_text(f'{{"event": "answ{said}\n{said}\n{{"event": "ar')
    lines = check_site(site, None, offline=True).lines
    assert any("of triage: they make answers here worse" in line for line in lines)


def test_a_state_folder_elsewhere_is_its_owners_alone(site, tmp_path):
    state = tmp_path / "elsewhere"
    state.mkdir(mode=0o755)
    change(site, 'state = "state"', f'state = "{state}"')
    checked(site)
    assert state.stat().st_mode & 0o777 == 0o700


def test_units_are_columns_that_name_people(site):
    """A column that does is warned of; as unit it must be there, and the experiment's too."""

    def of_patients(name, empty=False):
        """Two records of each patient, the same in training and test."""
        rows = [{**r, name: "" if empty and n == 5 else f"p{n // 2}"} for n, r in enumerate(GOOD)]
        for split in ("train", "test"):
            jsonl(site.parent / "data" / "triage" / f"{split}.jsonl", rows)

    of_patients("ward")
    assert checked(site).warnings == []  # it names nobody
    of_patients("patient_id")
    (warning,) = checked(site).warnings
    assert "column 'patient_id' of task 'triage' has 3 values in 6 training rows" in warning
    assert "set policy.unit_column = 'patient_id'" in warning
    groups = asked(privacy={"mechanism": "record", "unit_column": "person"})
    (found,) = checked(site, groups).problems
    assert "policy.unit_column" in found
    change(site, "[policy] ", '[policy]\nunit_column = "patient_id" ')
    report = checked(site, groups)
    assert report.problems == []
    (warning,) = report.warnings
    assert "3 groups have training and test records" in warning
    said = "\n".join(report.lines)
    assert "6 train of 3 groups" in said
    assert "unit of privacy: group of 'patient_id'" in said
    (found,) = checked(site, asked()).problems
    assert "demands groups of 'patient_id'" in found
    for column, empty, problem in (
        ("patient_id", True, "row 6: column 'patient_id' is empty"),
        ("ward", False, "row 1: no column 'patient_id'; the columns are: text, label, ward"),
    ):
        of_patients(column, empty)
        found = checked(site).problems
        assert [problem in each for each in found] == [True, True]  # of train and of test


def test_people_who_differ_in_punctuation_alone_are_warned_of(site):
    names = ("P-1", "p 1", "p-2", "P-2", "p-3", "12")
    rows = [{**row, "patient": name} for row, name in zip(GOOD, names, strict=True)]
    jsonl(site.parent / "data" / "triage" / "train.jsonl", rows)
    jsonl(site.parent / "data" / "triage" / "test.jsonl", [{**GOOD[0], "patient": "p-4"}])
    change(site, "[policy] ", '[policy]\nunit_column = "patient" ')
    (warning,) = checked(site).warnings
    assert warning.startswith("task 'triage': 'p 1' and 'p-1' look alike")


def test_counts_are_warned_of_in_the_clear_and_where_they_are_in_no_sum(site):
    private = {"mechanism": "record", "metrics": "summed"}
    (told,) = checked(site, asked(privacy=private, aggregation={"secure": True})).warnings
    assert told.startswith(f"task 'triage': {len(GOOD)} test rows")
    assert "policy.min_records = 32" in told
    assert checked(site, asked(privacy=private)).warnings == []
    change(site, 'metrics = "none"', 'metrics = "clear"')
    (warning,) = checked(site).warnings
    assert warning.startswith('policy.metrics = "clear": a crafted head or adapter can name')


def own(site):
    return keys.fingerprint_of_line(keys.read_public_key(site / "site.pub"))


def pin(site, *names):
    """Write pins, as the comment in the file says."""
    shown = {name: keys.fingerprint_of_line(OTHERS[name].public.decode()) for name in names}
    lines = "".join(f'{name} = "{print_}"\n' for name, print_ in shown.items())
    change(site, "\n[policy]", f"\n[peers]\n{lines}\n[policy]")


def test_a_site_that_starts_is_told_of_certificates_that_expire(
    tmp_path, data, monkeypatch, capsys
):
    """And serves: the server may come later."""
    monkeypatch.setattr(keys, "AUTHORITY_DAYS", 20)
    soon = tmp_path / "soon.crt"
    soon.write_bytes(keys.make_authority().public)
    init_site(tmp_path / "site", data, "north", "127.0.0.1:1", soon, AGREED)
    served = []
    monkeypatch.setattr(folder_module, "_keep_going", lambda *given: served.append(given))
    start_site(tmp_path / "site")
    said = capsys.readouterr().out
    assert "warning: " in said
    assert "ca.crt: expires on " in said
    assert len(served) == 1


def test_a_site_is_told_its_fingerprint_and_pins_nothing_else(tmp_path, site):
    said = init_site(tmp_path / "other", tmp_path / "data", "south")
    assert f"fingerprint of this site's key: {own(tmp_path / 'other')}" in said
    assert any(own(site) in line for line in checked(site).lines)
    change(site, "\n[policy]", '\n[peers]\nwest = "MD5:12:34"\n[policy]')
    with pytest.raises(UserError, match=r"peers\.west: .* is no fingerprint; write what deal site"):
        read_site(site / "site.toml")


REQUIRED = ('secure_aggregation = "allowed"', 'secure_aggregation = "required"')
FOUR = {"sites": ("north", *OTHERS), "clients": 4}
THREE = {"sites": ("north", "south", "west"), "clients": 3}
MOST = ("\nmin_cohort = 3", "\nmin_cohort = 4")
ASKED = ("[policy] ", '[data.instructions]\ntriage = "How urgent?"\n[policy] ')
TOLD = DataConfig(source="sites", labels=AGREED, instructions={"triage": "Whose?"})


@pytest.mark.parametrize(
    ("changes", "pinned", "experiment", "problem"),
    [
        ((), (), asked(model={"name": "somebody/else"}), "does not name 'somebody/else'"),
        ((), (), asked(privacy={"mechanism": "none"}), "'none', but the site's policy demands"),
        ([ASKED], (), asked(data=TOLD), "task 'triage' has another instruction"),
        ((), (), asked(aggregation=SECURE), "secure sums: no site is pinned"),
        ((), TWO, asked(aggregation=SECURE, federation=FOUR), "no key of east is pinned"),
        ((), TWO, asked(aggregation=SECURE, federation=THREE), ""),
        ([REQUIRED], (), None, "secure sums: no site is pinned"),
        ([REQUIRED], OTHERS, asked(), "set aggregation.secure to true in the experiment"),
        (
            [REQUIRED, MOST],
            OTHERS,
            asked(aggregation=SECURE),
            "policy.min_cohort is 4, and aggregation.min_cohort of the experiment 3",
        ),
        ([REQUIRED, MOST], OTHERS, asked(aggregation=SECURE | {"min_cohort": 4}), ""),
    ],
)
def test_what_the_site_would_refuse_in_the_first_round_is_told_before(
    site, changes, pinned, experiment, problem
):
    """Another base model, mechanism or instruction, sums that it could not make; or nothing."""
    for old, new in changes:
        change(site, old, new)
    if pinned:
        pin(site, *pinned)
    report = checked(site, experiment)
    assert [problem in each for each in report.problems] == [True] * bool(problem)
    if not problem:
        assert "base model 'embedded:minilm': agreed to" in report.lines
        assert "the policy allows the experiment: privacy.mechanism 'record'" in report.lines


def test_whether_sums_could_be_made_is_one_line(site):
    def line():
        report = checked(site)
        assert report.problems == []  # nobody has asked for them
        (found,) = [each for each in report.lines if each.startswith("secure sums")]
        return found

    assert "not possible here: no site is pinned" in line()
    pin(site, *TWO)
    assert "allowed by the policy, with south, west (pinned), of 3 sites or more, 1 of" in line()
    change(site, "\nmin_cohort = 3", "\nmin_cohort = 5")
    assert "2 other sites are pinned, and a sum is of 5" in line()


def test_somebody_in_two_tasks_is_a_problem_before_anything_is_served(site, data):
    for task in ("triage", "ward"):
        rows = [
            {"text": "no findings", "label": "ab"[n % 2], "who": f"{task} {n}"} for n in range(40)
        ]
        for split in ("train", "test"):
            jsonl(data / task / f"{split}.jsonl", rows)
    change(site, '"triage" = ["a", "b"]', '"triage" = ["a", "b"]\nward = ["a", "b"]')
    assert not any("disjoint" in line for line in checked(site).lines)
    change(site, "[policy]", "[policy]\ndisjoint_tasks = true")
    with pytest.raises(UserError, match=r"no column says it; set data\.id_column"):
        checked(site)
    change(site, "[data]\n", '[data]\nid_column = "who"\n')
    report = checked(site)
    assert not report.problems  # equal texts of two people are in nobody's way
    assert "policy.disjoint_tasks: no id is in two of 2 tasks" in report.lines
    train = data / "ward" / "train.jsonl"
    train.write_text(train.read_text().replace("ward 7", "triage 7"))
    said = "tasks 'triage' and 'ward' have 1 ids of training records in common"
    assert [said in each for each in checked(site).problems] == [True]
    with pytest.raises(UserError, match=re.escape(said)):
        start_site(site)
