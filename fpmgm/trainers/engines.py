# SPDX-License-Identifier: Apache-2.0
"""What a trainer asks of the engine that runs it: DDP, DeepSpeed's ZeRO, FSDP, compilation."""

from accelerate.utils import DynamoBackend
from transformers import Trainer


def splits_weights(trainer: Trainer) -> bool:
    """Whether each rank holds a part of the weights only."""
    return trainer.is_fsdp_enabled or (
        trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    )


def describe_engine(trainer: Trainer) -> str:
    """What shares the training among processes, where it decides the form of checkpoints."""
    if trainer.is_deepspeed_enabled:
        return f"DeepSpeed ZeRO-{trainer.accelerator.state.deepspeed_plugin.zero_stage}"
    return "FSDP" if trainer.is_fsdp_enabled else "none"


def skips_bad_steps(trainer: Trainer) -> bool:
    """Whether the loss is scaled for float16, which skips a step that overflows and goes on by itself."""
    if trainer.is_deepspeed_enabled:
        return trainer.deepspeed.fp16_enabled()
    return trainer.accelerator.scaler is not None


def check_engine(trainer: Trainer) -> None:
    """Raise a `ValueError` where the engine's settings leave no way to export the weights, or to average them."""
    if not splits_weights(trainer):
        return
    state = trainer.accelerator.state
    if trainer.is_fsdp_enabled:
        if state.fsdp_plugin.fsdp_version != 2:
            raise ValueError(f"`fsdp_version`={state.fsdp_plugin.fsdp_version} must be 2: FSDP1 hides the parameters.")
        if "FULL_STATE_DICT" not in str(state.fsdp_plugin.state_dict_type):
            raise ValueError(
                f"`fsdp_state_dict_type`={state.fsdp_plugin.state_dict_type.name} would export nothing: use "
                "FULL_STATE_DICT."
            )
    elif not state.deepspeed_plugin.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save", False):
        raise ValueError(
            "`zero3_save_16bit_model`=False (in DeepSpeed: `stage3_gather_16bit_weights_on_model_save`) would export "
            "nothing under ZeRO-3: set it to true."
        )


def compile_blocks(trainer: Trainer) -> None:
    """Compile the model block by block where compilation is asked for, by `torch_compile` or by accelerate: the
    solver's loop, whose length changes from step to step, stays in Python."""
    plugin = trainer.accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO:
        trainer.model.compile_blocks(**plugin.to_kwargs())
        plugin.backend = DynamoBackend.NO  # or the whole model would be compiled once more
