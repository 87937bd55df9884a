"""N:M sparsity for pretrained diffusion models."""
