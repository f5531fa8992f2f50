"""Twelve exercises: functions to write, from one line to a task of your own.

Each stands below with what it does, why, where the paper says it, and what to look at. Write it in
place of `raise NotImplementedError`, then let it be checked:

    python tests/exercises.py           # the list
    python tests/exercises.py 3         # checks what you wrote for number 3
    python tests/exercises.py 12 train  # after the check: three minutes of training

A check says what is wrong and where to look. The project's own functions, which are named where
there are some, are one way to solve them; look there last.
"""
import os
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import data
import eval
import model
import sample
import tokenizer
import train


class Hint(Exception):
    """What is wrong with an answer, and where to look."""


def expect(right, hint):
    if not right:
        raise Hint(hint)


def close(a, b):
    """Whether an answer is a tensor like this one."""
    shaped = torch.is_tensor(a) and a.shape == b.shape
    return shaped and torch.allclose(a.float(), b.float(), atol=1e-4)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------
# 1

def quantize(coords, bins, shift):
    """Coordinates, fractions from 0 to 1 (float, any shape) -> tokens (int64, the same shape).

    A network that writes words needs a word for every place. `bins` values stand for the places
    along a side: 0.0 is the first, token `shift`, 1.0 the last; what lies outside goes to the
    nearest end. The more bins, the finer, and the larger the vocabulary (2109.10852, section 2.1).
    Look at: how far a box moves there and back with 64 bins, and with 1000 (`eval.py --truth`).
    Ours: tokenizer.quantize.
    """
    raise NotImplementedError


def check_1(quantize):
    tokens = quantize(torch.tensor([[0.0, 1.0], [0.5, 0.26]]), 11, 100)
    expect(torch.is_tensor(tokens) and tokens.shape == (2, 2), "the result has the input's shape")
    expect(not tokens.is_floating_point(), "tokens are whole numbers: int64")
    expect(tokens[0, 0] == 100, "0.0 is the first of the tokens, which is `shift`")
    expect(tokens[0, 1] == 110, "1.0 is the last of 11 tokens: how many steps are between them?")
    rounded = quantize(torch.tensor([0.26, 0.24]), 11, 100).tolist()
    expect(rounded == [103, 102], "each value goes to the nearest place; does yours go down?")
    outside = quantize(torch.tensor([-0.2, 1.3]), 11, 100).tolist()
    expect(outside == [100, 110], "what lies outside of the image must stay a coordinate token")


# --------------------------------------------------------------------------------------------------
# 2

PROMPT, FAKE, CLASS_SHIFT = 10, 30, 100


def detection_sequence(boxes, labels, noise, vocab):
    """Objects -> (inputs, targets, weights), each (5 N,), to train a decoder on.

    boxes (N, 4) are fractions y_min x_min y_max x_max, labels (N,) their classes. An object is five
    tokens: its coordinates (tokenizer.quantize(coords, vocab)), then CLASS_SHIFT + label. Where
    `noise` (N,) is True there is no object, only a box drawn at random: its class is FAKE, and
    since nobody should learn to write such boxes, its coordinates weigh 0; all else weighs 1. The
    network reads the input and predicts the target at the same place: the input begins with PROMPT,
    and is one token behind (2109.10852, sections 2.2 and 2.4).
    Look at: how many objects det_shapes finds if it is trained with --noise_boxes=False.
    Ours: tokenizer.encode_detection.
    """
    raise NotImplementedError


