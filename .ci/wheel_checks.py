# SPDX-License-Identifier: Apache-2.0
"""What an extra promises, tried where nothing but the wheel and that extra is installed: `wheel_checks.py EXTRA`."""

import sys
import tempfile
from importlib.metadata import entry_points, metadata
from pathlib import Path

import torch
from transformers import AutoModel

import fpmgm


FOLDER = Path(tempfile.mkdtemp())


def tiny_model() -> fpmgm.FPMDLMForMaskedDiffusion:
    config = fpmgm.FPMDLMConfig(
        vocab_size=11, mask_token_id=10, hidden_size=16, num_attention_heads=2, intermediate_size=32,
        conditioning_size=8, max_position_embeddings=8,
    )  # fmt: skip
    return fpmgm.FPMDLMForMaskedDiffusion(config).eval()


def core() -> None:
    """A model samples, is saved with its code and loaded; what is not installed is named."""
    model = tiny_model()
    tokens = model.generate(budget=12, seed=0)
    model.save_pretrained(FOLDER / "model")
    assert {"block_fpmdlm.py", "modeling_fpmdlm.py"} <= {path.name for path in (FOLDER / "model").iterdir()}
    assert torch.equal(AutoModel.from_pretrained(FOLDER / "model").generate(budget=12, seed=0), tokens)
    assert metadata("fpmgm")["License-Expression"] == "Apache-2.0"
    assert (Path(fpmgm.__file__).parent / "py.typed").is_file()
    try:
        fpmgm.MGMTrainer  # noqa: B018
    except ImportError as error:
        assert "pip install 'fpmgm[train]'" in str(error), error


def train() -> None:
    """Text becomes blocks, a model trains on them, an adapter too, and a card is written."""
    from peft import LoraConfig

    from fpmgm.data import load_text, pack, train_tokenizer
    from fpmgm.trainers import MGMTrainer, MGMTrainingConfig

    (FOLDER / "text.txt").write_text("The cat sat on the mat, and the other cat on the other mat.\n" * 50)
    text = load_text(text_files=[FOLDER / "text.txt"])
    tokenizer = train_tokenizer(text["text"], 270)
    blocks = pack(text, tokenizer, length=8)
    config = tiny_model().config
    config.vocab_size, config.mask_token_id = len(tokenizer), tokenizer.mask_token_id
    for peft_config in (None, LoraConfig(r=2)):
        args = MGMTrainingConfig(
            output_dir=str(FOLDER / f"run{peft_config is None}"), max_steps=2, warmup_steps=1, use_cpu=True,
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        model = fpmgm.FPMDLMForMaskedDiffusion(config)
        model.save_pretrained(FOLDER / "base")
        model = AutoModel.from_pretrained(FOLDER / "base")
        trainer = MGMTrainer(
            model=model, args=args, train_dataset=blocks, processing_class=tokenizer, peft_config=peft_config
        )
        trainer.train()
        trainer.save_model()
        assert (Path(args.output_dir) / "README.md").is_file()


def eval() -> None:
    """Texts are judged without a download, a picture is drawn, lm-eval's command is there."""
    from fpmgm.analysis import plot_frontier
    from fpmgm.evaluation import NGramJudge, generative_perplexity, repetition_rate, unigram_entropy
    from fpmgm.evaluation.lm_eval import MGMLM

    assert unigram_entropy([[1, 2, 3]]) > 0 and repetition_rate([[1, 2, 3, 4, 5]]) == 0
    assert NGramJudge(torch.arange(40).view(4, 10) % 7, vocab_size=11)
    assert callable(generative_perplexity) and callable(plot_frontier) and issubclass(MGMLM, object)
    [command] = [script for script in entry_points(group="console_scripts") if script.name == "fpmgm-eval"]
    assert callable(command.load())


def images() -> None:
    """A pipeline draws pictures."""
    from fpmgm.models.modeling_xqgan import XQGANConfig, XQGANModel

    tokenizer = XQGANModel(
        XQGANConfig(
            image_size=12, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, codebook_size=7, codebook_dim=4,
        )
    ).eval()  # fmt: skip
    config = fpmgm.FPMaskGITConfig(
        codebook_size=7, num_classes=3, grid_size=3, hidden_size=16, num_attention_heads=2, intermediate_size=24,
        num_pre_layers=1, num_post_layers=1,
    )  # fmt: skip
    pipeline = fpmgm.FPMaskGITPipeline(fpmgm.FPMaskGITModel(config).eval(), tokenizer)
    pictures = pipeline([0, 1], num_steps=3, seed=0).images
    assert fpmgm.make_grid(pictures).size[0] > 0


def demo() -> None:
    """The demonstration builds for a model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from fpmgm.demo import build, reveal

    tiny_model().save_pretrained(FOLDER / "model")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(10)} | {"<mask>": 10}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, mask_token="<mask>").save_pretrained(FOLDER / "model")
    frames = list(reveal(str(FOLDER / "model"), "", None, budget=12, seed=0))
    assert "fp-masked" in frames[0][0] and "fp-masked" not in frames[-1][0]
    assert build([str(FOLDER / "model")])


def liger() -> None:
    """The head takes the kernel, and its losses are the plain ones: here in Triton's interpreter, without a GPU."""
    from fpmgm.models.head import cross_entropy, fused_cross_entropy

    assert fused_cross_entropy("cpu") is not None
    logits, labels = torch.randn(5, 11, requires_grad=True), torch.arange(5)
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none").detach()
    losses, _ = cross_entropy(logits + 0, labels, overwrite=True)
    torch.testing.assert_close(losses.detach(), plain)


def distributed() -> None:
    """DeepSpeed loads, and accelerate makes an optimizer's plan of it."""
    from accelerate.utils import DeepSpeedPlugin

    assert DeepSpeedPlugin(zero_stage=2).zero_stage == 2


def docs() -> None:
    """The site builds, without a warning."""
    from mkdocs.__main__ import cli

    site = Path(__file__).parents[1] / "mkdocs.yml"
    cli(["build", "--strict", "--config-file", str(site), "--site-dir", str(FOLDER)], standalone_mode=False)
    assert (FOLDER / "index.html").is_file()


if __name__ == "__main__":
    {f.__name__: f for f in (core, train, eval, images, demo, liger, distributed, docs)}[sys.argv[1]]()
    print(f"{sys.argv[1]}: fpmgm {fpmgm.__version__}, torch {torch.__version__}")  # noqa: T201
