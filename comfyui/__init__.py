"""MADiff for ComfyUI: link or copy this folder into ComfyUI's `custom_nodes`; see README.md beside this file."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS


__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
