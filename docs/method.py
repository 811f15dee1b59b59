# SPDX-License-Identifier: Apache-2.0
"""Draws the picture of the method for README, `method_light.svg` and `method_dark.svg`: `python docs/method.py`."""

from html import escape
from pathlib import Path


WIDTH, HEIGHT = 920, 300
COLOURS = {
    "light": {
        "text": "#1f2328", "faint": "#59636e", "line": "#59636e", "once": "#eef1f5", "shared": "#ffe3cc",
        "edge": "#b9c0c8", "masked": "#d9dde2", "old": "#dcefdc", "new": "#fdba74",
    },
    "dark": {
        "text": "#f0f6fc", "faint": "#9198a1", "line": "#9198a1", "once": "#262c36", "shared": "#6b3a12",
        "edge": "#3d444d", "masked": "#3d444d", "old": "#1f4d2b", "new": "#b45309",
    },
}  # fmt: skip
BEFORE = ["The", None, "sat", None, "the", None]
AFTER = ["The", "cat", "sat", None, "the", "mat"]


def method(theme: str) -> str:
    """The picture as SVG."""
    c = COLOURS[theme]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        "<title>One denoising step: P, the shared block F iterated to a fixed point, H</title>",
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{c["line"]}"/></marker></defs>',
        *_tokens(12, BEFORE, BEFORE, c),
        *_box(212, 110, 100, "P", "runs once", c["once"], c),
        *_box(408, 92, 136, "F", "one block, n times", c["shared"], c, height=96),
        *_box(640, 110, 100, "H", "runs once", c["once"], c),
        *_tokens(828, AFTER, BEFORE, c),
        _arrow("M108 140 H206", c), _arrow("M312 140 H402", c), _arrow("M544 140 H634", c), _arrow("M740 140 H822", c),
        _arrow("M432 90 C432 24 520 24 520 88", c),
        _words(476, 34, "h ← F(h, u)", c["text"]),
        _words(357, 130, "u, h⁰", c["faint"]), _words(589, 130, "h*", c["text"]),
        _arrow("M590 150 V252 H357 V152", c, dashed=True),
        _words(474, 272, "the next step starts from h*, by what happened to each token", c["faint"]),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def _tokens(x: int, words: list, before: list, c: dict) -> list[str]:
    """A column of tokens; what was masked `before` is new."""
    parts = []
    for i, (word, old) in enumerate(zip(words, before, strict=True)):
        fill = "masked" if word is None else "old" if word == old else "new"
        parts.append(f'<rect x="{x}" y="{44 + 34 * i}" width="80" height="28" rx="5" fill="{c[fill]}"/>')
        parts.append(_words(x + 40, 63 + 34 * i, word or "", c["text"]))
    return parts


def _box(x: int, y: int, width: int, name: str, words: str, fill: str, c: dict, height: int = 60) -> list[str]:
    middle, base = x + width // 2, y + height // 2
    return [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{c["edge"]}"/>',
        _words(middle, base, name, c["text"], size=22),
        _words(middle, base + 20, words, c["faint"], size=12),
    ]


def _arrow(path: str, c: dict, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{c["line"]}" stroke-width="1.6" marker-end="url(#tip)"{dash}/>'


def _words(x: int, y: int, words: str, fill: str, size: int = 15) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="middle" font-size="{size}" fill="{fill}">{escape(words)}</text>'


if __name__ == "__main__":
    for theme in COLOURS:
        Path(__file__).with_name(f"method_{theme}.svg").write_text(method(theme), encoding="utf-8")
