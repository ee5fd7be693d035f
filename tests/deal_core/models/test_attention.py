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


@pytest.mark.parametrize("queries", [300, 5, 1])
def test_queries_of_a_group_read_one_key_and_the_next_word_reads_all(queries):
    """Of texts too long for the plain operations, too: one query always takes them."""
    query, key, value = inputs(300, torch.float32)
    query, key, value = query[:, :, -queries:], key[:, ::2], value[:, ::2]
    layer, mask = Layer(), padding(300)[:, :, -queries:]
    layer.num_key_value_groups = 2
    out, _ = attention(layer, query, key, value, mask)
    keys, values = (each.repeat_interleave(2, dim=1) for each in (key, value))
    expected = scaled_dot_product_attention(query, keys, values, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    short, seen = key[:, :, :queries], mask[..., :queries]
    out, _ = attention(layer, query, short, value[:, :, :queries], seen)
    own = (each[:, :, :queries] for each in (keys, values))
    expected = scaled_dot_product_attention(query, *own, attn_mask=seen).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_attention_sinks_are_not_left_out_in_silence():
    """Of GPT-OSS, for one: then another attention is looked for, or the model refused."""
    with pytest.raises(ValueError, match="attention sinks"):
        attention(Layer(), *inputs(5, torch.float32), None, s_aux=torch.zeros(4))
