# SPDX-License-Identifier: Apache-2.0
"""What trainers ask of their engine, as far as one process shows it; `test_distributed.py` runs the engines."""

from types import SimpleNamespace

import pytest
import torch

from fpmgm.trainers.engines import check_engine, skips_bad_steps

from ..testing_utils import CHECKPOINTING, refused
from .training_utils import make_trainer, training_model, weights


def trainer_under(fsdp=None, deepspeed=None) -> SimpleNamespace:
    state = SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=deepspeed)
    return SimpleNamespace(
        is_fsdp_enabled=fsdp is not None,
        is_deepspeed_enabled=deepspeed is not None,
        accelerator=SimpleNamespace(state=state, scaler=None),
    )


def fsdp(version: int, state_dict_type: str) -> SimpleNamespace:
    return SimpleNamespace(fsdp_version=version, state_dict_type=torch.distributed.fsdp.StateDictType[state_dict_type])


def zero(stage: int, gathers: bool) -> SimpleNamespace:
    config = {"zero_optimization.stage3_gather_16bit_weights_on_model_save": gathers}
    return SimpleNamespace(zero_stage=stage, get_value=config.get)


@pytest.mark.parametrize(
    "engine, named",
    [
        ({"fsdp": fsdp(1, "FULL_STATE_DICT")}, "`fsdp_version`=1 must be 2"),
        ({"fsdp": fsdp(2, "SHARDED_STATE_DICT")}, "`fsdp_state_dict_type`=SHARDED_STATE_DICT"),
        ({"deepspeed": zero(3, False)}, "`zero3_save_16bit_model`=False"),
    ],
)
def test_engines_that_could_not_export_are_refused(engine, named):
    refused(named, check_engine, trainer_under(**engine))


@pytest.mark.parametrize(
    "engine",
    [{}, {"fsdp": fsdp(2, "FULL_STATE_DICT")}, {"deepspeed": zero(3, True)}, {"deepspeed": zero(2, False)}],
)
def test_engines_that_can_export_are_not(engine):
    check_engine(trainer_under(**engine))


def test_float16_skips_bad_steps_whoever_scales_the_loss():
    trainer = trainer_under()
    assert not skips_bad_steps(trainer)
    trainer.accelerator.scaler = object()
    assert skips_bad_steps(trainer)
    for enabled in (False, True):
        trainer = trainer_under(deepspeed=zero(2, False))
        trainer.deepspeed = SimpleNamespace(fp16_enabled=lambda enabled=enabled: enabled)
        assert skips_bad_steps(trainer) == enabled


@pytest.mark.parametrize("again", [{CHECKPOINTING: True}, {"num_kept_iterations": 1}])
def test_compiled_blocks_under_a_loop_of_any_length_train_alike(tmp_path, again):
    # `backend="eager"` captures the graphs without generating code; steps 1 to 3 take 6, 10 and 7 iterations.
    arguments = {"max_steps": 3, **again}
    plain, compiled = training_model().double(), training_model().double()  # Adam amplifies float32's rounding
    make_trainer(tmp_path, plain, **arguments).train()
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["frames"]["ok"]
    trainer = make_trainer(tmp_path, compiled, torch_compile_backend="eager", **arguments)
    trainer.train()
    assert torch._dynamo.utils.counters["frames"]["ok"] > before
    assert len({line["iterations"] for line in trainer.state.log_history if "loss" in line}) > 2
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(compiled.get_parameter(name), tensor, atol=1e-6, rtol=0, msg=name)
