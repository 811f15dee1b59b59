# SPDX-License-Identifier: Apache-2.0
"""MDLM checkpoints: the original's logits, both layouts, and nothing of a checkpoint's code executed."""

import contextlib
import json
import os
import pickle
import re
import shutil
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fpmgm import FPMDLMForMaskedDiffusion, load_mdlm

from ..testing_utils import SHARED, needs_shared, refused, tiny_model


EXPLICIT = {"num_pre_layers": 2, "num_fixed_point_layers": 0, "num_post_layers": 0}
# Our names → MDLM's, in MDLM's own order of modules.
MODULES = [
    ("embed_tokens.weight", "vocab_embed.embedding"),
    ("time_embedding.mlp.", "sigma_map.mlp."),
    *[
        pair
        for i in range(12)
        for pair in [
            (f"pre_layers.{i}.norm1.", f"blocks.{i}.norm1."),
            (f"pre_layers.{i}.attention.qkv_proj.", f"blocks.{i}.attn_qkv."),
            (f"pre_layers.{i}.attention.o_proj.", f"blocks.{i}.attn_out."),
            (f"pre_layers.{i}.norm2.", f"blocks.{i}.norm2."),
            (f"pre_layers.{i}.up_proj.", f"blocks.{i}.mlp.0."),
            (f"pre_layers.{i}.down_proj.", f"blocks.{i}.mlp.2."),
            (f"pre_layers.{i}.modulation.", f"blocks.{i}.adaLN_modulation."),
        ]
    ],
    ("final_norm.", "output_layer.norm_final."),
    ("lm_head.", "output_layer.linear."),
    ("final_modulation.", "output_layer.adaLN_modulation."),
]


def original_state(model: FPMDLMForMaskedDiffusion, prefix: str = "backbone.") -> dict[str, torch.Tensor]:
    """The weights under MDLM's names, with the buffer of rotary frequencies that MDLM saves."""
    ours, state = model.state_dict(), {}
    for mine, theirs in MODULES:
        for name in [name for name in ours if name.startswith(mine)]:
            state[prefix + theirs + name.removeprefix(mine)] = ours.pop(name).clone()
        if mine == "time_embedding.mlp.":
            state[f"{prefix}rotary_emb.inv_freq"] = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    assert not ours
    return state


def original_config(model: FPMDLMForMaskedDiffusion) -> dict:
    config = model.config
    return {
        "model_type": "mdlm",
        "vocab_size": config.vocab_size,
        "model_length": config.max_position_embeddings,
        "hidden_dim": config.hidden_size,
        "cond_dim": config.conditioning_size,
        "n_blocks": config.num_pre_layers,
        "n_heads": config.num_attention_heads,
        "dropout": 0.2,
        "time_conditioning": config.time_conditioning,
    }


def explicit_model(seed: int = 0, **overrides) -> FPMDLMForMaskedDiffusion:
    return tiny_model(seed, **{**EXPLICIT, "intermediate_size": 64, **overrides})  # MDLM's MLP is 4 × the width


def write_folder(folder: Path, model: FPMDLMForMaskedDiffusion, prefix: str = "backbone.", **changes) -> Path:
    (folder / "config.json").write_text(json.dumps({**original_config(model), **changes}))
    save_file(original_state(model, prefix), folder / "model.safetensors")
    return folder


@torch.no_grad()
def assert_equal_logits(loaded, model, **inputs) -> None:
    ids = torch.arange(16).view(2, 8) % 11
    torch.testing.assert_close(loaded(ids, **inputs).logits, model(ids, **inputs).logits, rtol=0, atol=0)


# --- the hub's layout ------------------------------------------------------------------------------------------------


