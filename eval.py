"""How good is a model? Average precision, scores of captions and of panoptic masks, and how real
samples are.

Boxes, masks and keypoints are scored by pycocotools (cocodataset.org/#detection-eval), captions by
pycocoevalcap, samples by held-out loss, by a proxy classifier trained on the spot, and by
FID (1706.08500), FVD (1812.01717) and Inception Score (1606.03498) with a network of the user's;
panoptic masks by PQ (1801.00868), of videos by STQ (2102.11859) and DAVIS's J&F (1905.00737), and
those of others, too. Results are written in COCO's formats. Under torchrun every process predicts a
part of the items.
Left out: test sets without labels; precision and recall of samples.

    python eval.py                                      # the newest run on its held-out data
    torchrun --nproc_per_node=8 eval.py --ckpt=out/seg_coco_vit_b --data_dir=coco --boxes=truth
    python eval.py --ckpt=out/gen_cifar10_rin --eval_samples=50000 --inception=inception.pt
    python eval.py --results=mine.json --truth_json=instances_val2017.json      # of another program
"""
import hashlib
import io
import json
import math
import os
import re
import sys
import zipfile
from collections import Counter, defaultdict
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from functools import partial
from itertools import chain, compress, pairwise
from os.path import abspath, dirname, getmtime, isfile, splitext
from time import sleep, time
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from numpy.random import default_rng
from PIL import Image, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

import data
import sample
import tokenizer
from model import Device, image_tokens
from sample import PREDICT, Inputs, changed, predict, true_objects
from tokenizer import Count, Natural, UserError, frozen, notice, require

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)             # times t at which the loss of generation is taken
TOGETHER = ["det", "seg"]                      # masks are of the boxes that detection found


def evaluate(model, c, split, device, tasks=None, limit=None, boxes="", truth=False, **options):
    """Predicts a split of the model's data and scores the predictions.

    limit:   only so many items, and no proxy classifier: a look in between
    boxes:   what seg and kpt are asked about: "own" detections, "truth", or {image_id: objects};
             "": its own where the model detects, else the truth
    truth:   decode the encoded truth in place of predictions: the ceiling that tokens set
    options: batch_size, workers and seed, see `predict_items`
    Returns {task: {name: number}}, empty on all processes but the first, and {task: {item:
    prediction}}. The first number of a task, the more the better, chooses the best checkpoint.
    UserError if no item can be read.
    """
    boxes = boxes or ("own" if "det" in c.data.tasks else "truth")
    if limit:
        c = changed(c, proxy_classifier=False)
    metrics, predictions = {}, {}
    passes = [[task] for task in SCORE]
    if boxes == "own" and not truth:
        passes[:2] = [TOGETHER]                        # det and seg are the first two
    for group in passes:
        group = [task for task in group if task in (tasks or c.data.tasks)]
        if not group:
            continue
        source = data.make_source(c, split, group[0])
        items = ITEMS[group[0]](source, c)[:limit or None]
        found = predict_items(
            model, source, items, c, group, device, TRUTH if truth else PREDICT, boxes, **options)
        for task in group:
            predictions[task] = found
            if device.first:
                metrics[task] = SCORE[task](found, source, c, device)
    device.wait()                                      # gloo can abort a process that ends at once
    return metrics, predictions


def predict_items(
        model, source, items, c, tasks, device, table, boxes="own", batch_size=16, workers=0,
        seed=0):
    """{image_id, or number of the sample: prediction} of a source's items. Whole batches are shared
    out, each with random numbers of its own: any number of processes gives the same."""
    starts = range(0, len(items), batch_size)[device.rank::device.world]
    batches = [items[i:i + batch_size] for i in starts]
    loader = data.make_loader(data.EvalSet(source), batches, list, workers)
    mine = []
    for start, batch in zip(starts, tqdm(loader, "evaluate", disable=device.quiet, leave=False)):
        # Of an item that cannot be read there is only a message.
        skipped = [item for item in batch if isinstance(item, str)]
        records = {
            item.get("image_id", n): item
            for n, item in enumerate(batch, start) if item not in skipped}
        objects = None                                 # that seg and kpt are asked about
        if boxes != "own" and {"seg", "kpt"} & set(tasks):
            objects = [
                true_objects(record, source.categories) if boxes == "truth"
                else boxes.get(key, []) for key, record in records.items()]
        generator = device.generator(seed * 1_000_003 + start)
        inputs = Inputs(list(records.values()), c, objects, generator, LEVELS)
        with device.autocast():
            said = predict(model, inputs, c, tasks, table) if records else []
        mine.append((start, dict(zip(records, said)), skipped))
    found, left_out = {}, []
    for _, said, skipped in sorted(chain(*device.gather(mine))):           # in order again
        found |= said
        left_out += skipped
    for message in left_out:
        notice(f"left out of the evaluation: {message}")
    reason = left_out[0] if left_out else "the split is empty"
    require(found, f"no item to evaluate for {', '.join(tasks)}: {reason}")
    return found


# --------------------------------------------------------------------------------------------------
# SCORE[task](predictions, source, c, device) -> {name: number}

BOX_METRICS = (
    "AP AP50 AP75 AP_small AP_medium AP_large "
    "AR_1 AR_10 AR_100 AR_small AR_medium AR_large").split()
