"""Networks that generate: training, its checkpoints, sampling, through the same scripts."""
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, run
from PIL import Image

import data
import train
from data import Batch
from diffusion import (
    as_denoiser,
    condition,
    denoising_loss,
    denoising_losses,
    generate,
    pixels_to_x0,
    x0_to_pixels,
)
from model import FIT, RIN, Device, FITConfig, RINConfig, UNet, UNetConfig, build, load
from sample import changed, load_model
from train import PRESETS, Config, OptimConfig, make_optimizer

TINY_UNET = UNetConfig(
    sample_size=(8, 8), num_classes=4, self_cond="x", unet_dim=32, multipliers=(1,),
    res_blocks=(1,), attention_at=(8,), head_dim=32)
TINY_RIN = RINConfig(
    sample_size=(8, 8), num_classes=4, interface_dim=32, latents=8, latent_dim=32, latent_heads=4,
    latent_layers=(1, 1), rw_heads=4, drop_path=0.0, dropout=0.0)
GENERATORS = {
    name: preset.config for name, preset in PRESETS.items() if preset.config.data.tasks == ("gen",)}


def recipe(model, **fields):
    return changed(Config(model=model), tasks=("gen",), **fields)


def batch_of(pixels, labels):
    return Batch(pixels, torch.ones(len(pixels)), cond={"labels": labels})


def random_pixels(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


# --------------------------------------------------------------------------------------------------
# pixels and conditions

@pytest.mark.parametrize("bits", ["", "uint8", "gray", "uint8_s", "oneh"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 4), (2, 3, 2, 4, 4)])
def test_pixels_come_back_from_what_is_diffused(bits, shape):
    c, pixels = recipe(TINY_UNET, bits=bits, b_scale=0.5), random_pixels(*shape)
    x0 = pixels_to_x0(pixels, c)
    assert x0.abs().max() <= 0.5 and len(x0) == 2
    assert torch.equal(x0_to_pixels(x0, c), pixels)


def test_condition_is_what_the_network_takes():
    cond = {"labels": torch.zeros(2, dtype=torch.long), "frames": random_pixels(2, 3, 1, 8, 8)}
    assert condition(cond, recipe(replace(TINY_UNET, num_classes=0))) == {}
    assert condition(cond, recipe(TINY_UNET)) == {"labels": cond["labels"]}
    taken = condition(cond, recipe(replace(TINY_RIN, frames=2, cond_frames=1)))
    assert set(taken) == {"labels", "frames"} and taken["frames"].abs().max() <= 1


# --------------------------------------------------------------------------------------------------
# training

def overfit(c, batch, steps, lr=2e-2):
    torch.manual_seed(0)
    network = build(c.model).train()
    o = OptimConfig(optimizer="muon", lr=lr, weight_decay=0.0)
    optimizer = make_optimizer(network.named_parameters(), o)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        loss = denoising_loss(network, batch, c) / len(batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.mark.parametrize("model, fields, steps", [
    (TINY_UNET, dict(pred_type="x"), 120),
    (TINY_RIN, dict(pred_type="x", self_cond_rate=0.9, self_cond_masking=True), 120),
    (replace(TINY_UNET, channels=24, softmax_groups=3),
     dict(bits="uint8", pred_type="x_softmax_xent", b_scale=0.5), 140),
], ids=["unet", "rin-latent", "bits"])
def test_a_batch_is_overfit_and_sampling_gives_it_back(model, fields, steps):
    c = recipe(model, sample_steps=20, sampler="ddim", **fields)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 2, (4, 3, 2, 2), generator=generator) * 204 + 26
    pixels = torch.nn.functional.interpolate(blocks.float(), scale_factor=4).byte()
    labels = torch.arange(4)                           # the label tells which of the four
    network = overfit(c, batch_of(pixels.repeat(3, 1, 1, 1), labels.repeat(3)), steps)
    generator = torch.Generator().manual_seed(1)
    samples = generate(network, c, 8, {"labels": labels.repeat(2)}, generator)
    errors = (samples.float() - pixels.repeat(2, 1, 1, 1)).abs().mean((1, 2, 3)) / 255
    assert errors.max() < 0.06, errors


