# SPDX-License-Identifier: Apache-2.0
"""The fixed-point masked diffusion language model: pre-stack P, injection G, shared stack F, post-stack and head H.

    h_pre = P(z, t);   u = G(h_pre);   h* ≈ fixed point of h ↦ F(h; u, t);   logits = H(h*, t)        (Section 3.1)

Without fixed-point layers it is MDLM. The blocks are MDLM's: rotary self-attention and MLP under an adaptive layer
norm whose vectors come from the diffusion time, or are constants when time is not conditioned on.

Shapes: B batch, L length, D hidden size, C conditioning size, V vocabulary, N iterations, P selected positions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .block_fpmdlm import FPMDLMBlock, LayerNorm, Modulation, TimestepEmbedding, modulate, rotary_embedding, wide
from .configuration_fpmdlm import FPMDLMConfig
from .fixed_point import SOLVERS, FixedPointSolution, solve_adaptively, solve_fixed_point
from .generation_mgm import MGMGenerationMixin
from .injection import INJECTION_STARTS, INJECTIONS, IdentityLinear, ZeroLinear, initialize
from .noise import IGNORE_INDEX, sigma
from .reuse import warm_start
from .selection import Selection, select


@dataclass
class MGMOutput(ModelOutput):
    """Output of a masked generative model.

    Args:
        loss (`torch.Tensor`, scalar): Weighted cross-entropy per real position, when `labels` are given.
        logits (`torch.Tensor`): (B, L, V), or (P, V) at `logits_positions`; raw, with the mask column.
        last_hidden_state (`torch.Tensor`): (B, L, D) after the post-stack, before the final norm; (P, D) at
            `logits_positions`.
        fixed_point_state (`torch.Tensor`): (B, L, D) h*; `None` without fixed-point layers.
        residuals (`torch.Tensor`): (N, B) relative residual of each iteration taken, float32; NaN where a sequence
            stopped earlier.
        masked_accuracy (`torch.Tensor`, scalar): Share of the positions with a label whose most likely token is right.
        block_evaluations (`int`): Transformer blocks run for the sequence that took most.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    fixed_point_state: torch.Tensor | None = None
    residuals: torch.Tensor | None = None
    masked_accuracy: torch.Tensor | None = None
    block_evaluations: int | None = None


def masked_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """−log p(label) at masked positions, (P,), with no probability on the mask id (the SUBS parameterisation).

    Args:
        logits (`torch.Tensor`): (P, V); the mask column is overwritten with −∞.
        labels (`torch.Tensor`): (P,).
    """
    logits[:, mask_token_id] = float("-inf")
    return F.cross_entropy(logits.to(wide(logits.dtype)), labels, reduction="none")


class FixedPointStack(nn.Module):
    """G and F: `constant` makes u = G(h_pre) once per call, `forward` is one application of F."""

    def __init__(self, config: FPMDLMConfig):
        super().__init__()
        a, b = INJECTION_STARTS[config.injection_init]
        self.input_proj = IdentityLinear(config.hidden_size, [[1.0]])
        self.injection = INJECTIONS[config.input_injection](config.hidden_size, a, b)
        self.layers = nn.ModuleList([FPMDLMBlock(config) for _ in range(config.num_fixed_point_layers)])

    def constant(self, h_pre: torch.Tensor) -> torch.Tensor:
        """What every iteration adds from u = G(h_pre)."""
        return self.injection.constant(self.input_proj(h_pre))

    def forward(self, h, constant, modulations, rotary, attention_mask, keeps) -> torch.Tensor:
        h = self.injection(h, constant)  # (B, L, D)
        for layer, modulation, keep in zip(self.layers, modulations, keeps, strict=True):
            h = layer(h, modulation, rotary, attention_mask, keep)
        return h


class FPMDLMPreTrainedModel(PreTrainedModel):
    """Initialisation and what Hugging Face needs to know of the architecture."""

    config: FPMDLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is normalised here
    _no_split_modules = ["FPMDLMBlock", "Modulation"]  # both are called on their own
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if initialize(module):  # the modulations and the head at 0, the injection as z = ah + bu
            return
        if isinstance(module, LayerNorm):
            init.ones_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Embedding)):  # MDLM's: uniform in ±1/√fan_in, whatever the width
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if getattr(module, "bias", None) is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)