KEYPOINT_METRICS = "AP AP50 AP75 AP_medium AP_large AR AR50 AR75 AR_medium AR_large".split()
# of each task: pycocotools' name, its metrics, and where an object has its result and its score
COCO_TASKS = {
    "det": ("bbox", BOX_METRICS, "bbox", "score"),
    "seg": ("segm", BOX_METRICS, "segmentation", "score"),
    "kpt": ("keypoints", KEYPOINT_METRICS, "keypoints", "keypoint_score"),
}


def score_objects(task, predictions, source, c, device):
    """COCO's average precision and recall. No predictions give AP 0; a number for which the truth
    has no object is -1, as in pycocotools."""
    results = coco_results(task, predictions)
    return average_precision(source.truth(task), results, predictions, task) | {
        "images": len(predictions)}


def coco_results(task, predictions):
    """Predictions -> a list in COCO's format of results."""
    *_, key, score = COCO_TASKS[task]
    return [
        {"image_id": i, "category_id": obj["category_id"], key: obj[key], "score": obj[score]}
        for i, prediction in predictions.items()
        for obj in prediction["objects"] if key in obj]


# ==== reference ===================================================================================
# the other tasks' scores, and the table

def score_captions(predictions, source, c, device):
    """`caption_scores`, and the fraction that is exactly one of the references."""
    references = defaultdict(list)
    for annotation in source.truth("cap")["annotations"]:
        references[annotation["image_id"]].append(annotation["caption"].strip())
    written = {i: p["caption"] for i, p in predictions.items() if i in references}
    if not written:
        return {"exact": -1.0}                         # nothing to find
    scores = caption_scores(written, references)
    exact = sum(text in references[i] for i, text in written.items()) / len(written)
    return scores | {"exact": round(exact, 5), "images": len(written)}


def score_samples(predictions, source, c, device):
    """How real samples are, and how right.

    minus_loss, loss, loss_at_T   mean over LEVELS, on the held-out items; at each of them
    minus_bits, bits_per_dim   of an ImageAR: mean over the held-out items and their tokens
    histogram_bits   the same if each pixel were known by how often each level stood at its place in
                     training images: a ceiling
    class_accuracy   fraction of samples that the proxy classifier takes for their label
    proxy_accuracy   fraction of held-out items that it takes for theirs: how far to trust it
    frechet          distance of samples to training data, in its features
    frechet_real     the same of as many held-out items: a floor, the higher the fewer they are
    fid, inception_score(_std)   with the network c.sampling.inception
    fvd              of predicted frames, with the network c.sampling.i3d
    frame_error      mean square error of predicted frames, colours in [0, 1]; copy_error: of
                     repeating the last context frame
    """
    # losses: (N, LEVELS), of an ImageAR its bits (N,)
    pixels, labels, losses = map(np.stack, zip(*(said.values() for said in predictions.values())))
    loss = float(losses.mean())
    at_levels = {}
    if losses.ndim > 1:
        metrics = {"minus_loss": -loss, "loss": loss}
        at_levels = {f"loss_at_{t}": mean for t, mean in zip(LEVELS, losses.mean(0).tolist())}
    else:
        metrics = {"minus_bits": -loss, "bits_per_dim": loss}
        metrics["histogram_bits"] = histogram_bits(source, c, len(pixels))
    first = c.model.cond_frames                        # where a clip's predicted frames begin
    made = pixels[:, first:]
    metrics |= quality(made, labels, source, c, device)
    if first:
        items = random_items(source, c)
        future = np.stack([source[items[n]]["pixels"][first:] for n in predictions]) / 255
        for name, guess in (("frame_error", made), ("copy_error", pixels[:, first - 1:first])):
            metrics[name] = float(np.square(guess / 255 - future).mean())
    return metrics | at_levels | {"samples": len(pixels)}


def quality(pixels, labels, source, c, device):
    """What the proxy classifier and the Inception network say of samples, where they are asked."""
    train = data.make_source(c, "train", c.data.tasks[0])
    scores = {}
    s = c.sampling
    if s.proxy_classifier and train.classes:
        scores |= proxy_scores(pixels, labels, source, train, c, device)
    if s.inception:
        scores |= network_scores(Inception(s.inception, device), "fid", pixels, train, c)
    if s.i3d:
        require(pixels.ndim == 5, f"--i3d={s.i3d}: FVD is of videos, this model makes images")
        scores |= network_scores(I3D(s.i3d, device), "fvd", pixels, train, c)
    return scores


def histogram_bits(source, c, count):
    def tokens_of(source, count):                      # (N, T)
        pixels, _ = real_pixels(source, c, count)
        return image_tokens(torch.from_numpy(pixels).movedim(-1, 1), c.model).flatten(1)

    seen = tokens_of(data.make_source(c, "train", "ar"), PROXY_IMAGES)
    counts = F.one_hot(seen, c.model.levels).sum(0) + 1                # (T, levels); none is 0
    share = counts / counts.sum(1, keepdim=True)
    return -share.log2().gather(1, tokens_of(source, count).T).mean().item()


def score_maps(predictions, source, c, device):
    """PQ, SQ and RQ, see `panoptic_quality`."""
    return panoptic_quality(beside_truth(predictions, source), source.categories) | {
        "images": len(predictions)}


def score_clips(predictions, source, c, device):
    """STQ and J&F, see `video_quality`."""
    return video_quality(beside_truth(predictions, source), source.categories) | {
        "clips": len(predictions)}


def beside_truth(predictions, source):
    """Of each prediction of maps (truth, found), as in data's records."""
    for n, prediction in predictions.items():
        maps = np.stack([data.read_ids(io.BytesIO(content)) for content in prediction["maps"]])
        segments = {i: {"category_id": i >> 8} for i in np.unique(maps).tolist() if i}
        yield source[n], {"maps": maps, "segments": segments}


