# SPDX-License-Identifier: Apache-2.0
"""Command lines of recipes and benchmarks: dataclasses, a YAML of their values, overrides, and a `--help` to read."""

import argparse
import difflib
import inspect
import io
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, NewType, get_args, get_type_hints

import yaml
from huggingface_hub import constants, repo_info
from huggingface_hub.file_download import repo_folder_name
from transformers import HfArgumentParser, PreTrainedConfig


# Types of options that must name something that is there.
LocalPath = NewType("LocalPath", str)  # a file or folder
ModelName = NewType("ModelName", str)  # a file or folder of a model or tokenizer, or a name on the hub
DatasetName = NewType("DatasetName", str)  # a folder of a dataset, or a name on the hub

# What --help shows first, whichever dataclass it is a field of.
COMMON = (
    "config", "model", "model_name_or_path", "text_files", "eval_text_files", "dataset_name", "image_dir", "codes_dir",
    "tokenizer", "prompt", "class_labels", "judge", "judge_text_files", "budgets", "budget", "num_samples",
    "output_dir", "output", "seed", "device",
)  # fmt: skip
TRAINING = (
    "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "ema_decay", "eval_strategy", "eval_steps",
    "save_steps", "save_total_limit", "logging_steps", "bf16", "use_cpu", "resume_from_checkpoint", "push_to_hub",
)  # fmt: skip

ON_HUB = {ModelName: "model", DatasetName: "dataset"}
SHOWN = {LocalPath: "path", **dict.fromkeys(ON_HUB, "path or hub name"), str: "text", int: "number", float: "number"}


def parse_arguments(types: tuple[type, ...], description: str, argv: list[str] | None = None) -> tuple:
    """Instances of the dataclasses `types` from `--config FILE.yaml` and `--name value` overrides.

    No name is taken for another that it begins. What fields of the types [`LocalPath`], [`ModelName`] and
    [`DatasetName`] name, alone or in a list, must be there: it is looked up here, before anything slow begins.

    Args:
        types (`tuple[type, ...]`): Dataclasses with disjoint field names.
        description (`str`): First words of `--help`, in lines as they are.
        argv (`list[str]`, *optional*): Arguments. `None`: the command line's.

    Raises:
        `ValueError`: for a name that no dataclass has, in the YAML or the arguments, and for a file, folder or model
            that does not exist.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks γ or ± is no reason to stop
            stream.reconfigure(errors="replace")
    parser = _Parser(types, description)
    argv = sys.argv[1:] if argv is None else list(argv)
    parser.check_spelling(argv)
    config = _config_of(argv)
    values = {} if config is None else read_yaml("config", config)
    for name in values:
        if name not in parser.options:
            raise ValueError(f"`config`={config!r} sets {_no_option(name, list(parser.options))}")
    parser.set_defaults(**{name: value for name, value in values.items() if value in (None, [])})
    *instances, _ = parser.parse_args_into_dataclasses([*_as_options(values), *argv], look_for_args_file=False)
    for instance in instances:
        check_names(instance, config, values)
    return tuple(instances)


def model_arguments(config_class: type[PreTrainedConfig], exclude: tuple[str, ...] = ()) -> type:
    """A dataclass with the architecture's own fields, in its docstring's words, as the options of a recipe."""
    own = [f for f in fields(config_class) if f.name in config_class.own_fields() and f.name not in exclude]
    words = _documented(config_class)
    columns = [
        (f.name, f.type, field(default=None if f.default is MISSING else f.default, metadata={"help": words[f.name]}))
        for f in own
    ]
    return make_dataclass("ModelArguments", columns, namespace={"__doc__": f"Architecture ({config_class.__name__})."})


# --- what is read ----------------------------------------------------------------------------------------------------


def _config_of(argv: list[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser.parse_known_args(argv)[0].config


def read_yaml(option: str, path: str | Path) -> dict[str, Any]:
    """The names and values of a YAML file; messages say `option`, which names it.

    Raises:
        `ValueError`: for a file that does not exist, is no YAML, or gives a name twice, of which YAML itself takes the
            last.
    """
    path = str(path)
    if not Path(path).is_file():
        raise ValueError(f"`{option}`={path!r} does not exist: give a YAML file.")
    try:
        text = Path(path).read_text(encoding="utf-8")
        twice = next(_repeated(yaml.compose(text, yaml.SafeLoader)), None)
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`{option}`={path!r} is no YAML: {error}") from error
    if twice is not None:
        raise ValueError(
            f"`{option}`={path!r} gives `{twice.value}` a second time in line {twice.start_mark.line + 1}: give it "
            "once."
        )
    if not isinstance(values, dict):
        raise ValueError(f"`{option}`={path!r} holds no `name: value` lines but {type(values).__name__}.")
    return values


def _repeated(node: yaml.Node | None) -> Iterator[yaml.Node]:
    """The names that a mapping in `node` has had before."""
    if isinstance(node, yaml.MappingNode):
        names = [name.value for name, _ in node.value]
        yield from (name for i, (name, _) in enumerate(node.value) if name.value in names[:i])
        for _, value in node.value:
            yield from _repeated(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _repeated(value)


def _as_options(values: dict[str, Any]) -> list[str]:
    """The arguments that a YAML's values stand for, so that both are read alike."""
    options = []
    for name, value in values.items():
        if isinstance(value, list):
            options += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            options.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return options


