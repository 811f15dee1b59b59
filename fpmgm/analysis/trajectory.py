# SPDX-License-Identifier: Apache-2.0
"""The states that a denoiser sees from the first step to the last: of a model's own sampling, or of given tokens.

Shapes: B batch, L length, T denoising steps.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..models.arguments import check_whole
from ..models.reveal import RevealTask
from ..models.schedules import time_grid
from ..models.text_input import token_rows


# Three-state reuse that reuses nothing: the solver starts from h_pre, and no step is left out as idle. A looped model
# has no reuse.
NOTHING_REUSED = {
    "reuse": "3sr",
    "gamma_unchanged": 0.0,
    "gamma_masked": [0.0, 0.0],
    "gamma_changed": 0.0,
    "gamma_remasked": 0.0,
}


class Trajectory(NamedTuple):
    """`states` (T + 1, B, L): the tokens before each step and after the last, on the CPU; `times` (T,), the diffusion
    time of each step, float64; `class_labels` (B,) of images, or `None`."""

    states: torch.Tensor
    times: torch.Tensor
    class_labels: torch.Tensor | None = None


def sampled_trajectory(
    model: nn.Module,
    num_steps: int,
    iterations: int = 4,
    class_labels: list[int] | torch.Tensor | None = None,
    **options: Any,
) -> Trajectory:
    """What a model sees while it samples without reuse.

    Args:
        model (`PreTrainedModel`): Any model of this library.
        num_steps (`int`): Denoising steps T.
        iterations (`int`, defaults to 4): Fixed-point iterations of each step; explicit models take none.
        class_labels (`list[int]` or `torch.Tensor`, *optional*): (B,) classes of images. `None`: no class.
        options: Of `generate`: `batch_size`, `seed`, `temperature`, `guidance_scale`, `remask`, …
    """
    after, times = {}, time_grid(num_steps)[:-1]  # tokens by step; explicit models leave idle steps out

    def note(step) -> None:
        after[step.step], times[step.step] = step.sequences.cpu(), step.time

    shared = model.config.num_fixed_point_layers > 0
    written = model.generate(
        num_steps=num_steps,
        iterations=iterations if shared else 0,
        class_labels=class_labels,
        callback=note,
        **{**({} if model.config.is_looped else NOTHING_REUSED), **_whole_texts(model), **options},
    ).cpu()  # (B, L)
    states = [torch.full_like(written, model.config.mask_token_id)]
    for step in range(num_steps):
        states.append(after.get(step, states[-1]))
    labels = None if class_labels is None else torch.as_tensor(class_labels).cpu()
    return Trajectory(torch.stack(states), times, labels)


def masked_trajectory(
    model: nn.Module,
    input_ids: torch.Tensor | Iterable[Sequence[int]],
    num_steps: int,
    class_labels: Sequence[int] | torch.Tensor | None = None,
    seed: int | list[int] = 0,
    remask: float | None = None,
) -> Trajectory:
    """What a model would see if its sampler wrote the given tokens: contexts that several models can share.

    Positions are revealed in the default order of the model (ancestral for text, Halton's for images).

    Args:
        model (`PreTrainedModel`): Whose order and mask id are used; its weights are not.
        input_ids (`torch.Tensor`, `Dataset` or `Iterable`): (B, L) ids of real text, such as `fpmgm.data.pack` gives,
            or image codes.
        num_steps (`int`): Denoising steps T.
        class_labels (`list[int]` or `torch.Tensor`, *optional*): (B,) classes of images. `None`: no class.
        seed (`int` or `list[int]`, defaults to 0): Of the order, as in `generate`.
        remask (`float`, *optional*): Mask tokens again, as in `generate`. `None`: what is revealed stays.

    Raises:
        `ValueError`: for rows of different lengths, or one that holds the mask id, and for `remask` where the model's
            order masks nothing again.

    Example:

    ```python
    >>> import torch
    >>> from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion
    >>> model = FPMDLMForMaskedDiffusion(FPMDLMConfig(
    ...     vocab_size=11, mask_token_id=10, hidden_size=8, num_attention_heads=2, intermediate_size=16,
    ...     conditioning_size=4, max_position_embeddings=4))
    >>> masked_trajectory(model, torch.tensor([[1, 2, 3, 4]]), num_steps=3).states[:, 0].tolist()
    [[10, 10, 10, 10], [1, 10, 10, 4], [1, 10, 3, 4], [1, 2, 3, 4]]

    ```
    """
    check_whole("num_steps", num_steps, minimum=1, unit="denoising steps")
    mask_token_id = model.config.mask_token_id
    rows = token_rows(input_ids, "input_ids", mask_token_id)
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"`input_ids` have {sorted({len(row) for row in rows})[:5]} tokens: give rows of one length.")
    tokens = torch.tensor(rows)
    wanted = torch.ones_like(tokens, dtype=torch.bool)
    name, order = next(iter(model.orders.items()))
    if remask is not None and name != "ancestral":
        raise ValueError(f"`remask`={remask} needs a model of the order 'ancestral', not {name!r}: leave it out.")
    config = model.generation_config.updated(remask=remask, final="sample", order=None, **_whole_texts(model))
    schedule = order(RevealTask(wanted, wanted, num_steps, mask_token_id, config, seed, None)).schedule
    masked, states = wanted.flatten(), []
    for reveals, remasks in zip(schedule.reveals, schedule.remasks, strict=True):
        states.append(tokens.masked_fill(masked.view_as(tokens), mask_token_id))
        masked = masked.index_fill(0, reveals, False).index_fill(0, remasks, True)
    labels = None if class_labels is None else torch.as_tensor(class_labels).cpu()
    return Trajectory(torch.stack([*states, tokens]), time_grid(num_steps)[:-1], labels)


def _whole_texts(model: nn.Module) -> dict[str, Any]:
    """What makes texts of one length, written at once, of a checkpoint with other defaults."""
    wanted = {"block_length": None, "stop_at_eos": False}
    return {name: value for name, value in wanted.items() if getattr(model.generation_config, name, value) != value}
