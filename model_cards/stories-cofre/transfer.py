# SPDX-License-Identifier: Apache-2.0
"""Tensors on their way from the CPU to the device.

Random numbers are drawn on the CPU, where every device gets the same ones, and which positions a step needs is found
there too. An ordinary copy of them would wait until the device has finished all its work so far.
"""

import torch


def to_device(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`x` on `device`; on a GPU in the order of its work, for which the CPU does not wait.

    Args:
        x (`torch.Tensor`): Of any shape. On the CPU, it must not be written afterwards.
        device (`torch.device` or `str`): Where to.

    Example:

    ```python
    >>> import torch
    >>> to_device(torch.arange(3), "cpu")
    tensor([0, 1, 2])

    ```
    """
    if x.device.type != "cpu":
        return x.to(device)
    if torch.device(device).type == "cuda":
        x = x.pin_memory()  # out of ordinary memory, the driver may wait before it copies
    return x.to(device, non_blocking=True)