def test_labels_are_dropped_at_their_rate_while_the_network_trains():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x, gamma, self_cond, labels):
            seen.append(labels)
            return x, None

    c = recipe(replace(TINY_UNET, self_cond="none"), label_drop=0.25)
    spy, batch = Spy(), batch_of(random_pixels(2000, 3, 8, 8), torch.arange(2000) % 4)
    denoising_losses(spy.train(), batch, c, generator=torch.Generator().manual_seed(0))
    dropped, labels = seen[0] == -1, batch.cond["labels"]
    assert 0.2 < dropped.float().mean() < 0.3 and torch.equal(seen[0][~dropped], labels[~dropped])
    denoising_losses(spy.eval(), batch, c)
    assert torch.equal(seen[1], labels)


def test_little_noise_counts_more_while_the_network_trains():
    times = torch.tensor([0.1, 0.5, 0.6, 0.999])
    batch = batch_of(random_pixels(4, 3, 8, 8), torch.arange(4))
    network = build(replace(TINY_UNET, self_cond="none"))

    def losses(weight):
        c = recipe(network.config, train_schedule="cosine@0,1,1", low_noise_weight=weight)
        return denoising_losses(network, batch, c, times, torch.Generator().manual_seed(0))

    network.eval()
    assert torch.equal(losses(1.0), losses(3.0))
    network.train()
    plain, weighted = losses(1.0), losses(3.0)
    expected = [3, 2, 1 / math.sin(0.3 * math.pi) ** 2, 1]      # gamma = cos(pi t / 2) ** 2
    assert torch.allclose(weighted / plain, torch.tensor(expected), atol=1e-4)


def test_noise_of_a_loss_at_given_times_is_the_generators():
    torch.manual_seed(0)
    c, network = recipe(TINY_UNET), build(TINY_UNET).eval()
    batch = batch_of(random_pixels(4, 3, 8, 8), torch.full((4,), -1))
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)                    # it starts at zero

    def losses(seed):
        generator = torch.Generator().manual_seed(seed)
        return denoising_losses(network, batch, c, torch.full((4,), 0.5), generator).tolist()

    assert losses(1) == losses(1) != losses(2)


def test_a_loss_is_the_sum_of_the_losses_of_examples():
    torch.manual_seed(0)
    c, network = recipe(TINY_UNET), build(TINY_UNET).eval()
    batch = batch_of(random_pixels(4, 3, 8, 8), torch.arange(4))
    torch.manual_seed(5)
    losses = denoising_losses(network, batch, c)
    torch.manual_seed(5)
    weighted = batch._replace(weights=torch.tensor([1.0, 0.0, 2.0, 0.5]))
    loss = denoising_loss(network, weighted, c)
    assert losses.shape == (4,) and torch.allclose(loss, (losses * weighted.weights).sum())


