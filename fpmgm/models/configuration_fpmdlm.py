# SPDX-License-Identifier: Apache-2.0
"""Configuration of the fixed-point masked diffusion language model."""

from .arguments import flag, number, whole
from .configuration_mgm import DERIVED, EPSILON, SHARED_FIELDS, SIZE, MGMConfig, check_fields


FIELDS = {
    **SHARED_FIELDS,
    "vocab_size": SIZE,
    "mask_token_id": whole(0),
    "conditioning_size": SIZE,
    "max_position_embeddings": SIZE,
    "time_conditioning": flag(),
    "rope_theta": number(0, float("inf"), "()"),
    "layer_norm_eps": EPSILON,
}


class FPMDLMConfig(MGMConfig):
    r"""
    Configuration of [`FPMDLMForMaskedDiffusion`]: `num_pre_layers` explicit blocks P, `num_fixed_point_layers` shared
    blocks F iterated to a fixed point, `num_post_layers` explicit blocks H. The defaults are the paper's FP-MDLM;
    `num_pre_layers=12, num_fixed_point_layers=0, num_post_layers=0` is MDLM-small.

    Args:
        vocab_size (`int`, defaults to 50258): Number of token ids, the mask id included.
        mask_token_id (`int`, defaults to 50257): Id of the mask; it is never generated.
        hidden_size (`int`, defaults to 768): Width D of the residual stream.
        num_attention_heads (`int`, defaults to 12): Heads; must divide `hidden_size` into an even head size.
        intermediate_size (`int`, defaults to 3072): Width of each block's MLP.
        conditioning_size (`int`, defaults to 128): Width of the time-conditioning vector of the adaptive layer norms.
        max_position_embeddings (`int`, defaults to 1024): Longest sequence, and the default length of `generate`.
        dropout (`float`, defaults to 0.1): Dropout after attention and MLP, in [0, 1). Inside the fixed-point stack
            one mask serves all iterations of a call.
        num_pre_layers (`int`, defaults to 1): Blocks of P, before the fixed-point stack; an explicit model's blocks.
        num_fixed_point_layers (`int`, defaults to 1): Blocks of F, iterated to a fixed point; 0: an explicit model.
        num_post_layers (`int`, defaults to 1): Blocks of H, after the fixed-point stack.
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
        time_conditioning (`bool`, defaults to `False`): Whether the blocks see the diffusion time.
        rope_theta (`float`, defaults to 10000): Base of the rotary position embedding.
        layer_norm_eps (`float`, defaults to 1e-5): Added to variances.
        tie_word_embeddings (`bool`, defaults to `False`): Whether the head shares the embedding's weight.
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*): The tokenizer's; the model does not read them.

    Raises:
        `ValueError`: names the field, its value, what is allowed and what to do.

    Example:

    ```python
    >>> from fpmgm import FPMDLMConfig
    >>> FPMDLMConfig(num_pre_layers=12, num_fixed_point_layers=0, num_post_layers=0).num_hidden_layers
    12

    ```
    """

    model_type = "fpmdlm"

    vocab_size: int = 50258
    mask_token_id: int = 50257
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    conditioning_size: int = 128
    max_position_embeddings: int = 1024
    time_conditioning: bool = False
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        check_fields(self, FIELDS, DERIVED, kwargs)
        _check_sizes(self)
        super().__post_init__(**kwargs)


def _check_sizes(config: FPMDLMConfig) -> None:
    if config.hidden_size % (2 * config.num_attention_heads):
        raise ValueError(
            f"`num_attention_heads`={config.num_attention_heads} must divide `hidden_size`={config.hidden_size} into "
            "heads of even size (rotary embedding turns pairs of channels): change one of the two."
        )
    if not 0 <= config.mask_token_id < config.vocab_size:
        raise ValueError(
            f"`mask_token_id`={config.mask_token_id} must lie in [0, `vocab_size`={config.vocab_size}): "
            "add one id for the mask to the vocabulary size."
        )


__all__ = ["FPMDLMConfig"]
