# SPDX-License-Identifier: Apache-2.0
"""Halton-MaskGIT checkpoints: the original `.pth` files, or their weights as `.safetensors`, read as data."""

import math
from pathlib import Path

import torch

from ..models.configuration_fpmaskgit import FPMaskGITConfig
from ..models.modeling_fpmaskgit import FPMaskGITModel
from .checkpoint import NO_MODEL, check_file, check_tensors, read_checkpoint, read_tensors, reading
from .state_dict import check_there, count_layers, filled, renamed, unwrapped


# Halton-MaskGIT's parameter names → ours; `transformer.layers.` is our `pre_layers.`: it is a pre-stack alone.
RENAMES = [
    (r"^tok_emb\.", "embed_tokens."),
    (r"^pos_emb\.", "position_embedding."),
    (r"^cls_emb\.", "class_embedding."),
    (r"^reg_tokens\.", "register_tokens."),
    (r"^last_norm\.norm_final\.", "final_norm."),
    (r"^last_norm\.mlp\.1\.", "final_modulation."),
    (r"^head\.", "lm_head."),
    (r"^transformer\.layers\.(\d+)\.mlp\.1\.", r"pre_layers.\1.modulation."),
    (r"^transformer\.layers\.(\d+)\.ln([12])\.", r"pre_layers.\1.norm\2."),
    (r"^transformer\.layers\.(\d+)\.attn\.wqkv\.", r"pre_layers.\1.attention.qkv_proj."),
    (r"^transformer\.layers\.(\d+)\.attn\.wo\.", r"pre_layers.\1.attention.o_proj."),
    (r"^transformer\.layers\.(\d+)\.ff\.w1\.", r"pre_layers.\1.gate_proj."),
    (r"^transformer\.layers\.(\d+)\.ff\.w2\.", r"pre_layers.\1.down_proj."),
    (r"^transformer\.layers\.(\d+)\.ff\.w3\.", r"pre_layers.\1.up_proj."),
]
LAYERS = "transformer.layers."
KIND = "a Halton-MaskGIT checkpoint"
HEADS = {384: 6, 512: 6, 768: 12, 1024: 16, 1152: 16}  # by width, of the published sizes: no weight tells them


def load_halton_maskgit(path: str | Path, config: dict | None = None) -> FPMaskGITModel:
    """Load a Halton-MaskGIT checkpoint as an explicit model (`num_fixed_point_layers=0`) with the original's logits.

    Args:
        path (`str` or `Path`): An original `.pth` file, or its `model_state_dict` as `.safetensors`.
        config (`dict`, *optional*): Arguments of the original's constructor, any of `input_size`, `hidden_dim`,
            `codebook_size`, `depth`, `heads`, `mlp_dim`, `nclass`, `register`, `proj`. The weights tell all but
            `heads`. `None`: the heads of the published size of that width.

    Returns:
        [`FPMaskGITModel`] in float32 and evaluation mode.

    Raises:
        `ValueError`: lists missing and unknown keys, wrong shapes, or weights that are not finite; also for a width
            whose heads are not known, and for arguments that the weights contradict.

    Example:

    ```python
    >>> from fpmgm import load_halton_maskgit
    >>> model = load_halton_maskgit("ImageNet_384_large.pth")  # doctest: +SKIP
    >>> codes = model.generate(class_labels=[207], budget=384, seed=0)  # doctest: +SKIP

    ```
    """
    path = Path(path)
    state = _read(path)
    found = _arguments_from_shapes(state, path)
    heads = _check_arguments(found, config or {}, path)
    with reading(path, KIND, NO_MODEL):
        ours = {renamed(name, RENAMES): tensor for name, tensor in _joined(state).items()}
    return filled(lambda: FPMaskGITModel(_our_config(state, found, heads)), ours, path, KIND)


def _read(path: Path) -> dict[str, torch.Tensor]:
    check_file(path)
    if path.suffix == ".safetensors":
        state = read_tensors(path)
    else:
        checkpoint = read_checkpoint(path, "save `{'model_state_dict': ...}` alone and load that")
        if not isinstance(checkpoint, dict) or "model_state_dict" not in checkpoint:
            raise ValueError(f"`{path}` is not {KIND}: it has no `model_state_dict`.")
        state = checkpoint["model_state_dict"]
    check_tensors(state, path)
    return unwrapped(state, path)


def _arguments_from_shapes(state: dict[str, torch.Tensor], path: Path) -> dict[str, int]:
    """The original constructor's arguments, but for the heads."""
    needed = ("tok_emb.weight", "pos_emb.weight", "cls_emb.weight", "transformer.layers.0.ff.w1.weight")
    check_there(state, needed, path, KIND)
    if any(state[name].dim() != 2 for name in needed):
        raise ValueError(f"`{path}` is not {KIND}: {needed} must be matrices.")
    ids, hidden_dim = state["tok_emb.weight"].shape
    return {
        "input_size": math.isqrt(len(state["pos_emb.weight"])),
        "hidden_dim": hidden_dim,
        "codebook_size": ids - 1,
        "depth": count_layers(state, LAYERS, path),
        "nclass": len(state["cls_emb.weight"]) - 1,
        "register": len(state["reg_tokens.weight"]) if "reg_tokens.weight" in state else 0,
        "proj": 1,
    }


def _check_arguments(found: dict[str, int], given: dict[str, int], path: Path) -> int:
    """The heads, where the arguments `given` do not contradict those `found` in the weights."""
    unknown = sorted(set(given) - {*found, "heads", "mlp_dim"})
    if unknown:
        raise ValueError(f"`config` has {unknown}, but the original's arguments are {[*found, 'heads', 'mlp_dim']}.")
    wrong = {name: (given[name], found[name]) for name in given if name in found and given[name] != found[name]}
    if wrong:
        raise ValueError(f"`config` and the weights disagree (given, found): {wrong}. Leave these arguments out.")
    heads = given.get("heads", HEADS.get(found["hidden_dim"]))
    if heads is None:
        raise ValueError(
            f"`config`['heads'] is needed for `path`={str(path)!r}: the weights do not tell it, and width "
            f"{found['hidden_dim']} is none of the published {tuple(HEADS)}."
        )
    return heads


def _our_config(state: dict[str, torch.Tensor], found: dict[str, int], heads: int) -> FPMaskGITConfig:
    return FPMaskGITConfig(
        codebook_size=found["codebook_size"],
        num_classes=found["nclass"],
        grid_size=found["input_size"],
        hidden_size=found["hidden_dim"],
        num_attention_heads=heads,
        intermediate_size=len(state["transformer.layers.0.ff.w1.weight"]),
        num_register_tokens=found["register"],
        num_pre_layers=found["depth"],
        num_fixed_point_layers=0,
        num_post_layers=0,
        tie_word_embeddings="head.weight" not in state or torch.equal(state["head.weight"], state["tok_emb.weight"]),
    )


def _joined(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Query, key and value of a layer in one matrix; the tied head and absent registers written out."""
    joined = dict(state)
    for name in state:
        if name.endswith(".attn.wq.weight"):
            names = [name.replace(".wq.", f".{part}.") for part in ("wq", "wk", "wv")]
            if all(part in state for part in names):
                joined[name.replace(".wq.", ".wqkv.")] = torch.cat([joined.pop(part) for part in names])
    joined.setdefault("head.weight", state["tok_emb.weight"])
    joined.setdefault("reg_tokens.weight", state["tok_emb.weight"][:0])
    return joined
