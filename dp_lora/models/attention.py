"""Cross-attention to a single context token, without the attention.

The softmax over one token is 1, so every position receives to_out(to_v(context)) whatever to_q and to_k are. The class
embedding is one token, so attn2 is computed once per row instead of once per position.
"""

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor


class OneTokenAttnProcessor(AttnProcessor2_0):
    """Exactly to_out(to_v(context)) for a context (B, 1, D) and hidden states (B, N, C); else the stock way.

    Calls the modules themselves, so LoRA layers in the place of to_v and to_out.0 work.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args,
        **kwargs,
    ) -> Tensor:
        plain = (
            encoder_hidden_states is not None
            and encoder_hidden_states.shape[1] == 1
            and hidden_states.ndim == 3
            and hidden_states.shape[0] == encoder_hidden_states.shape[0]
            and attention_mask is None
            and not attn.norm_cross
            and not attn.residual_connection
            and attn.rescale_output_factor == 1.0
        )
        if not plain:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        update = attn.to_out[0](attn.to_v(encoder_hidden_states))
        return attn.to_out[1](update.expand(-1, hidden_states.shape[1], -1))


def use_one_token_attention(unet: UNet2DConditionModel) -> None:
    """Give every attn2 of `unet` the processor above; attn1 keeps its own."""
    processors = {
        name: OneTokenAttnProcessor() if name.endswith("attn2.processor") else processor
        for name, processor in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)
