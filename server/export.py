"""The learnt adapter as a folder that plain PEFT loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from peft import LoraConfig
from safetensors.numpy import save_file

from deal_core.config.experiment import Experiment
from deal_core.lora.adapter import stack
from deal_core.lora.arrays import to_arrays
from deal_core.lora.state import State


def export_adapter(folder: Path, state: State, experiment: Experiment) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``; and, where labels have
    heads, ``heads.safetensors``: a row of weights and a bias for each label of a task, in the
    task's order.

    All parts are stacked, so one PEFT adapter of the summed rank gives
    exactly the global model. A hub or folder name goes into the config as the base model; an
    embedded one is named as in the experiment.
    """
    merged = stack(state.parts())
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {key: np.ascontiguousarray(value) for key, value in to_arrays(merged).items()}
    save_file(arrays, folder / "adapter_model.safetensors", {"format": "pt"})
    if state.heads:
        heads = {task: np.ascontiguousarray(head.numpy()) for task, head in state.heads.items()}
        save_file(heads, folder / "heads.safetensors", {"format": "pt"})
    config = LoraConfig(
        r=merged.rank,
        lora_alpha=merged.rank,
        target_modules=sorted(merged.layers),
        base_model_name_or_path=experiment.model.name,
    )
    config.save_pretrained(str(folder))