SCORE = {task: partial(score_objects, task) for task in COCO_TASKS} | {
    "cap": score_captions,
    "gen": score_samples,
    "ar": score_samples,
    "pan": score_maps,
    "vps": score_clips,
}


# --------------------------------------------------------------------------------------------------
# panoptic masks. Truth and what was found are records as of data.py: maps, segments

def overlaps(*maps):
    """Maps of one shape, of numbers from 0 on -> Counter: of the pixels that have each tuple of
    values, at one place one of each map."""
    sizes = [int(m.max(initial=0)) + 1 for m in maps]
    values, counts = np.unique(np.ravel_multi_index(maps, sizes), return_counts=True)
    return Counter(dict(zip(zip(*np.unravel_index(values, sizes)), counts.tolist())))


def match_segments(totals, truth, truth_rows, found, found_rows):
    """Adds maps (H, W) and their segments to {category_id: [sum of IoU, true positives, false
    positives, false negatives]} (1801.00868, section 4.1). Segments match if their IoU is above a
    half. Of what is found, pixels without truth do not count; where most of it has none, or is of a
    crowd of its category, it is no false positive."""
    shared, sizes, areas = overlaps(truth, found), overlaps(truth), overlaps(found)
    wrong = {f for f in found_rows if areas[f,]}
    missed = set()
    crowds = {}
    for t, row in truth_rows.items():
        if sizes[t,] and row.get("iscrowd"):
            crowds[row["category_id"]] = t             # of several of a category, the last
        elif sizes[t,]:
            missed.add(t)
    for (t, f), n in shared.items():
        if t not in truth_rows or f not in found_rows:
            continue
        row = truth_rows[t]
        if row.get("iscrowd") or row["category_id"] != found_rows[f]["category_id"]:
            continue
        iou = n / (row.get("area", sizes[t,]) + areas[f,] - n - shared[0, f])
        if iou > 0.5:
            totals[row["category_id"]] += iou, 1, 0, 0
            missed.discard(t)
            wrong.discard(f)
    for t in missed:
        totals[truth_rows[t]["category_id"]] += 0, 0, 0, 1
    for f in wrong:
        category = found_rows[f]["category_id"]
        if shared[0, f] + shared[crowds.get(category), f] <= areas[f,] / 2:
            totals[category] += 0, 0, 1, 0


def panoptic_quality(pairs, categories):
    """PQ, SQ and RQ of all frames of pairs (truth, found): of all categories that occur, of things,
    of stuff, and of each. categories: rows {label, name, isthing}"""
    totals = {row["label"]: np.zeros(4) for row in categories}
    for truth, found in pairs:
        for t, f in zip(truth["maps"], found["maps"]):
            match_segments(totals, t, truth["segments"], f, found["segments"])
    scores = {}
    of_each = {}
    metrics = {}
    for row, (iou, right, wrong, missed) in zip(categories, totals.values()):
        if right + wrong + missed:
            segmentation = iou / max(right, 1)
            recognition = right / (right + (wrong + missed) / 2)
            quality = segmentation * recognition
            scores[row["label"]] = quality, segmentation, recognition
            of_each[f"PQ_{row['name'].replace(' ', '_')}"] = float(quality)
    things = {row["label"] for row in categories if row["isthing"]}
    groups = {"": totals, "_things": things, "_stuff": totals.keys() - things}
    for ending, chosen in groups.items():
        rows = [scores[category] for category in chosen if category in scores]
        means = np.mean(rows or [[0.0] * 3], 0).tolist()
        metrics.update(zip((f"PQ{ending}", f"SQ{ending}", f"RQ{ending}"), means))
    return metrics | of_each


# --------------------------------------------------------------------------------------------------
# panoptic masks of videos

def iou(a, b, shared):
    """Of the pixels that are a in one map and those that are b in another, of their `overlaps`."""
    union = sum(n for (t, f), n in shared.items() if t == a or f == b)
    return shared[a, b] / union if union else 1.0


def video_quality(pairs, categories):
    """STQ, AQ and SQ of clips (2102.11859, section 4.2), where the tracks of things count, but
    crowds, and pixels without truth, nowhere; and J&F (1905.00737): mean, recall and decay of J and
    F, see `region_and_boundary`."""
    things = [row["label"] for row in categories if row["isthing"]]
    count = 0                                          # of true tracks
    association = 0.0
    confusion = Counter()
    rows = []
    for pair in pairs:
        maps = [sample.true_map(record["maps"], record["segments"]) for record in pair]
        classes, ids = np.moveaxis(maps, 2, 0)         # of truth and found, (2, T, H, W) each
        thing = np.isin(classes, things)
        known = classes[0] > 0
        confusion += overlaps(*classes[:, known])
        rows += region_and_boundary(*ids * thing * known)
        crowd = thing[0] & (ids[0] == 0)
        tracks = (classes * (ids.max() + 1) + ids) * (thing & ~crowd)          # 0: of none
        sizes, lengths = map(overlaps, tracks)
        for (t, f), n in overlaps(*tracks).items():
            if t and f:
                association += n * n / (sizes[t,] + lengths[f,] - n) / sizes[t,]
        del sizes[0,]
        count += len(sizes)
    ious = [iou(k, k, confusion) for k in set(chain(*confusion))]
    quality = association / max(count, 1)
    segmentation = sum(ious) / max(len(ious), 1)
    means = np.reshape(rows or [0.0] * 6, (-1, 6)).mean(0).tolist()
    names = "J_mean J_recall J_decay F_mean F_recall F_decay".split()
    return {
        "STQ": math.sqrt(quality * segmentation),
        "AQ": quality,
        "SQ": segmentation,
        "J&F": (means[0] + means[3]) / 2,
    } | dict(zip(names, means))


