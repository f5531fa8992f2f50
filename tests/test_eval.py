"""Predictions, pictures and metrics of all tasks."""
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_tools

import data
import eval
import sample
import tokenizer
from data import DataError
from model import Pix2Seq, Pix2SeqConfig
from tokenizer import BytePieces
from train import Config, merge_categories

ROOT = os.path.dirname(os.path.abspath(eval.__file__))
TASKS = ("det", "seg", "kpt", "cap")
MODEL = Pix2SeqConfig(image_size=(64, 64), patch_size=16, enc_layers=1, enc_dim=32, enc_mlp=64, enc_heads=2, dec_layers=1, dec_dim=32,
                      dec_mlp=64, dec_heads=2, vocab_size=3000 + BytePieces.size, drop_path=0.0, dropout=0.0)


def predictor(**fields):
    """A configuration as load_model gives it, for drawn shapes."""
    config = Config(model=MODEL, tasks=",".join(TASKS), **{"val_count": 6, "max_objects": 6, "max_points": 40, "seg_samples": 2,
                                                           "caption_length": 60, **fields})
    return SimpleNamespace(**vars(config), categories=merge_categories([data.Shapes("val")]))


@pytest.fixture(scope="module")
def model():
    """Untrained, but never at the end of its sequence, so that it finds something everywhere."""
    torch.manual_seed(0)
    model = Pix2Seq(MODEL).eval()
    with torch.no_grad():
        model.decoder.bias[1000:2000] += 5
        model.decoder.bias[101:105] += 3
    return model


def test_truth_as_prediction_is_perfect_but_for_quantisation():
    metrics, _ = eval.evaluate(None, predictor(val_count=40), TASKS, truth=True)
    assert metrics["det"]["AP"] > 0.99 and metrics["kpt"]["AP"] > 0.99, metrics
    assert metrics["seg"]["AP"] > 0.95, metrics
    assert metrics["cap"]["exact"] == 1.0 and metrics["cap"]["BLEU_4"] == pytest.approx(1.0), metrics


def test_an_untrained_model_goes_through_every_task(model):
    metrics, results = eval.evaluate(model, predictor(), TASKS, boxes="truth", batch_size=4)
    assert set(metrics) == set(TASKS) and all(m["images"] == 6 for m in metrics.values())
    assert len(results["seg"]) == sum(len(data.Shapes("val")[i]["labels"]) for i in range(6))
    assert all(len(r["keypoints"]) == 15 and r["category_id"] == 4 for r in results["kpt"])
    json.dumps(results)


def test_own_boxes_are_the_ones_that_get_masks(model):
    c = predictor()
    images = [data.Shapes("val")[i]["image"] for i in range(3)]
    found = sample.look(model, images, c, ("det", "seg"), generator=torch.Generator().manual_seed(0))
    again = sample.look(model, images, c, ("det",), generator=torch.Generator().manual_seed(0))
    for a, b in zip(found, again):
        assert [o["bbox"] for o in a["objects"]] == [o["bbox"] for o in b["objects"]]
        assert all(o["segmentation"]["size"] == [64, 64] for o in a["objects"])


def test_no_predictions_are_a_valid_result(model, monkeypatch):
    monkeypatch.setattr(sample, "detect", lambda model, context, c, g: (torch.zeros(len(context), 2, dtype=torch.long), torch.zeros(len(context), 2, 4),
                                                                        torch.zeros(len(context), 2)))
    metrics, results = eval.evaluate(model, predictor(), ("det", "seg", "kpt"))
    assert metrics["det"]["AP"] == metrics["seg"]["AP"] == metrics["kpt"]["AP"] == 0 and results["det"] == []


