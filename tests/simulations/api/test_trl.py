"""TRL's SFTTrainer takes the steps of rounds: ``pip install --editable '.[trl]'``."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from simulations.api import DealStrategy, RecordDP, UserError, patch, simulate
from tests.architectures import save
from tests.simulations.runs import learnt_adapter

trl = pytest.importorskip("trl", reason="pip install --editable '.[trl]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:task"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

INSTRUCTIONS = {
    "colours": [(f"{a} {b}", "red green") for a in "abcd" for b in "abcd"],
    "words": [(f"{a} {b} {b}", "blue a") for a in "abcd" for b in "abcd"],
}


def trainer_of(folder, losses):
    """A Llama of a few thousand weights, and its own instructions."""
    from datasets import Dataset

    class Note(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **more):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    place = save(folder / "llama", "llama")
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(place)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8))
    arguments = trl.SFTConfig(
        str(folder / "trainer"),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=2e-2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
    )
    rows = [{"prompt": a, "completion": b} for own in INSTRUCTIONS.values() for a, b in own]
    return trl.SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(place),
        callbacks=[Note()],
    )


def test_an_sft_trainer_takes_the_steps_of_rounds(tmp_path):
    losses = []
    trainer = trainer_of(tmp_path, losses)
    strategy = DealStrategy(clients=2, rounds=2, overrides={"train.max_length": 32})

    def client(number):
        own = {t: {"train": r[number::2], "test": r[:2]} for t, r in INSTRUCTIONS.items()}
        return patch(trainer, own)

    done = simulate(client, strategy, dict.fromkeys(INSTRUCTIONS, ()), out=tmp_path / "run")
    assert len(losses) == 2 * 2 * 2 * 2 * 2  # tasks, rounds, clients, epochs, batches of four
    first, last = losses[:4], losses[8:12]  # a client's, of both rounds of the first task
    assert sum(last) < 0.8 * sum(first)
    assert any(v.any() for k, v in learnt_adapter(done.folder).items() if "lora_B" in k)
    private = DealStrategy(clients=2, rounds=1, privacy=RecordDP())
    with pytest.raises(UserError, match="RecordDP: a Trainer's own loop clips no single record's"):
        simulate(client, private, dict.fromkeys(INSTRUCTIONS, ()), out=tmp_path / "private")
