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

    python data.py --sheet shapes.png                   # a look at the synthetic shapes
    python data.py --export DIR --count 1000            # write them as a COCO dataset
"""
import argparse
import glob
import gzip
import itertools
import json
import math
import os
import pickle
import signal
import warnings
import zlib
from array import array
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch.utils.data import DataLoader, Dataset

import tokenizer

PAD_VALUE = 0.3                                        # grey of the padding, as in the reference


class DataError(ValueError):
    """Something is wrong with the user's data; the message names the file and what was expected."""


@dataclass(frozen=True)
class DataConfig:
    """Where data come from, and how they become examples."""
    tasks: tuple[str, ...] = ("det",)   # what to learn: some of det,seg,kpt,cap; or gen; or ar
    data: str = "shapes"                # shapes, coco; gen: shapes, mnist, cifar10, images, videos
    data_dir: str = ""                  # coco: train2017/, val2017/, annotations/; gen: the files
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
    bad_boxes: str = "error"            # coco: empty boxes, or outside their image: error or drop
    max_shapes: int = 4                 # shapes: most shapes in a scene
    data_seed: int = 0                  # shapes: dataset seed
    val_count: int = 500                # shapes: held-out scenes, of val and of test
    max_objects: int = 100              # det: most objects in a sequence, noise boxes counted
    scale_min: float = 0.3              # det, cap: scale jitter, smallest image / canvas
    scale_max: float = 2.0              # det, cap: scale jitter, largest
    flip: bool = True                   # det, seg, gen, pan, vps: mirror half of the images
    noise_boxes: bool = True            # det: fill sequences up with noise boxes
    noise_weight: float = 1.0           # det: loss weight of the class of a noise box
    pad_weight: float = 0.1             # det: loss weight of padding, of ending the sequence
    max_instances: int = 10             # seg: objects to learn from an image
    max_segments: int = 100             # pan, vps: ids of instances, 0 for none included
    random_ids: bool = True             # pan, vps: number instances anew each time they are seen
    clip_frames: int = 16               # vps, shapes: frames of a clip
    past_drop: float = 0.2              # vps: probability that an earlier frame's map is hidden
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
        def put(fields):
            return {
                name: x.to(device, non_blocking=True)
                for name, x in fields.items() if torch.is_tensor(x)}

        batch = self._replace(**put(self._asdict()), cond=put(self.cond))
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

    def image(self, image, method=Image.BILINEAR):
        """PIL RGB -> uint8 (canvas height, canvas width, 3), zero outside of (height, width)."""
        box = self.left, self.top, self.right, self.bottom
        part = np.asarray(image.resize((self.width, self.height), method, box=box))
        if self.flip:
            part = part[:, ::-1]
        pixels = np.zeros((*self.canvas, *part.shape[2:]), part.dtype)
        pixels[:self.height, :self.width] = part
        return pixels

    def to_view(self, yx):
        """(..., 2) pixels of the image -> fractions of the rectangle, mirrored with it."""
        size = self.bottom - self.top, self.right - self.left
        yx = (yx - (self.top, self.left)) / size
        if self.flip:
            yx[..., 1] = 1 - yx[..., 1]
        return yx

    def to_canvas(self, yx):
        """(..., 2) fractions of the rectangle -> fractions of the padded canvas."""
        return yx * (self.height / self.canvas[0], self.width / self.canvas[1])

    def to_image(self, yx):
        """(..., 2) fractions of the padded canvas -> pixels of the image, for views that predict,
        which are never mirrored."""
        size = self.bottom - self.top, self.right - self.left
        yx = yx * (self.canvas[0] / self.height, self.canvas[1] / self.width)
        return yx * size + (self.top, self.left)


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
    mirrored = flip and rng.random() < 0.5
    return View(*start, *end, *shown.tolist(), canvas, mirrored)


def jittered(image, c, rng, flip):
    """A `train_view` of a whole image, as det, cap, pan and vps learn from it."""
    d = c.data
    return train_view(whole(image), c.model.image_size, rng, d.scale_min, d.scale_max, flip)


def view_boxes(view, boxes):
    """(N, 4) yxyx pixels -> (N, 4) yxyx fractions of the view's rectangle, clipped to it; empty if
    outside."""
    corners = view.to_view(boxes.reshape(-1, 2, 2))
    return np.hstack([corners.min(1), corners.max(1)]).clip(0, 1)


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
    view = jittered(image, c, rng, d.flip)
    boxes = view_boxes(view, record["boxes"])
    usable = visible(boxes) & ~record["iscrowd"]
    order = rng.permutation(np.flatnonzero(usable))[:d.max_objects]
    boxes, labels = boxes[order], record["labels"][order]
    missing = d.max_objects - len(order)
    if d.noise_boxes and missing:
        boxes = np.concatenate([boxes, noise_boxes(boxes, missing, rng)])
        labels = np.append(labels, [tokenizer.FAKE_LABEL] * missing)
    objects = pad_objects(view, boxes, labels, d.max_objects)
    corrupt = rng.random((d.max_objects, 2), np.float32)
    return pixels_of(view, image) | objects | {"corrupt": corrupt}


def pixels_of(view, image):
    return {
        "image": view.image(image),
        "size": np.array([view.height, view.width])}


def visible(boxes):
    return (boxes[:, 2:] > boxes[:, :2]).all(-1)


def noise_boxes(boxes, count, rng):
    """`count` boxes that look like objects and are none (2109.10852, section 2.4): near-copies of
    real boxes, real boxes elsewhere, random boxes. boxes: (N, 4) yxyx fractions of the view."""
    def around(centers, sizes):
        return np.hstack([centers - sizes / 2, centers + sizes / 2])

    copies = rng.integers(count + 1) if len(boxes) else 0
    others = count - copies
    repeats = count // max(len(boxes), 1) + 1
    pool = np.tile(boxes, (repeats, 1))
    near = rng.permutation(pool)[:copies]
    sizes = near[:, 2:] - near[:, :2]
    near = near + truncated_normal(rng, near.shape, 0.05) * np.tile(sizes, 2)
    moved = rng.permutation(pool)[:others]
    sizes = moved[:, 2:] - moved[:, :2]
    moved = around(rng.random(sizes.shape), sizes)
    centers = rng.random((others, 2))
    sizes = np.abs(truncated_normal(rng, centers.shape, 0.5))
    drawn = around(centers, sizes)
    far = rng.permutation(np.concatenate([moved, drawn]))[:others]
    return rng.permutation(np.concatenate([near, far])).clip(0, 1)


def det_batch(x, c):
    """Stacked examples -> the tokens of a Batch."""
    return tokenizer.encode_detection(
        x["boxes"], x["labels"], c.vocab, x["corrupt"],
        c.data.noise_weight, c.data.pad_weight)


def collate(task, c):
    """A task's function of examples -> Batch. (A partial, so that workers can be sent it.)"""
    return partial(collate_examples, task, c)


def collate_parts(c, parts):
    """Items of Streams, of one task -> it and its Batch."""
    (task, *_), examples = zip(*parts)
    return task, collate_examples(task, c, examples)


