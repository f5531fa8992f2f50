"""Networks that generate: training, its checkpoints, sampling, through the same scripts as the rest."""
import json
import os
import re
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from diffusion import as_denoiser, condition, denoising_loss, generate, pixels_to_x0, x0_to_pixels
from model import RIN, RINConfig, UNet, UNetConfig, build
from sample import load_model, read_checkpoint
from train import PRESETS, Config

ROOT = os.path.dirname(os.path.abspath(train.__file__))
TINY_UNET = UNetConfig(sample_size=(8, 8), num_classes=4, self_cond="x", unet_dim=32, multipliers=(1,), res_blocks=(1,), attention_at=(8,), head_dim=32)
TINY_RIN = RINConfig(sample_size=(8, 8), num_classes=4, interface_dim=32, latents=8, latent_dim=32, latent_heads=4, latent_layers=(1, 1), rw_heads=4,
                     drop_path=0.0, dropout=0.0)
GENERATORS = {name: preset.config for name, preset in PRESETS.items() if preset.config.tasks == "gen"}


def recipe(model, **fields):
    return SimpleNamespace(**vars(Config(model=model, tasks="gen", **fields)), categories=[])


def run(script, *arguments, torchrun=0, check=True):
    command = [sys.executable, *(["-m", "torch.distributed.run", f"--nproc_per_node={torchrun}", "--standalone"] if torchrun else []),
               os.path.join(ROOT, script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


# pixels and data

@pytest.mark.parametrize("bits", ["", "uint8", "gray", "uint8_s", "oneh"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 4), (2, 3, 2, 4, 4)])
def test_pixels_come_back_from_what_is_diffused(bits, shape):
    c = recipe(TINY_UNET, bits=bits, b_scale=0.5)
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)) / 255
    x0 = pixels_to_x0(pixels, c)
    assert x0.abs().max() <= 0.5 and len(x0) == 2
    assert torch.allclose(x0_to_pixels(x0, c), pixels, atol=1e-6)


def test_condition_is_what_the_network_takes():
    labels, known = torch.zeros(2, dtype=torch.long), torch.zeros(2, 3, 1, 8, 8)
    assert condition(recipe(replace(TINY_UNET, num_classes=0)), labels) is None
    assert condition(recipe(TINY_UNET), labels)[0] is labels and condition(recipe(TINY_UNET), None) == (None,)
    assert len(condition(recipe(replace(TINY_RIN, frames=2, cond_frames=1)), labels, known)) == 2


# training

def overfit(c, pixels, labels, steps, lr=3e-3):
    torch.manual_seed(0)
    network = build(c.model).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        loss = denoising_loss(network, c, pixels, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.mark.parametrize("model, fields, steps", [
    (TINY_UNET, dict(pred_type="x"), 300), (TINY_RIN, dict(pred_type="x", self_cond_rate=0.9, self_cond_masking=True), 500),
    (replace(TINY_UNET, channels=24, softmax_groups=3), dict(bits="uint8", pred_type="x_softmax_xent", b_scale=0.5), 400)],
    ids=["unet", "rin-latent", "bits"])
def test_a_batch_is_learned_by_heart_and_sampling_gives_it_back(model, fields, steps):
    c = recipe(model, sample_steps=20, sampler="ddim", **fields)
    g = torch.Generator().manual_seed(0)
    pixels = torch.nn.functional.interpolate(torch.randint(0, 2, (4, 3, 2, 2), generator=g).float() * 0.8 + 0.1, scale_factor=4)
    labels = torch.arange(4)                           # the label tells which of the four
    network = overfit(c, pixels.repeat(3, 1, 1, 1), labels.repeat(3), steps)
    samples = generate(network, c, 8, labels.repeat(2), generator=torch.Generator().manual_seed(1))
    errors = (samples - pixels.repeat(2, 1, 1, 1)).abs().mean((1, 2, 3))
    assert errors.max() < 0.06, errors


def test_labels_are_dropped_at_their_rate_while_the_network_trains():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x, gamma, cond, self_cond):
            seen.append(cond[0])
            return x

    c, spy, labels = recipe(replace(TINY_UNET, self_cond="none"), label_drop=0.25), Spy(), torch.arange(2000) % 4
    denoising_loss(spy.train(), c, torch.rand(2000, 3, 8, 8), labels, generator=torch.Generator().manual_seed(0))
    dropped = seen[0] == -1
    assert 0.2 < dropped.float().mean() < 0.3 and torch.equal(seen[0][~dropped], labels[~dropped])
    denoising_loss(spy.eval(), c, torch.rand(2000, 3, 8, 8), labels)
    assert torch.equal(seen[1], labels)


