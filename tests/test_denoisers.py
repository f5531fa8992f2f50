"""What RIN, UNet and FIT claim. That they agree with the reference is asked in test_parity.py."""
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_parity import FILES, Golden, fit_config, rin_config, unet_config

import diffusion
import model as m

KINDS = "rin", "unet", "fit_denoiser"
GOLDEN = [f for f in FILES if os.path.basename(f).startswith(KINDS)]
NAMES = [os.path.basename(f) for f in GOLDEN]


def golden_model(g):
    if "num_layers" in g.config:
        return m.RIN(rin_config(g.config, g["in:cond"]))
    if "num_groups" in g.config:
        return m.FIT(fit_config(g.config, g))
    return m.UNet(unet_config(g.config, g))


@pytest.mark.parametrize("path", GOLDEN, ids=NAMES)
def test_weights_that_do_not_fit_are_refused_by_name(path):
    g = Golden(path)
    model, name = golden_model(g), "model/time_emb/dense_1/kernel"
    before = {key: w.clone() for key, w in model.state_dict().items()}
    missing = {key: w for key, w in g.weights.items() if key != name}
    for weights, words in (
            (missing, "missing: time_emb.fc2.weight"),
            (g.weights | {"model/other/kernel": g.weights[name]}, "left over: model/other"),
            (g.weights | {name: g.weights[name][1:]}, f"wrong shape: {name}")):
        with pytest.raises(ValueError, match=words):
            m.load_reference_weights(model, weights)
    assert all(torch.equal(w, before[key]) for key, w in model.state_dict().items())


TINY_RIN = m.RINConfig(
    sample_size=(8, 8),
    interface_patch=4,
    interface_dim=24,
    interface_mlp_ratio=2,
    latents=10,
    latent_dim=32,
    latent_mlp_ratio=2,
    latent_heads=4,
    latent_layers=(1, 1),
    rw_heads=4,
    drop_path=0.0,
    dropout=0.0,
)
TINY_FIT = m.FITConfig(
    sample_size=(8, 8),
    fit_layers="(1)1(1)1(1)",
    fit_grid=2,
    fit_patch=2,
    fit_dim=24,
    fit_heads=2,
    fit_latents=3,
    fit_latent_dim=32,
    fit_latent_heads=4,
    fit_mlp_ratio=2,
)
TINY_UNET = m.UNetConfig(
    sample_size=(8, 8),
    unet_dim=32,
    multipliers=(1, 2),
    res_blocks=(1, 1),
    attention_at=(4,),
    head_dim=16,
)


def example(c, B=2):
    """(x, gamma) of a configuration."""
    return torch.randn(B, *c.sample_shape), torch.rand(B)


def conditions(c):
    """All conditions that a network takes, for two examples; the second has no label."""
    given = {}
    if c.num_classes:
        given["labels"] = torch.tensor([1, -1])
    if c.cond_frames:
        given["frames"] = torch.randn(2, c.channels, c.cond_frames, *c.sample_size)
    if isinstance(c, m.UNetConfig) and c.cond_channels:
        given["map"] = torch.randn(2, c.cond_channels, *c.sample_size)
    if isinstance(c, m.UNetConfig) and c.context_dim:
        given["context"] = torch.randn(2, 7, c.context_dim)
    return given


