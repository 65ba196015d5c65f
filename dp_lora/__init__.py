"""DP-LoRA: differentially private LoRA fine-tuning of latent diffusion models (Tsai et al., arXiv 2406.01355)."""

__version__ = "0.1.0"
