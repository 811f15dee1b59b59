# SPDX-License-Identifier: Apache-2.0
"""Pushing to a hub and loading, where fpmgm is not installed, what was pushed or saved."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from .hub_server import HubServer
from .testing_utils import ROOT, run_python


PUSH = """
import json, sys
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, JanusVQVAEConfig

from fpmgm import FPMaskGITPipeline, FPMDLMForMaskedDiffusion, FPMDLMPipeline, MGMGenerationConfig
from fpmgm.data import train_tokenizer
from fpmgm.models.modeling_vqgan import VQGANModel
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig
from tests.testing_utils import tiny_image_model, tiny_image_tokenizer, tiny_model

folder = Path(sys.argv[1])
texts = ["the cat sat on the mat, and the other cat sat on the other mat"] * 4
tokenizer = train_tokenizer(texts, 270)
model = tiny_model(vocab_size=270, mask_token_id=269)
model.generation_config = MGMGenerationConfig(budget=18, allocation="fixed", reuse="full", temperature=0.5, top_k=7)

model.push_to_hub("tester/tiny")
tokenizer.push_to_hub("tester/tiny")
model.save_pretrained(folder / "local")
tokenizer.save_pretrained(folder / "local")
image_model = tiny_image_model(num_register_tokens=2)
image_model.save_pretrained(folder / "image")
vqgan = VQGANModel(JanusVQVAEConfig(
    num_patches=3, base_channels=32, channel_multiplier=[1, 1, 1], num_res_blocks=1, latent_channels=32, embed_dim=4,
    num_embeddings=7,
))
FPMaskGITPipeline(image_model, vqgan).save_pretrained(folder / "pipeline")
pipeline = FPMaskGITPipeline(image_model, tiny_image_tokenizer())
pipeline.save_pretrained(folder / "pushed", push_to_hub=True, repo_id="tester/pipeline", private=True)
pipeline.push_to_hub("tester/again")
for name in ("model/model-00001-of-00002.safetensors", "README.md", "examples/model.png"):
    HfApi().upload_file(path_or_fileobj=b"by hand", path_in_repo=name, repo_id="tester/again")
pipeline.push_to_hub("tester/again")
loaded = {
    "made": pipeline,
    "hub": FPMaskGITPipeline.from_pretrained("tester/pipeline", revision="main", token="dummy"),
    "local": FPMaskGITPipeline.from_pretrained(folder / "pipeline"),
}
drawn = {name: each([0, "LABEL_2"], budget=20, seed=4, output_type="pt") for name, each in loaded.items()}
assert type(AutoModel.from_pretrained("tester/tiny")) is FPMDLMForMaskedDiffusion

ids = torch.arange(16).view(2, 8) * 17 % 270
written = {
    "ids": ids,
    "logits": model(ids).logits.detach(),
    "with_arguments": model.generate(batch_size=3, budget=24, temperature=1.0, top_k=None, reuse="3sr", seed=5),
    "with_its_own_configuration": model.generate(batch_size=3, seed=6),
    "codes": image_model.generate(batch_size=3, budget=24, seed=5),
    **{f"{name} codes": out.codes for name, out in drawn.items()},
    **{f"{name} images": out.images for name, out in drawn.items()},
}
save_file(written, folder / "written.safetensors")
words = "the other cat – 😀"
(folder / "tokens.json").write_text(json.dumps([words, tokenizer(words)["input_ids"]]))

writer = FPMDLMPipeline(model, tokenizer, task="masked-generation", device="cpu")
writer.push_to_hub("tester/writer")
(folder / "texts.json").write_text(json.dumps(writer(["the<|mask|*3>", "a cat"], max_new_tokens=2, budget=20, seed=4)))

