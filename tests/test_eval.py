"""Predictions, pictures and metrics of detection, masks, keypoints and captions."""
import ast
import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, run
from PIL import Image

import data
import eval
import sample
import tokenizer
from model import Device, Pix2Seq, Pix2SeqConfig, build, save
from sample import Inputs
from tokenizer import BytePieces, UserError, Vocab
from train import Config

TASKS = ("det", "seg", "kpt", "cap")
MODEL = Pix2SeqConfig(
    image_size=(64, 64), patch_size=16,
    enc_layers=1, enc_dim=32, enc_mlp=64, enc_heads=2,
    dec_layers=1, dec_dim=32, dec_mlp=64, dec_heads=2,
    vocab_size=3000 + BytePieces.size, drop_path=0.0, dropout=0.0)
CPU = Device("cpu")


def configuration(**fields):
    """Of a model of all four tasks, trained on drawn shapes."""
    defaults = {
        "tasks": TASKS,
        "val_count": 6,
        "max_objects": 6,
        "max_points": 40,
        "seg_samples": 2,
        "caption_length": 60,
    }
    c = Config(model=MODEL, categories=tuple(data.Shapes("val").categories))
    return sample.changed(c, **(defaults | fields))


def evaluate(model, c, tasks=None, **options):
    return eval.evaluate(model, c, "val", CPU, tasks, **options)


@pytest.fixture(scope="module")
def model():
    """Untrained, but never at the end of its sequence, so that it predicts something everywhere."""
    torch.manual_seed(0)
    model = Pix2Seq(MODEL).eval()
    with torch.no_grad():
        model.decoder.bias[1000:2000] += 5
        model.decoder.bias[101:105] += 3
    return model


def test_every_task_has_a_row_in_every_table():
    tables = sample.PREDICT, eval.SCORE, eval.ITEMS, eval.WRITE, sample.SHOW
    assert all(table.keys() == data.EXAMPLES.keys() for table in tables)
    assert eval.TRUTH.keys() == data.EXAMPLES.keys() - {"gen", "ar"}
    assert set(eval.TOGETHER) <= data.EXAMPLES.keys()


def test_truth_as_prediction_is_perfect_but_for_quantisation(model):
    metrics, _ = evaluate(model, configuration(val_count=40), truth=True)
    assert metrics["det"]["AP"] > 0.99 and metrics["kpt"]["AP"] > 0.99, metrics
    assert metrics["seg"]["AP"] > 0.95, metrics
    assert metrics["cap"]["exact"] == 1.0, metrics
    assert metrics["cap"].get("BLEU_4", 1.0) == pytest.approx(1.0), metrics


def test_an_untrained_model_goes_through_every_task(model):
    metrics, predictions = evaluate(model, configuration(), boxes="truth", batch_size=4)
    assert set(metrics) == set(TASKS) and all(m["images"] == 6 for m in metrics.values())
    masks = eval.coco_results("seg", predictions["seg"])
    assert len(masks) == sum(len(data.Shapes("val")[i]["labels"]) for i in range(6))
    people = eval.coco_results("kpt", predictions["kpt"])
    assert people and all(len(r["keypoints"]) == 15 and r["category_id"] == 4 for r in people)
    assert all(isinstance(p["caption"], str) for p in predictions["cap"].values())
    json.dumps(predictions)


def test_evaluation_leaves_the_model_in_its_mode(model):
    for mode in (True, False):
        evaluate(model.train(mode), configuration(), ["det"], limit=2)
        assert model.training == mode


def test_a_limit_takes_the_first_images(model):
    _, predictions = evaluate(model, configuration(), ["det"], limit=2)
    assert list(predictions["det"]) == [1, 2]


def test_own_boxes_are_the_ones_that_get_masks(model):
    c = configuration()
    records = [{"image": data.Shapes("val")[i]["image"]} for i in range(3)]

    def predict(tasks):
        inputs = sample.Inputs(records, c, generator=torch.Generator().manual_seed(0))
        return sample.predict(model, inputs, c, tasks)

    masked, detected = (
        [p["objects"] for p in predict(tasks)] for tasks in (("det", "seg"), ("det",)))
    boxes_of = [[[obj["bbox"] for obj in objects] for objects in p] for p in (masked, detected)]
    assert boxes_of[0] == boxes_of[1] and any(boxes_of[0])
    for objects in masked:
        assert all(obj["segmentation"]["size"] == [64, 64] for obj in objects)


