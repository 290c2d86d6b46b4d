# SPDX-License-Identifier: Apache-2.0
"""Motion by search, in torch: on any device, of any instant, without weights and without OpenCV.

One flow is sought for both frames: what is at a pixel of the instant was at some place of the first frame and will be at one of the
second, on a straight path (motion symmetric about the instant: Park et al., "BMBC", ECCV 2020). From coarse to fine, each pixel
takes, of its own flow, those near it (at coarse scales) and those of pixels around (propagation: Barnes et al., "PatchMatch", 2009), the
one along which windows of both frames differ least (at the coarsest scales, the one on which neighbours agree: Felzenszwalb & Huttenlocher,
"Efficient belief propagation for early vision", 2006), then goes down the slope of that difference (Lucas & Kanade, 1981); an average within
edges follows (Tomasi & Manduchi, "Bilateral filtering", 1998), and at the coarser scales a flow that bends little (Brox et al., "High
accuracy optical flow estimation based on a theory for warping", ECCV 2004).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .warping import halves, warp, window_mean


# Chosen on windows of training clips and of clips kept for development, by LPIPS of the mean of both warped frames and of what a decoder makes of it (training/EXPERIMENTS.md).
COARSEST_SIDE = 5  # pixels of the shorter side at the coarsest scale, at least
REACH_AT_COARSEST = 4  # pixels there that are tried in each direction
COARSE_SCALES = 3  # at so many scales after it …
REACH = 2  # … flows that differ by up to so many pixels in each direction are tried
JUMPS = (12, 4)  # distances at which other pixels' flows are tried, at every scale
TOLD_JUMPS = (4,)  # the same where it goes on from flow that it was told, but at the first scale, where none are
DESCENTS = 2  # steps of Lucas and Kanade at the coarser scales
LAST_DESCENTS = 1  # at the finest, whose start has been smoothed, and at the first scale after flow that it was told
MOST_DESCENT = 1.5  # pixels of the scale, in each direction
CONTRAST_RADIUS, DIFFERENCE_RADIUS = 4, 3  # of windows, in pixels of the scale
LEAST_CONTRAST = 0.05  # of [0, 1]: where there is less, the difference between frames counts less
GREY_WEIGHT = 0.15  # of grey values' difference, beside that of contrasts, which plain surfaces have not
CHANGE_COST = 0.002  # how much smaller the difference must be for another flow to be taken
FAR_COST = 0.002  # the same for each pixel by which it differs, where all that are near are tried
AGREEING_SCALES = 3  # at so many, the coarsest first, pixels agree with their neighbours on which of these to take
ROUNDS = 5  # of telling each other what each of these would cost
APART_COST = 0.02  # of a pixel, to the right and down, between neighbours' flows …
MOST_APART = 3.0  # … up to so many: edges of things cost no more
STIFFNESS = 5e-6  # of the descent, and of smoothing, where there is no slope
EDGE = 0.1  # of [0, 1]: pixels that differ so much are averaged little
CONFIDENCE = 0.03  # pixels whose windows differ so much count little in averages
AVERAGED = (1, 2)  # distances of the pixels around that are averaged, one after the other
SMOOTHINGS, SWEEPS = 2, 10  # how often both frames are looked at again, and sweeps of Jacobi each time
BEND_COST = 0.2  # of a pixel between neighbours' flows, beside a cost of 1 of a grey value of [0, 1] between frames
GAP_KNEE = 0.01  # of grey values: a difference beyond costs what it is, a smaller one its square
BEND_KNEE = 0.1  # the same of pixels between neighbours' flows
MOST_SMOOTHING = 1.0  # pixels of the scale, in each direction and at a time


@torch.no_grad()
def search_flow(
    first: torch.Tensor,
    second: torch.Tensor,
    time: float | torch.Tensor,
    start: torch.Tensor | None = None,
    finest_scale: int = 1,
    polish: bool = True,
    whole: bool = True,
) -> torch.Tensor:
    """
    The flow of both frames, without gradients: it is found by choices.

    Args:
        first, second (`torch.Tensor` of shape `(B, 1, H, W)`): grey frames, in [0, 1].
        time (`float` or `torch.Tensor` of shape `(B,)`): the instant, from 0, the first frame's, to 1, the second's.
        start (`torch.Tensor` of shape `(B, 2, h, w)`, *optional*): flow to start from, one scale before the finest; in pixels of its own
            size, which is that of the frames or of a scale.
        finest_scale (`int`): halvings of the frames at which the search ends.
        polish (`bool`): then go down the slope at full resolution, from what was found at a smaller one.
        whole (`bool`): give flow of the frames' size; otherwise of the finest scale's, as it was found there.

    Returns:
        Flow `(B, 2, H, W)` float32, or of the finest scale's size, (x, y) in its pixels: what is at `p` at the instant moves from
        `p - time * flow(p)` in the first frame to `p + (1 - time) * flow(p)` in the second.
    """
    size = first.shape[-2:]
    # A number is filled in on the device, so that nothing is copied to it.
    share = time if isinstance(time, torch.Tensor) else torch.full((1,), time, device=first.device)
    share = share.to(first.device, torch.float32).expand(len(first)).view(-1, 1, 1, 1)
    # The flow times these are the offsets to both frames.
    shares = torch.cat([-share, 1 - share])
    last = finest_scale + 1 if start is not None else None
    scales = _pyramid(torch.cat([first, second]).float(), finest_scale, last)
    flow = None
    for number in reversed(range(finest_scale, len(scales))):
        frames = scales[number]
        seen = _contrast(frames)
        images = torch.cat([seen, frames], dim=1)
        if flow is not None:
            flow = _at_next_scale(flow, frames.shape[-2:])
        elif start is not None:
            flow = flow_of_size(start.float(), frames.shape[-2:])
        if flow is None:
            flow = seen.new_zeros(len(first), 2, *frames.shape[-2:])
            flow, difference = _least_near(images, flow, shares, REACH_AT_COARSEST, AGREEING_SCALES > 0)
        elif start is None and number >= len(scales) - 1 - COARSE_SCALES:
            flow, difference = _least_near(images, flow, shares, REACH, number > len(scales) - 1 - AGREEING_SCALES)
        else:
            difference = _difference(images, flow, shares)
        told = number == last
        for jump in JUMPS if start is None else () if told else TOLD_JUMPS:
            candidates = torch.stack([flow, *_around(flow, [(jump, 0), (-jump, 0), (0, jump), (0, -jump)])])
            flow, difference = _least(images, candidates, shares, CHANGE_COST, difference)
        descents = DESCENTS if number > finest_scale and not told else LAST_DESCENTS
        flow = _settled(frames, seen, flow, shares, difference, descents)
        if number > finest_scale:
            flow = _smoothed(frames, seen, flow, shares)
    assert flow is not None  # there is a scale at least
    if not whole:
        return flow
    for _ in range(finest_scale):
        flow = _at_next_scale(flow, (2 * flow.shape[-2], 2 * flow.shape[-1]))
    flow = flow[..., : size[0], : size[1]]
    if polish and finest_scale > 0:
        flow = _polished(torch.cat([first, second]).float(), flow, shares)
    return flow


def _settled(
    frames: torch.Tensor,
    seen: torch.Tensor,
    flow: torch.Tensor,
    shares: torch.Tensor,
    difference: torch.Tensor,
    descents: int,
) -> torch.Tensor:
    """Flow after so many steps of Lucas and Kanade, each taken where it makes the difference smaller, then averaged within edges. `seen`
    are the frames' contrasts, `difference` that along the flow."""
    pictures = torch.cat([seen, frames, *_slopes(seen)], dim=1)
    first, second = _warp_both(pictures, flow, shares)
    for left in reversed(range(descents)):
        tried = flow + _descent(first, second, shares)
        # After the last step, nobody asks for slopes.
        kept = pictures.shape[1] if left else 2
        first_there, second_there = _warp_both(pictures[:, :kept], tried, shares)
        reached = _windows_differ(first_there, second_there)
        better = reached < difference
        flow, difference = torch.where(better, tried, flow), torch.where(better, reached, difference)
        first, second = (
            torch.where(better, there, here[:, :kept])
            for there, here in ((first_there, first), (second_there, second))
        )
    return _averaged(flow, first, second, difference)


