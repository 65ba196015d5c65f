"""A tiny random model to draw from; its three classes look different."""

import torch

from dp_lora.config import load
from dp_lora.diffusion import make_scheduler
from dp_lora.models.autoencoder import build_autoencoder
from dp_lora.models.folder import Model
from dp_lora.models.info import model_info
from dp_lora.models.unet import build_unet

CLASSES = ["a", "b", "c"]
TINY = (
    "public.size=16 data.size=16 data.classes=[a,b,c] data.n_public=4000 autoencoder.block_out_channels=[8,8] "
    "autoencoder.norm_num_groups=4 ldm.block_out_channels=[16,16] ldm.attention_head_width=8 ldm.norm_num_groups=8 "
    "ldm.cross_attention_dim=8 sampling.n=8 sampling.steps=4 sampling.batch_size=3"
)


def tiny_config(more: str = ""):
    return load("folder", None, f"data.path=none {TINY} {more}")


def tiny_model(config, null_row: bool = True, classes=CLASSES) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = build_autoencoder(config.autoencoder, channels=1, size=16).eval()
        unet = build_unet(config.ldm, latent_channels=3, latent_size=8).eval()
        # the last layer starts near zero: without this all classes would look the same
        for parameter in unet.conv_out.parameters():
            parameter.data.normal_(std=0.3)
        embedding = 3 * torch.randn(len(classes) + null_row, 8)
    ldm = config.ldm
    scheduler = make_scheduler(ldm.beta_schedule, ldm.beta_start, ldm.beta_end, ldm.prediction_type)
    info = model_info(
        classes=list(classes),
        null_row=null_row,
        size=16,
        channels=1,
        prediction_type=ldm.prediction_type,
        trained_on={"source": "nothing"},
        privacy_status="public",
        seed=0,
        sections={},
    )
    return Model(unet, vae, scheduler, embedding, info)
