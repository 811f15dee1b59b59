# SPDX-License-Identifier: Apache-2.0
"""Halton-MaskGIT checkpoints: logits of the original, of a reference written from its description, every bad file."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from fpmgm import convert_to_fixed_point, load_halton_maskgit
from tests.testing_utils import SHARED, needs_shared, refused


SIDE, CODES, CLASSES = 3, 6, 4


def original_state(width=16, heads=2, registers=1, depth=2, hidden=24) -> dict[str, torch.Tensor]:
    """Random weights under the original's names; the inner width of attention is heads × (width // heads)."""
    inner = heads * (width // heads)
    shapes = {
        "tok_emb.weight": (CODES + 1, width),
        "pos_emb.weight": (SIDE**2, width),
        "cls_emb.weight": (CLASSES + 1, width),
        "head.bias": (CODES + 1,),
        "last_norm.norm_final.weight": (width,),
        "last_norm.norm_final.bias": (width,),
        "last_norm.mlp.1.weight": (2 * width, width),
        "last_norm.mlp.1.bias": (2 * width,),
    }
    if registers:
        shapes["reg_tokens.weight"] = (registers, width)
    for i in range(depth):
        layer = f"transformer.layers.{i}."
        shapes |= {layer + f"attn.w{part}.weight": (inner, width) for part in "qkv"}
        shapes |= {layer + "attn.wo.weight": (width, inner), layer + "ff.w2.weight": (width, hidden)}
        shapes |= {layer + f"ff.w{part}.weight": (hidden, width) for part in (1, 3)}
        shapes |= {layer + f"ln{part}.weight": (width,) for part in (1, 2)}
        shapes |= {layer + "mlp.1.weight": (6 * width, width), layer + "mlp.1.bias": (6 * width,)}
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**state, "head.weight": state["tok_emb.weight"].clone()}


def norm(x, weight=1.0):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def original_logits(state, codes, classes, heads) -> torch.Tensor:
    """The original's forward pass from its description, on (B, L) codes; class `CLASSES` is the null class."""
    c = torch.nn.functional.silu(state["cls_emb.weight"][classes])
    h = state["tok_emb.weight"][codes] + state["pos_emb.weight"]
    if "reg_tokens.weight" in state:
        h = torch.cat([h, state["reg_tokens.weight"].expand(len(h), -1, -1)], dim=1)
    for i in range(sum(name.endswith("ln1.weight") for name in state)):
        w = {name.split(".", 3)[3]: x for name, x in state.items() if name.startswith(f"transformer.layers.{i}.")}
        a, b, gate, d, e, gate2 = (c @ w["mlp.1.weight"].T + w["mlp.1.bias"])[:, None].chunk(6, -1)
        x = norm(h, w["ln1.weight"]) * (1 + b) + a
        q, k, v = (x @ w[f"attn.w{part}.weight"].T for part in "qkv")
        q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (norm(q), norm(k), v))
        shares = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        h = h + gate * ((shares @ v).transpose(1, 2).flatten(2) @ w["attn.wo.weight"].T)
        x = norm(h, w["ln2.weight"]) * (1 + e) + d
        up = torch.nn.functional.silu(x @ w["ff.w1.weight"].T) * (x @ w["ff.w3.weight"].T)
        h = h + gate2 * (up @ w["ff.w2.weight"].T)
    a, b = (c @ state["last_norm.mlp.1.weight"].T + state["last_norm.mlp.1.bias"])[:, None].chunk(2, -1)
    h = norm(h[:, : codes.shape[1]], state["last_norm.norm_final.weight"]) + state["last_norm.norm_final.bias"]
    return (h * (1 + b) + a) @ state["head.weight"].T + state["head.bias"]