def test_boxes_of_others_are_the_ones_that_get_masks_and_keypoints(model):
    boxes = {3: [{"category_id": 4, "bbox": [10.0, 12.0, 20.0, 30.0], "score": 0.5}]}
    _, predictions = evaluate(model, configuration(), ("seg", "kpt"), boxes=boxes)
    for task, key in (("seg", "segmentation"), ("kpt", "keypoints")):
        assert [i for i, p in predictions[task].items() if p["objects"]] == [3]
        (obj,) = predictions[task][3]["objects"]
        assert obj["bbox"] == boxes[3][0]["bbox"] and obj[key]


def test_no_predictions_are_a_valid_result(model):
    silent = copy.deepcopy(model)
    with torch.no_grad():
        silent.decoder.bias[tokenizer.PAD] += 100      # the sequence ends at once
    metrics, predictions = evaluate(silent, configuration(), ("det", "seg", "kpt"))
    assert [metrics[task]["AP"] for task in ("det", "seg", "kpt")] == [0, 0, 0]
    assert eval.coco_results("det", predictions["det"]) == []


def test_perfect_results_score_one_and_wrong_classes_nothing():
    truth, ids = data.Shapes("val", count=20).truth(), range(1, 21)
    keys = ("image_id", "category_id", "bbox")
    results = [{key: a[key] for key in keys} | {"score": 0.9} for a in truth["annotations"]]
    assert eval.average_precision(truth, results, ids)["AP"] == 1
    wrong = [r | {"category_id": r["category_id"] % 4 + 1} for r in results]
    assert eval.average_precision(truth, wrong, ids)["AP"] < 0.2
    first = truth["annotations"][0]["image_id"]
    few = [r for r in results if r["image_id"] == first]
    assert eval.average_precision(truth, few, [first])["AP"] == 1


def test_each_category_has_its_own_average_precision():
    truth, ids = data.Shapes("val", count=20).truth(), range(1, 21)
    names = {row["id"]: row["name"] for row in truth["categories"]}
    keys = ("image_id", "category_id", "bbox")
    results = [
        {key: a[key] for key in keys} | {"score": 0.9} for a in truth["annotations"]
        if names[a["category_id"]] != "circle"]
    truth["categories"].append({"id": 99, "name": "nowhere at all"})
    scores = eval.average_precision(truth, results, ids)
    of_each = {names[i]: scores[f"AP_{names[i]}"] for i in names}
    assert of_each == dict.fromkeys(names.values(), 1) | {"circle": 0}
    assert scores["AP_nowhere_at_all"] == -1
    assert scores["AP"] == pytest.approx(np.mean(list(of_each.values())), abs=1e-5)
    assert list(scores)[:12] == eval.BOX_METRICS and len(scores) == 12 + len(names) + 1


def test_an_unreadable_image_is_left_out_of_the_evaluation(tmp_path, model, capsys):
    data.export_shapes(str(tmp_path), 3, 64, "png")
    images = tmp_path / "val2017"
    (images / "000000000002.png").write_bytes(b"no image")
    c = configuration(data="coco", data_dir=str(tmp_path))
    metrics, predictions = evaluate(model, c, ["det"], truth=True)
    assert metrics["det"]["images"] == 2 and metrics["det"]["AP"] > 0.99
    assert list(predictions["det"]) == [1, 3]
    assert "000000000002.png" in capsys.readouterr().err
    for name in ("000000000001.png", "000000000003.png"):
        (images / name).write_bytes(b"")
    with pytest.raises(UserError, match="no item to evaluate for det: .*000000000001.png"):
        evaluate(model, c, ["det"], truth=True)


