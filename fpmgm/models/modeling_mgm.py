# SPDX-License-Identifier: Apache-2.0
"""What every masked generative model of this library shares: pre-stack P, injection G, shared stack F, post-stack and
head H, the loss at masked positions, and what Hugging Face needs to know.

    h_pre = P(z, t);   u = G(h_pre);   h* ≈ fixed point of h ↦ F(h; u, t);   logits = H(h*, t)        (Section 3.1)

A model gives its embedding, its conditioning vector and its block; without fixed-point layers it is explicit.

Shapes: B batch, L length, D hidden size, C conditioning size, V vocabulary, N iterations, P selected positions,
A active ones.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import ModelOutput

from .arguments import check_names, shown
from .fixed_point import FixedPointSolution, SolverOptions, solve
from .frozen_states import FrozenStates, check_frozen, stores
from .head import HeadLoss, LMHead, LogitsLoss, head_loss
from .layers import Modulation, modulate, wide
from .loading import check_complete
from .noise import IGNORE_INDEX
from .reuse import warm_start
from .selection import Selection, select
from .stacks import BlockInputs, FixedPointStack, active_step, has_rows, whole_step


@dataclass
class MGMOutput(ModelOutput):
    """Output of a masked generative model.

    Args:
        loss (`torch.Tensor`, scalar): Weighted cross-entropy per real position, when `labels` are given, and what a
            `logits_loss` adds.
        logits (`torch.Tensor`): (B, L, V), or (P, V) at `logits_positions`; raw, with the mask column.
        last_hidden_state (`torch.Tensor`): (B, L, D) after the post-stack, before the final norm; (P, D) at
            `logits_positions`.
        normed_hidden_state (`torch.Tensor`): The same after the final norm: the head's input.
        fixed_point_state (`torch.Tensor`): (B, L, D) h*, where L counts registers too; `None` without fixed-point
            layers.
        residuals (`torch.Tensor`): (N, B) relative residual of each iteration taken, float32; NaN where a sequence
            stopped earlier.
        masked_accuracy (`torch.Tensor`, scalar): Share of the masked positions with a label whose most likely token
            is right.
        logits_loss (`torch.Tensor`, scalar): What the `logits_loss` of the call gave, without its weight or gradient.
        block_evaluations (`int`): Transformer blocks run for the sequence that took most; of `active_positions` their
            share of it, rounded up.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    normed_hidden_state: torch.Tensor | None = None
    fixed_point_state: torch.Tensor | None = None
    residuals: torch.Tensor | None = None
    masked_accuracy: torch.Tensor | None = None
    logits_loss: torch.Tensor | None = None
    block_evaluations: int | None = None