def test_a_normalised_input_has_unit_deviation_and_bits_by_sigmoid_are_expected_bits():
    c = recipe(
        replace(TINY_UNET, channels=24), normalize_input=True, pred_type="x_sigmoid_xent",
        bits="uint8", b_scale=0.5)
    seen = []

    def network(x, gamma, self_cond):
        seen.append(x)
        return torch.full_like(x, 100.0), None

    x_t = 7 * torch.randn(3, 24, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(as_denoiser(network, c)(x_t, None)[0], torch.tensor(0.5))
    logits = as_denoiser(network, c, logits=True)(x_t, None)[0]
    assert torch.allclose(logits, torch.tensor(100.0))
    assert torch.allclose(seen[0].std((1, 2, 3), correction=0), torch.ones(3), atol=1e-5)


# --------------------------------------------------------------------------------------------------
# whole runs

def shrunk(c):
    """A preset of milliseconds."""
    m = c.model
    classes = m.num_classes if m.num_classes <= 10 else 2
    size = {"cifar10": (32, 32), "mnist": (28, 28)}.get(c.data.data, (16, 16))
    if isinstance(m, UNetConfig):
        m = replace(
            m, unet_dim=32, res_blocks=(1,) * len(m.res_blocks), attention_at=(8,), head_dim=32)
    elif isinstance(m, FITConfig):
        m = replace(
            m, fit_layers="(1)1(1)", fit_grid=2, fit_dim=32, fit_heads=2, fit_latent_dim=32,
            fit_latent_heads=2)
    else:
        m = replace(
            m, latents=8, latent_dim=32, latent_heads=4, interface_dim=32, rw_heads=4,
            latent_layers=(1, 1))
    options = dict(
        sample_size=size, num_classes=classes, steps=2, warmup_steps=1, batch_size=4, workers=0,
        eval_every=0, save_every=1, log_every=1, sample_steps=2, eval_samples=4, val_count=4,
        proxy_classifier=False, device="cpu", pictures=1)
    return changed(replace(c, model=m), **options)


def write_data(kind, folder):
    """A tiny data set of each kind that --data_dir can name."""
    rng = np.random.default_rng(0)
    if kind == "cifar10":
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            labels, pixels = rng.integers(0, 10, (4, 1)), rng.integers(0, 256, (4, 3072))
            rows = np.concatenate([labels, pixels], 1).astype(np.uint8)
            (folder / f"{name}.bin").write_bytes(rows.tobytes())
    elif kind == "mnist":
        for name in ("train", "t10k"):
            pixels = rng.integers(0, 256, 8 * 784, np.uint8).tobytes()
            images = struct.pack(">4i", 2051, 8, 28, 28) + pixels
            (folder / f"{name}-images-idx3-ubyte").write_bytes(images)
            labels = struct.pack(">2i", 2049, 8) + bytes(range(8))
            (folder / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    elif kind in ("images", "videos"):
        for part in ("train/a", "train/b", "val/a", "val/b"):
            (folder / part).mkdir(parents=True)
            for i in range(17):
                image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8))
                image.save(folder / part / f"{i:03}.png")


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generating_preset_shrunk_trains_resumes_and_samples(name, tmp_path, monkeypatch):
    write_data(GENERATORS[name].data.data, tmp_path)
    c = changed(shrunk(GENERATORS[name]), out=str(tmp_path / "run"), data_dir=str(tmp_path))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as patch:               # asked to stop after the first step
        patch.setattr(Device, "stopping", lambda self, step: step == 1)
        assert train.train(c) is None
    assert load(f"{c.run.out}/last.pt")["step"] == 1
    metrics = train.train(c)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert np.isfinite(metrics["gen"]["loss"])
    model, found = load_model(f"{c.run.out}/last.pt", Device("cpu"))
    assert found.model == c.model and isinstance(model, (RIN, UNet, FIT))
    saved, weights = load(f"{c.run.out}/last.pt"), model.state_dict()
    assert all(torch.equal(w, saved["ema"][k]) for k, w in weights.items()), "of the average"
    assert any(not torch.equal(w, saved["model"][k]) for k, w in weights.items()), "not the last"


SMALL = [
    "gen_shapes_rin", "--steps=4", "--save_every=2", "--log_every=1", "--val_count=4",
    "--batch_size=4", "--latents=8", "--latent_dim=32", "--interface_dim=32",
    "--latent_layers=1,1", "--sample_size=16", "--proxy_classifier=false", "--eval_samples=4",
    "--sample_steps=3", "--pictures=4", "--workers=0", "--device=cpu"]


SMALL_UNET = [option for option in SMALL[1:] if not re.search("latent|interface", option)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("gen") / "whole")
    return folder, run("train.py", *SMALL, f"--out={folder}").stdout


def test_a_generating_run_leaves_its_grid_and_says_its_loss(finished):
    folder, output = finished
    assert {"best.pt", "last.pt", "step_0000004"} <= set(os.listdir(folder))
    assert os.listdir(f"{folder}/step_0000004") == ["samples.png"]
    assert re.search(r"gen: minus_loss -\d\.\d+, loss \d\.\d+", output), output


@pytest.mark.parametrize("small", [SMALL, ["video_shapes", *SMALL_UNET]])
def test_the_speed_of_a_generating_run_is_measured(small, tmp_path, monkeypatch, capsys):
    class ShortTimer(train.Timer):
        def blocked_autorange(self, min_run_time):
            return super().blocked_autorange(min_run_time=0.01)

    monkeypatch.setattr(train, "Timer", ShortTimer)
    command = ["train.py", *small, "--bench", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", command)
    train.main()
    output = capsys.readouterr().out
    for part in ("data", "forward", "step", "sample"):
        line = rf"^{part} +\d+\.\d ms +\d+\.\d images per second, 0 compilations$"
        assert re.search(line, output, re.M), output


def test_a_killed_generating_run_ends_bit_identical(finished, tmp_path):
    folder = str(tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, os.path.join(ROOT, "train.py"), *SMALL, f"--out={folder}"],
        stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    for line in process.stdout:
        if line.startswith("step       3"):
            process.kill()
            break
    process.stdout.read()
    process.wait()
    assert load(f"{folder}/last.pt")["step"] == 2
    run("train.py", *SMALL, f"--out={folder}")
    a, b = (load(f"{f}/last.pt") for f in (folder, finished[0]))
    assert all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in b[part])


