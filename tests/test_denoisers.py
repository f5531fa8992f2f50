"""RIN and UNet: what they claim. That they agree with the reference is asked in test_parity.py."""
import os
from dataclasses import replace

import pytest
import torch

import model as m
from diffusion import diffuse, diffusion_loss, sample, self_cond_for_training, softmax_bits
from test_parity import FILES, Golden, rin_config, unet_config

GOLDEN = [f for f in FILES if os.path.basename(f).startswith(("rin", "unet"))]


@pytest.mark.parametrize("path", GOLDEN, ids=[os.path.basename(f) for f in GOLDEN])
def test_weights_that_do_not_fit_are_refused_by_name(path):
    g = Golden(path)
    model = m.RIN(rin_config(g.config, g["in:cond"])) if "num_layers" in g.config else m.UNet(unet_config(g.config, g))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    name = "model/time_emb/dense_1/kernel"
    missing = {k: w for k, w in g.weights.items() if k != name}
    for weights, words in [(missing, "missing: time_emb.fc2.weight"), (g.weights | {"model/other/kernel": g.weights[name]}, "left over: model/other"),
                           (g.weights | {name: g.weights[name][1:]}, "wrong shape: model/time_emb/dense_1/kernel")]:
        with pytest.raises(ValueError, match=words):
            m.load_reference_weights(model, weights)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------
# RIN

TINY_RIN = m.RINConfig(sample_size=(8, 8), interface_patch=4, interface_dim=24, interface_mlp_ratio=2, latents=10, latent_dim=32,
                       latent_mlp_ratio=2, latent_heads=4, latent_layers=(1, 1), rw_heads=4, drop_path=0.0, dropout=0.0)
TINY_UNET = m.UNetConfig(sample_size=(8, 8), unet_dim=32, multipliers=(1, 2), res_blocks=(1, 1), attention_at=(4,), head_dim=16)


def example(c, B=2):
    """(x, gamma) of a configuration."""
    frames = [c.frames] if getattr(c, "frames", 1) + getattr(c, "cond_frames", 0) > 1 else []
    return torch.randn(B, c.channels, *frames, *c.sample_size), torch.rand(B)


