"""Every format of training data on a real layout made here, and what is drawn from it."""

import dataclasses
import pickle
import shutil
import tracemalloc
from pathlib import Path

import cv2
import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from madiff_diffusers.files import VIDEO_SUFFIXES
from madiff_diffusers.scene_cuts import cuts_of_changes, find_cuts
from madiff_diffusers.video.interpolation import SourceFrame
from madiff_diffusers.video.streaming import _with_cuts
from tests.conftest import moving_picture
from tests.video_files import film_clip
from training.data.datasets import ClipDataset, StreamedDataset, build_dataset
from training.data.sources import NoWindow, Unreadable, images_in, parse_sources, read_image, read_source
from training.data.transforms import Augmentation, EventTransform, TripletTransform
from training.frame_bank import FrameBank
from training.options import RunOptions
from training.random_motion import MovingScene
from training.validation import validation_windows


SMALL = {"resolution": 32, "gaps": (1.0,), "candidates": 1}


@pytest.fixture(autouse=True)
def short_wait(monkeypatch) -> None:
    """At the end of every epoch of a stream, the library waits seconds for its threads; here they have little to do."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


def write_frames(folder: Path, names: list, start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        cv2.imwrite(str(folder / name), cv2.cvtColor(moving_picture(start + i), cv2.COLOR_RGB2BGR))


def write_video(path: Path, frames: list, codec: str = "mp4v") -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 25, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()


def triplet_rows(count: int) -> dict:
    columns = {"prev": [], "mid": [], "next": []}
    for row in range(count):
        for i, column in enumerate(columns):
            picture = np.roll(moving_picture(i), 3 * row, axis=1).copy()
            picture[:16, :16] = row  # tells the row
            encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
            columns[column].append({"bytes": encoded, "path": None})
    return columns


def make_dataset(count: int):
    import datasets

    features = datasets.Features({name: datasets.Image() for name in ("prev", "mid", "next")})
    return datasets.Dataset.from_dict(triplet_rows(count), features=features)


def make_layout(name: str, root: Path) -> None:
    """A small folder in a format; every clip drifts by (3, 1) pixels a frame."""
    if name == "videos":
        root.mkdir()
        write_video(root / "a.mp4", [moving_picture(i) for i in range(9)])
        write_video(root / "b.avi", [moving_picture(i) for i in range(5)], codec="MJPG")
    elif name == "frames":
        write_frames(root / "clip1", [f"f{i}.png" for i in range(12)])  # f10 comes after f9
        write_frames(root / "clip2", [f"{i:03d}.jpg" for i in range(4)])
        (root / "notes").mkdir()
    elif name in ("vimeo-triplet", "vimeo-septuplet"):
        prefix, count = ("tri", 3) if name == "vimeo-triplet" else ("sep", 7)
        for folder in ("00001/0001", "00001/0002", "00002/0001"):
            write_frames(root / "sequences" / folder, [f"im{i + 1}.png" for i in range(count)])
        (root / f"{prefix}_trainlist.txt").write_text("00001/0001\n00002/0001\n\n")
        (root / f"{prefix}_testlist.txt").write_text("00001/0002\n")
    elif name == "bvi-dvc":
        for number in range(3):
            write_frames(root / "quintuplets" / f"{number:05d}", [f"frame{i}.png" for i in range(5)])
    elif name == "datasets":
        make_dataset(4).save_to_disk(str(root))
    elif name == "datasets-stream":
        root.mkdir()
        make_dataset(4).to_parquet(str(root / "train.parquet"))
    elif name == "stills":
        write_frames(root, ["a.png", "b.jpg", "c.png"])


FORMATS = ("videos", "frames", "vimeo-triplet", "vimeo-septuplet", "bvi-dvc", "datasets", "datasets-stream", "stills")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_triplets_with_the_middle_in_the_middle(name, tmp_path):
    make_layout(name, tmp_path / "data")
    samples = build_dataset(RunOptions(data=f"{name}:{tmp_path / 'data'}", **SMALL), TripletTransform())
    batch = next(iter(DataLoader(_first(samples, 12), batch_size=12, num_workers=1)))
    frames = [batch[f"frame_{place}"] for place in ("prev", "mid", "next")]
    assert all(frame.shape == (12, 3, 32, 32) and frame.dtype == torch.float32 for frame in frames)
    assert all(-1 <= frame.min() and frame.max() <= 1 for frame in frames)
    if isinstance(samples, ClipDataset):  # where loader processes are not forked, they are handed the samples
        copied = pickle.loads(pickle.dumps(samples))
        assert torch.equal(copied[3]["frame_mid"], samples[3]["frame_mid"])
    prev, mid, next_ = frames
    per_sample = [(a - b).abs().mean((1, 2, 3)) for a, b in ((prev, mid), (mid, next_), (prev, next_))]
    assert (torch.maximum(per_sample[0], per_sample[1]) < 1.05 * per_sample[2]).float().mean() > 0.9
    assert (batch["time"] == 0.5).all() and (batch["unreadable"] == 0).all()


def _first(samples, count: int):
    if isinstance(samples, ClipDataset):
        return torch.utils.data.Subset(samples, range(count))
    return samples


@pytest.mark.parametrize(
    "name, clips",
    [("frames", [12, 4]), ("vimeo-triplet", [3, 3]), ("vimeo-septuplet", [7, 7]), ("bvi-dvc", [5, 5, 5])],
)
def test_lists_and_order_of_frames_are_kept(name, clips, tmp_path):
    make_layout(name, tmp_path / "data")
    source = read_source(name, str(tmp_path / "data"), RunOptions())
    assert list(source.lengths) == clips
    last = source.read(0, range(clips[0] - 1, clips[0]))[0]
    assert np.abs(last.astype(int) - moving_picture(clips[0] - 1)).mean() < 1, "the last by number, not by letters"


@pytest.mark.parametrize("name", [name for name in FORMATS if "datasets" not in name] + ["mvsec"])
def test_a_wrong_layout_shows_the_one_expected(name, tmp_path):
    pytest.importorskip("h5py")
    (tmp_path / "empty").mkdir()
    options = RunOptions(data=f"{name}:{tmp_path / 'empty'}", **SMALL)
    with pytest.raises(ValueError, match=f"(?s)is not of the format {name}: .* Expected:\n    {tmp_path}"):
        build_dataset(options, EventTransform(5, 3))


def test_a_wrong_dataset_or_column_is_named(tmp_path):
    make_layout("datasets", tmp_path / "data")
    with pytest.raises(
        ValueError, match=r"three image columns .* has \['prev', 'mid', 'next'\], but is \['a', 'b', 'c'\]"
    ):
        build_dataset(RunOptions(data=f"datasets:{tmp_path / 'data'}", columns="a,b,c"), TripletTransform())
    for name in ("datasets", "datasets-stream"):
        with pytest.raises(ValueError, match=f"(?s)is not of the format {name}: .* Expected:\n    {tmp_path}"):
            build_dataset(RunOptions(data=f"{name}:{tmp_path / 'nowhere'}"), TripletTransform())


def test_empty_and_broken_cells_are_unreadable(tmp_path):
    import datasets

    rows = triplet_rows(3)
    rows["mid"][0] = None
    rows["mid"][1] = {"bytes": b"no picture", "path": None}
    features = datasets.Features({name: datasets.Image() for name in rows})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "data"))
    options = {"data": f"datasets:{tmp_path / 'data'}", **SMALL}
    with pytest.raises(Unreadable, match="column mid of row [01]"):
        samples = build_dataset(RunOptions(**options), TripletTransform())
        [samples[i] for i in range(20)]
    samples = build_dataset(RunOptions(**options, on_unreadable="skip"), TripletTransform())
    assert sum(int(samples[i]["unreadable"]) for i in range(20)) > 5


def test_sources_are_parsed():
    assert parse_sources("videos:/a@0.8, stills:/b@0.2") == [("videos", "/a", 0.8), ("stills", "/b", 0.2)]
    assert parse_sources("/clips@home/x") == [("videos", "/clips@home/x", 1.0)]
    for wrong in ("tapes:/a", "videos:", "videos:/a@0", "videos:/a@much"):
        with pytest.raises(ValueError, match="`data`"):
            parse_sources(wrong)


def test_sources_are_mixed_by_their_shares(tmp_path):
    for name in ("dark", "bright"):
        (tmp_path / name).mkdir()
        frames = [np.full((40, 40, 3), 50 if name == "dark" else 200, np.uint8)] * 3
        write_video(tmp_path / name / "x.mp4", frames)
    samples = build_dataset(
        RunOptions(data=f"videos:{tmp_path}/dark@1,videos:{tmp_path}/bright@3", **SMALL), TripletTransform()
    )
    bright = np.mean([samples[i]["frame_mid"].mean() > 0 for i in range(200)])
    assert 0.65 < bright < 0.85


def test_a_stream_does_not_mix(tmp_path):
    make_layout("datasets-stream", tmp_path / "data")
    with pytest.raises(ValueError, match="one datasets-stream"):
        build_dataset(RunOptions(data=f"datasets-stream:{tmp_path / 'data'},videos:/x"), TripletTransform())


# ---- videos ----


@pytest.mark.parametrize("cache", [1.0, 0.0])
def test_videos_are_read_alike_kept_or_on_demand(cache, tmp_path):
    make_layout("videos", tmp_path / "data")
    source = read_source("videos", str(tmp_path / "data"), RunOptions(cache_gib=cache))
    assert list(source.lengths) == [9, 5]
    for first in (0, 1, 5):
        for i, frame in enumerate(source.read(0, range(first, first + 4, 2))):
            truth = moving_picture(first + 2 * i).astype(int)
            error = np.abs(frame.astype(int) - truth).mean()
            assert error < 6 and error < np.abs(frame.astype(int) - moving_picture(first + 2 * i + 1)).mean()


def scenes() -> list:
    """Two scenes of six frames each."""
    other = cv2.flip(255 - moving_picture(0), 0)
    return [moving_picture(i) for i in range(6)] + [np.roll(other, 2 * i, axis=1) for i in range(6)]


def test_cuts_are_found_and_motion_is_not_taken_for_one():
    assert find_cuts(scenes()) == [6]
    assert find_cuts([scenes()[5], scenes()[6]]) == [1]
    assert find_cuts([moving_picture(8 * i) for i in range(12)]) == [], "24 pixels a frame"
    flicker = [np.clip(moving_picture(i).astype(int) + 12 * (i % 2), 0, 255).astype(np.uint8) for i in range(8)]
    assert find_cuts(flicker) == []
    assert find_cuts([moving_picture(0)]) == find_cuts([]) == []


@pytest.mark.parametrize("each", [1, 2, 3, 4])
def test_animation_on_twos_to_fours_is_motion(each):
    """Every drawing is shown so many times; a cut among them is one all the same, and so is each picture of a slide show."""
    drawings = [*[0.13] * 6, 0.5, *[0.13] * 6]
    changes = [change for drawing in drawings for change in (*[0.0] * (each - 1), drawing)]
    assert cuts_of_changes(changes) == [7 * each]
    assert cuts_of_changes([*[0.3] * 6, 0.01, 0.01, 0.1, *[0.01] * 8]) == [9], "the nearest changes are compared with"
    assert cuts_of_changes([*[0.0] * 5, 0.13, *[0.0] * 5, 0.13, *[0.0] * 5]) == [6, 12]
    stream = [SourceFrame(np.full((36, 64, 3), value, np.float32)) for value in np.cumsum([0, *changes]) % 2 / 3]
    given = [starts for _, starts in _with_cuts(stream, 0.08, 3.0)]
    levels = [round(float(each.frame.mean()) * 255) for each in stream]
    expected = cuts_of_changes([abs(b - a) / 255 for a, b in zip(levels, levels[1:])])
    assert [number for number, starts in enumerate(given) if starts] == expected, "the same from a stream"


def test_a_stream_without_end_takes_no_more_memory():
    held = []
    tracemalloc.start()
    try:
        frames = (SourceFrame(np.full((36, 64, 3), number % 7 / 7, np.float32)) for number in range(5000))
        for number, _ in enumerate(_with_cuts(frames, 0.08, 3.0)):
            if number in (1000, 4900):
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[1] - held[0] < 20_000


@pytest.mark.parametrize("cache", [1.0, 0.0])
def test_no_sample_goes_across_a_cut(cache, tmp_path):
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "cut.mp4", scenes())
    samples = build_dataset(RunOptions(data=str(tmp_path / "clips"), cache_gib=cache, **SMALL), TripletTransform())
    for i in range(60):
        sample = samples[i]
        assert (sample["frame_prev"] - sample["frame_next"]).abs().mean() < 0.5
        assert sample["unreadable"] == 0, "a cut is no fault of the file"
    source = read_source("videos", str(tmp_path / "clips"), RunOptions(cache_gib=cache))
    if cache:
        assert list(source.lengths) == [6, 6]
    else:
        # Across the cut, over the end, and beyond it, where a header may say that there is more.
        for times in (range(5, 8), range(4, 9, 2), range(10, 13), range(40, 43)):
            with pytest.raises(NoWindow):
                source.read(0, times)


def test_validation_takes_the_nearest_window_without_a_cut(tmp_path):
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "cut.mp4", scenes())
    options = RunOptions(validation=str(tmp_path / "clips"), validation_samples=3, validation_crop=100)
    windows = validation_windows(options, frames=4, multiple=32)
    assert [window.shape for window in windows] == [(4, 64, 96, 3)] * 3
    assert all(find_cuts(window) == [] for window in windows)
    assert np.abs(windows[0][0].astype(int) - moving_picture(1)).mean() < 6
    with pytest.raises(ValueError, match="no 8 frames without a scene cut"):
        validation_windows(options, frames=8, multiple=32)


def test_validation_takes_the_test_list(tmp_path):
    make_layout("vimeo-triplet", tmp_path / "data")
    write_frames(tmp_path / "data" / "sequences" / "00001" / "0002", ["im1.png", "im2.png", "im3.png"], start=20)
    options = RunOptions(validation=f"vimeo-triplet:{tmp_path / 'data'}", validation_samples=2)
    for window in validation_windows(options, frames=3, multiple=32):
        assert np.abs(window[1].astype(int) - moving_picture(21)).mean() < 1


def test_validation_takes_a_dataset_s_test_split_and_never_what_is_trained_on(tmp_path):
    (tmp_path / "data").mkdir()
    for split, start in (("train", 0), ("test", 20)):
        rows = {
            name: [Image.fromarray(moving_picture(start + number))]
            for number, name in enumerate(("prev", "mid", "next"))
        }
        features = datasets.Features({name: datasets.Image() for name in rows})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    place = f"datasets:{tmp_path / 'data'}"
    options = RunOptions(data=place, validation=place, validation_samples=1, columns="prev,mid,next")
    assert np.abs(validation_windows(options, frames=3, multiple=32)[0][1].astype(int) - moving_picture(21)).mean() < 1
    (tmp_path / "data" / "test.parquet").unlink()
    with pytest.raises(ValueError, match="has no split `test` or `validation`, and `data` is all of it"):
        validation_windows(options, frames=3, multiple=32)
    other = RunOptions(data="videos:elsewhere", validation=place, validation_samples=1, columns="prev,mid,next")
    assert np.abs(validation_windows(other, frames=3, multiple=32)[0][1].astype(int) - moving_picture(1)).mean() < 1


def test_any_time_needs_more_than_one_instant(clips, tmp_path):
    with pytest.raises(ValueError, match="`any_time` needs a `window` of more than 3 frames"):
        build_dataset(RunOptions(data=str(clips), any_time=0.5), TripletTransform(3, 0.5))


# ---- files that cannot be read ----


def test_an_unreadable_file_is_fatal_or_left_out_and_counted(tmp_path, capfd):
    make_layout("vimeo-triplet", tmp_path / "data")
    broken = tmp_path / "data" / "sequences" / "00001" / "0001" / "im2.png"
    broken.write_bytes(broken.read_bytes()[:40])
    data = f"vimeo-triplet:{tmp_path / 'data'}"
    samples = build_dataset(RunOptions(data=data, **SMALL), TripletTransform())
    with pytest.raises(Unreadable, match=str(broken)):
        [samples[i] for i in range(20)]
    samples = build_dataset(RunOptions(data=data, on_unreadable="skip", **SMALL), TripletTransform())
    counts = [int(samples[i]["unreadable"]) for i in range(40)]
    assert sum(counts) >= 10 and f"left out: No picture can be read from {broken}" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "data" / "sequences" / "00002")
    with pytest.raises(ValueError, match="100 draws in a row met nothing that can be used"):
        samples[0]


def test_every_stage_takes_the_same_files_for_videos(clips, tmp_path):
    for number, suffix in enumerate(VIDEO_SUFFIXES):
        shutil.copyfile(clips / "left.mp4", tmp_path / f"{number}{suffix}")
    assert len(read_source("videos", str(tmp_path), RunOptions()).lengths) == len(VIDEO_SUFFIXES)
    assert FrameBank(str(tmp_path), torch.device("cpu"), 48).count == len(VIDEO_SUFFIXES)


def test_broken_videos_are_left_out_or_named(tmp_path, capfd):
    make_layout("videos", tmp_path / "data")
    (tmp_path / "data" / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(Unreadable, match="broken.mp4"):
        read_source("videos", str(tmp_path / "data"), RunOptions())
    source = read_source("videos", str(tmp_path / "data"), RunOptions(on_unreadable="skip"))
    assert list(source.lengths) == [9, 5] and "broken.mp4" in capfd.readouterr().err


def test_videos_are_read_whatever_their_names_and_tags_are(tmp_path, monkeypatch):
    film = film_clip(tmp_path / "a:b.mp4", 5, metadata={"title": "F-te"})
    film.write_bytes(film.read_bytes().replace(b"F-te", "Fête".encode("latin-1")))
    monkeypatch.chdir(tmp_path)  # so that the name alone, up to its colon, could be a protocol
    source = read_source("videos", ".", RunOptions())
    assert list(source.lengths) == [5] and len(source.read(0, range(5))) == 5


def test_frames_smaller_than_the_crop_and_clips_that_are_too_short_are_named(tmp_path):
    make_layout("frames", tmp_path / "data")
    with pytest.raises(ValueError, match="64x96 pixels are smaller than `resolution` 80"):
        build_dataset(RunOptions(data=f"frames:{tmp_path / 'data'}", resolution=80), TripletTransform())[0]
    with pytest.raises(ValueError, match="the longest has 12"):
        build_dataset(RunOptions(data=f"frames:{tmp_path / 'data'}"), TripletTransform(frames=13))


# ---- samples ----


def clip_samples(clips: Path, maker=None, **changes) -> ClipDataset:
    settings = {"resolution": 32, "gaps": (0.5, 0.5), "colour_jitter": 0.2, **changes}
    return build_dataset(RunOptions(data=str(clips), **settings), maker or TripletTransform())


def test_samples_follow_from_seed_and_number(clips):
    first, second = clip_samples(clips, random_motion_share=0.5), clip_samples(clips, random_motion_share=0.5)
    for i in range(8):
        assert all(torch.equal(first[i][name], second[i][name]) for name in first[i])
    assert not torch.equal(first[7]["frame_mid"], first[8]["frame_mid"])
    assert not torch.equal(first[7]["frame_mid"], clip_samples(clips, seed=1, random_motion_share=0.5)[7]["frame_mid"])


def test_instants_of_longer_windows(clips):
    half_way, samples = (
        clip_samples(clips, TripletTransform(5), gaps=(1.0,)),
        clip_samples(clips, TripletTransform(5, any_time=1.0), gaps=(1.0,)),
    )
    times, seen = set(), []
    for i in range(20):
        sample = samples[i]
        times.add(sample["time"].item())
        assert half_way[i]["time"] == 0.5 and half_way[i]["frame_mid"].shape == sample["frame_mid"].shape == (
            3,
            32,
            32,
        )
        # The nearer neighbour in time differs less from the middle frame.
        to_prev, to_next = ((sample["frame_mid"] - sample[name]).abs().mean() for name in ("frame_prev", "frame_next"))
        seen.append((sample["time"] < 0.5) == (to_prev < to_next) or sample["time"] == 0.5)
    assert times == {0.25, 0.5, 0.75} and sum(seen) >= 18
    share = [clip_samples(clips, TripletTransform(5, any_time=0.5))[i]["time"].item() != 0.5 for i in range(60)]
    assert 10 <= sum(share) <= 30, "half of the samples, of which a third are half-way by chance"


def test_scenes_are_rendered_at_any_instant(clips):
    samples = clip_samples(clips, TripletTransform(any_time=1.0), random_motion_share=1.0)
    times = [samples[i]["time"].item() for i in range(12)]
    assert len(set(times)) == 12 and 0.1 <= min(times) < 0.4 and 0.6 < max(times) <= 0.9


def test_augmentation_turns_mirrors_reverses_and_recolours_all_frames_alike():
    frames = np.stack([moving_picture(i, 32, 32) for i in range(3)])
    plain = Augmentation(32)
    seen = {plain(frames, np.random.default_rng(i)).tobytes() for i in range(200)}
    turned = [
        np.rot90(mirrored, turns, axes=(1, 2)) for mirrored in (frames, frames[:, :, ::-1]) for turns in range(4)
    ]
    assert seen == {np.ascontiguousarray(each[::step]).tobytes() for each in turned for step in (1, -1)}
    jittered = Augmentation(32, colour_jitter=0.3)
    still = np.stack([frames[0]] * 3)
    for i in range(10):
        made = jittered(still, np.random.default_rng(i))
        assert (made == made[:1]).all() and made.dtype == np.uint8
        original = plain(still, np.random.default_rng(i))
        assert 0 < np.abs(made.astype(int) - original).mean() < 60


def test_gaps_and_candidates(clips):
    def change(**settings) -> float:
        samples = clip_samples(clips, colour_jitter=0.0, **settings)
        sample = [samples[i] for i in range(40)]
        return float(np.mean([(each["frame_prev"] - each["frame_next"]).abs().mean() for each in sample]))

    assert change(gaps=(0.0, 0.0, 1.0)) > 1.2 * change(gaps=(1.0,))
    assert change(candidates=4) > 1.1 * change(candidates=1)


# ---- random motion ----


def test_a_scene_moves_smoothly_and_layers_hide_what_is_behind():
    stills = [moving_picture(0), np.full((64, 96, 3), 255, np.uint8)]
    scene = MovingScene(stills, 64, 64, np.random.default_rng(3), speed=6)
    times = np.linspace(-1, 1, 17)
    frames = np.stack([scene.render(time) for time in times]).astype(int)
    steps = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    assert steps.max() < 0.4 * np.abs(frames[0] - frames[-1]).mean()
    background, layer = scene.layers
    matrix = layer.matrix(0.0)
    middle = matrix @ [(layer.picture.shape[1] - 1) / 2, (layer.picture.shape[0] - 1) / 2, 1]
    assert middle == pytest.approx(layer.centre), "a layer lies at its centre at time 0"
    x, y = np.clip(layer.centre.round().astype(int), 0, 63)
    assert (frames[8, y, x] == 255).all()
    later = matrix - layer.matrix(0.5)
    assert np.abs(later[:, 2]).max() > 0


def test_paths_are_not_linear_and_blur_is_the_mean_over_the_exposure():
    scene = MovingScene([moving_picture(0), moving_picture(20)], 64, 64, np.random.default_rng(1))
    places = [scene.layers[1].matrix(time) @ [0, 0, 1] for time in (-1, 0, 1)]
    assert np.abs(places[0] + places[2] - 2 * places[1]).max() > 0.1
    sharp = np.mean([scene.render(time).astype(float) for time in np.linspace(-0.3, 0.3, 61)], axis=0)
    blurred = scene.render(0.0, exposure=0.6)
    assert np.abs(blurred - sharp).mean() < 0.4 * np.abs(scene.render(0.0) - sharp).mean()
    assert (
        np.abs(np.diff(blurred.astype(float), axis=1)).mean()
        < np.abs(np.diff(scene.render(0.0).astype(float), axis=1)).mean()
    )


def test_no_point_moves_farther_than_the_largest_shift():
    for seed in range(20):
        scene = MovingScene([moving_picture(0)] * 3, 48, 64, np.random.default_rng(seed))
        for layer in scene.layers:
            height, width = layer.picture.shape[:2]
            corners = np.array([[0, 0, 1], [width - 1, 0, 1], [0, height - 1, 1], [width - 1, height - 1, 1]]).T
            paths = np.stack([layer.matrix(time) @ corners for time in np.linspace(-1, 1, 9)])
            assert np.linalg.norm(paths[-1] - paths[0], axis=0).max() <= scene.largest_shift


# ---- events ----


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_event_samples_match_their_frames(clips, share):
    samples = clip_samples(
        clips, EventTransform(num_bins=5, frames=3), gaps=(1.0,), colour_jitter=0.0, random_motion_share=share
    )
    change, events = [], []
    for i in range(20):
        sample = samples[i]
        assert sample["events"].shape == (10, 32, 32) and sample["frame_first"].shape == (1, 32, 32)
        change.append(float((sample["frame_second"] - sample["frame_first"]).mean()))
        events.append(float(sample["events"][:5].mean() - sample["events"][5:].mean()))
    assert np.corrcoef(change, events)[0, 1] > 0.5, "where it gets brighter, increases prevail"


def make_recording(path: Path, pictures: int = 4) -> None:
    """A grey ramp that gets brighter from picture to picture, and one event a pixel half-way between two of them."""
    import h5py

    height, width = 40, 48
    rows, columns = np.mgrid[:height, :width]
    events = []
    for i in range(pictures - 1):
        moment = np.full(height * width, 10 + i + 0.5)
        events.append(np.stack([columns.ravel(), rows.ravel(), moment, np.where(columns.ravel() < 10, 1, -1)], axis=1))
    with h5py.File(path, "w") as file:
        file["davis/left/events"] = np.concatenate(events)
        ramp = (rows * 2 + columns).astype(np.uint8)
        file["davis/left/image_raw"] = np.stack([ramp + 10 * i for i in range(pictures)]).astype(np.uint8)
        file["davis/left/image_raw_ts"] = 10.0 + np.arange(pictures)


def test_recorded_events(tmp_path):
    h5py = pytest.importorskip("h5py")
    make_recording(tmp_path / "a_data.hdf5")
    with h5py.File(tmp_path / "a_gt.hdf5", "w") as file:  # MVSEC's truth for other tasks
        file["davis/left/depth_image_raw"] = np.zeros(3)
    options = RunOptions(data=f"mvsec:{tmp_path}", resolution=32, gaps=(0.5, 0.5))
    samples = build_dataset(options, EventTransform(5, 2))
    assert torch.equal(pickle.loads(pickle.dumps(samples))[0]["events"], samples[0]["events"])
    gaps = set()
    for batch in DataLoader(torch.utils.data.Subset(samples, range(20)), batch_size=1, num_workers=1):
        gap = round(float((batch["frame_second"] - batch["frame_first"]).mean()) * 127.5 / 10)
        gaps.add(gap)
        assert batch["events"].sum() == pytest.approx(gap * 32 * 32), (
            "one event a pixel and picture, and none of others"
        )
        at_middle = batch["events"][0, 2] + batch["events"][0, 7]
        assert gap == 2 or (at_middle == 1).all(), "half-way in time is the middle bin"
        brighter, darker = batch["events"][0, :5].sum(0), batch["events"][0, 5:].sum(0)
        assert (brighter.sum(0) > 0).sum() <= 10 and brighter.sum() < darker.sum()
    assert gaps == {1, 2}
    with pytest.raises(ValueError, match="train_i2e alone"):
        build_dataset(options, TripletTransform())
    composing = dataclasses.replace(options, random_motion_share=0.6)
    with pytest.raises(ValueError, match="`random_motion_share` must be 0 with mvsec, .*, but is 0.6"):
        build_dataset(composing, EventTransform(5, 2))


def test_a_recording_that_lacks_something_is_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    make_recording(tmp_path / "a.hdf5")
    with pytest.raises(ValueError, match="`resolution` 64 is larger"):
        build_dataset(RunOptions(data=f"mvsec:{tmp_path}", resolution=64), EventTransform(5, 2))
    (tmp_path / "b.hdf5").write_bytes(b"no recording")
    with pytest.raises(ValueError, match="b.hdf5 is no HDF5 file"):
        build_dataset(RunOptions(data=f"mvsec:{tmp_path}", resolution=32), EventTransform(5, 2))
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        del file["davis/left/image_raw_ts"]
    with pytest.raises(ValueError, match="a.hdf5 has no davis/left/image_raw_ts"):
        build_dataset(RunOptions(data=f"mvsec:{tmp_path}", resolution=32), EventTransform(5, 2))


# ---- streams ----


def rows_seen(samples, count: int) -> list:
    """The rows of the first samples, by the mark in the corner of every picture, wherever it was turned to."""
    seen = []
    for _, sample in zip(range(count), samples):
        frame = ((sample["frame_mid"] + 1) * 127.5).round()
        corners = [frame[:, y, x] for y in (0, -1) for x in (0, -1)]
        seen += [int(corner[0]) for corner in corners if (corner == corner[0]).all() and corner[0] < 40][:1]
    return seen


@pytest.fixture
def stream(tmp_path) -> Path:
    """Twelve square triplets in three files, whose crop is the whole picture."""
    import datasets

    rows = triplet_rows(12)
    for column in rows:
        for row in rows[column]:
            image = cv2.imdecode(np.frombuffer(row["bytes"], np.uint8), cv2.IMREAD_COLOR)
            row["bytes"] = cv2.imencode(".png", np.maximum(image, 40)[:48, :48])[1].tobytes()
    for number, row in enumerate(zip(*rows.values())):
        for cell in row:
            image = cv2.imdecode(np.frombuffer(cell["bytes"], np.uint8), cv2.IMREAD_COLOR)
            image[:16, :16] = number
            cell["bytes"] = cv2.imencode(".png", image)[1].tobytes()
    features = datasets.Features({name: datasets.Image() for name in rows})
    table = datasets.Dataset.from_dict(rows, features=features)
    for i in range(3):
        table.select(range(4 * i, 4 * i + 4)).to_parquet(str(tmp_path / f"part{i}.parquet"))
    return tmp_path


def streamed(folder: Path, process: int = 0, processes: int = 1, skipped: int = 0) -> StreamedDataset:
    samples = build_dataset(RunOptions(data=f"datasets-stream:{folder}", resolution=48), TripletTransform())
    samples.start(process, processes, 2, skipped)
    return samples


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_gives_each_row_once_an_epoch_over_all_processes(workers, stream):
    def rows(count: int, *share: int) -> list:
        return rows_seen(DataLoader(streamed(stream, *share), batch_size=None, num_workers=workers), count)

    one = rows(24)
    assert sorted(one[:12]) == sorted(one[12:]) == list(range(12))
    assert one[:12] != list(range(12)) and one[:12] != one[12:], "shuffled anew"
    for processes in (2, 3):
        shares = [rows(24 // processes, process, processes) for process in range(processes)]
        for epoch in (slice(0, 12 // processes), slice(12 // processes, None)):
            assert sorted(sum((share[epoch] for share in shares), [])) == list(range(12))
    whole = rows(16, 1, 2)
    assert rows(8, 1, 2, 4) == whole[8:], "goes on where it was"


def test_a_stream_has_at_most_one_loader(stream):
    with pytest.raises(ValueError, match="`dataloader_num_workers` must be 0 or 1"):
        next(iter(DataLoader(streamed(stream), num_workers=2)))


def test_pictures_are_not_read_by_opencv_from_their_names(tmp_path, monkeypatch):
    """Which on Windows are ASCII, or not found."""
    path = tmp_path / "Bäume.png"
    path.write_bytes(cv2.imencode(".png", np.full((4, 4, 3), 7, np.uint8))[1].tobytes())
    monkeypatch.setattr(cv2, "imread", lambda name, *_: None)
    assert (read_image(path) == 7).all()
    (tmp_path / "._Bäume.png").write_bytes(b"of macOS")
    assert images_in(tmp_path) == [path]
