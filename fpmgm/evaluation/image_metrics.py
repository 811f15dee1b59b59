# SPDX-License-Identifier: Apache-2.0
"""Measures of generated pictures: Fréchet distance and Inception score, float64, under a feature extractor of choice.

A distance means something only with its extractor, its resizing, its reference pictures and their numbers, so these
come with it. It is a FID under `InceptionExtractor` alone; other extractors give a *proxy* Fréchet distance.

Shapes: N pictures, F features, C classes of the extractor, S image size.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from ..models.arguments import check_whole


class FeatureExtractor(Protocol):
    """What turns pictures into features.

    `name` says which network and weights, `resize` how pictures get its input size, `distance_name` what the Fréchet
    distance of its features is called. Called with (N, 3, S, S) uint8 pictures, it gives (N, F) features and (N, C)
    logits.
    """

    name: str
    resize: str
    distance_name: str

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class ImageStatistics:
    """Mean and covariance of the features of a set of pictures, and where they come from.

    Args:
        mean (`np.ndarray`): (F,) float64.
        covariance (`np.ndarray`): (F, F) float64, with N − 1.
        count (`int`): Pictures, N.
        extractor, resize (`str`): Those of the extractor.
        description (`str`): Which pictures.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    extractor: str
    resize: str
    description: str

    def save(self, path: str | Path) -> None:
        """Write to a `.safetensors` file, to compare with later."""
        texts = {name: getattr(self, name) for name in ("extractor", "resize", "description")}
        save_file({"mean": self.mean, "covariance": self.covariance}, path, {**texts, "count": str(self.count)})

    @classmethod
    def load(cls, path: str | Path) -> "ImageStatistics":
        """Read what `save` wrote.

        Raises:
            `ValueError`: names the file, if it holds anything else.
        """
        if not Path(path).is_file():
            raise ValueError(f"`path`={str(path)!r} is no file: give one that `ImageStatistics.save` wrote.")
        try:
            with safe_open(path, framework="numpy") as file:
                texts = {name: file.metadata()[name] for name in ("extractor", "resize", "description")}
                count = int(file.metadata()["count"])
                mean, covariance = (file.get_tensor(name) for name in ("mean", "covariance"))
            if covariance.shape != (*mean.shape, *mean.shape) or mean.ndim != 1 or count < 2:
                raise ValueError(f"mean {mean.shape} and covariance {covariance.shape} of {count} pictures")
            if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                raise ValueError("its numbers are not finite")
        except Exception as error:  # of safetensors, of what is missing, of what does not fit
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise ValueError(
                f"`path`={str(path)!r} holds no statistics that `ImageStatistics.save` wrote ({reason}): make them "
                "again with `image_statistics`."
            ) from error
        return cls(mean, covariance, count, **texts)


def frechet_distance(mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), the squared 2-Wasserstein distance of two normal distributions.

    The trace of the root is the sum of the roots of the eigenvalues of Σ₁Σ₂, as in torch-fidelity.

    Args:
        mean1, mean2 (`np.ndarray`): (F,).
        covariance1, covariance2 (`np.ndarray`): (F, F).

    Raises:
        `ValueError`: for other shapes, and for numbers that are not finite.

    Examples:
        >>> eye = np.eye(2)
        >>> round(frechet_distance(np.zeros(2), eye, np.ones(2), 4 * eye), 6)
        4.0
    """
    mean1, covariance1, mean2, covariance2 = (
        np.asarray(x, dtype=np.float64) for x in (mean1, covariance1, mean2, covariance2)
    )
    shapes, size = [x.shape for x in (mean1, covariance1, mean2, covariance2)], mean1.size
    if shapes != [(size,), (size, size)] * 2:
        raise ValueError(f"means and covariances have shapes {shapes}: they must be (F,) and (F, F), both times.")
    if not all(np.isfinite(x).all() for x in (mean1, covariance1, mean2, covariance2)):
        raise ValueError("means and covariances must be finite: an extractor that gives NaN has been used.")
    difference = mean1 - mean2
    roots = np.sqrt(np.linalg.eigvals(covariance1 @ covariance2).astype(np.complex128)).real
    return float(difference @ difference + np.trace(covariance1) + np.trace(covariance2) - 2 * roots.sum())


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """exp of the mean divergence of p(class | picture) from its mean over pictures; mean and deviation over splits.

    Args:
        logits (`np.ndarray`): (N, C) of the extractor's classifier.
        splits (`int`, defaults to 10): Parts in which the shuffled pictures are scored, N at least.
        seed (`int`, defaults to 2020): Of the shuffle, torch-fidelity's.

    Raises:
        `ValueError`: for fewer pictures than splits, less than one split, and logits that are no finite (N, C).

    Examples:
        >>> score, deviation = inception_score(100 * np.eye(3).repeat(4, axis=0), splits=1)
        >>> round(score, 6), deviation
        (3.0, 0.0)
    """
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or not np.isfinite(logits).all():
        raise ValueError(f"`logits` of shape {logits.shape} must be finite numbers (pictures, classes).")
    check_whole("splits", splits, minimum=1, unit="parts")
    if len(logits) < splits:
        raise ValueError(f"`splits`={splits} must be at most the {len(logits)} pictures: give more pictures.")
    logits = logits[np.random.RandomState(seed).permutation(len(logits))]
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))  # (N, C)
    scores = []
    for i in range(splits):
        chunk = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        p = np.exp(chunk)
        with np.errstate(divide="ignore", invalid="ignore"):  # a class that no picture has: 0 · log 0
            divergence = np.where(p > 0, p * (chunk - np.log(p.mean(axis=0))), 0).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))


@torch.no_grad()
def extract_features(images: Iterable[torch.Tensor], extractor: FeatureExtractor) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, F) and logits (N, C), float64, of pictures.

    Args:
        images (`Iterable[torch.Tensor]`): Batches of (B, 3, S, S) uint8 pictures, tensors or arrays, in a list or from
            a generator; one tensor or array is one batch.
        extractor ([`FeatureExtractor`]): Such as [`InceptionExtractor`].

    Raises:
        `ValueError`: for pictures of another type or shape, and for none.
    """
    features, logits = [], []
    for batch in [images] if hasattr(images, "shape") else images:
        batch = torch.from_numpy(np.ascontiguousarray(batch)) if isinstance(batch, np.ndarray) else batch
        if not torch.is_tensor(batch):
            raise ValueError(
                f"`images` holds a {type(batch).__name__}: give batches of uint8 (batch, 3, height, width)."
            )
        if batch.dtype != torch.uint8 or batch.dim() != 4 or batch.shape[1] != 3:
            raise ValueError(
                f"`images` of {batch.dtype} and shape {tuple(batch.shape)} must be batches of uint8 pictures "
                "(batch, 3, height, width): use `to_uint8` on pixels in [-1, 1]."
            )
        batch_features, batch_logits = extractor(batch)
        features.append(batch_features.double().cpu().numpy())
        logits.append(batch_logits.double().cpu().numpy())
    if not features:
        raise ValueError("`images` holds no batch: give at least one of uint8 pictures (batch, 3, height, width).")
    return np.concatenate(features), np.concatenate(logits)


