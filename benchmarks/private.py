"""What privacy costs a local step of the encoder: the mechanism ``record``, whose batches have the
stated size on average, beside an ordinary step and beside Opacus."""

import warnings
from collections.abc import Sequence

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer

from deal_core.config.experiment import TrainConfig
from deal_core.models.interface import Encoded
from deal_core.privacy.dpsgd import PrivateGradients
from deal_core.privacy.interface import RecordId
from deal_core.privacy.noise import SecureNoise
from measuring import Contestant, Figures, Window, measured
from step import MINILM, Case, deal_step, encoder_parts

SIZES = {
    "small": ((12, 2, 4),),
    "usual": ((0, 8, 8),),
    "full": ((0, 16, 256), (0, 128, 256), (64, 16, 256), (64, 64, 256)),
}
"""Tokens, batch and examples of each table."""


def record(data: Sequence[Encoded], config: TrainConfig) -> PrivateGradients:
    """Return the private gradients of an epoch on average."""
    return PrivateGradients(
        data=data,
        record_ids=[RecordId("bench", row) for row in range(len(data))],
        sample_rate=config.batch_size / len(data),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        steps=len(data) // config.batch_size,
        expected_batch=config.batch_size,
        noise=SecureNoise(),
    )


def opacus_step(case: Case) -> Window:
    """Return PEFT LoRA and Opacus' hooks in a plain loop: padded batches in random order."""
    warnings.simplefilter("ignore")  # upstream's own
    torch.manual_seed(0)
    encoder, rows, collate = encoder_parts(case)
    for name, factor in encoder.named_parameters():
        factor.requires_grad_("lora_B" in name)
    learning = [factor for factor in encoder.parameters() if factor.requires_grad]
    model = GradSampleModule(encoder.train())
    optimizer = DPOptimizer(
        torch.optim.AdamW(learning, lr=TrainConfig().learning_rate, fused=True),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=case.batch_size,
    )

    def epoch() -> None:
        for batch in torch.split(torch.randperm(len(rows)), case.batch_size):
            model(**collate([rows[i] for i in batch.tolist()]))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

    return lambda: {"work": len(rows), **measured(epoch)}


def main(given: Sequence[str] | None = None) -> None:
    """Measure and show case by case: ratios are to the plain step of the same factor."""
    figures = Figures("private", __doc__, given)
    for size in SIZES[figures.size]:
        case = Case(MINILM, *size)
        step = (case, torch.float32, 0, frozenset({"lora_B"}))
        contestants = [
            Contestant("plain", deal_step, step),
            Contestant("record", deal_step, (*step, record)),
            Contestant("Opacus", opacus_step, (case,)),
        ]
        figures.race(f"{case.title}, lora_B", contestants)


if __name__ == "__main__":
    main()
