"""Diffusion models written here."""
