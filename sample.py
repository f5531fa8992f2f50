"""Look at one image, or make some: a trained model draws what it sees, or what it dreams up, and prints it as JSON.

Boxes (Pix2Seq, arXiv 2109.10852, section 2.3), masks, joints and captions (2206.07669, section 2), all from one decoder.
With no image, it takes held-out ones of the data that the model was trained on. A model that generates draws a grid of
images, or goes on from the first frames of held-out clips (sampling: diffusion.py). Left out: whole datasets (eval.py).

    python sample.py                                    # the newest run, eight held-out images or 64 new ones
    python sample.py photo.jpg --ckpt=out/multi_coco_vit_b/best.pt --task=det,seg --min_score=0.5 --attention
    python sample.py --ckpt=out/gen_shapes --class=circle --steps=50 --guidance=2 --strip
"""
import argparse
import glob
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_tools

import data
import tokenizer
from diffusion import SAMPLERS, generate
from model import NETWORKS, load_weights, reference_checkpoint

# ---------------------------------------------------------------------------------------------------------------
# checkpoints

def pick_device(name):
    """"auto" -> cuda, else mps, else cpu; anything else is torch's own name of a device."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def find_checkpoint(path=None):
    """A checkpoint file, or the best one of a run's folder; without a path, of the run that wrote last."""
    if path is None:
        runs = glob.glob("out/*/last.pt")
        if not runs:
            raise FileNotFoundError("no run in out/: train one with `python train.py`, or name a checkpoint with --ckpt")
        path = os.path.dirname(max(runs, key=os.path.getmtime))
    if os.path.isdir(path):
        best, last = os.path.join(path, "best.pt"), os.path.join(path, "last.pt")
        path = best if os.path.exists(best) else last
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such checkpoint")
    return path


def read_checkpoint(path, device="cpu"):
    """The dict that train.py saved. Only tensors and plain values are read: a file from a stranger can run no code."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        return checkpoint if checkpoint["config"] else None
    except FileNotFoundError:
        raise
    except Exception as e:                             # torch raises many types for a damaged file
        raise ValueError(f"{path}: not a whole checkpoint of train.py ({type(e).__name__}: {str(e).splitlines()[0]})") from e


def is_reference(path):
    """Whether a path is a TensorFlow checkpoint of the reference: its folder, or DIR/ckpt-N."""
    return bool(path) and (os.path.exists(f"{path}.index") or os.path.exists(os.path.join(path, "checkpoint")))


def read_weights(path, **known):
    """A checkpoint of train.py (file or folder) or of the reference -> the dict of `read_checkpoint`.
    known: what a checkpoint of the reference does not tell, see `model.reference_checkpoint`."""
    return reference_checkpoint(path, **known) if is_reference(path) else read_checkpoint(find_checkpoint(path))


def load_model(path, device, **known):
    """Checkpoint, as of `read_weights` -> the model, ready to predict, and the configuration that it was trained with."""
    checkpoint = read_weights(path, **known)
    c = SimpleNamespace(**checkpoint["config"])
    network, kind = NETWORKS[checkpoint["network"]]
    c.model = kind(**c.model)
    model = network(c.model)
    load_weights(model, checkpoint.get("ema", checkpoint["model"]))
    c.categories = checkpoint["categories"]            # of the training data: list of {id, name, label}
    return model.to(device).eval(), c


def add_checkpoint_arguments(parser):
    """What sample.py and eval.py let the user say about the model."""
    parser.add_argument("--ckpt", "--init_from", help="checkpoint file or folder of a run (default: the newest run in out/), or the folder "
                        "or DIR/ckpt-N of a TensorFlow checkpoint of the reference")
    parser.add_argument("--categories", nargs="+", help="of a reference checkpoint: annotation files in COCO's format that name the classes")
    parser.add_argument("--image_size", type=int, help="of a reference checkpoint: side of its images in pixels")
    parser.add_argument("--pieces", help="of a reference checkpoint: SentencePiece model file, for captions")


def checkpoint_arguments(args):
    """The parsed arguments of `add_checkpoint_arguments` -> (path, what `load_model` takes as known)."""
    known = {key: getattr(args, key) for key in ("categories", "pieces") if getattr(args, key)}
    return args.ckpt, known | ({"image_size": (args.image_size,) * 2} if args.image_size else {})


def add_sampling_arguments(parser):
    """What sample.py and eval.py let the user say about generating."""
    parser.add_argument("--steps", type=int, help="generate: calls of the network (default: as trained, as for the next three)")
    parser.add_argument("--sampler", choices=list(SAMPLERS), help="generate: how noise is taken away")
    parser.add_argument("--guidance", type=float, help="generate: how far beyond the prediction without label")
    parser.add_argument("--td", type=float, help="generate: each step goes further by this share of a step")


def set_sampling(c, args):
    """Puts the parsed arguments of `add_sampling_arguments` into a model's configuration."""
    for key, value in (("sample_steps", args.steps), ("sampler", args.sampler), ("guidance", args.guidance), ("td", args.td)):
        if value is not None:
            setattr(c, key, value)


