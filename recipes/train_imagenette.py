# SPDX-License-Identifier: Apache-2.0
"""Train a MaskGIT or an FP-MaskGIT on codes of pictures: ImageNette as in the paper, or any folder of class folders.

    accelerate launch recipes/train_imagenette.py --config recipes/configs/fp_maskgit_imagenette.yaml
        --image_dir imagenette2 --tokenizer XQGAN-4096.pt
    python recipes/train_imagenette.py --config recipes/configs/fp_maskgit_small.yaml --codes_dir codes/mine
    python recipes/train_imagenette.py --model_name_or_path outputs/maskgit --use_peft --codes_dir codes/mine
        --output_dir outputs/adapter --max_steps 500 --learning_rate 1e-3 --warmup_steps 50

With pictures, `codes_dir` is prepared first, as by prepare_images.py. Codebook, grid and classes of the model follow
from the codes. The same command goes on from where it was. What is exported to `output_dir` holds the EMA weights.
"""

import shlex
from dataclasses import asdict, dataclass, field

from transformers import set_seed

from fpmgm import FPMaskGITConfig, FPMaskGITModel
from fpmgm.command_line import model_arguments, parse_arguments
from fpmgm.trainers import MGMTrainer, MGMTrainingConfig
from fpmgm.trainers.lock import hold_folder
from fpmgm.trainers.peft import LoraArguments
from image_data import (
    CodesArguments,
    EncodingArguments,
    PictureArguments,
    check_model_reads,
    describe_codes,
    describe_rows,
    encode_pictures,
    keep_preparation,
    load_code_rows,
)
from narration import say
from train_and_export import (
    OptionalStartArguments,
    Rows,
    check_adapter,
    check_architecture,
    load_model,
    make_trainer,
    run_checkpoint,
    train_and_export,
)


@dataclass
class MadeCodesArguments(CodesArguments):
    """The codes to train on, which are made first where pictures are given."""

    codes_dir: str | None = field(default=None, metadata={"help": "Folder of codes, there already or to be made."})


ModelArguments = model_arguments(FPMaskGITConfig, exclude=("codebook_size", "grid_size", "num_classes"))
TYPES = (
    OptionalStartArguments,
    MadeCodesArguments,
    PictureArguments,
    EncodingArguments,
    ModelArguments,
    LoraArguments,
    MGMTrainingConfig,
)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Prepare, train, evaluate, export; returns the metrics of the exported weights."""
    arguments = parse_arguments(TYPES, __doc__, argv)
    start, codes, _, _, _, lora, args = arguments
    check_adapter(lora, start)
    if codes.codes_dir is None:
        raise ValueError("`codes_dir` is needed: give the folder that holds the codes, or where they are to be made.")
    with hold_folder(args.output_dir, take=args.should_save):
        return train(*arguments)


def train(start, codes, pictures, encoding, architecture, lora, args) -> dict[str, float]:
    """[`main`], in a folder that is this run's alone."""
    checkpoint = run_checkpoint(args)
    with args.main_process_first(desc="data"):
        if pictures.image_dir is not None or pictures.dataset_name is not None:
            encode_pictures(pictures, encoding, codes.codes_dir, args.device)
        train_rows, eval_rows, preparation = load_code_rows(codes)
    if encoding.augment != preparation.get("augment", encoding.augment):  # the codes are there, without the pictures
        say(
            f"codes: those in {codes.codes_dir} were made with `augment`={preparation['augment']!r}, which stays; "
            f"{encoding.augment!r} is for pictures that are given by `image_dir` or `dataset_name`"
        )

    set_seed(args.seed)  # before the weights are drawn
    model = make_model(architecture, start.model_name_or_path, preparation)
    keep_preparation(codes, args)
    rows = Rows(train_rows, eval_rows, None, describe_codes(preparation), describe_rows(codes, preparation))
    trainer = make_trainer(MGMTrainer, rows, start, lora, args, model=model)
    metrics = train_and_export(trainer, checkpoint, codes.words)
    if trainer.is_world_process_zero():
        print(f"draw with: {sampling_command(args.output_dir, preparation)}")
    return metrics


def sampling_command(model: str, preparation: dict) -> str:
    """The command that draws a picture of the first class."""
    words = ["python", "recipes/sample_images.py", "--model", model, "--class_labels", preparation["classes"][0]]
    words += ["--tokenizer", preparation.get("tokenizer", "TOKENIZER")]  # older preparations do not tell
    if preparation.get("tokenizer_subfolder"):
        words += ["--tokenizer_subfolder", preparation["tokenizer_subfolder"]]
    return shlex.join(words)


def make_model(architecture: ModelArguments, model_name: str | None, preparation: dict) -> FPMaskGITModel:
    """A fresh model of the codes that `preparation` describes, or the one to go on from, if it reads these."""
    if model_name is None:
        return FPMaskGITModel(
            FPMaskGITConfig(
                **asdict(architecture),
                codebook_size=preparation["codebook_size"],
                grid_size=preparation["grid_size"],
                id2label=dict(enumerate(preparation["classes"])),
            )
        )
    model = load_model(model_name)
    check_model_reads(model.config, model_name, preparation)
    check_architecture(architecture, model.config, model_name)
    return model


if __name__ == "__main__":
    main()
