"""How good is a model? Average precision of boxes, masks and joints; scores of captions.

Boxes, masks and joints by pycocotools (cocodataset.org/#detection-eval), captions by BLEU, ROUGE-L and CIDEr; results in COCO's
own formats, so that its server takes them. Under torchrun every process predicts a share of the images. `--truth` feeds the
tokenised truth through decoding as if predicted, which shows the ceiling that tokens set. Left out: test sets without labels.

    python eval.py                                                   # the newest run on its held-out data
    torchrun --nproc_per_node=8 eval.py --ckpt=out/multi_coco_vit_b --data_dir=coco --task=seg --boxes=truth
"""
import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

import data
import tokenizer
from sample import (add_checkpoint_arguments, add_joints, checkpoint_arguments, find_checkpoint, is_reference, load_model, look,
                    make_pieces, make_vocab, mask_of, objects_in_image, pick_device, pick_tasks, to_rle, true_boxes)

# ---------------------------------------------------------------------------------------------------------------
# boxes, masks, joints

BOX_METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large")
METRICS = {"det": BOX_METRICS, "seg": BOX_METRICS,
           "kpt": ("AP", "AP50", "AP75", "AP_medium", "AP_large", "AR", "AR50", "AR75", "AR_medium", "AR_large")}
COCO_NAMES = {"det": "bbox", "seg": "segm", "kpt": "keypoints"}
JOINT_SIGMA = 0.089                                    # of joints that COCO does not know: as strict as for its ankles


