# SPDX-License-Identifier: Apache-2.0
"""From class names to pictures: an image model, its tokenizer and its image processor in one folder or repository.

Shapes: B pictures, L codes of a picture, H = W grid size, S image size.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers.utils import ModelOutput

from . import model_cards
from .conversion.checkpoint import read_json, reading
from .conversion.image_tokenizers import load_image_tokenizer
from .conversion.pretrained import load_pretrained
from .conversion.sources import SAFETENSORS, fetch
from .model_cards.escape import PLACES, one_line
from .models.arguments import check_whole, one_of
from .models.image_processing import make_image_processor
from .models.image_tokenizer import to_uint8
from .models.modeling_fpmaskgit import FPMaskGITModel
from .pictures import to_pil
from .pipeline_inputs import as_list, class_ids, entries, pictures, wanted_codes


INDEX = "model_index.json"
PARTS = {"model": "model", "vq": "tokenizer", "processor": "processor"}  # sub-folder → attribute
CARD = Path(model_cards.__file__).with_name("pipeline.md")
MOST_ZOOM = 8  # times a picture's size to which a processor may resize before it crops
OUTPUT_TYPE = one_of(("pil", "pt", "np"))


@dataclass
class FPMaskGITPipelineOutput(ModelOutput):
    """Output of [`FPMaskGITPipeline`].

    Args:
        images: B pictures: a list of `PIL.Image.Image`; `"pt"`: `torch.Tensor` (B, 3, S, S), `"np"`: `numpy.ndarray`
            (B, S, S, 3), both of the same 8-bit values.
        codes (`torch.LongTensor`): (B, L), row by row.
        class_labels (`torch.LongTensor`): (B,) ids, or `None` without classes.
        block_evaluations (`int`): Block evaluations of the most costly picture; never above the budget.
        guidance_evaluations (`int`): Further ones of its run without class, for guidance.
        num_steps (`int`): Denoising steps.
    """

    images: Any = None
    codes: torch.LongTensor | None = None
    class_labels: torch.LongTensor | None = None
    block_evaluations: int | None = None
    guidance_evaluations: int | None = None
    num_steps: int | None = None


class FPMaskGITPipeline:
    """Draws pictures of classes, and parts of pictures.

    Args:
        model ([`FPMaskGITModel`]): Writes codes. The names of its classes are `model.config.id2label`.
        tokenizer ([`VQGANModel`] or [`XQGANModel`]): Makes codes of pictures and pictures of codes.
        processor (`CLIPImageProcessorPil`, *optional*): Makes pixels of pictures. `None`:
            `make_image_processor(tokenizer.image_size)`.

    Raises:
        `ValueError`: if these do not fit together: another codebook size, grid or image size.
        `ImportError`: without Pillow.

    Example:

    ```python
    >>> from fpmgm import FPMaskGITConfig, FPMaskGITModel, FPMaskGITPipeline
    >>> from fpmgm.models.modeling_xqgan import XQGANConfig, XQGANModel
    >>> tokenizer = XQGANModel(XQGANConfig(image_size=16, patch_size=4, hidden_size=8, num_hidden_layers=1,
    ...                                    num_attention_heads=2, intermediate_size=16, codebook_size=32))
    >>> config = FPMaskGITConfig(codebook_size=32, grid_size=4, id2label={0: "tench", 1: "church"}, hidden_size=8,
    ...                          num_attention_heads=2, intermediate_size=16, num_pre_layers=1, num_post_layers=1)
    >>> pipeline = FPMaskGITPipeline(FPMaskGITModel(config), tokenizer)
    >>> out = pipeline(["tench", 1], num_images_per_class=2, budget=24, seed=0)
    >>> out.images[0].size, out.codes.shape, out.class_labels.tolist(), out.block_evaluations
    ((16, 16), torch.Size([4, 16]), [0, 0, 1, 1], 24)

    ```
    """

    def __init__(self, model, tokenizer, processor=None):
        processor = make_image_processor(tokenizer.image_size) if processor is None else processor
        check_parts(model, tokenizer, processor)
        self.model, self.tokenizer, self.processor = model.eval(), tokenizer.eval(), processor

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Iterable[int | str] | None = None,
        num_images_per_class: int = 1,
        *,
        image: Any = None,
        mask: Any = None,
        seed: int | list[int] | None = None,
        output_type: str = "pil",
        decode_batch_size: int = 16,
        **kwargs: Any,
    ) -> FPMaskGITPipelineOutput:
        """Draw pictures; with `image` and `mask`, the masked part of it anew.

        Args:
            class_labels (`int`, `str` or a list of them, *optional*): Ids or names of classes; of a name with synonyms
                ("tench, Tinca tinca") each. `None`: no class.
            num_images_per_class (`int`, defaults to 1): Pictures for each entry, one after another.
            image (*optional*): Pictures to keep a part of, one for all entries or one for each: `PIL.Image.Image`,
                8-bit array (H, W, 3) or tensor (3, H, W), or a list of these; what is transparent lies on white. The
                processor resizes and crops them. No address is fetched, no file opened. `None`: everything is drawn.
            mask (*optional*): What of `image` to draw anew: a `PIL.Image.Image` of its size, white there, or a tensor
                or array, true there, of (H, W) codes or (S, S) pixels; a list holds one for each picture. A code is
                drawn anew if any of its pixels is.
            seed (`int` or `list[int]`, *optional*): Picture k draws from the stream (seed, k); or one seed for each.
                `None`: PyTorch's global generator.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"pt"` or `"np"`: see [`FPMaskGITPipelineOutput`].
            decode_batch_size (`int`, defaults to 16): Pictures that the tokenizer takes at a time, to bound memory.
            kwargs: For [`~MGMGenerationMixin.generate`]: `budget`, `guidance_scale`, `reuse`, `order`, `temperature`,
                `callback`, `progress_bar`, … Defaults are those of the model's `generation_config`.

        Returns:
            [`FPMaskGITPipelineOutput`].

        Raises:
            `ValueError`: names the argument, its value, what is allowed and what to do.
        """
        OUTPUT_TYPE.check("output_type", output_type)
        check_whole("num_images_per_class", num_images_per_class, minimum=1, unit="pictures")
        check_whole("decode_batch_size", decode_batch_size, minimum=1, unit="pictures")
        classes = class_ids(class_labels, self.model.config.id2label)
        codes = None if image is None and mask is None else self._masked_codes(image, mask, decode_batch_size)
        classes, codes = entries(classes, codes, num_images_per_class)
        out = self.model.generate(
            input_ids=codes,
            batch_size=num_images_per_class if classes is None and codes is None else None,
            class_labels=classes,
            seed=seed,
            return_dict_in_generate=True,
            **kwargs,
        )
        return FPMaskGITPipelineOutput(
            images=self.decode(out.sequences, output_type, decode_batch_size),
            codes=out.sequences,
            class_labels=None if classes is None else torch.as_tensor(classes),
            block_evaluations=out.block_evaluations,
            guidance_evaluations=out.guidance_evaluations,
            num_steps=out.num_steps,
        )

    @torch.no_grad()
    def encode(self, images: Any, batch_size: int = 16) -> torch.LongTensor:
        """(B, L) codes of pictures, resized and cropped by the processor, `batch_size` at a time.

        Args:
            images: As `image` of a call.
            batch_size (`int`, defaults to 16): Pictures at a time.
        """
        check_whole("batch_size", batch_size, minimum=1, unit="pictures")
        images = pictures(images, "images")
        parts = (images[i : i + batch_size] for i in range(0, len(images), batch_size))
        pixels = (self.processor(part, return_tensors="pt")["pixel_values"] for part in parts)
        device, dtype = self.tokenizer.device, self.tokenizer.dtype
        return torch.cat([self.tokenizer.encode(part.to(device, dtype)).flatten(1) for part in pixels])

    @torch.no_grad()
    def decode(self, codes: torch.LongTensor, output_type: str = "pil", batch_size: int = 16) -> Any:
        """Pictures of (B, L) codes, `batch_size` at a time; `output_type` as in [`FPMaskGITPipelineOutput`]."""
        OUTPUT_TYPE.check("output_type", output_type)
        parts = codes.to(self.tokenizer.device).split(batch_size)
        pixels = torch.cat([to_uint8(self.tokenizer.decode(part)).cpu() for part in parts])  # (B, 3, S, S)
        if output_type == "pil":
            return to_pil(pixels)
        return pixels.contiguous() if output_type == "pt" else pixels.permute(0, 2, 3, 1).contiguous().numpy()

    def _masked_codes(self, image, mask, batch_size: int) -> torch.LongTensor:
        """(E, L) codes of the E pictures, the mask id where they are to be drawn anew."""
        if image is None or mask is None:
            missing = "image" if image is None else "mask"
            raise ValueError(f"`{missing}`=None: give `image` and, for what to draw anew, `mask`, or neither.")
        images = pictures(image)
        masks = as_list(mask)
        masks = masks * len(images) if len(masks) == 1 else masks
        if len(masks) != len(images):
            raise ValueError(f"`mask` lists {len(masks)} masks for {len(images)} pictures: give one for all or each.")
        pairs = zip(masks, images, strict=True)
        wanted = torch.stack([wanted_codes(*pair, self.tokenizer, self.processor) for pair in pairs])  # (E, L)
        codes = self.encode(images, batch_size)
        return codes.masked_fill(wanted.to(codes.device), self.model.config.mask_token_id)

    # --- folders and repositories ------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
    ) -> "FPMaskGITPipeline":
        """Load what `save_pretrained` or `push_to_hub` wrote.

        Args:
            path_or_repo (`str` or `Path`): Folder or hub repository.
            revision (`str`, *optional*): Branch, tag or commit. `None`: `main`.
            token (`str` or `bool`, *optional*): For private repositories. `None`: that of `hf auth login`.
            cache_dir (`str` or `Path`, *optional*): Where downloads are kept. `None`: the hub's cache.
            local_files_only (`bool`, defaults to `False`): Whether to take downloaded files only.
            dtype (`torch.dtype`, *optional*): Of the model's weights. `None`: as saved. The tokenizer keeps its own:
                its codes depend on rounding.
            device_map (*optional*): Where weights are loaded to, as for any model (needs accelerate). `None`: the CPU.

        Raises:
            `ValueError`: for a path that does not exist, a folder or repository of something else, damaged files,
                weights that are missing or not finite, and parts that do not fit together.
        """
        files = [INDEX, *(f"{part}/{name}" for part in PARTS for name in ("*.json", *SAFETENSORS))]
        options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = fetch(path_or_repo, files, revision=revision, **options)
        if not (folder / INDEX).is_file():
            raise ValueError(
                f"`path_or_repo`={str(path_or_repo)!r} has no {INDEX}: give what `FPMaskGITPipeline.save_pretrained` "
                "wrote, or make a pipeline of a model and a tokenizer, `FPMaskGITPipeline(model, tokenizer)`."
            )
        from transformers import CLIPImageProcessorPil

        read_json(folder / INDEX)
        placed = {} if device_map is None else {"device_map": device_map}
        of_model = placed if dtype is None else {**placed, "dtype": dtype}
        model = load_pretrained(FPMaskGITModel, folder / "model", **of_model)
        tokenizer = load_image_tokenizer(folder / "vq", **placed)
        with reading(folder / "processor", "an image processor"):
            processor = CLIPImageProcessorPil.from_pretrained(folder / "processor", local_files_only=True)
        with reading(folder, "a pipeline", "its parts do not fit together"):
            return cls(model, tokenizer, processor)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> None:
        """Write `model/`, `vq/`, `processor/`, `model_index.json`, a card `README.md`, and the code that loads the
        first two where fpmgm is not installed.

        Args:
            save_directory (`str` or `Path`): Folder; files of these names in it are replaced.
            push_to_hub (`bool`, defaults to `False`): Whether to push as well.
            repo_id (`str`, *optional*): Where to. `None`: the name of the folder.
            private, token (*optional*): See [`~FPMaskGITPipeline.push_to_hub`].
        """
        folder = Path(save_directory)
        self._write(folder, name=repo_id or folder.resolve().name)
        if push_to_hub:
            self.push_to_hub(repo_id or folder.resolve().name, private=private, token=token)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload FPMaskGITPipeline",
        create_pr: bool = False,
    ) -> str:
        """Upload everything in one commit, which takes away what an earlier one left in the parts' folders.

        A card that the repository has is kept.

        Args:
            repo_id (`str`): Repository; it is made where it does not exist.
            private (`bool`, *optional*): Whether a new repository is. `None`: the default of its owner.
            token (`str` or `bool`, *optional*): Who uploads. `None`: that of `hf auth login`.
            commit_message (`str`): First line of the commit.
            create_pr (`bool`, defaults to `False`): Whether to open a pull request instead.

        Returns:
            `str`: Address of the commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        has_card = api.file_exists(repo_id, "README.md")
        with TemporaryDirectory() as folder:
            self._write(Path(folder), name=repo_id)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                create_pr=create_pr,
                ignore_patterns=["README.md"] if has_card else None,
                delete_patterns=[f"{part}/*" for part in PARTS],  # old shards would be loaded instead of new weights
            )
        return commit.commit_url

    def _write(self, folder: Path, name: str) -> None:
        parts = {part: getattr(self, attribute) for part, attribute in PARTS.items()}
        for part, component in parts.items():
            component.save_pretrained(folder / part)
            for code in (folder / part).glob("*.py"):  # `AutoModel` looks for the code of a sub-folder at the top
                shutil.copyfile(code, folder / code.name)
        index = {part: [type(c).__module__.split(".")[0], type(c).__name__] for part, c in parts.items()}
        index = {"_class_name": type(self).__name__, "_fpmgm_version": version("fpmgm"), **index}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self._card(name).save(folder / "README.md")

    def _card(self, name: str) -> ModelCard:
        tags = ["fpmgm", "maskgit", "class-conditional-image-generation"]
        data = ModelCardData(library_name="fpmgm", tags=tags)
        generation = self.model.generation_config
        settings = ("budget", "num_steps", "iterations", "allocation", "reuse", "order", "temperature", "top_k")
        settings += ("top_p", "guidance_scale", "guidance_schedule")
        return ModelCard.from_template(
            data,
            template_path=str(CARD),
            **PLACES,
            name=name,
            config=self.model.config,
            parameters=f"{self.model.num_parameters():,}",
            tokenizer=self.tokenizer,
            tokenizer_parameters=f"{self.tokenizer.num_parameters():,}",
            settings={key: getattr(generation, key) for key in settings if getattr(generation, key) is not None},
            version=version("fpmgm"),
        )

    def __repr__(self) -> str:
        config, tokenizer = self.model.config, self.tokenizer
        stacks = (config.num_pre_layers, config.num_fixed_point_layers, config.num_post_layers)
        names = [one_line(name) for name in list(config.id2label.values())[:3]]
        more = ", …" if config.num_classes > len(names) else ""
        return (
            f"{type(self).__name__}(\n"
            f"  model: {type(self.model).__name__}, {self.model.num_parameters():,} parameters, blocks "
            f"{' / '.join(map(str, stacks))}, "
            f"{config.grid_size} × {config.grid_size} of {config.codebook_size} codes,\n"
            f"  tokenizer: {type(tokenizer).__name__}, {tokenizer.num_parameters():,} parameters, pictures of "
            f"{tokenizer.image_size} × {tokenizer.image_size},\n"
            f"  classes: {config.num_classes} ({', '.join(names)}{more}),\n"
            f"  on {self.device}, {str(self.model.dtype).removeprefix('torch.')}\n)"
        )

    # --- devices -----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.device

    def to(self, device: torch.device | str) -> "FPMaskGITPipeline":
        """Move model and tokenizer; returns the pipeline itself."""
        self.model.to(device)
        self.tokenizer.to(device)
        return self


