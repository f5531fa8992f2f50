"""Panoptic masks: their scores by hand-made cases, their data, their network."""
import itertools
import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image
from pycocotools import mask

import data
import diffusion
import eval
import sample
import train
from data import ShapeMaps
from model import Device, Panoptic, PanopticConfig, adapt_weights, load_weights
from sample import Config, changed
from tokenizer import UserError
from train import PRESETS

TINY = PanopticConfig(
    image_size=(32, 48), encoder="vit", patch_size=8, enc_layers=1, enc_dim=32, enc_mlp=32,
    enc_heads=4, drop_path=0.0, dropout=0.0, sample_size=(16, 24), fuse_dim=32, unet_dim=32,
    multipliers=(1,), res_blocks=(1,), transformer_layers=1, transformer_dim=32, head_dim=32)
CATEGORIES = [
    {"id": 1, "name": "cat", "isthing": 1, "label": 1},
    {"id": 2, "name": "dog", "isthing": 1, "label": 2},
    {"id": 3, "name": "sea water", "isthing": 0, "label": 3}]


def recipe(model=TINY, **fields):
    c = Config(model=model, categories=tuple(CATEGORIES))
    return changed(
        c, bits="ids", pred_type="x_softmax_xent", b_scale=0.1, scale_min=1.0, scale_max=1.0,
        flip=False, color_jitter=0.0, **fields)


def row(category, **more):
    return {"category_id": category, **more}


def quality(truth, truth_rows, found, found_rows):
    pair = (
        {"maps": np.array([numbers]), "segments": rows}
        for numbers, rows in ((truth, truth_rows), (found, found_rows)))
    return eval.panoptic_quality([tuple(pair)], CATEGORIES)


# --------------------------------------------------------------------------------------------------
# panoptic quality

def test_segments_match_above_half_of_their_union():
    truth = [[1] * 6 + [2] * 6]
    found = [[5] * 8 + [6] * 4]                        # IoU 6/8, and 4/6
    scores = quality(truth, {1: row(1), 2: row(3)}, found, {5: row(1), 6: row(3)})
    assert scores["PQ_cat"] == pytest.approx(6 / 8)
    assert scores["PQ_sea_water"] == pytest.approx(4 / 6)
    assert scores["PQ"] == scores["SQ"] == pytest.approx((6 / 8 + 4 / 6) / 2)
    assert scores["PQ_things"] == scores["PQ_cat"] and scores["RQ"] == 1
    assert "PQ_dog" not in scores                      # it occurs nowhere


def test_another_class_is_missed_and_wrong():
    scores = quality([[1] * 4 + [2] * 4], {1: row(1), 2: row(1)},
                     [[1] * 4 + [2] * 4], {1: row(1), 2: row(2)})
    assert scores["PQ_cat"] == pytest.approx(1 / (1 + 0.5)) and scores["PQ_dog"] == 0
    assert scores["SQ_things"] == 0.5 and scores["RQ"] == pytest.approx(1 / 3)


def test_half_of_the_union_is_no_match():
    scores = quality([[1, 1, 0, 0]], {1: row(1)}, [[1, 0, 0, 0]], {1: row(1)})
    assert scores["PQ"] == 0


def test_pixels_without_truth_do_not_count():
    # 4 of 10 found pixels are of nothing; and a segment that is mostly there is not wrong.
    found = [[1] * 10 + [2] * 6]
    scores = quality([[1] * 6 + [0] * 10], {1: row(1)}, found, {1: row(1), 2: row(2)})
    assert scores["PQ"] == 1 and "PQ_dog" not in scores


def test_a_crowd_is_neither_missed_nor_wrong_to_find():
    truth, rows = [[1] * 6 + [2] * 4], {1: row(1, iscrowd=1), 2: row(1)}
    assert quality(truth, rows, [[0] * 6 + [2] * 4], {2: row(1)})["PQ"] == 1
    assert quality(truth, rows, [[7] * 6 + [2] * 4], {2: row(1), 7: row(1)})["PQ"] == 1
    other = quality(truth, rows, [[7] * 6 + [2] * 4], {2: row(1), 7: row(2)})
    assert other["PQ_cat"] == 1 and other["PQ_dog"] == 0


# --------------------------------------------------------------------------------------------------
# videos

def clip(classes, ids):
    """A record of classes and instance ids (T, H, W), 0 for stuff and crowds."""
    numbers = np.array(classes) * 256 + np.array(ids)
    segments = {n: row(n >> 8, iscrowd=int(n % 256 == 0)) for n in np.unique(numbers).tolist()}
    return {"maps": numbers, "segments": segments}


