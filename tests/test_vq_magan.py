import pytest
import torch
from diffusers import VQModel

from madiff_diffusers import VQMAGANModel, vq_magan
from madiff_diffusers.warping import _cubic_by_pixels, halves, joined, warp
from tests.conftest import excite, load_config


PAPER_BEHAVIOUR = {
    "coarse_to_fine": False,
    "offset_hints": False,
    "match_neighbours": False,
    "warp_frames": False,
    "refine_channels": 0,
    "stem_stride": 1,
}


def build(**changes) -> VQMAGANModel:
    torch.manual_seed(0)
    return VQMAGANModel(**{**load_config("tiny")["vqvae"], **changes})


def inputs(model: VQMAGANModel, batch: int = 2, height: int = 32, width: int = 48) -> tuple:
    generator = torch.Generator().manual_seed(1)
    frames = [torch.rand(batch, 3, height, width, generator=generator) * 2 - 1 for _ in range(3)]
    hints = [torch.randn(batch, model.config.hint_channels, height, width, generator=generator) for _ in range(2)]
    return (*frames, *hints)


def test_is_a_vq_model_with_features_at_every_scale():
    model = build()
    assert isinstance(model, VQModel)
    frame = inputs(model)[0]
    encoded = model.encode(frame)
    assert model.downsample_factor == 8
    assert encoded.latents.shape == (2, 3, 4, 6)
    assert torch.equal(encoded.features.frame, frame)
    features = (encoded.features.frame, *encoded.features.pyramid)
    assert [tuple(feature.shape[-2:]) for feature in features] == [(32, 48), (16, 24), (8, 12), (4, 6)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        PAPER_BEHAVIOUR,
        {"norm_num_groups": None, "act_fn": "leaky_relu"},
        {"hint_encoder_channels": 6},
        {**PAPER_BEHAVIOUR, "hint_encoder_channels": 6},
    ],
)
def test_forward_gives_a_frame_offsets_and_gates(changes):
    model = excite(build(**changes))
    frames = inputs(model, height=64, width=96)
    out = model(*frames)
    assert out.sample.shape == (2, 3, 64, 96) and out.sample.isfinite().all()
    assert out.commit_loss.shape == (2,)
    assert all(offsets.shape[1] == 4 for offsets in out.offsets)
    assert all(0 <= gate.min() and gate.max() <= 1 for gate in out.gates)
    sides = [offsets.shape[-2] for offsets in out.offsets]
    assert sides == sorted(sides) and len(sides) == len(model.config.block_out_channels) + 1 + model.config.warp_frames


