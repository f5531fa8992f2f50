"""The loop: command line, presets, optimisation, runs that are interrupted, checkpoints."""
import copy
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, run
from PIL import Image

import data
import eval
import model
import tokenizer
import train
from model import (
    Device,
    FITConfig,
    Pix2Seq,
    Pix2SeqConfig,
    RINConfig,
    UNetConfig,
    load,
    save,
    token_losses,
)
from sample import changed, load_model
from tokenizer import Vocab, encode_detection
from train import PRESETS, Config, OptimConfig, parse

SMALL = [
    "--steps=6", "--save_every=2", "--log_every=1", "--val_count=4", "--pictures=2",
    "--batch_size=4", "--enc_layers=1", "--dec_layers=1", "--enc_dim=32", "--enc_mlp=64",
    "--dec_dim=32", "--dec_mlp=64", "--dropout=0.1", "--drop_path=0.1", "--workers=0",
    "--device=cpu"]


def small_config(folder, **changes):
    """The configuration of SMALL, for runs in this process."""
    c, _ = parse([*SMALL, f"--out={folder}"])
    return changed(c, **changes)


def logged(folder):
    with open(f"{folder}/log.jsonl") as f:
        return [json.loads(line) for line in f]


def losses(folder):
    return {entry["step"]: entry["loss"] for entry in logged(folder) if "loss" in entry}