def test_two_processes_share_the_batch_of_a_generating_run(tmp_path):
    run("train.py", *SMALL, f"--out={tmp_path}/two", torchrun=2)
    saved = load(f"{tmp_path}/two/last.pt")
    assert saved["step"] == 4 and all(w.isfinite().all() for w in saved["ema"].values())


def test_samples_repeat_for_a_seed_and_differ_for_another(finished, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = f"--ckpt={finished[0]}", "--count=4", f"--seed={seed}", f"--out={tmp_path}/{name}"
        report = json.loads(run("sample.py", *options).stdout)
        assert report["classes"] == list(data.KINDS)
    a, b, c = (np.asarray(Image.open(tmp_path / name / "samples.png")) for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_a_class_is_asked_for_by_name_and_a_page_shows_the_way(finished, tmp_path):
    options = [f"--ckpt={finished[0]}", "--count=2", f"--out={tmp_path}"]
    report = json.loads(run(
        "sample.py", *options, "--class=square", "--sample_steps=5", "--sampler=ddpm",
        "--guidance=1", "--td=1", "--explain").stdout)
    assert report["classes"] == ["square"] * 2
    assert (report["sample_steps"], report["sampler"]) == (5, "ddpm")
    page = (tmp_path / "samples.html").read_text()
    assert "samples.png" in os.listdir(tmp_path)
    assert page.count("<figure") == 2 * 5 and page.count("<img") == 1 + 2 * 5
    assert "t 1.00<br>gamma 0.000" in page and "t 0.20" in page
    for code, arguments, words in (
            (1, ["--class=cube"], "this model knows circle, square, triangle, figure"),
            (1, ["photo.jpg"], "takes no images"),
            (2, ["--sampler=euler"], "--sampler: expected one of ddim")):
        refused = run("sample.py", *arguments, *options, check=False)
        assert refused.returncode == code and words in refused.stderr, refused.stderr


def test_a_video_model_goes_on_from_context_frames(tmp_path):
    small = [
        *SMALL, "--steps=1", "--num_classes=0", "--frames=3", "--cond_frames=2", "--save_every=1"]
    run("train.py", *small, f"--out={tmp_path}/run")
    run("sample.py", f"--ckpt={tmp_path}/run", "--count=2", f"--out={tmp_path}/samples")
    with Image.open(tmp_path / "samples/samples.gif") as film:
        assert film.n_frames == 5
    with Image.open(tmp_path / "samples/frames.png") as picture:       # guess, truth, guess, truth
        rows = np.array_split(np.asarray(picture), 4)
    context = 2 * rows[0].shape[1] // 5 - 2
    assert (rows[0][:60, :context] == rows[1][:60, :context]).all()
    assert (rows[0][:60, context:] != rows[1][:60, context:]).any()


@pytest.mark.parametrize("argument, words", [
    ("--channels=4", "channels is 4, but image_channels=3"),
    ("--num_classes=7", "num_classes is 7, but the data has 4 classes"),
    ("--train_schedule=cosin", "unknown schedule 'cosin'"),
    ("--low_noise_weight=0.5", "--low_noise_weight: expected a number of at least 1, got '0.5'"),
    ("--low_noise_weight=nan", "--low_noise_weight: expected a number of at least 1, got 'nan'"),
    ("--pred_type=noise", "--pred_type: expected one of x, eps"),
    ("--bits=utf8", "--bits: expected one of nothing, uint8"),
    ("--tasks=gen,det", "'det' is no task of RINConfig, expected some of gen"),
    ("--tasks=paint", "paint"),
    ("--sample_size=16,32", "ask for (1, 16, 32, 3)"),
    ("--data=coco", "coco"),
    ("--pred_type=x_softmax_xent", "belong together"),
    ("--latent_layers=1,x", "expected a whole number of at least 0, several between commas"),
])
def test_what_does_not_fit_is_said_before_training(argument, words, tmp_path, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        c, _ = train.parse([*SMALL, f"--out={tmp_path}/run", argument])
        train.train(c)
    assert words in f"{error.value} {capsys.readouterr().err}"
    assert not (tmp_path / "run/log.jsonl").exists()
