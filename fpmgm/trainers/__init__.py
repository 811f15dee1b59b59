# SPDX-License-Identifier: Apache-2.0
"""Trainers on Hugging Face's `Trainer`, one configuration dataclass each."""

from transformers.utils import is_accelerate_available, is_datasets_available


if not (is_accelerate_available() and is_datasets_available()):
    raise ImportError("fpmgm.trainers needs accelerate and datasets: pip install 'fpmgm[train]'")

from .checkpoints import last_checkpoint
from .consistency_config import ConsistencyConfig
from .consistency_trainer import ConsistencyTrainer
from .conversion_config import ConversionConfig
from .conversion_trainer import ConversionTrainer
from .ema import EMACallback
from .image_tokenizer_trainer import ImageTokenizerConfig, ImageTokenizerTrainer
from .mgm_config import MGMTrainingConfig
from .mgm_trainer import MGMTrainer
from .peft import register_target_modules
from .prompts import encode_prompts
from .sdtt_config import SDTTConfig
from .sdtt_trainer import SDTTTrainer


register_target_modules()


__all__ = [
    "ConsistencyConfig",
    "ConsistencyTrainer",
    "ConversionConfig",
    "ConversionTrainer",
    "EMACallback",
    "ImageTokenizerConfig",
    "ImageTokenizerTrainer",
    "MGMTrainer",
    "MGMTrainingConfig",
    "SDTTConfig",
    "SDTTTrainer",
    "encode_prompts",
    "last_checkpoint",
]
