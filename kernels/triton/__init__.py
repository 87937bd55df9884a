"""N:M layers on NVIDIA GPUs through Triton; nothing here imports triton until a layer is run."""
