# SPDX-License-Identifier: Apache-2.0
"""MDLM checkpoints and those of its descendants with the same network: SDTT, Duo's MDLM, DiDi-Instruct, IDLM.

They come as folders or hub repositories (`config.json` and weights, whole or in shards), as Lightning `.ckpt` files
with EMA, or as a state dict alone. The sizes are read from the weights, what these do not tell from the configuration.
All is read as data: no remote code runs, nothing but tensors is unpickled, and flash-attn is not needed.
"""

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.configuration_fpmdlm import FPMDLMConfig
from ..models.modeling_fpmdlm import FPMDLMForMaskedDiffusion
from ..models.text_input import read_tokenizer
from .checkpoint import check_tensors, few, one_line, read_checkpoint, read_json, read_tensors, setting
from .sources import PICKLES, SAFETENSORS, fetch, weight_files
from .state_dict import check_there, count_layers, filled, fitting, renamed, unwrapped


logger = logging.get_logger(__name__)


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
MATRICES = ("vocab_embed.embedding", "sigma_map.mlp.2.weight", "blocks.0.mlp.0.weight")  # which tell sizes
FREQUENCIES = "rotary_emb.inv_freq"  # a buffer that we compute
ROOT, AVERAGED_ROOT = "backbone", "student_ema"  # what the network is an attribute of in a training
CONTAINERS = ("state_dict", "module", "model", "model_state_dict")  # Lightning, DeepSpeed, others
# Names of a configuration (MDLM's; SDTT's and Lightning's under `model`) → ours.
SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "hidden_size": "hidden_size",
    "cond_dim": "conditioning_size",
    "n_blocks": "num_pre_layers",
    "n_heads": "num_attention_heads",
    "model_length": "max_position_embeddings",
    "length": "max_position_embeddings",
    "dropout": "dropout",
    "time_conditioning": "time_conditioning",
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
TOKENIZER_FILES = (*TOKENIZER, "merges.txt", "special_tokens_map.json", "added_tokens.json")
BERT_SIZES = (28996, 30522)  # vocabularies whose own mask token MDLM takes (LM1B), and adds none


class Original(NamedTuple):
    """What a checkpoint holds: the network's weights, their average or `None`, its configuration, its folder."""

    state: dict[str, torch.Tensor]
    average: list[torch.Tensor] | None
    config: Any
    folder: Path | None


def load_mdlm(
    path_or_repo: str | Path,
    *,
    use_ema: bool = True,
    max_position_embeddings: int | None = None,
    time_conditioning: bool | None = None,
    mask_token_id: int | None = None,
    revision: str | None = None,
) -> FPMDLMForMaskedDiffusion:
    """Load an MDLM checkpoint as an explicit model (`num_fixed_point_layers=0`) with the original's logits.

    Args:
        path_or_repo (`str` or `Path`): A folder or a hub repository such as `"kuleshov-group/mdlm-owt"` or
            `"jdeschena/sdtt"` (`model.safetensors` or `pytorch_model.bin`, whole or in shards), a Lightning `.ckpt`,
            or a file with a state dict alone (`.safetensors`, `.bin`, `.pt`, `.pth`). Prefixes that compilation and
            engines leave in the names are passed over.
        use_ema (`bool`, defaults to `True`): Take a training checkpoint's EMA weights. Folders and state dicts alone
            hold one set of weights, which is taken.
        max_position_embeddings (`int`, *optional*): Longest sequence. `None`: as the configuration says, in
            `config.json` or a `.ckpt`; 1024 where there is none.
        time_conditioning (`bool`, *optional*): `None`: as the configuration says; `False` where there is none.
        mask_token_id (`int`, *optional*): Id of the mask. `None`: that of the tokenizer in the folder or repository,
            if it has one, else the last id, which MDLM adds to a tokenizer without a mask token. MDLM on LM1B takes
            `bert-base-uncased`'s, 103.
        revision (`str`, *optional*): Branch, tag or commit on the hub: a branch is a model in `"jdeschena/sdtt"`.
            `None`: `main`.

    Returns:
        [`FPMDLMForMaskedDiffusion`] in float32 and evaluation mode.

    Raises:
        `ValueError`: names a file that is not there or cannot be read, and what it should be; lists missing and
            unknown keys, wrong shapes, or weights that are not finite; also for a checkpoint of another architecture
            or of another process than masking, and a mask id outside the vocabulary.

    Example:

    ```python
    >>> from fpmgm import load_mdlm
    >>> model = load_mdlm("kuleshov-group/mdlm-owt")  # doctest: +SKIP
    >>> tokens = model.generate(budget=768, seed=0)  # doctest: +SKIP
    >>> fast = load_mdlm("jdeschena/sdtt", revision="baselines_kld_step_70000")  # doctest: +SKIP

    ```
    """
    original = _read(path_or_repo, use_ema, revision)
    given = {"max_position_embeddings": max_position_embeddings, "time_conditioning": time_conditioning}
    config = _our_config(original, path_or_repo, {name: x for name, x in given.items() if x is not None})
    config["mask_token_id"] = _mask_token_id(mask_token_id, original.folder, config["vocab_size"])
    state = {renamed(name, RENAMES): tensor for name, tensor in original.state.items() if name != FREQUENCIES}
    model = filled(lambda: FPMDLMForMaskedDiffusion(FPMDLMConfig(**config)), state, path_or_repo, "an MDLM")
    if original.average is not None:
        average = _named_average(original.average, state, path_or_repo)
        model.load_state_dict(fitting(model, average, f"{path_or_repo} (EMA)"), assign=True)
    return model