def test_odd_annotations_pass_through_every_task(tmp_path, model):
    """Crowds, several polygons per object, people without keypoints, images without objects."""
    data.export_shapes(str(tmp_path), 6, 64, "png")
    crowd = {
        "id": 10_000,
        "image_id": 4,
        "category_id": 4,
        "bbox": [10, 0, 20, 64],
        "area": 1280,
        "iscrowd": 1,
        "segmentation": {"size": [64, 64], "counts": [640, 1280, 2176]},
        "keypoints": [0] * 15,
        "num_keypoints": 0,
    }
    for kind in ("instances", "person_keypoints"):
        path = tmp_path / f"annotations/{kind}_val2017.json"
        truth = json.loads(path.read_text())
        for a in truth["annotations"]:
            if a["image_id"] == 1:
                a["image_id"] = 2                      # image 1 has no objects
            if "keypoints" in a and a["image_id"] == 3:
                a["keypoints"], a["num_keypoints"] = [0] * 15, 0
        truth["annotations"].append(crowd)
        path.write_text(json.dumps(truth))
    c = configuration(data="coco", data_dir=str(tmp_path))
    metrics, _ = evaluate(model, c, ("det", "seg", "kpt"), truth=True)
    assert metrics["det"]["AP"] > 0.99 and metrics["kpt"]["AP"] > 0.99, metrics
    assert metrics["seg"]["AP"] > 0.9, metrics
    source = data.make_source(c, "val")
    for task in ("det", "seg"):
        for i in range(6):
            example = data.EXAMPLES[task](source[i], c, np.random.default_rng(0))
            assert example["labels"].min() >= tokenizer.FAKE_LABEL
    people = data.make_source(c, "val", "kpt")
    drawn = [data.Shapes("val")[i] for i in range(6)]
    figures = [(r["labels"] == 4).sum() for r in drawn if r["image_id"] != 3]
    assert people.count("kpt") == sum(figures)


def test_ids_such_as_0_and_9001_come_back_in_the_results(tmp_path, model):
    data.export_shapes(str(tmp_path), 3, 64, "png")
    path = tmp_path / "annotations/instances_val2017.json"
    new = {1: 0, 2: 7, 3: 9001, 4: 12}
    truth = json.loads(path.read_text())
    for a in truth["annotations"]:
        a["category_id"] = new[a["category_id"]]
    for category in truth["categories"]:
        category["id"] = new[category["id"]]
    path.write_text(json.dumps(truth))
    c = configuration(data="coco", data_dir=str(tmp_path))
    c = replace(c, categories=tuple(data.make_source(replace(c, categories=()), "val").categories))
    metrics, predictions = evaluate(model, c, ["det"], truth=True)
    ids = {result["category_id"] for result in eval.coco_results("det", predictions["det"])}
    assert metrics["det"]["AP"] > 0.99
    assert ids == {a["category_id"] for a in truth["annotations"]}


def test_keypoints_find_their_way_back_from_the_crop(model):
    source = data.Shapes("val", count=30)
    _, predictions = evaluate(model, configuration(val_count=30), ["kpt"], truth=True)
    records = {source[i]["image_id"]: source[i] for i in range(30)}
    results = eval.coco_results("kpt", predictions["kpt"])
    assert len(results) == sum((record["labels"] == 4).sum() for record in records.values())
    for result in results:
        record = records[result["image_id"]]
        figures = record["keypoints"][record["labels"] == 4, :, :2]
        found = np.array(result["keypoints"]).reshape(-1, 3)[:, [1, 0]]
        assert np.abs(found - figures).max((1, 2)).min() < 0.1


