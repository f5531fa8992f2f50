"""The exercises' checks: right answers pass, typical wrong ones get the hint that is meant."""
import subprocess
import sys

import exercises
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ENVIRONMENT, ROOT
from exercises import CLASS_SHIFT, POINT_PROMPT, coco_ap, verdict

import data
import diffusion
import eval
import model
import sample
import tokenizer
import train


class Vocab:
    def __init__(self, bins, coord_shift):
        self.bins, self.coord_shift = bins, coord_shift


def sequence(boxes, labels, noise, vocab):
    labels = torch.where(noise, tokenizer.FAKE_LABEL, labels)
    return tuple(tokenizer.encode_detection(boxes, labels, vocab))


def attend(q, k, v, keys, values):
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    return F.scaled_dot_product_attention(q, keys, values), keys, values


def noisy(x0, eps, t):
    return diffusion.add_noise(x0, diffusion.gamma_schedule("cosine@0,1,1")(t), eps)


def ddim(denoise, x_t, gamma, gamma_next):
    eps = denoise(x_t, gamma)
    x0, _ = diffusion.predict_x0_eps(x_t, gamma, eps, "eps", b_scale=torch.inf)
    return diffusion.ddim_step(x_t, x0, eps, gamma, gamma_next, None)


def gray(pixels):
    image = pixels[None, None, :, None] / 255
    return diffusion.rgb_to_bits(image, "gray")[0, :, :, 0].T


def conditioned(denoise, x_t, gamma, count):
    c = train.PRESETS["bits_shapes"].config
    c = sample.changed(
        c, self_cond="x", self_cond_rate=count / len(x_t), pred_type="x", b_scale=1e9)

    def pair(x_t, gamma, seen):
        return denoise(x_t, gamma, seen), None

    seen = diffusion.self_cond_for_training(pair, x_t, gamma, {}, c)
    return denoise(x_t, gamma, seen)


def point_example(record, c, rng):
    view = data.eval_view(data.whole(record["image"]), c.model.image_size)
    order = rng.permutation(len(record["labels"]))
    centers = np.zeros((c.data.max_objects, 2), np.float32)
    labels = np.zeros(c.data.max_objects, np.int64)
    middle = record["boxes"].reshape(-1, 2, 2).mean(1)
    centers[:len(order)] = view.to_canvas(view.to_view(middle))[order]
    labels[:len(order)] = record["labels"][order]
    return data.pixels_of(view, record["image"]) | {"centers": centers, "labels": labels}


def point_tokens(x, c):
    coords = tokenizer.quantize(x["centers"], c.vocab)
    rows = torch.cat([coords, (x["labels"] + CLASS_SHIFT)[..., None]], -1)
    targets = torch.where(x["labels"][..., None] == 0, 0, rows).flatten(1)
    weights = torch.where(targets == 0, c.data.pad_weight, 1.0)
    return tokenizer.Tokens(tokenizer.with_prompt(POINT_PROMPT, targets), targets, weights)


def point(model, inputs, c):
    prompts = torch.full((len(inputs.records), 1), POINT_PROMPT)
    out = sample.generate(model, inputs, prompts, length=3 * c.data.max_objects, end=0, top_p=0.1)
    said = []
    for view, tokens in zip(inputs.views, out.tokens[:, 0].cpu()):
        rows = tokens.reshape(-1, 3)
        rows = rows[:int((rows == 0).any(1).int().argmax()) if (rows == 0).any() else None]
        yx = view.to_image(tokenizer.dequantize(rows[:, :2], c.vocab).numpy())
        labels = (rows[:, 2] - CLASS_SHIFT).tolist()
        said.append({"points": [(*place, label) for place, label in zip(yx.tolist(), labels)]})
    return said


def score_points(predictions, source, c, device):
    found = total = 0
    for image_id, prediction in predictions.items():
        record = source[image_id - 1]
        for (y0, x0, y1, x1), label in zip(record["boxes"].tolist(), record["labels"].tolist()):
            y, x = (y0 + y1) / 2, (x0 + x1) / 2
            found += any(
                np.hypot(v - y, u - x) < 4 and kind == label for v, u, kind in prediction["points"])
            total += 1
    return {"found": found / max(total, 1)}


ROWS = {
    "EXAMPLES": point_example, "COLLATE": point_tokens, "PREDICT": point, "SCORE": score_points}
RIGHT = {
    1: lambda coords, bins, shift: tokenizer.quantize(coords, Vocab(bins, shift)),
    2: sequence,
    3: lambda T: torch.ones(T, T, dtype=torch.bool).tril(),
    4: attend,
    5: lambda logits, p: model.filter_logits(logits, top_p=p).softmax(1),
    6: coco_ap,
    7: noisy,
    8: lambda x_t, gamma, v: diffusion.predict_x0_eps(x_t, gamma, v, "v", b_scale=torch.inf),
    9: ddim,
    10: gray,
    11: conditioned,
    12: lambda: ROWS,
}