def check_2(detection_sequence):
    vocab = tokenizer.Vocab(bins=100, coord_shift=200, text_shift=400)
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.3, 0.0, 0.9, 0.4]])
    labels, noise = torch.tensor([7, 3]), torch.tensor([False, True])
    result = detection_sequence(boxes, labels, noise, vocab)
    expect(isinstance(result, tuple) and len(result) == 3, "return inputs, targets, weights")
    inputs, targets, weights = result
    expect(targets.shape == (10,), "two objects are ten tokens in a row")
    first = tokenizer.quantize(boxes[0], vocab).tolist()
    swapped = [first[i] for i in (1, 0, 3, 2)]
    expect(targets[:4].tolist() != swapped, "y comes first: y_min x_min y_max x_max")
    expect(targets[:4].tolist() == first, "an object begins with its four coordinate tokens")
    expect(targets[4] == 107, "the fifth token is CLASS_SHIFT + label")
    expect(targets[9] == FAKE, "the class of a noise box is FAKE, whatever its label says")
    expect(inputs[0] == PROMPT, "the input begins with PROMPT")
    expect(inputs.tolist() != targets.tolist(), "the input must be one token behind the target")
    expect(inputs[1:].tolist() == targets[:-1].tolist(), "the input is one token behind the target")
    expect(weights[5:9].sum() == 0, "nobody should learn the coordinates of a noise box: weight 0")
    expect(weights[9] == 1, "but that it is none, is to be learned: the class FAKE weighs 1")
    expect(weights[:5].tolist() == [1] * 5, "a real object's tokens weigh 1")


# --------------------------------------------------------------------------------------------------
# 3

def causal_mask(T):
    """(T, T) bool: in row i, True at the tokens that token i may look at: itself and those before.

    In training all tokens of a sequence are predicted at once; the mask keeps each from seeing
    those that it should predict. In writing it is not needed: later tokens are not there yet.
    Look at: `Attention.forward` in model.py, where scaled_dot_product_attention makes it.
    """
    raise NotImplementedError


def check_3(causal_mask):
    mask = causal_mask(4)
    expect(torch.is_tensor(mask) and mask.shape == (4, 4), "a mask of four tokens is (4, 4)")
    expect(mask.dtype == torch.bool, "a mask is True and False: dtype bool")
    expect(mask.diagonal().all(), "a token may look at itself")
    expect(not mask[0, 3], "the first token sees the last: rows are those who look")
    expect(mask[3].all(), "the last token may look at all of them")
    expect(mask.sum() == 10, "token i sees i + 1 tokens, so four of them see ten")


# --------------------------------------------------------------------------------------------------
# 4

def attend_step(q, k, v, keys, values):
    """One token attends to itself and to those before: (output, keys, values).

    q, k, v: of the new token (B, heads, 1, size); keys, values: of those before it (B, heads, t,
    size). Returned are the new token's output (B, heads, 1, size) and keys and values with its own
    at their end. So a sequence is written without computing any key twice: the cache that makes
    decoding fast. Softmax of q k / sqrt(size), times v.
    Look at: `Cache` in model.py; `python train.py --bench` says how long a token takes.
    """
    raise NotImplementedError


def check_4(attend_step):
    q, k, v = (normal(2, 3, 5, 8, seed=seed) for seed in range(3))
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    keys = values = torch.zeros(2, 3, 0, 8)
    outputs = []
    for t in range(5):
        now = slice(t, t + 1)
        result = attend_step(q[:, :, now], k[:, :, now], v[:, :, now], keys, values)
        expect(isinstance(result, tuple) and len(result) == 3, "return output, keys, values")
        output, keys, values = result
        expect(keys.shape[2] == t + 1, "the new token's key must be added to those before it")
        expect(output.shape == (2, 3, 1, 8), "one token goes in, so one comes out")
        outputs.append(output)
    expect(close(outputs[0], v[:, :, :1]), "the first token attends to itself alone: its own value")
    ordered = close(keys, k) and close(values, v)
    expect(ordered, "keys and values stand in the order of their tokens")
    unscaled = (q[:, :, 4:] @ k.mT).softmax(-1) @ v
    expect(not close(outputs[4], unscaled), "the products must be divided by sqrt(size)")
    expect(close(torch.cat(outputs, 2), whole),
           "step by step must give what all at once gives: over which dimension is your softmax?")


# --------------------------------------------------------------------------------------------------
# 5

def nucleus(logits, p):
    """Logits (S, V) -> probabilities (S, V) to draw from: 0 for all but the likeliest tokens whose
    probabilities together are at most p, or the likeliest alone; they sum to 1 again.

    Rare tokens are many, and one of them ruins a sequence; always taking the likeliest one gives
    the same few objects. Between them lies top-p (1904.09751; 2109.10852, section 3.1 and fig. 7).
    Look at: `python sample.py --top_p=...`, with 0.01, 0.4 and 1.
    Ours: model.filter_logits.
    """
    raise NotImplementedError