def coco_index(truth):
    """Truth in COCO's format -> pycocotools' COCO, without its chatter."""
    coco = COCO()
    coco.dataset = truth
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def average_precision(truth, results, image_ids, task="det"):
    """COCO truth and results (list of {image_id, category_id, score, and bbox, segmentation or keypoints}) -> the numbers of
    COCO's metric, by name. No results at all give AP 0; a number for which the truth has no object is -1, as in pycocotools."""
    coco = coco_index(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        found = coco.loadRes([dict(r) for r in results]) if results else coco_index({**truth, "annotations": []})
        run = COCOeval(coco, found, COCO_NAMES[task])
        run.params.imgIds = sorted(image_ids)
        if task == "kpt":
            joints = max((len(a["keypoints"]) // 3 for a in truth["annotations"] if "keypoints" in a), default=17)
            if joints != len(run.params.kpt_oks_sigmas):
                run.params.kpt_oks_sigmas = np.full(joints, JOINT_SIGMA)
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: round(float(value), 5) for name, value in zip(METRICS[task], run.stats)}


# ---------------------------------------------------------------------------------------------------------------
# captions: n-grams in common with what people wrote

CAPTION_METRICS = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "ROUGE_L", "CIDEr")
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
WORD = re.compile(r"""(?:mrs?|ms|dr|st|ave|jr|sr|vs|etc|no(?=\.[ ]\d))\. | (?:[^\W\d_]\.){2,}    # mr.  no. 5  u.s.
    | \d+(?:[.,:/]\d+)+ | \w+?(?=n't\b) | n't\b | '(?:s|m|d|re|ve|ll|\d0s)\b    # 1,000  10:30  is n't  man 's  '80s
    | \w+(?:[-/.]\w+ | '(?!(?:s|m|d|re|ve|ll)\b)\w+)* | [!?]{2,} | [][(){}<>&@#$%*+=/~]    # two-story  o'clock  &
    """, re.VERBOSE)


def caption_words(text):
    """str -> list of words, close to the Penn Treebank tokeniser that pycocoevalcap runs: lower case, punctuation
    removed (but neither brackets nor "!!", as there), "isn't" -> is n't, "man's" -> man 's, "two-story" in one piece."""
    text = re.sub(r"\bcannot\b", "can not", text.lower().replace("\u2019", "'"))
    return [BRACKETS.get(word, word) for word in WORD.findall(text)]


def official_words(texts):
    """list of str -> list of lists of words, by the Java program inside pycocoevalcap. It takes one text a line, so
    any of its line breaks inside of one (\\r, \\v, \\f, U+2028, U+2029) would shift all that follow."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    lines = PTBTokenizer().tokenize({i: [{"caption": " ".join(text.split())}] for i, text in enumerate(texts)})
    if len(lines) != len(texts):
        raise RuntimeError(f"PTBTokenizer returned {len(lines)} of {len(texts)} captions; library=False does without it")
    return [lines[i][0].split() for i in range(len(texts))]


def ngrams(words):
    """list of words -> one Counter each for the words, pairs, triples and quadruples."""
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in (1, 2, 3, 4)]


def bleu(pairs):
    """[(candidate, [reference, ...])] in words -> (4,) BLEU_1..4 of the corpus (Papineni et al., ACL 2002): geometric
    means of the precisions, times a penalty if the candidates are shorter than the references closest in length."""
    correct, total, length, closest = np.zeros(4), np.zeros(4), 0, 0
    for candidate, references in pairs:
        for n, (counts, *others) in enumerate(zip(ngrams(candidate), *map(ngrams, references))):
            most = Counter()
            for other in others:
                most |= other                                                  # the larger count of each n-gram
            correct[n] += (counts & most).total()
            total[n] += counts.total()
        length += len(candidate)
        closest += min((abs(len(r) - len(candidate)), len(r)) for r in references)[1]
    precision = (correct + 1e-15) / (total + 1e-9)                             # pycocoevalcap's guards against 0 / 0
    penalty = math.exp(min(0.0, 1 - (closest + 1e-9) / (length + 1e-15)))
    return np.cumprod(precision) ** (1 / np.arange(1, 5)) * penalty


def rouge_l(pairs, beta=1.2):
    """Mean over images of the F score of the longest common subsequence (Lin, ACL 2004); precision and recall may come
    from different references."""
    scores = []
    for candidate, references in pairs:
        a, best = candidate or [""], np.zeros(2)                               # as pycocoevalcap: no text is one empty word
        for b in (reference or [""] for reference in references):
            row = [0] * (len(b) + 1)                                           # longest for a up to here and b[:j]
            for word in a:
                corner = 0
                for j, other in enumerate(b, 1):
                    corner, row[j] = row[j], corner + 1 if word == other else max(row[j], row[j - 1])
            best = np.maximum(best, (row[-1] / len(a), row[-1] / len(b)))
        precision, recall = best
        scores.append((1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision) if precision else 0.0)
    return float(np.mean(scores))


def cider(pairs, sigma=6.0):
    """CIDEr-D without stemming, which is what pycocoevalcap calls CIDEr (1411.5726): ten times the mean cosine of n-gram
    counts, each weighted by how few images use the n-gram. 0 with one image, where every weight is log(1)."""
    seen = Counter(gram for _, references in pairs for gram in {g for r in references for c in ngrams(r) for g in c})
    idf = lambda gram: math.log(len(pairs)) - math.log(max(1, seen[gram]))
    weigh = lambda words: [{gram: count * idf(gram) for gram, count in counts.items()} for counts in ngrams(words)]
    norm = lambda weights: math.sqrt(sum(w * w for w in weights.values()))
    total = 0.0
    for candidate, references in pairs:
        weights = weigh(candidate)
        for reference in references:
            penalty = math.exp(-(len(candidate) - len(reference)) ** 2 / (2 * sigma ** 2))
            for a, b in zip(weights, weigh(reference)):
                dot = sum(min(w, b[g]) * b[g] for g, w in a.items() if g in b)         # repeating a word gains nothing
                total += penalty * dot / (norm(a) * norm(b) or 1.0) / (4 * len(references))
    return 10 * total / len(pairs)


def caption_scores(candidates, references, library=None):
    """{image_id: str}, {image_id: [str, ...]} -> CAPTION_METRICS of the corpus, and which "words" they rest on.

    Candidates decide which images count, also in CIDEr's weights. library: True takes words from pycocoevalcap's
    Java tokeniser ("words": "ptb"), which published numbers rest on; False from `caption_words` ("own"), for which
    nothing must be installed; None picks the first where package and Java are found. Given the same words, the
    numbers are pycocoevalcap's. ValueError names an image without references; ImportError what is missing.
    """
    missing = [name for name, found in (("pip install pycocoevalcap", importlib.util.find_spec("pycocoevalcap")),
                                        ("java on the PATH", shutil.which("java"))) if not found]
    if library and missing:
        raise ImportError(f"library=True needs {' and '.join(missing)}")
    if not candidates:
        raise ValueError("no captions to score")
    for image_id in candidates:
        if not references.get(image_id):
            raise ValueError(f"image {image_id} has a caption to score, but no reference captions")
    texts = [text for i, candidate in candidates.items() for text in (candidate, *references[i])]
    official = not missing if library is None else library
    words = iter(official_words(texts) if official else map(caption_words, texts))
    pairs = [(next(words), [next(words) for _ in references[i]]) for i in candidates]
    scores = (*bleu(pairs), rouge_l(pairs), cider(pairs))
    return {name: round(float(x), 5) for name, x in zip(CAPTION_METRICS, scores)} | {"words": "ptb" if official else "own"}


# ---------------------------------------------------------------------------------------------------------------
# predictions for a dataset

def truth_as_prediction(record, c, tasks, category_of):
    """What `look` would return about a record's image if every token of the truth were predicted with certainty."""
    vocab, found, image = make_vocab(c), {}, record["image"]
    view = data.eval_view(data.whole(image), c.model.image_size)
    real = np.flatnonzero(~record["iscrowd"])
    boxes = data.pad_objects(view, data.view_boxes(view, record["boxes"][real]), record["labels"][real], max(len(real), 1))
    boxes, labels = torch.from_numpy(boxes["boxes"])[None], torch.from_numpy(boxes["labels"])[None]
    if "det" in tasks:
        tokens = tokenizer.encode_detection(boxes[:, :c.max_objects], labels[:, :c.max_objects], vocab).targets
        certain = torch.full((*tokens.shape, vocab.size), -torch.inf).scatter(-1, tokens[..., None], 0.0)
        decoded = tokenizer.decode_detection(tokens, certain[..., vocab.classes], vocab)
        found["objects"] = objects_in_image(view, *(x[0] for x in decoded), category_of)
    if "seg" in tasks or "kpt" in tasks:
        found["objects"] = true_boxes(record, category_of)
    if "seg" in tasks:
        points = torch.from_numpy(data.outline_points(view, [record["polygons"][i] for i in real], len(real), c.max_points))[None]
        decoded = tokenizer.decode_points(tokenizer.encode_points(points, labels[:, :len(real)], vocab), vocab)
        for thing, row in zip(found["objects"], decoded[0] if len(real) else ()):
            thing["segmentation"] = to_rle(mask_of(view, row, image.size))
    if "kpt" in tasks:
        for thing, i in zip(found["objects"], real):
            if not record["keypoints"][i, :, 2].any():
                continue                               # the truth does not know this one's joints
            crop = data.eval_view(data.around_box(image, record["boxes"][i], c.crop_margin), c.model.image_size)
            points = torch.from_numpy(data.joint_points(crop, record["keypoints"][i]))[None]
            tokens = tokenizer.encode_points(points, labels[0, :1], vocab)
            add_joints(thing, crop, tokenizer.decode_points(tokens, vocab)[0].numpy(), 1.0)
    if "cap" in tasks:
        texts, pieces = record["captions"][:1] or [""], make_pieces(c)
        tokens = tokenizer.encode_captions(texts, vocab, pieces, c.caption_length).targets
        found["caption"] = tokenizer.decode_captions(tokens, vocab, pieces)[0]
    return found


def predict(model, source, c, tasks, batch_size=8, workers=0, limit=None, seed=0, boxes="own", truth=False, dtype=torch.float32):
    """What the model finds in a source's images, spread over all processes.

    boxes: where seg and kpt take their boxes from: "own" detection pass, "truth", or {image_id: list of results}
    Returns {image_id: what `look` returns} and the messages about images that cannot be read.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(len(source) if limit is None else min(limit, len(source)))[rank::world]
    batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
    loader = data.make_loader(data.EvalSet(source), batches, list, workers)
    category_of = {label: i for i, label in source.label_of.items()}
    found, skipped = {}, []
    for step, items in enumerate(tqdm(loader, "evaluate", disable=rank > 0 or not sys.stderr.isatty(), leave=False)):
        skipped += [item for item in items if isinstance(item, str)]
        records = [item for item in items if not isinstance(item, str)]
        if not records:
            continue
        if truth:
            looked = [truth_as_prediction(record, c, tasks, category_of) for record in records]
        else:
            device = next(model.parameters()).device
            given = None if boxes == "own" or not set(tasks) & {"seg", "kpt"} else \
                [true_boxes(r, category_of) if boxes == "truth" else boxes.get(r["image_id"], []) for r in records]
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + batches[step][0])
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                looked = look(model, [r["image"] for r in records], c, tasks, given, generator)
        found.update(zip((r["image_id"] for r in records), looked))
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, (found, skipped))
        found, skipped = {k: v for share in shares for k, v in share[0].items()}, [m for share in shares for m in share[1]]
    return found, skipped


def task_results(found, task, categories):
    """What `predict` returns -> the results of one task in COCO's format."""
    if task == "cap":
        return [{"image_id": image_id, "caption": f["caption"]} for image_id, f in found.items()]
    key = {"det": "bbox", "seg": "segmentation", "kpt": "keypoints"}[task]
    return [{"image_id": image_id, "category_id": o["category_id"], key: o[key], "score": o["keypoint_score" if task == "kpt" else "score"]}
            for image_id, f in found.items() for o in f["objects"] if key in o and o["category_id"] in categories]


def evaluate(model, c, tasks, split="val", boxes="own", **options):
    """Metrics of each task {task: {name: number}} and its results {task: list}; on processes but the first, metrics are None.
    Tasks with the same images and the same kind of boxes share one pass. DataError if no image can be read."""
    training = model is not None and model.training
    if model is not None:
        model.eval()
    metrics, results = {}, {}
    # Masks and joints of given boxes say nothing about detection, so that gets a pass of its own then.
    passes = [["det", "seg"], ["kpt"], ["cap"]] if boxes == "own" and not options.get("truth") else [["det"], ["seg"], ["kpt"], ["cap"]]
    for group in passes:
        group = [task for task in group if task in tasks]
        if not group:
            continue
        source = data.make_source(c, split, group[0])
        found, skipped = predict(model, source, c, group, boxes=boxes, **options)
        for message in skipped:
            tqdm.write(f"warning: left out of the evaluation: {message}", file=sys.stderr)
        if not found:
            raise data.DataError(f"no image to evaluate: {skipped[0] if skipped else 'the split is empty'}")
        for task in group:
            truth = source.truth(task)
            results[task] = task_results(found, task, {category["id"] for category in truth["categories"]})
            if dist.is_initialized() and dist.get_rank() > 0:
                continue
            if task == "cap":
                references = {}
                for a in truth["annotations"]:
                    references.setdefault(a["image_id"], []).append(a["caption"].strip())
                written = {i: f["caption"] for i, f in found.items() if i in references}
                exact = sum(text in references[i] for i, text in written.items()) / max(len(written), 1)
                metrics[task] = caption_scores(written, {i: references[i] for i in written}) | {"exact": round(exact, 5)}
            else:
                metrics[task] = average_precision(truth, results[task], found, task)
            metrics[task]["images"] = len(found)
    if training:
        model.train()
    return metrics, results


def run(path, args, device):
    """Evaluate one checkpoint, print its numbers and save them beside it."""
    model, c = load_model(path, device, **checkpoint_arguments(args)[1])
    for key in DATA_KEYS:
        if getattr(args, key) is not None:
            setattr(c, key, getattr(args, key))
    tasks = pick_tasks(args.task, c)
    start = time.time()
    metrics, results = evaluate(model, c, tasks, args.split, read_boxes(args.boxes or ("own" if "det" in c.tasks else "truth")),
                                batch_size=args.batch_size, workers=args.workers, limit=args.limit, seed=args.seed, truth=args.truth,
                                dtype=getattr(torch, args.dtype))
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    stem = args.out or f"{os.path.splitext(path)[0]}_{args.split}{'_truth' if args.truth else ''}"
    seconds = round(time.time() - start, 1)
    print(f"{path}, {args.split}, {seconds} s" + (", truth fed as prediction" if args.truth else ""))
    for task in tasks:
        print(f"{task}: {metrics[task]['images']} images, results in COCO's format: {stem}_{task}.json")
        print("".join(f"  {name:10}{value:8.4f}\n" for name, value in metrics[task].items() if isinstance(value, float)), end="", flush=True)
        with open(f"{stem}_{task}.json", "w") as f:
            json.dump(results[task], f)
    with open(f"{stem}_metrics.json", "w") as f:
        json.dump({"checkpoint": path, "split": args.split, "truth": args.truth, "seconds": seconds, **metrics}, f, indent=1)
    print(f"numbers: {stem}_metrics.json", flush=True)


def read_boxes(text):
    """"own", "truth", or the path of a results file in COCO's format -> what `predict` takes."""
    if text in ("own", "truth"):
        return text
    try:
        with open(text) as f:
            boxes = {}
            for thing in json.load(f):
                boxes.setdefault(thing["image_id"], []).append({key: thing[key] for key in ("category_id", "bbox", "score")})
            return boxes
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{text}: expected a list of {{image_id, category_id, bbox, score}} ({type(e).__name__}: {e})") from e


DATA_KEYS = ("data", "data_dir", "bad_boxes", "train_json", "train_keypoints", "train_captions", "train_images",
             "val_json", "val_keypoints", "val_captions", "val_images", "top_p", "temperature", "seg_samples")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_arguments(parser)
    parser.add_argument("--task", help="some of det,seg,kpt,cap (default: what the model was trained on)")
    parser.add_argument("--split", choices=["val", "train"], default="val")
    parser.add_argument("--boxes", help="for masks and joints: own (a detection pass), truth, or a results file (default: own, if it detects)")
    parser.add_argument("--limit", type=int, help="only the first images of the split")
    parser.add_argument("--truth", action="store_true", help="feed the tokenised truth as prediction: the ceiling that tokens set")
    parser.add_argument("--watch", action="store_true", help="evaluate last.pt of the run each time it changes, until interrupted")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=min(4, (os.cpu_count() or 1) - 1))
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", help="start of the names of the files written (default: beside the checkpoint)")
    for key in DATA_KEYS:
        parser.add_argument(f"--{key}", type={"top_p": float, "temperature": float, "seg_samples": int}.get(key, str), help="as in train.py")
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
            run(args.ckpt if is_reference(args.ckpt) else find_checkpoint(args.ckpt), args, device)
    except (FileNotFoundError, ImportError, RuntimeError, ValueError) as e:
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
