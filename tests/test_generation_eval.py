"""Metrics of generated images: distances, scores, networks of features, and all of it together."""
import functools
import json
import math
import os
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import data
import diffusion
import eval
import sample
from model import Device, RINConfig, UNetConfig, build, save
from train import PRESETS, Config

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
CPU = Device("cpu")
MODEL = UNetConfig(
    sample_size=(8, 8), num_classes=4, self_cond="x", unet_dim=32, multipliers=(1,),
    res_blocks=(1,), attention_at=(8,), head_dim=32)
VIDEO = RINConfig(
    sample_size=(8, 8), frames=2, cond_frames=2, interface_dim=32, latents=8, latent_dim=32,
    latent_heads=4, latent_layers=(1, 1), rw_heads=4)


def configuration(model=MODEL, **fields):
    """Of a model that generates drawn shapes."""
    defaults = {"tasks": ("gen",), "val_count": 40, "eval_samples": 24, "sample_steps": 2}
    c = Config(model=model, categories=tuple(data.ShapeClips("val").categories))
    return sample.changed(c, **(defaults | fields))


def evaluate(model, c, **options):
    """-> metrics, and the predictions of each sample."""
    metrics, predictions = eval.evaluate(model, c, "val", CPU, **options)
    return metrics["gen"], predictions["gen"]


@pytest.fixture(scope="module")
def model():
    """Untrained, but with an output that is not zero."""
    torch.manual_seed(0)
    model = build(MODEL).eval()
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    return model


def images(count, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)


def dark_and_bright(count):
    """Images of two classes that brightness tells apart."""
    labels = np.arange(count) % 2
    return images(count) // 3 + (labels * 160).astype(np.uint8)[:, None, None, None], labels


# --------------------------------------------------------------------------------------------------
# distances and scores

def random_covariance(rng, size):
    a = rng.standard_normal((size, size))
    return a @ a.T + 0.1 * np.eye(size)


def test_distance_of_diagonal_gaussians_is_that_of_their_deviations():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([16.0, 1.0, 0.0])
    mean = np.array([1.0, 2.0, 2.0])
    expected = 9 + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    found = eval.frechet_distance(mean, np.diag(a), np.zeros(3), np.diag(b))
    assert found == pytest.approx(expected, rel=1e-12)


def test_distance_of_covariances_that_do_not_commute_is_the_closed_form():
    rng, zero = np.random.default_rng(0), np.zeros(12)
    a, b = random_covariance(rng, 12), random_covariance(rng, 12)
    assert not np.allclose(a @ b, b @ a)
    root = np.sqrt(np.linalg.eigvals(a @ b).real).sum()            # another way to the same trace
    found = eval.frechet_distance(zero, a, zero, b)
    assert found == pytest.approx(np.trace(a + b) - 2 * root, rel=1e-9) and found > 1
    assert eval.frechet_distance(zero, b, zero, a) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("count", [20, 500])
def test_distance_of_a_set_to_itself_is_zero_also_where_its_covariance_is_singular(count):
    features = np.random.default_rng(0).standard_normal((count, 64)) * 100
    mean, cov = eval.feature_statistics(features)
    assert abs(eval.frechet_distance(mean, cov, mean, cov)) < 1e-9 * np.trace(cov)
    shifted = eval.feature_statistics(features + 3)
    assert eval.frechet_distance(mean, cov, *shifted) == pytest.approx(9 * 64, rel=1e-6)
    zero = np.zeros((64, 64))
    assert eval.frechet_distance(mean, zero, mean, cov) == pytest.approx(np.trace(cov))


def test_directions_without_variance_share_nothing():
    u = np.random.default_rng(0).standard_normal((300, 1))
    u *= 100 / np.linalg.norm(u)       # rounding turns 299 zeros of uu' into eigenvalues of 1e-12
    found = eval.frechet_distance(np.zeros(300), u @ u.T, np.zeros(300), np.eye(300))
    assert found == pytest.approx(1e4 + 300 - 2 * 100, rel=1e-12)


def test_statistics_are_unbiased_and_need_two_rows():
    features = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    mean, cov = eval.feature_statistics(features)
    assert np.allclose(mean, features.mean(0), atol=1e-6)
    assert cov.dtype == np.float64 and np.allclose(cov, np.cov(features.astype(np.float64).T))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        eval.feature_statistics(features[:1])


