"""How good is a model? Average precision by pycocotools over any split.

All twelve numbers of COCO's detection metric (cocodataset.org/#detection-eval); results in COCO's own format, so that its
server takes them. Under torchrun every process predicts a share of the images. `--truth` feeds the tokenised truth
through decoding as if predicted, which shows the ceiling that quantisation sets. Left out: test sets without labels.

    python eval.py                                                   # the newest run on its held-out data
    python eval.py --ckpt=out/det_coco_vit_b --data_dir=coco --split=val --batch_size=16
"""
import argparse
import contextlib
import io
import json
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

import data
import tokenizer
from sample import detect, find_checkpoint, load_model, make_vocab, objects_in_image, pick_device

BBOX_METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
                "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")


def coco_index(truth):
    """Truth in COCO's format -> pycocotools' COCO, without its chatter."""
    coco = COCO()
    coco.dataset = truth
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def average_precision(truth, results, image_ids):
    """COCO truth and results (lists of {image_id, category_id, bbox, score}) -> the twelve numbers, by name. No results
    at all give AP 0; a number for which the truth has no object (say, no small one) is -1, as in pycocotools."""
    coco = coco_index(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        found = coco.loadRes(results) if results else coco_index({**truth, "annotations": []})
        run = COCOeval(coco, found, "bbox")
        run.params.imgIds = sorted(image_ids)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: round(float(value), 5) for name, value in zip(BBOX_METRICS, run.stats)}


def truth_as_prediction(batch, vocab):
    """Encode the true objects of a batch, then decode them as if a model had been certain of every token."""
    tokens = tokenizer.encode_detection(batch["boxes"], batch["labels"], vocab).targets
    logprobs = torch.full((*tokens.shape, vocab.coord_shift), -torch.inf)
    class_tokens = tokens.where(tokens < vocab.coord_shift, 0)
    return tokenizer.decode_detection(tokens, logprobs.scatter(-1, class_tokens[..., None], 0.0)[..., vocab.classes], vocab)


def predict(model, source, c, device, batch_size=8, workers=0, limit=None, seed=0, truth=False, dtype=torch.float32):
    """Predictions for a source, spread over all processes. Returns results in COCO's format, the ids of the images that
    were read, and the messages about those that could not be."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    dataset = data.EvalSet(source, data.detection_options(c))
    mine = range(len(source) if limit is None else min(limit, len(source)))[rank::world]
    batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
    loader = data.make_loader(dataset, batches, data.collate, workers)
    category_of, vocab = {label: i for i, label in source.label_of.items()}, make_vocab(c)
    results, seen, skipped = [], [], []
    for step, batch in enumerate(tqdm(loader, "evaluate", disable=rank > 0 or not sys.stderr.isatty(), leave=False)):
        skipped += batch["skipped"]
        if "image" not in batch:
            continue
        if truth:
            found = truth_as_prediction(batch, vocab)
        else:
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + batches[step][0])
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                found = detect(model, data.to_images(batch["image"], batch["size"], device), c, generator)
        for image_id, view, *objects in zip(batch["image_id"], batch["view"], *found):
            seen.append(image_id)
            results += [{"image_id": image_id, **o} for o in objects_in_image(view, *objects, category_of)]
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, (results, seen, skipped))
        results, seen, skipped = ([x for share in shares for x in share[i]] for i in range(3))
    return results, seen, skipped


def evaluate(model, source, c, device, **options):
    """`predict`, then `average_precision` (on the first process; elsewhere None). Returns metrics and results."""
    training = model is not None and model.training
    if model is not None:
        model.eval()
    results, seen, skipped = predict(model, source, c, device, **options)
    if training:
        model.train()
    if dist.is_initialized() and dist.get_rank() > 0:
        return None, results
    for message in skipped:
        tqdm.write(f"warning: left out of the evaluation: {message}", file=sys.stderr)
    if not seen:
        raise data.DataError(f"no image to evaluate: {skipped[0] if skipped else 'the split is empty'}")
    return average_precision(source.truth(), results, seen) | {"images": len(seen)}, results


def run(path, args, device):
    """Evaluate one checkpoint, print its numbers and save them beside it."""
    model, c = load_model(path, device)
    for key in ("data_dir", "data", "val_json", "val_images", "train_json", "train_images", "top_p", "temperature"):
        if getattr(args, key) is not None:
            setattr(c, key, getattr(args, key))
    start = time.time()
    metrics, results = evaluate(model, data.make_source(c, args.split), c, device, batch_size=args.batch_size, workers=args.workers,
                                limit=args.limit, seed=args.seed, truth=args.truth, dtype=getattr(torch, args.dtype))
    if metrics is None:
        return
    metrics = {"checkpoint": path, "split": args.split, "truth": args.truth, **metrics, "seconds": round(time.time() - start, 1)}
    stem = f"{os.path.splitext(path)[0]}_{args.split}{'_truth' if args.truth else ''}"
    for name, value in (("results", results), ("metrics", metrics)):
        with open(f"{args.out or stem}_{name}.json", "w") as f:
            json.dump(value, f)
    print(f"{path}, {metrics['images']} {args.split} images, {metrics['seconds']} s" + (", truth fed as prediction" if args.truth else ""))
    for name in BBOX_METRICS:
        print(f"  {name:10}{metrics[name]:8.4f}")
    print(f"results: {args.out or stem}_results.json (COCO format), {args.out or stem}_metrics.json", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="checkpoint file or folder of a run (default: the newest run in out/)")
    parser.add_argument("--split", choices=["val", "train"], default="val")
    for key, text in (("data", "shapes or coco (default: as trained)"), ("data_dir", "folder in COCO's layout"), ("val_json", "annotations"),
                      ("val_images", "their images"), ("train_json", "annotations"), ("train_images", "their images")):
        parser.add_argument(f"--{key}", help=text)
    parser.add_argument("--limit", type=int, help="only the first images of the split")
    parser.add_argument("--truth", action="store_true", help="feed the tokenised truth as prediction: the ceiling of quantisation")
    parser.add_argument("--watch", action="store_true", help="evaluate last.pt of the run each time it changes, until interrupted")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=min(4, (os.cpu_count() or 1) - 1))
    parser.add_argument("--top_p", type=float, help="nucleus of sampling (default: as trained)")
    parser.add_argument("--temperature", type=float, help="of sampling (default: as trained)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", help="start of the names of the two files written (default: beside the checkpoint)")
    args = parser.parse_args()
    device = pick_device(args.device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    try:
        if args.watch:
            watch(args, device)
        else:
            run(find_checkpoint(args.ckpt), args, device)
    except (FileNotFoundError, ValueError) as e:
        sys.exit(f"error: {e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def watch(args, device):
    """Evaluate the run's last checkpoint whenever it is a new one."""
    done = None
    while True:
        with contextlib.suppress(FileNotFoundError):
            path = find_checkpoint(args.ckpt)
            path = os.path.join(os.path.dirname(path), "last.pt") if args.ckpt is None or os.path.isdir(args.ckpt) else path
            changed = os.path.getmtime(path)
            if changed != done:
                run(path, args, device)
                done = changed
        time.sleep(5)


if __name__ == "__main__":
    main()
