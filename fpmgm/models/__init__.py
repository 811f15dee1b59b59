# SPDX-License-Identifier: Apache-2.0
"""Models that travel: this flat folder's files are copied into every saved checkpoint."""
