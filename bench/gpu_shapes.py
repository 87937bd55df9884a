"""The layers that the GPU is measured on: those of diffusion models, at their own sizes."""

from dataclasses import dataclass

#: Images a batch. The first is the one that throughput is quoted at.
BATCHES = (64, 16, 1)


@dataclass(frozen=True)
class Linear:
    """One linear layer: ``tokens`` an image, ``width -> rows``."""

    name: str
    tokens: int
    width: int
    rows: int


@dataclass(frozen=True)
class Conv:
    """One convolution on square images of ``size``, padded to keep it (or to half it, with ``stride`` 2)."""

    name: str
    size: int
    channels: int
    rows: int
    window: int = 3
    stride: int = 1


def _transformer(model: str, tokens: int, dim: int) -> list[Linear]:
    layers = (("qkv", 1, 3), ("proj", 1, 1), ("fc1", 1, 4), ("fc2", 4, 1))
    return [Linear(f"{model} {layer}", tokens, dim * a, dim * b) for layer, a, b in layers]


LINEARS = (
    *_transformer("U-ViT-S/2", 257, 512),
    *_transformer("U-ViT-M/4", 258, 768),
    *_transformer("U-ViT-L/2", 258, 1024),
    *_transformer("U-ViT-H/2", 258, 1152),
    *_transformer("DiT-XL/2", 256, 1152),
    Linear("SD 1.5 320 q", 4096, 320, 320),
    Linear("SD 1.5 320 ff in", 4096, 320, 2560),
    Linear("SD 1.5 320 ff out", 4096, 1280, 320),
    Linear("SD 1.5 640 ff in", 1024, 640, 5120),
    Linear("SD 1.5 1280 ff in", 256, 1280, 10240),
    Linear("SD 1.5 1280 ff out", 256, 5120, 1280),
    *_transformer("SD 3", 1024, 1536),
)
CONVS = (
    Conv("SD 1.5 320@64", 64, 320, 320),
    Conv("SD 1.5 640@32", 32, 640, 640),
    Conv("SD 1.5 1280@16", 16, 1280, 1280),
    Conv("SD 1.5 1280@8", 8, 1280, 1280),
    Conv("SD 1.5 2560@16", 16, 2560, 1280),
    Conv("SD 1.5 320@64 down", 64, 320, 320, stride=2),
    Conv("SD 1.5 320@64 1x1", 64, 320, 320, window=1),
    Conv("DDPM CIFAR-10 128@32", 32, 128, 128),
    Conv("DDPM CIFAR-10 256@16", 16, 256, 256),
    Conv("DDPM CIFAR-10 256@8", 8, 256, 256),
)
#: SparseDM's own speed table: one block of this width, fp16, by MLP ratio and patch size of a 32 x 32 image.
GRID_WIDTH, GRID_HEADS, GRID_BATCH = 8192, 64, 8
GRID = tuple((patch, ratio) for patch in (1, 2, 4) for ratio in (1, 2, 4, 8))
