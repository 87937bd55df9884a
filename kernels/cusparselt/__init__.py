"""NVIDIA's library for 2:4 weights, reached through torch."""
