"""A server that wants one site's update out of two sums: it asks for the same round once more, and
leaves that site out. Shown to work where sites mask an update as often as they are asked."""

import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from safetensors.numpy import load_file

from client import local_training as training
from client.app import make_app
from client.secure_exchanges import SecureStore
from deal_core.config.file import to_run_config
from deal_core.lora.payload import LORA
from deal_core.lora.state import from_arrays
from deal_core.models import adapter_shapes
from deal_core.protection import sum_terms
from deal_core.secure_sum import server_round as exchanges
from deal_core.secure_sum.server_round import ServerRound, open_round, unmasked_sum
from deal_core.secure_sum.site_state import UsedUpdates
from deal_core.wire.instruction import RECORD, read_instruction
from deal_core.wire.secure_layout import layout_of, without_loss
from server.secure_aggregation import ChannelKeys, SecureAggregation
from server.strategy import start_state
from simulations.engines.inprocess import FIRST_CLIENT_NODE
from simulations.engines.worker_pool import assume_identity
from tests.client.secure.sites import RUN, SecureSite, SiteGrid, asked_for, grid_of, make_sites
from tests.simulations.run.secure_runs import Ran, rounds

pytestmark = pytest.mark.usefixtures("one_model")

VICTIM = 3
"""East, who is left out of the second sum."""
TRAINED = frozenset({"lora_B"})


@dataclass
class FirstRound:
    """What a server knows after an honest round of four sites, and is not to be told.

    Attributes:
        total: sum over all.
        grid: to the sites; has what each was asked.
    """

    sites: list[SecureSite]
    ran: Ran
    total: dict[str, np.ndarray]
    held: ServerRound
    grid: SiteGrid
    keys: ChannelKeys

    @property
    def others(self):
        return [number for number in range(len(self.sites)) if number != VICTIM]

    def site(self, number):
        return self.keys.site(str(number))


@pytest.fixture(scope="module")
def honest(tmp_path_factory, one_model):
    path = tmp_path_factory.mktemp("honest")
    sites, totals, grids = make_sites(path), [], []
    total = SecureAggregation.unmask

    def noted(self, step, held):
        words = total(self, step, held)
        totals.append(words)
        return words

    class Kept(SiteGrid):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            grids.append(self)

    experiment = asked_for()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SecureAggregation, "unmask", noted)
        ran = rounds(experiment, path / RUN, grid_of=grid_of(sites, Kept))
    (record,) = (path / RUN / "secure").glob("*.round")
    held = ServerRound.from_bytes(record.read_bytes())
    layout = layout_of(experiment, ran.state.current, TRAINED, gradients=False, basis="")
    keys = ChannelKeys(path / RUN / "secure" / "keys.json", RUN)
    return FirstRound(sites, ran, layout.decode(totals[0]), held, grids[0], keys)


@pytest.fixture
def first(honest, tmp_path):
    """After the honest round, with the sites' folders as it left them."""
    sites = []
    for site in honest.sites:
        shutil.copytree(site.folder, tmp_path / site.name)
        sites.append(replace(site, folder=tmp_path / site.name))
    again = SiteGrid(make_app(), to_run_config(asked_for()), len(sites), sites=sites)
    again.asked = dict(honest.grid.asked)
    return replace(honest, sites=sites, grid=again)


def asked(first, number, exchange, content):
    kind = "train" if exchange == "mask" else f"query.{exchange}"
    with assume_identity(1, 1):
        message = Message(content, FIRST_CLIENT_NODE + number, kind)
        (reply,) = first.grid.send_and_receive([message])
    return reply


def code(reply):
    return str(reply.content["status"]["code"])


def prepared_again(first, content):
    """Another round of the run, of all but the victim: the sites have nothing against it. Its terms
    are those of what will be asked."""
    terms = first.held.terms
    cohort = tuple(site for site in terms.cohort if site != first.site(VICTIM))
    layout = layout_told(first, content).digest
    held = open_round(replace(terms, number=terms.number + 1, cohort=cohort, layout=layout))
    for number in first.others:
        record = ConfigRecord(
            {
                "request": held.terms.to_bytes(),
                "announcements": [first.keys.announcement(str(k)) for k in first.others],
                "names": [first.sites[k].name for k in first.others],
            }
        )
        reply = asked(first, number, "prepare", RecordDict({"secure": record}))
        assert code(reply) == "ok"
        data = reply.content["secure"]["reply"]
        held = exchanges.add_prepared(held, first.site(number), data)
    return exchanges.close_prepared(held)


def layout_told(first, content):
    """What a site makes of a request for an update."""
    experiment, instruction = asked_for(), read_instruction(dict(content[RECORD]))
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    start = start_state(experiment, shapes)
    arrays = {key: array.numpy() for key, array in content[LORA].items()}
    state = replace(
        start, current=from_arrays(arrays, shapes, start.current.rank, start.current.scaling)
    )
    basis = sum_terms(experiment, experiment.model.name, instruction, state)
    return layout_of(experiment, state.current, TRAINED, gradients=False, basis=basis)


def request_again(first, number, nudge):
    """The request of the first round, word for word but for the sum; or a hair beside it."""
    content = RecordDict(dict(first.grid.asked["mask", number].content))
    if nudge:
        arrays = ArrayRecord(dict(content[LORA]))
        key = next(key for key in arrays if "lora_A" in key)
        arrays[key] = Array(arrays[key].numpy() + np.float32(nudge))
        content[LORA] = arrays
    return content


