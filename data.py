"""Images and labels: where they come from, how they are augmented, how they become batches.

Every source gives records (see `Shapes.__getitem__`, and `ShapeClips.__getitem__` for generation);
a task makes a training example of a record; examples become a Batch of tokens or of pixels.
Augmentation follows Pix2Seq (arXiv 2109.10852, section 2.4 and appendix B; 2206.07669 for instances
and captions). A training stream is a pure function of (seed, position), so any number of workers,
processes or restarts sees the same examples. Only uint8 pixels leave a worker; they become floats
on the device.
Left out: downloads, every path is the user's; video files, a video is a folder of its frames;
random crops in generation.

    python data.py --sheet shapes.png                   # a look at the synthetic shapes
    python data.py --export DIR --count 1000            # write them as a COCO dataset
"""
import argparse
import functools
import gzip
import itertools
import json
import math
import os
import signal
import warnings
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

import tokenizer
from tokenizer import FAKE_LABEL, INVISIBLE_POINT, PAD_LABEL, PAD_POINT, SEPARATOR_POINT

PAD_VALUE = 0.3                                        # grey of the padding, as in the reference


class DataError(ValueError):
    """Something is wrong with the user's data; the message names the file and what was expected."""


@dataclass(frozen=True)
class DataConfig:
    """Where data come from, and how they become examples."""
    tasks: tuple[str, ...] = ("det",)   # what to learn: some of det,seg,kpt,cap; or gen
    data: str = "shapes"                # shapes, coco; gen: shapes, mnist, cifar10, images, videos
    data_dir: str = ""                  # coco: train2017/, val2017/, annotations/; gen: the files
    train_json: str = ""                # coco: instances for training, if not in data_dir
    train_keypoints: str = ""           # coco: the same for kpt
    train_captions: str = ""            # coco: the same for cap
    train_images: str = ""              # coco: their images
    val_json: str = ""                  # coco: instances held out
    val_keypoints: str = ""             # coco: the same for kpt
    val_captions: str = ""              # coco: the same for cap
    val_images: str = ""                # coco: their images
    bad_boxes: str = "error"            # coco: empty boxes, or outside their image: error or drop
    max_shapes: int = 4                 # shapes: most shapes in a scene
    data_seed: int = 0                  # shapes: dataset seed
    val_count: int = 500                # shapes: held-out scenes
    max_objects: int = 100              # det: most objects in a sequence, noise boxes counted
    scale_min: float = 0.3              # det, cap: scale jitter, smallest image / canvas
    scale_max: float = 2.0              # det, cap: scale jitter, largest
    flip: bool = True                   # det, seg, gen: mirror half of the images
    noise_boxes: bool = True            # det: fill sequences up with noise boxes
    noise_weight: float = 1.0           # det: loss weight of the class of a noise box
    pad_weight: float = 0.1             # det: loss weight of padding, of ending the sequence
    max_instances: int = 10             # seg: objects to learn from an image
    max_points: int = 128               # seg: points of an object's polygons
    instance_scale_min: float = 0.3     # seg, kpt: scale jitter, smallest
    instance_scale_max: float = 1.0     # seg, kpt: scale jitter, largest
    crop_margin: float = 0.5            # kpt: the crop is the box and this times its size around it
    invisible_weight: float = 0.1       # kpt: loss weight of an invisible keypoint
    captions_per_image: int = 5         # cap: captions to learn from an image
    caption_length: int = 128           # cap: most pieces of a caption
    caption_drop: float = 0.5           # cap: probability that an input token is hidden
    caption_pad_weight: float = 1.0     # cap: loss weight of padding
    caption_flip: bool = True           # cap: mirror half of the images, which makes left right
    color_jitter: float = 0.5           # cap: strength of the colour distortion
    image_channels: int = 3             # gen: colours of an image, 1 or 3


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
            if isinstance(x, dict):
                return {key: put(value) for key, value in x.items()}
            return x.to(device, non_blocking=True) if torch.is_tensor(x) else x

        batch = Batch(*map(put, self))
        if self.images is None:
            return batch
        return batch._replace(images=to_images(batch.images, batch.sizes))


def to_images(pixels, sizes):
    """uint8 (B, H, W, 3) and sizes (B, 2) of the unpadded parts -> float (B, 3, H, W) in [0, 1],
    with PAD_VALUE below and to the right."""
    images = pixels.permute(0, 3, 1, 2).float() / 255
    y = torch.arange(images.shape[2], device=pixels.device)[:, None]
    x = torch.arange(images.shape[3], device=pixels.device)
    inside = (y < sizes[:, 0, None, None]) & (x < sizes[:, 1, None, None])     # (B, H, W)
    return torch.where(inside[:, None], images, PAD_VALUE)


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
    canvas: tuple[int, int]
    flip: bool = False

    def image(self, image):
        """PIL RGB -> uint8 (canvas height, canvas width, 3), zero outside of (height, width)."""
        box = self.left, self.top, self.right, self.bottom
        part = np.asarray(image.resize((self.width, self.height), Image.BILINEAR, box=box))
        pixels = np.zeros((*self.canvas, 3), np.uint8)
        pixels[:self.height, :self.width] = part[:, ::-1] if self.flip else part
        return pixels

    def to_view(self, yx):
        """(..., 2) pixels of the image -> fractions of the rectangle, mirrored with it."""
        yx = (yx - (self.top, self.left)) / (self.bottom - self.top, self.right - self.left)
        return np.stack([yx[..., 0], 1 - yx[..., 1]], -1) if self.flip else yx

    def to_canvas(self, yx):
        """(..., 2) fractions of the rectangle -> fractions of the padded canvas."""
        return yx * (self.height / self.canvas[0], self.width / self.canvas[1])

    def to_image(self, yx):
        """(..., 2) fractions of the padded canvas -> pixels of the image, for views that predict,
        which are never mirrored."""
        yx = yx * (self.canvas[0] / self.height, self.canvas[1] / self.width)
        return yx * (self.bottom - self.top, self.right - self.left) + (self.top, self.left)


def whole(image):
    """PIL image -> the region (top, left, bottom, right) that is all of it, in pixels."""
    return 0, 0, image.height, image.width


def eval_view(region, canvas):
    """All of a region, as large as the canvas allows."""
    h, w = region[2] - region[0], region[3] - region[1]
    scale = min(canvas[0] / h, canvas[1] / w)
    return View(*region, max(round(h * scale), 1), max(round(w * scale), 1), canvas)


def train_view(region, canvas, rng, scale_range, flip):
    """Scale jitter, then a random crop of the canvas's size, then a mirror (2109.10852, app. B)."""
    origin, size = np.array(region[:2]), np.array(region[2:]) - region[:2]
    scale = rng.uniform(*scale_range) * min(canvas / size)
    scaled = np.maximum((size * scale).astype(int), 1)
    offset = (rng.random() * np.maximum(scaled - canvas, 0)).astype(int)       # one number for both
    height, width = np.minimum(canvas, scaled - offset)
    start = origin + offset * size / scaled
    end = origin + (offset + (height, width)) * size / scaled
    mirrored = bool(flip and rng.random() < 0.5)
    return View(*start, *end, int(height), int(width), canvas, mirrored)


def view_boxes(view, boxes):
    """(N, 4) yxyx pixels -> (N, 4) yxyx fractions of the view's rectangle, clipped to it; empty if
    outside."""
    corners = view.to_view(boxes.reshape(-1, 2, 2))
    return np.concatenate([corners.min(1), corners.max(1)], -1).clip(0, 1)


