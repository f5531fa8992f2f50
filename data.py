"""Images and labels: where they come from, how they are augmented, how they become batches.

Every source gives records (see `Shapes.__getitem__`, for generation `ShapeClips.__getitem__`, for
panoptic masks `ShapeMaps.__getitem__`); a task makes a training example of a record; examples
become a Batch of tokens or of pixels, or of the classes and ids of maps (2210.06366).
Augmentation follows Pix2Seq (arXiv 2109.10852, section 2.4 and appendix B; 2206.07669 for instances
and captions). A training stream is a pure function of (seed, position), so any number of workers,
processes or restarts sees the same examples. Only uint8 pixels leave a worker; they become floats
on the device.
Left out: downloads, every path is the user's; video files, a video is a folder of its frames;
random crops in generation.

    python data.py --export DIR --count 1000            # write the synthetic shapes as COCO's files
    python data.py --check a.json images/               # what a dataset in COCO's format holds
"""
import glob
import gzip
import itertools
import json
import math
import os
import pickle
import reprlib
import signal
import zlib
from array import array
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from os.path import dirname, exists, getmtime, isdir, isfile, join, relpath, splitext
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.random import default_rng
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

import tokenizer
from tokenizer import (
    Count, Fraction, Natural, NotNegative, Positive, UserError, between, check_choice, frozen,
    require)

PAD_VALUE = 0.3                                        # grey of the padding, as in the reference


@frozen
class DataConfig:
    """Where data come from, and how they become examples."""
    tasks: tuple[str, ...] = ("det",)   # what to learn: some of det, seg, kpt, cap; or one other
    data: str = "shapes"                # where from: shapes, coco and so on (see data.SOURCES)
    data_dir: str = ""                  # files: their folder, as train2017/, annotations/ of coco
    train_json: str = ""                # coco: instances for training, if not in data_dir
    train_keypoints: str = ""           # coco: the same for kpt
    train_captions: str = ""            # coco: the same for cap
    train_masks: str = ""               # coco: the PNGs of pan, whose JSON is train_json
    train_images: str = ""              # coco: their images
    val_json: str = ""                  # coco: instances held out
    val_keypoints: str = ""             # coco: the same for kpt
    val_captions: str = ""              # coco: the same for cap
    val_masks: str = ""                 # coco: the PNGs of pan
    val_images: str = ""                # coco: their images
    bad_boxes: Literal["error", "drop"] = "error"       # coco: on boxes outside of their image
    max_shapes: Count = 4               # shapes: most shapes in a scene
    data_seed: Natural = 0              # shapes: dataset seed
    val_count: Count = 500              # shapes: held-out scenes, of val and of test
    max_objects: Count = 100            # det: most objects in a sequence, noise boxes counted
    scale_min: Positive = 0.3           # det, cap, pan, vps: scale jitter, smallest image / canvas
    scale_max: Positive = 2.0           # det, cap, pan, vps: scale jitter, largest
    flip: bool = True                   # det, seg, gen, ar, pan, vps: mirror half of the images
    noise_boxes: bool = True            # det: fill sequences up with noise boxes
    noise_weight: NotNegative = 1.0     # det: loss weight of the class of a noise box
    pad_weight: NotNegative = 0.1       # det: loss weight of padding, of ending the sequence
    max_instances: Count = 10           # seg: objects to learn from an image
    max_segments: between(2) = 100      # pan, vps: ids of instances, 0 for none included
    random_ids: bool = True             # pan, vps: number instances anew each time they are seen
    clip_frames: Count = 16             # vps, shapes: frames of a clip
    past_drop: Fraction = 0.2           # vps: probability that an earlier frame's map is hidden
    max_points: Count = 128             # seg: points of an object's polygons
    instance_scale_min: Positive = 0.3  # seg, kpt: scale jitter, smallest
    instance_scale_max: Positive = 1.0  # seg, kpt: scale jitter, largest
    crop_margin: NotNegative = 0.5      # kpt: the crop is the box and this times its size around it
    invisible_weight: NotNegative = 0.1     # kpt: loss weight of an invisible keypoint
    captions_per_image: Count = 5       # cap: captions to learn from an image
    caption_length: Count = 128         # cap: most pieces of a caption
    caption_drop: Fraction = 0.5        # cap: probability that an input token is hidden
    caption_pad_weight: NotNegative = 1.0   # cap: loss weight of padding
    caption_flip: bool = True           # cap: mirror half of the images, which makes left right
    color_jitter: NotNegative = 0.5     # cap, pan, vps: strength of the colour distortion
    image_channels: Literal[1, 3] = 3   # gen, ar: colours of an image


class Batch(NamedTuple):
    """B examples of a task. Pixels are uint8 until `to` puts them on the device."""
    targets: torch.Tensor              # int64 tokens (B, [G,] T), or pixels (B, C, [frames,] H, W)
    weights: torch.Tensor              # float32 loss weight of each token, or example (B,)
    inputs: torch.Tensor | None = None         # int64 tokens (B, [G,] T)
    images: torch.Tensor | None = None         # (B, H, W, 3)
    sizes: torch.Tensor | None = None          # (B, 2) height and width of the unpadded image
    cond: dict = {}                    # gen: labels (B,), -1 unknown; context frames, like targets
    skipped: tuple = ()                # messages about images that could not be read

    def to(self, device):
        """The same on the device, images as float (B, 3, H, W) in [0, 1]."""
        def put(x):
            return x.to(device, non_blocking=True)

        batch = tree_map_only(torch.Tensor, put, self)
        if self.images is None:
            return batch
        return batch._replace(images=to_images(batch.images, batch.sizes))


def to_images(pixels, sizes):
    """uint8 (B, H, W, 3) and sizes (B, 2) of the unpadded parts -> float (B, 3, H, W) in [0, 1],
    with PAD_VALUE below and to the right."""
    images = pixels.permute(0, 3, 1, 2).float() / 255
    y, x = (torch.arange(side, device=pixels.device) for side in images.shape[2:])
    height, width = sizes.T[..., None, None, None]     # (B, 1, 1, 1)
    padding = (y[:, None] >= height) | (x >= width)    # (B, 1, H, W)
    return images.masked_fill(padding, PAD_VALUE)


# --------------------------------------------------------------------------------------------------
# views: which part of an image the network sees

@dataclass
class View:
    """A rectangle of the image, resized to (height, width) at the top left of a padded canvas,
    maybe mirrored."""
    top: float                                         # the rectangle, in pixels of the image
    left: float
    bottom: float
    right: float
    height: int                                        # resized, in pixels of the canvas
    width: int
    canvas: tuple                                      # height, width
    flip: bool = False

    def __post_init__(self):
        self.start = self.top, self.left               # as (y, x), for what is made of points
        self.size = self.bottom - self.top, self.right - self.left
        self.shown = self.height, self.width

    def image(self, image, method=Image.BILINEAR):
        """PIL RGB -> uint8 (canvas height, canvas width, 3), zero outside of (height, width)."""
        box = self.left, self.top, self.right, self.bottom
        part = image.resize(self.shown[::-1], method, box)
        if self.flip:
            part = ImageOps.mirror(part)
        canvas = Image.new(image.mode, self.canvas[::-1])
        canvas.paste(part)
        return np.array(canvas)

    def to_view(self, yx):
        """(..., 2) pixels of the image -> fractions of the rectangle, mirrored with it."""
        yx = (yx - self.start) / self.size
        if self.flip:
            yx[..., 1] = 1 - yx[..., 1]
        return yx

    def to_canvas(self, yx):
        """(..., 2) fractions of the rectangle -> fractions of the padded canvas."""
        return yx * np.divide(self.shown, self.canvas)

    def to_image(self, yx):
        """(..., 2) fractions of the padded canvas -> pixels of the image, for views that predict,
        which are never mirrored."""
        return yx * np.divide(self.canvas, self.shown) * self.size + self.start


def whole(image):
    """PIL image -> the region (top, left, bottom, right) that is all of it, in pixels."""
    return 0, 0, image.height, image.width


def train_view(region, canvas, rng, scale_min, scale_max, flip):
    """Scale jitter (at 1 the image just fits into the canvas), a random crop of the canvas's size,
    one random number for rows and columns, a mirror (2109.10852, app. B)."""
    origin = np.array(region[:2])
    size = region[2:] - origin
    scale = rng.uniform(scale_min, scale_max) * min(canvas / size)
    scaled = np.maximum((size * scale).astype(int), 1)
    offset = (rng.random() * np.maximum(scaled - canvas, 0)).astype(int)
    shown = np.minimum(canvas, scaled - offset)
    start = origin + offset * size / scaled
    end = origin + (offset + shown) * size / scaled
    return View(*start, *end, *shown.tolist(), canvas, flip and rng.random() < 0.5)


def view_boxes(view, boxes):
    """(N, 4) yxyx pixels -> (N, 4) yxyx fractions of the view's rectangle, clipped to it; empty if
    outside."""
    corners = view.to_view(boxes.reshape(-1, 2, 2))
    return np.sort(corners, 1).reshape(-1, 4).clip(0, 1)           # a mirror swaps left and right


def pad_objects(view, boxes, labels, count):
    """At most `count` boxes (N, 4), fractions of the view, and labels (N,) -> arrays of `count`
    rows, boxes as fractions of the canvas."""
    padded_boxes = np.zeros((count, 4), np.float32)
    padded_boxes[:len(boxes)] = view.to_canvas(boxes.reshape(-1, 2, 2)).reshape(-1, 4)
    padded_labels = np.full(count, tokenizer.PAD_LABEL)
    padded_labels[:len(labels)] = labels
    return {"boxes": padded_boxes, "labels": padded_labels}


# --------------------------------------------------------------------------------------------------
# detection: a record becomes an example, examples become a batch

def det_example(record, c, rng):
    """Record -> image (H, W, 3) uint8, size (2,) of its unpadded part, boxes (max_objects, 4)
    fractions of the canvas, labels (max_objects,), corrupt (max_objects, 2) random numbers."""
    d, image = c.data, record["image"]
    view = train_view(whole(image), c.model.image_size, rng, d.scale_min, d.scale_max, d.flip)
    order, boxes = shown_objects(view, record, d.max_objects, rng)
    labels = record["labels"][order]
    missing = d.max_objects - len(order)
    if d.noise_boxes and missing:
        boxes = np.concatenate([boxes, noise_boxes(boxes, missing, rng)])
        labels = np.append(labels, [tokenizer.FAKE_LABEL] * missing)
    objects = pad_objects(view, boxes, labels, d.max_objects)
    return pixels_of(view, image) | objects | {
        "corrupt": rng.random((d.max_objects, 2), np.float32)}


def pixels_of(view, image):
    return {"image": view.image(image), "size": np.array(view.shown)}


def shown_objects(view, record, most, rng, usable=True):
    """Numbers, in random order, of at most `most` objects of which the view shows something and
    which are no crowds; and their boxes, fractions of the view."""
    boxes = view_boxes(view, record["boxes"])
    shown = (boxes[:, 2:] > boxes[:, :2]).all(-1)
    order = rng.permutation(np.flatnonzero(shown & ~record["iscrowd"] & usable))[:most]
    return order, boxes[order]


