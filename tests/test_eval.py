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
from model import Device, Pix2Seq, Pix2SeqConfig, save
from tokenizer import BytePieces, UserError
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


def test_attention_to_latents_is_no_picture():
    c = Config(model=replace(MODEL, encoder="fit"))
    with pytest.raises(ValueError, match="--attention: the decoder of a fit attends to latents"):
        sample.draw_attention(None, None, c)


def test_sample_shows_the_attention_of_the_tokens_of_an_object(checkpoint, tmp_path):
    options = "--count=5", "--task=det", "--attention", "--min_score=0"
    run("sample.py", f"--ckpt={checkpoint}", *options, cwd=tmp_path)
    pictures = [name for name in os.listdir(tmp_path / "samples") if "attention" in name]
    assert pictures and Image.open(tmp_path / "samples" / pictures[0]).size[0] > 300


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
