# SPDX-License-Identifier: Apache-2.0
"""The fixed-point masked diffusion language model; without fixed-point layers it is MDLM.

The blocks are MDLM's: rotary self-attention and MLP under an adaptive layer norm whose vectors come from the diffusion
time, or are constants when time is not conditioned on.

Shapes: B batch, L length, D hidden size, C conditioning size.
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils.generic import can_return_tuple

from .block_fpmdlm import FPMDLMBlock, LayerNorm, TimestepEmbedding
from .configuration_fpmdlm import FPMDLMConfig
from .generation_mgm import MGMGenerationMixin
from .modeling_mgm import DenoiserOptions, MGMOutput, MGMPreTrainedModel, check_tensor
from .noise import sigma
from .reveal import TEXT_ORDERS
from .rotary import rotary_embedding


class FPMDLMForMaskedDiffusion(MGMGenerationMixin, MGMPreTrainedModel):
    """Fixed-point masked diffusion language model, trained by masked cross-entropy and sampled by `generate`.

    Example:

    ```python
    >>> import torch
    >>> from fpmgm import FPMDLMConfig, FPMDLMForMaskedDiffusion
    >>> config = FPMDLMConfig(vocab_size=11, mask_token_id=10, hidden_size=8, num_attention_heads=2,
    ...                       intermediate_size=16, conditioning_size=4, max_position_embeddings=6)
    >>> model = FPMDLMForMaskedDiffusion(config).eval()
    >>> output = model(torch.full((2, 6), 10), num_iterations=4)
    >>> output.logits.shape, output.residuals.shape, output.block_evaluations
    (torch.Size([2, 6, 11]), torch.Size([4, 2]), 6)
    >>> model.generate(batch_size=2, budget=24, seed=0).shape
    torch.Size([2, 6])

    ```
    """

    config: FPMDLMConfig
    orders = TEXT_ORDERS
    output_modalities = ("text",)  # transformers asks of what can generate
    _no_split_modules = ["FPMDLMBlock", "Modulation"]  # both are called on their own

    def __init__(self, config: FPMDLMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.time_embedding = TimestepEmbedding(config.conditioning_size)
        norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self._build(config, FPMDLMBlock, norm, config.vocab_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "initialize"):  # the modulations and the head at 0, the injection as z = ah + bu
            module.initialize()
        elif isinstance(module, LayerNorm):
            init.ones_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Embedding)):  # MDLM's: uniform in ±1/√fan_in, whatever the width
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if getattr(module, "bias", None) is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        timesteps: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **options: Unpack[DenoiserOptions],
    ) -> MGMOutput:
        """One denoiser call.

        Args:
            input_ids (`torch.LongTensor`): (B, L) ids, the mask id where a token is unknown.
            timesteps (`torch.Tensor`, *optional*): (B,) diffusion time t in (0, 1]. Used, and needed, only with
                `time_conditioning`.
            attention_mask (`torch.Tensor`, *optional*): (B, L), 0 at padding. `None`: no padding.
            labels (`torch.LongTensor`, *optional*): (B, L) tokens to predict, -100 where no loss. `None`: no loss.
            token_type_ids (*optional*): Not read: tokenizers of BERT's kind send it.
            options: Iterations, start, positions and losses: see [`DenoiserOptions`].

        Raises:
            `ValueError`: a shape beyond the model's length, missing `timesteps`, fewer than one iteration, an argument
                that does not exist or has no effect in this call.
        """
        self._check_inputs(input_ids, timesteps)
        h = self.embed_tokens(input_ids)  # (B, L, D)
        conditioning, rotary = self.conditioning(timesteps, h.device), self.rotary(h)
        masked = input_ids == self.config.mask_token_id
        return self._denoise_once(h, conditioning, rotary, masked, attention_mask, labels, options)

    def conditioning(self, timesteps: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """(B, C), or (1, C) when time is not conditioned on: one constant vector for every sequence."""
        noise = (
            sigma(timesteps) if self.config.time_conditioning else torch.zeros(1, dtype=torch.float32, device=device)
        )
        return self.time_embedding(noise)

    def rotary(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the positions of `h` (B, L, D), each (L, K)."""
        head_size = self.config.hidden_size // self.config.num_attention_heads
        return rotary_embedding(h.shape[1], head_size, self.config.rope_theta, h.device, h.dtype)

    def _check_inputs(self, input_ids: torch.Tensor, timesteps: torch.Tensor | None) -> None:
        longest = self.config.max_position_embeddings
        check_tensor("input_ids", input_ids)
        if input_ids.dim() != 2 or input_ids.shape[1] > longest:
            raise ValueError(
                f"`input_ids` of shape {tuple(input_ids.shape)} must be (batch, length) with length at most "
                f"`max_position_embeddings`={longest}: cut the text into pieces."
            )
        if not self.config.time_conditioning:
            return
        if timesteps is None:
            raise ValueError(
                "`timesteps`=None, but the model has `time_conditioning`: give a (batch,) time in (0, 1]."
            )
        check_tensor("timesteps", timesteps, input_ids.shape[:1])


FPMDLMConfig.register_for_auto_class()
FPMDLMForMaskedDiffusion.register_for_auto_class("AutoModelForMaskedLM")

__all__ = ["FPMDLMForMaskedDiffusion"]
