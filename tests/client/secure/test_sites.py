"""Secure sums among real sites: pins, policy, and servers that are not honest."""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from client.app import make_app
from deal_core.config.file import to_run_config
from deal_core.errors import UserError
from deal_core.privacy.ledger import Ledger
from deal_core.secure_sum.keys import announce, public_half
from simulations.deployment.keys import fingerprint_of_line, make_key_pair
from simulations.engines.worker_pool import assume_identity
from tests.client.secure.sites import (
    NAMES,
    OPEN,
    RUN,
    TASK,
    SecureSite,
    SiteGrid,
    asked_for,
    grid_of,
    make_sites,
    pins,
)
from tests.simulations.run.secure_runs import rounds

pytestmark = pytest.mark.usefixtures("one_model")

CODES = {"unpinned", "protocol", "refused"}


@pytest.fixture
def sites(tmp_path):
    return make_sites(tmp_path)


@pytest.fixture
def play(tmp_path):
    """Run one round or more; only fixed words come back from who refuses."""

    def run(sites, *overrides, kind=SiteGrid, last=1):
        experiment = asked_for(*overrides)
        ran = rounds(experiment, tmp_path / RUN, last=last, grid_of=grid_of(sites, kind))
        said = [r for r in ran.told("client_failed", "reason") if r.startswith("client reports")]
        assert {reason.removeprefix("client reports ").strip("'") for reason in said} <= CODES
        return ran

    return run


def test_sites_that_know_each_other_send_nothing_but_masked_vectors(sites, play, monkeypatch):
    """Of as many as policies and experiment ask for; rounding does not follow from the run's seed,
    which is the server's word."""
    drawn = []
    monkeypatch.setattr("client.requests.seeded_numpy", lambda *given: drawn.append(given))
    for site in sites:
        site.write(pins(sites, site), OPEN + "min_cohort = 4\n")
    ran = play(sites, "aggregation.min_cohort=4")
    assert drawn == []
    assert ran.told("summed", "sites") == [4]
    assert {key.partition(".")[0] for key in ran.seen} == {"status", "secure", "metrics"}
    assert ran.told("client_failed", "client") == []
    assert {e["fingerprint"] for e in ran.events if e["event"] == "announced"} == {
        site.fingerprint for site in sites
    }
    assert all(site.trained() for site in sites)
    assert set(ran.told("client_finished", "num_examples")) == {1.0}
    assert not any("loss" in event for event in ran.events)


CLEAR = (
    *("aggregation.secure=false", "method.prototype.enabled=on", "federation.rounds=1"),
    "federation.deadline_seconds=120",
)
SHARING = 'metrics = "none"\nmin_records = 1\nshare_sums = true\n'


def test_sites_that_train_in_the_clear_add_their_class_sums_under_masks(sites, play):
    """By default: the updates that a site keeps are no sign that it has announced itself before."""
    for site in sites:
        site.write(pins(sites, site), SHARING)
    ran = play(sites, *CLEAR, last=2)
    assert ran.told("client_failed", "reason") == []
    assert ran.told("summed", "sites") == [4]
    assert ran.state.heads.keys() == {TASK}


def test_sites_that_know_no_peer_keep_their_class_sums_and_the_run_goes_on(sites, play):
    for site in sites:
        site.write({}, SHARING)
    ran = play(sites, *CLEAR, last=2)
    idle = [e for e in ran.events if e["event"] == "client_idle" and e["phase"] == "prototypes"]
    assert {e["code"] for e in idle} == {"unpinned"}
    assert ran.told("round_lost", "phase") == ["prototypes"]
    assert ran.told("stage_finished", "stage") == [0]
    assert not ran.state.heads