def collate_examples(task, c, examples):
    x = {}                                             # arrays are stacked, lists listed
    for key, value in examples[0].items():
        values = [example[key] for example in examples]
        x[key] = values if isinstance(value, list) else torch.from_numpy(np.stack(values))
    skipped = tuple(itertools.chain(*x.pop("skipped", ())))
    batch = Batch(**COLLATE[task](x, c)._asdict())
    return batch._replace(images=x.get("image"), sizes=x.get("size"), skipped=skipped)


# --------------------------------------------------------------------------------------------------
# streams: which example comes when

@dataclass
class TrainStream(Dataset):
    """Example number p of an endless, shuffled stream of one task's. An unreadable image is
    replaced by the next one."""
    source: "Source"
    task: str
    c: object                                          # a configuration
    seed: int

    def __post_init__(self):
        self.count = self.source.count(self.task)
        if self.count == 0:
            raise DataError(f"the training data has nothing to learn {self.task} from")

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
            except DataError as e:
                skipped.append(str(e))
                continue
            rng = np.random.default_rng([self.seed, list(EXAMPLES).index(self.task), p])
            return EXAMPLES[self.task](record, self.c, rng) | {"skipped": skipped}
        raise DataError(
            f"none of the {self.count} training images can be read, the last: {skipped[-1]}")


@dataclass
class Streams(Dataset):
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
    return np.random.default_rng([seed, epoch]).permutation(count)


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
class EvalSet(Dataset):
    """Record i of a source; of an unreadable image only the message, a str."""
    source: "Source"

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            return self.source[i]
        except DataError as e:
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
    boxes = view_boxes(view, record["boxes"])
    has_polygons = np.array(list(map(bool, record["polygons"])), bool)
    usable = visible(boxes) & ~record["iscrowd"] & has_polygons
    order = rng.permutation(np.flatnonzero(usable))[:d.max_instances]
    objects = pad_objects(view, boxes[order], record["labels"][order], d.max_instances)
    polygons = [record["polygons"][i] for i in order]
    points = polygon_points(view, polygons, d.max_instances, d.max_points)
    return pixels_of(view, image) | objects | {"points": points}


def seg_batch(x, c):
    return tokenizer.encode_instances(
        tokenizer.PROMPT_SEG,
        x["boxes"],
        x["labels"],
        x["points"],
        c.vocab)


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
    region = around_box(image, record["boxes"][n], d.crop_margin)
    view = train_view(
        region, c.model.image_size, rng, d.instance_scale_min, d.instance_scale_max, flip=False)
    box = view_boxes(view, record["boxes"][[n]])
    points = keypoint_points(view, record["keypoints"][n])[None]
    mask = rng.random(points.shape) < rng.random()
    objects = pad_objects(view, box, record["labels"][[n]], 1)
    return pixels_of(view, image) | objects | {"points": points, "mask": mask}


def kpt_batch(x, c):
    return tokenizer.encode_instances(
        tokenizer.PROMPT_KPT,
        x["boxes"],
        x["labels"],
        x["points"],
        c.vocab,
        x["mask"],
        c.data.invisible_weight,
        pad_weight=0.0)


def around_box(image, box, margin):
    """The region of a yxyx box in pixels, widened on each side by `margin` times its size, within
    the image."""
    size = np.tile(box[2:] - box[:2], 2)
    box = box + size * (-margin, -margin, margin, margin)
    return tuple(box.clip(0, whole(image)[2:] * 2).tolist())


def keypoint_points(view, keypoints):
    """(K, 3) yxv pixels -> (2 K,) float32 fractions of the canvas; INVISIBLE_POINT where unlabelled
    or outside of the view."""
    points = view.to_view(keypoints[:, :2])
    inside = ((points > 0) & (points < 1)).all(-1)
    shown = inside & (keypoints[:, 2] > 0)
    points = view.to_canvas(points)
    points[~shown] = tokenizer.INVISIBLE_POINT
    return points.astype(np.float32).ravel()