def test_tracking_quality_of_a_track_that_is_cut_in_two():
    classes, ids = [[[1, 1, 3, 3]]] * 4, [[[7, 7, 0, 0]]] * 4
    found = [[[7, 7, 0, 0]]] * 2 + [[[8, 8, 0, 0]]] * 2
    scores = eval.video_quality([(clip(classes, ids), clip(classes, found))], CATEGORIES)
    # 4 of 8 pixels with each id: sum of TPA * IoU over the size = 2 * 4 * 4/8 / 8.
    assert scores["AQ"] == pytest.approx(0.5) and scores["SQ"] == 1
    assert scores["STQ"] == pytest.approx(math.sqrt(0.5))


def test_tracking_counts_no_pixels_without_truth_and_no_crowds():
    truth = clip([[[1, 1, 0, 1]]], [[[7, 7, 0, 0]]])   # the last is a crowd
    found = clip([[[1, 1, 1, 1]]], [[[2, 2, 2, 2]]])
    scores = eval.video_quality([(truth, found)], CATEGORIES)
    assert scores["SQ"] == 1
    assert scores["AQ"] == pytest.approx(2 / 3)        # where there is no truth, the track is long


def test_region_and_boundary_of_the_best_assignment():
    truth = np.zeros((5, 40, 40), int)
    truth[:, 5:15, 5:15], truth[:, 25:35, 25:35] = 1, 2

    def scores_of(found):
        pair = (clip(np.where(ids > 0, 1, 3), ids) for ids in (truth, found))
        return eval.video_quality([tuple(pair)], CATEGORIES)

    assert scores_of(truth)["J&F"] == 1
    assert scores_of(np.select([truth == 1, truth == 2], [9, 4]))["J&F"] == 1
    scores = scores_of(np.where(truth == 1, 3, 0))     # the other is missed in all frames
    assert scores["J_mean"] == scores["F_mean"] == scores["J_recall"] == 0.5
    late = np.where(np.arange(5)[:, None, None] < 4, truth, 0)
    scores = scores_of(late)
    assert scores["J_mean"] == pytest.approx(0.8) and scores["J_decay"] == 0.5


def test_boundaries_match_within_eight_thousandths_of_the_diagonal():
    truth = np.zeros((100, 100), bool)
    truth[20:60, 20:60] = True
    assert eval.boundary_score(truth, np.roll(truth, 2, 1)) == 1           # ceil(0.008 * 141) = 2
    assert eval.boundary_score(truth, np.roll(truth, 3, 1)) < 1
    nothing = np.zeros_like(truth)
    assert eval.boundary_score(truth, nothing) == 0 and eval.boundary_score(nothing, nothing) == 1


def test_best_assignment_is_that_of_all_permutations():
    rng = np.random.default_rng(0)
    for _ in range(100):
        n = int(rng.integers(1, 6))
        scores = rng.random((n, int(rng.integers(n, 7)))).round(1)
        columns = eval.best_assignment(scores)
        best = max(
            scores[np.arange(n), list(chosen)].sum()
            for chosen in itertools.permutations(range(scores.shape[1]), n))
        assert len(set(columns.tolist())) == n
        assert scores[np.arange(n), columns].sum() == pytest.approx(best)


def test_dilate_is_a_disk_around_every_pixel():
    mask = np.random.default_rng(0).random((20, 30)) > 0.98
    y, x = np.indices(mask.shape)
    near = [(y - a) ** 2 + (x - b) ** 2 <= 16 for a, b in np.argwhere(mask)]
    assert np.array_equal(eval.dilate(mask, 4), np.any(near, 0))


# --------------------------------------------------------------------------------------------------
# data

def shown(view, numbers):
    view = data.on_canvas(view, TINY.sample_size)
    return view.image(Image.fromarray(numbers), Image.NEAREST)


def test_ids_are_random_and_the_same_in_all_frames():
    record = ShapeMaps("val", 48, frames=3)[3]
    view = data.eval_view(data.whole(record["images"][0]), TINY.image_size)
    first, second = (
        data.id_maps(record, view, recipe(), np.random.default_rng(seed)) for seed in range(2))
    assert np.array_equal(first[:, 0], second[:, 0]) and not np.array_equal(first, second)
    numbers = np.stack([
        shown(view, frame) for frame in record["maps"]])
    pairs = set(zip(numbers.ravel().tolist(), first[:, 1].ravel().tolist()))
    assert len(pairs) == len(np.unique(numbers))       # one id each, in all three frames
    assert first[:, 1].max() < recipe().data.max_segments


