"""Models that ship with the package: U-ViT, the backbone that SparseDM prunes."""

from sparsedm_compile.models.presets import create_uvit, example_inputs, uvit_presets
from sparsedm_compile.models.uvit import UViT, UViTText2Image

__all__ = ["UViT", "UViTText2Image", "create_uvit", "example_inputs", "uvit_presets"]
