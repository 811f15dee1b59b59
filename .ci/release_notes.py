# SPDX-License-Identifier: Apache-2.0
"""The notes of a release, as CHANGELOG.md has them: `python .ci/release_notes.py 0.1.0`.

Ends with an error if the package has another version, or if the changelog has no entry for it.
"""

import re
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]


def release_notes(changelog: str, version: str) -> str:
    """What stands under the heading `## VERSION` or `## VERSION - DATE`."""
    entries = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    found = [entry for entry in entries if re.match(rf"\[?{re.escape(version)}\]?(\s|$)", entry)]
    if not found or not found[0].partition("\n")[2].strip():
        raise ValueError(f"CHANGELOG.md has no entry `## {version}`: give `Unreleased` that name and a date.")
    return found[0].partition("\n")[2].strip() + "\n"


def main(version: str) -> str:
    """The notes of `version`, which must be the package's."""
    own = re.search(r'__version__ = "(.+)"', (ROOT / "fpmgm/__init__.py").read_text(encoding="utf-8")).group(1)
    if version != own:
        raise ValueError(f"the tag says {version}, fpmgm/__init__.py {own}: make them agree.")
    return release_notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version)


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1]))