def test_a_peer_that_is_not_pinned_is_named_with_the_cure_here_alone(sites, play):
    north, east = sites[0], sites[3]
    north.write({k: v for k, v in pins(sites, north).items() if k != "east"})
    ran = play(sites)
    assert ran.told("client_failed", "reason") == ["client reports 'unpinned'"]
    assert ran.told("client_failed", "client") == ["0"]
    assert ran.told("summed", "sites") == [3]
    assert not north.trained()
    (line,) = north.errors()
    assert f'"east" = "{east.fingerprint}"' in line
    assert "by telephone" in line
    assert "\n" not in line


def test_a_peer_with_another_key_than_the_pinned_one_is_named_with_both(sites, play):
    north, east = sites[0], sites[3]
    other = fingerprint_of_line(make_key_pair("east").public.decode())
    north.write({**pins(sites, north), "east": other})
    ran = play(sites)
    assert ran.told("client_failed", "reason") == ["client reports 'unpinned'"]
    (line,) = north.errors()
    assert "the server says that site 'east' has the key" in line
    assert east.fingerprint in line
    assert other in line
    assert "telephone that institution" in line


def test_without_pins_nobody_is_trusted_unless_the_policy_says_so(tmp_path, play):
    sites = make_sites(tmp_path)
    for site in sites[1:]:
        site.write({})
    with pytest.raises(UserError, match="the quorum is"):
        play(sites)
    for site in sites[1:]:
        site.write({}, OPEN + "server_vouches_for_peers = true\n")
    assert play(sites).told("summed", "sites") == [4]


@pytest.mark.parametrize(
    ("policy", "asked", "reason"),
    [
        ("min_cohort = 4\n", "aggregation.min_cohort=3", "min_cohort = 4"),
        ("colluding = 2\n", "privacy.colluding=1", "with 2"),
    ],
)
def test_a_site_whose_policy_asks_for_more_takes_no_part(sites, play, policy, asked, reason):
    north = sites[0]
    north.write(pins(sites, north), OPEN + policy)
    ran = play(sites, asked)
    assert ran.told("client_failed", "reason") == ["client reports 'protocol'"]
    assert ran.told("summed", "sites") == [3]
    assert reason in north.errors()[0]
    assert not north.trained()


@pytest.mark.parametrize("exchange", ["mask", "confirm", "unmask"])
def test_a_round_that_is_open_does_not_outlive_a_stricter_policy(sites, play, exchange):
    """The sites want larger sums when three exchanges are left, two, or one."""

    class Stricter(SiteGrid):
        def tamper(self, at, number, request):
            if at == exchange and number == 0:
                for site in self.sites:
                    site.write(pins(self.sites, site), OPEN + "min_cohort = 5\n")

    if exchange == "mask":
        with pytest.raises(UserError, match="0 of 4 clients gave a valid reply"):
            play(sites, kind=Stricter)
        assert not any(site.trained() for site in sites)
    else:
        assert play(sites, kind=Stricter).told("summed", "sites") == []
    assert all("min_cohort = 5" in site.errors()[-1] for site in sites)


@pytest.mark.parametrize("exchange", ["next", "mask", "confirm", "unmask"])
def test_a_peer_that_is_pinned_or_dropped_during_a_run_counts_at_once(sites, play, exchange):
    """A server that vouched for sites of its own sums with them no more, in no later exchange."""
    north, strangers, asked = sites[0], pins(sites[:2], sites[0]), []
    for site in sites:
        site.write({}, OPEN + "server_vouches_for_peers = true\n")

    class Pinned(SiteGrid):
        def tamper(self, at, number, request):
            asked.append(at)
            due = asked.count("prepare") > 4 if exchange == "next" else at == exchange
            if due and number == 0:  # of three peers it knows one from now on
                north.write(strangers, OPEN + "server_vouches_for_peers = true\n")

    ran = play(sites, kind=Pinned, last=2)
    assert "not among the pinned peers" in north.errors()[-1] or "[peers]" in north.errors()[-1]
    whole = {"next": [4, 3], "mask": [3, 3], "confirm": [4, 3], "unmask": [4, 3]}
    assert ran.told("summed", "sites") == whole[exchange]