def make_vocab(c):
    return tokenizer.Vocab(c.bins, c.coord_shift, c.text_shift, c.model.vocab_size)


def make_pieces(c):
    """The pieces of captions: a SentencePiece model file, or bytes."""
    return tokenizer.SentencePieces(c.pieces) if c.pieces else tokenizer.BytePieces()


# ---------------------------------------------------------------------------------------------------------------
# prediction: functions of a model and its configuration c

TASKS = ("det", "seg", "kpt", "cap")


def look(model, images, c, tasks, boxes=None, generator=None):
    """Everything that the tasks ask for, about each image.

    images: list of B PIL RGB, of any size
    tasks:  some of TASKS
    boxes:  what to segment and to find the joints of: for each image a list of {category_id, bbox, score}; None: what the
            model's own detection pass finds
    Returns for each image {objects: [{category_id, bbox: xywh px, score, segmentation: RLE, keypoints: x y v ...}], caption: str},
    the parts that the tasks ask for; keypoint_score stands beside keypoints.
    """
    device = next(model.parameters()).device
    views = [data.eval_view(data.whole(image), c.model.image_size) for image in images]
    found = [{} for _ in images]
    if set(tasks) != {"kpt"} or boxes is None:
        context = model.encode(stack_views(images, views, device))
    if boxes is None and set(tasks) & {"det", "seg", "kpt"}:
        category_of = {category["label"]: category["id"] for category in c.categories}
        boxes = [objects_in_image(view, *objects, category_of) for view, *objects in zip(views, *detect(model, context, c, generator))]
    for i, objects in enumerate(boxes or ()):
        found[i]["objects"] = [dict(thing) for thing in objects]
    if "seg" in tasks:
        segment(model, context, images, views, [f["objects"] for f in found], c, generator)
    if "kpt" in tasks:
        for image, f in zip(images, found):
            find_joints(model, image, f["objects"], c, generator)
    if "cap" in tasks:
        for f, caption in zip(found, describe(model, context, c, generator)):
            f["caption"] = caption
    return found


def stack_views(images, views, device):
    """PIL images and their views -> (B, 3, H, W) float on the device."""
    pixels = np.stack([view.image(image) for image, view in zip(images, views)])
    return data.to_images(torch.from_numpy(pixels), torch.tensor([[view.height, view.width] for view in views]), device)


def detect(model, context, c, generator=None):
    """Encoded images (B, N, D) -> labels (B, max_objects), boxes_yxyx (B, max_objects, 4) fractions and scores."""
    vocab = make_vocab(c)
    prompt = torch.full((len(context), 1), tokenizer.PROMPT_DET, device=context.device)
    out = model.generate(context, prompt, 5 * c.max_objects, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p,
                         end=tokenizer.PAD, keep=vocab.classes, generator=generator)
    return tokenizer.decode_detection(out.tokens[:, 0], out.logprobs[:, 0], vocab)


