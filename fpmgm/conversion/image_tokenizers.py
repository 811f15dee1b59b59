# SPDX-License-Identifier: Apache-2.0
"""Image tokenizers: folders of ours, LlamaGen's VQ files and XQGAN's VQ-4096 file, read without running their code.

Their weights are under licences of their own; XQGAN's is for non-commercial research only.
"""

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import JanusVQVAEConfig

from ..models.configuration_xqgan import XQGANConfig
from ..models.modeling_vqgan import VQGANModel
from ..models.modeling_xqgan import XQGANModel
from .checkpoint import (
    NO_MODEL,
    check_file,
    check_tensors,
    one_line,
    read_checkpoint,
    read_json,
    read_tensors,
    reading,
)
from .pretrained import load_pretrained
from .sources import FILE_SUFFIXES, SAFETENSORS, fetch
from .state_dict import check_there, count_layers, filled, renamed, unwrapped


IMAGE_TOKENIZERS = {"janus_vqgan": VQGANModel, "xqgan": XQGANModel}  # by `model_type`

# Parameter names of LlamaGen → `JanusVQVAE`'s.
LLAMAGEN_RENAMES = [
    (r"^encoder\.conv_blocks\.(\d+)\.res\.", r"encoder.down.\1.block."),
    (r"^encoder\.conv_blocks\.", r"encoder.down."),
    (r"^decoder\.conv_blocks\.(\d+)\.res\.", r"decoder.up.\1.block."),
    (r"^decoder\.conv_blocks\.", r"decoder.up."),
    (r"^(encoder|decoder)\.mid\.0\.", r"\1.mid.block_1."),
    (r"^(encoder|decoder)\.mid\.1\.", r"\1.mid.attn_1."),
    (r"^(encoder|decoder)\.mid\.2\.", r"\1.mid.block_2."),
]
# Parameter names of XQGAN → ours.
XQGAN_RENAMES = [
    (r"^encoder\.model\.patch_embed\.proj\.", "encoder.patch_embed."),
    (r"^decoder\.to_pixel\.model\.", "decoder.to_pixels."),
    (r"^quantize\.embedding\.weight$", "codebook"),
    (r"^(encoder|decoder)\.(model|lvl_embed)\b", r"\1.transformer.\2"),
    (r"\.transformer\.model\.", ".transformer."),
    (r"\.lvl_embed\.weight$", ".level_embedding"),
    (r"\.pos_embed$", ".position_embedding"),
    (r"\.blocks\.(\d+)\.", r".layers.\1."),
    (r"\.attn\.qkv\.", ".qkv_proj."),
    (r"\.attn\.proj\.", ".o_proj."),
    (r"\.ls([12])\.gamma$", r".scale\1"),
    (r"\.mlp\.fc1\.", ".up_proj."),
    (r"\.mlp\.fc2\.", ".down_proj."),
]
XQGAN_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")  # others serve its training
COUNTERS = (".codebook_used", ".ema_vocab_hit_SV", ".lvl1LC")  # buffers that count codes or can be computed
DINO_HEAD_SIZE = 64  # of every DINOv2 size
CODEBOOK = "quantize.embedding.weight"  # of both
LLAMAGEN, XQGAN = "a VQ model of LlamaGen", "an XQGAN of vision transformers"
HUB = ("revision", "token", "cache_dir", "local_files_only")  # options of a download


def load_image_tokenizer(path_or_repo: str | Path, subfolder: str = "", **kwargs: Any) -> VQGANModel | XQGANModel:
    """Load an image tokenizer: pixels ↔ a grid of codes.

    Args:
        path_or_repo (`str` or `Path`): A folder or hub repository that `save_pretrained` wrote, or a file of LlamaGen
            (`vq_ds16_c2i.pt`) or XQGAN (`XQGAN-4096.pt`).
        subfolder (`str`, *optional*): Where in the folder or repository, such as `"vq"`. Empty: at its top.
        kwargs: Of the hub, `revision`, `token`, `cache_dir`, `local_files_only`; of `from_pretrained`, `dtype`,
            `device_map`, … Not for a file.

    Returns:
        [`VQGANModel`] or [`XQGANModel`] in evaluation mode: both have `encode` and `decode`.

    Raises:
        `ValueError`: for a folder or file of something else, a damaged one, and weights missing or not finite.
    """
    path = Path(path_or_repo)
    if path.suffix in FILE_SUFFIXES:
        if kwargs or subfolder:
            given = sorted(kwargs) + ["subfolder"] * bool(subfolder)
            raise ValueError(f"{given} cannot be given with a file, `path_or_repo`={str(path)!r}: leave them out.")
        state = _tensors(path, use_ema=True)
        return _xqgan(state, path) if "encoder.latent_tokens" in state else _llamagen(state, path, image_size=256)
    hub = {name: kwargs.pop(name) for name in HUB if name in kwargs}
    files = ("config.json", *SAFETENSORS)
    folder = fetch(path_or_repo, [str(Path(subfolder) / name) for name in files], **hub) / subfolder
    kind = read_json(folder / "config.json").get("model_type")
    if not isinstance(kind, str) or kind not in IMAGE_TOKENIZERS:
        raise ValueError(
            f"{str(folder)!r} holds `model_type`={one_line(kind)!r}, which is no image tokenizer: known are "
            f"{tuple(IMAGE_TOKENIZERS)}."
        )
    return load_pretrained(IMAGE_TOKENIZERS[kind], folder, **kwargs)


