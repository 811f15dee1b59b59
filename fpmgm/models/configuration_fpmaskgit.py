# SPDX-License-Identifier: Apache-2.0
"""Configuration of the fixed-point masked generative image model."""

from .arguments import whole
from .configuration_mgm import DERIVED, EPSILON, PROBABILITY, SHARED_FIELDS, SIZE, MGMConfig, check_fields


FIELDS = {
    **SHARED_FIELDS,
    "codebook_size": SIZE,
    "num_classes": SIZE,
    "grid_size": whole(1, 2**12),
    "num_register_tokens": whole(0, 2**12),
    "class_dropout": PROBABILITY,
    "rms_norm_eps": EPSILON,
}
FOLLOWING = {
    **DERIVED,
    "vocab_size": "`codebook_size` + 1",
    "mask_token_id": "`codebook_size`",
    "max_position_embeddings": "`grid_size` squared",
    "conditioning_size": "`hidden_size`",
}


class FPMaskGITConfig(MGMConfig):
    r"""
    Configuration of [`FPMaskGITModel`]: `num_pre_layers` explicit blocks P, `num_fixed_point_layers` shared blocks F
    iterated to a fixed point, `num_post_layers` explicit blocks H. The defaults are the paper's FP-MaskGIT;
    `num_pre_layers=24, num_fixed_point_layers=0, num_post_layers=0` is MaskGIT-Large, 12 in place of 24 is MaskGIT-12.

    `vocab_size` (`codebook_size` + 1), `mask_token_id` (`codebook_size`) and `max_position_embeddings` (`grid_size`
    squared) follow from the fields.

    Args:
        codebook_size (`int`, defaults to 4096): Codes of the image tokenizer, ids from 0; the next id is the mask.
        num_classes (`int`, defaults to 10): Classes, with ids from 0; the next id is the null class, which stands for
            no class. Left out, it is the length of `id2label`, Hugging Face's names of the classes, where that is
            given.
        grid_size (`int`, defaults to 16): Side of the square of tokens that make an image, row by row.
        hidden_size (`int`, defaults to 1024): Width D of the residual stream.
        num_attention_heads (`int`, defaults to 16): Heads; their size is `hidden_size` // `num_attention_heads`.
        intermediate_size (`int`, defaults to 2816): Width of each block's gated MLP.
        num_register_tokens (`int`, defaults to 1): Learned tokens after those of the image, without a position.
        dropout (`float`, defaults to 0.1): Dropout after attention and inside the MLP, in [0, 1). Inside the
            fixed-point stack one mask serves all iterations of a call.
        class_dropout (`float`, defaults to 0.1): Share of the sequences whose class the trainer replaces by the null
            class, in [0, 1), for classifier-free guidance.
        num_pre_layers (`int`, defaults to 4): Blocks of P, before the fixed-point stack; an explicit model's blocks.
        num_fixed_point_layers (`int`, defaults to 1): Blocks of F, iterated to a fixed point; 0: an explicit model.
        num_post_layers (`int`, defaults to 4): Blocks of H, after the fixed-point stack.
        input_injection (`str`, defaults to `"mlp"`): How F sees its input u: `"mlp"` (the paper's), `"linear"` or
            `"diagonal"` (z = a⊙h + (1 − a)⊙u with a in (0, 1): stable for any weights, nearly free). `"none"` is a
            looped model, to compare with: F sees the start h⁰ = h_pre alone, which carries the gradient, so that no
            solution is reused.
        injection_init (`str`, defaults to `"contraction"`): Start of the injection: `"contraction"` is exactly
            z = h/2 + u/2, for training from scratch; `"identity"` is exactly z = h, for conversion (not possible
            for `"diagonal"`, whose a stays below 1, and `"none"`).
        num_fixed_point_iterations (`int`, defaults to 6): Iterations of `forward` when none are given.
        no_grad_iterations (`list[int]`, defaults to [0, 4]): Inclusive range from which the trainer draws the
            iterations without gradient (SJFB, Section 3.2 and Appendix C.1); [0, 0] without an injection.
        grad_iterations (`list[int]`, defaults to [3, 6]): Inclusive range from which it draws those with gradient,
            which come after.
        rms_norm_eps (`float`, defaults to 1e-5): Added to mean squares.
        tie_word_embeddings (`bool`, defaults to `True`): Whether the head shares the token embedding's weight; its
            bias is its own.

    Raises:
        `ValueError`: names the field, its value, what is allowed and what to do.

    Example:

    ```python
    >>> from fpmgm import FPMaskGITConfig
    >>> config = FPMaskGITConfig(codebook_size=512, grid_size=8, id2label={0: "cat", 1: "dog", 2: "owl"})
    >>> config.mask_token_id, config.max_position_embeddings, config.num_classes
    (512, 64, 3)

    ```
    """

    model_type = "fpmaskgit"

    codebook_size: int = 4096
    num_classes: int | None = None
    grid_size: int = 16
    hidden_size: int = 1024
    num_attention_heads: int = 16
    intermediate_size: int = 2816
    num_register_tokens: int = 1
    class_dropout: float = 0.1
    num_pre_layers: int = 4
    num_post_layers: int = 4
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        names = kwargs.get("num_labels") if self.id2label is None else len(self.id2label)
        if self.num_classes is None:
            self.num_classes = 10 if names is None else names
        check_fields(self, FIELDS, FOLLOWING, kwargs)
        _check_sizes(self, names)
        super().__post_init__(**{**kwargs, "num_labels": self.num_classes})

    @property
    def vocab_size(self) -> int:
        """Token ids, the mask id included."""
        return self.codebook_size + 1

    @property
    def mask_token_id(self) -> int:
        """Id of the mask; it is never generated."""
        return self.codebook_size

    @property
    def max_position_embeddings(self) -> int:
        """Tokens of an image."""
        return self.grid_size**2

    @property
    def conditioning_size(self) -> int:
        """Width of the class vector that the adaptive layer norms see."""
        return self.hidden_size


def _check_sizes(config: FPMaskGITConfig, names: int | None) -> None:
    if config.num_attention_heads > config.hidden_size:
        raise ValueError(
            f"`num_attention_heads`={config.num_attention_heads} must be at most `hidden_size`={config.hidden_size}."
        )
    if names is not None and names != config.num_classes:
        raise ValueError(
            f"`num_classes`={config.num_classes} must be the {names} classes that `id2label` names: leave it out."
        )


__all__ = ["FPMaskGITConfig"]