def check_5(nucleus):
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.05, 0.05, 0.8, 0.1]])
    found = nucleus(probs.log(), 0.75)
    expect(torch.is_tensor(found) and found.shape == (2, 4), "the result has the logits' shape")
    expect((found[1] > 0).any(), "where the likeliest is above p by itself, it stays alone")
    kept = (found > 0).tolist()
    expect(kept[0] != [False, True, True, True],
           "0.4 + 0.3 + 0.2 is above 0.75: the token that crosses p is left out here")
    expect(kept == [[False, True, False, True], [False, False, True, False]],
           "sort by probability, add up, and keep those whose sum is at most p")
    expect(close(found.sum(1), torch.ones(2)), "what is left must sum to 1 again")
    expect(close(found[0], torch.tensor([0, 4 / 7, 0, 3 / 7])), "those kept stay in proportion")


# --------------------------------------------------------------------------------------------------
# 6

def average_precision(boxes, scores, truth):
    """AP at IoU 0.5 of one class in one image, as COCO computes it.

    boxes (N, 4) and truth (M, 4) are y_min x_min y_max x_max, scores (N,) say how sure. In the
    order of their scores, each box takes the true one that no other has and with which its IoU, the
    area in common over the area of both, is largest, if that is 0.5 or more; else it is wrong.
    After each box: precision, the fraction right so far, and recall, that of truth found. At each
    recall of 0, 0.01, ... 1 counts the largest precision at this recall or above, 0 where it is not
    reached; AP is the mean of these 101 (cocodataset.org/#detection-eval).
    Look at: what AP says of a detector that finds everything, and every object twice.
    Ours: pycocotools, in eval.average_precision.
    """
    raise NotImplementedError


def coco_ap(boxes, scores, truth):
    """AP50 by pycocotools."""
    def rows(boxes, **more):
        return [
            {"image_id": 1, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0], **more}
            for y0, x0, y1, x1 in boxes.tolist()]

    annotations = [
        row | {"id": n, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]}
        for n, row in enumerate(rows(truth), 1)]
    content = {
        "images": [{"id": 1, "height": 100, "width": 100}], "annotations": annotations,
        "categories": [{"id": 1, "name": "shape"}]}
    results = [row | {"score": score} for row, score in zip(rows(boxes), scores.tolist())]
    return eval.average_precision(content, results, [1])["AP50"]


def check_6(average_precision):
    truth = torch.tensor([[0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 90.0]])

    def ap(boxes, scores):
        return float(average_precision(torch.tensor(boxes), torch.tensor(scores), truth))

    perfect = ap(truth.tolist(), [0.9, 0.8, 0.7])
    expect(abs(perfect - 1) < 0.02, "the truth itself, each box once, must give 1")
    far = ap([[80.0, 80, 90, 90]] * 3, [0.9, 0.8, 0.7])
    expect(far < 0.02, "boxes that touch nothing give 0: is a negative overlap cut off at 0?")
    doubled = ap([[0.0, 0, 10, 10]] * 3, [0.9, 0.8, 0.7])
    expect(doubled < 0.4, "a true box is found once; who finds it again is wrong")
    rng = np.random.default_rng(0)
    for _ in range(30):
        moved = truth[rng.integers(0, 3, 6)] + torch.tensor(rng.normal(0, 2, (6, 4))).float()
        boxes = torch.cat([moved[:, :2], torch.maximum(moved[:, 2:], moved[:, :2] + 1)], 1)
        scores = torch.tensor(rng.random(6)).float()
        mine, right = float(average_precision(boxes, scores, truth)), coco_ap(boxes, scores, truth)
        order = scores.argsort(descending=True)
        sorted_first = float(average_precision(boxes[order], scores[order], truth))
        same = abs(mine - sorted_first) < 1e-4
        expect(same, "the order of the rows must not matter: sort by score")
        expect(abs(mine - right) < 0.01,
               f"{mine:.3f} here, {right:.3f} by pycocotools: at each recall counts the largest "
               f"precision at this recall or above")


# --------------------------------------------------------------------------------------------------
# 7

