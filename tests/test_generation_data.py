import gzip
import os
import re
import struct
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import COLORS, KINDS, ClipFolder, PixelArrays, ShapeClips, TrainStream
from diffusion import pixels_to_x0, x0_to_pixels
from model import Pix2SeqConfig, RINConfig
from sample import changed
from tokenizer import UserError
from train import Config


def options(size=(8, 8), frames=1, cond_frames=0, **fields):
    """A configuration for generating images or clips."""
    model = RINConfig(sample_size=size, frames=frames, cond_frames=cond_frames)
    return changed(Config(model=model), tasks=("gen",), **fields)


def write_images(folder, names, pixels=lambda i: np.full((10, 10, 3), 10 * i, np.uint8)):
    """Image files, the i-th with every pixel 10 i if not told otherwise."""
    os.makedirs(folder, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(pixels(i)).save(folder / name)


def levels(source):
    """What `write_images` wrote, read back: each record's levels, one for each frame."""
    return [
        (source[i]["pixels"].reshape(-1, *source.size, 3)[:, 0, 0, 0] // 10).tolist()
        for i in range(len(source))
    ]


# shapes


def shape_mask(pixels):
    """(H, W) bool: where the one shape of an image is."""
    masks = (np.abs(pixels.astype(int) - color).max(-1) < 40 for color in COLORS.values())
    return max(masks, key=np.sum)


def test_a_drawn_image_is_a_function_of_seed_split_and_number():
    pixels = lambda split, seed, i, **k: ShapeClips(split, seed=seed, **k)[i]["pixels"]
    assert np.array_equal(pixels("train", 3, 17), pixels("train", 3, 17))
    assert pixels("train", 3, 17).shape == (32, 32, 3)
    assert np.array_equal(pixels("train", 3, 17, frames=4), pixels("train", 3, 17, frames=4))
    assert not np.array_equal(pixels("train", 3, 17), pixels("train", 4, 17))
    drawn = [
        {ShapeClips(split)[i]["pixels"].tobytes() for i in range(200)} for split in data.SPLITS]
    assert len(set.union(*drawn)) == 600               # no scene stands in two splits
    assert len(ShapeClips("val")) == 500 and len(ShapeClips("val", count=7)) == 7
    assert len(ShapeClips("train")) > 1 << 32
    with pytest.raises(UserError, match="unknown split 'holdout'.*train, val, test"):
        ShapeClips("holdout")


def test_the_label_is_the_kind_that_is_drawn():
    source, counts = ShapeClips("val", 64), np.zeros(4, int)
    for i in range(100):
        mask = shape_mask(source[i]["pixels"])
        ys, xs = np.nonzero(mask)
        width, height = np.ptp(xs) + 1, np.ptp(ys) + 1
        filled, foot = mask.sum() / (width * height), mask[ys.max() - 2].sum() / width
        if filled > 0.65:
            seen = "square" if filled > 0.9 else "circle"
        else:
            seen = "triangle" if foot > 0.8 else "figure"
        assert seen == source.classes[source[i]["label"]], (i, filled, foot)
        assert 0.40 < max(height, width) / 64 < 0.75, (height, width)
        counts[source[i]["label"]] += 1
    assert counts.min() > 10, dict(zip(KINDS, counts))


def test_the_shape_of_a_clip_moves_straight_bounces_and_stays_inside():
    source, bounced, speeds = ShapeClips("val", 128, frames=24), 0, []
    for i in range(8):
        clip = source[i]["pixels"]
        assert clip.shape == (24, 128, 128, 3) and clip.dtype == np.uint8
        edge = np.ones((128, 128), bool)
        edge[1:-1, 1:-1] = False
        assert (clip[:, edge] == clip[0, edge]).all(), (
            f"clip {i}: the shape crosses the border, or the background changes"
        )
        centers = [np.argwhere(shape_mask(frame)).mean(0) / 128 for frame in clip]
        step = np.diff(centers, axis=0)                # (23, 2)
        usual = np.median(np.abs(step), 0)
        assert (np.abs(step) < usual + 0.006).all(), (i, step)
        assert (np.abs(step) > usual - 0.006).mean() > 0.7, (i, step)
        speeds.append(np.hypot(*usual))
        clear = step[(np.abs(step) > 0.006).all(-1)]
        bounced += (np.diff(np.sign(clear), axis=0) != 0).any()
    assert bounced > 4
    assert 0.028 < min(speeds) < 0.045 and 0.06 < max(speeds) < 0.082, speeds


def test_clips_are_written_as_a_gif(tmp_path):
    clips = np.zeros((32, 16, 16, 16, 3), np.uint8) + np.arange(16)[:, None, None, None] * 9
    assert data.save_grid(clips.astype(np.uint8), f"{tmp_path}/a") == f"{tmp_path}/a.gif"
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 16
        assert gif.size == (8 * 64 + 7 * 2, 4 * 64 + 3 * 2)           # each enlarged four times


def test_a_grid_is_filled_row_by_row_with_white_between_and_after(tmp_path):
    levels = np.arange(10, 60, 10, dtype=np.uint8)     # of five grey images, 2 x 2
    grey = levels.reshape(5, 1, 1, 1).repeat(2, 1).repeat(2, 2)
    assert data.save_grid(grey, f"{tmp_path}/a", columns=3, side=4, gap=1) == f"{tmp_path}/a.png"
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (9, 14)
    assert (pixels[:4, 4] == 255).all() and (pixels[4] == 255).all()
    assert (pixels[5:, 10:] == 255).all()
    assert [pixels[y, x] for y in (3, 8) for x in (3, 8, 13)] == [10, 20, 30, 40, 50, 255]


# mnist


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    return header + array.tobytes()


def write_mnist(folder, part="t10k", count=30, dot="-", ending=""):
    """Random digits in MNIST's format. Returns (pixels, labels)."""
    rng = np.random.default_rng(len(part))
    pixels = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for kind, array in (("images", pixels), ("labels", labels)):
        path = folder / f"{part}-{kind}{dot}idx{array.ndim}-ubyte{ending}"
        with (gzip.open if ending else open)(path, "wb") as f:
            f.write(idx(array))
    return pixels, labels


@pytest.mark.parametrize("dot, ending", [("-", ""), ("-", ".gz"), (".", ""), (".", ".gz")])
def test_idx_files_are_read_as_they_were_written(tmp_path, dot, ending):
    for part, split in (("train", "train"), ("t10k", "val")):
        pixels, labels = write_mnist(tmp_path, part, 31, dot, ending)
        source = data.load_mnist(tmp_path, split)
        records = [source[i] for i in range(31)]
        assert np.array_equal([record["pixels"] for record in records], pixels[..., None])
        assert [record["label"] for record in records] == labels.tolist()
        assert source.classes == list("0123456789") and not source.endless


def test_the_t10k_files_alone_are_shared_out(tmp_path):
    pixels, labels = write_mnist(tmp_path, count=35)
    train, val = data.load_mnist(tmp_path, "train"), data.load_mnist(tmp_path, "val")
    with pytest.raises(UserError, match="unknown split 'test', expected one of train, val"):
        data.load_mnist(tmp_path, "test")
    assert np.array_equal(val.pixels, pixels[::10, ..., None]) and len(train) == 31
    rows = {p.tobytes(): label for p, label in zip(pixels, labels)}
    both = [
        (source[i]["pixels"].tobytes(), source[i]["label"])
        for source in (train, val)
        for i in range(len(source))
    ]
    assert dict(both) == rows and len(both) == 35


@pytest.mark.parametrize(
    "name, edit, words",
    [
        (
            "images-idx3",
            lambda b: b[:-1],
            r"t10k-images-idx3-ubyte: 23535 bytes, expected 23536 for 30 x 28 x 28",
        ),
        ("images-idx3", lambda b: b[:9], "images-idx3-ubyte: 9 bytes, expected"),
        ("images-idx3", lambda b: b + b"x", "23537 bytes, expected 23536"),
        ("images-idx3", lambda b: b"", "images-idx3-ubyte: begins with , expected 00000803"),
        (
            "labels-idx1",
            lambda b: bytes([0, 0, 13, 1]) + b[4:],
            "labels-idx1-ubyte: begins with 00000d01, expected 00000801",
        ),
        (
            "labels-idx1",
            lambda b: idx(np.zeros(29, np.uint8)),
            "images-idx3.*labels-idx1.*30 images, but 29 labels",
        ),
        (
            "labels-idx1",
            lambda b: idx(np.full(30, 10, np.uint8)),
            "labels-idx1.*labels from 10 to 10, expected less than 10",
        ),
    ],
)
def test_what_is_wrong_with_an_idx_file_is_named(tmp_path, name, edit, words):
    write_mnist(tmp_path)
    path = tmp_path / f"t10k-{name}-ubyte"
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(UserError, match=words):
        data.load_mnist(tmp_path, "val")


def test_a_truncated_gz_is_named(tmp_path):
    write_mnist(tmp_path, ending=".gz")
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    for content in (path.read_bytes()[:-99], b"not packed"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="images-idx3-ubyte.gz: cannot be read"):
            data.load_mnist(tmp_path, "val")


# cifar10


def write_cifar(folder):
    """Six files of four random images in CIFAR-10's binary version."""
    os.makedirs(folder)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = rng.integers(0, 10, (4, 1)).astype(np.uint8)
        pixels = rng.integers(0, 256, (4, 3072)).astype(np.uint8)
        rows = np.concatenate([labels, pixels], 1)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())


def test_cifar10_is_read_from_its_folder_or_the_one_of_its_archive(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    write_cifar(folder)
    train, val = (data.load_cifar10(tmp_path, split) for split in ("train", "val"))
    assert len(train) == 20 and len(val) == 4 and train[0]["pixels"].shape == (32, 32, 3)
    assert train.classes[9] == "truck"
    assert np.array_equal(data.load_cifar10(folder, "val").pixels, val.pixels)
    rows = np.frombuffer((folder / "test_batch.bin").read_bytes(), np.uint8).reshape(4, 3073)
    colours = [rows[1, 1 + 1024 * c + 32 * 2 + 5] for c in range(3)]
    assert val[1]["label"] == rows[1, 0] and val[1]["pixels"][2, 5].tolist() == colours


def test_the_python_version_of_cifar10_is_not_unpickled_and_the_binary_one_asked_for(tmp_path):
    (tmp_path / "test_batch").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match="no test_batch.bin, expected the CIFAR-10 binary version"):
        data.load_cifar10(tmp_path, "val")


@pytest.mark.parametrize(
    "content, words",
    [
        (bytes(3073 + 5), "test_batch.bin: 3078 bytes, .*expected 3073 bytes per image"),
        (b"", "test_batch.bin: 0 bytes"),
        (b"\x0b" + bytes(3072), "test_batch.bin: .*labels up to 11, expected .*up to 9"),
    ],
)
def test_what_is_wrong_with_a_cifar10_file_is_named(tmp_path, content, words):
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(UserError, match=words):
        data.load_cifar10(tmp_path, "val")


def test_a_missing_batch_is_named(tmp_path):
    write_cifar(tmp_path / "x")
    os.remove(tmp_path / "x" / "data_batch_4.bin")
    with pytest.raises(UserError, match="x: no data_batch_4.bin, expected the CIFAR-10 binary"):
        data.load_cifar10(tmp_path / "x", "train")


# folders of images


def test_class_folders_are_labelled_in_the_order_of_their_names(tmp_path):
    for n, name in enumerate(["zebra", "ant", "cat"]):
        write_images(
            tmp_path / name,
            ["1.png", "2.JPG", "3.bmp", "notes.PPM"],
            lambda i: np.full((9, 9, 3), 70 * n, np.uint8),
        )
        (tmp_path / name / ".hidden.png").write_bytes(b"")
        (tmp_path / name / "notes.txt").write_bytes(b"")
    source = ClipFolder(tmp_path, "train", (8, 8))
    assert source.classes == ["ant", "cat", "zebra"] and len(source) == 9 and not source.endless
    records = [source[i] for i in range(9)]
    levels = {(record["label"], round(record["pixels"].mean() / 70)) for record in records}
    assert levels == {(0, 1), (1, 2), (2, 0)}
    assert [ClipFolder(tmp_path, "val", (8, 8))[i]["label"] for i in range(3)] == [0, 1, 2]


def test_every_twentieth_image_is_held_out(tmp_path):
    write_images(tmp_path / "many", [f"{i:02}.png" for i in range(25)])
    write_images(tmp_path / "one", ["a.png"])
    names = {
        split: sum((names for _, names, _ in ClipFolder(tmp_path, split, (8, 8)).clips), [])
        for split in ("train", "val")
    }
    assert names["val"] == ["00.png", "20.png"] and len(names["train"]) == 24
    assert not set(names["train"]) & set(names["val"])
    loose = ClipFolder(tmp_path / "many", "val", (8, 8))
    assert levels(loose) == [[0], [20]] and loose.classes == [] and loose[0]["label"] == -1


def test_own_folders_of_the_splits_are_used_and_have_the_classes_of_train(tmp_path):
    for name in ("train/a", "train/b", "train/c", "val/b"):
        write_images(tmp_path / name, ["1.png", "2.png"])
    train, val = ClipFolder(tmp_path, "train", (8, 8)), ClipFolder(tmp_path, "val", (8, 8))
    assert train.classes == val.classes == ["a", "b", "c"]
    assert len(train) == 6 and len(val) == 2 and val[0]["label"] == 1
    write_images(tmp_path / "val/d", ["1.png"])
    with pytest.raises(UserError, match="val/d: a class that is not in .*train, which has a, b, c"):
        ClipFolder(tmp_path, "val", (8, 8))


def test_an_image_is_cropped_to_its_centre(tmp_path):
    columns = np.repeat(255 * np.eye(3, dtype=np.uint8), [30, 40, 30], 0)      # red, green, blue
    write_images(tmp_path, ["wide.png", "tall.png"], lambda i: np.stack([columns] * 40, i))
    tall, wide = (ClipFolder(tmp_path, split, (20, 20))[0]["pixels"] for split in ("val", "train"))
    for pixels in (wide, tall.swapaxes(0, 1)):  # the other colours shine in at the rim, both alike
        assert pixels.shape == (20, 20, 3)
        assert (pixels[:, 2:-2] == (0, 255, 0)).all() and (pixels[..., 1] > 230).all()
        assert np.array_equal(pixels[..., 0], pixels[:, ::-1, 2])
    assert ClipFolder(tmp_path, "val", (10, 25))[0]["pixels"].shape == (10, 25, 3)


def test_shrinking_averages_fine_patterns(tmp_path):
    checks = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    write_images(tmp_path, ["checks.png"], lambda i: np.stack([checks] * 3, -1))
    pixels = ClipFolder(tmp_path, "train", (16, 16))[0]["pixels"]
    assert np.abs(pixels[2:-2, 2:-2].astype(int) - 127).max() < 8, (pixels.min(), pixels.max())


def test_a_corrupt_image_is_skipped_and_named(tmp_path):
    write_images(tmp_path / "train", [f"{i}.png" for i in range(4)])
    good = (tmp_path / "train" / "2.png").read_bytes()
    (tmp_path / "train" / "2.png").write_bytes(good[: len(good) // 2])
    source, c = ClipFolder(tmp_path, "train", (8, 8)), options()
    with pytest.raises(UserError, match="2.png: not a readable image"):
        source[2]
    stream = TrainStream(source, "gen", c, seed=0)
    batch = data.collate("gen", c)([stream[p] for p in range(4)])
    assert batch.targets.shape == (4, 3, 8, 8) and len(batch.skipped) == 1
    assert "2.png" in batch.skipped[0]


# folders of videos


def write_videos(folder, lengths):
    for name, length in lengths.items():
        write_images(folder / name, [f"{i}.png" for i in range(length)])


def test_videos_are_read_in_all_windows_of_frames_in_order(tmp_path):
    write_videos(tmp_path / "train", {"a": 3, "b": 12})
    (tmp_path / "train" / "a" / "notes.txt").write_bytes(b"")
    source = ClipFolder(tmp_path, "train", (8, 8), 3)
    windows = [[i, i + 1, i + 2] for i in range(10)]   # 10.png after 9.png
    assert levels(source) == [[0, 1, 2], *windows]
    assert source[0]["pixels"].shape == (3, 8, 8, 3)
    assert source[0]["label"] == -1 and source.classes == []


def test_videos_that_are_too_short_are_left_out_with_a_notice(tmp_path, capsys):
    write_videos(tmp_path, {"a": 2, "b": 4, "c": 1, "d": 4})
    words = "left out 2 of 4 videos, shorter than 4 frames, such as .*a$"
    train, val = (ClipFolder(tmp_path, split, (8, 8), 4) for split in ("train", "val"))
    assert re.search(words, capsys.readouterr().err, re.M)
    assert len(train) == len(val) == 1 and train.clips[0][0] != val.clips[0][0]
    words = "no video of 5 frames or more for train.*a folder of frames"
    with pytest.raises(UserError, match=words):
        ClipFolder(tmp_path, "train", (8, 8), 5)


@pytest.mark.parametrize("count, held", [(1, 0), (2, 1), (20, 1), (21, 2)])
def test_every_twentieth_video_is_held_out_and_at_least_one(tmp_path, count, held):
    write_videos(tmp_path, {f"{i:02}": 1 for i in range(count)})
    train = {path for path, *_ in ClipFolder(tmp_path, "train", (8, 8), 1).clips}
    if not held:
        with pytest.raises(UserError, match="no video .* for val"):
            ClipFolder(tmp_path, "val", (8, 8), 1)
    val = {path for path, *_ in ClipFolder(tmp_path, "val", (8, 8), 1).clips} if held else set()
    assert len(val) == held and len(train) == count - held and not train & val


def test_videos_in_class_folders_have_labels(tmp_path):
    for name in ("train/run/a", "train/run/b", "train/jump/c", "val/run/d"):
        write_videos(tmp_path, {name: 2})
    train, val = (ClipFolder(tmp_path, split, (8, 8), 2) for split in ("train", "val"))
    assert train.classes == val.classes == ["jump", "run"]
    assert [train[i]["label"] for i in range(3)] == [0, 1, 1]
    assert [val[i]["label"] for i in range(len(val))] == [1]
    write_videos(tmp_path, {"val/fly/e": 2})
    with pytest.raises(UserError, match="val/fly: a class that is not in .*, which has jump, run"):
        ClipFolder(tmp_path, "val", (8, 8), 2)


# examples and batches


def test_mirroring_turns_the_whole_clip_and_half_of_the_clips():
    clip = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3)).astype(np.uint8)
    c, mirrored = options((8, 6), frames=3, cond_frames=2), 0
    for seed in range(60):
        example = data.gen_example({"pixels": clip, "label": 4}, c, np.random.default_rng(seed))
        turned = not np.array_equal(example["pixels"], clip)
        assert not turned or np.array_equal(example["pixels"], clip[:, :, ::-1])
        assert example["label"] == 4 and example["label"].dtype == np.int64
        mirrored += turned
    assert 15 < mirrored < 45
    still = options((8, 6), frames=5, flip=False)
    for seed in range(20):
        example = data.gen_example({"pixels": clip, "label": 4}, still, np.random.default_rng(seed))
        assert np.array_equal(example["pixels"], clip)


def test_grey_becomes_colour_if_colours_are_generated():
    rng = np.random.default_rng(0)
    grey = {"pixels": rng.integers(0, 256, (8, 8, 1)).astype(np.uint8), "label": 0}
    example = lambda record, **k: data.gen_example(record, options(flip=False, **k), rng)["pixels"]
    assert np.array_equal(example(grey, image_channels=1)[0], grey["pixels"])
    assert np.array_equal(example(grey, image_channels=3)[0], np.repeat(grey["pixels"], 3, -1))


@pytest.mark.parametrize(
    "shape, c, words",
    [
        ((8, 9, 3), {}, r"\(1, 8, 9, 3\).*ask for \(1, 8, 8, 3\)"),
        ((8, 8, 3), {"image_channels": 1}, r"ask for \(1, 8, 8, 1\)"),
        ((8, 8, 3), {"frames": 4}, r"ask for \(4, 8, 8, 3\)"),
        ((4, 8, 8, 3), {"frames": 4, "cond_frames": 1}, r"ask for \(5, 8, 8, 3\)"),
        ((2, 8, 8, 3), {}, r"\(2, 8, 8, 3\)"),
    ],
)
def test_pixels_that_the_model_does_not_take_are_named(shape, c, words):
    record = {"pixels": np.zeros(shape, np.uint8), "label": 0}
    with pytest.raises(UserError, match=words):
        data.gen_example(record, options(**c), np.random.default_rng(0))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_workers_gives_the_same_pixels_and_labels():
    c = options((16, 16), frames=2)
    stream = TrainStream(data.make_source(c, "train", "gen"), "gen", c, seed=0)
    streams, collate = data.Streams({"gen": stream}), partial(data.collate_parts, c)
    runs = []
    for start, workers in ((0, 0), (0, 2), (1, 0)):
        positions = data.MicroBatches(start, 3, {"gen": (4, 0)})
        loader = data.make_loader(streams, positions, collate, workers)
        runs.append([batch for _, batch in loader])
    for batch in runs[0]:
        labels = batch.cond["labels"]
        assert batch.targets.shape == (4, 3, 2, 16, 16) and batch.targets.dtype == torch.uint8
        assert labels.shape == (4,) and labels.dtype == torch.int64
        assert torch.equal(batch.weights, torch.ones(4)) and batch.skipped == ()
    for a, b in [*zip(runs[0], runs[1], strict=True), *zip(runs[0][1:], runs[2], strict=True)]:
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.cond["labels"], b.cond["labels"])


