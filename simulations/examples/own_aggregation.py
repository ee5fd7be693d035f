"""A federation of one's own: rounds by hand, with an aggregation that the project does not have.

The median of three clients, factor by factor, against their mean, where one client sends noise.
"""

import torch

from deal_core.data import open_source, partition
from deal_core.lora.adapter import Adapter, LoraFactors
from simulations.api import (
    ClientUpdate,
    aggregate,
    begin_task,
    evaluate,
    experiment,
    load_base,
    start,
    train_client,
)

config = experiment(
    {
        "data": {
            "tasks": ["surgery"],
            "max_train": 90,
            "max_test": 60,
            "partition": {"kind": "iid"},
        },
        "method": {"name": "sequential"},
        "train": {"max_length": 32, "precision": "float32"},
    }
)
task = open_source(config.data).load("surgery")
shares = partition(task, config.data.partition, 3, config.run.seed)
model = load_base(config)


def spoilt(update: ClientUpdate) -> ClientUpdate:
    """Return what a client sends whose disk is broken."""
    noise = torch.Generator().manual_seed(0)
    layers = {
        name: LoraFactors(f.A, torch.randn(f.B.shape, generator=noise))
        for name, f in update.adapter.layers.items()
    }
    return ClientUpdate(update.client, Adapter(layers, update.adapter.scaling), update.weight)


def median(updates: list[ClientUpdate]) -> ClientUpdate:
    """Return the median of all updates, entry by entry, as if it were one client's."""
    first = updates[0].adapter

    def middle(factors: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(factors).median(dim=0).values

    layers = {
        name: LoraFactors(
            middle([u.adapter.layers[name].A for u in updates]),
            middle([u.adapter.layers[name].B for u in updates]),
        )
        for name in first.layers
    }
    return ClientUpdate("median", Adapter(layers, first.scaling), 1.0)


state = begin_task(start(config), config)
updates = [
    train_client(model, state, share.train, task.labels, config, client=str(number))
    for number, share in enumerate(shares)
]
updates[2] = spoilt(updates[2])
after = {
    "before": state,
    "mean": aggregate(state, updates, config).state,
    "median": aggregate(state, [median(updates)], config).state,
}
for name, each in after.items():
    print(f"{name:<8}{evaluate(model, each, task.test, task.labels):.3f}")
