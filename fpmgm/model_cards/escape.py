# SPDX-License-Identifier: Apache-2.0
"""Others' words in a card, each made harmless for the place where it lands. YAML's writer escapes front matter."""

import html
import json
import math
import re
import unicodedata
from typing import Any


MARKUP = re.compile(r"([\\`*\[\]|~$#]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z]))")  # an underscore within a word is none


def one_line(text: Any) -> str:
    """`text` on one line, without control characters.

    >>> one_line("a\\nb\\x00c")
    'a b c'
    """
    return " ".join("".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in str(text)).split())


def inline(text: Any) -> str:
    """`text` as it is, in a sentence, a heading or a cell of a table in Markdown.

    >>> inline("a|b <i>*c*</i> of_d")
    'a\\\\|b &lt;i&gt;\\\\*c\\\\*&lt;/i&gt; of_d'
    """
    return MARKUP.sub(r"\\\1", html.escape(one_line(text), quote=False))


def code(text: Any) -> str:
    """`text` as code in a sentence.

    >>> code("a`b")
    '``a`b``'
    """
    text = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def python_string(text: Any) -> str:
    """A literal of Python, on one line, that stands for `text`.

    >>> python_string('the "b"')
    '"the \\\\"b\\\\""'
    """
    text = str(text)
    harmless = all(unicodedata.category(c)[0] not in "C" and c not in "\u2028\u2029\x85" for c in text)
    return json.dumps(text, ensure_ascii=False) if harmless else _ascii(text)


def _ascii(text: str) -> str:
    return '"' + "".join(ascii(c)[1:-1] if c not in "\"'" else {'"': '\\"', "'": "'"}[c] for c in text) + '"'


def number(value: Any) -> str:
    """A value in a table: fractions with five significant digits, anything but numbers as text.

    >>> number(22.8312345678), number(12345), number(2e-4), number("a|b")
    ('22.831', '12,345', '0.0002', 'a\\\\|b')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return inline(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def with_error(value: Any, error: Any) -> str:
    """A value and its standard error, to the error's second digit.

    >>> with_error(43.4123, 7.2984), with_error(3.1, None)
    ('43.4 ± 7.3', '3.1')
    """
    if not isinstance(error, int | float) or not isinstance(value, int | float) or not 0 < error < math.inf:
        return number(value)
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


PLACES = {f.__name__: f for f in (inline, code, python_string, number)}  # what templates call
