"""The reference kernel: plain torch, takes every layer, runs anywhere."""
