"""Kernels: work on pages of bytes. torch reference first; faster bodies stand beside it."""