# --- files -----------------------------------------------------------------------------------------------------------


def _read(path_or_repo: str | Path, use_ema: bool, revision: str | None) -> Original:
    beside = ("config.json", *TOKENIZER_FILES)
    path = fetch(path_or_repo, (*beside, *SAFETENSORS), revision=revision)
    if path.is_dir() and path != Path(path_or_repo) and not any(path.glob("*.safetensors")):
        path = fetch(path_or_repo, (*beside, *PICKLES), revision=revision)  # a repository without safetensors
    if not path.is_dir() and path.suffix != ".safetensors":
        return _training_checkpoint(path, use_ema)
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(path) if path.is_dir() else [path]:
        shard = read_tensors(file) if file.suffix == ".safetensors" else read_checkpoint(file)
        check_tensors(shard, file)
        if twice := [name for name in shard if name in state]:
            raise ValueError(f"{str(file)!r} holds weights that another shard holds too: {few(twice)}.")
        state |= shard
    state = _network(unwrapped(state, path), (ROOT,))
    _check_network(state, path)
    config = path / "config.json"
    return Original(state, None, read_json(config) if config.exists() else {}, path if path.is_dir() else None)


def _training_checkpoint(path: Path, use_ema: bool) -> Original:
    """What a file of `torch.save` holds; Lightning pickles its configuration beside the tensors."""
    checkpoint = read_checkpoint(path, "save `{'state_dict': ..., 'ema': ...}` alone and load that")
    container = next((name for name in CONTAINERS if isinstance(setting(checkpoint, name), dict)), None)
    values = checkpoint if container is None else checkpoint[container]
    tensors = isinstance(values, dict) and all(isinstance(name, str) for name in values)
    if not tensors or (container is None and not any(torch.is_tensor(x) for x in values.values())):
        places = ", ".join(f"`{name}`" for name in CONTAINERS)
        raise ValueError(f"{str(path)!r} holds no state dict, neither at its top nor under one of {places}.")
    names = unwrapped(values, path)
    state = _network(names, (AVERAGED_ROOT, ROOT) if use_ema else (ROOT, AVERAGED_ROOT))
    check_tensors(state, path)
    _check_network(state, path)  # before advice on its EMA
    average = setting(checkpoint, "ema", "shadow_params") if use_ema and container is not None else None
    averaged = container is None or any(name.startswith(f"{AVERAGED_ROOT}.") for name in names)
    if use_ema and average is None and not averaged:
        raise ValueError(f"`use_ema`=True, but {str(path)!r} holds no EMA: load it with `use_ema=False`.")
    if average is not None:
        check_tensors({str(i): x for i, x in enumerate(average)} if isinstance(average, list) else {}, path)
    return Original(state, average, setting(checkpoint, "hyper_parameters", "config"), None)


def _network(state: dict[str, Any], roots: tuple[str, ...]) -> dict[str, Any]:
    """What is below the first of `roots` that there is, however often it is repeated; `state` itself without any."""
    root = next((f"{root}." for root in roots if any(name.startswith(f"{root}.") for name in state)), None)
    while root is not None and any(name.startswith(root) for name in state):
        state = {name.removeprefix(root): tensor for name, tensor in state.items() if name.startswith(root)}
    return state


def _check_network(state: dict[str, torch.Tensor], source: str | Path) -> None:
    """Raise a `ValueError` unless these are weights of the network, at a glance."""
    check_there(state, MATRICES, source, "an MDLM's")
    if any(state[name].dim() != 2 or not state[name].numel() for name in MATRICES):
        raise ValueError(f"`{source}` is not an MDLM's: {MATRICES} must be matrices.")


