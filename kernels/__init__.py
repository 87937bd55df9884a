"""Kernels that skip the zeros, one folder per device, each beside a naive oracle."""
