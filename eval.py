"""How good is a model? Average precision of boxes, masks and joints; scores of captions; how real and how right generated images are.

Boxes, masks and joints by pycocotools (cocodataset.org/#detection-eval), captions by BLEU, ROUGE-L and CIDEr; results in COCO's
own formats, so that its server takes them. Under torchrun every process predicts a share of the images. `--truth` feeds the
tokenised truth through decoding as if predicted, which shows the ceiling that tokens set. Generated images by held-out loss, by a
small classifier trained on the spot, and by FID (1706.08500) and Inception Score (1606.03498) with a network of the user's; videos
also by the error of their frames. Left out: test sets without labels; precision and recall of samples.

    python eval.py                                                   # the newest run on its held-out data
    torchrun --nproc_per_node=8 eval.py --ckpt=out/multi_coco_vit_b --data_dir=coco --task=seg --boxes=truth
    python eval.py --ckpt=out/gen_cifar10 --samples=50000 --batch_size=250 --inception=inception-2015-12-05.pt
"""
import argparse
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
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

import data
import tokenizer
from diffusion import denoising_loss, generate
from sample import (add_checkpoint_arguments, add_joints, add_sampling_arguments, checkpoint_arguments, find_checkpoint, is_reference,
                    load_model, look, make_pieces, make_vocab, mask_of, objects_in_image, pick_device, pick_tasks, set_sampling, to_rle,
                    true_boxes)

# ---------------------------------------------------------------------------------------------------------------
# processes of torchrun

def processes():
    """(this process's number, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share_out(count, batch_size):
    """This process's batches of the numbers below count: whole ones, so that results do not depend on how many processes share."""
    rank, world = processes()
    return [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)][rank::world]


def gather(mine):
    """A list, one thing for each of this process's batches -> those of all processes, in the order of the batches."""
    world = processes()[1]
    if world == 1:
        return mine
    shares = [None] * world
    dist.all_gather_object(shares, mine)
    return [shares[i % world][i // world] for i in range(sum(map(len, shares)))]


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
# generated images. Pixels are as in data.py, with colours last: uint8 (N, H, W, C), of clips (N, T, H, W, C)

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)                     # times t at which the held-out loss is taken
HELD_OUT = 200                                         # held-out items that it is taken of
FID_IMAGES = 50_000                                    # training images, at most, behind a FID, as is the custom
JUDGE_IMAGES = 10_000                                  # those (or frames) that a judge learns from and compares with
PICTURES = 64                                          # samples that are returned to look at


def feature_statistics(features):
    """(N, D) -> mean (D,) and unbiased covariance (D, D), float64. ValueError for fewer than two rows."""
    if len(features) < 2:
        raise ValueError(f"the statistics of features need at least 2 images, got {len(features)}")
    features = np.asarray(features, np.float64)
    centered = features - features.mean(0)
    return features.mean(0), centered.T @ centered / (len(features) - 1)


def frechet_distance(mean_a, cov_a, mean_b, cov_b):
    """Squared distance of two Gaussians, |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (1706.08500, eq. 6), float64.

    That last trace is the sum of the singular values of P'Q, where A = PP' and B = QQ'. Nothing is squared before its root is
    taken, which would turn zeros of 1e-16 into 1e-8; so covariances may be singular, as those of N <= D images are.
    """
    def factor(cov):                                   # (D, D) -> (D, rank)
        values, vectors = np.linalg.eigh(cov)
        kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])

    shared = np.linalg.svd(factor(cov_a).T @ factor(cov_b), compute_uv=False).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * shared)


