"""Images and labels: where they come from, how they are augmented, how they become batches of tokens.

Two sources give the same record (see `Shapes.__getitem__`): *shapes*, an endless world of drawn scenes that needs no
download, and *coco*, any dataset in COCO's format. Augmentation follows Pix2Seq (arXiv 2109.10852, section 2.4 and
appendix B; 2206.07669 for instances and captions). Generation has smaller records (see `ShapeClips.__getitem__`), of
*shapes*, one thing at rest or in motion, *mnist*, *cifar10*, and *images* and *videos*, folders of the user's.
A training stream is a pure function of (seed, position), so any number of workers, processes or restarts sees the same
examples. Only uint8 pixels leave a worker; they become floats on the device.
Left out: downloads, every path is the user's; video files, a video is a folder of its frames; random crops in generation.

    python data.py --sheet shapes.png                   # a look at the drawn world
    python data.py --clips shapes.gif                   # and at what moves in it
    python data.py --export DIR --count 1000            # write it as a COCO dataset, then: train.py --data=coco --data_dir=DIR
"""
import argparse
import codecs
import gzip
import io
import itertools
import json
import math
import os
import pickle
import signal
import warnings
import zlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from tokenizer import (CLASS_SHIFT, FAKE_LABEL, INVISIBLE_POINT, PAD_LABEL, PAD_POINT, PROMPT_KPT, PROMPT_SEG, SEPARATOR_POINT,
                       encode_captions, encode_detection, encode_instances)

PAD_VALUE = 0.3                                        # grey level of the padding, as in the reference


class DataError(ValueError):
    """Something is wrong with the user's data; the message names the file and what was expected."""


# ---------------------------------------------------------------------------------------------------------------
# shapes: an embedded world of drawn scenes

KINDS = ("circle", "square", "triangle", "figure")     # categories 1..4
COLORS = {"red": (220, 50, 40), "green": (50, 170, 70), "blue": (50, 90, 220), "yellow": (235, 205, 50),
          "purple": (150, 60, 180), "white": (240, 240, 240)}
JOINTS = ("head", "left_hand", "right_hand", "left_foot", "right_foot")      # of a figure; left is the viewer's left
SKELETON = ((1, 2), (1, 3), (1, 4), (1, 5))           # lines between joints, counted from 1 as in COCO
SPLITS = {"train": 0, "val": 1}
JSON_KINDS = {"det": "instances", "seg": "instances", "kpt": "person_keypoints", "cap": "captions"}   # COCO's file for each task


@dataclass
class Thing:
    """One drawn object. Lengths are fractions of the image's side."""
    kind: str
    color: str
    y: float                                           # centre
    x: float
    radius: float                                      # half its height
    pose: np.ndarray                                   # (4, 2) in [0, 1]: what differs between figures

    @cached_property
    def joints(self):
        """(5, 2) yx fractions of a figure's joints, in the order of JOINTS."""
        reach, height = 0.55 + 0.45 * self.pose[:, 0], self.pose[:, 1]
        hands = [(-0.75 + 1.1 * height[0], -reach[0]), (-0.75 + 1.1 * height[1], reach[1])]
        feet = [(1.0, -0.2 - 0.7 * height[2]), (1.0, 0.2 + 0.7 * height[3])]
        return np.array([(-0.7, 0.0), *hands, *feet]) * self.radius + (self.y, self.x)

    @cached_property
    def polygons(self):
        """Its outlines, a list of (P, 2) arrays of yx fractions: one polygon, or head and body of a figure."""
        if self.kind == "figure":
            _, left_hand, right_hand, left_foot, right_foot = self.joints
            at = lambda y, x: np.array([self.y + y * self.radius, self.x + x * self.radius])
            body = [at(-0.55, 0), left_hand, at(0.1, -0.3), left_foot, at(0.35, 0), right_foot, at(0.1, 0.3), right_hand]
            turn = np.arange(12) / 12 * 2 * np.pi
            head = np.stack([-0.7 + 0.3 * np.cos(turn), 0.3 * np.sin(turn)], -1)
            return [head * self.radius + (self.y, self.x), np.array(body)]
        if self.kind == "circle":
            turn = np.arange(20) / 20 * 2 * np.pi
            outline = np.stack([np.cos(turn), np.sin(turn)], -1)
        elif self.kind == "square":
            outline = np.array([(-0.9, -0.9), (-0.9, 0.9), (0.9, 0.9), (0.9, -0.9)])
        else:
            outline = np.array([(-1, 0), (1, 1), (1, -1)])
        return [outline * self.radius + (self.y, self.x)]

    def square(self):
        """The square around its circle, yxyx fractions, in which it lies."""
        return self.y - self.radius, self.x - self.radius, self.y + self.radius, self.x + self.radius


def random_thing(rng, kind, color, smallest, largest):
    """A thing whose radius is in this range, fully inside the image."""
    radius = rng.uniform(smallest, largest)
    y, x = rng.uniform(radius + 0.01, 0.99 - radius, 2)
    return Thing(kind, color, y, x, radius, rng.random((4, 2)))


def random_scene(rng, max_things):
    """1 to max_things things, fully inside the image, the squares around no two of which overlap by more than a tenth (IoU)."""
    things = []
    for _ in range(rng.integers(1, max_things + 1)):
        kind, color = KINDS[rng.integers(len(KINDS))], list(COLORS)[rng.integers(len(COLORS))]
        for _ in range(10):
            thing = random_thing(rng, kind, color, 0.14, 0.26)
            if all(box_iou(thing.square(), other.square()) < 0.1 for other in things):
                things.append(thing)
                break
    return things


def box_iou(a, b):
    """Intersection over union of two yxyx boxes."""
    both = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def random_background(rng, size):
    """PIL image of dull colours: a gradient or a blotchy texture."""
    cells, contrast = (2, 16) if rng.random() < 0.5 else (6, 8)
    corners = rng.integers(40, 130) + rng.integers(-contrast, contrast + 1, (cells, cells, 3))
    return Image.fromarray(corners.astype(np.uint8)).resize((size, size), Image.BILINEAR)


def draw_scene(things, background):
    """Things drawn over a square background in their order, four times as large and then averaged (antialiased)."""
    side = 4 * background.width
    canvas = background.resize((side, side), Image.NEAREST)
    pen = ImageDraw.Draw(canvas)
    for thing in things:
        for polygon in thing.polygons:
            pen.polygon((polygon[:, ::-1] * side).ravel().tolist(), fill=COLORS[thing.color])
    return canvas.reduce(4)


def describe(things):
    """Every sentence about two things, "a red circle above a blue square", its inverse included; their name if there is only one.
    A direction counts if they are at least half as far apart in it as in the other."""
    name = lambda thing: f"a {thing.color} {thing.kind}"
    if len(things) == 1:
        return [name(things[0])]
    sentences = set()
    for a, b in itertools.permutations(things, 2):
        y, x = b.y - a.y, b.x - a.x
        if abs(y) >= abs(x) / 2:
            sentences.add(f"{name(a)} {'above' if y > 0 else 'below'} {name(b)}")
        if abs(x) >= abs(y) / 2:
            sentences.add(f"{name(a)} {'left' if x > 0 else 'right'} of {name(b)}")
    return sorted(sentences)


