"""Flower's SecAgg+ where a client's vector comes after the others were told that it had gone.

The clients' part is Flower's own code, stage by stage; the server here does what it is told to do,
and keeps the late vector.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

client = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
"""The module; its package has a function of the same name."""
QUANTIZED, CLIPPING, MOST_EXAMPLES, RING = 1 << 22, 8.0, 1000.0, 1 << 32
"""Flower's defaults: true numbers are from 0 to ``QUANTIZED``, which is public."""
NODES, THRESHOLD = (21, 22, 23), 2
States = Mapping[int, Any]


def late_vector(target: int, update: np.ndarray, examples: int) -> tuple[np.ndarray, bytes]:
    """Take every mask from a client's late vector that the server knows.

    Args:
        target: whose vector comes late.
        update: of every client.
        examples: of every client.

    Returns:
        The number of examples on its grid, then the update on its grid, with the mask that the
        client has added by itself; and the secret of that mask, which the server does not have.
    """
    states: States = {node: client.SecAggPlusState(nid=node) for node in NODES}
    keys = share(states)
    masked = {node: masked_vector(state, update, examples) for node, state in states.items()}
    others = [node for node in NODES if node != target]
    private = revealed_key(states, others, target)
    words = masked[target]
    for other in others:
        seed = generate_shared_key(bytes_to_private_key(private), bytes_to_public_key(keys[other]))
        mask = pseudo_rand_gen(seed, RING, [words.shape])[0]
        words = words - mask if target > other else words + mask
    return words % RING, states[target].rd_seed


def share(states: States) -> dict[int, bytes]:
    """Run the first two stages; return the public keys of the masks between two clients."""
    settings = {
        Key.SAMPLE_NUMBER: len(states), Key.SHARE_NUMBER: len(states), Key.THRESHOLD: THRESHOLD,
        Key.CLIPPING_RANGE: CLIPPING, Key.TARGET_RANGE: QUANTIZED, Key.MOD_RANGE: RING,
        Key.MAX_WEIGHT: MOST_EXAMPLES,
    }  # fmt: skip
    said = {node: client._setup(state, settings) for node, state in states.items()}
    keys = {
        str(node): (each[Key.PUBLIC_KEY_1], each[Key.PUBLIC_KEY_2]) for node, each in said.items()
    }
    boxes: dict[int, dict[int, bytes]] = {node: {} for node in states}
    for node, state in states.items():
        sent = client._share_keys(state, dict(keys))
        for to, box in zip(sent[Key.DESTINATION_LIST], sent[Key.CIPHERTEXT_LIST], strict=True):
            boxes[to][node] = box
    for node, state in states.items():
        state.boxes = boxes[node]
    return {int(node): pair[0] for node, pair in keys.items()}


def masked_vector(state: Any, update: np.ndarray, examples: int) -> np.ndarray:
    """Run the third stage at one client."""
    told = {Key.SOURCE_LIST: list(state.boxes), Key.CIPHERTEXT_LIST: list(state.boxes.values())}
    sent = client._collect_masked_vectors(state, told, examples, ndarrays_to_parameters([update]))
    return np.concatenate([bytes_to_ndarray(each).ravel() for each in sent[Key.MASKED_PARAMETERS]])


def revealed_key(states: States, others: list[int], target: int) -> bytes:
    """Run the last stage, in which the target is said to be gone; return its key of pair masks."""
    told = {Key.ACTIVE_NODE_ID_LIST: others, Key.DEAD_NODE_ID_LIST: [target]}
    shares = []
    for node in others:
        sent = client._unmask(states[node], told)
        shares.append(sent[Key.SHARE_LIST][sent[Key.NODE_ID_LIST].index(target)])
    return combine_shares(shares)
