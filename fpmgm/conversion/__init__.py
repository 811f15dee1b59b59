# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other implementations, read without running their code."""

from .mdlm import load_mdlm


__all__ = ["load_mdlm"]