def check_split(split):
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")


def drawn_count(split, count):
    """How many drawn items a split has, if not `count`: so many for training that none is seen twice."""
    check_split(split)
    return count or (1 << 40 if split == "train" else 500)


class Shapes:
    """Drawn scenes with COCO-style truth. Item i of a split is a pure function of (seed, split, i)."""
    endless = True                                     # items need no shuffling: any run of them is a fresh sample

    def __init__(self, split, size=64, max_things=4, seed=0, count=None):
        self.split, self.size, self.max_things, self.seed = split, size, max_things, seed
        self.count, self.drawn = drawn_count(split, count), {}
        self.categories = [{"id": i + 1, "name": kind} for i, kind in enumerate(KINDS)]
        self.categories[KINDS.index("figure")] |= {"keypoints": list(JOINTS), "skeleton": SKELETON}
        self.label_of = {c["id"]: c["id"] for c in self.categories}

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        """Record i, a dict. N objects; pixel coordinates are floats, (y, x) order, of the image as it is.
        image: PIL RGB            image_id: int              labels: (N,) int64, the label that has a class token
        boxes: (N, 4) float32 yxyx   iscrowd: (N,) bool      polygons: a list of (P, 2) arrays an object
        keypoints: (N, K, 3) float32, y x visibility (0, 1 or 2)          captions: list of str
        """
        if i not in self.drawn:
            if len(self.drawn) >= 512:                 # tasks that share a source ask for the same scenes
                self.drawn.clear()
            rng = np.random.default_rng([self.seed, SPLITS[self.split], i])
            self.drawn[i] = self.record(random_scene(rng, self.max_things), rng, i)
        return self.drawn[i]

    def record(self, things, rng, i):
        polygons = [[np.round(p * self.size, 2) for p in thing.polygons] for thing in things]
        extent = [np.concatenate(p) for p in polygons]
        keypoints = np.zeros((len(things), len(JOINTS), 3), np.float32)
        for row, thing in zip(keypoints, things):
            if thing.kind == "figure":
                row[:, :2], row[:, 2] = np.round(thing.joints * self.size, 2), 2
        return {
            "image": draw_scene(things, random_background(rng, self.size)), "image_id": i + 1,
            "labels": np.array([KINDS.index(t.kind) + 1 for t in things], np.int64),
            "boxes": np.array([np.concatenate([e.min(0), e.max(0)]) for e in extent], np.float32),
            "iscrowd": np.zeros(len(things), bool), "polygons": polygons, "keypoints": keypoints, "captions": describe(things),
        }

    @property
    def people(self):
        """How many training examples of keypoints there are."""
        return self.count

    def person(self, i):
        """A record that has a figure, and which of its objects that is."""
        rng, figures = np.random.default_rng([self.seed, SPLITS[self.split], i, 1]), []
        while not figures:
            things = random_scene(rng, self.max_things)
            figures = [n for n, thing in enumerate(things) if thing.kind == "figure"]
        return self.record(things, rng, i), figures[0]

    def truth(self, task="det"):
        """The whole split as a dict in COCO's format, of which pycocotools makes an index."""
        images, annotations = [], []
        for i in range(len(self)):
            record = self[i]
            image_id = record["image_id"]
            images.append({"id": image_id, "file_name": f"{image_id:012d}.png", "height": self.size, "width": self.size})
            if task == "cap":
                annotations += [{"image_id": image_id, "caption": caption} for caption in record["captions"]]
                continue
            for (y0, x0, y1, x1), label, polygons, joints in zip(record["boxes"].astype(np.float64).round(2), record["labels"],
                                                                 record["polygons"], record["keypoints"].astype(np.float64).round(2)):
                found = {"image_id": image_id, "iscrowd": 0, "category_id": int(label), "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
                         "area": sum(polygon_area(p) for p in polygons), "segmentation": [p[:, ::-1].ravel().tolist() for p in polygons]}
                if KINDS[label - 1] == "figure":
                    found |= {"keypoints": joints[:, [1, 0, 2]].ravel().tolist(), "num_keypoints": len(JOINTS)}
                if task != "kpt" or "keypoints" in found:
                    annotations.append(found)
        for n, annotation in enumerate(annotations):
            annotation["id"] = n + 1
        categories = [c for c in self.categories if task != "kpt" or "keypoints" in c]
        return {"images": images, "annotations": annotations, "categories": categories}


class ShapeClips:
    """One drawn thing on a plain ground, at rest in an image or moving through a clip. Item i of a split is a pure function of
    (seed, split, i)."""
    endless, classes = True, list(KINDS)

    def __init__(self, split, size=32, frames=1, seed=0, count=None):
        self.split, self.size, self.frames, self.seed, self.count = split, size, frames, seed, drawn_count(split, count)

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        """Record i for generation, a dict, as every source for it gives:
        pixels: uint8 (H, W, C), of a clip (T, H, W, C), C is 1 or 3          label: int, index in the source's classes; -1 unknown
        """
        rng = np.random.default_rng([self.seed, SPLITS[self.split], i, 2])       # 2: not the scenes of Shapes
        label, color = int(rng.integers(len(KINDS))), list(COLORS)[rng.integers(len(COLORS))]
        thing = random_thing(rng, KINDS[label], color, 0.22, 0.36)
        background = Image.new("RGB", (self.size, self.size), tuple(rng.integers(40, 130, 3).tolist()))
        turn, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.08)
        path = (thing.y, thing.x) + speed * np.arange(self.frames)[:, None] * (np.sin(turn), np.cos(turn))
        low, room = thing.radius + 0.01, 0.98 - 2 * thing.radius                # a straight line, folded at both ends of the room
        path = low + room - np.abs((path - low) % (2 * room) - room)            # (T, 2) yx
        pixels = np.stack([np.asarray(draw_scene([replace(thing, y=y, x=x)], background)) for y, x in path])
        return {"pixels": pixels if self.frames > 1 else pixels[0], "label": label}


def polygon_area(points):
    """Area inside a polygon (P, 2), by the shoelace formula."""
    (y, x), (next_y, next_x) = points.T, points[np.arange(len(points)) - 1].T
    return 0.5 * abs(x @ next_y - y @ next_x)


def export_shapes(folder, count, size, seed, image_format):
    """Write `count` training scenes and 500 held-out ones in COCO's layout."""
    for split in SPLITS:
        source = Shapes(split, size, seed=seed, count=count if split == "train" else min(count, 500))
        os.makedirs(f"{folder}/{split}2017", exist_ok=True)
        os.makedirs(f"{folder}/annotations", exist_ok=True)
        for task, kind in JSON_KINDS.items():
            truth = source.truth(task)
            for image in truth["images"]:
                image["file_name"] = image["file_name"].replace(".png", f".{image_format}")
            with open(f"{folder}/annotations/{kind}_{split}2017.json", "w") as f:
                json.dump(truth, f)
        for i, image in enumerate(truth["images"]):
            source[i]["image"].save(f"{folder}/{split}2017/{image['file_name']}", quality=95)


