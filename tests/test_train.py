import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import data
import train
from model import Pix2SeqConfig, RINConfig, UNetConfig
from sample import load_model, read_checkpoint
from train import PRESETS, Config, UsageError, parse

ROOT = os.path.dirname(os.path.abspath(train.__file__))
SMALL = ["--steps=6", "--save_every=2", "--log_every=1", "--val_count=4", "--pictures=2", "--batch_size=4", "--enc_layers=1", "--dec_layers=1",
         "--enc_dim=32", "--enc_mlp=64", "--dec_dim=32", "--dec_mlp=64", "--dropout=0.1", "--drop_path=0.1", "--workers=0", "--device=cpu"]


def run(*arguments, torchrun=0, check=True):
    command = [sys.executable, *(["-m", "torch.distributed.run", f"--nproc_per_node={torchrun}", "--standalone"] if torchrun else []),
               os.path.join(ROOT, "train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def losses(folder):
    with open(f"{folder}/log.jsonl") as f:
        return {entry["step"]: entry["loss"] for entry in map(json.loads, f) if "loss" in entry}


def same_weights(a, b):
    a, b = (read_checkpoint(f"{folder}/last.pt")["model"] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole small run on drawn shapes."""
    folder = str(tmp_path_factory.mktemp("run") / "whole")
    done = run(*SMALL, f"--out={folder}")
    return folder, done.stdout


# command line

def test_command_line_is_typed_by_the_fields():
    name, config, actions = parse(["det_shapes", "--lr=3e-4", "--steps", "7", "--flip", "--compile=off", "--image_size=96", "--enc_dim=48"])
    assert (name, config.lr, config.steps, config.flip, config.compile) == ("det_shapes", 3e-4, 7, True, "off")
    assert config.model.image_size == (96, 96) and config.model.enc_dim == 48 and config.out == "out/det_shapes" and not actions


@pytest.mark.parametrize("arguments, words", [
    (["--lrr=1"], "did you mean 'lr'"), (["det_shaps"], "did you mean 'det_shapes'"), (["--lr=fast"], "--lr=fast: expected float"),
    (["--flip=maybe"], "expected bool"), (["--image_size=1,2,3"], "one or two integers"), (["--steps"], "expected a value"), (["--enc_dimm=3"], "enc_dim")])
def test_a_wrong_command_line_names_the_nearest(arguments, words, capsys):
    with pytest.raises(UsageError):
        parse(arguments)
    assert words in capsys.readouterr().err


def test_every_field_has_its_meaning_in_the_help():
    for part in (Config(), Pix2SeqConfig(), RINConfig(), UNetConfig()):
        missing = set(vars(part)) - set(train.field_help(type(part))) - {"model"}
        assert not missing, f"no comment beside {missing}"
        assert isinstance(part, Config) or not set(vars(Config())) & set(vars(part)), "a key would be ambiguous"


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.config.tasks != "gen"])
def test_every_preset_shrunk_takes_a_step_and_evaluates(preset, tmp_path):
    config = PRESETS[preset].config
    small = replace(config.model, image_size=(64, 64), patch_size=16, resnet_width=0.125, enc_layers=1, enc_dim=32, enc_mlp=64, enc_heads=2,
                    dec_layers=1, dec_dim=32, dec_mlp=64, dec_heads=2)
    options = dict(steps=1, batch_size=2, workers=0, max_objects=5, max_points=12, seg_samples=1, caption_length=20, val_count=2, device="cpu", task_starts="",
                   out=str(tmp_path / "run"), eval_images=0)
    if config.data == "coco":
        data.export_shapes(str(tmp_path), 4, 64, 0, "jpg")
        options["data_dir"] = str(tmp_path)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    metrics = train.train(train.Run(preset, replace(config, **options, model=small)))
    signal.signal(signal.SIGINT, handlers[0]), signal.signal(signal.SIGTERM, handlers[1])
    assert all(0 <= train.headline(task, m) <= 1 for task, m in metrics.items()), metrics
    model, c = load_model(str(tmp_path / "run/best.pt"), torch.device("cpu"))
    assert c.model == small and {category["name"] for category in c.categories} <= set(data.KINDS)


# optimisation

@pytest.mark.parametrize("schedule", ["linaer", "linear@3", "exp", "cosine@", ""])
def test_an_unknown_schedule_lists_the_choices(schedule):
    with pytest.raises(ValueError, match="expected linear, cosine"):
        train.learning_rate(5, 1.0, schedule, 0, 10, 0.0)


def test_learning_rate_rises_and_falls_to_its_end():
    rate = lambda step, schedule="linear": train.learning_rate(step, 2.0, schedule, 10, 110, 0.1)
    assert [rate(0), rate(5), rate(10), rate(60), rate(110), rate(500)] == pytest.approx([0, 1, 2, 1.1, 0.2, 0.2])
    assert rate(60, "cosine") == pytest.approx(1.1) and rate(60, "none") == 2 and rate(110, "cosine@0.5") == pytest.approx(1.1)


def two_parameters():
    generator = torch.Generator().manual_seed(0)
    return [("fc.weight", torch.nn.Parameter(torch.randn(6, 4, generator=generator))), ("fc.bias", torch.nn.Parameter(torch.zeros(6)))]


def test_a_lamb_step_is_as_long_as_its_parameter_times_the_rate_but_adams_where_there_is_no_decay():
    named = two_parameters()
    (weight, bias), before = [p for _, p in named], named[0][1].detach().clone()
    optimizer = train.make_optimizer(named, Config(optimizer="lamb", lr=0.01, no_decay="bias"), torch.device("cpu"))
    for p in (weight, bias):
        p.grad = torch.full_like(p, 1000.0)
    optimizer.step()
    assert (weight - before).norm().item() == pytest.approx(0.01 * before.norm().item(), rel=1e-4)
    assert torch.allclose(bias, torch.full((6,), -0.01))
    for p in (weight, bias):
        p.detach().zero_()
    optimizer.step()                                   # a parameter of norm 0 has a way to leave it
    assert weight.isfinite().all() and (weight != 0).all()


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_an_optimizer_goes_on_from_its_saved_state_bit_for_bit(name, tmp_path):
    named = two_parameters()
    c, grads = Config(optimizer=name, lr=0.01, no_decay="bias"), torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(1))
    optimizer = train.make_optimizer(named, c, torch.device("cpu"))
    for i, grad in enumerate(grads):
        if i == 2:
            train.save(str(tmp_path / "saved.pt"), {"weights": [p.detach() for _, p in named], "optimizer": optimizer.state_dict()})
        named[0][1].grad, named[1][1].grad = grad.clone(), grad.mean(1)
        optimizer.step()
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    again = [(key, torch.nn.Parameter(w)) for (key, _), w in zip(named, saved["weights"])]
    optimizer = train.make_optimizer(again, c, torch.device("cpu"))
    optimizer.load_state_dict(saved["optimizer"])
    for grad in grads[2:]:
        again[0][1].grad, again[1][1].grad = grad.clone(), grad.mean(1)
        optimizer.step()
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named, again))


def test_an_unknown_optimizer_lists_the_choices():
    with pytest.raises(ValueError, match="unknown optimizer 'lion', expected adamw or lamb"):
        train.make_optimizer(two_parameters(), Config(optimizer="lion"), torch.device("cpu"))


def test_one_batch_can_be_learned_by_heart(tiny_config):
    from tokenizer import Vocab, encode_detection
    from model import Pix2Seq, token_loss
    torch.manual_seed(0)
    model = Pix2Seq(tiny_config).train()
    corners = torch.rand(4, 3, 2, 2).sort(2).values.view(4, 3, 4)
    tokens = encode_detection(corners, torch.randint(1, 9, (4, 3)), Vocab(100, 110, 210, 210))
    images = torch.rand(4, 3, 32, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(300):
        loss = token_loss(model(images, tokens.inputs), tokens.targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, loss
    written = model.eval().generate(model.encode(images), tokens.inputs[:, :1], 15, temperature=0).tokens[:, 0]
    assert torch.equal(written, tokens.targets)


# runs

def test_a_run_leaves_its_files_and_says_what_is_next(finished):
    folder, output = finished
    assert {"best.pt", "last.pt", "log.jsonl", "step_0000006.png"} <= set(os.listdir(folder))
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6]
    assert re.search(r"det: AP \d\.\d+, AP50 \d\.\d+, AP75 \d\.\d+ on 4 held-out images", output) and "python sample.py --ckpt=" in output


def test_a_finished_run_only_says_its_result_again(finished):
    before = losses(finished[0])
    output = run(*SMALL, f"--out={finished[0]}").stdout
    assert "on 4 held-out images" in output and losses(finished[0]) == before


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_ends_bit_identical_to_an_uninterrupted_one(how, finished, tmp_path):
    folder = str(tmp_path / "run")
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *SMALL, f"--out={folder}"], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    for line in process.stdout:
        if line.startswith("step       3"):
            process.send_signal(how)
            break
    rest = process.stdout.read()
    code = process.wait()
    assert code == (-9 if how == signal.SIGKILL else 128 + how), rest
    stopped = read_checkpoint(f"{folder}/last.pt")["step"]
    assert 2 <= stopped < 6, stopped
    run(*SMALL, f"--out={folder}")
    assert same_weights(folder, finished[0]) and losses(folder) == losses(finished[0])


def test_killed_while_saving_the_last_checkpoint_stands(finished, tmp_path, monkeypatch):
    path = str(tmp_path / "last.pt")
    train.save(path, {"config": {"a": 1}, "step": 1})

    def half(content, f):
        f.write(b"half of a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        train.save(path, {"config": {"a": 1}, "step": 2})
    assert read_checkpoint(path)["step"] == 1


def test_another_configuration_does_not_go_on_from_a_run(finished):
    done = run(*SMALL, f"--out={finished[0]}", "--lr=0.5", check=False)
    assert done.returncode != 0 and re.search("lr: [0-9.]+ there, 0.5 here", done.stderr)


def test_fresh_moves_the_earlier_run_aside(finished, tmp_path):
    import shutil
    folder = str(tmp_path / "run")
    shutil.copytree(finished[0], folder)
    run(*SMALL, f"--out={folder}", "--fresh")
    assert same_weights(folder, folder + ".1") and losses(folder) == losses(finished[0])


def test_a_task_joins_at_its_step(tmp_path):
    several = [*SMALL, "--tasks=det,cap", "--task_starts=0,3", "--steps=4"]
    run(*several, f"--out={tmp_path}/run")
    with open(f"{tmp_path}/run/log.jsonl") as f:
        logged = {entry["step"]: entry for entry in map(json.loads, f) if "loss" in entry}
    assert ["loss_cap" in logged[step] for step in (1, 2, 3, 4)] == [False, False, False, True]
    assert logged[1]["loss"] == logged[1]["loss_det"] and logged[4]["loss"] == pytest.approx(logged[4]["loss_det"] + logged[4]["loss_cap"])
    refused = run(*several, f"--out={tmp_path}/other", "--task_starts=1,3", check=False)
    assert refused.returncode == 1 and "expected a task that starts at step 0" in refused.stderr


def test_two_processes_give_the_result_of_one(tmp_path):
    still = [*SMALL, "--dropout=0", "--drop_path=0"]
    for name, processes in (("one", 0), ("two", 2)):
        run(*still, f"--out={tmp_path / name}", torchrun=processes)
    run(*still, f"--out={tmp_path / 'parts'}", "--accumulate=2")
    one = read_checkpoint(str(tmp_path / "one/last.pt"))
    for other in ("two", "parts"):
        found = read_checkpoint(str(tmp_path / other / "last.pt"))
        worst = max((one["model"][k] - found["model"][k]).abs().max().item() for k in one["model"])
        assert worst < 1e-5, f"{other}: weights differ by {worst}"
        assert losses(tmp_path / other) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        assert found["best"] == pytest.approx(one["best"], abs=1e-6)


def test_a_finetune_to_other_classes_is_refused_until_adapt_says_it_is_meant(finished, tmp_path):
    data.export_shapes(str(tmp_path), 6, 64, 0, "jpg")
    for split in ("train", "val"):
        path = tmp_path / f"annotations/instances_{split}2017.json"
        truth = json.loads(path.read_text())
        new = {1: (0, "circle"), 2: (7, "box"), 3: (9001, "wedge"), 4: (12, "person")}
        for k in truth["categories"]:
            k["id"], k["name"] = new[k["id"]]
        for a in truth["annotations"]:
            a["category_id"] = new[a["category_id"]][0]
        path.write_text(json.dumps(truth))
    command = [*SMALL, "--data=coco", f"--data_dir={tmp_path}", f"--init_from={finished[0]}", f"--out={tmp_path / 'run'}", "--coord_shift=120", "--text_shift=184",
               "--vocab_size=442", "--image_size=96"]
    refused = run(*command, check=False)
    assert refused.returncode == 1 and "has other classes" in refused.stderr and not os.path.exists(tmp_path / "run/last.pt"), refused.stderr
    output = run(*command, "--adapt").stdout
    assert "adapted: decoder.embed: vocabulary of 432, the model has 442" in output and "classes are others there" in output, output
    _, c = load_model(str(tmp_path / "run/best.pt"), torch.device("cpu"))
    assert [(k["id"], k["label"]) for k in c.categories] == [(0, 1), (7, 7), (9001, 2), (12, 12)]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    done = run(*SMALL, f"--out={tmp_path / 'run'}", "--lr=1e30", "--warmup_steps=2", check=False)
    assert done.returncode != 0 and re.search(r"loss is {'loss_det': (nan|inf)} at step \d", done.stderr), done.stderr
    assert read_checkpoint(str(tmp_path / "run/last.pt"))["step"] == 2


def test_checkpoints_of_strangers_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"config": {}, "model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt: not a whole checkpoint"):
        read_checkpoint(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()


def test_a_truncated_checkpoint_is_named(finished, tmp_path):
    whole = open(f"{finished[0]}/last.pt", "rb").read()
    (tmp_path / "last.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="last.pt: not a whole checkpoint"):
        read_checkpoint(str(tmp_path / "last.pt"))


def test_data_that_is_not_there_is_an_error_without_a_traceback(tmp_path):
    done = run("det_coco_tiny", f"--data_dir={tmp_path}", f"--out={tmp_path / 'run'}", check=False)
    assert done.returncode == 1 and "instances_train2017.json: no such file" in done.stderr and "Traceback" not in done.stderr
    done = run("det_coco_tiny", f"--out={tmp_path / 'run'}", check=False)
    assert "--data_dir" in done.stderr and "Traceback" not in done.stderr
