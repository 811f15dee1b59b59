# SPDX-License-Identifier: Apache-2.0
"""The XQGAN image tokenizer with one codebook (VQ-4096), the paper's: two DINOv2-shaped vision transformers.

The encoder reads patches and as many learned latent tokens, which share the patches' positions, and keeps the latent
tokens; the decoder reads mask tokens and the quantised latents and keeps the mask tokens. No weights come with this
library: `load_xqgan` reads a file of yours. Those published with XQGAN are licensed for non-commercial research.

Shapes: B batch, S image size, H = W grid size, N = H·W, D hidden size, E codebook dimension, P patch size.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_xqgan import XQGANConfig
from .image_tokenizer import ImageTokenizerMixin


LAYER_SCALE = 1e-5  # of fresh blocks
NEARLY_ZERO = 1e-6  # standard deviation of fresh tokens


class XQGANBlock(nn.Module):
    """Pre-norm attention and MLP, each branch scaled per channel."""

    def __init__(self, config: XQGANConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width)
        self.scale1 = nn.Parameter(torch.full((width,), LAYER_SCALE))
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.up_proj = nn.Linear(width, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, width)
        self.scale2 = nn.Parameter(torch.full((width,), LAYER_SCALE))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv_proj(self.norm1(h)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, L, D)
        h = h + self.scale1 * self.o_proj(attended)
        return h + self.scale2 * self.down_proj(F.gelu(self.up_proj(self.norm2(h))))


class XQGANTransformer(nn.Module):
    """Blocks over image tokens and latent tokens, told apart by a level embedding."""

    def __init__(self, config: XQGANConfig):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + config.grid_size**2, config.hidden_size))
        self.level_embedding = nn.Parameter(torch.zeros(2, config.hidden_size))
        self.layers = nn.ModuleList([XQGANBlock(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def place(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, 1 + N, D): the class token, then `tokens` (B, N, D), each at its position."""
        return torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.position_embedding

    def forward(self, image: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        h = torch.cat([image + self.level_embedding[0], latents + self.level_embedding[1]], dim=1)  # (B, L, D)
        for layer in self.layers:
            h = layer(h)
        return self.norm(h)


class XQGANEncoder(nn.Module):
    """Pixels to one latent per patch."""

    def __init__(self, config: XQGANConfig):
        super().__init__()
        patch = config.patch_size
        self.patch_embed = nn.Conv2d(3, config.hidden_size, kernel_size=patch, stride=patch)
        self.latent_tokens = nn.Parameter(torch.zeros(1, config.grid_size**2, config.hidden_size))
        self.transformer = XQGANTransformer(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)  # (B, N, D)
        latents = self.latent_tokens.expand(len(patches), -1, -1)
        place = self.transformer.place
        h = self.transformer(place(patches), place(latents)[:, 1:])  # (B, 1 + 2N, D)
        return h[:, -latents.shape[1] :]  # (B, N, D)


class XQGANDecoder(nn.Module):
    """One latent per patch to pixels."""

    def __init__(self, config: XQGANConfig):
        super().__init__()
        self.grid_size, self.patch_size = config.grid_size, config.patch_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.transformer = XQGANTransformer(config)
        self.to_pixels = nn.Linear(config.hidden_size, config.patch_size**2 * 3)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        masks = self.mask_token.expand(len(latents), latents.shape[1], -1)
        place = self.transformer.place
        h = self.transformer(place(masks), place(latents))[:, 1 : 1 + masks.shape[1]]  # (B, N, D)
        side, patch = self.grid_size, self.patch_size
        x = self.to_pixels(h).view(-1, side, side, patch, patch, 3)  # (B, H, W, P, P, 3)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, side * patch, side * patch)  # (B, 3, S, S)


class XQGANModel(ImageTokenizerMixin, PreTrainedModel):
    """An image tokenizer of two vision transformers with a codebook on the unit sphere.

    Args:
        config ([`XQGANConfig`]): Sizes.

    Example:

    ```python
    >>> config = XQGANConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
    ...                      intermediate_size=16, codebook_size=16, codebook_dim=4)
    >>> tokenizer = XQGANModel(config)
    >>> codes = tokenizer.encode(torch.zeros(1, 3, 8, 8))
    >>> tuple(codes.shape), tuple(tokenizer.decode(codes).shape)
    ((1, 2, 2), (1, 3, 8, 8))

    ```
    """

    config: XQGANConfig
    base_model_prefix = "model"
    _no_split_modules = ["XQGANBlock"]

    def __init__(self, config: XQGANConfig):
        super().__init__(config)
        self.encoder = XQGANEncoder(config)
        self.quant_conv = nn.Conv2d(config.hidden_size, config.codebook_dim, 1)
        self.codebook = nn.Parameter(torch.zeros(config.codebook_size, config.codebook_dim))
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.hidden_size, 1)
        self.decoder = XQGANDecoder(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, XQGANBlock):
            init.constant_(module.scale1, LAYER_SCALE)
            init.constant_(module.scale2, LAYER_SCALE)
        elif isinstance(module, XQGANTransformer):
            init.normal_(module.cls_token, std=NEARLY_ZERO)
            init.normal_(module.position_embedding, std=0.02)
            init.normal_(module.level_embedding, std=0.02)
        elif isinstance(module, XQGANEncoder):
            init.normal_(module.latent_tokens, std=NEARLY_ZERO)
        elif isinstance(module, XQGANDecoder):
            init.normal_(module.mask_token, std=NEARLY_ZERO)
        elif isinstance(module, XQGANModel):
            init.normal_(module.codebook)

    @property
    def grid_size(self) -> int:
        """Codes along one side of an image."""
        return self.config.grid_size

    @property
    def image_size(self) -> int:
        """Pixels along one side of an image."""
        return self.config.image_size

    def latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, H, W, E) encoder output before normalisation, of (B, 3, S, S) pixels."""
        h = self.encoder(pixel_values).transpose(1, 2).unflatten(2, (self.grid_size, self.grid_size))  # (B, D, H, W)
        return self.quant_conv(h).permute(0, 2, 3, 1)

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) decoder output, of (B, H, W, E) quantised latents."""
        return self.decoder(self.post_quant_conv(latents.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2))


XQGANConfig.register_for_auto_class()
XQGANModel.register_for_auto_class("AutoModel")

__all__ = ["XQGANModel"]
