# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness with the model `fpmgm` known to it (Appendix D.2.2).

python -m fpmgm.evaluation.lm_eval --model_args pretrained=FOLDER --tasks arc_easy
"""

from importlib.util import find_spec


if find_spec("lm_eval") is None or find_spec("accelerate") is None:
    raise ImportError("fpmgm.evaluation.lm_eval needs lm-eval and accelerate: pip install 'fpmgm[eval]'")

from .adapter import MGMLM
from .protocols import PROTOCOLS, Protocol
from .table import make_table


__all__ = ["MGMLM", "PROTOCOLS", "Protocol", "make_table"]