def changed(number, place, change):
    """The right answer to an exercise of which a part of the result is changed."""
    def answer(*arguments):
        result = [*RIGHT[number](*arguments)]
        result[place] = change(result[place])
        return tuple(result)

    return answer


def at(index, value):
    def change(x):
        x = x.clone()
        x[index] = value
        return x

    return change


def own_ap(once=True, ordered=True, cut=True, envelope=True):
    """Average precision, with what can be forgotten left out."""
    def ap(boxes, scores, truth):
        order = scores.argsort(descending=True) if ordered else torch.arange(len(scores))
        taken, right = set(), []
        for box in boxes[order]:
            size = torch.minimum(box[2:], truth[:, 2:]) - torch.maximum(box[:2], truth[:, :2])
            both = (size.clamp(min=0) if cut else size.abs()).prod(1)
            areas = (box[2:] - box[:2]).prod() + (truth[:, 2:] - truth[:, :2]).prod(1)
            iou = both / (areas - both)
            if once:
                iou[list(taken)] = -1
            best = int(iou.argmax())
            right.append(float(iou[best] >= 0.5))
            if right[-1]:
                taken.add(best)
        hits = torch.tensor(right).cumsum(0)
        precision, recall = hits / torch.arange(1, len(right) + 1), hits / len(truth)
        if envelope:
            precision = precision.flip(0).cummax(0).values.flip(0)
        places = torch.searchsorted(recall, torch.linspace(0, 1, 101) - 1e-6)
        return torch.cat([precision, torch.zeros(1)])[places.clamp(max=len(right))].mean()

    return ap


def crossing(logits, p):
    probs = logits.softmax(1)
    values, order = probs.sort(descending=True)
    kept = values * (values.cumsum(1) - values < p)
    probs = torch.zeros_like(probs).scatter(1, order, kept)
    return probs / probs.sum(1, keepdim=True)


def early(q, k, v, keys, values):
    output = F.scaled_dot_product_attention(q, keys, values) if keys.shape[2] else v * 0
    return output, torch.cat([keys, k], 2), torch.cat([values, v], 2)


def unscaled(q, k, v, keys, values):
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    return (q @ keys.mT).softmax(-1) @ values, keys, values


def wrong_softmax(q, k, v, keys, values):
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    scores = (q @ keys.mT / q.shape[-1] ** 0.5).softmax(-2) / keys.shape[2]
    return scores @ values, keys, values


def through(denoise, x_t, gamma, count):
    seen = denoise(x_t, gamma, torch.zeros_like(x_t))
    return denoise(x_t, gamma, torch.cat([seen[:count], torch.zeros_like(seen[count:])]))


def for_all(denoise, x_t, gamma, count):
    with torch.no_grad():
        seen = denoise(x_t, gamma, torch.zeros_like(x_t))
    return denoise(x_t, gamma, seen)


def sees_input(denoise, x_t, gamma, count):
    with torch.no_grad():
        seen = denoise(x_t, gamma, x_t)
    return denoise(x_t, gamma, seen)


def other(**rows):
    return lambda: ROWS | rows


def unordered(record, c, rng):
    return point_example(record, c, np.random.default_rng(0))


def corner(record, c, rng):
    example = point_example(record, c, rng)
    return example | {"centers": example["centers"] - 0.1 * (example["centers"] > 0)}


def all_points(model, inputs, c):
    padded = c.data.max_objects
    return [{"points": said["points"] + [(0, 0, 1)] * (padded - len(said["points"]))}
            for said in point(model, inputs, c)]