def inception_score(probabilities, splits=10):
    """(N, K) class probabilities -> mean and standard deviation over the splits of exp(mean KL(p(y|x) || p(y))), 1 to K
    (1606.03498, section 4). Fewer images than splits are a split each."""
    scores = []
    for p in np.array_split(np.asarray(probabilities, np.float64), min(splits, len(probabilities))):
        log = np.log(np.maximum(p, 1e-300))            # 0 log 0 is 0
        scores.append(np.exp((p * (log - np.log(np.maximum(p.mean(0), 1e-300)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def as_frames(pixels):
    """Clips (N, T, H, W, C) -> their frames (N T, H, W, C); images stay."""
    return pixels.flatten(0, 1) if pixels.ndim == 5 else pixels


class Inception:
    """The network behind FID and Inception Score, from a TorchScript file.

    Published numbers rest on Inception as of 2015-12-05; NVIDIA's stylegan2-ada-pytorch offers it as inception-2015-12-05.pt
    (pretrained/metrics/ of its download site). It takes uint8 (N, 3, H, W), resizes by itself, and is called with
    return_features=True for features (N, 2048), with no_output_bias=True for probabilities (N, 1008). Any other TorchScript
    module will do that makes features (N, D), or the pair (features, probabilities), of uint8 (N, 3, H, W).
    ValueError if the file is no TorchScript.
    """
    def __init__(self, path, device="cpu"):
        with open(path, "rb") as f:
            self.key = hashlib.sha256(f.read()).hexdigest()[:16]
        try:
            self.network = torch.jit.load(path, map_location=device).eval()
        except RuntimeError as e:
            raise ValueError(f"{path}: not a TorchScript file, which is needed: weights alone (a state dict) do not say how to compute. Make one of "
                             f"your network with torch.jit.script(network).save(path) or torch.jit.trace(network, images).save(path) "
                             f"({str(e).splitlines()[0]})") from e
        known = {argument.name for argument in self.network.forward.schema.arguments}
        self.device, self.keywords = device, {"return_features", "no_output_bias"} <= known

    @torch.no_grad()
    def look(self, pixels, keyword):
        images = as_frames(pixels).to(self.device).movedim(-1, 1)
        images = images.expand(-1, 3, -1, -1).contiguous()                     # grey is three equal colours
        return self.network(images, **{keyword: True}) if self.keywords else self.network(images)

    def features(self, pixels):
        """Images, or clips frame by frame -> (N, D) float32 array."""
        out = self.look(pixels, "return_features")
        return (out[0] if isinstance(out, tuple) else out).float().flatten(1).cpu().numpy()

    def probabilities(self, pixels):
        """Images, or clips frame by frame -> (N, K) float32 array, or None if the network has none."""
        out = self.look(pixels, "no_output_bias")
        out = out if self.keywords else out[1] if isinstance(out, tuple) else None
        return None if out is None else out.float().cpu().numpy()


class Judge(torch.nn.Module):
    """A small classifier of the model's own data, trained on the spot (`train_judge`). It says whether samples show the class
    that they should, and its features are what Frechet distances are taken of. Those compare with nothing but each other, on
    the same data; and a judge that knows little of held-out images says little. Clips are judged frame by frame."""

    def __init__(self, channels, classes, widths=(32, 64, 128)):
        super().__init__()
        self.body = torch.nn.Sequential(*[f for a, b in zip((channels, *widths), widths) for f in
                                          (torch.nn.Conv2d(a, b, 3, 2, 1), torch.nn.BatchNorm2d(b), torch.nn.ReLU())])
        self.head = torch.nn.Linear(widths[-1], classes)

    def forward(self, images):
        """(N, C, H, W) in [0, 1] -> features (N, 128), scores (N, classes)."""
        features = self.body(images * 2 - 1).mean((2, 3))
        return features, self.head(features)

    @torch.no_grad()
    def look(self, pixels):
        """Images, or clips frame by frame -> features (N, 128) array, classes: of a clip the likeliest by the mean of its frames."""
        device, features, classes = self.head.weight.device, [], []
        for part in pixels.split(256):
            found, scores = self(data.to_floats(as_frames(part), device))
            features.append(found.cpu().numpy())
            classes.append(scores.softmax(-1).unflatten(0, (len(part), -1)).mean(1).argmax(-1).cpu().numpy())
        return np.concatenate(features), np.concatenate(classes)


def train_judge(pixels, labels, classes, device="cpu", steps=300, seed=0):
    """Pixels of N images or clips, labels (N,) int64 (-1 unknown), number of classes -> Judge, the same every time (on a GPU
    nearly so). The global generators are left as they are. ValueError if all labels are unknown."""
    device, known = torch.device(device), labels >= 0
    if not known.any():
        raise ValueError("no image has a label that a judge could learn")
    labels = labels[known].repeat_interleave(pixels.shape[1] if pixels.ndim == 5 else 1)
    pixels = as_frames(pixels[known])
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        judge = Judge(pixels.shape[-1], classes).to(device)
        optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
        for _ in range(steps):
            chosen = torch.randint(len(labels), (64,))
            _, scores = judge(data.to_floats(pixels[chosen], device))
            F.cross_entropy(scores, labels[chosen].to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return judge.eval()


def real_batches(source, c, batches, workers=0):
    """Yields pixels and labels (B,) int64 (-1 unknown) of batches of numbers. A number is a position in one fixed shuffled order of
    the items, as files are often sorted; beyond the last item the order goes on with another. No image is mirrored."""
    c = SimpleNamespace(**{**vars(c), "flip": False, "seed": 0})
    for batch in data.make_loader(data.TrainStream(source, "gen", c), batches, data.TrainCollate("gen", c, None, None), workers):
        for message in batch["skipped"]:
            warnings.warn(f"another image stands in the evaluation for {message}")
        yield batch["pixels"], batch["label"]


def real_items(source, c, count, known_frames=0, workers=0):
    """Pixels, of clips those of the frames after the known ones, and labels of at most `count` items; all of them on every process."""
    count = min(count, len(source))
    parts = real_batches(source, c, [range(i, min(i + 64, count)) for i in range(0, count, 64)], workers)
    pixels, labels = (torch.cat(part) for part in zip(*parts))
    return pixels[:, known_frames:], labels            # [:, 0:] of images is all of them


def real_statistics(network, source, c, split="train", count=FID_IMAGES, folder=None, batch_size=64, workers=0):
    """Mean and covariance of a network's features of at most `count` items, of clips the frames that are predicted.

    network: has features(pixels) -> (N, D) array, and a `key` that no other network has
    folder:  where they are kept; the name of the file says what of, and it is used only if all else is the same too
    """
    count, (height, width) = min(count, len(source)), c.model.sample_size
    first = getattr(c.model, "cond_frames", 0)
    key = json.dumps({"data": c.data, "data_dir": os.path.abspath(c.data_dir), "data_seed": c.data_seed, "split": split, "of": len(source),
                      "images": count, "size": [height, width], "channels": c.image_channels, "frames": [first, data.clip_length(c)],
                      "network": network.key})
    path = os.path.join(folder or "", f"stats_{c.data}_{split}_{height}x{width}x{c.image_channels}_{count}_{network.key}.npz")
    # The first process says whether there is a file: where folders are not shared, others would wait for nothing.
    found = gather([read_statistics(path, key) if folder and processes()[0] == 0 else None])[0]
    if found is None:
        features = gather([network.features(pixels[:, first:]) for pixels, _ in real_batches(source, c, share_out(count, batch_size), workers)])
        found = feature_statistics(np.concatenate(features))
        if folder and processes()[0] == 0:
            os.makedirs(folder, exist_ok=True)
            with open(f"{path}.tmp", "wb") as f:
                np.savez(f, key=key, mean=found[0], cov=found[1])
            os.replace(f"{path}.tmp", path)
    return found


def read_statistics(path, key):
    """(mean, cov) of a file of `real_statistics`; None if it is not there, damaged, or of something else."""
    with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
        with np.load(path) as stored:
            if str(stored["key"]) == key:
                return stored["mean"], stored["cov"]


@torch.no_grad()
def held_out_loss(model, c, source, batch_size=64, seed=0, dtype=torch.float32, workers=0):
    """{"loss": mean, "loss_at": {"0.1": ...}} at each of LEVELS, of at most HELD_OUT items. The noise depends on the seed alone. Every
    example sees the network's own estimate, as in sampling; in training only a share of them does."""
    device, rows = next(model.parameters()).device, []
    c = SimpleNamespace(**{**vars(c), "self_cond_rate": 1.0, "self_cond_masking": False})
    batches = share_out(min(HELD_OUT, len(source)), batch_size)
    for batch, (pixels, labels) in zip(batches, real_batches(source, c, batches, workers)):
        images, labels = data.to_floats(pixels, device), labels.to(device) if c.model.num_classes else None
        for t in LEVELS:
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + batch[0])       # the same noise at every level
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = denoising_loss(model, c, images, labels, torch.full((len(images),), t, device=device), generator)
            rows.append((t, len(images), loss.mean().item()))
    rows = [row for part in gather([rows]) for row in part]
    mean = lambda rows: sum(n * loss for _, n, loss in rows) / sum(n for _, n, _ in rows)
    return {"loss": mean(rows), "loss_at": {str(t): mean([row for row in rows if row[0] == t]) for t in LEVELS}}


def draw_samples(model, c, source, count, batch_size=64, seed=0, dtype=torch.float32, workers=0):
    """Yields this process's batches of samples: pixels, the labels asked for (B,) int64 or None, and true clips or None.

    Labels go round: 0, 1, 2, ... A model that continues clips is shown the first frames of held-out ones, and asked for their labels.
    """
    device, known_frames, batches = next(model.parameters()).device, getattr(c.model, "cond_frames", 0), share_out(count, batch_size)
    clips = real_batches(source, c, batches, workers) if known_frames else ((None, torch.tensor(batch)) for batch in batches)
    bar = tqdm(zip(batches, clips), "samples", len(batches), disable=processes()[0] > 0 or not sys.stderr.isatty(), leave=False)
    for batch, (truth, labels) in bar:
        if not known_frames and c.model.num_classes:
            labels = labels % c.model.num_classes
        labels = labels if c.model.num_classes else None
        known = data.to_floats(truth[:, :known_frames], device) if known_frames else None
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + batch[0])
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            pixels = generate(model, c, len(batch), None if labels is None else labels.to(device), known, generator)
        yield torch.from_numpy(data.to_pixels(pixels)), labels, truth


def evaluate_generation(model, c, split="val", seed=0, batch_size=64, inception=None, judge=True, stats_dir=None, count=None,
                        dtype=torch.float32, judge_steps=300, workers=0):
    """Metrics of a model that generates, {name: number} (on processes but the first, empty), and its first samples to look at: pixels, a
    uint8 array; of clips with the known frames before.

    inception: TorchScript file as of `Inception`; stats_dir: folder for the statistics of real images that it makes
    judge:     whether to train a `Judge`, in judge_steps, where the data has classes
    count:     samples to draw (default: c.eval_samples); PICTURES at most where there is nothing to measure

    loss, loss_at    of held-out data, see `held_out_loss`
    class_accuracy   share of samples that the judge takes for what was asked for, where the model takes labels
    judge_accuracy   share of held-out items that it takes for what they are: how far it can be trusted
    frechet          distance of samples to training data, in the judge's features
    frechet_real     the same of as many held-out items (or all, if those are fewer): a floor above 0, the higher the fewer they are
    fid              distance of samples to training data, in Inception's features; inception_score and inception_score_std
    frame_error      mean square error of predicted frames, of colours in [0, 1]; copy_error: of repeating the last known frame
    samples          how many there are
    """
    device, training, count = next(model.parameters()).device, model.training, count or c.eval_samples
    if count < 1:
        raise ValueError(f"expected at least 1 sample to evaluate, got {count}")
    held_out, train = data.make_source(c, split, "gen"), data.make_source(c, "train", "gen")
    known_frames = getattr(c.model, "cond_frames", 0)
    model.eval()
    metrics = held_out_loss(model, c, held_out, batch_size, seed, dtype, workers)
    inception = Inception(inception, device) if inception else None
    judge = judge and len(train.classes) > 0
    if judge:
        real, labels = real_items(train, c, JUDGE_IMAGES // data.clip_length(c), known_frames, workers)
        judge = train_judge(real, labels, len(train.classes), device, judge_steps)
        if dist.is_initialized():                      # one judge for all: GPUs differ in their last bits
            for weights in judge.state_dict().values():
                dist.broadcast(weights, 0)
    elif not (inception or known_frames):
        count = min(count, PICTURES)

    rows = []
    for pixels, asked, truth in draw_samples(model, c, held_out, count, batch_size, seed, dtype, workers):
        shown = pixels if truth is None else torch.cat([truth[:, :known_frames], pixels], 1)
        row = {"pixels": shown[:PICTURES if len(rows) * batch_size < PICTURES else 0].numpy()}
        if judge:
            row["judge"], classes = judge.look(pixels)
            if asked is not None:
                row["right"] = (classes == asked.numpy())[asked.numpy() >= 0]
        if inception:
            row |= {"inception": inception.features(pixels), "probabilities": inception.probabilities(pixels)}
        if truth is not None:
            past, future = truth[:, :known_frames] / 255, truth[:, known_frames:] / 255
            row |= {name: (guess - future).square().flatten(1).mean(1).numpy()
                    for name, guess in (("frame_error", pixels / 255), ("copy_error", past[:, -1:]))}
        rows.append(row)
    rows = gather(rows)
    found = {key: np.concatenate([row[key] for row in rows]) for key in rows[0] if rows[0][key] is not None}
    if inception:
        most = 5 * count if train.endless else FID_IMAGES
        real_inception = real_statistics(inception, train, c, "train", most, stats_dir, batch_size, workers)
    model.train(training)
    if processes()[0] > 0:
        return {}, found["pixels"][:PICTURES]

    metrics |= {name: float(found[key].mean()) for name, key in (("class_accuracy", "right"), ("frame_error", "frame_error"),
                                                                 ("copy_error", "copy_error")) if len(found.get(key, ()))}
    if judge:
        held, labels = real_items(held_out, c, max(count, HELD_OUT), known_frames, workers)
        features, classes = judge.look(held)
        metrics["judge_accuracy"] = float((classes == labels.numpy())[labels.numpy() >= 0].mean())
        real = feature_statistics(judge.look(real)[0])
        metrics["frechet"] = frechet_distance(*feature_statistics(found["judge"]), *real)
        metrics["frechet_real"] = frechet_distance(*feature_statistics(features[:len(found["judge"])]), *real)
    if inception:
        metrics["fid"] = frechet_distance(*feature_statistics(found["inception"]), *real_inception)
        if "probabilities" in found:
            metrics["inception_score"], metrics["inception_score_std"] = inception_score(found["probabilities"])
    return metrics | {"samples": count}, found["pixels"][:PICTURES]


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
    rank, world = processes()
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
    shares = gather([(found, skipped)])
    return {k: v for share in shares for k, v in share[0].items()}, [m for share in shares for m in share[1]]


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
            if processes()[0] > 0:
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
    if tasks == ("gen",):
        return run_generation(path, model, c, args)
    start = time.time()
    metrics, results = evaluate(model, c, tasks, args.split, read_boxes(args.boxes or ("own" if "det" in c.tasks else "truth")),
                                batch_size=args.batch_size, workers=args.workers, limit=args.limit, seed=args.seed, truth=args.truth,
                                dtype=getattr(torch, args.dtype))
    if processes()[0] > 0:
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


def run_generation(path, model, c, args):
    """The same for a model that generates."""
    set_sampling(c, args)
    start, stem = time.time(), args.out or f"{os.path.splitext(path)[0]}_{args.split}"
    metrics, pixels = evaluate_generation(model, c, args.split, args.seed, args.batch_size, args.inception, not args.no_judge,
                                          args.stats or os.path.dirname(path), args.samples, getattr(torch, args.dtype), workers=args.workers)
    if processes()[0] > 0:
        return
    recipe, seconds = {key: getattr(c, key) for key in ("sample_steps", "sampler", "guidance", "td")}, round(time.time() - start, 1)
    print(f"{path}, {args.split}, {seconds} s, " + ", ".join(f"{key} {value}" for key, value in recipe.items()))
    for name, value in metrics.items():
        for at, number in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"  {f'{name} {at}':20}{number:10{'d' if isinstance(number, int) else '.4f'}}")
    with open(f"{stem}_metrics.json", "w") as f:
        json.dump({"checkpoint": path, "split": args.split, "seconds": seconds, **recipe, "gen": metrics}, f, indent=1)
    print(f"samples: {data.save_grid(pixels, f'{stem}_samples')}\nnumbers: {stem}_metrics.json", flush=True)


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
    parser.add_argument("--task", help="some of det,seg,kpt,cap, or gen (default: what the model was trained on)")
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
    parser.add_argument("--samples", type=int, help="of a model that generates: how many images to draw (default: as in train.py, eval_samples)")
    add_sampling_arguments(parser)
    parser.add_argument("--no_judge", action="store_true", help="train no small classifier on the model's data to judge its images by")
    parser.add_argument("--inception", metavar="FILE", help="TorchScript network for FID and Inception Score: inception-2015-12-05.pt of "
                        "NVIDIA's stylegan2-ada-pytorch (it takes uint8 images and resizes by itself), or any that makes features (N, D), or "
                        "features and class probabilities, of uint8 (N, 3, H, W)")
    parser.add_argument("--stats", metavar="DIR", help="folder for what FID knows of the real images (default: beside the checkpoint)")
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