def test_boxes_are_read_from_a_results_file(tmp_path):
    path, obj = tmp_path / "boxes.json", {"category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    source = data.Shapes("val")
    c = Config(categories=tuple(source.categories))
    path.write_text(json.dumps([{"image_id": 3, **obj}]))
    assert eval.read_boxes(str(path), source, c) == {3: [{"image_id": 3, **obj}]}
    for content, words in (
            ('[{"image_id": 3}]', r"category_id.*results\[0\]"), ("[3]", "results"),
            ("no json", "not JSON"), ("{}", "expected a list"),
            (json.dumps([{"image_id": 999, **obj}]), "image_id, .* has 999"),
            (json.dumps([{"image_id": 3, **obj, "score": math.nan}]), "score, .* has nan"),
            (json.dumps([{"image_id": 3, **obj, "bbox": "1 2"}]), "bbox, .* has '1 2'")):
        path.write_text(content)
        with pytest.raises(UserError, match=f"boxes.json: .*{words}"):
            eval.read_boxes(str(path), source, c)


# --------------------------------------------------------------------------------------------------
# scripts

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    path = str(tmp_path_factory.mktemp("run") / "best.pt")
    config = asdict(configuration())
    save(path, {"network": "Pix2Seq", "config": config, "model": model.state_dict()})
    return path


def test_sample_predicts_for_photos_of_any_size(checkpoint, tmp_path):
    sizes = {"wide": (300, 40), "tall": (20, 333), "dot": (1, 1)}
    for name, size in sizes.items():
        Image.new("RGB", size, "green").save(tmp_path / f"{name}.png")
    photos = [f"{name}.png" for name in sizes]
    done = run(
        "sample.py", *photos, f"--ckpt={checkpoint}", "--min_score=0", cwd=tmp_path, process=True)
    report = json.loads(done.stdout)
    assert [(r["width"], r["height"]) for r in report] == list(sizes.values())
    for r in report:
        assert os.path.exists(tmp_path / r["picture"]) and isinstance(r["caption"], str)
        for o in r["objects"]:
            x, y, w, h = o["bbox"]
            assert 0 <= x <= x + w <= r["width"] + 1e-3 and o["name"]
            assert 0 <= y <= y + h <= r["height"] + 1e-3
    assert os.path.exists(tmp_path / "samples/all.png")


def python_of_readme(word, checkpoint):
    """The block of README's Python that has this word, about a checkpoint."""
    with open(f"{ROOT}/README.md") as f:
        blocks = re.findall("```python\n(.*?)```", f.read(), re.S)
    [block] = [text for text in blocks if word in text]
    return block.replace("out/det_shapes/best.pt", checkpoint)


def test_readme_detects_from_python(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40), "green").save("photo.jpg")
    code, asked = python_of_readme("predict", checkpoint), []

    def everywhere(views, tokens, logprobs, c):
        asked.append(tokens.shape)
        return [sample.as_objects([[0, 0, v.height, v.width]], [1], [0.5], c.categories)
                for v in views]

    exec(code, {})
    monkeypatch.setattr(sample, "read_objects", everywhere)
    exec(code, {})
    first, second = map(ast.literal_eval, capsys.readouterr().out.splitlines())
    assert type(first) is list and asked == [(1, 5 * configuration().data.max_objects)]
    assert second == [{"category_id": 1, "bbox": [0, 0, 64, 51], "score": 0.5}]