def test_a_masked_vector_does_not_outlive_a_stricter_policy(sites, play):
    """It was sent, and its reply lost; the site has thought better of it; the server asks again."""
    grids = []

    class Kept(SiteGrid):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            grids.append(self)

    play(sites, kind=Kept)
    asked = grids[0].asked["mask", 0]
    with assume_identity(1, 1):
        assert answered_again(grids[0], asked) == "ok"
        sites[0].write(pins(sites, sites[0]), OPEN + "max_rank = 16\n")
        assert answered_again(grids[0], asked) == "masked"


def answered_again(grid, asked):
    """Code of the reply to a request that comes once more."""
    message = Message(RecordDict(dict(asked.content)), asked.metadata.dst_node_id, "train")
    (reply,) = grid.send_and_receive([message])
    return str(reply.content["status"]["code"])


def test_a_site_that_requires_masks_takes_no_part_in_an_experiment_without(sites, play):
    for site in sites[2:]:
        site.write(pins(sites, site), OPEN.replace("required", "allowed"))
    ran = play(sites, "aggregation.secure=false")
    idle = [e["client"] for e in ran.events if e.get("code") == "policy"]
    assert idle == ["0", "1"]
    assert [site.trained() for site in sites] == [False, False, True, True]


def test_another_policy_refuses_before_it_has_prepared(sites, play):
    """A site that prepares and then sends nothing is a dropout for the others."""
    north = sites[0]
    north.write(pins(sites, north), OPEN + 'mechanism = "record"\n')
    ran = play(sites)
    assert [e["client"] for e in ran.events if e.get("code") == "policy"] == ["0"]
    cohorts = [(e["sites"], e["cohort"]) for e in ran.events if e["event"] == "summed"]
    assert cohorts == [(3, 4)]
    assert not north.trained()


def test_sums_of_embeddings_leave_masked_and_where_the_policy_shares_them(sites, play):
    asked = ("method.name=prototype", "method.prototype.directions=0")
    ran = play(sites, *asked)
    assert {e["code"] for e in ran.events if e["event"] == "client_idle"} >= {"policy"}
    assert not any(site.trained() for site in sites)
    for site in sites:
        site.write(pins(sites, site), OPEN + "share_sums = true\n")
    ran = play(sites, *asked)
    assert not [key for key in ran.seen if key.startswith("sums")]
    assert ran.told("summed", "sites") == [4]
    assert ran.state.heads.keys() == {TASK}


class WithoutRecord(SiteGrid):
    """Asks for an update, and leaves the secure sum out."""

    def tamper(self, exchange, number, request):
        if exchange == "mask":
            del request.content["secure"]


def test_an_update_is_not_sent_without_a_sum_it_could_go_into(sites, play):
    """And nothing is trained, nothing counted and nothing charged for the asking."""
    policy = 'mechanism = "record"\nsecure_aggregation = "required"\n'
    for site in sites:
        site.write(pins(sites, site), policy)
    with pytest.raises(UserError, match="the quorum is"):
        play(sites, "privacy.mechanism=record", kind=WithoutRecord)
    for site in sites:
        assert "records" in site.errors()[0]
        assert not site.trained()
        assert Ledger(site.folder / "state").events() == []


class AnotherForm(SiteGrid):
    """Asks for more factors than the terms were about."""

    def tamper(self, exchange, number, request):
        if exchange == "mask":
            request.content["instruction"]["trained"] = ["lora_A", "lora_B"]


def test_a_vector_of_another_form_than_was_agreed_is_not_made(sites, play):
    with pytest.raises(UserError, match="the quorum is"):
        play(sites, kind=AnotherForm)
    assert not any(site.trained() for site in sites)


class SwappedKey(SiteGrid):
    """Tells north another channel key of south's, with a signature of its own."""

    pair = make_key_pair("server")

    def tamper(self, exchange, number, request):
        if exchange == "prepare" and number == 0:
            record = request.content["secure"]
            announced = list(record["announcements"])
            announced[1] = self.forged(announced[1])
            record["announcements"] = announced

    def forged(self, announcement):
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key

        own = load_ssh_private_key(self.pair.private, None)
        return announce(RUN, public_half(bytes(32)), own).to_bytes()


