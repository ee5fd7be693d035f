import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from deal_core.config.experiment import AdapterConfig
from deal_core.lora.attach import attach, lora_layers, set_trainable
from deal_core.lora.linear import AdaptedLinear

BOTH = frozenset({"lora_A", "lora_B"})


class Net(nn.Module):
    """Two layers, so that one input needs a gradient and one does not."""

    def __init__(self, kind):
        super().__init__()
        make = {"linear": nn.Linear, "conv1d": lambda i, o: Conv1D(o, i)}[kind]
        self.first, self.second = make(12, 10), make(10, 6)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_peft(kind):
    """PEFT's own forward over the same weights."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"])
    config.fan_in_fan_out = kind == "conv1d"
    return get_peft_model(net(kind), config)


def net(kind):
    torch.manual_seed(3)
    return Net(kind)


def fill(model):
    """Nonzero factors, the same in both models."""
    for number, layer in enumerate(lora_layers(model).values()):
        name = next(iter(layer.lora_A))
        layer.lora_A[name].weight.data = draw(number, *layer.lora_A[name].weight.shape)
        layer.lora_B[name].weight.data = draw(number + 9, *layer.lora_B[name].weight.shape)
        layer.scaling[name] = 2.0


def same(a, b):
    """Equal up to float32 rounding of sums whose terms are as large as the largest entry."""
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * float(b.detach().abs().max()))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("trained", [BOTH, frozenset({"lora_A"}), frozenset({"lora_B"})])
def test_output_and_gradients_are_pefts(kind, trained):
    config = AdapterConfig(rank=4, lora_alpha=8.0, target_modules=("first", "second"))
    ours = attach(net(kind), config, TaskType.FEATURE_EXTRACTION)
    theirs = plain_peft(kind)
    fill(ours)
    fill(theirs)
    set_trainable(ours, trained)
    x, x2 = (draw(7, 2, 5, 12).requires_grad_() for _ in range(2))
    first, second = ours.base_model.model(x), theirs(x2)
    same(first, second)
    first.square().sum().backward()
    second.square().sum().backward()
    same(x.grad, x2.grad)
    for mine, other in zip(lora_layers(ours).values(), lora_layers(theirs).values(), strict=True):
        for factor in BOTH:
            a, b = getattr(mine, factor)["current"].weight, getattr(other, factor)["default"].weight
            if factor in trained:
                same(a.grad, b.grad)
            else:
                assert a.grad is None


def test_gradients_agree_with_finite_differences():
    shapes = {"x": (2, 3, 5), "W": (4, 5), "bias": (4,), "A": (2, 5), "B": (4, 2)}
    values = {k: draw(i, *shape).double() for i, (k, shape) in enumerate(shapes.items())}
    for name in ("x", "A", "B"):
        values[name].requires_grad_()

    def apply(x, A, B):
        return AdaptedLinear.apply(x, lambda: values["W"], values["bias"], A, B, 1.5)

    # gradients of the factors are float32, so the tolerance is float32's
    assert torch.autograd.gradcheck(
        apply, (values["x"], values["A"], values["B"]), atol=1e-3, rtol=1e-3
    )


def test_bfloat16_weights_keep_float32_factors_and_gradients():
    config = AdapterConfig(rank=4, lora_alpha=8.0, target_modules=("first", "second"))
    model = attach(net("linear").bfloat16(), config, TaskType.FEATURE_EXTRACTION)
    exact = attach(net("linear"), config, TaskType.FEATURE_EXTRACTION)
    fill(model)
    fill(exact)
    x = draw(7, 2, 5, 12)
    model.base_model.model(x.bfloat16()).float().square().sum().backward()
    exact.base_model.model(x).square().sum().backward()
    for mine, other in zip(lora_layers(model).values(), lora_layers(exact).values(), strict=True):
        for factor in BOTH:
            a, b = (getattr(m, factor)["current"].weight for m in (mine, other))
            assert a.dtype == a.grad.dtype == torch.float32
            assert (a.grad - b.grad).norm() < 0.05 * b.grad.norm()