def same_weights(a, b):
    a, b = (load(f"{folder}/last.pt")["model"] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(autouse=True)
def signals():
    """Runs in this process catch signals; afterwards they are as before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole small run on drawn shapes: its folder and what it printed."""
    folder = str(tmp_path_factory.mktemp("run") / "whole")
    return folder, run("train.py", *SMALL, f"--out={folder}").stdout


# --------------------------------------------------------------------------------------------------
# command line and presets

def test_command_line_is_typed_by_the_fields():
    c, args = parse([
        "det_shapes", "--lr=3e-4", "--steps", "7", "--flip", "--compile=off", "--image_size=96",
        "--enc_dim=48", "--tasks=det,seg", "--task-weights=1,0.5"])
    assert (c.optim.lr, c.optim.steps, c.data.flip, c.run.compile) == (3e-4, 7, True, "off")
    assert c.model.image_size == (96, 96) and c.model.enc_dim == 48
    assert c.data.tasks == ("det", "seg") and c.optim.task_weights == (1.0, 0.5)
    assert c.run.out == "out/det_shapes" and not args.list and not args.bench


@pytest.mark.parametrize("arguments, words", [
    (["--lrr=1"], "did you mean '--lr'"),
    (["det_shaps"], "did you mean 'det_shapes'"),
    (["--lr=fast"], "--lr: expected a number above 0, got 'fast'"),
    (["--flip=maybe"], "expected true or false, got 'maybe'"),
    (["--image_size=1,2,3"], "expected a whole number of at least 1, several between commas"),
    (["--steps"], "expected one argument"),
    (["--enc_dimm=3"], "enc_dim"),
])
def test_a_wrong_command_line_names_the_nearest(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_every_field_has_its_meaning_in_the_help(capsys):
    for network in (Pix2SeqConfig(), RINConfig(), UNetConfig(), FITConfig()):
        for part in train.sample.parts_of(replace(Config(), model=network)):
            parser = train.sample.Parser()
            parser.add_config(part)
            helped = parser.format_help()
            missing = [f.name for f in fields(part) if f"--{f.name} " not in helped]
            assert not missing, f"no comment beside {missing} of {type(part).__name__}"


def test_help_shows_options_and_list_shows_presets(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["gen_shapes", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "--sample_steps" in out and "default: 50)" in out
    listed = run("train.py", "--list").stdout
    assert all(name in listed for name in PRESETS)


@pytest.mark.parametrize(
    "name", [n for n, p in PRESETS.items() if isinstance(p.config.model, Pix2SeqConfig)])
def test_every_preset_shrunk_takes_a_step_and_evaluates(name, tmp_path):
    c = PRESETS[name].config
    shrunk = replace(
        c.model, image_size=(64, 64), patch_size=16, resnet_width=0.125, enc_layers=1, enc_dim=32,
        enc_mlp=64, enc_heads=2, dec_layers=1, dec_dim=32, dec_mlp=64, dec_heads=2)
    options = dict(
        steps=1, batch_size=2, task_batches=(), task_starts=(), workers=0, max_objects=5,
        max_points=12, seg_samples=1, caption_length=20, val_count=2, device="cpu",
        out=str(tmp_path / "run"), eval_images=0)
    if c.data.data == "coco":
        data.export_shapes(str(tmp_path), 4, 64, "jpg")
        options["data_dir"] = str(tmp_path)
    metrics = train.train(changed(replace(c, model=shrunk), **options))
    assert set(metrics) == set(c.data.tasks)
    assert all(0 <= next(iter(numbers.values())) <= 1 for numbers in metrics.values()), metrics
    _, found = load_model(str(tmp_path / "run/best.pt"), Device("cpu"))
    assert found.model == shrunk
    assert {category["name"] for category in found.categories} <= set(data.KINDS)


# --------------------------------------------------------------------------------------------------
# optimisation

@pytest.mark.parametrize("schedule", ["linaer", "linear@3", "exp", "cosine@", ""])
def test_an_unknown_schedule_lists_the_choices(schedule):
    with pytest.raises(ValueError, match="expected linear, cosine"):
        train.learning_rate(5, OptimConfig(lr_schedule=schedule, steps=10))


def test_learning_rate_rises_and_falls_to_its_end():
    def rate(step, schedule="linear"):
        optim = OptimConfig(
            lr=2.0, lr_schedule=schedule, warmup_steps=10, steps=110, end_lr_factor=0.1)
        return train.learning_rate(step, optim)

    rates = [rate(step) for step in (0, 5, 10, 60, 110, 500)]
    assert rates == pytest.approx([0, 1, 2, 1.1, 0.2, 0.2])
    assert rate(60, "cosine") == pytest.approx(1.1) and rate(60, "none") == 2
    assert rate(110, "cosine@0.5") == pytest.approx(1.1)
    assert rate(60, "exp@0.25") == pytest.approx(1.0)


def two_parameters():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 4, generator=generator))
    return [("fc.weight", weight), ("fc.bias", torch.nn.Parameter(torch.zeros(6)))]


def test_a_lamb_step_is_as_long_as_its_parameter_times_the_rate_but_adams_without_decay():
    named = two_parameters()
    (weight, bias), before = [p for _, p in named], named[0][1].detach().clone()
    optim = OptimConfig(optimizer="lamb", lr=0.01, no_decay="bias")
    optimizer = train.make_optimizer(named, optim)
    for p in (weight, bias):
        p.grad = torch.full_like(p, 1000.0)
    optimizer.step()
    step = (weight - before).norm().item()
    assert step == pytest.approx(0.01 * before.norm().item(), rel=1e-4)
    assert torch.allclose(bias, torch.full((6,), -0.01))
    for p in (weight, bias):
        p.detach().zero_()
    optimizer.step()                                   # a parameter of norm 0 has a way to leave it
    assert weight.isfinite().all() and (weight != 0).all()


def test_lamb_scales_keys_and_values_apart_as_the_variables_of_the_reference():
    """One step of Adam is the sign of the gradient, so each variable's is known by hand."""
    attention = model.Attention(8, 2)
    with torch.no_grad():
        attention.kv.weight[8:] *= 10                  # values much longer than keys
    keys, values = attention.kv.weight.detach().clone().chunk(2)
    grad = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    attention.kv.weight.grad = grad.clone()
    named = [(f"self_att.{name}", p) for name, p in attention.named_parameters()]
    optim = OptimConfig(optimizer="lamb", lr=0.01, no_decay="bias", weight_decay=0.1)
    train.make_optimizer(named, optim).step()

    def by_hand(variable, grad):
        update = grad.sign() + 0.1 * variable
        return variable - 0.01 * variable.norm() / update.norm() * update

    split = torch.cat([by_hand(keys, grad[:8]), by_hand(values, grad[8:])])
    joined = by_hand(torch.cat([keys, values]), grad)
    assert torch.allclose(attention.kv.weight, split, atol=1e-6)
    assert not torch.allclose(attention.kv.weight, joined, atol=1e-3)


def test_orthogonal_takes_singular_values_to_about_one_and_keeps_the_directions():
    for shape in ((3, 6, 10), (2, 10, 6), (1, 8, 8)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        u, values, v = torch.linalg.svd(train.orthogonal(x), full_matrices=False)
        assert values.min() > 0.6 and values.max() < 1.3
        nearest = torch.linalg.svd(x, full_matrices=False)
        overlap = (train.orthogonal(x) * (nearest.U @ nearest.Vh)).sum((1, 2)) / min(shape[1:])
        assert (overlap > 0.8).all()


def test_muon_makes_matrices_orthogonal_each_variable_by_itself_and_the_rest_as_adam():
    attention, tables = model.Attention(8, 2), model.embedding(5, 8)
    named = [(f"self_att.{name}", p) for name, p in attention.named_parameters()]
    named.append(("embed", tables))
    before = {name: p.detach().clone() for name, p in named}
    for n, (_, p) in enumerate(named):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
    optim = OptimConfig(optimizer="muon", lr=0.01, weight_decay=0.1, no_decay="bias")
    train.make_optimizer(named, optim).step()
    change = {name: (before[name] - p.detach()) / 0.01 for name, p in named}
    for half in (change["self_att.kv.weight"] - 0.1 * before["self_att.kv.weight"]).chunk(2):
        values = torch.linalg.svdvals(half) / (0.2 * 8 ** 0.5)         # as long as Adam's step
        assert values.min() > 0.6 and values.max() < 1.3
    for name in ("self_att.kv.bias", "embed"):
        p, decay = dict(named)[name], 0.0 if name.endswith("bias") else 0.1
        assert torch.allclose(change[name], p.grad.sign() + decay * before[name], atol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "lamb", "muon"])
def test_an_optimizer_goes_on_from_its_saved_state_bit_for_bit(name):
    def advance(named, optimizer, grads):
        for grad in grads:
            named[0][1].grad, named[1][1].grad = grad.clone(), grad.mean(1)
            optimizer.step()

    named, optim = two_parameters(), OptimConfig(optimizer=name, lr=0.01, no_decay="bias")
    grads = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(1))
    optimizer = train.make_optimizer(named, optim)
    advance(named, optimizer, grads[:2])
    again = [(key, torch.nn.Parameter(p.detach().clone())) for key, p in named]
    state = copy.deepcopy(optimizer.state_dict())
    advance(named, optimizer, grads[2:])
    optimizer = train.make_optimizer(again, optim)
    optimizer.load_state_dict(state)
    advance(again, optimizer, grads[2:])
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named, again))


