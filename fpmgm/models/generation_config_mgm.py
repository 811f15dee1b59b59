# SPDX-License-Identifier: Apache-2.0
"""Every default of `generate`, saved as `generation_config.json` beside the weights."""

import copy
from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig

from .arguments import Allowed, check_names, checked, either, flag, list_of, number, one_of, optional, shown, whole
from .budget import ALLOCATIONS, MOST_BLOCK_EVALUATIONS, MOST_STEPS
from .fixed_point import SOLVERS
from .guidance import GUIDANCE_SCHEDULES
from .reuse import GAMMAS, REUSES


FINALS = ("sample", "argmax", "none")
FREEZING = ("refresh_every", "freeze_tolerance")  # details of `freeze`
TUNABLE = ("num_steps", "allocation", "reuse", *GAMMAS, "tolerance", "solver", "freeze", *FREEZING)
RETIRED = ("carry_over", "skip_idle_steps")  # in files of earlier versions, where they are off
MOST_TUNED_PLANS = 1000
MISPLACED = {
    "max_length": "use `length`, or `max_new_tokens` behind a prompt",
    "max_new_tokens": "it is an argument of `generate`: give it in the call",
    "num_beams": "sequences are not written from left to right: there is nothing to beam",
    "do_sample": "use `temperature=0` for the most likely tokens",
    "num_return_sequences": "use `batch_size` for texts from nothing, or repeat the rows of `input_ids`",
}

SHARE = number(0, 1)
TOKEN = whole(0, 2**31 - 1)
ITERATIONS = whole(0, MOST_BLOCK_EVALUATIONS, "iterations at a step")
EACH_STEP = list_of(ITERATIONS, 0, MOST_STEPS)
# Of each parameter the default, and what it may be.
PARAMETERS = {
    "budget": (96, optional(whole(1, MOST_BLOCK_EVALUATIONS, "block evaluations"), "leaves the cost to `iterations`")),
    "num_steps": (None, optional(whole(1, MOST_STEPS, "denoising steps"), "derives them from the budget")),
    "iterations": (None, optional(either(ITERATIONS, EACH_STEP), "plans them from the budget")),
    "iterations_per_step": (4, whole(1, MOST_BLOCK_EVALUATIONS, "iterations at a step")),
    "allocation": ("decreasing", either(one_of(ALLOCATIONS), EACH_STEP)),
    "reuse": ("3sr", one_of(REUSES)),
    "gamma_unchanged": (1.0, SHARE),
    "gamma_masked": ([0.75, 0.9], list_of(SHARE, 2, 2)),
    "gamma_changed": (0.2, SHARE),
    "gamma_remasked": (0.2, SHARE),
    "tolerance": (None, optional(number(0, float("inf"), words="be at least 0"), "takes every iteration")),
    "solver": ("picard", one_of(SOLVERS)),
    "freeze": (False, flag()),
    "refresh_every": (None, optional(whole(1, MOST_STEPS, "steps"), "computes all positions at the first step alone")),
    "freeze_tolerance": (None, optional(number(0, float("inf"), words="be at least 0"), "looks at no movement")),
    "tuned_plans": (
        {},
        Allowed(
            f"be a dict of at most {MOST_TUNED_PLANS:,} plans",
            lambda value: isinstance(value, dict) and len(value) <= MOST_TUNED_PLANS,
        ),
    ),
    "temperature": (1.0, number(0, float("inf"), words="be a number >= 0 (0: most likely token)")),
    "top_k": (None, optional(whole(1, unit="tokens"), "keeps all tokens")),
    "top_p": (None, optional(number(0, 1, "(]"), "keeps all tokens")),
    "order": (None, optional(Allowed("be a word", lambda value: isinstance(value, str)), "is the model's own")),
    "entropy_bound": (0.1, number(0, float("inf"), words="be a number of nats >= 0")),
    "confidence_threshold": (0.9, SHARE),
    "margin_threshold": (0.8, SHARE),
    "guidance_scale": (1.0, number(0, float("inf"), words="be a number >= 0 (1: no guidance)")),
    "guidance_schedule": ("constant", one_of(GUIDANCE_SCHEDULES)),
    "remask": (None, optional(number(0, 1, "(]"), "keeps what is revealed")),
    "final": ("sample", one_of(FINALS)),
    "block_length": (None, optional(whole(1, 2**31 - 1, "tokens"), "makes no blocks")),
    "stop_at_eos": (False, flag()),
    "bos_token_id": (None, optional(TOKEN, "is not set")),
    "eos_token_id": (None, optional(either(TOKEN, list_of(TOKEN, 1, 64)), "is not set")),
    "pad_token_id": (None, optional(TOKEN, "is not set")),
    "progress_bar": (False, flag()),
    "return_dict_in_generate": (False, flag()),
}
DEFAULTS = {name: default for name, (default, _) in PARAMETERS.items()}
ALLOWED = {name: allowed for name, (_, allowed) in PARAMETERS.items()}
# What nothing reads unless something else is set: what that is, and whether a configuration has it.
READ_WITH = {
    **dict.fromkeys(GAMMAS, ("`reuse`='3sr'", lambda config: config.reuse == "3sr")),
    **dict.fromkeys(("top_k", "top_p"), ("a `temperature` above 0", lambda config: config.temperature > 0)),
    "guidance_schedule": ("a `guidance_scale` other than 1", lambda config: config.guidance_scale != 1),
    "pad_token_id": ("`stop_at_eos`=True", lambda config: config.stop_at_eos),
}
OF_THE_LOADER = ("_commit_hash", "_from_model_config", "_original_object_hash")  # set by the hub's


