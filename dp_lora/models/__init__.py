"""Networks and their files: autoencoder, UNet, attention for a single context token, the model folder."""