def test_ids_can_be_the_same_each_time():
    record, view = ShapeMaps("val", 64)[3], data.eval_view((0, 0, 64, 64), TINY.image_size)
    ids = {
        fixed: {data.id_maps(record, view, recipe(random_ids=not fixed), rng).tobytes()
                for rng in map(np.random.default_rng, range(5))}
        for fixed in (True, False)}
    assert len(ids[True]) == 1 and len(ids[False]) == 5


def test_crowds_and_pixels_without_class_are_not_known():
    record = {
        "images": [Image.new("RGB", (48, 32))],
        "maps": np.repeat(np.int32([0, 5, 6]), 16)[None, None].repeat(32, 1),
        "segments": {5: row(1), 6: row(2, iscrowd=1)}}
    view = data.eval_view((0, 0, 32, 48), TINY.image_size)
    classes, _, known = data.id_maps(record, view, recipe(), np.random.default_rng(0))[0]
    assert np.array_equal(classes[0], np.repeat([0, 1, 2], 8))
    assert np.array_equal(known[0], np.repeat([0, 1, 0], 8))


def test_earlier_frames_stand_in_order_with_the_same_ids_and_can_be_dropped():
    record = ShapeMaps("val", 48, frames=3)[0]
    view = data.eval_view(data.whole(record["images"][0]), TINY.image_size)
    numbers = [shown(view, frame) for frame in record["maps"]]

    def example(frames, drop):
        c = recipe(replace(TINY, past_frames=2), past_drop=drop)
        part = record | {"images": record["images"][:frames], "maps": record["maps"][:frames]}
        return data.map_example(part, c, np.random.default_rng(0))

    kept = example(3, 0.0)
    assert kept["past"].shape == (4, 16, 24)
    seen = [*kept["past"][1::2], kept["map"][1]]
    pairs = set(zip(np.ravel(numbers).tolist(), np.ravel(seen).tolist()))
    assert len(pairs) == len(np.unique(numbers))
    assert not example(3, 1.0)["past"].any()
    assert not example(2, 0.0)["past"][:2].any() and example(2, 0.0)["past"][2:].any()


def test_a_clip_is_learned_frame_by_frame_with_two_before():
    source = ShapeMaps("val", 32, frames=4, past=2)
    for i, frames in ((0, 1), (1, 2), (3, 3), (7, 3)):
        assert len(source.record("vps", i)["images"]) == frames
    assert np.array_equal(source.record("vps", 3)["maps"], source[3]["maps"][1:])


def coco_files(folder, change=lambda truth, ids: None):
    """Two images with panoptic truth in COCO's format; change: may spoil them."""
    truth, ids = {"categories": CATEGORIES, "images": [], "annotations": []}, []
    for i in (4, 9):
        map_ = np.repeat([0, 70_000 + i, 3], 16)[None].repeat(32, 0)
        ids.append(map_)
        truth["images"].append({"id": i, "file_name": f"{i}.jpg", "height": 32, "width": 48})
        truth["annotations"].append({"image_id": i, "file_name": f"{i}.png", "segments_info": [
            {"id": 70_000 + i, "category_id": 2, "iscrowd": 0, "area": 512},
            {"id": 3, "category_id": 3, "iscrowd": 0, "area": 512}]})
    change(truth, ids)
    for i, map_ in zip((4, 9), ids):
        Image.new("RGB", (48, 32), "red").save(folder / f"{i}.jpg")
        (folder / f"{i}.png").write_bytes(sample.as_png(map_))
    (folder / "pan.json").write_text(json.dumps(truth))
    return data.coco_maps(str(folder / "pan.json"), str(folder), str(folder))


def test_coco_maps_are_read(tmp_path):
    source = coco_files(tmp_path)
    record = source[1]
    assert len(source) == 2 and record["id"] == 9 and record["name"] == "9"
    assert np.array_equal(np.unique(record["maps"]), [0, 3, 70_009])
    assert record["segments"][70_009]["category_id"] == 2
    assert [k["label"] for k in source.categories] == [1, 2, 3]