def best_assignment(scores):
    """Which column belongs to each row, each to one, so that the sum is largest: scores (N, M) with
    N <= M -> (N,). Row by row: it takes the column where that, and where the owner of that column
    goes then, and so on, gives most (Bellman-Ford)."""
    columns = np.full(len(scores), -1)
    for row, gain in enumerate(scores.copy()):
        taker = np.full(len(gain), row)
        for owner in columns[:row].argsort().tolist() * row:
            j = columns[owner]
            moved = gain[j] - scores[owner, j] + scores[owner]
            better = moved > gain + 1e-12
            gain[better], taker[better] = moved[better], owner
        gain[columns[:row]] = -np.inf                  # what is taken is no end
        j = gain.argmax()
        while j >= 0:
            columns[taker[j]], j = j, columns[taker[j]]
    return columns


def boundary(mask):
    """Pixels of a bool mask (H, W) that differ from those to the right of them or below."""
    padded = np.pad(mask, (0, 1), "edge")
    neighbours = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != neighbours).any(0)


def dilate(mask, radius):
    """A bool mask (H, W), grown by a disk."""
    squares = torch.arange(-radius, radius + 1) ** 2
    disk = (squares[:, None] + squares <= radius ** 2)[None, None].float()
    near = F.conv2d(torch.from_numpy(mask)[None].float(), disk, padding=radius)
    return (near[0] > 0.5).numpy()


def boundary_score(truth, found):
    """F: harmonic mean of the fractions of the boundaries of two masks that lie near the other's
    (1704.00675), nearer than 0.8 % of the diagonal."""
    a, b = boundary(truth), boundary(found)
    if not (a.any() and b.any()):
        return float(a.any() == b.any())
    radius = math.ceil(0.008 * math.hypot(*truth.shape))
    recall = dilate(b, radius)[a].mean()
    precision = dilate(a, radius)[b].mean()
    return 2 * precision * recall / max(precision + recall, 1e-9)


def region_and_boundary(truth, found):
    """Numbers of instances (T, H, W), 0 for none, of which each true one has the found one that is
    most like it (DAVIS 2017, unsupervised) -> a list: of each true one mean, recall (above a half)
    and decay (first quarter less last) of J, IoU, and of F."""
    rows = []
    objects, others = (np.setdiff1d(ids, 0).tolist() for ids in (truth, found))
    others += [-1] * (len(objects) - len(others))      # nothing, which is like an object unseen
    counts = list(map(overlaps, truth, found))
    j = [iou(a, b, shared) for a in objects for b in others for shared in counts]
    j = np.reshape(j, (len(objects), len(others), len(truth)))
    ends = np.round(np.linspace(1, len(truth), 5) + 1e-10).astype(int)
    for n, k in enumerate(best_assignment(j.mean(2))):
        f = list(map(boundary_score, truth == objects[n], found == others[k]))
        for values in (j[n, k], np.array(f)):
            decay = values[:ends[1]].mean() - values[ends[3] - 1:].mean()
            rows += values.mean(), (values > 0.5).mean(), decay
    return rows


# --------------------------------------------------------------------------------------------------
# the items of an evaluation