rows = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"][:8] for text in texts]})
common = dict(
    max_steps=3, learning_rate=1e-2, warmup_steps=0, per_device_train_batch_size=2, use_cpu=True, report_to="none",
    disable_tqdm=True, data_description="cats and mats",
)
arguments = MGMTrainingConfig(
    output_dir=str(folder / "run"), hub_model_id="tester/trained", save_strategy="no", **common
)
trainer = MGMTrainer(
    model=model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
)
trainer.train()
trainer.save_metrics("eval", trainer.evaluate())
trainer.push_to_hub()
save_file(trainer.ema.shadow, folder / "average.safetensors")

arguments.output_dir, arguments.hub_model_id = str(folder / "adapter"), "tester/adapter"
base = AutoModel.from_pretrained("tester/tiny")
trainer = MGMTrainer(
    model=base, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=LoraConfig(r=2)
)
trainer.train()
trainer.push_to_hub()
with trainer.ema.applied():
    save_file({"logits": trainer.model.eval()(ids).logits.detach()}, folder / "adapted.safetensors")

saving = MGMTrainingConfig(
    output_dir=str(folder / "saved"), hub_model_id="tester/saved", push_to_hub=True, hub_strategy="checkpoint",
    save_steps=3, **common
)
MGMTrainer(model=model, args=saving, train_dataset=rows).train()
"""

LOAD = """
import json, sys
from pathlib import Path


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fpmgm":
            raise ImportError(f"{name} is not installed")


sys.meta_path.insert(0, NotInstalled())

import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForMaskedLM, AutoTokenizer, JanusVQVAE, pipeline

folder = Path(sys.argv[1])
ids = load_file(folder / "written.safetensors")["ids"]
words, _ = json.loads((folder / "tokens.json").read_text())
remote = {"trust_remote_code": True}
tensors, facts = {}, {}


def record(name, model):
    tensors[f"{name}/logits"] = model(ids).logits.detach()
    tensors[f"{name}/with_arguments"] = model.generate(
        batch_size=3, budget=24, temperature=1.0, top_k=None, reuse="3sr", seed=5
    )
    tensors[f"{name}/with_its_own_configuration"] = model.generate(batch_size=3, seed=6)
    configuration = model.generation_config
    facts[name] = {
        "class": type(configuration).__name__,
        "module": type(model).__module__,
        **{key: getattr(configuration, key) for key in ("budget", "allocation", "reuse", "temperature", "top_k")},
    }


for source, place in {"hub": "tester/tiny", "local": str(folder / "local")}.items():
    for auto in (AutoModel, AutoModelForMaskedLM):
        model = auto.from_pretrained(place, **remote)
        record(f"{source} {auto.__name__}", model)
    model.save_pretrained(folder / f"again_{source}")
    record(f"{source} again", AutoModel.from_pretrained(folder / f"again_{source}", **remote))
    facts[f"{source} tokens"] = AutoTokenizer.from_pretrained(place, **remote)(words)["input_ids"]

tensors["codes"] = AutoModel.from_pretrained(folder / "image", **remote).generate(batch_size=3, budget=24, seed=5)
for source, place in {"hub": "tester/pipeline", "local": str(folder / "pipeline")}.items():
    model, tokenizer = (AutoModel.from_pretrained(place, subfolder=part, **remote) for part in ("model", "vq"))
    codes = model.generate(class_labels=[0, 2], budget=20, seed=4)
    tensors |= {f"{source} codes": codes, f"{source} pixels": tokenizer.decode(codes)}
    facts[f"{source} pipeline"] = model.config.id2label[2]
    if Version(transformers.__version__) >= Version("5.23"):  # older ones want torchvision for this
        processor = AutoImageProcessor.from_pretrained(place, subfolder="processor")
        assert processor.crop_size["height"] == 12
part = AutoModel.from_pretrained(folder / "pipeline" / "model", **remote)  # a checkpoint of its own
tensors["part codes"] = part.generate(class_labels=[0, 2], budget=20, seed=4)
plain = JanusVQVAE.from_pretrained(folder / "pipeline", subfolder="vq").eval()
tensors["plain pixels"] = plain.decode(codes).detach()