class FPMDLMForMaskedDiffusion(MGMGenerationMixin, FPMDLMPreTrainedModel):
    """Fixed-point masked diffusion language model, trained by masked cross-entropy and sampled by `generate`.

    Example:

    ```python
    >>> import torch
    >>> from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion
    >>> config = FPMDLMConfig(vocab_size=11, mask_token_id=10, hidden_size=8, num_attention_heads=2,
    ...                       intermediate_size=16, conditioning_size=4, max_position_embeddings=6)
    >>> model = FPMDLMForMaskedDiffusion(config).eval()
    >>> output = model(torch.full((2, 6), 10), num_iterations=4)
    >>> output.logits.shape, output.residuals.shape, output.block_evaluations
    (torch.Size([2, 6, 11]), torch.Size([4, 2]), 6)
    >>> model.generate(batch_size=2, budget=24, seed=0).shape
    torch.Size([2, 6])

    ```
    """

    default_order = "ancestral"
    gradient_checkpointing = False
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: FPMDLMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.time_embedding = TimestepEmbedding(config.conditioning_size)
        self.pre_layers = nn.ModuleList([FPMDLMBlock(config) for _ in range(config.num_pre_layers)])
        self.fixed_point = FixedPointStack(config) if config.num_fixed_point_layers else None
        self.post_layers = nn.ModuleList([FPMDLMBlock(config) for _ in range(config.num_post_layers)])
        self.final_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.final_modulation = Modulation(config.conditioning_size, config.hidden_size, 2)
        head = nn.Linear if config.tie_word_embeddings else ZeroLinear
        self.lm_head = head(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        timesteps: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weights: torch.Tensor | None = None,
        num_iterations: int | torch.LongTensor | None = None,
        num_no_grad_iterations: int = 0,
        fixed_point_state: torch.Tensor | None = None,
        reuse_weights: torch.Tensor | None = None,
        tolerance: float | None = None,
        solver: str = "picard",
        logits_positions: torch.LongTensor | None = None,
        output_logits: bool | None = None,
    ) -> MGMOutput:
        """One denoiser call.

        Args:
            input_ids (`torch.LongTensor`): (B, L) ids, the mask id where a token is unknown.
            timesteps (`torch.Tensor`, *optional*): (B,) diffusion time t in (0, 1]. Used, and needed, only with
                `time_conditioning`.
            attention_mask (`torch.Tensor`, *optional*): (B, L), 0 at padding. `None`: no padding.
            labels (`torch.LongTensor`, *optional*): (B, L) tokens to predict, -100 where no loss. `None`: no loss.
            loss_weights (`torch.Tensor`, *optional*): (B,) weight of a sequence's cross-entropy. `None`: 1.
            num_iterations (`int` or `torch.LongTensor`, *optional*): Iterations with gradient, or, without gradient,
                (B,) the most of each sequence. `None`: `num_fixed_point_iterations`.
            num_no_grad_iterations (`int`, defaults to 0): Iterations without gradient before them.
            fixed_point_state (`torch.Tensor`, *optional*): (B, L, D) solution to start from. `None`: start from h_pre.
            reuse_weights (`torch.Tensor`, *optional*): (B, L) share γ of `fixed_point_state` in the start. `None`: 1.
            tolerance (`float`, *optional*): A sequence stops iterating when its relative residual is at most this
                (without gradient only). `None`: all iterations are taken.
            solver (`str`, defaults to `"picard"`): `"picard"`, h ← F(h), or `"anderson"`, which also mixes earlier
                iterates (without gradient only); an iteration of either is one evaluation of F.
            logits_positions (`torch.LongTensor`, *optional*): (P,) indices into the flattened B·L
                positions: the logits are (P, V), and the last explicit block has queries there only. On the CPU they
                cost no wait for the device. `None`: everywhere.
            output_logits (`bool`, *optional*): Whether to build logits. `None`: only without `labels`.

        Raises:
            `ValueError`: ids outside the vocabulary length, missing `timesteps`, fewer than one iteration.
        """
        self._check_inputs(input_ids, timesteps, num_iterations, num_no_grad_iterations, solver)
        h = self.embed_tokens(input_ids)  # (B, L, D)
        conditioning, rotary = self.conditioning(timesteps, h.device), self.rotary(h)
        bias = create_bidirectional_mask(config=self.config, inputs_embeds=h, attention_mask=attention_mask)

        selection = None
        if logits_positions is not None:
            selection = select(logits_positions, *input_ids.shape, h.device)
        pre, post = self.pre_layers, self.post_layers
        explicit = self.fixed_point is None and not len(post)

        h = self._run(pre, h, conditioning, rotary, bias, selection if explicit else None)  # (B, L, D)
        solution = None
        if self.fixed_point is not None:
            solution = self._solve(
                h, conditioning, rotary, bias, attention_mask,
                start=warm_start(h, fixed_point_state, reuse_weights),
                num_iterations=self.config.num_fixed_point_iterations if num_iterations is None else num_iterations,
                num_no_grad_iterations=num_no_grad_iterations,
                tolerance=tolerance,
                solver=solver,
            )  # fmt: skip
            h = solution.state
        h = self._run(post, h, conditioning, rotary, bias, selection)  # (B, L, D) or (P, D)
        if selection is not None and h.dim() == 3:  # no block after F
            h = selection.pick(h)

        loss = accuracy = logits = None
        if output_logits or (output_logits is None and labels is None):
            logits = self._logits(h, conditioning, selection.rows if selection else None)  # (B, L, V) or (P, V)
        if labels is not None:
            loss, accuracy = self._loss(h, conditioning, labels, selection, loss_weights, attention_mask)
        iterations = 0 if solution is None else len(solution.residuals)
        return MGMOutput(
            loss=loss,
            logits=logits,
            last_hidden_state=h,
            fixed_point_state=None if solution is None else solution.state,
            residuals=None if solution is None else solution.residuals,
            masked_accuracy=accuracy,
            block_evaluations=len(pre) + iterations * self.config.num_fixed_point_layers + len(post),
        )

    def conditioning(self, timesteps: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """(B, C), or (1, C) when time is not conditioned on: one constant vector for every sequence."""
        noise = sigma(timesteps) if self.config.time_conditioning else torch.zeros(1, device=device)
        return self.time_embedding(noise)

    def rotary(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the positions of `h` (B, L, D), each (L, K)."""
        head_size = self.config.hidden_size // self.config.num_attention_heads
        return rotary_embedding(h.shape[1], head_size, self.config.rope_theta, h.device, h.dtype)

    def _run(self, layers, h, conditioning, rotary, bias, selection: Selection | None = None) -> torch.Tensor:
        """Explicit blocks; the last one gives the selected positions only, (P, D), where there is a selection."""
        for i, layer in enumerate(layers):
            last = selection if i == len(layers) - 1 else None
            # Only a mask written out as a tensor has rows that can be left out; other kernels' masks do not.
            pruned = last if bias is None or (torch.is_tensor(bias) and bias.dim() == 4) else None
            h = self._checkpointed(layer, h, layer.modulation(conditioning), rotary, bias, (None, None), pruned)
            h = last.pick(h) if last is not None and pruned is None else h
        return h

    def _solve(
        self, h_pre, conditioning, rotary, bias, attention_mask, start,
        num_iterations, num_no_grad_iterations, tolerance, solver,
    ) -> FixedPointSolution:  # fmt: skip
        """h* of h ↦ F(h; u): what no iteration changes (u, modulations, dropout masks) is computed once."""
        stack = self.fixed_point
        constant = stack.constant(h_pre)
        modulations = [layer.modulation(conditioning) for layer in stack.layers]
        keeps = [self._dropout_masks(h_pre) for _ in stack.layers]

        def step(h: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
            if rows is None:
                return self._checkpointed(stack, h, constant, modulations, rotary, bias, keeps)
            part = [tuple(v[rows] if len(v) > 1 else v for v in vectors) for vectors in modulations]
            return stack(h, constant[rows], part, rotary, None if bias is None else bias[rows], keeps)

        if tolerance is None and solver == "picard" and not torch.is_tensor(num_iterations):
            return solve_fixed_point(step, start, num_iterations, num_no_grad_iterations, attention_mask)
        return solve_adaptively(step, start, num_iterations, tolerance, solver, attention_mask)

    def _dropout_masks(self, h: torch.Tensor) -> tuple:
        """The two masks of one block, kept over the iterations so that F stays one map."""
        if not self.training or self.config.dropout == 0:
            return (None, None)
        return tuple(torch.rand_like(h, dtype=torch.float32) >= self.config.dropout for _ in range(2))

    def _checkpointed(self, module: Callable, *args):
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *args)
        return module(*args)

    def _logits(self, h: torch.Tensor, conditioning: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Final norm and head: (B, L, D) → (B, L, V), or (P, D) with the sequences `rows` (P,) → (P, V)."""
        shift, scale = self.final_modulation(conditioning)  # (B or 1, 1, D)
        if rows is not None:
            shift, scale = (v[rows, 0] if len(v) > 1 else v[0] for v in (shift, scale))  # (P or 1, D)
        return self.lm_head(modulate(self.final_norm(h), shift, scale))

    def _loss(
        self, h, conditioning, labels, selection, loss_weights, attention_mask
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted cross-entropy summed over positions with a label, per real position; and the share guessed right.

        Only masked positions carry loss, so the head runs there only.
        """
        batch_size, length = labels.shape
        if selection is None:
            positions = (labels != IGNORE_INDEX).flatten().nonzero().squeeze(1)  # (P,)
            rows, labels, h = positions // length, labels.flatten()[positions], h.flatten(0, 1)[positions]
        else:
            rows, labels = selection.rows, labels[selection.rows, selection.columns]
        logits = self._logits(h, conditioning, rows)  # (P, V)
        losses = masked_cross_entropy(logits, labels, self.config.mask_token_id)  # (P,)
        if loss_weights is not None:
            losses = losses * loss_weights[rows]
        real = batch_size * length if attention_mask is None else attention_mask.sum()
        with torch.no_grad():
            accuracy = (logits.argmax(dim=-1) == labels).sum() / (labels != IGNORE_INDEX).sum().clamp(min=1)
        return losses.sum() / real, accuracy

    def _check_inputs(self, input_ids, timesteps, num_iterations, num_no_grad_iterations, solver) -> None:
        longest = self.config.max_position_embeddings
        if input_ids.dim() != 2 or input_ids.shape[1] > longest:
            raise ValueError(
                f"`input_ids` of shape {tuple(input_ids.shape)} must be (batch, length) with length at most "
                f"`max_position_embeddings`={longest}: cut the text into pieces."
            )
        if self.config.time_conditioning and timesteps is None:
            raise ValueError(
                "`timesteps`=None, but the model has `time_conditioning`: give a (batch,) time in (0, 1]."
            )
        least = 1 if self.fixed_point is not None else 0
        if isinstance(num_iterations, int) and num_iterations < least:
            raise ValueError(f"`num_iterations`={num_iterations} must be at least {least}.")
        if num_no_grad_iterations < 0:
            raise ValueError(f"`num_no_grad_iterations`={num_no_grad_iterations} must be at least 0.")
        if solver not in SOLVERS:
            raise ValueError(f"`solver`={solver!r} must be one of {tuple(SOLVERS)}.")

    def compile_blocks(self, **options: Any) -> None:
        """Compile, in place, the blocks whose shapes are the same at every step: all but the last explicit one.

        The solver's loop stays in Python. Compilation takes tens of seconds at the first call of a shape.

        Args:
            options: Passed to `torch.compile`, such as `mode="reduce-overhead"` for CUDA graphs.
        """
        explicit = [*self.pre_layers, *self.post_layers]
        for layer in explicit[:-1]:
            layer.compile(**options)
        if self.fixed_point is not None:
            self.fixed_point.compile(**options)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save weights, configurations and the model's code, so that both Auto classes load it anywhere."""
        # The copier writes AutoConfig and AutoModelForMaskedLM; AutoModel must be named here.
        self.config.auto_map = {"AutoModel": "modeling_fpmdlm.FPMDLMForMaskedDiffusion"}
        super().save_pretrained(save_directory, **kwargs)


FPMDLMConfig.register_for_auto_class()
FPMDLMForMaskedDiffusion.register_for_auto_class("AutoModelForMaskedLM")

__all__ = ["FPMDLMForMaskedDiffusion", "FPMDLMPreTrainedModel", "MGMOutput"]