def randomised(model):
    """Every parameter away from its first value, for zeros hide what a network looks at."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def without_gradient(model):
    return [name for name, p in model.named_parameters()
            if p.grad is None or not p.grad.isfinite().all()]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------------------
# RIN

@pytest.mark.parametrize("self_cond", ["latent", "interface", "latent+interface"])
def test_a_warm_start_changes_nothing_at_first_and_something_later(self_cond):
    model = m.RIN(replace(TINY_RIN, self_cond=self_cond)).eval()
    x, gamma = example(TINY_RIN)
    with torch.no_grad():
        cold, hidden = model(x, gamma)
        assert torch.equal(model(x, gamma, hidden)[0], cold)
        randomised(model)
        cold, hidden = model(x, gamma)
        zeros = tuple(torch.zeros_like(h) for h in hidden)
        assert torch.equal(model(x, gamma, zeros)[0], cold)
        assert not torch.allclose(model(x, gamma, hidden)[0], cold, atol=1e-3)


EXTRA = dict(num_classes=5, cond_on_latents=0, time_on_latents=False)
RIN_OPTIONS = {
    "one block that only reads": dict(latent_layers=(1, 0)),
    "time as an extra token": dict(time_on_latents=False),
    "label as an extra token": dict(num_classes=5, cond_on_latents=0),
    "both as extra tokens, writable": dict(**EXTRA, cond_writable=True, conv_kernel=3),
    "decoupled": dict(**EXTRA, cond_decoupled_read=True, cond_dim=12),
    "not square": dict(
        sample_size=(4, 12), conv_kernel=2, interface_position="sin_cos",
        latent_position="sin_cos"),
    "no MLP after a write": dict(interface_mlp_ratio=0, rw_context_norm=True, channels=7),
    "interface wider than latents": dict(interface_dim=48),
    "video": dict(
        **EXTRA, frames=3, cond_frames=1, frame_stride=2, self_cond="latent+interface",
        cond_writable=True, conv_kernel=3),
    "video of patches of three frames": dict(
        frames=4, frame_stride=3, interface_position="sin_cos_plus_learned"),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", RIN_OPTIONS)
def test_rin_predicts_in_the_shape_of_its_input_and_every_parameter_learns(name, checkpointing):
    c = replace(TINY_RIN, **RIN_OPTIONS[name])
    model = randomised(m.RIN(c)).train()
    m.set_checkpointing(model, checkpointing)
    x, gamma = example(c)
    given = conditions(c)
    _, hidden = model(x, gamma, **given)
    pred, hidden = model(x, gamma, tuple(h.detach() for h in hidden), **given)
    assert pred.shape == x.shape and hidden[0].shape == (2, c.latents, c.latent_dim)
    # A last block that only reads moves latents alone.
    (pred.square().mean() + hidden[0].square().mean()).backward()
    assert not without_gradient(model)


def test_context_frames_change_the_prediction_of_a_video():
    c = replace(TINY_RIN, frames=2, cond_frames=2, frame_stride=2)
    model = randomised(m.RIN(c))
    x, gamma = example(c)
    with torch.no_grad():
        a, b = (model(x, gamma, frames=torch.randn(2, 3, 2, 8, 8))[0] for _ in range(2))
    assert a.shape == x.shape and not torch.allclose(a, b, atol=1e-3)


FIT_OPTIONS = {
    "ends with latents": dict(fit_layers="(1)1(2)1", num_classes=5),
    "one block, labels without a layer": dict(
        fit_layers="(1)2(1)", num_classes=32, cond_proj=False),
    "not square": dict(sample_size=(4, 12), fit_grid=2, fit_position="sin_cos"),
    "MLPs between, none within": dict(fit_read_mlp=True, fit_local_attention=False, channels=7),
    "tokens wider than latents": dict(fit_dim=48, fit_context_norm=False),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FIT_OPTIONS)
def test_fit_predicts_in_the_shape_of_its_input_and_every_parameter_learns(name, checkpointing):
    c = replace(TINY_FIT, **FIT_OPTIONS[name])
    model = randomised(m.FIT(c)).train()
    m.set_checkpointing(model, checkpointing)
    x, gamma = example(c)
    _, hidden = model(x, gamma, **conditions(c))
    pred, hidden = model(x, gamma, tuple(h.detach() for h in hidden), **conditions(c))
    assert pred.shape == x.shape and hidden[0].shape == (2, 4, 3, 32)
    (pred.square().mean() + hidden[0].square().mean()).backward()
    assert not without_gradient(model)


def test_groups_of_a_fit_hear_of_each_other_through_latents_alone():
    """Before any latents are written back, a patch of one cell changes no other cell."""
    x, gamma = example(TINY_FIT)
    other = x.clone()
    other[:, :, 0, 0] += 1                             # in the first of four cells
    for layers, heard in (("(2)", False), ("(1)1(1)", True)):
        model = randomised(m.FIT(replace(TINY_FIT, fit_layers=layers, self_cond="none")))
        with torch.no_grad():
            change = (model(x, gamma)[0] - model(other, gamma)[0]).abs().amax((0, 1))
        assert change[:4, :4].min() > 0
        assert (change[4:, 4:].max() > 1e-6) == heard


def test_a_causal_fit_lets_no_group_hear_of_later_ones_and_a_token_of_none_that_follow():
    torch.manual_seed(0)
    blocks = m.fit_blocks(replace(TINY_FIT, fit_layers="(1)1(1)2(1)"), causal=3)
    x, latents = torch.randn(2, 4, 5, 24), torch.randn(2, 4, 3, 32)

    def run(x):
        written = latents
        for block in blocks:
            x, written = block(x, written)
        return x

    other = x.clone()
    other[:, 1, 2] += 1                                # a token of the second group
    with torch.no_grad():
        change = (run(x) - run(other)).abs().amax((0, 3))              # (groups, tokens)
    assert (change[0] == 0).all() and (change[1, :2] == 0).all()
    assert (change[1, 2:] > 0).all() and (change[2:] > 0).all()


@pytest.mark.parametrize("side", [1, 2, 3])
def test_cells_are_cut_row_by_row_and_put_together_again(side):
    x = torch.randn(2, 3, 6, 12)
    c = replace(TINY_FIT, sample_size=(6, 12), fit_grid=side, fit_patch=1)
    model = m.FIT(c)
    cells = model.cells(x)
    assert cells.shape == (2, 3, side ** 2, 6 // side, 12 // side)
    assert torch.equal(cells[:, :, -1], x[..., -6 // side:, -12 // side:])
    assert torch.equal(m.from_patches(cells.movedim(1, 4), model.cell_shape, x.shape), x)


@pytest.mark.parametrize("config", [
    TINY_RIN,
    replace(TINY_RIN, frames=2),
    replace(TINY_RIN, cond_on_latents=0),
    TINY_UNET,
    TINY_FIT,
])
def test_a_dropped_label_is_none_whatever_it_was_and_others_matter(config):
    model = randomised(m.build(replace(config, num_classes=5)))
    x, gamma = example(config)

    def predict(labels):
        return model(x, gamma, labels=labels)[0]

    with torch.no_grad():
        none, zeros = predict(None), predict(torch.zeros(2, 5))
        dropped, ones, mixed = (predict(torch.tensor(pair)) for pair in ([-1, -1], [1, 1], [-1, 1]))
        one_hot = predict(torch.eye(5)[[1, 1]])
    assert torch.equal(none, dropped) and torch.equal(none, zeros) and torch.equal(ones, one_hot)
    assert torch.allclose(mixed[0], none[0], atol=1e-5)
    assert torch.allclose(mixed[1], ones[1], atol=1e-5)
    assert not torch.allclose(ones, none, atol=1e-3)


@pytest.mark.parametrize("config, wrong, words", [
    (TINY_RIN, dict(self_cond="tape"), "none, latent, interface, latent\\+interface"),
    (TINY_RIN, dict(interface_position="fourier"), "learned, sin_cos, sin_cos_plus_learned"),
    (TINY_RIN, dict(sample_size=(8, 9)), "multiple of 4 .interface_patch"),
    (TINY_RIN, dict(cond_decoupled_read=True), "needs extra tokens"),
    (TINY_RIN, dict(time_on_latents=False, cond_dim=8), "cond_dim 8"),
    (TINY_RIN, dict(latent_dim=30, latent_heads=3), "width of the time embedding 30"),
    (TINY_FIT, dict(self_cond="interface"), "none, latent"),
    (TINY_FIT, dict(fit_position="fourier"), "sin_cos, learned"),
    (TINY_FIT, dict(fit_layers="2,2"), "fit_layers '2,2': expected"),
    (TINY_FIT, dict(fit_layers="(2)0(1)1"), "fit_layers '\\(2\\)0\\(1\\)1': expected"),
    (TINY_FIT, dict(sample_size=(8, 10)), "sample_size 10 is not a multiple of 4"),
    (TINY_UNET, dict(self_cond="latent"), "none, x, eps, auto"),
    (TINY_UNET, dict(transformer_layers=1, transformer_position="fourier"), "sin_cos, learned"),
    (TINY_UNET, dict(sample_size=(8, 9)), "sample_size 9 is not a multiple of 2"),
    (TINY_UNET, dict(res_blocks=(1, 1, 1)), "differ in length"),
    (TINY_UNET, dict(softmax_groups=2), "channels 3 is not a multiple of 2 .softmax_groups"),
])
def test_options_that_make_no_sense_are_refused(config, wrong, words):
    with pytest.raises(ValueError, match=words):
        m.build(replace(config, **wrong))


@pytest.mark.parametrize("config", [TINY_RIN, TINY_UNET, TINY_FIT])
def test_inputs_that_do_not_fit_are_refused(config):
    x, gamma = example(config)
    model = m.build(config)
    with pytest.raises(ValueError, match="labels: this network takes none"):
        model(x, gamma, labels=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"samples of shape \(3, 4, 8\), expected \(3, 8, 8\)"):
        model(x[:, :, :4], gamma)


@pytest.mark.parametrize("config, name, value", [
    (replace(TINY_RIN, frames=2), "frames", torch.randn(2, 3, 1, 8, 8)),
    (replace(TINY_UNET, frames=2), "frames", torch.randn(2, 3, 1, 8, 8)),
    (TINY_UNET, "map", torch.randn(2, 4, 8, 8)),
    (TINY_UNET, "context", torch.randn(2, 7, 20)),
])
def test_a_condition_is_needed_where_it_is_taken_and_refused_elsewhere(config, name, value):
    takes = {
        "frames": dict(cond_frames=1),
        "map": dict(cond_channels=4),
        "context": dict(context_dim=20),
    }
    x, gamma = example(config)
    with pytest.raises(ValueError, match=f"{name}: this network takes none"):
        m.build(config)(x, gamma, **{name: value})
    model = m.build(replace(config, **takes[name]))
    with pytest.raises(ValueError, match=f"{name}: this network needs"):
        model(x, gamma)
    assert model(x, gamma, **{name: value})[0].shape == x.shape


# --------------------------------------------------------------------------------------------------
# UNet

UNET_OPTIONS = {
    "self-conditioned": dict(self_cond="x"),
    "strided": dict(in_stride=2, in_kernel=4, sample_size=(16, 8), attention_at=()),
    "logits": dict(channels=6, softmax_groups=2, in_stride=2, attention_at=()),
    "wider first, other kernels": dict(multipliers=(2, 1), kernel_sizes=(3, 1)),
    "all conditions": dict(
        num_classes=5, cond_channels=4, context_dim=20, transformer_layers=1, transformer_dim=64,
        transformer_stride=2),
    "no positions": dict(
        transformer_layers=1, transformer_dim=32, transformer_position="none", res_blocks=(2, 3)),
    "one resolution": dict(multipliers=(1,), res_blocks=(2,), attention_at=(8,)),
    "video": dict(frames=3, cond_frames=2, self_cond="x", num_classes=5),
    "video of bits": dict(frames=3, channels=6, softmax_groups=2),
}


@pytest.mark.parametrize("name", UNET_OPTIONS)
def test_unet_predicts_in_the_shape_of_its_input_and_every_parameter_learns(name):
    c = replace(TINY_UNET, **UNET_OPTIONS[name])
    model = randomised(m.UNet(c)).train()
    x, gamma = example(c)
    out, hidden = model(x, gamma, torch.randn_like(x), **conditions(c))
    assert hidden is None
    if c.softmax_groups:
        assert out.shape == (2, 16, *c.sample_shape[1:])
        out = diffusion.softmax_bits(out, c.softmax_groups)
    assert out.shape == x.shape
    out.square().mean().backward()
    assert not without_gradient(model)


def test_frames_are_channels_to_a_unet():
    """Of a video it makes what it makes of an image that has as many channels."""
    videos = replace(TINY_UNET, frames=3, cond_frames=2)
    images = replace(TINY_UNET, channels=9, cond_channels=6)
    model, other = randomised(m.UNet(videos)), m.UNet(images).eval()
    other.load_state_dict(model.state_dict())
    (x, gamma), frames = example(videos), torch.randn(2, 3, 2, 8, 8)
    with torch.no_grad():
        out, _ = model(x, gamma, frames=frames)
        same, _ = other(x.flatten(1, 2), gamma, map=frames.flatten(1, 2))
    assert torch.equal(out.flatten(1, 2), same)


@pytest.mark.parametrize("side, kernel, stride", [
    (7, 3, 2), (8, 3, 2), (8, 4, 2), (5, 2, 1), (6, 1, 1),
])
def test_same_padding_puts_the_odd_pixel_at_the_bottom_and_right(side, kernel, stride):
    conv = m.SameConv2d(1, 1, kernel, stride, bias=False)
    torch.nn.init.ones_(conv.weight)
    out = -(-side // stride)
    pad = max((out - 1) * stride + kernel - side, 0)
    inside = slice(pad // 2, pad // 2 + side)
    padded = torch.zeros(1, 1, side + pad, side + pad)
    padded[..., inside, inside] = x = torch.randn(1, 1, side, side)
    expected = padded.unfold(2, kernel, stride).unfold(3, kernel, stride).sum((-1, -2))
    assert torch.allclose(conv(x), expected, atol=1e-5) and expected.shape[-1] == out


# --------------------------------------------------------------------------------------------------
# both, with diffusion.py

CASES = {
    "rin": (replace(TINY_RIN, num_classes=5), dict()),
    "video": (replace(TINY_RIN, frames=2, cond_frames=1), dict()),
    "unet": (replace(TINY_UNET, num_classes=5, self_cond="x"), dict()),
    "video, unet": (replace(TINY_UNET, frames=2, cond_frames=1), dict()),
    "fit": (replace(TINY_FIT, num_classes=5), dict()),
    "bits": (
        replace(TINY_UNET, channels=24, softmax_groups=3),
        dict(bits="uint8", pred_type="x_softmax_xent")),
}


@pytest.mark.parametrize("name", CASES)
def test_training_on_one_batch_lowers_the_loss_and_the_network_samples(name):
    config, options = CASES[name]
    model, frames = m.build(config), config.sample_shape[1:-2]
    sampling = SimpleNamespace(
        sample_schedule="cosine", sample_steps=3, sampler="ddim", td=0.0, self_cond_decay=0.0,
        guidance=1.0 if config.num_classes else 0.0)
    c = SimpleNamespace(
        model=config, diffusion=diffusion.DiffusionConfig(**options), sampling=sampling,
        data=SimpleNamespace(image_channels=3))
    pixels = torch.randint(0, 2, (8, 3, *frames, 8, 8), dtype=torch.uint8) * 255
    cond = {"labels": torch.arange(8) % 5}
    if config.cond_frames:
        cond["frames"] = pixels[:, :, :config.cond_frames]
    batch = SimpleNamespace(images=None, targets=pixels, weights=torch.ones(8), cond=cond)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(30):
        generator = torch.Generator().manual_seed(1)    # always the same noise
        times = torch.linspace(0.1, 0.9, 8)
        loss = diffusion.denoising_losses(model, batch, c, times, generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    images = diffusion.generate(model, c, 8, cond)
    assert images.shape == pixels.shape and images.dtype == torch.uint8


RECIPES = [
    m.RINConfig(num_classes=10, drop_path=0.1, dropout=0.1),
    m.RINConfig(
        sample_size=(64, 64), num_classes=1000, interface_patch=8, interface_dim=512,
        interface_mlp_ratio=4, rw_heads=16, latent_dim=768, latent_layers=(4, 4, 4, 4)),
    m.UNetConfig(channels=24, num_classes=10, self_cond="x", softmax_groups=3),
    m.UNetConfig(
        sample_size=(512, 512), channels=16, cond_channels=256, context_dim=512, softmax_groups=2,
        unet_dim=128, multipliers=(1, 1, 2, 2), res_blocks=(1, 1, 1, 1), attention_at=(),
        transformer_layers=6, transformer_dim=512, in_kernel=1, out_kernel=1),
    m.UNetConfig(
        sample_size=(64, 64), num_classes=1000, unet_dim=192, multipliers=(1, 2, 3, 4),
        res_blocks=(3, 3, 3, 3)),
]


@pytest.mark.parametrize("config", RECIPES)
def test_published_recipes_can_be_written_down(config):
    with torch.device("meta"):
        x, gamma = example(config)
        out, _ = m.build(config).eval()(x, gamma, **conditions(config))
    assert out.shape[2:] == x.shape[2:]