# ---------------------------------------------------------------------------------------------------------------
# coco: images and JSON files of the user's

def load_image(path, size=None):
    """Any image file -> PIL RGB. size: (height, width) that its labels are for; a photo that is stored turned is turned
    upright unless only the stored form fits it. DataError, naming the file, if it cannot be read or fits neither way."""
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if size is not None and (upright.height, upright.width) != tuple(size):
                upright = image
            if size is not None and (upright.height, upright.width) != tuple(size):
                raise DataError(f"{path}: the image is {image.height}x{image.width}, its labels are for {size[0]}x{size[1]}")
            if upright.mode.startswith(("I", "F")):    # 16 bits and more; convert() would clip, not scale
                pixels = np.asarray(upright).astype(np.float64)
                top = 1 if upright.mode == "F" and pixels.max() <= 1 else 65535 if pixels.max() > 255 else 255
                upright = Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8))
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return upright.convert("RGB")
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as e:
        raise DataError(f"{path}: not a readable image ({e})") from e


class Coco:
    """A dataset in COCO's format: one JSON file and the folder of its images. Records as of `Shapes`.

    Everything but the pixels is checked here; DataError names each kind of problem, with a few examples and their number.
    bad_boxes: what to do about boxes of zero size or more than a pixel outside their image: "error" or "drop".
    Category ids in [1, 900) are the labels, as in the reference; others get the free labels from 1 on.
    """
    endless = False

    def __init__(self, json_path, image_dir, max_label=899, bad_boxes="error"):
        if bad_boxes not in ("error", "drop"):
            raise DataError(f"bad_boxes is {bad_boxes!r}, expected 'error' or 'drop'")
        self.json_path, self.image_dir = json_path, image_dir
        try:
            with open(json_path) as f:
                truth = json.load(f)
        except FileNotFoundError:
            raise DataError(f"{json_path}: no such file, expected annotations in COCO's JSON format") from None
        except json.JSONDecodeError as e:
            raise DataError(f"{json_path}: not JSON ({e})") from e
        for key in ("images", "annotations"):
            if not isinstance(truth, dict) or not isinstance(truth.get(key), list):
                raise DataError(f"{json_path}: expected an object with a list {key!r}, as in COCO's format")
        truth.setdefault("categories", [])             # captions have none
        if not os.path.isdir(image_dir):
            raise DataError(f"{image_dir}: no such folder, expected the images of {json_path}")
        self.images, self.annotations, self.categories, self.kept = truth["images"], {}, truth["categories"], {}
        self._check(truth, bad_boxes)
        self.label_of = assign_labels([c["id"] for c in self.categories], max_label, json_path)

    def _check(self, truth, bad_boxes):
        problems = []

        def report(what, names):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                problems.append(f"{len(names)} {what}: {', '.join(map(str, names[:5]))}{more}")

        report("images lack one of id, file_name, height, width",
               [image for image in self.images if not {"id", "file_name", "height", "width"} <= image.keys()])
        report("annotations lack image_id", [a for a in truth["annotations"] if "image_id" not in a])
        if not problems:
            sizes = {image["id"]: (image["height"], image["width"]) for image in self.images}
            known = {c["id"] for c in self.categories}
            report("image ids appear twice", twice([image["id"] for image in self.images]))
            report("category ids appear twice", twice([c["id"] for c in self.categories]))
            report("annotation ids appear twice", twice([a["id"] for a in truth["annotations"] if "id" in a]))
            report(f"images are not in {self.image_dir}", missing_files(self.image_dir, [i["file_name"] for i in self.images]))
            stray = [a for a in truth["annotations"] if a["image_id"] not in sizes]
            report("annotations are of an image_id that no image has", [f"{a['image_id']} ({label(a)})" for a in stray])
            boxed = [a for a in truth["annotations"] if "caption" not in a and a["image_id"] in sizes]
            report("annotations have a category_id that no category has",
                   [f"{a.get('category_id')} ({label(a)})" for a in boxed if a.get("category_id") not in known])
            unboxed = [a for a in boxed if len(a.get("bbox", ())) != 4]
            report("annotations have no bbox of four numbers", [label(a) for a in unboxed])
        if not problems and boxed:
            x, y, w, h = np.array([a["bbox"] for a in boxed], float).T
            height, width = np.array([sizes[a["image_id"]] for a in boxed]).T
            bad = (w <= 0) | (h <= 0) | (x < -1) | (y < -1) | (x + w > width + 1) | (y + h > height + 1) | ~np.isfinite(x + y + w + h)
            names = [f"{label(boxed[i])} {boxed[i]['bbox']} in {width[i]}x{height[i]}" for i in np.flatnonzero(bad)]
            if bad_boxes == "error":
                report("boxes are empty or outside their image (--bad_boxes=drop leaves them out)", names)
            elif names:
                warnings.warn(f"{self.json_path}: left out {len(names)} boxes, empty or outside their image, such as {names[0]}")
                dropped = {id(boxed[i]) for i in np.flatnonzero(bad)}
                truth["annotations"] = [a for a in truth["annotations"] if id(a) not in dropped]
        if problems:
            raise DataError("\n  ".join([f"{self.json_path}:"] + problems))
        for a in truth["annotations"]:
            self.annotations.setdefault(a["image_id"], []).append(a)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        found = self.annotations.get(image["id"], [])
        boxed = [a for a in found if "bbox" in a]
        x, y, w, h = np.array([a["bbox"] for a in boxed], np.float32).reshape(-1, 4).T
        limit = np.array([image["height"], image["width"]] * 2, np.float32)
        joints = max([len(a.get("keypoints", ())) // 3 for a in boxed], default=0)
        keypoints = np.array([a.get("keypoints") or [0] * 3 * joints for a in boxed], np.float32).reshape(len(boxed), joints, 3)
        pixels = self.kept.get(i)
        if pixels is None:
            pixels = load_image(os.path.join(self.image_dir, image["file_name"]), (image["height"], image["width"]))
            if len(self.images) <= 200:                # a set this small is decoded once
                self.kept[i] = pixels
        return {
            "image": pixels, "image_id": image["id"],
            "labels": np.array([self.label_of[a["category_id"]] for a in boxed], np.int64),
            "boxes": np.stack([y, x, y + h, x + w], -1).clip(0, limit),
            "iscrowd": np.array([bool(a.get("iscrowd", 0)) for a in boxed], bool),
            "polygons": [polygons_of(a) for a in boxed],
            "keypoints": keypoints[..., [1, 0, 2]],
            "captions": [a["caption"].strip() for a in found if "caption" in a],
        }

    @cached_property
    def units(self):
        """(image, object) numbers of everybody who has a labelled joint and is no crowd."""
        return [(i, n) for i, image in enumerate(self.images)
                for n, a in enumerate(a for a in self.annotations.get(image["id"], []) if "bbox" in a)
                if any(a.get("keypoints", [])[2::3]) and not a.get("iscrowd", 0)]

    @property
    def people(self):
        return len(self.units)

    def person(self, i):
        image, n = self.units[i]
        return self[image], n

    def truth(self, task="det"):
        """The dataset as a dict in COCO's format, without what was left out. Every task has its own file."""
        found = [dict(a, id=n + 1) for n, a in enumerate(a for image in self.images for a in self.annotations.get(image["id"], []))]
        for a in found:
            if "bbox" in a:                            # pycocotools needs both
                a.update(iscrowd=a.get("iscrowd", 0), area=a.get("area", a["bbox"][2] * a["bbox"][3]))
        return {"images": self.images, "annotations": found, "categories": self.categories}


def polygons_of(annotation):
    """An annotation's outlines, a list of (P, 2) yx arrays; none if it is a run-length mask, as crowds are."""
    parts = annotation.get("segmentation", [])
    return [np.array(p, np.float32).reshape(-1, 2)[:, ::-1] for p in parts if len(p) >= 6] if isinstance(parts, list) else []


def label(annotation):
    return f"annotation {annotation.get('id', '?')}"


def twice(ids):
    seen = set()
    return [i for i in ids if i in seen or seen.add(i)]


def missing_files(folder, names):
    """Those of `names` (paths relative to the folder) that it lacks; lists each folder once, not each file."""
    listed = {}
    for sub in {os.path.dirname(name) for name in names}:
        path = os.path.join(folder, sub)
        listed[sub] = set(os.listdir(path)) if os.path.isdir(path) else set()
    return [name for name in names if os.path.basename(name) not in listed[os.path.dirname(name)]]


def assign_labels(ids, max_label, where):
    """{category id: label in 1..max_label}: ids that can be labels stay, others take the free labels from 1 on."""
    if len(ids) > max_label:
        raise DataError(f"{where}: {len(ids)} categories, but the vocabulary has room for {max_label} (raise coord_shift)")
    kept = {i: i for i in ids if isinstance(i, int) and 1 <= i <= max_label}
    free = (n for n in range(1, max_label + 1) if n not in kept)
    return {i: kept[i] if i in kept else next(free) for i in ids}


# ---------------------------------------------------------------------------------------------------------------
# images and clips to generate: files of the user's

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_KINDS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
LAYOUTS = {                                            # what the user puts into data_dir
    "mnist": "MNIST's files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte, maybe .gz",
    "cifar10": "the CIFAR-10 binary version (data_batch_1.bin to data_batch_5.bin and test_batch.bin) or python version (the same without .bin)",
    "images": f"images ({' '.join(IMAGE_KINDS)}), or a folder of them for each class; either may be divided into train/ and val/",
    "videos": "a folder of frames (image files) for each video, maybe in a folder for each class; either may be divided into train/ and val/",
}


class PixelArrays:
    """Images in memory: pixels (N, H, W, C) uint8, labels (N,). Records as of `ShapeClips`. DataError, naming `where`, if they do not fit."""
    endless = False

    def __init__(self, pixels, labels, classes, where="images in memory"):
        if len(pixels) != len(labels):
            raise DataError(f"{where}: {len(pixels)} images, but {len(labels)} labels")
        if len(labels) and not -1 <= min(labels) <= max(labels) < len(classes):
            raise DataError(f"{where}: labels from {min(labels)} to {max(labels)}, expected less than {len(classes)}")
        self.pixels, self.labels, self.classes = pixels, labels, list(classes)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return {"pixels": self.pixels[i], "label": int(self.labels[i])}


def held_out(count, split, every):
    """Which of `count` things are a split's: every `every`-th is held out, beginning with the first, but never the only one."""
    is_val = (np.arange(count) % every == 0) & (count > 1)
    return np.flatnonzero(is_val == (split == "val"))


def read_bytes(path):
    """What a file holds, unpacked if it is a .gz. DataError, naming it, if it cannot be read."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
            return f.read()
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: cannot be read ({e})") from e


def load_mnist(folder, split):
    """MNIST, or data in its format -> PixelArrays of (28, 28, 1). val is the t10k part; if no other is there, every tenth image of it
    is val and the others are train. DataError names the file and what was expected."""
    check_split(split)
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    paths = {part: [find_file(folder, f"{part}-{kind}", f"{part}-{kind.replace('-idx', '.idx')}") for kind in kinds] for part in ("train", "t10k")}
    shared = not any(paths["train"])
    images, labels = paths["t10k" if shared or split == "val" else "train"]
    if not (images and labels):
        raise DataError(f"{folder}: no images or no labels for {split}, expected {LAYOUTS['mnist']}")
    source = PixelArrays(read_idx(images, 3)[..., None], read_idx(labels, 1), "0123456789", f"{images}, {labels}")
    rows = held_out(len(source), split, 10) if shared else slice(None)
    return PixelArrays(source.pixels[rows], source.labels[rows], source.classes)


def find_file(folder, *names):
    """The path of the first of these names that is there, maybe with .gz, or None."""
    paths = [os.path.join(folder, name + ending) for name in names for ending in ("", ".gz")]
    return next(filter(os.path.isfile, paths), None)


def read_idx(path, dims):
    """An idx file of bytes -> uint8 array of `dims` dimensions."""
    content, magic = read_bytes(path), bytes([0, 0, 8, dims])
    if content[:4] != magic:
        raise DataError(f"{path}: begins with {content[:4].hex()}, expected {magic.hex()}, an idx file of bytes in {dims} dimensions")
    shape = [int.from_bytes(content[at:at + 4], "big") for at in range(4, 4 + 4 * dims, 4)]
    if len(content) != (expected := 4 + 4 * dims + math.prod(shape)):
        raise DataError(f"{path}: {len(content)} bytes, expected {expected} for {' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def load_cifar10(folder, split):
    """CIFAR-10 -> PixelArrays of (32, 32, 3): the binary or the python version, in the folder or in the one of its archive in there.
    DataError names the file and what was expected."""
    check_split(split)
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    for place in (folder, os.path.join(folder, "cifar-10-batches-bin"), os.path.join(folder, "cifar-10-batches-py")):
        for ending, read in ((".bin", read_cifar_binary), ("", read_cifar_pickle)):
            paths = [os.path.join(place, name + ending) for name in names]
            if any(map(os.path.exists, paths)):
                parts = [PixelArrays(*read(path), CIFAR10_CLASSES, path) for path in paths]
                pixels, labels = np.concatenate([p.pixels for p in parts]), np.concatenate([p.labels for p in parts])
                return PixelArrays(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels, CIFAR10_CLASSES)
    raise DataError(f"{folder}: no {names[0]}.bin or {names[0]}, expected {LAYOUTS['cifar10']}")


def read_cifar_binary(path):
    """-> (N, 3072) uint8, red before green before blue, and labels (N,)."""
    content = np.frombuffer(read_bytes(path), np.uint8)
    if not len(content) or len(content) % 3073:
        raise DataError(f"{path}: {len(content)} bytes, expected 3073 for each image, as in the CIFAR-10 binary version")
    rows = content.reshape(-1, 3073)
    return rows[:, 1:], rows[:, 0]


def read_cifar_pickle(path):
    """As `read_cifar_binary`."""
    content = read_bytes(path)
    try:
        batch = ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()      # Python 2 wrote the original
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        pixels, labels = batch["data"], np.asarray(batch["labels"])
        fits = pixels.dtype == np.uint8 and pixels.shape[1:] == (3072,) and labels.dtype.kind in "iu" and labels.shape == pixels.shape[:1]
    except Exception as e:                             # a broken pickle can raise anything
        raise DataError(f"{path}: not a batch of the CIFAR-10 python version ({type(e).__name__}: {e})") from e
    if not fits:
        raise DataError(f"{path}: data {pixels.shape} {pixels.dtype} and labels {labels.shape} {labels.dtype}, expected (N, 3072) uint8 and (N,) integers")
    return pixels, labels


class ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain values alone: a pickle may name any function, which loading it would run."""
    arrays = {"ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.uint8(0).__reduce__()[0]}

    def find_class(self, module, name):
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in self.arrays:
            return self.arrays[name]
        if (module, name) == ("_codecs", "encode"):    # how Python 3 writes bytes in protocol 2
            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is neither an array nor a plain value")


def listing(folder):
    """Names of the subfolders and of the image files in a folder, both sorted. Hidden ones are left out."""
    entries = sorted((e.name, e.is_dir()) for e in os.scandir(folder) if not e.name.startswith("."))
    return [name for name, is_dir in entries if is_dir], [name for name, is_dir in entries if not is_dir and name.lower().endswith(IMAGE_KINDS)]


def split_folder(folder, split, layout):
    """Where a split lies, and whether the other one is in there too: folder/train and folder/val, or both in the folder itself."""
    check_split(split)
    own = [s for s in SPLITS if os.path.isdir(os.path.join(folder, s))]
    if not os.path.isdir(folder) or own and split not in own:
        raise DataError(f"{os.path.join(folder, split) if own else folder}: no such folder, expected {layout}")
    return (os.path.join(folder, split), False) if own else (folder, True)


def class_names(folder, names):
    """Classes of which `names` are a split's: those of folder/train if there is one, so that labels are the same in both splits."""
    train = os.path.join(folder, "train")
    classes = listing(train)[0] if names and os.path.isdir(train) else names
    if stray := [name for name in names if name not in classes]:
        raise DataError(f"{os.path.join(folder, 'val', stray[0])}: a class that is not in {train}, which has {', '.join(classes[:5]) or 'none'}")
    return classes


def fit_image(path, size):
    """An image file -> uint8 (*size, 3): its centre in the shape of `size`, resized (bicubic, antialiased)."""
    return np.asarray(ImageOps.fit(load_image(path), (size[1], size[0]), Image.BICUBIC))


class ImageFolder:
    """A folder of images, or of a folder of images for each class, as ImageNet's. Records as of `ShapeClips`, with pixels (*size, 3).

    split: the subfolder of that name; if there are none, every twentieth image of a class, by name, is val and the others are train.
    Labels count the class folders by name, those of train. Images that lie in no class have label -1. Folders in class folders are
    left out. DataError if there is nothing to be found; an unreadable image raises it when it is asked for.
    """
    endless = False

    def __init__(self, folder, split, size):
        root, shared = split_folder(folder, split, LAYOUTS["images"])
        names, loose = listing(root)
        if names and loose:
            raise DataError(f"{root}: images such as {loose[0]} beside folders such as {names[0]}, expected {LAYOUTS['images']}")
        self.classes, self.size, self.files = class_names(folder, names), tuple(size), []
        for label, name in [(self.classes.index(name), name) for name in names] or [(-1, "")]:
            images = listing(os.path.join(root, name))[1]
            rows = held_out(len(images), split, 20) if shared else range(len(images))
            self.files += [(os.path.join(root, name, images[i]), label) for i in rows]
        if not self.files:
            raise DataError(f"{root}: no image for {split}, expected {LAYOUTS['images']}")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        path, label = self.files[i]
        return {"pixels": fit_image(path, self.size), "label": label}


class VideoFolder:
    """A folder of a folder of frames for each video, maybe in class folders. Item i is a window of `frames` frames that follow each other,
    (frames, *size, 3), or (*size, 3) for frames=1. Splits, labels and errors as of `ImageFolder`; held out is every twentieth video of all.

    Frames are sorted by the length of their names, then by name, so that 9.png comes before 10.png. Videos that are too short are left
    out, with a warning. The subfolders are classes if none of them has an image.
    """
    endless = False

    def __init__(self, folder, split, frames, size):
        root, shared = split_folder(folder, split, LAYOUTS["videos"])
        names = listing(root)[0]
        found = {name: listing(os.path.join(root, name)) for name in names}
        by_class = any(inner for inner, _ in found.values()) and not any(images for _, images in found.values())
        self.classes, self.frames, self.size = class_names(folder, names) if by_class else [], frames, tuple(size)
        groups = [(name, self.classes.index(name), found[name][0]) for name in names] if by_class else [("", -1, names)]
        paths = [(os.path.join(root, group, video), label) for group, label, inner in groups for video in inner]
        videos = [(path, sorted(listing(path)[1], key=lambda name: (len(name), name)), label) for path, label in paths]
        if short := [path for path, images, _ in videos if len(images) < frames]:
            warnings.warn(f"{root}: left out {len(short)} of {len(videos)} videos, shorter than {frames} frames, such as {short[0]}")
        videos = [video for video in videos if len(video[1]) >= frames]
        self.videos = [videos[i] for i in held_out(len(videos), split, 20)] if shared else videos
        if not self.videos:
            raise DataError(f"{root}: no video of {frames} frames or more for {split}, expected {LAYOUTS['videos']}")
        self.ends = np.cumsum([len(images) - frames + 1 for _, images, _ in self.videos])      # windows up to the end of each video

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        video = np.searchsorted(self.ends, i, side="right")
        path, images, label = self.videos[video]
        last = len(images) + i - self.ends[video] + 1
        pixels = np.stack([fit_image(os.path.join(path, name), self.size) for name in images[last - self.frames:last]])
        return {"pixels": pixels if self.frames > 1 else pixels[0], "label": label}


# ---------------------------------------------------------------------------------------------------------------
# transforms: which part of an image the network sees

@dataclass
class View:
    """A rectangle of the image, resized to (height, width) at the top left of a padded canvas, maybe mirrored."""
    top: float                                         # the rectangle, in pixels of the image
    left: float
    bottom: float
    right: float
    height: int                                        # of the resized rectangle, in pixels of the canvas
    width: int
    canvas: tuple[int, int]
    flip: bool = False

    def image(self, image):
        """PIL RGB -> uint8 (canvas height, canvas width, 3); what lies outside (height, width) is not yet filled."""
        part = image.resize((self.width, self.height), Image.BILINEAR, box=(self.left, self.top, self.right, self.bottom))
        pixels = np.zeros((*self.canvas, 3), np.uint8)
        pixels[:self.height, :self.width] = np.asarray(part)[:, ::-1] if self.flip else np.asarray(part)
        return pixels

    def to_view(self, yx):
        """(..., 2) pixels of the image -> fractions of the rectangle, mirrored with it."""
        yx = (yx - (self.top, self.left)) / (self.bottom - self.top, self.right - self.left)
        return np.stack([yx[..., 0], 1 - yx[..., 1]], -1) if self.flip else yx

    def to_canvas(self, yx):
        """(..., 2) fractions of the rectangle -> fractions of the padded canvas."""
        return yx * (self.height / self.canvas[0], self.width / self.canvas[1])

    def to_image(self, yx):
        """(..., 2) fractions of the padded canvas -> pixels of the image. Views that predict are never mirrored."""
        yx = yx * (self.canvas[0] / self.height, self.canvas[1] / self.width)
        return yx * (self.bottom - self.top, self.right - self.left) + (self.top, self.left)


def whole(image):
    """PIL image -> the region (top, left, bottom, right) that is all of it, in pixels."""
    return 0, 0, image.height, image.width


def around_box(image, box, margin):
    """The region of a yxyx box in pixels, widened on each side by `margin` times its size, within the image."""
    size = np.tile(box[2:] - box[:2], 2) * (-margin, -margin, margin, margin)
    return tuple(np.clip(box + size, 0, [image.height, image.width] * 2).tolist())


def eval_view(region, canvas):
    """All of a region, as large as the canvas allows."""
    h, w = region[2] - region[0], region[3] - region[1]
    scale = min(canvas[0] / h, canvas[1] / w)
    return View(*region, max(round(h * scale), 1), max(round(w * scale), 1), canvas)


def train_view(region, canvas, rng, scale_range, flip):
    """Scale jitter, then a random crop of the canvas's size, then a mirror (2109.10852, appendix B)."""
    origin, size = np.array(region[:2]), np.array(region[2:]) - region[:2]
    scale = rng.uniform(*scale_range) * min(canvas / size)
    scaled = np.maximum((size * scale).astype(int), 1)
    offset = (rng.random() * np.maximum(scaled - canvas, 0)).astype(int)       # one number for both directions
    height, width = np.minimum(canvas, scaled - offset)
    start, end = (origin + corner * size / scaled for corner in (offset, offset + (height, width)))
    return View(*start, *end, int(height), int(width), canvas, bool(flip and rng.random() < 0.5))


def view_boxes(view, boxes):
    """(N, 4) yxyx pixels -> (N, 4) yxyx fractions of the view's rectangle, clipped to it; empty if outside."""
    corners = view.to_view(boxes.reshape(-1, 2, 2))
    return np.concatenate([corners.min(1), corners.max(1)], -1).clip(0, 1)


def noise_boxes(boxes, count, rng):
    """`count` boxes that look like objects and are none (2109.10852, section 2.4): near-copies of real boxes, real boxes
    elsewhere, random boxes. boxes: (N, 4) yxyx fractions of the view."""
    def around(centers, sizes):
        return np.concatenate([centers - sizes / 2, centers + sizes / 2], -1)

    copies = rng.integers(0, count + 1) if len(boxes) else 0
    others = count - copies
    pool = np.tile(boxes, (count // max(len(boxes), 1) + 1, 1))
    near = rng.permutation(pool)[:copies]
    near = near + truncated_normal(rng, near.shape, 0.05) * np.tile(near[:, 2:] - near[:, :2], 2)
    moved = rng.permutation(pool)[:others]
    moved = around(rng.random((len(moved), 2)), moved[:, 2:] - moved[:, :2])
    drawn = around(rng.random((others, 2)), np.abs(truncated_normal(rng, (others, 2), 0.5)))
    bad = rng.permutation(np.concatenate([moved, drawn]))[:others]
    return rng.permutation(np.concatenate([near, bad])).clip(0, 1)


def truncated_normal(rng, shape, std):
    """Normal numbers of which none is beyond two standard deviations (those are drawn again)."""
    x = rng.standard_normal(shape)
    while (far := np.abs(x) > 2).any():
        x[far] = rng.standard_normal(far.sum())
    return x * std


def jitter_colors(image, strength, rng):
    """PIL RGB -> the same with brightness, contrast, saturation and hue changed at random, four times in five, and grey one
    time in five (the colour distortion of SimCLR, arXiv 2002.05709, appendix A)."""
    if rng.random() < 0.8:
        for change in rng.permutation(4):
            if change < 3:
                kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[change]
                image = kind(image).enhance(rng.uniform(max(0, 1 - 0.8 * strength), 1 + 0.8 * strength))
            else:
                hue, saturation, value = image.convert("HSV").split()
                turn = int(rng.uniform(-0.2, 0.2) * strength * 256)
                image = Image.merge("HSV", (hue.point(lambda h: (h + turn) % 256), saturation, value)).convert("RGB")
    return image.convert("L").convert("RGB") if rng.random() < 0.2 else image


def thin_polygons(polygons, most):
    """A list of (P, 2) -> the same outlines in at most `most` points, a separator between two counted as one: every polygon
    gives up its share, evenly along its outline; where even triangles are too many, the smallest polygons go."""
    polygons = sorted(polygons, key=polygon_area, reverse=True)[:(most + 1) // 4]
    room = most - len(polygons) + 1
    share = min(room / max(sum(map(len, polygons)), 1), 1)
    while sum(max(int(len(p) * share), 3) for p in polygons) > room:
        share *= 0.95
    kept = [min(max(int(len(p) * share), 3), len(p)) for p in polygons]
    return [p[np.arange(n) * len(p) // n] for p, n in zip(polygons, kept)]


# ---------------------------------------------------------------------------------------------------------------
# examples: what a task trains on. Record, configuration (fields of train.Config), generator -> dict of arrays

def det_example(record, c, rng):
    """image (H, W, 3) uint8, size (2,) of its unpadded part, boxes (max_objects, 4) fractions of the canvas, labels
    (max_objects,), corrupt (max_objects, 2) for `encode_detection`."""
    view = train_view(whole(record["image"]), c.model.image_size, rng, (c.scale_min, c.scale_max), c.flip)
    boxes = view_boxes(view, record["boxes"])
    order = rng.permutation(np.flatnonzero(visible(boxes) & ~record["iscrowd"]))[:c.max_objects]
    boxes, labels = boxes[order], record["labels"][order]
    if c.noise_boxes and (missing := c.max_objects - len(boxes)):
        boxes = np.concatenate([boxes, noise_boxes(boxes, missing, rng)])
        labels = np.concatenate([labels, np.full(missing, FAKE_LABEL)])
    return (seen(view, record["image"]) | pad_objects(view, boxes, labels, c.max_objects)
            | {"corrupt": rng.random((c.max_objects, 2), np.float32)})


def seg_example(record, c, rng):
    """image, size, boxes (max_instances, 4), labels (max_instances,), points (max_instances, 2 max_points) with the *_POINT marks."""
    view = train_view(whole(record["image"]), c.model.image_size, rng, (c.instance_scale_min, c.instance_scale_max), c.flip)
    boxes = view_boxes(view, record["boxes"])
    outlined = np.array([bool(p) for p in record["polygons"]], bool)
    order = rng.permutation(np.flatnonzero(visible(boxes) & ~record["iscrowd"] & outlined))[:c.max_instances]
    return (seen(view, record["image"]) | pad_objects(view, boxes[order], record["labels"][order], c.max_instances)
            | {"points": outline_points(view, [record["polygons"][i] for i in order], c.max_instances, c.max_points)})


def kpt_example(record, c, rng):
    """image cropped to one person, size, boxes (1, 4), labels (1,), points (1, 2 K), mask (1, 2 K) bool: the share of the points
    that is hidden is drawn for every example (in the reference for every batch)."""
    record, person = record
    region = around_box(record["image"], record["boxes"][person], c.crop_margin)
    view = train_view(region, c.model.image_size, rng, (c.instance_scale_min, c.instance_scale_max), flip=False)
    box = view_boxes(view, record["boxes"][person:person + 1])
    points = joint_points(view, record["keypoints"][person])[None]
    return (seen(view, record["image"]) | pad_objects(view, box, record["labels"][person:person + 1], 1)
            | {"points": points, "mask": rng.random(points.shape) < rng.random()})


def cap_example(record, c, rng):
    """image, size, captions: captions_per_image str, drop (captions_per_image, caption_length) for `encode_captions`."""
    image = jitter_colors(record["image"], c.color_jitter, rng) if c.color_jitter else record["image"]
    view = train_view(whole(image), c.model.image_size, rng, (c.scale_min, c.scale_max), c.caption_flip)
    texts = record["captions"] or [""]
    chosen = rng.permutation(len(texts) * -(-c.captions_per_image // len(texts)))[:c.captions_per_image] % len(texts)
    return seen(view, image) | {"captions": [texts[i] for i in chosen],
                                "drop": rng.random((c.captions_per_image, c.caption_length), np.float32)}


def gen_example(record, c, rng):
    """pixels (H, W, C) uint8, of a clip (T, H, W, C), and label int64. DataError if they are not of the size that the model takes."""
    pixels, frames = record["pixels"], clip_length(c)
    expected = (*([frames] if frames > 1 else []), *c.model.sample_size, c.image_channels)
    if pixels.shape[:-1] != expected[:-1] or pixels.shape[-1] not in (1, c.image_channels):
        raise DataError(f"the data is {pixels.shape} (frames, height, width, channels), but sample_size, image_channels and frames ask for {expected}")
    if c.flip and rng.random() < 0.5:
        pixels = pixels[..., ::-1, :]
    return {"pixels": np.broadcast_to(pixels, expected).copy(), "label": np.int64(record["label"])}      # grey as three equal colours


def clip_length(c):
    """How many frames an example of generation has, known ones counted; 1: an image."""
    return getattr(c.model, "frames", 1) + getattr(c.model, "cond_frames", 0)


EXAMPLES = {"det": det_example, "seg": seg_example, "kpt": kpt_example, "cap": cap_example, "gen": gen_example}


def seen(view, image):
    return {"image": view.image(image), "size": np.array([view.height, view.width])}


def visible(boxes):
    return (boxes[:, 2:] > boxes[:, :2]).all(-1)


def pad_objects(view, boxes, labels, count):
    """Boxes (N, 4), fractions of the view, and labels (N,) -> arrays of `count` rows, fractions of the canvas."""
    n = min(len(boxes), count)
    padded = {"boxes": np.zeros((count, 4), np.float32), "labels": np.full(count, PAD_LABEL)}
    padded["boxes"][:n] = view.to_canvas(boxes[:n].reshape(-1, 2, 2)).reshape(-1, 4)
    padded["labels"][:n] = labels[:n]
    return padded


def outline_points(view, objects, count, most):
    """Polygons of N objects, in pixels -> (count, 2 most) float32 fractions of the canvas, clipped to the view, with *_POINT marks."""
    points = np.full((count, most, 2), PAD_POINT, np.float32)
    for row, polygons in zip(points, objects):
        n = 0
        for polygon in thin_polygons(polygons, most):
            if n:
                row[n], n = SEPARATOR_POINT, n + 1
            row[n:n + len(polygon)] = view.to_canvas(view.to_view(polygon).clip(0, 1))
            n += len(polygon)
    return points.reshape(count, 2 * most)


def joint_points(view, keypoints):
    """(K, 3) yxv pixels -> (2 K,) float32 fractions of the canvas; INVISIBLE_POINT where unlabelled or outside of the view."""
    points = view.to_view(keypoints[:, :2])
    shown = (keypoints[:, 2] > 0) & (points > 0).all(-1) & (points < 1).all(-1)
    return np.where(shown[:, None], view.to_canvas(points), INVISIBLE_POINT).astype(np.float32).ravel()


class TrainStream(Dataset):
    """Position p of an endless, shuffled stream of one task's examples. An unreadable image is replaced by the next one."""

    def __init__(self, source, task, c):
        self.source, self.task, self.c, self.epoch = source, task, c, None
        self.count = source.people if task == "kpt" else len(source)
        if self.count == 0:
            raise DataError("the training data has no " + ("person with a labelled joint" if task == "kpt" else "image"))

    def index(self, p):
        if self.source.endless:
            return p
        epoch, i = divmod(p, self.count)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.c.seed, epoch]).permutation(self.count)
        return int(self.order[i])

    def __getitem__(self, p):
        first, skipped = self.index(p), []
        while True:
            i = (first + len(skipped)) % self.count
            try:
                record = self.source.person(i) if self.task == "kpt" else self.source[i]
                break
            except DataError as e:
                skipped.append(str(e))
                if len(skipped) == self.count:
                    raise DataError(f"none of the {self.count} training images can be read, the last: {e}") from e
        example = EXAMPLES[self.task](record, self.c, np.random.default_rng([self.c.seed, list(EXAMPLES).index(self.task), p]))
        return example | {"skipped": skipped}


class EvalSet(Dataset):
    """Record i of a source; of an unreadable image only the message."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            return self.source[i]
        except DataError as e:
            return str(e)


class TrainCollate:
    """Examples -> batch: stacked images, and the token sequences of all of them, written at once. gen: pixels and labels (B,)."""

    def __init__(self, task, c, vocab, pieces):
        self.task, self.c, self.vocab, self.pieces = task, c, vocab, pieces

    def __call__(self, examples):
        c = self.c
        x = {key: torch.from_numpy(np.stack([e[key] for e in examples])) for key in examples[0] if key not in ("skipped", "captions")}
        if self.task == "gen":
            return {**x, "weights": torch.ones(len(examples)), "skipped": [m for e in examples for m in e["skipped"]]}
        if self.task == "det":
            tokens = encode_detection(x["boxes"], x["labels"], self.vocab, x["corrupt"], c.noise_weight, c.pad_weight)
        elif self.task == "seg":
            tokens = encode_instances(PROMPT_SEG, x["boxes"], x["labels"], x["points"], self.vocab)
        elif self.task == "kpt":
            tokens = encode_instances(PROMPT_KPT, x["boxes"], x["labels"], x["points"], self.vocab, x["mask"], c.invisible_weight, 0.0)
        else:
            captions = [caption for e in examples for caption in e["captions"]]
            tokens = encode_captions(captions, self.vocab, self.pieces, c.caption_length, x["drop"].flatten(0, 1), c.caption_drop,
                                     pad_weight=c.caption_pad_weight)
            tokens = type(tokens)(*(t.view(len(examples), -1, c.caption_length) for t in tokens))
        return {"image": x["image"], "size": x["size"], "skipped": [m for e in examples for m in e["skipped"]], **tokens._asdict()}


def make_source(c, split, task="det"):
    """The records that a configuration asks for. c.data: shapes or coco, for gen shapes or one of LAYOUTS; split: train or val.
    DataError if it cannot be."""
    choices = ("shapes", *LAYOUTS) if task == "gen" else ("shapes", "coco")
    if c.data not in choices:
        raise DataError(f"data is {c.data!r}, expected one of {', '.join(choices)} for the task {task}")
    if task == "gen":
        return generation_source(c, split)
    if c.data == "shapes":
        return Shapes(split, max(c.model.image_size), c.max_things, c.data_seed, c.val_count if split == "val" else None)
    own = {"kpt": f"{split}_keypoints", "cap": f"{split}_captions"}.get(task, f"{split}_json")
    json_path, images = getattr(c, own), getattr(c, f"{split}_images")
    if not c.data_dir and not (json_path and images):
        raise DataError(f"data is 'coco': name a folder in COCO's layout with --data_dir, or --{own} and --{split}_images")
    return Coco(json_path or f"{c.data_dir}/annotations/{JSON_KINDS[task]}_{split}2017.json", images or f"{c.data_dir}/{split}2017",
                c.coord_shift - CLASS_SHIFT - 1, c.bad_boxes)


def generation_source(c, split):
    """`make_source` for the task gen."""
    size, frames = tuple(c.model.sample_size), clip_length(c)
    if c.data == "shapes":
        return ShapeClips(split, max(size), frames, c.data_seed, c.val_count if split == "val" else None)
    if not c.data_dir:
        raise DataError(f"data is {c.data!r}: name with --data_dir the folder of {LAYOUTS[c.data]}")
    if c.data == "videos":
        return VideoFolder(c.data_dir, split, frames, size)
    return ImageFolder(c.data_dir, split, size) if c.data == "images" else {"mnist": load_mnist, "cifar10": load_cifar10}[c.data](c.data_dir, split)


class Positions:
    """Batch sampler: from step `start` on, this process's share of each global batch, in `parts` parts. A part is every
    (world x parts)-th position of the batch, so which process computes what does not change the batch."""

    def __init__(self, start, steps, batch, parts=1, rank=0, world=1):
        self.start, self.steps, self.batch, self.parts, self.rank, self.world = start, steps, batch, parts, rank, world

    def __len__(self):
        return (self.steps - self.start) * self.parts

    def __iter__(self):
        for step in range(self.start, self.steps):
            for part in range(self.parts):
                first = step * self.batch + self.rank * self.parts + part
                yield list(range(first, (step + 1) * self.batch, self.world * self.parts))


def ignore_interrupts(worker):
    """Ctrl-C reaches every process of a terminal; only the main one answers it, by saving."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(dataset, batch_sampler, collate_fn, workers, pin=False):
    """DataLoader over whole batches of a map-style dataset. Its own generator keeps it from drawing on the global one,
    which would make a resumed run differ."""
    return DataLoader(dataset, batch_sampler=batch_sampler, collate_fn=collate_fn, num_workers=workers, pin_memory=pin,
                      prefetch_factor=4 if workers else None, worker_init_fn=ignore_interrupts,
                      generator=torch.Generator().manual_seed(0))


def to_images(pixels, sizes, device):
    """uint8 (B, H, W, 3) and sizes (B, 2) of the unpadded parts -> float (B, 3, H, W) in [0, 1] on the device, with
    PAD_VALUE below and to the right."""
    pixels, sizes = pixels.to(device, non_blocking=True), sizes.to(device, non_blocking=True)
    images = pixels.permute(0, 3, 1, 2).float() / 255
    y, x = torch.arange(images.shape[2], device=device), torch.arange(images.shape[3], device=device)
    inside = (y[:, None] < sizes[:, 0, None, None]) & (x < sizes[:, 1, None, None])              # (B, H, W)
    return torch.where(inside[:, None], images, PAD_VALUE)


def to_floats(pixels, device):
    """uint8 (B, H, W, C) -> float (B, C, H, W) in [0, 1] on the device; of clips (B, T, H, W, C) -> (B, C, T, H, W)."""
    return pixels.to(device, non_blocking=True).movedim(-1, 1).contiguous().float() / 255


def to_pixels(x):
    """The inverse: float (B, C, ...), cut to [0, 1] -> uint8 array (B, ..., C)."""
    return (x.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()


def save_grid(pixels, stem, columns=8, side=64, gap=2, ms=150):
    """Images (N, H, W, C) uint8 -> STEM.png, a grid with rows of `columns`, small images enlarged to some `side` pixels; clips
    (N, T, H, W, C) -> STEM.gif, a grid that moves, `ms` a frame. Returns the file's name."""
    zoom, columns = max(1, round(side / pixels.shape[-2])), min(columns, len(pixels))
    cells = pixels if pixels.ndim == 5 else pixels[:, None]
    cells = cells.repeat(zoom, 2).repeat(zoom, 3)
    cells = np.pad(cells, ((0, -len(cells) % columns), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    _, T, H, W, C = cells.shape
    frames = cells.reshape(-1, columns, T, H, W, C).transpose(2, 0, 3, 1, 4, 5).reshape(T, -1, columns * W, C)[:, :-gap, :-gap]
    first, *others = [Image.fromarray(frame[..., 0] if C == 1 else frame) for frame in frames]
    path, film = (f"{stem}.gif", dict(save_all=True, append_images=others, duration=ms, loop=0)) if pixels.ndim == 5 else (f"{stem}.png", {})
    first.save(path, **film)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", metavar="DIR", help="write shapes there in COCO's layout")
    parser.add_argument("--sheet", metavar="FILE", help="write a picture of the first 32 held-out scenes, a .png")
    parser.add_argument("--clips", metavar="FILE", help="write 16 held-out clips, a .gif")
    parser.add_argument("--count", type=int, default=1000, help="training scenes to export; at most 500 held-out ones go with them")
    parser.add_argument("--size", type=int, default=64, help="side of a scene or clip in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another world")
    parser.add_argument("--format", choices=["jpg", "png"], default="jpg", help="of the exported images")
    args = parser.parse_args()
    if args.count < 1 or args.size < 16:
        parser.error("expected --count of at least 1 and --size of at least 16")
    if args.export:
        export_shapes(args.export, args.count, args.size, args.seed, args.format)
        print(f"wrote {args.export}; train on it with: python train.py --data=coco --data_dir={args.export}")
    if args.sheet:
        scenes = Shapes("val", args.size, seed=args.seed)
        print("wrote", save_grid(np.stack([np.asarray(scenes[i]["image"]) for i in range(32)]), os.path.splitext(args.sheet)[0]))
    if args.clips:
        clips = ShapeClips("val", args.size, 16, args.seed)
        print("wrote", save_grid(np.stack([clips[i]["pixels"] for i in range(16)]), os.path.splitext(args.clips)[0], columns=4))
    if not (args.export or args.sheet or args.clips):
        parser.print_help()


if __name__ == "__main__":
    main()
