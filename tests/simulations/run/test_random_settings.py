"""Settings drawn at random: what does not go together is refused before a run starts; what starts
ends, also when it was stopped on the way; and what was learnt answers."""

import json
import random
from itertools import product

import pytest

from deal_core.errors import UserError
from simulations.report.labels import count_labels
from simulations.run.check import preflight
from simulations.use.predict import PredictRequest, predict
from tests.architectures import CONFIGS, save
from tests.simulations.runs import assert_same_run, simulated, write_tasks
from tests.sizes import TINY_MODEL

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_model")]

TEXTS = [" ".join(each) for each in product("abcd", repeat=3)][:24]
LABELS = {0: (), 2: ("red", "green"), 3: ("red", "blue", "green"), 4: ("Text", "with", "a", "one")}
"""How many labels a task may have; none: it writes."""
METHODS = ("deal", "deal", "lwf", "ewc", "olora", "slao", "sequential", "replay", "prototype")
SOMETIMES = {
    "federation.clients_per_round": (2, 3),
    "federation.rounds": (1, 3),
    "federation.local_epochs": (2,),
    "federation.quorum": (1.0,),
    "method.prototype.enabled": ("on", "auto", "off"),
    "method.prototype.layers": (1, 2),
    "method.retention.apart": (True,),
    "method.retention.filter": ("wavelet", "none"),
    "method.distillation.weight": (0.0,),
    "method.update.lambda1": (0.01,),
    "stream.schedule": ("per-client", "joint", "joint-all-labels"),
    "stream.evaluate_every": (2, 3),
    "aggregation.rule": ("ffa", "flora", "fedex"),
    "aggregation.robust": ("cosine-norm",),
    "aggregation.secure": (True,),
    "wire.dtype": ("int8",),
    "adapter.kind": ("pooled",),
    "adapter.retained_rank": (2, 4),
    "train.step": ("server",),
    "train.precision": ("float32", "bfloat16"),
    "privacy.mechanism": ("record",),
    "privacy.noise_share": ("sum",),
    "privacy.metrics": ("none", "summed"),
}
FAILED = ("client_failed", "evaluation_lost", "aggregation_failed", "round_lost")


def drawn(draw, folder, make_experiment):
    """An experiment of two or three tasks."""
    family = draw.choice(["bert", "llama", "llama", "t5"])
    kinds = [2, 3, 4] if family == "bert" else [0, 2, 3, 4]
    tasks = {f"task{n}": draw.choice(kinds) for n in range(draw.choice([2, 2, 3]))}
    rows = {
        task: [
            {"text": text, "label": LABELS[count][n % count]}
            if count
            else {"text": text, "target": "red blue"}
            for n, text in enumerate(TEXTS)
        ]
        for task, count in tasks.items()
    }
    settings = {key: draw.choice(of) for key, of in SOMETIMES.items() if draw.random() < 0.2}
    settings |= {"method.name": draw.choice(METHODS), "federation.clients": draw.choice([2, 3, 4])}
    if settings.get("method.retention.apart"):
        routed = {"method.prototype.enabled": "on", "federation.clients": 3}
        settings |= {"method.name": "deal", **routed}
    if "privacy.mechanism" in settings:
        settings["privacy.target_delta"] = 1e-3
    model = TINY_MODEL
    if family != "bert":
        named = f'model.name="{save(folder / "model", family)}"'
        model = (f"model.family={CONFIGS[family][0]}", named, "model.max_new_tokens=3")
    return make_experiment(
        *write_tasks(folder / "data", rows),
        f"data.generation={json.dumps([task for task, count in tasks.items() if not count])}",
        'data.partition.kind="iid"',
        "data.max_train=24",
        "data.max_test=12",
        "adapter.rank=2",
        "train.batch_size=4",
        "train.max_length=32",
        *model,
        *(f"{key}={json.dumps(value).strip(chr(34))}" for key, value in settings.items()),
    )


@pytest.mark.parametrize("seed", range(80))
def test_what_starts_ends_and_answers(seed, make_experiment, tmp_path):
    draw = random.Random(seed)
    try:
        experiment = drawn(draw, tmp_path, make_experiment)
        preflight(experiment)
    except UserError:
        return
    folder, told = tmp_path / "run", []
    simulated(experiment, folder, told.append)
    assert not [event for event in told if event["event"] in FAILED]
    stop = draw.randrange(3, len(told))

    def until(event):
        if until.heard == stop:
            raise KeyboardInterrupt
        until.heard += 1

    until.heard = 0
    again = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        simulated(experiment, again, until)
    simulated(experiment, again, resume=True)
    assert_same_run(folder, again)
    count_labels(folder, lambda task, far: None)
    for task in experiment.data.tasks:
        predict(PredictRequest(str(folder), texts=("a b c", "d"), task=task), print)