def test_noise_of_a_loss_at_given_times_is_the_generators():
    torch.manual_seed(0)
    c, pixels, network = recipe(TINY_UNET), torch.rand(4, 3, 8, 8), build(TINY_UNET).eval()
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)                    # it starts at zero
    loss = lambda seed: denoising_loss(network, c, pixels, None, torch.full((4,), 0.5), torch.Generator().manual_seed(seed)).item()
    assert loss(1) == loss(1) != loss(2)


def test_a_normalised_input_has_unit_deviation_and_bits_by_sigmoid_are_expected_bits():
    c = recipe(replace(TINY_UNET, channels=24), normalize_input=True, pred_type="x_sigmoid_xent", bits="uint8", b_scale=0.5)
    seen = []
    network = lambda x, *rest: seen.append(x) or torch.full_like(x, 100.0)
    x_t = 7 * torch.randn(3, 24, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(as_denoiser(network, c)(x_t, None, None, None), torch.tensor(0.5))
    assert torch.allclose(as_denoiser(network, c, logits=True)(x_t, None, None, None), torch.tensor(100.0))
    assert torch.allclose(seen[0].std((1, 2, 3), correction=0), torch.ones(3), atol=1e-5)


# whole runs

def shrunk(config):
    m = config.model
    if isinstance(m, UNetConfig):
        m = replace(m, sample_size=(16, 16), unet_dim=32, res_blocks=(1,) * len(m.res_blocks), attention_at=(8,), head_dim=32,
                    num_classes=min(m.num_classes, 10) and (m.num_classes if m.num_classes <= 10 else 2))
    else:
        m = replace(m, sample_size=(16, 16), latents=8, latent_dim=32, latent_heads=4, interface_dim=32, rw_heads=4, latent_layers=(1, 1),
                    num_classes=m.num_classes if m.num_classes <= 10 else 2)
    size = {"cifar10": (32, 32), "mnist": (28, 28)}.get(config.data, (16, 16))
    return replace(config, model=replace(m, sample_size=size), steps=2, warmup_steps=1, batch_size=4, workers=0, eval_every=0, save_every=1, log_every=1,
                   sample_steps=2, eval_samples=4, val_count=4, judge=False, device="cpu", pictures=1)


def write_data(kind, folder):
    """A tiny data set of each kind that --data_dir can name."""
    rng = np.random.default_rng(0)
    if kind == "cifar10":
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            records = np.concatenate([rng.integers(0, 10, (4, 1)), rng.integers(0, 256, (4, 3072))], 1).astype(np.uint8)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
    elif kind == "mnist":
        for name in ("train", "t10k"):
            (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 8, 28, 28) + rng.integers(0, 256, 8 * 784, np.uint8).tobytes())
            (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 8) + bytes(range(8)))
    elif kind in ("images", "videos"):
        for split in ("train", "val"):
            for part in ("a", "b"):
                (folder / split / part).mkdir(parents=True)
                for i in range(17):
                    Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / split / part / f"{i:03}.png")


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generating_preset_shrunk_trains_saves_resumes_and_samples(name, tmp_path, monkeypatch):
    write_data(GENERATORS[name].data, tmp_path)
    config = replace(shrunk(GENERATORS[name]), out=str(tmp_path / "run"), data_dir=str(tmp_path))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped = train.Run(name, config)                  # one step, as an interrupted run leaves it
    os.makedirs(config.out)
    loader = iter(stopped.loader("gen", 0, 2))
    stopped.model.train()
    stopped.step({"gen": [next(loader)]}, 0, False)
    train.save(f"{config.out}/last.pt", stopped.checkpoint(1, -1.0))
    resumed = train.Run(name, config)
    metrics = train.train(resumed)
    signal.signal(signal.SIGINT, handlers[0]), signal.signal(signal.SIGTERM, handlers[1])
    assert np.isfinite(metrics["gen"]["loss"])
    model, c = load_model(f"{config.out}/last.pt", torch.device("cpu"))
    assert c.model == config.model and isinstance(model, (RIN, UNet))
    average = resumed.average.state_dict()
    assert all(torch.equal(w, average[k]) for k, w in model.state_dict().items()), "sampling takes the averaged weights"
    assert any(not torch.equal(w, resumed.model.state_dict()[k]) for k, w in average.items()), "which are not the last ones"


SMALL = ["gen_shapes_rin", "--steps=4", "--save_every=2", "--log_every=1", "--val_count=4", "--batch_size=4", "--latents=8", "--latent_dim=32", "--interface_dim=32",
         "--latent_layers=1,1", "--sample_size=16", "--judge=false", "--eval_samples=4", "--sample_steps=3", "--workers=0", "--device=cpu"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("gen") / "whole")
    return folder, run("train.py", *SMALL, f"--out={folder}").stdout