class MGMGenerationConfig(GenerationConfig):
    """Parameters of [`MGMGenerationMixin.generate`].

    Args: Parameters that control the computation
        budget (`int`, *optional*, defaults to 96): Block evaluations per sequence; see [`plan_budget`].
        num_steps (`int`, *optional*): Denoising steps. `None`: chosen from the budget.
        iterations (`int` or `list[int]`, *optional*): Fixed-point iterations of every step or of each, instead of a
            budget. `None`: planned from the budget.
        iterations_per_step (`int`, defaults to 4): How many iterations the steps of a budget are chosen for, about,
            where `num_steps` is not given. A model without fixed-point layers has none to choose for.
        allocation (`str` or `list[int]`, defaults to `"decreasing"`): How a budget's iterations are shared over steps.
        reuse (`str`, defaults to `"3sr"`): Start of the solver from the previous step: `"none"`, `"full"`, `"3sr"`.
            A model without fixed-point layers solves nothing, so that all are the same to it.
        gamma_unchanged (`float`, defaults to 1.0): Share reused at visible tokens that did not change (3sr).
        gamma_masked (`list[float]`, defaults to [0.75, 0.9]): Share reused at masked positions, when nothing and when
            everything is visible (3sr).
        gamma_changed (`float`, defaults to 0.2): Share reused at tokens that the last step revealed (3sr).
        gamma_remasked (`float`, defaults to 0.2): Share reused at tokens that were masked again or rewritten (3sr).
        tolerance (`float`, *optional*): A sequence's solve stops when its relative residual is at most this. `None`:
            every planned iteration is taken.
        solver (`str`, defaults to `"picard"`): `"picard"` or `"anderson"`; an iteration of either costs the same.
        freeze (`bool`, defaults to `False`): Leave positions alone that are not masked, once they were computed with
            their token: they keep keys, values and solution, and cost nothing. A budget is charged for the positions
            that are computed, so that it buys more steps; where it buys neither a step nor an iteration, nothing but a
            prompt is frozen. An approximation: frozen positions do not see what changes elsewhere.
        refresh_every (`int`, *optional*): With `freeze`, compute all positions again every so many steps. 1: at every
            step, as without `freeze`. `None`: at the first step alone.
        freeze_tolerance (`float`, *optional*): With `freeze`, leave a position alone only when its solution moved by
            at most this share of its norm the last time it was computed. `None`: at once.
        tuned_plans (`dict[str, dict]`, defaults to `{}`): For a budget, as text, the values that were tuned for it, of
            the names above but `budget` and `iterations` (`recipes/tune_sampling.py` finds them). A call with that
            budget uses them all, unless it sets one of them itself: then it uses none.

    Args: Parameters that control the draw
        temperature (`float`, defaults to 1.0): Divides the logits; 0 takes the most likely token.
        top_k (`int`, *optional*): Draw among the k most likely tokens. `None`: all.
        top_p (`float`, *optional*): Draw among the most likely tokens that hold this probability. `None`: all.
        order (`str`, *optional*): Which positions are revealed when. Text: `"ancestral"`, images: `"random"`, both:
            `"halton"` (a Halton sequence spreads what a step reveals over the text or the image), `"confidence"`,
            where each step keeps the most probable of its draws, and three that decide from the predictions how many
            a step reveals: `"entropy"`, `"threshold"`, `"margin"`. These end when all is revealed: the planned steps
            are the most that they take, and what is left at the last of them is drawn there. `None`: `"ancestral"`
            for text, `"halton"` for images.
        entropy_bound (`float`, defaults to 0.1): The entropy order reveals the most certain positions of which the
            entropies, but for the largest, add up to at most this, in nats (EB-Sampler; its γ, as recommended for
            DiffusionGemma), and at least an even share. 0: beside what is certain, that share alone.
        confidence_threshold (`float`, defaults to 0.9): The threshold order reveals the positions whose most likely
            token has at least this probability, and at least an even share (Fast-dLLM and its default).
        margin_threshold (`float`, defaults to 0.8): The margin order reveals the positions whose two most likely
            tokens differ by at least this, and at least an even share. What passes 0.9 in the threshold order
            passes 0.8 here.
        guidance_scale (`float`, defaults to 1.0): w of classifier-free guidance, at least 0: the logits are
            unconditional + w · (conditional − unconditional). 1: off, the denoiser runs once per step. Otherwise its
            batch is doubled, which the budget does not count.
        guidance_schedule (`str`, defaults to `"constant"`): `"constant"`, or `"linear"`, from 1 at the first step to
            `guidance_scale` at the last (where the steps are not known beforehand, with the share revealed).
        remask (`float`, *optional*): Mask a visible token again with at most this probability per step, in (0, 1]
            (ReMDM's capped schedule; ancestral order only). `None`: what is revealed stays.
        final (`str`, defaults to `"sample"`): What happens to positions that the last step would leave masked (in the
            ancestral and the adaptive orders): `"sample"` draws them at that step, `"argmax"` takes their most likely
            tokens, `"none"` leaves the mask id.

    Args: Parameters that control the output
        block_length (`int`, *optional*): Write text block by block, each of so many masked positions in their order:
            a block begins when the one before it is written. The steps, and the iterations of an allocation, are
            shared over the blocks by their sizes; rows with fewer masked positions than others have the iterations of
            the row with the most, which alone they might not have. `None`: no blocks.
        stop_at_eos (`bool`, defaults to `False`): End a text at the first `eos_token_id` that is written in it:
            nothing is written behind it any more, the sequence is finished when all before it is written, and what
            is behind it in the result is `pad_token_id`.
        progress_bar (`bool`, defaults to `False`): Whether to show the denoising steps.
        return_dict_in_generate (`bool`, defaults to `False`): Return [`MGMGenerationOutput`] instead of tokens.
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*): `eos_token_id` (or a list of them) is read for
            `stop_at_eos`, `pad_token_id` too (`None`: the first end of text). `None`: the model configuration's.

    Raises:
        `ValueError`: on an unknown name or a value that is not allowed.
    """

    def __init__(self, **kwargs):
        # Not super().__init__(): the fields of left-to-right generation have no meaning here.
        check_one_cost(kwargs.get("budget"), kwargs.get("iterations"))
        of_loader = {name: kwargs.pop(name, None) for name in OF_THE_LOADER}
        vars(self).update(**copy.deepcopy(DEFAULTS), **of_loader, transformers_version=None)
        kwargs = {name: value for name, value in kwargs.items() if name not in RETIRED or value}
        check_names(kwargs, self.names(), "generation argument(s)", MISPLACED)
        if kwargs.get("iterations") is not None:
            self.budget = None
        vars(self).update(kwargs)
        self.validate()

    def names(self) -> list[str]:
        """Names of the parameters."""
        return [name for name in vars(self) if not name.startswith("_")]

    def validate(self, **unused: Any) -> None:
        """Raise a `ValueError` that names the first value that is not allowed."""
        vars(self).update(checked(ALLOWED, vars(self)))
        check_one_cost(self.budget, self.iterations)
        for name in FREEZING:
            if not self.freeze and getattr(self, name) is not None:
                raise ValueError(f"`{name}`={getattr(self, name)} is about frozen positions: give `freeze=True` too.")
        self.tuned_plans = dict(_tuned_plan(budget, plan) for budget, plan in self.tuned_plans.items())

    def tuned(self, given: Iterable[str] = ()) -> tuple["MGMGenerationConfig", dict[str, Any] | None]:
        """A copy with the plan that was tuned for the budget, and that plan.

        The plan is a whole: where the caller has `given` one of its values, or `iterations_per_step`, of which its
        number of steps takes the place, it is left alone (the config itself and `None` are returned, as for a budget
        that nothing was tuned for).
        """
        plan = self.tuned_plans.get(str(self.budget))
        if plan is None or {*plan, "iterations_per_step"} & set(given):
            return self, None
        return self.updated(**plan), dict(plan)

    def updated(self, **kwargs: Any) -> "MGMGenerationConfig":
        """A copy with `kwargs` set; a budget given here replaces saved iterations, and the other way round;
        `freeze=False` takes its details with it."""
        check_one_cost(kwargs.get("budget"), kwargs.get("iterations"))
        values = {name: value for name, value in self.to_dict().items() if not name.startswith("_")}
        check_names(kwargs, values, "generation argument(s)", MISPLACED)
        if kwargs.get("budget") is not None:
            values["iterations"] = None
        if kwargs.get("iterations") is not None:
            values["budget"] = None
        if "freeze" in kwargs and not kwargs["freeze"]:
            values |= dict.fromkeys(FREEZING)
        return type(self)(**{**values, **kwargs})

    def to_diff_dict(self) -> dict[str, Any]:
        """All values: a reader of `generation_config.json` sees every default."""
        return self.to_dict()

    @classmethod
    def from_model_config(cls, model_config: Any) -> "MGMGenerationConfig":
        """The defaults: a model configuration holds no generation parameters."""
        return cls()


