import functools
import itertools
import json
import os

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

import data
from data import Coco, EvalSet, Shapes, TrainStream
from model import Pix2SeqConfig
from sample import changed
from tokenizer import FAKE_LABEL, UserError, Vocab
from train import Config


def options(size=64, **fields):
    """A configuration for images of `size` px; fields as on the command line."""
    c = Config(model=Pix2SeqConfig(image_size=(size, size)), vocab=Vocab(100, 110, 210))
    return changed(c, **fields)


@pytest.fixture(autouse=True)
def rng():
    return np.random.default_rng(0)


def write_coco(folder, edit=lambda truth: None, sizes=((20, 30), (25, 25), (40, 10))):
    """A COCO dataset of small images, one box each. Returns (json path, image folder)."""
    os.makedirs(folder / "images", exist_ok=True)
    images, annotations = [], []
    for i, (h, w) in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 255, (h, w, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": h, "width": w})
        annotations.append(
            {
                "id": i + 1,
                "image_id": i + 1,
                "category_id": 7,
                "bbox": [1, 2, 5, 6],
                "area": 30,
                "iscrowd": 0,
            }
        )
    truth = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "cat"}]}
    edit(truth)
    (folder / "truth.json").write_text(json.dumps(truth))
    return str(folder / "truth.json"), str(folder / "images")


