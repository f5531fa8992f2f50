"""Images and labels: where they come from, how they are augmented, how they become batches of tokens.

Two sources give the same record (see `Shapes.__getitem__`): *shapes*, an endless world of drawn scenes that needs no
download, and *coco*, any dataset in COCO's format. Augmentation follows Pix2Seq (arXiv 2109.10852, section 2.4 and
appendix B; 2206.07669 for instances and captions). A training stream is a pure function of (seed, position), so any
number of workers, processes or restarts sees the same examples. Only uint8 pixels leave a worker; they become floats on
the device.
Left out: downloads. Every path is the user's.

    python data.py --sheet shapes.png                   # a look at the drawn world
    python data.py --export DIR --count 1000            # write it as a COCO dataset, then: train.py --data=coco --data_dir=DIR
"""
import argparse
import json
import os
import signal
import warnings
from dataclasses import dataclass
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


def random_scene(rng, max_things):
    """1 to max_things things, fully inside the image, the squares around no two of which overlap by more than a tenth (IoU)."""
    things = []
    for _ in range(rng.integers(1, max_things + 1)):
        kind, color = KINDS[rng.integers(len(KINDS))], list(COLORS)[rng.integers(len(COLORS))]
        for _ in range(10):
            radius = rng.uniform(0.14, 0.26)
            y, x = rng.uniform(radius + 0.01, 0.99 - radius, 2)
            thing = Thing(kind, color, y, x, radius, rng.random((4, 2)))
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
    """Every true sentence about two things, "a red circle above a blue square"; about one if there is no other."""
    name = lambda thing: f"a {thing.color} {thing.kind}"
    if len(things) == 1:
        return [name(things[0])]
    near = 0.05                                        # closer than this along an axis, neither is above or left of the other
    sentences = []
    for a in things:
        for b in things:
            if a.y < b.y - near:
                sentences += [f"{name(a)} above {name(b)}", f"{name(b)} below {name(a)}"]
            if a.x < b.x - near:
                sentences += [f"{name(a)} left of {name(b)}", f"{name(b)} right of {name(a)}"]
    return sorted(set(sentences)) or [name(things[0])]


class Shapes:
    """Drawn scenes with COCO-style truth. Item i of a split is a pure function of (seed, split, i)."""
    endless = True                                     # items need no shuffling: any run of them is a fresh sample

    def __init__(self, split, size=64, max_things=4, seed=0, count=None):
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
        self.split, self.size, self.max_things, self.seed = split, size, max_things, seed
        self.count, self.drawn = count or (1 << 40 if split == "train" else 500), {}
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


EXAMPLES = {"det": det_example, "seg": seg_example, "kpt": kpt_example, "cap": cap_example}


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
    """Examples -> batch: stacked images, and the token sequences of all of them, written at once."""

    def __init__(self, task, c, vocab, pieces):
        self.task, self.c, self.vocab, self.pieces = task, c, vocab, pieces

    def __call__(self, examples):
        c = self.c
        x = {key: torch.from_numpy(np.stack([e[key] for e in examples])) for key in examples[0] if key not in ("skipped", "captions")}
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
    """The records that a configuration asks for. c.data: shapes or coco; split: train or val. DataError if it cannot be."""
    if c.data == "shapes":
        return Shapes(split, max(c.model.image_size), c.max_things, c.data_seed, c.val_count if split == "val" else None)
    if c.data != "coco":
        raise DataError(f"unknown data {c.data!r}, expected 'shapes' or 'coco'")
    own = {"kpt": f"{split}_keypoints", "cap": f"{split}_captions"}.get(task, f"{split}_json")
    json_path, images = getattr(c, own), getattr(c, f"{split}_images")
    if not c.data_dir and not (json_path and images):
        raise DataError(f"data is 'coco': name a folder in COCO's layout with --data_dir, or --{own} and --{split}_images")
    return Coco(json_path or f"{c.data_dir}/annotations/{JSON_KINDS[task]}_{split}2017.json", images or f"{c.data_dir}/{split}2017",
                c.coord_shift - CLASS_SHIFT - 1, c.bad_boxes)


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", metavar="DIR", help="write shapes there in COCO's layout")
    parser.add_argument("--sheet", metavar="FILE", help="write a picture of the first 32 held-out scenes")
    parser.add_argument("--count", type=int, default=1000, help="training scenes to export; at most 500 held-out ones go with them")
    parser.add_argument("--size", type=int, default=64, help="side of a scene in pixels")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another world")
    parser.add_argument("--format", choices=["jpg", "png"], default="jpg", help="of the exported images")
    args = parser.parse_args()
    if args.count < 1 or args.size < 16:
        parser.error("expected --count of at least 1 and --size of at least 16")
    if args.export:
        export_shapes(args.export, args.count, args.size, args.seed, args.format)
        print(f"wrote {args.export}; train on it with: python train.py --data=coco --data_dir={args.export}")
    if args.sheet:
        scenes = [np.asarray(Shapes("val", args.size, seed=args.seed)[i]["image"]) for i in range(32)]
        Image.fromarray(np.concatenate([np.concatenate(scenes[r:r + 8], 1) for r in range(0, 32, 8)])).save(args.sheet)
        print(f"wrote {args.sheet}")
    if not (args.export or args.sheet):
        parser.print_help()


if __name__ == "__main__":
    main()