def cap_example(record, c, rng):
    """image, size, captions: captions_per_image str, drop (captions_per_image, caption_length)."""
    d, image = c.data, record["image"]
    if d.color_jitter:
        image = jitter_colors(image, d.color_jitter, rng)
    view = jittered(image, c, rng, d.caption_flip)
    texts, count = record["captions"] or [""], d.captions_per_image
    rounds = -(-count // len(texts))
    order = rng.permutation(len(texts) * rounds)[:count]
    chosen = [texts[i % len(texts)] for i in order]
    drop = rng.random((count, d.caption_length), np.float32)
    return pixels_of(view, image) | {"captions": chosen, "drop": drop}


def cap_batch(x, c):
    d, drop = c.data, x["drop"]                        # (B, captions, length)
    tokens = tokenizer.encode_captions(
        list(itertools.chain(*x["captions"])),
        c.vocab,
        d.caption_length,
        drop.flatten(0, 1),
        d.caption_drop,
        pad_weight=d.caption_pad_weight)
    return tokenizer.Tokens(*(rows.view_as(drop) for rows in tokens))


def jitter_colors(image, strength, rng):
    """PIL RGB -> the same with brightness, contrast, saturation and hue changed at random, four
    times in five, and grey one time in five (SimCLR's distortion, arXiv 2002.05709, appendix A)."""
    low, high = max(0, 1 - 0.8 * strength), 1 + 0.8 * strength
    kinds = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
    for change in rng.permutation(4) if rng.random() < 0.8 else ():
        if change < 3:
            image = kinds[change](image).enhance(rng.uniform(low, high))
        else:
            hue, saturation, value = image.convert("HSV").split()
            turn = int(rng.uniform(-0.2, 0.2) * strength * 256)
            hue = hue.point(lambda h: (h + turn) % 256)
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image.convert("L").convert("RGB") if rng.random() < 0.2 else image


def gen_example(record, c, rng):
    """pixels (frames, H, W, C) uint8, context frames first, of an image one frame, and label int64.
    DataError if they are not of the size that the model takes."""
    pixels, channels = record["pixels"], c.data.image_channels
    if pixels.ndim == 3:
        pixels = pixels[None]
    expected = *clip_shape(c), channels
    if pixels.shape[:3] != expected[:3] or pixels.shape[3] not in (1, channels):
        raise DataError(
            f"the data is {pixels.shape} (frames, height, width, channels), but sample_size, "
            f"image_channels and frames ask for {expected}")
    if c.data.flip and rng.random() < 0.5:
        pixels = pixels[:, :, ::-1]
    pixels = np.broadcast_to(pixels, expected).copy()  # grey: equal colours
    return {"pixels": pixels, "label": np.int64(record["label"])}


def gen_batch(x, c):
    """What is to be generated, and the context frames before it."""
    pixels, first = x["pixels"].movedim(-1, 1), c.model.cond_frames            # (B, C, T, H, W)
    cond = {"labels": x["label"]}
    if first:
        cond["frames"] = pixels[:, :, :first].contiguous()
    B, C = pixels.shape[:2]
    targets = pixels[:, :, first:].reshape(B, C, *c.model.sample_shape[1:])    # an image: no T
    return Batch(targets.contiguous(), torch.ones(B), cond=cond)


def clip_shape(c):
    """(frames, height, width) of an example of generation, context frames counted."""
    _, *frames, height, width = c.model.sample_shape
    return sum(frames or [1]) + c.model.cond_frames, height, width


def map_example(record, c, rng):
    """Of the last of the record's frames: image (H, W, 3), size (2,), map (2, h, w) and known
    (h, w), see `id_maps`. Of those before it, the oldest first: past (2 P, h, w), zero where one is
    missing or was dropped."""
    d, image, past_frames = c.data, record["images"][-1], c.model.past_frames
    if d.color_jitter:
        image = jitter_colors(image, d.color_jitter, rng)
    view = jittered(image, c, rng, d.flip)
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
    most, rng = c.data.max_segments - 1, rng if c.data.random_ids else np.random.default_rng(0)
    view, frames = on_canvas(view, c.model.sample_size), map(Image.fromarray, record["maps"])
    numbers = np.stack([view.image(frame, Image.NEAREST) for frame in frames])
    present, places = np.unique(numbers, return_inverse=True)
    rows = [record["segments"].get(number, {"category_id": 0}) for number in present.tolist()]
    labelled = np.flatnonzero([row["category_id"] for row in rows])
    chosen = rng.permutation(labelled)[:most]
    table = np.zeros((len(rows), 3), np.uint8)
    for n, instance in zip(chosen, rng.permutation(most) + 1):
        table[n] = rows[n]["category_id"], instance, not rows[n].get("iscrowd")
    return np.moveaxis(table[places.reshape(numbers.shape)], -1, 1)


def on_canvas(view, canvas):
    """The same view on another canvas."""
    sides = zip((view.height, view.width), canvas, view.canvas)
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
    "seg": seg_batch,
    "kpt": kpt_batch,
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
    reports, if the data have it). DataError if it cannot be."""
    check_split(split)
    choices = SOURCES[task]
    if c.data.data not in choices:
        raise DataError(
            f"data is {c.data.data!r}, expected one of {', '.join(choices)} for the task {task}")
    return choices[c.data.data](c, split)


class Source:
    """What sources share. A source has a length and a record per item; `classes` (names); for
    objects and captions `truth(task)`, in COCO's format; to learn keypoints from, `people` and a
    record per `person`. Labels of objects begin at 1, for 0 is padding."""
    endless, first_label = False, 0

    @cached_property
    def categories(self):
        """[{id, name, label, maybe keypoints and skeleton}]"""
        return [
            {"id": i, "name": name, "label": i}
            for i, name in enumerate(self.classes, self.first_label)]

    def count(self, task):
        """How many training examples there are of a task."""
        return len(self.people if task in PER_PERSON else self)

    def record(self, task, i):
        """The record of training example i of a task."""
        return self.person(i) if task in PER_PERSON else self[i]


SPLITS = "train", "val", "test"
TWO_SPLITS = "train", "val"                            # of data that come without a test split
# of each task COCO's name of the annotation file, our fields that name another, what it annotates
COCO_FILES = {
    "det": ("instances", "json", "bbox"),
    "seg": ("instances", "json", "bbox"),
    "kpt": ("person_keypoints", "keypoints", "keypoints"),
    "cap": ("captions", "captions", "caption"),
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


def check_split(split, known=SPLITS):
    if split not in known:
        raise DataError(f"unknown split {split!r}, expected one of {', '.join(known)}")


def check_folder(folder, expected):
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder, expected {expected}")


def seed_and_count(c, split):
    """Of a drawn dataset; in training there is no end."""
    return c.data.data_seed, None if split == "train" else c.data.val_count


def shapes_source(c, split):
    return Shapes(split, max(c.model.image_size), c.data.max_shapes, *seed_and_count(c, split))


def coco_source(task, c, split):
    kind, field, _ = COCO_FILES[task]                  # a test split is in data_dir
    usual = f"annotations/{kind}_{split}2017.json", f"{split}2017"
    paths = coco_paths(c, split, (field, "images"), usual)
    return Coco(*paths, c.vocab.max_label, c.data.bad_boxes)


def coco_paths(c, split, named, usual):
    """What the options --SPLIT_NAME say, or usual names in data_dir. DataError if neither does."""
    folder, options = c.data.data_dir, [f"{split}_{name}" for name in named]
    paths = [getattr(c.data, option, "") for option in options]
    if not folder and not all(paths):
        raise DataError(
            f"data is 'coco': name a folder in COCO's layout with --data_dir, or all of "
            f"{', '.join('--' + option for option in options)}")
    return [path or f"{folder}/{name}" for path, name in zip(paths, usual)]


def clips_source(c, split):
    frames, *size = clip_shape(c)
    return ShapeClips(split, max(size), frames, *seed_and_count(c, split))


def shape_maps_source(c, split):
    size, past = max(c.model.image_size), c.model.past_frames
    frames = c.data.clip_frames if past else 1
    return ShapeMaps(split, size, c.data.max_shapes, frames, *seed_and_count(c, split), past)


def coco_maps_source(c, split):
    masks = f"annotations/panoptic_{split}2017"
    usual = f"{masks}.json", masks, f"{split}2017"
    return coco_maps(*coco_paths(c, split, ("json", "masks", "images"), usual), c.model.past_frames)


def video_masks_source(c, split):
    reader = VIDEO_MASKS[c.data.data]
    check_split(split, TWO_SPLITS)
    if not c.data.data_dir:
        raise DataError(f"data is {c.data.data!r}: name with --data_dir {reader.__doc__}")
    return reader(c.data.data_dir, split, c.model.past_frames)


def files_source(c, split):
    folder, kind = c.data.data_dir, c.data.data
    if not folder:
        raise DataError(f"data is {kind!r}: name with --data_dir the folder of {LAYOUTS[kind]}")
    frames, *size = clip_shape(c)
    reader, *options = {
        "mnist": (load_mnist,),
        "cifar10": (load_cifar10,),
        "images": (ClipFolder, size),
        "videos": (ClipFolder, size, frames),
    }[kind]
    return reader(folder, split, *options)


# of each task what --data can be, a function of (c, split)
SOURCES = {
    task: {"shapes": shapes_source, "coco": partial(coco_source, task)} for task in COCO_FILES}
SOURCES["pan"] = SOURCES["vps"] = {
    "shapes": shape_maps_source,
    "coco": coco_maps_source,
    **dict.fromkeys(("kitti_step", "cityscapes_vps", "davis"), video_masks_source),
}
SOURCES["gen"] = SOURCES["ar"] = {"shapes": clips_source} | dict.fromkeys(LAYOUTS, files_source)


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
        _, left_hand, right_hand, left_foot, right_foot = self.keypoints
        neck, left, crotch, right = self.place(TORSO)
        body = [neck, left_hand, left, left_foot, crotch, right_foot, right, right_hand]
        head = arc(12) * 0.3 + (-0.7, 0)
        return [self.place(head), np.array(body)]


def random_kind(rng):
    """Kind and colour of a shape."""
    kind = KINDS[rng.integers(len(KINDS))]
    return kind, list(COLORS)[rng.integers(len(COLORS))]


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
        kind, color = random_kind(rng)
        for _ in range(10):
            shape = random_shape(rng, kind, color, 0.14, 0.26)
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
    canvas = background.resize((4 * background.width,) * 2, Image.NEAREST)
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
    training none is seen twice."""
    endless = True

    def __init__(self, split, size, seed=0, count=None):
        check_split(split)
        self.split, self.size, self.seed = split, size, seed
        self.length = count or (1 << 40 if split == "train" else 500)

    def __len__(self):
        return self.length

    def seeds(self, i, *kind):
        return self.seed, SPLITS.index(self.split), i, *kind


