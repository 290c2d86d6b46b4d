"""What moves evenly in a video moves evenly in what is made of it, at any rate; with the weights that come with the package."""

from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
import torch

from madiff_diffusers import FlowHints, MADiffPipeline, interpolate_frames, interpolate_video
from madiff_diffusers.hub_repository import bundled_checkpoints
from tests.conftest import photograph


PAN = 12  # pixels that the picture moves by from one source frame to the next
FRAMES = 3


@pytest.fixture(scope="module", params=bundled_checkpoints())
def shipped(request) -> MADiffPipeline:
    pipeline = MADiffPipeline.from_pretrained(request.param)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pan() -> list:
    return [np.ascontiguousarray(photograph()[150:278, 100 + PAN * i : 292 + PAN * i]) for i in range(FRAMES)]


def steps(frames: list) -> np.ndarray:
    """Pixels by which the picture moves from each frame to the next, by phase correlation away from the edges, where it comes in."""
    grey = [cv2.cvtColor(np.asarray(frame), cv2.COLOR_RGB2GRAY).astype(np.float32)[16:-16, 24:-24] for frame in frames]
    window = cv2.createHanningWindow(grey[0].shape[::-1], cv2.CV_32F)
    return np.array([-cv2.phaseCorrelate(a, b, window)[0][0] for a, b in zip(grey, grey[1:])])


@pytest.mark.parametrize(
    "input_rate, options, expected",
    [
        (24, {"factor": 3}, Fraction(PAN, 3)),
        (24, {"factor": 5}, Fraction(PAN, 5)),
        (24, {"fps": 60}, Fraction(PAN * 24, 60)),
        (25, {"fps": 30}, Fraction(PAN * 25, 30)),
        (24, {"slow_motion": 3, "audio": "drop"}, Fraction(PAN, 3)),
    ],
)
def test_every_step_of_a_pan_is_even(shipped, tmp_path, input_rate, options, expected):
    source, output = tmp_path / "pan.mkv", tmp_path / "out.mkv"
    with av.open(str(source), "w") as file:
        stream = file.add_stream("ffv1", rate=input_rate, options={})
        stream.height, stream.width, stream.pix_fmt = *pan()[0].shape[:2], "yuv444p"
        for array in pan():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        file.mux(stream.encode(None))
    result = interpolate_video(shipped, source, output, codec="ffv1", cut_threshold=2.0, progress=False, **options)
    with av.open(str(output)) as file:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    # The last source frame is shown until the end.
    moving = [
        frame for time, frame in frames if time <= (FRAMES - 1) / input_rate * options.get("slow_motion", 1) + 1e-3
    ]
    assert len(moving) == int((FRAMES - 1) * PAN / expected) + 1 and result.made >= len(moving) - FRAMES
    assert np.abs(steps(moving) - float(expected)).max() <= 0.3


def test_a_stream_of_frames_moves_evenly_and_belongs_to_the_caller(shipped):
    made = list(interpolate_frames(shipped, pan(), factor=3, cut_threshold=2.0))
    assert len(made) == 3 * FRAMES and np.abs(steps(made[:-2]) - PAN / 3).max() <= 0.3
    spoilt = []
    for frame in interpolate_frames(shipped, pan(), factor=3, cut_threshold=2.0, output_type="np"):
        spoilt.append((frame * 255).round().astype(np.uint8))
        frame *= 0
    assert all(np.array_equal(np.asarray(a), b) for a, b in zip(made, spoilt)), (
        "what a caller does to a frame changes no other"
    )


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("time", [0.25, 0.7])
def test_flow_starts_as_seen_from_the_instant(fine, time):
    prev, _, next_ = (torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 127.5 - 1 for frame in pan())
    source = FlowHints(fine)
    hints_prev, hints_next = source.start(prev, next_, time)
    inner = (0, 0, slice(24, -24), slice(40, -40))
    assert abs(hints_prev[inner].median().item() - 2 * PAN * time) <= 0.3
    assert abs(hints_next[inner].median().item() + 2 * PAN * (1 - time)) <= 0.3


def test_flow_between_neighbours_is_found_once_for_all_instants():
    prev, _, next_ = (torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 127.5 - 1 for frame in pan())
    source, calls = FlowHints(), []
    flows = source._flows
    source._flows = lambda *frames, **settings: calls.append(1) or flows(*frames, **settings)
    first = source.start(prev, next_, 0.25)
    assert (
        torch.equal(source.start(prev, next_, 0.25)[0], first[0])
        and source.start(prev, next_, 0.5)
        and len(calls) == 1
    )
    prev += 0.1 * torch.rand(prev.shape, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(source.start(prev, next_, 0.25)[0], first[0]) and len(calls) == 2, (
        "frames that changed have other flow"
    )