def test_tasks_that_share_a_file_read_it_once_and_again_when_it_has_changed(tmp_path, monkeypatch):
    path, images = write_coco(tmp_path)
    read, read_bytes = [], data.read_bytes
    monkeypatch.setattr(data, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    first = data.Coco(path, images, task="det")
    second = data.Coco(path, images, task="seg", bad_boxes="drop")
    assert read == [path] and first.annotations is second.annotations
    write_coco(tmp_path, lambda truth: truth["annotations"].pop())
    os.utime(path, (1, 1))
    assert len(data.Coco(path, images).annotations) == 2 and read == [path] * 2


# shapes


def test_a_scene_is_a_function_of_seed_split_and_number():
    a, b = Shapes("train", seed=3)[17], Shapes("train", seed=3)[17]
    assert np.array_equal(a["image"], b["image"]) and np.array_equal(a["boxes"], b["boxes"])
    for other in (
        Shapes("val", seed=3)[17],
        Shapes("train", seed=4)[17],
        Shapes("train", seed=3)[18],
    ):
        assert not np.array_equal(a["image"], other["image"])


def box_iou(a, b):
    """Intersection over union of two yxyx boxes."""
    both = np.prod((np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(0))
    return both / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both)


def test_boxes_of_shapes_hold_their_pixels_and_hardly_overlap():
    source, found = Shapes("val"), set()
    for i in range(60):
        record = source[i]
        boxes, labels = record["boxes"], record["labels"].tolist()
        assert 1 <= len(labels) <= 4 and boxes.min() >= 0 and boxes.max() <= 64
        found |= set(labels)
        for box, parts in zip(boxes, record["polygons"]):
            points = np.concatenate(parts)
            assert np.allclose([*points.min(0), *points.max(0)], box)
        for a, b in itertools.combinations(boxes, 2):
            assert box_iou(a, b) < 0.25, (i, a, b)
    assert found == {1, 2, 3, 4}


def test_tasks_that_learn_from_the_same_scenes_have_them_drawn_once():
    assert Shapes("train", 32)[5] is Shapes("train", 32)[5]
    assert Shapes("train", 32)[5] is not Shapes("train", 48)[5]


def test_every_training_example_of_keypoints_has_a_figure():
    source = Shapes("train")
    for i in range(20):
        record = source.record("kpt", i)
        assert record["labels"][record["person"]] == 4
        assert record["keypoints"][record["person"], :, 2].all()
    assert source.count("kpt") == source.count("det") == len(source)


def test_keypoints_of_a_figure_lie_on_the_figure():
    import pycocotools.mask as mask

    for i in range(40):
        record = Shapes("val", size=256)[i]
        objects = zip(record["labels"], record["polygons"], record["keypoints"])
        for label, polygons, keypoints in objects:
            if label != 4:
                assert (keypoints == 0).all()
                continue
            flat = [polygon[:, ::-1].ravel().tolist() for polygon in polygons]
            inside = mask.decode(mask.merge(mask.frPyObjects(flat, 256, 256)))
            for y, x in keypoints[:, :2].astype(int):
                near = inside[max(y - 4, 0):y + 5, max(x - 4, 0):x + 5]
                assert near.any(), (i, keypoints)


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_exported_shapes_load_back_to_the_same_examples(tmp_path, image_format):
    run("data.py", "--export", str(tmp_path), "--count", "6", "--format", image_format)
    for split in ("train", "val"):
        drawn = Shapes(split, count=6)
        read = Coco(f"{tmp_path}/annotations/instances_{split}2017.json", f"{tmp_path}/{split}2017")
        assert len(read) == 6
        for i in range(6):
            a, b = drawn[i], read[i]
            assert np.array_equal(a["labels"], b["labels"])
            assert np.allclose(a["boxes"], b["boxes"], atol=0.011)
            difference = np.abs(np.asarray(a["image"], int) - np.asarray(b["image"], int))
            assert difference.max() == 0 if image_format == "png" else difference.mean() < 6


def test_a_dataset_is_looked_at_before_training(tmp_path):
    def edit(truth):
        truth["annotations"][1]["bbox"] = [1, 2, 0, 6]
        truth["annotations"].append(truth["annotations"][2] | {"id": 4, "bbox": [0, 0, 9, 9]})

    path, images = write_coco(tmp_path, edit)
    done = run("data.py", "--check", path, images, cwd=str(tmp_path))
    counts, last = done.stdout.rsplit("\n", 2)[:2]
    assert json.loads(counts) == {
        "images": 3, "learned": {"cat": 3}, "left out": {data.BAD_BOXES: 1}}
    assert last == (
        "[20 10] to [40 30] pixels high and wide; 0 to 2 boxes, 1.0 on average; some are drawn in "
        f"{path}.png")
    assert f"left out: 1 {data.BAD_BOXES}" in done.stderr
    with Image.open(f"{path}.png") as picture:
        assert picture.width > 3 * 300 and np.ptp(np.asarray(picture)) > 200
    done = run("data.py", "--check", path, str(tmp_path / "none"), check=False)
    assert done.returncode == 1 and "none: no such folder" in done.stderr
    assert run("data.py", check=False).returncode == 2


# coco


def test_a_good_dataset_is_read(tmp_path):
    source = Coco(*write_coco(tmp_path))
    record = source[0]
    assert record["image"].size == (30, 20)
    assert record["labels"].tolist() == [7]
    assert record["boxes"].tolist() == [[2, 1, 8, 6]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_annotations_are_read_in_any_unicode_encoding(tmp_path, encoding):
    path, images = write_coco(tmp_path, lambda t: t["categories"][0].update(name="Käfer"))
    text = json.dumps(json.loads((tmp_path / "truth.json").read_text()), ensure_ascii=False)
    (tmp_path / "truth.json").write_bytes(text.encode(encoding))
    assert Coco(path, images).classes == ["Käfer"]


def test_an_example_of_keypoints_is_about_one_person_who_is_no_crowd(tmp_path):
    def edit(truth):
        seen, unseen = [3, 4, 2, 5, 6, 1], [0] * 6
        for annotation, keypoints in zip(truth["annotations"], (seen, unseen, seen)):
            annotation["keypoints"] = keypoints
        crowd = dict(truth["annotations"][0], id=8, iscrowd=1)
        second = dict(truth["annotations"][0], id=9)
        truth["annotations"] += [crowd, second]
        truth["categories"][0]["keypoints"] = ["head", "tail"]

    source = Coco(*write_coco(tmp_path, edit), task="kpt")
    assert len(source) == 3 and source.count("kpt") == 3
    people = [source.record("kpt", i) for i in range(3)]
    assert [(p["image_id"], p["person"]) for p in people] == [(1, 0), (1, 2), (3, 0)]
    assert people[0]["keypoints"][0].tolist() == [[4, 3, 2], [6, 5, 1]]


@pytest.mark.parametrize(
    "edit, words",
    [
        (
            lambda t: t["images"].append(
                {"id": 9, "file_name": "gone.png", "height": 5, "width": 5}
            ),
            "1 images are not in .*gone.png",
        ),
        (
            lambda t: t["annotations"][1].update(image_id=77),
            r"image_id, expected the id of an image: annotations\[1\] \(id 2\) has 77",
        ),
        (
            lambda t: t["annotations"][1].update(category_id=5),
            r"category_id, expected the id of a category: annotations\[1\] \(id 2\) has 5",
        ),
        (
            lambda t: t["annotations"][0].update(bbox=[1, 2, 0, 4]),
            r"empty or outside.*\(id 1\) has 4 values \[1, 2, 0, 4\] in 30x20",
        ),
        (
            lambda t: t["annotations"][2].update(bbox=[1, 2, 30, 4]),
            r"empty or outside.*\[2\] \(id 3\)",
        ),
        (
            lambda t: t["annotations"][2].pop("bbox"),
            r"bbox, expected x y width height in pixels: .*\(id 3\) has None",
        ),
        (
            lambda t: t["images"][0].update(id=2),
            r"id, expected a number or text that no other has: images\[1\] \(id 2\) has 2",
        ),
        (
            lambda t: t["annotations"][0].update(id=2),
            r"id, expected a number.* that no other has: annotations\[1\] .* has 2",
        ),
        (
            lambda t: t["categories"].append({"id": 7, "name": "dog"}),
            r"id, expected a number that no other has: categories\[1\] \(id 7\) has 7",
        ),
        (
            lambda t: t["images"][0].pop("width"),
            r"width, expected pixels, a whole number: images\[0\] \(id 1\) has None",
        ),
        (lambda t: t.pop("images"), "list 'images'"),
        (
            lambda t: [
                t["annotations"].append(
                    {"id": 10 + i, "image_id": 100 + i, "category_id": 7, "bbox": [0, 0, 1, 1]}
                )
                for i in range(8)
            ],
            "8 wrong values of image_id, .* and 5 more",
        ),
    ],
)
def test_what_is_wrong_with_a_dataset_is_named(tmp_path, edit, words):
    with pytest.raises(UserError, match="(?s)truth.json.*" + words):
        Coco(*write_coco(tmp_path, edit))


def test_missing_files_are_named(tmp_path):
    path, images = write_coco(tmp_path)
    with pytest.raises(UserError, match="nothing.json: no such file"):
        Coco(str(tmp_path / "nothing.json"), images)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        Coco(path, str(tmp_path / "nowhere"))
    for content in (b"{half", b"", b'{"images": "\xe4"}'):
        (tmp_path / "truth.json").write_bytes(content)
        with pytest.raises(UserError, match="truth.json: not JSON"):
            Coco(path, images)
    with pytest.raises(UserError, match="images: no such file, or another thing"):
        Coco(images, images)


def test_bad_boxes_can_be_left_out(tmp_path, capsys):
    paths = write_coco(tmp_path, lambda t: t["annotations"][0].update(bbox=[1, 2, 0, 4]))
    source = Coco(*paths, bad_boxes="drop")
    assert "left out: 1 boxes are empty or outside their image" in capsys.readouterr().err
    assert len(source[0]["labels"]) == 0 and len(source.truth()["annotations"]) == 2


def test_category_ids_stay_if_they_can_and_are_mapped_back():
    assert data.assign_labels([1, 90, 899], 899, "x") == {1: 1, 90: 90, 899: 899}
    labels = data.assign_labels([0, 7, 9001, 2], 899, "x")
    assert labels == {0: 1, 7: 7, 9001: 3, 2: 2}
    with pytest.raises(UserError, match="3 categories.*room for 2"):
        data.assign_labels([1, 2, 3], 2, "x")


# image files


def test_every_kind_of_image_loads_as_the_same_picture(tmp_path):
    y, x = np.mgrid[:40, :60]
    rgb = np.stack([y * 6, x * 4, 128 + 0 * x], -1).astype(np.uint8)
    picture = Image.fromarray(rgb)
    grey = np.asarray(picture.convert("L"))
    save = lambda name, image, **k: image.save(tmp_path / name, **k)
    save("rgb.png", picture)
    save("alpha.png", picture.convert("RGBA"))
    save("palette.png", picture.quantize(256))
    save("cmyk.jpg", picture.convert("CMYK"), quality=100)
    save("grey.png", Image.fromarray(grey))
    save("deep.png", Image.fromarray(grey.astype(np.uint16) * 257))
    save("deep.tif", Image.fromarray(grey.astype(np.int32) * 257))
    save("grey_alpha.png", Image.fromarray(grey).convert("LA"))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by a quarter
    save("turned.jpg", picture.rotate(90, expand=True), quality=100, exif=exif)
    for name in os.listdir(tmp_path):
        image = data.load_image(str(tmp_path / name), (40, 60))
        expected = np.stack([grey] * 3, -1) if "grey" in name or "deep" in name else rgb
        assert image.mode == "RGB" and image.size == (60, 40), name
        error = np.abs(np.asarray(image, int) - expected).mean()
        assert error < (8 if name == "palette.png" else 3), f"{name}: mean difference {error}"


def test_a_photo_whose_labels_are_for_its_stored_form_is_not_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert data.load_image(str(tmp_path / "a.jpg"), (20, 30)).size == (30, 20)
    assert data.load_image(str(tmp_path / "a.jpg")).size == (20, 30)
    with pytest.raises(UserError, match="20x30, its labels are for 5x5"):
        data.load_image(str(tmp_path / "a.jpg"), (5, 5))


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_an_unreadable_image_is_skipped_named_and_counted(tmp_path, content):
    paths = write_coco(tmp_path)
    good = (tmp_path / "images" / "1.png").read_bytes()
    half = good[:len(good) // 2]
    (tmp_path / "images" / "1.png").write_bytes(half if content is None else content)
    source = Coco(*paths)
    c = options(32, max_objects=5)
    stream = TrainStream(source, "det", c, seed=0)
    batch = data.collate("det", c)([stream[p] for p in range(6)])
    assert batch.images.shape[0] == 6 and len(batch.skipped) == 2
    assert all("1.png" in message for message in batch.skipped)
    records = [EvalSet(source)[i] for i in range(3)]
    assert [isinstance(r, str) for r in records] == [False, True, False] and "1.png" in records[1]


def test_training_data_of_which_nothing_can_be_read_stops(tmp_path):
    paths = write_coco(tmp_path)
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 training images"):
        TrainStream(Coco(*paths), "det", options(32), seed=0)[0]


# transforms


def test_prediction_view_maps_points_there_and_back(rng):
    for size in ((640, 480), (31, 500), (1, 1), (333, 1000)):
        view = data.eval_view(data.whole(Image.new("RGB", size)), (64, 96))
        assert view.height <= 64 and view.width <= 96 and (view.height == 64 or view.width == 96)
        points = rng.random((9, 2)) * (size[1], size[0])
        assert np.allclose(view.to_image(view.to_canvas(view.to_view(points))), points)


def test_training_view_moves_boxes_with_their_pixels(rng):
    for i in range(200):
        h, w = rng.integers(20, 90, 2)
        pixels = np.zeros((h, w, 3), np.uint8)
        y, x = rng.integers(2, h - 8), rng.integers(2, w - 8)
        pixels[y:y + 6, x:x + 6] = 255
        view = data.train_view((0, 0, h, w), (64, 48), rng, 0.5, 2.0, True)
        box = data.view_boxes(view, np.array([[y, x, y + 6, x + 6]], float))
        canvas = view.image(Image.fromarray(pixels))
        y0, x0, y1, x1 = view.to_canvas(box.reshape(2, 2)).ravel() * (64, 48, 64, 48)
        lit = np.argwhere(canvas[..., 0] > 127)
        if len(lit):
            seen = np.array([*lit.min(0), *lit.max(0) + 1])
            assert np.abs(seen - (y0, x0, y1, x1)).max() < 1.6, (i, view)
        elif min(y1 - y0, x1 - x0) > 2:
            pytest.fail(f"box {y0, x0, y1, x1} has no pixels in {view}")


def test_noise_boxes_are_boxes_in_the_image(rng):
    for n in (0, 1, 30):
        boxes = np.sort(rng.random((n, 2, 2)), 1).reshape(n, 4)
        for count in (1, 17, 100):
            noise = data.noise_boxes(boxes, count, rng)
            assert noise.shape == (count, 4) and noise.min() >= 0 and noise.max() <= 1
            assert (noise[:, 2:] >= noise[:, :2]).all()


def test_training_example_keeps_objects_and_fills_up_with_noise(rng):
    record = Shapes("train")[0]
    c = options(max_objects=10, scale_min=1, scale_max=1, flip=False)
    example = data.det_example(record, c, rng)
    real = example["labels"] > 0
    assert sorted(example["labels"][real]) == sorted(record["labels"])
    assert (example["labels"][~real] == FAKE_LABEL).all()
    by_corner = lambda boxes: boxes[np.lexsort(boxes.T)]
    boxes = by_corner(example["boxes"][real] * 64)
    assert np.allclose(boxes, by_corner(record["boxes"]), atol=1e-4)


def test_crowds_are_not_trained_on_and_too_many_objects_are_cut(tmp_path, rng):
    def edit(truth):
        truth["annotations"] = [
            {"id": i, "image_id": 1, "category_id": 7, "bbox": [1, 2, 5, 6], "iscrowd": int(i < 3)}
            for i in range(12)
        ]

    record = Coco(*write_coco(tmp_path, edit))[0]
    for most, expected in ((20, 9), (4, 4)):
        c = options(max_objects=most, scale_min=1, scale_max=1, noise_boxes=False)
        assert (data.det_example(record, c, rng)["labels"] == 7).sum() == expected


def test_a_one_pixel_box_and_an_image_without_objects_survive(tmp_path, rng):
    def edit(truth):
        truth["annotations"] = [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [3, 3, 1, 1]}]

    source = Coco(*write_coco(tmp_path, edit))
    for i in range(3):
        example = data.det_example(source[i], options(max_objects=6), rng)
        assert example["image"].shape == (64, 64, 3) and np.isfinite(example["boxes"]).all()


def test_padding_is_grey_and_exact():
    pixels = torch.full((2, 4, 6, 3), 255, dtype=torch.uint8)
    images = data.to_images(pixels, torch.tensor([[4, 6], [2, 3]]))
    assert (images[0] == 1).all() and (images[1, :, :2, :3] == 1).all()
    assert (images[1, :, 2:] == data.PAD_VALUE).all()
    assert (images[1, :, :, 3:] == data.PAD_VALUE).all()


# streams


def batches(workers, world=1, parts=1, start=0, steps=3, task="det", batch=8):
    """Per process a list of its batches."""
    c = options(
        max_objects=6,
        scale_min=0.5,
        scale_max=1.5,
        max_instances=3,
        max_points=20,
        caption_length=50,
    )
    streams = data.Streams({task: TrainStream(Shapes("train"), task, c, seed=5)})
    collate, loaded = functools.partial(data.collate_parts, c), []
    for rank in range(world):
        positions = data.MicroBatches(start, steps, {task: (batch, 0)}, parts, rank, world)
        loader = data.make_loader(streams, positions, collate, workers)
        loaded.append([batch for _, batch in loader])
    return loaded


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("task", Pix2SeqConfig.TASKS)
def test_any_number_of_workers_gives_the_same_stream(task):
    alone = batches(0, task=task)[0]
    for workers in (1, 3):
        for a, b in zip(alone, batches(workers, task=task)[0], strict=True):
            for field in ("images", "inputs", "targets", "weights"):
                assert torch.equal(getattr(a, field), getattr(b, field)), field
    assert all(b.images.dtype == torch.uint8 for b in alone)


def test_a_stream_that_starts_later_goes_on_where_it_would_have_been():
    for a, b in zip(batches(0)[0][2:], batches(0, start=2)[0], strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.inputs, b.inputs)


def test_a_step_has_a_batch_of_each_task_that_has_started():
    positions = data.MicroBatches(1, 4, {"det": (4, 0), "seg": (2, 2)}, parts=2)
    assert list(positions) == [
        [("det", 4), ("det", 6)], [("det", 5), ("det", 7)],
        [("det", 8), ("det", 10)], [("det", 9), ("det", 11)], [("seg", 4)], [("seg", 5)],
        [("det", 12), ("det", 14)], [("det", 13), ("det", 15)], [("seg", 6)], [("seg", 7)]]


@pytest.mark.parametrize("world, parts", [(2, 1), (1, 4), (2, 2)])
def test_processes_and_parts_share_each_batch_out(world, parts):
    whole = batches(0)[0]
    shares = batches(0, world, parts)
    for step, batch in enumerate(whole):
        rows = {tuple(row.tolist()) for row in batch.inputs}
        shared = [
            tuple(row.tolist())
            for share in shares
            for part in share[step * parts:(step + 1) * parts]
            for row in part.inputs]
        assert len(shared) == 8 and set(shared) == rows


def test_an_epoch_shows_every_image_once_in_a_new_order(tmp_path):
    source = Coco(*write_coco(tmp_path, sizes=((20, 20),) * 9, edit=lambda t: None))
    stream = TrainStream(source, "det", options(32), seed=0)
    epochs = [[stream.index(p) for p in range(e * 9, e * 9 + 9)] for e in range(3)]
    assert all(sorted(e) == list(range(9)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_making_a_loader_draws_nothing_from_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(0, steps=1)
    assert torch.equal(before, torch.get_rng_state())


def test_a_batch_becomes_floats_with_grey_padding_on_the_device():
    batch = batches(0, steps=1)[0][0]
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.images, data.to_images(batch.images, batch.sizes))
    assert torch.equal(moved.targets, batch.targets) and moved.images.dtype == torch.float32


# captions


def test_a_sentence_names_the_directions_in_which_two_shapes_are_apart():
    def shape(kind, y, x):
        return data.Shape(kind, "red", y, x, 0.1, np.zeros((4, 2)))

    a, right = shape("circle", 0.2, 0.2), shape("square", 0.3, 0.8)
    corner = shape("square", 0.7, 0.8)
    assert data.captions_of([a]) == ["a red circle"]
    assert data.captions_of([a, right]) == [
        "a red circle left of a red square",
        "a red square right of a red circle",
    ]
    assert data.captions_of([a, corner]) == [
        "a red circle above a red square",
        "a red circle left of a red square",
        "a red square below a red circle",
        "a red square right of a red circle",
    ]