@pytest.mark.parametrize("change, words", [
    (lambda truth, ids: ids.__setitem__(0, ids[0][:30]),
     "4.png: height and width are (30, 48), of its image (32, 48)"),
    (lambda truth, ids: ids[1].__setitem__((0, 0), 12),
     "9.png: 1 ids are not in segments_info: 12"),
    (lambda truth, ids: ids[1].__setitem__(ids[1] == 3, 0),
     "9.png: 1 ids in segments_info are not there: 3"),
    (lambda truth, ids: truth["annotations"][0]["segments_info"][0].update(category_id=8),
     "the id of a category: annotations[0] (4.png) segments_info[0] (id 70004) has 8"),
    (lambda truth, ids: truth["annotations"].pop(), "images have no annotation: 9"),
    (lambda truth, ids: truth["annotations"][0].pop("segments_info"),
     "segments_info, expected a list: annotations[0] (id None) has None"),
    (lambda truth, ids: truth["images"][0].update(file_name="x.jpg"), "images are not in"),
    (lambda truth, ids: truth.update(categories=[{"id": 1, "name": "cat"}]),
     "isthing, expected 0 or 1: categories[0] (id 1) has None"),
])
def test_what_is_wrong_with_coco_maps_is_named(tmp_path, change, words):
    with pytest.raises(UserError, match=re.escape(words)):
        coco_files(tmp_path, change)


def video_files(folder, kind, frames=(0, 1, 2), split="train"):
    """A clip of a person (instance 258) on a road, in the layout of KITTI-STEP or DAVIS."""
    names = {
        "kitti_step": ("training/image_02/0007", f"panoptic_maps/{split}/0007"),
        "davis": ("JPEGImages/480p/bear", "Annotations/480p/bear")}[kind]
    for name in (*names, "ImageSets/2017"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / f"ImageSets/2017/{split}.txt").write_text("bear\n")
    for t in frames:
        Image.new("RGB", (48, 32)).save(folder / names[0] / f"{t:06}.png")
        pixels = np.zeros((32, 48, 3), np.uint8)
        pixels[:, :4], pixels[:, 20:30] = (255, 0, 0), (11, 1, 2)
        picture = Image.fromarray(pixels)
        if kind == "davis":
            picture = Image.fromarray((pixels[..., 0] == 11).astype(np.uint8) * 3)
            picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
        picture.save(folder / names[1] / f"{t:06}.png")


def test_kitti_step_and_davis_are_read(tmp_path):
    video_files(tmp_path, "kitti_step")
    source = data.kitti_step(str(tmp_path), "train")
    record = source[0]
    assert len(source) == 1 and source.count("vps") == 3 and record["id"] == "0007"
    assert record["segments"] == {
        1: row(1, iscrowd=0), 258 * 256 + 12: row(12, iscrowd=0)}
    assert np.array_equal(record["maps"][0, 0, [0, 10, 25]], [0, 1, 258 * 256 + 12])
    assert [k["name"] for k in source.categories if k["isthing"]] == ["person", "car"]
    video_files(tmp_path / "davis", "davis")
    record = data.davis(str(tmp_path / "davis"), "train", 2).record("vps", 2)
    assert record["maps"].shape == (3, 32, 48) and record["segments"] == {1: row(1), 4: row(2)}


def test_images_of_cityscapes_vps_are_clips_by_their_name(tmp_path):
    coco_files(tmp_path)
    truth = json.loads((tmp_path / "pan.json").read_text())
    for name, rows in (("img", truth["images"]), ("panoptic_video", truth["annotations"])):
        (tmp_path / "val" / name).mkdir(parents=True)
        for n, row_ in enumerate(rows):
            old, row_["file_name"] = row_["file_name"], f"0003_000{n}_bonn.png"
            (tmp_path / old).rename(tmp_path / "val" / name / row_["file_name"])
    (tmp_path / "panoptic_gt_val_city_vps.json").write_text(json.dumps(truth))
    source = data.cityscapes_vps(str(tmp_path), "val", past=1)
    assert len(source) == 1 and source[0]["id"] == "0003" and source.count("vps") == 2
    assert source.record("vps", 1)["maps"].shape == (2, 32, 48)
    assert source[0]["segments"].keys() == {3, 70_004, 70_009}


def test_folders_without_videos_and_files_that_are_none_are_named(tmp_path, monkeypatch):
    for folder in ("images/train", "panoptic_maps/train"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError, match="panoptic_maps/train: no video"):
        data.kitti_step(str(tmp_path), "train")
    with pytest.raises(UserError, match="train.txt: no such file"):
        data.davis(str(tmp_path), "train")
    (tmp_path / "map.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="map.png: not a readable image"):
        data.read_ids(f"{tmp_path}/map.png")
    for folder in ("images/train/0", "panoptic_maps/train/0"):
        (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match="images/train/0: no frames, expected image files"):
        data.kitti_step(str(tmp_path), "train")
    with pytest.raises(ValueError, match="images: no frames"):
        list(sample.read_frames(f"{tmp_path}/images"))
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "film.mp4").write_bytes(b"film")
    with pytest.raises(ImportError, match="film.mp4: .* needs the package av: pip install av"):
        list(sample.read_frames(f"{tmp_path}/film.mp4"))


