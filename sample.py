"""Ask a trained model what is in an image, or to make new ones; draw the answer, print it as JSON.

Boxes (Pix2Seq, arXiv 2109.10852, section 2.3), masks, keypoints and captions (2206.07669, section
2) all come from one decoder that reads one encoded image; diffusion.py's sampler makes new ones,
and panoptic maps of images and videos (2210.06366). Without an image on the command line, held-out
ones of the model's own data are taken.
Left out: whole datasets (eval.py).

    python sample.py                                    # the newest run, held-out images or samples
    python sample.py photo.jpg --ckpt=out/multi_coco_vit_b/best.pt --task=det,seg --explain
    python sample.py --ckpt=out/gen_shapes --class=circle --sample_steps=50 --guidance=2
"""
import argparse
import base64
import difflib
import glob
import html
import inspect
import io
import json
import math
import os
import re
import sys
import textwrap
import typing
from contextlib import suppress
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import count, islice, zip_longest
from os.path import basename, dirname, exists, getmtime, isdir, isfile, realpath
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from pycocotools import mask as mask_tools
from torch.utils.data import default_collate
from tqdm import tqdm

import data
import diffusion
import tokenizer
from data import DataConfig
from diffusion import DiffusionConfig
from model import (
    NETWORKS, Device, Dtype, ImageConfig, Pix2SeqConfig, Switch, attention_maps, build,
    image_losses, image_tokens, load, load_weights, token_image)
from tokenizer import (
    Count, Fraction, Natural, NotNegative, Rate, Seed, UserError, Vocab, frozen, require)


@frozen
class SamplingConfig:
    """How a trained model is asked, and how its answers are scored; may change at any time."""
    top_p: Fraction = 0.4               # det: top-p of sampling tokens (1904.09751)
    top_k: Natural = 0                  # sample among the k likeliest tokens, in every task; 0: all
    temperature: NotNegative = 1.0      # of sampling tokens, in every task; 0: the likeliest
    seg_samples: tokenizer.between(1, 255) = 8  # seg: sampled polygons, averaged into a mask
    seg_top_p: Fraction = 0.8           # seg: top-p
    kpt_top_p: Fraction = 0.1           # kpt: top-p
    cap_top_p: Fraction = 1.0           # cap: top-p
    ar_top_p: Fraction = 1.0            # ar: top-p
    sample_schedule: str = "cosine"     # gen, pan, vps: noise schedule gamma(t) of sampling
    sample_steps: Count = 100           # gen, pan, vps: sampling steps
    later_steps: Natural = 0            # vps: those of all frames but the first; 0: as many
    sampler: typing.Literal[tuple(diffusion.SAMPLERS)] = "ddim"  # gen, pan, vps: how noise goes
    guidance: NotNegative = 0.0         # gen: classifier-free guidance scale
    td: NotNegative = 0.0               # gen, pan, vps: asymmetric time intervals, extra length
    self_cond_decay: Rate = 0.0         # gen, pan, vps: weight of the past in self-conditioning
    eval_samples: Count = 200           # gen, ar: samples per evaluation
    min_pixels: Natural = 40            # pan, vps: smaller instances are left out
    split_pixels: Natural = 0           # pan, vps: so large a part of another class stays; 0: none
    proxy_classifier: bool = False      # gen, ar: train a small classifier that scores the samples
    inception: str = ""                 # gen, ar: TorchScript file for FID: inception-2015-12-05.pt
    i3d: str = ""                       # gen: TorchScript file for FVD: i3d_torchscript.pt


@frozen
class Config:
    """What defines a trained model and its data; train.Config adds how it was trained."""
    model: Pix2SeqConfig | ImageConfig = Pix2SeqConfig()
    vocab: Vocab = Vocab()
    data: DataConfig = DataConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sampling: SamplingConfig = SamplingConfig()
    categories: tuple = ()              # of the training data: {id, name, label, maybe keypoints}


# --------------------------------------------------------------------------------------------------
# inputs: B records that a model is asked about

@dataclass
class Inputs:
    """Records as of data.py, and what the tasks work out about them: each is computed once.

    records:   photos need only {image: PIL RGB}; to generate: {pixels, label}
    objects:   per image a list of {category_id, bbox: x y w h in pixels, score} that seg and kpt
               are asked about; None: those that the model detects
    levels:    gen: times t at which the loss on the records' own pixels is taken, too; ar: if any,
               their bits
    rows:      ar: the upper rows of the records' own pixels that are given
    trace:     is called with what happens on the way, for `explain`: (images as seen, encoded
               images, prompts, tokens), or [x_t, x0] of a sampling step
    """
    records: list
    c: Config
    objects: list | None = None
    generator: torch.Generator | None = None
    levels: tuple = ()
    rows: int = 0
    trace: typing.Callable | None = None
    encoded = None                                     # what `encode` returns, once it is known

    @cached_property
    def images(self):
        """The image of each record, of a clip the first."""
        return [record.get("image") or record["images"][0] for record in self.records]

    @cached_property
    def views(self):
        return [data.eval_view(data.whole(im), self.c.model.image_size) for im in self.images]

    def encode(self, model):
        """The images as seen (B, 3, H, W), and encoded (B, N, dec_dim)."""
        if self.encoded is None:
            seen = view_images(model, self.images, self.views)
            self.encoded = seen, model.encode(seen)
        return self.encoded


# --------------------------------------------------------------------------------------------------
# PREDICT[task](model, inputs, c) -> a dict per record, what the model says about it. The tasks of
# objects share them: each adds its keys to the same dicts.

def detect(model, inputs, c):
    """[{objects}]: the model's own, or the ones that `inputs` came with (2109.10852)."""
    if inputs.objects is None:
        out = generate(
            model,
            inputs,
            torch.full((len(inputs.records), 1), tokenizer.PROMPT_DET),
            length=5 * c.data.max_objects,
            top_p=c.sampling.top_p,
            end=tokenizer.PAD,
            return_logprobs=c.vocab.classes,
        )
        inputs.objects = list(read_objects(inputs.views, out.tokens[:, 0], out.logprobs[:, 0], c))
    return [{"objects": objects} for objects in inputs.objects]


