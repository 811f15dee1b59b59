# SPDX-License-Identifier: Apache-2.0
"""Parameters that an engine splits over ranks: this rank's part, all parts put together, and a part cut out again.

DeepSpeed's ZeRO-3 cuts the flattened parameter into equal pieces, the last one padded; FSDP2 makes the parameter a
`DTensor`. Under any other engine every rank holds the whole.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F


def part_of(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank holds of `parameter`, without a copy."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def whole_from(part: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """All ranks' parts put together in the shape of `parameter`. Every rank must call it."""
    if hasattr(parameter, "ds_tensor"):
        pieces = [torch.empty_like(part) for _ in range(dist.get_world_size(parameter.ds_process_group))]
        dist.all_gather(pieces, part, group=parameter.ds_process_group)
        return torch.cat(pieces)[: parameter.ds_numel].view(parameter.ds_shape)
    if isinstance(parameter, DTensor):
        layout = {"shape": parameter.shape, "stride": parameter.stride()}
        return DTensor.from_local(part, parameter.device_mesh, parameter.placements, **layout).full_tensor()
    return part


def part_from(whole: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of `whole`, on the device of the rank's part of `parameter`."""
    whole = whole.to(part_of(parameter).device)
    if hasattr(parameter, "ds_tensor"):
        size, rank = len(parameter.ds_tensor), dist.get_rank(parameter.ds_process_group)
        piece = whole.flatten()[rank * size : (rank + 1) * size]
        return F.pad(piece, (0, size - len(piece)))
    if isinstance(parameter, DTensor):
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local()
    return whole


def forget_gathered(model: nn.Module) -> None:
    """Free the whole weights that an engine has gathered, so that the next use sees the parts as they are now."""
    for parameter in model.parameters():
        if getattr(parameter, "ds_status", None) is not None and parameter.ds_status.name == "AVAILABLE":
            parameter.partition()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
