# SPDX-License-Identifier: Apache-2.0
"""Show a text while it is being revealed: in a terminal, or anywhere a function can put a string."""

import shutil
import sys
from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase


CLEAR_BELOW = "\x1b[J"
BLANK, ASCII_BLANK = "░", "_"


def printable(text: str, encoding: str | None) -> str:
    """`text` as an output of this encoding can show it: `_` for `░` and `?` for any other letter that it lacks.

    >>> printable("caf\u00e9 \u2591\u2591", "ascii")
    'caf? __'
    """
    encoding = encoding or "utf-8"  # None: an output that takes text as it is
    try:
        BLANK.encode(encoding)
    except UnicodeEncodeError:
        text = text.replace(BLANK, ASCII_BLANK)
    return text.encode(encoding, errors="replace").decode(encoding)


class TextStreamer:
    """Passed as `generate(streamer=...)`, shows the batch after each step; masked tokens appear as `░` (in a terminal
    without it as `_`).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Decodes the tokens; its mask token marks what is not yet written.
        show (`Callable[[list[str]], None]`, *optional*): Receives the texts after each step, for a web demo. `None`:
            rewrite them in place in the terminal; in a file or a pipe they are written once, when they are finished.

    Raises:
        `ValueError`: if the tokenizer has no mask token.

    Example:

    ```python
    >>> model.generate(budget=96, streamer=TextStreamer(tokenizer))  # doctest: +SKIP

    ```
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[list[str]], None] | None = None):
        if tokenizer.mask_token is None:
            raise ValueError("`tokenizer` has no mask token: use the one that the model was trained with.")
        self.tokenizer = tokenizer
        self.show = show or self._print
        self._text, self._lines = "", 0

    def put(self, tokens: torch.Tensor) -> None:
        """Show the tokens (B, L) of a step."""
        blank = self.tokenizer.mask_token
        self.show([self.tokenizer.decode(row).replace(blank, BLANK) for row in tokens])

    def end(self) -> None:
        """After the last step, what is shown stays."""
        if self._text:
            self._write(self._text)
        self._text, self._lines = "", 0

    def _print(self, texts: list[str]) -> None:
        text = printable("\n\n".join(texts), sys.stdout.encoding)
        if not sys.stdout.isatty():  # nothing can be rewritten there
            self._text = text
            return
        width = shutil.get_terminal_size().columns
        back = f"\x1b[{self._lines}F" if self._lines else ""
        self._write(f"{back}{CLEAR_BELOW}{text}")
        self._lines = sum(1 + max(len(line) - 1, 0) // width for line in text.split("\n"))

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
