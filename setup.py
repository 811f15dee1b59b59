# SPDX-License-Identifier: Apache-2.0
"""What `pyproject.toml` cannot say: the version as the package has it, the README with links that work anywhere."""

import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
REPOSITORY = "https://github.com/fpmgm/fpmgm"


def readme() -> str:
    """The README for the package index, which has no other files: links lead to the repository, pictures too."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^\]]*\]\(|src(?:set)?=\")(?!https?:)", rf"\1{REPOSITORY}/raw/main/", text)
    return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!https?:|#)", rf"\1{REPOSITORY}/blob/main/", text)


setup(
    version=re.search(r'__version__ = "(.+)"', (ROOT / "fpmgm/__init__.py").read_text(encoding="utf-8")).group(1),
    long_description=readme(),
    long_description_content_type="text/markdown",
)
