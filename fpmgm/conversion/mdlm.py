# SPDX-License-Identifier: Apache-2.0
"""MDLM checkpoints: the hub layout (`config.json`, `model.safetensors`) and Lightning `.ckpt` files with EMA.

The weights are read as data. No remote code runs, nothing but tensors is unpickled, and flash-attn is not needed.
"""

import json
import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from ..models.configuration_fpmdlm import FPMDLMConfig
from ..models.modeling_fpmdlm import FPMDLMForMaskedDiffusion
from .checkpoint import check_state, read_checkpoint


# MDLM's parameter names → ours; `blocks.` is our `pre_layers.`: an MDLM is a pre-stack alone.
RENAMES = [
    (r"^vocab_embed\.embedding$", "embed_tokens.weight"),
    (r"^sigma_map\.mlp\.", "time_embedding.mlp."),
    (r"^output_layer\.norm_final\.", "final_norm."),
    (r"^output_layer\.linear\.", "lm_head."),
    (r"^output_layer\.adaLN_modulation\.", "final_modulation."),
    (r"^blocks\.(\d+)\.adaLN_modulation\.", r"pre_layers.\1.modulation."),
    (r"^blocks\.(\d+)\.attn_qkv\.", r"pre_layers.\1.attention.qkv_proj."),
    (r"^blocks\.(\d+)\.attn_out\.", r"pre_layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.mlp\.0\.", r"pre_layers.\1.up_proj."),
    (r"^blocks\.(\d+)\.mlp\.2\.", r"pre_layers.\1.down_proj."),
    (r"^blocks\.(\d+)\.(norm[12])\.", r"pre_layers.\1.\2."),
]
FREQUENCIES = "rotary_emb.inv_freq"  # a buffer that we compute


def load_mdlm(
    path_or_repo: str | Path,
    *,
    use_ema: bool = True,
    max_position_embeddings: int | None = None,
    time_conditioning: bool | None = None,
    revision: str | None = None,
) -> FPMDLMForMaskedDiffusion:
    """Load an MDLM checkpoint as an explicit model (`num_fixed_point_layers=0`) with the original's logits.

    Args:
        path_or_repo (`str` or `Path`): A folder with `config.json` and `model.safetensors`, a hub repository such as
            `"kuleshov-group/mdlm-owt"`, or a Lightning `.ckpt` file.
        use_ema (`bool`, defaults to `True`): Take a `.ckpt`'s EMA weights (hub weights are EMA already).
        max_position_embeddings (`int`, *optional*): Longest sequence. `None`: `model_length` of `config.json`; 1024
            for a `.ckpt`, which does not say.
        time_conditioning (`bool`, *optional*): `None`: as `config.json` says; `False` for a `.ckpt`.
        revision (`str`, *optional*): Hub revision. `None`: the default branch.

    Returns:
        [`FPMDLMForMaskedDiffusion`] in float32 and evaluation mode.

    Raises:
        `ValueError`: lists missing and unknown keys, wrong shapes, or weights that are not finite; also for a
            checkpoint of another architecture.

    Example:

    ```python
    >>> from fpmgm import load_mdlm
    >>> model = load_mdlm("kuleshov-group/mdlm-owt")  # doctest: +SKIP
    >>> tokens = model.generate(budget=768, seed=0)  # doctest: +SKIP

    ```
    """
    path = Path(path_or_repo)
    if path.suffix in (".ckpt", ".pt", ".pth"):
        state = _lightning_state(path, use_ema)
        config = _config_from_shapes(state)
    else:
        original, state = _hub_files(path_or_repo, revision)
        config = _config_from_original(original, path_or_repo)
    if max_position_embeddings is not None:
        config["max_position_embeddings"] = max_position_embeddings
    if time_conditioning is not None:
        config["time_conditioning"] = time_conditioning
    with torch.device("meta"):
        model = FPMDLMForMaskedDiffusion(FPMDLMConfig(**config))
    state.pop(FREQUENCIES, None)
    renamed = {_rename(name): tensor.float() for name, tensor in state.items()}
    check_state(model, renamed, path_or_repo)
    model.load_state_dict(renamed, assign=True)
    return model.requires_grad_(True).eval()


