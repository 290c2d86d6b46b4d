"""Clips held whole on the training device, and batches cut out of them there.

A loader that decodes and crops on the CPU gives a few dozen samples a second; a GPU trains hundreds. Here every frame lies on the
device as uint8, and a batch is one gather: crops of three frames, chosen by how much moves in them.
"""

import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from madiff_diffusers.files import VIDEO_SUFFIXES
from madiff_diffusers.scene_cuts import find_cuts
from madiff_diffusers.video.decoding import Source
from madiff_diffusers.video.errors import VideoError
from training.data.sources import shown


def _decode(path: Path) -> list[np.ndarray]:
    try:
        return [frame.to_ndarray(format="rgb24") for _, frame in Source(path).frames()]
    except VideoError as error:
        raise ValueError(f"`data`: {error}; mend it, or move it away") from error


class FrameBank:
    """
    Args:
        folder: of video files; their frames must fit into the device's memory, 3 bytes a pixel.
        device: where they are kept.
        least: videos smaller than this, in pixels of either side, are left out, and those of fewer than three frames in a scene; they are named
            on standard error.

    Raises:
        ValueError: if a video of the folder cannot be read, or none is left.
    """

    def __init__(self, folder: str, device: torch.device, least: int):
        # As in the other stages, folders inside are others': held-out clips may lie there.
        paths = sorted(path for path in shown(Path(folder)) if path.suffix.lower() in VIDEO_SUFFIXES)
        clips, left_out = [], []
        with ThreadPoolExecutor() as pool:
            for path, clip in zip(paths, pool.map(_decode, paths)):
                edges = [0, *find_cuts(clip), len(clip)] if min(clip[0].shape[:2]) >= least else []
                found = [each for each in itertools.pairwise(edges) if each[1] - each[0] >= 3]
                if found:
                    clips.append((clip, found))
                else:
                    left_out.append(path.relative_to(folder).as_posix())
        if not clips:
            raise ValueError(
                f"`data` must have videos of three frames or more that are at least {least} pixels high and wide, but {folder!r} has none."
            )
        if left_out:
            print(
                f"left out of {folder}, smaller than {least} pixels or of fewer than three frames in a scene: {', '.join(left_out)}",
                file=sys.stderr,
            )
        self.device = device
        shapes, bases, scenes, base = [], [], [], 0
        total = sum(len(clip) * clip[0].shape[0] * clip[0].shape[1] for clip, _ in clips)
        self.pixels = torch.empty(total, 3, dtype=torch.uint8, device=device)
        for number, (clip, found) in enumerate(clips):
            height, width = clip[0].shape[:2]
            frames = torch.from_numpy(np.stack(clip)).view(-1, 3)
            self.pixels[base : base + len(frames)] = frames.to(device)
            shapes.append((height, width))
            bases.append(base)
            base += len(frames)
            scenes += [(number, *each) for each in found]
        self.count = len(clips)
        self.shapes = torch.tensor(shapes, device=device)
        self.largest = int(self.shapes.min(dim=1).values.max())  # side of the largest crop that there is
        self.bases = torch.tensor(bases, device=device)
        self.scenes = torch.tensor(scenes, device=device)  # clip, first frame, frame after the last
        lengths = (self.scenes[:, 2] - self.scenes[:, 1]).float()
        self.weights = lengths.clamp(
            max=120
        ).sqrt()  # long clips are seen more often, but not as much as they are longer

    def _rows(
        self,
        clip: torch.Tensor,
        frame: torch.Tensor,
        top: torch.Tensor,
        left: torch.Tensor,
        ys: torch.Tensor,
        xs: torch.Tensor,
    ) -> torch.Tensor:
        """Numbers of pixels `(N, len(ys), len(xs))` of frames `(N,)` of clips."""
        height, width = self.shapes[clip].unbind(1)
        y = (top[:, None] + ys)[:, :, None]
        x = (left[:, None] + xs)[:, None, :]
        wide = width[:, None, None]
        return self.bases[clip][:, None, None] + (frame * height)[:, None, None] * wide + y * wide + x

    def _crops(
        self, clip: torch.Tensor, frame: torch.Tensor, top: torch.Tensor, left: torch.Tensor, size: int, step: int = 1
    ) -> torch.Tensor:
        """Frames `(N, 3, size / step, size / step)` float32 in [-1, 1]."""
        along = torch.arange(0, size, step, device=self.device)
        pixels = self.pixels[self._rows(clip, frame, top, left, along, along)]
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1

    def _uniform(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(count, generator=generator, device=self.device)

    def textures(self, count: int, size: int, generator: torch.Generator) -> torch.Tensor:
        """Crops of frames drawn at random, `(N, 3, size, size)` in [-1, 1]."""
        clip = torch.randint(self.count, (count,), generator=generator, device=self.device)
        height, width = self.shapes[clip].unbind(1)
        scene = self._scene_of(clip)
        frame = (
            self.scenes[scene, 1]
            + (self._uniform(count, generator) * (self.scenes[scene, 2] - self.scenes[scene, 1])).long()
        )
        top = (self._uniform(count, generator) * (height - size + 1)).long()
        left = (self._uniform(count, generator) * (width - size + 1)).long()
        return self._crops(clip, frame, top, left, size)

    def _scene_of(self, clip: torch.Tensor) -> torch.Tensor:
        """The first scene of each clip."""
        return (self.scenes[:, 0][None] == clip[:, None]).float().argmax(dim=1)

    def triplets(
        self,
        count: int,
        size: int,
        gaps: Sequence[float],
        any_time: float,
        candidates: int,
        generator: torch.Generator,
    ) -> dict[str, torch.Tensor]:
        """
        Crops of three frames of clips.

        Args:
            count: of samples.
            size: side of the crops, in pixels; of clips that are smaller there are none.
            gaps: chances of 1, 2, … frames between a neighbour and the frame half-way.
            any_time: share of samples whose middle frame is any of those between the neighbours, where there are several.
            candidates: crops drawn for each sample, of which mostly the one that changes most is kept.

        Returns:
            `frame_prev`, `frame_mid`, `frame_next` `(N, 3, size, size)` in [-1, 1], and `time` `(N,)`.
        """
        drawn = count * candidates
        large = (self.shapes[self.scenes[:, 0]] >= size).all(dim=1)
        scene = torch.multinomial(self.weights * large, drawn, replacement=True, generator=generator)
        clip, first, last = self.scenes[scene].unbind(1)
        chances = torch.tensor(gaps, device=self.device, dtype=torch.float32)
        gap = 1 + torch.multinomial(chances, drawn, replacement=True, generator=generator)
        gap = torch.minimum(gap, (last - first - 1) // 2)
        start = first + (self._uniform(drawn, generator) * (last - first - 2 * gap)).long()
        between = 1 + (self._uniform(drawn, generator) * (2 * gap - 1)).long()
        between = torch.where(self._uniform(drawn, generator) < any_time, between, gap)
        height, width = self.shapes[clip].unbind(1)
        top = (self._uniform(drawn, generator) * (height - size + 1)).long()
        left = (self._uniform(drawn, generator) * (width - size + 1)).long()
        small = [self._crops(clip, frame, top, left, size, step=8) for frame in (start, start + 2 * gap)]
        change = (small[0] - small[1]).abs().mean(dim=(1, 2, 3)).view(count, candidates)
        # Now and then any of them, so that little motion is seen, too.
        change = torch.where(
            self._uniform(count, generator)[:, None] < 0.75,
            change,
            self._uniform(drawn, generator).view(count, candidates),
        )
        kept = change.argmax(dim=1) + torch.arange(count, device=self.device) * candidates
        clip, start, gap, between, top, left = (each[kept] for each in (clip, start, gap, between, top, left))
        frames = self._crops(
            clip.repeat(3), torch.cat([start, start + between, start + 2 * gap]), top.repeat(3), left.repeat(3), size
        )
        prev, mid, next_ = frames.chunk(3)
        return {"frame_prev": prev, "frame_mid": mid, "frame_next": next_, "time": between.float() / (2 * gap).float()}


def augment(batch: dict[str, torch.Tensor], size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Samples resized to `size`, mirrored, transposed, reversed in time and recoloured at random; of some, the neighbours get other light
    than the middle frame, or all frames noise. `hints`, where there are some, follow what moves pixels."""
    frames = torch.stack([batch["frame_prev"], batch["frame_mid"], batch["frame_next"]], dim=1)  # [B,3,3,H,W]
    count, device = len(frames), frames.device

    def chance(share: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator, device=device) < share).view(-1, 1, 1, 1, 1)

    def between(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator, device=device)

    hints = batch.get("hints")  # (x, y) to the previous frame, then to the next
    if frames.shape[-1] != size:
        assert hints is None, "hints keep their size"
        flat = F.interpolate(
            frames.flatten(0, 1), size=(size, size), mode="bicubic", align_corners=False, antialias=True
        )
        frames = flat.view(count, 3, 3, size, size)

    def where(chosen: torch.Tensor, changed: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return torch.where(chosen.view(-1, *[1] * (kept.ndim - 1)), changed, kept)

    for axis, signs in ((-1, (-1, 1, -1, 1)), (-2, (1, -1, 1, -1))):
        mirrored = chance(0.5)
        frames = where(mirrored, frames.flip(axis), frames)
        if hints is not None:
            hints = where(mirrored, hints.flip(axis) * hints.new_tensor(signs).view(1, 4, 1, 1), hints)
    transposed = chance(0.5)
    frames = where(transposed, frames.transpose(-1, -2), frames)
    backwards = chance(0.5)
    frames = where(backwards, frames.flip(1), frames)
    time = where(backwards, 1 - batch["time"], batch["time"])
    if hints is not None:
        hints = where(transposed, hints[:, [1, 0, 3, 2]].transpose(-1, -2), hints)
        hints = where(backwards, hints[:, [2, 3, 0, 1]], hints)
    # Colours: channels swapped, brightness, contrast and gamma, the same for all frames of a sample.
    order = torch.rand(count, 3, generator=generator, device=device).argsort(dim=1)
    swapped = frames.gather(2, order.view(-1, 1, 3, 1, 1).expand_as(frames))
    frames = torch.where(chance(0.3), swapped, frames)
    frames = (frames.clamp(-1, 1) + 1) / 2
    coloured = frames.clamp(min=1e-4) ** between(0.7, 1.4, 1, 1, 1, 1) * between(0.75, 1.1, 1, 1, 1, 1)
    frames = torch.where(chance(0.5), coloured, frames)
    # Light that changes along time.
    drift = 1 + between(-0.06, 0.06, 1, 1, 1, 1) * torch.tensor([-1.0, 0.0, 1.0], device=device).view(1, 3, 1, 1, 1)
    frames = torch.where(chance(0.08), frames * drift, frames)
    noise = between(0, 0.02, 1, 1, 1, 1) * torch.randn(frames.shape, generator=generator, device=device)
    frames = torch.where(chance(0.1), frames + noise, frames)
    frames = frames.clamp(0, 1) * 2 - 1
    prev, mid, next_ = frames.unbind(1)
    changed = {"frame_prev": prev, "frame_mid": mid, "frame_next": next_, "time": time}
    return changed if hints is None else {**changed, "hints": hints}


def composed(
    bank: FrameBank, count: int, size: int, layers: int, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    Scenes composed of pieces of frames: a background and layers with outlines of their own, which shift, turn and grow on paths that
    are not straight, at an instant drawn for each.

    Returns:
        What `FrameBank.triplets` gives, and the exact flow `(N, 4, size, size)` from the middle frame to the previous and the next,
        in pixels, of what is seen in the middle frame.
    """
    device = bank.device
    total = count * (layers + 1)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, device=device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    textures = bank.textures(total, size, generator)
    background = torch.zeros(count, layers + 1, dtype=torch.bool, device=device)
    background[:, 0] = True
    background = background.view(-1)

    # 1. paths; lengths are in pixels of the frame, instants run from 0 to 1
    time = torch.where(
        torch.rand(count, generator=generator, device=device) < 0.5,
        torch.full((count,), 0.5, device=device),
        uniform(0.1, 0.9, count),
    )
    angle = uniform(0, 2 * torch.pi, total)
    speed = torch.exp(uniform(-0.7, 4.4, total)) * torch.where(background, 0.6, 1.0)  # half a pixel to 80, most slow
    direction = torch.stack([angle.cos(), angle.sin()], dim=1)
    camera = (speed[:, None] * direction).view(count, layers + 1, 2)
    velocity = camera.clone()
    velocity[:, 1:] += camera[:, :1] * (torch.rand(count, layers, 1, generator=generator, device=device) < 0.6)
    velocity = velocity.view(total, 2)
    bend = 0.25 * speed[:, None] * normal(total, 2) * (torch.rand(total, 1, generator=generator, device=device) < 0.3)
    centre = uniform(0, size, total, 2)
    spin = normal(total) * torch.where(background, 0.03, 0.25)
    growth = normal(total) * torch.where(background, 0.03, 0.12)

    def place(instant: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Matrix `(M, 2, 2)` and shift `(M, 2)` of each layer's own pixels to the scene's."""
        passed = (instant.repeat_interleave(layers + 1) - 0.5)[:, None]
        shift = centre + velocity * passed + bend * passed**2
        turn, scale = spin * passed[:, 0], torch.exp(growth * passed[:, 0])
        cos, sin = scale * turn.cos(), scale * turn.sin()
        return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1), shift

    # 2. outlines: radius over angle, with a few harmonics; many are small or thin
    radii = size * torch.exp(uniform(-3.2, -0.9, total, 2))
    phases, heights = uniform(0, 2 * torch.pi, total, 5), normal(total, 5) * 0.3 / torch.arange(2, 7, device=device)
    soft = uniform(0.7, 1.5, total)

    pixel = torch.arange(size, device=device) + 0.5
    grid = torch.stack(torch.meshgrid(pixel, pixel, indexing="xy"), dim=-1).view(1, -1, 2)  # x, y

    def render(instant: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The frame, each layer's opacity `(M, size²)` and its own coordinates of each pixel `(M, size², 2)`."""
        matrix, shift = place(instant)
        local = (grid - shift[:, None]) @ torch.linalg.inv(matrix).transpose(1, 2)  # [M,size²,2]
        polar = torch.atan2(local[..., 1] / radii[:, 1:], local[..., 0] / radii[:, :1])
        outline = 1 + sum(heights[:, k, None] * torch.cos((k + 2) * polar + phases[:, k, None]) for k in range(5))
        distance = ((local / radii[:, None]).norm(dim=-1) - outline.clamp(min=0.15)) * radii.min(dim=1).values[:, None]
        opacity = torch.where(background[:, None], 1.0, torch.sigmoid(-2 * distance / soft[:, None]))
        seen = (local + (centre[:, None] % size)) / size * 2 - 1
        colours = F.grid_sample(
            textures, seen.view(total, size, size, 2), mode="bilinear", padding_mode="reflection", align_corners=False
        )
        colours, alpha = colours.view(count, layers + 1, 3, size, size), opacity.view(count, layers + 1, 1, size, size)
        frame = colours[:, 0]
        for number in range(1, layers + 1):
            frame = torch.lerp(frame, colours[:, number], alpha[:, number])
        return frame, opacity, local

    zero, one = torch.zeros_like(time), torch.ones_like(time)
    prev, _, _ = render(zero)
    next_, _, _ = render(one)
    mid, opacity, local = render(time)

    # 3. flow of the layer on top
    ways = []
    for instant in (zero, one):
        matrix, shift = place(instant)
        ways.append(local @ matrix.transpose(1, 2) + shift[:, None] - grid)
    flows = torch.cat(ways, dim=-1).view(count, layers + 1, size, size, 4)
    covered = opacity.view(count, layers + 1, size, size, 1) > 0.5
    flow = flows[:, 0]
    for number in range(1, layers + 1):
        flow = torch.where(covered[:, number], flows[:, number], flow)
    return {"frame_prev": prev, "frame_mid": mid, "frame_next": next_, "time": time}, flow.permute(
        0, 3, 1, 2
    ).contiguous()
