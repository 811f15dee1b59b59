# SPDX-License-Identifier: Apache-2.0
"""The fixed-point masked generative image model; without fixed-point layers it is Halton-MaskGIT.

An image is a square of codes of an image tokenizer, row by row. The blocks see the class through their adaptive norms,
and no time. Learned registers follow the tokens.

Shapes: B batch, L tokens, R registers, D hidden size.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils.generic import can_return_tuple

from .block_fpmaskgit import FPMaskGITBlock, RMSNorm
from .configuration_fpmaskgit import FPMaskGITConfig
from .generation_mgm import MGMGenerationMixin
from .modeling_mgm import DenoiserOptions, MGMOutput, MGMPreTrainedModel, check_tensor
from .reveal import IMAGE_ORDERS


EMBEDDING_STD = 0.02  # of fresh embeddings, and with them of the tied head


class FPMaskGITModel(MGMGenerationMixin, MGMPreTrainedModel):
    """Fixed-point masked generative model of images, trained by masked cross-entropy and sampled by `generate`.

    Example:

    ```python
    >>> import torch
    >>> from fpmgm import FPMaskGITConfig, FPMaskGITModel
    >>> config = FPMaskGITConfig(codebook_size=16, num_classes=3, grid_size=4, hidden_size=8, num_attention_heads=2,
    ...                          intermediate_size=16, num_pre_layers=1, num_post_layers=1)
    >>> model = FPMaskGITModel(config).eval()
    >>> output = model(torch.full((2, 16), 16), class_labels=torch.tensor([0, 2]), num_iterations=4)
    >>> output.logits.shape, output.residuals.shape, output.block_evaluations
    (torch.Size([2, 16, 17]), torch.Size([4, 2]), 6)
    >>> model.generate(class_labels=[0, 2], guidance_scale=2.0, budget=24, seed=0).shape
    torch.Size([2, 16])

    ```
    """

    config: FPMaskGITConfig
    orders = IMAGE_ORDERS
    output_modalities = ("image",)  # transformers asks of what can generate
    _no_split_modules = ["FPMaskGITBlock", "Modulation"]  # both are called on their own

    def __init__(self, config: FPMaskGITConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.hidden_size)
        self.register_tokens = nn.Embedding(config.num_register_tokens, config.hidden_size)
        norm = RMSNorm(config.hidden_size, config.rms_norm_eps, bias=True)
        self._build(config, FPMaskGITBlock, norm, config.vocab_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "initialize"):  # the modulations at 0, the injection as z = ah + bu, the head's bias at 0
            module.initialize()
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):  # without a bias, all of them
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=EMBEDDING_STD)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        class_labels: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        timesteps: torch.Tensor | None = None,
        **options: Unpack[DenoiserOptions],
    ) -> MGMOutput:
        """One denoiser call. `fixed_point_state` and `reuse_weights` have L + R positions: the registers come last.

        Args:
            input_ids (`torch.LongTensor`): (B, L) codes row by row, the mask id where a code is unknown.
            class_labels (`torch.LongTensor`, *optional*): (B,) classes; `num_classes` is the null class. `None`: the
                null class.
            labels (`torch.LongTensor`, *optional*): (B, L) codes to predict, -100 where no loss. `None`: no loss.
            timesteps (`torch.Tensor`, *optional*): Not used: this model does not see the time. Here so that all models
                are called alike.
            options: Iterations, start, positions and losses: see [`DenoiserOptions`].

        Raises:
            `ValueError`: a shape that is not that of images and their classes, fewer than one iteration, an argument
                that does not exist or has no effect in this call.
        """
        self._check_inputs(input_ids, class_labels, options)
        h = self.embed_tokens(input_ids) + self.position_embedding.weight  # (B, L, D)
        h = torch.cat([h, self.register_tokens.weight.expand(h.shape[0], -1, -1)], dim=1)  # (B, L + R, D)
        masked = input_ids == self.config.mask_token_id
        return self._denoise_once(h, self.conditioning(class_labels, h.device), None, masked, None, labels, options)

    def conditioning(self, class_labels: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """(B, D), or (1, D) without classes: one constant vector for every sequence."""
        if class_labels is None:
            class_labels = torch.full((1,), self.config.num_classes, device=device)
        return F.silu(self.class_embedding(class_labels))

    def _start(
        self, input_ids, batch_size, length, attention_mask, token_type_ids, max_new_tokens
    ) -> tuple[torch.Tensor, None]:
        """What `generate` begins with: whole images only."""
        of_text = {
            "attention_mask": attention_mask, "token_type_ids": token_type_ids, "max_new_tokens": max_new_tokens
        }  # fmt: skip
        for name, value in of_text.items():
            if value is not None:
                raise ValueError(
                    f"`{name}` cannot be given: images have no padding, and are no text. To keep codes, give them in "
                    "`input_ids`."
                )
        tokens, _ = super()._start(input_ids, batch_size, length, None, None, None)
        if tokens.shape[1] != self.config.max_position_embeddings:
            raise ValueError(
                f"`length`={tokens.shape[1]} must be {self.config.max_position_embeddings}, the tokens of an image: "
                "leave it out."
            )
        return tokens, None

    def _check_inputs(self, input_ids: torch.Tensor, class_labels: torch.Tensor | None, options: dict) -> None:
        if "attention_mask" in options:
            raise ValueError("`attention_mask` cannot be given: images have no padding and are all of one length.")
        length, side = self.config.max_position_embeddings, self.config.grid_size
        check_tensor("input_ids", input_ids)
        if input_ids.dim() != 2 or input_ids.shape[1] != length:
            raise ValueError(
                f"`input_ids` of shape {tuple(input_ids.shape)} must be (batch, {length}), {side} × {side} codes row "
                "by row: flatten a (batch, rows, columns) grid with `.flatten(1)`."
            )
        if class_labels is not None:
            check_tensor("class_labels", class_labels, input_ids.shape[:1])


FPMaskGITConfig.register_for_auto_class()
FPMaskGITModel.register_for_auto_class("AutoModel")

__all__ = ["FPMaskGITModel"]
