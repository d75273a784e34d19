"""Exports models as ONNX, torch.export or safetensors files, each with a model card."""
