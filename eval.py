"""How good is a model? Average precision, scores of captions, and how real samples are.

Boxes, masks and keypoints are scored by pycocotools (cocodataset.org/#detection-eval), captions by
BLEU, ROUGE-L and CIDEr, samples by held-out loss, by a proxy classifier trained on the spot, and by
FID (1706.08500) and Inception Score (1606.03498) with a network of the user's. Results are written
in COCO's formats. Under torchrun every process predicts a part of the items.
Left out: test sets without labels; precision and recall of samples.

    python eval.py                                      # the newest run on its held-out data
    torchrun --nproc_per_node=8 eval.py --ckpt=out/seg_coco_vit_b --data_dir=coco --boxes=truth
    python eval.py --ckpt=out/gen_cifar10_rin --eval_samples=50000 --inception=inception.pt
"""
import contextlib
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import compress, zip_longest

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

import data
import sample
import tokenizer
from model import Device, image_tokens
from sample import PREDICT, Inputs, predict

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)             # times t at which the loss of generation is taken
TOGETHER = ["det", "seg"]                      # masks are of the boxes that detection found


def evaluate(model, c, split, device, tasks=None, limit=None, boxes="own", truth=False, **options):
    """Predicts a split of the model's data and scores the predictions.

    limit:   only so many items, and no proxy classifier: a look in between
    boxes:   what seg and kpt are asked about: "own" detections, "truth", or {image_id: objects}
    truth:   decode the encoded truth in place of predictions: the ceiling that tokens set
    options: batch_size, workers and seed, see `predict_items`
    Returns {task: {name: number}}, empty on all processes but the first, and {task: {item:
    prediction}}. The first number of a task, the more the better, chooses the best checkpoint.
    DataError if no item can be read.
    """
    if limit:
        c = replace(c, sampling=replace(c.sampling, proxy_classifier=False))
    metrics, predictions = {}, {}
    passes = [[task] for task in SCORE]
    if boxes == "own" and not truth:
        passes = [TOGETHER] + [group for group in passes if group[0] not in TOGETHER]
    for group in passes:
        group = [task for task in group if task in (tasks or c.data.tasks)]
        if not group:
            continue
        source = data.make_source(c, split, group[0])
        items = ITEMS[group[0]](source, c)[:limit or None]
        table = TRUTH if truth else PREDICT
        found = predict_items(model, source, items, c, group, device, table, boxes, **options)
        for task in group:
            predictions[task] = found
            if device.first:
                metrics[task] = SCORE[task](found, source, c, device)
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
            for n, item in enumerate(batch, start) if not isinstance(item, str)}
        objects = prompt_objects(records, boxes, source) if {"seg", "kpt"} & set(tasks) else None
        generator = device.generator(seed * 1_000_003 + start)
        inputs = Inputs(list(records.values()), c, objects, generator, LEVELS)
        with device.autocast():
            said = predict(model, inputs, c, tasks, table) if records else []
        mine.append((dict(zip(records, said)), skipped))
    found, left_out = {}, []
    for row in zip_longest(*device.gather(mine), fillvalue=({}, ())):      # in order again
        for said, skipped in row:
            found |= said
            left_out += skipped
    for message in left_out if device.first else ():
        tqdm.write(f"warning: left out of the evaluation: {message}", file=sys.stderr)
    if not found:
        reason = left_out[0] if left_out else "the split is empty"
        raise data.DataError(f"no item to evaluate for {', '.join(tasks)}: {reason}")
    return found


def prompt_objects(records, boxes, source):
    """What seg and kpt are asked about in each of {image_id: record}; None: own detections."""
    if boxes == "own":
        return None
    if boxes == "truth":
        return [sample.true_objects(record, source.categories) for record in records.values()]
    return [boxes.get(image_id, []) for image_id in records]