def test_context_frames_are_the_first_of_a_clip():
    clip = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    c = options(frames=3, cond_frames=2, flip=False)
    batch = data.collate("gen", c)([data.gen_example({"pixels": clip, "label": -1}, c, None)])
    assert np.array_equal(batch.cond["frames"][0].movedim(0, -1), clip[:2])
    assert np.array_equal(batch.targets[0].movedim(0, -1), clip[2:])


def test_data_and_pixels_invert_each_other():
    every = torch.arange(256).to(torch.uint8)
    for shape in ((2, 1, 8, 16), (1, 3, 2, 4, 4)):
        pixels = every.repeat(3)[: torch.tensor(shape).prod()].reshape(shape)
        x0 = pixels_to_x0(pixels, options(b_scale=0.5))
        assert x0.shape == shape and x0.min() >= -0.5 and x0.max() <= 0.5
        assert torch.equal(x0_to_pixels(x0, options(b_scale=0.5)), pixels)
    x0 = torch.tensor([[[[-3.0, -1 + 2 * 0.499 / 255, -1 + 2 * 0.501 / 255, 1.7]]]])
    assert x0_to_pixels(x0, options()).ravel().tolist() == [0, 0, 1, 255]


# configurations


def test_a_configuration_finds_its_source(tmp_path):
    write_mnist(tmp_path)
    write_images(tmp_path / "images", ["1.png", "2.png"])
    write_videos(tmp_path / "videos", {"a": 4, "b": 4})
    write_cifar(tmp_path / "cifar")
    make = lambda split="train", **k: data.make_source(options(**k), split, "gen")
    drawn = make("val", frames=3, cond_frames=1, val_count=9, data_seed=5)
    same = ShapeClips("val", 8, 4, 5)
    assert len(drawn) == 9 and np.array_equal(drawn[2]["pixels"], same[2]["pixels"])
    assert isinstance(make(data="mnist", data_dir=str(tmp_path)), PixelArrays)
    assert len(make(data="cifar10", data_dir=f"{tmp_path}/cifar")) == 20
    images = make(data="images", data_dir=f"{tmp_path}/images")
    assert images[0]["pixels"].shape == (8, 8, 3)
    videos = make(data="videos", data_dir=f"{tmp_path}/videos", frames=2, cond_frames=1)
    assert videos[0]["pixels"].shape == (3, 8, 8, 3)


