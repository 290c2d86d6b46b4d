"""MADiff: motion-aware latent diffusion for video frame interpolation, as a Diffusers pipeline."""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.2.0.dev0"

# Where each public name lives; loaded on first use, so that importing the package stays quick.
_LOCATIONS = {
    "EncodedFrames": "frame_coding",
    "EventGANModel": "eventgan",
    "EventGANOutput": "eventgan",
    "EventHints": "motion_hints",
    "FlowHints": "motion_hints",
    "FrameProcessor": "image_processor",
    "HintSource": "motion_hints",
    "MADiffPipeline": "pipeline_madiff",
    "MADiffPipelineOutput": "pipeline_output",
    "ModelHints": "motion_hints",
    "MotionHintModel": "motion_flow",
    "RIFEFlowModel": "motion_flow",
    "SearchHints": "motion_hints",
    "StackedHints": "motion_hints",
    "VQMAGANDecoderOutput": "vq_magan",
    "VQMAGANEncoderOutput": "vq_magan",
    "VQMAGANModel": "vq_magan",
    "VideoError": "video.errors",
    "VideoOptions": "video.options",
    "VideoResult": "video.jobs",
    "build_hint_source": "hint_registry",
    "convert_eventgan_checkpoint": "convert_eventgan",
    "convert_rife_checkpoint": "convert_rife",
    "interpolate_frames": "video.streaming",
    "interpolate_video": "video.jobs",
    "register_hint_source": "hint_registry",
}

__all__ = sorted(_LOCATIONS)

if TYPE_CHECKING:
    from .convert_eventgan import convert_eventgan_checkpoint
    from .convert_rife import convert_rife_checkpoint
    from .eventgan import EventGANModel, EventGANOutput
    from .frame_coding import EncodedFrames
    from .hint_registry import build_hint_source, register_hint_source
    from .image_processor import FrameProcessor
    from .motion_flow import MotionHintModel, RIFEFlowModel
    from .motion_hints import EventHints, FlowHints, HintSource, ModelHints, SearchHints, StackedHints
    from .pipeline_madiff import MADiffPipeline
    from .pipeline_output import MADiffPipelineOutput
    from .video.errors import VideoError
    from .video.jobs import VideoResult, interpolate_video
    from .video.options import VideoOptions
    from .video.streaming import interpolate_frames
    from .vq_magan import VQMAGANDecoderOutput, VQMAGANEncoderOutput, VQMAGANModel


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LOCATIONS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
