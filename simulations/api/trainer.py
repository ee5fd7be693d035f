"""The steps of a round, taken by a Hugging Face ``Trainer``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from deal_core.config.experiment import TrainConfig
from deal_core.errors import UserError
from deal_core.lora.attach import set_trainable
from deal_core.models.interface import LanguageModel
from deal_core.training.loop import Gradients, NonPrivateGradients, Objective, TrainReport


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

    trainer.model = trainer.model_wrapped = model.module
    trainer.optimizer = trainer.lr_scheduler = None  # they start anew in every round
    trainer.compute_loss, trainer.get_train_dataloader = compute_loss, rows
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean, whatever is accumulated
    done = trainer.train()
    model.module.eval()
    return TrainReport(done.global_step, done.training_loss)
