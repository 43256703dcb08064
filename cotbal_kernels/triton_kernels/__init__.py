"""Triton kernels, one file each; imported only where they are launched."""
