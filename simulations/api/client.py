"""A client of a federation as a Flower ``ClientApp``, around a model and rows that a program
passes."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from torch import Tensor
from torch.utils.data import DataLoader

from client.app import make_app, runtime_of
from client.gate import NO_LIMITS, ON_A_TRAINER, Asked, possible, require
from client.identity import Client, file_of, status_reply, write_log
from client.resident_worker import INSIDE
from client.runtime import ClientRuntime
from client.site_file import SiteFile
from deal_core.config.experiment import Experiment, TrainConfig
from deal_core.config.file import EXPERIMENT
from deal_core.data.given import GIVEN, keep_rows, read_rows, usable
from deal_core.errors import UserError
from deal_core.lora.attach import set_trainable
from deal_core.models.interface import LanguageModel
from deal_core.models.loading import Loss, Predict, keep
from deal_core.privacy.interface import Mechanism
from deal_core.protection import make_mechanism
from deal_core.training.loop import Gradients, NonPrivateGradients, Objective, TrainReport
from simulations.api import nouns

WITHOUT_TABLE = NO_LIMITS.model_copy(
    update={"metrics": "clear", "share_num_examples": True, "noise_share": "site"}
)
"""The policy of a client that demands privacy and has none: it does what is asked, with noise that
is all its own. Who could pose as the other sites of a sum would take away what they add."""


class DealClient(ClientApp):
    """A Flower ``ClientApp`` that trains a model on its own rows, and says what it takes part in.

    In a deployment ``site.toml`` has the site's name, ledger and policy (``--node-config
    'site="/path/to/site.toml"'``); model and rows are those that are passed here.

    Args:
        model: a ``PeftModel`` or ``PreTrainedModel``; it stays as it is.
        tokenizer: of the model.
        tasks: name of a task to its rows, ``{"train": rows, "test": rows}`` or a pair of them; a
            row is ``(text, answer)``, a mapping with ``text`` and ``label``, or an ``Example``.
        method: the only method that it takes part in; None: any.
        privacy: the least protection under which it trains; None: what is asked.
        loss: ``loss(model, examples)`` gives ``(batch,)``, for a model that no family trains.
        predict: ``predict(model, examples, labels)`` gives the label of each.
        trainer: a Hugging Face ``Trainer`` whose loop takes the steps (:func:`patch`).
        mods: of Flower, around every message.

    Raises:
        UserError: something of it cannot be trained, or not under ``privacy``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tasks: Mapping[str, Any],
        *,
        method: nouns.Deal | str | None = None,
        privacy: nouns.RecordDP | None = None,
        loss: Loss | None = None,
        predict: Predict | None = None,
        trainer: Any = None,
        mods: list[Mod] | None = None,
    ) -> None:
        super().__init__(mods=mods)
        self.model = nouns.read_model(model, tokenizer, loss, predict)
        self.rows = {task: read_rows(task, rows) for task, rows in tasks.items()}
        self.method, self.privacy, self._trainer = method, privacy, trainer
        if privacy is not None and self.model.family == nouns.OWN_LOSS:
            raise UserError(f"RecordDP and a model with a loss of its own: {nouns.READS_SEVERAL}")
        if privacy is not None and trainer is not None:
            raise UserError(ON_A_TRAINER)
        self._runtimes: dict[tuple[str, str], ClientRuntime] = {}
        make_app(self._runtime, self._file, self)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message; the experiment of a run comes with it, and stays what it was."""
        told = message.content.config_records.get(EXPERIMENT) if message.has_content() else None
        if told is not None:
            del message.content[EXPERIMENT]
            before = context.state.config_records.get(EXPERIMENT)
            if before is not None and dict(before) != dict(told):
                return status_reply(message, "refused")
            context.state[EXPERIMENT] = told
            own = {key: str(value) for key, value in told.items()}
            context.run_config = {**context.run_config, **own}
        keep(self.model)  # this process may be one that the app was sent to
        # The process that stays has no model that a program passes.
        context.node_config = {**context.node_config, INSIDE: True}
        return super().__call__(message, context)

    def require_allowed(self, experiment: Experiment, own_noise: bool = False) -> None:
        """Check that an experiment is one that the client takes part in; ``own_noise``: it makes
        all noise itself.

        Raises:
            Refusal: it is not; one line.
        """
        insists = {"model.name": self.model.name} | nouns.method_settings(self.method)
        insists |= {} if self.privacy is None else {"privacy.mechanism": "record"}
        own_loop = self._trainer is not None
        asked = Asked(experiment, insists=insists, own_loop=own_loop, own_noise=own_noise)
        require(asked, "program")
        possible(asked, lambda: nouns.require_possible(experiment))

    def _file(self, context: Context) -> SiteFile | None:
        """``site.toml`` with the client's own model and demand; None for a simulated client."""
        file = file_of(context)
        if file is None:
            return None
        policy, models = file.policy, {**file.models, self.model.name: ""}
        if self.privacy is not None:
            units = sum(len(train) for train, _ in self.rows.values())
            policy = self.privacy.tightened(policy or WITHOUT_TABLE, units)
        if policy is not None:  # the layers of its own model may be adapted
            named = (*policy.target_modules, *self.model.adapter.get("target_modules", ()))
            policy = policy.model_copy(update={"target_modules": named})
        return file.model_copy(update={"models": models, "policy": policy})

    def _runtime(self, client: Client) -> ClientRuntime:
        # Of simulate, with the rows of all other clients; whose rows a site reads is its own word.
        together = client.simulated and client.asked.data.source.startswith(GIVEN)
        alone = client.simulated and not together and self.privacy is not None
        self.require_allowed(client.asked, own_noise=alone)
        if together and self._trainer is None:
            return runtime_of(client)
        place = client.settings, "" if client.file is None else client.file.model_dump_json()
        if place not in self._runtimes:
            experiment, changes = client.experiment, dict[str, Any]()
            if client.simulated and self.privacy is not None:
                changes["privacy"] = self.privacy.within(experiment.privacy)
            if not together:
                rows: Mapping[str, Any] = self.rows
                if client.file is not None or alone:
                    rows, left_out = usable(rows, experiment.data)
                    for task, number in left_out.items():
                        if client.file is not None:
                            write_log(client.file, "rows_left_out", task=task, rows=number)
                source = keep_rows(rows)
                changes["data"] = experiment.data.model_copy(update={"source": source})
            runtime = ClientRuntime(
                experiment.model_copy(update=changes),
                _own_noise if alone else make_mechanism,
                whole=not together,
            )
            if self._trainer is not None:
                runtime.take_steps = partial(trainer_steps, self._trainer)
            self._runtimes = {place: runtime}
        return self._runtimes[place]