def _no_option(name: str, known: list[str]) -> str:
    likely = [other for other in known if other.startswith(name)] or difflib.get_close_matches(name, known)
    guess = f": did you mean {' or '.join(f'`{other}`' for other in likely[:3])}?" if likely else ";"
    return f"`{name}`, which this command does not have{guess} See --help."


def given(options: Any) -> dict[str, Any]:
    """Those of the dataclass `options` that are not their defaults."""
    return {f.name: getattr(options, f.name) for f in fields(options) if getattr(options, f.name) != f.default}


# --- what must be there ----------------------------------------------------------------------------------------------


def check_names(options: Any, config: str | None = None, values: dict[str, Any] | None = None) -> None:
    """Raise a `ValueError` if a field of the dataclass `options` names a file, folder or model that does not exist.

    Defaults are not looked up: what else is given may make them idle. `config` and its `values`: the YAML to point at,
    whose first lines say what is made before.
    """
    hints = get_type_hints(type(options))
    for name, value in given(options).items():
        kind = next((part for part in _parts(hints[name]) if part in (LocalPath, *ON_HUB)), None)
        if kind is None or value is None:
            continue
        for item in value if isinstance(value, list) else [value]:
            of_yaml = config is not None and values.get(name) in (item, value)
            see = f"make it as the first lines of {config} say, or give another" if of_yaml else "give one that does"
            check_name(name, item, kind, see)


def check_name(name: str, value: str, kind: Any, what_to_do: str = "give one that does") -> None:
    """Raise a `ValueError` if `value` of the option `name`, of one of the types above, does not exist."""
    if Path(value).exists():
        return
    if kind is LocalPath:
        raise ValueError(f"`{name}`: {value!r} does not exist: {what_to_do}.")
    try:
        _look_up(value, ON_HUB[kind])
    except Exception as error:  # of the network, of the hub, of the name's form
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"`{name}`={value!r} does not exist, neither as a file or folder here nor on the hub ({reason}): "
            f"{what_to_do}."
        ) from error


def _look_up(name: str, repo_type: str) -> None:
    """One short question to the hub, unless that repository has been fetched before."""
    if not (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=repo_type)).is_dir():
        repo_info(name, repo_type=repo_type, timeout=10)


def _parts(hint: Any) -> Iterator[Any]:
    yield hint
    for part in get_args(hint):
        yield from _parts(part)


# --- what --help shows -----------------------------------------------------------------------------------------------


