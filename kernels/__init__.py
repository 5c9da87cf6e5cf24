"""Triton kernels, installed as pydl.kernels."""