def add_noise(x0, eps, t):
    """Data and noise, both (B, ...), and times t (B,) -> x_t: data at t = 0, noise at t = 1.

    x_t = sqrt(gamma) x0 + sqrt(1 - gamma) eps, with gamma(t) = cos(t pi / 2) squared. The squares
    of the two factors sum to 1, so that x_t stays as large as its parts (2301.10972, section 2).
    Look at: `python sample.py --ckpt=out/gen_shapes --explain`, samples.html, from right to left.
    Ours: diffusion.add_noise, gamma_schedule("cosine@0,1,1").
    """
    raise NotImplementedError


def check_7(add_noise):
    x0, eps = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    ends = add_noise(x0, eps, torch.tensor([0.0, 1.0, 0.5]))
    shaped = torch.is_tensor(ends) and ends.shape == x0.shape
    expect(shaped, "x_t is shaped like x0; there is one t per example")
    expect(not close(ends[0], eps[0]), "at t = 0 there is no noise: gamma(0) is 1")
    expect(close(ends[0], x0[0]), "at t = 0 there is data alone")
    expect(close(ends[1], eps[1]), "at t = 1 there is noise alone")
    halves = (x0[2] + eps[2]) / 2
    expect(not close(ends[2], halves), "the factors are the square roots of gamma and of 1 - gamma")
    expect(close(ends[2], (x0[2] + eps[2]) / 2 ** 0.5), "at t = 0.5 gamma is cos(pi / 4) squared")


# --------------------------------------------------------------------------------------------------
# 8

def x0_and_eps(x_t, gamma, v):
    """What a prediction of v says about data and noise: (x0, eps), each (B, ...); gamma is (B,).

    v = sqrt(gamma) eps - sqrt(1 - gamma) x0 is the third of three things that a network can
    predict; with x_t each of them gives the two others, but where gamma is near 0 or 1 small errors
    of one are large errors of another (2202.00512, section 4 and appendix D).
    Look at: `train.py gen_shapes --pred_type=v` beside x and eps.
    Ours: diffusion.predict_x0_eps.
    """
    raise NotImplementedError


def check_8(x0_and_eps):
    x0, eps, gamma = normal(3, 5), normal(3, 5, seed=1), torch.tensor([0.1, 0.5, 0.9])
    a, b = gamma.sqrt()[:, None], (1 - gamma).sqrt()[:, None]
    result = x0_and_eps(a * x0 + b * eps, gamma, a * eps - b * x0)
    expect(isinstance(result, tuple) and len(result) == 2, "return x0 and eps")
    found, noise = result
    expect(not (close(found, eps) and close(noise, x0)), "x0 is the first of the two")
    expect(close(found, x0), "multiply x_t by sqrt(gamma) and v by sqrt(1 - gamma): what is left "
                             "of eps in the difference, and what of x0?")
    expect(close(noise, eps), "eps is a sum of parts of x_t and v, too: mind the signs")


# --------------------------------------------------------------------------------------------------
# 9

def ddim_step(denoise, x_t, gamma, gamma_next):
    """x_t at noise level gamma -> the same picture with the noise of gamma_next.

    denoise(x_t, gamma) says what the noise in x_t is, eps. Subtract it to see the data x0, then mix
    data and the same noise anew, with less of it. No chance is in it: the same noise gives the
    same image (2010.02502, eq. 12 with sigma 0; 2208.04202, algorithm 3).
    Look at: `sample.py --sample_steps=...`, with 5, 20 and 100; and --sampler=ddpm.
    Ours: diffusion.ddim_step.
    """
    raise NotImplementedError


def check_9(ddim_step):
    x0, eps, calls = normal(2, 6), normal(2, 6, seed=1), []

    def mix(gamma):
        return gamma ** 0.5 * x0 + (1 - gamma) ** 0.5 * eps

    def denoise(x_t, gamma):
        calls.append(gamma)
        return eps

    now, then = torch.tensor(0.2), torch.tensor(0.6)
    found = ddim_step(denoise, mix(now), now, then)
    expect(calls == [now], "the network is asked once, about x_t and its gamma")
    expect(torch.is_tensor(found) and found.shape == x0.shape, "the result is shaped like x_t")
    expect(not close(found, mix(now)), "nothing has changed: mix again, with gamma_next")
    expect(not close(found, x0), "that is x0; the next x_t still has the noise of gamma_next")
    expect(close(found, ddim_step(denoise, mix(now), now, then)), "no new noise: DDIM is certain")
    expect(close(found, mix(then)), "with the true noise, x0 must be exact: is eps scaled by "
                                    "sqrt(1 - gamma), and the rest divided by sqrt(gamma)?")