def _named_average(average: list, state: dict[str, torch.Tensor], source: str | Path) -> dict[str, torch.Tensor]:
    """The averaged weights by name: they are listed in the order of the parameters."""
    shapes, expected = [tuple(x.shape) for x in average], [tuple(x.shape) for x in state.values()]
    if shapes != expected:
        pairs = zip(shapes, expected, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        raise ValueError(
            f"the EMA of `{source}` lists {len(shapes)} tensors, expected {len(expected)}, those of the parameters; "
            f"only the first {same} have their shapes. `use_ema=False` takes the weights as they were trained."
        )
    return dict(zip(state, average, strict=True))


# --- configuration ---------------------------------------------------------------------------------------------------


def _our_config(original: Original, source: str | Path, given: dict[str, Any]) -> dict[str, Any]:
    """Fields of ours: sizes from the weights, what these do not tell from the configuration, `given` above both."""
    _check_process(original.config, source)
    found = {theirs: _told(original.config, theirs) for theirs in SETTINGS}
    told = {SETTINGS[theirs]: value for theirs, value in found.items() if value is not None}
    sizes = _sizes(original.state, told.get("num_attention_heads"), source)
    if not isinstance(told.get("time_conditioning", False), bool):
        raise ValueError(f"the configuration of `{source}` has `time_conditioning`={told['time_conditioning']!r:.99}.")
    wrong = {name: (told[name], size) for name, size in sizes.items() if told.get(name, size) != size}
    if wrong:
        raise ValueError(
            f"the configuration of `{source}` and its weights disagree (configuration, weights): {wrong}."
        )
    return {**told, **sizes, **given, "num_fixed_point_layers": 0, "num_post_layers": 0}


def _told(config: Any, name: str) -> Any:
    """What a configuration says; `None` where it says nothing or leaves it to an interpolation of omegaconf."""
    places = ((name,), ("model", name), ("algo", name))
    values = (setting(config, *place) for place in places)
    plain = (x for x in values if isinstance(x, (bool, int, float, str)))
    return next((x for x in plain if not str(x).startswith(("${", "???"))), None)


def _check_process(config: Any, source: str | Path) -> None:
    """Raise a `ValueError` for another architecture, or the same network trained for another process than masking."""
    kind, process = setting(config, "model_type"), _told(config, "parameterization")
    if kind not in (None, "mdlm"):
        raise ValueError(
            f"`path_or_repo`={str(source)!r} holds a checkpoint of `model_type`={one_line(kind)!r}, not 'mdlm': load "
            "one of ours with `AutoModel.from_pretrained`."
        )
    if isinstance(process, str) and process != "subs":
        raise ValueError(
            f"`path_or_repo`={str(source)!r} was trained with `parameterization`={process!r}, not 'subs': it is no "
            "masked diffusion model, although its network is MDLM's."
        )


def _sizes(state: dict[str, torch.Tensor], heads: int | None, source: str | Path) -> dict[str, Any]:
    """Fields of ours that the weights tell; the number of heads, where they do not tell it, is `heads`."""
    vocab_size, hidden_size = state["vocab_embed.embedding"].shape
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": len(state["blocks.0.mlp.0.weight"]),
        "conditioning_size": len(state["sigma_map.mlp.2.weight"]),
        "num_pre_layers": count_layers(state, "blocks.", source),
    }
    if FREQUENCIES in state:
        frequencies = state[FREQUENCIES].double().flatten()
        heads, theta = hidden_size // (2 * len(frequencies)), _rotary_base(frequencies, source)
        return {**sizes, "num_attention_heads": heads, "rope_theta": theta}
    if heads is None:
        raise ValueError(
            f"`{source}` does not tell the number of attention heads: it has neither {FREQUENCIES!r} nor a "
            "configuration. Put a `config.json` with `n_heads` beside the weights and load the folder."
        )
    return {**sizes, "num_attention_heads": heads}


def _rotary_base(frequencies: torch.Tensor, source: str | Path) -> float:
    """θ of frequencies θ^(−i/n), i < n, which may be rounded to 16 bits; 10,000 where they are nearly that."""
    shares = torch.arange(len(frequencies), dtype=torch.double) / max(1, len(frequencies))
    last = float(-frequencies[-1].log() / shares[-1]) if len(frequencies) > 1 else 0.0
    for theta in (10000.0, float(f"{math.exp(min(last, 99.0)):.4g}")):
        if torch.allclose(frequencies, theta**-shares, rtol=1e-2, atol=0.0):
            return theta
    raise ValueError(f"{FREQUENCIES!r} of `{source}` holds no frequencies θ^(−i/n) of a rotary embedding.")


def _mask_token_id(given: int | None, folder: Path | None, vocab_size: int) -> int:
    """The id given, that of the tokenizer in `folder`, or the last one."""
    tokenizer = None
    if given is None and folder is not None and any((folder / name).exists() for name in TOKENIZER):
        tokenizer = _tokenizer_of(folder)
    of_tokenizer = None if tokenizer is None else tokenizer.mask_token_id
    found = vocab_size - 1 if given is None and of_tokenizer is None else of_tokenizer if given is None else given
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < vocab_size:
        whose = f"the tokenizer in {str(folder)!r} has " if given is None else ""
        raise ValueError(
            f"{whose}`mask_token_id`={found!r}, which must be an id of the checkpoint's vocabulary, from 0 to "
            f"{vocab_size - 1}: give another `mask_token_id`, or leave it out for the last id."
        )
    if given is None and of_tokenizer is None:
        doubt = f"{vocab_size} ids are BERT's vocabulary, whose [MASK] is 103" if vocab_size in BERT_SIZES else None
        if tokenizer is not None and len(tokenizer) != vocab_size - 1:
            doubt = f"the tokenizer in {str(folder)!r} has {len(tokenizer)} of {vocab_size} ids, not all but that one"
        if doubt is not None:
            logger.warning(
                f"the mask id is taken to be the last, {found}, but {doubt}: give `mask_token_id` to say which it is."
            )
    return found


def _tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return read_tokenizer(folder, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"{one_line(error)} It would tell the mask id: give `mask_token_id` instead.") from error