class ForgedKey(SwappedKey):
    """The same, in the name of south's own key, which has not signed it."""

    def forged(self, announcement):
        from dataclasses import replace

        from deal_core.secure_sum.keys import Announcement

        genuine = Announcement.from_bytes(announcement)
        return replace(genuine, channel_key=public_half(bytes(32))).to_bytes()


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [(SwappedKey, "unpinned", "[peers] of site.toml has"), (ForgedKey, "protocol", "between")],
)
def test_a_server_in_the_middle_is_refused(sites, play, kind, code, line):
    ran = play(sites, kind=kind)
    assert ran.told("client_failed", "reason") == [f"client reports '{code}'"]
    assert line in sites[0].errors()[0]
    assert ran.told("summed", "sites") == [3]
    assert not sites[0].trained()


class SecondKey(SwappedKey):
    """Honest in the first round; in the second, south has another key with its own signature."""

    south: SecureSite

    def forged(self, announcement):
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key

        if ("mask", 0) not in self.asked:
            return announcement
        own = load_ssh_private_key(self.sites[1].pair.private, None)
        return announce(RUN, public_half(bytes(32)), own).to_bytes()


def test_a_second_channel_key_of_a_peer_is_refused(sites, play):
    """As of a site that has lost its state and begun anew: its old key may have been copied."""
    ran = play(sites, kind=SecondKey, last=2)
    assert ran.told("summed", "sites") == [4, 3]
    assert "two channel keys in one run" in sites[0].errors()[0]


def test_a_site_announces_itself_with_the_key_it_is_registered_with(sites, play):
    """One that poses as another costs itself the round, and not those who would not know it."""
    east = sites[3]
    stranger = make_key_pair("stranger")
    (east.folder / "site.key").write_bytes(stranger.private)
    ran = play(sites)
    (reason,) = ran.told("client_failed", "reason")
    assert "is registered with another" in reason
    assert ran.told("summed", "sites") == [3]


def test_a_renewed_key_is_announced_anew_and_refused_until_it_is_pinned(sites, play):
    assert play(sites).told("summed", "sites") == [4]
    east = sites[3]
    renewed = make_key_pair("east")
    (east.folder / "site.key").write_bytes(renewed.private)
    again = [*sites[:3], SecureSite(east.folder, "east", renewed)]
    for site in again[:2]:
        site.write(pins(again, site))
    ran = play(again, last=2)
    assert ran.told("client_failed", "client") == ["2"]  # west has the old fingerprint still
    assert ran.told("summed", "sites") == [3]


def test_a_run_of_another_name_is_not_announced_for(sites, tmp_path):
    grid = SiteGrid(make_app(), to_run_config(asked_for()), len(sites), sites=sites)
    with assume_identity(1, 1):
        node = next(iter(grid.get_node_ids()))
        from flwr.app import RecordDict

        record = RecordDict({"secure": ConfigRecord({"run": "another"})})
        (reply,) = grid.send_and_receive([Message(record, node, "query.announce")])
    assert reply.content["status"]["code"] == "refused"
    assert len(NAMES) == len(sites)


def test_a_record_that_is_no_request_is_refused_and_changes_nothing(sites, play):
    bent = [
        {},
        {"request": "a text"},
        {"request": b"", "names": ["a"], "announcements": []},
        {"request": b"", "names": "a", "announcements": "b"},
    ]

    class Bending(SiteGrid):
        def tamper(self, exchange, number, request):
            if exchange == "prepare":
                request.content["secure"] = ConfigRecord(bent[number])

    with pytest.raises(UserError, match="the quorum is"):
        play(sites, kind=Bending)
    assert len(sites) == len(bent)
    assert all(site.errors() for site in sites)
    assert not any(site.trained() for site in sites)