# --------------------------------------------------------------------------------------------------
# 10

def gray_bits(pixels):
    """Intensities 0 to 255 (int64, (N,)) -> their Gray code as analog bits, float (N, 8), -1 or 1,
    the lowest bit first.

    A diffusion model of real numbers makes discrete data when these are written in bits, and bits
    are -1 and 1; what it makes is cut off at 0 (2208.04202, section 2). In plain binary, 127 and
    128 differ in all bits; in Gray code, x XOR (x >> 1), neighbours differ in one.
    Look at: `train.py bits_shapes --bits=uint8`, gray and uint8_s.
    Ours: diffusion.rgb_to_bits.
    """
    raise NotImplementedError


def check_10(gray_bits):
    pixels = torch.arange(256)
    bits = gray_bits(pixels)
    expect(torch.is_tensor(bits) and bits.shape == (256, 8), "a pixel is eight bits: (N, 8)")
    expect(set(bits.unique().tolist()) == {-1.0, 1.0}, "analog bits are -1 and 1, floats")
    places = 2 ** torch.arange(8)
    words = ((bits > 0) * places).sum(1)
    expect(not torch.equal(words, pixels), "that is plain binary: 127 and 128 differ in all bits")
    backwards = ((bits.flip(1) > 0) * places).sum(1)
    code = pixels ^ (pixels >> 1)
    expect(not torch.equal(backwards, code), "the lowest bit comes first")
    expect(torch.equal(words, code), "Gray code is x XOR (x >> 1)")


# --------------------------------------------------------------------------------------------------
# 11

def self_conditioned(denoise, x_t, gamma, count):
    """A training pass with self-conditioning: the prediction (B, ...) for all examples, of which
    the first `count` see the network's own estimate, and the others zeros.

    denoise(x_t, gamma, seen) -> prediction of x0, shaped like x_t. While sampling, each step can
    show the network what it said at the last one. So that it learns to use that, a first pass that
    sees zeros makes an estimate, without gradient, and a second pass sees it (2208.04202, section
    3 and algorithm 1). It costs a quarter more and makes samples much better.
    Look at: `train.py bits_shapes --self_cond=none` beside x (README has the numbers).
    Ours: diffusion.self_cond_for_training.
    """
    raise NotImplementedError


def check_11(self_conditioned):
    weight = torch.tensor(2.0, requires_grad=True)
    x_t, gamma, calls = normal(4, 3), torch.full((4,), 0.5), []

    def denoise(x_t, gamma, seen):
        calls.append(seen.detach().clone())
        return weight * x_t + 0.5 * seen

    found = self_conditioned(denoise, x_t, gamma, 2)
    expect(torch.is_tensor(found) and found.shape == x_t.shape, "return the prediction for all")
    expect(len(calls) == 2, "the network is asked twice: for an estimate, and to learn")
    expect(not calls[0].any(), "the first pass has no estimate yet: it sees zeros")
    expect(len(calls[1]) == 4, "the second pass is about all examples")
    expect(not calls[1][2:].any(), "only the first `count` examples see an estimate")
    expect(close(calls[1][:2], 2 * x_t[:2]), "what they see is the first pass's prediction")
    found.sum().backward()
    expect(close(weight.grad, x_t.sum()), "no gradient goes through the first pass: torch.no_grad")


# --------------------------------------------------------------------------------------------------
# 12

POINT_PROMPT = 14


