"""The models that the benchmarks take their shapes and their end-to-end cases from."""

from dataclasses import dataclass
from pathlib import Path

from sparsedm_compile.model_spec import LoadedModel, load_model

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Source:
    """How to build a model: as ``sparsedm bench model SPEC --config CONFIG`` would.

    Attributes:
        spec: a preset or ``"diffusers:ClassName"``.
        config: file in ``bench/configs``; the defaults of preset or class without it.
    """

    spec: str
    config: str | None = None

    def load(self, batch: int = 1, device: str = "cpu") -> LoadedModel:
        """The model with random weights, and inputs."""
        return load_model(self.spec, batch=batch, config=self.config and CONFIGS / self.config, device=device)


#: Title -> source. Latents of 1024 x 1024 pixels for PixArt-alpha, SDXL, SD3 and Flux, of 512 x 512 for SD 1.5.
MODELS = {
    "U-ViT-S/2": Source("uvit-s/2"),
    "U-ViT-M/4": Source("uvit-m/4"),
    "U-ViT-L/2": Source("uvit-l/2"),
    "U-ViT-H/2": Source("uvit-h/2"),
    "DDPM UNet 35M": Source("diffusers:UNet2DModel", "ddpm-cifar10.json"),
    "SparseDM UNet": Source("diffusers:UNet2DModel", "ddpm-sparsedm.json"),
    "DiT-XL/2": Source("diffusers:DiTTransformer2DModel", "dit-xl-2.json"),
    "PixArt-alpha": Source("diffusers:PixArtTransformer2DModel", "pixart-alpha.json"),
    "SD 1.5 UNet": Source("diffusers:UNet2DConditionModel", "sd-1.5-unet.json"),
    "SDXL UNet": Source("diffusers:UNet2DConditionModel", "sdxl-unet.json"),
    "SD3-medium": Source("diffusers:SD3Transformer2DModel", "sd3-medium.json"),
    "Flux": Source("diffusers:FluxTransformer2DModel"),
}
