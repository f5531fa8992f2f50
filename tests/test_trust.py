"""Wrong input: one error that says where, before the first step; nothing saved is lost.

Rows of tables are kinds of wrong input; the fuzzers make members of them at random, with a seed.
The long ones run by `pytest -m campaign tests/test_trust.py`, some five minutes on two cores.
"""
import copy
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, run
from PIL import Image
from test_panoptic import coco_files

import data
import eval
import model as m
import sample
import tokenizer
import train
from tokenizer import UserError

TINY = [
    "--steps=2", "--save_every=1", "--log_every=1", "--pictures=1", "--batch_size=2",
    "--enc_layers=1", "--dec_layers=1", "--enc_dim=16", "--enc_mlp=16", "--enc_heads=2",
    "--dec_dim=16", "--dec_mlp=16", "--dec_heads=2", "--image_size=32", "--max_objects=6",
    "--workers=0", "--device=cpu"]


def dataset(folder, edit=lambda truth: None, split=None):
    """A COCO dataset of three images per split: instances, keypoints and captions. edit: of the
    files of a split, or of both, by kind; it may replace one by bytes."""
    random.seed(0)
    os.makedirs(f"{folder}/annotations", exist_ok=True)
    for part in ("train", "val"):
        os.makedirs(f"{folder}/{part}2017", exist_ok=True)
        images, objects, captions = [], [], []
        for i in range(1, 4):
            pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(f"{folder}/{part}2017/{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 48})
            captions += [{"id": i, "image_id": i, "caption": f"number {i}"}]
            for k in range(2):
                objects.append({
                    "id": 10 * i + k, "image_id": i, "category_id": 1 + k, "iscrowd": 0,
                    "bbox": [4 + 20 * k, 6, 18, 20], "area": 200.0,
                    "segmentation": [[4 + 20 * k, 6, 22 + 20 * k, 6, 22 + 20 * k, 26]]})
                if k == 0:
                    objects[-1]["keypoints"] = [6, 8, 2, 12, 20, 1]
        categories = [
            {"id": 1, "name": "cat", "keypoints": ["head", "tail"], "skeleton": [[1, 2]]},
            {"id": 2, "name": "dog"}]
        truth = {
            "instances": {"images": images, "annotations": objects, "categories": categories},
            "captions": {"images": images, "annotations": captions}}
        truth = copy.deepcopy(truth)
        if split in (None, part):
            edit(truth)
        for kind, content in truth.items():
            path = f"{folder}/annotations/{kind}_{part}2017.json"
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
            with open(path, "wb") as f:
                f.write(content)
    return str(folder)


def started(folder, *options):
    """What training says about a dataset."""
    return run(
        "train.py", *TINY, "--data=coco", f"--data_dir={folder}", f"--out={folder}/run", *options,
        check=False)


def refused(done, *words, code=1):
    """One error of one or two lines that has these words, and no traceback."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert done.returncode == code, done.stdout + done.stderr
    assert len(lines) in (1, 2) and lines[0].startswith("error: "), done.stderr
    assert len(lines[0]) < 700, lines[0]
    for word in words:
        assert word in done.stderr, f"{word!r} is not in {done.stderr}"


def objects(key, value, *numbers):
    """An edit: this value of the annotations with these numbers (all: none given)."""
    def edit(truth):
        rows = truth["instances"]["annotations"]
        for n in numbers or range(len(rows)):
            rows[n][key] = value

    return edit


def rows(kind, rows_of, n, **values):
    return lambda truth: truth[kind][rows_of][n].update(values)


def whole(kind, content):
    return lambda truth: truth.update({kind: content})


def dropped(kind, name, key, n=0):
    return lambda truth: truth[kind][name][n].pop(key)


def twice(kind, name):
    return lambda truth: truth[kind][name].append(dict(truth[kind][name][0]))


NAN = math.nan
REFUSED = [
    # boxes
    ("det", objects("bbox", None, 1), ["bbox", "annotations[1]", "(id 11)", "None"]),
    ("det", objects("bbox", ["1", "2", "3", "4"], 1), ["(id 11)", "'1'", "x y width height"]),
    ("det", objects("bbox", [1, 2, 3], 2), ["(id 20)", "[1, 2, 3]"]),
    ("det", objects("bbox", [1, 2, NAN, 4], 2), ["(id 20)", "nan"]),
    ("det", objects("bbox", [1, 2, 1e999, 4], 2), ["(id 20)", "inf"]),
    ("det", objects("bbox", [10, 10, -5, 5], 0), ["(id 10)", "-5"]),
    ("det", objects("bbox", {"x": 1}, 0), ["(id 10)", "{'x': 1}"]),
    ("det", objects("bbox", 7, 0), ["(id 10)", "has 7"]),
    ("det", objects("bbox", [10, 10, 40, 36]), ["look like x1 y1 x2 y2"]),
    ("det", objects("bbox", [0.1, 0.1, 0.4, 0.6]), ["between 0 and 1", "pixels"]),
    ("det", objects("bbox", [100, 100, 5, 5], 0), ["outside", "--bad_boxes=drop", "40"]),
    # other values of annotations
    ("det", objects("iscrowd", "0"), ["iscrowd", "'0'", "0 or 1"]),
    ("det", objects("iscrowd", 3, 0), ["iscrowd", "3"]),
    ("det", objects("area", "big", 0), ["area", "'big'"]),
    ("det", objects("category_id", "1"), ["category_id", "'1'"]),
    ("det", objects("category_id", [1], 0), ["category_id", "[1]"]),
    ("det", objects("category_id", 9, 0), ["category_id", "9"]),
    ("det", objects("image_id", "1", 0), ["image_id", "'1'"]),
    ("det", objects("image_id", 77, 0), ["image_id", "77"]),
    ("det", dropped("instances", "annotations", "image_id"), ["image_id", "None"]),
    ("det", dropped("instances", "annotations", "bbox"), ["bbox", "None"]),
    ("det", twice("instances", "annotations"), ["id", "10"]),
    ("det", lambda t: t["instances"]["annotations"].append(None), ["annotations[6]", "None"]),
    ("det", lambda t: t["instances"]["annotations"].insert(0, 5), ["annotations[0]", "5"]),
    # images and categories
    ("det", rows("instances", "images", 2, id="3"), ["id", "'3'"]),
    ("det", rows("instances", "images", 0, id=None), ["id", "None"]),
    ("det", rows("instances", "images", 0, height="40"), ["height", "'40'"]),
    ("det", rows("instances", "images", 0, width=0), ["width", "0"]),
    ("det", rows("instances", "images", 0, file_name=5), ["file_name", "5"]),
    ("det", rows("instances", "images", 0, file_name="no.png"), ["no.png"]),
    ("det", dropped("instances", "images", "file_name"), ["file_name", "None"]),
    ("det", twice("instances", "images"), ["id", "images[3]"]),
    ("det", rows("instances", "categories", 0, id="1"), ["categories[0]", "'1'"]),
    ("det", rows("instances", "categories", 1, id=1), ["categories[1]", "1"]),
    ("det", dropped("instances", "categories", "name"), ["name", "None"]),
    ("det", rows("instances", "categories", 0, name=3), ["name", "3"]),
    ("det", lambda t: t["instances"].update(categories={"1": "cat"}), ["'categories'"]),
    ("det", lambda t: t["instances"].update(images=[]), ["no images"]),
    ("det", lambda t: t["instances"].update(annotations=[]), ["nothing to learn"]),
    ("det", lambda t: t["instances"].update(annotations=None), ["'annotations'"]),
    ("det", lambda t: t["instances"].pop("images"), ["'images'"]),
    # whole files
    ("det", whole("instances", b""), ["not JSON"]),
    ("det", whole("instances", b'{"images": [{"id"'), ["not JSON"]),
    ("det", whole("instances", b"[" * 100_000), ["not JSON"]),
    ("det", whole("instances", b"\x1f\x8b\x08\x00abc"), ["not JSON"]),
    ("det", whole("instances", '{"images": "é"}'.encode("latin-1")), ["not JSON"]),
    ("det", whole("instances", b"[]"), ["object with a list"]),
    ("det", whole("instances", b"3"), ["object with a list"]),
    # masks
    ("seg", objects("segmentation", []), ["nothing to learn seg"]),
    ("seg", objects("segmentation", None), ["nothing to learn seg"]),
    ("seg", objects("segmentation", "abc", 0), ["segmentation", "'abc'"]),
    ("seg", objects("segmentation", {"size": [40, 48], "counts": [5, 5]}, 0), ["run lengths"]),
    ("seg", objects("segmentation", {"size": [40, 48], "counts": [-5, 1925]}, 0), ["run lengths"]),
    ("seg", objects("segmentation", {"size": [4, 4], "counts": [16]}, 0), ["run lengths"]),
    ("seg", objects("segmentation", {"size": [40, 48], "counts": "abc"}, 0), ["run lengths"]),
    ("seg", objects("segmentation", {"counts": [16]}, 0), ["run lengths"]),
    # keypoints
    ("kpt", objects("keypoints", [1, 2, 3, 4], 0), ["keypoints", "4 values", "(id 10)"]),
    ("kpt", objects("keypoints", [1, 2, 7, 3, 4, 2], 0), ["visibility", "(id 10)"]),
    ("kpt", objects("keypoints", [1, 2, 2, NAN, 4, 2], 0), ["keypoints", "(id 10)"]),
    ("kpt", objects("keypoints", [1, 2, 2, 3, 4, 2], 1), ["keypoints", "(id 11)"]),
    ("kpt", rows("instances", "categories", 0, keypoints=None, skeleton=None),
     ["keypoints of categories: none"]),
    ("kpt", rows("instances", "categories", 1, keypoints=["nose"]), ["'cat': 2, 'dog': 1"]),
    ("kpt", rows("instances", "categories", 0, keypoints="head"), ["keypoints"]),
    ("kpt", rows("instances", "categories", 0, skeleton=[[1, 9]]), ["skeleton"]),
    # captions
    ("cap", rows("captions", "annotations", 0, caption=["a"]), ["caption", "['a']"]),
    ("cap", rows("captions", "annotations", 0, caption=5), ["caption", "5"]),
    ("cap", lambda t: [a.update(caption=" ") for a in t["captions"]["annotations"]],
     ["nothing to learn cap"]),
]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("task, edit, words", REFUSED)
def test_a_wrong_annotation_file_ends_training_before_its_first_step(
        tmp_path, task, edit, words, split):
    """Also if it is the held-out one, but that a file to evaluate on may hold nothing."""
    if split == "val" and re.search("nothing|none|'cat'", words[0]):
        pytest.skip("a notice, or nothing: the model has its categories from training")
    done = started(dataset(tmp_path, edit, split), f"--tasks={task}")
    file = f"_{split}2017.json" if "nothing to learn" not in words[0] else ""
    refused(done, file, *words)
    assert not os.path.exists(tmp_path / "run/last.pt")


MENDED = [
    ("det", whole("extra", {}), []),
    ("det", lambda t: [a.pop("iscrowd") and a.pop("area") for a in t["instances"]["annotations"]],
     []),
    ("det", objects("iscrowd", None), []),
    ("det", objects("area", None), []),
    ("det", objects("segmentation", "anything", 0), []),
    ("det", objects("keypoints", [1, 2], 0), []),
    ("det", rows("instances", "categories", 1, keypoints=["nose"]), []),
    ("det", rows("instances", "annotations", 0, id=None), []),
    ("det", lambda t: t["instances"].update(info=None, licenses=3), []),
    ("det", lambda t: t["instances"]["annotations"].extend(
        dict(t["instances"]["annotations"][0], id=100 + i) for i in range(5)),
     ["left out: 1 images have more objects than --max_objects, up to 7"]),
    ("seg", objects("segmentation", [], 0), ["left out: 1 masks have no polygon"]),
    ("seg", objects("segmentation", None, 0), ["left out: 1 masks have no polygon"]),
    ("seg", objects("segmentation", [[1, 2, 3, 4]], 0), ["left out: 1 masks have no polygon"]),
    ("seg", objects("segmentation", [[1, 2, 3, 4, 5, 6, 7]], 0), ["left out: 1 masks"]),
    ("seg", objects("segmentation", [[1, 2, NAN, 4, 5, 6]], 0), ["left out: 1 masks"]),
    ("seg", objects("segmentation", [[1, 2, 1e30, 4, 5, 6]], 0), ["left out: 1 masks"]),
    ("seg", objects("segmentation", [[4, 6], [22, 6], [22, 26]], 0), []),
    ("seg", objects("segmentation", [[[4, 6], [22, 6], [22, 26]]], 0), []),
    ("seg", objects("segmentation", [4, 6, 22, 6, 22, 26], 0), []),
    ("seg", objects("segmentation", [[4, 6, 22, 6, 22, 26], []], 0), []),
    ("seg", objects("segmentation", {"size": [40, 48], "counts": [500, 20, 1400]}, 0),
     ["left out: 1 masks of run lengths are not learned from"]),
    ("kpt", objects("area", 0), []),
    ("kpt", dropped("instances", "annotations", "keypoints", 2), []),
    ("kpt", objects("num_keypoints", None), []),
    ("cap", rows("captions", "annotations", 0, caption=None), ["left out: 1 captions are empty"]),
    ("cap", rows("captions", "annotations", 0, caption=""), ["left out: 1 captions are empty"]),
    ("cap", rows("captions", "annotations", 0, caption="long " * 2000),
     ["left out: 1 captions are cut to --caption_length"]),
]


@pytest.mark.parametrize("task, edit, words", MENDED)
def test_what_can_be_mended_is_mended_and_what_is_left_out_is_counted(tmp_path, task, edit, words):
    done = started(dataset(tmp_path, edit), f"--tasks={task}")
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if "left out" in line]
    assert len(notes) == 2 * len(words), notes         # train and val
    for word in words:
        assert word in notes[0], notes
    with open(tmp_path / "run/data.json") as f:
        stored = json.load(f)
    assert stored[f"{task} train"]["images"] == 3
    assert len(stored[f"{task} train"]["left out"]) == len(words)


def test_a_byte_order_mark_and_utf_16_are_read(tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):
        def edit(truth):
            truth["instances"] = json.dumps(truth["instances"]).encode(encoding)

        assert started(dataset(tmp_path / encoding, edit)).returncode == 0


def test_files_that_are_none_end_at_once(tmp_path):
    folder = dataset(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    os.makedirs(tmp_path / "folder.json")
    for path in ("pipe", "folder.json", "gone"):
        for option in ("train_json", "val_json"):
            done = started(folder, f"--{option}={tmp_path}/{path}")
            refused(done, f"{tmp_path}/{path}: no such file, or another thing than a file")


def test_held_out_categories_are_matched_by_their_names(tmp_path):
    def other_ids(truth):
        for row in truth["instances"]["categories"]:
            row["id"] += 40
        for row in truth["instances"]["annotations"]:
            row["category_id"] += 40

    folder = dataset(tmp_path, other_ids, "val")
    c = sample.changed(train.Config(), data="coco", data_dir=folder)
    learned = data.make_source(c, "train")
    done = started(folder)
    assert done.returncode == 0 and "2 categories have other ids" in done.stderr, done.stderr
    held_out = data.make_source(replace(c, categories=tuple(learned.categories)), "val")
    assert held_out.categories == learned.categories
    assert held_out[0]["labels"].tolist() == learned[0]["labels"].tolist() == [1, 2]
    assert {a["category_id"] for a in held_out.truth()["annotations"]} == {1, 2}

    def other_names(truth):
        truth["instances"]["categories"][0]["name"] = "lynx"

    refused(started(dataset(tmp_path, other_names, "val")), "val2017.json", "'lynx'", "cat, dog")


def test_classes_that_a_model_knows_by_number_may_have_any_name():
    """Those of converted checkpoints; another name is another class."""
    c = train.PRESETS["gen_shapes"].config
    for name, fine in ((str, True), (data.KINDS.__getitem__, True), ("cube {}".format, False)):
        rows = tuple({"id": i, "name": name(i), "label": i} for i in range(4))
        if fine:
            assert data.make_source(replace(c, categories=rows), "val", "gen").classes == data.KINDS
        else:
            with pytest.raises(UserError, match="class 0 is 'circle', not 'cube 0'"):
                data.make_source(replace(c, categories=rows), "val", "gen")


def test_a_true_box_at_the_edge_keeps_its_place_beside_its_mask(tmp_path):
    """Cut to the image nothing is left of it, but the masks behind it are still those of others."""
    edge = objects("bbox", [48, 6, 1, 20], 0)
    source = data.Coco(
        f"{dataset(tmp_path, edge)}/annotations/instances_train2017.json",
        f"{tmp_path}/train2017", task="seg")
    record = source[0]
    found = sample.true_objects(record, source.categories)
    assert [obj["category_id"] for obj in found] == [1, 2] and len(record["polygons"]) == 2


def test_a_refused_run_leaves_the_earlier_ones_folder_as_it_was(tmp_path):
    folder = dataset(tmp_path / "a")
    assert started(folder).returncode == 0
    before = (tmp_path / "a/run/data.json").read_bytes()
    edit = lambda truth: truth["instances"]["annotations"].pop()
    other = dataset(tmp_path / "b", edit)
    refused(started(other, f"--out={folder}/run"), "is of another run")
    assert (tmp_path / "a/run/data.json").read_bytes() == before
    empty = dataset(tmp_path / "c", lambda truth: truth["instances"].update(annotations=[]))
    refused(started(empty, f"--out={folder}/run", "--fresh"), "nothing to learn det")
    assert sorted(os.listdir(tmp_path / "a")) == ["annotations", "run", "train2017", "val2017"]


def test_a_class_has_one_name_in_all_files(tmp_path):
    def edit(truth):
        truth["person_keypoints"] = copy.deepcopy(truth["instances"])
        truth["person_keypoints"]["categories"][0]["name"] = "person"

    refused(started(dataset(tmp_path, edit), "--tasks=det,kpt"), "'cat'", "'person'")


def test_nothing_to_find_in_held_out_data_is_said_and_makes_no_best_checkpoint(tmp_path):
    edit = lambda truth: truth["instances"].update(annotations=[])
    done = started(dataset(tmp_path, edit, "val"))
    assert done.returncode == 0 and "nothing to find" in done.stderr, done.stderr
    assert os.path.exists(tmp_path / "run/last.pt") and not os.path.exists(tmp_path / "run/best.pt")
    sampled = run("sample.py", f"--ckpt={tmp_path}/run", f"--out={tmp_path}/shown", check=False)
    assert sampled.returncode == 0, sampled.stderr


def test_of_two_equal_scores_the_later_is_the_best(tmp_path):
    done = started(dataset(tmp_path), "--steps=4", "--eval_every=2", "--lr=1e-9")
    assert done.returncode == 0, done.stderr
    assert m.load(str(tmp_path / "run/best.pt"))["step"] == 4


RESULT = {"image_id": 1, "category_id": 1, "bbox": [4, 6, 18, 20], "score": 0.5}


@pytest.mark.parametrize("change, words", [
    (dict(image_id=99), ["image_id", "99"]),
    (dict(image_id="1"), ["image_id", "'1'"]),
    (dict(category_id=5), ["category_id", "5"]),
    (dict(score=None), ["score", "None"]),
    (dict(score=NAN), ["score", "nan"]),
    (dict(score="0.5"), ["score", "'0.5'"]),
    (dict(bbox="1 2 3 4"), ["bbox", "'1 2 3 4'"]),
    (dict(bbox=["1", "2", "3", "4"]), ["bbox", "'1'"]),
    (dict(bbox=[1, 2, 3]), ["bbox", "[1, 2, 3]"]),
    (dict(bbox=None), ["bbox", "None"]),
])
def test_wrong_results_are_named_and_no_results_are_ap_0(trained_masks, tmp_path, change, words):
    path = tmp_path / "results.json"
    options = (
        f"--ckpt={trained_masks}", f"--boxes={path}", "--task=seg", f"--out={tmp_path}/scores")
    path.write_text(json.dumps([RESULT, {**RESULT, "image_id": 2, **change}]))
    refused(run("eval.py", *options, check=False), "results.json", "results[1]", *words)
    path.write_text("[]")
    assert re.search(r"AP +0.0000", run("eval.py", *options).stdout)


@pytest.fixture(scope="module")
def trained_masks(tmp_path_factory):
    """A run on the masks of three images."""
    folder = tmp_path_factory.mktemp("masks")
    done = started(dataset(folder), "--tasks=seg", "--max_points=5")
    assert done.returncode == 0, done.stderr
    return str(folder / "run")


# --------------------------------------------------------------------------------------------------
# images

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on three images."""
    folder = tmp_path_factory.mktemp("trained")
    done = started(dataset(folder))
    assert done.returncode == 0, done.stderr
    return str(folder / "run")


def odd_images(folder):
    """{name: whether it can be read}"""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8))
    names = {}

    def put(name, image, readable=True, **options):
        image.save(f"{folder}/{name}", **options)
        names[name] = readable

    put("plain.PNG", picture)
    put("photo.JPG", picture)
    put("one.png", picture.resize((1, 1)))
    put("line.png", picture.resize((20_000, 1)))
    put("cmyk.jpg", picture.convert("CMYK"))
    put("deep.png", Image.fromarray(np.arange(108, dtype=np.uint16).reshape(9, 12) * 600))
    put("palette.png", picture.quantize(4), transparency=1)
    put("film.gif", picture, save_all=True, append_images=[picture.rotate(90)])
    put("grey.png", picture.convert("L"))
    put("ünïcode name.webp", picture)
    exif = Image.Exif()
    exif[0x0112] = 6
    put("turned.jpg", picture, exif=exif)
    for name, content in (
            ("empty.jpg", b""), ("text.jpg", b"hello"), ("page.png", b"<html>"),
            ("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")):
        with open(f"{folder}/{name}", "wb") as f:
            f.write(content)
        names[name] = False
    with open(f"{folder}/photo.JPG", "rb") as f:
        content = f.read()
    with open(f"{folder}/half.jpg", "wb") as f:
        f.write(content[:len(content) // 2])
    bomb = Image.new("1", (30_000, 20_000))
    put("bomb.png", bomb, readable=False)
    os.mkfifo(f"{folder}/pipe.png")
    return names | {"half.jpg": False, "pipe.png": False, "gone.png": False}


def test_of_photos_those_that_can_be_read_are_predicted_and_the_others_named(trained, tmp_path):
    names = odd_images(tmp_path)
    paths = [f"{tmp_path}/{name}" for name in names]
    done = run(
        "sample.py", *paths, f"--ckpt={trained}", f"--out={tmp_path}/shown", "--min_score=0",
        check=False)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    films = [row for row in report if "_0000" in row["image"]]
    assert [row["image"] for row in films] == ["film_000000", "film_000001"]
    paths = [path for path in paths if not path.endswith(".gif")]
    for path, row in zip(paths, [row for row in report if row not in films]):
        name = os.path.basename(path)
        assert ("error" not in row) == names[name], row
        if names[name]:
            assert os.path.exists(row["picture"])
        else:
            assert path in row["error"] and f"error: {path}" in done.stderr
    drawn = Image.open(f"{tmp_path}/shown/turned.png")
    assert drawn.height > drawn.width                  # upright


def test_unreadable_training_images_are_left_out_by_name(tmp_path):
    folder = dataset(tmp_path)
    (tmp_path / "train2017/2.png").write_bytes(b"no image")
    Image.new("RGB", (48, 41)).save(tmp_path / "train2017/3.png")
    done = started(folder, "--steps=4")
    assert done.returncode == 0, done.stderr
    assert "2.png: not a readable image" in done.stdout
    assert "3.png: the image is 41x48, its labels are for 40x48" in done.stdout


def test_pictures_replace_neither_an_input_nor_each_other(trained, tmp_path):
    for folder in ("a", "b", "samples"):
        (tmp_path / folder).mkdir()
    image, inputs = Image.new("RGB", (30, 20), "red"), []
    for name in ("a/x.jpg", "b/x.png", "samples/x.png", "samples/all.png", "samples/X_1.png"):
        image.save(tmp_path / name)
        inputs.append(str(tmp_path / name))
    before = [open(path, "rb").read() for path in inputs]
    done = run("sample.py", *inputs, f"--ckpt={trained}", f"--out={tmp_path}/samples")
    assert [open(path, "rb").read() for path in inputs] == before
    pictures = [row["picture"] for row in json.loads(done.stdout)]
    assert len({path.lower() for path in pictures}) == 5 and not set(pictures) & set(inputs)
    assert all(map(os.path.exists, pictures))


def test_an_evaluation_does_not_replace_the_boxes_it_is_about(tmp_path):
    assert started(dataset(tmp_path), "--tasks=det,seg", "--max_points=5").returncode == 0
    boxes = tmp_path / "run/last_val_det.json"
    boxes.write_text(json.dumps([RESULT]))
    done = run("eval.py", f"--ckpt={tmp_path}/run/last.pt", f"--boxes={boxes}", check=False)
    refused(done, str(boxes), "--out")
    assert json.loads(boxes.read_text()) == [RESULT]


def test_frames_of_different_sizes_are_named(tmp_path):
    for n, size in enumerate([(9, 9), (9, 9), (8, 9)]):
        Image.new("RGB", size).save(tmp_path / f"{n}.png")
    failed, options = [], sample.SampleOptions(images=(str(tmp_path),))
    assert not list(sample.each_input(options, "vps", None, failed))
    assert f"{tmp_path}: frames of different sizes" in failed[0]["error"]


# --------------------------------------------------------------------------------------------------
# checkpoints and runs

class Stranger:
    """Unpickled, it would make a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, "w")


def test_a_strangers_file_runs_nothing_in_any_reader(tmp_path):
    mark, path = str(tmp_path / "mark"), str(tmp_path / "file")
    content = pickle.dumps(Stranger(mark))

    def pack(path):
        torch.save({"network": "Pix2Seq", "config": Stranger(mark), "model": {}}, path)

    def arrays(path):
        with open(path, "wb") as f:
            np.savez(f, mean=np.array([Stranger(mark)], object), cov=np.zeros(1))

    def plain(path):
        with open(path, "wb") as f:
            f.write(content)

    readers = [
        m.load, data.read_json, data.parse_json, data.load_image, data.read_ids,
        lambda path: data.read_idx(path, 3), lambda path: data.load_cifar10(path, "train"),
        lambda path: data.load_mnist(path, "train"),
        lambda path: list(sample.read_frames(f"{path}.gif")),
        tokenizer.SentencePieces, lambda path: eval.Inception(path, m.Device("cpu")),
        lambda path: train.start_from(path, None, train.Config(), None),
    ]
    for write in (plain, pack, arrays):
        for read in readers:
            os.makedirs(path + "s", exist_ok=True)
            for target in (path, f"{path}.gif"):
                write(target)
            with pytest.raises((UserError, OSError, ImportError)):
                read(path)
    assert not os.path.exists(mark)


def test_frechet_statistics_of_a_stranger_are_not_unpickled(tmp_path):
    path, mark = tmp_path / "statistics.npz", str(tmp_path / "mark")
    np.savez(path, mean=np.array([Stranger(mark)], object), cov=np.zeros(1))
    with pytest.raises(ValueError, match="allow_pickle"), np.load(path) as stored:
        stored["mean"]
    assert not os.path.exists(mark)


def broken_checkpoints(path, count, seed=0):
    """Yields (what was done, the file's content): cut, or with a bit flipped."""
    with open(path, "rb") as f:
        content = f.read()
    rng = random.Random(seed)
    for n in range(count):
        place = rng.randrange(len(content))
        if n % 4 == 0:
            yield f"cut at {place}", content[:place]
        else:
            flipped = bytearray(content)
            flipped[place] ^= 1 << rng.randrange(8)
            yield f"bit of {place}", bytes(flipped)


def load_broken(trained, tmp_path, count):
    """How many of broken checkpoints are noticed. One that is not must hold what the whole does:
    bits of a date, or of the space between tensors, mean nothing."""
    whole, noticed = m.load(f"{trained}/last.pt"), 0
    path = str(tmp_path / "last.pt")
    for what, content in broken_checkpoints(f"{trained}/last.pt", count):
        with open(path, "wb") as f:
            f.write(content)
        try:
            found = m.load(path)
        except UserError as e:
            assert path in str(e) and "\n" not in str(e), (what, e)
            noticed += 1
            continue
        assert str(found["config"]) == str(whole["config"]) and found["step"] == whole["step"], what
        for name, weights in whole["model"].items():
            assert torch.equal(found["model"][name], weights), (what, name)
    return noticed


def test_a_broken_checkpoint_is_noticed(trained, tmp_path):
    assert load_broken(trained, tmp_path, 120) >= 60


def test_a_broken_last_checkpoint_says_how_to_go_on_and_replaces_nothing(tmp_path):
    folder = dataset(tmp_path)
    assert started(folder).returncode == 0
    (tmp_path / "run/last.pt").write_bytes(b"broken")
    best = (tmp_path / "run/best.pt").read_bytes()
    refused(started(folder, "--steps=2"), "last.pt", "--fresh", "best.pt", "--init_from")
    assert (tmp_path / "run/last.pt").read_bytes() == b"broken"
    assert (tmp_path / "run/best.pt").read_bytes() == best
    assert not list(tmp_path.glob("run/*.tmp"))


@pytest.mark.parametrize("content, words", [
    ({"network": "Nothing"}, "Nothing"),
    ({"config": {}}, "model"),
    ({"config": 3}, "checkpoint"),
    ({"model": {}}, "missing"),
    ({"format": 1}, "format 1"),
    ({"format": 99}, "format 99"),
])
def test_a_checkpoint_with_other_content_is_named(trained, tmp_path, content, words):
    path = str(tmp_path / "odd.pt")
    torch.save(m.load(f"{trained}/last.pt") | content, path)
    refused(run("sample.py", f"--ckpt={path}", check=False), path, words)


def test_a_checkpoints_configuration_must_be_of_the_right_types(trained, tmp_path):
    path, content = str(tmp_path / "odd.pt"), m.load(f"{trained}/last.pt")
    for part, name, value in (
            ("model", "enc_dim", "16"), ("model", "enc_layers", -1), ("vocab", "bins", 1.5),
            ("data", "max_objects", None), ("sampling", "top_p", math.nan),
            ("model", "image_size", 5), ("model", "unknown", 5)):
        odd = copy.deepcopy(content)
        odd["config"][part][name] = value
        torch.save(odd, path)
        refused(run("sample.py", f"--ckpt={path}", check=False), path, name)


def test_a_run_goes_on_only_with_the_same_data_classes_and_sizes(tmp_path):
    folder, other = dataset(tmp_path / "a"), dataset(tmp_path / "b")
    assert started(folder).returncode == 0
    out = f"--out={folder}/run"
    refused(started(other, out, "--steps=2"), "data_dir", "--fresh")
    refused(started(folder, out, "--enc_dim=32"), "enc_dim", "16", "32")

    def swap(truth):
        a, b = truth["instances"]["categories"]
        a["name"], b["name"] = b["name"], a["name"]

    refused(started(dataset(tmp_path / "a", swap), out), "classes", "1 cat", "1 dog")


def test_half_a_line_at_the_end_of_the_log_is_mended(tmp_path):
    folder = dataset(tmp_path)
    assert started(folder).returncode == 0
    log = tmp_path / "run/log.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines) + '\n{"step": 2, "lo')
    assert started(folder).returncode == 0
    again = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["step"] for entry in again] == [json.loads(line)["step"] for line in lines]


def test_a_full_disk_leaves_the_last_checkpoint_and_no_rest(tiny_model, tmp_path):
    """Writing fails at every place of the file, as it would on a full disk."""
    from resource import RLIM_INFINITY, RLIMIT_FSIZE, setrlimit

    content = {
        "network": "Pix2Seq", "config": {}, "model": tiny_model.state_dict(), "step": 1, "best": 0}
    path = str(tmp_path / "last.pt")
    m.save(path, content)
    size = os.path.getsize(path)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in range(0, size, size // 20):
            setrlimit(RLIMIT_FSIZE, (limit, RLIM_INFINITY))
            with pytest.raises(OSError, match="File too large|last.pt"):
                m.save(path, {**content, "step": 2})
    finally:
        setrlimit(RLIMIT_FSIZE, (RLIM_INFINITY, RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == ["last.pt"] and m.load(path)["step"] == 1


def test_an_out_that_cannot_be_a_folder_is_said(tmp_path):
    folder = dataset(tmp_path)
    (tmp_path / "file").write_text("")
    for out in (f"{tmp_path}/file", f"{tmp_path}/file/run", "/proc/run"):
        refused(started(folder, f"--out={out}"), out)


def test_a_second_run_in_a_folder_is_refused_with_the_process_of_the_first(tmp_path):
    folder = dataset(tmp_path)
    os.makedirs(tmp_path / "run")
    code = "import sys, time, train; lock = train.locked(sys.argv[1]); print(1, flush=True);"
    other = subprocess.Popen(
        [sys.executable, "-c", code + "time.sleep(60)", f"{tmp_path}/run"], cwd=ROOT,
        env=ENVIRONMENT, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        for option in ("--steps=2", "--fresh"):
            refused(started(folder, option), f"process {other.pid}")
        assert os.listdir(tmp_path / "run") == [".lock"]
    finally:
        other.kill()
        other.wait()
    assert started(folder).returncode == 0             # the lock went with its process


# --------------------------------------------------------------------------------------------------
# command line

OPTIONS = [
    "--steps=-1", "--accumulate=0", "--log_every=0", "--batch_size=0", "--lr=nan", "--lr=0",
    "--dropout=2", "--dropout=1", "--top_p=nan", "--temperature=-1", "--device=gpu",
    "--compile=maybe", "--dtype=fp8", "--patch_size=0", "--beta1=1", "--ema_decay=1.5",
    "--image_size=0", "--image_size=32,x", "--image_size=", "--tasks=", "--tasks=det,det",
    "--tasks=car", "--scale_min=-1", "--optimizer=sgd", "--encoder=vgg", "--flip=maybe",
    "--seed=-1", "--lr=1e999", "--lr=--", "--steps=1.5", "--steps=1e3", "--workers=-2",
    "--eval_every=-5", "--save_every=0", "--weight_decay=nan", "--clip_norm=-1", "--target=2"]


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_out_of_its_range_is_named(tmp_path, option):
    done = run("train.py", f"--out={tmp_path}/run", option, check=False)
    code = done.returncode
    assert code in (1, 2)
    refused(done, option.partition("=")[0].strip("-").partition("=")[0], code=code)
    assert not os.path.exists(tmp_path / "run")


@pytest.mark.parametrize("options, words", [
    (["--patch_size=7", "--image_size=4"], ["image_size", "patch_size"]),
    (["--enc_heads=5"], ["96", "5", "heads"]),
    (["--no_decay=("], ["no_decay"]),
    (["--lr_schedule=cosin"], ["lr_schedule", "cosine[@FRACTION]"]),
    (["--init_from=nothing"], ["nothing"]),
    (["--data=cocoa"], ["cocoa", "shapes, coco"]),
    (["--max_objects=1000"], ["max_seq_len"]),
    (["--batch_size=3", "--accumulate=2"], ["multiple"]),
    (["--vocab_size=10"], ["vocab_size"]),
    (["--bins=1"], ["bins"]),
    (["--pieces=nothing.model", "--tasks=cap"], ["nothing.model"]),
    (["--task_starts=5"], ["task_starts"]),
    (["--task_weights=1,2"], ["task_weights"]),
    (["--enc_dim=100000000000", "--enc_heads=1"], ["memory"]),
    (["gen_shapes", "--inception=nothing.pt"], ["nothing.pt"]),
    (["gen_shapes", "--i3d=nothing.pt"], ["nothing.pt"]),
    (["gen_shapes", "--train_schedule=cosin"], ["cosin"]),
    (["gen_shapes", "--sample_schedule=cosin"], ["cosin"]),
])
def test_what_does_not_go_together_is_said_before_the_first_step(tmp_path, options, words):
    done = run("train.py", *options, f"--out={tmp_path}/run", "--steps=2", check=False)
    refused(done, *words, code=done.returncode)
    assert done.returncode in (1, 2) and not os.path.exists(tmp_path / "run/log.jsonl")


@pytest.mark.parametrize("script, option, words", [
    ("train.py", "--min_score=0.5", "another script or network"),
    ("train.py", "--unet_dim=8", "another script or network"),
    ("train.py", "--bits=uint8", "another script or network"),
    ("train.py", "--guidance=2", "is of gen"),
    ("train.py", "--data_dir=x", "is of files"),
    ("train.py", "--lrr=1", "did you mean '--lr'"),
    ("sample.py", "--lr=1", "another script or network"),
    ("sample.py", "--data_dir=x", "another script or network"),
    ("eval.py", "--explain", "another script or network"),
])
def test_an_option_of_elsewhere_is_said_to_be_so(script, option, words):
    refused(run(script, option, check=False), option.partition("=")[0], words, code=2)


def test_options_of_another_task_are_refused_for_a_checkpoint(trained):
    for script, option in (("sample.py", "--guidance=2"), ("sample.py", "--class=cat"),
                           ("sample.py", "--complete=x.png"), ("eval.py", "--eval_samples=3")):
        done = run(script, f"--ckpt={trained}", option, check=False)
        refused(done, option.partition("=")[0], code=done.returncode)


def try_options(presets, values, capsys):
    """No traceback, whatever it is; what is accepted is of the field's type."""
    for preset in presets:
        c = train.PRESETS[preset].config
        for part in sample.parts_of(c):
            kinds = tokenizer.get_type_hints(type(part), include_extras=True)
            for field in fields(part):
                for value in values:
                    try:
                        found, _ = train.parse([preset, f"--{field.name}={value}"])
                    except SystemExit as stop:
                        message = capsys.readouterr().err
                        assert stop.code == 2 and field.name in message, (field.name, value)
                        continue
                    owner = next(p for p in sample.parts_of(found) if type(p) is type(part))
                    assert tokenizer.fits(getattr(owner, field.name), kinds[field.name])


def test_every_option_refuses_or_understands_every_value(capsys):
    try_options(["multi_shapes", "vps_shapes"], ["", "nan", "-1", "x", "1e999"], capsys)


@pytest.mark.campaign
def test_campaign_of_options(capsys):
    values = ["0", "1,2,3,4,5", "none", "true", "-1e-9", "1.5", "\x00", "9" * 400, "[]", "é", "-"]
    try_options([name for name in train.PRESETS if "shapes" in name], values, capsys)


def test_help_that_nobody_reads_to_its_end_is_quiet():
    for script in ("train.py", "data.py"):
        command = f"{sys.executable} {ROOT}/{script} --help | head -n 1"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=ENVIRONMENT)
        assert done.stderr == "" and done.stdout.count("\n") == 1


def test_watching_ends_quietly_when_it_is_interrupted(trained):
    other = subprocess.Popen(
        [sys.executable, f"{ROOT}/eval.py", f"--ckpt={trained}", "--watch", "--workers=0"],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "numbers:" not in (line := other.stdout.readline()) and line:
        pass
    other.send_signal(signal.SIGINT)
    _, errors = other.communicate(timeout=60)
    assert other.returncode == 130 and "Traceback" not in errors, errors


def test_a_process_that_loads_data_and_dies_is_an_error(tmp_path):
    code = (
        "import os, sys, data; old = data.Coco.__getitem__\n"
        "def die(self, i):\n"
        "    if data.torch.utils.data.get_worker_info(): os._exit(9)\n"
        "    return old(self, i)\n"
        "data.Coco.__getitem__ = die\n"
        "import train; sys.argv = ['train.py', *sys.argv[1:]]; train.main()")
    done = subprocess.run(
        [sys.executable, "-c", code, *TINY, "--data=coco", f"--data_dir={dataset(tmp_path)}",
         f"--out={tmp_path}/run", "--workers=1"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "a process that loads data died" in done.stderr, done.stderr
    # torch may log one of its own, of a profiler that is not there, behind a date.
    assert not re.search("^Traceback", done.stderr, re.M), done.stderr


def test_data_is_read_by_workers_that_are_spawned(tmp_path):
    """As on Windows and macOS, where nothing is inherited; in a folder with spaces and accents."""
    folder = dataset(tmp_path / "ä folder")
    c = sample.changed(train.Config(), data="coco", data_dir=folder)
    c = sample.changed(c, image_size=(32, 32), max_objects=3)
    source = data.make_source(c, "train")
    streams = data.Streams({"det": data.TrainStream(source, "det", c, 0)})
    loader = torch.utils.data.DataLoader(
        streams, batch_sampler=[[("det", 0), ("det", 1)]], num_workers=1,
        collate_fn=data.partial(data.collate_parts, c), worker_init_fn=data.ignore_interrupts,
        multiprocessing_context=multiprocessing.get_context("spawn"))
    [(task, batch)] = list(loader)
    _, same = data.collate_parts(c, [streams["det", 0], streams["det", 1]])
    assert task == "det" and torch.equal(batch.inputs, same.inputs)


def test_nothing_of_posix_alone_is_imported():
    code = (
        "import sys\n"
        "for name in ('resource', 'fcntl', 'pwd', 'grp'): sys.modules[name] = None\n"
        "import tokenizer, data, diffusion, model, sample, eval, train\n"
        "assert model.Device('cpu').memory_gb() == 0")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, check=True)


# --------------------------------------------------------------------------------------------------
# campaigns: members of the kinds above, at random

JUNK = (
    None, "", "x", "1", -1, 0, 1, 2.5, NAN, math.inf, -math.inf, 1e30, 10 ** 30, [], [1], [[]],
    [None], {}, {"a": 1}, True, False, "nan", [0, 0, 0, 0], [1, 2, 3], [[1, 2], [3, 4]], "\ud800",
    {"size": [40, 48], "counts": [1920]}, {"size": [40, 48], "counts": "abc"}, "../../x", "a" * 999)


def places(tree, path=()):
    """Yields the path of every value in lists and dicts."""
    for key, value in (tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def mutate(tree, rng):
    """Changes a tree of JSON at one place; returns what was done."""
    *path, last = rng.choice(list(places(tree)))
    inner = tree
    for key in path:
        inner = inner[key]
    kind = rng.choice(["junk", "junk", "junk", "drop", "twice", "swap"])
    if kind == "junk":
        inner[last] = copy.deepcopy(rng.choice(JUNK))
    elif kind == "drop":
        del inner[last]
    elif kind == "twice" and isinstance(inner, list):
        inner.append(copy.deepcopy(inner[last]))
    else:
        other = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner[last], inner[other] = inner[other], inner[last]
    return f"{kind} at {[*path, last]}"


def use_coco(path, images, task):
    """All that training and evaluation do with a source."""
    c = sample.changed(train.PRESETS["multi_shapes"].config, tasks=(task,))
    c = sample.changed(c, image_size=(32, 32))
    source = data.Coco(path, images, task=task, max_label=c.vocab.max_label)
    c = replace(c, categories=tuple(source.categories))
    source.summary(c)
    if source.count(task):
        stream = data.TrainStream(source, task, c, seed=0)
        batch = data.collate(task, c)([stream[p] for p in range(3)])
        assert torch.isfinite(batch.weights).all()
    records = {source[i]["image_id"]: source[i] for i in range(len(source))}
    inputs = sample.Inputs(list(records.values()), c)
    found = dict(zip(records, sample.predict(Nothing(), inputs, c, (task,), eval.TRUTH)))
    return eval.SCORE[task](found, source, c, None)


class Nothing(torch.nn.Module):
    """A model that is not asked."""


def use_maps(path, folder):
    """The same with panoptic masks."""
    c = train.PRESETS["pan_shapes"].config
    c = sample.changed(c, image_size=(32, 32), sample_size=(16, 16))
    source = data.coco_maps(path, folder, folder)
    c = replace(c, categories=tuple(source.categories))
    source.summary(c)
    stream = data.TrainStream(source, "pan", c, seed=0)
    data.collate("pan", c)([stream[p] for p in range(3)])
    inputs = sample.Inputs([source[i] for i in range(len(source))], c)
    found = dict(enumerate(sample.predict(Nothing(), inputs, c, ("pan",), eval.TRUTH)))
    return eval.SCORE["pan"](found, source, c, None)


KINDS = ["det", "seg", "kpt", "cap", "pan", "results"]


def fuzz(tmp_path, kind, count, seed):
    """Mutations of a JSON file: each is refused by name, or everything works with it. Returns how
    many work."""
    folder, rng, taken = dataset(tmp_path), random.Random(f"{kind} {seed}"), 0
    odd = f"{folder}/odd.json"
    path = f"{folder}/annotations/{'captions' if kind == 'cap' else 'instances'}_train2017.json"
    if kind == "pan":
        coco_files(tmp_path)
        path = f"{folder}/pan.json"
    with open(path) as f:
        whole = json.load(f)
    use = {"pan": lambda: use_maps(odd, folder)}.get(
        kind, lambda: use_coco(odd, f"{folder}/train2017", kind))
    if kind == "results":
        whole = [{**RESULT, "image_id": i} for i in (1, 2, 3)]
        source = data.Coco(path, f"{folder}/train2017")
        c = replace(train.Config(), categories=tuple(source.categories))
        use = lambda: eval.read_boxes(odd, source, c)
    for _ in range(count):
        truth = copy.deepcopy(whole)
        what = [mutate(truth, rng) for _ in range(rng.choice([1, 1, 2]))]
        with open(odd, "w") as f:
            json.dump(truth, f)
        try:
            use()
            taken += 1
        except UserError as e:
            assert folder in str(e) or "nothing to learn" in str(e), (what, e)
            assert str(e).count("\n") <= 1, (what, e)
        except Exception as e:
            raise AssertionError(f"{what}: {type(e).__name__}: {e}") from e
    return taken


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_is_refused_by_name_or_works(tmp_path, kind):
    assert 0 < fuzz(tmp_path, kind, 50, 0) < 50


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS)
def test_campaign_of_mutated_files(tmp_path, kind):
    taken = fuzz(tmp_path, kind, 2000, 1)
    print(f"{kind}: 2000 mutations, {taken} of them work")


@pytest.mark.campaign
def test_campaign_of_broken_checkpoints(trained, tmp_path):
    print(f"{load_broken(trained, tmp_path, 1000)} of 1000 broken checkpoints noticed")


@pytest.mark.campaign
def test_campaign_of_kills(tmp_path):
    """A run of two processes, killed at 24 random moments, ends as one that was not."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
        f"{ROOT}/train.py", *TINY, "--steps=300", "--save_every=3", "--eval_every=60",
        "--pictures=0", "--dropout=0.1", "--val_count=8"]

    def start(out):
        return subprocess.Popen(
            [*command, f"--out={tmp_path}/{out}"], env=ENVIRONMENT, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("whole").wait(600) == 0
    rng, kills = random.Random(0), 0
    while kills < 24:
        step = m.load(f"{tmp_path}/run/last.pt")["step"] if kills and os.path.exists(
            tmp_path / "run/last.pt") else 0
        process, until = start("run"), time.time() + 60
        while time.time() < until:                     # until it has saved something new
            time.sleep(0.05)
            try:
                if m.load(f"{tmp_path}/run/last.pt")["step"] > step:
                    break
            except UserError:
                pass
        time.sleep(rng.random() * 0.3)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        print(f"kill {kills}: after step {step}, {os.listdir(tmp_path / 'run')}")
        assert not os.path.exists(tmp_path / "run/last.pt") or m.load(f"{tmp_path}/run/last.pt")
    assert start("run").wait(600) == 0
    ours, theirs = (m.load(f"{tmp_path}/{out}/last.pt") for out in ("run", "whole"))
    for name, weights in theirs["model"].items():
        assert torch.equal(ours["model"][name], weights), name
    assert step < 300, "it had ended before the last kill"
    assert ours["step"] == theirs["step"] == 300 and ours["best"] == theirs["best"]