class Shapes(Drawn):
    """Drawn scenes with COCO-style truth."""
    classes, first_label = list(KINDS), 1

    def __init__(self, split, size=64, max_shapes=4, seed=0, count=None):
        super().__init__(split, size, seed, count)
        self.max_shapes = max_shapes
        self.people = range(self.length)               # one can be drawn for every number
        skeleton = {"keypoints": list(KEYPOINTS), "skeleton": SKELETON}
        self.categories[KINDS.index("figure")] |= skeleton

    def __getitem__(self, i):
        """Record i, a dict. N objects; pixel coordinates are floats, (y, x) order, of the image.
        image: PIL RGB    image_id: int    labels: (N,) int64, the label that has a class token
        boxes: (N, 4) float32 yxyx    iscrowd: (N,) bool    polygons: per object a list of (P, 2)
        keypoints: (N, K, 3) float32, y x visibility (0, 1 or 2)    captions: list of str
        """
        return draw_record(self.seeds(i), self.size, self.max_shapes)

    def person(self, i):
        """A record that has a figure, and which of its objects that is."""
        record = draw_record(self.seeds(i, 1), self.size, self.max_shapes, needed="figure")
        label = KINDS.index("figure") + 1
        return record | {"person": record["labels"].tolist().index(label)}

    def truth(self, task="det", ending="png"):
        """The whole split as a dict in COCO's format, of which pycocotools makes an index."""
        images, annotations, needed = [], [], COCO_FILES[task][-1]
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
                    ids = {"id": len(annotations) + 1, "image_id": image_id}
                    annotations.append(ids | annotation)
        categories = [k for k in self.categories if task not in PER_PERSON or "keypoints" in k]
        return {"images": images, "annotations": annotations, "categories": categories}


@lru_cache(maxsize=512)                                # tasks learned at once see the same scenes
def draw_record(seeds, size, max_shapes, needed=None):
    """The record of a scene; with `needed` the first scene that has such a kind of shape."""
    rng = np.random.default_rng(seeds)
    shapes = random_scene(rng, max_shapes)
    while needed and needed not in [shape.kind for shape in shapes]:
        shapes = random_scene(rng, max_shapes)
    labels = [KINDS.index(shape.kind) + 1 for shape in shapes]
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
        "labels": np.array(labels, np.int64),
        "boxes": np.array(boxes, np.float32),
        "iscrowd": np.zeros(len(shapes), bool),
        "polygons": polygons,
        "keypoints": keypoints,
        "captions": captions_of(shapes),
    }


def coco_object(record, n):
    """Object n of a drawn record -> an annotation in COCO's format."""
    y0, x0, y1, x1 = record["boxes"][n].astype(float).round(2)
    w, h = round(x1 - x0, 2), round(y1 - y0, 2)
    yxv = record["keypoints"][n].astype(float).round(2)
    polygons = record["polygons"][n]
    annotation = {
        "category_id": int(record["labels"][n]),
        "iscrowd": 0,
        "bbox": [x0, y0, w, h],
        "area": sum(map(polygon_area, polygons)),
        "segmentation": [polygon[:, ::-1].ravel().tolist() for polygon in polygons],
    }
    if yxv.any():
        annotation["keypoints"] = yxv[:, [1, 0, 2]].ravel().tolist()
        annotation["num_keypoints"] = len(yxv)
    return annotation


class ShapeClips(Drawn):
    """One drawn shape on a plain ground, at rest in an image or moving through a clip."""
    classes = list(KINDS)

    def __init__(self, split, size=32, frames=1, seed=0, count=None):
        super().__init__(split, size, seed, count)
        self.frames = frames

    def __getitem__(self, i):
        """Record i for generation, a dict, as every source for it gives:
        pixels: uint8 (H, W, C), of a clip (T, H, W, C), C is 1 or 3
        label: int, index in the source's classes; -1 unknown
        """
        rng = np.random.default_rng(self.seeds(i, 2))  # 2: unlike Shapes
        shape = random_shape(rng, *random_kind(rng), 0.22, 0.36)
        grey = tuple(rng.integers(40, 130, 3).tolist())
        background = Image.new("RGB", (self.size, self.size), grey)
        turn, speed = rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.08)
        track = moving(
            shape, turn, speed, range(self.frames), shape.radius + 0.01, 0.99 - shape.radius)
        frames = [draw_scene([shape], background) for shape in track]
        pixels = np.stack(frames) if self.frames > 1 else np.asarray(frames[0])
        return {"pixels": pixels, "label": KINDS.index(shape.kind)}


GROUNDS = {"plain": (1, 32), "blotchy": (8, 72)}       # stuff, as options of `background`


class ShapeMaps(Drawn):
    """Drawn scenes with panoptic truth, and clips of them: shapes are things that cross each other,
    leave and return, the ground is stuff of one of two kinds. past: earlier frames that are read to
    learn from a frame."""
    classes = [*KINDS, *GROUNDS]

    def __init__(self, split, size=64, max_shapes=4, frames=1, seed=0, count=None, past=0):
        super().__init__(split, size, seed, count)
        self.max_shapes, self.frames, self.past = max_shapes, frames, past
        self.categories = segment_categories(self.classes, KINDS)

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
        rng = np.random.default_rng(self.seeds(i, 3))
        count = rng.integers(1, self.max_shapes + 1)
        shapes = [random_shape(rng, *random_kind(rng), 0.14, 0.26) for _ in range(count)]
        turns, speeds = rng.uniform(0, 2 * np.pi, count), rng.uniform(0.02, 0.06, count)
        # They turn outside of the image.
        tracks = [moving(*start, times, -0.2, 1.2) for start in zip(shapes, turns, speeds)]
        stuff = list(GROUNDS)[rng.integers(2)]
        ground = background(rng, self.size, *GROUNDS[stuff])
        kinds = [*(shape.kind for shape in shapes), stuff]
        images, maps = [], []
        for moved in zip(*tracks):
            numbers = Image.new("L", (4 * self.size,) * 2, len(kinds))
            draw_polygons(numbers, moved, range(1, count + 1))
            images.append(draw_scene(moved, ground))
            maps.append(np.asarray(numbers)[2::4, 2::4])
        return {
            "images": images,
            "id": i + 1,
            "name": f"{i + 1:06}",
            "maps": np.stack(maps).astype(np.int32),
            "segments": {
                n: {"category_id": 1 + self.classes.index(kind)}
                for n, kind in enumerate(kinds, 1)},
        }


def segment_categories(names, things):
    """Categories of panoptic masks, numbered from 1 on."""
    return [
        {"id": i, "name": name, "isthing": int(name in things), "label": i}
        for i, name in enumerate(names, 1)]


def moving(shape, turn, speed, times, low, high):
    """The shape at these times, where its coordinates turn back at both ends."""
    room, steps = high - low, np.multiply.outer(times, (np.sin(turn), np.cos(turn)))
    path = (shape.y, shape.x) + speed * steps          # (T, 2) yx
    path = high - np.abs((path - low) % (2 * room) - room)
    return [replace(shape, y=y, x=x) for y, x in path]