def point_rows():
    """A task of your own: point at the centre of each shape. A dict of four functions, the rows of
    the task "pnt" in the tables of that name.

    EXAMPLES: (record, c, rng) -> dict of arrays: "image" and "size" as data.pixels_of makes them of
              a view (data.eval_view of the whole image will do), "centers" (max_objects, 2) float32
              y x fractions, and "labels" (max_objects,), in random order, 0 where there is none
    COLLATE:  (x, c) -> tokenizer.Tokens: three tokens per object, y x class, then PAD (0). Inputs
              are one behind and begin with POINT_PROMPT. Padding weighs c.data.pad_weight
    PREDICT:  (model, inputs, c) -> per record {"points": [(y, x, label)]}, in pixels of the image
    SCORE:    (predictions, source, c, device) -> {"found": fraction of true centres that a point of
              their class is nearer to than 4 pixels}

    A record is as of data.Shapes; source[i] gives it, predictions are by image_id, which counts
    from 1. The loss is model.token_loss, the sequence 3 * max_objects long.
    Look at: README, "How to add something"; data.det_example, tokenizer.encode_detection,
    sample.detect, eval.score_captions. Then `python tests/exercises.py 12 train`.
    """
    raise NotImplementedError


@contextmanager
def installed(rows):
    """The task "pnt" in all tables, for a while."""
    tables = [
        (data.EXAMPLES, rows["EXAMPLES"]),
        (data.COLLATE, rows["COLLATE"]),
        (data.SOURCES, {"shapes": data.shapes_source}),
        (train.LOSS, model.token_loss),
        (train.LENGTHS, lambda c: 3 * c.data.max_objects),
        (sample.PREDICT, rows["PREDICT"]),
        (eval.SCORE, rows["SCORE"]),
        (eval.ITEMS, lambda source, c: range(len(source)))]
    tasks = model.Pix2SeqConfig.TASKS
    try:
        for table, row in tables:
            table["pnt"] = row
        model.Pix2SeqConfig.TASKS = (*tasks, "pnt")
        yield
    finally:
        for table, _ in tables:
            table.pop("pnt", None)
        model.Pix2SeqConfig.TASKS = tasks


def point_config(**changes):
    return sample.changed(
        train.PRESETS["det_shapes"].config, tasks=("pnt",), pictures=0, **changes)


def most_classes(source):
    """The record that shows most different kinds of shapes."""
    records = [source[i] for i in range(len(source))]
    return max(records, key=lambda record: len(set(record["labels"].tolist())))