def random_items(source, c):
    """As many items as samples are asked for: files are often sorted by class, so shuffled."""
    count = c.sampling.eval_samples
    if source.endless:
        return range(count)
    length = len(source)
    rng = default_rng(0)
    orders = [rng.permutation(length) for _ in range(count // length + 1)]
    return np.concatenate(orders)[:count].tolist()


ITEMS = dict.fromkeys(PREDICT, lambda source, c: range(len(source))) | {
    "gen": random_items,
    "ar": random_items}


# --------------------------------------------------------------------------------------------------
# TRUTH[task](model, inputs, c): what a model would say that predicts every token of the truth

def true_detection(model, inputs, c):
    truth = [
        true_objects(record, c.categories)[:c.data.max_objects]
        for record in inputs.records]
    tokens = tokenizer.encode_detection(
        *sample.prompt_boxes(inputs.views, truth, c), c.vocab).targets
    certain = F.one_hot(tokens, c.vocab.text_shift)[..., c.vocab.classes].log()
    for objects in sample.read_objects(inputs.views, tokens, certain, c):
        yield {"objects": objects}


def through_tokens(points, c):
    """Points (..., P) -> the points that their tokens say."""
    # The label 1 stands for whatever is no padding.
    tokens = tokenizer.encode_points(torch.from_numpy(points), torch.tensor(1), c.vocab)
    return tokenizer.decode_points(tokens, c.vocab)


def true_masks(model, inputs, c):
    for record, view in zip(inputs.records, inputs.views):
        objects = true_objects(record, c.categories)
        polygons = list(compress(record["polygons"], ~record["iscrowd"]))
        points = data.polygon_points(view, polygons, len(objects), c.data.max_points)
        for obj, row in zip(objects, through_tokens(points, c)):
            sample.add_mask(obj, view, row[None], record["image"].size)
        yield {"objects": objects}


def true_keypoints(model, inputs, c):
    for record in inputs.records:
        objects = true_objects(record, c.categories)
        for obj, keypoints in zip(objects, record["keypoints"][~record["iscrowd"]]):
            if keypoints[:, 2].any():                  # else the truth does not know this one's
                crop = sample.keypoint_view(record["image"], obj["bbox"], c)
                points = data.keypoint_points(crop, keypoints)
                sample.add_keypoints(obj, crop, through_tokens(points, c).numpy(), 1.0)
        yield {"objects": objects}


def true_captions(model, inputs, c):
    texts = [(record["captions"] or [""])[0] for record in inputs.records]
    tokens = tokenizer.encode_captions(texts, c.vocab, c.data.caption_length).targets
    return [{"caption": text} for text in tokenizer.decode_captions(tokens, c.vocab)]


def true_maps(model, inputs, c):
    rng = default_rng(0)
    for record, view in zip(inputs.records, inputs.views):
        yield sample.map_prediction(record, data.id_maps(record, view, c, rng)[:, :2], view, c)


TRUTH = {
    "det": true_detection,
    "seg": true_masks,
    "kpt": true_keypoints,
    "cap": true_captions,
    "pan": true_maps,
    "vps": true_maps,
}


# --------------------------------------------------------------------------------------------------
# average precision

KEYPOINT_SIGMA = 0.089             # of keypoints COCO does not know: as strict as for its ankles


def coco_evaluation(truth, results, image_ids, task):
    """COCO truth and results (list of {image_id, category_id, score, and bbox, segmentation or
    keypoints}) -> pycocotools' COCOeval, when it has run."""
    with redirect_stdout(io.StringIO()):    # pycocotools prints what it does
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(results) if results else COCO(), COCO_TASKS[task][0])
        run.params.imgIds = sorted(image_ids)
        counts = [len(a["keypoints"]) // 3 for a in truth["annotations"] if "keypoints" in a]
        if counts and max(counts) != 17:               # a person of COCO has 17
            run.params.kpt_oks_sigmas = np.full(max(counts), KEYPOINT_SIGMA)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def average_precision(truth, results, image_ids, task="det"):
    """The numbers of COCO's metric, by name, and the AP of each category."""
    run = coco_evaluation(truth, results, image_ids, task)
    names = *COCO_TASKS[task][1], *(
        f"AP_{row['name'].replace(' ', '_')}" for row in run.cocoGt.loadCats(run.params.catIds))
    # (thresholds, recalls, categories, areas, most detections); -1 where the truth has none.
    values = *run.stats, *run.eval["precision"][..., 0, -1].mean((0, 1))
    return {name: round(float(value), 5) for name, value in zip(names, values)}


def draw_errors(task, predictions, c, split, path):
    """The worst errors at an IoU of 0.5: the eight surest wrong objects, and the eight largest that
    were missed."""
    source, pictures = data.make_source(c, split, task), []
    run = coco_evaluation(source.truth(task), coco_results(task, predictions), predictions, task)
    numbers = list(source.sizes)
    for side, coco, size, text in (
            ("dt", run.cocoDt, "score", "wrong"), ("gt", run.cocoGt, "area", "missed")):
        errors = [
            coco.anns[i] for row in filter(None, run.evalImgs)
            for i, match in zip(row[f"{side}Ids"], row[f"{side}Matches"][0])
            if row["aRng"] == run.params.areaRng[0]                    # all sizes
            and not match and not coco.anns[i].get("ignore")]
        for a in sorted(errors, key=lambda a: -a[size])[:8]:
            found = {"score": 1.0, **a}
            found.pop("segmentation", None)            # may be polygons
            image = source[numbers.index(a["image_id"])]["image"]
            picture = sample.draw(image, {"objects": [found], "caption": text}, c)
            pictures.append(ImageOps.contain(picture, (384, 384)))
    if pictures:
        data.tile(pictures).save(path)


# --------------------------------------------------------------------------------------------------
# captions: words in common with what people wrote, by pycocoevalcap

BRACKETS = dict(zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split()))
WORD = re.compile(r"""
    (?:mrs?|ms|dr|st|ave|jr|sr|vs|etc|no(?=\.[ ]\d))\.             # mr.  no. 5
    | (?:[^\W\d_]\.){2,}                                          # u.s.
    | \d+(?:[.,:/]\d+)+                                           # 1,000  10:30
    | \w+?(?=n't\b) | n't\b                                       # is n't
    | '(?:s|m|d|re|ve|ll|\d0s)\b                                  # man 's  '80s
    | \w+(?:[-/.]\w+ | '(?!(?:s|m|d|re|ve|ll)\b)\w+)*             # two-story  o'clock
    | [!?]{2,} | [][(){}<>&@#$%*+=/~]
    """, re.VERBOSE)


def caption_words(text):
    """str -> list of words, close to the Penn Treebank tokeniser that pycocoevalcap runs: lower
    case, punctuation removed (but neither brackets nor "!!", as there), "isn't" -> is n't, "man's"
    -> man 's, "two-story" in one piece."""
    text = re.sub(r"\bcannot\b", "can not", text.lower().replace("\u2019", "'"))
    return [BRACKETS.get(word, word) for word in WORD.findall(text)]


def caption_scores(candidates, references):
    """{image_id: str}, {image_id: [str, ...]} -> {name: number} of the corpus, by the package
    pycocoevalcap; nothing without it.

    Candidates decide which images count, also in CIDEr's weights. Words are those of
    `caption_words`, so that numbers do not depend on whether Java is found. UserError names an
    image without references.
    """
    require(candidates, "no captions to score")
    for i in candidates:
        require(references.get(i), f"image {i} has a caption to score, but no references")
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError:
        notice("ROUGE, CIDEr and BLEU need pip install pycocoevalcap")
        return {}
    def words(text):
        return " ".join(caption_words(text))

    found = {i: [words(text)] for i, text in candidates.items()}
    truth = {i: list(map(words, references[i])) for i in candidates}
    scores = {"ROUGE_L": Rouge().compute_score(truth, found)[0]}
    if any(map(any, truth.values())):                  # these fail where there is no word at all
        scores["CIDEr"], _ = Cider().compute_score(truth, found)
        bleu, _ = Bleu(4).compute_score(truth, found, verbose=0)
        scores |= {f"BLEU_{n}": score for n, score in enumerate(bleu, 1)}
    return {name: round(float(score), 5) for name, score in scores.items()}


# --------------------------------------------------------------------------------------------------
# samples. Pixels are uint8 (N, H, W, C), of clips (N, T, H, W, C), which count frame by frame

FID_IMAGES = 50_000                    # training images, at most, behind a FID, as is the custom
PROXY_IMAGES = 10_000                  # those (or frames) that a proxy classifier learns from


def feature_statistics(features):
    """(N, D) -> mean (D,) and unbiased covariance (D, D), float64. UserError for N < 2."""
    require(
        len(features) >= 2, f"statistics of features need at least 2 images, got {len(features)}")
    features = np.asarray(features, np.float64)
    return features.mean(0), np.atleast_2d(np.cov(features.T))


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of two Gaussians (1706.08500, eq. 6).

    That last trace is the sum of the singular values of P'Q, where A = PP' and B = QQ'. Nothing is
    squared before its root is taken, which would turn zeros of 1e-16 into 1e-8; so covariances may
    be singular, as those of N <= D images are. float64.
    """
    def factor(cov):                                   # (D, D) -> (D, rank)
        values, vectors = np.linalg.eigh(cov)
        kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])

    shared = np.linalg.norm(factor(cov_a).T @ factor(cov_b), "nuc")
    apart = np.square(mean_a - mean_b).sum()
    return float(apart + np.trace(cov_a) + np.trace(cov_b) - 2 * shared)


def inception_score(probabilities, splits=10):
    """(N, K) class probabilities -> mean and standard deviation over the splits of
    exp(mean KL(p(y|x) || p(y))), 1 to K (1606.03498, section 4)."""
    scores = []
    splits = min(splits, len(probabilities))
    probabilities = np.asarray(probabilities, np.float64).clip(1e-300)     # 0 log 0 is 0
    for p in np.array_split(probabilities, splits):
        divergence = p * (np.log(p) - np.log(p.mean(0)))
        scores.append(np.exp(divergence.sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def as_frames(pixels, dims=3):
    """Clips (N, T, H, W, C) -> their frames (N T, H, W, C); images stay, and with 4 dims clips."""
    return pixels.reshape(-1, *pixels.shape[-dims:])


@torch.no_grad()
def outputs_of(network, pixels, device, size=256):
    """What a network makes of pixels, as uint8 (B, C, H, W) on the device: a list of its outputs,
    float32 on the CPU."""
    batches = torch.from_numpy(pixels).split(size)
    parts = [network(batch.to(device.device).movedim(-1, 1)) for batch in batches]
    return [torch.cat(outputs).float().cpu() for outputs in zip(*parts)]


def real_pixels(source, c, count):
    """Pixels of at most `count` items, of clips the frames after the context frames, and their
    labels (N,); in a fixed random order, as files are often sorted. No image is mirrored."""
    task = c.data.tasks[0]
    still = changed(c, flip=False)
    stream = data.TrainStream(source, task, still, seed=0)
    batch = data.collate(task, still)([stream[i] for i in range(min(count, len(source)))])
    for message in batch.skipped:
        notice(f"another image stands in the evaluation for {message}")
    return batch.targets.movedim(1, -1).numpy(), batch.cond["labels"].numpy()


class ProxyClassifier(nn.Module):
    """A small classifier of the model's own data, trained on the spot. It says whether samples show
    the class that they should, and its features are what Frechet distances are taken of. Those
    compare only with each other, on the same data."""

    def __init__(self, channels, classes):
        super().__init__()
        layers = []
        for a, b in pairwise((channels, 32, 64, 128)):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(128, classes)

    def forward(self, images):
        """uint8 (N, C, H, W) -> features (N, 128), scores (N, classes)."""
        features = self.body(images.float() / 255 * 2 - 1).mean((2, 3))
        return features, self.head(features)

    def classify(self, pixels, device):
        """Pixels -> features (N or N T, 128) and classes (N,), of a clip the likeliest by the mean
        of its frames."""
        features, scores = outputs_of(self, as_frames(pixels), device)
        classes = scores.softmax(-1).unflatten(0, (len(pixels), -1)).mean(1).argmax(-1)
        return features.numpy(), classes.numpy()


def train_proxy(pixels, labels, classes, device, steps=300, seed=0):
    """Pixels and labels (N,), -1 unknown -> ProxyClassifier, the same every time (on a GPU nearly
    so). The global generators are left as they are. UserError if all labels are unknown."""
    known = labels >= 0
    require(known.any(), "no image has a label that a proxy classifier could learn")
    images = torch.from_numpy(as_frames(pixels[known])).movedim(-1, 1)
    labels = torch.from_numpy(labels[known].repeat(len(images) // known.sum()))
    with device.fork_rng(seed):
        proxy = ProxyClassifier(images.shape[1], classes).to(device.device)
        optimizer = torch.optim.AdamW(proxy.parameters(), weight_decay=0.05)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
        for _ in range(steps):
            chosen = torch.randint(len(labels), (64,))
            _, scores = proxy(images[chosen].to(device.device))
            loss = F.cross_entropy(scores, labels[chosen].to(device.device))
            device.scaler.scale(loss).backward()
            device.step(optimizer)
            rates.step()
    return proxy.eval()


def proxy_scores(pixels, labels, truth, train, c, device):
    real = real_pixels(train, c, PROXY_IMAGES // c.model.frames)
    proxy = train_proxy(*real, len(train.classes), device)

    def judge(pixels, labels):
        """The fraction of right classes, and the statistics of the features."""
        features, classes = proxy.classify(pixels, device)
        return float((classes == labels)[labels >= 0].mean()), feature_statistics(features)

    _, known = judge(*real)
    right, made = judge(pixels, labels)
    held_right, floor = judge(*real_pixels(truth, c, len(pixels)))
    scores = {"class_accuracy": right} if c.model.num_classes else {}
    return scores | {
        "proxy_accuracy": held_right,
        "frechet": frechet_distance(*made, *known),
        "frechet_real": frechet_distance(*floor, *known),
    }


class Inception:
    """The network behind FID and Inception Score, from a TorchScript file.

    Published numbers rest on Inception as of 2015-12-05; NVIDIA's stylegan2-ada-pytorch offers it
    as inception-2015-12-05.pt. It takes uint8 (N, 3, H, W), resizes by itself, and is called with
    return_features=True for features (N, 2048), with no_output_bias=True for probabilities
    (N, 1008). Any other TorchScript module will do that makes features (N, D), or the pair
    (features, probabilities), of uint8 (N, 3, H, W). UserError if the file is no TorchScript.
    """
    batch = 64
    dims = 3

    def __init__(self, path, device):
        self.path = path
        with open(path, "rb") as f:
            self.key = hashlib.sha256(f.read()).hexdigest()[:16]
        try:
            self.network = torch.jit.load(path, device.device).eval()
        except RuntimeError as e:
            raise UserError(
                f"{path}: not a TorchScript file; weights alone do not say how to compute, make "
                f"one with torch.jit.script(network).save(path) ({str(e).splitlines()[0]})") from e
        self.keywords = {argument.name for argument in self.network.forward.schema.arguments}
        self.device = device

    def features(self, pixels):
        """Pixels -> (N, D) features, and (N, K) probabilities or None, float32."""
        items = as_frames(pixels, self.dims)
        features, *rest = outputs_of(self, items, self.device, self.batch)
        return features.reshape(len(features), -1).numpy(), rest[0].numpy() if rest else None

    def __call__(self, images):
        # A grey image has one channel, the network takes three.
        output = self.outputs(images.repeat_interleave(3 // images.shape[1], 1))
        return output if isinstance(output, tuple) else (output,)

    def outputs(self, images):
        if not {"return_features", "no_output_bias"} <= self.keywords:
            return self.network(images)
        features = self.network(images, return_features=True)
        return features, self.network(images, no_output_bias=True)


class I3D(Inception):
    """The network behind FVD (1812.01717), which scores clips of 10 frames or more: StyleGAN-V and
    common_metrics_on_video_quality offer i3d_torchscript.pt. It takes float (N, 3, T, H, W) in
    [0, 255], and is called with rescale, resize and return_features. Any other TorchScript module
    will do that makes features (N, D) of that."""
    batch = 8
    dims = 4                                           # clips stay whole

    def outputs(self, clips):
        wanted = self.keywords & {"rescale", "resize", "return_features"}
        return self.network(clips.float(), **dict.fromkeys(wanted, True))


def network_scores(network, name, pixels, train, c):
    """Frechet distance to training items in a network's features, and Inception Score."""
    features, probabilities = network.features(pixels)
    real = real_statistics(network, train, c, 5 * len(pixels) if train.endless else FID_IMAGES)
    scores = {name: frechet_distance(*feature_statistics(features), *real)}
    if probabilities is not None:
        scores["inception_score"], scores["inception_score_std"] = inception_score(probabilities)
    return scores


def real_statistics(network, train, c, count):
    """Mean and covariance of a network's features of training items. They are kept beside the
    network, in a file whose name says what they are of."""
    of = [
        asdict(c.data), abspath(c.data.data_dir), len(train), count, network.key,
        c.model.sample_shape, c.model.cond_frames]
    key = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]
    path = f"{network.path}.statistics_{key}.npz"
    with suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        with np.load(path) as stored:
            return stored["mean"], stored["cov"]
    mean, cov = feature_statistics(network.features(real_pixels(train, c, count)[0])[0])
    np.savez(path, mean=mean, cov=cov)
    return mean, cov


