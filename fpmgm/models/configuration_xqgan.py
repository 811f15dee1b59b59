# SPDX-License-Identifier: Apache-2.0
"""Configuration of the XQGAN image tokenizer."""

from transformers import PreTrainedConfig


class XQGANConfig(PreTrainedConfig):
    """Sizes of [`XQGANModel`]; the defaults are VQ-4096's, 16 × 16 codes for 256 pixels.

    Args:
        image_size (`int`, defaults to 256): Pixels along one side.
        patch_size (`int`, defaults to 16): Pixels along one side of a patch; one code stands for one patch.
        hidden_size (`int`, defaults to 768): Width of encoder and decoder.
        num_hidden_layers (`int`, defaults to 12): Blocks of each.
        num_attention_heads (`int`, defaults to 12): Heads of a block.
        intermediate_size (`int`, defaults to 3072): Width inside a block's MLP.
        codebook_size (`int`, defaults to 4096): Number of codes.
        codebook_dim (`int`, defaults to 64): Size of a code's vector.
        layer_norm_eps (`float`, defaults to 1e-6): Added to variances.

    Raises:
        `ValueError`: if patches do not tile the image or heads the width.
    """

    model_type = "xqgan"

    image_size: int = 256
    patch_size: int = 16
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    codebook_size: int = 4096
    codebook_dim: int = 64
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        for whole, part in (("image_size", "patch_size"), ("hidden_size", "num_attention_heads")):
            if getattr(self, part) < 1 or getattr(self, whole) % getattr(self, part):
                raise ValueError(f"`{part}`={getattr(self, part)} must divide `{whole}`={getattr(self, whole)}.")
        super().__post_init__(**kwargs)

    @property
    def grid_size(self) -> int:
        """Codes along one side of an image."""
        return self.image_size // self.patch_size


__all__ = ["XQGANConfig"]