def objects_in_image(view, labels, boxes, scores, category_of):
    """Predictions about one image (N,), (N, 4), (N,) -> list of {category_id, bbox: xywh pixels of the image, score}.
    Left out: what the sequence ended before, classes the data does not have, empty boxes."""
    corners = view.to_image(boxes.float().cpu().numpy().reshape(-1, 2, 2).astype(np.float64))
    corners = corners.clip((view.top, view.left), (view.bottom, view.right))
    objects = []
    for label, ((y0, x0), (y1, x1)), score in zip(labels.tolist(), corners.tolist(), scores.tolist()):
        if score > 0 and label in category_of and y1 > y0 and x1 > x0:
            objects.append({"category_id": category_of[label], "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score})
    return objects


def true_boxes(record, category_of):
    """A record's objects, without crowds, as if detected with certainty."""
    return [{"category_id": category_of[label], "bbox": [x0, y0, x1 - x0, y1 - y0], "score": 1.0}
            for label, (y0, x0, y1, x1), crowd in zip(record["labels"].tolist(), record["boxes"].tolist(), record["iscrowd"]) if not crowd]


def told_boxes(views, objects, c, device):
    """Objects as of `look` about B images -> boxes_yxyx (B, G, 4) fractions of the canvas and labels (B, G), padded."""
    label_of = {category["id"]: category["label"] for category in c.categories}
    G = max(map(len, objects))
    rows = []
    for view, things in zip(views, objects):
        x, y, w, h = np.array([thing["bbox"] for thing in things], np.float64).reshape(-1, 4).T
        boxes = data.view_boxes(view, np.stack([y, x, y + h, x + w], -1))
        rows.append(data.pad_objects(view, boxes, np.array([label_of[thing["category_id"]] for thing in things], np.int64), G))
    return (torch.from_numpy(np.stack([row[key] for row in rows])).to(device) for key in ("boxes", "labels"))


def segment(model, context, images, views, objects, c, generator=None):
    """Adds a mask to each object, in place: the mean of several sampled outlines, at least one half (2206.07669, section 2.3)."""
    if not any(objects):
        return
    vocab = make_vocab(c)
    prompts = tokenizer.instance_prompt(tokenizer.PROMPT_SEG, *told_boxes(views, objects, c, context.device), vocab)
    for start in range(0, prompts.shape[1], 16):       # so many objects an image at a time: the cache of keys is large
        out = model.generate(context, prompts[:, start:start + 16], 2 * c.max_points, samples=c.seg_samples, temperature=c.temperature,
                             top_k=c.top_k, top_p=c.seg_top_p, end=tokenizer.PAD, generator=generator)
        points = tokenizer.decode_points(out.tokens, vocab).cpu().unflatten(1, (-1, c.seg_samples))     # (B, G, samples, P)
        for image, view, things, rows in zip(images, views, objects, points):
            for thing, samples in zip(things[start:], rows):
                mean = sum(mask_of(view, sample, image.size) for sample in samples) / c.seg_samples
                thing["segmentation"] = to_rle(mean >= 0.5)


def mask_of(view, points, size):
    """(P,) points as of `tokenizer.decode_points` -> (H, W) uint8 mask of the whole image; size is (W, H)."""
    outlines = [view.to_image(p)[:, ::-1].ravel().tolist() for p in tokenizer.split_polygons(points) if len(p) >= 3]
    if not outlines:
        return np.zeros(size[::-1], np.uint8)
    return mask_tools.decode([mask_tools.merge(mask_tools.frPyObjects(outlines, size[1], size[0]))])[..., 0]


def to_rle(mask):
    """(H, W) bool -> COCO's run-length form, fit for JSON."""
    rle = mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def find_joints(model, image, objects, c, generator=None):
    """Adds keypoints and keypoint_score to the objects of categories that have joints, in place. Each is cropped out and
    encoded by itself; an invisible joint is guessed too (2206.07669, section 2.3)."""
    joints = {category["id"]: len(category["keypoints"]) for category in c.categories if category.get("keypoints")}
    people = [thing for thing in objects if thing["category_id"] in joints]
    vocab, device = make_vocab(c), next(model.parameters()).device
    for start in range(0, len(people), 32):            # so many crops at a time
        part = people[start:start + 32]
        corners = np.array([thing["bbox"] for thing in part])[:, [1, 0, 3, 2]]
        views = [data.eval_view(data.around_box(image, np.concatenate([box[:2], box[:2] + box[2:]]), c.crop_margin), c.model.image_size)
                 for box in corners]
        prompts = tokenizer.instance_prompt(tokenizer.PROMPT_KPT, *told_boxes(views, [[thing] for thing in part], c, device), vocab)
        length = 2 * max(joints.values())
        out = model.generate(model.encode(stack_views([image] * len(part), views, device)), prompts, length, temperature=c.temperature,
                             top_k=c.top_k, top_p=c.kpt_top_p, forbid=tokenizer.INVISIBLE, generator=generator)
        scores = tokenizer.point_score(torch.tensor([thing["score"] for thing in part], device=device), out.tokens[:, 0], out.probs[:, 0])
        points = tokenizer.decode_points(out.tokens[:, 0], vocab).cpu().numpy()
        for thing, view, row, score in zip(part, views, points, scores.tolist()):
            add_joints(thing, view, row[:2 * joints[thing["category_id"]]], score)


def add_joints(thing, view, points, score):
    """(2 K,) points, fractions of a view's canvas -> keypoints x y 2 in pixels; one that is no coordinate is put at the box's centre."""
    x, y, w, h = thing["bbox"]
    points = points.reshape(-1, 2).astype(np.float64)
    pixels = np.where((points < 0).any(-1, keepdims=True), (y + h / 2, x + w / 2), view.to_image(points))
    thing["keypoints"] = np.concatenate([pixels[:, ::-1], np.full((len(points), 1), 2.0)], -1).ravel().tolist()
    thing["keypoint_score"] = score


def describe(model, context, c, generator=None):
    """Encoded images (B, N, D) -> B captions."""
    vocab, pieces = make_vocab(c), make_pieces(c)
    prompt = torch.full((len(context), 1), tokenizer.PROMPT_CAP, device=context.device)
    out = model.generate(context, prompt, c.caption_length, temperature=c.temperature, top_k=c.top_k, top_p=c.cap_top_p,
                         end=vocab.text_shift + tokenizer.END_PIECE, generator=generator)
    return tokenizer.decode_captions(out.tokens[:, 0], vocab, pieces)


# ---------------------------------------------------------------------------------------------------------------
# pictures

PALETTE = [(230, 60, 60), (60, 160, 250), (90, 200, 90), (250, 180, 40), (190, 100, 240), (60, 210, 210), (250, 120, 180)]


def draw(image, found, c, min_score=0.3, side=384):
    """PIL RGB and what `look` found in it -> a copy with masks, joints, boxes, names, scores and the caption, small images enlarged."""
    zoom = max(1, round(side / max(image.size)))
    picture = image.resize((image.width * zoom, image.height * zoom), Image.NEAREST)
    font = ImageFont.load_default(max(12, max(picture.size) // 40))
    categories = {category["id"]: category for category in c.categories}
    things = sorted((t for t in found.get("objects", ()) if t["score"] >= min_score), key=lambda t: t["score"])
    colors = [PALETTE[i % len(PALETTE)] for i in range(len(things))]
    for thing, color in zip(things, colors):           # masks first, so that they hide nothing else
        if "segmentation" in thing:
            mask = Image.fromarray(110 * mask_tools.decode([thing["segmentation"]])[..., 0]).resize(picture.size, Image.NEAREST)
            picture.paste(Image.new("RGB", picture.size, color), mask=mask)
    pen = ImageDraw.Draw(picture)
    width = max(2, max(picture.size) // 300)
    for thing, color in zip(things, colors):
        x, y, w, h = (zoom * value for value in thing["bbox"])
        category = categories[thing["category_id"]]
        pen.rectangle((x, y, x + w, y + h), outline=color, width=width)
        if "keypoints" in thing:
            joints = [(zoom * px, zoom * py) for px, py in zip(thing["keypoints"][::3], thing["keypoints"][1::3])]
            for a, b in category.get("skeleton", ()):
                pen.line((joints[a - 1], joints[b - 1]), fill="white", width=width)
            for px, py in joints:
                pen.ellipse((px - 2 * width, py - 2 * width, px + 2 * width, py + 2 * width), fill=color, outline="black")
        text = f"{category['name']} {thing['score']:.2f}"
        left, top, right, bottom = pen.textbbox((x, y), text, font=font)
        up = min(bottom - y + 2, y)                    # above the box where there is room
        pen.rectangle((left, y - up, right + 2, bottom - up + 2), fill=color)
        pen.text((x + 1, y - up), text, fill="black", font=font)
    if "caption" not in found:
        return picture
    lines = wrap(found["caption"], lambda text: pen.textlength(text, font=font), picture.width - 8)
    framed = Image.new("RGB", (picture.width, picture.height + (len(lines) + 1) * (font.size + 4)), "white")
    framed.paste(picture)
    ImageDraw.Draw(framed).multiline_text((4, picture.height + 2), "\n".join(lines), fill="black", font=font)
    return framed


def draw_attention(model, image, objects, c, most=4, side=192):
    """Where the tokens of each of the likeliest objects looked: one row an object, one picture for y_min x_min y_max x_max class."""
    device, vocab = next(model.parameters()).device, make_vocab(c)
    view = data.eval_view(data.whole(image), c.model.image_size)
    boxes, labels = told_boxes([view], [objects], c, device)
    context = model.encode(stack_views([image], [view], device))
    looked = model.attention_maps(context, tokenizer.encode_detection(boxes, labels, vocab).inputs).cpu()
    rows, cols = model.encoder.grid
    looked = looked[:, -rows * cols:].view(-1, 5, rows, cols)                  # without the class token
    canvas = Image.fromarray(view.image(image))
    scale = side / max(canvas.size)
    canvas = canvas.resize((round(canvas.width * scale), round(canvas.height * scale)), Image.NEAREST)
    pictures = []
    for n in sorted(range(len(objects)), key=lambda n: -objects[n]["score"])[:most]:
        y0, x0, y1, x1 = (boxes[0, n].cpu() * torch.tensor([canvas.height, canvas.width] * 2)).tolist()
        for heat in looked[n]:
            light = Image.fromarray((255 * heat / heat.max()).byte().numpy()).resize(canvas.size, Image.BILINEAR)
            picture = Image.composite(canvas, Image.blend(canvas, Image.new("RGB", canvas.size), 0.8), light)
            ImageDraw.Draw(picture).rectangle((x0, y0, x1, y1), outline="white")
            pictures.append(picture)
    return tile(pictures, columns=5)


def wrap(text, length, most):
    """str -> lines, each no longer than `most` by `length`, if its words allow."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if not lines[-1] or length(longer) <= most else [*lines, word]
    return lines


def tile(pictures, columns=4, gap=4):
    """PIL pictures -> one, in rows of `columns`, each cell as large as the largest."""
    columns = min(columns, len(pictures))
    w, h = (max(p.size[i] for p in pictures) + gap for i in (0, 1))
    sheet = Image.new("RGB", (columns * w - gap, -(-len(pictures) // columns) * h - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * w, i // columns * h))
    return sheet


# ---------------------------------------------------------------------------------------------------------------
# generated images

def known_frames(c, count):
    """The first held-out clips of a model's data -> their first cond_frames, (count, C, cond_frames, H, W) in [0, 1]."""
    source, rng = data.make_source(c, "val", "gen"), np.random.default_rng(0)
    c = SimpleNamespace(**{**vars(c), "flip": False})
    pixels = np.stack([data.gen_example(source[i % len(source)], c, rng)["pixels"] for i in range(count)])
    return data.to_floats(torch.from_numpy(pixels), "cpu")[:, :, :c.model.cond_frames]


def sample_images(model, c, args):
    """Draw new images or clips into args.out, a strip of how they came about with args.strip. Returns the report."""
    device, names = next(model.parameters()).device, [category["name"] for category in c.categories]
    count, labels = args.count or 64, None
    if args.class_name is not None and (args.class_name not in names or not c.model.num_classes):
        raise ValueError(f"--class={args.class_name}: this model knows {', '.join(names) if c.model.num_classes else 'no classes'}")
    if c.model.num_classes:
        labels = torch.arange(count, device=device) % len(names)
        if args.class_name is not None:
            labels = torch.full_like(labels, names.index(args.class_name))
    known = known_frames(c, count).to(device) if getattr(c.model, "cond_frames", 0) else None
    generator, size, steps = torch.Generator(device).manual_seed(args.seed), 64, []
    parts = []
    for first in range(0, count, size):
        part = slice(first, min(first + size, count))
        keep = (lambda i, pixels: steps.append(pixels[:8].cpu())) if args.strip and first == 0 else None
        pixels = generate(model, c, part.stop - first, None if labels is None else labels[part], None if known is None else known[part], generator, keep)
        parts.append(pixels if known is None else torch.cat([known[part], pixels], 2))
    os.makedirs(args.out, exist_ok=True)
    pictures = [data.save_grid(data.to_pixels(torch.cat(parts)), os.path.join(args.out, "samples"))]
    if steps:
        chosen = [steps[round(i * (len(steps) - 1) / 9)] for i in range(10)]
        film = torch.stack(chosen, 1)                  # (8, 10, C, H, W), of a video (8, 10, C, T, H, W): its last frame stands for it
        film = film[:, :, :, -1] if film.ndim == 6 else film
        pictures.append(data.save_grid(data.to_pixels(film.flatten(0, 1)), os.path.join(args.out, "strip"), columns=10))
        last = torch.stack(steps + steps[-1:] * (len(steps) // 4 + 1), 2)      # (8, C, steps, ...)
        last = last[:, :, :, -1] if last.ndim == 6 else last
        pictures.append(data.save_grid(data.to_pixels(last), os.path.join(args.out, "denoising"), columns=4, ms=80))
    return {"pictures": pictures, "samples": count, "seed": args.seed, "steps": c.sample_steps, "sampler": c.sampler, "guidance": c.guidance,
            "td": c.td, "classes": None if labels is None else [names[label] for label in labels.tolist()]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help="image files; none: held-out items of the model's own data")
    add_checkpoint_arguments(parser)
    parser.add_argument("--task", help=f"some of {','.join(TASKS)}, or all (default: what the model was trained on)")
    parser.add_argument("--count", type=int, help="held-out items to show when no image is named (default: 8), or images to generate (64)")
    parser.add_argument("--min_score", type=float, default=0.3, help="leave out objects below this score")
    parser.add_argument("--temperature", type=float, help="of sampling (default: as trained; 0 for the likeliest tokens)")
    parser.add_argument("--top_p", type=float, help="nucleus of sampling boxes (default: as trained)")
    parser.add_argument("--boxes", nargs="+", metavar="X,Y,W,H,NAME", help="what to segment and to find the joints of, in pixels (default: what "
                        "the model detects; for one that does not, the true boxes of held-out items)")
    parser.add_argument("--attention", action="store_true", help="also draw where the tokens of each object looked")
    add_sampling_arguments(parser)
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="generate: only this class (default: all in turn)")
    parser.add_argument("--strip", action="store_true", help="generate: also a strip and a GIF of how images came out of noise")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="samples", help="folder for the pictures")
    args = parser.parse_args()
    try:
        device = pick_device(args.device)
        path, known = checkpoint_arguments(args)
        model, c = load_model(path, device, **known)
        if c.tasks == "gen":
            if args.images or args.task not in (None, "gen"):
                raise ValueError("this model generates: it takes no images and no other task")
            set_sampling(c, args)
            return print(json.dumps(sample_images(model, c, args), indent=1))
        tasks = pick_tasks(args.task, c)
        for key in ("temperature", "top_p"):
            if getattr(args, key) is not None:
                setattr(c, key, getattr(args, key))
        if args.images:
            inputs = [(name, data.load_image(name), None) for name in args.images]
        else:
            source = data.make_source(c, "val", tasks[0])
            records = [source[i] for i in range(min(args.count or 8, len(source)))]
            truth = {label: i for i, label in source.label_of.items()}
            inputs = [(f"val_{r['image_id']}", r["image"], None if "det" in c.tasks else true_boxes(r, truth)) for r in records]
        told = [read_box(text, c) for text in args.boxes] if args.boxes else None
        generator = torch.Generator(device).manual_seed(args.seed)
        os.makedirs(args.out, exist_ok=True)
        pictures, report = [], []
        for name, image, boxes in inputs:
            boxes = told or boxes
            if boxes is None and "det" not in c.tasks and set(tasks) & {"seg", "kpt"}:
                raise ValueError("this model does not detect: say what to look at with --boxes=X,Y,W,H,NAME")
            found = look(model, [image], c, tasks, None if boxes is None else [boxes], generator)[0]
            pictures.append(draw(image, found, c, args.min_score))
            target = os.path.join(args.out, os.path.splitext(os.path.basename(name))[0] + ".png")
            pictures[-1].save(target)
            if args.attention and found.get("objects"):
                draw_attention(model, image, found["objects"], c).save(target.replace(".png", "_attention.png"))
            names = {category["id"]: category["name"] for category in c.categories}
            found["objects"] = [{"name": names[o["category_id"]], **o} for o in found.get("objects", ()) if o["score"] >= args.min_score]
            report.append({"image": name, "picture": target, "width": image.width, "height": image.height, **found})
    except (FileNotFoundError, ImportError, ValueError) as e:
        sys.exit(f"error: {e}")
    if len(pictures) > 1:
        tile(pictures).save(os.path.join(args.out, "all.png"))
    print(json.dumps(rounded(report), indent=1))
    print(f"{path or find_checkpoint()}: {len(pictures)} pictures in {args.out}/" + (", all of them in all.png" if len(pictures) > 1 else ""), file=sys.stderr)


def pick_tasks(text, c):
    """The text of --task -> tuple of tasks; ValueError if it names none, or one that the model does not know."""
    trained = tuple(c.tasks.split(","))
    tasks = trained if text in (None, "all") else tuple(text.split(","))
    for task in tasks:
        if task not in trained:
            raise ValueError(f"--task={text}: this model knows {', '.join(trained)}")
    return tasks


def read_box(text, c):
    """X,Y,W,H,NAME -> an object as of `look`. ValueError, naming the classes, if it is none."""
    *numbers, name = text.split(",")
    ids = {category["name"]: category["id"] for category in c.categories}
    try:
        x, y, w, h = map(float, numbers)
        return {"category_id": ids[name], "bbox": [x, y, w, h], "score": 1.0}
    except (ValueError, KeyError):
        raise ValueError(f"--boxes {text}: expected X,Y,W,H,NAME, the name one of {', '.join(ids)}") from None


def rounded(value):
    """The same JSON value with its floats in four decimals."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
