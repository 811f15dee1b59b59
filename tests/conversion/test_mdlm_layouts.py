# SPDX-License-Identifier: Apache-2.0
"""MDLM's network in all the files it comes in: descendants, wrappers, shards, tokenizers beside it, broken files."""

import fnmatch
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fpmgm import convert_to_fixed_point, load_mdlm
from fpmgm.conversion import mdlm, sources

from ..testing_utils import SHARED, needs_shared, refused, word_tokenizer
from .test_mdlm import assert_equal_logits, explicit_model, original_config, original_state, write_folder


# --- descendants -----------------------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    ("folder", "file", "options", "logits"),
    [
        ("sdtt_tiny", "", {}, "logits"),
        ("sdtt_teacher_tiny", "", {}, "logits"),
        ("duo_mdlm_tiny", "mdlm.ckpt", {}, "logits"),
        ("duo_mdlm_tiny", "mdlm.ckpt", {"use_ema": False}, "logits_not_ema"),
        ("duo_mdlm_tiny", "mdlm.ckpt", {"time_conditioning": True}, "logits_ema_with_sigma"),
        ("didi_instruct_tiny", "", {}, "logits"),
        ("didi_instruct_tiny", "model.safetensors", {"time_conditioning": True}, "logits_with_sigma"),
    ],
)
@torch.no_grad()
def test_descendants_give_their_originals_logits(folder, file, options, logits):
    folder = SHARED / "parity" / folder
    expected = load_file(folder / "expected.safetensors")
    model = load_mdlm(folder / file, **options)
    t = (1 - torch.exp(-expected["sigma"])) / (1 - 1e-3)  # σ = −log(1 − (1 − 10⁻³) t)
    found = model(expected["input_ids"], timesteps=t).logits
    torch.testing.assert_close(found, expected[logits], rtol=0, atol=1e-4)
    assert model.config.mask_token_id == expected[logits].shape[-1] - 1


def hydra_config(model) -> dict:
    """What SDTT's repository stores: no `model_type`, no vocabulary, sizes under `model`."""
    sizes = {"hidden_size": 16, "cond_dim": 8, "length": 8, "n_blocks": 2, "n_heads": 2, "dropout": 0.2}
    return {
        "model": {**sizes, "type": "ddit-orig"},
        "data_preprocess": {"seq_len": "${model.length}"},
        "parameterization": {"name": "multi-round-sdtt"},
        "time_conditioning": model.config.time_conditioning,
    }


@pytest.mark.parametrize("prefix", ["backbone.", "backbone.backbone."])
def test_sdtts_folder_tells_its_sizes_under_model(tmp_path, prefix):
    model = explicit_model(time_conditioning=True)
    (tmp_path / "config.json").write_text(json.dumps(hydra_config(model)))
    save_file(original_state(model, prefix), tmp_path / "model.safetensors")
    loaded = load_mdlm(tmp_path)
    assert_equal_logits(loaded, model, timesteps=torch.tensor([0.3, 0.9]))
    assert (loaded.config.max_position_embeddings, loaded.config.dropout) == (8, 0.2)


def test_a_folder_of_weights_alone_is_read(tmp_path):
    model = explicit_model()
    save_file(original_state(model, prefix=""), tmp_path / "model.safetensors")
    loaded = load_mdlm(tmp_path)
    assert_equal_logits(loaded, model)
    assert (loaded.config.max_position_embeddings, loaded.config.time_conditioning) == (1024, False)
    state = original_state(model, prefix="")
    del state["rotary_emb.inv_freq"]
    save_file(state, tmp_path / "model.safetensors")
    refused(r"does not tell the number of attention heads.*`config\.json` with `n_heads`", load_mdlm, tmp_path)
    (tmp_path / "config.json").write_text('{"n_heads": 2}')
    assert_equal_logits(load_mdlm(tmp_path), model)


def test_idlms_folder_is_mdlms_with_heads_of_64(tmp_path):
    model = explicit_model(hidden_size=128, num_attention_heads=2)
    write_folder(tmp_path, model)
    state = load_file(tmp_path / "model.safetensors")
    state["backbone.rotary_emb.inv_freq"] = 10000.0 ** -(torch.arange(0, 64, 2) / 64)  # 32 entries
    save_file(state, tmp_path / "model.safetensors")
    assert_equal_logits(load_mdlm(tmp_path), model)