class DenoiserOptions(TypedDict, total=False):
    """Arguments that every model's `forward` takes beside its own.

    Args:
        loss_weights (`torch.Tensor`, *optional*): (B,) weight of a sequence's cross-entropy. `None`: 1.
        logits_loss (`Callable`, *optional*): A further loss of the logits where there is a label, or, without
            `labels`, at `logits_positions`. Called with (R, V) logits of some of these P positions, the mask id
            forbidden, and the slice of these positions; gives a scalar. `None`: none.
        logits_loss_weight (`float`, defaults to 1): What `logits_loss` is multiplied by in the loss, at least 0.
        num_items_in_batch (`int` or `float`, *optional*): Positions that the cross-entropy is divided by, say those
            of a whole optimizer step. `None`: the real positions of this call.
        num_iterations (`int` or `torch.LongTensor`, *optional*): Iterations with gradient, or, without gradient,
            (B,) the most of each sequence. `None`: `num_fixed_point_iterations`.
        num_no_grad_iterations (`int`, defaults to 0): Iterations without gradient before them.
        num_kept_iterations (`int`, *optional*): How many of those with gradient, the last ones, keep their activations
            for the backward pass; earlier ones run again there. Activation checkpointing goes before it. `None`: all.
        fixed_point_state (`torch.Tensor`, *optional*): (B, L, D) solution to start from, of the shape of the output's.
            `None`: start from h_pre.
        reuse_weights (`torch.Tensor`, *optional*): (B, L) share γ of `fixed_point_state` in the start. `None`: 1.
        tolerance (`float`, *optional*): A sequence stops iterating when its relative residual is at most this
            (without gradient only). `None`: all iterations are taken.
        solver (`str`, defaults to `"picard"`): `"picard"`, h ← F(h), or `"anderson"`, which also mixes earlier
            iterates (without gradient only); an iteration of either is one evaluation of F.
        logits_positions (`torch.LongTensor`, *optional*): (P,) indices into the flattened B·L positions, with
            `labels` those that have one: logits and hidden states are (P, ·), and the last explicit block has queries
            there only. On the CPU they cost no wait for the device. `None`: everywhere.
        frozen_states ([`FrozenStates`], *optional*): Keys, values and solution of every position, written by this call
            (without gradient only). `None`: nothing is kept.
        active_positions (`torch.LongTensor`, *optional*): (A,) ascending indices into B·(L + R), R registers, of the
            positions that are computed; the others are as `frozen_states` have them. `logits_positions` are among
            them. `None`: all.
        output_logits (`bool`, *optional*): Whether to build logits. `None`: only where no loss is asked for.
        training (`bool`, *optional*): Whether dropout acts, and activation checkpointing where it is on. `None`: in
            training mode. The modules' own modes are neither read nor changed where it is given.
    """

    loss_weights: torch.Tensor | None
    logits_loss: LogitsLoss | None
    logits_loss_weight: float
    num_items_in_batch: int | float | None
    num_iterations: int | torch.LongTensor | None
    num_no_grad_iterations: int
    num_kept_iterations: int | None
    fixed_point_state: torch.Tensor | None
    reuse_weights: torch.Tensor | None
    tolerance: float | None
    solver: str
    logits_positions: torch.LongTensor | None
    frozen_states: FrozenStates | None
    active_positions: torch.LongTensor | None
    output_logits: bool | None
    training: bool | None


SOLVER_OPTIONS = {field.name for field in fields(SolverOptions)}
# What other models return when they are asked to, by argument or configuration.
NOT_RETURNED = {
    "output_hidden_states": "read `last_hidden_state` and `fixed_point_state`, or put forward hooks on the blocks",
    "output_attentions": "attention weights are never built",
}


def check_tensor(name: str, x: torch.Tensor, shape: torch.Size | None = None) -> None:
    """Raise a `ValueError` for what is no tensor, or one of another shape. `None`: any shape will do."""
    if not torch.is_tensor(x):
        raise ValueError(f"`{name}`={shown(x)} must be a tensor.")
    if shape is not None and x.shape != shape:
        raise ValueError(f"`{name}` of shape {tuple(x.shape)} must be {tuple(shape)}.")


