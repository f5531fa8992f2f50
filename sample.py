"""Look at one image: a trained model draws what it sees and prints it as JSON.

Boxes, class names and scores (Pix2Seq, arXiv 2109.10852, section 2.3). With no image, it takes held-out ones of the data
that the model was trained on. Left out: scores for a whole dataset (eval.py).

    python sample.py                                    # the newest run, eight held-out images
    python sample.py photo.jpg --ckpt=out/det_coco_vit_b/best.pt --min_score=0.5
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

import data
import tokenizer
from data import DataError
from model import Pix2Seq, Pix2SeqConfig

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


def load_model(path, device):
    """Checkpoint file -> the model, ready to predict, and the configuration that it was trained with."""
    checkpoint = read_checkpoint(path, device)
    c = SimpleNamespace(**checkpoint["config"])
    c.model = Pix2SeqConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in c.model.items()})
    model = Pix2Seq(c.model).to(device).eval()
    model.load_state_dict(checkpoint["model"])
    c.categories = checkpoint["categories"]            # of the training data: list of {id, name, label}
    return model, c


def make_vocab(c):
    return tokenizer.Vocab(c.bins, c.coord_shift, c.text_shift, c.model.vocab_size)


# ---------------------------------------------------------------------------------------------------------------
# prediction

@torch.no_grad()
def detect(model, images, c, generator=None):
    """Images (B, 3, H, W) float -> labels (B, N), boxes_yxyx (B, N, 4) fractions and scores (B, N), N = max_objects."""
    vocab = make_vocab(c)
    context = model.encode(images)
    prompt = torch.full((len(images), 1), tokenizer.PROMPT_DET, device=images.device)
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


# ---------------------------------------------------------------------------------------------------------------
# pictures

PALETTE = [(230, 60, 60), (60, 160, 250), (90, 200, 90), (250, 180, 40), (190, 100, 240), (60, 210, 210), (250, 120, 180)]


def draw_objects(image, objects, names, side=384):
    """PIL RGB and objects as of `objects_in_image` -> a copy with boxes, class names and scores, small images enlarged."""
    zoom = max(1, round(side / max(image.size)))
    picture = image.resize((image.width * zoom, image.height * zoom), Image.NEAREST)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(max(12, max(picture.size) // 40))
    for thing in sorted(objects, key=lambda o: o["score"]):
        x, y, w, h = (zoom * value for value in thing["bbox"])
        color = PALETTE[list(names).index(thing["category_id"]) % len(PALETTE)]
        pen.rectangle((x, y, x + w, y + h), outline=color, width=max(2, max(picture.size) // 300))
        text = f"{names[thing['category_id']]} {thing['score']:.2f}"
        left, top, right, bottom = pen.textbbox((x, y), text, font=font)
        up = min(bottom - y + 2, y)                    # above the box where there is room
        pen.rectangle((left, y - up, right + 2, bottom - up + 2), fill=color)
        pen.text((x + 1, y - up), text, fill="black", font=font)
    return picture


def tile(pictures, columns=4, gap=4):
    """PIL pictures -> one, in rows of `columns`, each cell as large as the largest."""
    columns = min(columns, len(pictures))
    w, h = (max(p.size[i] for p in pictures) + gap for i in (0, 1))
    sheet = Image.new("RGB", (columns * w - gap, -(-len(pictures) // columns) * h - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * w, i // columns * h))
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", help="image files; none: held-out items of the model's own data")
    parser.add_argument("--ckpt", help="checkpoint file or folder of a run (default: the newest run in out/)")
    parser.add_argument("--count", type=int, default=8, help="held-out items to show when no image is named")
    parser.add_argument("--min_score", type=float, default=0.3, help="leave out objects below this score")
    parser.add_argument("--temperature", type=float, help="of sampling (default: as trained; 0 for the likeliest tokens)")
    parser.add_argument("--top_p", type=float, help="nucleus of sampling (default: as trained)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="samples", help="folder for the pictures")
    args = parser.parse_args()
    try:
        device = pick_device(args.device)
        path = find_checkpoint(args.ckpt)
        model, c = load_model(path, device)
        for key in ("temperature", "top_p"):
            if getattr(args, key) is not None:
                setattr(c, key, getattr(args, key))
        if args.images:
            inputs = [(name, data.load_image(name)) for name in args.images]
        else:
            source = data.make_source(c, "val")
            records = [source[i] for i in range(min(args.count, len(source)))]
            inputs = [(f"val_{r['image_id']}", r["image"]) for r in records]
    except (FileNotFoundError, ValueError) as e:
        sys.exit(f"error: {e}")
    category_of = {category["label"]: category["id"] for category in c.categories}
    names = {category["id"]: category["name"] for category in c.categories}
    generator = torch.Generator(device).manual_seed(args.seed)
    os.makedirs(args.out, exist_ok=True)
    pictures, report = [], []
    for name, image in inputs:
        view = data.eval_view(image, c.model.image_size)
        pixels = torch.from_numpy(view.image(image))[None]
        labels, boxes, scores = detect(model, data.to_images(pixels, torch.tensor([[view.height, view.width]]), device), c, generator)
        objects = [o for o in objects_in_image(view, labels[0], boxes[0], scores[0], category_of) if o["score"] >= args.min_score]
        pictures.append(draw_objects(image, objects, names))
        target = os.path.join(args.out, os.path.splitext(os.path.basename(name))[0] + ".png")
        pictures[-1].save(target)
        report.append({"image": name, "picture": target, "width": image.width, "height": image.height,
                       "objects": [{"name": names[o["category_id"]], "category_id": o["category_id"], "score": round(o["score"], 4),
                                    "box_xywh_px": [round(v, 1) for v in o["bbox"]]} for o in objects]})
    if len(pictures) > 1:
        tile(pictures).save(os.path.join(args.out, "all.png"))
    print(json.dumps(report, indent=1))
    print(f"{path}: {len(pictures)} pictures in {args.out}/" + (", all of them in all.png" if len(pictures) > 1 else ""), file=sys.stderr)


if __name__ == "__main__":
    main()