@needs_shared
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_logits_equal_the_originals(tmp_path, kind):
    folder = SHARED / "parity/maskgit_tiny"
    path, config = folder / "model_state_dict.safetensors", json.loads((folder / "config.json").read_text())
    if kind == "pth":
        state, path = load_file(path), tmp_path / "original.pth"
        torch.save({"model_state_dict": state, "iter": 7, "optimizer_state_dict": {"state": {}}}, path)
    model, expected = load_halton_maskgit(path, config), load_file(folder / "expected.safetensors")
    assert not model.training and model.config.num_fixed_point_layers == 0
    classes = torch.where(expected["drop_label"], config["nclass"], expected["class_labels"])
    with torch.no_grad():
        logits = model(expected["codes"].flatten(1), class_labels=classes).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)
    reference = original_logits(load_file(folder / "model_state_dict.safetensors"), expected["codes"].flatten(1),
                                classes, config["heads"])  # fmt: skip
    torch.testing.assert_close(reference, expected["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "heads", "registers", "tied"), [(16, 2, 1, True), (16, 3, 0, False), (512, 6, 2, True)], ids=str
)
def test_logits_equal_the_description_and_survive_saving(tmp_path, width, heads, registers, tied):
    state = original_state(width, heads, registers)
    if not tied:
        state["head.weight"] = state["head.weight"] + 0.1
    save_file(state, tmp_path / "weights.safetensors")
    config = None if width == 512 else {"heads": heads}  # Small: 6 heads of size 85
    model = load_halton_maskgit(tmp_path / "weights.safetensors", config)
    assert (model.lm_head.weight is model.embed_tokens.weight) == model.config.tie_word_embeddings == tied
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    codes, classes = torch.randint(CODES + 1, (5, SIDE**2)), torch.arange(5)
    expected = original_logits({k: x.double() for k, x in state.items()}, codes, classes, heads)
    torch.testing.assert_close(model.double()(codes, class_labels=classes).logits, expected, rtol=0, atol=1e-8)
    model.float().save_pretrained(tmp_path / "ours")
    again = AutoModel.from_pretrained(tmp_path / "ours").double()
    torch.testing.assert_close(again(codes, class_labels=classes).logits, expected, rtol=0, atol=1e-8)


def test_the_arguments_are_read_from_the_weights(tmp_path):
    save_file(original_state(width=12, heads=4, registers=2, depth=3, hidden=20), tmp_path / "w.safetensors")
    given = {"input_size": 3, "hidden_dim": 12, "codebook_size": 6, "depth": 3, "nclass": 4, "register": 2, "proj": 1}
    config = load_halton_maskgit(tmp_path / "w.safetensors", {"heads": 4, "mlp_dim": 30, **given}).config
    assert (config.grid_size, config.num_pre_layers, config.intermediate_size) == (3, 3, 20)
    assert (config.num_classes, config.num_register_tokens, config.num_attention_heads) == (4, 2, 4)


def test_a_loaded_model_converts_to_a_fixed_point(tmp_path):
    save_file(original_state(depth=4), tmp_path / "w.safetensors")
    teacher = load_halton_maskgit(tmp_path / "w.safetensors", {"heads": 2})
    student = convert_to_fixed_point(teacher, {"pre": [1], "fixed_point": [3], "post": [4]})
    layers, codes = teacher.pre_layers, torch.randint(CODES + 1, (2, SIDE**2))
    with torch.no_grad():
        once = student(codes, num_iterations=1).logits
        teacher.pre_layers, teacher.config.num_pre_layers = torch.nn.ModuleList([layers[0], *layers[2:]]), 3
        # F once, injected as z = h
        torch.testing.assert_close(once, teacher(codes).logits, rtol=0, atol=1e-3)
    assert student.generate(class_labels=[0, 1], budget=12).lt(CODES).all()


def test_every_key_that_does_not_fit_is_listed(tmp_path):
    state = original_state()
    del state["transformer.layers.1.ln2.weight"], state["transformer.layers.0.attn.wk.weight"]
    state["in_proj.weight"] = torch.zeros(2)
    state["head.bias"] = torch.zeros(3)
    state["last_norm.norm_final.bias"][0] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    message = refused("do not fit", load_halton_maskgit, tmp_path / "w.safetensors", {"heads": 2})
    for problem in (
        "missing: pre_layers.1.norm2.weight (16,)",
        "missing: pre_layers.0.attention.qkv_proj.weight",
        "unknown: transformer.layers.0.attn.wq.weight",
        "unknown: in_proj.weight (2,)",
        "wrong shape: lm_head.bias is (3,), expected (7,)",
        "not finite: final_norm.bias",
    ):
        assert problem in message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"`config`\['heads'\] is needed.*width 16"),
        ({"heads": 2, "nclass": 5}, r"disagree.*'nclass': \(5, 4\)"),
        ({"heads": 2, "proj": 2}, r"disagree.*'proj': \(2, 1\)"),
        ({"heads": 2, "layers": 2}, r"`config` has \['layers'\]"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(tmp_path, config, message):
    save_file(original_state(), tmp_path / "w.safetensors")
    refused(message, load_halton_maskgit, tmp_path / "w.safetensors", config)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_forward_module._orig_mod."])
def test_prefixes_of_compilation_and_engines_are_no_part_of_a_name(tmp_path, prefix):
    state, wrapped = original_state(), {prefix + name: x for name, x in original_state().items()}
    torch.save({"model_state_dict": wrapped}, tmp_path / "w.pth")
    model = load_halton_maskgit(str(tmp_path / "w.pth"), {"heads": 2})
    assert torch.equal(model.class_embedding.weight, state["cls_emb.weight"])


def test_files_of_other_kinds_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, message in (
        ("absent.pth", r"absent\.pth' does not exist: it must be an existing file"),
        ("other.pth", "no `model_state_dict`"),
        ("other.safetensors", "it has no .*tok_emb.weight"),
    ):
        refused(message, load_halton_maskgit, tmp_path / name)