def check_12(point_rows):
    rows = point_rows()
    expect(isinstance(rows, dict) and {"EXAMPLES", "COLLATE", "PREDICT", "SCORE"} <= rows.keys(),
           "return a dict with EXAMPLES, COLLATE, PREDICT and SCORE")
    c, source = point_config(), data.Shapes("val", count=20)
    c = replace(c, categories=tuple(source.categories))
    record, rng = most_classes(source), np.random.default_rng(0)
    truth = {
        (round(float(y0 + y1) / 2), round(float(x0 + x1) / 2), int(label))
        for (y0, x0, y1, x1), label in zip(record["boxes"], record["labels"])}
    example = rows["EXAMPLES"](record, c, rng)
    expect(example["image"].shape == (64, 64, 3), "EXAMPLES: image is (64, 64, 3) uint8")
    most = c.data.max_objects
    expect(example["centers"].shape == (most, 2) and example["labels"].shape == (most,),
           "EXAMPLES: centers is (max_objects, 2), labels (max_objects,), the rest is padding")
    n = len(record["labels"])
    expect((example["labels"] > 0).sum() == n, f"EXAMPLES: {n} objects have labels, the others 0")
    found = {
        (round(float(64 * y)), round(float(64 * x)), int(label))
        for (y, x), label in zip(example["centers"], example["labels"]) if label}
    expect(found == truth, f"EXAMPLES: centres {sorted(found)}, the boxes' are {sorted(truth)}")
    orders = {tuple(rows["EXAMPLES"](record, c, np.random.default_rng(i))["labels"].tolist())
              for i in range(20)}
    expect(len(orders) > 1, "EXAMPLES: the order is to be random, drawn from rng")
    stacked = {
        key: torch.from_numpy(np.stack([example[key]] * 2)) for key in ("centers", "labels")}
    tokens = rows["COLLATE"](stacked, c)
    expect(tokens.targets.shape == (2, 3 * most), "COLLATE: three tokens per object")
    targets = tokens.targets[0, :3 * n].reshape(n, 3)
    expect((targets[:, 2] > CLASS_SHIFT).all() and (targets[:, :2] >= c.vocab.coord_shift).all(),
           "COLLATE: y x class, that is two coordinate tokens and a class token")
    expect(not tokens.targets[0, 3 * n:].any(), "COLLATE: what stands after the objects is PAD")
    expect(tokens.inputs[0, 0] == POINT_PROMPT, "COLLATE: inputs begin with POINT_PROMPT")
    expect(torch.equal(tokens.inputs[0, 1:], tokens.targets[0, :-1]), "COLLATE: one token behind")
    expect(close(tokens.weights[0, 3 * n:], torch.full((3 * (most - n),), c.data.pad_weight)),
           "COLLATE: padding weighs pad_weight")

    class Knowing:
        """A model that writes the true sequence."""

        def encode(self, images):
            return torch.zeros(len(images), 1, 1)

        def generate(self, context, prompts, length, **options):
            expect((prompts == POINT_PROMPT).all(), "PREDICT: the prompt is POINT_PROMPT")
            written = tokens.targets[:1, :length].expand(len(prompts), 1, -1)
            return model.Generated(written, torch.ones_like(written, dtype=torch.float32), None)

        def parameters(self):
            return iter([torch.zeros(1)])

    [said] = rows["PREDICT"](Knowing(), sample.Inputs([record], c), c)
    points = {(round(float(y)), round(float(x)), int(label)) for y, x, label in said["points"]}
    near = all(
        any(abs(y - v) + abs(x - u) <= 2 and label == kind for v, u, kind in truth)
        for y, x, label in points)
    expect(near and len(points) == n,
           f"PREDICT: of the true sequence it says {sorted(points)}, the centres are "
           f"{sorted(truth)}: pixels of the image, nothing after PAD")
    perfect = rows["SCORE"]({record["image_id"]: said}, source, c, None)
    expect(perfect.get("found") == 1, f"SCORE: the true centres give {perfect}, expected found 1")
    wrong = {"points": [(y, x, label % 4 + 1) for y, x, label in said["points"]]}
    if not {(y, x, label % 4 + 1) for y, x, label in truth} & truth:
        worse = rows["SCORE"]({record["image_id"]: wrong}, source, c, None)
        expect(worse["found"] < 1, "SCORE: a point of another class has not found the shape")


def train_12(folder):
    """Trains the task, some three minutes on two cores. Returns its metrics."""
    with installed(point_rows()):
        c = point_config(out=folder, steps=600, eval_every=200)
        return train.train(c)


EXERCISES = {
    1: ("coordinates become tokens", quantize, check_1),
    2: ("objects and noise boxes become a sequence", detection_sequence, check_2),
    3: ("what a token may look at", causal_mask, check_3),
    4: ("attention with a cache of keys and values", attend_step, check_4),
    5: ("top-p, or nucleus, sampling", nucleus, check_5),
    6: ("IoU and average precision", average_precision, check_6),
    7: ("a noise schedule and x_t", add_noise, check_7),
    8: ("x0, eps and v", x0_and_eps, check_8),
    9: ("a step of DDIM", ddim_step, check_9),
    10: ("analog bits and Gray code", gray_bits, check_10),
    11: ("self-conditioning", self_conditioned, check_11),
    12: ("a task of your own, a row in each table", point_rows, check_12),
}


def verdict(number, answer=None):
    """What there is to say about an answer: "passed", or what is wrong."""
    _, stub, check = EXERCISES[number]
    try:
        check(answer or stub)
    except NotImplementedError:
        return f"not written yet: {stub.__name__} in tests/exercises.py"
    except Hint as hint:
        return f"not yet: {hint}"
    except Exception as e:
        return f"it ends with {type(e).__name__}: {e}"
    return "passed"


def main():
    numbers = [int(text) for text in sys.argv[1:] if text in map(str, EXERCISES)]
    if not numbers:
        for number, (title, stub, _) in EXERCISES.items():
            print(f"{number:3}  {stub.__name__:20} {title}")
        return
    said = verdict(numbers[0])
    print(f"{numbers[0]}: {said}")
    if said != "passed":
        sys.exit(1)
    if numbers[0] == 12 and "train" in sys.argv:
        print(train_12("out/exercise_12"))


if __name__ == "__main__":
    main()
