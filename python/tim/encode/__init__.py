"""Latents of images, computed once with an autoencoder of diffusers: `tim encode`."""

from tim.encode.command import main

__all__ = ["main"]