def test_perfect_results_score_one_and_wrong_classes_nothing():
    source = data.Shapes("val", count=20)
    truth = source.truth()
    results = [{"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9} for a in truth["annotations"]]
    ids = range(1, 21)
    assert eval.average_precision(truth, results, ids)["AP"] == 1
    wrong = [r | {"category_id": r["category_id"] % 4 + 1} for r in results]
    assert eval.average_precision(truth, wrong, ids)["AP"] < 0.2
    first = {a["image_id"] for a in truth["annotations"][:1]}
    assert eval.average_precision(truth, [r for r in results if r["image_id"] in first], first)["AP"] == 1


def test_an_unreadable_image_is_left_out_of_the_evaluation(tmp_path, model, capsys):
    data.export_shapes(str(tmp_path), 3, 64, 0, "png")
    (tmp_path / "val2017" / "000000000002.png").write_bytes(b"no image")
    c = predictor(data="coco", data_dir=str(tmp_path))
    metrics, _ = eval.evaluate(None, c, ("det",), truth=True)
    assert metrics["det"]["images"] == 2 and metrics["det"]["AP"] > 0.99
    assert "000000000002.png" in capsys.readouterr().err
    for name in ("1", "3"):
        (tmp_path / "val2017" / f"00000000000{name}.png").write_bytes(b"")
    with pytest.raises(DataError, match="no image to evaluate"):
        eval.evaluate(None, c, ("det",), truth=True)


def test_odd_annotations_pass_through_every_task(tmp_path):
    """Crowds, several polygons an object, people without joints, images without objects."""
    data.export_shapes(str(tmp_path), 6, 64, 0, "png")
    for kind in ("instances", "person_keypoints"):
        path = tmp_path / f"annotations/{kind}_val2017.json"
        truth = json.loads(path.read_text())
        for a in truth["annotations"]:
            if a["image_id"] == 1:
                a["image_id"] = 2                      # image 1 has no objects
            if "keypoints" in a and a["image_id"] == 3:
                a["keypoints"], a["num_keypoints"] = [0] * 15, 0
        mask = np.zeros((64, 64), np.uint8, order="F")
        mask[:, 10:30] = 1
        rle = {"size": [64, 64], "counts": [640, 1280, 2176]}
        truth["annotations"].append({"id": 10_000, "image_id": 4, "category_id": 4, "bbox": [10, 0, 20, 64], "area": 1280, "iscrowd": 1,
                                     "segmentation": rle, "keypoints": [0] * 15, "num_keypoints": 0})
        path.write_text(json.dumps(truth))
    c = predictor(data="coco", data_dir=str(tmp_path))
    metrics, results = eval.evaluate(None, c, ("det", "seg", "kpt"), truth=True)
    assert metrics["det"]["AP"] > 0.99 and metrics["seg"]["AP"] > 0.9 and metrics["kpt"]["AP"] > 0.99, metrics
    source = data.make_source(c, "val")
    for task in ("det", "seg"):
        for i in range(6):
            assert data.EXAMPLES[task](source[i], replace(Config(model=MODEL), max_points=40), np.random.default_rng(0))["labels"].min() >= -70
    people = data.make_source(c, "val", "kpt")
    drawn = [data.Shapes("val")[i] for i in range(6)]
    assert people.people == sum((r["labels"] == 4).sum() for r in drawn if r["image_id"] != 3)


def test_ids_such_as_0_and_9001_come_back_in_the_results(tmp_path, model):
    data.export_shapes(str(tmp_path), 3, 64, 0, "png")
    path = tmp_path / "annotations/instances_val2017.json"
    new = {1: 0, 2: 7, 3: 9001, 4: 12}
    truth = json.loads(path.read_text())
    for a in truth["annotations"]:
        a["category_id"] = new[a["category_id"]]
    for k in truth["categories"]:
        k["id"] = new[k["id"]]
    path.write_text(json.dumps(truth))
    c = predictor(data="coco", data_dir=str(tmp_path))
    metrics, results = eval.evaluate(None, c, ("det",), truth=True)
    assert metrics["det"]["AP"] > 0.99 and {r["category_id"] for r in results["det"]} == {a["category_id"] for a in truth["annotations"]}


def test_joints_find_their_way_back_from_the_crop():
    record = data.Shapes("val", size=200)[3]
    c = predictor()
    metrics, results = eval.evaluate(None, predictor(val_count=30), ("kpt",), truth=True)
    source = data.Shapes("val", count=30)
    for result in results["kpt"]:
        joints = [row for i in range(30) if source[i]["image_id"] == result["image_id"] for row, label in
                  zip(source[i]["keypoints"], source[i]["labels"]) if label == 4]
        found = np.array(result["keypoints"]).reshape(-1, 3)[:, [1, 0]]
        assert min(np.abs(found - j[:, :2]).max() for j in joints) < 0.1


def test_boxes_are_read_from_a_results_file(tmp_path):
    (tmp_path / "boxes.json").write_text(json.dumps([{"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]))
    assert eval.read_boxes(str(tmp_path / "boxes.json")) == {3: [{"category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]}
    (tmp_path / "boxes.json").write_text('[{"image_id": 3}]')
    with pytest.raises(ValueError, match="boxes.json: expected a list of"):
        eval.read_boxes(str(tmp_path / "boxes.json"))


# pictures and scripts

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("run")
    c = predictor()
    config = {k: v for k, v in vars(c).items() if k != "categories"} | {"model": asdict(MODEL)}
    torch.save({"network": "Pix2Seq", "model": model.state_dict(), "step": 1, "best": 0.0, "preset": "test", "config": config, "categories": c.categories}, folder / "best.pt")
    return str(folder / "best.pt")


def script(name, *arguments, cwd=None, check=True):
    done = subprocess.run([sys.executable, os.path.join(ROOT, name), *arguments], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def test_sample_answers_about_photos_of_any_size(checkpoint, tmp_path):
    for name, size in (("wide", (300, 40)), ("tall", (20, 333)), ("dot", (1, 1))):
        Image.new("RGB", size, "green").save(tmp_path / f"{name}.png")
    done = script("sample.py", "wide.png", "tall.png", "dot.png", f"--ckpt={checkpoint}", "--min_score=0", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert [(r["width"], r["height"]) for r in report] == [(300, 40), (20, 333), (1, 1)]
    for r in report:
        assert os.path.exists(tmp_path / r["picture"]) and isinstance(r["caption"], str)
        for o in r["objects"]:
            x, y, w, h = o["bbox"]
            assert 0 <= x <= x + w <= r["width"] + 1e-3 and 0 <= y <= y + h <= r["height"] + 1e-3 and o["name"]
    assert os.path.exists(tmp_path / "samples/all.png")


def test_sample_takes_held_out_items_and_repeats_itself(checkpoint, tmp_path):
    runs = [script("sample.py", f"--ckpt={checkpoint}", "--count=2", "--task=det,cap", "--seed=3", cwd=tmp_path).stdout for _ in range(2)]
    assert runs[0] == runs[1] and len(json.loads(runs[0])) == 2


def test_sample_shows_where_the_tokens_of_an_object_looked(checkpoint, tmp_path):
    script("sample.py", f"--ckpt={checkpoint}", "--count=5", "--task=det", "--attention", "--min_score=0", cwd=tmp_path)
    pictures = [name for name in os.listdir(tmp_path / "samples") if "attention" in name]
    assert pictures and Image.open(tmp_path / "samples" / pictures[0]).size[0] > 300


def test_sample_looks_at_the_boxes_it_is_told(checkpoint, tmp_path):
    Image.new("RGB", (90, 80), "green").save(tmp_path / "a.png")
    done = script("sample.py", "a.png", f"--ckpt={checkpoint}", "--task=seg,kpt", "--boxes", "10,10,30,40,figure", "5,5,20,20,circle", cwd=tmp_path)
    objects = json.loads(done.stdout)[0]["objects"]
    assert [o["name"] for o in objects] == ["figure", "circle"] and all("segmentation" in o for o in objects)
    assert len(objects[0]["keypoints"]) == 15 and "keypoints" not in objects[1]
    done = script("sample.py", "a.png", f"--ckpt={checkpoint}", "--boxes", "1,2,3,dog", cwd=tmp_path, check=False)
    assert "expected X,Y,W,H,NAME, the name one of circle" in done.stderr


@pytest.mark.parametrize("arguments, words", [
    (["nothing.jpg"], "nothing.jpg"), (["--ckpt=nowhere.pt"], "nowhere.pt: no such checkpoint"), (["--task=paint"], "this model knows det, seg, kpt, cap")])
def test_sample_names_what_is_wrong(checkpoint, tmp_path, arguments, words):
    arguments = arguments if "--ckpt" in arguments[0] else [*arguments, f"--ckpt={checkpoint}"]
    done = script("sample.py", *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_eval_prints_and_saves_all_numbers(checkpoint, tmp_path):
    done = script("eval.py", f"--ckpt={checkpoint}", "--workers=0", f"--out={tmp_path}/x", "--task=det,kpt,cap", "--limit=3")
    saved = json.loads((tmp_path / "x_metrics.json").read_text())
    assert set(eval.BOX_METRICS) <= set(saved["det"]) and len(set(eval.METRICS["kpt"]) & set(saved["kpt"])) == 10
    assert set(eval.CAPTION_METRICS) <= set(saved["cap"]) and "AR_100" in done.stdout and "CIDEr" in done.stdout
    assert isinstance(json.loads((tmp_path / "x_det.json").read_text()), list)


def test_two_processes_find_what_one_finds(checkpoint, tmp_path):
    script("eval.py", f"--ckpt={checkpoint}", "--workers=0", f"--out={tmp_path}/one", "--task=det", "--batch_size=1")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", f"{ROOT}/eval.py", f"--ckpt={checkpoint}",
                    "--workers=0", f"--out={tmp_path}/two", "--task=det", "--batch_size=1"], check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    one, two = (json.loads((tmp_path / f"{name}_det.json").read_text()) for name in ("one", "two"))
    key = lambda r: (r["image_id"], r["bbox"])
    assert sorted(one, key=key) == sorted(two, key=key) and one


def test_watch_evaluates_a_checkpoint_that_appears(checkpoint, tmp_path):
    import shutil
    process = subprocess.Popen([sys.executable, f"{ROOT}/eval.py", "--watch", f"--ckpt={tmp_path}", "--workers=0", "--task=det", "--limit=2"],
                               stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    shutil.copy(checkpoint, tmp_path / "last.pt.tmp")
    os.replace(tmp_path / "last.pt.tmp", tmp_path / "last.pt")
    try:
        assert any(line.startswith("numbers:") for line in process.stdout), "nothing was evaluated"
    finally:
        process.kill()
    assert os.path.exists(tmp_path / "last_val_metrics.json")
