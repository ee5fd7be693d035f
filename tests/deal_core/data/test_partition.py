from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.config.data import PartitionConfig
from deal_core.data import Example, TaskData
from deal_core.data.partition import PARTITIONERS, partition
from deal_core.errors import UserError

SETTINGS = settings(max_examples=8, deadline=None)


def make_task(train, test, name="task", groups=8):
    """A task with this many training and test examples of each label."""
    labels = tuple(f"label {number}" for number in range(len(train)))

    def examples(split, counts):
        return tuple(
            Example(f"{split} {label} {number}", label, f"site {number % groups}")
            for label, count in zip(labels, counts, strict=True)
            for number in range(count)
        )

    sites = tuple(f"site {number}" for number in range(groups))
    return TaskData(name, labels, examples("train", train), examples("test", test), sites)


def skew(parts):
    """Mean total-variation distance between a client's labels and everyone's (0-1)."""
    whole = Counter(example.label for part in parts for example in part.train)
    total = sum(whole.values())
    distances = []
    for part in parts:
        own = Counter(example.label for example in part.train)
        if part.train:
            gaps = [abs(own[x] / len(part.train) - whole[x] / total) for x in part.labels]
            distances.append(sum(gaps) / 2)
    return sum(distances) / len(distances)


@pytest.mark.parametrize("kind", PARTITIONERS)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    clients=st.integers(1, 8),
    alpha=st.floats(0.001, 1000),
    seed=st.integers(0, 2**40),
)
@SETTINGS
def test_every_example_goes_to_exactly_one_client(kind, counts, clients, alpha, seed):
    task = make_task([count + 8 for count in counts], counts)
    config = PartitionConfig(kind=kind, alpha=alpha)
    parts = partition(task, config, clients, seed)
    assert len(parts) == clients
    assert Counter(e for part in parts for e in part.train) == Counter(task.train)
    assert Counter(e for part in parts for e in part.test) == Counter(task.test)
    assert all((part.name, part.labels) == (task.name, task.labels) for part in parts)
    assert parts == partition(task, config, clients, seed)


def test_dirichlet_skew_grows_as_alpha_falls():
    task = make_task([150] * 4, [20] * 4)
    skews = [
        sum(skew(partition(task, PartitionConfig(alpha=alpha), 4, seed)) for seed in range(3)) / 3
        for alpha in (100.0, 0.05)
    ]
    assert skews == sorted(skews)
    assert skews[0] < 0.1
    assert skews[1] > 0.5


def test_quantity_differs_in_size_and_not_in_labels():
    task = make_task([200] * 3, [30] * 3)
    spread = {}
    for alpha in (100.0, 0.3):
        config = PartitionConfig(kind="quantity", alpha=alpha)
        draws = [partition(task, config, 4, seed) for seed in range(8)]
        sizes = [sorted(len(part.train) for part in parts) for parts in draws]
        assert min(own[0] for own in sizes) >= 1
        spread[alpha] = sum(own[-1] - own[0] for own in sizes) / len(sizes)
        large = [part for parts in draws for part in parts if len(part.train) > 100]
        assert skew(large) < 0.1
    assert spread[100.0] < 100 < 250 < spread[0.3]


def test_column_gives_each_group_to_one_client_in_every_task():
    config = PartitionConfig(kind="column", column="site")
    whole = partition(make_task([16, 16], [8, 8]), config, 4, 0)
    # This task lacks the sites from 3 on: the others keep their clients.
    part = partition(make_task([3, 3], [3, 3]), config, 4, 1)
    for parts in (whole, part):
        for client, own in enumerate(parts):
            sites = {f"site {client}", f"site {client + 4}"}
            assert {example.group for example in own.train + own.test} <= sites
    assert (part[3].train, part[3].test) == ((), ())


def test_column_without_enough_groups_is_an_error():
    config = PartitionConfig(kind="column", column="site")
    with pytest.raises(
        UserError, match=r"has 2 values for 3 clients; set federation\.clients to 2"
    ):
        partition(make_task([9], [3], groups=2), config, 3, 0)
    bare = TaskData("t", ("a",), (Example("x", "a"),), (Example("y", "a"),))
    with pytest.raises(UserError, match="needs a data source with such a column"):
        partition(bare, config, 1, 0)


@pytest.mark.parametrize("kind", sorted(set(PARTITIONERS) - {"column"}))
def test_more_clients_than_examples_is_an_error(kind):
    with pytest.raises(UserError, match="2 training examples for 3 clients"):
        partition(make_task([1, 1], [1, 1]), PartitionConfig(kind=kind), 3, 0)