def test_the_base_of_the_rotary_embedding_is_that_of_the_frequencies_stored(tmp_path):
    model = explicit_model(rope_theta=500.0)
    state = original_state(model)
    state["backbone.rotary_emb.inv_freq"] = 500.0 ** -(torch.arange(0, 8, 2) / 8)
    save_file(state, tmp_path / "model.safetensors")
    assert_equal_logits(load_mdlm(tmp_path), model)
    save_file({name: x.bfloat16() for name, x in original_state(model).items()}, tmp_path / "model.safetensors")
    assert load_mdlm(tmp_path).config.rope_theta == 10000  # rounded frequencies are those of the usual base
    state["backbone.rotary_emb.inv_freq"][2] = 7.0
    save_file(state, tmp_path / "model.safetensors")
    refused("holds no frequencies", load_mdlm, tmp_path)


def test_a_distilled_teacher_becomes_a_fixed_point_student(tmp_path):
    model = explicit_model()
    (tmp_path / "config.json").write_text(json.dumps(hydra_config(model)))
    save_file(original_state(model), tmp_path / "model.safetensors")
    student = convert_to_fixed_point(load_mdlm(tmp_path), {"pre": [1], "fixed_point": [2], "post": [2]})
    layer = student.fixed_point.layers[0].attention.qkv_proj.weight
    assert torch.equal(layer, model.pre_layers[1].attention.qkv_proj.weight)
    assert student.generate(length=8, budget=9, seed=0).max() < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_blocks": 3}, r"disagree \(configuration, weights\): \{'num_pre_layers': \(3, 2\)\}"),
        ({"vocab_size": 12}, r"'vocab_size': \(12, 11\)"),
        ({"model_type": "bd3lm"}, "`model_type`='bd3lm', not 'mdlm'"),
        ({"algo": {"parameterization": "mean"}}, "`parameterization`='mean', not 'subs': it is no masked diffusion"),
        ({"model_length": -1}, "`max_position_embeddings`=-1 must be a whole number"),
        ({"n_heads": 10**30}, "disagree"),
    ],
)
def test_configurations_that_are_not_the_weights_are_refused(tmp_path, changes, message):
    write_folder(tmp_path, explicit_model(), **changes)
    assert str(tmp_path) in refused(message, load_mdlm, tmp_path)


# --- wrappers --------------------------------------------------------------------------------------------------------