def test_what_readme_exports_writes_the_same_tokens(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = {}
    exec(python_of_readme("torch.export", checkpoint), seen)
    encode, step = (torch.export.load(f"{name}.pt2").module() for name in ("encode", "step"))
    image = torch.rand(1, 3, *seen["c"].model.image_size)
    tokens = prompt = torch.full((1, 1), 10)
    for _ in range(12):
        tokens = torch.cat([tokens, step(tokens, encode(image)).argmax(1, keepdim=True)], 1)
    model = seen["model"]
    expected = model.generate(model.encode(image), prompt, 12, temperature=0).tokens[0]
    assert torch.equal(tokens[:, 1:], expected)


def test_sample_takes_held_out_images_and_repeats_itself(checkpoint, tmp_path):
    options = f"--ckpt={checkpoint}", "--count=2", "--task=det,cap", "--seed=3"
    first, again = (run("sample.py", *options, cwd=tmp_path).stdout for _ in range(2))
    assert first == again and len(json.loads(first)) == 2


def figures_of(page):
    """Lines of each figure of a page, and how many pictures it has."""
    found = re.findall('<figure class="(.*?)">(.*?)</figure>', page)
    return [(kind, *re.sub("<img.*?>", "", rest).split("<br>"), rest.count("<img"))
            for kind, rest in found]


def test_a_page_explains_every_token(checkpoint, tmp_path, monkeypatch):
    drawn = []
    generate = Pix2Seq.generate

    def kept(self, *arguments, **options):
        drawn.append(generate(self, *arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(Pix2Seq, "generate", kept)
    boxes = "--boxes", "10,10,30,40,figure", "5,5,20,20,circle"
    Image.new("RGB", (90, 80), "green").save(tmp_path / "a.png")
    run("sample.py", "a.png", f"--ckpt={checkpoint}", "--explain", "--temperature=0", *boxes,
        cwd=tmp_path)
    page = (tmp_path / "samples/a.html").read_text()
    assert "http" not in page and "<script" not in page
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert [title.split()[0] for title in titles] == ["mask?", "mask?", "keypoints?", "caption?"]
    assert titles[0].endswith("figure") and "0.111 0.111 0.557 0.444" in titles[0]
    figures = figures_of(page)
    for out, samples, exact in zip(drawn, (2, 1, 1), (True, False, True)):
        for tokens, probs in zip(out.tokens[0, ::samples], out.probs[0, ::samples]):
            for token, prob in zip(tokens.tolist()[:tokens.count_nonzero() + 1], probs.tolist()):
                kind, text, said, *others, pictures = figures.pop(0)
                number, share = map(int, re.findall(r"\d+", said))
                assert number == token and pictures == 1 and len(others) == 3
                assert kind == tokenizer.meaning(token, configuration().vocab, {})[0]
                assert (kind == "coordinate") == (text[:2] in ("y ", "x "))
                if exact:                              # of keypoints it reads hidden ones, too
                    assert abs(share / 100 - prob) < 0.006, (token, share, prob)
    assert not figures


def test_tokens_say_what_they_mean():
    vocab = Vocab(bins=11, coord_shift=110, text_shift=121)
    said = [tokenizer.meaning(token, vocab, {3: "cat"}) for token in (
        0, 10, 30, 40, 41, 50, 103, 104, 110, 120, 122, 123 + ord("a"))]
    assert said == [
        ("special", "end"), ("special", "boxes?"), ("special", "noise"),
        ("special", "next polygon"), ("special", "invisible"), ("special", "unused"),
        ("class", "cat"), ("class", "4"), ("coordinate", "0.000"), ("coordinate", "1.000"),
        ("text", "end"), ("text", "a")]


def test_a_page_of_a_fit_has_no_attention(tmp_path):
    c = replace(configuration(), model=replace(MODEL, encoder="fit", image_size=(32, 32)))
    torch.manual_seed(0)
    network = build(c.model)
    trace = []
    record = {"image": Image.new("RGB", (32, 32))}
    sample.predict(network, Inputs([record], c, trace=trace.append), c, ["cap"])
    sample.explain(network, trace, record["image"], c, f"{tmp_path}/page")
    figures = figures_of((tmp_path / "page.html").read_text())
    assert figures and all(pictures == 0 for *_, pictures in figures)


def test_sample_takes_folders_patterns_and_films_and_prints_lines(
        checkpoint, tmp_path, monkeypatch):
    def three(views, tokens, logprobs, c):
        boxes, scores = 3 * [[1, 2, 9, 9]], [0.1, 0.9, 0.5]
        return [sample.as_objects(boxes, [1, 2, 3], scores, c.categories) for _ in views]

    monkeypatch.setattr(sample, "read_objects", three)
    (tmp_path / "photos").mkdir()
    for n in (2, 10):
        Image.new("RGB", (60, 40 + n), "green").save(tmp_path / f"photos/{n}.jpg")
        Image.new("RGB", (50, 40 + n), "green").save(tmp_path / f"more{n}.png")
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "green")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    options = "--json", "--task=det", "--min_score=0", "--top=2", "--batch_size=2"
    done = run(
        "sample.py", "photos", "more*.png", "film.gif", "none*.png", f"--ckpt={checkpoint}",
        *options, cwd=tmp_path, check=False)
    rows = list(map(json.loads, done.stdout.splitlines()))
    assert done.returncode == 1 and "none*.png" in done.stderr
    names = [row["image"] for row in rows]
    assert names == [
        "photos/2.jpg", "photos/10.jpg", "more10.png", "more2.png", "film_000000", "film_000001",
        "none*.png"]
    assert [row.get("height") for row in rows] == [42, 50, 50, 42, 20, 20, None]
    for row in rows[:-1]:
        assert [obj["score"] for obj in row["objects"]] == [0.9, 0.5]
        assert os.path.exists(tmp_path / row["picture"])


def test_an_object_has_the_colour_of_its_class():
    c = configuration()
    objects = [{"category_id": i, "bbox": [10, 10, 80, 80], "score": 0.5} for i in (1, 2)]
    image = Image.new("RGB", (400, 400))
    alone, both = (sample.draw(image, {"objects": part}, c) for part in (objects[1:], objects))
    assert alone.getpixel((50, 90)) == both.getpixel((50, 90)) != (0, 0, 0)


def test_sample_takes_prompt_boxes(checkpoint, tmp_path):
    Image.new("RGB", (90, 80), "green").save(tmp_path / "a.png")
    model, boxes = f"--ckpt={checkpoint}", ("10,10,30,40,figure", "5,5,20,20,circle")
    done = run(
        "sample.py", "a.png", model, "--task=seg,kpt", "--boxes", *boxes, cwd=tmp_path)
    figure, circle = json.loads(done.stdout)[0]["objects"]
    assert (figure["name"], circle["name"]) == ("figure", "circle")
    assert "segmentation" in figure and "segmentation" in circle
    assert len(figure["keypoints"]) == 15 and "keypoints" not in circle
    done = run("sample.py", "a.png", model, "--boxes", "1,2,3,dog", cwd=tmp_path, check=False)
    assert "expected X,Y,W,H,NAME, the name one of circle" in done.stderr


def test_the_checkpoint_is_the_best_of_the_newest_run_or_of_the_one_that_is_named(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run in out/: .*python train.py"):
        sample.find_checkpoint()
    for age, names in enumerate([["last.pt"], ["last.pt", "best.pt"], ["last.pt"]]):
        os.makedirs(f"out/{age}")
        for name in names:
            path = f"out/{age}/{name}"
            open(path, "w").close()
            os.utime(path, (0, 1000 - age))
    assert sample.find_checkpoint() == "out/0/last.pt"
    assert sample.find_checkpoint("out/1") == "out/1/best.pt"
    assert sample.find_checkpoint("out/1/last.pt") == "out/1/last.pt"
    with pytest.raises(FileNotFoundError, match="out/9: no such checkpoint"):
        sample.find_checkpoint("out/9")


@pytest.mark.parametrize("argument, words", [
    ("nothing.jpg", "nothing.jpg"),
    ("--ckpt=nowhere.pt", "nowhere.pt: no such checkpoint"),
    ("--task=paint", "this model knows det, seg, kpt, cap"),
])
def test_sample_names_what_is_wrong(checkpoint, tmp_path, argument, words):
    done = run("sample.py", f"--ckpt={checkpoint}", argument, cwd=tmp_path, check=False)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["sample.py", "eval.py"])
def test_an_unknown_option_names_the_nearest(checkpoint, tmp_path, name):
    done = run(name, f"--ckpt={checkpoint}", "--temperatur=1", cwd=tmp_path, check=False)
    words = "error: unknown option --temperatur, did you mean '--temperature'?"
    assert done.returncode == 2 and done.stderr.startswith(words)


def test_eval_prints_and_saves_all_numbers(checkpoint, tmp_path):
    options = "--task=det,kpt,cap", "--boxes=truth", "--limit=3", "--top_p=0.9", "--workers=1"
    done = run("eval.py", f"--ckpt={checkpoint}", f"--out={tmp_path}/x", *options)
    saved = json.loads((tmp_path / "x_metrics.json").read_text())
    assert set(eval.BOX_METRICS) <= set(saved["det"])
    assert set(eval.KEYPOINT_METRICS) <= set(saved["kpt"])
    assert "exact" in saved["cap"]
    assert saved["sampling"]["top_p"] == 0.9 and saved["split"] == "val"
    assert "AR_100" in done.stdout and "exact" in done.stdout
    for task, keys in (
            ("det", {"image_id", "category_id", "bbox", "score"}),
            ("kpt", {"image_id", "category_id", "keypoints", "score"}),
            ("cap", {"image_id", "caption"})):
        results = json.loads((tmp_path / f"x_{task}.json").read_text())
        assert results and all(set(result) == keys for result in results)


def test_two_processes_find_what_one_finds(checkpoint, tmp_path):
    options = f"--ckpt={checkpoint}", "--workers=0", "--task=det,cap", "--batch_size=1"
    run("eval.py", *options, f"--out={tmp_path}/one")
    run("eval.py", *options, f"--out={tmp_path}/two", torchrun=2)
    for task in ("det", "cap"):
        one, two = (
            json.loads((tmp_path / f"{name}_{task}.json").read_text()) for name in ("one", "two"))
        assert one == two and one, task


def test_watch_evaluates_a_checkpoint_that_appears(checkpoint, tmp_path):
    options = f"--ckpt={tmp_path}", "--workers=0", "--task=det", "--limit=2"
    process = subprocess.Popen(
        [sys.executable, f"{ROOT}/eval.py", "--watch", *options],
        stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    shutil.copy(checkpoint, tmp_path / "last.pt.tmp")
    os.replace(tmp_path / "last.pt.tmp", tmp_path / "last.pt")
    try:
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith("numbers:") for line in lines), "nothing was evaluated"
    finally:
        process.kill()
    assert os.path.exists(tmp_path / "last_val_metrics.json")


def test_results_files_of_others_are_scored_as_our_own(checkpoint, tmp_path):
    run("eval.py", f"--ckpt={checkpoint}", f"--out={tmp_path}/ours", "--truth")
    source = data.Shapes("val", 64, count=configuration().data.val_count)
    for task in TASKS:
        with open(tmp_path / f"{task}.json", "w") as f:
            json.dump(source.truth(task), f)
        results = f"{tmp_path}/ours_{task}.json"
        scores = eval.score_files(eval.EvalOptions(
            results=results, truth_json=f"{tmp_path}/{task}.json", task=task))
        with open(f"{tmp_path}/ours_metrics.json") as f:
            expected = json.load(f)[task]
        assert all(scores[key] == value for key, value in expected.items() if key in scores), task
        assert len(scores) > 2 or task == "cap"
    options = eval.EvalOptions(results=f"{tmp_path}/bad.json", truth_json=f"{tmp_path}/det.json")
    good = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    for rows, words in (
            ({"results": [good]}, "expected a list"),
            ([good | {"image_id": 99}], r"results\[0\] .* has 99"),
            ([good | {"category_id": 9}], "wrong values of category_id"),
            ([good | {"score": None}], "wrong values of score"),
            ([good | {"bbox": ["1", 2, 3, 4]}], "wrong values of bbox")):
        (tmp_path / "bad.json").write_text(json.dumps(rows))
        with pytest.raises(UserError, match=words):
            eval.score_files(options)
    (tmp_path / "bad.json").write_text("[]")
    assert eval.score_files(options)["AP"] == 0
    done = run(
        "eval.py", f"--results={tmp_path}/ours_det.json", f"--truth_json={tmp_path}/det.json")
    assert re.search("AP +(1.0000|0.9)", done.stdout), done.stdout


@pytest.fixture
def two_results(tmp_path, monkeypatch):
    """The truth of six scenes where README's commands leave it, and results: the truth, and of the
    first image nothing right."""
    source = data.Shapes("val", 64, count=6)
    truth, folder = source.truth("det"), "own/annotations"
    right = [{**a, "score": 0.9} for a in truth["annotations"]]
    wrong = [{**a, "bbox": [0, 0, 1, 1]} if a["image_id"] == 1 else a for a in right]
    monkeypatch.chdir(tmp_path)
    for path, content in (
            (f"{folder}/instances_val2017.json", truth | {"info": {}}),
            ("out/det_coco_tiny/best_val_det.json", right),
            ("out/second/best_val_det.json", wrong)):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as f:
            json.dump(content, f)
    return source


def test_readme_draws_precision_and_ap_of_classes(two_results):
    pytest.importorskip("matplotlib").use("agg")
    seen = {}
    exec(python_of_readme("barh", ""), seen)
    assert Image.open("ap.png").size == (1200, 500)
    assert np.allclose([bar.get_width() for bar in seen["bars"].patches], 1)
    assert np.allclose([line.get_ydata() for line in seen["curves"].lines], 1)


def test_readme_says_which_images_changed(two_results, capsys):
    exec(python_of_readme("most_common", ""), {})
    said = capsys.readouterr().out.splitlines()[-1]
    count = sum(a["image_id"] == 1 for a in two_results.truth("det")["annotations"])
    assert said.endswith(f"('000000000001.png', {-2 * count})]"), said


def test_the_worst_errors_are_drawn(checkpoint, tmp_path, monkeypatch):
    """All that is there is missed, and something found in a corner."""
    drawn = []

    def corner(views, tokens, logprobs, c):
        for view in views:
            yield sample.as_objects([[0, 0, 2, 2]], [2], [0.25], c.categories)

    draw = sample.draw
    monkeypatch.setattr(sample, "read_objects", corner)
    monkeypatch.setattr(sample, "draw", lambda *given: drawn.append(given[1]) or draw(*given))
    run("eval.py", f"--ckpt={checkpoint}", "--task=det", "--errors", f"--out={tmp_path}/a")
    count = configuration().data.val_count
    kinds = [said["caption"] for said in drawn]
    assert kinds == ["wrong"] * count + ["missed"] * 8
    areas = [math.prod(said["objects"][0]["bbox"][2:]) for said in drawn[count:]]
    truth = data.Shapes("val", 64, count=count).truth("det")["annotations"]
    boxes = {tuple(a["bbox"]): a["area"] for a in truth}
    found = [boxes[tuple(said["objects"][0]["bbox"])] for said in drawn[count:]]
    assert found == sorted(boxes.values(), reverse=True)[:8] and min(areas) > 50
    assert Image.open(tmp_path / "a_det_errors.png").size[0] > 1000