@pytest.mark.parametrize("changes", [{}, PAPER_BEHAVIOUR, {"compare_warps": True}, {"hint_encoder_channels": 6}])
def test_every_parameter_receives_a_gradient(changes):
    model = excite(build(**changes))
    mid, *rest = inputs(model)
    out = model(mid, *rest)
    ((out.sample - mid).abs().mean() + out.commit_loss.mean()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_the_last_warp_can_see_both_neighbours():
    """Where it compares them, what it takes from each depends on each; otherwise on their blend alone."""
    torch.manual_seed(0)
    for compare in (False, True):
        head = excite(build(compare_warps=compare)).decoder.head
        hidden_states, frames, start = torch.randn(1, 8, 8, 8), torch.rand(2, 3, 16, 16), torch.zeros(2, 2, 16, 16)
        gates = [head(hidden_states, frames, start, torch.randn(2, 8, 8, 8))[2] for _ in range(2)]
        assert torch.equal(*gates) != compare
    with pytest.raises(ValueError, match="need `warp_frames=True`"):
        build(compare_warps=True, warp_frames=False)


def test_what_does_not_move_is_kept():
    model = excite(build(still_threshold=0.1))
    mid, prev, _, *hints = inputs(model)
    still = model(mid, prev, prev, *hints).sample
    assert torch.allclose(still, prev, atol=1e-6), "whatever the hints say"
    assert not torch.allclose(excite(build())(mid, prev, prev, *hints).sample, prev, atol=0.05)
    # A patch that changes by more than the threshold is the network's, and what is far from it is kept.
    changed = prev.clone()
    changed[:, :, :16, :16] += 0.5
    made, free = model(mid, prev, changed, *hints).sample, excite(build())(mid, prev, changed, *hints).sample
    assert torch.equal(made[:, :, :12, :12], free[:, :, :12, :12])
    assert torch.allclose(made[:, :, 20:, 20:], prev[:, :, 20:, 20:], atol=1e-6)
    with pytest.raises(ValueError, match="need `warp_frames=True`"):
        build(still_threshold=0.1, warp_frames=False)


def test_decode_quantizes_what_encode_does_not():
    model = excite(build())
    mid, prev, next_, hints_prev, hints_next = inputs(model)
    encoded = [model.encode(frame) for frame in (prev, next_)]
    rest = (encoded[0].features, encoded[1].features, hints_prev, hints_next)
    latents = model.encode(mid).latents
    codes = model.quantize.embedding.weight
    distance = torch.cdist(latents.permute(0, 2, 3, 1).reshape(-1, 3), codes)
    nearest = codes[distance.argmin(1)].view(2, 4, 6, 3).permute(0, 3, 1, 2)
    assert not torch.allclose(latents, nearest)
    expected = model.decode(nearest, *rest, force_not_quantize=True).sample
    assert torch.allclose(model.decode(latents, *rest).sample, expected, atol=1e-5)
    assert not torch.allclose(model.decode(latents, *rest, force_not_quantize=True).sample, expected, atol=1e-5)


def test_forward_is_encode_and_decode():
    model = excite(build())
    mid, prev, next_, *hints = inputs(model)
    encoded = [model.encode(frame) for frame in (mid, prev, next_)]
    decoded = model.decode(encoded[0].latents, encoded[1].features, encoded[2].features, *hints).sample
    assert torch.allclose(decoded, model(mid, prev, next_, *hints).sample, atol=1e-5)


def test_hints_and_latents_change_the_frame():
    model = excite(build())
    mid, prev, next_, hints_prev, hints_next = inputs(model)
    sample = model(mid, prev, next_, hints_prev, hints_next).sample
    assert not torch.allclose(sample, model(mid, prev, next_, 0 * hints_prev, 0 * hints_next).sample, atol=1e-4)
    assert not torch.allclose(sample, model(-mid, prev, next_, hints_prev, hints_next).sample, atol=1e-4)


def test_an_untrained_decoder_warps_the_frames_along_the_flow_among_the_hints():
    model = build()
    # A change of 4 pixels in x between neighbours: the middle is 2 pixels from both.
    ramp = torch.linspace(-1, 1, 48).expand(1, 3, 32, 48)
    step = 2 / 47
    prev, next_ = ramp - 2 * step, ramp + 2 * step
    hints = torch.zeros(1, 20, 32, 48)
    hints_prev, hints_next = hints.clone(), hints.clone()
    hints_prev[:, -2], hints_next[:, -2] = 2, -2
    sample = model(ramp, prev, next_, hints_prev, hints_next).sample
    assert torch.allclose(sample[..., 4:-4], ramp[..., 4:-4], atol=1e-4)


def test_warp_moves_by_pixels_and_repeats_the_border():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    offsets = torch.zeros(1, 2, 3, 4)
    assert torch.allclose(warp(image, offsets), image, atol=1e-5)
    offsets[:, 0] = 1
    assert torch.allclose(warp(image, offsets)[0, 0, 0], torch.tensor([1.0, 2.0, 3.0, 3.0]), atol=1e-5)
    offsets[:, 1] = -0.5
    assert torch.allclose(warp(image, offsets)[0, 0, 1], torch.tensor([3.0, 4.0, 5.0, 5.0]), atol=1e-5)


def test_a_cubic_warp_weighs_four_pixels_each_way():
    """By cubic convolution, half-way between two pixels, and at the border those that are there are continued."""
    torch.manual_seed(0)
    image, offsets = torch.rand(1, 2, 5, 8), torch.zeros(1, 2, 5, 8)
    assert torch.allclose(warp(image, offsets, cubic=True), image, atol=1e-5)
    offsets[:, 0] = 0.5
    row = torch.cat([image[..., :1], image, image[..., -1:], image[..., -1:]], dim=-1)
    weights = (-0.09375, 0.59375, 0.59375, -0.09375)
    expected = sum(weight * row[..., first : first + 7] for first, weight in enumerate(weights))
    warped = warp(image, offsets, cubic=True)
    assert torch.allclose(warped[..., :-1], expected, atol=1e-5)
    assert torch.allclose(warped[..., -1], image[..., -1], atol=1e-5), "offsets that lead out of it end at its border"
    part = warp(image, offsets[..., 1:3, 2:6], origin=(1, 2), cubic=True)
    assert torch.allclose(part, warped[..., 1:3, 2:6], atol=1e-5)


def test_cubic_samples_are_the_same_pixel_by_pixel():
    image, offsets = torch.rand(2, 3, 9, 14), 3 * torch.randn(2, 2, 9, 14)
    x = (torch.arange(14.0) + offsets[:, 0]).clamp(0, 13)
    y = (torch.arange(9.0)[:, None] + offsets[:, 1]).clamp(0, 8)
    assert torch.allclose(_cubic_by_pixels(image, x, y), warp(image, offsets, cubic=True), atol=1e-5)


def test_frames_are_sampled_as_configured():
    """Stripes that move by half a pixel keep more of their contrast by cubic samples."""
    stripes = torch.tensor([-1.0, -1.0, 1.0, 1.0]).repeat(12).expand(1, 3, 32, 48)
    contrast = {}
    for sampling in ("bilinear", "bicubic"):
        model = build(frame_sampling=sampling)  # as built, it blends both frames along the hints
        hints = torch.zeros(1, model.config.hint_channels, 32, 48)
        hints[:, -2] = 0.5
        contrast[sampling] = model(stripes, stripes, stripes, hints, hints).sample[..., 8:-8].abs().amax()
    assert contrast["bicubic"] > contrast["bilinear"] + 0.05
    with pytest.raises(ValueError, match="`frame_sampling` must be 'bilinear', or 'bicubic' .* is 'cubic'"):
        build(frame_sampling="cubic")
    with pytest.raises(ValueError, match="`frame_sampling` must be .* with `warp_frames=True`"):
        build(frame_sampling="bicubic", warp_frames=False)


def test_the_warp_of_a_part_reaches_out_of_it():
    image = torch.rand(2, 3, 12, 40)
    offsets = 9 * torch.randn(2, 2, 12, 40)
    part = warp(image, offsets[..., 4:8, 8:24], origin=(4, 8))
    assert torch.allclose(part, warp(image, offsets)[..., 4:8, 8:24], atol=1e-5)


def test_warp_in_half_precision_still_addresses_pixels_of_a_wide_frame():
    image = torch.arange(3000.0).view(1, 1, 1, 3000) / 3000
    warped = warp(image.bfloat16(), torch.full((1, 2, 1, 3000), 5.0))
    assert torch.equal(warped[..., :-5], image.bfloat16()[..., 5:])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("origin", [None, (4, 8)])
def test_features_are_warped_alike_by_rows_and_by_channels(dtype, tolerance, origin):
    """Rows of channels are read where they lie side by side and no gradient is wanted."""
    image = torch.rand(2, 24, 20, 40).to(dtype)
    offsets = 9 * torch.randn(2, 2, 8, 16)
    offsets[:, :, 2] = offsets[:, :, 2].round()
    offsets[:, :, 3] = 100
    offsets[0, 0, 5, 5] = float("nan")
    expected = warp(image, offsets, origin)
    with torch.no_grad():
        warped = warp(image.contiguous(memory_format=torch.channels_last), offsets, origin)
    assert warped.is_contiguous(memory_format=torch.channels_last) and warped.dtype == dtype
    assert torch.allclose(warped, expected, atol=tolerance, equal_nan=True) and warped[0, :, 5, 5].isnan().all()
    assert torch.equal(warped[:, :, 3], image[:, :, -1:, -1].expand(-1, -1, 16))


def test_halves_are_joined_without_a_copy():
    for whole in (torch.rand(4, 3, 5, 6), torch.rand(2, 3, 5, 6).to(memory_format=torch.channels_last)):
        first, second = halves(whole)
        with torch.no_grad():
            both = joined(first, second)
            assert torch.equal(both, whole) and both.data_ptr() == whole.data_ptr() and both.stride() == whole.stride()
            for other in (second.clone(), first, whole[1 : 1 + len(first)]):
                assert torch.equal(joined(first, other), torch.cat([first, other]))
            assert torch.equal(joined(second, first), torch.cat([second, first]))
            part = [each[..., 1:4, 2:5] for each in (first, second)]
            assert torch.equal(joined(*part), whole[..., 1:4, 2:5])
        assert joined(first, second).data_ptr() != whole.data_ptr(), (
            "what a gradient flows through is a tensor of its own"
        )


@pytest.mark.parametrize("refine_channels", [0, 4])
def test_strips_of_the_last_warp_meet_without_a_seam(monkeypatch, refine_channels):
    model = excite(build(refine_channels=refine_channels, still_threshold=0.5)).eval()
    with torch.no_grad():
        mid, prev, next_, *hints = inputs(model, height=40)
        features = [model.encode(frame).features for frame in (prev, next_)]
        latents = model.encode(mid).latents

        def decode(**part):
            return model.decode(latents, *features, *hints, **part)

        whole = decode()
        monkeypatch.setattr(vq_magan, "STRIP_PIXELS", 7 * 48)
        strips = decode()
        for name in ("offsets", "gates"):
            assert torch.allclose(getattr(strips, name)[-1], getattr(whole, name)[-1], atol=1e-5)
        assert torch.allclose(strips.sample, whole.sample, atol=1e-5)

        latents, hints = latents[..., 1:, 2:], [each[..., 8:, 16:] for each in hints]
        part = decode(origin=(8, 16)).sample
        monkeypatch.undo()
        assert torch.allclose(part, decode(origin=(8, 16)).sample, atol=1e-5)


def test_resized_hints_average_events_and_rescale_offsets():
    model = build()
    hints = torch.ones(1, 20, 32, 48)
    resized = model.resize_hints(hints, (8, 12))
    assert resized.shape == (1, 20, 8, 12)
    assert torch.allclose(resized[:, :-2], torch.ones(1)) and torch.allclose(resized[:, -2:], torch.tensor(0.25))
    plain = build(offset_hints=False).resize_hints(hints, (8, 12))
    assert torch.allclose(plain, torch.ones(1))


def test_what_cancels_in_means_over_cells_is_seen_by_an_encoder_of_hints():
    """Edges of both polarities that go by within a cell; nothing told is nothing found."""
    stripes = torch.zeros(2, 18, 32, 48)
    stripes[..., ::2], stripes[..., 1::2] = 1, -1
    nothing = torch.zeros_like(stripes)
    for channels, seen in ((0, False), (6, True)):
        model = excite(build(offset_hints=False, hint_channels=18, hint_encoder_channels=channels)).eval()
        frames = inputs(model)[:3]
        with torch.no_grad():
            told, untold = (model(*frames, hints, hints).sample for hints in (stripes, nothing))
        assert torch.equal(told, untold) != seen
        if seen:
            assert not any(found.any() for found in model.hint_encoder(nothing))
            with torch.no_grad():  # hints of half the size stand for four pixels each
                smaller = model(*frames, nothing[..., ::2, ::2] + 1, nothing[..., ::2, ::2]).sample
                assert torch.allclose(smaller, model(*frames, nothing + 1, nothing).sample, atol=1e-5)


def test_save_and_load(tmp_path):
    model = excite(build())
    model.register_to_config(scaling_factor=2.5)
    model.save_pretrained(tmp_path)
    loaded = VQMAGANModel.from_pretrained(tmp_path)
    assert loaded.config.scaling_factor == 2.5 and dict(loaded.config)["act_fn"] == "silu"
    batch = inputs(model)
    assert torch.equal(model.eval()(*batch).sample, loaded(*batch).sample)


def test_wrong_arguments_are_named():
    for settings in ({"hint_encoder_channels": 8, "news_latents": True}, {"hint_encoder_channels": 1}):
        with pytest.raises(
            ValueError, match="`hint_encoder_channels` must be 0 or at least 2, and 0 with `news_latents`"
        ):
            VQMAGANModel(**settings)
    with pytest.raises(ValueError, match="`stem_stride` must be 1 or 2, but is 4"):
        build(stem_stride=4)
    with pytest.raises(ValueError, match="coarse_to_fine"):
        build(coarse_to_fine=False)
    with pytest.raises(ValueError, match="'tanh'"):
        build(act_fn="tanh")
    model = build()
    mid, prev, next_, hints_prev, hints_next = inputs(model)
    with pytest.raises(ValueError, match="multiples of 8, but is 30x48"):
        model.encode(mid[:, :, :30])
    with pytest.raises(ValueError, match="`hints_next` must have 20 channels"):
        model(mid, prev, next_, hints_prev, hints_next[:, :18])
