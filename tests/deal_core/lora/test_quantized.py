"""Weights of 8 and 4 bits: the same sums as with the whole weights that they stand for."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from peft import TaskType
from torch import nn

from deal_core.config.experiment import AdapterConfig
from deal_core.lora.adapter import Adapter, LoraFactors
from deal_core.lora.attach import (
    at_task_start,
    attach,
    base_only,
    factors_in,
    lora_layers,
    merge,
    write,
)
from deal_core.lora.linear import compute_whole, whole_weight

bitsandbytes = pytest.importorskip("bitsandbytes")
ADAPTED = ("first", "second")
CONFIG = AdapterConfig(rank=4, lora_alpha=8.0, target_modules=ADAPTED)


class Net(nn.Module):
    """Two layers that are adapted, and one between that is not."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.second = (
            nn.Linear(64, 96),
            nn.Linear(96, 96),
            nn.Linear(96, 8),
        )

    def forward(self, x):
        return self.second(torch.tanh(self.middle(torch.tanh(self.first(x)))))


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_few_bits(bits, layer):
    size = layer.in_features, layer.out_features
    if bits == 8:
        made = bitsandbytes.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0)
    else:
        made = bitsandbytes.nn.Linear4bit(*size, quant_type="nf4", compute_dtype=torch.float32)
    made.load_state_dict(layer.state_dict())
    made = made.to("cpu")
    if bits == 8:  # as transformers leaves it: quantized when it is loaded
        made.weight = bitsandbytes.nn.Int8Params(
            layer.weight.data, requires_grad=False, has_fp16_weights=False
        ).to("cpu")
    return made


@pytest.fixture(params=[8, 4])
def pair(request):
    """A model of few bits, and an ordinary one of the weights that these stand for."""
    torch.manual_seed(3)
    plain = Net()
    few = deepcopy(plain)
    for name, layer in plain.named_children():
        setattr(few, name, of_few_bits(request.param, layer))
        layer.weight.data = whole_weight(getattr(few, name), torch.float32)
    compute_whole(few)
    both = [attach(net, CONFIG, TaskType.FEATURE_EXTRACTION) for net in (few, plain)]
    shapes = {n: (m.out_features, m.in_features) for n, m in lora_layers(both[1]).items()}
    for model in both:
        write(model, adapter(shapes, 4, 1))
        merge(model, adapter(shapes, 6, 2), adapter(shapes, 3, 3), 2)
    return SimpleNamespace(few=both[0], plain=both[1])


def adapter(shapes, rank, seed):
    layers = {
        name: LoraFactors(draw(seed, rank, d_in) / 9, draw(seed + 9, d_out, rank) / 9)
        for name, (d_out, d_in) in shapes.items()
    }
    return Adapter(layers, 2.0)


def output(model, x):
    return model.base_model.model(x)


@pytest.mark.parametrize("state", ["current", "task_start", "pretrained"])
def test_every_state_is_that_of_the_whole_weights(pair, state):
    x = draw(7, 5, 64)
    found = []
    for model in (pair.few, pair.plain):
        if state == "current":
            found.append(output(model, x).detach())
        else:
            with at_task_start(model) if state == "task_start" else base_only(model):
                found.append(output(model, x))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    with base_only(pair.plain):
        assert torch.equal(found[1], output(pair.plain, x)) == (state == "pretrained")


def test_gradients_are_those_of_the_whole_weights(pair):
    """Through the layer between too, which has no adapter."""
    gradients = []
    for model in (pair.few, pair.plain):
        x = draw(7, 5, 3, 64).requires_grad_()
        wanted = [x, *factors_in(model).values()]
        gradients.append(torch.autograd.grad(output(model, x).square().sum(), wanted))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_whole_weight_is_kept_for_the_way_back(pair):
    def kept(model):
        entries = []

        def pack(tensor):
            entries.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output(model, draw(7, 2, 64).requires_grad_())
        return max(entries)

    assert kept(pair.few) < 64 * 96 <= kept(pair.plain)


def test_what_is_made_of_a_text_does_not_depend_on_the_one_beside(pair):
    """An entry above 6 makes LLM.int8 take its column apart, for all rows."""
    quiet, loud = draw(7, 1, 64), draw(8, 1, 64) * 30
    alone = output(pair.few, quiet)
    beside = output(pair.few, torch.cat([quiet, loud]))[:1]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-5)
