"""A client's vector under its masks: one for a place in the run, on the disk before it leaves."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from client.context import RequestContext
from client.secure.legs import announced_state
from client.secure.request import request_of
from client.secure.store import SecureStore
from deal_core.config.experiment import Experiment
from deal_core.lora.payload import PayloadError
from deal_core.lora.state import State
from deal_core.privacy.accounting.sum_terms import sum_terms
from deal_core.randomness import seeded_numpy
from deal_core.secure_sum import site_round
from deal_core.secure_sum.layout import Layout
from deal_core.secure_sum.messages import MaskRequest
from deal_core.secure_sum.site_policy import SitePolicy
from deal_core.wire.instruction import Instruction


def told_here(
    place: RequestContext, experiment: Experiment, instruction: Instruction, state: State
) -> str:
    """Return what this client was told of a sum, for its layout: others must have been told the
    same."""
    return sum_terms(experiment, place.asked_model(experiment), instruction, state)


@dataclass(frozen=True)
class Maskable:
    """What a client is asked to add to a sum.

    Attributes:
        client: which client.
        message: has the round's mask request.
        layout: of the vector.
        conditions: on the round, from the settings that the vector is made with: the legs before
            may have come with others.
        place: in the run; of one place one vector is masked.
        name: of the request that the vector answers.
    """

    client: RequestContext
    message: Message
    layout: Layout
    conditions: SitePolicy
    place: str
    name: str

    @property
    def sites(self) -> int:
        """How many sites are in the sum, as the mask request says."""
        return len(MaskRequest.from_bytes(request_of(self.message)).mask_keys) + 1

    def require(self) -> None:
        """Check, before anything is counted, trained or charged, that the vector can be masked.

        Raises:
            ProtocolError: the request is refused, or a vector of this place is in a sum already.
            PayloadError: no request, or not what the round's terms say.
        """
        store, request = SecureStore(self.client.folder), request_of(self.message)
        with store.alone():
            kept = announced_state(store)
            site_round.require_maskable(kept, request)
            context = MaskRequest.from_bytes(request).context
            terms = kept.round_of(context).terms
            self.conditions.check(terms)
            if terms.layout != self.layout.digest:
                raise PayloadError("secure: an update of another form than the round's terms say")
            store.used().masking(context, self.place, self.name)

    def masked(self, arrays: Mapping[str, NDArray[Any] | None], seed: int) -> bytes:
        """Return the masked vector. That it is in this sum, and in no other, is on the disk before.

        Args:
            arrays: an array for each field of the layout, or that it is covered.
            seed: of the run, for the random rounding of a simulated client.

        Raises:
            ProtocolError: the mask request is refused, or the vector is in another sum.
        """
        generator = (
            seeded_numpy(seed, "secure rounding", self.client.client, self.place)
            if self.client.site is None
            else np.random.default_rng(secrets.randbits(128))  # the seed is the server's word
        )
        encoded = self.layout.encode(arrays, generator)
        store, request = SecureStore(self.client.folder), request_of(self.message)
        with store.alone():
            answered = site_round.mask(announced_state(store), request, encoded)
            context = MaskRequest.from_bytes(request).context
            store.keep_used(store.used().masking(context, self.place, self.name))
            store.keep(answered.state)
        return answered.reply