@pytest.mark.parametrize(
    "task, choice, words",
    [
        ("det", "mnist", "data is 'mnist', expected one of shapes, coco for the task det"),
        (
            "gen",
            "coco",
            "data is 'coco', expected one of shapes, mnist, cifar10, images, videos for the task",
        ),
        ("gen", "cifar", "data is 'cifar'"),
    ],
)
def test_data_that_does_not_fit_its_task_is_refused(task, choice, words):
    with pytest.raises(UserError, match=words):
        c = options(data=choice)
        if task == "det":
            c = replace(c, model=Pix2SeqConfig())
        data.make_source(c, "train", task)


@pytest.mark.parametrize(
    "choice, words",
    [
        ("mnist", "t10k-images-idx3-ubyte"),
        ("cifar10", "CIFAR-10 binary version"),
        ("images", r"\.png"),
        ("videos", "a folder of frames .* per video"),
    ],
)
def test_missing_data_says_what_to_put_where(tmp_path, choice, words):
    make = lambda folder, split="train": data.make_source(
        options(data=choice, data_dir=folder), split, "gen"
    )
    with pytest.raises(UserError, match=f"--data_dir.*{words}"):
        make("")
    for folder in (tmp_path / "gone", tmp_path):
        with pytest.raises(UserError, match=f"^{folder}: .*expected .*{words}"):
            make(str(folder))
    if choice in ("images", "videos"):
        os.mkdir(tmp_path / "train")
        with pytest.raises(UserError, match="/val: no such folder, expected"):
            make(str(tmp_path), "val")


def test_images_beside_class_folders_are_refused(tmp_path):
    write_images(tmp_path, ["a.png"])
    write_images(tmp_path / "cat", ["b.png"])
    with pytest.raises(UserError, match="images such as a.png beside folder cat"):
        ClipFolder(tmp_path, "train", (8, 8))
