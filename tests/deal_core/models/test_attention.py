import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from deal_core.models.fast.attention import attention


class Layer(nn.Module):
    is_causal = False


def inputs(length, dtype, heads=4):
    generator = torch.Generator().manual_seed(length)
    shape = (2, heads, length, 8)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def padding(length):
    """The second text is three tokens shorter."""
    mask = torch.ones(2, 1, length, length, dtype=torch.bool)
    mask[1, :, :, -3:] = False
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("length", [5, 300])
def test_equals_torchs_attention_and_its_gradients(length, dtype, tolerance, masked):
    mask = padding(length) if masked else None
    ours, theirs = inputs(length, dtype), inputs(length, dtype)
    out, _ = attention(Layer(), *ours, mask)
    expected = scaled_dot_product_attention(*theirs, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=10 * tolerance)


def test_attention_sinks_are_not_left_out_in_silence():
    """Of GPT-OSS, for one: then another attention is looked for, or the model refused."""
    with pytest.raises(ValueError, match="attention sinks"):
        attention(Layer(), *inputs(5, torch.float32), None, s_aux=torch.zeros(4))