def test_a_frame_that_is_missing_in_a_clip_is_named(tmp_path):
    video_files(tmp_path, "kitti_step", frames=(0, 1, 3))
    with pytest.raises(UserError, match="1 frames are missing: 2"):
        data.kitti_step(str(tmp_path), "train")
    (tmp_path / "training/image_02/0007/000003.png").unlink()
    with pytest.raises(UserError, match="1 maps have no frame: 000003"):
        data.kitti_step(str(tmp_path), "train")


# --------------------------------------------------------------------------------------------------
# results that others made

def test_results_in_coco_format_are_scored_against_their_truth(tmp_path):
    coco_files(tmp_path)
    found = json.loads((tmp_path / "pan.json").read_text())
    (tmp_path / "mine").mkdir()
    for a in found["annotations"]:                     # a part of the dog is missed
        ids = data.read_ids(str(tmp_path / a["file_name"])).copy()
        ids[:12, 16:32] = 0
        (tmp_path / "mine" / a["file_name"]).write_bytes(sample.as_png(ids))
    (tmp_path / "mine.json").write_text(json.dumps({"annotations": found["annotations"]}))
    options = eval.EvalOptions(
        truth_json=str(tmp_path / "pan.json"), truth_masks=str(tmp_path),
        results=str(tmp_path / "mine.json"))
    scores = eval.score_files(options)
    assert scores["PQ_dog"] == pytest.approx(20 / 32) and scores["PQ_sea_water"] == 1
    assert scores["RQ"] == 1 and "PQ_cat" not in scores
    found["annotations"][0]["segments_info"][0]["category_id"] = 8
    (tmp_path / "mine.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="mine.json: 1 wrong values of category_id, .* has 8"):
        eval.score_files(options)


@pytest.mark.parametrize("kind, expected", [
    ("kitti_step", {"STQ": 1.0, "AQ": 1.0, "SQ": 1.0}),
    ("davis", {"J&F": 1.0, "J_mean": 1.0, "F_mean": 1.0, "J_decay": 0.0})])
def test_folders_of_maps_are_scored_by_their_kind(tmp_path, kind, expected):
    video_files(tmp_path, kind)
    folders = {"kitti_step": "panoptic_maps/train", "davis": "Annotations/480p"}
    maps = tmp_path / folders[kind]
    options = eval.EvalOptions(truth_masks=str(maps), results=str(maps))
    assert expected.items() <= eval.score_files(options).items()
    other = tmp_path / "other" / next(maps.iterdir()).name
    other.mkdir(parents=True)
    for path in next(maps.iterdir()).iterdir():        # nothing but the ground is found
        pixels = Image.open(path)
        pixels.paste(0 if kind == "davis" else (0, 0, 0), (0, 0, 48, 32))
        pixels.save(other / path.name)
    options = replace(options, results=str(tmp_path / "other"))
    scores = eval.score_files(options)
    assert scores[list(expected)[0]] == 0
    (other / "000002.png").unlink()
    with pytest.raises(UserError, match="frames have no map: 000002"):
        eval.score_files(options)


def random_segments(rng, categories, base=None):
    """A map (40, 60) of overlapping rectangles, and its segments; with a base, that one shifted,
    with some segments of another class, some missing and some new."""
    numbers, rows = np.zeros((40, 60), int), {}
    if base:
        numbers = np.roll(base[0], rng.integers(-5, 6, 2), (0, 1))
        rows = {n: dict(r) for n, r in base[1].items() if rng.random() < 0.9}
        for r in rows.values():
            r["category_id"] = int(rng.choice([r["category_id"]] * 5 + categories))
    for _ in range(2 if base else rng.integers(2, 9)):
        n, y, x = (int(rng.integers(*ends)) for ends in ((1, 1 << 24), (0, 30), (0, 50)))
        numbers[y:y + rng.integers(4, 30), x:x + rng.integers(4, 40)] = n
        rows[n] = row(int(rng.choice(categories)))
    numbers = np.where(np.isin(numbers, list(rows)), numbers, 0)
    return numbers, {n: r for n, r in rows.items() if n in numbers}


@pytest.mark.parametrize("seed", range(3))
def test_panoptic_quality_is_hotcocos(seed, tmp_path):
    panoptic = pytest.importorskip("hotcoco.panoptic")
    rng, files = np.random.default_rng(seed), {"truth": [], "found": []}
    for i in range(20):
        truth = random_segments(rng, [1, 2, 3])
        found = random_segments(rng, [1, 2, 3], truth)
        for n, r in truth[1].items():
            r["iscrowd"] = int(r["category_id"] < 3 and rng.random() < 0.2)
            r |= {"area": int((truth[0] == n).sum()), "bbox": [0, 0, 1, 1]}
        for name, (numbers, rows) in (("truth", truth), ("found", found)):
            os.makedirs(tmp_path / name, exist_ok=True)
            (tmp_path / name / f"{i}.png").write_bytes(sample.as_png(numbers))
            segments = [{"id": n, **r} for n, r in rows.items()]
            files[name].append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 60} for i in range(20)]
    for name, annotations in files.items():
        content = {"images": images, "categories": CATEGORIES, "annotations": annotations}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    theirs = panoptic.pq_compute(f"{tmp_path}/truth.json", f"{tmp_path}/found.json")
    ours = eval.score_files(eval.EvalOptions(
        truth_json=f"{tmp_path}/truth.json", truth_masks=f"{tmp_path}/truth",
        results=f"{tmp_path}/found.json"))
    for group, ending in (("All", ""), ("Things", "_things"), ("Stuff", "_stuff")):
        for name in ("pq", "sq", "rq"):
            assert ours[name.upper() + ending] == pytest.approx(theirs[group][name], abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_region_and_boundary_are_trackevals(seed):
    for name in ("skimage", "cv2"):                    # what trackeval imports when it is run
        pytest.importorskip(name)
    metrics, rng = pytest.importorskip("trackeval.metrics"), np.random.default_rng(seed)
    truth, rows = [random_segments(rng, [1])[0] % 4 for _ in range(6)], {1: row(1), 2: row(1)}
    found = [random_segments(rng, [1], (numbers, rows))[0] % 7 for numbers in truth]

    def dets(frames, ids):
        masks = [[np.asfortranarray(frame == i, np.uint8) for i in ids] for frame in frames]
        return [list(map(mask.encode, each)) for each in masks]

    ids = [np.unique(frames)[np.unique(frames) > 0].tolist() for frames in (truth, found)]
    theirs = metrics.JAndF().eval_sequence({
        "num_timesteps": 6, "num_gt_ids": len(ids[0]), "num_tracker_ids": len(ids[1]),
        "gt_dets": dets(truth, ids[0]), "tracker_dets": dets(found, ids[1]),
        "gt_ids": [list(range(len(ids[0])))] * 6, "tracker_ids": [list(range(len(ids[1])))] * 6})
    pair = (clip(np.where(np.array(frames) > 0, 1, 3), frames) for frames in (truth, found))
    ours = eval.video_quality([tuple(pair)], CATEGORIES)
    for name, value in list(ours.items())[3:]:         # behind STQ, AQ and SQ
        assert value == pytest.approx(theirs[name.replace("_", "-").title()], abs=1e-9), name


# --------------------------------------------------------------------------------------------------
# the network, and its maps

def test_features_are_merged_until_they_are_as_large_as_the_masks():
    def merges(**fields):
        c = replace(TINY, encoder="resnet", resnet_variant="c4", resnet_width=0.125, **fields)
        return list(Panoptic(c).fuse)

    assert merges(image_size=(64, 96)) == ["2", "1"]                      # strides 16, 8, 4
    assert merges(image_size=(32, 48)) == ["2", "1", "0"]                 # and twice as large
    assert merges(image_size=(128, 192)) == ["2"]
    assert list(Panoptic(TINY).fuse) == ["0"]
    with pytest.raises(ValueError, match="sample_size"):
        Panoptic(replace(TINY, sample_size=(16, 20)))


@pytest.mark.parametrize("change, words", [
    (dict(max_segments=300), "channels 16: expected 'ids', twice the bits of 299"),
    (dict(bits="uint8"), "bits 'uint8', channels 16: expected 'ids'"),
    (dict(sampler="euler"), "sampler is 'euler'"),
    (dict(train_schedule="cubic"), "cubic"),
    (dict(low_noise_weight=0.5), "low_noise_weight is 0.5"),
    (dict(pred_type="x"), "softmax_groups belong together"),
])
def test_what_does_not_fit_is_said_before_the_first_step(change, words, tmp_path):
    c = changed(
        train.PRESETS["pan_shapes"].config, channels=16, out=str(tmp_path), device="cpu", steps=1,
        **change)
    with pytest.raises(ValueError, match=words):
        train.prepare(c, Device("cpu"))


def test_a_network_of_images_goes_on_as_one_of_videos():
    torch.manual_seed(0)
    old, new = (Panoptic(replace(TINY, past_frames=n)).eval() for n in (0, 2))
    with pytest.raises(ValueError, match="conv_in.*channels more"):
        adapt_weights(old.state_dict(), new)
    weights, notes = adapt_weights(old.state_dict(), new, adapt=True)
    load_weights(new, weights)
    assert len(notes) == 1
    x, images = torch.randn(2, 16, 16, 24), torch.rand(2, 3, 32, 48)
    torch.nn.init.normal_(old.denoiser.conv_out.weight)                   # it begins with zeros
    new.denoiser.conv_out.load_state_dict(old.denoiser.conv_out.state_dict())
    expected, _ = old(x, torch.full((2,), 0.5), images=images)
    y, _ = new(x, torch.full((2,), 0.5), images=images, past=torch.randn(2, 32, 16, 24))
    assert expected.std() > 0.1
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_the_first_frame_takes_its_own_number_of_steps_and_the_next_see_its_map():
    torch.manual_seed(0)
    c, calls, pasts = recipe(
        replace(TINY, past_frames=2), sample_steps=4, later_steps=2), [], []
    network = Panoptic(c.model).eval()
    encode = network.encode
    network.encode = lambda images, past: pasts.append(past) or encode(images, past)
    maps = diffusion.generate_maps(
        network, c, torch.rand(1, 3, 3, 32, 48), torch.Generator().manual_seed(0),
        callback=calls.append)
    assert [[x.shape for x in states] for states in calls] == 4 * [2 * [(1, 2, 16, 24)]]
    assert maps.shape == (1, 3, 2, 16, 24)
    none, first = torch.zeros(1, 2, 16, 24, dtype=torch.long), maps[:, 0]
    expected = diffusion.ints_to_bits(torch.cat([none, first], 1), 8, 0.1)
    assert torch.equal(pasts[1], expected) and torch.equal(pasts[2][:, :16], expected[:, 16:])


def test_a_full_map_is_as_large_as_its_image_and_keeps_large_instances():
    view = data.eval_view((0, 0, 64, 64), TINY.image_size)                # 32 of the 48 columns
    mask = np.zeros((2, 16, 24), np.uint8)
    mask[0, :, :8], mask[1, :, :8] = 2, 7
    mask[0, 0, 0], mask[:, 8, 12] = 1, (3, 9)          # a stray class, and an instance of one pixel
    full = sample.full_map(mask, view, (64, 64), sample.SamplingConfig(min_pixels=20))
    assert full.shape == (64, 64) and np.unique(full).tolist() == [0, 2 * 256 + 7]
    assert (full[:, :32] > 0).all() and not full[:, 32:].any()
    options = sample.SamplingConfig(min_pixels=20, split_pixels=16)       # the stray one has 16
    parted = sample.full_map(mask, view, (64, 64), options)
    assert np.unique(parted).tolist() == [0, 256 + 7, 2 * 256 + 7] and (parted == 263).sum() == 16
    assert np.array_equal(sample.read_map(sample.as_png(full)), [full >> 8, full & 255])


@pytest.mark.parametrize("frames", [1, 3])
def test_truth_as_prediction_is_perfect_where_masks_are_as_large_as_images(frames):
    c = recipe(
        replace(TINY, image_size=(64, 64), sample_size=(64, 64)), min_pixels=0, max_segments=8)
    source = ShapeMaps("val", 64, frames=frames, count=6)
    c = replace(c, categories=tuple(source.categories))
    records = [source[i] for i in range(6)]
    said = dict(enumerate(eval.true_maps(None, sample.Inputs(records, c), c)))
    assert eval.score_maps(said, source, c, None)["PQ"] == pytest.approx(1, abs=1e-12)
    if frames > 1:
        scores = eval.score_clips(said, source, c, None)
        assert [scores[key] for key in ("STQ", "J&F")] == pytest.approx([1, 1], abs=1e-12)


# --------------------------------------------------------------------------------------------------
# runs

@pytest.mark.parametrize(
    "name", [n for n, p in PRESETS.items() if isinstance(p.config.model, PanopticConfig)])
def test_every_panoptic_preset_shrunk_trains_resumes_and_evaluates(name, tmp_path):
    c = PRESETS[name].config
    kind, shrunk = c.data.data, replace(
        c.model, image_size=(32, 48), patch_size=8, enc_layers=1, enc_dim=32, enc_mlp=32,
        enc_heads=2, resnet_width=0.125, sample_size=(16, 24), fuse_dim=32, unet_dim=32,
        multipliers=(1,), res_blocks=(1,), transformer_layers=1, transformer_dim=32, head_dim=32)
    options = dict(data_dir=str(tmp_path), out=str(tmp_path / "run"))
    if kind == "coco":
        coco_files(tmp_path)
        for part in ("train", "val"):
            options |= {f"{part}_{what}": str(tmp_path) for what in ("masks", "images")}
            options[f"{part}_json"] = f"{tmp_path}/pan.json"
    elif kind != "shapes":
        for split in ("train", "val"):
            video_files(tmp_path, kind, split=split)
    c = changed(
        replace(c, model=shrunk), steps=2, batch_size=2, workers=0, val_count=2, clip_frames=3,
        sample_steps=2, min_pixels=1, warmup_steps=1, device="cpu", pictures=1, max_shapes=2,
        **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Device, "stopping", lambda self, step: step == 1)
        assert train.train(c) is None
    (task,) = c.data.tasks
    metrics = train.train(c)[task]
    assert {"pan": {"PQ", "SQ", "RQ"}, "vps": {"STQ", "J&F"}}[task] <= set(metrics)
    assert all(0 <= metrics[key] <= 1 for key in ("PQ", "STQ") if key in metrics)
    clips = task == "vps"
    (picture,) = (tmp_path / "run/step_0000002").glob(f"*.{'gif' if clips else 'png'}")
    width, height = Image.open(picture).size           # what is predicted, and beside it the truth
    assert width > 1.9 * height or kind != "shapes"
    said = run("sample.py", f"--ckpt={c.run.out}", "--count=2", "--explain", f"--out={tmp_path}/s")
    report = json.loads(said.stdout)
    for annotation in report["annotations"]:
        ids = data.read_ids(f"{tmp_path}/s/maps/{annotation['file_name']}")
        assert set(np.unique(ids)) - {0} == {row["id"] for row in annotation["segments_info"]}
    for path in report["pictures"]:                    # noise and estimate of both steps
        page = Path(path).with_suffix(".html").read_text()
        assert page.count("<img") == 1 + 4 and "t 0.50<br>gamma 0.500" in page


SMALL = [
    "pan_shapes", "--steps=4", "--batch_size=4", "--image_size=32", "--sample_size=16",
    "--enc_layers=1", "--unet_dim=32", "--multipliers=1", "--res_blocks=1", "--val_count=4",
    "--sample_steps=2", "--workers=0", "--device=cpu", "--optimizer=adamw", "--pictures=0",
    "--save_every=2", "--log_every=1"]


def test_two_processes_find_the_maps_that_one_finds(tmp_path):
    run("train.py", *SMALL, f"--out={tmp_path}/run")
    options = f"--ckpt={tmp_path}/run", "--batch_size=1", "--device=cpu"
    for name, processes in (("one", 0), ("two", 2)):
        run("eval.py", *options, f"--out={tmp_path}/{name}", f"--workers={processes}",
            torchrun=processes)
    one, two = ((tmp_path / f"{name}_pan.json").read_text() for name in ("one", "two"))
    assert one == two and len(json.loads(one)["annotations"]) == 4


def test_photos_are_segmented_at_their_own_size_and_clips_read_from_gifs(tmp_path):
    run("train.py", *SMALL, "--steps=1", f"--out={tmp_path}/run")
    Image.new("RGB", (50, 21), "red").save(tmp_path / "photo.jpg")
    Image.new("RGB", (20, 70), "blue").save(tmp_path / "tall.png")
    files = [f"{tmp_path}/{name}" for name in ("photo.jpg", "tall.png")]
    said = run("sample.py", *files, f"--ckpt={tmp_path}/run", f"--out={tmp_path}/s")
    maps = [a["file_name"] for a in json.loads(said.stdout)["annotations"]]
    assert [Image.open(f"{tmp_path}/s/maps/{name}").size for name in maps] == [(50, 21), (20, 70)]
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert len(list(sample.read_frames(f"{tmp_path}/film.gif"))) == 3
    (tmp_path / "film").mkdir()
    for i in (9, 10):
        frames[0].save(tmp_path / f"film/{i}.png")
    options = sample.SampleOptions(images=(f"{tmp_path}/film/",))
    [(name, record)] = sample.each_input(options, "vps", None, [])
    assert len(record["images"]) == 2 and name == f"{tmp_path}/film/"
    options = replace(options, images=(f"{tmp_path}/film.gif",))
    rows = list(sample.each_input(options, "pan", None, []))
    assert [name for name, _ in rows] == [f"film_{n:06}" for n in range(3)]
    colors = [row["images"][0].getpixel((0, 0)) for _, row in rows]
    assert [np.argmax(color) for color in colors] == [0, 1, 2]