trained = AutoModelForMaskedLM.from_pretrained("tester/trained", **remote)
tensors |= {f"trained/{name}": tensor.clone() for name, tensor in trained.state_dict().items()}
tensors["adapter/logits"] = AutoModel.from_pretrained("tester/adapter", **remote).eval()(ids).logits.detach()
facts["trained tokens"] = AutoTokenizer.from_pretrained("tester/trained", **remote)(words)["input_ids"]
write = pipeline("masked-generation", model="tester/writer", device="cpu", **remote)
facts["texts"] = write(["the<|mask|*3>", "a cat"], max_new_tokens=2, budget=20, seed=4)
for released in json.loads(sys.argv[2]):
    facts[released] = AutoModel.from_pretrained(released, **remote).generate(batch_size=2, budget=24, seed=0).tolist()
assert not [name for name in sys.modules if name.split(".")[0] == "fpmgm"]
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "loaded.safetensors")
(folder / "facts.json").write_text(json.dumps(facts))
"""

KINDS = [f"{source} {how}" for source in ("hub", "local") for how in ("AutoModel", "AutoModelForMaskedLM", "again")]


RELEASED = [str(path.parent) for path in (ROOT / "model_cards").glob("*/results.json")]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The server after the push, and what was written before it and read after it, tensors and other facts."""
    folder = tmp_path_factory.mktemp("hub")
    with HubServer() as server:
        environment = {
            **{"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"},
            **{"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"},
            **{"HF_ENDPOINT": server.url, "HF_TOKEN": "dummy", "PYTHONIOENCODING": "utf-8"},
        }
        for name, script, options, own in (
            ("push", PUSH, [], {"PYTHONPATH": str(ROOT)}),
            ("load", LOAD, ["-I"], {}),  # -I: neither this folder nor PYTHONPATH
        ):
            command = [*options, "-c", script, str(folder), json.dumps(RELEASED)]
            run_python(*command, cwd=folder, **environment, HF_HOME=str(folder / f"home-{name}"), **own)
        files = {
            name: load_file(folder / f"{name}.safetensors") for name in ("written", "loaded", "average", "adapted")
        }
        notes = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("facts", "tokens", "texts")}
        yield SimpleNamespace(repositories=server.repositories, server=server, **files, **notes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_works_the_same_where_fpmgm_is_not_installed(hub, kind):
    for name in ("logits", "with_arguments", "with_its_own_configuration"):
        assert torch.equal(hub.loaded[f"{kind}/{name}"], hub.written[name])
    facts = dict(hub.facts[kind])
    assert facts.pop("module").startswith("transformers_modules.")
    assert facts == {
        "class": "MGMGenerationConfig", "budget": 18, "allocation": "fixed", "reuse": "full", "temperature": 0.5,
        "top_k": 7,
    }  # fmt: skip


@pytest.mark.parametrize("released", RELEASED)
def test_a_released_checkpoint_writes_what_it_wrote_where_fpmgm_is_not_installed(hub, released):
    expected = json.loads((Path(released) / "results.json").read_text(encoding="utf-8"))["tokens_of_budget_24"]
    assert hub.facts[released] == expected


def test_a_pushed_pipeline_writes_the_same_where_fpmgm_is_not_installed(hub):
    assert hub.facts["texts"] == hub.texts
    assert all(text["generated_text"] and 0 < text["block_evaluations"] <= 20 for (text,) in hub.texts)


def test_a_pushed_pipeline_draws_the_same(hub):
    assert torch.equal(hub.written["hub codes"], hub.written["made codes"])
    assert torch.equal(hub.written["hub images"], hub.written["made images"])
    request, files = hub.server.requests["tester/pipeline"], hub.repositories["tester/pipeline"]
    assert hub.server.commits["tester/pipeline"] == 1
    assert request.get("visibility") == "private" or request["private"]  # as older clients say it
    card = ModelCard(files["README.md"].decode())
    assert 'FPMaskGITPipeline.from_pretrained("tester/pipeline")' in card.text
    assert card.data.library_name == "fpmgm"
    assert files["modeling_xqgan.py"] == files["vq/modeling_xqgan.py"]  # the code is found from both places


def test_a_pipeline_pushed_again_replaces_its_parts_and_keeps_what_was_written_by_hand(hub):
    first, again = (dict(hub.repositories[f"tester/{name}"]) for name in ("pipeline", "again"))
    assert again.pop("README.md") == again.pop("examples/model.png") == b"by hand"
    first.pop("README.md")
    assert again == first


@pytest.mark.parametrize("source", ["hub", "local"])
def test_the_parts_of_a_pipeline_work_the_same_where_fpmgm_is_not_installed(hub, source):
    assert torch.equal(hub.loaded["codes"], hub.written["codes"])  # of a model that is no part
    assert torch.equal(hub.loaded[f"{source} codes"], hub.written[f"{source} codes"])
    images = ((hub.loaded[f"{source} pixels"] + 1) * 127.5).round().byte()
    assert torch.equal(images, hub.written[f"{source} images"])
    assert len(images.unique()) > 20  # something that could differ
    assert hub.facts[f"{source} pipeline"] == "LABEL_2"


def test_a_part_of_a_pipeline_is_a_checkpoint_of_its_own(hub):
    assert torch.equal(hub.loaded["part codes"], hub.loaded["local codes"])
    torch.testing.assert_close(hub.loaded["plain pixels"].clamp(-1, 1), hub.loaded["local pixels"])


def test_the_tokenizer_travels_along(hub):
    assert [hub.facts[f"{name} tokens"] for name in ("hub", "local", "trained")] == [hub.tokens[1]] * 3


def test_the_trainer_pushes_the_average_and_its_card(hub):
    for name, tensor in hub.average.items():
        assert torch.equal(hub.loaded[f"trained/{name}"], tensor)
    files = hub.repositories["tester/trained"]
    card = ModelCard(files["README.md"].decode())
    assert "cats and mats" in card.text
    assert 'from_pretrained("tester/trained"' in card.text
    loss = json.loads(files["eval_results.json"])["eval_loss"]
    assert f"| eval_loss | {loss:.5g} |" in card.text and card.data.pipeline_tag == "fill-mask"
    assert "fpmgm" in card.data.tags


def test_a_pushed_adapter_is_loaded_with_the_model_that_its_card_names(hub):
    torch.testing.assert_close(hub.loaded["adapter/logits"], hub.adapted["logits"])
    assert (hub.adapted["logits"] - hub.written["logits"]).abs().max() > 1e-3
    files = hub.repositories["tester/adapter"]
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(files)
    assert "model.safetensors" not in files
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", "tester/tiny")
    assert 'from_pretrained("tester/adapter"' in card.text and "cats and mats" in card.text


def test_a_pushed_checkpoint_is_whole(hub):
    files = hub.repositories["tester/saved"]
    pushed = {name.removeprefix("last-checkpoint/"): data for name, data in files.items() if "/" in name}
    listed = json.loads(pushed.pop("checkpoint_files.json"))
    assert {"model.safetensors", "ema.safetensors", "optimizer.pt", "trainer_state.json"} < listed.keys()
    assert {name: len(data) for name, data in pushed.items()} == listed


def test_no_code_but_the_models_folder_is_pushed(hub):
    code = {name for name in hub.repositories["tester/tiny"] if name.endswith(".py")}
    models = {path.name for path in (ROOT / "fpmgm/models").glob("*.py")}
    assert "modeling_fpmdlm.py" in code
    assert code <= models
    assert code == {name for name in hub.repositories["tester/trained"] if name.endswith(".py")}
    assert {Path(name).name for name in hub.repositories["tester/pipeline"] if name.endswith(".py")} <= models
