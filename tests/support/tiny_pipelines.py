"""Whole tiny pipelines of every family, with random weights and vocabularies made here; no downloads."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

SIZE = 32  # pixels
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def _opened(module: Any) -> Any:
    """Move all weights away from zero, so that every weight can get a gradient."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.eval()


def _clip_tokenizer() -> CLIPTokenizer:
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _clip(tokenizer: CLIPTokenizer, *, projection: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=32, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _t5(width: int = 32) -> tuple[T5Tokenizer, T5EncoderModel]:
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((letter, -3.0) for letter in LETTERS + ":,."),
    ]
    config = T5Config(
        vocab_size=64, d_model=width, d_ff=2 * width, d_kv=8, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64), T5EncoderModel(config).eval()


def _vae(channels: int = 4, shift: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=channels, norm_num_groups=4,
        sample_size=SIZE, shift_factor=shift, scaling_factor=0.5,
    ).eval()  # fmt: skip


def stable_diffusion(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    tokenizer = _clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32, attention_head_dim=2,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        prediction_type=prediction_type,
    )  # fmt: skip
    parts = (_vae(), _clip(tokenizer), tokenizer, _opened(unet), scheduler, None, None)
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)


def sdxl() -> StableDiffusionXLPipeline:
    one, two = _clip_tokenizer(), _clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64, attention_head_dim=(2, 4),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    parts = (_vae(), _clip(one), _clip(two, projection=True), one, two, _opened(unet), scheduler)
    return StableDiffusionXLPipeline(*parts, add_watermarker=False)


def sd3() -> StableDiffusion3Pipeline:
    one, two = _clip_tokenizer(), _clip_tokenizer()
    three, encoder = _t5(64)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        _opened(transformer), FlowMatchEulerDiscreteScheduler(shift=3.0), _vae(16, 0.06), _clip(one, projection=True),
        one, _clip(two, projection=True), two, encoder, three,
    )  # fmt: skip


def flux() -> FluxPipeline:
    tokenizer = _clip_tokenizer()
    two, encoder = _t5()
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(scheduler, _vae(16, 0.1159), _clip(tokenizer), tokenizer, encoder, two, _opened(transformer))


def _pixart(sample_size: int) -> PixArtTransformer2DModel:
    # three times 16: an embedding of sizes has a third of the width
    return _opened(
        PixArtTransformer2DModel(
            sample_size=sample_size, num_layers=2, patch_size=2, attention_head_dim=12, num_attention_heads=4,
            caption_channels=32, in_channels=4, cross_attention_dim=48, out_channels=8,
        )
    )  # fmt: skip


def pixart() -> PixArtSigmaPipeline:
    tokenizer, encoder = _t5()
    return PixArtSigmaPipeline(tokenizer, encoder, _vae(), _pixart(16), DPMSolverMultistepScheduler())


def pixart_alpha() -> PixArtAlphaPipeline:
    """With sample_size 128, as the base of 1,024 pixels: that alone makes transformer and pipeline use sizes."""
    tokenizer, encoder = _t5()
    return PixArtAlphaPipeline(tokenizer, encoder, _vae(), _pixart(128), DPMSolverMultistepScheduler())


def sana() -> SanaPipeline:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *LETTERS, "▁"]
    tokenizer = GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=64)
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    ).eval()  # fmt: skip
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4, attention_head_dim=8,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=32,
        sample_size=16, timestep_scale=0.5,
    )  # fmt: skip
    # as published bases have it: a solver that is told of the flow
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(tokenizer, encoder, vae, _opened(transformer), scheduler)


def dit() -> DiTPipeline:
    transformer = _opened(
        DiTTransformer2DModel(
            sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=4, in_channels=4,
            out_channels=8, num_embeds_ada_norm=1000,
        )
    )  # fmt: skip
    tables = [block.norm1.emb.class_embedder.embedding_table for block in transformer.transformer_blocks]
    for table in tables[1:]:
        table.weight.data.copy_(tables[0].weight)
    return DiTPipeline(transformer, _vae(), DDIMScheduler(clip_sample=False))


BUILD = {
    "sd": stable_diffusion,
    "sd-v": lambda: stable_diffusion("v_prediction"),
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "pixart-alpha": pixart_alpha,
    "sana": sana,
    "dit": dit,
}
TEXT = tuple(name for name in BUILD if name != "dit")


def make_pipeline(folder: Path, name: str) -> Path:
    """Write the tiny pipeline of a family, with a fixed seed."""
    torch.manual_seed(5)
    BUILD[name]().save_pretrained(folder)
    return folder
