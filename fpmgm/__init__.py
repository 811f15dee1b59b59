# SPDX-License-Identifier: Apache-2.0
"""Fixed-point masked generative models for the Hugging Face world.

Importing `fpmgm` registers its models with `AutoConfig`, `AutoModel` and `AutoModelForMaskedLM`, and the task
`"masked-generation"` with `pipeline`. Its sub-packages and the trainers, which need more than torch and transformers,
are imported when they are first used.
"""

import importlib
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM
from transformers.pipelines import PIPELINE_REGISTRY

from .conversion import convert_to_fixed_point, load_halton_maskgit, load_mdlm
from .models.budget import BudgetPlan, plan_budget
from .models.configuration_fpmaskgit import FPMaskGITConfig
from .models.configuration_fpmdlm import FPMDLMConfig
from .models.generation_mgm import GenerationStep, MGMGenerationConfig, MGMGenerationMixin, MGMGenerationOutput
from .models.modeling_fpmaskgit import FPMaskGITModel
from .models.modeling_fpmdlm import FPMDLMForMaskedDiffusion
from .models.modeling_mgm import MGMOutput
from .models.pipeline_fpmdlm import FPMDLMPipeline
from .notebook import RevealAnimation
from .pictures import make_grid, reveal_frames, save_animation
from .pipeline_fpmaskgit import FPMaskGITPipeline, FPMaskGITPipelineOutput
from .streamers import TextStreamer


__version__ = "0.1.0"

AutoConfig.register(FPMDLMConfig.model_type, FPMDLMConfig, exist_ok=True)
AutoModel.register(FPMDLMConfig, FPMDLMForMaskedDiffusion, exist_ok=True)
AutoModelForMaskedLM.register(FPMDLMConfig, FPMDLMForMaskedDiffusion, exist_ok=True)
AutoConfig.register(FPMaskGITConfig.model_type, FPMaskGITConfig, exist_ok=True)
AutoModel.register(FPMaskGITConfig, FPMaskGITModel, exist_ok=True)
if "masked-generation" not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline("masked-generation", FPMDLMPipeline, AutoModelForMaskedLM, type="text")

SUB_PACKAGES = ("analysis", "data", "evaluation", "trainers")
TRAINERS = (
    "ConsistencyConfig",
    "ConsistencyTrainer",
    "ConversionConfig",
    "ConversionTrainer",
    "ImageTokenizerConfig",
    "ImageTokenizerTrainer",
    "MGMTrainer",
    "MGMTrainingConfig",
    "SDTTConfig",
    "SDTTTrainer",
)


def __getattr__(name: str) -> Any:
    """A sub-package, or a trainer, when it is first used."""
    if name in SUB_PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in TRAINERS:
        return getattr(importlib.import_module(f"{__name__}.trainers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *SUB_PACKAGES, *TRAINERS])


__all__ = [
    "BudgetPlan",
    "FPMDLMConfig",
    "FPMDLMForMaskedDiffusion",
    "FPMDLMPipeline",
    "FPMaskGITConfig",
    "FPMaskGITModel",
    "FPMaskGITPipeline",
    "FPMaskGITPipelineOutput",
    "GenerationStep",
    "MGMGenerationConfig",
    "MGMGenerationMixin",
    "MGMGenerationOutput",
    "MGMOutput",
    "RevealAnimation",
    "TextStreamer",
    "convert_to_fixed_point",
    "load_halton_maskgit",
    "load_mdlm",
    "make_grid",
    "plan_budget",
    "reveal_frames",
    "save_animation",
]