@needs_shared
@torch.no_grad()
def test_logits_are_those_of_the_original_implementation(tmp_path):
    folder = tmp_path / "mdlm"
    shutil.copytree(SHARED / "parity/mdlm_tiny", folder)
    expected = load_file(folder / "expected.safetensors")
    model = load_mdlm(folder)
    assert (model.config.num_pre_layers, model.config.num_fixed_point_layers) == (4, 0)
    assert model.config.mask_token_id == 100
    logits = model(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_a_folder_loads_with_and_without_the_prefix(tmp_path, prefix):
    model = explicit_model()
    loaded = load_mdlm(str(write_folder(tmp_path, model, prefix)))
    assert_equal_logits(loaded, model)
    assert not loaded.training
    assert all(p.requires_grad and p.dtype == torch.float32 and not p.is_meta for p in loaded.parameters())
    assert (loaded.config.max_position_embeddings, loaded.config.dropout) == (8, 0.2)
    assert loaded.generate(length=8, budget=8, seed=0).max() < 10
    loaded.save_pretrained(tmp_path / "ours")
    assert_equal_logits(FPMDLMForMaskedDiffusion.from_pretrained(tmp_path / "ours"), model)


def test_the_time_is_conditioned_on_where_the_checkpoint_says_so(tmp_path):
    model = explicit_model(time_conditioning=True)
    write_folder(tmp_path, model)
    t = torch.tensor([0.3, 0.9])
    assert_equal_logits(load_mdlm(tmp_path), model, timesteps=t)
    without = load_mdlm(tmp_path, time_conditioning=False)
    model.config.time_conditioning = False
    assert_equal_logits(without, model)


def test_every_key_and_shape_that_does_not_fit_is_listed(tmp_path):
    write_folder(tmp_path, explicit_model())
    state = load_file(tmp_path / "model.safetensors")
    del state["backbone.blocks.1.attn_out.weight"], state["backbone.output_layer.linear.bias"]
    state["backbone.blocks.0.mlp.0.bias"] = torch.zeros(63)
    state["backbone.blocks.0.norm1.weight"] = torch.zeros(15)
    state["backbone.something.else"] = torch.zeros(1)
    state["backbone.blocks.0.norm2.weight"][3] = float("nan")
    save_file(state, tmp_path / "model.safetensors")
    message = refused("do not fit", load_mdlm, tmp_path)
    for problem, names in {
        "missing": ["pre_layers.1.attention.o_proj.weight", "lm_head.bias"],
        "wrong shape": ["pre_layers.0.up_proj.bias", "pre_layers.0.norm1.weight"],
        "unknown": ["something.else"],
        "not finite": ["pre_layers.0.norm2.weight"],
    }.items():
        found = re.findall(rf"^  {problem}: (\S+)", message, flags=re.MULTILINE)
        assert sorted(found) == sorted(names)
    assert "(63,)" in message
    assert "(64,)" in message


# --- Lightning's layout ----------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Classes of a module that is gone at load time; their code, if it ran, would write the file `trace`."""
    module, trace = types.ModuleType("gone_project"), tmp_path / "trace"
    source = f"""
class Config:
    def __init__(self, **kwargs):
        open({str(trace)!r}, "w").close()
        self.__dict__.update(kwargs)

    def __getstate__(self):
        return dict(self.__dict__)

    def __setstate__(self, state):
        open({str(trace)!r}, "w").close()
        self.__dict__.update(state)


class Node:
    pass


class Options(dict):
    pass


def attack(path):
    open(path, "w").close()


class Reduced:
    def __reduce__(self):
        return attack, ({str(trace)!r},)
"""
    exec(compile(source, "gone_project.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "gone_project", module)
    yield module, trace


def write_checkpoint(path: Path, model, average=None, hyper_parameters=None, **changes) -> Path:
    state = original_state(model)
    checkpoint = {"state_dict": state, "epoch": 3, "global_step": 1000, "hyper_parameters": hyper_parameters or {}}
    if average is not None:
        shadow = [x for name, x in original_state(average).items() if not name.endswith("inv_freq")]
        checkpoint["ema"] = {"decay": 0.9999, "num_updates": 1000, "shadow_params": shadow}
    torch.save({**checkpoint, **changes}, path)
    return path


def test_a_lightning_checkpoint_gives_its_average_or_its_raw_weights(tmp_path):
    raw, average = explicit_model(0), explicit_model(1)
    path = write_checkpoint(tmp_path / "last.ckpt", raw, average)
    assert_equal_logits(load_mdlm(path, max_position_embeddings=8), average)
    assert_equal_logits(load_mdlm(path, use_ema=False), raw)
    assert load_mdlm(path).config.max_position_embeddings == 1024


def test_nothing_of_a_checkpoint_is_imported_or_run(tmp_path, foreign):
    module, trace = foreign
    node = module.Node()
    node.child, node.values = module.Node(), {"a": [1, (2, 3)], "path": tmp_path}
    hyper_parameters = {
        "config": module.Config(model="small", node=node),
        "tokenizer": module.Reduced(),
        "class": module.Config,
        "options": defaultdict(list, a=[1]),
    }
    average = explicit_model(1)
    path = write_checkpoint(tmp_path / "last.ckpt", explicit_model(0), average, hyper_parameters)
    trace.unlink()  # written when the object was made
    torch.load(path, weights_only=False)
    assert trace.exists()  # the file would betray code that runs
    trace.unlink()
    del sys.modules["gone_project"]
    assert_equal_logits(load_mdlm(path, max_position_embeddings=8), average)
    assert not trace.exists()
    assert "gone_project" not in sys.modules


def test_a_checkpoint_with_a_class_derived_from_dict_is_refused_with_advice(tmp_path, foreign):
    path = write_checkpoint(tmp_path / "last.ckpt", explicit_model(), explicit_model(), {"a": foreign[0].Options(a=1)})
    refused(r"last\.ckpt.*cannot be read as data.*Options.*save", load_mdlm, path)


def test_a_checkpoint_that_calls_the_system_runs_nothing(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'trace'}",)

    path = write_checkpoint(tmp_path / "last.ckpt", explicit_model(), explicit_model(), {"a": Attack()})
    with contextlib.suppress(ValueError, pickle.UnpicklingError):
        load_mdlm(path)
    assert not (tmp_path / "trace").exists()


def test_lightning_checkpoints_that_do_not_fit_are_refused(tmp_path):
    model, path = explicit_model(), tmp_path / "last.ckpt"
    write_checkpoint(path, model, ema={"decay": 0.9, "num_updates": 1, "shadow_params": [torch.zeros(2)]})
    refused(r"the EMA .* 1 tensors, expected 30.*`use_ema=False`", load_mdlm, path)
    torch.save({"weights": {}}, path)
    refused("`state_dict`", load_mdlm, path)
    write_checkpoint(path, model, state_dict={"encoder.weight": torch.zeros(2)})
    refused(r"last\.ckpt` is not an MDLM's: it has no .*it has encoder\.weight", load_mdlm, path)
    state = original_state(model)
    state["backbone.blocks.0.norm1.weight"][0] = float("nan")
    del state["backbone.blocks.1.norm2.weight"]
    write_checkpoint(path, model, state_dict=state)
    refused(r"(?s)missing: pre_layers\.1\.norm2.*not finite: pre_layers\.0\.norm1", load_mdlm, path, use_ema=False)
