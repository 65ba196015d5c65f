"""Models of a few sizes with random weights and random data, for the benchmarks of the private step."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from dp_lora.config import Config, load
from dp_lora.data.conditions import Captions
from dp_lora.diffusion import make_scheduler
from dp_lora.models.adapters import EMBEDDING, Adapter, add_lora
from dp_lora.models.autoencoder import Vae, build_autoencoder, latent_size
from dp_lora.models.families import FAMILIES
from dp_lora.models.folder import Model
from dp_lora.models.info import model_info
from dp_lora.models.unet import build_unet

# S: EMNIST's LDM, with stock resamplers, which the stock step needs; M: cin256's structure at a quarter of its width;
# L: cin256 at its own width, for a GPU
SIZES = {
    "S": ("mnist32-class-dp-eps10", "lora.targets=default ldm.residual_resampling=false"),
    "M": (
        "celebahq-eps10",
        "lora.targets=default ldm.block_out_channels=[64,128,256] autoencoder.block_out_channels=[32,64,64,128] "
        "autoencoder.num_vq_embeddings=1024",
    ),
    "L": ("celebahq-eps10", ""),
}
PHYSICAL_BATCH = {"S": 256, "M": 8, "L": 32, "T": 16}  # rows: as in the study, or as many as an H100 holds in float32
POOL = 512  # private pictures
TEXT_WIDTH = 128  # of a token of a caption
CPU = torch.device("cpu")


def stock_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same network with diffusers' own attention, frozen."""
    with unet.device:
        stock = UNet2DConditionModel.from_config(unet.config)
    stock.load_state_dict(unet.state_dict())
    return stock.eval().requires_grad_(False)


@dataclass(frozen=True)
class Setup:
    """Private latents (POOL, c, h, w), labels (POOL,), and builders of the networks: each call gives the same weights.

    The networks are built on `device`; another device draws other weights.
    """

    size: str
    config: Config
    latents: np.ndarray
    labels: np.ndarray
    device: torch.device

    @property
    def physical_batch(self) -> int:
        return PHYSICAL_BATCH[self.size]

    def captions(self) -> Captions | None:
        """The captions that condition the rows; None: the class embedding does."""
        return None

    def vae(self) -> Vae:
        torch.manual_seed(0)
        with self.device:
            vae = build_autoencoder(self.config.autoencoder, self.config.data.channels, self.config.data.size)
        return vae.eval().requires_grad_(False)

    def model(self) -> Model:
        """Our model, which cuts cross-attention to one token short."""
        torch.manual_seed(0)
        ldm, vae = self.config.ldm, self.vae()
        with self.device:
            unet = build_unet(ldm, self.config.autoencoder.latent_channels, latent_size(vae))
        unet.eval().requires_grad_(False)
        scheduler = make_scheduler(ldm.beta_schedule, ldm.beta_start, ldm.beta_end, ldm.prediction_type)
        info = model_info(
            classes=list(self.config.data.classes),
            null_row=False,
            size=self.config.data.size,
            channels=self.config.data.channels,
            prediction_type=ldm.prediction_type,
            trained_on={"source": "nothing"},
            privacy_status="public",
            seed=0,
            sections={},
        )
        return Model(unet, vae, scheduler, self.embedding().detach(), info)

    def stock_unet(self) -> UNet2DConditionModel:
        """The same network with diffusers' own attention, as `from_pretrained` gives it."""
        return stock_copy(self.model().denoiser)

    def embedding(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = (len(self.config.data.classes), self.config.ldm.cross_attention_dim)
        return torch.randn(shape, generator=generator).to(self.device).requires_grad_()

    def adapter(self, unet: UNet2DConditionModel) -> tuple[Adapter, dict[str, Tensor]]:
        """Our adapter on `unet`, and its tensors by name; B is not zero, so every trained weight has a gradient."""
        generator = torch.Generator().manual_seed(2)
        lora = add_lora(unet, self.config.lora, generator)
        adapter = Adapter(unet, lora, self.embedding())
        parameters = adapter.parameters(self.config.lora.train)
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name.endswith(".lora_B"):
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        assert EMBEDDING in parameters
        return adapter, parameters


class TextSetup(Setup):
    """Stable Diffusion's structure at a fifth of its width: captions of 77 tokens, latents (4, 16, 16)."""

    def model(self) -> Model:
        torch.manual_seed(0)
        with self.device:
            unet = UNet2DConditionModel(
                sample_size=16,
                block_out_channels=(64, 128, 256),
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                layers_per_block=1,
                cross_attention_dim=TEXT_WIDTH,
            )
        scheduler = make_scheduler("linear", 0.00085, 0.012, "epsilon")
        family = FAMILIES["StableDiffusionPipeline"]
        return Model(unet.eval().requires_grad_(False), None, scheduler, None, {}, family)

    def captions(self) -> Captions:
        """Random tensors as encoded captions: POOL / 8 of them, one for each picture."""
        generator = torch.Generator().manual_seed(1)
        context = torch.randn(POOL // 8, 77, TEXT_WIDTH, generator=generator)
        return Captions({"context": context}, [[picture % len(context)] for picture in range(POOL)])

    def adapter(self, unet: UNet2DConditionModel) -> tuple[Adapter, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(2)
        family = FAMILIES["StableDiffusionPipeline"]
        adapter = Adapter(unet, add_lora(unet, self.config.lora, generator, family), None, family)
        return adapter, adapter.parameters(self.config.lora.train)


def text_setup(device: torch.device = CPU) -> TextSetup:
    """The setup T of a text-to-image base: it trains A and B on all targets of its family."""
    config = load("folder", {}, "data.path=none data.classes=[] data.captions=true data.n_public=512 data.size=128 "
                                "data.channels=3 lora.rank=4 lora.train=AB")  # fmt: skip
    latents = np.random.default_rng(0).standard_normal((POOL, 4, 16, 16), dtype=np.float32)
    return TextSetup("T", config, latents, np.zeros(POOL, np.int64), device)


def setup(size: str, device: torch.device = CPU, more: str = "") -> Setup:
    """The setup of a size of SIZES; `more`: overrides."""
    name, overrides = SIZES[size]
    config = load(name, {}, f"{overrides} {more}")
    rng = np.random.default_rng(0)
    with torch.device("meta"):
        side = latent_size(build_autoencoder(config.autoencoder, config.data.channels, config.data.size))
    shape = (POOL, config.autoencoder.latent_channels, side, side)
    labels = rng.integers(0, len(config.data.classes), POOL)
    return Setup(size, config, rng.standard_normal(shape, dtype=np.float32), labels, device)
