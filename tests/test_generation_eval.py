"""Metrics of generated images: distances, scores, feature networks, the judge, and how they come together."""
import json
import os
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import eval
from model import RINConfig, UNetConfig, build
from train import Config

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
MODEL = UNetConfig(sample_size=(8, 8), num_classes=4, self_cond="x", unet_dim=32, multipliers=(1,), res_blocks=(1,), attention_at=(8,),
                   head_dim=32)
VIDEO = RINConfig(sample_size=(8, 8), frames=2, cond_frames=2, interface_dim=32, latents=8, latent_dim=32, latent_heads=4, latent_layers=(1, 1),
                  rw_heads=4)


def recipe(model=MODEL, **fields):
    """A configuration as load_model gives it."""
    config = Config(model=model, tasks="gen", **{"val_count": 40, "eval_samples": 24, "sample_steps": 2, **fields})
    return SimpleNamespace(**vars(config), categories=[])


@pytest.fixture(scope="module")
def model():
    """Untrained, but with an output that is not zero."""
    torch.manual_seed(0)
    model = build(MODEL).eval()
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    return model


def images(count, channels=3, seed=0):
    return torch.randint(0, 256, (count, 8, 8, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def dark_and_bright(count):
    """Images of two classes that brightness tells apart."""
    labels = torch.arange(count) % 2
    return images(count) // 3 + (labels * 160).byte()[:, None, None, None], labels


# distances and scores

def random_covariance(rng, size):
    a = rng.standard_normal((size, size))
    return a @ a.T + 0.1 * np.eye(size)


def test_distance_of_diagonal_gaussians_is_that_of_their_deviations():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([16.0, 1.0, 0.0])
    mean = np.array([1.0, 2.0, 2.0])
    expected = 9 + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert eval.frechet_distance(mean, np.diag(a), np.zeros(3), np.diag(b)) == pytest.approx(expected, rel=1e-12)


def test_distance_of_covariances_that_do_not_commute_is_the_closed_form():
    rng = np.random.default_rng(0)
    a, b = random_covariance(rng, 12), random_covariance(rng, 12)
    assert not np.allclose(a @ b, b @ a)
    expected = np.trace(a + b) - 2 * np.sqrt(np.linalg.eigvals(a @ b).real).sum()        # another way to the same trace
    found = eval.frechet_distance(np.zeros(12), a, np.zeros(12), b)
    assert found == pytest.approx(expected, rel=1e-9) and found > 1
    assert eval.frechet_distance(np.zeros(12), b, np.zeros(12), a) == pytest.approx(found, rel=1e-9)


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
    u *= 100 / np.linalg.norm(u)                       # rounding makes 299 eigenvalues of about 1e-12 from the zeros of uu'
    found = eval.frechet_distance(np.zeros(300), u @ u.T, np.zeros(300), np.eye(300))
    assert found == pytest.approx(1e4 + 300 - 2 * 100, rel=1e-12)


def test_statistics_are_unbiased_and_need_two_rows():
    features = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    mean, cov = eval.feature_statistics(features)
    assert cov.dtype == np.float64 and np.allclose(cov, np.cov(features.astype(np.float64).T)) and np.allclose(mean, features.mean(0), atol=1e-6)
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        eval.feature_statistics(features[:1])


def test_inception_score_is_1_without_a_clue_and_the_number_of_classes_with_certainty():
    assert eval.inception_score(np.full((40, 10), 0.1)) == (pytest.approx(1), pytest.approx(0))
    assert eval.inception_score(np.eye(10)[np.arange(100) % 10]) == (pytest.approx(10), pytest.approx(0))
    assert eval.inception_score(np.eye(10)[np.arange(100) // 10])[0] == pytest.approx(1)                # each split has but one class
    assert eval.inception_score(np.eye(4)[[0, 1, 2]], splits=1)[0] == pytest.approx(3)


# feature networks

class WithKeywords(torch.nn.Module):
    """Called as NVIDIA's file is."""
    def forward(self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False):
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
    def save(network):
        path = str(tmp_path / f"{type(network).__name__}.pt")
        torch.jit.script(network).save(path)
        return path
    return save


@pytest.mark.parametrize("kind", [WithKeywords, FeaturesOnly, Pair])
def test_every_kind_of_torchscript_gives_features_and_the_probabilities_it_has(saved, kind):
    network, pixels = eval.Inception(saved(kind())), images(5)
    expected = pixels.float().mean((1, 2))
    assert np.allclose(network.features(pixels), expected)
    if kind is FeaturesOnly:
        assert network.probabilities(pixels) is None
    else:
        assert np.allclose(network.probabilities(pixels), expected.softmax(1), atol=1e-6)


def test_grey_becomes_three_colours_and_clips_become_frames(saved):
    network, grey = eval.Inception(saved(FeaturesOnly())), images(6, channels=1)
    assert np.allclose(network.features(grey), grey.float().mean((1, 2)).expand(-1, 3))
    assert np.allclose(network.features(grey.unflatten(0, (2, 3))), network.features(grey))


def test_networks_are_told_apart_by_their_files(saved):
    assert eval.Inception(saved(FeaturesOnly())).key == eval.Inception(saved(FeaturesOnly())).key != eval.Inception(saved(Pair())).key


def test_a_state_dict_is_refused_with_what_to_do(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt: not a TorchScript file.*state dict.*torch.jit.script\(network\).save"):
        eval.Inception(str(tmp_path / "weights.pt"))
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        eval.Inception(str(tmp_path / "nothing.pt"))


class Counting:
    """A feature network that counts the images it saw."""
    def __init__(self, key):
        self.key, self.seen = key, 0

    def features(self, pixels):
        self.seen += len(pixels)
        return pixels.float().mean((1, 2)).numpy()


def test_statistics_of_real_images_are_computed_once_for_each_network_and_data(tmp_path):
    c = recipe()
    source, network, other = data.make_source(c, "train", "gen"), Counting("one"), Counting("two")
    first = eval.real_statistics(network, source, c, count=30, folder=str(tmp_path), batch_size=8)
    again = eval.real_statistics(network, source, c, count=30, folder=str(tmp_path), batch_size=8)
    assert network.seen == 30 and all(np.array_equal(a, b) for a, b in zip(first, again))
    eval.real_statistics(other, source, c, count=30, folder=str(tmp_path))
    assert other.seen == 30
    name = "stats_shapes_train_8x8x3_30_one.npz"
    assert name in os.listdir(tmp_path) and len(os.listdir(tmp_path)) == 2

    c.data_seed = 1                                    # not in the name
    eval.real_statistics(network, data.make_source(c, "train", "gen"), c, count=30, folder=str(tmp_path))
    assert network.seen == 60
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    eval.real_statistics(network, data.make_source(c, "train", "gen"), c, count=30, folder=str(tmp_path))
    assert network.seen == 90


# the judge

def test_the_judge_learns_two_classes_repeats_itself_and_leaves_the_global_generator_alone():
    pixels, labels = dark_and_bright(64)
    before = torch.get_rng_state()
    judge, twin = (eval.train_judge(pixels, labels, 2, steps=20) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(judge.state_dict().values(), twin.state_dict().values()))
    features, classes = judge.look(pixels)
    assert features.shape == (64, 128) and (classes == labels.numpy()).all(), classes
    other = eval.train_judge(pixels, labels, 2, steps=20, seed=1)
    assert not torch.equal(other.head.weight, judge.head.weight)


def test_the_judge_takes_clips_frame_by_frame_and_no_heed_of_unknown_labels():
    pixels, labels = dark_and_bright(64)
    clips = pixels[:, None].repeat(1, 3, 1, 1, 1)
    wrong = torch.where(torch.arange(64) < 40, labels, -1)
    features, classes = eval.train_judge(clips, wrong, 2, steps=20).look(clips)
    assert features.shape == (192, 128) and (classes == labels.numpy()).all(), classes
    with pytest.raises(ValueError, match="no image has a label"):
        eval.train_judge(pixels, torch.full((64,), -1), 2)


# everything together

def true_images(c, shift=0):
    """A stand-in for `generate`: real images of the class that is asked for, or of one `shift` further."""
    source, of = data.make_source(c, "train", "gen"), {}
    for i in range(10_000, 10_200):                    # the judge does not learn from these
        of.setdefault(source[i]["label"], []).append(source[i]["pixels"])

    def generate(model, c, count, labels=None, known=None, generator=None, callback=None):
        chosen = [of[(label + shift) % 4][i] for i, label in enumerate(labels.tolist())]
        return data.to_floats(torch.from_numpy(np.stack(chosen)), "cpu")
    return generate


@pytest.mark.parametrize("shift, expected", [(0, 1.0), (1, 0.0)])
def test_class_accuracy_is_the_share_of_samples_that_show_what_was_asked_for(monkeypatch, model, shift, expected):
    larger = replace(MODEL, sample_size=(16, 16))      # shapes can be told apart
    c = recipe(larger)
    monkeypatch.setattr(eval, "generate", true_images(c, shift))
    monkeypatch.setattr(eval, "denoising_loss", lambda *args: torch.zeros(()))
    monkeypatch.setattr(eval, "JUDGE_IMAGES", 1500)
    metrics, pixels = eval.evaluate_generation(model, c, judge_steps=150)
    assert metrics["class_accuracy"] == pytest.approx(expected, abs=0.15) and metrics["judge_accuracy"] > 0.85, metrics
    assert metrics["samples"] == 24 and pixels.shape == (24, 16, 16, 3) and pixels.dtype == np.uint8
    assert metrics["frechet"] < 5 * metrics["frechet_real"], metrics                     # the samples are real


def test_noise_is_further_from_the_data_than_the_data(monkeypatch, model):
    monkeypatch.setattr(eval, "JUDGE_IMAGES", 500)
    metrics, _ = eval.evaluate_generation(model, recipe(), judge_steps=20)
    assert metrics["frechet"] > 5 * metrics["frechet_real"], metrics


def test_the_held_out_loss_has_the_same_noise_each_time(model):
    source = data.make_source(recipe(), "val", "gen")
    first, again, other = (eval.held_out_loss(model, recipe(), source, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert set(first["loss_at"]) == {"0.1", "0.3", "0.5", "0.7", "0.9"} and len(set(first["loss_at"].values())) == 5
    assert first["loss"] == pytest.approx(np.mean(list(first["loss_at"].values())))


def test_a_model_keeps_its_mode_and_the_global_generator_its_state(model):
    before = torch.get_rng_state()
    _, pixels = eval.evaluate_generation(model.train(), recipe(eval_samples=70, sample_steps=1, val_count=8), batch_size=16, judge=False)
    assert model.training and not model.eval().training and torch.equal(torch.get_rng_state(), before)
    assert len(pixels) == 64                           # with nothing to measure, no more are drawn


@pytest.mark.parametrize("labels", [False, True])
def test_a_video_model_is_compared_with_repeating_the_last_frame(monkeypatch, labels):
    c = recipe(replace(VIDEO, num_classes=4 * labels), eval_samples=10)
    video, asked = build(c.model), []

    def repeat(model, c, count, labels=None, known=None, generator=None, callback=None):
        asked.append(labels)
        return known[:, :, -1:].expand(-1, -1, 2, -1, -1)

    monkeypatch.setattr(eval, "generate", repeat)
    metrics, pixels = eval.evaluate_generation(video, c, batch_size=4, judge_steps=5)
    source = data.make_source(c, "val", "gen")
    clips = np.stack([source[i]["pixels"] for i in range(10)]) / 255
    assert metrics["frame_error"] == pytest.approx(metrics["copy_error"]), metrics
    assert metrics["copy_error"] == pytest.approx(np.square(clips[:, 2:] - clips[:, 1:2]).mean(), rel=1e-5)
    assert np.allclose(eval.real_items(source, c, 10, known_frames=2)[0] / 255, clips[:, 2:])
    assert pixels.shape == (10, 4, 8, 8, 3) and all(np.array_equal(p[:2], source[i]["pixels"][:2]) for i, p in enumerate(pixels))
    truth = [source[i]["label"] for i in range(10)]
    assert torch.cat(asked).tolist() == truth if labels else asked == [None] * 3
    assert ("class_accuracy" in metrics) == labels and "frechet_real" in metrics


def test_processes_share_batches_and_put_them_in_order_again(monkeypatch):
    whole = eval.share_out(22, 5)
    assert [list(b) for b in whole] == [list(range(0, 5)), list(range(5, 10)), list(range(10, 15)), list(range(15, 20)), [20, 21]]
    shares = []
    for rank in range(3):
        monkeypatch.setattr(eval, "processes", lambda: (rank, 3))
        shares.append(eval.share_out(22, 5))
    monkeypatch.setattr(eval.dist, "all_gather_object", lambda out, mine: out.__setitem__(slice(None), shares))
    assert eval.gather(shares[0]) == whole


def test_eval_prints_and_saves_the_numbers_of_a_model_that_generates(monkeypatch, capsys, tmp_path, model, saved):
    c = recipe(sample_steps=100)
    config = {k: v for k, v in vars(c).items() if k != "categories"} | {"model": asdict(MODEL)}
    torch.save({"network": "UNet", "model": model.state_dict(), "step": 1, "best": 0.0, "preset": "test", "config": config,
                "categories": [{"id": i, "name": name, "label": i} for i, name in enumerate(data.KINDS)]}, tmp_path / "best.pt")
    monkeypatch.setattr(eval, "JUDGE_IMAGES", 200)
    monkeypatch.setattr(sys, "argv", ["eval.py", f"--ckpt={tmp_path}", "--samples=12", "--steps=2", "--sampler=ddpm", "--guidance=1", "--workers=0",
                                      "--device=cpu", f"--inception={saved(Pair())}"])
    eval.main()
    report = json.loads((tmp_path / "best_val_metrics.json").read_text())
    assert (report["sample_steps"], report["sampler"], report["guidance"]) == (2, "ddpm", 1.0)
    assert set(report["gen"]) == {"loss", "loss_at", "class_accuracy", "judge_accuracy", "frechet", "frechet_real", "fid", "inception_score",
                                  "inception_score_std", "samples"}
    printed = capsys.readouterr().out
    assert "loss_at 0.3" in printed and "judge_accuracy" in printed and "inception_score" in printed
    assert os.path.exists(tmp_path / "best_val_samples.png") and any(name.startswith("stats_shapes_train_8x8x3_60_") for name in os.listdir(tmp_path))