class _Parser(HfArgumentParser):
    """Options by name; their help in groups, what is common first, what only Hugging Face's `Trainer` knows last."""

    def __init__(self, types: tuple[type, ...], description: str):
        self.options: dict[str, argparse.Action] = {}
        self.spellings: set[str] = set()
        usage = "%(prog)s [--config FILE.yaml] [--option value ...]"
        super().__init__(types, description=description, usage=usage, allow_abbrev=False)
        self.add_argument("--config", help="YAML file with any of these values; the command line overrides it.")
        for name, words in ((name, words) for kind in types for name, words in _words(kind).items()):
            self.options[name].help = self.options[name].help or words

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an option and remember it; of `--name` and `--no_name` the former."""
        action = super().add_argument(*names, **options)
        self.options.setdefault(action.dest, action)
        self.spellings |= set(action.option_strings)
        return action

    def check_spelling(self, argv: list[str]) -> None:
        """Raise a `ValueError` for the first option that does not exist, and for a list that is given in parts."""
        for argument in argv:
            option = argument.split("=")[0]
            if option.startswith("--") and " " not in option and option not in self.spellings:
                name = option.removeprefix("--").replace("-", "_")
                raise ValueError(f"the command line has {_no_option(name, list(self.options))}")
        for name, action in self.options.items():
            times = sum(argument.split("=")[0] in action.option_strings for argument in argv)
            if action.nargs in ("+", "*") and times > 1:
                raise ValueError(
                    f"the command line gives `{name}` {times} times, of which the last alone would count: put all "
                    f"values behind one --{name}."
                )

    def groups(self) -> dict[str, list[str]]:
        """Names of the options by title."""
        groups = {"Common": COMMON, "Training": TRAINING} if "max_steps" in self.options else {"Common": COMMON}
        groups = {title: [name for name in names if name in self.options] for title, names in groups.items()}
        shown = {name for names in groups.values() for name in names}
        last = {}
        for kind in self.dataclass_types:
            homes = {f.name: _home(kind, f.name) for f in fields(kind) if f.init and f.name not in shown}
            for home in kind.__mro__:
                names = [name for name, other in homes.items() if other is home]
                if names:
                    title = re.sub(r"[`\[\]]", "", home.__doc__.strip().split("\n")[0].rstrip("."))
                    (last if home.__name__ == "TrainingArguments" else groups)[title] = names
        return groups | dict(zip(["All else that Hugging Face's Trainer takes"], last.values(), strict=False))

    def format_help(self) -> str:
        """The description, and the groups."""
        parts = [self.format_usage().strip(), self.description.strip()]
        for title, names in self.groups().items():
            parts.append("\n".join([f"{title}:", *(_help_of(self.options[name]) for name in names)]))
        return "\n\n".join(parts) + "\n"


def _home(kind: type, name: str) -> type:
    """The class that a field comes from."""
    return next(c for c in reversed(kind.__mro__) if name in inspect.get_annotations(c))


def _help_of(action: argparse.Action) -> str:
    value = "|".join(map(str, action.choices)) if action.choices else SHOWN.get(action.type, "value")
    if len(value) > 40 or getattr(action.type, "__name__", "") == "string_to_bool":
        value = "true|false" if len(value) <= 40 else "name"
    several = " ..." if action.nargs == "+" else ""
    lines = textwrap.wrap(" ".join(action.help.replace("%%", "%").split()), 92) if action.help else []
    if action.default not in (None, "", argparse.SUPPRESS):
        default = action.default if not isinstance(action.default, list) else " ".join(map(str, action.default))
        lines = textwrap.wrap(" ".join([*lines, f"[{default}]"]), 92)
    return "\n      ".join([f"  --{action.dest} {value}{several}", *lines])


def _words(kind: type) -> dict[str, str]:
    """What is said of the fields of a dataclass: by their metadata, or by its docstring or that of a class before."""
    found = {}
    for home in filter(is_dataclass, reversed(kind.__mro__)):
        found |= _documented(home) | {f.name: f.metadata["help"] for f in fields(home) if "help" in f.metadata}
    return {f.name: found[f.name] for f in fields(kind) if f.init and f.name in found}


def _documented(config_class: type) -> dict[str, str]:
    """What a docstring's `Args` say of each name, in one line."""
    found = {}
    arguments = inspect.cleandoc(config_class.__doc__).partition("Args:\n")[2].split("\n\n")[0]
    for names, text in re.findall(r"^    (\w[\w, ]*) \(.+?\): (.+(?:\n {8}.+)*)", arguments, flags=re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()).replace("`None`", "null"))
    return found