MISTAKES = [
    (1, lambda c, bins, shift: (c * bins).round().long().clamp(0, bins) + shift, "how many steps"),
    (1, lambda c, bins, shift: (c * (bins - 1)).long().clamp(0, bins - 1) + shift, "go down"),
    (1, lambda c, bins, shift: (c * (bins - 1)).round().long() + shift, "outside"),
    (1, lambda c, bins, shift: (c * (bins - 1)).round() + shift, "whole numbers"),
    (1, lambda c, bins, shift: (c * (bins - 1)).round().long(), "the first of the tokens"),
    (2, lambda boxes, *rest: sequence(boxes[:, [1, 0, 3, 2]], *rest), "y comes first"),
    (2, changed(2, 2, lambda w: torch.ones_like(w)), "weight 0"),
    (2, changed(2, 2, at(9, 0.0)), "FAKE weighs 1"),
    (2, changed(2, 1, at(9, 103)), "class of a noise box"),
    (2, lambda *a: (sequence(*a)[1].clone().index_fill_(0, torch.tensor([0]), 10),
                    *sequence(*a)[1:]), "one token behind"),
    (2, lambda *a: (sequence(*a)[1], *sequence(*a)[1:]), "begins with PROMPT"),
    (3, lambda T: torch.ones(T, T, dtype=torch.bool).triu(), "rows are those who look"),
    (3, lambda T: torch.ones(T, T, dtype=torch.bool).tril(-1), "itself"),
    (3, lambda T: torch.ones(T, T).tril(), "dtype bool"),
    (4, early, "its own value"),
    (4, unscaled, "sqrt"),
    (4, wrong_softmax, "softmax"),
    (4, lambda q, k, v, keys, values: (v, keys, values), "must be added"),
    (4, lambda q, k, v, keys, values: (
        attend(q, k, v, keys, values)[0], torch.cat([k, keys], 2), torch.cat([v, values], 2)),
     "order of their tokens"),
    (5, crossing, "crosses p"),
    (5, lambda logits, p: RIGHT[5](logits, p) * 0.9, "sum to 1"),
    (5, lambda logits, p: logits.softmax(1) * (logits.softmax(1) > 0.85), "stays alone"),
    (5, lambda logits, p: logits.softmax(1), "at most p"),
    (6, own_ap(once=False), "found once"),
    (6, own_ap(ordered=False), "sort by score"),
    (6, own_ap(cut=False), "cut off at 0"),
    (6, own_ap(envelope=False), "this recall or above"),
    (7, lambda x0, eps, t: noisy(eps, x0, t), "no noise"),
    (7, lambda x0, eps, t: noisy(x0, eps, 1 - t), "no noise"),
    (7, lambda x0, eps, t: (g := (t * torch.pi / 2).cos().square()[:, None, None]) * x0
     + (1 - g) * eps, "square roots"),
    (8, lambda x_t, g, v: RIGHT[8](x_t, g, -v), "signs|difference"),
    (8, lambda *a: RIGHT[8](*a)[::-1], "first of the two"),
    (8, changed(8, 1, lambda eps: -eps), "signs"),
    (9, lambda denoise, x_t, g, then: ddim(denoise, x_t, g, g), "gamma_next"),
    (9, lambda denoise, x_t, g, then: (
        x_t - (1 - g).sqrt() * denoise(x_t, g)) / g.sqrt(), "still has the noise"),
    (9, lambda denoise, x_t, g, then: ddim(denoise, x_t, g, then) + torch.randn(2, 6), "certain"),
    (9, lambda denoise, x_t, g, then: then.sqrt() * (x_t - (eps := denoise(x_t, g)))
     + (1 - then).sqrt() * eps, "scaled by"),
    (10, lambda x: diffusion.rgb_to_bits(x[None, None, :, None] / 255)[0, :, :, 0].T, "binary"),
    (10, lambda x: (gray(x) + 1) / 2, "-1 and 1"),
    (10, lambda x: gray(x).flip(1), "lowest bit"),
    (11, through, "no gradient"),
    (11, for_all, "only the first"),
    (11, sees_input, "it sees zeros"),
    (11, lambda denoise, x_t, g, n: denoise(x_t, g, torch.zeros_like(x_t)), "asked twice"),
    (12, other(EXAMPLES=unordered), "order is to be random"),
    (12, other(EXAMPLES=corner), "centres"),
    (12, other(COLLATE=lambda x, c: (t := point_tokens(x, c))._replace(inputs=t.targets)),
     "begin with POINT_PROMPT"),
    (12, other(COLLATE=lambda x, c: (t := point_tokens(x, c))._replace(
        weights=torch.ones_like(t.weights))), "pad_weight"),
    (12, other(PREDICT=all_points), "nothing after PAD"),
    (12, other(SCORE=lambda *a: {"found": 1.0}), "another class"),
    (12, lambda: {}, "return a dict"),
]


@pytest.mark.parametrize("number", exercises.EXERCISES)
def test_the_right_answer_passes(number):
    assert verdict(number, RIGHT[number]) == "passed"


def test_a_right_answer_of_ones_own_passes_too():
    assert verdict(6, own_ap()) == "passed"


@pytest.mark.parametrize("number, answer, words", MISTAKES)
def test_a_typical_mistake_gets_its_hint(number, answer, words):
    said = verdict(number, answer)
    assert said.startswith("not yet") and any(word in said for word in words.split("|")), said


@pytest.mark.parametrize("number", exercises.EXERCISES)
def test_a_stub_is_not_written_yet_and_an_error_is_said(number):
    assert "not written yet" in verdict(number)
    assert "ends with" in verdict(number, lambda *arguments: 1 / 0)


def test_the_task_of_ones_own_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(exercises, "point_rows", lambda: ROWS)
    with exercises.installed(ROWS):
        c = exercises.point_config(
            out=str(tmp_path / "run"), steps=4, batch_size=4, eval_every=0, val_count=3,
            log_every=1)
        metrics = train.train(c)
    assert 0 <= metrics["pnt"]["found"] <= 1
    assert "pnt" not in data.EXAMPLES and "pnt" not in eval.SCORE


def test_the_list_and_a_check_run_as_a_script():
    def say(*arguments):
        command = [sys.executable, f"{ROOT}/tests/exercises.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)

    listed = say().stdout
    assert listed.count("\n") == 12 and "attend_step" in listed
    done = say("3")
    assert done.returncode == 1 and "not written yet: causal_mask" in done.stdout
