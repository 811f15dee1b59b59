# SPDX-License-Identifier: Apache-2.0
"""What every image tokenizer shares: pixels become a grid of codes, the nearest rows of a codebook on the unit sphere,
and codes become pixels.

A tokenizer gives `codebook`, `latents` and `pixels`; encoding, decoding and the training loss are written here.

Shapes: B batch, C colour channels, S image size, H = W grid size, E codebook dimension, K codebook size.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .modes import evaluating


COMMITMENT = 0.25  # weight of the pull of latents towards their codes, against the pull of codes towards latents
PIXEL_SLACK = 1e-3  # normalisation in float32 may leave [-1, 1] by its rounding


@dataclass
class ImageTokenizerOutput(ModelOutput):
    """Output of a tokenizer's `forward`.

    Args:
        loss (`torch.Tensor`, scalar): Mean absolute error of the pixels plus the codebook's loss.
        pixel_values (`torch.Tensor`): (B, C, S, S) reconstruction.
        codes (`torch.LongTensor`): (B, H, W).
        latents (`torch.Tensor`): (B, H, W, E) of unit norm, before quantisation.
    """

    loss: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    codes: torch.LongTensor | None = None
    latents: torch.Tensor | None = None


class ImageTokenizerMixin:
    """Gives a vector-quantised autoencoder `encode`, `decode` and a `forward` to train with.

    The model has `image_size` and `grid_size` (`int`), `codebook`, the (K, E) parameter, `latents(pixel_values)` →
    (B, H, W, E) before normalisation, and `pixels(latents)` → (B, C, S, S).
    """

    main_input_name = "pixel_values"

    @property
    def codebook_size(self) -> int:
        """Number of codes, K."""
        return len(self.codebook)

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.LongTensor:
        """Codes of images, without dropout, whatever mode the model is in.

        Args:
            pixel_values (`torch.Tensor`): (B, C, S, S) in [-1, 1].

        Returns:
            `torch.LongTensor` of shape (B, H, W), in [0, K).

        Raises:
            `ValueError`: for another shape or pixels outside [-1, 1].
        """
        self._check_pixels(pixel_values)
        with evaluating(self):
            return nearest_codes(F.normalize(self.latents(pixel_values), dim=-1), self.codebook)

    @torch.no_grad()
    def decode(self, codes: torch.LongTensor) -> torch.Tensor:
        """Images of codes, without dropout, whatever mode the model is in.

        Args:
            codes (`torch.LongTensor`): (B, H, W), or (B, H·W) in row-major order.

        Returns:
            `torch.Tensor` of shape (B, C, S, S), in [-1, 1].

        Raises:
            `ValueError`: for another shape or codes outside [0, K).
        """
        codes = self._checked_codes(codes)  # (B, H, W)
        with evaluating(self):
            return self.pixels(F.normalize(self.codebook, dim=-1)[codes]).clamp(-1, 1)

    def forward(self, pixel_values: torch.Tensor) -> ImageTokenizerOutput:
        """Encode and decode with gradients: those of the quantised latents pass straight through to the latents.

        Args:
            pixel_values (`torch.Tensor`): (B, C, S, S) in [-1, 1].
        """
        self._check_pixels(pixel_values)
        latents = F.normalize(self.latents(pixel_values), dim=-1)  # (B, H, W, E)
        codes = nearest_codes(latents, self.codebook)  # (B, H, W)
        quantised = F.normalize(self.codebook, dim=-1)[codes]  # (B, H, W, E)
        codebook_loss = F.mse_loss(quantised, latents.detach()) + COMMITMENT * F.mse_loss(latents, quantised.detach())
        reconstruction = self.pixels(latents + (quantised - latents).detach())  # (B, C, S, S)
        return ImageTokenizerOutput(
            loss=F.l1_loss(reconstruction, pixel_values) + codebook_loss,
            pixel_values=reconstruction,
            codes=codes,
            latents=latents,
        )

    @torch.no_grad()
    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save weights and configuration, the codebook on the unit sphere, where other readers expect it."""
        self.codebook.copy_(F.normalize(self.codebook, dim=-1))
        super().save_pretrained(save_directory, **kwargs)

    def _check_pixels(self, pixel_values: torch.Tensor) -> None:
        size = self.image_size
        if pixel_values.dim() != 4 or pixel_values.shape[-2:] != (size, size):
            raise ValueError(
                f"`pixel_values` of shape {tuple(pixel_values.shape)} must be (batch, channels, {size}, {size}): "
                "resize and crop the images with the tokenizer's image processor."
            )
        low, high = pixel_values.min().item(), pixel_values.max().item()
        if not -1 - PIXEL_SLACK <= low <= high <= 1 + PIXEL_SLACK:
            raise ValueError(
                f"`pixel_values` go from {low:.4g} to {high:.4g}, but must lie in [-1, 1]: take `2 * image / 255 - 1` "
                "of 8-bit images, as the image processor does."
            )

    def _checked_codes(self, codes: torch.LongTensor) -> torch.LongTensor:
        side = self.grid_size
        if codes.shape[1:] not in ((side, side), (side * side,)):
            raise ValueError(
                f"`codes` of shape {tuple(codes.shape)} must be (batch, {side}, {side}) or (batch, {side * side}): "
                f"this tokenizer's images have {side} × {side} codes."
            )
        low, high = codes.min().item(), codes.max().item()
        if low < 0 or high >= self.codebook_size:
            raise ValueError(
                f"`codes` go from {low} to {high}, but must lie in [0, {self.codebook_size}): was the generator "
                "trained on another tokenizer, or does it still hold masked positions?"
            )
        return codes.view(-1, side, side)


def nearest_codes(latents: torch.Tensor, codebook: torch.Tensor) -> torch.LongTensor:
    """Row of `codebook` (K, E) with the largest cosine to each of `latents` (..., E): nearest on the sphere."""
    return (latents @ F.normalize(codebook, dim=-1).T).argmax(dim=-1)


def to_uint8(pixel_values: torch.Tensor) -> torch.Tensor:
    """8-bit pictures of pixels in [-1, 1], rounded to the nearest.

    Examples:
        >>> to_uint8(torch.tensor([-1.0, 0.0, 1.0])).tolist()
        [0, 128, 255]
    """
    return ((pixel_values.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


__all__ = ["ImageTokenizerMixin", "ImageTokenizerOutput", "nearest_codes", "to_uint8"]