def _polished(frames: torch.Tensor, flow: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Flow after one step of Lucas and Kanade more, taken everywhere, and an average over four pixels in the place of eight: at full
    resolution a look at what the step did costs more time than it is worth."""
    seen = _contrast(frames)
    first, second = _warp_both(torch.cat([seen, frames, *_slopes(seen)], dim=1), flow, shares)
    flow = flow + _descent(first, second, shares)
    return _averaged(flow, first, second, _windows_differ(first, second), of_four=True)


def _descent(first: torch.Tensor, second: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The step of Lucas and Kanade for contrasts, grey values and slopes of both frames `(B, 4, h, w)`, warped: `(B, 2, h, w)`."""
    to_first, to_second = halves(shares.abs())
    gap = second[:, :1] - first[:, :1]
    slope = (to_second * second[:, 2:]).addcmul_(to_first, first[:, 2:])
    x, y = slope[:, :1], slope[:, 1:]
    sums = window_mean(torch.cat([x * x, x * y, y * y, x * gap, y * gap], dim=1), DIFFERENCE_RADIUS)
    xx, xy, yy, xg, yg = sums.split(1, dim=1)
    xx, yy = xx + STIFFNESS, yy + STIFFNESS
    along_x, along_y = (xy * yg).addcmul_(yy, xg, value=-1), (xy * xg).addcmul_(xx, yg, value=-1)
    step = torch.cat([along_x, along_y], dim=1).div_((xx * yy).addcmul_(xy, xy, value=-1))
    return step.clamp_(-MOST_DESCENT, MOST_DESCENT)


def _pyramid(frames: torch.Tensor, finest_scale: int, last: int | None) -> list[torch.Tensor]:
    """Frames and their halves down to the coarsest scale, or to the `last`; sides that are odd are continued by a pixel."""
    scales = [frames]
    while len(scales) <= finest_scale or (
        min(scales[-1].shape[-2:]) >= 2 * COARSEST_SIDE if last is None else len(scales) <= last
    ):
        height, width = scales[-1].shape[-2:]
        scales.append(F.avg_pool2d(F.pad(scales[-1], (0, width % 2, 0, height % 2), mode="replicate"), 2))
    return scales


def _at_next_scale(flow: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Flow of a scale as flow of the next finer one, of that size."""
    flow = 2 * F.interpolate(flow, scale_factor=2.0, mode="bilinear", align_corners=False)
    return flow[..., : size[0], : size[1]]


def flow_of_size(flow: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Flow as flow of a smaller or larger image that is halved or doubled to that size, odd sides continued by a pixel."""
    while flow.shape[-1] > size[1]:
        flow = F.avg_pool2d(F.pad(flow, (0, flow.shape[-1] % 2, 0, flow.shape[-2] % 2), mode="replicate"), 2) / 2
    while flow.shape[-1] < size[1]:
        flow = _at_next_scale(flow, (2 * flow.shape[-2], 2 * flow.shape[-1]))
    return flow[..., : size[0], : size[1]]


def _contrast(frames: torch.Tensor) -> torch.Tensor:
    """Frames less the mean around each pixel, over the contrast around it: what a change of light leaves as it is."""
    radius = min(CONTRAST_RADIUS, (min(frames.shape[-2:]) - 1) // 2)
    high = frames - window_mean(frames, radius)
    return high * (LEAST_CONTRAST / (window_mean(high.square(), radius).sqrt() + LEAST_CONTRAST))


def _warp_both(images: torch.Tensor, flow: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second images `(2B, C, h, w)` as seen at the instant, along flow `(B, 2, h, w)`."""
    return halves(warp(images, torch.cat([flow, flow]) * shares))


def _difference(images: torch.Tensor, flow: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """By how much windows of both images differ along a flow, `(B, 1, h, w)`."""
    return _windows_differ(*_warp_both(images, flow, shares))


def _windows_differ(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """By how much windows around each pixel differ in the first channel, contrasts, and the second, grey values."""
    gaps = (second[:, :2] - first[:, :2]).abs()
    return window_mean(gaps[:, :1] + GREY_WEIGHT * gaps[:, 1:], DIFFERENCE_RADIUS)


def _slopes(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slopes of images along x and y."""
    left, right, above, below = _around(images, [(-1, 0), (1, 0), (0, -1), (0, 1)])
    return (right - left) / 2, (below - above) / 2


def _costs(
    images: torch.Tensor, candidates: torch.Tensor, shares: torch.Tensor, costs: torch.Tensor | float
) -> torch.Tensor:
    """Difference plus cost at each pixel along candidate flows `(K, B, 2, h, w)`: `(K, B, 1, h, w)`."""
    count, batch = candidates.shape[:2]
    # Of all candidates, first images and then second ones.
    pairs, between = (
        each.unflatten(0, (2, 1, batch)).expand(-1, count, -1, -1, -1, -1).flatten(0, 2) for each in (images, shares)
    )
    differences = _difference(pairs, candidates.flatten(0, 1), between).unflatten(0, (count, batch))
    return differences + (costs.view(-1, 1, 1, 1, 1) if isinstance(costs, torch.Tensor) else costs)


def _least(
    images: torch.Tensor, candidates: torch.Tensor, shares: torch.Tensor, cost: float, known: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of candidate flows `(K, B, 2, h, w)`, the one with the least difference at each pixel, and that difference. `known` is that along the
    first; `cost` is added to that along each of the others."""
    differences = torch.cat([known[None], _costs(images, candidates[1:], shares, cost)])
    least, chosen = differences.min(dim=0)
    return candidates.gather(0, chosen.expand(-1, 2, -1, -1)[None])[0], least


def _least_near(
    images: torch.Tensor, flow: torch.Tensor, shares: torch.Tensor, reach: int, agreed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a flow and all that differ from it by up to `reach` whole pixels in each direction, the one with the least difference plus cost at
    each pixel, or that on which neighbours agree; and that sum, without what neighbours add to it."""
    around = torch.arange(-reach, reach + 1, device=flow.device, dtype=flow.dtype)
    ways = torch.cartesian_prod(around, around)
    candidates = flow + ways.view(-1, 1, 2, 1, 1)
    costs = _costs(images, candidates, shares, FAR_COST * ways.norm(dim=1))  # [K,B,1,h,w]
    compared = (
        _with_neighbours(costs[:, :, 0].transpose(0, 1), flow, reach).transpose(0, 1)[:, :, None] if agreed else costs
    )
    chosen = compared.argmin(dim=0, keepdim=True)
    return candidates.gather(0, chosen.expand(-1, -1, 2, -1, -1))[0], costs.gather(0, chosen)[0]


def _with_neighbours(costs: torch.Tensor, flow: torch.Tensor, reach: int) -> torch.Tensor:
    """
    Costs of `(2 * reach + 1) ** 2` steps from a flow at each pixel `(B, K, h, w)`, in the order of x and then y, and beside them what it
    would cost the pixels around: each tells its four neighbours how little its own steps can cost for each of theirs, with
    `APART_COST` for a pixel by which both flows would differ and no more than for `MOST_APART`, and passes on what the others told it
    (min-sum belief propagation).
    """
    side = 2 * reach + 1
    ways = [(1, 0), (-1, 0), (0, 1), (0, -1)]
    steps = torch.arange(-reach, reach + 1, device=flow.device, dtype=flow.dtype)
    between = steps.view(-1, 1, 1, 1) - steps.view(-1, 1, 1)  # of a step here and one there
    # Flow here less flow there, to the right and down: [4,B,here,there,h,w].
    x, y = torch.stack([flow - there for there in _around(flow, ways)]).split(1, dim=2)
    x, y = (APART_COST * (gap[:, :, None] + between).abs() for gap in (x, y))
    height, width = flow.shape[-2:]
    is_there = flow.new_ones(4, 1, 1, height, width)
    is_there[0, ..., -1], is_there[1, ..., 0], is_there[2, ..., -1, :], is_there[3, ..., 0, :] = 0, 0, 0, 0
    told = costs.new_zeros(4, *costs.shape)
    for _ in range(ROUNDS):
        # Whoever tells leaves out what it was told by the one it tells, who is on the other side of it.
        passed = costs + told.sum(dim=0) - torch.stack([told[1], told[0], told[3], told[2]])
        there = torch.stack([_around(each, [way])[0] for each, way in zip(passed, ways)])
        least = there.amin(dim=2, keepdim=True)
        found = there.unflatten(2, (1, side, side))  # [4,B,1,x there,y there,h,w]
        found = (found + x[:, :, :, :, None]).amin(dim=3)  # [4,B,x here,y there,h,w]
        found = (found[:, :, :, None] + y[:, :, None]).amin(dim=4)  # [4,B,x here,y here,h,w]
        told = (found.flatten(2, 3) - least).clamp(max=APART_COST * MOST_APART) * is_there
    return costs + told.sum(dim=0)


def _around(images: torch.Tensor, ways: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Images as seen from so many pixels, (x, y), away; borders are continued. Views."""
    most = max(abs(step) for way in ways for step in way)
    padded = F.pad(images, (most, most, most, most), mode="replicate")
    height, width = images.shape[-2:]
    return [padded[..., most + y : most + y + height, most + x : most + x + width] for x, y in ways]


def _averaged(
    flow: torch.Tensor, first: torch.Tensor, second: torch.Tensor, difference: torch.Tensor, of_four: bool = False
) -> torch.Tensor:
    """Flow averaged with that of pixels around, eight or four, which look alike in the warped images, by their second channel, grey
    values, and whose flow is sure: along it, windows differ little. Two pixels look as much alike from either, so that it is found once."""
    image = (first[:, 1:2] + second[:, 1:2]) / 2
    confidence = torch.exp(difference * (-1 / CONFIDENCE)) + 1e-3
    height, width = flow.shape[-2:]
    for distance in AVERAGED:
        padded = F.pad(image, (distance, distance, distance, distance), mode="replicate")
        ways = [(distance, 0), (0, distance)]
        if not of_four:
            ways += [(distance, distance), (-distance, distance)]
        total, weights = confidence * flow, confidence.clone()
        for x, y in ways:
            alike = _alike(padded, x, y)
            # There and back: of a pair of pixels, this one is the first, and then the second.
            back = [(x, y), (-x, -y)]
            places = [(distance, distance - max(-x, 0)), (distance - y, distance - max(x, 0))]
            for (top, left), flow_there, sure in zip(places, _around(flow, back), _around(confidence, back)):
                weight = alike[..., top : top + height, left : left + width] * sure
                total.addcmul_(weight, flow_there)
                weights += weight
        flow = total.div_(weights)
    return flow


def _alike(image: torch.Tensor, x: int, y: int) -> torch.Tensor:
    """How much alike two pixels look of which the second is (x, y) away from the first, 1 at most, wherever both are in the image: from the
    topmost such pair to the lowest, and from the leftmost on."""
    height, width = image.shape[-2:]
    first = image[..., : height - y, max(-x, 0) : width - max(x, 0)]
    second = image[..., y:, max(x, 0) : width - max(-x, 0)]
    return torch.exp((second - first).abs() * (-1 / EDGE))


def _smoothed(frames: torch.Tensor, seen: torch.Tensor, flow: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Flow near this one along which the frames' contrasts `seen` differ little and that bends little, but at edges.

    What is made small is the sum over pixels of `sqrt(gap² + GAP_KNEE²)` and, for each two neighbours,
    `edge * BEND_COST * sqrt(|difference of their flows|² + BEND_KNEE²)` (Brox et al., 2004), by weighted squares.
    """
    pictures = torch.cat([seen, frames, *_slopes(seen)], dim=1)
    to_first, to_second = halves(shares.abs())
    for _ in range(SMOOTHINGS):
        first, second = _warp_both(pictures, flow, shares)
        gap = second[:, :1] - first[:, :1]
        slope = (to_second * second[:, 2:]).addcmul_(to_first, first[:, 2:])
        image = (first[:, 1:2] + second[:, 1:2]) / 2
        # Weights of each pixel with its right and its lower neighbour; none leads over the border.
        across = _bend_weights(flow.diff(dim=3), image.diff(dim=3))
        down = _bend_weights(flow.diff(dim=2), image.diff(dim=2))
        to_left, to_right = F.pad(across, (1, 0)), F.pad(across, (0, 1))
        to_above, to_below = F.pad(down, (0, 0, 1, 0)), F.pad(down, (0, 0, 0, 1))
        # Each pixel's flow solves (sum of weights + pull * slope slopeᵀ) flow = weighted neighbours + pull * slope * (slope · flow - gap).
        pull = torch.rsqrt(gap.square() + GAP_KNEE**2) * _both_within(flow, shares)
        x, y = slope[:, :1], slope[:, 1:]
        stiff = to_left + to_right + to_above + to_below + STIFFNESS
        xx, xy, yy = pull * x * x + stiff, pull * x * y, pull * y * y + stiff
        given = pull * slope * ((slope * flow).sum(dim=1, keepdim=True) - gap) + STIFFNESS * flow
        determinant = xx * yy - xy * xy
        to_x, to_y = torch.cat([yy, -xy], dim=1) / determinant, torch.cat([-xy, xx], dim=1) / determinant
        # Sweeps go through views of one border more, where nothing counts, so that a sweep is no more than its sums.
        around = F.pad(flow, (1, 1, 1, 1))
        solved = around[..., 1:-1, 1:-1]
        left, right = around[..., 1:-1, :-2], around[..., 1:-1, 2:]
        above, below = around[..., :-2, 1:-1], around[..., 2:, 1:-1]
        right_side = torch.empty_like(given)
        side_x, side_y = right_side.split(1, dim=1)
        for _ in range(SWEEPS):
            torch.addcmul(given, to_left, left, out=right_side)
            right_side.addcmul_(to_right, right).addcmul_(to_above, above).addcmul_(to_below, below)
            torch.mul(to_x, side_x, out=solved).addcmul_(to_y, side_y)
        flow = flow + (solved - flow).clamp(-MOST_SMOOTHING, MOST_SMOOTHING)
    return flow


def _both_within(flow: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """1 where a flow `(B, 2, h, w)` leads into both frames, 0 elsewhere; `(B, 1, h, w)`."""
    height, width = flow.shape[-2:]
    x = torch.arange(width, device=flow.device, dtype=flow.dtype)
    y = torch.arange(height, device=flow.device, dtype=flow.dtype)[:, None]
    at_x, at_y = (torch.cat([flow, flow]) * shares + torch.stack(torch.broadcast_tensors(x, y))).split(1, dim=1)
    into_first, into_second = halves((at_x >= 0) & (at_x <= width - 1) & (at_y >= 0) & (at_y <= height - 1))
    return into_first & into_second


def _bend_weights(bends: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Weights of squared differences of neighbours' flows `(B, 2, h, w)`, less where grey values `(B, 1, h, w)` differ."""
    bend = torch.rsqrt(bends.square().sum(dim=1, keepdim=True) + BEND_KNEE**2)
    return BEND_COST * torch.exp(edges.abs() * (-1 / EDGE)) * bend
