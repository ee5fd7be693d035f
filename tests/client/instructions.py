"""Instructions and run configs as a server might bend them, for property tests."""

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.client.real_site import LABELS

TASKS = [*LABELS, "elsewhere", "", "../etc"]
some = st.lists(st.sampled_from(TASKS), max_size=4)
repeated = st.builds(lambda task, n: [task] * n, st.sampled_from(TASKS), st.sampled_from([2, 20]))
lists = st.one_of(st.just([]), some, repeated, st.just(list(LABELS)))


@dataclass(frozen=True)
class Bent:
    """Attributes: ``kind`` of message; ``fields`` of the instruction that are changed; ``config``,
    overrides of the experiment; ``labels`` that it names; ``loud``, size of the retained adapter;
    ``run``, its name; ``policy`` of the site."""

    kind: str
    fields: dict[str, Any]
    config: tuple[str, ...]
    labels: str
    loud: float
    run: str
    policy: str


FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "task": st.sampled_from(TASKS),
    "phase": st.sampled_from(["learn", "probe", "send texts"]),
    "stage": st.integers(-1, 3),
    "server_round": st.integers(0, 3),
    "tasks": lists,
    "seen": lists,
    "future": lists,
    "past": lists,
    "trained": st.sampled_from([["lora_A"], ["lora_A", "lora_B"], ["head"]]),
    "rank": st.sampled_from([4, 64, 10**9]),
    "residual_rank": st.integers(1, 2),
    "num_reference_directions": st.sampled_from([4, 8, 9]),
}
CONFIG: dict[str, tuple[str, ...]] = {
    "privacy.mechanism": ("none", "record"),
    "privacy.metrics": ("none", "clear"),
    "privacy.target_delta": ("0.9", "0.00001"),
    "privacy.target_epsilon": ("0.5", "8", "1000"),
    "privacy.noise": ("seeded",),
    "privacy.sample_rate": ("0.2", "1.0"),
    "privacy.disjoint_tasks": ("true",),
    "privacy.unit_column": ("", "patient", "label", "nobody"),
    "privacy.max_grad_norm": ("0.01", "100"),
    "data.max_train": ("1", "20"),
    "stream.schedule": ("joint", "per-client"),
    "method.name": ("sequential", "lwf", "ewc", "replay"),
    "train.learning_rate": ("1e-30", "1", "0.05"),
    "federation.local_epochs": ("2",),
    "federation.rounds": ("1", "9"),
    "wire.dtype": ("int8",),
}
POLICIES = {
    "strict": 'mechanism = "record"\nmax_epsilon = 1.0\n',
    "disjoint": 'mechanism = "record"\nmax_epsilon = 1.0\ndisjoint_tasks = true\n',
    "groups": 'mechanism = "record"\nmax_epsilon = 1.0\nunit_column = "patient"\n',
    "open": 'metrics = "clear"\nshare_num_examples = true\n',
}
HONEST = {
    "groups": ("privacy.mechanism=record", "privacy.unit_column=person"),
    "open": ("privacy.mechanism=none",),
}
"""What a site of this policy takes part in; the others: ``record``."""


@st.composite
def bent(draw: st.DrawFn, policy: str) -> Bent:
    """A message of a server that bends one thing or a few: most of them get far."""
    kind = draw(st.sampled_from(["train", "train", "train", "evaluate"]))
    task = draw(st.sampled_from(list(LABELS)))
    honest = {"task": task} if kind == "train" else {"task": "", "server_round": 0, "stage": -1}
    honest |= {} if kind == "train" else {"tasks": list(LABELS)}
    changed = draw(st.lists(st.sampled_from(list(FIELDS)), max_size=2, unique=True))
    keys = draw(st.lists(st.sampled_from(list(CONFIG)), max_size=2, unique=True))
    return Bent(
        kind=kind,
        fields={**honest, **{name: draw(FIELDS[name]) for name in changed}},
        config=(
            *HONEST.get(policy, ("privacy.mechanism=record",)),
            *(f"{key}={draw(st.sampled_from(CONFIG[key]))}" for key in keys),
        ),
        labels=draw(st.sampled_from(["all"] * 9 + ["less", "fewer tasks", "more"])),
        loud=draw(st.sampled_from([0.0] * 7 + [1e2, 1e30])),
        run=draw(st.sampled_from(["run-1", "run-2"])),
        policy=policy,
    )


@st.composite
def histories(draw: st.DrawFn) -> list[Bent]:
    """Messages to one site, in their order; some are sent twice."""
    policy = draw(st.sampled_from(list(POLICIES)))
    sent = draw(st.lists(bent(policy), min_size=1, max_size=3))
    return [*sent, sent[0]] if draw(st.booleans()) else sent
