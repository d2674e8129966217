"""Unveil: masked diffusion auto-encoders for images and video."""

__version__ = "0.1.0"