def pad_objects(view, boxes, labels, count):
    """Boxes (N, 4), fractions of the view, and labels (N,) -> arrays of `count` rows, boxes as
    fractions of the canvas."""
    n = min(len(boxes), count)
    padded = {"boxes": np.zeros((count, 4), np.float32), "labels": np.full(count, PAD_LABEL)}
    padded["boxes"][:n] = view.to_canvas(boxes[:n].reshape(-1, 2, 2)).reshape(-1, 4)
    padded["labels"][:n] = labels[:n]
    return padded


# --------------------------------------------------------------------------------------------------
# detection: a record becomes an example, examples become a batch

def det_example(record, c, rng):
    """Record -> image (H, W, 3) uint8, size (2,) of its unpadded part, boxes (max_objects, 4)
    fractions of the canvas, labels (max_objects,), corrupt (max_objects, 2) random numbers."""
    d = c.data
    region, scale_range = whole(record["image"]), (d.scale_min, d.scale_max)
    view = train_view(region, c.model.image_size, rng, scale_range, d.flip)
    boxes = view_boxes(view, record["boxes"])
    order = rng.permutation(np.flatnonzero(visible(boxes) & ~record["iscrowd"]))[:d.max_objects]
    boxes, labels = boxes[order], record["labels"][order]
    missing = d.max_objects - len(boxes)
    if d.noise_boxes and missing:
        boxes = np.concatenate([boxes, noise_boxes(boxes, missing, rng)])
        labels = np.concatenate([labels, np.full(missing, FAKE_LABEL)])
    objects = pad_objects(view, boxes, labels, d.max_objects)
    corrupt = rng.random((d.max_objects, 2), np.float32)
    return see(view, record["image"]) | objects | {"corrupt": corrupt}


def see(view, image):
    return {"image": view.image(image), "size": np.array([view.height, view.width])}


def visible(boxes):
    return (boxes[:, 2:] > boxes[:, :2]).all(-1)


