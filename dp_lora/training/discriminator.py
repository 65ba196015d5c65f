"""The patch discriminator of latent diffusion's autoencoder (Isola et al. 2017, section 3.2.2) and its hinge losses."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 64
MAX_LAYERS = 3


class PatchDiscriminator(nn.Module):
    """Pixels (N, C, H, W) in [-1, 1] -> one logit per patch (N, 1, h, w); above 0 means real.

    Strided 4x4 convolutions with batch norm, as many as the side allows and at most 3 (patches of 70 pixels).
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        layers = max(1, min(MAX_LAYERS, size.bit_length() - 3))
        width = WIDTH
        net: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            wider = WIDTH * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            net += [nn.Conv2d(width, wider, 4, stride, padding=1, bias=False), nn.BatchNorm2d(wider), nn.LeakyReLU(0.2)]
            width = wider
        net.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.net = nn.Sequential(*net)
        for module in self.net:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net(pixels)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator from its logits for real and for reconstructed pictures."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction_loss: Tensor, generator_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Weight that gives the generator loss a gradient as long as the reconstruction's at the decoder's last layer.

    Esser et al. 2021 (VQGAN), equation 7; a constant, at most 1e4.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (of_generator,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    return (of_reconstruction.norm() / (of_generator.norm() + 1e-4)).clamp(0, 1e4).detach()