# --------------------------------------------------------------------------------------------------
# command line

@frozen
class EvalOptions(sample.Options):
    """What eval.py is asked for."""
    split: Literal[data.SPLITS] = "val"     # test: where recipes are not chosen
    boxes: str = ""                     # seg, kpt: what about: own, truth, or a results file
    limit: Natural = 0                  # only so many items of the split; 0: all
    truth: bool = False                 # score the encoded and decoded truth: a ceiling
    errors: bool = False                # det, seg, kpt: draw the worst of them
    watch: bool = False                 # evaluate last.pt of the run whenever it changes
    results: str = ""                   # files to score in place of a model, see `score_files`
    truth_json: str = ""                # of results in COCO's formats: the truth
    truth_masks: str = ""               # its PNGs; of results of videos their folder
    batch_size: Count = 16              # items at a time
    workers: Natural = min(4, (os.cpu_count() or 1) - 1)    # processes that load data
    out: str = ""                       # start of the names of the files; empty: the checkpoint's


@tokenizer.script
def main():
    parser = sample.Parser(description=__doc__)
    parser.add_config(EvalOptions(), data.DataConfig(), sample.SamplingConfig(), without=("tasks",))
    args = parser.parse(sys.argv[1:])
    options = sample.given(EvalOptions(), vars(args))
    try:
        device = Device(options.device, options.dtype, options.compile)
        if options.results:
            print_scores(score_files(options))
        elif options.watch:
            watch(options, args, device)
        else:
            run(sample.find_checkpoint(options.ckpt), options, args, device)
    finally:
        Device.close()


