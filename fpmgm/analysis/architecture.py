# SPDX-License-Identifier: Apache-2.0
"""A denoiser in numbers: what its configuration says about weights, matrix products and what a block keeps for its
backward pass. A new architecture is one more function here.

Shapes: B batch, L length, D hidden size, C conditioning size, I intermediate size, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from ..models.block_fpmdlm import TIMESTEP_FREQUENCIES


class Linear(NamedTuple):
    """A linear map from `inputs` to `outputs` channels."""

    inputs: int
    outputs: int
    bias: bool = True

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.inputs * self.outputs + self.bias * self.outputs


class Values(NamedTuple):
    """Numbers kept for each token: `wide` in float32 or better, `narrow` in the type of the products, `widened` in
    float32 beside them where the products are in another type, `masks` of PyTorch's dropout, `flags` one byte each."""

    wide: int = 0
    narrow: int = 0
    widened: int = 0
    masks: int = 0
    flags: int = 0


class Block(NamedTuple):
    """A transformer block.

    `everywhere` and `selected` are its linear maps: those of keys, values and queries, which run at all positions, and
    those that run only at the positions selected, where a block gives only these. `width` is heads × head size. What
    is kept is that of each position, each query and each position selected. `passes` is how many channels' worth of
    tensors its other operations read and write for a token, forward and backward.
    """

    everywhere: tuple[Linear, ...]
    selected: tuple[Linear, ...]
    modulation: Linear
    width: int
    norms: int
    kept_at_positions: Values
    kept_at_queries: Values
    kept_at_selected: Values
    widest: int
    passes: tuple[int, int]

    @property
    def parameters(self) -> int:
        """All its weights."""
        maps = (*self.everywhere, *self.selected, self.modulation)
        return sum(linear.parameters for linear in maps) + self.norms


class Injection(NamedTuple):
    """`once` and `each` are its linear maps for a call and for an iteration, `vectors` its further weights. Kept:
    numbers for each token, for a call and for an iteration; `passes` as of a block, for an iteration."""

    once: tuple[Linear, ...]
    each: tuple[Linear, ...]
    vectors: int
    kept_once: Values
    kept_each: Values
    passes: tuple[int, int]

    @property
    def parameters(self) -> int:
        """All its weights."""
        return sum(linear.parameters for linear in (*self.once, *self.each)) + self.vectors


class Architecture(NamedTuple):
    """A denoiser: `pre`, `shared` and `post` blocks, `embeddings` weights beside those of the `vocabulary` tokens,
    `conditioning` maps that make the conditioning vector, of one sequence or (`per_sequence`) of each, `registers`
    positions beside the tokens; `masked_area(t)` is the integral from 0 to t of the masked share over training's
    times, which are uniform in [0, 1): at 1 it is the mean share."""

    block: Block
    pre: int
    shared: int
    post: int
    hidden: int
    vocabulary: int
    tied: bool
    embeddings: int
    conditioning: tuple[Linear, ...]
    per_sequence: bool
    registers: int
    injection: Injection | None
    final_modulation: Linear
    final_norm: int
    dropout: bool
    masked_area: Callable[[float], float]


def architecture(config) -> Architecture:
    """The architecture of a model configuration.

    Args:
        config: A configuration of this library.

    Raises:
        `ValueError`: if `config` is of another `model_type`.

    Example:

    ```python
    >>> from fpmgm import FPMDLMConfig
    >>> architecture(FPMDLMConfig()).block.parameters
    7677696

    ```
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in ARCHITECTURES:
        raise ValueError(f"`config` is of `model_type`={model_type!r}, but must be one of {tuple(ARCHITECTURES)}.")
    return ARCHITECTURES[model_type](config)


def text_area(t: float) -> float:
    """∫₀ᵗ s ds."""
    return t * t / 2


def image_area(t: float) -> float:
    """∫₀ᵗ arccos(s)/(π/2) ds."""
    return (t * math.acos(t) - math.sqrt(1 - t * t) + 1) / (math.pi / 2)


def _architecture(config, **own) -> Architecture:
    """What all configurations say alike, and what is a model's `own`."""
    return Architecture(
        pre=config.num_pre_layers,
        shared=config.num_fixed_point_layers,
        post=config.num_post_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        tied=config.tie_word_embeddings,
        injection=_injection(config) if config.num_fixed_point_layers else None,
        dropout=config.dropout > 0,
        **own,
    )


