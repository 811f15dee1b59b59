# SPDX-License-Identifier: Apache-2.0
"""Folders that `save_pretrained` wrote, whole or refused: no weight is left at random, none is NaN.

Configuration and headers of the weights are compared before anything is loaded, so that a folder that claims more than
it holds costs neither time nor memory.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from .checkpoint import check_file, read_json, reading
from .sources import weight_files
from .state_dict import misfits, refuse, shapes_of


LAYERS = {  # by `model_type`: modules that the configuration asks for one by one
    "fpmaskgit": lambda config: config.num_hidden_layers,
    "janus_vqgan": lambda config: config.num_res_blocks * len(config.channel_multiplier),
    "xqgan": lambda config: config.num_hidden_layers,
}


def load_pretrained(model_class: type[PreTrainedModel], folder: Path, **kwargs: Any) -> PreTrainedModel:
    """`model_class.from_pretrained(folder, **kwargs)` in evaluation mode, if the folder is whole.

    Args:
        model_class (`type[PreTrainedModel]`): One of `LAYERS`' classes.
        folder (`Path`): Of `config.json` and safetensors, in one file or in shards.
        kwargs: `dtype`, `device_map`, …

    Raises:
        `ValueError`: names a file that is missing or cannot be read, and lists what does not fit or is not finite.
    """
    read_json(folder / "config.json")
    with reading(folder / "config.json", f"the configuration of a {model_class.__name__}"):
        config = model_class.config_class.from_pretrained(folder, local_files_only=True)
    declared = _declared_shapes(folder)
    _check_whole(model_class, config, declared, folder)
    with reading(folder, f"a {model_class.__name__}"):
        model = model_class.from_pretrained(folder, use_safetensors=True, local_files_only=True, **kwargs).eval()
    on_a_device = {name: x for name, x in model.state_dict().items() if x.device.type != "meta"}
    wrong = [name for name, x in on_a_device.items() if x.is_floating_point() and not x.isfinite().all()]
    refuse({"not finite": wrong}, model_class.__name__, folder)
    return model


def _declared_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from the headers of the weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        check_file(file)
        with reading(file, "tensors (safetensors)"), safe_open(file, framework="pt") as header:
            shapes |= {name: tuple(header.get_slice(name).get_shape()) for name in header.keys()}  # noqa: SIM118
    return shapes


def _check_whole(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, declared: dict[str, tuple[int, ...]], folder: Path
) -> None:
    """Raise a `ValueError` unless the weights declared are those of the configuration's model."""
    with reading(folder / "config.json", f"the configuration of a {model_class.__name__}", "its sizes fit no model"):
        layers = LAYERS[config.model_type](config)
        if layers > len(declared):
            raise ValueError(
                f"it asks for {layers:,} layers, but there are {len(declared):,} weights in {str(folder)!r}"
            )
        with torch.device("meta"):
            model = model_class(config)
        tied = set(model.all_tied_weights_keys)
    expected = {
        name: shape for name, shape in shapes_of(model.state_dict()).items() if name not in tied - set(declared)
    }
    refuse(misfits(expected, declared), model_class.__name__, folder)
