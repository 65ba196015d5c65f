"""The private step and its accounting. Knows tensors and a loss function; no diffusion, no data files, no tracking."""