def export_shapes(folder, count, size, seed, image_format):
    """Write `count` training scenes and 500 held-out ones in COCO's layout."""
    os.makedirs(f"{folder}/annotations", exist_ok=True)
    for split in SPLITS:
        os.makedirs(f"{folder}/{split}2017", exist_ok=True)
        number = count if split == "train" else min(count, 500)
        source = Shapes(split, size, seed=seed, count=number)
        for task, (kind, *_) in COCO_FILES.items():
            with open(f"{folder}/annotations/{kind}_{split}2017.json", "w") as f:
                json.dump(source.truth(task, image_format), f)
        for i in range(number):
            path = f"{folder}/{split}2017/{i + 1:012d}.{image_format}"
            source[i]["image"].save(path, quality=95)


# --------------------------------------------------------------------------------------------------
# coco: images and JSON files of the user's

UNREADABLE = OSError, SyntaxError, Image.DecompressionBombError            # what PIL raises


def load_image(path, size=None):
    """Any image file -> PIL RGB. size: (height, width) that its labels are for; a photo that is
    stored turned is turned upright unless only the stored form fits it. DataError, naming the file,
    if it cannot be read or fits neither way."""
    try:
        with Image.open(path) as stored:
            stored.load()
            for image in (ImageOps.exif_transpose(stored), stored):
                height, width = image.height, image.width
                if size is None or (height, width) == tuple(size):
                    return to_rgb(image)
    except UNREADABLE as e:
        raise DataError(f"{path}: not a readable image ({e})") from e
    raise DataError(
        f"{path}: the image is {height}x{width}, its labels are for {size[0]}x{size[1]}")