class MGMPreTrainedModel(PreTrainedModel):
    """The denoiser. A model's `forward` embeds its tokens and hands them to `_denoise_once`.

    Its block takes `(h, modulation, rotary, attention_mask, keep, selection, training, key_values)`, has a
    `modulation` of the conditioning vector, and draws with `dropout_masks(h)` what an evaluation in training keeps
    (`None` where it keeps everything). It drops out in `training`, an argument: its own mode may be another thread's.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _checkpoint_every = 1
    accepts_loss_kwargs = False  # the loss is normalised here
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def _build(self, config: PreTrainedConfig, block: type[nn.Module], norm: nn.Module, vocab_size: int) -> None:
        """Make the stacks, the final norm and the head."""
        self.pre_layers = nn.ModuleList([block(config) for _ in range(config.num_pre_layers)])
        self.fixed_point = FixedPointStack(config, block) if config.num_fixed_point_layers else None
        self.post_layers = nn.ModuleList([block(config) for _ in range(config.num_post_layers)])
        self.final_norm = norm
        self.final_modulation = Modulation(config.conditioning_size, config.hidden_size, 2)
        self.lm_head = LMHead(config.hidden_size, vocab_size, config.tie_word_embeddings)

    def _read_options(self, options: DenoiserOptions, labels: torch.Tensor | None) -> tuple[SolverOptions, dict]:
        """How to solve, and the other options of a call of `forward`.

        Raises:
            `ValueError`: for a name that is no option, and for one that this call cannot honour.
        """
        what = f"argument(s) of `{type(self).__name__}.forward`"
        check_names(options, DenoiserOptions.__annotations__, what, NOT_RETURNED)
        for name, instead in NOT_RETURNED.items():
            if getattr(self.config, name):
                raise ValueError(f"`config.{name}`=True cannot be honoured: {instead}. Set it to False.")
        solver = SolverOptions(**{name: value for name, value in options.items() if name in SOLVER_OPTIONS})
        if self.fixed_point is None:
            solver.check_unused()
        elif solver.num_iterations is None:
            solver = replace(solver, num_iterations=self.config.num_fixed_point_iterations)
        if self.config.is_looped:
            solver.check_looped()
        others = {name: value for name, value in options.items() if name not in SOLVER_OPTIONS and value is not None}
        for name in ("loss_weights", "num_items_in_batch"):
            if labels is None and name in others:
                raise ValueError(f"`{name}` is about the cross-entropy: give `labels` too, or leave it out.")
        if "logits_loss_weight" in others and "logits_loss" not in others:
            raise ValueError("`logits_loss_weight` weighs `logits_loss`: give that too, or leave it out.")
        if labels is None and "logits_loss" in others and "logits_positions" not in others:
            raise ValueError("`logits_loss` needs positions: give `labels` or `logits_positions` too.")
        check_frozen(others, torch.is_grad_enabled() or others.get("training", self.training))
        return solver, others

    def _denoise_once(
        self,
        h: torch.Tensor,
        conditioning: torch.Tensor,
        rotary: Any,
        masked: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.LongTensor | None,
        options: DenoiserOptions,
    ) -> MGMOutput:
        """P, G, F and H on embedded tokens `h` under `conditioning` (B or 1, C), as the caller's `options` say.

        `masked` (B, L) says which tokens are unknown; `h` (B, L, D) may have more positions after these (registers),
        `rotary` is whatever the model's blocks want to know of positions.
        """
        # 1. what is asked
        solver, options = self._read_options(options, labels)
        (batch_size, length), width, explicit = masked.shape, h.shape[1], self.fixed_point is None
        given = {"attention_mask": attention_mask, "labels": labels, **vars(solver), **options}
        shapes = {"attention_mask": masked.shape, "labels": masked.shape, "loss_weights": (batch_size,)}
        for name, shape in {**shapes, "fixed_point_state": h.shape, "reuse_weights": h.shape[:2]}.items():
            if given.get(name) is not None:
                check_tensor(name, given[name], shape)
        attention_mask = None if attention_mask is None else attention_mask.bool()
        bias = create_bidirectional_mask(config=self.config, inputs_embeds=h, attention_mask=attention_mask)
        inputs = BlockInputs(conditioning, rotary, bias, options.get("training", self.training))
        frozen, among, selection = options.get("frozen_states"), options.get("active_positions"), None
        if among is not None:
            among = among.cpu()
            inputs = inputs.at(select(among, batch_size, width, h.device))
            h = inputs.active.pick(h.flatten(0, 1))  # (A, D)
        if "logits_positions" in options:
            selection = select(options["logits_positions"], batch_size, length, h.device, width, among)

        # 2. P, F and H
        pre, post = self.pre_layers, self.post_layers
        of_pre, of_shared, of_post = stores(frozen, self.config)
        h = self._run(pre, of_pre, h, inputs, selection if explicit and not len(post) else None)
        solution = state = None
        if not explicit:
            solution = self._solve(h, of_shared, inputs, attention_mask, solver)
            h = solution.state  # (B, L, D) or (A, D)
            state = h if frozen is None else frozen.solved(h, inputs.active)
        h = self._run(post, of_post, h, inputs, selection)  # or (P, D)
        if selection is not None and not explicit and not len(post):
            h = selection.pick(h.flatten(0, -2))
        if selection is None:
            h = h[:, :length]  # without what a model appends to the tokens
        normed = self._normed(h, conditioning, selection)

        # 3. logits and loss
        loss = accuracy = added = logits = None
        wants_loss = labels is not None or "logits_loss" in options
        if options.get("output_logits", not wants_loss):
            logits = self.lm_head(normed)  # (B, L, V) or (P, V)
        if wants_loss:
            loss, accuracy, added = self._loss(normed, labels, masked, selection, attention_mask, options)
        iterations = 0 if explicit else len(solution.residuals)
        blocks = len(pre) + iterations * self.config.num_fixed_point_layers + len(post)
        computed = width if inputs.active is None else inputs.active.shape[1]
        return MGMOutput(
            loss=loss,
            logits=logits,
            last_hidden_state=h,
            normed_hidden_state=normed,
            fixed_point_state=state,
            residuals=None if explicit else solution.residuals,
            masked_accuracy=accuracy,
            logits_loss=added,
            block_evaluations=math.ceil(blocks * computed / width),
        )

    def _run(self, layers, kept, h, inputs: BlockInputs, selection: Selection | None) -> torch.Tensor:
        """Explicit blocks; the last one gives the selected positions only, (P, D), where there is a selection."""
        active = None if inputs.active is None else inputs.active._replace(places=None)
        for i, (layer, store) in enumerate(zip(layers, kept, strict=True)):
            last = selection if i == len(layers) - 1 else None
            pruned = last if has_rows(inputs.bias) else None
            part = None if store is None else store.of(inputs.active)
            arguments = (inputs.modulation(layer), inputs.rotary, inputs.bias, None, pruned or active, inputs.training)
            h = self._checkpointed(i, inputs.training, layer, h, *arguments, part)
            h = last.pick(h.flatten(0, 1)) if last is not None and pruned is None else h
        return h

    def _solve(self, h_pre, kept, inputs: BlockInputs, attention_mask, options: SolverOptions) -> FixedPointSolution:
        """h* of h ↦ F(h; u), (B, L, D), or at the active positions, (A, D)."""
        state, weights, active = options.fixed_point_state, options.reuse_weights, inputs.active
        if active is not None:
            state, weights = (None if x is None else active.pick(x.flatten(0, 1)) for x in (state, weights))
        start = warm_start(h_pre, state, weights)
        if not self.config.is_looped:
            start = start.detach()  # P learns through u alone
        turns = itertools.count()
        if self.gradient_checkpointing:  # runs every iteration again, or those that it was told to
            options = replace(options, num_kept_iterations=None)
        if active is None:
            step = whole_step(
                self.fixed_point, h_pre, inputs, kept,
                lambda *arguments: self._checkpointed(next(turns), inputs.training, *arguments),
            )  # fmt: skip
            return solve(step, start, options, attention_mask)
        step = active_step(self.fixed_point, h_pre, inputs, kept)
        real = active.filled() if attention_mask is None else active.pad(active.pick(attention_mask.flatten()))
        solution = solve(step, active.pad(start), options, real)  # (B, Q, D)
        return solution._replace(state=active.pack(solution.state))

    def _set_gradient_checkpointing(self, **kwargs) -> None:
        super()._set_gradient_checkpointing(**kwargs)
        self._checkpoint_every = kwargs.get("every_n_layers", 1)

    def _checkpointed(self, place: int, training: bool, module: Callable, *args):
        """module(*args), run again in the backward pass where that is asked of this `place` in its stack, or of this
        iteration."""
        asked = self.gradient_checkpointing and place % self._checkpoint_every == 0
        if asked and training and torch.is_grad_enabled():
            # One by one: with `use_reentrant`, what is inside of a tuple would not be cut off from its own graph.
            leaves, tree = tree_flatten(args)
            return self._gradient_checkpointing_func(lambda *leaves: module(*tree_unflatten(leaves, tree)), *leaves)
        return module(*args)

    def _normed(self, h: torch.Tensor, conditioning: torch.Tensor, selection: Selection | None) -> torch.Tensor:
        """The head's input, of the shape of `h`: (B, L, D), or (P, D) at the selected positions."""
        shift, scale = self.final_modulation(conditioning)  # (B or 1, 1, D)
        if selection is not None:
            shift, scale = selection.vector(shift), selection.vector(scale)  # (P or 1, D)
        return modulate(self.final_norm(h), shift, scale)

    def _loss(
        self, normed, labels, masked, selection, attention_mask, options: DenoiserOptions
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The loss at the positions with a label, or, without labels, at the selected ones; the share of the masked
        ones guessed right; and what `logits_loss` gave."""
        # 1. the positions: P of B·L
        if selection is None:
            positions, length = (labels != IGNORE_INDEX).flatten().nonzero().squeeze(1), labels.shape[1]
            rows, columns = positions // length, positions % length
            normed = normed[rows, columns]
        else:
            rows, columns = selection.rows, selection.columns
        # 2. the weight of each: its sequence's, shared out over the items
        items, loss_weights = options.get("num_items_in_batch"), options.get("loss_weights")
        if items is None:
            items = masked.numel() if attention_mask is None else attention_mask.sum()
        weights = 1 if loss_weights is None else loss_weights[rows].to(wide(normed.dtype))
        weights = normed.new_ones(len(rows), dtype=wide(normed.dtype)) * weights / items  # (P,)
        # 3. logits and their loss, chunk by chunk
        labels = None if labels is None else labels[rows, columns]
        further = options.get("logits_loss")
        loss = HeadLoss(self.config.mask_token_id, labels, weights, further, options.get("logits_loss_weight", 1.0))
        total, hits, added = head_loss(self.lm_head, normed, loss)
        # 4. what is reported
        accuracy = None
        if labels is not None:
            masked = masked[rows, columns]
            accuracy = (hits & masked).float().sum() / masked.float().sum().clamp(min=1)
        return total, accuracy, None if further is None else added

    def compile_blocks(self, **options: Any) -> None:
        """Compile, in place, the blocks whose shapes are the same at every step: all but the last explicit one.

        The solver's loop stays in Python. Compilation takes tens of seconds at the first call of a shape.

        Args:
            options: Passed to `torch.compile`. To sample, leave out the modes with CUDA graphs (`"reduce-overhead"`,
                `"max-autotune"`): without a gradient a graph's output is freed by the next call, which reads it.
        """
        explicit = [*self.pre_layers, *self.post_layers]
        for layer in explicit[:-1]:
            layer.compile(**options)
        if self.fixed_point is not None:
            self.fixed_point.compile(**options)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks run again in the backward pass: PEFT asks by this name, which transformers warns of."""
        return self.gradient_checkpointing

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        """As in `PreTrainedModel`, but weights that a checkpoint lacks are an error, not random.

        Raises:
            `ValueError`: names them.
        """
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        if not load_config.ignore_mismatched_sizes:
            advice = "Get the whole checkpoint. To start them anew on purpose, give `ignore_mismatched_sizes=True`."
            check_complete(load_config.pretrained_model_name_or_path, loading_info.missing_keys, advice)
        return loading_info

    def load_adapter(self, peft_model_id=None, *args, **kwargs):
        """As in transformers, of an adapter all of whose weights are found: else some would be random.

        Raises:
            `ValueError`: names what is missing; transformers does not find DoRA's magnitudes.
        """
        loaded = super().load_adapter(peft_model_id, *args, **kwargs)
        advice = "Get the whole adapter, or let PEFT load it: `PeftModel.from_pretrained(its_model, adapter)`."
        check_complete(peft_model_id, loaded.missing_keys, advice)
        return loaded

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save weights, configurations and the model's code, so that its Auto classes load it anywhere."""
        # The copier writes AutoConfig and one Auto class; AutoModel must be named here.
        module = type(self).__module__.rsplit(".", 1)[-1]
        self.config.auto_map = {"AutoModel": f"{module}.{type(self).__name__}"}
        super().save_pretrained(save_directory, **kwargs)


__all__ = ["DenoiserOptions", "MGMOutput", "MGMPreTrainedModel"]