def _tuned_plan(budget: str | int, plan: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A budget, as text, and its plan, as the code wants it."""
    budget = str(budget)
    if not budget.isdecimal() or len(budget) > 9 or int(budget) < 1 or not isinstance(plan, dict):
        raise ValueError(f"`tuned_plans` has {budget!r}: {shown(plan)}, but must map budgets, such as '96', to dicts.")
    unknown = sorted(map(str, set(plan) - set(TUNABLE)))
    if unknown:
        raise ValueError(f"`tuned_plans`[{budget!r}] sets {unknown}, but may set {TUNABLE} only.")
    try:
        plan = checked(ALLOWED, plan)
    except ValueError as error:
        raise ValueError(f"`tuned_plans`[{budget!r}]: {error}") from error
    return budget, plan


def check_one_cost(budget: int | None, iterations: int | list[int] | None) -> None:
    """Raise a `ValueError` if both a budget and iterations are given."""
    if budget is not None and iterations is not None:
        raise ValueError(
            f"`budget`={shown(budget)} and `iterations`={shown(iterations)} exclude each other: give a budget, or "
            "`num_steps` with `iterations`."
        )


def check_given(config: Any, given: dict[str, Any], model_config: Any) -> None:
    """Raise a `ValueError` for what a call has `given` and nothing would read, with all that `config` says."""
    if config.iterations is not None and "allocation" in given:
        raise ValueError(
            f"`allocation`={shown(given['allocation'])} shares a budget over the steps, but `iterations` are set: "
            "leave it out, or give a budget."
        )
    if "iterations_per_step" in given and (config.iterations is not None or config.num_steps is not None):
        raise ValueError(
            f"`iterations_per_step`={given['iterations_per_step']} chooses the number of steps, but "
            f"`{'num_steps' if config.iterations is None else 'iterations'}` is set: leave one of the two out."
        )
    if given.get("reuse", "none") != "none" and model_config.is_looped:
        raise ValueError(
            f"`reuse`={given['reuse']!r} starts from the last solution, but without an injection the model sees "
            "new tokens through the start alone: leave it out."
        )
    if config.freeze_tolerance is not None and model_config.num_fixed_point_layers == 0:
        raise ValueError(
            f"`freeze_tolerance`={config.freeze_tolerance} is about solutions, but the model has no fixed-point "
            "layers: leave it out."
        )
    for name, (needed, is_set) in READ_WITH.items():
        if given.get(name, DEFAULTS[name]) != DEFAULTS[name] and not is_set(config):
            raise ValueError(
                f"`{name}`={shown(given[name])} is read with {needed} only: give that too, or leave it out."
            )


__all__ = ["MGMGenerationConfig"]
