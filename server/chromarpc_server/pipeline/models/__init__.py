"""The reference's networks: transformer, text encoder, autoencoder."""