def _own_noise(experiment: Experiment) -> Mechanism:
    """The mechanism of a client that demands privacy: the seed of a run is the server's word."""
    return make_mechanism(experiment.changed(privacy={"noise": "secure"}))


def patch(trainer: Any, tasks: Mapping[str, Any]) -> DealClient:
    """Return a client whose steps a Hugging Face ``Trainer`` takes: its arguments, with the
    optimiser and scheduler that they name, and its callbacks, with DEAL's objective as its loss.
    Without privacy.

    Args:
        trainer: its model and ``processing_class`` are the client's.
        tasks: as of :class:`DealClient`; they take the place of the trainer's own data sets.

    Raises:
        UserError: no tokeniser, an optimiser that is made already, or a model that cannot be
            trained.
    """
    if trainer.optimizer is not None:
        raise UserError(
            "patch: the trainer's optimiser is of other parameters than a round's; name it in "
            "TrainingArguments(optim=...), or pass optimizer_cls_and_kwargs="
        )
    if trainer.processing_class is None:
        raise UserError("patch: the trainer has no tokeniser; make it with processing_class=")
    return DealClient(trainer.model, trainer.processing_class, tasks, trainer=trainer)


def trainer_steps(
    trainer: Any,
    model: LanguageModel,
    objective: Objective,
    gradients: Gradients,
    trained: frozenset[str],
    config: TrainConfig,
) -> TrainReport:
    """Return the report of the trainer's own epochs on the positions of the client's data, in the
    place of :func:`~deal_core.training.loop.run_local_steps`.

    Raises:
        UserError: the method moves other parameters than a trainer finds in the model.
    """
    assert isinstance(gradients, NonPrivateGradients)
    if hasattr(objective, "parametrization"):
        raise UserError("a Trainer cannot train this method; leave trainer= out")
    data, order = gradients.data, gradients.generator
    set_trainable(model.module, trained)

    def compute_loss(_: Any, inputs: dict[str, Tensor], *args: Any, **more: Any) -> Tensor:
        loss = objective.example_losses(inputs["positions"].tolist()).mean()
        penalty = objective.penalty()
        return loss if penalty is None else loss + penalty

    def rows() -> DataLoader[Any]:
        return DataLoader(
            range(len(data)),  # type: ignore[arg-type]
            batch_size=trainer.args.per_device_train_batch_size,
            shuffle=True,
            generator=order,
            collate_fn=lambda batch: {"positions": torch.tensor(batch)},
        )

    own = trainer.model
    trainer.model = trainer.model_wrapped = model.module
    trainer.compute_loss, trainer.get_train_dataloader = compute_loss, rows
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean, whatever is accumulated
    with torch.random.fork_rng():  # a model may drop activations: the same in every process
        torch.manual_seed(order.initial_seed())
        done = trainer.train()
    trainer.model = trainer.model_wrapped = own
    trainer.optimizer = trainer.lr_scheduler = None  # they start anew in every round
    model.module.eval()
    return TrainReport(done.global_step, done.training_loss)