def image_statistics(features: np.ndarray, extractor: FeatureExtractor, description: str) -> ImageStatistics:
    """Mean and covariance of `features` (N, F), for example of the pictures to compare with.

    Raises:
        `ValueError`: for fewer than two pictures, and features that are no finite (N, F).
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or not np.isfinite(features).all():
        raise ValueError(f"`features` of shape {features.shape} must be finite numbers (pictures, features).")
    if len(features) < 2:
        raise ValueError(f"`features` has {len(features)} row(s): a covariance needs two pictures at least.")
    covariance = np.atleast_2d(np.cov(features, rowvar=False, dtype=np.float64))
    mean = features.mean(axis=0, dtype=np.float64)
    return ImageStatistics(mean, covariance, len(features), extractor.name, extractor.resize, description)


def evaluate_images(
    images: Iterable[torch.Tensor],
    reference: ImageStatistics,
    extractor: FeatureExtractor,
    splits: int = 10,
    description: str = "generated",
) -> dict[str, float | int | str]:
    """Fréchet distance to `reference` and Inception score of pictures, with all that they depend on.

    Args:
        images (`Iterable[torch.Tensor]`): Batches of (B, 3, S, S) uint8 pictures, as in [`extract_features`].
        reference ([`ImageStatistics`]): Of the pictures to compare with, under the same extractor.
        extractor ([`FeatureExtractor`]): Such as [`InceptionExtractor`].
        splits (`int`, defaults to 10): See [`inception_score`].
        description (`str`, defaults to `"generated"`): Which pictures.

    Returns:
        `dict`: the distance under the extractor's `distance_name`, `inception_score` and its deviation over splits
        (`proxy_inception_score…` for an extractor that is not Inception), `extractor`, `resize`, `images`,
        `reference`, `num_images`, `num_reference`, `splits`.

    Raises:
        `ValueError`: if the reference was made with another extractor.
    """
    made_with = (reference.extractor, reference.resize)
    if made_with != (extractor.name, extractor.resize):
        raise ValueError(
            f"`reference` was made with {made_with}, `extractor` is {(extractor.name, extractor.resize)}: their "
            "features cannot be compared. Make the reference's statistics anew."
        )
    features, logits = extract_features(images, extractor)
    own = image_statistics(features, extractor, description)
    score, deviation = inception_score(logits, splits)
    prefix = "" if extractor.distance_name == "fid" else "proxy_"
    return {
        extractor.distance_name: frechet_distance(own.mean, own.covariance, reference.mean, reference.covariance),
        f"{prefix}inception_score": score,
        f"{prefix}inception_score_deviation": deviation,
        "extractor": extractor.name,
        "resize": extractor.resize,
        "images": description,
        "reference": reference.description,
        "num_images": own.count,
        "num_reference": reference.count,
        "splits": splits,
    }
