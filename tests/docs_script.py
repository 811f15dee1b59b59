# SPDX-License-Identifier: Apache-2.0
"""Runs the Python of documents as a reader would, page by page: `python -m tests.docs_script PAGES.json ERRORS.json`.

A reader has what a page speaks of: trained models under the names that it uses, a text, a hub. Here these are tiny
ones in the folder that it runs in. Numbers of steps, samples and widths are made small. What it writes is a traceback
for each page that failed.
"""

import copy
import json
import re
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from fpmgm import FPMaskGITPipeline
from fpmgm.data import load_text, pack, train_tokenizer
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig
from tests.conversion.test_maskgit import original_state
from tests.conversion.test_mdlm import write_folder
from tests.testing_utils import tiny_image_model, tiny_image_tokenizer, tiny_model


TEXT = "The function returns the number of rows. The cat sat on the mat, and the other cat sat on the other mat.\n"
LENGTH = 64

# What is made smaller, wherever it stands.
SMALLER = {
    r"\bmax_steps=[\d_]+": "max_steps=2",
    r"\bwarmup_steps=[\d_]+": "warmup_steps=1",
    r"\bnum_iterations=6": "num_iterations=1",
    r"\bMGMTrainingConfig\(": "MGMTrainingConfig(eval_num_draws=1, ",
    r"\b(hidden_size|intermediate_size)=\d+": r"\1=16",
    r"(train_tokenizer\(.*?vocab_size=)\d+": r"\g<1>300",
    r"\bnum_attention_heads=\d+": "num_attention_heads=2",
    r"\bnum_samples=\d+": "num_samples=2",
    r"\bbudget=(384|768)": "budget=48",
    r"Config\(output_dir=": r"Config(use_cpu=True, report_to='none', disable_tqdm=True, output_dir=",
    r"(ConversionConfig\(.*?)output_dir": r"\1max_steps=2, output_dir",
    r"FPMaskGITConfig\(id2label=": "FPMaskGITConfig(hidden_size=16, num_attention_heads=2, id2label=",
    r'"ImageNet_384_large.pth"': '"ImageNet_384_large.pth", {"heads": 2}',
    r"class_labels=\[207, 250\]": "class_labels=[0, 1]",
    r'"vq_ds16_c2i.pt"': '"vq"',
}

# What needs a download that no folder stands in for, or serves a page: it must compile.
NOT_RUN = ("lm_eval.simple_evaluate", "InceptionExtractor()", "from fpmgm.demo")


def make_world() -> None:
    """The files and folders that pages name."""
    Path("my_text.txt").write_text(TEXT * 200, encoding="utf-8")
    tokenizer = train_tokenizer([TEXT] * 4, 300)
    ids = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id}
    mdlm = tiny_model(
        **ids, num_pre_layers=12, num_fixed_point_layers=0, num_post_layers=0, intermediate_size=64,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    for name in ("quickstart/fp_mdlm", "kuleshov-group/mdlm-owt", "gpt2-large"):
        Path(name).mkdir(parents=True)
        tokenizer.save_pretrained(name)
    tiny_model(**ids, max_position_embeddings=LENGTH, input_injection="diagonal", scale=0.05).save_pretrained(
        "quickstart/fp_mdlm"
    )
    write_folder(Path("kuleshov-group/mdlm-owt"), mdlm)
    judge = GPT2Config(vocab_size=len(tokenizer), n_positions=1024, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(judge).save_pretrained("gpt2-large")
    torch.save({"model_state_dict": original_state(depth=24)}, "ImageNet_384_large.pth")
    vq = tiny_image_tokenizer(image_size=16)
    vq.save_pretrained("vq")
    Path("model_cards").symlink_to(Path(__file__).parents[1] / "model_cards")
    labels = {0: "tench", 1: "springer", 2: "church", 3: "parachute"}
    model = tiny_image_model(num_classes=4, grid_size=4, id2label=labels)
    FPMaskGITPipeline(model, vq).save_pretrained("org/fp-maskgit")


def made_names() -> dict:
    """Names that a page may use without saying where they come from."""
    model, tokenizer = (
        AutoModel.from_pretrained("quickstart/fp_mdlm"),
        AutoTokenizer.from_pretrained("quickstart/fp_mdlm"),
    )
    blocks = pack(load_text(text_files=["my_text.txt"]), tokenizer, length=LENGTH)
    prompt = torch.full((3, LENGTH), tokenizer.mask_token_id)
    prompt[:, :3] = 0
    args = MGMTrainingConfig(
        output_dir="outputs/made", max_steps=1, hub_model_id="me/fp-mdlm", use_cpu=True, report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    return {
        "model": model,
        "tokenizer": tokenizer,
        "blocks": blocks,
        "held_out": blocks.select(range(2)),
        "texts": [TEXT, TEXT.upper()],
        "input_ids": torch.tensor(blocks[:2]["input_ids"]),
        "prompt": prompt,
        "pairs": [([5, 6], [7, 8, 9]), ([6], [5, 5])],
        "args": args,
        "trainer": MGMTrainer(model=copy.deepcopy(model), args=args, train_dataset=blocks, processing_class=tokenizer),
        "demo": SimpleNamespace(update=lambda text: None),
        "given": torch.full((1, 9), 6),  # codes of the image model: 6 is its mask
        "photo": Image.new("RGB", (20, 16), (200, 90, 30)),
        "mask": Image.new("L", (20, 16), 255),
        "grid": torch.ones(4, 4, dtype=torch.bool),
        "pixel_values": torch.zeros(1, 3, 16, 16),
    }


def run_page(blocks: list[str], page: str) -> None:
    """Run the blocks of one page, one after the other, in one namespace."""
    names = made_names()
    for block in blocks:
        compile(block, page, "exec")
        if any(words in block for words in NOT_RUN):
            continue
        for pattern, smaller in SMALLER.items():
            block = re.sub(pattern, smaller, block)
        exec(compile(block, page, "exec"), names)


def main(pages: dict[str, list[str]]) -> dict[str, str]:
    """The traceback of each page that failed."""
    make_world()
    errors = {}
    for page, blocks in pages.items():
        try:
            run_page(blocks, page)
        except Exception:
            errors[page] = traceback.format_exc()
    return errors


if __name__ == "__main__":
    found = main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