def train_again(first, held, number, nudge):
    content = request_again(first, number, nudge)
    content["secure"] = ConfigRecord({"request": exchanges.mask_request(held, first.site(number))})
    return asked(first, number, "mask", content)


def second_sum(first, nudge=0.0):
    """The sum over all but the victim; or the codes of those who did not add to it."""
    held = prepared_again(first, request_again(first, first.others[0], nudge))
    replies = {number: train_again(first, held, number, nudge) for number in first.others}
    if any(code(reply) != "ok" for reply in replies.values()):
        return [code(reply) for reply in replies.values()]
    for number, reply in replies.items():
        held = exchanges.add_masked(held, first.site(number), reply.content["secure"]["reply"])
    held = exchanges.close_masked(held)
    for exchange, request, add, close in (
        ("confirm", exchanges.confirm_request, exchanges.add_confirmed, exchanges.close_confirmed),
        ("unmask", exchanges.unmask_request, exchanges.add_unmasked, lambda held: held),
    ):
        for number in first.others:
            record = ConfigRecord({"request": request(held, first.site(number))})
            reply = asked(first, number, exchange, RecordDict({"secure": record}))
            held = add(held, first.site(number), reply.content["secure"]["reply"])
        held = close(held)
    experiment = asked_for()
    layout = layout_of(experiment, first.ran.state.current, TRAINED, gradients=False, basis="")
    return layout.decode(unmasked_sum(held))


def own_update(first, number):
    """What a site has learnt, as it lies on its own disk: change of each factor."""
    (file,) = first.sites[number].state.glob("update-0-1.safetensors")
    sent = first.grid.asked["mask", number].content[LORA]
    return {key: value - sent[key].numpy() for key, value in load_file(file).items()}


def stolen(first, less):
    """The difference of two sums, as an update of one site."""
    return {key: first.total[key] - less[key] for key in without_loss(less)}


@pytest.mark.parametrize("nudge", [0.0, 1e-6])
def test_the_same_round_is_not_masked_again_for_a_cohort_less_one(first, monkeypatch, nudge):
    trained = []

    def noted(*arguments, **named):
        trained.append("again")
        raise AssertionError

    monkeypatch.setattr(training.loop, "run_local_steps", noted)
    assert second_sum(first, nudge) == ["masked"] * 3
    assert trained == []
    for number in first.others:
        assert "a second sum would tell the difference" in first.sites[number].errors()[-1]


def test_where_it_is_masked_again_the_update_of_the_one_left_out_is_read(first, monkeypatch):
    """So the test above can fail, and the record of used updates is what stands in the way."""
    monkeypatch.setattr(UsedUpdates, "masking", lambda self, *place: self)
    read, own = stolen(first, second_sum(first)), own_update(first, VICTIM)
    assert read.keys() == own.keys()
    for key, value in own.items():
        assert np.abs(value).max() > 1e-4
        np.testing.assert_allclose(read[key], value, atol=1e-6)


def test_the_first_request_gets_its_first_reply_and_no_other_context_does(first):
    """Asked again to the byte, after the round is over, a site repeats itself."""
    for number in first.others:
        before = first.grid.asked["mask", number].content
        one, two = (asked(first, number, "mask", RecordDict(dict(before))) for _ in range(2))
        assert one.content["secure"]["reply"] == two.content["secure"]["reply"]
        assert code(one) == "ok"


def test_a_site_does_not_change_its_mind_about_who_has_survived(first):
    """Confirmed once; other survivors, of whom one is left out, would open another sum."""
    cohort = first.held.terms.cohort
    fewer = tuple(at for at in range(len(cohort)) if cohort[at] != first.site(VICTIM))
    lying = replace(first.held, survivors=fewer)
    for number in first.others:
        record = ConfigRecord({"request": exchanges.confirm_request(lying, first.site(number))})
        reply = asked(first, number, "confirm", RecordDict({"secure": record}))
        assert code(reply) == "protocol"
        assert "reply" not in reply.content.get("secure", {})


def restored(first, number):
    """A site from the backup that it is told to make: without the secrets of secure sums."""
    for file in first.sites[number].state.glob("secure-sum.*"):
        file.unlink()


def announced_again(first, number):
    content = RecordDict({"secure": ConfigRecord({"run": RUN})})
    return asked(first, number, "announce", content)


def test_a_site_that_has_lost_what_it_kept_does_not_announce_itself_again(first):
    """With a new key the update that it keeps could enter a second sum."""
    for number in first.others:
        restored(first, number)
        reply = announced_again(first, number)
        assert code(reply) == "protocol"
        assert "sits the run out" in first.sites[number].errors()[-1]


def test_a_lost_record_of_summed_updates_counts_as_no_empty_one(first):
    for number in first.others:
        (first.sites[number].state / "secure-sum.used").unlink()
    assert second_sum(first) == ["protocol"] * 3


def test_where_it_announces_itself_again_the_update_of_another_is_read(first, monkeypatch):
    """So the tests above can fail."""
    monkeypatch.setattr(SecureStore, "_lost", lambda self: False)
    renewed = {}
    for number in first.others:
        restored(first, number)
        renewed[str(number)] = announced_again(first, number).content["secure"]["reply"]
    known = ChannelKeys.announcement
    monkeypatch.setattr(
        ChannelKeys, "announcement", lambda self, name: renewed.get(name) or known(self, name)
    )
    read, own = stolen(first, second_sum(first)), own_update(first, VICTIM)
    for key, value in own.items():
        np.testing.assert_allclose(read[key], value, atol=1e-6)
