"""U-ViT: a vision transformer over noisy image patches, with long skip connections, as a diffusion backbone.

Source: "All are Worth Words: A ViT Backbone for Diffusion Models", arXiv 2209.12152, section 3. Parameter names,
constructor arguments and forward signatures are those of the published checkpoints, which load with ``strict=True``.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_MAX_PERIOD = 10_000.0


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding: ``dim / 2`` cosines, then ``dim / 2`` sines, periods geometric from 2 pi to 2 pi 10^4.

    Args:
        timesteps: ``(B,)``, any real dtype, may be fractional.
        dim: even.

    Returns:
        float32, ``(B, dim)``.
    """
    half = dim // 2
    exponents = torch.arange(half, device=timesteps.device, dtype=torch.float32) / half
    angles = timesteps.float().unsqueeze(1) * torch.exp(-math.log(_MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class PatchEmbed(nn.Module):
    """Cut an image into square patches and project each: ``(B, C, H, W) -> (B, H W / patch_size^2, embed_dim)``."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, tokens, embed_dim)``, tokens in row-major order."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, ``(B, L, dim) -> (B, L, dim)``, in the dtype of its input."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, L, dim) -> (B, L, dim)``."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, heads, head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linears with an exact GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, L, dim) -> (B, L, dim)``."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; with ``skip``, a linear first merges the concatenated long skip (section 3.1)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, skip: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """``x``, ``skip`` and the result are ``(B, L, dim)``."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Backbone(nn.Module):
    """What both U-ViTs share: everything but the condition tokens, ``extras`` tokens before the patches."""

    def __init__(
        self,
        extras: int,
        *,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        mlp_time_embed: bool,
        use_checkpoint: bool,
        conv: bool,
        skip: bool,
    ) -> None:
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        if embed_dim % num_heads or embed_dim % 2:
            raise ValueError(f"embed_dim {embed_dim} must be even and a multiple of num_heads {num_heads}")
        if depth % 2:
            raise ValueError(f"depth {depth} must be even: half the blocks send a long skip and half receive one")
        self.img_size = img_size
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.extras = extras
        self.use_checkpoint = use_checkpoint

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.time_embed: nn.Module = nn.Identity()
        if mlp_time_embed:
            self.time_embed = nn.Sequential(
                nn.Linear(embed_dim, 4 * embed_dim), nn.SiLU(), nn.Linear(4 * embed_dim, embed_dim)
            )
        tokens = extras + (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim))

        def block(skip: bool = False) -> Block:
            return Block(embed_dim, num_heads, mlp_ratio, qkv_bias, skip)

        self.in_blocks = nn.ModuleList(block() for _ in range(depth // 2))
        self.mid_block = block()
        self.out_blocks = nn.ModuleList(block(skip) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1) if conv else nn.Identity()

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _embed(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The patch tokens ``(B, L, dim)`` and the time token ``(B, 1, dim)``."""
        if x.dim() != 4 or x.shape[1:] != (self.in_chans, self.img_size, self.img_size):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, this U-ViT takes (B, {self.in_chans}, {self.img_size}, {self.img_size})"
            )
        if timesteps.shape != x.shape[:1]:
            raise ValueError(f"timesteps has shape {tuple(timesteps.shape)}, expected one per image: ({x.shape[0]},)")
        patches = self.patch_embed(x)
        embedding = timestep_embedding(timesteps, self.embed_dim).to(patches.dtype)
        return patches, self.time_embed(embedding).unsqueeze(1)

    def _run(self, block: Block, *args: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)  # nothing here is random
        return block(*args)

    def _denoise(self, tokens: Tensor) -> Tensor:
        """``(B, extras + L, dim) -> (B, C, H, W)``."""
        x = tokens + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = self._run(block, x)
            skips.append(x)
        x = self._run(self.mid_block, x)
        for block in self.out_blocks:
            x = self._run(block, x, skips.pop())
        patches = self.decoder_pred(self.norm(x))[:, self.extras :]
        side, patch = self.img_size // self.patch_size, self.patch_size
        patches = patches.unflatten(1, (side, side)).unflatten(-1, (patch, patch, self.in_chans))
        image = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # B C row (in patch) column (in patch)
        return self.final_layer(image)


class UViT(_Backbone):
    """U-ViT, unconditional or conditioned on a class label; predicts the noise in an image or a latent.

    Args:
        img_size: height and width of the image or latent; a multiple of ``patch_size``.
        depth: even; the network has ``depth + 1`` blocks.
        mlp_time_embed: pass the time token through an MLP (no published checkpoint does).
        num_classes: 0 or less for an unconditional model.
        use_checkpoint: recompute each block in the backward pass, to save memory.
        conv: end in a 3x3 convolution (all published checkpoints but H).
        skip: merge long skips in the second half of the blocks.

    Raises:
        ValueError: sizes that do not divide, or an odd depth.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        num_classes: int = -1,
        use_checkpoint: bool = False,
        conv: bool = True,
        skip: bool = True,
    ) -> None:
        conditional = num_classes > 0
        super().__init__(
            extras=2 if conditional else 1,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            mlp_time_embed=mlp_time_embed,
            use_checkpoint=use_checkpoint,
            conv=conv,
            skip=skip,
        )
        self.num_classes = num_classes
        if conditional:
            self.label_emb = nn.Embedding(num_classes, embed_dim)
        self._init_weights()

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise.

        Args:
            x: ``(B, in_chans, img_size, img_size)``, in the dtype of the weights.
            timesteps: ``(B,)``, any real dtype.
            y: ``(B,)`` int64 class labels, for a class-conditional model only.

        Returns:
            The shape and dtype of ``x``.

        Raises:
            ValueError: a shape other than these, a label missing or a label too many.
        """
        if (y is not None) != (self.num_classes > 0):
            fix = "leave y out" if y is not None else f"pass class labels y in [0, {self.num_classes})"
            raise ValueError(f"this U-ViT was built with num_classes={self.num_classes}: {fix}")
        patches, time_token = self._embed(x, timesteps)
        if y is None:
            return self._denoise(torch.cat([time_token, patches], dim=1))
        return self._denoise(torch.cat([self.label_emb(y).unsqueeze(1), time_token, patches], dim=1))


class UViTText2Image(_Backbone):
    """U-ViT conditioned on a sequence of text embeddings, each of which is a token.

    Args:
        clip_dim: width of a text embedding.
        num_clip_token: length of the sequence.

    The others are those of :class:`UViT`.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        use_checkpoint: bool = False,
        clip_dim: int = 768,
        num_clip_token: int = 77,
        conv: bool = True,
        skip: bool = True,
    ) -> None:
        super().__init__(
            extras=1 + num_clip_token,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            mlp_time_embed=mlp_time_embed,
            use_checkpoint=use_checkpoint,
            conv=conv,
            skip=skip,
        )
        self.clip_dim = clip_dim
        self.num_clip_token = num_clip_token
        self.context_embed = nn.Linear(clip_dim, embed_dim)
        self._init_weights()

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Predict the noise.

        Args:
            x: ``(B, in_chans, img_size, img_size)``, in the dtype of the weights.
            timesteps: ``(B,)``, any real dtype.
            context: ``(B, num_clip_token, clip_dim)`` text embeddings, in the dtype of the weights.

        Returns:
            The shape and dtype of ``x``.

        Raises:
            ValueError: a shape other than these.
        """
        if context.shape[1:] != (self.num_clip_token, self.clip_dim) or context.shape[0] != x.shape[0]:
            raise ValueError(
                f"context has shape {tuple(context.shape)}, this U-ViT takes "
                f"({x.shape[0]}, {self.num_clip_token}, {self.clip_dim})"
            )
        patches, time_token = self._embed(x, timesteps)
        return self._denoise(torch.cat([time_token, self.context_embed(context), patches], dim=1))
