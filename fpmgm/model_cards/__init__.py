# SPDX-License-Identifier: Apache-2.0
"""The card written beside every exported checkpoint: `template.md`."""