def _fpmdlm(config) -> Architecture:
    size, conditioning, inner = config.hidden_size, config.conditioning_size, config.intermediate_size
    modulated = size if config.time_conditioning else 0  # the norm's output, where its vectors are not the norm's own
    block = Block(
        everywhere=(Linear(size, 3 * size, bias=False),),
        selected=(Linear(size, size, bias=False), Linear(size, inner), Linear(inner, size)),
        modulation=Linear(conditioning, 6 * size),
        width=size,
        norms=2 * size,
        # The norm's input and statistics; its output, values, turned keys.
        kept_at_positions=Values(wide=size + 2 + modulated, narrow=3 * size),
        # Turned queries, attention's output and normaliser.
        kept_at_queries=Values(wide=config.num_attention_heads, narrow=2 * size),
        # Attention's output in rows, both branches after dropout, the norm, the MLP before GELU.
        kept_at_selected=Values(wide=size + 2 + modulated, narrow=4 * size + inner, masks=2 * size),
        widest=inner,
        passes=(26 * size + 2 * inner, 50 * size + 5 * inner),
    )
    return _architecture(
        config,
        block=block,
        embeddings=0,
        conditioning=(Linear(TIMESTEP_FREQUENCIES, conditioning), Linear(conditioning, conditioning)),
        per_sequence=config.time_conditioning,
        registers=0,
        final_modulation=Linear(conditioning, 2 * size),
        final_norm=size,
        masked_area=text_area,
    )


def _fpmaskgit(config) -> Architecture:
    size, inner = config.hidden_size, config.intermediate_size
    width = config.num_attention_heads * (size // config.num_attention_heads)
    block = Block(
        everywhere=(Linear(size, 3 * width, bias=False),),
        selected=(
            Linear(width, size, bias=False), Linear(size, inner, bias=False), Linear(size, inner, bias=False),
            Linear(inner, size, bias=False),
        ),
        modulation=Linear(size, 6 * size),
        width=width,
        norms=2 * size,
        # The norm's input and statistic, its output before and after modulation; queries, keys and values, and what
        # normalises the keys.
        kept_at_positions=Values(wide=2 * size + 2, narrow=size + 4 * width, widened=width),
        # Normalised queries and what normalises them, attention's output and normaliser.
        kept_at_queries=Values(wide=config.num_attention_heads + 1, narrow=2 * width, widened=width),
        # Attention's output in rows, both branches, the norm as above, the MLP before SwiGLU.
        kept_at_selected=Values(
            wide=2 * size + 1, narrow=width + 3 * size + 2 * inner, masks=size, flags=inner
        ),
        widest=3 * inner,
        # With a GPU's kernel for RMS norms. A CPU has none: there a norm is many passes.
        passes=(28 * size + 5 * inner, 76 * size + (22 if config.dropout else 12) * inner),
    )  # fmt: skip
    return _architecture(
        config,
        block=block,
        embeddings=(config.max_position_embeddings + config.num_classes + 1 + config.num_register_tokens) * size,
        conditioning=(),
        per_sequence=True,
        registers=config.num_register_tokens,
        final_modulation=Linear(size, 2 * size),
        final_norm=2 * size,
        masked_area=image_area,
    )


def _injection(config) -> Injection:
    size = config.hidden_size
    project = Linear(size, size)  # G
    kinds = {
        # Kept: h_pre and u once; the state and the hidden layer before GELU at each iteration.
        "mlp": Injection(
            once=(project, Linear(size, 2 * size)),
            each=(Linear(size, 2 * size, bias=False), Linear(2 * size, size)),
            vectors=0,
            kept_once=Values(narrow=2 * size),
            kept_each=Values(narrow=3 * size),
            passes=(10 * size, 12 * size),
        ),
        "linear": Injection(
            once=(project, Linear(size, size)),
            each=(Linear(size, size, bias=False),),
            vectors=0,
            kept_once=Values(narrow=2 * size),
            kept_each=Values(narrow=size),
            passes=(3 * size, size),
        ),
        "diagonal": Injection(
            once=(project,),
            each=(),
            vectors=size,
            kept_once=Values(narrow=2 * size),
            kept_each=Values(wide=size),
            passes=(3 * size, 6 * size),
        ),
    }
    return kinds[config.input_injection]


ARCHITECTURES = {"fpmdlm": _fpmdlm, "fpmaskgit": _fpmaskgit}