def load_llamagen_vq(path: str | Path, image_size: int = 256, use_ema: bool = True) -> VQGANModel:
    """Load a VQ file of LlamaGen; the sizes are read from the shapes.

    Args:
        path (`str` or `Path`): `vq_ds16_c2i.pt` (16,384 codes, 16 × 16 for 256 pixels), `vq_ds8_c2i.pt`, or the same
            state dict as `.safetensors`.
        image_size (`int`, defaults to 256): Pixels along one side of the images to be decoded.
        use_ema (`bool`, defaults to `True`): Take the averaged weights where the file holds them.

    Returns:
        [`VQGANModel`] with the original's codes and pixels, its codebook on the unit sphere, where it is read.

    Raises:
        `ValueError`: lists missing and unknown keys, wrong shapes and weights that are not finite; also for an
            `image_size` that is not a whole number of codes.
    """
    return _llamagen(_tensors(Path(path), use_ema), path, image_size)


def load_xqgan(path: str | Path, use_ema: bool = True) -> XQGANModel:
    """Load XQGAN's VQ-4096, the tokenizer of the paper; the sizes are read from the shapes.

    Args:
        path (`str` or `Path`): `XQGAN-4096.pt`, or the same state dict as `.safetensors`. It is yours to get; its
            licence is for non-commercial research.
        use_ema (`bool`, defaults to `True`): Take the averaged weights where the file holds them, as the original's
            samplers do.

    Returns:
        [`XQGANModel`] in evaluation mode.

    Raises:
        `ValueError`: lists missing and unknown keys, wrong shapes and weights that are not finite; also for a
            product-quantised XQGAN.
    """
    return _xqgan(_tensors(Path(path), use_ema), path)


def _llamagen(state: dict[str, torch.Tensor], path: str | Path, image_size: int) -> VQGANModel:
    with reading(path, LLAMAGEN, NO_MODEL):
        config = JanusVQVAEConfig(**_llamagen_sizes(state, path, image_size))
        ours = {renamed(name, LLAMAGEN_RENAMES): tensor for name, tensor in state.items()}
        ours[CODEBOOK] = F.normalize(ours[CODEBOOK].float(), dim=-1)
    return filled(lambda: VQGANModel(config), ours, path, LLAMAGEN)


def _xqgan(state: dict[str, torch.Tensor], path: str | Path) -> XQGANModel:
    if any(name.startswith("quantizes.") for name in state):
        raise ValueError(
            f"`path`={str(path)!r} holds an XQGAN of several codebooks (product quantisation): one code per position "
            "needs the one of a single codebook, XQGAN-4096."
        )
    parts = {name: tensor for name, tensor in state.items() if name.startswith(XQGAN_PARTS)}
    with reading(path, XQGAN, NO_MODEL):
        config = XQGANConfig(**_xqgan_sizes(parts, path))
    return filled(
        lambda: XQGANModel(config), {renamed(name, XQGAN_RENAMES): x for name, x in parts.items()}, path, XQGAN
    )


def _tensors(path: Path, use_ema: bool) -> dict[str, torch.Tensor]:
    """The state dict of a file, without counters."""
    check_file(path)
    if path.suffix == ".safetensors":
        state = read_tensors(path)
    else:
        checkpoint = read_checkpoint(path)
        checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
        ema = checkpoint.get("ema") if use_ema else None
        state = ema or checkpoint.get("model") or checkpoint
    check_tensors(state, path)
    return {name: tensor for name, tensor in unwrapped(state, path).items() if not name.endswith(COUNTERS)}


def _llamagen_sizes(state: dict[str, torch.Tensor], path: str | Path, image_size: int) -> dict:
    needed = ("encoder.conv_in.weight", "encoder.conv_out.weight", "quant_conv.weight", CODEBOOK)
    check_there(state, (*needed, "encoder.conv_blocks.0.res.0.conv1.weight"), path, LLAMAGEN)
    base, latent, embed = (len(state[name]) for name in needed[:3])
    levels = count_layers(state, "encoder.conv_blocks.", path)
    if image_size < 1 or image_size % 2 ** (levels - 1):
        raise ValueError(f"`image_size`={image_size} must be a multiple of {2 ** (levels - 1)}, the pixels of a code.")
    widths = [len(state[f"encoder.conv_blocks.{level}.res.0.conv1.weight"]) for level in range(levels)]
    return {
        "base_channels": base,
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": count_layers(state, "encoder.conv_blocks.0.res.", path),
        "latent_channels": latent,
        "embed_dim": embed,
        "num_embeddings": len(state[CODEBOOK]),
        "num_patches": image_size // 2 ** (levels - 1),
    }


def _xqgan_sizes(state: dict[str, torch.Tensor], path: str | Path) -> dict:
    model = "encoder.model."
    needed = (f"{model}patch_embed.proj.weight", f"{model}pos_embed", f"{model}blocks.0.mlp.fc1.weight")
    check_there(state, (*needed, "encoder.latent_tokens", CODEBOOK), path, XQGAN)
    width, _, _, patch = state[needed[0]].shape
    side = round((state[needed[1]].shape[1] - 1) ** 0.5)
    codebook_size, codebook_dim = state[CODEBOOK].shape
    return {
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_size": width,
        "num_hidden_layers": count_layers(state, f"{model}blocks.", path),
        "num_attention_heads": max(1, width // DINO_HEAD_SIZE),
        "intermediate_size": len(state[needed[2]]),
        "codebook_size": codebook_size,
        "codebook_dim": codebook_dim,
    }
