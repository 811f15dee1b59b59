# SPDX-License-Identifier: Apache-2.0
"""The shape of the package: what may import what, and the rules that every file keeps."""

import ast
import doctest
import functools
import importlib
import importlib.util
import pkgutil
import sys
import sysconfig
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import fpmgm

from .testing_utils import run_python


PACKAGE = Path(fpmgm.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODELS = PACKAGE / "models"
LAYERS = ("data", "trainers", "conversion", "evaluation", "analysis")  # each may import models, none another
OURS = {"FPMDLMForMaskedDiffusion", "FPMDLMPreTrainedModel", "FPMaskGITModel", "FPMaskGITPreTrainedModel"}
MOST_LINES, MOST_FUNCTION_LINES = 450, 80
UNANNOTATED = {"config"}  # any object with the needed attributes
INTERFACES = {"eager_attention_forward"}  # the signature is Hugging Face's

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
model_files = pytest.mark.parametrize("path", sorted(MODELS.glob("*.py")), ids=lambda path: path.name)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported_modules(path: Path) -> frozenset[str]:
    """Absolute names of all modules that `path` imports anywhere, relative imports resolved."""
    module = path.relative_to(PACKAGE.parent).with_suffix("")
    package = module.parts[:-1]  # for __init__.py too: the folder it stands in
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            found.add(".".join(base))
            # `from .. import trainers` imports a module too
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return frozenset(found)


def sub_package(name: str) -> str | None:
    """`"data"` for `fpmgm.data.text`; `None` for modules of others."""
    parts = name.split(".")
    return parts[1] if parts[0] == "fpmgm" and len(parts) > 1 else None


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines_without_docstring(function: ast.FunctionDef) -> int:
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= first.end_lineno - first.lineno + 1
    return lines


@functools.cache
def called_names(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call with the name it is written with, such as `torch.load`."""
    return [(ast.unparse(node.func), node) for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]


# --- arrows ----------------------------------------------------------------------------------------------------------


@every_file
def test_imports_go_one_way(path):
    parts = path.relative_to(PACKAGE).parts
    own = parts[0] if len(parts) > 1 else None
    top = {p.stem for p in PACKAGE.glob("[!_]*.py")}
    allowed = {None: {*LAYERS, *top, "models", "model_cards"}, "models": {"models"}, "model_cards": set()}
    allowed |= {layer: {layer, "models", "model_cards"} for layer in LAYERS}
    assert own in allowed, f"{path}: which sub-packages may `{own}` import?"
    names = imported_modules(path)
    found = {sub_package(name) for name in names} & {*top, *(p.name for p in PACKAGE.iterdir() if p.is_dir())}
    assert found <= allowed[own]
    assert own is None or "fpmgm.__version__" not in names, "the package itself stands above its folders"
    assert not {name for name in names if name.split(".")[0] in ("recipes", "benchmarks", "tests")}


def test_models_is_a_flat_folder_whose_files_import_each_other_by_name():
    assert [p for p in MODELS.iterdir() if p.is_dir() and p.name != "__pycache__"] == []
    wrong = []
    for path in MODELS.glob("*.py"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom) and node.level:
                flat = node.level == 1 and node.module and (MODELS / f"{node.module}.py").is_file()
                wrong += [] if flat else [f"{path.name}:{node.lineno}: {ast.unparse(node)}"]
    assert wrong == []


def test_model_cards_holds_templates_and_what_escapes_words_in_them():
    assert {path.name for path in (PACKAGE / "model_cards").rglob("*.py")} == {"__init__.py", "escape.py"}


def test_the_text_model_never_imports_the_image_model():
    reached, todo = set(), [MODELS / "modeling_fpmdlm.py"]
    while todo:
        path = todo.pop()
        reached.add(path.stem)
        names = {name.split(".")[2] for name in imported_modules(path) if name.startswith("fpmgm.models.")}
        todo += [MODELS / f"{name}.py" for name in names - reached if (MODELS / f"{name}.py").is_file()]
    assert {"fixed_point", "configuration_fpmdlm"} <= reached
    assert not {name for name in reached if "maskgit" in name}


# --- what Hugging Face's copier of remote code sees ------------------------------------------------------------------


@model_files
def test_the_remote_code_copier_reads_the_imports_that_python_does(path):
    # The copier searches the text with a regular expression, docstrings included, and follows nothing else.
    by_text = set(get_relative_imports(path))
    by_syntax = {name.split(".")[2] for name in imported_modules(path) if name.startswith("fpmgm.models.")}
    by_syntax &= {other.stem for other in MODELS.glob("*.py")}
    assert by_text == by_syntax
    assert {name for name in by_text if not (MODELS / f"{name}.py").is_file()} == set()


@model_files
def test_models_need_nothing_but_torch_and_transformers(path):
    # Loading a checkpoint elsewhere demands every package that these imports name, but for those in a `try`.
    others = {name.split(".")[0] for name in imported_modules(path)} - {"fpmgm"}
    assert others - set(sys.stdlib_module_names) <= {"torch", "transformers", "liger_kernel"}
    assert set(get_imports(path)) - set(sys.stdlib_module_names) <= {"torch", "transformers"}


# --- dependencies ----------------------------------------------------------------------------------------------------

WITHOUT_EXTRAS = """
import importlib.util
for name in ("datasets", "accelerate", "peft", "matplotlib", "lm_eval", "deepspeed", "PIL"):
    assert importlib.util.find_spec(name) is None, name
import sys
import fpmgm, fpmgm.command_line
assert not {f"fpmgm.{name}" for name in ("trainers", "data", "evaluation", "analysis")} & set(sys.modules)
assert {"trainers", "MGMTrainer", "generate"} - set(dir(fpmgm)) == {"generate"}
assert fpmgm.FPMDLMForMaskedDiffusion(fpmgm.FPMDLMConfig(
    vocab_size=11, mask_token_id=10, hidden_size=8, num_attention_heads=2, intermediate_size=8, conditioning_size=4,
    max_position_embeddings=4,
)).generate(budget=6, seed=0).shape == (1, 4)
for name, extra in (("trainers", "train"), ("data", "train"), ("evaluation.lm_eval", "eval")):
    try:
        importlib.import_module("fpmgm." + name)
    except ImportError as error:
        assert f"pip install 'fpmgm[{extra}]'" in str(error), error
    else:
        raise AssertionError(name + " imported")
try:
    fpmgm.MGMTrainer
except ImportError as error:
    assert "pip install 'fpmgm[train]'" in str(error), error
else:
    raise AssertionError("MGMTrainer imported")
"""


def test_the_core_works_where_the_extras_are_not_installed(tmp_path):
    # A folder of links to the installed packages, without those of the extras.
    extras = ("datasets", "accelerate", "peft", "matplotlib", "lm_eval", "deepspeed", "mpl_toolkits", "pil")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.lower().startswith((*extras, "__editable__")) and entry.suffix != ".pth":
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "fpmgm").symlink_to(PACKAGE)
    script = f"import sys; sys.path.append({str(tmp_path)!r})\n{WITHOUT_EXTRAS}"
    run_python("-I", "-S", "-c", script, cwd=tmp_path)


# --- habits ----------------------------------------------------------------------------------------------------------


@every_file
def test_nothing_outside_models_asks_for_our_classes(path):
    # A model loaded as remote code is another class: ask its `config.model_type`.
    if path.parent == MODELS:
        return
    asked = [node for name, node in called_names(path) if name in ("isinstance", "issubclass")]
    assert [ast.unparse(node) for node in asked if any(name in ast.unparse(node) for name in OURS)] == []


@every_file
def test_no_printing_and_no_pickle(path):
    calls = called_names(path)
    assert [node.lineno for name, node in calls if name in ("print", "pprint.pprint")] == []
    unsafe = []
    for name, node in calls:
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in ("torch.load", "load") and options.get("weights_only") != "True":
            unsafe.append(ast.unparse(node))
    assert unsafe == []
    assert not {name.split(".")[0] for name in imported_modules(path)} & {"pickle", "cloudpickle", "dill", "joblib"}


def opens_text_without_encoding(node: ast.Call) -> bool:
    name, keywords = node.func, {keyword.arg for keyword in node.keywords}
    called = name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", None)
    if called not in ("open", "read_text", "write_text") or "encoding" in keywords:
        return False
    if called == "open":  # of the built-in function the mode is the second argument, of a path the first
        owner = ast.unparse(name.value) if isinstance(name, ast.Attribute) else None
        mode = node.args[(0 if owner else 1) :][:1]
        return owner not in ("gzip", "os", "Image", "PILImage") and not (mode and "b" in ast.unparse(mode[0]))
    return True


@pytest.mark.parametrize("folder", ["fpmgm", "recipes", "benchmarks"])
def test_text_files_are_opened_in_utf_8_whatever_the_locale(folder):
    wrong = []
    for path in sorted((PACKAGE.parent / folder).rglob("*.py")):
        calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
        wrong += [f"{path.name}:{node.lineno}" for node in calls if opens_text_without_encoding(node)]
    assert wrong == []


@every_file
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    lengths = {function.name: lines_without_docstring(function) for function in functions(path)}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_FUNCTION_LINES} == {}


def public_definitions(path: Path) -> list[tuple[str, ast.AST]]:
    """Public functions and classes of a module, and the public methods of those classes."""
    found = []
    for node in parse(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append((node.name, node))
            methods = node.body if isinstance(node, ast.ClassDef) else []
            found += [
                (f"{node.name}.{method.name}", method)
                for method in methods
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
            ]
    return found


@every_file
def test_public_functions_classes_and_methods_have_docstrings(path):
    # PyTorch's `forward` and a callback's `on_…` are described by their class.
    described = ("forward", "on_")
    bare = [
        name
        for name, node in public_definitions(path)
        if ast.get_docstring(node) is None and not name.split(".")[-1].startswith(described)
    ]
    assert [name for name in bare if not name.endswith("__init__")] == []


@every_file
def test_public_functions_are_annotated(path):
    missing = []
    for name, node in public_definitions(path):
        if not isinstance(node, ast.FunctionDef) or "." in name or name in INTERFACES:
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        missing += [f"{name}({a.arg})" for a in arguments if a.annotation is None and a.arg not in UNANNOTATED]
        missing += [f"{name} -> ?"] if node.returns is None else []
    assert missing == []


def test_examples_in_docstrings_run():
    names = [info.name for info in pkgutil.walk_packages(fpmgm.__path__, "fpmgm.")]
    if importlib.util.find_spec("gradio") is None:
        names.remove("fpmgm.demo")
    assert {"fpmgm.models.budget", "fpmgm.trainers.mgm_trainer"} <= set(names)
    results = {name: doctest.testmod(importlib.import_module(name)) for name in names}
    assert {name: result.failed for name, result in results.items() if result.failed} == {}
    assert sum(result.attempted - getattr(result, "skipped", 0) for result in results.values()) > 10


def test_sub_packages_and_trainers_are_imported_when_they_are_used():  # not before: see `WITHOUT_EXTRAS`
    assert fpmgm.MGMTrainer is fpmgm.trainers.MGMTrainer
    assert set(fpmgm.TRAINERS) == {name for name in fpmgm.trainers.__all__ if name.endswith(("Trainer", "Config"))}
    assert fpmgm.evaluation.grid and fpmgm.data.pack and fpmgm.analysis.plot_frontier
    with pytest.raises(AttributeError, match="MGMTrainre"):
        _ = fpmgm.MGMTrainre
