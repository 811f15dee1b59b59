# SPDX-License-Identifier: Apache-2.0
"""Real English that every installation brings: Python's documentation and the docstrings of installed packages."""

import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics


PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "datasets",
    "huggingface_hub",
    "accelerate",
    "pandas",
    "networkx",
    "sympy",
)
DOCSTRING = re.compile(r'"""(.+?)"""', re.DOTALL)


def paragraphs() -> list[str]:
    """Distinct paragraphs of prose, in an order that does not depend on the machine."""
    sources = list(topics.values())
    site, library = (Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib"))
    for root in (library, *(site / package for package in PACKAGES)):
        for file in sorted(root.rglob("*.py")):
            if root == library and "site-packages" in file.parts:
                continue
            sources += DOCSTRING.findall(file.read_text(encoding="utf-8", errors="ignore"))
    found = (" ".join(text.split()) for source in sources for text in re.split(r"\n\s*\n", source))
    return list(dict.fromkeys(text for text in found if is_prose(text)))


def is_prose(text: str) -> bool:
    """Whether a paragraph is a sentence or more, rather than code, a table or a signature."""
    if "--" in text:  # underlined headings, rules
        return False
    letters = sum(character.isalpha() or character in " ,.'" for character in text)
    return len(text) > 80 and text[0].isupper() and text[-1] in ".!?" and letters > 0.93 * len(text)