def noise_boxes(boxes, count, rng):
    """`count` boxes that look like objects and are none (2109.10852, section 2.4): near-copies of
    real boxes, real boxes elsewhere, random boxes. boxes: (N, 4) yxyx fractions of the view."""
    def sizes_of(boxes):
        return boxes[:, 2:] - boxes[:, :2]

    copies = rng.integers(count + 1) if len(boxes) else 0
    others = count - copies
    repeats = count // max(len(boxes), 1) + 1
    pool = np.tile(boxes, (repeats, 1))
    near = rng.permutation(pool)[:copies]
    near = near + truncated_normal(rng, near.shape, 0.05) * np.tile(sizes_of(near), 2)
    moved = sizes_of(rng.permutation(pool)[:others])
    centers = rng.random((len(moved) + others, 2))
    drawn = np.abs(truncated_normal(rng, (others, 2), 0.5))
    halves = np.concatenate([moved, drawn]) / 2
    far = rng.permutation(np.hstack([centers - halves, centers + halves]))[:others]
    return rng.permutation(np.concatenate([near, far])).clip(0, 1)


def det_batch(x, c):
    """Stacked examples -> the tokens of a Batch."""
    return tokenizer.encode_detection(
        x["boxes"], x["labels"], c.vocab, x["corrupt"],
        c.data.noise_weight, c.data.pad_weight)


def collate(task, c):
    """A task's function of examples -> Batch."""
    def join(examples):
        x = {}                                         # arrays are stacked, lists listed
        for key, value in examples[0].items():
            values = [example[key] for example in examples]
            x[key] = values if isinstance(value, list) else torch.from_numpy(np.stack(values))
        batch = Batch(**COLLATE[task](x, c)._asdict())
        skipped = tuple(sum(x.get("skipped", ()), []))
        return batch._replace(images=x.get("image"), sizes=x.get("size"), skipped=skipped)

    return join


def collate_parts(c, parts):
    """Items of Streams, of one task -> it and its Batch."""
    (task, *_), examples = zip(*parts)
    return task, collate(task, c)(examples)


# --------------------------------------------------------------------------------------------------
# streams: which example comes when

@dataclass
class TrainStream:
    """Example number p of an endless, shuffled stream of one task's. An unreadable image is
    replaced by the next one."""
    source: "Source"
    task: str
    c: object                                          # a configuration
    seed: int

    def __post_init__(self):
        self.count = self.source.count(self.task)
        require(
            self.count and self.source.learned,
            f"the training data has nothing to learn {self.task} from")

    def index(self, p):
        """Which of the source's training examples is number p of the stream: each once an epoch."""
        if self.source.endless:                        # drawn: no two are alike
            return p
        epoch, i = divmod(p, self.count)
        return int(shuffled(self.count, self.seed, epoch)[i])

    def __getitem__(self, p):
        first, skipped = self.index(p), []
        for i in range(first, first + self.count):
            try:
                record = self.source.record(self.task, i % self.count)
            except UserError as e:
                skipped.append(str(e))
                continue
            rng = default_rng([self.seed, list(EXAMPLES).index(self.task), p])
            return EXAMPLES[self.task](record, self.c, rng) | {"skipped": skipped}
        raise UserError(
            f"none of the {self.count} training images can be read, the last: {skipped[-1]}")


@dataclass
class Streams:
    """TrainStreams by task: item (task, p) is the task and its example number p."""
    streams: dict

    def __getitem__(self, item):
        task, p = item
        return task, self.streams[task][p]


@dataclass
class MicroBatches:
    """Batch sampler: from step `start` on, which examples (task, p) this process learns from, of
    each task that has started in `parts` micro-batches a step. A micro-batch is every (world x
    parts)-th of the global batch: how many processes share it changes nothing in it."""
    start: int
    steps: int
    tasks: dict                                        # task: (images of a batch, first step)
    parts: int = 1
    rank: int = 0
    world: int = 1

    def __iter__(self):
        for step in range(self.start, self.steps):
            for task, (batch, begins) in self.tasks.items():
                for part in range(self.parts if step >= begins else 0):
                    first = step * batch + self.rank * self.parts + part
                    numbers = range(first, (step + 1) * batch, self.world * self.parts)
                    yield [(task, p) for p in numbers]


def make_loader(dataset, batch_sampler, collate_fn, workers, pin=False):
    """DataLoader over whole batches of a map-style dataset. Its own generator keeps it from drawing
    on the global one, which would make a resumed run differ."""
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate_fn,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator().manual_seed(0),
    )


# ==== reference ===================================================================================
# helpers of the core

@lru_cache(maxsize=8)
def shuffled(count, seed, epoch):
    """The order of an epoch."""
    return default_rng([seed, epoch]).permutation(count)


def truncated_normal(rng, shape, std):
    """Normal numbers of which none is beyond two standard deviations (those are drawn again)."""
    x = rng.standard_normal(shape)
    while (far := np.abs(x) > 2).any():
        x[far] = rng.standard_normal(far.sum())
    return x * std


