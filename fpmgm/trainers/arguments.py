# SPDX-License-Identifier: Apache-2.0
"""Command lines of recipes: dataclasses, a YAML of their values, and overrides."""

import sys
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path

import yaml
from transformers import HfArgumentParser, PreTrainedConfig


def parse_arguments(types: tuple[type, ...], description: str, argv: list[str] | None = None) -> tuple:
    """Instances of the dataclasses `types` from `--config FILE.yaml` and `--name value` overrides.

    Args:
        types (`tuple[type, ...]`): Dataclasses with disjoint field names.
        description (`str`): First words of `--help`.
        argv (`list[str]`, *optional*): Arguments. `None`: the command line's.

    Raises:
        `ValueError`: for a YAML that does not exist or sets a name that no dataclass has.
    """
    parser = HfArgumentParser(types, description=description)
    parser.add_argument("--config", help="YAML file with any of the values below; the command line overrides it.")
    argv = sys.argv[1:] if argv is None else argv
    known = {action.dest for action in parser._actions}
    config = _config_path(argv)
    if config is not None:
        if not Path(config).is_file():
            raise ValueError(f"`config`={config!r} does not exist: give a YAML file.")
        values = yaml.safe_load(Path(config).read_text()) or {}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"`config`={config!r} sets {unknown}, which this recipe does not have: see --help.")
        parser.set_defaults(**values)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
    instances = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, args_filename=None)
    return tuple(instances[: len(types)])


def _config_path(argv: list[str]) -> str | None:
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            return argv[i + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None


def model_arguments(config_class: type[PreTrainedConfig], exclude: tuple[str, ...] = ()) -> type:
    """A dataclass with the architecture's own fields, so that a recipe takes each of them as an option."""
    own = [f for f in fields(config_class) if f.name in config_class.__annotations__ and f.name not in exclude]
    see = {"help": f"See {config_class.__name__}."}
    columns = [(f.name, f.type, field(default=None if f.default is MISSING else f.default, metadata=see)) for f in own]
    return make_dataclass("ModelArguments", columns)


@dataclass
class LoraArguments:
    """Whether to train low-rank adapters instead of the weights; the names are those of TRL's recipes."""

    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters on frozen weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout before the adapters; 0 keeps F one map for all iterations."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to adapt, or all-linear; null: the projections of the blocks."}
    )

    def __post_init__(self):
        given = [f.name for f in fields(self) if f.name != "use_peft" and getattr(self, f.name) != f.default]
        if given and not self.use_peft:
            raise ValueError(f"{given} do nothing without `use_peft`: add --use_peft, or leave them out.")
