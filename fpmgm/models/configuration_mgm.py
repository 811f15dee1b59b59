# SPDX-License-Identifier: Apache-2.0
"""Checks that the configurations of all models share."""

from transformers import PreTrainedConfig


INPUT_INJECTIONS = ("mlp", "linear", "diagonal")
INJECTION_INITS = ("contraction", "identity")


def check_whole_field(config: PreTrainedConfig, name: str, minimum: int) -> None:
    """Raise a `ValueError` unless the field is a whole number of at least `minimum`."""
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{name}`={value!r} must be a whole number of at least {minimum}.")


def check_share(config: PreTrainedConfig, name: str) -> None:
    """Raise a `ValueError` unless the field is a probability below 1."""
    if not 0 <= getattr(config, name) < 1:
        raise ValueError(f"`{name}`={getattr(config, name)} must lie in [0, 1): use 0 to switch it off.")


def check_stacks(config: PreTrainedConfig) -> None:
    """Raise a `ValueError` unless there is at least one block."""
    for name in ("num_pre_layers", "num_fixed_point_layers", "num_post_layers"):
        check_whole_field(config, name, minimum=0)
    if config.num_hidden_layers == 0:
        raise ValueError("`num_pre_layers`, `num_fixed_point_layers` and `num_post_layers` are all 0: give one block.")


def check_fixed_point(config: PreTrainedConfig) -> None:
    """Raise a `ValueError` for an injection that does not exist or ranges of iterations that are none."""
    check_whole_field(config, "num_fixed_point_iterations", minimum=1)
    if config.input_injection not in INPUT_INJECTIONS:
        raise ValueError(f"`input_injection`={config.input_injection!r} must be one of {INPUT_INJECTIONS}.")
    if config.injection_init not in INJECTION_INITS:
        raise ValueError(f"`injection_init`={config.injection_init!r} must be one of {INJECTION_INITS}.")
    if config.input_injection == "diagonal" and config.injection_init == "identity":
        raise ValueError(
            "`injection_init`='identity' cannot be had with `input_injection`='diagonal', whose share of the state "
            "stays below 1: use 'contraction'."
        )
    for name, minimum in (("no_grad_iterations", 0), ("grad_iterations", 1)):
        bounds = getattr(config, name)
        if len(bounds) != 2 or not all(isinstance(n, int) for n in bounds) or not minimum <= bounds[0] <= bounds[1]:
            raise ValueError(
                f"`{name}`={bounds} must be two whole numbers [low, high] with {minimum} <= low <= high: "
                "each training step draws its number of iterations from this range."
            )
