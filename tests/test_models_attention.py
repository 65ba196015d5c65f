import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig

from dp_lora.models.attention import OneTokenAttnProcessor, use_one_token_attention


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention(query_dim=16, cross_attention_dim=6, heads=4, dim_head=4, bias=False)


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=6,
        attention_head_dim=(2, 4),
    )


def test_one_token_gives_what_the_stock_processor_gives():
    layer = attention()
    hidden, context = torch.randn(5, 9, 16), torch.randn(5, 1, 6)
    expected = AttnProcessor2_0()(layer, hidden, context)
    found = OneTokenAttnProcessor()(layer, hidden, context)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_one_token_gives_the_gradients_of_the_stock_processor():
    layer = attention()
    hidden, weight = torch.randn(5, 9, 16), torch.randn(5, 9, 16)
    gradients = []
    for processor in (AttnProcessor2_0(), OneTokenAttnProcessor()):
        torch.manual_seed(1)
        context = torch.randn(5, 1, 6, requires_grad=True)
        loss = (processor(layer, hidden, context) * weight).sum()
        gradients.append(torch.autograd.grad(loss, [context, layer.to_v.weight, layer.to_out[0].weight]))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [2, 3])
def test_a_longer_context_goes_the_stock_way_bit_for_bit(tokens):
    layer = attention()
    hidden, context = torch.randn(5, 9, 16), torch.randn(5, tokens, 6)
    expected = AttnProcessor2_0()(layer, hidden, context)
    assert torch.equal(OneTokenAttnProcessor()(layer, hidden, context), expected)


def test_self_attention_to_a_single_position_goes_the_stock_way():
    torch.manual_seed(0)
    layer = Attention(query_dim=16, heads=4, dim_head=4)
    hidden = torch.randn(5, 1, 16)
    assert torch.equal(OneTokenAttnProcessor()(layer, hidden), AttnProcessor2_0()(layer, hidden))


def test_every_attn2_gets_the_processor_and_no_attn1():
    network = unet()
    use_one_token_attention(network)
    kinds = {name: type(processor) for name, processor in network.attn_processors.items()}
    attn2 = [kind for name, kind in kinds.items() if ".attn2." in name]
    assert len(attn2) == len(kinds) / 2 > 0
    assert all((kind is OneTokenAttnProcessor) == (".attn2." in name) for name, kind in kinds.items())


def test_the_whole_unet_is_the_stock_one_with_and_without_lora():
    network = unet()
    for with_lora in (False, True):
        if with_lora:
            names = ["attn1.to_q", "attn2.to_v", "attn2.to_out.0"]
            network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False))
        stock = copy.deepcopy(network)
        use_one_token_attention(network)
        x, t, context = torch.randn(4, 3, 8, 8), torch.tensor([1, 2, 500, 999]), torch.randn(4, 1, 6)
        expected = stock(x, t, encoder_hidden_states=context).sample
        found = network(x, t, encoder_hidden_states=context).sample
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        if with_lora:
            network.disable_adapters()
            without = network(x, t, encoder_hidden_states=context).sample
            assert (found - without).abs().max() > 1e-3