def generate(model, inputs, prompts, **options):
    """Tokens after each prompt about the images, drawn as c.sampling says."""
    (seen, context), s = inputs.encode(model), inputs.c.sampling
    out = model.generate(
        context,
        prompts.to(context.device),
        temperature=s.temperature,
        top_k=s.top_k,
        generator=inputs.generator,
        **options,
    )
    if inputs.trace:
        inputs.trace((seen, context, prompts, out.tokens))
    return out


def read_objects(views, tokens, class_logprobs, c):
    """Detection sequences (B, T) and (B, T, classes) -> yields per image a list of objects. Left
    out: what stands after the end of a sequence, empty boxes, and what `as_objects` leaves out."""
    labels, boxes, scores = tokenizer.decode_detection(tokens, class_logprobs, c.vocab)
    corners = boxes.unflatten(2, (2, 2)).cpu().numpy()
    for view, yx, of_box, sure in zip(views, corners, labels.tolist(), scores.tolist()):
        yx = view.to_image(yx).clip((view.top, view.left), (view.bottom, view.right))
        sure = np.array(sure) * (yx[:, 0] < yx[:, 1]).all(1)
        yield as_objects(yx.reshape(-1, 4).tolist(), of_box, sure.tolist(), c.categories)


@torch.no_grad()
def predict(model, inputs, c, tasks, table=None):
    """All that `tasks` say about each record, one dict per record; dropout is off meanwhile. table:
    another one than PREDICT."""
    training, predictions, table = model.training, [{} for _ in inputs.records], table or PREDICT
    model.eval()
    for task in table:
        if task in tasks:
            for prediction, said in zip(predictions, table[task](model, inputs, c)):
                prediction |= said
    model.train(training)
    return predictions


# ==== reference ===================================================================================
# the other tasks, and the table

def segment(model, inputs, c):
    """[{objects}], with a mask each: sampled polygons, averaged (2206.07669, section 2.3)."""
    found = detect(model, inputs, c)
    prompts = tokenizer.instance_prompt(
        tokenizer.PROMPT_SEG, *prompt_boxes(inputs.views, inputs.objects, c), c.vocab)
    starts = range(0, prompts.shape[1], 16)            # the cache of keys limits how many at a time
    for start in tqdm(starts, "masks", leave=False, disable=None if starts[2:] else True):
        out = generate(
            model,
            inputs,
            prompts[:, start:start + 16],
            length=2 * c.data.max_points,
            samples=c.sampling.seg_samples,
            top_p=c.sampling.seg_top_p,
            end=tokenizer.PAD,
        )
        points = tokenizer.decode_points(out.tokens, c.vocab).cpu().unflatten(
            1, (-1, c.sampling.seg_samples))                                   # (B, G, samples, P)
        for image, view, objects, rows in zip(inputs.images, inputs.views, inputs.objects, points):
            for obj, polygons in zip(objects[start:], rows):
                add_mask(obj, view, polygons, image.size)
    return found


def find_keypoints(model, inputs, c):
    """[{objects}], with keypoints where their category has some: each object is cropped out and
    encoded by itself; invisible keypoints are guessed, too (2206.07669, section 2.3)."""
    found = detect(model, inputs, c)
    counts = {k["id"]: len(k["keypoints"]) for k in c.categories if k.get("keypoints")}
    for image, objects in zip(inputs.images, inputs.objects):
        people = (obj for obj in objects if obj["category_id"] in counts)
        for part in batches(people, 32):
            crops = replace(inputs, records=[{"image": image}] * len(part))
            crops.views = [keypoint_view(image, obj["bbox"], c) for obj in part]
            boxes = prompt_boxes(crops.views, [[obj] for obj in part], c)
            out = generate(
                model,
                crops,
                tokenizer.instance_prompt(tokenizer.PROMPT_KPT, *boxes, c.vocab),
                length=2 * max(counts.values()),
                top_p=c.sampling.kpt_top_p,
                suppress=tokenizer.INVISIBLE,
            )
            tokens = out.tokens[:, 0].cpu()
            probs = out.probs[:, 0].cpu()
            scores = tokenizer.point_score(torch.tensor([o["score"] for o in part]), tokens, probs)
            points = tokenizer.decode_points(tokens, c.vocab).numpy()
            for obj, view, row, score in zip(part, crops.views, points, scores.tolist()):
                add_keypoints(obj, view, row[:2 * counts[obj["category_id"]]], score)
    return found


def caption(model, inputs, c):
    """[{caption}]"""
    out = generate(
        model,
        inputs,
        torch.full((len(inputs.records), 1), tokenizer.PROMPT_CAP),
        length=c.data.caption_length,
        top_p=c.sampling.cap_top_p,
        end=c.vocab.text_shift + tokenizer.END_PIECE,
    )
    return [{"caption": text} for text in tokenizer.decode_captions(out.tokens[:, 0], c.vocab)]


def make_images(model, inputs, c):
    """[{pixels, label}]: a new image of the record's label, (H, W, C) uint8, or a clip (T, H, W, C)
    that goes on from the record's context frames; with `levels`, the losses at each of them."""
    # Every example sees the network's own estimate, as in sampling, and none is mirrored.
    c = changed(c, self_cond_rate=1.0, self_cond_masking=False)
    batch = unmirrored(model, inputs, c)
    losses = []
    for t in inputs.levels:
        times = torch.full_like(batch.weights, t)      # one per example
        noise = inputs.generator.clone_state()         # the same at every level
        losses.append(diffusion.denoising_losses(model, batch, c, times, noise).cpu().numpy())
    pixels = diffusion.generate(
        model, c, len(batch.targets), batch.cond, inputs.generator, inputs.trace)
    if c.model.cond_frames:
        pixels = torch.cat([batch.cond["frames"], pixels], 2)
    return made(inputs, pixels, "losses", zip(*losses))