PREFIXES = [
    "_orig_mod.",
    "_orig_mod.backbone.",
    "backbone._orig_mod.",
    "module.backbone.",
    "module._orig_mod.backbone.",
    "_forward_module.backbone.",
    "_forward_module._orig_mod.",
    "_fsdp_wrapped_module.backbone._fsdp_wrapped_module.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_compilation_and_engines_are_no_part_of_a_name(tmp_path, prefix):
    raw, average = explicit_model(0), explicit_model(1)
    assert_equal_logits(load_mdlm(write_folder(tmp_path, raw, prefix)), raw)
    shadow = [x for name, x in original_state(average).items() if not name.endswith("inv_freq")]
    checkpoint = {"state_dict": original_state(raw, prefix), "ema": {"shadow_params": shadow}}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    assert_equal_logits(load_mdlm(tmp_path / "last.ckpt"), average)
    assert_equal_logits(load_mdlm(tmp_path / "last.ckpt", use_ema=False), raw)


def test_wrappers_inside_a_name_and_weights_listed_twice(tmp_path):
    model = explicit_model()
    state = original_state(model)
    wrapped = {name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): x for name, x in state.items()}
    torch.save(wrapped, tmp_path / "weights.pt")
    assert_equal_logits(load_mdlm(tmp_path / "weights.pt"), model)
    torch.save({**wrapped, **state}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt` holds the weights of one model twice.*_checkpoint_wrapped"):
        load_mdlm(tmp_path / "weights.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.pth", "weights.safetensors"])
def test_a_state_dict_alone_is_read(tmp_path, name):
    model = explicit_model()
    save = save_file if name.endswith("safetensors") else torch.save
    save(original_state(model), tmp_path / name)
    assert_equal_logits(load_mdlm(tmp_path / name), model)


def test_checkpoints_of_other_trainings(tmp_path):
    raw, average = explicit_model(0), explicit_model(1)
    torch.save({"module": original_state(raw, "_forward_module.backbone.")}, tmp_path / "model_states.pt")  # DeepSpeed
    refused("holds no EMA: load it with `use_ema=False`", load_mdlm, tmp_path / "model_states.pt")
    assert_equal_logits(load_mdlm(tmp_path / "model_states.pt", use_ema=False), raw)
    both = {**original_state(average, "student_ema."), **original_state(raw), "discriminator.weight": torch.ones(1)}
    torch.save({"state_dict": both}, tmp_path / "didi.ckpt")
    assert_equal_logits(load_mdlm(tmp_path / "didi.ckpt"), average)
    assert_equal_logits(load_mdlm(tmp_path / "didi.ckpt", use_ema=False), raw)


class Node:
    """As omegaconf pickles its containers and values: an object with this state."""

    def __init__(self, **state):
        self.__dict__.update(state)


def omegaconf(value) -> Node:
    if isinstance(value, dict):
        return Node(_content={key: omegaconf(item) for key, item in value.items()}, _parent=None)
    return Node(_val=value, _parent=None)


def test_the_configuration_that_lightning_pickles_is_read_as_data(tmp_path):
    model = explicit_model(time_conditioning=True)
    state, shadow = original_state(model), list(original_state(model).values())
    algo = {"name": "mdlm", "parameterization": "subs", "time_conditioning": True}
    sizes = {"length": 8, "n_heads": 2, "dropout": 0.2}
    for process, message in (("subs", None), ("mean", "`parameterization`='mean'")):
        config = omegaconf({"model": sizes, "algo": {**algo, "parameterization": process}})
        torch.save({"state_dict": state, "hyper_parameters": {"config": config}}, tmp_path / "last.ckpt")
        if message is None:
            loaded = load_mdlm(tmp_path / "last.ckpt", use_ema=False)
            assert_equal_logits(loaded, model, timesteps=torch.tensor([0.3, 0.9]))
            assert (loaded.config.max_position_embeddings, loaded.config.dropout) == (8, 0.2)
        else:  # a uniform-state model: the same network
            refused(message, load_mdlm, tmp_path / "last.ckpt", use_ema=False)
    torch.save({"state_dict": state, "ema": {"shadow_params": shadow}}, tmp_path / "last.ckpt")
    refused(r"lists 31 tensors, expected 30.*only the first 5 have their shapes", load_mdlm, tmp_path / "last.ckpt")


# --- shards and broken files -----------------------------------------------------------------------------------------


def write_shards(folder: Path, model, kind: str) -> None:
    state, names = original_state(model), {}
    for i in range(2):
        name = f"{kind.split('.')[0]}-{i + 1:05d}-of-00002.{kind.split('.')[1]}"
        shard = {key: x for n, (key, x) in enumerate(state.items()) if n % 2 == i}
        (save_file if name.endswith("safetensors") else torch.save)(shard, folder / name)
        names |= dict.fromkeys(shard, name)
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text(json.dumps(original_config(model)))


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_read_and_a_missing_one_is_named(tmp_path, kind):
    model = explicit_model()
    write_shards(tmp_path, model, kind)
    assert_equal_logits(load_mdlm(tmp_path), model)
    shard = next(tmp_path.glob("*-00002-of-*"))
    shutil.copy(next(tmp_path.glob("*-00001-of-*")), shard)
    refused(rf"{shard.name}' holds weights that another shard holds too", load_mdlm, tmp_path)
    shard.unlink()
    refused(rf"lacks 1 of 2 shards that {kind}.index.json names, such as '{shard.name}'", load_mdlm, tmp_path)
    (tmp_path / f"{kind}.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.bin"}}))
    refused(r"index\.json' must name files of its folder", load_mdlm, tmp_path)


def test_a_folder_with_a_pickled_state_dict_is_read(tmp_path):
    model = explicit_model()
    write_folder(tmp_path, model)
    (tmp_path / "model.safetensors").unlink()
    torch.save(original_state(model), tmp_path / "pytorch_model.bin")
    assert_equal_logits(load_mdlm(tmp_path), model)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea\nsize 678676752\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: POINTER, "a Git LFS pointer in place of the file: run `git lfs pull`"),
        (lambda whole: b"", "it is empty: get it again"),
        (lambda whole: b"<!DOCTYPE html><html>404</html>", "it is a web page"),
        (lambda whole: whole[: len(whole) // 2], "damaged, cut off"),
        (lambda whole: whole[:7], "damaged, cut off"),
        (lambda whole: bytes(1000), "damaged, cut off"),
    ],
    ids=["pointer", "empty", "page", "half", "header", "zeros"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "last.ckpt", "config.json"])
def test_a_file_that_is_no_whole_file_is_named_with_what_it_is(tmp_path, name, content, message):
    model = explicit_model()
    path = write_folder(tmp_path, model) / name
    if path.suffix in (".bin", ".ckpt"):
        (tmp_path / "model.safetensors").unlink()
        torch.save({"state_dict": original_state(model)} if path.suffix == ".ckpt" else original_state(model), path)
    path.write_bytes(content(path.read_bytes()))
    assert repr(str(path)) in refused(message, load_mdlm, path if path.suffix == ".ckpt" else tmp_path)


# --- the mask's id ---------------------------------------------------------------------------------------------------


def save_tokenizer(folder: Path, mask: str | None) -> None:
    words = ["a", "b", "c", "[MASK]", "d", "[UNK]"]
    word_tokenizer(words, unk_token="[UNK]", mask_token=mask).save_pretrained(folder)


def test_the_mask_id_is_the_tokenizers_the_one_given_or_the_last(tmp_path):
    write_folder(tmp_path, explicit_model())
    assert load_mdlm(tmp_path).config.mask_token_id == 10
    save_tokenizer(tmp_path, None)
    assert load_mdlm(tmp_path).config.mask_token_id == 10
    save_tokenizer(tmp_path, "[MASK]")
    model = load_mdlm(tmp_path)
    assert model.config.mask_token_id == 3
    assert not (model.generate(length=8, batch_size=8, budget=16, seed=0) == 3).any()
    assert load_mdlm(tmp_path, mask_token_id=7).config.mask_token_id == 7
    for wrong in (11, -1, 2.0, True, "3"):
        with pytest.raises(ValueError, match=rf"`mask_token_id`={wrong!r}, which must be an id .* from 0 to 10"):
            load_mdlm(tmp_path, mask_token_id=wrong)


def test_a_tokenizer_that_does_not_fit_or_cannot_be_read_is_named(tmp_path):
    write_folder(tmp_path, explicit_model(vocab_size=3, mask_token_id=2))
    save_tokenizer(tmp_path, "[MASK]")
    refused(r"the tokenizer in '.*' has `mask_token_id`=3, which must be .* from 0 to 2", load_mdlm, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    refused(r"no tokenizer can be read from '.*give `mask_token_id` instead", load_mdlm, tmp_path)
    assert load_mdlm(tmp_path, mask_token_id=2).config.mask_token_id == 2


def test_a_last_id_that_need_not_be_the_mask_is_warned_about(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(mdlm.logger, "warning", warnings.append)
    write_folder(tmp_path, explicit_model(vocab_size=30522, mask_token_id=103))
    assert load_mdlm(tmp_path, mask_token_id=103).config.mask_token_id == 103
    assert not warnings
    assert load_mdlm(tmp_path).config.mask_token_id == 30521
    assert "whose [MASK] is 103: give `mask_token_id`" in warnings[0]
    for vocab_size in (8, 7):  # a vocabulary padded to a round number, and one of the tokenizer's six words and a mask
        write_folder(tmp_path, explicit_model(vocab_size=vocab_size, mask_token_id=6))
        save_tokenizer(tmp_path, None)
        load_mdlm(tmp_path)
    assert len(warnings) == 2 and "has 6 of 8 ids, not all but that one: give `mask_token_id`" in warnings[1]


# --- paths and repositories ------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(sources, "snapshot_download", refuse)


@pytest.mark.parametrize("name", ["./gone", "/gone/model", "runs/a/model", "gone/last.ckpt", "a\\b", Path("gone")])
def test_a_path_that_does_not_exist_is_said_without_asking_the_hub(no_network, name):
    refused(r"`path_or_repo`='.*' does not exist: correct the path", load_mdlm, name)


def test_a_repositorys_branch_is_its_revision(tmp_path, monkeypatch):
    model, asked = explicit_model(), []
    branch = tmp_path / "branch"
    branch.mkdir()
    write_folder(branch, model)
    (tmp_path / "main").mkdir()

    def download(name, allow_patterns, revision, **options):
        asked.append((name, revision))
        folder = tmp_path / (revision or "main")
        wanted = [f.name for f in folder.iterdir() if any(fnmatch.fnmatch(f.name, p) for p in allow_patterns)]
        assert sorted(wanted) == sorted(f.name for f in folder.iterdir())
        return str(folder)

    monkeypatch.setattr(sources, "snapshot_download", download)
    assert_equal_logits(load_mdlm("jdeschena/sdtt", revision="branch"), model)
    assert asked == [("jdeschena/sdtt", "branch")]
    refused(r"holds no weights .*give the branch as `revision`", load_mdlm, "jdeschena/sdtt")
    refused("`revision`='branch' is of hub repositories", load_mdlm, branch, revision="branch")


def test_what_the_hub_does_not_give_is_said_with_the_name():
    refused("`path_or_repo`='nobody/nothing' is no path here, and the hub does not give", load_mdlm, "nobody/nothing")