def _rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return name


def _hub_files(path_or_repo: str | Path, revision: str | None) -> tuple[dict, dict[str, torch.Tensor]]:
    """`config.json` and the tensors of a folder or hub repository."""
    folder, files = Path(path_or_repo), ("config.json", "model.safetensors")
    if folder.exists():
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"`path_or_repo`={str(path_or_repo)!r} lacks {missing}: an MDLM folder holds {files}.")
        paths = [folder / name for name in files]
    else:
        paths = [hf_hub_download(str(path_or_repo), name, revision=revision) for name in files]
    state = load_file(paths[1])
    return json.loads(Path(paths[0]).read_text(encoding="utf-8")), {
        name.removeprefix("backbone."): x for name, x in state.items()
    }


def _config_from_original(original: dict, source: str | Path) -> dict:
    if original.get("model_type") != "mdlm":
        raise ValueError(
            f"`path_or_repo`={str(source)!r} holds a checkpoint of `model_type`={original.get('model_type')!r}, not "
            "'mdlm': load one of ours with `AutoModel.from_pretrained`."
        )
    return {
        "vocab_size": original["vocab_size"],
        "mask_token_id": original["vocab_size"] - 1,
        "hidden_size": original["hidden_dim"],
        "num_attention_heads": original["n_heads"],
        "intermediate_size": 4 * original["hidden_dim"],
        "conditioning_size": original["cond_dim"],
        "max_position_embeddings": original["model_length"],
        "dropout": original.get("dropout", 0.1),
        "time_conditioning": original.get("time_conditioning", False),
        "num_pre_layers": original["n_blocks"],
        "num_fixed_point_layers": 0,
        "num_post_layers": 0,
    }


def _config_from_shapes(state: dict[str, torch.Tensor]) -> dict:
    """A Lightning checkpoint's configuration is code; its tensors say all but the longest length."""
    needed = ("vocab_embed.embedding", "sigma_map.mlp.2.weight", FREQUENCIES, "blocks.0.mlp.0.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"the checkpoint is not an MDLM's: its `backbone` has no {missing}.")
    vocab_size, hidden_size = state["vocab_embed.embedding"].shape
    return {
        "vocab_size": vocab_size,
        "mask_token_id": vocab_size - 1,
        "hidden_size": hidden_size,
        "num_attention_heads": hidden_size // (2 * len(state[FREQUENCIES])),
        "intermediate_size": len(state["blocks.0.mlp.0.weight"]),
        "conditioning_size": len(state["sigma_map.mlp.2.weight"]),
        "num_pre_layers": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_fixed_point_layers": 0,
        "num_post_layers": 0,
    }


def _lightning_state(path: Path, use_ema: bool) -> dict[str, torch.Tensor]:
    """The backbone's tensors of a Lightning checkpoint; its EMA lists them in the order of the parameters."""
    if not path.is_file():
        raise ValueError(f"`path_or_repo`={str(path)!r} does not exist: give a .ckpt file, a folder or a hub name.")
    # Lightning pickles the training configuration beside the tensors.
    checkpoint = read_checkpoint(path, "save `{'state_dict': ..., 'ema': ...}` alone and load that")
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"`path_or_repo`={str(path)!r} is not a Lightning checkpoint: it has no `state_dict`.")
    prefix = "backbone."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    if not state:
        raise ValueError(f"`path_or_repo`={str(path)!r} is not an MDLM checkpoint: no key begins with {prefix!r}.")
    if not use_ema:
        return state
    shadow = (checkpoint.get("ema") or {}).get("shadow_params")
    if shadow is None:
        raise ValueError(f"`use_ema`=True, but {str(path)!r} holds no EMA: load it with `use_ema=False`.")
    parameters = [name for name in state if name != FREQUENCIES]
    shapes, expected = [tuple(x.shape) for x in shadow], [tuple(state[name].shape) for name in parameters]
    if shapes != expected:
        raise ValueError(
            f"the EMA of {str(path)!r} has {len(shapes)} tensors {shapes}, expected {len(expected)} {expected}: load "
            "it with `use_ema=False`."
        )
    return {**state, **dict(zip(parameters, shadow, strict=True))}