def ignore_interrupts(worker):
    """Ctrl-C reaches every process of a terminal; only the main one answers it, by saving."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --------------------------------------------------------------------------------------------------
# what a model is evaluated on

@dataclass
class EvalSet:
    """Record i of a source; of an unreadable image only the message, a str."""
    source: "Source"

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            return self.source[i]
        except UserError as e:
            return str(e)


def eval_view(region, canvas):
    """All of a region, as large as the canvas allows."""
    size = np.subtract(region[2:], region[:2])
    scaled = size * min(canvas / size)
    shown = np.maximum(scaled.round().astype(int), 1)
    return View(*region, *shown.tolist(), canvas)


# --------------------------------------------------------------------------------------------------
# the other tasks' examples and batches

def seg_example(record, c, rng):
    """image, size, boxes (max_instances, 4), labels (max_instances,), points (max_instances,
    2 max_points) with the *_POINT marks."""
    d, image = c.data, record["image"]
    view = train_view(
        whole(image), c.model.image_size, rng, d.instance_scale_min, d.instance_scale_max, d.flip)
    has_polygons = np.fromiter(map(bool, record["polygons"]), bool)
    order, boxes = shown_objects(view, record, d.max_instances, rng, has_polygons)
    objects = pad_objects(view, boxes, record["labels"][order], d.max_instances)
    points = polygon_points(
        view, [record["polygons"][i] for i in order], d.max_instances, d.max_points)
    return pixels_of(view, image) | objects | {"points": points}


def instance_batch(prompt, pad_weight, x, c):
    return tokenizer.encode_instances(
        prompt,
        x["boxes"],
        x["labels"],
        x["points"],
        c.vocab,
        x.get("mask"),
        c.data.invisible_weight,
        pad_weight)


def polygon_points(view, objects, count, most):
    """Polygons of N objects, in pixels -> (count, 2 most) float32 fractions of the canvas, clipped
    to the view, with *_POINT marks."""
    points = np.full((count, most, 2), tokenizer.PAD_POINT, np.float32)
    for row, polygons in zip(points, objects):
        n = 0
        for polygon in thin_polygons(polygons, most):
            if n:
                row[n] = tokenizer.SEPARATOR_POINT
                n += 1
            end = n + len(polygon)
            row[n:end] = view.to_canvas(view.to_view(polygon).clip(0, 1))
            n = end
    return points.reshape(count, 2 * most)


def thin_polygons(polygons, most):
    """A list of (P, 2) -> the same polygons in at most `most` points, a separator between two
    counted as one: each gives up an equal fraction, evenly along it; where even triangles
    are too many, the smallest polygons go."""
    def size(polygon):
        return max(int(len(polygon) * fraction), 3)

    polygons = sorted(polygons, key=polygon_area, reverse=True)[:(most + 1) // 4]
    room = most - len(polygons) + 1
    fraction = min(room / max(sum(map(len, polygons)), 1), 1)
    while sum(map(size, polygons)) > room:
        fraction *= 0.95
    return [p[np.arange(size(p)) * len(p) // size(p)] for p in polygons]


def polygon_area(points):
    """Area inside a polygon (P, 2), by the shoelace formula."""
    y, x = points.T
    other_y, other_x = np.roll(points, 1, 0).T         # the other end of each side
    return 0.5 * abs(x @ other_y - y @ other_x)


def kpt_example(record, c, rng):
    """image cropped to one person, size, boxes (1, 4), labels (1,), points (1, 2 K), mask (1, 2 K)
    bool: the fraction of the points that is hidden is drawn for every example (in the reference for
    every batch). The record says which of its objects it is about."""
    d, image, n = c.data, record["image"], record["person"]
    box = record["boxes"][n]
    view = train_view(
        around_box(image, box, d.crop_margin), c.model.image_size, rng,
        d.instance_scale_min, d.instance_scale_max, flip=False)
    points = keypoint_points(view, record["keypoints"][n])[None]
    mask = rng.random(points.shape) < rng.random()
    objects = pad_objects(view, view_boxes(view, box), record["labels"][[n]], 1)
    return pixels_of(view, image) | objects | {"points": points, "mask": mask}


def around_box(image, box, margin):
    """The region of a yxyx box in pixels, widened on each side by `margin` times its size, within
    the image."""
    size = np.tile(box[2:] - box[:2], 2)
    box = box + size * (-margin, -margin, margin, margin)
    return box.clip(0, whole(image)[2:] * 2)


def keypoint_points(view, keypoints):
    """(K, 3) yxv pixels -> (2 K,) float32 fractions of the canvas; INVISIBLE_POINT where unlabelled
    or outside of the view."""
    points = view.to_view(keypoints[:, :2])
    shown = ((points > 0) & (points < 1)).all(-1) & (keypoints[:, 2] > 0)
    points = view.to_canvas(points)
    points[~shown] = tokenizer.INVISIBLE_POINT
    return points.astype(np.float32).ravel()


def cap_example(record, c, rng):
    """image, size, captions: captions_per_image str, drop (captions_per_image, caption_length)."""
    d, image = c.data, jitter_colors(record["image"], c.data.color_jitter, rng)
    view = train_view(
        whole(image), c.model.image_size, rng, d.scale_min, d.scale_max, d.caption_flip)
    texts, count = record["captions"] or [""], d.captions_per_image
    texts = texts * -(-count // len(texts))
    chosen = [texts[i] for i in rng.permutation(len(texts))[:count]]
    return pixels_of(view, image) | {
        "captions": chosen,
        "drop": rng.random((count, d.caption_length), np.float32)}


def cap_batch(x, c):
    d, drop = c.data, x["drop"]                        # (B, captions, length)
    tokens = tokenizer.encode_captions(
        sum(x["captions"], []),
        c.vocab,
        d.caption_length,
        drop.flatten(0, 1),
        d.caption_drop,
        pad_weight=d.caption_pad_weight)
    return tokenizer.Tokens(*(rows.view_as(drop) for rows in tokens))


def jitter_colors(image, strength, rng):
    """PIL RGB -> the same with brightness, contrast, saturation and hue changed at random, four
    times in five, and grey one time in five (SimCLR's distortion, arXiv 2002.05709, appendix A)."""
    if not strength:
        return image
    low, high = max(0, 1 - 0.8 * strength), 1 + 0.8 * strength
    kinds = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for change in rng.permutation(4) if rng.random() < 0.8 else ():
        if change < 3:
            image = kinds[change](image).enhance(rng.uniform(low, high))
        else:
            turn, levels = int(rng.uniform(-0.2, 0.2) * strength * 256), list(range(256))
            hue = [(level + turn) % 256 for level in levels]
            image = image.convert("HSV").point(hue + 2 * levels).convert("RGB")
    return image.convert("L").convert("RGB") if rng.random() < 0.2 else image


def gen_example(record, c, rng):
    """pixels (frames, H, W, C) uint8, context frames first, of an image one frame, and label int64.
    UserError if they are not of the size that the model takes."""
    pixels, shape = record["pixels"], clip_shape(c)
    if pixels.ndim == 3:
        pixels = pixels[None]
    expected = *shape, c.data.image_channels
    require(
        pixels.shape in (expected, (*shape, 1)),
        f"the data is {pixels.shape} (frames, height, width, channels), but sample_size, "
        f"image_channels and frames ask for {expected}")
    if c.data.flip and rng.random() < 0.5:
        pixels = pixels[:, :, ::-1]
    pixels = np.broadcast_to(pixels, expected).copy()  # grey: equal colours
    return {"pixels": pixels, "label": np.int64(record["label"])}


def gen_batch(x, c):
    """What is to be generated, and the context frames before it."""
    pixels, first = x["pixels"].movedim(-1, 1), c.model.cond_frames            # (B, C, T, H, W)
    B, C = pixels.shape[:2]
    context, targets = pixels.tensor_split([first], 2)
    targets = targets.reshape(B, C, *c.model.sample_shape[1:])                 # an image: no T
    cond = {"labels": x["label"]}
    if first:
        cond["frames"] = context.contiguous()
    return Batch(targets.contiguous(), torch.ones(B), cond=cond)


def clip_shape(c):
    """(frames, height, width) of an example of generation, context frames counted."""
    return c.model.frames + c.model.cond_frames, *c.model.sample_size


def map_example(record, c, rng):
    """Of the last of the record's frames: image (H, W, 3), size (2,), map (2, h, w) and known
    (h, w), see `id_maps`. Of those before it, the oldest first: past (2 P, h, w), zero where one is
    missing or was dropped."""
    d, past_frames = c.data, c.model.past_frames
    image = jitter_colors(record["images"][-1], d.color_jitter, rng)
    view = train_view(whole(image), c.model.image_size, rng, d.scale_min, d.scale_max, d.flip)
    maps = id_maps(record, view, c, rng)
    past = np.zeros((past_frames, *maps[0, :2].shape), np.uint8)
    for n, frame in enumerate(maps[-2::-1, :2][:past_frames], 1):
        past[-n] = frame * (rng.random() >= d.past_drop)
    return pixels_of(view, image) | {
        "map": maps[-1, :2],
        "known": maps[-1, 2],
        "past": past.reshape(-1, *maps.shape[2:])}


def id_maps(record, view, c, rng):
    """Of each pixel of the masks of a record's frames the class, the instance's id, and whether it
    is known what is right, uint8 (T, 3, h, w): not where there is no class, a crowd, or an instance
    too many. Ids are random, those of stuff, too, and the same in all frames (2210.06366); without
    random_ids always the same."""
    rng = rng if c.data.random_ids else default_rng(0)
    view = on_canvas(view, c.model.sample_size)
    numbers = np.stack([
        view.image(Image.fromarray(frame), Image.NEAREST) for frame in record["maps"]])
    present, places = np.unique(numbers, return_inverse=True)
    rows = [record["segments"].get(number, {"category_id": 0}) for number in present]
    labelled = rng.permutation(np.flatnonzero([row["category_id"] for row in rows]))
    ids = rng.permutation(c.data.max_segments - 1) + 1
    table = np.zeros((len(rows), 3), np.uint8)
    for n, instance in zip(labelled, ids):
        table[n] = rows[n]["category_id"], instance, not rows[n].get("iscrowd")
    return np.moveaxis(table[places.reshape(numbers.shape)], -1, 1)


def on_canvas(view, canvas):
    """The same view on another canvas."""
    sides = zip(view.shown, canvas, view.canvas)
    height, width = (max(round(shown * new / old), 1) for shown, new, old in sides)
    return replace(view, height=height, width=width, canvas=canvas)


def map_batch(x, c):
    """Maps to be denoised, and what is known beside the image."""
    cond = {"known": x["known"]}
    if c.model.past_frames:
        cond["past"] = x["past"]
    return Batch(x["map"], torch.ones(len(x["map"])), cond=cond)


# (record, c, rng) -> arrays of one example. A new row comes last: its place seeds augmentation.
EXAMPLES = {
    "det": det_example,
    "seg": seg_example,
    "kpt": kpt_example,
    "cap": cap_example,
    "gen": gen_example,
    "ar": gen_example,
    "pan": map_example,
    "vps": map_example,
}
COLLATE = {                            # (stacked examples, c) -> Tokens, or a Batch without images
    "det": det_batch,
    "seg": partial(instance_batch, tokenizer.PROMPT_SEG, 1.0),
    "kpt": partial(instance_batch, tokenizer.PROMPT_KPT, 0.0),
    "cap": cap_batch,
    "gen": gen_batch,
    "ar": gen_batch,
    "pan": map_batch,
    "vps": map_batch,
}
PER_PERSON = {"kpt"}                                   # one example per person, not per image


# --------------------------------------------------------------------------------------------------
# sources

def make_source(c, split, task="det"):
    """The records of a configuration. split: train, val (which chooses recipes) or test (which
    reports, if the data have it). UserError if it cannot be."""
    choices = SOURCES[task]
    require(
        c.data.data in choices,
        f"data is {c.data.data!r}, expected one of {', '.join(choices)} for the task {task}")
    source = choices[c.data.data](task, c, split)
    known = {k["label"]: k["name"] for k in c.categories if getattr(c.model, "num_classes", 1)}
    for row in source.categories:
        label = row["label"]
        require(
            not known or known.get(label) in (row["name"], str(label)),    # or known by number
            f"the {split} data's class {label} is {row['name']!r}, not {known.get(label)!r}")
    return source


class Source:
    """What sources share. A source has a length and a record per item; `classes` (names); for
    objects and captions `truth(task)`, in COCO's format; to learn keypoints from, `people` and a
    record per `person`. Labels of objects begin at 1, for 0 is padding."""
    endless, learned = False, True                     # whether there is anything to learn

    @cached_property
    def categories(self):
        """[{id, name, label, maybe keypoints and skeleton}]"""
        return [{"id": i, "name": name, "label": i} for i, name in enumerate(self.classes)]

    def count(self, task):
        """How many training examples there are of a task."""
        return len(self.people if task in PER_PERSON else self)

    def record(self, task, i):
        """The record of training example i of a task."""
        return self.person(i) if task in PER_PERSON else self[i]

    def summary(self, c):
        """What there is to learn from, and what was left out, in numbers."""
        return {"images": len(self), "learned": {"in all": self.count("")}, "left out": {}}


SPLITS = "train", "val", "test"
TWO_SPLITS = "train", "val"                            # of data that come without a test split
# of each task COCO's name of the annotation file, our fields that name another
COCO_FILES = {
    "det": ("instances", "json"),
    "seg": ("instances", "json"),
    "kpt": ("person_keypoints", "keypoints"),
    "cap": ("captions", "captions"),
    "pan": ("panoptic", "json"),
    "vps": ("panoptic", "json"),
}
IMAGE_KINDS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
LAYOUTS = {                                            # what the user puts into data_dir
    "mnist": "MNIST's files train-images-idx3-ubyte, train-labels-idx1-ubyte, "
             "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte, maybe .gz",
    "cifar10": "the CIFAR-10 binary version (data_batch_1.bin to data_batch_5.bin, test_batch.bin)",
    "images": f"images ({' '.join(IMAGE_KINDS)}), or a folder of them per class; either may be "
              "divided into train/ and val/",
    "videos": "a folder of frames (image files) per video, maybe in a folder per class; either may "
              "be divided into train/ and val/",
}
MASK_LAYOUTS = {                                       # the same, of videos with panoptic masks
    "kitti_step": "images/SPLIT or training/image_02, and panoptic_maps/SPLIT: PNGs per video",
    "cityscapes_vps": "panoptic_gt_SPLIT_city_vps.json, SPLIT/panoptic_video and SPLIT/img",
    "davis": "JPEGImages/480p, Annotations_unsupervised/480p or Annotations/480p, and the names of "
             "the videos in ImageSets/2017/SPLIT.txt",
}


def check_file(path):
    """A pipe or a device would be waited for."""
    require(isfile(path), f"{path}: no such file, or another thing than a file")


def check_folder(folder, expected):
    require(isdir(folder), f"{folder}: no such folder, expected {expected}")


def shapes_source(task, c, split):
    """What is drawn for a task; in training there is no end."""
    d, past = c.data, getattr(c.model, "past_frames", 0)
    if task in ("gen", "ar"):
        kind, (frames, *size) = ShapeClips, clip_shape(c)
    else:
        kind = ShapeMaps if task in ("pan", "vps") else Shapes
        frames, size = d.clip_frames if past else 1, c.model.image_size
    count = None if split == "train" else d.val_count
    return kind(split, max(size), frames, d.data_seed, count, d.max_shapes, past)


def coco_source(task, c, split):
    """Its files are where the options --SPLIT_NAME say, or in data_dir as usual. UserError if
    neither tells."""
    folder, (kind, field) = c.data.data_dir, COCO_FILES[task]
    own = f"{folder}/annotations/{kind}_{split}2017.json"
    if task == "kpt" and not (getattr(c.data, f"{split}_{field}", "") or exists(own)):
        kind, field = COCO_FILES["det"]                # which may hold keypoints, too
    stem = f"annotations/{kind}_{split}2017"
    usual = {field: f"{stem}.json", "masks": stem, "images": f"{split}2017"}
    if kind != "panoptic":
        del usual["masks"]
    paths = [                                          # a test split is in data_dir
        getattr(c.data, f"{split}_{name}", "") or folder and f"{folder}/{path}"
        for name, path in usual.items()]
    require(
        all(paths),
        f"data is 'coco': name a folder in COCO's layout with --data_dir, or all of "
        f"{', '.join(f'--{split}_{name}' for name in usual)}")
    if kind == "panoptic":
        return coco_maps(*paths, c.model.past_frames, known=c.categories)
    return Coco(*paths, c.vocab.max_label, c.data.bad_boxes, task, c.categories)


def files_source(task, c, split):
    folder, kind = c.data.data_dir, c.data.data
    require(
        folder,
        f"data is {kind!r}: name with --data_dir a folder of {(LAYOUTS | MASK_LAYOUTS)[kind]}")
    if kind not in ("images", "videos"):               # the others come without a test split
        check_choice(split, TWO_SPLITS, "split")
    frames, *size = clip_shape(c)
    past = getattr(c.model, "past_frames", 0)
    reader, *options = {
        "mnist": (load_mnist,),
        "cifar10": (load_cifar10,),
        "images": (ClipFolder, size),
        "videos": (ClipFolder, size, frames),
        "kitti_step": (kitti_step, past),
        "cityscapes_vps": (cityscapes_vps, past),
        "davis": (davis, past),
    }[kind]
    return reader(folder, split, *options)


# of each task what --data can be, a function of (task, c, split)
SOURCES = dict.fromkeys(COCO_FILES, {"shapes": shapes_source, "coco": coco_source})
SOURCES["pan"] = SOURCES["vps"] = SOURCES["det"] | dict.fromkeys(MASK_LAYOUTS, files_source)
SOURCES["gen"] = SOURCES["ar"] = {"shapes": shapes_source} | dict.fromkeys(LAYOUTS, files_source)


# --------------------------------------------------------------------------------------------------
# shapes: a synthetic dataset of drawn scenes, and of clips

KINDS = "circle square triangle figure".split()        # categories 1..4, the last has keypoints
COLORS = {
    "red": (220, 50, 40),
    "green": (50, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (235, 205, 50),
    "purple": (150, 60, 180),
    "white": (240, 240, 240),
}
# Of a figure; left is the viewer's left. The skeleton counts keypoints from 1, as COCO does.
KEYPOINTS = "head left_hand right_hand left_foot right_foot".split()
SKELETON = tuple((1, n) for n in range(2, 6))          # the head and each of the others


def arc(count):
    """(count, 2) yx points of a unit circle."""
    turn = np.arange(count) / count * 2 * np.pi
    return np.stack([np.cos(turn), np.sin(turn)], -1)


POLYGONS = {                                           # yx, of shapes of radius 1
    "circle": arc(20),
    "square": [(-0.9, -0.9), (-0.9, 0.9), (0.9, 0.9), (0.9, -0.9)],
    "triangle": [(-1, 0), (1, 1), (1, -1)],
}
TORSO = (
    (-0.55, 0),                                        # neck
    (0.1, -0.3),                                       # left
    (0.35, 0),                                         # crotch
    (0.1, 0.3))                                        # right


@dataclass
class Shape:
    """One drawn shape. Lengths are fractions of the image's side."""
    kind: str
    color: str
    y: float                                           # centre
    x: float
    radius: float                                      # half its height
    pose: np.ndarray                                   # (4, 2) in [0, 1]: differs between figures

    def place(self, points):
        """(P, 2) yx of a shape of radius 1 around the origin -> fractions of the image."""
        return np.array(points) * self.radius + (self.y, self.x)

    @cached_property
    def keypoints(self):
        """(5, 2) yx fractions of a figure's keypoints, in the order of KEYPOINTS."""
        reach, height = self.pose.T
        hand_y = -0.75 + 1.1 * height[:2]
        hand_x = (0.55 + 0.45 * reach[:2]) * (-1, 1)
        foot_x = (0.2 + 0.7 * height[2:]) * (-1, 1)
        return self.place([(-0.7, 0.0), *zip(hand_y, hand_x), *zip((1.0, 1.0), foot_x)])

    @cached_property
    def polygons(self):
        """A list of (P, 2) arrays of yx fractions: one polygon, or head and body of a figure."""
        if self.kind != "figure":
            return [self.place(POLYGONS[self.kind])]
        head = arc(12) * 0.3 + (-0.7, 0)
        limbs = self.keypoints[[1, 3, 4, 2]]           # around the body, each behind one of TORSO
        body = np.stack([self.place(TORSO), limbs], 1).reshape(-1, 2)
        return [self.place(head), body]


def random_look(rng):
    """Kind and colour of a shape."""
    return rng.choice(KINDS), rng.choice(list(COLORS))


def random_shape(rng, look, smallest, largest):
    """A shape of this kind and colour, its radius in this range, fully inside the image."""
    radius = rng.uniform(smallest, largest)
    center = rng.uniform(radius + 0.01, 0.99 - radius, 2)
    return Shape(*look, *center, radius, rng.random((4, 2)))


def random_scene(rng, max_shapes):
    """1 to max_shapes shapes, fully inside the image, the squares around no two of which overlap by
    more than a tenth (IoU)."""
    shapes = []
    for _ in range(rng.integers(1, max_shapes + 1)):
        look = random_look(rng)
        for _ in range(10):
            shape = random_shape(rng, look, 0.14, 0.26)
            if all(square_iou(shape, other) < 0.1 for other in shapes):
                shapes.append(shape)
                break
    return shapes


def square_iou(a, b):
    """Intersection over union of the squares around two shapes."""
    def overlap(p, q):
        start = max(p - a.radius, q - b.radius)
        end = min(p + a.radius, q + b.radius)
        return max(end - start, 0)

    both = overlap(a.y, b.y) * overlap(a.x, b.x)
    areas = (2 * a.radius) ** 2 + (2 * b.radius) ** 2
    return both / (areas - both)


def background(rng, size, cells, contrast):
    """PIL image that runs through cells x cells random colours, about as dark as each other."""
    grey = rng.integers(40, 130)
    corners = grey + rng.integers(-contrast, contrast + 1, (cells, cells, 3))
    small = Image.fromarray(corners.clip(0, 255).astype(np.uint8))
    return small.resize((size, size), Image.BILINEAR)


def draw_scene(shapes, background):
    """Shapes drawn over a square background in their order, four times as large and then averaged
    (antialiased)."""
    canvas = ImageOps.scale(background, 4, Image.NEAREST)
    draw_polygons(canvas, shapes, [COLORS[shape.color] for shape in shapes])
    return canvas.reduce(4)


def draw_polygons(canvas, shapes, colors):
    """Draws shapes, in their order, onto a square PIL image."""
    pen = ImageDraw.Draw(canvas)
    for shape, color in zip(shapes, colors):
        for polygon in shape.polygons:
            xy = polygon[:, ::-1] * canvas.width
            pen.polygon(xy.ravel().tolist(), fill=color)


def captions_of(shapes):
    """Every sentence about two shapes, "a red circle above a blue square", its inverse included;
    their name if there is only one. A direction counts if they are at least half as far apart in it
    as in the other."""
    def name(shape):
        return f"a {shape.color} {shape.kind}"

    if len(shapes) == 1:
        return [name(shapes[0])]
    sentences = set()
    for a, b in itertools.permutations(shapes, 2):
        y, x = b.y - a.y, b.x - a.x
        if abs(y) >= abs(x) / 2:
            sentences.add(f"{name(a)} {'above' if y > 0 else 'below'} {name(b)}")
        if abs(x) >= abs(y) / 2:
            sentences.add(f"{name(a)} {'left' if x > 0 else 'right'} of {name(b)}")
    return sorted(sentences)


class Drawn(Source):
    """What drawn datasets share. Item i of a split is a pure function of (seed, split, i); in
    training none is seen twice. size: side in pixels; count: of the items; either may be left to
    the kind of data. frames: of a clip; past: earlier ones that are read to learn from one."""
    endless, size = True, 64

    def __init__(self, split, size=None, frames=1, seed=0, count=None, max_shapes=4, past=0):
        check_choice(split, SPLITS, "split")
        self.split, self.seeds = split, (seed, SPLITS.index(split))
        self.size, self.length = size or self.size, count or (1 << 40 if split == "train" else 500)
        self.frames, self.max_shapes, self.past = frames, max_shapes, past

    def __len__(self):
        return self.length

    def count(self, task):
        return self.length                             # a person can be drawn for every number


class Shapes(Drawn):
    """Drawn scenes with COCO-style truth."""
    classes = KINDS
    categories = [{"id": i, "name": kind, "label": i} for i, kind in enumerate(KINDS, 1)]
    categories[-1] |= {"keypoints": KEYPOINTS, "skeleton": SKELETON}

    @property
    def sizes(self):
        """{image id: (height, width)} of what is held out; training has no end."""
        ids = range(1, 1 + self.length) if self.split != "train" else ()
        return dict.fromkeys(ids, (self.size, self.size))

    def __getitem__(self, i):
        """Record i, a dict. N objects; pixel coordinates are floats, (y, x) order, of the image.
        image: PIL RGB    image_id: int    labels: (N,) int64, the label that has a class token
        boxes: (N, 4) float32 yxyx    iscrowd: (N,) bool    polygons: per object a list of (P, 2)
        keypoints: (N, K, 3) float32, y x visibility (0, 1 or 2)    captions: list of str
        """
        return draw_record((*self.seeds, i), self.size, self.max_shapes)

    def person(self, i):
        """A record that has a figure, and which of its objects that is."""
        record = draw_record((*self.seeds, i, 1), self.size, self.max_shapes, needed="figure")
        return record | {"person": record["labels"].tolist().index(len(KINDS))}

    def truth(self, task="det", ending="png"):
        """The whole split as a dict in COCO's format, of which pycocotools makes an index."""
        images, annotations = [], []
        needed = {"kpt": "keypoints", "cap": "caption"}.get(task, "bbox")
        for i in range(len(self)):
            record = self[i]
            image_id = record["image_id"]
            images.append({
                "id": image_id,
                "file_name": f"{image_id:012d}.{ending}",
                "height": self.size,
                "width": self.size})
            found = [coco_object(record, n) for n in range(len(record["labels"]))]
            found += [{"caption": caption} for caption in record["captions"]]
            for annotation in found:
                if needed in annotation:
                    annotations.append(
                        {"id": len(annotations) + 1, "image_id": image_id, **annotation})
        categories = [k for k in self.categories if task not in PER_PERSON or "keypoints" in k]
        return {"images": images, "annotations": annotations, "categories": categories}


@lru_cache(maxsize=512)                                # tasks learned at once see the same scenes
def draw_record(seeds, size, max_shapes, needed=None):
    """The record of a scene; with `needed` the first scene that has such a kind of shape."""
    rng = default_rng(seeds)
    shapes = random_scene(rng, max_shapes)
    while needed and needed not in [shape.kind for shape in shapes]:
        shapes = random_scene(rng, max_shapes)
    polygons = [[np.round(part * size, 2) for part in shape.polygons] for shape in shapes]
    boxes = [[*yx.min(0), *yx.max(0)] for yx in map(np.concatenate, polygons)]
    keypoints = np.zeros((len(shapes), len(KEYPOINTS), 3), np.float32)
    for row, shape in zip(keypoints, shapes):
        if shape.kind == "figure":
            row[:, :2] = np.round(shape.keypoints * size, 2)
            row[:, 2] = 2
    texture = (2, 16) if rng.random() < 0.5 else (6, 8)              # a gradient, or blotches
    return {
        "image": draw_scene(shapes, background(rng, size, *texture)),
        "image_id": seeds[2] + 1,
        "labels": np.array([KINDS.index(shape.kind) + 1 for shape in shapes], np.int64),
        "boxes": np.array(boxes, np.float32),
        "iscrowd": np.zeros(len(shapes), bool),
        "polygons": polygons,
        "keypoints": keypoints,
        "captions": captions_of(shapes),
    }


def coco_object(record, n):
    """Object n of a drawn record -> an annotation in COCO's format."""
    y0, x0, y1, x1 = record["boxes"][n].astype(float).round(2)
    yxv = record["keypoints"][n].astype(float).round(2)
    polygons = record["polygons"][n]
    annotation = {
        "category_id": int(record["labels"][n]),
        "iscrowd": 0,
        "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
        "area": sum(map(polygon_area, polygons)),
        "segmentation": [polygon[:, ::-1].ravel().tolist() for polygon in polygons],
    }
    if yxv.any():
        annotation["keypoints"] = yxv[:, [1, 0, 2]].ravel().tolist()
        annotation["num_keypoints"] = len(yxv)
    return annotation


class ShapeClips(Drawn):
    """One drawn shape on a plain ground, at rest in an image or moving through a clip."""
    classes, size = KINDS, 32

    def __getitem__(self, i):
        """Record i for generation, a dict, as every source for it gives:
        pixels: uint8 (H, W, C), of a clip (T, H, W, C), C is 1 or 3
        label: int, index in the source's classes; -1 unknown
        """
        rng = default_rng((*self.seeds, i, 2))         # 2: unlike Shapes
        shape = random_shape(rng, random_look(rng), 0.22, 0.36)
        grey = tuple(rng.integers(40, 130, 3))
        background = Image.new("RGB", (self.size, self.size), grey)
        turn, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.08)
        track = moving(
            shape, turn, speed, range(self.frames), shape.radius + 0.01, 0.99 - shape.radius)
        frames = [draw_scene([shape], background) for shape in track]
        pixels = np.array(frames if self.frames > 1 else frames[0])
        return {"pixels": pixels, "label": KINDS.index(shape.kind)}


def segment_categories(names, things):
    """Categories of panoptic masks, numbered from 1 on."""
    return [
        {"id": i, "name": name, "isthing": int(name in things), "label": i}
        for i, name in enumerate(names, 1)]


GROUNDS = {"plain": (1, 32), "blotchy": (8, 72)}       # stuff, as options of `background`


class ShapeMaps(Drawn):
    """Drawn scenes with panoptic truth, and clips of them: shapes are things that cross each other,
    leave and return, the ground is stuff of one of two kinds."""
    classes = [*KINDS, *GROUNDS]
    categories = segment_categories(classes, KINDS)

    def __getitem__(self, i):
        """Record i for panoptic masks, a dict, as every source for them gives:
        images: list of PIL RGB, one or the frames of a clip    id: int or str    name: str
        maps: (T, H, W) int32, the segment that a pixel is of, 0 for none
        segments: {its number: {category_id (its label), maybe iscrowd and area}}
        """
        return self.draw(i, range(self.frames))

    def record(self, task, i):
        """To learn from: a frame, and those before it."""
        last = i % self.frames
        return self.draw(i, range(max(last - self.past, 0), last + 1))

    def draw(self, i, times):
        rng = default_rng((*self.seeds, i, 3))
        count = rng.integers(1, self.max_shapes + 1)
        shapes = [random_shape(rng, random_look(rng), 0.14, 0.26) for _ in range(count)]
        turns, speeds = rng.uniform(0, 2 * np.pi, count), rng.uniform(0.02, 0.06, count)
        # They turn outside of the image.
        tracks = [moving(*start, times, -0.2, 1.2) for start in zip(shapes, turns, speeds)]
        stuff = rng.choice(list(GROUNDS))
        ground = background(rng, self.size, *GROUNDS[stuff])
        kinds = [*(shape.kind for shape in shapes), stuff]
        images, maps = [], []
        for moved in zip(*tracks):
            numbers = Image.new("L", (4 * self.size,) * 2, len(kinds))
            draw_polygons(numbers, moved, itertools.count(1))
            images.append(draw_scene(moved, ground))
            maps.append(np.asarray(numbers)[2::4, 2::4])
        return {
            "images": images,
            "id": i + 1,
            "name": f"{i + 1:06}",
            "maps": np.array(maps, np.int32),
            "segments": {
                n: {"category_id": 1 + self.classes.index(kind)}
                for n, kind in enumerate(kinds, 1)},
        }


def moving(shape, turn, speed, times, low, high):
    """The shape at these times, where its coordinates turn back at both ends."""
    room, steps = high - low, np.outer(times, (np.sin(turn), np.cos(turn)))
    path = (shape.y, shape.x) + speed * steps          # (T, 2) yx
    path = high - np.abs((path - low) % (2 * room) - room)
    return [replace(shape, y=y, x=x) for y, x in path]


def export_shapes(folder, count, size, image_format):
    """Write `count` training scenes and 500 held-out ones in COCO's layout."""
    os.makedirs(f"{folder}/annotations", exist_ok=True)
    for split in SPLITS:
        os.makedirs(f"{folder}/{split}2017", exist_ok=True)
        number = count if split == "train" else min(count, 500)
        source = Shapes(split, size, count=number)
        for task in ("det", "kpt", "cap"):             # those of seg are det's
            with open(f"{folder}/annotations/{COCO_FILES[task][0]}_{split}2017.json", "w") as f:
                json.dump(source.truth(task, image_format), f)
        for i in range(number):
            source[i]["image"].save(
                f"{folder}/{split}2017/{i + 1:012d}.{image_format}", quality=95)


# --------------------------------------------------------------------------------------------------
# coco: images and JSON files of the user's

# Others may call programs.
FORMATS = "JPEG PNG WEBP BMP PPM GIF TIFF".split()


def open_image(path):
    """A loaded PIL image, of any mode. path: of a file, or an io.BytesIO. UserError if it cannot be
    read."""
    if isinstance(path, str):
        check_file(path)
    try:
        with Image.open(path, formats=FORMATS) as stored:
            stored.load()
            return stored
    except Exception as e:                             # PIL raises many types for a damaged file
        raise UserError(f"{path}: not a readable image ({e})") from e


def load_image(path, size=None):
    """Any image file -> PIL RGB. size: (height, width) that its labels are for; a photo that is
    stored turned is turned upright unless only the stored form fits it. UserError, naming the file,
    if it cannot be read or fits neither way."""
    stored = open_image(path)
    for image in (ImageOps.exif_transpose(stored), stored):
        width, height = image.size
        if size is None or (height, width) == size:
            return to_rgb(image)
    raise UserError(
        f"{path}: the image is {height}x{width}, its labels are for {size[0]}x{size[1]}")


def to_rgb(image):
    """PIL image of any mode -> RGB; 16 bits are scaled, transparency becomes white."""
    if image.mode.startswith(("I", "F")):              # convert() would clip, not scale
        pixels = np.asarray(image, float)
        top = 65535 if pixels.max() > 255 else 255 if image.mode != "F" else 1
        pixels = pixels.clip(0, top) * (255 / top)
        image = Image.fromarray(pixels.round().astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


class Packed:
    """A list of values, pickled one behind the other. As objects they would take several times the
    memory, and every worker that looks at one would copy it."""

    def __init__(self):
        self.content, self.starts = bytearray(), array("q")

    def __getitem__(self, n):
        return pickle.loads(memoryview(self.content)[self.starts[n]:])     # it knows its own end

    def __len__(self):
        return len(self.starts)

    def append(self, row):
        self.starts.append(len(self.content))
        self.content += pickle.dumps(row, pickle.HIGHEST_PROTOCOL)


class Coco(Source):
    """A dataset in COCO's format: one JSON file and the folder of its images. Records as of Shapes.

    Everything but the pixels is checked here, by the tables of rules below; UserError names each
    kind of problem, with three examples and their number. What the task can do without is left out
    and counted. Category ids in [1, max_label] are the labels, as in the reference; others get the
    free labels from 1 on.

    bad_boxes: what to do about boxes of zero size or more than a pixel outside their image: "error"
               or "drop"
    task:      what annotations are needed for: det, seg, kpt or cap
    known:     categories of a model: those of the file are the ones of the same name
    """

    def __init__(
            self, json_path, image_dir, max_label=899, bad_boxes="error", task="det", known=()):
        self.json_path, self.image_dir, self.task = json_path, image_dir, task
        self.left_out, self.learned = Counter(), Counter()
        check_file(json_path)
        truth, self.annotations = read_annotations(json_path, getmtime(json_path))
        self.sizes = image_sizes(json_path, truth, image_dir)
        self.images = [{key: row[key] for key in IMAGE_KEYS} for row in truth["images"]]
        self.category = read_categories(json_path, truth["categories"], task, known, max_label)
        self.categories = list(self.category.values())
        self.classes = [category["name"] for category in self.categories]
        self.most = check_keypoints(json_path, self.categories) if task in PER_PERSON else 0
        self.rows = Packed()                           # of each image the numbers of annotations
        for numbers in self.group_by_image(bad_boxes):
            self.rows.append(numbers)

    def group_by_image(self, bad_boxes):
        """Of each image the numbers of its annotations, but those to leave out, which it counts.
        UserError with all that is wrong."""
        path, task, sizes = self.json_path, self.task, self.sizes
        check_rows(
            path, {"annotations": self.annotations}, annotation_rules(task, sizes, self.category))
        rows, bad = {image_id: [] for image_id in sizes}, []
        corners = fractions = task != "cap"
        for n, a in enumerate(self.annotations):
            (height, width), why = sizes[a["image_id"]], None
            if task == "cap":
                name = "captions"
                if not (a.get("caption") or "").strip():
                    why = "captions are empty"
            else:
                name = self.category[a["category_id"]]["name"]
                x, y, w, h = a["bbox"]
                corners &= x < w <= width + 1 and y < h <= height + 1
                fractions &= max(x + w, y + h) <= 1
                beyond = min(x, y) < -1 or x + w > width + 1 or y + h > height + 1
                if beyond or min(w, h) == 0:
                    why = BAD_BOXES
                    place = described(f"annotations[{n}]", a, a["bbox"])
                    bad.append(f"{place} in {width}x{height}")
                elif task == "seg" and not mask_of(a, (height, width)):
                    why = "masks have no polygon of three points"
            if why:
                self.left_out[why] += 1
                continue
            rows[a["image_id"]].append(n)
            if not a.get("iscrowd"):
                if task == "seg" and isinstance(a["segmentation"], dict):
                    self.left_out["masks of run lengths are not learned from"] += 1
                else:
                    self.learned[name] += 1
        require(
            not (fractions and self.annotations),
            f"{path}: all boxes lie between 0 and 1, expected pixels")
        if bad_boxes == "error" or corners:
            hint = "they look like x1 y1 x2 y2" if corners else "--bad_boxes=drop leaves them out"
            refuse(path, {f"{BAD_BOXES}, expected x y width height; {hint}": bad})
        self.say_left_out()
        return rows.values()

    def __len__(self):
        return len(self.images)

    def of_image(self, i):
        """Annotations of image i."""
        return [self.annotations[n] for n in self.rows[i]]

    def __getitem__(self, i):
        image = self.images[i]
        size, found = self.sizes[image["id"]], self.of_image(i)
        path = join(self.image_dir, image["file_name"])
        record = {"image": load_image(path, size), "image_id": image["id"]}
        if self.task == "cap":
            return record | {"captions": [a["caption"].strip() for a in found]}
        xy_wh = np.array([a["bbox"] for a in found], np.float32).reshape(-1, 2, 2)
        boxes = xy_wh[..., ::-1].cumsum(1).reshape(-1, 4)
        return record | {
            "labels": np.array([self.category[a["category_id"]]["label"] for a in found], np.int64),
            "boxes": boxes.clip(0, np.array(size * 2, np.float32)),
            "iscrowd": np.array([a.get("iscrowd") for a in found], bool),
            "polygons": [polygons_of(a, size) if self.task == "seg" else [] for a in found],
            "keypoints": np.array([self.keypoints_of(a) for a in found], np.float32).reshape(
                len(found), self.most, 3)[..., [1, 0, 2]],
        }

    def keypoints_of(self, a):
        """x y visibility of each, zeros where they are missing."""
        return self.most and a.get("keypoints") or [0] * 3 * self.most

    @cached_property
    def people(self):
        """(image, object) numbers of annotations with a labelled keypoint that are no crowds."""
        return [
            (i, n) for i in range(len(self)) for n, a in enumerate(self.of_image(i))
            if any(self.keypoints_of(a)[2::3]) and not a.get("iscrowd")]

    def person(self, i):
        """The record that person i is in, and which of its objects that is."""
        image, n = self.people[i]
        return self[image] | {"person": n}

    def truth(self, task="det"):
        """The dataset as a dict in COCO's format, without what was left out. Every task has its own
        file."""
        annotations = []
        for i, image in enumerate(self.images):
            for a in map(without_null, self.of_image(i)):
                if task != "cap":
                    category, keypoints = self.category[a["category_id"]], self.keypoints_of(a)
                    if task in PER_PERSON and not count_keypoints(category):
                        continue
                    a = {
                        "iscrowd": 0,
                        **a,
                        "area": a.get("area") or math.prod(a["bbox"][2:]),
                        "category_id": category["id"],
                        "keypoints": keypoints,
                        "num_keypoints": sum(map(bool, keypoints[2::3])),
                    }
                if task == "seg":
                    a["segmentation"] = mask_of(a, self.sizes[image["id"]])
                annotations.append(a | {"id": len(annotations) + 1})
        return {
            "info": {},                                # which some pycocotools ask for
            "images": self.images,
            "annotations": annotations,
            "categories": self.categories,
        }

    def summary(self, c):
        """What there is to learn from, and what is left out, in numbers."""
        if self.task == "det":
            counts = list(map(len, self.rows))
            over = f"images have more objects than --max_objects, up to {max(counts)}"
            self.left_out[over] = sum(count > c.data.max_objects for count in counts)
        if self.task == "cap":
            self.left_out["captions are cut to --caption_length"] = sum(
                len(c.vocab.text.encode(a["caption"])) > c.data.caption_length
                for i in range(len(self)) for a in self.of_image(i))
        self.say_left_out()
        return {
            "images": len(self),
            "learned": dict(self.learned),
            "left out": dict(+self.left_out)}          # without zeros

    def say_left_out(self):
        for what, number in (+self.left_out).items():
            tokenizer.notice(f"{self.json_path}: left out: {number} {what}")


IMAGE_KEYS = "id file_name height width".split()
BAD_BOXES = "boxes are empty or outside their image"


# Rules: of each key what is expected, and a test of (value, row), or a dict of all right values.
# With a ? it may be missing.

def annotation_rules(kind, sizes, categories):
    """Those of a kind of ROWS. sizes: {image id: (height, width)}; categories: {id: row}"""
    def are_keypoints(v, row):
        right = are_numbers(v, 3 * count_keypoints(categories[row["category_id"]]))
        return right if "results" in kind else not v or right and {0, 1, 2}.issuperset(v[2::3])

    rules = {
        "image_id": ("the id of an image", sizes),
        "id": ("a number that no other has", once()),
        "caption": ("text", lambda v, row: type(v) is str),
        "category_id": ("the id of a category", categories),
        "bbox": (
            "x y width height in pixels",
            lambda v, row: are_numbers(v, 4) and min(v[2:]) >= 0),
        "iscrowd": IS_CROWD,
        "area": ("a number of at least 0", lambda v, row: is_number(v) and v >= 0),
        "segmentation": (
            "polygons, or run lengths that are as many pixels as its image has",
            lambda v, row: type(v) is list or are_runs(v, sizes[row["image_id"]])),
        "keypoints": (
            "x y visibility (0, 1 or 2) of each keypoint of its category", are_keypoints),
        "score": ("a number", is_number),
    }
    return {key: rules[key.rstrip("?")] for key in ROWS[kind].split()}


OBJECT = "image_id id? category_id bbox iscrowd? area?"
ROWS = {                               # what rows of annotations have, or of results
    "det": OBJECT,
    "seg": f"{OBJECT} segmentation?",
    "kpt": f"{OBJECT} keypoints?",
    "cap": "image_id id? caption?",
    "det results": "image_id category_id bbox score",
    "seg results": "image_id category_id segmentation score",
    "kpt results": "image_id category_id keypoints score",
    "cap results": "image_id caption",
}


def is_number(v, row=None):
    return type(v) in (int, float) and abs(v) < 1e9    # nor is it NaN


def is_size(v, row=None):
    return type(v) is int and v > 0


def is_text(v, row=None):
    return type(v) is str and v.strip() != ""


IS_CROWD = "0 or 1", lambda v, row: type(v) in (int, bool) and v in (0, 1)
PIXELS = "pixels, a whole number", is_size


def once(kinds=(int, str)):
    """A test for values of one of these types that it has not seen yet."""
    seen = set()

    def test(v, row):
        kind = type(next(iter(seen), v))               # either all are numbers or all are text
        is_new = type(v) is kind and kind in kinds and v not in seen
        if is_new:
            seen.add(v)
        return is_new

    return test


def are_numbers(v, count):
    return len(v) == count and all(map(is_number, v))


def are_runs(v, size):
    """Whether run lengths, a list or COCO's text, are a mask of this size."""
    runs = v["counts"]
    if type(runs) is str:
        runs = run_lengths(runs)
    return tuple(v["size"]) == size and min(runs) >= 0 and sum(runs) == math.prod(size)


def run_lengths(text):
    """COCO's text of run lengths -> list of them: five bits per letter, the lowest first, and from
    the third on the difference to the one before the last."""
    runs, value, shift = [], 0, 0
    for letter in text:
        bits = ord(letter) - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def described(place, row, value):
    count = f"{len(value)} values " if isinstance(value, list) else ""
    return f"{place} (id {row.get('id')!r}) has {count}{reprlib.repr(value)}"


def check_rows(path, lists, rules):
    """UserError about what breaks a rule in lists of a file, {name: rows}."""
    problems = {}
    for name, rows in lists.items():
        for n, row in enumerate(rows):
            place = f"{name}[{n}]"
            if type(row) is not dict:
                raise UserError(f"{path}: {place} is {reprlib.repr(row)}, expected an object")
            for rule, (expected, test) in rules.items():
                key = rule.rstrip("?")
                value = row.get(key)
                try:
                    right = value in test if isinstance(test, dict) else test(value, row)
                except (TypeError, ValueError, ArithmeticError, LookupError):
                    right = False
                if not (right or value is None and key != rule):
                    what = f"wrong values of {key}, expected {expected}"
                    problems.setdefault(what, []).append(described(place, row, value))
    refuse(path, problems)


def refuse(path, problems):
    """UserError about a file if there is any {what: names of those}: the first three names of the
    first kind, and how many there are of each other one."""
    kinds = {f"{len(names)} {what}": names for what, names in problems.items() if names}
    if kinds:
        first, *others = kinds
        names = kinds[first]
        shown = ", ".join(map(str, names[:3]))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError("; ".join([f"{path}: {first}: {shown}{more}", *others]))


def check_keypoints(path, categories):
    """How many keypoints categories have. UserError if none has any, or some have more."""
    counts = {row["name"]: count_keypoints(row) for row in categories if count_keypoints(row)}
    require(
        len(set(counts.values())) == 1,
        f"{path}: keypoints of categories: {counts or 'none'}, expected lists of one length")
    return max(counts.values())


def without_null(row):
    return {key: value for key, value in row.items() if value is not None}


def count_keypoints(category):
    return len(category.get("keypoints", ()))


def mask_of(a, size):
    """An annotation's mask as pycocotools takes it: run lengths, or polygons [x, y, x, y, ...] of
    three points or more, which may be given as pairs, or one alone. None if there is none."""
    parts, found = a.get("segmentation"), []
    if not isinstance(parts, list):
        return parts
    if not all(isinstance(part, list) for part in parts) or {2} == set(map(len, parts)):
        parts = [parts]                                # all of them are one polygon
    for part in parts:
        with suppress(TypeError, ValueError, OverflowError):
            given = np.array(part, float)
            xy = given.reshape(-1, 2)
            near = np.abs(xy / size[::-1] - 0.5) <= 1.5            # NaN is not
            if len(xy) >= 3 and given.shape[1:] in ((), (2,)) and near.all():
                found.append(given.ravel().tolist())
    return found or None


def polygons_of(a, size):
    """An annotation's polygons, a list of (P, 2) yx arrays; none if it is a run-length mask, as
    crowds are."""
    mask = mask_of(a, size)
    parts = mask if isinstance(mask, list) else []
    return [np.array(xy, np.float32).reshape(-1, 2)[:, ::-1] for xy in parts]


@lru_cache(maxsize=1)                                  # tasks that share a file read it once
def read_annotations(path, time):
    """An annotation file -> the dict, and its annotations, Packed while it is read. time: when the
    file was last written, as a file that has changed is read again."""
    packed = Packed()

    def pack(row):
        if "image_id" not in row:
            return row
        packed.append(row)                             # and None takes its place

    truth = read_json(path, hook=pack)
    if truth["annotations"] != [None] * len(packed):   # others have an image_id, or some have none
        truth, packed = read_json(path), Packed()
        for row in truth["annotations"]:
            packed.append(row)
    return truth, packed


def read_results(path, sizes, categories, task="det"):
    """Results of a task in COCO's format. UserError for what is wrong. sizes: {image id: (height,
    width)}; categories: {id: row}"""
    rows = parse_json(path)
    require(isinstance(rows, list), f"{path}: expected a list, as in COCO's format of results")
    check_rows(path, {"results": rows}, annotation_rules(f"{task} results", sizes, categories))
    return rows


def image_sizes(path, truth, image_dir):
    """{image id: (height, width)} of a file in COCO's format. UserError if what is said about its
    images is wrong; image_dir: the folder that has them, if it is to be looked at."""
    images = truth["images"]
    check_rows(path, {"images": images}, {
        "id": ("a number or text that no other has", once()),
        "file_name": ("the name of a file", is_text),
        "height": PIXELS,
        "width": PIXELS,
    })
    require(images, f"{path}: no images")
    if image_dir is not None:
        check_folder(image_dir, f"the images of {path}")
        refuse(path, {f"images are not in {image_dir}": missing_files(image_dir, images)})
    return {image["id"]: (image["height"], image["width"]) for image in images}


def parse_json(path, hook=None):
    """What a JSON file holds. hook: what each dict in it becomes. UserError if it is none."""
    content = read_bytes(path)
    try:
        content = content.decode(json.detect_encoding(content))           # frees the bytes
        return json.loads(content, object_hook=hook)
    except (ValueError, RecursionError) as e:          # UnicodeDecodeError, too
        raise UserError(f"{path}: not JSON ({e})") from e


def read_json(path, lists=("images", "annotations"), hook=None):
    """An annotation file -> dict with these lists, and that of its categories. hook: as above."""
    content = parse_json(path, hook)
    truth = {"categories": []}                         # captions have none
    truth |= content if isinstance(content, dict) else {}
    for key in (*lists, "categories"):
        require(
            isinstance(truth.get(key), list),
            f"{path}: expected an object with a list {key!r}, as in COCO's format")
    return truth


def missing_files(folder, rows):
    """The file names of rows (paths relative to the folder) that it lacks; lists each folder once,
    not each file."""
    names, present = [row["file_name"] for row in rows], set()
    for sub in set(map(dirname, names)):
        path = join(folder, sub)
        if isdir(path):
            present |= {(sub, file) for file in os.listdir(path)}
    return [name for name in names if os.path.split(name) not in present]


def read_categories(path, rows, task, known, max_label=0):
    """{id of a file's category: what is kept of it, and its label}. UserError if something is wrong
    with them. known, max_label: as of Coco."""
    rules = {
        "id": ("a number that no other has", once((int,))),
        "name": ("text", is_text),
    }
    keys = "id name isthing"
    if task in PER_PERSON:
        rules["keypoints?"] = "names", lambda v, row: type(v) is list and all(map(is_text, v))
        rules["skeleton?"] = (
            "pairs of numbers of keypoints",
            lambda v, row: all(0 < min(a, b) and max(a, b) <= count_keypoints(row) for a, b in v))
        keys += " keypoints skeleton"
    if task == "pan":
        rules["isthing"] = IS_CROWD
    check_rows(path, {"categories": rows}, rules)
    if known:
        return matched(path, rows, known)
    if task == "pan":                                  # labels count them by id
        rows.sort(key=lambda row: row["id"])
        labels = itertools.count(1)
    else:
        labels = assign_labels([row["id"] for row in rows], max_label, path).values()
    return {
        row["id"]: without_null({key: row.get(key) for key in keys.split()}) | {"label": label}
        for row, label in zip(rows, labels)}


def matched(path, rows, known):
    """{id of a file's category: the one of that name among `known`, those of a model}. UserError if
    there is none. One that a model knows by its number alone may be called anything."""
    ours = {row["name"]: row for row in known} | {(row["id"], row["name"]): row for row in known}
    found, strange = {}, []
    for row in rows:
        i, name = row["id"], row["name"]
        found[i] = ours.get((i, name)) or ours.get(name) or ours.get((i, str(i)))
        if not found[i]:
            strange.append(repr(name))
    names = ", ".join(ours["name"] for ours in known[:10])
    refuse(path, {f"categories are none of the model's, which has {names}": strange})
    moved = [ours["name"] for i, ours in found.items() if ours["id"] != i]
    if moved:
        tokenizer.notice(
            f"{path}: {len(moved)} categories have other ids, such as {moved[0]}: taken by name")
    return found


def assign_labels(ids, max_label, where):
    """{category id: label in 1..max_label}: ids that can be labels stay, others take the free
    labels from 1 on."""
    require(
        len(ids) <= max_label,
        f"{where}: {len(ids)} categories, there is room for {max_label}: raise coord_shift")
    possible = range(1, max_label + 1)
    free = (n for n in possible if n not in ids)
    return {i: i if i in possible else next(free) for i in ids}


# --------------------------------------------------------------------------------------------------
# panoptic masks of the user's. Records as of ShapeMaps

@dataclass
class MaskClips(Source):
    """Images and videos with panoptic truth.

    clips: [(id, name, paths of images, maps)], an image is a clip of one frame; without paths of
           images, records have none
    read:  a map, such as its path -> numbers of segments (H, W) and {number: row}, as in records
    past:  earlier frames that are read to learn from a frame
    """
    clips: list
    read: object
    categories: list
    past: int = 0

    def __post_init__(self):
        self.frames = [(n, t) for n, clip in enumerate(self.clips) for t in range(len(clip[3]))]

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        return self.window(i, 0, None)

    def count(self, task):
        return len(self.frames)

    def record(self, task, i):
        """To learn from: a frame, and those before it."""
        n, last = self.frames[i]
        return self.window(n, max(last - self.past, 0), last + 1)

    def window(self, n, start, end):
        clip_id, name, images, maps = self.clips[n]
        numbers, rows = zip(*map(self.read, maps[start:end]))
        check_sizes(name, numbers)
        return {
            "images": [load_image(path, m.shape) for path, m in zip(images[start:end], numbers)],
            "id": clip_id,
            "name": name,
            "maps": np.stack(numbers),
            "segments": {number: row for frame in rows for number, row in frame.items()},
        }


def check_sizes(name, frames):
    """UserError if frames, arrays or PIL images of a clip, differ in size."""
    sizes = {np.shape(frame)[:2] for frame in frames}
    require(len(sizes) <= 1, f"{name}: frames of different sizes (height, width): {sizes}")


def coco_maps(json_path, masks, image_dir=None, past=0, videos=False, truth_json="", known=()):
    """Images with COCO's panoptic format: a JSON file, a folder of PNGs whose colour R + 256 G +
    65536 B is the id of a segment, 0 of none, and the folder of the images, if they are to be read.
    Labels count the categories by id. All is checked here, of more than 2000 images the ids in the
    PNGs of the first 2000, as in Coco.

    known:      as of Coco
    videos:     names of images begin with that of their video, and a _
    truth_json: of what the JSON file holds the results; it has the images and categories
    """
    truth = read_json(truth_json or json_path)
    if truth_json:
        truth["annotations"] = read_json(json_path, ("annotations",))["annotations"]
    check_folder(masks, f"the PNGs of {json_path}")
    category = read_categories(truth_json or json_path, truth["categories"], "pan", known)
    of_image, clips = check_coco_maps(json_path, truth, masks, image_dir, category), {}
    for n, image in enumerate(truth["images"]):
        clip_id = image["id"]
        annotation = of_image[clip_id]
        name = splitext(image["file_name"])[0]
        if videos:
            clip_id = name = name.partition("_")[0]
        clip = clips.setdefault(clip_id, (clip_id, name, [], []))
        if image_dir is not None:
            clip[2].append(f"{image_dir}/{image['file_name']}")
        segments = {
            row["id"]: without_null(row) | {"category_id": category[row["category_id"]]["label"]}
            for row in annotation["segments_info"]}
        listed = f"{masks}/{annotation['file_name']}", segments
        if n < 2000:
            check_listed(*listed, image)
        clip[3].append(listed)
    return MaskClips(list(clips.values()), read_listed, known or list(category.values()), past)


def read_listed(listed):
    """A PNG whose segments a JSON file lists."""
    path, segments = listed
    return read_ids(path), segments


def check_listed(path, segments, image):
    """UserError if such a PNG is not of its image's size, or has other segments."""
    ids, size = read_ids(path), (image["height"], image["width"])
    require(ids.shape == size, f"{path}: height and width are {ids.shape}, of its image {size}")
    found = set(np.unique(ids).tolist()) - {0}
    refuse(path, {
        "ids are not in segments_info": sorted(found - segments.keys()),
        "ids in segments_info are not there": sorted(segments.keys() - found),
    })


def check_coco_maps(path, truth, masks, image_dir, known):
    """{id of an image: its annotation}. UserError if annotations or their segments (known: ids of
    categories) are wrong."""
    sizes, is_new, annotations = image_sizes(path, truth, image_dir), once(), truth["annotations"]
    check_rows(path, {"annotations": annotations}, {
        "image_id": ("the id of an image, once", lambda v, row: v in sizes and is_new(v, row)),
        "file_name": ("the name of a PNG", is_text),
        "segments_info": ("a list", lambda v, row: type(v) is list),
    })
    segments = {
        f"annotations[{n}] ({a['file_name']}) segments_info": a["segments_info"]
        for n, a in enumerate(annotations)}
    check_rows(path, segments, {
        "id": ("a whole number above 0", is_size),
        "category_id": ("the id of a category", known),
        "iscrowd?": IS_CROWD,
        "area?": ("a number above 0", lambda v, row: is_number(v) and v > 0),
    })
    of_image = {a["image_id"]: a for a in annotations}
    refuse(path, {
        "images have no annotation": [i for i in sizes if i not in of_image],
        f"PNGs are not in {masks}": missing_files(masks, annotations),
    })
    return of_image


def read_ids(path, green=1 << 8, blue=1 << 16):
    """A PNG -> the number that each pixel's colour is (H, W) int32; green, blue: what they count.
    UserError if it cannot be read or has no colours."""
    pixels = read_png(path, ("RGB", "RGBA"), "colours R + 256 G + 65536 B")
    return pixels[..., :3] @ np.array([1, green, blue], np.int32)


def read_png(path, modes, what):
    """The values of an image of one of these modes of PIL."""
    stored = open_image(path)
    require(stored.mode in modes, f"{path}: a {stored.mode} image, expected {what}")
    return np.asarray(stored)


CITYSCAPES = (
    "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky "
    "person rider car truck bus train motorcycle bicycle").split()
FOLLOWED = "person", "car"                             # things of KITTI-STEP


def read_step(path):
    """A map of KITTI-STEP: red is the class, 255 none, green and blue the instance."""
    colours = read_ids(path, green=1 << 16, blue=1 << 8)     # 256 times the instance, and the class
    numbers = np.where(colours % 256 < len(CITYSCAPES), colours + 1, 0)
    return numbers, {
        n: {"category_id": n % 256, "iscrowd": int(n < 256 and CITYSCAPES[n - 1] in FOLLOWED)}
        for n in np.setdiff1d(numbers, 0).tolist()}


def read_davis(path):
    """A map of DAVIS: a palette image of instances, 0 is the background, 255 not annotated."""
    ids = read_png(path, ("P", "L"), "a palette").astype(np.int32)
    numbers = (ids + 1) % 256                          # 255 becomes 0
    return numbers, {
        n: {"category_id": 1 + (n > 1)} for n in np.setdiff1d(numbers, 0).tolist()}


# of clips, as MaskClips has them, the source
step_clips = partial(
    MaskClips, read=read_step, categories=segment_categories(CITYSCAPES, FOLLOWED))
davis_clips = partial(
    MaskClips, read=read_davis, categories=segment_categories(["background", "object"], ["object"]))


def kitti_step(folder, split, past=0):
    """KITTI-STEP in a folder as of MASK_LAYOUTS."""
    images = f"{folder}/images/{split}"
    if not isdir(images):
        images = f"{folder}/training/image_02"
    return step_clips(clip_files(images, f"{folder}/panoptic_maps/{split}"), past=past)


def cityscapes_vps(folder, split, past=0):
    """Cityscapes-VPS in a folder as of MASK_LAYOUTS."""
    return coco_maps(
        f"{folder}/panoptic_gt_{split}_city_vps.json",
        f"{folder}/{split}/panoptic_video",
        f"{folder}/{split}/img",
        past,
        videos=True)


def davis(folder, split, past=0):
    """DAVIS in a folder as of MASK_LAYOUTS."""
    listed = f"{folder}/ImageSets/2017/{split}.txt"
    require(exists(listed), f"{listed}: no such file, expected the names of the videos")
    names = read_bytes(listed).decode().split()
    maps = f"{folder}/Annotations_unsupervised/480p"
    if not isdir(maps):
        maps = f"{folder}/Annotations/480p"
    return davis_clips(clip_files(f"{folder}/JPEGImages/480p", maps, names), past=past)


def clip_files(images, maps, names=None):
    """Folders of frames and of maps, per video -> clips of MaskClips. UserError if a frame has no
    map, a map no frame, or frames in the middle are missing."""
    check_folder(maps, "a folder of PNGs per video")
    clips = []
    for name in names or listing(maps)[0]:
        frames, found = frame_files(f"{images}/{name}"), frame_files(f"{maps}/{name}")
        numbers = set(map(int, filter(str.isdecimal, frames)))
        gaps = set(range(min(numbers), max(numbers))) - numbers if numbers else ()
        refuse(f"{images}/{name}", {
            "frames have no map": sorted(frames.keys() - found),
            "maps have no frame": sorted(found.keys() - frames),
            "frames are missing": sorted(gaps),
        })
        clips.append((name, name, list(frames.values()), [found[stem] for stem in frames]))
    require(clips, f"{maps}: no video")
    return clips


def frame_files(folder):
    """{name without its ending: path} of the images in a folder, 9.png before 10.png."""
    check_folder(folder, "the frames of a video")
    files = sorted(listing(folder)[1], key=len)
    require(files, f"{folder}: no frames, expected image files")
    return {splitext(file)[0]: f"{folder}/{file}" for file in files}


# --------------------------------------------------------------------------------------------------
# images and clips to generate: files of the user's

class PixelArrays(Source):
    """Images in memory: pixels (N, H, W, C) uint8, labels (N,). Records as of ShapeClips.
    UserError, naming `where`, if they do not fit."""

    def __init__(self, pixels, labels, classes, where="images in memory"):
        require(
            len(pixels) == len(labels), f"{where}: {len(pixels)} images, but {len(labels)} labels")
        low, high = min(labels, default=0), max(labels, default=0)
        require(
            low >= -1 and high < len(classes),
            f"{where}: labels from {low} to {high}, expected less than {len(classes)}")
        self.pixels, self.labels, self.classes = pixels, labels, list(classes)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return {"pixels": self.pixels[i], "label": int(self.labels[i])}


def held_out(count, split, every):
    """Which of `count` items are a split's: every `every`-th is held out, beginning with the first,
    but never the only one."""
    check_choice(split, TWO_SPLITS, "split")
    is_val = (np.arange(count) % every == 0) & (count > 1)
    return np.flatnonzero(is_val == (split == "val"))


def read_bytes(path):
    """Content of a file, unpacked if it is a .gz. UserError, naming it, if it cannot be read."""
    check_file(path)
    opened = gzip.open if path.endswith(".gz") else open
    try:
        with opened(path, "rb") as f:
            return f.read()
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: cannot be read ({e})") from e


def load_mnist(folder, split):
    """MNIST, or data in its format -> PixelArrays of (28, 28, 1). val is the t10k part; if no other
    is there, every tenth image of it is val and the others are train. UserError names the file and
    what was expected."""
    shared = not find_file(folder, "train-*idx?-ubyte*")
    part = "t10k" if shared or split == "val" else "train"
    images = find_file(folder, f"{part}-images?idx3-ubyte*")     # - or . before idx, maybe .gz
    labels = find_file(folder, f"{part}-labels?idx1-ubyte*")
    require(
        images and labels,
        f"{folder}: no images or labels for {split}, expected {LAYOUTS['mnist']}")
    pixels = read_idx(images, 3)[..., None]
    targets = read_idx(labels, 1)
    source = PixelArrays(pixels, targets, "0123456789", f"{images}, {labels}")
    if shared:
        rows = held_out(len(source), split, 10)
        source.pixels, source.labels = pixels[rows], targets[rows]
    return source


def find_file(folder, *patterns):
    """The path of the first file in a folder that fits a pattern, or None."""
    for pattern in patterns:
        for name in sorted(glob.glob(pattern, root_dir=folder)):
            return f"{folder}/{name}"


def read_idx(path, dims):
    """An idx file of bytes -> uint8 array of `dims` dimensions."""
    content, magic = read_bytes(path), bytes([0, 0, 8, dims])
    require(
        content[:4] == magic,
        f"{path}: begins with {content[:4].hex()}, expected {magic.hex()}, idx in {dims}D")
    header = 4 + 4 * dims
    shape = [int.from_bytes(content[at:at + 4], "big") for at in range(4, header, 4)]
    expected = header + math.prod(shape)
    require(
        len(content) == expected,
        f"{path}: {len(content)} bytes, expected {expected} for {' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def load_cifar10(folder, split):
    """CIFAR-10's binary version -> PixelArrays of (32, 32, 3); in the folder, or in the one of its
    archive in there. UserError names the file and what was expected."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    rows = []                                          # label, then red, green, blue
    for name in names if split == "train" else ["test_batch.bin"]:
        path = find_file(folder, name, f"cifar-10-batches-bin/{name}")
        require(path, f"{folder}: no {name}, expected {LAYOUTS['cifar10']}")
        content = np.frombuffer(read_bytes(path), np.uint8)
        most = max(content[::3073], default=0)
        require(
            len(content) and not len(content) % 3073 and most <= 9,
            f"{path}: {len(content)} bytes, labels up to {most}, expected 3073 bytes per image "
            f"and labels up to 9, as in the CIFAR-10 binary version")
        rows.append(content.reshape(-1, 3073))
    rows = np.concatenate(rows)
    pixels = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return PixelArrays(pixels, rows[:, 0], CIFAR10_CLASSES, folder)


class ClipFolder(Source):
    """A folder of images, or of a folder of frames per video; either maybe in a folder per class.
    Records as of ShapeClips: an image (*size, 3), or with `frames` a window of so many frames that
    follow each other, (frames, *size, 3).

    split: the subfolder of that name; if there are none, every twentieth image of a class, or video
    of all, is val and the others are train. Labels count the class folders by name, those of train;
    without class folders they are -1. Frames are sorted by the length of their names, then by name,
    so that 9.png comes before 10.png. Videos that are too short are left out, with a notice.
    UserError if there is nothing to be found; an unreadable image raises it when it is asked for.
    """

    def __init__(self, folder, split, size, frames=None):
        self.size, self.frames = tuple(size), frames or 1
        videos = frames is not None
        layout = LAYOUTS["videos" if videos else "images"]
        divided = any(isdir(f"{folder}/{name}") for name in SPLITS)
        root = f"{folder}/{split}" if divided else folder
        check_folder(root, layout)
        folders, files = listing(root)
        if folders and files and not videos:
            raise UserError(
                f"{root}: images such as {files[0]} beside folder {folders[0]}, expected {layout}")

        def share(items):
            if divided:
                return items
            return [items[i] for i in held_out(len(items), split, 20)]

        # Of folders of images there is one, or one per video; or that many per class.
        by_class = not any(names for _, names in image_folders(root, videos))
        self.classes = listing(f"{folder}/train" if divided else root)[0] if by_class else []
        self.clips, short = [], []                     # (folder, names of frames, label)
        for path, names in image_folders(root, videos + by_class):
            name = relpath(path, root).split(os.sep)[0]
            require(
                not by_class or name in self.classes,
                f"{root}/{name}: a class that is not in {folder}/train, which has "
                f"{', '.join(self.classes[:5]) or 'none'}")
            names = sorted(names, key=len) if videos else share(names)
            if len(names) < self.frames:
                short.append(path)
                continue
            self.clips.append((path, names, self.classes.index(name) if by_class else -1))
        if videos:
            if short:
                tokenizer.notice(
                    f"{root}: left out {len(short)} of {len(short + self.clips)} videos, shorter "
                    f"than {self.frames} frames, such as {short[0]}")
            self.clips = share(self.clips)
        self.windows = np.array([                      # a clip's number, its first frame
            (n, start) for n, (_, names, _) in enumerate(self.clips)
            for start in range(len(names) - self.frames + 1)])
        kind = f"video of {self.frames} frames or more" if videos else "image"
        require(self.clips, f"{root}: no {kind} for {split}, expected {layout}")

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, i):
        n, start = self.windows[i]
        folder, names, label = self.clips[n]
        frames = [
            fit_image(f"{folder}/{name}", self.size) for name in names[start:start + self.frames]]
        pixels = np.stack(frames) if self.frames > 1 else frames[0]
        return {"pixels": pixels, "label": label}


def image_folders(root, depth):
    """The folders `depth` levels below one: [(path, names of its images)], in order."""
    folders, files = listing(root)
    if not depth:
        return [(root, files)]
    return [found for name in folders for found in image_folders(f"{root}/{name}", depth - 1)]


def listing(folder):
    """Names of the subfolders and of the image files in a folder, both sorted. Hidden ones are left
    out."""
    folders, files = [], []
    for entry in os.scandir(folder):
        name = entry.name
        if name.startswith("."):
            continue
        if entry.is_dir():
            folders.append(name)
        elif name.lower().endswith(IMAGE_KINDS):
            files.append(name)
    return sorted(folders), sorted(files)


def fit_image(path, size):
    """An image file -> uint8 (*size, 3): its centre in the shape of `size`, resized (bicubic,
    antialiased)."""
    return np.asarray(ImageOps.fit(load_image(path), size[::-1]))


# --------------------------------------------------------------------------------------------------
# a look at the data

def tile(pictures, columns=4, gap=4):
    """PIL pictures -> one, in rows of `columns`, each cell as large as the largest."""
    cell = np.max([picture.size for picture in pictures], 0) + gap         # width, height
    corners = [(i % columns, i // columns) * cell for i in range(len(pictures))]
    sheet = Image.new(pictures[0].mode, tuple(np.max(corners, 0) + cell - gap), "white")
    for picture, corner in zip(pictures, corners):
        sheet.paste(picture, tuple(corner))
    return sheet


def save_grid(pixels, stem, columns=8, side=64, gap=2):
    """Images (N, H, W, C) uint8 -> STEM.png, a grid with rows of `columns`, small images enlarged
    to some `side` pixels; clips (N, T, H, W, C) -> STEM.gif, a grid that moves. Returns the file's
    name."""
    zoom = max(1, round(side / pixels.shape[-2]))
    pixels = pixels.repeat(zoom, -3).repeat(zoom, -2)
    clips = pixels if pixels.ndim == 5 else pixels[:, None]        # (N, T, H, W, C)
    if clips.shape[-1] == 1:
        clips = clips[..., 0]
    return save_film([
        tile(list(map(Image.fromarray, images)), columns, gap)
        for images in clips.swapaxes(0, 1)], stem)


def save_film(pictures, stem):
    """One PIL picture -> STEM.png; several -> STEM.gif, 150 ms each. Returns the file's name."""
    first, *others = pictures
    path = f"{stem}.gif" if others else f"{stem}.png"
    first.save(path, save_all=bool(others), append_images=others, duration=150, loop=0)
    return path


def check_dataset(json_path, image_dir):
    """Prints what a dataset in COCO's format holds, and draws sixteen of its images beside it, into
    JSON.png."""
    import sample

    source = Coco(json_path, image_dir, bad_boxes="drop")
    c = sample.Config(categories=source.categories)
    sizes, boxes = list(source.sizes.values()), list(map(len, source.rows))
    pictures = []
    for i in default_rng(0).permutation(len(source))[:16]:
        record = source[i]
        said = {"objects": sample.true_objects(record, source.categories)}
        pictures.append(ImageOps.contain(sample.draw(record["image"], said, c), (384, 384)))
    tile(pictures).save(f"{json_path}.png")
    print(json.dumps(source.summary(c), indent=1))
    print(
        f"{np.min(sizes, 0)} to {np.max(sizes, 0)} pixels high and wide; {min(boxes)} to "
        f"{max(boxes)} boxes, {np.mean(boxes):.1f} on average; some are drawn in {json_path}.png")


@dataclass
class ExportOptions:
    """Which shapes to write."""
    export: str = ""                    # folder for shapes in COCO's layout
    count: Count = 1000                 # training scenes to export, with 500 held-out ones
    size: between(16) = 64              # side of a scene or clip in pixels
    format: Literal["jpg", "png"] = "jpg"   # of the exported images


@tokenizer.script
def main():
    import sample

    parser, args = sample.Parser(description=__doc__), ExportOptions()
    parser.add_argument(
        "--check", nargs=2, metavar=("JSON", "FOLDER"),
        help="boxes in COCO's format, and their images, to look at")
    parser.add_config(args)
    parser.parse_args(namespace=args)
    if args.check:
        return check_dataset(*args.check)
    if not args.export:
        parser.error("expected --check or --export")
    require(
        not exists(f"{args.export}/annotations"),
        f"{args.export}: holds annotations, expected a new folder")
    export_shapes(args.export, args.count, args.size, args.format)
    print(f"wrote {args.export}; next: python train.py --data=coco --data_dir={args.export}")


if __name__ == "__main__":
    main()
