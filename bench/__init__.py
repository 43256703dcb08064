"""Throughput of the loss beside its peers: ``pytest bench/ --benchmark-only``."""