def check_parts(model: torch.nn.Module, tokenizer: torch.nn.Module, processor: Any) -> None:
    """Raise a `ValueError` unless model, tokenizer and processor are of one codebook, grid and image size."""
    if model.config.model_type != "fpmaskgit":
        raise ValueError(f"`model` of `model_type`={model.config.model_type!r} must be an image model, 'fpmaskgit'.")
    for name in ("codebook_size", "grid_size"):
        of_model, of_tokenizer = getattr(model.config, name), getattr(tokenizer, name)
        if of_model != of_tokenizer:
            raise ValueError(
                f"`model` has `{name}`={of_model}, `tokenizer` has `{name}`={of_tokenizer}: take the tokenizer whose "
                "codes the model was trained on."
            )
    crop, size = (processor.crop_size["height"], processor.crop_size["width"]), tokenizer.image_size
    if crop != (size, size):
        raise ValueError(
            f"`processor` gives pictures of {crop[0]} × {crop[1]} pixels, `tokenizer` takes {size} × {size}: leave "
            "`processor` out, or make it with `make_image_processor`."
        )
    resized = dict(processor.size)
    if not all(1 <= edge <= MOST_ZOOM * size for edge in resized.values()):
        raise ValueError(
            f"`processor` resizes pictures to {resized}, of which `tokenizer` takes {size} × {size}: leave "
            "`processor` out, or make it with `make_image_processor`."
        )
