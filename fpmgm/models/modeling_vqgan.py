# SPDX-License-Identifier: Apache-2.0
"""The convolutional image tokenizer: LlamaGen's VQ-16 and smaller ones of its kind, on transformers' `JanusVQVAE`.

Its folder is one of `JanusVQVAE`'s too, which loads it where this library is not installed.

Shapes: B batch, S image size, H = W grid size, E codebook dimension.
"""

import torch
from torch import nn
from transformers import JanusVQVAE

from .image_tokenizer import ImageTokenizerMixin


class VQGANModel(ImageTokenizerMixin, JanusVQVAE):
    """A vector-quantised autoencoder of residual convolutions with a codebook on the unit sphere.

    Args:
        config (`JanusVQVAEConfig`): `num_patches` is the grid size; each entry of `channel_multiplier` but the last
            halves the image. The defaults, with `num_patches=16`, are LlamaGen's VQ-16 for 256 pixels.

    Example:

    ```python
    >>> from transformers import JanusVQVAEConfig
    >>> config = JanusVQVAEConfig(num_patches=4, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1,
    ...                           latent_channels=32, num_embeddings=16)
    >>> tokenizer = VQGANModel(config)
    >>> codes = tokenizer.encode(torch.zeros(1, 3, 8, 8))
    >>> tuple(codes.shape), tuple(tokenizer.decode(codes).shape)
    ((1, 4, 4), (1, 3, 8, 8))

    ```
    """

    @property
    def grid_size(self) -> int:
        """Codes along one side of an image."""
        return self.config.num_patches

    @property
    def image_size(self) -> int:
        """Pixels along one side of an image."""
        return self.config.num_patches * 2 ** (len(self.config.channel_multiplier) - 1)

    @property
    def codebook(self) -> nn.Parameter:
        """(K, E) codes."""
        return self.quantize.embedding.weight

    def latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, H, W, E) encoder output before normalisation, of (B, 3, S, S) pixels."""
        return self.quant_conv(self.encoder(pixel_values)).permute(0, 2, 3, 1)

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) decoder output, of (B, H, W, E) quantised latents."""
        return self.decoder(self.post_quant_conv(latents.permute(0, 3, 1, 2)))


VQGANModel.register_for_auto_class("AutoModel")

__all__ = ["VQGANModel"]