def to_rgb(image):
    """PIL image of any mode -> RGB; 16 bits are scaled, transparency becomes white."""
    if image.mode.startswith(("I", "F")):              # convert() would clip, not scale
        pixels = np.asarray(image).astype(float)
        top = 65535 if pixels.max() > 255 else 255
        if image.mode == "F" and pixels.max() <= 1:
            top = 1
        pixels = pixels.clip(0, top) * (255 / top)
        image = Image.fromarray(pixels.round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class Packed:
    """A list of dicts, pickled one behind the other. As objects they would take several times the
    memory, and every worker that looks at one would copy it."""

    def __init__(self):
        self.content, self.ends = bytearray(), array("q", [0])

    def __getitem__(self, n):
        return pickle.loads(self.content[self.ends[n]:self.ends[n + 1]])

    def append(self, row):
        self.content += pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
        self.ends.append(len(self.content))


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
        self.decoded, self.annotations = {}, Packed()

        def pack(row):                                 # while the file is read
            if "image_id" in row:
                self.annotations.append(row)
                return None
            return row

        truth = read_json(json_path, hook=pack)
        self.images = [{key: row.get(key) for key in IMAGE_KEYS} for row in truth["images"]]
        places = np.array(self.checked(truth, bad_boxes), int)
        self.rows = places.argsort(kind="stable")      # numbers of annotations, by image
        self.starts = np.searchsorted(places[self.rows], range(len(self.images) + 1))
        ids = [category["id"] for category in truth["categories"]]
        self.label_of = assign_labels(ids, max_label, json_path)
        self.categories = [labelled(row, self.label_of[row["id"]]) for row in truth["categories"]]
        self.classes = [category["name"] for category in self.categories]

    def checked(self, truth, bad_boxes):
        """Of each annotation the number of its image, -1 to leave it out. DataError with all that
        is wrong."""
        sizes = image_sizes(self.json_path, truth, self.image_dir)
        numbers = {image_id: i for i, image_id in enumerate(sizes)}
        categories, seen = {category["id"] for category in truth["categories"]}, set()
        places, problems = [], {}
        for a in self.annotations:
            what, shown = problem(a, sizes, categories, seen)
            if what:
                problems.setdefault(what, []).append(shown)
            places.append(-1 if what else numbers[a["image_id"]])
        problems["annotations lack image_id"] = [
            row for row in truth["annotations"] if row is not None]
        if bad_boxes == "drop" and (bad := problems.pop(BAD_BOXES, None)):
            warnings.warn(f"{self.json_path}: left out {len(bad)} boxes, empty or outside their "
                          f"image, such as {bad[0]}")
        refuse(self.json_path, problems)
        return places

    def __len__(self):
        return len(self.images)

    def of_image(self, i):
        """Annotations of image i."""
        return [self.annotations[n] for n in self.rows[self.starts[i]:self.starts[i + 1]]]

    def __getitem__(self, i):
        image, annotations = self.images[i], self.of_image(i)
        found = [a for a in annotations if "bbox" in a]
        size = image["height"], image["width"]
        path = os.path.join(self.image_dir, image["file_name"])
        picture = self.decoded.get(i) or load_image(path, size)
        if len(self) <= 200:                           # few images are decoded once
            self.decoded[i] = picture
        xywh = np.array([a["bbox"] for a in found], np.float32)
        x, y, w, h = xywh.reshape(-1, 4).T
        boxes = np.stack([y, x, y + h, x + w], -1)
        keypoints = [a.get("keypoints") or [] for a in found]
        most = max(map(len, keypoints), default=0)
        keypoints = np.array([k or [0] * most for k in keypoints], np.float32)
        keypoints = keypoints.reshape(len(found), most // 3, 3)
        return {
            "image": picture,
            "image_id": image["id"],
            "labels": np.array([self.label_of[a["category_id"]] for a in found], np.int64),
            "boxes": boxes.clip(0, np.array(size * 2, np.float32)),
            "iscrowd": np.array([a.get("iscrowd", 0) for a in found], bool),
            "polygons": [polygons_of(a) for a in found],
            "keypoints": keypoints[..., [1, 0, 2]],
            "captions": [a["caption"].strip() for a in annotations if "caption" in a],
        }

    @cached_property
    def people(self):
        """(image, object) numbers of annotations with a labelled keypoint that are no crowds."""
        found = []
        for i in range(len(self)):
            for n, a in enumerate(a for a in self.of_image(i) if "bbox" in a):
                visible = a.get("keypoints", [])[2::3]
                if any(visible) and not a.get("iscrowd"):
                    found.append((i, n))
        return found

    def person(self, i):
        """The record that person i is in, and which of its objects that is."""
        image, n = self.people[i]
        return self[image] | {"person": n}

    def truth(self, task="det"):
        """The dataset as a dict in COCO's format, without what was left out. Every task has its own
        file."""
        annotations = []
        for a in itertools.chain.from_iterable(map(self.of_image, range(len(self)))):
            if "bbox" in a:                            # pycocotools needs both
                _, _, w, h = a["bbox"]
                a = {"iscrowd": 0, "area": w * h} | a
            annotations.append(a | {"id": len(annotations) + 1})
        return {"images": self.images, "annotations": annotations, "categories": self.categories}


IMAGE_KEYS = "id", "file_name", "height", "width"
BAD_BOXES = "boxes are empty or outside their image (--bad_boxes=drop leaves them out)"


def problem(a, sizes, categories, seen):
    """(what is wrong with an annotation, its name), or (None, None). sizes: {image id: (height,
    width)}; categories: known ids; seen: annotation ids so far, to which its own is added."""
    name, image, category = f"annotation {a.get('id', '?')}", a["image_id"], a.get("category_id")
    if image not in sizes:
        return "annotations are of an image_id that no image has", f"{image} ({name})"
    if "id" in a and a["id"] in seen:
        return "annotation ids appear twice", a["id"]
    seen.add(a.get("id"))
    if "caption" in a:
        return None, None
    if category not in categories:
        return "annotations have a category_id that no category has", f"{category} ({name})"
    if len(a.get("bbox", ())) != 4:
        return "annotations have no bbox of four numbers", name
    height, width = sizes[image]
    x, y, w, h = map(float, a["bbox"])
    inside = min(x, y) >= -1 and x + w <= width + 1 and y + h <= height + 1
    if not (inside and min(w, h) > 0):                 # NaN is not inside
        return BAD_BOXES, f"{name} {a['bbox']} in {width}x{height}"
    return None, None


def image_sizes(path, truth, image_dir=None):
    """{image id: (height, width)} of a file in COCO's format. DataError if what is said about its
    images is wrong; image_dir: the folder that has them, if it is to be looked at."""
    images = truth["images"]
    if image_dir is not None:
        check_folder(image_dir, f"the images of {path}")
    refuse(path, {
        f"images lack one of {', '.join(IMAGE_KEYS)}":
            [image for image in images if not {*IMAGE_KEYS} <= image.keys()],
    })
    files = [image["file_name"] for image in images]
    refuse(path, {
        "image ids appear twice": twice([image["id"] for image in images]),
        "category ids appear twice": twice([category["id"] for category in truth["categories"]]),
        f"images are not in {image_dir}": missing_files(image_dir, files) if image_dir else [],
    })
    return {image["id"]: (image["height"], image["width"]) for image in images}


def refuse(path, problems):
    """DataError about a file if there is any {what: names of those}, with the first five names of
    each."""
    lines = [f"{path}:"]
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            lines.append(f"{len(names)} {what}: {', '.join(map(str, names[:5]))}{more}")
    if lines[1:]:
        raise DataError("\n  ".join(lines))


def read_json(path, lists=("images", "annotations"), hook=None):
    """An annotation file -> dict with these lists, and that of its categories. hook: what each dict
    in it becomes."""
    if not os.path.exists(path):
        raise DataError(f"{path}: no such file, expected annotations in COCO's JSON format")
    content = read_bytes(path)
    try:
        content = content.decode(json.detect_encoding(content))           # frees the bytes
        truth = json.loads(content, object_hook=hook)
    except ValueError as e:                            # UnicodeDecodeError, too
        raise DataError(f"{path}: not JSON ({e})") from e
    for key in lists:
        if not isinstance(truth, dict) or not isinstance(truth.get(key), list):
            raise DataError(f"{path}: expected an object with a list {key!r}, as in COCO's format")
    return {"categories": []} | truth                  # captions have none


def polygons_of(annotation):
    """An annotation's polygons, a list of (P, 2) yx arrays; none if it is a run-length mask, as
    crowds are."""
    parts = annotation.get("segmentation", [])
    if not isinstance(parts, list):
        return []
    return [
        np.array(xy, np.float32).reshape(-1, 2)[:, ::-1]
        for xy in parts if len(xy) >= 6]


def twice(ids):
    seen = set()
    return [i for i in ids if i in seen or seen.add(i)]


def missing_files(folder, names):
    """Those of `names` (paths relative to the folder) that it lacks; lists each folder once, not
    each file."""
    present = set()
    for sub in set(map(os.path.dirname, names)):
        path = os.path.join(folder, sub)
        if os.path.isdir(path):
            present |= {(sub, file) for file in os.listdir(path)}
    return [name for name in names if os.path.split(name) not in present]


def labelled(category, label):
    """What is kept of a category of a file, and its label."""
    known = "id", "name", "isthing", "keypoints", "skeleton"
    return {key: category[key] for key in known if key in category} | {"label": label}


def assign_labels(ids, max_label, where):
    """{category id: label in 1..max_label}: ids that can be labels stay, others take the free
    labels from 1 on."""
    if len(ids) > max_label:
        raise DataError(
            f"{where}: {len(ids)} categories, but the vocabulary has room for {max_label} (raise "
            f"coord_shift)")
    kept = {i for i in ids if isinstance(i, int) and 1 <= i <= max_label}
    free = (n for n in range(1, max_label + 1) if n not in kept)
    return {i: i if i in kept else next(free) for i in ids}


# --------------------------------------------------------------------------------------------------
# panoptic masks of the user's. Records as of ShapeMaps

class MaskClips(Source):
    """Images and videos with panoptic truth.

    clips: [(id, name, paths of images, maps)], an image is a clip of one frame; without paths of
           images, records have none
    read:  a map, such as its path -> numbers of segments (H, W) and {number: row}, as in records
    past:  earlier frames that are read to learn from a frame
    """

    def __init__(self, clips, read, categories, past=0):
        self.clips, self.read, self.categories, self.past = clips, read, categories, past
        self.frames = [(n, t) for n, clip in enumerate(clips) for t in range(len(clip[3]))]

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        return self.window(i, 0, len(self.clips[i][3]))

    def count(self, task):
        return len(self.frames)

    def record(self, task, i):
        """To learn from: a frame, and those before it."""
        n, last = self.frames[i]
        return self.window(n, max(last - self.past, 0), last + 1)

    def window(self, n, start, end):
        clip_id, name, images, maps = self.clips[n]
        numbers, rows = zip(*map(self.read, maps[start:end]))
        return {
            "images": [load_image(path, m.shape) for path, m in zip(images[start:end], numbers)],
            "id": clip_id,
            "name": name,
            "maps": np.stack(numbers),
            "segments": {number: row for frame in rows for number, row in frame.items()},
        }


def coco_maps(json_path, masks, image_dir=None, past=0, videos=False, truth_json=""):
    """Images with COCO's panoptic format: a JSON file, a folder of PNGs whose colour R + 256 G +
    65536 B is the id of a segment, 0 of none, and the folder of the images, if they are to be read.
    Labels count the categories by id. All is checked here, of more than 2000 images the ids in the
    PNGs of the first 2000; DataError names each kind of problem, with a few examples and their
    number.

    videos:     names of images begin with that of their video, and a _
    truth_json: of what the JSON file holds the results; it has the images and categories
    """
    truth = read_json(truth_json or json_path)
    if truth_json:
        truth["annotations"] = read_json(json_path, ("annotations",))["annotations"]
    check_folder(masks, f"the PNGs of {json_path}")
    rows = sorted(truth["categories"], key=lambda row: row["id"])
    categories = [labelled(row, n) for n, row in enumerate(rows, 1)]
    label_of = {row["id"]: row["label"] for row in categories}
    check_coco_maps(json_path, truth, masks, image_dir, label_of.keys())
    of_image, clips = {a["image_id"]: a for a in truth["annotations"]}, {}
    for image in truth["images"]:
        annotation, clip_id = of_image[image["id"]], image["id"]
        name = os.path.splitext(image["file_name"])[0]
        if videos:
            clip_id = name = name.partition("_")[0]
        clip = clips.setdefault(clip_id, (clip_id, name, [], []))
        if image_dir is not None:
            clip[2].append(f"{image_dir}/{image['file_name']}")
        segments = {
            row["id"]: row | {"category_id": label_of[row["category_id"]]}
            for row in annotation["segments_info"]}
        clip[3].append((f"{masks}/{annotation['file_name']}", segments))
    return MaskClips(list(clips.values()), read_listed, categories, past)


def read_listed(listed):
    """A PNG whose segments a JSON file lists."""
    path, segments = listed
    return read_ids(path), segments


def check_coco_maps(path, truth, masks, image_dir, known):
    """DataError if maps, their segments or categories (known: ids of these) are wrong."""
    annotations, sizes = truth["annotations"], image_sizes(path, truth, image_dir)
    annotated = [a.get("image_id") for a in annotations]
    refuse(path, {
        "categories lack isthing": [k["name"] for k in truth["categories"] if "isthing" not in k],
        "annotations lack one of image_id, file_name, segments_info": [
            i for i, a in zip(annotated, annotations)
            if not {"image_id", "file_name", "segments_info"} <= a.keys()],
        "annotations are of an image_id that no image has": list(set(annotated) - sizes.keys()),
        "images are annotated twice": twice(annotated),
        "images have no annotation": sorted(sizes.keys() - set(annotated)),
    })
    refuse(path, {
        f"PNGs are not in {masks}": missing_files(masks, [a["file_name"] for a in annotations]),
        "segments have a category_id that no category has": [
            f"{row.get('category_id')} ({a['file_name']}, segment {row.get('id')})"
            for a in annotations for row in a["segments_info"]
            if row.get("category_id") not in known],
    })
    strange, missing = [], []
    for a in annotations[:2000]:
        file, (height, width) = a["file_name"], sizes[a["image_id"]]
        ids = read_ids(f"{masks}/{file}")
        if ids.shape != (height, width):
            h, w = ids.shape
            raise DataError(f"{masks}/{file}: {h}x{w}, its image is {height}x{width}")
        found = set(np.unique(ids).tolist()) - {0}
        listed = {row["id"] for row in a["segments_info"]}
        strange += [f"{i} ({file})" for i in sorted(found - listed)]
        missing += [f"{i} ({file})" for i in sorted(listed - found)]
    refuse(path, {
        "ids in PNGs are not in segments_info": strange,
        "ids in segments_info are not in their PNG": missing,
    })


def read_ids(path):
    """A PNG -> the number that each pixel's colour is (H, W) int32. DataError if it cannot be read
    or has no colours."""
    pixels = read_png(path, ("RGB", "RGBA"), "colours R + 256 G + 65536 B")
    return pixels[..., :3] @ np.array([1, 1 << 8, 1 << 16], np.int32)


def read_png(path, modes, what):
    """The values of an image of one of these modes of PIL."""
    try:
        with Image.open(path) as stored:
            if stored.mode not in modes:
                raise DataError(f"{path}: a {stored.mode} image, expected {what}")
            return np.asarray(stored)
    except UNREADABLE as e:
        raise DataError(f"{path}: not a readable PNG ({e})") from e


CITYSCAPES = (
    "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky "
    "person rider car truck bus train motorcycle bicycle").split()
FOLLOWED = "person", "car"                             # things of KITTI-STEP


def read_step(path):
    """A map of KITTI-STEP: red is the class, 255 none, green and blue the instance."""
    colours = read_ids(path)                           # R + 256 G + 65536 B
    classes, ids = colours & 255, (colours >> 8 & 255) * 256 + (colours >> 16)
    numbers = np.where(classes < len(CITYSCAPES), ids * 256 + classes + 1, 0)
    things = [1 + CITYSCAPES.index(name) for name in FOLLOWED]
    return numbers, {
        n: {"category_id": n % 256, "iscrowd": int(n < 256 and n in things)}
        for n in np.setdiff1d(numbers, 0).tolist()}


def read_davis(path):
    """A map of DAVIS: a palette image of instances, 0 is the background, 255 not annotated."""
    ids = read_png(path, ("P", "L"), "a palette").astype(np.int32)
    numbers = np.where(ids == 255, 0, ids + 1)
    return numbers, {
        n: {"category_id": 1 + (n > 1)} for n in np.setdiff1d(numbers, 0).tolist()}


# of clips, as MaskClips has them, the source
step_clips = partial(
    MaskClips, read=read_step, categories=segment_categories(CITYSCAPES, FOLLOWED))
davis_clips = partial(
    MaskClips, read=read_davis, categories=segment_categories(["background", "object"], ["object"]))


def kitti_step(folder, split, past=0):
    """a folder with images/SPLIT or training/image_02, and panoptic_maps/SPLIT: PNGs per video"""
    images = f"{folder}/images/{split}"
    if not os.path.isdir(images):
        images = f"{folder}/training/image_02"
    return step_clips(clip_files(images, f"{folder}/panoptic_maps/{split}"), past=past)


def cityscapes_vps(folder, split, past=0):
    """a folder with panoptic_gt_SPLIT_city_vps.json, SPLIT/panoptic_video and SPLIT/img"""
    truth, files = f"{folder}/panoptic_gt_{split}_city_vps.json", f"{folder}/{split}"
    return coco_maps(truth, f"{files}/panoptic_video", f"{files}/img", past, videos=True)


def davis(folder, split, past=0):
    """a folder with JPEGImages/480p, Annotations_unsupervised/480p or Annotations/480p, and the
    names of the videos in ImageSets/2017/SPLIT.txt"""
    listed = f"{folder}/ImageSets/2017/{split}.txt"
    if not os.path.exists(listed):
        raise DataError(f"{listed}: no such file, expected the names of the videos")
    names = read_bytes(listed).decode().split()
    maps = f"{folder}/Annotations_unsupervised/480p"
    if not os.path.isdir(maps):
        maps = f"{folder}/Annotations/480p"
    return davis_clips(clip_files(f"{folder}/JPEGImages/480p", maps, names), past=past)


VIDEO_MASKS = {"kitti_step": kitti_step, "cityscapes_vps": cityscapes_vps, "davis": davis}


def clip_files(images, maps, names=None):
    """Folders of frames and of maps, per video -> clips of MaskClips. DataError if a frame has no
    map, a map no frame, or frames in the middle are missing."""
    check_folder(maps, "a folder of PNGs per video")
    clips = []
    for name in names or listing(maps)[0]:
        frames, found = frame_files(f"{images}/{name}"), frame_files(f"{maps}/{name}")
        numbers = set(map(int, filter(str.isdecimal, frames)))
        gaps = set(range(min(numbers), max(numbers))) - numbers if numbers else ()
        refuse(f"{images}/{name}", {
            "frames have no map": sorted(frames.keys() - found.keys()),
            "maps have no frame": sorted(found.keys() - frames.keys()),
            "frames are missing": sorted(gaps),
        })
        clips.append((name, name, list(frames.values()), [found[stem] for stem in frames]))
    if not clips:
        raise DataError(f"{maps}: no video")
    return clips


def frame_files(folder):
    """{name without its ending: path} of the images in a folder, 9.png before 10.png."""
    check_folder(folder, "the frames of a video")
    files = sorted(listing(folder)[1], key=len)
    return {os.path.splitext(file)[0]: f"{folder}/{file}" for file in files}


# --------------------------------------------------------------------------------------------------
# images and clips to generate: files of the user's

class PixelArrays(Source):
    """Images in memory: pixels (N, H, W, C) uint8, labels (N,). Records as of ShapeClips.
    DataError, naming `where`, if they do not fit."""

    def __init__(self, pixels, labels, classes, where="images in memory"):
        if len(pixels) != len(labels):
            raise DataError(f"{where}: {len(pixels)} images, but {len(labels)} labels")
        low, high = min(labels, default=0), max(labels, default=0)
        if low < -1 or high >= len(classes):
            raise DataError(
                f"{where}: labels from {low} to {high}, expected less than {len(classes)}")
        self.pixels, self.labels, self.classes = pixels, labels, list(classes)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return {"pixels": self.pixels[i], "label": int(self.labels[i])}


def held_out(count, split, every):
    """Which of `count` items are a split's: every `every`-th is held out, beginning with the first,
    but never the only one."""
    check_split(split, TWO_SPLITS)
    is_val = (np.arange(count) % every == 0) & (count > 1)
    return np.flatnonzero(is_val == (split == "val"))


def read_bytes(path):
    """Content of a file, unpacked if it is a .gz. DataError, naming it, if it cannot be read."""
    opened = gzip.open if str(path).endswith(".gz") else open
    try:
        with opened(path, "rb") as f:
            return f.read()
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: cannot be read ({e})") from e


def load_mnist(folder, split):
    """MNIST, or data in its format -> PixelArrays of (28, 28, 1). val is the t10k part; if no other
    is there, every tenth image of it is val and the others are train. DataError names the file and
    what was expected."""
    check_split(split, TWO_SPLITS)
    kinds = ("images?idx3-ubyte*", "labels?idx1-ubyte*")         # - or . before idx, maybe .gz
    train, t10k = ([find_file(folder, f"{part}-{kind}") for kind in kinds]
                   for part in ("train", "t10k"))
    shared = not any(train)
    images, labels = t10k if shared or split == "val" else train
    if not (images and labels):
        raise DataError(f"{folder}: no images or labels for {split}, expected {LAYOUTS['mnist']}")
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
    if content[:4] != magic:
        raise DataError(
            f"{path}: begins with {content[:4].hex()}, expected {magic.hex()}, an idx file of "
            f"bytes in {dims} dimensions")
    header = 4 + 4 * dims
    shape = [int.from_bytes(content[at:at + 4], "big") for at in range(4, header, 4)]
    expected = header + math.prod(shape)
    if len(content) != expected:
        sizes = " x ".join(map(str, shape))
        raise DataError(f"{path}: {len(content)} bytes, expected {expected} for {sizes}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def load_cifar10(folder, split):
    """CIFAR-10's binary version -> PixelArrays of (32, 32, 3); in the folder, or in the one of its
    archive in there. DataError names the file and what was expected."""
    check_split(split, TWO_SPLITS)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    rows = []                                          # label, then red, green, blue
    for name in names if split == "train" else ["test_batch.bin"]:
        path = find_file(folder, name, f"cifar-10-batches-bin/{name}")
        if path is None:
            raise DataError(f"{folder}: no {name}, expected {LAYOUTS['cifar10']}")
        content = np.frombuffer(read_bytes(path), np.uint8)
        most = max(content[::3073], default=0)
        if not len(content) or len(content) % 3073 or most > 9:
            raise DataError(
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
    so that 9.png comes before 10.png. Videos that are too short are left out, with a warning.
    DataError if there is nothing to be found; an unreadable image raises it when it is asked for.
    """

    def __init__(self, folder, split, size, frames=None):
        check_split(split)
        self.size, self.frames = tuple(size), frames or 1
        videos = frames is not None
        layout = LAYOUTS["videos" if videos else "images"]
        divided = any(os.path.isdir(f"{folder}/{name}") for name in SPLITS)
        root = f"{folder}/{split}" if divided else folder
        check_folder(root, layout)
        folders, files = listing(root)
        if folders and files and not videos:
            raise DataError(
                f"{root}: images such as {files[0]} beside folders such as {folders[0]}, expected "
                f"{layout}")

        def share(items):
            if divided:
                return items
            return [items[i] for i in held_out(len(items), split, 20)]

        # Of folders of images there is one, or one per video; or that many per class.
        by_class = not any(names for _, names in image_folders(root, depth=videos))
        train, self.clips = f"{folder}/train", []      # (folder, names of frames, label)
        self.classes = listing(train if divided else root)[0] if by_class else []
        for path, names in image_folders(root, videos + by_class):
            name = os.path.relpath(path, root).split(os.sep)[0]
            if by_class and name not in self.classes:
                known = ", ".join(self.classes[:5]) or "none"
                raise DataError(
                    f"{root}/{name}: a class that is not in {train}, which has {known}")
            names = sorted(names, key=len) if videos else share(names)
            self.clips.append((path, names, self.classes.index(name) if by_class else -1))
        if videos:
            short = [path for path, names, _ in self.clips if len(names) < self.frames]
            if short:
                warnings.warn(f"{root}: left out {len(short)} of {len(self.clips)} videos, shorter "
                              f"than {self.frames} frames, such as {short[0]}")
            self.clips = share([clip for clip in self.clips if len(clip[1]) >= self.frames])
        windows = [len(names) - self.frames + 1 for _, names, _ in self.clips]
        self.ends = np.cumsum(windows)
        if not sum(windows):
            kind = f"video of {self.frames} frames or more" if videos else "image"
            raise DataError(f"{root}: no {kind} for {split}, expected {layout}")

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        n = np.searchsorted(self.ends, i, side="right")
        folder, names, label = self.clips[n]
        last = len(names) + i - self.ends[n] + 1
        window = names[last - self.frames:last]
        frames = [fit_image(f"{folder}/{name}", self.size) for name in window]
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
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            folders.append(entry.name)
        elif entry.name.lower().endswith(IMAGE_KINDS):
            files.append(entry.name)
    return sorted(folders), sorted(files)


def fit_image(path, size):
    """An image file -> uint8 (*size, 3): its centre in the shape of `size`, resized (bicubic,
    antialiased)."""
    return np.asarray(ImageOps.fit(load_image(path), size[::-1], Image.BICUBIC))


# --------------------------------------------------------------------------------------------------
# a look at the data

def tile(pictures, columns=4, gap=4):
    """PIL pictures -> one, in rows of `columns`, each cell as large as the largest."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    w, h = np.max([picture.size for picture in pictures], 0) + gap
    size = columns * w - gap, rows * h - gap
    sheet = Image.new(pictures[0].mode, size, "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * w, i // columns * h))
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
    grids = [
        tile(list(map(Image.fromarray, images)), columns, gap)
        for images in clips.swapaxes(0, 1)]
    return save_film(grids, stem)


def save_film(pictures, stem):
    """One PIL picture -> STEM.png; several -> STEM.gif, 150 ms each. Returns the file's name."""
    if len(pictures) == 1:
        pictures[0].save(f"{stem}.png")
        return f"{stem}.png"
    pictures[0].save(
        f"{stem}.gif", save_all=True, append_images=pictures[1:], duration=150, loop=0)
    return f"{stem}.gif"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--export", metavar="DIR", help="write shapes there in COCO's layout")
    add("--sheet", metavar="FILE", help="draw 32 held-out scenes, a .png")
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
        source, stem = Shapes("val", args.size, seed=args.seed), args.sheet.removesuffix(".png")
        print("wrote", save_grid(np.stack([source[i]["image"] for i in range(32)]), stem))
    if not (args.export or args.sheet):
        parser.print_help()


if __name__ == "__main__":
    main()