def write_images(model, inputs, c):
    """[{pixels, label}]: an image of the record's label, (H, W, C) uint8, written pixel by pixel,
    that begins with `rows` of the record's own; with `levels`, also the bits per dimension of the
    record's pixels."""
    batch = unmirrored(model, inputs, c)
    tokens = image_tokens(batch.targets, c.model).flatten(1)
    given = tokens[:, :inputs.rows * tokens.shape[1] // c.model.sample_size[0]]
    s = c.sampling
    tokens = model.generate(
        given, batch.cond["labels"], inputs.generator, temperature=s.temperature, top_k=s.top_k,
        top_p=s.ar_top_p)
    bits = (image_losses(model, batch, c) / math.log(2)).tolist() if inputs.levels else ()
    return made(inputs, token_image(tokens, c.model), "bits", bits)


def unmirrored(model, inputs, c):
    """The batch of the records' own pixels."""
    c = changed(c, flip=False)
    examples = [data.gen_example(record, c, None) for record in inputs.records]
    return data.collate("gen", c)(examples).to(next(model.parameters()).device)


def made(inputs, pixels, key, rows):
    """Of each record the new pixels, of (B, C, [T,] H, W), its label, and its row, if any, as
    `key`."""
    pixels = pixels.movedim(1, -1).cpu().numpy()
    return [
        {"pixels": image, "label": record["label"], key: row}
        for record, image, row in zip_longest(inputs.records, pixels, rows, fillvalue=())]


@torch.no_grad()
def make_maps(model, inputs, c):
    """[{id, name, maps, segments}]: of each frame of a record the class and instance of each pixel,
    see `map_prediction`."""
    clips = [record["images"] for record in inputs.records]
    frames = [                                         # (T, B, 3, H, W); ends are repeated
        view_images(model, [clip[min(t, len(clip) - 1)] for clip in clips], inputs.views)
        for t in range(max(map(len, clips)))]
    maps = diffusion.generate_maps(
        model, c, torch.stack(frames, 1), inputs.generator, callback=inputs.trace)
    return [
        map_prediction(record, rows, view, c)
        for record, rows, view in zip(inputs.records, maps.cpu().numpy(), inputs.views)]


def map_prediction(record, masks, view, c):
    """Masks (T, 2, h, w) uint8, class and instance, of a record's frames (and maybe of more) ->
    what is said about it: its id and name, if any, maps, a PNG per frame, and per frame
    segments_info."""
    known = {row["label"]: row for row in c.categories}
    maps = [
        full_map(mask, view, image.size, c.sampling)
        for mask, image in zip(masks, record["images"])]
    segments = [
        [{"id": i, "category_id": known[i >> 8]["id"], "name": known[i >> 8]["name"]}
         for i in np.unique(ids).tolist() if i] for ids in maps]
    return {
        "id": record.get("id"),
        "name": record.get("name"),
        "maps": list(map(as_png, maps)),
        "segments": segments}


def full_map(mask, view, size, sampling):
    """Class and instance of each pixel of a mask (2, h, w) uint8 -> ids 256 * class + instance of
    each pixel of its image (width, height), 0 for none; see `majority_vote`."""
    view = data.on_canvas(view, mask.shape[1:])
    full = [
        torch.from_numpy(np.array(Image.fromarray(part).resize(size, Image.NEAREST), np.int64))
        for part in mask[:, :view.height, :view.width]]
    classes, ids = diffusion.majority_vote(*full, sampling.min_pixels, sampling.split_pixels)
    return (256 * classes + ids).numpy()


def as_png(ids):
    """Ids (H, W) -> a PNG in COCO's panoptic format, R + 256 G + 65536 B, as bytes."""
    colours = np.stack([ids, ids >> 8, ids >> 16], -1).astype(np.uint8)        # modulo 256
    return image_bytes(Image.fromarray(colours), "png")


def image_bytes(picture, kind):
    """What stands in a file of this kind of a PIL image, as bytes."""
    content = io.BytesIO()
    picture.save(content, kind)
    return content.getvalue()


def read_map(content):
    """A PNG of `full_map` -> class and instance (2, H, W)."""
    ids = data.read_ids(io.BytesIO(content))
    return np.stack(np.divmod(ids, 256))


PREDICT = {
    "det": detect,
    "seg": segment,
    "kpt": find_keypoints,
    "cap": caption,
    "gen": make_images,
    "ar": write_images,
    "pan": make_maps,
    "vps": make_maps,
}


# --------------------------------------------------------------------------------------------------
# images into the network, boxes into prompts, masks and keypoints out of points

def batches(items, size):
    """Yields lists of at most `size` items."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def view_images(model, images, views):
    """PIL images and the views of them -> float (B, 3, H, W) in [0, 1], padded."""
    parts = default_collate([data.pixels_of(view, image) for view, image in zip(views, images)])
    device = next(model.parameters()).device
    return data.to_images(parts["image"].to(device), parts["size"].to(device))


def prompt_boxes(views, objects, c):
    """Objects of B views -> boxes_yxyx (B, G, 4), fractions of the canvas, and labels (B, G)."""
    label_of = lookup(c.categories, "id", "label")
    most = max(map(len, objects))
    rows = []
    for view, group in zip(views, objects):
        corners = np.array([box_corners(obj["bbox"]) for obj in group])
        labels = [label_of[obj["category_id"]] for obj in group]
        rows.append(data.pad_objects(view, data.view_boxes(view, corners), labels, most))
    return default_collate(rows).values()


def box_corners(bbox):
    """x y w h -> y0 x0 y1 x1."""
    x, y, w, h = bbox
    return y, x, y + h, x + w


def lookup(categories, key, value):
    """{key: value} of two fields of the categories."""
    return {category[key]: category[value] for category in categories}


def as_objects(boxes, labels, scores, categories):
    """Lists of boxes y0 x0 y1 x1, labels and scores -> a list of objects. Left out: what has score
    0, and labels without a category."""
    id_of = lookup(categories, "label", "id")
    return [
        {"category_id": id_of[label], "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
        for (y0, x0, y1, x1), label, score in zip(boxes, labels, scores)
        if score > 0 and label in id_of]


def true_objects(record, categories):
    """A record's objects without crowds, as if detected with certainty."""
    rows = record["boxes"], record["labels"], 1.0 - record["iscrowd"]
    return as_objects(*(row.tolist() for row in rows), categories)


def keypoint_view(image, bbox, c):
    """The crop around a box in which its keypoints are looked for."""
    corners = np.array(box_corners(bbox))
    return data.eval_view(data.around_box(image, corners, c.data.crop_margin), c.model.image_size)


def add_mask(obj, view, polygons, size):
    """Adds the mean of sampled polygons (samples, P), where at least one half, as COCO's run-length
    mask of the whole image; points as of `tokenizer.decode_points`, size is (width, height)."""
    votes = sum(polygon_mask(view, points, size) for points in polygons)       # uint8: up to 255
    rle = mask_tools.encode(np.asfortranarray(votes >= len(polygons) / 2, np.uint8))
    obj["segmentation"] = rle | {"counts": rle["counts"].decode()}


def polygon_mask(view, points, size):
    """(P,) points -> (H, W) uint8."""
    shape = size[::-1]
    polygons = [                                       # x y x y ... each
        view.to_image(yx)[:, ::-1].ravel().tolist()
        for yx in tokenizer.split_polygons(points) if len(yx) >= 3]
    if not polygons:
        return np.zeros(shape, np.uint8)
    return mask_tools.decode(mask_tools.merge(mask_tools.frPyObjects(polygons, *shape)))


def add_keypoints(obj, view, points, score):
    """Adds keypoints x y 2 in pixels, of points (2 K,), fractions of the view's canvas. One that is
    no coordinate is put at the box's centre."""
    x, y, w, h = obj["bbox"]
    points = points.reshape(-1, 2)
    yx = view.to_image(points)
    yx[(points < 0).any(-1)] = y + h / 2, x + w / 2
    obj["keypoints"] = np.insert(yx[:, ::-1], 2, 2, axis=1).ravel().tolist()
    obj["keypoint_score"] = score


# --------------------------------------------------------------------------------------------------
# checkpoints

def find_checkpoint(path=None):
    """A checkpoint file, or the best one of a run's folder; without a path, of the newest run."""
    if not path:
        runs = glob.glob("out/*/last.pt")
        if not runs:
            raise FileNotFoundError(
                "no run in out/: train one with `python train.py`, or name a checkpoint, --ckpt")
        path = dirname(max(runs, key=getmtime))
    if isdir(path):
        best = f"{path}/best.pt"
        path = best if exists(best) else f"{path}/last.pt"
    if not exists(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    return path


def load_model(path, device):
    """A checkpoint file -> the network on the device, ready to predict, and its Config. UserError
    for xla, which trains only."""
    require(device.type != "xla", "--device=xla is for training: predict with cpu or cuda")
    model, c = read_model(path)
    device.compile(model)
    return device.cast(device.place(model)).eval(), c


def read_model(path):
    """A checkpoint file -> the network, on the CPU, and its Config."""
    content = load(path)
    try:
        saved = content["config"]
        c = Config(
            NETWORKS[content["network"]][1](**saved["model"]),
            Vocab(**saved["vocab"]),
            DataConfig(**saved["data"]),
            DiffusionConfig(**saved["diffusion"]),
            given(SamplingConfig(), saved["sampling"]),            # may be of another version
            saved["categories"],
        )
        tokenizer.check_fields(*parts_of(c))
        model = build(c.model)
        load_weights(model, content.get("ema", content["model"]))
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise UserError(f"{path}: not a checkpoint of this version of the code ({e})") from e
    return model, c


# --------------------------------------------------------------------------------------------------
# command line, of all scripts: options are fields of configurations

class Parser(argparse.ArgumentParser):
    """Errors of one line that name the nearest option; exit code 2."""

    def __init__(self, **options):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"error: {message}\n")

    def add_config(self, *parts, without=()):
        """An option per field of each dataclass: typed by it, its comment as help. Only those that
        are given stand in the result (see `changed`)."""
        for part in parts:
            group = self.add_argument_group(type(part).__name__)
            kinds = typing.get_type_hints(type(part), include_extras=True)
            for name, comment in comments_of(type(part)).items():
                if name in without:
                    continue
                kind = kinds[name]
                text = f"{comment} ({tokenizer.expected(kind)}, default: {getattr(part, name)})"
                bare = dict(nargs="?", const=True) if kind is bool else {}
                group.add_argument(
                    f"--{name}", type=partial(read_option, kind), help=text.replace("%", "%%"),
                    metavar="...", default=argparse.SUPPRESS, **bare)

    def parse(self, argv):
        """The options given; a dash in a name is as good as an underscore."""
        argv = [re.sub("(?<=^--)[^=]+", lambda m: m[0].replace("-", "_"), text)
                for text in argv]
        args, unknown = self.parse_known_args(argv)
        unknown += [text for text in argv if text.endswith("=--")]         # argparse drops it
        if unknown:
            name = unknown[0].partition("=")[0]
            known = nearest(name, self._option_string_actions)
            self.error(f"unknown option {name}{known}, or of another script or network: --help")
        return args


def nearest(name, choices):
    close = difflib.get_close_matches(name, choices, 1)
    return f", did you mean {close[0]!r}?" if close else ""


@lru_cache
def comments_of(kind):
    """{field: its comment} of a dataclass."""
    source = "".join(map(inspect.getsource, reversed(kind.__mro__[:-1])))
    return dict(re.findall(r"^    (\w+): .*?# (.+)$", source, re.M))


def read_option(kind, text):
    """A command line's text -> a value of the type of a field."""
    with suppress(ValueError, re.error):
        return tokenizer.parsed(text, kind)
    raise argparse.ArgumentTypeError(f"expected {tokenizer.expected(kind)}, got {text!r}")


# what the comment of an option may say that it is of: tasks, kinds of data
OWNERS = {"files"}.union(data.EXAMPLES, *data.SOURCES.values())


def apply(c, args, *options):
    """A Config with the values that a command line gives. UserError for one of sampling or of files
    that is of other tasks or data than these, as the words before the colon of its comment say; any
    other changes nothing, which is said. options: other dataclasses of the command line."""
    c = changed(c, **vars(args))
    ours = {*c.data.tasks, c.data.data, "drawn" if c.data.data == "shapes" else "files"}
    for name in ("inception", "i3d"):
        path = getattr(c.sampling, name)
        require(not path or isfile(path), f"--{name}={path}: no such file")
    for part in (*parts_of(c), *options):
        for name, comment in comments_of(type(part)).items():
            of = set(comment.partition(":")[0].split(", ")) & OWNERS
            if name not in args or not of or of & ours:
                continue
            message = f"--{name} is of {', '.join(sorted(of))}, not of {', '.join(sorted(ours))}"
            if part in (c.sampling, *options) or of & {"files", "coco"}:
                raise UserError(message)
            tokenizer.notice(f"{message}: it changes nothing")
    return c


def parts_of(c):
    """The dataclasses that a Config holds."""
    return list(filter(is_dataclass, vars(c).values()))


def given(part, options):
    """A dataclass with those of its fields that a dict, such as of a command line, holds."""
    return replace(part, **{name: options[name] for name in vars(part) if name in options})


def changed(c, **options):
    """A Config with other values of fields, which stand in any of its parts."""
    parts = {key: given(part, options) for key, part in vars(c).items() if is_dataclass(part)}
    return replace(c, **parts)


def pick_tasks(text, c):
    """The text of --task -> tuple of tasks; UserError if the model does not know one."""
    tasks = c.data.tasks if text == "all" else tuple(text.split(","))
    for task in tasks:
        require(task in c.data.tasks, f"--task={text}: this model knows {', '.join(c.data.tasks)}")
    return tasks


@frozen
class Options:
    """What sample.py and eval.py are asked for."""
    ckpt: str = ""                      # checkpoint or folder of a run; empty: the newest run
    task: str = "all"                   # some of det,seg,kpt,cap, or one; all: all that it knows
    seed: Seed = 0                      # of sampling
    device: str = "auto"                # auto, cuda, mps or cpu
    dtype: Dtype = "auto"               # of matrix products (see model.Device)
    compile: Switch = "off"             # torch.compile, for much at once: auto: on cuda


@frozen
class SampleOptions(Options):
    """What sample.py is asked for."""
    count: Natural = 0                  # held-out items to show (0: 8), or samples (0: 64)
    min_score: Fraction = 0.3           # det, seg, kpt: leave out objects below this score
    top: Natural = 0                    # det, seg, kpt: only so many of the likeliest; 0: all
    batch_size: Count = 1               # det, seg, kpt, cap: images at a time
    json: bool = False                  # print a line of JSON per image
    explain: bool = False               # det, seg, kpt, cap, gen, pan, vps: pages that say how
    complete: str = ""                  # ar: an image file whose lower half is to be written anew
    out: str = "samples"                # folder for the pictures
    # These three are no options, but arguments of their own.
    images: tuple = ()
    boxes: tuple = ()
    class_name: str | None = None


@tokenizer.script
def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("images", nargs="*",
        help="image files, folders, GIFs or videos; none: held-out items of the model's own data")
    add("--boxes", nargs="+", default=(), metavar="X,Y,W,H,NAME",
        help="prompt boxes of seg and kpt, in pixels")
    add("--class", dest="class_name", metavar="NAME", help="gen: only this class (default: all)")
    parser.add_config(SampleOptions(), SamplingConfig())
    args = parser.parse(sys.argv[1:])
    options = given(SampleOptions(), vars(args))
    device = Device(options.device, options.dtype, options.compile)
    path = find_checkpoint(options.ckpt)
    model, c = load_model(path, device)
    c, tasks = apply(c, args, options), pick_tasks(options.task, c)
    with device.autocast():
        report = show(model, c, tasks, options, device.generator(options.seed))
    report = json.loads(json.dumps(report), parse_float=lambda text: round(float(text), 4))
    rows = report if isinstance(report, list) else [report]
    for part in rows if options.json else [report]:
        print(json.dumps(part, indent=None if options.json else 1))
    print(f"{path}: pictures in {options.out}/", file=sys.stderr)
    sys.exit(any("error" in row or row.get("failed") for row in rows))


# --------------------------------------------------------------------------------------------------
# SHOW[task](model, c, tasks, options, generator): predictions as pictures, and the JSON to print

def show(model, c, tasks, options, generator):
    """Pictures of what a model says about the user's images, or about held-out items, into a
    folder. options: SampleOptions. Returns what sample.py prints."""
    require(
        not options.class_name or SHOW[tasks[0]] is show_samples,
        f"--class={options.class_name} is of gen, ar, this is {','.join(tasks)}")
    os.makedirs(options.out, exist_ok=True)
    options = replace(options, images=tuple(image_files(options.images, tasks[0])))
    return SHOW[tasks[0]](model, c, tasks, options, generator)


def free_stem(folder, taken, name):
    """FOLDER/NAME for pictures called so, with a number where one of them is in `taken`, the paths
    of inputs and of other results, to which it is added."""
    stem = Path(name).stem
    for n in count():
        chosen = f"{folder}/{stem}{f'_{n}' if n else ''}"
        files = {real(chosen + ending) for ending in (".png", ".gif", ".html")}
        if not files & taken:
            taken |= files
            return chosen


def real(path):
    """A path as it is compared; on some machines capitals make no difference."""
    return realpath(path).lower()


def each_input(options, task, c, failed):
    """Yields the name and the record of each image (for vps: clip) that is named on the command
    line, frame by frame of a film, or else of held-out items; one at a time. Adds to `failed` what
    cannot be read, and why."""
    for path in tqdm(options.images, disable=None if options.images[1:] else True):
        try:
            frames = read_frames(path)
            if task == "vps":
                images = list(frames)
                data.check_sizes(path, images)
                yield path, {"images": images}
            for n, image in enumerate(frames):
                name = path if is_still(path) else f"{Path(path).stem}_{n:06}"
                yield name, {"image": image, "images": [image]}
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            failed.append({"image": path, "error": str(e)})
    for record in () if options.images else sample_records(c, options.count or 8):
        yield f"val_{record['image_id']}" if "image_id" in record else record["name"], record


def image_files(paths, task):
    """Paths with those that patterns stand for, which not every shell knows, and but for vps with
    the images of folders."""
    for pattern in paths:
        for path in sorted(glob.glob(pattern)) or [pattern]:
            if isdir(path) and task != "vps":
                yield from data.frame_files(path).values()
            else:
                yield path


def is_still(path):
    return path.lower().endswith(data.IMAGE_KINDS)


def read_frames(path):
    """Yields the frames, PIL RGB, of an image file, a folder of frames, a GIF, or, with PyAV, a
    video file. UserError if it cannot be read."""
    frame = None
    try:
        for frame in decode_frames(path):
            yield frame
    except (UserError, ImportError):
        raise
    except Exception as e:                             # PIL and PyAV raise many types
        raise UserError(f"{path}: not a readable video ({e})") from e
    require(frame, f"{path}: no frames, expected image files")


def decode_frames(path):
    if isdir(path):
        yield from map(data.load_image, data.frame_files(path).values())
        return
    data.check_file(path)
    if is_still(path):
        yield data.load_image(path)
    elif path.lower().endswith(".gif"):
        with Image.open(path, formats=data.FORMATS) as film:
            for frame in ImageSequence.Iterator(film):
                yield data.to_rgb(frame.copy())
    else:
        av = tokenizer.optional("av", "av", f"{path}: reading a video file")
        with av.open(path) as film:
            for frame in film.decode(video=0):
                yield frame.to_image()


def show_inputs(model, c, tasks, options, generator):
    """A picture per image, of clips GIFs, and the first of them in all.png. Objects are drawn, or
    panoptic maps, beside the truth if it is known, and those also as PNGs and JSON in COCO's
    format."""
    panoptic = isinstance(c.model, ImageConfig)
    asks = {"seg", "kpt"} & set(tasks) and not (options.boxes or "det" in c.data.tasks)
    require(
        not (asks and options.images),
        "this model does not detect: name boxes with --boxes=X,Y,W,H,NAME")
    names = lookup(c.categories, "id", "name")
    new_stem = partial(free_stem, options.out, set(map(real, options.images)))
    pictures, firsts, report, maps = [], [], [], {}
    inputs = each_input(options, tasks[0], c, report)
    for batch in batches(inputs, 1 if options.explain else options.batch_size):
        records, objects, trace = [record for _, record in batch], None, []
        if options.boxes and not panoptic:
            objects = [[read_box(text, c) for text in options.boxes] for _ in batch]
        elif asks:
            objects = [true_objects(record, c.categories) for record in records]
        asked = Inputs(records, c, objects, generator, trace=options.explain and trace.append)
        for (name, record), said in zip(batch, predict(model, asked, c, tasks)):
            stem = new_stem(name)
            if panoptic:
                short = basename(stem)
                maps[short] = said | {"id": record.get("id", short), "name": short}
                drawn = list(draw_maps(record["images"], map(read_map, said["maps"]), c))
                if "maps" in record:
                    truth = true_map(record["maps"], record["segments"])
                    pairs = zip(drawn, draw_maps(record["images"], truth, c))
                    drawn = list(map(data.tile, pairs))
            else:
                found = sorted(said.get("objects", ()), key=lambda obj: -obj["score"])
                said["objects"] = [
                    {"name": names[obj["category_id"]], **obj}
                    for obj in found[:options.top or None] if obj["score"] >= options.min_score]
                image = record["image"]
                drawn = [draw(image, said, c)]
                report.append({
                    "image": name,
                    "picture": f"{stem}.png",
                    "width": image.width,
                    "height": image.height,
                    **said,
                })
            pictures.append(data.save_film(drawn, stem))
            if len(firsts) < 16:
                firsts.append(ImageOps.contain(drawn[0], (768, 768)))
            if trace:
                explain(model, trace, drawn[0], c, stem)
    if len(firsts) > 1:
        data.tile(firsts).save(f"{new_stem('all')}.png")
    if not panoptic:
        return report
    path = write_maps(maps, new_stem("maps"))
    return {"pictures": pictures, "maps": path, "failed": report, **data.parse_json(path)}


def read_box(text, c):
    """X,Y,W,H,NAME -> an object. UserError, naming the classes, if it is none."""
    *numbers, name = text.split(",")
    ids = lookup(c.categories, "name", "id")
    with suppress(ValueError, KeyError):
        x, y, w, h = map(float, numbers)
        if min(w, h) > 0 and math.isfinite(x + y + w + h):
            return {"category_id": ids[name], "bbox": [x, y, w, h], "score": 1.0}
    raise UserError(f"--boxes {text}: expected X,Y,W,H,NAME, the name one of {', '.join(ids)}")


def show_samples(model, c, tasks, options, generator):
    """A grid of samples; with --complete, of images that begin with the upper half of a given
    one."""
    require(
        not (options.images or options.boxes),
        "this model generates: it takes no images and no boxes")
    names = [category["name"] for category in c.categories] if c.model.num_classes else []
    rows, changes, predictions, trace = 0, {}, [], []
    if options.complete:
        side = c.model.fit_patch or 1                  # of its groups those in the upper half
        rows = c.model.sample_size[0] // 2 // side * side
        pixels = data.fit_image(options.complete, c.model.sample_size)
        if c.data.image_channels == 1:
            pixels = pixels.mean(-1, keepdims=True).astype(np.uint8)
        changes["pixels"] = pixels
        predictions.append({"pixels": pixels})         # first what the model was given
    if options.class_name is not None:
        known = ", ".join(names) or "no classes"
        require(
            options.class_name in names, f"--class={options.class_name}: this model knows {known}")
        changes["label"] = names.index(options.class_name)
    records = [record | changes for record in sample_records(c, options.count or 64)]
    for batch in batches(records, 64):
        part = Inputs(
            batch, c, generator=generator, rows=rows,
            trace=options.explain and not trace and trace.append)      # of the first batch
        predictions += predict(model, part, c, tasks)
    stem = free_stem(options.out, {real(options.complete)}, "samples")
    pictures = [draw_grid(predictions, stem)]
    if c.model.cond_frames:
        pictures.append(draw_beside(predictions[:4], records, f"{options.out}/frames"))
    if trace:
        with Image.open(pictures[0]) as picture:
            explain(model, trace, picture, c, stem)
    return {
        "pictures": pictures,
        "samples": len(records),
        "seed": options.seed,
        "classes": [names[record["label"]] for record in records] if names else None,
        **vars(c.sampling),
    }


def sample_records(c, count):
    """Records to show or to generate from: held-out ones for a network that sees images or context
    frames, without those that cannot be read; for any other labels in turn, and black pixels."""
    if c.data.tasks[0] not in ("gen", "ar") or c.model.cond_frames:
        items = data.EvalSet(data.make_source(c, "val", c.data.tasks[0]))
        records = (items[i] for i in range(min(count, len(items))))
        return (record for record in records if not isinstance(record, str))
    shape = (*c.model.sample_shape[1:], c.data.image_channels)
    classes = max(len(c.categories), 1)
    return [{"pixels": np.zeros(shape, np.uint8), "label": n % classes} for n in range(count)]


def write_maps(predictions, stem):
    """PNGs in a folder, and a JSON file, in COCO's panoptic format; of clips, a folder of PNGs
    each, named by the number of their frame. Returns the JSON file's name."""
    annotations = []
    for p in predictions.values():
        for t, (content, segments) in enumerate(zip(p["maps"], p["segments"])):
            name = f"{p['name']}/{t:06}.png" if p["maps"][1:] else f"{p['name']}.png"
            path = Path(stem, name)
            os.makedirs(path.parent, exist_ok=True)
            path.write_bytes(content)
            annotations.append({"image_id": p["id"], "file_name": name, "segments_info": segments})
    with open(f"{stem}.json", "w") as f:
        json.dump({"annotations": annotations}, f)
        return f.name


def draw_maps(images, maps, c):
    """PIL images and their class and instance of each pixel (2, H, W) -> yields copies with the
    segments in colours, the same for an instance in all frames, and their names; small ones
    enlarged."""
    names = lookup(c.categories, "label", "name")
    for image, frame in zip(images, maps):
        picture, zoom, font = enlarged(image)
        colours = paint(frame).resize(picture.size, Image.NEAREST)
        picture = Image.blend(picture, colours, 0.6)
        pen = ImageDraw.Draw(picture)
        classes, ids = frame
        for label, i in np.unique(frame.reshape(2, -1), axis=1).T.tolist():
            if label:
                yx = np.argwhere((classes == label) & (ids == i))
                middle = np.hypot(*(yx - yx.mean(0)).T).argmin()
                pen.text(
                    (yx[middle, ::-1] + 0.5) * zoom, names[label], "white", font, "mm",
                    stroke_width=2, stroke_fill="black")
        yield picture


SHOW = dict.fromkeys(PREDICT, show_inputs) | {"gen": show_samples, "ar": show_samples}


def true_map(numbers, segments):
    """Segments of pixels (T, H, W) -> their class and number (T, 2, H, W), that of a crowd is 0."""
    values, places = np.unique(numbers, return_inverse=True)
    rows = [segments.get(n, {"category_id": 0}) for n in values.tolist()]
    table = [(row["category_id"], 0 if row.get("iscrowd") else n) for n, row in zip(values, rows)]
    return np.moveaxis(np.array(table)[places.reshape(numbers.shape)], -1, 1)


def paint(frame):
    """A map (2, H, W) -> PIL RGB: its hue tells class and instance, black is no class."""
    classes, ids = np.asarray(frame, np.int64)
    full = 255 * (classes > 0)
    hsv = np.stack([(97 * classes + 41 * ids) % 256, 3 * full // 4, full], -1).astype(np.uint8)
    return Image.fromarray(hsv, "HSV").convert("RGB")


# --------------------------------------------------------------------------------------------------
# pictures

PALETTE = "tomato deepskyblue limegreen orange violet turquoise hotpink".split()


def draw_grid(predictions, stem):
    return data.save_grid(np.stack([p["pixels"] for p in predictions]), stem)


def draw_beside(predictions, records, stem):
    """Predicted clips frame by frame, context first, and below each what really followed."""
    clips = []                                         # of shape (T, H, W, C), two per prediction
    for p, record in zip(predictions, records):
        clips += p["pixels"], np.broadcast_to(record["pixels"], p["pixels"].shape)
    return data.save_grid(np.concatenate(clips), stem, columns=len(clips[0]))


def enlarged(image):
    """A small PIL image enlarged to about 384 pixels, how many times, and a font for it."""
    zoom = max(1, round(384 / max(image.size)))
    picture = ImageOps.scale(image, zoom, Image.NEAREST)
    return picture, zoom, ImageFont.load_default(max(12, max(picture.size) // 40))


def draw(image, prediction, c):
    """PIL RGB and what was predicted -> a copy with masks, keypoints, boxes, names, scores and the
    caption, small images enlarged."""
    picture, zoom, font = enlarged(image)
    categories = {category["id"]: category for category in c.categories}
    objects = sorted(prediction["objects"], key=lambda obj: obj["score"])
    coloured = [(obj, PALETTE[obj["category_id"] % len(PALETTE)]) for obj in objects]
    for obj, color in coloured:                        # masks first, so that they hide nothing else
        if "segmentation" in obj:
            mask = Image.fromarray(110 * mask_tools.decode(obj["segmentation"]))
            picture.paste(color, mask=mask.resize(picture.size, Image.NEAREST))
    pen = ImageDraw.Draw(picture)
    for obj, color in coloured:
        draw_object(pen, obj, categories[obj["category_id"]], color, zoom, font)
    if "caption" not in prediction:
        return picture
    letters = int(picture.width / pen.textlength("n", font)) or 1
    lines = textwrap.wrap(prediction["caption"], letters)
    border = 0, 0, 0, (len(lines) + 1) * (font.size + 4)
    framed = ImageOps.expand(picture, border, "white")
    ImageDraw.Draw(framed).text((4, picture.height + 2), "\n".join(lines), "black", font)
    return framed


def draw_object(pen, obj, category, color, zoom, font):
    """Its box, keypoints with their skeleton, name and score."""
    line = max(2, max(pen.im.size) // 300)
    x, y, w, h = (zoom * value for value in obj["bbox"])
    pen.rectangle((x, y, x + w, y + h), outline=color, width=line)
    if "keypoints" in obj:
        points = zoom * np.reshape(obj["keypoints"], (-1, 3))[:, :2]
        for a, b in category.get("skeleton", ()):
            pen.line([*points[a - 1], *points[b - 1]], "white", line)
        for dot in points:
            pen.circle(dot, 2 * line, color, "black")
    text = f"{category['name']} {obj['score']:.2f}"
    left, top, right, bottom = pen.textbbox((x, y), text, font)
    up = min(bottom - y + 2, y)                        # above the box where there is room
    pen.rectangle((left, y - up, right + 2, bottom - up + 2), color)
    pen.text((x + 1, y - up), text, "black", font)


# --------------------------------------------------------------------------------------------------
# a page that explains a prediction, for a browser, whole in one file

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 13px sans-serif; margin: 2em }}
div {{ display: flex; flex-wrap: wrap; gap: 6px; margin-bottom: 1em }}
figure {{ margin: 0; padding: 4px; width: 100px; border-radius: 4px; background: #eee }}
figure img {{ width: 100px; display: block; image-rendering: pixelated }}
.class {{ background: #ffd9b3 }}
.coordinate {{ background: #d5e8ff }}
.text {{ background: #dff5d5 }}
</style>
<h1>{title}</h1>
<img src="{picture}">
<p>Of what was written, token by token after each prompt: where the decoder looked for it
(cross-attention, mean of layers and heads), what it says, its number and probability, other
choices. Coordinates are fractions of the image as the network sees it. Of what came out of noise:
ten steps, with the time t, and gamma, the part of signal in x_t.</p>
"""


def explain(model, trace, picture, c, stem):
    """STEM.html: a picture of what was predicted, and how it came about (see Inputs.trace)."""
    page = PAGE.format(title=html.escape(basename(stem)), picture=data_url(picture))
    noise = isinstance(c.model, ImageConfig)
    for title, figures in step_rows(trace, c) if noise else token_rows(model, trace, c):
        page += f"<h2>{html.escape(title)}</h2><div>{''.join(figures)}</div>"
    Path(f"{stem}.html").write_text(page, "utf-8")


def data_url(picture):
    """A PIL image as an address that is the image itself."""
    content = base64.b64encode(image_bytes(picture, "webp"))
    return f"data:image/webp;base64,{content.decode()}"


def figure(kind, picture, *lines):
    image = f'<img src="{data_url(picture)}">' if picture else ""
    return f'<figure class="{kind}">{image}{"<br>".join(map(html.escape, lines))}</figure>'


def to_pil(pixels):
    """uint8 (C, H, W) -> a PIL image."""
    return Image.fromarray(pixels.movedim(0, -1).cpu().numpy().squeeze())


def token_rows(model, trace, c):
    """Yields the prompt and the figures of the tokens after it, of at most four at a time; of
    several samples the first."""
    names = lookup(c.categories, "label", "name")
    meaning = partial(tokenizer.meaning, vocab=c.vocab, names=names)
    for seen, context, prompts, tokens in trace:
        prompts, tokens = prompts.flatten(0, -2).to(tokens), tokens.flatten(0, 1)
        given = prompts.shape[1]
        sequences = torch.cat([prompts, tokens[::len(tokens) // len(prompts)]], 1)     # (S, P + T)
        for n, row in enumerate(sequences[:4]):
            n = n * len(seen) // len(sequences)        # the image that it is about
            end = row.count_nonzero()                  # where the token stands that ends it
            logits, maps = attention_maps(model, context[n:n + 1], row[None, :end])
            written = zip(row[given:end + 1].tolist(), logits[given - 1:], maps[given - 1:])
            title = " ".join(meaning(token)[1] for token in row[:given].tolist())
            yield title, token_figures(model, seen[n], written, meaning)


def token_figures(model, image, written, meaning):
    """Yields a figure per token of a sequence about an encoded image (3, H, W), of (token, logits
    (V,), attention (N,))."""
    canvas = ImageOps.contain(to_pil((255 * image).byte()), (100, 100))
    coordinates = 0                                    # since anything else: y and x in turn
    for token, scores, heat in written:
        kind, text = meaning(token)
        coordinates = coordinates + 1 if kind == "coordinate" else 0
        if coordinates:
            text = f"{'xy'[coordinates % 2]} {text}"
        probs = scores.float().softmax(0)
        others = [
            f"{meaning(other)[1]} {probs[other]:.0%}"
            for other in probs.topk(4).indices.tolist() if other != token]
        picture = attention_picture(model, canvas, heat)
        yield figure(kind, picture, text, f"token {token}, {probs[token]:.0%}", *others[:3])


def attention_picture(model, canvas, heat):
    """A PIL image, dark but where it was looked at, heat (N,); None if a FIT encodes: its decoder
    looks at latents, not at patches."""
    if model.config.encoder == "fit":
        return
    rows, cols = model.encoder.grid                    # a class token stands before the patches
    heat = heat[-rows * cols:].view(rows, cols).cpu()
    light = Image.fromarray((255 * heat / heat.max()).byte().numpy())
    dark = canvas.point(lambda value: value // 5)
    return Image.composite(canvas, dark, light.resize(canvas.size))


def step_rows(trace, c):
    """Yields a title and the figures of ten steps, of x_t and of x0."""
    gamma = diffusion.gamma_schedule(c.sampling.sample_schedule)
    steps = np.linspace(0, len(trace) - 1, 10).round().astype(int)
    titles = "x_t: what the network saw", "x0: what it took that for"
    for title, samples in zip(titles, zip(*trace)):
        figures = []
        for i in np.unique(steps).tolist():
            t = torch.tensor(1 - i / len(trace))
            pixels = samples[i].movedim(1, 0).flatten(1, -2)       # one sample below the other
            picture = paint(pixels) if c.diffusion.bits == "ids" else to_pil(pixels)
            figures.append(figure("", picture, f"t {t:.2f}", f"gamma {gamma(t):.3f}"))
        yield title, figures


if __name__ == "__main__":
    main()