def test_inception_score_is_1_without_a_clue_and_the_number_of_classes_with_certainty():
    one, zero, ten = pytest.approx(1), pytest.approx(0), pytest.approx(10)
    certain = np.eye(10)
    assert eval.inception_score(np.full((40, 10), 0.1)) == (one, zero)
    assert eval.inception_score(certain[np.arange(100) % 10]) == (ten, zero)
    assert eval.inception_score(certain[np.arange(100) // 10])[0] == one   # a class per split
    assert eval.inception_score(np.eye(4)[[0, 1, 2]], splits=1)[0] == pytest.approx(3)


# --------------------------------------------------------------------------------------------------
# networks of features

class WithKeywords(torch.nn.Module):
    """Called as NVIDIA's file is."""
    def forward(
        self,
        img: torch.Tensor,
        return_features: bool = False,
        use_fp16: bool = False,
        no_output_bias: bool = False,
    ):
        assert img.dtype == torch.uint8
        mean = img.float().mean((2, 3))
        if return_features:
            return mean
        return (mean * (1.0 if no_output_bias else 0.0)).softmax(1)


class FeaturesOnly(torch.nn.Module):
    def forward(self, images):
        return images.float().mean((2, 3))


class Pair(torch.nn.Module):
    def forward(self, images):
        mean = images.float().mean((2, 3))
        return mean, mean.softmax(1)


@pytest.fixture
def saved(tmp_path):
    def save_script(network):
        path = str(tmp_path / f"{type(network).__name__}.pt")
        torch.jit.script(network).save(path)
        return path
    return save_script


@pytest.mark.parametrize("kind", [WithKeywords, FeaturesOnly, Pair])
def test_every_kind_of_torchscript_gives_features_and_the_probabilities_it_has(saved, kind):
    pixels = images(70)                                # more than one batch
    features, probabilities = eval.Inception(saved(kind()), CPU).features(pixels)
    expected = pixels.astype(np.float32).mean((1, 2))
    assert np.allclose(features, expected)
    if kind is FeaturesOnly:
        assert probabilities is None
    else:
        softmax = torch.from_numpy(expected).softmax(1)
        assert np.allclose(probabilities, softmax, atol=1e-6)


def test_grey_becomes_three_colours_and_clips_become_frames(saved):
    network, grey = eval.Inception(saved(FeaturesOnly()), CPU), images(6, channels=1)
    features, _ = network.features(grey)
    assert np.allclose(features, grey.astype(np.float32).mean((1, 2)).repeat(3, 1))
    assert np.allclose(network.features(grey.reshape(2, 3, 8, 8, 1))[0], features)


class OfClips(torch.nn.Module):
    """Called as StyleGAN-V's I3D: anything but that gives zeros."""
    def forward(self, clips, rescale: bool = False, resize: bool = False,
                return_features: bool = False):
        assert clips.dtype == torch.float32
        return clips.mean((3, 4)).flatten(1) * float(rescale and resize and return_features)


def test_clips_have_features_as_wholes(saved):
    clips = images(20).reshape(5, 4, 8, 8, 3)
    features, _ = eval.I3D(saved(OfClips()), CPU).features(clips)
    assert np.allclose(features, clips.mean((2, 3)).transpose(0, 2, 1).reshape(5, 12))


def test_images_have_no_fvd():
    c = PRESETS["gen_shapes"].config
    c = replace(c, sampling=replace(c.sampling, i3d="i3d.pt", proxy_classifier=False))
    with pytest.raises(ValueError, match="--i3d=i3d.pt: FVD is of videos"):
        eval.quality(images(4).reshape(4, 8, 8, 3), [0] * 4, None, c, CPU)


def test_networks_are_told_apart_by_their_files(saved):
    one, same, other = (eval.Inception(saved(k()), CPU) for k in (FeaturesOnly, FeaturesOnly, Pair))
    assert one.key == same.key != other.key


def test_a_state_dict_is_refused_with_what_to_do(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    words = r"weights.pt: not a TorchScript file; .*torch.jit.script\(network\).save"
    with pytest.raises(ValueError, match=words):
        eval.Inception(str(tmp_path / "weights.pt"), CPU)
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        eval.Inception(str(tmp_path / "nothing.pt"), CPU)


class Counting:
    """A network of features that counts the images it saw."""
    def __init__(self, folder, key):
        self.path, self.key, self.seen = f"{folder}/network.pt", key, 0

    def features(self, pixels):
        self.seen += len(pixels)
        return eval.as_frames(pixels).astype(np.float32).mean((1, 2)), None


def real_statistics(network, c):
    return eval.real_statistics(network, data.make_source(c, "train", "gen"), c, 30)


def test_statistics_of_real_images_are_computed_once_for_each_network_and_data(tmp_path):
    c, network, other = configuration(), Counting(tmp_path, "one"), Counting(tmp_path, "two")
    first, again = (real_statistics(network, c) for _ in range(2))
    assert network.seen == 30 and all(map(np.array_equal, first, again))
    real_statistics(other, c)
    assert other.seen == 30
    changed = real_statistics(network, configuration(data_seed=1))
    assert network.seen == 60 and not np.array_equal(changed[0], first[0])
    assert all(map(np.array_equal, first, real_statistics(network, c)))
    assert network.seen == 60 and len(os.listdir(tmp_path)) == 3


def test_statistics_of_clips_are_told_apart_by_their_context_frames(tmp_path):
    one, two = (replace(VIDEO, cond_frames=count) for count in (1, 2))
    network = Counting(tmp_path, "one")
    for model in (one, two):
        real_statistics(network, configuration(model))
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("kept", [0, 100])
def test_damaged_statistics_are_computed_again(tmp_path, kept):
    c, network = configuration(), Counting(tmp_path, "one")
    first = real_statistics(network, c)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:kept])
    assert all(map(np.array_equal, first, real_statistics(network, c)))
    assert network.seen == 60
    real_statistics(network, c)
    assert network.seen == 60


# --------------------------------------------------------------------------------------------------
# the proxy classifier

def test_the_proxy_classifier_learns_two_classes_and_repeats_itself():
    pixels, labels = dark_and_bright(64)
    before = torch.get_rng_state()
    proxy, twin = (eval.train_proxy(pixels, labels, 2, CPU, steps=20) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    weights, same = proxy.state_dict(), twin.state_dict()
    assert all(torch.equal(w, same[name]) for name, w in weights.items())
    features, classes = proxy.classify(pixels, CPU)
    assert features.shape == (64, 128) and (classes == labels).all(), classes
    other = eval.train_proxy(pixels, labels, 2, CPU, steps=20, seed=1)
    assert not torch.equal(other.head.weight, proxy.head.weight)


def test_the_proxy_classifier_takes_clips_frame_by_frame_and_leaves_out_unknown_labels():
    pixels, labels = dark_and_bright(64)
    clips = pixels[:, None].repeat(3, 1)
    some = np.where(np.arange(64) < 40, labels, -1)
    features, classes = eval.train_proxy(clips, some, 2, CPU, steps=20).classify(clips, CPU)
    assert features.shape == (192, 128) and (classes == labels).all(), classes
    with pytest.raises(ValueError, match="no image has a label"):
        eval.train_proxy(pixels, np.full(64, -1), 2, CPU)


# --------------------------------------------------------------------------------------------------
# everything together

def real_images(c, shift=0):
    """A stand-in for diffusion.generate: real images of the labels in the condition, or of the
    label `shift` further."""
    source, images_of = data.make_source(c, "train", "gen"), {}
    for i in range(10_000, 10_200):                    # the proxy classifier does not learn these
        record = source[i]
        images_of.setdefault(record["label"], []).append(record["pixels"])

    def generate(model, c, count, cond, generator=None, callback=None):
        labels = cond["labels"].tolist()
        chosen = [images_of[(label + shift) % 4][i] for i, label in enumerate(labels)]
        return torch.from_numpy(np.stack(chosen)).movedim(-1, 1)
    return generate


def train_proxy_for(monkeypatch, steps, count):
    """Makes the proxy classifier a cheap one: of so many steps and images."""
    monkeypatch.setattr(eval, "PROXY_IMAGES", count)
    monkeypatch.setattr(eval, "train_proxy", functools.partial(eval.train_proxy, steps=steps))


@pytest.mark.parametrize("shift, expected", [(0, 1.0), (1, 0.0)])
def test_class_accuracy_is_the_fraction_of_samples_that_show_their_label(
        monkeypatch, model, shift, expected):
    larger = replace(MODEL, sample_size=(16, 16))      # shapes can be told apart
    c = configuration(larger, proxy_classifier=True)
    monkeypatch.setattr(diffusion, "generate", real_images(c, shift))
    monkeypatch.setattr(diffusion, "denoising_losses", lambda model, batch, *_: batch.weights)
    train_proxy_for(monkeypatch, 300, 1500)
    metrics, predictions = evaluate(model, c)
    assert metrics["class_accuracy"] == pytest.approx(expected, abs=0.15), metrics
    assert metrics["proxy_accuracy"] > 0.85, metrics
    assert metrics["frechet"] < 5 * metrics["frechet_real"], metrics       # the samples are real
    assert metrics["samples"] == len(predictions) == 24
    shapes = {(p["pixels"].shape, p["pixels"].dtype.name) for p in predictions.values()}
    assert shapes == {((16, 16, 3), "uint8")}


def test_noise_is_further_from_the_data_than_the_data(monkeypatch, model):
    train_proxy_for(monkeypatch, 20, 500)
    metrics, _ = evaluate(model, configuration(proxy_classifier=True))
    assert metrics["frechet"] > 5 * metrics["frechet_real"], metrics


def test_a_look_in_between_trains_no_proxy_classifier(model):
    metrics, predictions = evaluate(model, configuration(proxy_classifier=True), limit=10)
    assert len(predictions) == 10
    losses = {f"loss_at_{level}" for level in eval.LEVELS}
    assert set(metrics) == {"minus_loss", "loss", "samples"} | losses


def test_the_held_out_loss_has_the_same_noise_each_time(model):
    first, again, other = (evaluate(model, configuration(), seed=seed)[0] for seed in (0, 0, 1))
    assert first == again and first["loss"] != other["loss"]
    at = [first[f"loss_at_{level}"] for level in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert len(set(at)) == 5 and first["loss"] == pytest.approx(np.mean(at))


def test_the_lowest_loss_is_the_first_and_highest_number(model):
    metrics, _ = evaluate(model, configuration())
    assert next(iter(metrics)) == "minus_loss" and metrics["minus_loss"] == -metrics["loss"]


def test_the_held_out_loss_is_that_of_the_networks_own_estimate_of_upright_items(model):
    """It is the loss of training with self-conditioning in every example, at one t."""
    c = configuration(self_cond_rate=0.0, flip=True)
    metrics, _ = evaluate(model, c, batch_size=24)
    source = data.make_source(c, "val", "gen")
    always = replace(c.diffusion, self_cond_rate=1.0)
    c = replace(c, diffusion=always, data=replace(c.data, flip=False))
    examples = [data.gen_example(source[i], c, None) for i in range(24)]
    batch = data.collate("gen", c)(examples).to("cpu")
    with torch.no_grad():
        losses = diffusion.denoising_losses(
            model, batch, c, torch.full((24,), 0.3), CPU.generator(0))
    assert metrics["loss_at_0.3"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_a_model_keeps_its_mode_and_the_global_generator_its_state(monkeypatch, model):
    train_proxy_for(monkeypatch, 5, 100)
    before = torch.get_rng_state()
    c = configuration(eval_samples=20, sample_steps=1, proxy_classifier=True)
    for mode in (True, False):
        evaluate(model.train(mode), c, batch_size=16)
        assert model.training == mode
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("classes", [0, 4])
def test_a_video_model_is_compared_with_repeating_the_last_frame(monkeypatch, classes):
    c = configuration(replace(VIDEO, num_classes=classes), eval_samples=10, proxy_classifier=True)
    video, labels = build(c.model), []

    def repeat(model, c, count, cond, generator=None, callback=None):
        labels.extend(cond["labels"].tolist())
        return cond["frames"][:, :, -1:].expand(-1, -1, 2, -1, -1)

    monkeypatch.setattr(diffusion, "generate", repeat)
    train_proxy_for(monkeypatch, 5, 200)
    metrics, predictions = evaluate(video, c, batch_size=4)
    source = data.make_source(c, "val", "gen")
    clips = np.stack([source[i]["pixels"] for i in range(10)])
    expected = np.square((clips[:, 2:] / 255 - clips[:, 1:2] / 255)).mean()
    assert metrics["frame_error"] == pytest.approx(metrics["copy_error"]), metrics
    assert metrics["copy_error"] == pytest.approx(expected, rel=1e-5)
    assert np.array_equal(eval.real_pixels(source, c, 10)[0], clips[:, 2:])
    for clip, prediction in zip(clips, predictions.values(), strict=True):
        assert prediction["pixels"].shape == (4, 8, 8, 3)
        assert np.array_equal(prediction["pixels"][:2], clip[:2])
    assert labels == [source[i]["label"] for i in range(10)]
    assert ("class_accuracy" in metrics) == bool(classes) and "frechet_real" in metrics


def test_a_sorted_dataset_is_sampled_in_a_random_order_each_item_before_any_twice(model):
    pixels, labels = images(8), np.arange(8) // 2
    source, c = data.PixelArrays(pixels, labels, "abcd"), configuration(eval_samples=20)
    items = eval.random_items(source, c)
    assert len(items) == 20 and items == eval.random_items(source, c)
    assert sorted(items[:8]) == sorted(items[8:16]) == list(range(8)) != items[:8]


def test_processes_share_batches_and_put_them_in_order_again(model):
    c, shares = configuration(sample_steps=1), []
    source = data.make_source(c, "val", "gen")

    def predict(device):
        return eval.predict_items(
            model, source, range(22), c, ["gen"], device, sample.PREDICT, batch_size=5)

    def keep(items):
        shares.append(items)
        return [items]

    for rank in range(3):
        mine = Device("cpu")
        mine.rank, mine.world, mine.gather = rank, 3, keep
        predict(mine)
    together = Device("cpu")
    together.gather = lambda items: shares
    whole, shared = predict(CPU), predict(together)
    assert [len(share) for share in shares] == [2, 2, 1]
    assert list(whole) == list(shared) == list(range(22))
    for n in whole:
        assert np.array_equal(whole[n]["pixels"], shared[n]["pixels"])
        assert whole[n]["losses"] == shared[n]["losses"]


@pytest.fixture
def checkpoint(tmp_path, model):
    c = configuration(sample_steps=100, proxy_classifier=True)
    content = {"network": "UNet", "config": asdict(c), "model": model.state_dict()}
    save(str(tmp_path / "best.pt"), content)


def test_the_truth_of_a_model_that_generates_is_refused(monkeypatch, checkpoint, tmp_path):
    monkeypatch.setattr(sys, "argv", ["eval.py", f"--ckpt={tmp_path}", "--truth", "--device=cpu"])
    with pytest.raises(SystemExit, match="--truth: only for det, seg, kpt, cap"):
        eval.main()


def test_eval_prints_and_saves_the_numbers_of_a_model_that_generates(
        monkeypatch, capsys, checkpoint, tmp_path, saved):
    train_proxy_for(monkeypatch, 20, 200)
    monkeypatch.setattr(sys, "argv", [
        "eval.py", f"--ckpt={tmp_path}", "--eval_samples=12", "--sample_steps=2", "--sampler=ddpm",
        "--guidance=1", "--workers=0", "--device=cpu", f"--inception={saved(Pair())}"])
    eval.main()
    report = json.loads((tmp_path / "best_val_metrics.json").read_text())
    s = report["sampling"]
    assert (s["sample_steps"], s["sampler"], s["guidance"]) == (2, "ddpm", 1.0)
    assert set(report["gen"]) == {
        "minus_loss", "loss", "class_accuracy", "proxy_accuracy", "frechet", "frechet_real", "fid",
        "inception_score", "inception_score_std", "samples"} | {
        f"loss_at_{level}" for level in eval.LEVELS}
    assert report["gen"]["samples"] == 12 and math.isfinite(report["gen"]["fid"])
    printed = capsys.readouterr().out
    for name in ("loss_at_0.3", "proxy_accuracy", "inception_score"):
        assert name in printed
    assert os.path.exists(tmp_path / "best_val_gen.png")
    assert list(tmp_path.rglob("*.statistics_*.npz"))