def test_an_unknown_optimizer_lists_the_choices():
    with pytest.raises(ValueError, match="optimizer is 'lion', expected one of adamw, lamb, muon"):
        tokenizer.check_fields(OptimConfig(optimizer="lion"))


def test_one_batch_can_be_overfit(tiny_config):
    torch.manual_seed(0)
    network = Pix2Seq(tiny_config).train()
    corners = torch.rand(4, 3, 2, 2).sort(2).values.view(4, 3, 4)
    tokens = encode_detection(corners, torch.randint(1, 9, (4, 3)), Vocab(100, 110, 210))
    images = torch.rand(4, 3, 32, 32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(300):
        loss = token_losses(network(images, tokens.inputs), tokens.targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, loss
    context, prompts = network.eval().encode(images), tokens.inputs[:, :1]
    written = network.generate(context, prompts, 15, temperature=0).tokens[:, 0]
    assert torch.equal(written, tokens.targets)


# --------------------------------------------------------------------------------------------------
# runs

def test_a_run_leaves_its_files_and_says_what_is_next(finished):
    folder, output = finished
    assert {"best.pt", "last.pt", "log.jsonl", "step_0000006"} <= set(os.listdir(folder))
    assert {"all.png", "val_1.png"} <= set(os.listdir(f"{folder}/step_0000006"))
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5, 6]
    assert re.search(r"det: AP \d\.\d+, AP50 \d\.\d+, AP75 \d\.\d+", output)
    assert "python sample.py --ckpt=" in output


def test_a_finished_run_only_says_its_result_again(finished):
    before = losses(finished[0])
    output = run("train.py", *SMALL, f"--out={finished[0]}").stdout
    assert "det: AP" in output and losses(finished[0]) == before
    assert "going on from step 6; a larger --steps goes further" in output
    steps = [entry["step"] for entry in logged(finished[0]) if "det_AP" in entry]
    assert steps == [6], "its evaluation stands in the log once"


def test_a_run_of_an_earlier_muon_is_refused_by_name(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    content = load(f"{tmp_path}/run/last.pt")
    for state in content["optimizer"]["state"].values():
        state["first"] = state.pop("step")
    save(f"{tmp_path}/run/last.pt", content)
    done = run("train.py", *SMALL, f"--out={tmp_path}/run", check=False)
    assert done.returncode == 1 and "which kept no 'step': --init_from=" in done.stderr


def test_a_finished_run_goes_on_with_more_steps_and_not_with_fewer(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    output = run("train.py", *SMALL, "--steps=8", f"--out={tmp_path}/run").stdout
    assert "of 6 steps: the learning rate goes on as if it had been one of 8" in output
    assert load(f"{tmp_path}/run/last.pt")["step"] == 8
    kept = losses(tmp_path / "run")
    assert kept.items() > losses(finished[0]).items() and len(kept) == 8
    rates = [entry["lr"] for entry in logged(tmp_path / "run") if "lr" in entry]
    recipe = OptimConfig(**load(f"{tmp_path}/run/last.pt")["config"]["optim"])
    assert recipe.steps == 8 and rates[6:] == [train.learning_rate(n, recipe) for n in (6, 7)]
    done = run("train.py", *SMALL, f"--out={tmp_path}/run", check=False)
    assert done.returncode == 1 and "steps: 8 there, 6 here" in done.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_ends_bit_identical_to_an_uninterrupted_one(how, finished, tmp_path):
    folder = str(tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "train.py"), *SMALL, f"--out={folder}"],
        stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    for line in process.stdout:
        if line.startswith("step       3"):
            process.send_signal(how)
            break
    rest = process.stdout.read()
    code = process.wait()
    assert code == (-9 if how == signal.SIGKILL else 130), rest
    stopped = load(f"{folder}/last.pt")["step"]
    assert 2 <= stopped < 6, stopped
    run("train.py", *SMALL, f"--out={folder}")
    assert same_weights(folder, finished[0]) and losses(folder) == losses(finished[0])


@pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="needs requirements-tpu.txt")
def test_xla_learns_what_the_cpu_learns_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "PJRT_DEVICE", "CPU")
    calm = [*SMALL, "--dropout=0", "--drop_path=0", "--pictures=0"]        # no random numbers
    run("train.py", *calm, f"--out={tmp_path}/cpu", process=True)
    process = subprocess.Popen(
        [sys.executable, f"{ROOT}/train.py", *calm, "--device=xla", f"--out={tmp_path}/xla"],
        stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True)
    for line in process.stdout:
        if line.startswith("step       3"):
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.wait()
    assert load(f"{tmp_path}/xla/last.pt")["step"] == 2
    done = run("train.py", *calm, "--device=xla", f"--out={tmp_path}/xla", process=True)
    assert "going on from step 2" in done.stdout and "det: AP" in done.stdout
    ours, theirs = losses(f"{tmp_path}/xla"), losses(f"{tmp_path}/cpu")
    assert len(ours) == 6 and ours == pytest.approx(theirs, rel=1e-5)