def run(path, options, args, device):
    """Evaluate one checkpoint, print its numbers and save them beside it."""
    model, c = sample.load_model(path, device)
    c = sample.apply(c, args, options)
    tasks, start = sample.pick_tasks(options.task, c), time()
    require(
        not options.truth or set(tasks) <= set(TRUTH),
        f"--truth: only for {', '.join(TRUTH)}, this model generates")
    boxes = options.boxes
    if boxes not in ("", "own", "truth"):
        boxes = read_boxes(boxes, data.make_source(c, options.split, tasks[0]), c)
    kind = options.split + "_truth" * options.truth
    stem = options.out or f"{splitext(path)[0]}_{kind}"
    require(
        sample.real(options.boxes) not in {sample.real(f"{stem}_{task}.json") for task in tasks},
        f"--boxes={options.boxes} would be overwritten: use another --out")
    metrics, predictions = evaluate(
        model, c, options.split, device, tasks, options.limit, boxes, options.truth,
        batch_size=options.batch_size, workers=options.workers, seed=options.seed)
    if not device.first:
        return
    seconds = round(time() - start, 1)
    print(f"{path}, {kind}, {seconds} s")
    for task in tasks:
        print(f"{task}: predictions in {WRITE[task](predictions[task], f'{stem}_{task}')}")
        print_scores(metrics[task])
        if options.errors and task in COCO_TASKS:
            draw_errors(task, predictions[task], c, options.split, f"{stem}_{task}_errors.png")
    content = {
        "checkpoint": path,
        "seconds": seconds,
        **asdict(options),
        "sampling": asdict(c.sampling),
        **metrics,
    }
    with open(f"{stem}_metrics.json", "w") as f:
        json.dump(content, f, indent=1)
    print(f"numbers: {f.name}", flush=True)


