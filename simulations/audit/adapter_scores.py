"""How far the losses of records fell by the adapters that one site hands over: the score of the
attack on membership in adapters. Training alone, for what others add can only hide it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from client.runtime import ClientRuntime
from deal_core.config.experiment import Experiment
from deal_core.data import Example
from deal_core.lora.attach import base_only
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.interface import LocalUpdate, Train, UpdateRequest
from deal_core.protection import make_mechanism
from deal_core.training.loop import evaluation_batches
from deal_core.wire.instruction import LEARN
from server.folder import Listener
from simulations.audit.canaries import Scores
from simulations.audit.planted import Overseen
from simulations.audit.run import alone, run_here, share_of


def adapter_scores(
    config: Experiment, client: int, listener: Listener
) -> dict[int, list[tuple[Scores, Scores]]]:
    """Return round within a task to the scores of members and of others, task by task, on the
    adapters that one site hands over after training alone."""
    found: dict[int, list[tuple[Scores, Scores]]] = {}

    def scored(ask: UpdateRequest, train: Train) -> Train:
        def trained(gradients: Any) -> LocalUpdate:
            made = train(gradients)
            share = share_of(config, ask.task, client)
            learnt = {example.unit for example in share.train if example.unit}
            strangers = [example for example in share.test if example.unit not in learnt]
            members = _scores(runtime.model, share.train, share.labels)
            others = _scores(runtime.model, strangers, share.labels)
            found.setdefault(ask.server_round, []).append((members, others))
            return made

        return trained if ask.phase == LEARN else train

    with alone(config, client) as config:
        runtime = ClientRuntime(config, lambda same: Overseen(make_mechanism(same), scored))
        run_here(config, runtime, listener)
    return found


def _scores(model: LanguageModel, examples: Sequence[Example], labels: Sequence[str]) -> Scores:
    """Return the mean over what is protected together, each group, or each example, of how far the
    loss of an example is below that of the frozen base model, which is public, ``(units,)``: an
    example that is easy for it as well says nothing."""
    if not examples:
        return np.zeros(0)
    encoded = model.encode(examples, labels)
    learnt = -_losses(model, encoded, labels)
    with base_only(model.module):
        learnt += _losses(model, encoded, labels)
    units: dict[str | int, list[float]] = {}
    for position, example in enumerate(examples):
        units.setdefault(example.unit or position, []).append(learnt[position])
    return np.array([np.mean(each) for each in units.values()], np.float64)


def _losses(model: LanguageModel, encoded: Sequence[Encoded], labels: Sequence[str]) -> Scores:
    losses = np.zeros(len(encoded))
    for batch in evaluation_batches(encoded):
        with torch.no_grad():
            own = [encoded[i] for i in batch]
            logits = model.scores(own, labels).double().cpu()
            targets = torch.tensor([e.target for e in own])
            losses[list(batch)] = cross_entropy(logits, targets, reduction="none").numpy()
    return losses