def random_items(source, c):
    """As many items as samples are asked for: files are often sorted by class, so shuffled."""
    count, length, rng = c.sampling.eval_samples, len(source), np.random.default_rng(0)
    if source.endless:
        return range(count)
    orders = [rng.permutation(length) for _ in range(count // length + 1)]
    return np.concatenate(orders)[:count].tolist()


ITEMS = dict.fromkeys(PREDICT, lambda source, c: range(len(source)))
ITEMS |= {"gen": random_items, "ar": random_items}


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


def score_objects(task, predictions, source, c, device=None):
    """COCO's average precision and recall. No predictions give AP 0; a number for which the truth
    has no object is -1, as in pycocotools."""
    truth = source.truth(task)
    known = {category["id"] for category in truth["categories"]}
    results = [r for r in coco_results(task, predictions) if r["category_id"] in known]
    return average_precision(truth, results, list(predictions), task) | {"images": len(predictions)}


def coco_results(task, predictions):
    """Predictions -> a list in COCO's format of results."""
    _, _, key, score = COCO_TASKS[task]
    return [
        {"image_id": i, "category_id": obj["category_id"], key: obj[key], "score": obj[score]}
        for i, prediction in predictions.items()
        for obj in prediction["objects"] if key in obj]


# ==== reference ===================================================================================
# the other tasks' scores, and the table

def score_captions(predictions, source, c, device=None):
    """ROUGE-L, CIDEr, BLEU, and the fraction that is exactly one of the references."""
    references = {}
    for annotation in source.truth("cap")["annotations"]:
        references.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
    written = {i: p["caption"] for i, p in predictions.items() if i in references}
    exact = sum(text in references[i] for i, text in written.items()) / max(len(written), 1)
    scores = caption_scores(written, references)
    return scores | {"exact": round(exact, 5), "images": len(written)}


def score_samples(predictions, source, c, device=None):
    """How real samples are, and how right.

    minus_loss, loss, loss_at_T   mean over LEVELS, on the held-out items; at each of them
    class_accuracy   fraction of samples that the proxy classifier takes for their label
    proxy_accuracy   fraction of held-out items that it takes for theirs: how far to trust it
    frechet          distance of samples to training data, in its features
    frechet_real     the same of as many held-out items: a floor, the higher the fewer they are
    fid, inception_score(_std)   with the network c.sampling.inception
    frame_error      mean square error of predicted frames, colours in [0, 1]; copy_error: of
                     repeating the last context frame
    """
    device = device or Device("cpu")
    pixels, labels, losses = (
        np.stack([p[key] for p in predictions.values()]) for key in ("pixels", "label", "losses"))
    first = c.model.cond_frames                        # where a clip's predicted frames begin
    loss = float(losses.mean())
    metrics = {"minus_loss": -loss, "loss": loss}
    metrics |= quality(pixels[:, first:], labels, source, c, device)
    if first:
        items = random_items(source, c)
        past, guess = pixels[:, first - 1:first] / 255, pixels[:, first:] / 255
        future = np.stack([source[items[n]]["pixels"][first:] for n in predictions]) / 255
        metrics["frame_error"] = float(np.square(guess - future).mean())
        metrics["copy_error"] = float(np.square(past - future).mean())
    for level, mean in zip(LEVELS, losses.mean(0).tolist()):
        metrics[f"loss_at_{level}"] = mean
    return metrics | {"samples": len(pixels)}


def quality(pixels, labels, source, c, device):
    """What the proxy classifier and the Inception network say of samples, where they are asked."""
    train, scores = data.make_source(c, "train", c.data.tasks[0]), {}
    if c.sampling.proxy_classifier and train.classes:
        scores |= proxy_scores(pixels, labels, source, train, c, device)
    if c.sampling.inception:
        scores |= inception_scores(pixels, train, c, device)
    return scores


def score_written(predictions, source, c, device=None):
    """How well an ImageAR predicts held-out images, and what its samples are like.

    minus_bits, bits_per_dim   mean over the held-out items and their tokens
    histogram_bits             the same if each pixel were known by how often each level stood at
                               its place in training images: a ceiling
    class_accuracy and so on   see `score_samples`
    """
    device = device or Device("cpu")
    pixels, labels, bits = (
        np.stack([p[key] for p in predictions.values()]) for key in ("pixels", "label", "bits"))
    bits = float(bits.mean())
    metrics = {"minus_bits": -bits, "bits_per_dim": bits}
    metrics["histogram_bits"] = histogram_bits(source, c, len(pixels))
    return metrics | quality(pixels, labels, source, c, device) | {"samples": len(pixels)}


def histogram_bits(source, c, count):
    train = data.make_source(c, "train", "ar")
    seen, held = (
        torch.from_numpy(real_pixels(s, c, n)[0]).movedim(-1, 1)
        for s, n in ((train, PROXY_IMAGES), (source, count)))
    seen, held = (image_tokens(pixels, c.model).flatten(1) for pixels in (seen, held))
    counts = F.one_hot(seen, c.model.levels).sum(0) + 1                # (T, levels); none is 0
    share = counts / counts.sum(1, keepdim=True)
    return -share.log2().gather(1, held.T).mean().item()


SCORE = {
    "det": partial(score_objects, "det"),
    "seg": partial(score_objects, "seg"),
    "kpt": partial(score_objects, "kpt"),
    "cap": score_captions,
    "gen": score_samples,
    "ar": score_written,
}


# --------------------------------------------------------------------------------------------------
# TRUTH[task](model, inputs, c): what a model would say that predicts every token of the truth

def truths(inputs, c):
    """Of each record: itself, its view, its objects without crowds, their boxes (1, N, 4) as
    fractions of the canvas, and labels (1, N)."""
    for record, view in zip(inputs.records, inputs.views):
        objects = sample.true_objects(record, c.categories)
        yield record, view, objects, *sample.prompt_boxes([view], [objects], c)


def true_detection(model, inputs, c):
    said, most, size = [], c.data.max_objects, c.vocab.text_shift
    for _, view, _, boxes, labels in truths(inputs, c):
        tokens = tokenizer.encode_detection(boxes[:, :most], labels[:, :most], c.vocab).targets
        certain = torch.full((*tokens.shape, size), -math.inf).scatter(-1, tokens[..., None], 0.0)
        said += sample.read_objects([view], tokens, certain[..., c.vocab.classes], c)
    return [{"objects": objects} for objects in said]


def through_tokens(points, labels, c):
    """Points (N, P), labels (N,) -> the points that their tokens say."""
    tokens = tokenizer.encode_points(torch.from_numpy(points), labels, c.vocab)
    return tokenizer.decode_points(tokens, c.vocab)


def true_masks(model, inputs, c):
    said = []
    for record, view, objects, _, labels in truths(inputs, c):
        polygons = list(compress(record["polygons"], ~record["iscrowd"]))
        points = data.polygon_points(view, polygons, len(objects), c.data.max_points)
        for obj, row in zip(objects, through_tokens(points, labels[0], c)):
            sample.add_mask(obj, view, row[None], record["image"].size)
        said.append({"objects": objects})
    return said


def true_keypoints(model, inputs, c):
    said = []
    for record, _, objects, _, labels in truths(inputs, c):
        for obj, label, keypoints in zip(
                objects, labels[0], record["keypoints"][~record["iscrowd"]]):
            if keypoints[:, 2].any():                  # else the truth does not know this one's
                crop = sample.keypoint_view(record["image"], obj["bbox"], c)
                points = data.keypoint_points(crop, keypoints)
                points = through_tokens(points[None], label[None], c)[0].numpy()
                sample.add_keypoints(obj, crop, points, 1.0)
        said.append({"objects": objects})
    return said


def true_captions(model, inputs, c):
    texts = [(record["captions"] or [""])[0] for record in inputs.records]
    tokens = tokenizer.encode_captions(texts, c.vocab, c.data.caption_length).targets
    return [{"caption": text} for text in tokenizer.decode_captions(tokens, c.vocab)]


TRUTH = {
    "det": true_detection,
    "seg": true_masks,
    "kpt": true_keypoints,
    "cap": true_captions,
}


# --------------------------------------------------------------------------------------------------
# average precision

KEYPOINT_SIGMA = 0.089             # of keypoints COCO does not know: as strict as for its ankles


def coco_index(truth):
    """Truth in COCO's format -> pycocotools' COCO, without its chatter."""
    coco = COCO()
    coco.dataset = truth
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def average_precision(truth, results, image_ids, task="det"):
    """COCO truth and results (list of {image_id, category_id, score, and bbox, segmentation or
    keypoints}) -> the numbers of COCO's metric, by name."""
    coco = coco_index(truth)
    kind, names, _, _ = COCO_TASKS[task]
    with contextlib.redirect_stdout(io.StringIO()):
        if results:
            predictions = coco.loadRes(results)
        else:
            predictions = coco_index({**truth, "annotations": []})
        run = COCOeval(coco, predictions, kind)
        run.params.imgIds = sorted(image_ids)
        counts = [len(a["keypoints"]) // 3 for a in truth["annotations"] if "keypoints" in a]
        if kind == "keypoints" and counts and max(counts) != len(run.params.kpt_oks_sigmas):
            run.params.kpt_oks_sigmas = np.full(max(counts), KEYPOINT_SIGMA)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: round(float(value), 5) for name, value in zip(names, run.stats)}


# --------------------------------------------------------------------------------------------------
# captions: n-grams in common with what people wrote

BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
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


def official_words(texts):
    """list of str -> list of lists of words, by the Java program inside pycocoevalcap. It takes one
    text per line, so line breaks inside of one would shift all that follow."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    numbered = {i: [{"caption": " ".join(text.split())}] for i, text in enumerate(texts)}
    lines = PTBTokenizer().tokenize(numbered)
    if len(lines) != len(texts):
        raise RuntimeError(f"PTBTokenizer returned {len(lines)} of {len(texts)} captions")
    return [lines[i][0].split() for i in range(len(texts))]


def ngrams(words):
    """list of words -> one Counter each for the words, pairs, triples and quadruples."""
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in (1, 2, 3, 4)]


def bleu(pairs):
    """[(candidate, [reference, ...])] in words -> (4,) BLEU_1..4 of the corpus (Papineni et al.,
    ACL 2002): geometric means of the precisions, times a penalty if the candidates are shorter than
    the references closest in length."""
    correct, total, length, closest = np.zeros(4), np.zeros(4), 0, 0
    for candidate, references in pairs:
        for n, (counts, *others) in enumerate(zip(ngrams(candidate), *map(ngrams, references))):
            most = Counter()
            for other in others:
                most |= other                          # the larger count of each n-gram
            correct[n] += (counts & most).total()
            total[n] += counts.total()
        length += len(candidate)
        closest += min((abs(len(r) - len(candidate)), len(r)) for r in references)[1]
    precision = (correct + 1e-15) / (total + 1e-9)     # pycocoevalcap's guards against 0 / 0
    penalty = math.exp(min(0.0, 1 - (closest + 1e-9) / (length + 1e-15)))
    return np.cumprod(precision) ** (1 / np.arange(1, 5)) * penalty


def rouge_l(pairs, beta=1.2):
    """Mean over images of the F score of the longest common subsequence (Lin, ACL 2004); precision
    and recall may come from different references."""
    scores = []
    for candidate, references in pairs:
        a = candidate or [""]                          # as pycocoevalcap: no text is one empty word
        best = np.zeros(2)
        for b in (reference or [""] for reference in references):
            common = common_subsequence(a, b)
            best = np.maximum(best, (common / len(a), common / len(b)))
        precision, recall = best
        mixed = recall + beta ** 2 * precision
        scores.append((1 + beta ** 2) * precision * recall / mixed if precision else 0.0)
    return float(np.mean(scores))


def common_subsequence(a, b):
    """Length of the longest common subsequence of two lists."""
    row = [0] * (len(b) + 1)                           # longest for a up to here and b[:j]
    for word in a:
        corner = 0
        for j, other in enumerate(b, 1):
            longer = corner + 1 if word == other else max(row[j], row[j - 1])
            corner, row[j] = row[j], longer
    return row[-1]


def cider(pairs, sigma=6.0):
    """CIDEr-D without stemming, which is what pycocoevalcap calls CIDEr (1411.5726): ten times the
    mean cosine of n-gram counts, each weighted by how few images use the n-gram. 0 with one image,
    where every weight is log(1)."""
    seen = Counter()
    for _, references in pairs:
        seen.update({gram for r in references for counts in ngrams(r) for gram in counts})

    def weigh(words):
        rare = math.log(len(pairs))
        return [
            {gram: count * (rare - math.log(max(1, seen[gram]))) for gram, count in counts.items()}
            for counts in ngrams(words)]

    def norm(weights):
        return math.sqrt(sum(w * w for w in weights.values()))

    total = 0.0
    for candidate, references in pairs:
        weights = weigh(candidate)
        for reference in references:
            penalty = math.exp(-(len(candidate) - len(reference)) ** 2 / (2 * sigma ** 2))
            for a, b in zip(weights, weigh(reference)):
                # The smaller of two weights: repeating a word gains nothing.
                dot = sum(min(w, b[gram]) * b[gram] for gram, w in a.items() if gram in b)
                total += penalty * dot / (norm(a) * norm(b) or 1.0) / (4 * len(references))
    return 10 * total / len(pairs)


def caption_scores(candidates, references):
    """{image_id: str}, {image_id: [str, ...]} -> {name: number} of the corpus.

    Candidates decide which images count, also in CIDEr's weights. Words come from pycocoevalcap's
    Java tokeniser, on which published numbers rest ("words": "ptb"), where package and Java are
    found, else from `caption_words` ("own"). Given the same words, the numbers are pycocoevalcap's.
    ValueError names an image without references.
    """
    if not candidates:
        raise ValueError("no captions to score")
    for image_id in candidates:
        if not references.get(image_id):
            raise ValueError(f"image {image_id} has a caption to score, but no references")
    official = importlib.util.find_spec("pycocoevalcap") and shutil.which("java")
    texts = [text for i, candidate in candidates.items() for text in (candidate, *references[i])]
    words = iter(official_words(texts) if official else map(caption_words, texts))
    pairs = [(next(words), [next(words) for _ in references[i]]) for i in candidates]
    scores = {"ROUGE_L": rouge_l(pairs), "CIDEr": cider(pairs)}
    for n, score in enumerate(bleu(pairs), 1):
        scores[f"BLEU_{n}"] = score
    scores = {name: round(float(score), 5) for name, score in scores.items()}
    return scores | {"words": "ptb" if official else "own"}


# --------------------------------------------------------------------------------------------------
# samples. Pixels are uint8 (N, H, W, C), of clips (N, T, H, W, C), which count frame by frame

FID_IMAGES = 50_000                    # training images, at most, behind a FID, as is the custom
PROXY_IMAGES = 10_000                  # those (or frames) that a proxy classifier learns from


def feature_statistics(features):
    """(N, D) -> mean (D,) and unbiased covariance (D, D), float64. ValueError for N < 2."""
    if len(features) < 2:
        raise ValueError(f"statistics of features need at least 2 images, got {len(features)}")
    features = np.asarray(features, np.float64)
    centered = features - features.mean(0)
    return features.mean(0), centered.T @ centered / (len(features) - 1)


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

    shared = np.linalg.svd(factor(cov_a).T @ factor(cov_b), compute_uv=False).sum()
    apart = np.square(mean_a - mean_b).sum()
    return float(apart + np.trace(cov_a) + np.trace(cov_b) - 2 * shared)


def inception_score(probabilities, splits=10):
    """(N, K) class probabilities -> mean and standard deviation over the splits of
    exp(mean KL(p(y|x) || p(y))), 1 to K (1606.03498, section 4)."""
    scores = []
    rows = np.asarray(probabilities, np.float64)
    for p in np.array_split(rows, min(splits, len(rows))):
        log, log_mean = (np.log(np.maximum(x, 1e-300)) for x in (p, p.mean(0)))    # 0 log 0 is 0
        scores.append(np.exp((p * (log - log_mean)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def as_frames(pixels):
    """Clips (N, T, H, W, C) -> their frames (N T, H, W, C); images stay."""
    return pixels.reshape(-1, *pixels.shape[-3:])


def image_batches(pixels, device, size=256):
    """Yields uint8 (B, C, H, W) on the device."""
    for part in np.array_split(pixels, -(-len(pixels) // size)):
        yield torch.from_numpy(part).to(device.device).movedim(-1, 1)


def real_pixels(source, c, count):
    """Pixels of at most `count` items, of clips the frames after the context frames, and their
    labels (N,); in a fixed random order, as files are often sorted. No image is mirrored."""
    still = replace(c, data=replace(c.data, flip=False))
    stream = data.TrainStream(source, c.data.tasks[0], still, seed=0)
    examples = [stream[i] for i in range(min(count, len(source)))]
    batch = data.collate(c.data.tasks[0], still)(examples)
    for message in batch.skipped:
        warnings.warn(f"another image stands in the evaluation for {message}")
    return batch.targets.movedim(1, -1).numpy(), batch.cond["labels"].numpy()


class ProxyClassifier(nn.Module):
    """A small classifier of the model's own data, trained on the spot. It says whether samples show
    the class that they should, and its features are what Frechet distances are taken of. Those
    compare only with each other, on the same data."""

    def __init__(self, channels, classes, widths=(32, 64, 128)):
        super().__init__()
        layers = []
        for a, b in zip((channels, *widths), widths):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(widths[-1], classes)

    def forward(self, images):
        """uint8 (N, C, H, W) -> features (N, 128), scores (N, classes)."""
        features = self.body(images.float() / 255 * 2 - 1).mean((2, 3))
        return features, self.head(features)

    @torch.no_grad()
    def classify(self, pixels, device):
        """Pixels -> features (N or N T, 128) and classes (N,), of a clip the likeliest by the mean
        of its frames."""
        parts = [self(images) for images in image_batches(as_frames(pixels), device)]
        features, scores = (torch.cat(part) for part in zip(*parts))
        classes = scores.softmax(-1).unflatten(0, (len(pixels), -1)).mean(1).argmax(-1)
        return features.cpu().numpy(), classes.cpu().numpy()


def train_proxy(pixels, labels, classes, device, steps=300, seed=0):
    """Pixels and labels (N,), -1 unknown -> ProxyClassifier, the same every time (on a GPU nearly
    so). The global generators are left as they are. ValueError if all labels are unknown."""
    known = labels >= 0
    if not known.any():
        raise ValueError("no image has a label that a proxy classifier could learn")
    images, labels = as_frames(pixels[known]), torch.from_numpy(labels[known])
    labels = labels.repeat_interleave(len(images) // len(labels))
    images = torch.from_numpy(images).movedim(-1, 1)
    with device.fork_rng(seed):
        proxy = ProxyClassifier(images.shape[1], classes).to(device.device)
        optimizer = torch.optim.AdamW(proxy.parameters(), weight_decay=0.05)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
        for _ in range(steps):
            chosen = torch.randint(len(labels), (64,))
            _, scores = proxy(images[chosen].to(device.device))
            F.cross_entropy(scores, labels[chosen].to(device.device)).backward()
            device.step(optimizer)
            rates.step()
    return proxy.eval()


def proxy_scores(pixels, labels, truth, train, c, device):
    frames = pixels.shape[1] if pixels.ndim == 5 else 1
    real, real_labels = real_pixels(train, c, PROXY_IMAGES // frames)
    proxy = train_proxy(real, real_labels, len(train.classes), device)
    held, held_labels = real_pixels(truth, c, len(pixels))

    def judge(pixels):
        features, classes = proxy.classify(pixels, device)
        return classes, feature_statistics(features)

    (_, known), (classes, made), (held_classes, floor) = map(judge, (real, pixels, held))
    scores = {}
    if c.model.num_classes:
        scores["class_accuracy"] = float((classes == labels)[labels >= 0].mean())
    right = (held_classes == held_labels)[held_labels >= 0]
    return scores | {
        "proxy_accuracy": float(right.mean()),
        "frechet": frechet_distance(*made, *known),
        "frechet_real": frechet_distance(*floor, *known),
    }


class Inception:
    """The network behind FID and Inception Score, from a TorchScript file.

    Published numbers rest on Inception as of 2015-12-05; NVIDIA's stylegan2-ada-pytorch offers it
    as inception-2015-12-05.pt. It takes uint8 (N, 3, H, W), resizes by itself, and is called with
    return_features=True for features (N, 2048), with no_output_bias=True for probabilities
    (N, 1008). Any other TorchScript module will do that makes features (N, D), or the pair
    (features, probabilities), of uint8 (N, 3, H, W). ValueError if the file is no TorchScript.
    """

    def __init__(self, path, device):
        with open(path, "rb") as f:
            self.key = hashlib.sha256(f.read()).hexdigest()[:16]
        try:
            self.network = torch.jit.load(path, map_location=device.device).eval()
        except RuntimeError as e:
            raise ValueError(
                f"{path}: not a TorchScript file; weights alone do not say how to compute, make "
                f"one with torch.jit.script(network).save(path) ({str(e).splitlines()[0]})") from e
        known = {argument.name for argument in self.network.forward.schema.arguments}
        self.device, self.keywords = device, {"return_features", "no_output_bias"} <= known

    @torch.no_grad()
    def features(self, pixels):
        """Pixels -> (N, D) features, and (N, K) probabilities or None, float32."""
        outputs = []
        for images in image_batches(as_frames(pixels), self.device, 64):
            images = images.expand(-1, 3, -1, -1).contiguous()     # grey is three equal colours
            if self.keywords:
                features = self.network(images, return_features=True)
                output = features, self.network(images, no_output_bias=True)
            else:
                output = self.network(images)
            outputs.append(output if isinstance(output, tuple) else (output,))
        features, *rest = (torch.cat(parts).float().cpu().numpy() for parts in zip(*outputs))
        return features.reshape(len(features), -1), rest[0] if rest else None


def inception_scores(pixels, train, c, device):
    network = Inception(c.sampling.inception, device)
    features, probabilities = network.features(pixels)
    count = 5 * len(pixels) if train.endless else FID_IMAGES
    real = real_statistics(network, train, c, count, c.sampling.stats_dir)
    scores = {"fid": frechet_distance(*feature_statistics(features), *real)}
    if probabilities is not None:
        mean, std = inception_score(probabilities)
        scores |= {"inception_score": mean, "inception_score_std": std}
    return scores


def real_statistics(network, train, c, count, folder=""):
    """Mean and covariance of a network's features of training items. With a folder they are kept
    there, in a file whose name says what they are of."""
    of = [asdict(c.data), os.path.abspath(c.data.data_dir), len(train), count, network.key]
    of += [c.model.sample_shape, c.model.cond_frames]
    key = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]
    path = os.path.join(folder, f"fid_statistics_{key}.npz")
    damaged = OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile
    with contextlib.suppress(*damaged):
        with np.load(path) as stored:
            return stored["mean"], stored["cov"]
    mean, cov = feature_statistics(network.features(real_pixels(train, c, count)[0])[0])
    if folder:
        os.makedirs(folder, exist_ok=True)
        np.savez(path, mean=mean, cov=cov)
    return mean, cov


# --------------------------------------------------------------------------------------------------
# command line

@dataclass(frozen=True)
class EvalOptions:
    """What eval.py is asked for."""
    ckpt: str = ""                      # checkpoint or folder of a run; empty: the newest run
    task: str = "all"                   # some of det,seg,kpt,cap, or gen; all: all that it knows
    split: str = "val"                  # val, train, or test: where recipes are not chosen
    boxes: str = ""                     # of seg and kpt: own detections, truth, or a results file
    limit: int = 0                      # only so many items of the split; 0: all
    truth: bool = False                 # score the encoded and decoded truth: a ceiling
    watch: bool = False                 # evaluate last.pt of the run whenever it changes
    batch_size: int = 16                # items at a time
    workers: int = min(4, (os.cpu_count() or 1) - 1)        # processes that load data
    seed: int = 0                       # of sampling
    device: str = "auto"                # auto, cuda, mps or cpu
    dtype: str = "float32"              # float32 or bfloat16
    out: str = ""                       # start of the names of the files; empty: the checkpoint's


def main():
    parser = sample.Parser(description=__doc__)
    parser.add_config(EvalOptions(), data.DataConfig(), sample.SamplingConfig(), without=("tasks",))
    args = parser.parse(sys.argv[1:])
    options = sample.given(EvalOptions(), args)
    try:
        device = Device(options.device, options.dtype)
        if options.watch:
            watch(options, args, device)
        else:
            run(sample.find_checkpoint(options.ckpt), options, args, device)
    except (OSError, ImportError, RuntimeError, ValueError) as e:
        sys.exit(f"error: {e}")
    finally:
        Device.close()


def run(path, options, args, device):
    """Evaluate one checkpoint, print its numbers and save them beside it."""
    model, c = sample.load_model(path, device)
    c = sample.configured(c, args)
    if not c.sampling.stats_dir:
        c = replace(c, sampling=replace(c.sampling, stats_dir=os.path.dirname(path)))
    tasks, start = sample.pick_tasks(options.task, c), time.time()
    if options.truth and not set(tasks) <= set(TRUTH):
        raise ValueError(f"--truth: only for {', '.join(TRUTH)}, this model generates")
    boxes = read_boxes(options.boxes or ("own" if "det" in c.data.tasks else "truth"))
    metrics, predictions = evaluate(
        model, c, options.split, device, tasks, options.limit, boxes, options.truth,
        batch_size=options.batch_size, workers=options.workers, seed=options.seed)
    if not device.first:
        return
    kind, seconds = options.split + "_truth" * options.truth, round(time.time() - start, 1)
    stem = options.out or f"{os.path.splitext(path)[0]}_{kind}"
    print(f"{path}, {kind}, {seconds} s")
    for task in tasks:
        print(f"{task}: predictions in {WRITE[task](predictions[task], f'{stem}_{task}')}")
        for name, value in metrics[task].items():
            shown = f"{value:.4f}" if isinstance(value, float) else value
            print(f"  {name:20}{shown:>10}")
    content = {
        "checkpoint": path,
        "seconds": seconds,
        **asdict(options),
        "sampling": asdict(c.sampling),
    }
    with open(f"{stem}_metrics.json", "w") as f:
        json.dump(content | metrics, f, indent=1)
    print(f"numbers: {stem}_metrics.json", flush=True)


def write_objects(task, predictions, stem):
    return write_json(coco_results(task, predictions), stem)


def write_captions(predictions, stem):
    return write_json(
        [{"image_id": i, "caption": p["caption"]} for i, p in predictions.items()], stem)


def write_json(results, stem):
    with open(f"{stem}.json", "w") as f:
        json.dump(results, f)
    return f"{stem}.json"


def write_samples(predictions, stem):
    return sample.draw_grid(list(predictions.values())[:64], stem)


WRITE = {
    "det": partial(write_objects, "det"),
    "seg": partial(write_objects, "seg"),
    "kpt": partial(write_objects, "kpt"),
    "cap": write_captions,
    "gen": write_samples,
    "ar": write_samples,
}


def read_boxes(text):
    """"own", "truth", or a results file in COCO's format -> what `evaluate` takes."""
    if text in ("own", "truth"):
        return text
    try:
        boxes = {}
        with open(text) as f:
            for result in json.load(f):
                obj = {key: result[key] for key in ("category_id", "bbox", "score")}
                boxes.setdefault(result["image_id"], []).append(obj)
        return boxes
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(
            f"{text}: expected a list of {{image_id, category_id, bbox, score}} "
            f"({type(e).__name__}: {e})") from e


def watch(options, args, device):
    """Evaluate the run's last checkpoint whenever it is a new one, until interrupted."""
    done = None
    while True:
        with contextlib.suppress(FileNotFoundError):
            path = sample.find_checkpoint(options.ckpt)
            if not os.path.isfile(options.ckpt):
                path = f"{os.path.dirname(path)}/last.pt"
            changed = os.path.getmtime(path)
            if changed != done:
                run(path, options, args, device)
                done = changed
        time.sleep(5)


if __name__ == "__main__":
    main()