def test_xla_does_not_predict(finished):
    with pytest.raises(ValueError, match="--device=xla is for training"):
        load_model(f"{finished[0]}/last.pt", SimpleNamespace(type="xla"))


def test_an_option_of_sampling_that_no_longer_exists_is_passed_over(finished, tmp_path):
    content = load(f"{finished[0]}/last.pt")
    content["config"]["sampling"] |= {"stats_dir": "x", "top_p": 0.3}
    save(str(tmp_path / "older.pt"), content)
    _, c = load_model(str(tmp_path / "older.pt"), Device("cpu"))
    assert c.sampling.top_p == 0.3


def test_float16_scales_its_losses_and_goes_on_with_that_scale(tmp_path, monkeypatch):
    for folder in ("whole", "parts"):
        c = small_config(tmp_path / folder, dtype="float16", pictures=0)
        if folder == "parts":
            with monkeypatch.context() as patch:
                patch.setattr(train.Device, "stopping", lambda self, step: step == 3)
                assert train.train(c) is None
        train.train(c)
    whole, parts = (load(f"{tmp_path}/{folder}/last.pt")["scaler"] for folder in ("whole", "parts"))
    assert whole == parts and whole["scale"] > 1 and whole["_growth_tracker"] > 3
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_an_evaluation_that_fails_loses_nothing_and_is_made_up_for(tmp_path, monkeypatch):
    c = small_config(tmp_path / "run", eval_every=3, save_every=3)

    def fail(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(train, "evaluate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train.train(c)
    assert load(f"{c.run.out}/last.pt")["step"] == 3
    monkeypatch.setattr(train, "evaluate", eval.evaluate)
    train.train(c)
    assert [entry["step"] for entry in logged(c.run.out) if "det_AP" in entry] == [3, 6]
    assert load(f"{c.run.out}/last.pt")["step"] == 6
    assert sorted(losses(c.run.out)) == [1, 2, 3, 4, 5, 6]


def test_killed_while_saving_the_last_checkpoint_stands(tmp_path, monkeypatch):
    path, content = str(tmp_path / "last.pt"), {"network": "RIN", "config": {}, "model": {}}
    save(path, content | {"step": 1})

    def half(content, f):
        f.write(b"half of a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save(path, content | {"step": 2})
    assert load(path)["step"] == 1 and os.listdir(tmp_path) == ["last.pt"]


def test_another_configuration_does_not_go_on_from_a_run(finished):
    with pytest.raises(ValueError, match="last.pt is of another run .lr: [0-9.]+ there, 0.5 here"):
        train.train(small_config(finished[0], lr=0.5))


def test_sampling_and_the_run_may_change_when_it_goes_on(finished):
    c = small_config(finished[0], top_p=0.5, log_every=2, checkpointing=True)
    assert "AP" in train.train(c)["det"]


def test_a_run_stops_where_its_target_is_reached_and_goes_on_without_it(
        tmp_path, monkeypatch, capsys):
    def evaluate_run(model, c, device, step, done):
        return {"det": {"AP": 0.1 * step, "AP50": 0.2 * step}}

    monkeypatch.setattr(train, "evaluate_run", evaluate_run)
    c = small_config(tmp_path / "run", target=0.7, eval_every=2, steps=12)
    assert train.train(c) == {"det": {"AP": pytest.approx(0.4), "AP50": pytest.approx(0.8)}}
    stopped = load(f"{c.run.out}/last.pt")["step"]
    assert 4 <= stopped < 12 and "AP50 0.800 after 0.0" in capsys.readouterr().out
    c = replace(c, run=replace(c.run, target=0.0))
    assert train.train(c)["det"]["AP50"] == pytest.approx(2.4)         # of step 12


def test_a_process_beside_the_first_ends_well_where_the_target_is_reached(tmp_path):
    """torchrun takes an exit code other than 0 of any process for a failure."""
    device = SimpleNamespace(first=False, quiet=True, world=2, name="cpu", say=lambda text: None)
    log = train.Log(small_config(tmp_path), device, torch.nn.Linear(1, 1), 0)
    assert log.stopped(4) == {}


def test_two_swapped_class_names_are_not_the_same_run(tmp_path):
    data.export_shapes(str(tmp_path), 6, 64, "jpg")
    c = small_config(tmp_path / "run", data="coco", data_dir=str(tmp_path), steps=1)
    train.train(c)
    for split in ("train", "val"):
        path = tmp_path / f"annotations/instances_{split}2017.json"
        text = path.read_text().replace("circle", "?").replace("square", "circle")
        path.write_text(text.replace("?", "square"))
    words = "classes: 1 circle, 2 square, 3 triangle, 4 figure there, 1 square, 2 circle"
    with pytest.raises(ValueError, match=words):
        train.train(c)


def test_fresh_moves_the_earlier_run_aside(finished, tmp_path):
    folder = str(tmp_path / "run")
    shutil.copytree(finished[0], folder)
    run("train.py", *SMALL, f"--out={folder}", "--fresh")
    assert same_weights(folder, folder + ".1") and losses(folder) == losses(finished[0])


def test_fresh_with_a_wrong_configuration_leaves_the_earlier_run_in_place(finished, tmp_path):
    folder = str(tmp_path / "run")
    shutil.copytree(finished[0], folder)
    with pytest.raises(ValueError, match="unknown lr_schedule"):
        train.train(small_config(folder, fresh=True, lr_schedule="linaer"))
    assert os.listdir(tmp_path) == ["run"] and same_weights(folder, finished[0])


def test_a_task_joins_at_its_step(tmp_path):
    several = [*SMALL, "--tasks=det,cap", "--task_starts=0,3", "--steps=4"]
    run("train.py", *several, f"--out={tmp_path}/run")
    steps = {entry["step"]: entry for entry in logged(tmp_path / "run") if "loss" in entry}
    assert ["loss_cap" in steps[step] for step in (1, 2, 3, 4)] == [False, False, False, True]
    assert steps[1]["loss"] == steps[1]["loss_det"]
    assert steps[4]["loss"] == pytest.approx(steps[4]["loss_det"] + steps[4]["loss_cap"])
    refused = run("train.py", *several, f"--out={tmp_path}/other", "--task_starts=1,3", check=False)
    assert refused.returncode == 1 and "a task that starts at step 0" in refused.stderr


def test_two_processes_give_the_result_of_one(tmp_path):
    # Not Muon: it makes the rounding in a direction without gradient as long as any other.
    still = [*SMALL, "--dropout=0", "--drop_path=0", "--optimizer=adamw", "--lr=2e-3"]
    for name, processes in (("one", 0), ("two", 2)):
        run("train.py", *still, f"--out={tmp_path / name}", torchrun=processes)
    run("train.py", *still, f"--out={tmp_path / 'parts'}", "--accumulate=2")
    one = load(str(tmp_path / "one/last.pt"))["model"]
    best = load(str(tmp_path / "one/best.pt"))["best"]
    for other in ("two", "parts"):
        found = load(str(tmp_path / other / "last.pt"))["model"]
        worst = max((one[k] - found[k]).abs().max().item() for k in one)
        assert worst < 1e-5, f"{other}: weights differ by {worst}"
        assert losses(tmp_path / other) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        assert load(str(tmp_path / other / "best.pt"))["best"] == pytest.approx(best, abs=1e-6)


def test_a_finetune_to_other_classes_is_refused_until_adapt_says_it_is_meant(finished, tmp_path):
    data.export_shapes(str(tmp_path), 6, 64, "jpg")
    new = {1: (0, "circle"), 2: (7, "box"), 3: (9001, "wedge"), 4: (12, "person")}
    for split in ("train", "val"):
        path = tmp_path / f"annotations/instances_{split}2017.json"
        truth = json.loads(path.read_text())
        for category in truth["categories"]:
            category["id"], category["name"] = new[category["id"]]
        for annotation in truth["annotations"]:
            annotation["category_id"] = new[annotation["category_id"]][0]
        path.write_text(json.dumps(truth))
    command = [
        *(option for option in SMALL if "val_count" not in option),
        "--data=coco", f"--data_dir={tmp_path}", f"--init_from={finished[0]}",
        f"--out={tmp_path / 'run'}", "--vocab_size=442", "--image_size=96"]
    refused = run("train.py", *command, check=False)
    assert refused.returncode == 1 and "has other classes" in refused.stderr, refused.stderr
    assert not os.path.exists(tmp_path / "run/last.pt")
    output = run("train.py", *command, "--adapt").stdout
    assert "adapted: decoder.embed: 432 rows, the model has 442" in output, output
    assert "classes differ, their tokens start afresh" in output, output
    _, c = load_model(str(tmp_path / "run/best.pt"), Device("cpu"))
    assert [(k["id"], k["label"]) for k in c.categories] == [(0, 1), (7, 7), (9001, 2), (12, 3)]


def test_another_vocabulary_or_network_is_not_started_from(finished, tmp_path):
    start = dict(init_from=finished[0], out=str(tmp_path / "run"), adapt=True)
    with pytest.raises(ValueError, match="has coord_shift 110, not 109"):
        train.train(small_config(tmp_path / "run", coord_shift=109, **start))
    c = changed(PRESETS["gen_shapes"].config, device="cpu", **start)
    with pytest.raises(ValueError, match="holds a Pix2Seq, not a UNet"):
        train.train(c)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    options = f"--out={tmp_path / 'run'}", "--lr=1e30", "--warmup_steps=2"
    done = run("train.py", *SMALL, *options, check=False)
    assert done.returncode != 0, done.stdout
    assert re.search(r"the loss is {'det': (nan|inf)}", done.stderr), done.stderr
    assert load(str(tmp_path / "run/last.pt"))["step"] == 2


def test_the_speed_of_training_and_of_prediction_is_measured(tmp_path, monkeypatch, capsys):
    class ShortTimer(train.Timer):
        def blocked_autorange(self, min_run_time):
            return super().blocked_autorange(min_run_time=0.01)

    monkeypatch.setattr(train, "Timer", ShortTimer)
    argv = ["train.py", *SMALL, "--bench", "--json", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()
    output = capsys.readouterr().out
    units = {"decode": "tokens", "16 objects": "polygons"}
    for part in ("data", "forward", "step", "encode", *units):
        unit = units.get(part, "images")
        line = rf"^{part} +\d+\.\d ms +\d+\.\d {unit} per second, 0 compilations$"
        assert re.search(line, output, re.M), output
    rows = json.loads(output.splitlines()[-1])
    assert {"data", "step", "matmul", "encode", *units} <= set(rows)
    assert all(row["ms"] > 0 and row["per_second"] > 0 for row in rows.values())
    assert re.search(r"step: \d+ GFLOPS, \d+% of a large product's; peak memory \d", output)


@pytest.mark.parametrize("form", [
    ["--bench", "--against={}", "--batch_size=8"], ["--against", "{}", "--batch_size=8", "--json"]])
def test_a_checkout_is_measured_beside_another(form, tmp_path, monkeypatch, capsys):
    commands = []

    def run(command, **options):
        commands.append(command)
        n = len(commands)
        ms = 30.0 + n if n % 2 else 10.0 + n           # the other one comes first
        text = f"8 images per step\nstep  {ms} ms  1.0 images per second\n"
        return subprocess.CompletedProcess(command, 0, text + ("new 3.0 ms\n" if n % 2 else ""))

    monkeypatch.setattr(train.subprocess, "run", run)
    argv = ["train.py", "det_shapes", *(text.format(tmp_path) for text in form)]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()
    assert [command[1] for command in commands] == [f"{tmp_path}/train.py", train.__file__] * 3
    assert {*map(tuple, (command[2:] for command in commands))} == {
        ("det_shapes", "--batch_size=8", "--bench")}
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [["step", "33.0", "14.0", "2.36"]]
    monkeypatch.setattr(
        train.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 2, ""))
    with pytest.raises(SystemExit, match=f"{tmp_path}/train.py: --bench failed, exit code 2"):
        train.main()


# --------------------------------------------------------------------------------------------------
# wrong input

def test_checkpoints_of_strangers_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"config": {}, "model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt: damaged, truncated or no checkpoint"):
        load(str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()


def test_a_truncated_checkpoint_is_named(finished, tmp_path):
    with open(f"{finished[0]}/last.pt", "rb") as f:
        whole = f.read()
    (tmp_path / "last.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="last.pt: damaged, truncated"):
        load(str(tmp_path / "last.pt"))


def test_a_checkpoint_of_another_format_says_so(tmp_path, monkeypatch):
    content = {"network": "Pix2Seq", "config": {}, "model": {}}
    torch.save(content, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"old.pt: has format 1, expected 2"):
        load(str(tmp_path / "old.pt"))
    monkeypatch.setattr(model, "FORMAT", 99)
    save(str(tmp_path / "new.pt"), content)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"new.pt: .*format 99, expected 2"):
        load(str(tmp_path / "new.pt"))


@pytest.mark.parametrize("changes, words", [
    (dict(accumulate=3), "a batch of 4 is not a multiple of 1 processes x --accumulate"),
    (dict(max_objects=100), "det sequences have 500 tokens, max_seq_len is 64"),
    (dict(vocab_size=150), "vocab_size is 150, the tokens need 174"),
    (dict(tasks=("gen",)), "'gen' is no task of Pix2SeqConfig, expected some of det,seg,kpt,cap"),
    (dict(task_weights=(1.0, 2.0)), r"--task_weights is \(1.0, 2.0\): expected 1 numbers, for det"),
    (dict(steps=0), "expected --steps"),
])
def test_what_does_not_fit_is_said_before_training(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        train.train(small_config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there_is_an_error_without_a_traceback(tmp_path):
    for options, words in (
            ([f"--data_dir={tmp_path}"], "instances_train2017.json: no such file"),
            ([], "--data_dir")):
        done = run("train.py", "det_coco_tiny", *options, f"--out={tmp_path / 'run'}", check=False)
        assert done.returncode == 1 and words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text, words", [(None, "no such file"), ("{half", "not JSON")])
def test_wrong_validation_files_are_an_error_before_the_first_step(text, words, tmp_path):
    data.export_shapes(str(tmp_path), 4, 64, "jpg")
    path = tmp_path / "annotations/instances_val2017.json"
    os.remove(path)
    if text:
        path.write_text(text)
    with pytest.raises(data.UserError, match=f"instances_val2017.json: {words}"):
        train.train(small_config(tmp_path / "run", data="coco", data_dir=str(tmp_path)))
    assert not (tmp_path / "run").exists()


def test_curves_of_runs_are_drawn_side_by_side(finished, tmp_path, monkeypatch):
    figures = []
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure
    save_figure = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path: figures.append(self) or save_figure(self, path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/log.jsonl").write_text(
        '{"step": 1, "loss": 3.0, "lr": 1}\n{"step": 2, "score": 0.5}\n7\n{"step": 3, "lo')
    said = run("train.py", "--plot", f"{tmp_path}/other", finished[0]).stdout
    assert said.strip() == f"{tmp_path}/other/curves.png"
    assert Image.open(said.strip()).size[0] > 1000
    loss, score = figures[0].axes
    assert (loss.get_title(), score.get_title()) == ("loss by step", "score by step")
    assert loss.lines[0].get_xydata().tolist() == [[1, 3]]
    assert score.lines[0].get_xydata().tolist() == [[2, 0.5]]
    entries = logged(finished[0])
    for axes, name in ((loss, "loss"), (score, "score")):
        expected = [[row["step"], row[name]] for row in entries if name in row]
        assert expected and axes.lines[1].get_xydata().tolist() == expected
    assert [text.get_text() for text in loss.get_legend().texts] == [
        f"{tmp_path}/other", finished[0]]


def test_an_optional_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="--wandb needs the package wandb: pip install wandb"):
        train.train(small_config(tmp_path / "run", wandb=True))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="--plot needs the package matplotlib: pip install"):
        train.plot([str(tmp_path)])


def test_the_log_goes_to_weights_and_biases_too(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

    class Wandb:
        @staticmethod
        def init(**options):
            calls.append(options)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    c = small_config(tmp_path / "run", wandb=True)
    train.train(c)
    options, *sent = calls
    assert options["project"] == "nano-pix2seq" and options["config"]["optim"]["lr"] == c.optim.lr
    assert [{"step": step, **values} for step, values in sent] == logged(tmp_path / "run")