def test_a_generating_run_leaves_its_grid_and_says_its_loss(finished):
    folder, output = finished
    assert {"best.pt", "last.pt", "step_0000004.png"} <= set(os.listdir(folder)) and re.search(r"gen: loss \d\.\d+, 4 samples", output), output


@pytest.mark.parametrize("preset", [SMALL[0], "video_shapes"])
def test_the_speed_of_a_generating_run_is_measured(preset, tmp_path):
    output = run("train.py", preset, *SMALL[1:], "--bench", f"--out={tmp_path}").stdout
    assert "one, in 3 steps" in output and re.search(r"step +\d+\.\d ms", output), output


def test_a_killed_generating_run_ends_bit_identical(finished, tmp_path):
    folder = str(tmp_path / "run")
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *SMALL, f"--out={folder}"], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    for line in process.stdout:
        if line.startswith("step       3"):
            process.kill()
            break
    process.stdout.read()
    process.wait()
    assert read_checkpoint(f"{folder}/last.pt")["step"] == 2
    run("train.py", *SMALL, f"--out={folder}")
    a, b = (read_checkpoint(f"{f}/last.pt") for f in (folder, finished[0]))
    assert all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in b[part])


def test_two_processes_share_the_batch_of_a_generating_run(tmp_path):
    run("train.py", *SMALL, f"--out={tmp_path}/two", torchrun=2)
    saved = read_checkpoint(f"{tmp_path}/two/last.pt")
    assert saved["step"] == 4 and all(w.isfinite().all() for w in saved["ema"].values())


def test_samples_repeat_for_a_seed_and_differ_for_another(finished, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        report = json.loads(run("sample.py", f"--ckpt={finished[0]}", "--count=4", f"--seed={seed}", f"--out={tmp_path}/{name}").stdout)
        assert report["classes"] == list(data.KINDS)
    a, b, c = (np.asarray(Image.open(tmp_path / name / "samples.png")) for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_a_class_is_asked_for_by_name_and_a_strip_shows_every_tenth_of_the_way(finished, tmp_path):
    arguments = [f"--ckpt={finished[0]}", "--count=2", f"--out={tmp_path}"]
    report = json.loads(run("sample.py", *arguments, "--class=square", "--steps=5", "--sampler=ddpm", "--guidance=1", "--td=1", "--strip").stdout)
    assert report["classes"] == ["square"] * 2 and (report["steps"], report["sampler"]) == (5, "ddpm")
    assert {"samples.png", "strip.png", "denoising.gif"} <= set(os.listdir(tmp_path))
    refused = run("sample.py", *arguments, "--class=cube", check=False)
    assert refused.returncode == 1 and "this model knows circle, square, triangle, figure" in refused.stderr
    refused = run("sample.py", "photo.jpg", *arguments, check=False)
    assert refused.returncode == 1 and "takes no images" in refused.stderr
    refused = run("sample.py", *arguments, "--sampler=euler", check=False)
    assert refused.returncode == 2 and "invalid choice: 'euler'" in refused.stderr


def test_a_video_model_goes_on_from_known_frames(tmp_path):
    small = ["video_shapes", *SMALL[1:], "--steps=1", "--frames=3", "--cond_frames=2", "--save_every=1"]
    run("train.py", *small, f"--out={tmp_path}/run")
    run("sample.py", f"--ckpt={tmp_path}/run", "--count=2", f"--out={tmp_path}/samples")
    with Image.open(tmp_path / "samples/samples.gif") as film:
        assert film.n_frames == 5


@pytest.mark.parametrize("arguments, words", [
    (["--channels=4"], "channels is 4, but image_channels=3"), (["--num_classes=7"], "num_classes is 7, but the data has 4 classes"),
    (["--train_schedule=cosin"], "unknown schedule 'cosin'"), (["--pred_type=noise"], "unknown pred_type 'noise'; choices: x, eps"),
    (["--bits=utf8"], "unknown bits 'utf8'"), (["--tasks=gen,det"], "unknown task 'gen'"), (["--tasks=det"], "RINConfig, is for gen"),
    (["--sample_size=16,32"], "ask for (16, 32, 3)"), (["--data=coco"], "coco"),
    (["--pred_type=x_softmax_xent"], "belong together"), (["--latent_layers=1,x"], "expected integers")])
def test_what_does_not_fit_is_said_before_training(arguments, words, tmp_path):
    done = run("train.py", *SMALL, f"--out={tmp_path}/run", *arguments, check=False)
    assert done.returncode in (1, 2) and words in done.stderr and "Traceback" not in done.stderr, done.stderr
