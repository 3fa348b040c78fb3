"""Triton kernels, installed as `gptneo_fast.kernels`: tensors in, tensors out, no knowledge of the model."""
