"""ImageAR: tokens of an image, causality, cached writing, and the task `ar` from end to end."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

import eval
import model as m
import sample
import train
from model import Device

FIT = m.ImageARConfig(
    sample_size=(4, 8),
    levels=5,
    num_classes=4,
    fit_layers="(1)1(1)2(1)",
    fit_patch=2,
    fit_dim=24,
    fit_heads=2,
    fit_latents=3,
    fit_latent_dim=32,
    fit_latent_heads=4,
    fit_mlp_ratio=2,
)
PLAIN = replace(FIT, fit_layers="(2)", fit_patch=0, fit_latents=1)
SMALL = [
    "--sample_size=8,8", "--fit_layers=(1)1(1)", "--fit_patch=4", "--fit_dim=32", "--fit_heads=2",
    "--fit_latent_dim=32", "--fit_latent_heads=2", "--fit_latents=2", "--levels=4", "--steps=4",
    "--save_every=2", "--log_every=1", "--batch_size=4", "--val_count=6", "--eval_samples=6",
    "--pictures=2", "--warmup_steps=1", "--proxy_classifier=False", "--device=cpu", "--workers=0",
    "--optimizer=adamw"]                               # see test_train: Muon amplifies rounding


def network(c):
    """A network whose label, bias and latents matter."""
    torch.manual_seed(0)
    model = m.ImageAR(c).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def random_tokens(c, count=2):
    pixels = torch.randint(0, 256, (count, *c.sample_shape), generator=torch.manual_seed(1))
    return m.image_tokens(pixels.byte(), c)


def test_groups_are_patches_in_the_order_of_a_snake_and_tokens_come_back():
    c = replace(FIT, sample_size=(4, 6), levels=256)
    pixels = torch.arange(72).view(1, 3, 4, 6).byte()
    tokens = m.image_tokens(pixels, c)
    assert tokens.shape == (1, 6, 12)
    first = [pixels[0, :, y, x].tolist() for y, x in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert tokens[0, 0].tolist() == sum(first, [])     # pixels row by row, of each its colours
    lefts = [pixels[0, 0, 0, x].item() for x in (0, 2, 4)]
    assert tokens[0, :3, 0].tolist() == lefts
    assert tokens[0, 3:, 0].tolist() == [pixels[0, 0, 2, x].item() for x in (4, 2, 0)]
    assert torch.equal(m.token_image(tokens, c), pixels)


@pytest.mark.parametrize("levels", [2, 5, 8, 256])
def test_a_level_stands_for_its_middle(levels):
    c = replace(PLAIN, levels=levels)
    pixels = torch.arange(0, 192, 2).view(1, 3, 4, 8).byte()
    tokens = m.image_tokens(pixels, c)
    again = m.token_image(tokens, c)
    assert tokens.min() == 0 and tokens.max() < levels
    assert (again.int() - pixels.int()).abs().max() <= math.ceil(128 / levels)
    assert torch.equal(m.image_tokens(again, c), tokens)


@pytest.mark.parametrize("c", [FIT, PLAIN, replace(FIT, fit_latents=1)])
def test_a_token_changes_no_logits_up_to_its_own(c):
    model, tokens = network(c), random_tokens(c)
    labels, flat = torch.tensor([0, 3]), tokens.flatten(1)
    with torch.no_grad():
        before = model(tokens, labels).flatten(1, 2)
        for t in (0, 17, 50, 94):
            other = flat.clone()
            other[:, t] = (other[:, t] + 1) % c.levels
            after = model(other.view(tokens.shape), labels).flatten(1, 2)
            change = (after - before).abs().amax((0, 2))
            assert (change[:t + 1] == 0).all() and change[t + 1] > 0 and change[-1] > 0


@pytest.mark.parametrize("c", [
    FIT,
    PLAIN,
    replace(FIT, fit_layers="(1)2(1)1", num_classes=0),
    replace(FIT, fit_latents=50, shared_embedding=True),               # more than a group's tokens
])
def test_cached_writing_equals_writing_without_a_cache_token_for_token(c):
    model, tokens = network(c), random_tokens(c)
    labels = torch.tensor([2, -1]) if c.num_classes else None
    written = model.generate(tokens.flatten(1)[:, :40], labels, torch.manual_seed(3), top_p=0.95)
    flat, generator = tokens.flatten(1).clone(), torch.manual_seed(3)
    with torch.no_grad():
        for t in range(40, flat.shape[1]):
            logits = model(flat.view(tokens.shape), labels).flatten(1, 2)[:, t]
            flat[:, t] = m.sample_token(logits, torch.rand(2, generator=generator), top_p=0.95)
    assert torch.equal(written.flatten(1), flat) and len(flat[:, 40:].unique()) > 2


def test_writing_repeats_with_its_generator_and_listens_to_the_label():
    model, nothing = network(FIT), torch.zeros(2, 0, dtype=torch.long)

    def write(seed, label):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(nothing, torch.tensor([label, label]), generator, top_p=0.9)

    first = write(1, 0)
    assert torch.equal(first, write(1, 0)) and not torch.equal(first, write(2, 0))
    assert not torch.equal(first, write(1, 1))


def test_every_parameter_learns():
    for c in (FIT, PLAIN):
        model, tokens = m.ImageAR(c).train(), random_tokens(c)
        m.token_losses(model(tokens, torch.tensor([0, 1])), tokens).mean().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("wrong, words", [
    (dict(levels=300), "levels is 300, expected a whole number from 2 to 256"),
    (dict(fit_patch=3), "sample_size 4 is not a multiple of 3 .fit_patch"),
    (dict(fit_layers="2"), "fit_layers '2': expected"),
])
def test_options_that_make_no_sense_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        m.build(replace(FIT, **wrong))


# --------------------------------------------------------------------------------------------------
# the task

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ar") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Device, "catch_signals", lambda self: None)
        train.train(train.parse(["ar_shapes", *SMALL, f"--out={folder}"])[0])
    return folder


def test_a_run_reports_bits_per_dimension_beside_those_of_a_histogram(finished):
    with open(f"{finished}/log.jsonl") as f:
        last = json.loads(f.readlines()[-1])
    assert last["ar_minus_bits"] == -last["ar_bits_per_dim"] and last["ar_samples"] == 6
    assert 0 < last["ar_histogram_bits"] < 2 and 0 < last["ar_bits_per_dim"] < 4       # 4 levels
    model, c = sample.load_model(f"{finished}/last.pt", Device("cpu"))
    records = [eval.data.make_source(c, "val", "ar")[i] for i in range(6)]
    inputs = sample.Inputs(records, c, generator=torch.Generator().manual_seed(0), levels=(0.5,))
    bits = [p["bits"] for p in sample.predict(model, inputs, c, ("ar",))]
    assert np.mean(bits) == pytest.approx(last["ar_bits_per_dim"], abs=1e-4)


def test_a_histogram_has_the_bits_of_the_shares_of_levels(finished):
    _, c = sample.load_model(f"{finished}/last.pt", Device("cpu"))

    class Halves(eval.data.Source):
        """Pixels that are black or white, each half of the time, everywhere alike."""
        endless, classes = True, ["any"]

        def __len__(self):
            return 4000

        def __getitem__(self, i):
            return {"pixels": np.full((8, 8, 3), 255 * (i % 2), np.uint8), "label": 0}

    monkey = pytest.MonkeyPatch()
    monkey.setattr(eval.data, "make_source", lambda c, split, task: Halves())
    bits = eval.histogram_bits(Halves(), c, 100)
    monkey.undo()
    assert bits == pytest.approx(1.0, abs=0.01)


def test_a_stopped_run_goes_on_bit_for_bit(finished, tmp_path, monkeypatch):
    c, _ = train.parse(["ar_shapes", *SMALL, f"--out={tmp_path}"])
    monkeypatch.setattr(Device, "catch_signals", lambda self: None)
    with monkeypatch.context() as patch:               # asked to stop after the second step
        patch.setattr(Device, "stopping", lambda self, step: step == 2)
        assert train.train(c) is None
    assert train.train(c)["ar"]["samples"] == 6
    one, two = (m.load(f"{folder}/last.pt")["model"] for folder in (finished, tmp_path))
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-6


def test_two_processes_give_the_result_of_one(finished, tmp_path):
    run("train.py", "ar_shapes", *SMALL, f"--out={tmp_path / 'two'}", torchrun=2)
    one, two = (
        m.load(f"{folder}/last.pt")["model"] for folder in (finished, tmp_path / "two"))
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-5


def test_sample_draws_images_of_a_class_and_completes_a_photo(finished, tmp_path):
    photo = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(photo)

    def draw(*options):
        shared = f"--ckpt={finished}", "--count=4", f"--out={tmp_path}", "--device=cpu"
        return run("sample.py", *shared, *options, check=False)

    done = draw("--class=circle")
    assert json.loads(done.stdout)["classes"] == ["circle"] * 4, done.stderr
    done = draw(f"--complete={photo}")
    assert json.loads(done.stdout)["samples"] == 4, done.stderr
    assert "--explain is of cap, det, gen, kpt, pan, seg, vps" in draw("--explain").stderr
    assert "no.png" in draw("--complete=no.png").stderr


def test_a_completed_image_keeps_its_upper_rows(finished):
    model, c = sample.load_model(f"{finished}/last.pt", Device("cpu"))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    inputs = sample.Inputs(
        [{"pixels": pixels, "label": 0}] * 2, c, generator=torch.manual_seed(0), rows=4)
    first, second = (p["pixels"] for p in sample.predict(model, inputs, c, ("ar",)))
    known = m.token_image(
        m.image_tokens(torch.from_numpy(pixels).permute(2, 0, 1)[None], c.model), c.model)
    known = known[0].permute(1, 2, 0).numpy()
    assert np.array_equal(first[:4], known[:4]) and np.array_equal(second[:4], known[:4])
    assert not np.array_equal(first[4:], second[4:])


def test_a_photo_is_completed_in_grey_by_a_model_of_grey_images(tmp_path):
    c, _ = train.parse(["ar_mnist", "--num_classes=0", f"--out={tmp_path}"])
    c = replace(c, model=replace(c.model, sample_size=(8, 8), fit_patch=0, fit_layers="(1)"))
    Image.fromarray(np.full((8, 8, 3), (0, 30, 60), np.uint8)).save(tmp_path / "photo.png")
    options = sample.SampleOptions(
        complete=str(tmp_path / "photo.png"), count=2, out=str(tmp_path))
    report = sample.show(m.build(c.model), c, ("ar",), options, torch.manual_seed(0))
    drawn = np.asarray(Image.open(report["pictures"][0]).convert("L"))
    assert report["samples"] == 2 and report["classes"] is None and (drawn == 30).any()


@pytest.mark.parametrize("options, words", [
    (["--levels=1"], "--levels: expected a whole number from 2 to 256, got '1'"),
    (["--num_classes=3"], "num_classes is 3, but the data has 4 classes"),
    (["--channels=1"], "channels is 1"),
    (["--tasks=gen"], "'gen' is no task of ImageARConfig"),
])
def test_wrong_options_end_before_the_first_step(options, words, tmp_path):
    refused = run("train.py", "ar_shapes", *SMALL, f"--out={tmp_path}", *options, check=False)
    assert refused.returncode in (1, 2) and words in refused.stderr


def test_the_presets_of_the_task_build():
    names = [name for name, row in train.PRESETS.items() if row.config.data.tasks == ("ar",)]
    assert names
    for name in names:
        with torch.device("meta"):
            m.build(train.PRESETS[name].config.model)
