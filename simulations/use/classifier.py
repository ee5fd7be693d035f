"""The answers of an export among the labels of all its tasks, for
``pipeline("text-classification", FOLDER, trust_remote_code=True)`` of transformers.

It works with ``answer.py`` and the weights beside its own folder.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class ExportConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Labels, in the order of their tasks."""

    model_type = "deal-export"


class ExportClassifier(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A model that scores labels as the program of the export does."""

    config_class = ExportConfig
    program: Any
    """The module ``answer.py``."""
    language: Any
    """Base model and adapter."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str, *given: Any, config: Any = None, **options: Any
    ) -> Any:
        """Return the model of the export around ``folder``."""
        spec: Any = importlib.util.spec_from_file_location(
            "answer", Path(folder).resolve().parent / "answer.py"
        )
        model: Any = cls(config)
        model.program = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(model.program)
        model.language = model.program.load()[0]
        return model.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **others: Any) -> Any:
        """Score each text by itself."""
        texts = (ids[own.bool()][None] for ids, own in zip(input_ids, attention_mask, strict=True))
        with torch.no_grad():
            rows = [
                self.program.by_vectors(
                    self.language,
                    {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                    self.config.tasks,
                )
                for ids in texts
            ]
        return SequenceClassifierOutput(logits=torch.stack(rows))
