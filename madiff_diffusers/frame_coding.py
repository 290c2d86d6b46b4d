# SPDX-License-Identifier: Apache-2.0
"""Neighbours in MA-Sampling: encoded once, and shown to the denoiser and the decoder beside motion hints."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
import torch.nn.functional as F
from diffusers import ModelMixin

from .decoder_inputs import FrameFeatures
from .motion_hints import FinishingSource, HintPair, together
from .tiling import Tile, Tiling


REACH_BESIDE_HINTS = 32  # pixels that the decoder's offsets may lead beyond those of the hints


@dataclass
class EncodedFrames:
    """
    Frames as neighbours, with what the networks make of each on its own, once for all that it is next to. Made by
    [`MADiffPipeline.encode_frames`].

    Args:
        frames (`torch.Tensor` of shape `(B, 3, H', W')`): padded, in [-1, 1].
        size (`tuple` of `int`): height and width before padding.
        latents (`torch.Tensor` of shape `(B, C, h, w)`, *optional*): before quantization, times the scaling factor; None where
            the autoencoder's latents are news, which a frame alone has not.
        features ([`FrameFeatures`], *optional*): see [`VQMAGANEncoderOutput`].
        coarse ([`EncodedFrames`], *optional*): the same frames at the size of guesses, where that is another.
        encoder (*optional*): a weak reference to the model that encoded them, and its dtype then.
    """

    frames: torch.Tensor
    size: tuple[int, int]
    latents: torch.Tensor | None = None
    features: FrameFeatures | None = None
    coarse: Optional["EncodedFrames"] = None
    encoder: tuple["weakref.ref[ModelMixin]", torch.dtype] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "encoder": None}  # which other processes have not

    @classmethod
    def together(cls, parts: Sequence["EncodedFrames"]) -> "EncodedFrames":
        """Encoded frames of one size in one batch, in the order given."""
        if len(parts) == 1:
            return parts[0]
        latents = [each.latents for each in parts if each.latents is not None]
        features = [each.features for each in parts if each.features is not None]
        frames, *pyramid = (torch.cat(each) for each in zip(*((each.frame, *each.pyramid) for each in features)))
        return cls(
            frames,
            parts[0].size,
            torch.cat(latents) if latents else None,
            FrameFeatures(frames, tuple(pyramid)),
            encoder=parts[0].encoder,
        )

    def one_by_one(self) -> list["EncodedFrames"]:
        """Each of a batch of encoded frames on its own."""
        assert self.features is not None, "encoded"
        features = [self.features.map(lambda each: each[number : number + 1]) for number in range(len(self.frames))]
        latents = [None] * len(self.frames) if self.latents is None else list(self.latents.split(1))
        return [
            EncodedFrames(own.frame, self.size, code, own, encoder=self.encoder)
            for own, code in zip(features, latents)
        ]

    def misfit(self, vqvae: ModelMixin, multiple: int, device: torch.device) -> str | None:
        """Why a pipeline of this model, which pads frames to that multiple on that device, cannot use them; None if it can."""
        if self.encoder is not None and self.encoder[0]() is not vqvae:
            return "was encoded by another autoencoder"
        if self.encoder is not None and self.encoder[1] != vqvae.dtype:
            return f"was encoded in {str(self.encoder[1]).removeprefix('torch.')}"
        own = self.frames.device
        if own.type != device.type or device.index not in (None, own.index):
            return f"is on {own}"
        height, width = self.frames.shape[-2:]
        return f"is padded to {height}x{width}" if height % multiple or width % multiple else None


class FrameCoder:
    """
    What a [`VQMAGANModel`] does in MA-Sampling.

    Args:
        vqvae: the model.
        tiling: runs it by tiles.
        force_not_quantize: decode latents as they are, not moved to their nearest codes.
    """

    def __init__(self, vqvae: ModelMixin, tiling: Tiling | None = None, force_not_quantize: bool = False):
        self.vqvae, self.tiling, self.force_not_quantize = vqvae, tiling, force_not_quantize
        # Latents of news have no part in what frames are encoded to, and evidence of their own in the denoiser's condition.
        self.tells_news = bool(getattr(vqvae.config, "news_latents", False))

    def encode(self, *neighbours: EncodedFrames) -> list[FrameFeatures]:
        """Encode those that are not encoded yet, together; the features of all."""
        left = [each for each in neighbours if each.features is None]
        if left:
            self._encode(left)
        return [each.features for each in neighbours if each.features is not None]

    def _encode(self, left: Sequence[EncodedFrames]) -> None:
        frames = torch.cat([each.frames for each in left])
        for each, own in zip(left, frames.chunk(len(left))):
            each.frames = own  # beside each other, as their features are, which saves putting them together again
        height, width = frames.shape[-2:]

        def encode(_: Tile, frames: torch.Tensor) -> list[torch.Tensor]:
            encoded = self.vqvae.encode(frames)
            return [*encoded.features.pyramid, *([] if encoded.latents is None else [encoded.latents])]

        made = self._by_tiles(encode, [frames], height, width)
        if not self.tells_news:
            latents = (made.pop() * self.vqvae.config.scaling_factor).chunk(len(left))
            for each, own in zip(left, latents):
                each.latents = own
        for each, pyramid in zip(left, zip(*(feature.chunk(len(left)) for feature in made))):
            each.features = FrameFeatures(each.frames, pyramid)
            each.encoder = weakref.ref(self.vqvae), self.vqvae.dtype

    def _by_tiles(
        self, function: Callable[..., list[torch.Tensor]], images: Sequence[torch.Tensor], height: int, width: int
    ) -> list[torch.Tensor]:
        """See [`Tiling`]; without one, the frame is a single tile."""
        if self.tiling is None:
            return function(Tile(0, height, 0, width), *images)
        return self.tiling(function, images, height, width)

    def coarse(self, each: EncodedFrames, scale: int) -> EncodedFrames:
        """The same frames, `scale` times smaller; made once."""
        if scale == 1:
            return each
        if each.coarse is None or each.coarse.frames.shape[-1] * scale != each.frames.shape[-1]:
            each.coarse = EncodedFrames(
                F.avg_pool2d(each.frames, scale), (each.size[0] // scale, each.size[1] // scale)
            )
        return each.coarse

    def condition(self, prev: EncodedFrames, next_: EncodedFrames, hints: HintPair) -> torch.Tensor:
        """What the denoiser sees beside the noisy latents, `(TB, …, h, w)`, of T instants' hints and both encoded neighbours."""
        count, sides = len(hints[0]) // len(prev.frames), self.encode(prev, next_)
        if self.tells_news:
            return self.vqvae.condition(*(repeated(side.pyramid[-1], count) for side in sides), *hints)
        latents = torch.cat([each.latents for each in (prev, next_) if each.latents is not None], dim=1)
        small = [
            each.to(self.vqvae.dtype) for each in self.resize_hints(hints, latents.shape[-2:])
        ]  # [TB,K,h,w] twice
        return torch.cat([repeated(latents, count), *small], dim=1)

    def resize_hints(self, hints: HintPair, size: Sequence[int]) -> HintPair:
        """See [`VQMAGANModel.resize_hints`]."""
        return self.vqvae.resize_hints(hints[0], size), self.vqvae.resize_hints(hints[1], size)

    def detailed(self, hints: HintPair, known: HintPair, refined: HintPair) -> HintPair:
        """Hints that a smaller guess told, at the size of those that were there before. Of the offsets it tells what changes as it sees them:
        detail that is smaller than its pixels stays.

        Args:
            hints: those before.
            known: the same at the guess's size.
            refined: those from the guess.
        """
        layout, size = self.vqvae.hint_layout, hints[0].shape[-2:]
        result = self.resize_hints(refined, size)
        if refined[0].shape[-2:] == size or not layout.has_offsets:
            return result
        for each, before, small in zip(result, hints, known):
            layout.offsets(each).add_(layout.offsets(before) - layout.offsets(self.vqvae.resize_hints(small, size)))
        return result

    def decode(
        self,
        prev: EncodedFrames,
        next_: EncodedFrames,
        latents: torch.Tensor,
        hints: HintPair,
        instants: torch.Tensor,
    ) -> torch.Tensor:
        """
        Args:
            prev, next_: B neighbours on either side; encoded if they are not yet.
            latents (`(TB, C, h, w)`): of T instants between each two, instant by instant, times the scaling factor.
            hints (`(TB, K, H, W)` twice): see [`VQMAGANModel.decode`].
            instants (`(TB,)`): in (0, 1).

        Returns:
            The frames, `(TB, 3, H, W)` float32 in [-1, 1].
        """
        neighbours, count = self.encode(prev, next_), len(latents) // len(prev.frames)
        height, width = prev.frames.shape[-2:]
        layout = self.vqvae.hint_layout

        def decode(tile: Tile, latents: torch.Tensor, *hints: torch.Tensor) -> list[torch.Tensor]:
            whole, origin = Tile(0, height, 0, width), None
            seen = whole
            if tile != whole:
                # Warps reach out of the tile as far as its hints tell, and by what the decoder adds to them.
                reach = float(REACH_BESIDE_HINTS)
                if layout.has_offsets:
                    scale = (tile.bottom - tile.top) / hints[0].shape[-2]
                    reach += max(layout.offsets(each).abs().max().item() for each in hints) * scale
                seen = tile.widened(reach, self.vqvae.downsample_factor, height, width)
                origin = (tile.top - seen.top, tile.left - seen.left)
            sides = [side.map(lambda each: repeated(seen.cut_out(each, height), count)) for side in neighbours]
            arguments = (latents, *sides, *hints, self.force_not_quantize)
            return [self.vqvae.decode(*arguments, time=instants, origin=origin).sample]

        images = [(latents / self.vqvae.config.scaling_factor).to(self.vqvae.dtype), *hints]
        (decoded,) = self._by_tiles(decode, images, height, width)
        return decoded.float().clamp(-1, 1)

    def motion_hints(
        self,
        source: FinishingSource,
        prev: EncodedFrames,
        next_: EncodedFrames,
        times: Sequence[float],
        instants: torch.Tensor,
        hints: HintPair | None = None,
        latents: torch.Tensor | None = None,
    ) -> HintPair:
        """
        Hints that a source finishes from the motion that the decoder makes of those so far.

        Args:
            source: can `begin` and `finish` hints.
            prev, next_: B neighbours on either side.
            times, instants: T instants between each two, in (0, 1); the same for each of the batch, `(TB,)`, on its device.
            hints: those so far, `(TB, K, H, W)` twice; if not given, those that the source begins with.
            latents: as for `decode`; without, zeros.
        """
        if hints is None:
            hints = together([source.begin(prev.frames, next_.frames, time) for time in times])
        motion = self.guess_motion(prev, next_, latents, hints, instants)
        parts = zip(*(each.chunk(len(times)) for each in motion), times)
        return together(
            [source.finish(prev.frames, next_.frames, (to_prev, to_next), time) for to_prev, to_next, time in parts]
        )

    def guess_motion(
        self,
        prev: EncodedFrames,
        next_: EncodedFrames,
        latents: torch.Tensor | None,
        hints: HintPair,
        instants: torch.Tensor,
    ) -> HintPair:
        """
        Of whole frames, whatever the tiles: the scales that it goes through have less than two values to a pixel of the frames.

        Args:
            prev, next_, latents, instants: as for `decode`; without latents, zeros.
            hints (`(TB, K, h, w)` twice): of any size that the frames' is a multiple of.

        Returns:
            See [`VQMAGANModel.guess_motion`].
        """
        count, read = len(instants) // len(prev.frames), self.vqvae.motion_scales
        sides = []
        for frame, pyramid in self.encode(
            prev, next_
        ):  # the finer features are not read, nor the frames without latents
            frame = frame if latents is None else repeated(frame, count)
            sides.append(
                FrameFeatures(frame, (*pyramid[:-read], *(repeated(each, count) for each in pyramid[-read:])))
            )
        size = [side // self.vqvae.motion_stride for side in prev.frames.shape[-2:]]
        known = self.resize_hints(hints, size)
        news = None if latents is None else (latents / self.vqvae.config.scaling_factor).to(self.vqvae.dtype)
        return self.vqvae.guess_motion(*sides, *known, news, self.force_not_quantize, time=instants)


def repeated(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """`(B, C, H, W)` as `(count * B, C, H, W)`, the whole batch again and again."""
    return tensor if count == 1 else tensor.repeat(count, 1, 1, 1)