def noise_boxes(boxes, count, rng):
    """`count` boxes that look like objects and are none (2109.10852, section 2.4): near-copies of
    real boxes, real boxes elsewhere, random boxes. boxes: (N, 4) yxyx fractions of the view."""
    def around(centers, sizes):
        return np.concatenate([centers - sizes / 2, centers + sizes / 2], -1)

    copies = rng.integers(0, count + 1) if len(boxes) else 0
    others = count - copies
    pool = np.tile(boxes, (count // max(len(boxes), 1) + 1, 1))
    near = rng.permutation(pool)[:copies]
    near = near + truncated_normal(rng, near.shape, 0.05) * np.tile(near[:, 2:] - near[:, :2], 2)
    moved = rng.permutation(pool)[:others]
    moved = around(rng.random((len(moved), 2)), moved[:, 2:] - moved[:, :2])
    centers = rng.random((others, 2))
    drawn = around(centers, np.abs(truncated_normal(rng, (others, 2), 0.5)))
    bad = rng.permutation(np.concatenate([moved, drawn]))[:others]
    return rng.permutation(np.concatenate([near, bad])).clip(0, 1)


def truncated_normal(rng, shape, std):
    """Normal numbers of which none is beyond two standard deviations (those are drawn again)."""
    x = rng.standard_normal(shape)
    while (far := np.abs(x) > 2).any():
        x[far] = rng.standard_normal(far.sum())
    return x * std


def det_batch(x, c):
    """Stacked examples -> the tokens of a Batch."""
    weights = c.data.noise_weight, c.data.pad_weight
    tokens = tokenizer.encode_detection(x["boxes"], x["labels"], c.vocab, x["corrupt"], *weights)
    return tokens._asdict()


def collate(task, c):
    """A task's function of examples -> Batch. (A partial, so that workers can be sent it.)"""
    return functools.partial(collate_examples, task, c)


def collate_examples(task, c, examples):
    x = {}
    for key, value in examples[0].items():
        x[key] = [example[key] for example in examples]
        if isinstance(value, (np.ndarray, np.generic)):
            x[key] = torch.from_numpy(np.stack(x[key]))
    skipped = tuple(message for example in x.pop("skipped", ()) for message in example)
    shown = {"images": x["image"], "sizes": x["size"]} if "image" in x else {}
    return Batch(**COLLATE[task](x, c), **shown, skipped=skipped)


# --------------------------------------------------------------------------------------------------
# streams: which example comes when

class TrainStream(Dataset):
    """Position p of an endless, shuffled stream of one task's examples. An unreadable image is
    replaced by the next one."""

    def __init__(self, source, task, c, seed):
        self.source, self.task, self.c, self.seed, self.epoch = source, task, c, seed, None
        self.count = source.count(task)
        if self.count == 0:
            raise DataError(f"the training data has nothing to learn {task} from")

    def index(self, p):
        if self.source.endless:
            return p
        epoch, i = divmod(p, self.count)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order = epoch, rng.permutation(self.count)
        return int(self.order[i])

    def __getitem__(self, p):
        first, skipped = self.index(p), []
        while True:
            i = (first + len(skipped)) % self.count
            try:
                record = self.source.record(self.task, i)
                break
            except DataError as e:
                skipped.append(str(e))
                if len(skipped) == self.count:
                    raise DataError(
                        f"none of the {self.count} training images can be read, the last: {e}"
                    ) from e
        rng = np.random.default_rng([self.seed, list(EXAMPLES).index(self.task), p])
        return EXAMPLES[self.task](record, self.c, rng) | {"skipped": skipped}


class Positions:
    """Batch sampler: from step `start` on, this process's part of each global batch, in `parts`
    parts. A part is every (world x parts)-th position of the batch, so which process computes what
    does not change the batch."""

    def __init__(self, start, steps, batch, parts=1, rank=0, world=1):
        self.start, self.steps, self.batch = start, steps, batch
        self.parts, self.rank, self.world = parts, rank, world

    def __iter__(self):
        for step in range(self.start, self.steps):
            for part in range(self.parts):
                first = step * self.batch + self.rank * self.parts + part
                yield list(range(first, (step + 1) * self.batch, self.world * self.parts))


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


def ignore_interrupts(worker):
    """Ctrl-C reaches every process of a terminal; only the main one answers it, by saving."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ==== reference ===================================================================================
# records to evaluate

class EvalSet(Dataset):
    """Record i of a source; of an unreadable image only the message, a str."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            return self.source[i]
        except DataError as e:
            return str(e)


# --------------------------------------------------------------------------------------------------
# the other tasks' examples and batches

def seg_example(record, c, rng):
    """image, size, boxes (max_instances, 4), labels (max_instances,), points (max_instances,
    2 max_points) with the *_POINT marks."""
    d = c.data
    region, scale_range = whole(record["image"]), (d.instance_scale_min, d.instance_scale_max)
    view = train_view(region, c.model.image_size, rng, scale_range, d.flip)
    boxes = view_boxes(view, record["boxes"])
    outlined = np.array([bool(polygons) for polygons in record["polygons"]], bool)
    usable = visible(boxes) & ~record["iscrowd"] & outlined
    order = rng.permutation(np.flatnonzero(usable))[:d.max_instances]
    objects = pad_objects(view, boxes[order], record["labels"][order], d.max_instances)
    polygons = [record["polygons"][i] for i in order]
    points = polygon_points(view, polygons, d.max_instances, d.max_points)
    return see(view, record["image"]) | objects | {"points": points}


def seg_batch(x, c):
    tokens = tokenizer.encode_instances(
        tokenizer.PROMPT_SEG, x["boxes"], x["labels"], x["points"], c.vocab)
    return tokens._asdict()


def polygon_points(view, objects, count, most):
    """Polygons of N objects, in pixels -> (count, 2 most) float32 fractions of the canvas, clipped
    to the view, with *_POINT marks."""
    points = np.full((count, most, 2), PAD_POINT, np.float32)
    for row, polygons in zip(points, objects):
        n = 0
        for polygon in thin_polygons(polygons, most):
            if n:
                row[n] = SEPARATOR_POINT
                n += 1
            row[n:n + len(polygon)] = view.to_canvas(view.to_view(polygon).clip(0, 1))
            n += len(polygon)
    return points.reshape(count, 2 * most)


def thin_polygons(polygons, most):
    """A list of (P, 2) -> the same polygons in at most `most` points, a separator between two
    counted as one: each gives up an equal fraction, evenly along its outline; where even triangles
    are too many, the smallest polygons go."""
    polygons = sorted(polygons, key=polygon_area, reverse=True)[:(most + 1) // 4]
    room = most - len(polygons) + 1
    fraction = min(room / max(sum(map(len, polygons)), 1), 1)
    while sum(max(int(len(p) * fraction), 3) for p in polygons) > room:
        fraction *= 0.95
    kept = [min(max(int(len(p) * fraction), 3), len(p)) for p in polygons]
    return [p[np.arange(n) * len(p) // n] for p, n in zip(polygons, kept)]


def polygon_area(points):
    """Area inside a polygon (P, 2), by the shoelace formula."""
    (y, x), (next_y, next_x) = points.T, points[np.arange(len(points)) - 1].T
    return 0.5 * abs(x @ next_y - y @ next_x)


def kpt_example(record, c, rng):
    """image cropped to one person, size, boxes (1, 4), labels (1,), points (1, 2 K), mask (1, 2 K)
    bool: the fraction of the points that is hidden is drawn for every example (in the reference for
    every batch). The record says which of its objects it is about."""
    n, d = record["person"], c.data
    region = around_box(record["image"], record["boxes"][n], d.crop_margin)
    scale_range = d.instance_scale_min, d.instance_scale_max
    view = train_view(region, c.model.image_size, rng, scale_range, flip=False)
    box, label = view_boxes(view, record["boxes"][n:n + 1]), record["labels"][n:n + 1]
    points = keypoint_points(view, record["keypoints"][n])[None]
    mask = rng.random(points.shape) < rng.random()
    objects = pad_objects(view, box, label, 1)
    return see(view, record["image"]) | objects | {"points": points, "mask": mask}


def kpt_batch(x, c):
    tokens = tokenizer.encode_instances(
        tokenizer.PROMPT_KPT, x["boxes"], x["labels"], x["points"], c.vocab, x["mask"],
        c.data.invisible_weight, 0.0)
    return tokens._asdict()


def around_box(image, box, margin):
    """The region of a yxyx box in pixels, widened on each side by `margin` times its size, within
    the image."""
    size = np.tile(box[2:] - box[:2], 2) * (-margin, -margin, margin, margin)
    return tuple(np.clip(box + size, 0, [image.height, image.width] * 2).tolist())


def keypoint_points(view, keypoints):
    """(K, 3) yxv pixels -> (2 K,) float32 fractions of the canvas; INVISIBLE_POINT where unlabelled
    or outside of the view."""
    points = view.to_view(keypoints[:, :2])
    shown = (keypoints[:, 2] > 0) & (points > 0).all(-1) & (points < 1).all(-1)
    points = np.where(shown[:, None], view.to_canvas(points), INVISIBLE_POINT)
    return points.astype(np.float32).ravel()


def cap_example(record, c, rng):
    """image, size, captions: captions_per_image str, drop (captions_per_image, caption_length)."""
    d, image = c.data, record["image"]
    if d.color_jitter:
        image = jitter_colors(image, d.color_jitter, rng)
    scale_range = d.scale_min, d.scale_max
    view = train_view(whole(image), c.model.image_size, rng, scale_range, d.caption_flip)
    texts, count = record["captions"] or [""], d.captions_per_image
    rounds = -(-count // len(texts))
    chosen = rng.permutation(len(texts) * rounds)[:count] % len(texts)
    drop = rng.random((count, d.caption_length), np.float32)
    return see(view, image) | {"captions": [texts[i] for i in chosen], "drop": drop}


def cap_batch(x, c):
    d = c.data
    captions = [caption for captions in x["captions"] for caption in captions]
    tokens = tokenizer.encode_captions(
        captions, c.vocab, d.caption_length, x["drop"].flatten(0, 1), d.caption_drop,
        pad_weight=d.caption_pad_weight)
    B = len(x["captions"])
    return {key: t.view(B, -1, d.caption_length) for key, t in tokens._asdict().items()}


def jitter_colors(image, strength, rng):
    """PIL RGB -> the same with brightness, contrast, saturation and hue changed at random, four
    times in five, and grey one time in five (SimCLR's distortion, arXiv 2002.05709, appendix A)."""
    if rng.random() < 0.8:
        for change in rng.permutation(4):
            if change < 3:
                kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[change]
                low = max(0, 1 - 0.8 * strength)
                image = kind(image).enhance(rng.uniform(low, 1 + 0.8 * strength))
            else:
                hue, saturation, value = image.convert("HSV").split()
                turn = int(rng.uniform(-0.2, 0.2) * strength * 256)
                hue = hue.point(lambda h: (h + turn) % 256)
                image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image.convert("L").convert("RGB") if rng.random() < 0.2 else image


def gen_example(record, c, rng):
    """pixels (frames, H, W, C) uint8, context frames first, of an image one frame, and label int64.
    DataError if they are not of the size that the model takes."""
    pixels, (frames, height, width) = as_clip(record["pixels"]), clip_shape(c)
    expected, channels = (frames, height, width), c.data.image_channels
    if pixels.shape[:3] != expected or pixels.shape[3] not in (1, channels):
        raise DataError(
            f"the data is {pixels.shape} (frames, height, width, channels), but sample_size, "
            f"image_channels and frames ask for {(*expected, channels)}")
    if c.data.flip and rng.random() < 0.5:
        pixels = pixels[..., ::-1, :]
    pixels = np.broadcast_to(pixels, (*expected, channels)).copy()             # grey: equal colours
    return {"pixels": pixels, "label": np.int64(record["label"])}


def gen_batch(x, c):
    """What is to be generated, and the context frames before it."""
    pixels, first = x["pixels"].movedim(-1, 1), c.model.cond_frames            # (B, C, T, H, W)
    targets, cond = pixels[:, :, first:], {"labels": x["label"]}
    if first:
        cond["frames"] = pixels[:, :, :first].contiguous()
    if len(c.model.sample_shape) == 3:                 # an image, (C, H, W)
        targets = targets[:, :, 0]
    return {"targets": targets.contiguous(), "weights": torch.ones(len(targets)), "cond": cond}


def as_clip(pixels):
    """An image (H, W, C) is a clip of one frame (1, H, W, C); clips stay."""
    return pixels if pixels.ndim == 4 else pixels[None]


def clip_shape(c):
    """(frames, height, width) of an example of generation, context frames counted."""
    _, *frames, height, width = c.model.sample_shape
    return sum(frames) + c.model.cond_frames if frames else 1, height, width


EXAMPLES = {                                           # (record, c, rng) -> arrays of one example
    "det": det_example,
    "seg": seg_example,
    "kpt": kpt_example,
    "cap": cap_example,
    "gen": gen_example,
}
COLLATE = {                                            # (stacked examples, c) -> fields of a Batch
    "det": det_batch,
    "seg": seg_batch,
    "kpt": kpt_batch,
    "cap": cap_batch,
    "gen": gen_batch,
}


# --------------------------------------------------------------------------------------------------
# sources

def make_source(c, split, task="det"):
    """The records of a configuration. split: train or val. DataError if it cannot be."""
    check_split(split)
    choices = SOURCES[task]
    if c.data.data not in choices:
        raise DataError(
            f"data is {c.data.data!r}, expected one of {', '.join(choices)} for the task {task}")
    return choices[c.data.data](c, split, task)


SPLITS = {"train": 0, "val": 1}
# COCO's name of the annotation file of each task, and our fields that name another
COCO_FILES = {
    "det": ("instances", "json"),
    "seg": ("instances", "json"),
    "kpt": ("person_keypoints", "keypoints"),
    "cap": ("captions", "captions"),
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


def check_split(split):
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")


def shapes_source(c, split, task):
    count = c.data.val_count if split == "val" else None
    return Shapes(split, max(c.model.image_size), c.data.max_shapes, c.data.data_seed, count)


def coco_source(c, split, task):
    kind, field = COCO_FILES[task]
    json_path = getattr(c.data, f"{split}_{field}")
    images = getattr(c.data, f"{split}_images")
    if not c.data.data_dir and not (json_path and images):
        raise DataError(
            f"data is 'coco': name a folder in COCO's layout with --data_dir, or --{split}_{field} "
            f"and --{split}_images")
    json_path = json_path or f"{c.data.data_dir}/annotations/{kind}_{split}2017.json"
    images = images or f"{c.data.data_dir}/{split}2017"
    return Coco(json_path, images, c.vocab.max_label, c.data.bad_boxes)


def clips_source(c, split, task):
    frames, *size = clip_shape(c)
    count = c.data.val_count if split == "val" else None
    return ShapeClips(split, max(size), frames, c.data.data_seed, count)


def files_source(c, split, task):
    if not c.data.data_dir:
        raise DataError(
            f"data is {c.data.data!r}: name with --data_dir the folder of {LAYOUTS[c.data.data]}")
    return READERS[c.data.data](c, split)


SEQUENCE_SOURCES = {"shapes": shapes_source, "coco": coco_source}
SOURCES = dict.fromkeys(("det", "seg", "kpt", "cap"), SEQUENCE_SOURCES)
SOURCES["gen"] = {"shapes": clips_source} | dict.fromkeys(LAYOUTS, files_source)
READERS = {
    "mnist": lambda c, split: load_mnist(c.data.data_dir, split),
    "cifar10": lambda c, split: load_cifar10(c.data.data_dir, split),
    "images": lambda c, split: ClipFolder(c.data.data_dir, split, c.model.sample_size),
    "videos": lambda c, split: ClipFolder(
        c.data.data_dir, split, c.model.sample_size, clip_shape(c)[0]),
}


class Source:
    """What sources share. A source has `endless` (items need no shuffling), `classes` (names),
    `categories` ({id, name, label, maybe keypoints and skeleton}) and a record per item."""
    endless = False

    def count(self, task):
        """How many training examples there are of a task."""
        return len(self)

    def record(self, task, i):
        """The record of training example i of a task."""
        return self[i]


class ClassSource(Source):
    """A source for generation: categories are the classes, counted from 0."""

    @property
    def categories(self):
        return [{"id": i, "name": name, "label": i} for i, name in enumerate(self.classes)]


# --------------------------------------------------------------------------------------------------
# shapes: a synthetic dataset of drawn scenes, and of clips

KINDS = ("circle", "square", "triangle", "figure")     # categories 1..4
COLORS = {
    "red": (220, 50, 40),
    "green": (50, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (235, 205, 50),
    "purple": (150, 60, 180),
    "white": (240, 240, 240),
}
# Of a figure; left is the viewer's left. The skeleton counts keypoints from 1, as COCO does.
KEYPOINTS = ("head", "left_hand", "right_hand", "left_foot", "right_foot")
SKELETON = ((1, 2), (1, 3), (1, 4), (1, 5))


def arc(count):
    """(count, 2) yx points of a unit circle."""
    turn = np.arange(count) / count * 2 * np.pi
    return np.stack([np.cos(turn), np.sin(turn)], -1)


OUTLINES = {
    "circle": arc(20),
    "square": np.array([(-0.9, -0.9), (-0.9, 0.9), (0.9, 0.9), (0.9, -0.9)]),
    "triangle": np.array([(-1, 0), (1, 1), (1, -1)]),
}


@dataclass
class Shape:
    """One drawn shape. Lengths are fractions of the image's side."""
    kind: str
    color: str
    y: float                                           # centre
    x: float
    radius: float                                      # half its height
    pose: np.ndarray                                   # (4, 2) in [0, 1]: differs between figures

    @cached_property
    def keypoints(self):
        """(5, 2) yx fractions of a figure's keypoints, in the order of KEYPOINTS."""
        reach, height = 0.55 + 0.45 * self.pose[:, 0], self.pose[:, 1]
        left_hand, right_hand = -0.75 + 1.1 * height[0], -0.75 + 1.1 * height[1]
        hands = [(left_hand, -reach[0]), (right_hand, reach[1])]
        feet = [(1.0, -0.2 - 0.7 * height[2]), (1.0, 0.2 + 0.7 * height[3])]
        return np.array([(-0.7, 0.0), *hands, *feet]) * self.radius + (self.y, self.x)

    @cached_property
    def polygons(self):
        """A list of (P, 2) arrays of yx fractions: one polygon, or head and body of a figure."""
        center = self.y, self.x
        if self.kind != "figure":
            return [OUTLINES[self.kind] * self.radius + center]
        _, left_hand, right_hand, left_foot, right_foot = self.keypoints
        neck, left, crotch, right = (
            np.array([self.y + y * self.radius, self.x + x * self.radius])
            for y, x in ((-0.55, 0), (0.1, -0.3), (0.35, 0), (0.1, 0.3)))
        body = [neck, left_hand, left, left_foot, crotch, right_foot, right, right_hand]
        turn = np.arange(12) / 12 * 2 * np.pi
        head = np.stack([-0.7 + 0.3 * np.cos(turn), 0.3 * np.sin(turn)], -1)
        return [head * self.radius + center, np.array(body)]

    def bounds(self):
        """The square around its circle, yxyx fractions, in which it lies."""
        r = self.radius
        return self.y - r, self.x - r, self.y + r, self.x + r


def random_shape(rng, kind, color, smallest, largest):
    """A shape whose radius is in this range, fully inside the image."""
    radius = rng.uniform(smallest, largest)
    y, x = rng.uniform(radius + 0.01, 0.99 - radius, 2)
    return Shape(kind, color, y, x, radius, rng.random((4, 2)))


def random_scene(rng, max_shapes):
    """1 to max_shapes shapes, fully inside the image, the squares around no two of which overlap by
    more than a tenth (IoU)."""
    shapes = []
    for _ in range(rng.integers(1, max_shapes + 1)):
        kind, color = KINDS[rng.integers(len(KINDS))], list(COLORS)[rng.integers(len(COLORS))]
        for _ in range(10):
            shape = random_shape(rng, kind, color, 0.14, 0.26)
            if all(box_iou(shape.bounds(), other.bounds()) < 0.1 for other in shapes):
                shapes.append(shape)
                break
    return shapes


def box_iou(a, b):
    """Intersection over union of two yxyx boxes."""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(height, 0) * max(width, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def random_background(rng, size):
    """PIL image of dull colours: a gradient or a blotchy texture."""
    cells, contrast = (2, 16) if rng.random() < 0.5 else (6, 8)
    corners = rng.integers(40, 130) + rng.integers(-contrast, contrast + 1, (cells, cells, 3))
    return Image.fromarray(corners.astype(np.uint8)).resize((size, size), Image.BILINEAR)


def draw_scene(shapes, background):
    """Shapes drawn over a square background in their order, four times as large and then averaged
    (antialiased)."""
    side = 4 * background.width
    canvas = background.resize((side, side), Image.NEAREST)
    pen = ImageDraw.Draw(canvas)
    for shape in shapes:
        for polygon in shape.polygons:
            pen.polygon((polygon[:, ::-1] * side).ravel().tolist(), fill=COLORS[shape.color])
    return canvas.reduce(4)


def describe(shapes):
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


def drawn_count(split, count):
    """How many drawn items a split has, if not `count`: in training none is seen twice."""
    check_split(split)
    return count or (1 << 40 if split == "train" else 500)


class Shapes(Source):
    """Drawn scenes with COCO-style truth. Item i is a pure function of (seed, split, i)."""
    endless, classes = True, list(KINDS)

    def __init__(self, split, size=64, max_shapes=4, seed=0, count=None):
        self.split, self.size, self.max_shapes, self.seed = split, size, max_shapes, seed
        self.length = drawn_count(split, count)
        self.categories = [{"id": i, "name": k, "label": i} for i, k in enumerate(KINDS, 1)]
        figure = self.categories[KINDS.index("figure")]
        figure |= {"keypoints": list(KEYPOINTS), "skeleton": SKELETON}

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        """Record i, a dict. N objects; pixel coordinates are floats, (y, x) order, of the image.
        image: PIL RGB    image_id: int    labels: (N,) int64, the label that has a class token
        boxes: (N, 4) float32 yxyx    iscrowd: (N,) bool    polygons: per object a list of (P, 2)
        keypoints: (N, K, 3) float32, y x visibility (0, 1 or 2)    captions: list of str
        """
        rng = np.random.default_rng([self.seed, SPLITS[self.split], i])
        return self.draw(random_scene(rng, self.max_shapes), rng, i)

    def draw(self, shapes, rng, i):
        polygons = [[np.round(p * self.size, 2) for p in shape.polygons] for shape in shapes]
        extents = [np.concatenate(p) for p in polygons]
        keypoints = np.zeros((len(shapes), len(KEYPOINTS), 3), np.float32)
        for row, shape in zip(keypoints, shapes):
            if shape.kind == "figure":
                row[:, :2], row[:, 2] = np.round(shape.keypoints * self.size, 2), 2
        boxes = [np.concatenate([extent.min(0), extent.max(0)]) for extent in extents]
        return {
            "image": draw_scene(shapes, random_background(rng, self.size)),
            "image_id": i + 1,
            "labels": np.array([KINDS.index(shape.kind) + 1 for shape in shapes], np.int64),
            "boxes": np.array(boxes, np.float32),
            "iscrowd": np.zeros(len(shapes), bool),
            "polygons": polygons,
            "keypoints": keypoints,
            "captions": describe(shapes),
        }

    def record(self, task, i):
        """Of kpt a scene that has a figure, and which of its objects that is."""
        if task != "kpt":
            return self[i]
        rng, figures = np.random.default_rng([self.seed, SPLITS[self.split], i, 1]), []
        while not figures:
            shapes = random_scene(rng, self.max_shapes)
            figures = [n for n, shape in enumerate(shapes) if shape.kind == "figure"]
        return self.draw(shapes, rng, i) | {"person": figures[0]}

    def truth(self, task="det"):
        """The whole split as a dict in COCO's format, of which pycocotools makes an index."""
        images, annotations = [], []
        categories = [k for k in self.categories if task != "kpt" or "keypoints" in k]
        known = {category["label"] for category in categories}
        for i in range(len(self)):
            record = self[i]
            image_id = record["image_id"]
            image = {"id": image_id, "file_name": f"{image_id:012d}.png"}
            images.append(image | {"height": self.size, "width": self.size})
            if task == "cap":
                found = [{"caption": caption} for caption in record["captions"]]
            else:
                rows = range(len(record["labels"]))
                found = [coco_object(record, n) for n in rows if record["labels"][n] in known]
            annotations += [{"image_id": image_id, **annotation} for annotation in found]
        for n, annotation in enumerate(annotations, 1):
            annotation["id"] = n
        return {"images": images, "annotations": annotations, "categories": categories}


def coco_object(record, n):
    """Object n of a drawn record -> an annotation in COCO's format."""
    y0, x0, y1, x1 = record["boxes"][n].astype(np.float64).round(2)
    label, polygons = record["labels"][n], record["polygons"][n]
    annotation = {
        "category_id": int(label),
        "iscrowd": 0,
        "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
        "area": sum(polygon_area(polygon) for polygon in polygons),
        "segmentation": [polygon[:, ::-1].ravel().tolist() for polygon in polygons],
    }
    if KINDS[label - 1] == "figure":
        yxv = record["keypoints"][n].astype(np.float64).round(2)
        annotation["keypoints"] = yxv[:, [1, 0, 2]].ravel().tolist()
        annotation["num_keypoints"] = len(KEYPOINTS)
    return annotation


class ShapeClips(ClassSource):
    """One drawn shape on a plain ground, at rest in an image or moving through a clip. Item i of a
    split is a pure function of (seed, split, i)."""
    endless, classes = True, list(KINDS)

    def __init__(self, split, size=32, frames=1, seed=0, count=None):
        self.split, self.size, self.frames, self.seed = split, size, frames, seed
        self.length = drawn_count(split, count)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        """Record i for generation, a dict, as every source for it gives:
        pixels: uint8 (H, W, C), of a clip (T, H, W, C), C is 1 or 3
        label: int, index in the source's classes; -1 unknown
        """
        rng = np.random.default_rng([self.seed, SPLITS[self.split], i, 2])     # 2: unlike Shapes
        label, color = int(rng.integers(len(KINDS))), list(COLORS)[rng.integers(len(COLORS))]
        shape = random_shape(rng, KINDS[label], color, 0.22, 0.36)
        grey = tuple(rng.integers(40, 130, 3).tolist())
        background = Image.new("RGB", (self.size, self.size), grey)
        turn, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.08)
        steps = np.arange(self.frames)[:, None] * (np.sin(turn), np.cos(turn))
        path = (shape.y, shape.x) + speed * steps
        low, room = shape.radius + 0.01, 0.98 - 2 * shape.radius               # folded at both ends
        path = low + room - np.abs((path - low) % (2 * room) - room)           # (T, 2) yx
        frames = [draw_scene([replace(shape, y=y, x=x)], background) for y, x in path]
        pixels = np.stack([np.asarray(frame) for frame in frames])
        return {"pixels": pixels if self.frames > 1 else pixels[0], "label": label}


def export_shapes(folder, count, size, seed, image_format):
    """Write `count` training scenes and 500 held-out ones in COCO's layout."""
    os.makedirs(f"{folder}/annotations", exist_ok=True)
    for split in SPLITS:
        os.makedirs(f"{folder}/{split}2017", exist_ok=True)
        size_of_split = count if split == "train" else min(count, 500)
        source = Shapes(split, size, seed=seed, count=size_of_split)
        for task, (kind, _) in COCO_FILES.items():
            truth = source.truth(task)
            for image in truth["images"]:
                image["file_name"] = image["file_name"].replace(".png", f".{image_format}")
            with open(f"{folder}/annotations/{kind}_{split}2017.json", "w") as f:
                json.dump(truth, f)
        for i, image in enumerate(truth["images"]):
            source[i]["image"].save(f"{folder}/{split}2017/{image['file_name']}", quality=95)


# --------------------------------------------------------------------------------------------------
# coco: images and JSON files of the user's

def load_image(path, size=None):
    """Any image file -> PIL RGB. size: (height, width) that its labels are for; a photo that is
    stored turned is turned upright unless only the stored form fits it. DataError, naming the file,
    if it cannot be read or fits neither way."""
    try:
        with Image.open(path) as stored:
            stored.load()
            image = ImageOps.exif_transpose(stored)
            if size is not None and (image.height, image.width) != tuple(size):
                image = stored
            if size is not None and (image.height, image.width) != tuple(size):
                raise DataError(
                    f"{path}: the image is {image.height}x{image.width}, its labels are for "
                    f"{size[0]}x{size[1]}")
            return to_rgb(image)
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as e:
        raise DataError(f"{path}: not a readable image ({e})") from e


def to_rgb(image):
    """PIL image of any mode -> RGB; 16 bits are scaled, transparency becomes white."""
    if image.mode.startswith(("I", "F")):              # convert() would clip, not scale
        pixels = np.asarray(image).astype(np.float64)
        top = 65535 if pixels.max() > 255 else 255
        if image.mode == "F" and pixels.max() <= 1:
            top = 1
        image = Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class Coco(Source):
    """A dataset in COCO's format: one JSON file and the folder of its images. Records as of Shapes.

    Everything but the pixels is checked here; DataError names each kind of problem, with a few
    examples and their number. bad_boxes: what to do about boxes of zero size or more than a pixel
    outside their image: "error" or "drop". Category ids in [1, max_label] are the labels, as in the
    reference; others get the free labels from 1 on.
    """

    def __init__(self, json_path, image_dir, max_label=899, bad_boxes="error"):
        if bad_boxes not in ("error", "drop"):
            raise DataError(f"bad_boxes is {bad_boxes!r}, expected 'error' or 'drop'")
        self.json_path, self.image_dir = json_path, image_dir
        truth = read_json(json_path)
        if not os.path.isdir(image_dir):
            raise DataError(f"{image_dir}: no such folder, expected the images of {json_path}")
        self.images, self.annotations, self.decoded = truth["images"], {}, {}
        for annotation in self.checked(truth, bad_boxes):
            self.annotations.setdefault(annotation["image_id"], []).append(annotation)
        self.coco_categories = truth["categories"]
        ids = [category["id"] for category in self.coco_categories]
        self.label_of = assign_labels(ids, max_label, json_path)
        kept = ("id", "name", "keypoints", "skeleton")
        self.categories = [
            {key: category[key] for key in kept if key in category}
            | {"label": self.label_of[category["id"]]} for category in self.coco_categories]
        self.classes = [category["name"] for category in self.categories]

    def checked(self, truth, bad_boxes):
        """The annotations to use. DataError with all that is wrong."""
        images, annotations = truth["images"], truth["annotations"]
        needed = {"id", "file_name", "height", "width"}
        self.refuse({
            "images lack one of id, file_name, height, width":
                [image for image in images if not needed <= image.keys()],
            "annotations lack image_id": [a for a in annotations if "image_id" not in a],
        })
        sizes = {image["id"]: (image["height"], image["width"]) for image in images}
        ids = [category["id"] for category in truth["categories"]]
        known = set(ids)
        boxed = [a for a in annotations if "caption" not in a]
        self.refuse({
            "image ids appear twice": twice([image["id"] for image in images]),
            "category ids appear twice": twice(ids),
            "annotation ids appear twice": twice([a["id"] for a in annotations if "id" in a]),
            f"images are not in {self.image_dir}":
                missing_files(self.image_dir, [image["file_name"] for image in images]),
            "annotations are of an image_id that no image has":
                [f"{a['image_id']} ({name(a)})" for a in annotations if a["image_id"] not in sizes],
            "annotations have a category_id that no category has":
                [f"{a.get('category_id')} ({name(a)})" for a in boxed
                 if a.get("category_id") not in known],
            "annotations have no bbox of four numbers":
                [name(a) for a in boxed if len(a.get("bbox", ())) != 4],
        })
        bad = [a for a in boxed if not box_fits(a["bbox"], *sizes[a["image_id"]])]
        names = [f"{name(a)} {a['bbox']} in {sizes[a['image_id']][1]}x{sizes[a['image_id']][0]}"
                 for a in bad]
        if bad_boxes == "error":
            hint = "(--bad_boxes=drop leaves them out)"
            self.refuse({f"boxes are empty or outside their image {hint}": names})
        if bad:
            warnings.warn(f"{self.json_path}: left out {len(bad)} boxes, empty or outside their "
                          f"image, such as {names[0]}")
        dropped = set(map(id, bad))
        return [a for a in annotations if id(a) not in dropped]

    def refuse(self, problems):
        """DataError if there is any {what: names of those}, with the first five names of each."""
        lines = [f"{self.json_path}:"]
        for what, names in problems.items():
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"{len(names)} {what}: {', '.join(map(str, names[:5]))}{more}")
        if lines[1:]:
            raise DataError("\n  ".join(lines))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i]
        found = self.annotations.get(image["id"], [])
        boxed = [a for a in found if "bbox" in a]
        x, y, w, h = np.array([a["bbox"] for a in boxed], np.float32).reshape(-1, 4).T
        limit = np.array([image["height"], image["width"]] * 2, np.float32)
        most = max([len(a.get("keypoints", ())) // 3 for a in boxed], default=0)
        keypoints = [a.get("keypoints") or [0] * 3 * most for a in boxed]
        keypoints = np.array(keypoints, np.float32).reshape(len(boxed), most, 3)
        return {
            "image": self.pixels(i),
            "image_id": image["id"],
            "labels": np.array([self.label_of[a["category_id"]] for a in boxed], np.int64),
            "boxes": np.stack([y, x, y + h, x + w], -1).clip(0, limit),
            "iscrowd": np.array([bool(a.get("iscrowd", 0)) for a in boxed], bool),
            "polygons": [polygons_of(a) for a in boxed],
            "keypoints": keypoints[..., [1, 0, 2]],
            "captions": [a["caption"].strip() for a in found if "caption" in a],
        }

    def pixels(self, i):
        """Image i; a set of few images is decoded once."""
        if i in self.decoded:
            return self.decoded[i]
        image = self.images[i]
        path = os.path.join(self.image_dir, image["file_name"])
        pixels = load_image(path, (image["height"], image["width"]))
        if len(self.images) <= 200:
            self.decoded[i] = pixels
        return pixels

    @cached_property
    def people(self):
        """(image, object) numbers of annotations with a labelled keypoint that are no crowds."""
        found = []
        for i, image in enumerate(self.images):
            boxed = [a for a in self.annotations.get(image["id"], []) if "bbox" in a]
            found += [(i, n) for n, a in enumerate(boxed)
                      if any(a.get("keypoints", [])[2::3]) and not a.get("iscrowd", 0)]
        return found

    def count(self, task):
        return len(self.people) if task == "kpt" else len(self)

    def record(self, task, i):
        """Of kpt the image of person i, and which of its objects that is."""
        if task != "kpt":
            return self[i]
        image, n = self.people[i]
        return self[image] | {"person": n}

    def truth(self, task="det"):
        """The dataset as a dict in COCO's format, without what was left out. Every task has its own
        file."""
        found = [a for image in self.images for a in self.annotations.get(image["id"], [])]
        annotations = []
        for n, a in enumerate(found, 1):
            a = dict(a, id=n)
            if "bbox" in a:                            # pycocotools needs both
                area = a["bbox"][2] * a["bbox"][3]
                a.update(iscrowd=a.get("iscrowd", 0), area=a.get("area", area))
            annotations.append(a)
        truth = {"images": self.images, "annotations": annotations}
        return truth | {"categories": self.coco_categories}


def read_json(path):
    """An annotation file -> dict with the lists images, annotations and categories."""
    try:
        with open(path) as f:
            truth = json.load(f)
    except FileNotFoundError:
        message = f"{path}: no such file, expected annotations in COCO's JSON format"
        raise DataError(message) from None
    except json.JSONDecodeError as e:
        raise DataError(f"{path}: not JSON ({e})") from e
    for key in ("images", "annotations"):
        if not isinstance(truth, dict) or not isinstance(truth.get(key), list):
            raise DataError(f"{path}: expected an object with a list {key!r}, as in COCO's format")
    return {"categories": []} | truth                  # captions have none


def polygons_of(annotation):
    """An annotation's polygons, a list of (P, 2) yx arrays; none if it is a run-length mask, as
    crowds are."""
    parts = annotation.get("segmentation", [])
    if not isinstance(parts, list):
        return []
    return [np.array(p, np.float32).reshape(-1, 2)[:, ::-1] for p in parts if len(p) >= 6]


def name(annotation):
    return f"annotation {annotation.get('id', '?')}"


def box_fits(bbox, height, width):
    """Whether x y w h is a box inside its image, up to a pixel."""
    x, y, w, h = map(float, bbox)
    inside = x >= -1 and y >= -1 and x + w <= width + 1 and y + h <= height + 1
    return w > 0 and h > 0 and inside                  # False for NaN, too


def twice(ids):
    seen = set()
    return [i for i in ids if i in seen or seen.add(i)]


def missing_files(folder, names):
    """Those of `names` (paths relative to the folder) that it lacks; lists each folder once, not
    each file."""
    listed = {}
    for sub in {os.path.dirname(name) for name in names}:
        path = os.path.join(folder, sub)
        listed[sub] = set(os.listdir(path)) if os.path.isdir(path) else set()
    return [name for name in names if os.path.basename(name) not in listed[os.path.dirname(name)]]


def assign_labels(ids, max_label, where):
    """{category id: label in 1..max_label}: ids that can be labels stay, others take the free
    labels from 1 on."""
    if len(ids) > max_label:
        raise DataError(
            f"{where}: {len(ids)} categories, but the vocabulary has room for {max_label} (raise "
            f"coord_shift)")
    kept = {i: i for i in ids if isinstance(i, int) and 1 <= i <= max_label}
    free = (n for n in range(1, max_label + 1) if n not in kept)
    return {i: kept[i] if i in kept else next(free) for i in ids}


# --------------------------------------------------------------------------------------------------
# images and clips to generate: files of the user's

class PixelArrays(ClassSource):
    """Images in memory: pixels (N, H, W, C) uint8, labels (N,). Records as of ShapeClips.
    DataError, naming `where`, if they do not fit."""

    def __init__(self, pixels, labels, classes, where="images in memory"):
        if len(pixels) != len(labels):
            raise DataError(f"{where}: {len(pixels)} images, but {len(labels)} labels")
        if len(labels) and not -1 <= min(labels) <= max(labels) < len(classes):
            raise DataError(
                f"{where}: labels from {min(labels)} to {max(labels)}, expected less than "
                f"{len(classes)}")
        self.pixels, self.labels, self.classes = pixels, labels, list(classes)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return {"pixels": self.pixels[i], "label": int(self.labels[i])}


def held_out(count, split, every):
    """Which of `count` items are a split's: every `every`-th is held out, beginning with the first,
    but never the only one."""
    is_val = (np.arange(count) % every == 0) & (count > 1)
    return np.flatnonzero(is_val == (split == "val"))


def read_bytes(path):
    """Content of a file, unpacked if it is a .gz. DataError, naming it, if it cannot be read."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as f:
            return f.read()
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: cannot be read ({e})") from e


def load_mnist(folder, split):
    """MNIST, or data in its format -> PixelArrays of (28, 28, 1). val is the t10k part; if no other
    is there, every tenth image of it is val and the others are train. DataError names the file and
    what was expected."""
    check_split(split)
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    paths = {part: [find_file(folder, f"{part}-{kind}") for kind in kinds]
             for part in ("train", "t10k")}
    shared = not any(paths["train"])
    images, labels = paths["t10k" if shared or split == "val" else "train"]
    if not (images and labels):
        raise DataError(f"{folder}: no images or labels for {split}, expected {LAYOUTS['mnist']}")
    pixels, targets = read_idx(images, 3)[..., None], read_idx(labels, 1)
    source = PixelArrays(pixels, targets, "0123456789", f"{images}, {labels}")
    if not shared:
        return source
    rows = held_out(len(source), split, 10)
    return PixelArrays(pixels[rows], targets[rows], source.classes)


def find_file(folder, name):
    """The path of a file of this name (or with .idx for -idx), maybe with .gz, or None."""
    forms = name, name.replace("-idx", ".idx")
    paths = (os.path.join(folder, form + ending) for form in forms for ending in ("", ".gz"))
    return next(filter(os.path.isfile, paths), None)


def read_idx(path, dims):
    """An idx file of bytes -> uint8 array of `dims` dimensions."""
    content, magic = read_bytes(path), bytes([0, 0, 8, dims])
    if content[:4] != magic:
        raise DataError(
            f"{path}: begins with {content[:4].hex()}, expected {magic.hex()}, an idx file of "
            f"bytes in {dims} dimensions")
    header = 4 + 4 * dims
    shape = [int.from_bytes(content[at:at + 4], "big") for at in range(4, header, 4)]
    if len(content) != header + math.prod(shape):
        raise DataError(
            f"{path}: {len(content)} bytes, expected {header + math.prod(shape)} for "
            f"{' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load_cifar10(folder, split):
    """CIFAR-10's binary version -> PixelArrays of (32, 32, 3); in the folder, or in the one of its
    archive in there. DataError names the file and what was expected."""
    check_split(split)
    numbers = range(1, 6)
    names = [f"data_batch_{i}.bin" for i in numbers] if split == "train" else ["test_batch.bin"]
    places = [folder, os.path.join(folder, "cifar-10-batches-bin")]
    place = next((p for p in places if os.path.exists(os.path.join(p, names[0]))), None)
    if place is None:
        raise DataError(f"{folder}: no {names[0]}, expected {LAYOUTS['cifar10']}")
    rows = []
    for path in (os.path.join(place, name) for name in names):
        content = np.frombuffer(read_bytes(path), np.uint8)
        if not len(content) or len(content) % 3073:
            raise DataError(
                f"{path}: {len(content)} bytes, expected 3073 per image, as in the CIFAR-10 binary "
                f"version")
        rows.append(content.reshape(-1, 3073))
        if rows[-1][:, 0].max() > 9:
            raise DataError(f"{path}: labels up to {rows[-1][:, 0].max()}, expected less than 10")
    rows = np.concatenate(rows)                        # label, then red, green, blue
    pixels = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return PixelArrays(pixels, rows[:, 0], CIFAR10_CLASSES, place)


def listing(folder):
    """Names of the subfolders and of the image files in a folder, both sorted. Hidden ones are left
    out."""
    entries = sorted((e.name, e.is_dir()) for e in os.scandir(folder) if not e.name.startswith("."))
    folders = [name for name, is_dir in entries if is_dir]
    files = [name for name, is_dir in entries if not is_dir]
    return folders, [name for name in files if name.lower().endswith(IMAGE_KINDS)]


def fit_image(path, size):
    """An image file -> uint8 (*size, 3): its centre in the shape of `size`, resized (bicubic,
    antialiased)."""
    return np.asarray(ImageOps.fit(load_image(path), (size[1], size[0]), Image.BICUBIC))


class ClipFolder(ClassSource):
    """A folder of images, or of a folder of frames per video; either maybe in a folder per class.
    Records as of ShapeClips: an image (*size, 3), or with `frames` a window of so many frames that
    follow each other, (frames, *size, 3).

    split: the subfolder of that name; if there are none, every twentieth image of a class, or video
    of all, is val and the others are train. Labels count the class folders by name, those of train;
    without class folders they are -1. Frames are sorted by the length of their names, then by name,
    so that 9.png comes before 10.png. Videos that are too short are left out, with a warning.
    DataError if there is nothing to be found; an unreadable image raises it when it is asked for.
    """

    def __init__(self, folder, split, size, frames=None):
        check_split(split)
        self.size, self.frames, videos = tuple(size), frames or 1, frames is not None
        layout = LAYOUTS["videos" if videos else "images"]
        own = [s for s in SPLITS if os.path.isdir(os.path.join(folder, s))]
        root = os.path.join(folder, split) if own else folder
        if not os.path.isdir(root):
            raise DataError(f"{root}: no such folder, expected {layout}")
        groups = self.video_groups(root) if videos else self.image_groups(root, layout)
        train = os.path.join(folder, "train")
        names = [group for group, _ in groups if group]
        self.classes = listing(train)[0] if names and own else names
        clips = []                                     # (folder, names of its frames, label)
        for group, items in groups:
            if group and group not in self.classes:
                where, known = os.path.join(root, group), ", ".join(self.classes[:5]) or "none"
                raise DataError(f"{where}: a class that is not in {train}, which has {known}")
            label = self.classes.index(group) if group else -1
            every = own or videos
            kept = range(len(items)) if every else held_out(len(items), split, 20)
            clips += [(*items[i], label) for i in kept]
        frames = self.frames
        long = [clip for clip in clips if len(clip[1]) >= frames]
        if len(long) < len(clips):
            short = next(clip[0] for clip in clips if len(clip[1]) < frames)
            warnings.warn(f"{root}: left out {len(clips) - len(long)} of {len(clips)} videos, "
                          f"shorter than {frames} frames, such as {short}")
        if videos and not own:
            long = [long[i] for i in held_out(len(long), split, 20)]
        if not long:
            kind = f"video of {frames} frames or more" if videos else "image"
            raise DataError(f"{root}: no {kind} for {split}, expected {layout}")
        self.clips = long
        self.ends = np.cumsum([len(names) - frames + 1 for _, names, _ in long])   # of windows

    def image_groups(self, root, layout):
        """[(class or "", [(folder, [name of an image])])]"""
        folders, files = listing(root)
        if folders and files:
            raise DataError(
                f"{root}: images such as {files[0]} beside folders such as {folders[0]}, expected "
                f"{layout}")
        groups = []
        for group in folders or [""]:
            folder = os.path.join(root, group)
            groups.append((group, [(folder, [name]) for name in listing(folder)[1]]))
        return groups

    def video_groups(self, root):
        """[(class or "", [(folder of a video, names of its frames in order)])]"""
        folders = listing(root)[0]
        inner = {name: listing(os.path.join(root, name)) for name in folders}
        by_class = any(sub for sub, _ in inner.values()) and not any(im for _, im in inner.values())
        videos = {name: inner[name][0] for name in folders} if by_class else {"": folders}
        groups = []
        for group, names in videos.items():
            paths = [os.path.join(root, group, name) for name in names]
            frames = [sorted(listing(path)[1], key=lambda f: (len(f), f)) for path in paths]
            groups.append((group, list(zip(paths, frames))))
        return groups

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        n = np.searchsorted(self.ends, i, side="right")
        folder, names, label = self.clips[n]
        last = len(names) + i - self.ends[n] + 1
        window = names[last - self.frames:last]
        pixels = np.stack([fit_image(os.path.join(folder, name), self.size) for name in window])
        return {"pixels": pixels if self.frames > 1 else pixels[0], "label": label}


# --------------------------------------------------------------------------------------------------
# a look at the data

def tile(pictures, columns=4, gap=4):
    """PIL pictures -> one, in rows of `columns`, each cell as large as the largest."""
    columns = min(columns, len(pictures))
    w, h = (max(picture.size[i] for picture in pictures) + gap for i in (0, 1))
    rows = -(-len(pictures) // columns)
    sheet = Image.new(pictures[0].mode, (columns * w - gap, rows * h - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * w, i // columns * h))
    return sheet


def save_grid(pixels, stem, columns=8, side=64, gap=2, ms=150):
    """Images (N, H, W, C) uint8 -> STEM.png, a grid with rows of `columns`, small images enlarged
    to some `side` pixels; clips (N, T, H, W, C) -> STEM.gif, a grid that moves, `ms` per frame.
    Returns the file's name."""
    zoom = max(1, round(side / pixels.shape[-2]))
    large = pixels.repeat(zoom, -3).repeat(zoom, -2)
    clips = large if pixels.ndim == 5 else large[:, None]                      # (N, T, H, W, C)
    clips = clips[..., 0] if clips.shape[-1] == 1 else clips
    frames = [tile(list(map(Image.fromarray, clips[:, t])), columns, gap)
              for t in range(clips.shape[1])]
    if pixels.ndim == 4:
        frames[0].save(f"{stem}.png")
        return f"{stem}.png"
    film = dict(save_all=True, append_images=frames[1:], duration=ms, loop=0)
    frames[0].save(f"{stem}.gif", **film)
    return f"{stem}.gif"


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--export", metavar="DIR", help="write shapes there in COCO's layout")
    add("--sheet", metavar="FILE", help="write a picture of the first 32 held-out scenes, a .png")
    add("--clips", metavar="FILE", help="write 16 held-out clips, a .gif")
    add("--count", type=int, default=1000, help="training scenes to export, with 500 held-out ones")
    add("--size", type=int, default=64, help="side of a scene or clip in pixels")
    add("--seed", type=int, default=0, help="dataset seed")
    add("--format", choices=["jpg", "png"], default="jpg", help="of the exported images")
    args = parser.parse_args()
    if args.count < 1 or args.size < 16:
        parser.error("expected --count of at least 1 and --size of at least 16")
    if args.export:
        export_shapes(args.export, args.count, args.size, args.seed, args.format)
        print(f"wrote {args.export}; next: python train.py --data=coco --data_dir={args.export}")
    if args.sheet:
        scenes = Shapes("val", args.size, seed=args.seed)
        pixels = np.stack([np.asarray(scenes[i]["image"]) for i in range(32)])
        print("wrote", save_grid(pixels, os.path.splitext(args.sheet)[0]))
    if args.clips:
        clips = ShapeClips("val", args.size, 16, args.seed)
        pixels = np.stack([clips[i]["pixels"] for i in range(16)])
        print("wrote", save_grid(pixels, os.path.splitext(args.clips)[0], columns=4))
    if not (args.export or args.sheet or args.clips):
        parser.print_help()


if __name__ == "__main__":
    main()