def randomised(model):
    """Every parameter away from its first value, for zeros hide what a network looks at."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("self_cond", ["latent", "interface", "latent+interface"])
def test_a_warm_start_changes_nothing_at_first_and_something_later(self_cond):
    model = m.RIN(replace(TINY_RIN, self_cond=self_cond)).eval()
    x, gamma = example(TINY_RIN)
    with torch.no_grad():
        cold, hidden = model(x, gamma)
        assert torch.equal(model(x, gamma, hidden=hidden)[0], cold)
        randomised(model)
        cold, hidden = model(x, gamma)
        zeros = tuple(torch.zeros_like(h) for h in hidden)
        assert torch.equal(model(x, gamma, hidden=zeros)[0], cold)
        assert not torch.allclose(model(x, gamma, hidden=hidden)[0], cold, atol=1e-3)


RIN_OPTIONS = {
    "one block that only reads": dict(latent_layers=(1, 0)),
    "time beside": dict(time_on_latents=False),
    "label beside": dict(num_classes=5, cond_on_latents=0),
    "both beside, writable": dict(num_classes=5, cond_on_latents=0, time_on_latents=False, cond_writable=True, conv_kernel=3),
    "decoupled": dict(num_classes=5, cond_on_latents=0, time_on_latents=False, cond_decoupled_read=True, cond_dim=12),
    "not square": dict(sample_size=(4, 12), conv_kernel=2, interface_position="sin_cos", latent_position="sin_cos"),
    "no MLP after a write": dict(interface_mlp_ratio=0, rw_context_norm=True, channels=7),
    "interface wider than latents": dict(interface_dim=48, checkpointing=True),
    "video": dict(frames=3, cond_frames=1, frame_stride=2, num_classes=5, self_cond="latent+interface", cond_on_latents=0,
                  time_on_latents=False, cond_writable=True, conv_kernel=3),
    "video of patches of three frames": dict(frames=4, frame_stride=3, interface_position="sin_cos_plus_learned"),
}


@pytest.mark.parametrize("name", RIN_OPTIONS)
def test_rin_predicts_in_the_shape_of_its_input_and_every_parameter_learns(name):
    c = replace(TINY_RIN, **RIN_OPTIONS[name])
    model = m.RIN(c)
    randomised(model).train()
    x, gamma = example(c)
    parts = [torch.tensor([1, -1])] * (c.num_classes > 0) + [torch.randn(2, c.channels, c.cond_frames, *c.sample_size)] * (c.cond_frames > 0)
    cond = tuple(parts) if parts else None
    pred, hidden = model(x, gamma, cond)
    pred, hidden = model(x, gamma, cond, tuple(h.detach() for h in hidden))
    assert pred.shape == x.shape and hidden[0].shape == (2, c.latents, c.latent_dim)
    (pred.square().mean() + hidden[0].square().mean()).backward()          # a last block that only reads moves latents alone
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_known_frames_change_the_prediction_of_a_video():
    c = replace(TINY_RIN, frames=2, cond_frames=2, frame_stride=2)
    model = randomised(m.RIN(c))
    x, gamma = example(c)
    with torch.no_grad():
        a, b = (model(x, gamma, torch.randn(2, 3, 2, 8, 8))[0] for _ in range(2))
    assert a.shape == x.shape and not torch.allclose(a, b, atol=1e-3)
    with pytest.raises(ValueError, match="takes frames"):
        model(x, gamma)


@pytest.mark.parametrize("model_class, config", [(m.RIN, TINY_RIN), (m.RIN, replace(TINY_RIN, frames=2)), (m.RIN, replace(TINY_RIN, cond_on_latents=0)),
                                                 (m.UNet, TINY_UNET)])
def test_a_dropped_label_is_none_whatever_it_was_and_others_matter(model_class, config):
    model = randomised(model_class(replace(config, num_classes=5)))
    x, gamma = example(config)
    predict = lambda labels: out[0] if isinstance(out := model(x, gamma, labels), tuple) else out
    with torch.no_grad():
        none, dropped, zeros = predict(None), predict(torch.tensor([-1, -1])), predict(torch.zeros(2, 5))
        ones, mixed, one_hot = predict(torch.tensor([1, 1])), predict(torch.tensor([-1, 1])), predict(torch.eye(5)[[1, 1]])
    assert torch.equal(none, dropped) and torch.equal(none, zeros) and torch.equal(ones, one_hot)
    assert torch.allclose(mixed[0], none[0], atol=1e-5) and torch.allclose(mixed[1], ones[1], atol=1e-5)
    assert not torch.allclose(ones, none, atol=1e-3)


@pytest.mark.parametrize("model_class, config, wrong, words", [
    (m.RIN, TINY_RIN, dict(self_cond="tape"), "'none', 'latent', 'interface' or 'latent\\+interface'"),
    (m.RIN, TINY_RIN, dict(interface_position="fourier"), "'learned', 'sin_cos' or 'sin_cos_plus_learned'"),
    (m.RIN, TINY_RIN, dict(sample_size=(8, 9)), "multiple of interface_patch 4"),
    (m.RIN, TINY_RIN, dict(cond_decoupled_read=True), "needs tokens beside the interface"),
    (m.RIN, TINY_RIN, dict(time_on_latents=False, cond_dim=8), "cond_dim 8"),
    (m.RIN, TINY_RIN, dict(latent_dim=30, latent_heads=3), "width 30 of the time embedding"),
    (m.UNet, TINY_UNET, dict(self_cond="latent"), "'none', 'x', 'eps' or 'auto'"),
    (m.UNet, TINY_UNET, dict(transformer_layers=1, transformer_position="fourier"), "'learned', 'sin_cos'"),
    (m.UNet, TINY_UNET, dict(sample_size=(8, 9)), "multiple of 2"),
    (m.UNet, TINY_UNET, dict(res_blocks=(1, 1, 1)), "differ in length"),
    (m.UNet, TINY_UNET, dict(softmax_groups=2), "multiple of softmax_groups 2"),
])
def test_options_that_make_no_sense_are_refused(model_class, config, wrong, words):
    with pytest.raises(ValueError, match=words):
        model_class(replace(config, **wrong))


def test_a_condition_that_the_network_does_not_take_is_refused():
    x, gamma = example(TINY_RIN)
    for model in (m.RIN(TINY_RIN), m.UNet(TINY_UNET)):
        with pytest.raises(ValueError, match="takes nothing"):
            model(x, gamma, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="got samples of shape"):
        m.RIN(TINY_RIN)(x[:, :, :4], gamma)


# ---------------------------------------------------------------------------------------------------------------
# UNet

UNET_OPTIONS = {
    "self-conditioned": dict(self_cond="x"),
    "strided": dict(in_stride=2, in_kernel=4, sample_size=(16, 8), attention_at=()),
    "logits": dict(channels=6, softmax_groups=2, in_stride=2, attention_at=()),
    "wider first, other kernels": dict(multipliers=(2, 1), kernel_sizes=(3, 1)),
    "all conditions": dict(num_classes=5, cond_channels=4, context_dim=20, transformer_layers=1, transformer_dim=64, transformer_stride=2),
    "no positions": dict(transformer_layers=1, transformer_dim=32, transformer_position="none", res_blocks=(2, 3)),
    "one resolution": dict(multipliers=(1,), res_blocks=(2,), attention_at=(8,)),
}


@pytest.mark.parametrize("name", UNET_OPTIONS)
def test_unet_predicts_in_the_shape_of_its_input_and_every_parameter_learns(name):
    c = replace(TINY_UNET, **UNET_OPTIONS[name])
    model = randomised(m.UNet(c)).train()
    x, gamma = example(c)
    parts = [(c.num_classes, torch.tensor([1, -1])), (c.cond_channels, torch.randn(2, c.cond_channels, *c.sample_size)),
             (c.context_dim, torch.randn(2, 7, c.context_dim))]
    out = model(x, gamma, tuple(part for taken, part in parts if taken), torch.randn_like(x) if c.self_cond != "none" else None)
    if c.softmax_groups:
        assert out.shape == (2, 16, 8, 8)
        out = softmax_bits(out, c.softmax_groups)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize("side, kernel, stride", [(7, 3, 2), (8, 3, 2), (8, 4, 2), (5, 2, 1), (6, 1, 1)])
def test_same_padding_puts_the_odd_pixel_at_the_bottom_and_right(side, kernel, stride):
    conv = m.SameConv2d(1, 1, kernel, stride, bias=False)
    torch.nn.init.ones_(conv.weight)
    out = -(-side // stride)
    pad = max((out - 1) * stride + kernel - side, 0)
    padded = torch.zeros(1, 1, side + pad, side + pad)
    padded[..., pad // 2:pad // 2 + side, pad // 2:pad // 2 + side] = x = torch.randn(1, 1, side, side)
    expected = padded.unfold(2, kernel, stride).unfold(3, kernel, stride).sum((-1, -2))
    assert torch.allclose(conv(x), expected, atol=1e-5) and expected.shape[-1] == out


# ---------------------------------------------------------------------------------------------------------------
# both, with diffusion.py

CASES = {"rin": (m.RIN, replace(TINY_RIN, num_classes=5), "eps"), "unet": (m.UNet, replace(TINY_UNET, num_classes=5, self_cond="x"), "eps"),
         "bits": (m.UNet, replace(TINY_UNET, channels=6, softmax_groups=2), "x_softmax_xent")}


@pytest.mark.parametrize("name", CASES)
def test_training_on_one_batch_lowers_the_loss_and_the_network_samples(name):
    model_class, config, pred_type = CASES[name]
    model = model_class(config)
    groups = getattr(config, "softmax_groups", 0)
    self_cond = config.self_cond
    x0 = torch.randn(8, config.channels, 8, 8, generator=torch.Generator().manual_seed(0)).sign()
    labels = torch.arange(8) % 5 if config.num_classes else None
    denoise = (lambda *args: softmax_bits(model(*args), groups)) if groups else model
    x_t, eps, gamma = diffuse(x0, "cosine", torch.linspace(0.1, 0.9, 8), torch.Generator().manual_seed(1))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(30):
        state = self_cond_for_training(denoise, x_t, gamma, labels, self_cond=self_cond, pred_type="eps" if pred_type == "eps" else "x")
        out = model(x_t, gamma, labels, state)
        loss = diffusion_loss(out[0] if isinstance(out, tuple) else out, pred_type, x0, eps, gamma, groups=groups or 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    images = sample(denoise, torch.randn(8, config.channels, 8, 8), 3, pred_type=pred_type, cond=labels, self_cond=self_cond,
                    guidance=1.0 if config.num_classes else 0.0)
    assert images.shape == x0.shape and images.isfinite().all()


def test_published_recipes_can_be_written_down():
    rin = dict(num_classes=10, drop_path=0.1, dropout=0.1)
    imagenet = m.RINConfig(sample_size=(64, 64), num_classes=1000, interface_patch=8, interface_dim=512, interface_mlp_ratio=4, rw_heads=16,
                           latent_dim=768, latent_layers=(4, 4, 4, 4), drop_path=0.0, dropout=0.0)
    bits = m.UNetConfig(channels=24, num_classes=10, self_cond="x", softmax_groups=3)
    panoptic = m.UNetConfig(sample_size=(512, 512), channels=16, cond_channels=256, context_dim=512, softmax_groups=2, unet_dim=128,
                            multipliers=(1, 1, 2, 2), res_blocks=(1, 1, 1, 1), attention_at=(), transformer_layers=6, transformer_dim=512,
                            in_kernel=1, out_kernel=1)
    with torch.device("meta"):
        for config in (m.RINConfig(**rin), imagenet, bits, panoptic,
                       m.UNetConfig(sample_size=(64, 64), num_classes=1000, unet_dim=192, multipliers=(1, 2, 3, 4), res_blocks=(3, 3, 3, 3))):
            model = (m.RIN if isinstance(config, m.RINConfig) else m.UNet)(config).eval()
            x, gamma = example(config)
            parts = [(config.num_classes, torch.tensor([1, 2])), (getattr(config, "cond_channels", 0), torch.randn(2, 256, 512, 512)),
                     (getattr(config, "context_dim", 0), torch.randn(2, 64, 512))]
            out = model(x, gamma, tuple(part for taken, part in parts if taken))
            assert (out[0] if isinstance(out, tuple) else out).shape[2:] == x.shape[2:]