def print_scores(scores):
    for name, value in scores.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        print(f"  {name:20}{shown:>10}")


def score_files(options):
    """Scores of results that others made: those of COCO's results, a JSON file, that options.task
    is of, det if it is all; PQ of COCO's panoptic format (a JSON file, its PNGs in the folder of
    that name); STQ and J&F of folders of PNGs per video, as KITTI-STEP or DAVIS has them."""
    truth_json, maps, results = options.truth_json, options.truth_masks, options.results
    if truth_json and not maps:
        task = "det" if options.task == "all" else options.task
        tokenizer.check_choice(task, (*COCO_TASKS, "cap"), "task")
        source = data.Coco(truth_json, None, bad_boxes="drop", task=task)
        rows = data.read_results(results, source.sizes, source.category, task)
        if task == "cap":
            return score_captions({row["image_id"]: row for row in rows}, source, None, None)
        return average_precision(source.truth(task), rows, source.sizes, task)
    if truth_json:
        truth = data.coco_maps(truth_json, maps)
        found = data.coco_maps(results, results.removesuffix(".json"), truth_json=truth_json)
        return panoptic_quality(zip(truth, found), truth.categories)
    clips = data.clip_files(maps, results)
    with Image.open(clips[0][2][0]) as first:
        kind = data.davis_clips if first.mode in ("P", "L") else data.step_clips
    truth, found = (kind([(*clip[:2], (), clip[side]) for clip in clips]) for side in (2, 3))
    return video_quality(zip(truth, found), truth.categories)


def write_results(task, predictions, stem):
    """A JSON file in COCO's format of results."""
    if task == "cap":
        results = [{"image_id": i, **said} for i, said in predictions.items()]
    else:
        results = coco_results(task, predictions)
    with open(f"{stem}.json", "w") as f:
        json.dump(results, f)
        return f.name


def write_samples(predictions, stem):
    return sample.draw_grid(list(predictions.values())[:64], stem)


WRITE = {task: partial(write_results, task) for task in (*COCO_TASKS, "cap")} | {
    "gen": write_samples,
    "ar": write_samples,
    "pan": sample.write_maps,
    "vps": sample.write_maps,
}


def read_boxes(path, source, c):
    """A results file in COCO's format -> {image_id: objects}, what seg and kpt are asked about."""
    boxes, categories = defaultdict(list), {category["id"]: category for category in c.categories}
    for result in data.read_results(path, source.sizes, categories):
        boxes[result["image_id"]].append(result)
    return boxes


def watch(options, args, device):
    """Evaluate the run's last checkpoint whenever it is a new one, until interrupted."""
    done = None
    while True:
        with suppress(FileNotFoundError):
            path = sample.find_checkpoint(options.ckpt)
            if not isfile(options.ckpt):
                path = f"{dirname(path)}/last.pt"
            written = getmtime(path)
            if written != done:
                run(path, options, args, device)
                done = written
        sleep(5)


if __name__ == "__main__":
    main()
