"""Training of the public models, by Lightning, and private fine-tuning."""
