"""The reference trainer for ResNeXt, on PyTorch-Ignite."""

__version__ = "0.1.0"
