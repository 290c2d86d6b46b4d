"""Pictures of what a network sees: motion hints, offsets, gates and errors. Needs the extra `eval`."""

import cv2
import numpy as np
import torch

from ..hint_registry import named_parts
from ..motion_hints import HintSource


def events_image(events: torch.Tensor) -> np.ndarray:
    """An event volume `(2 * bins, H, W)` on white: increases red, decreases blue, mixed where there are both."""
    increases, decreases = (part.sum(0).float().cpu().numpy() for part in events.chunk(2))
    scale = max(float(np.percentile(increases + decreases, 99)), 1e-3)
    red, blue = (np.clip(part / scale, 0, 1)[..., None] for part in (increases, decreases))
    image = 1 - red * np.array([0, 1, 1], np.float32) - blue * np.array([1, 1, 0], np.float32)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def offsets_image(offsets: torch.Tensor) -> np.ndarray:
    """Offsets `(2, H, W)` in pixels on the colour wheel: hue is direction, paleness is rest."""
    from torchvision.utils import flow_to_image

    return flow_to_image(offsets.float()).permute(1, 2, 0).cpu().numpy()


def hints_images(hints: torch.Tensor, hint_source: str, source: HintSource) -> list[tuple[str, np.ndarray]]:
    """Pictures of the parts of one side's hints `(C, H, W)`, each with its name.

    Args:
        hint_source: name of the source; parts are joined by `+`.
        source: the source. Parts of two channels are taken for offsets; of others, the mean is shown.
    """
    images = []
    parts = named_parts(hint_source, source)
    flows = [name for name, _ in parts if name in ("flow", "fine_flow", "search")]
    channels = hints.split([part.hint_channels for _, part in parts])
    for (name, _), each in zip(parts, channels):
        if name == "events":
            images.append((name, events_image(each)))
        elif len(each) == 2:
            images.append(("flow" if flows == [name] else name, offsets_image(each)))
        else:
            mean = each.float().mean(0).cpu().numpy()
            levels = (255 * (mean - mean.min()) / max(float(np.ptp(mean)), 1e-6)).astype(np.uint8)
            images.append((name, cv2.cvtColor(levels, cv2.COLOR_GRAY2RGB)))
    return images


def gate_image(gate: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """A gate `(1, U, V)` in [0, 1] at `size` (height, width), `(H, W, 3)` uint8: white for 1."""
    weight = (gate[0].float().clamp(0, 1) * 255).to(torch.uint8).cpu().numpy()
    return cv2.resize(cv2.cvtColor(weight, cv2.COLOR_GRAY2RGB), size[::-1], interpolation=cv2.INTER_NEAREST)


# A mean difference of this many grey levels or more has the brightest colour of an error map.
ERROR_SCALE = 64


def error_image(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The mean absolute difference of two `(H, W, 3)` uint8 images over RGB, black for none, bright from `ERROR_SCALE` on."""
    difference = np.abs(image.astype(np.float32) - truth).mean(axis=-1)
    levels = (difference * (255 / ERROR_SCALE)).clip(0, 255).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
