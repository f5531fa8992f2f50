"""What diffusion.py claims: inverses, oracles, edges.

That it agrees with the reference is asked in test_parity.py, and here of the panoptic file, of
which only a part is computed by diffusion.py; PARITY_DIR may name a folder that has it.
"""

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_parity import FOLDER, Golden

import diffusion
from diffusion import (
    PRED_TYPES,
    RGB_CODES,
    SAMPLERS,
    add_noise,
    bits_to_ints,
    bits_to_panoptic,
    bits_to_rgb,
    ddpm_step,
    diffuse,
    diffusion_loss,
    expected_bits,
    gamma_schedule,
    instance_weights,
    ints_to_bits,
    majority_vote,
    predict_x0_eps,
    rgb_to_bits,
    sample,
    self_cond_for_training,
    softmax_bits,
    unit_std,
)

SCHEDULE_NAMES = [
    "cosine",
    "cosine@0.2,1,1",
    "cosine@0,1,0.9",
    "sigmoid@-3,3,0.9",
    "simple_linear",
    "log@1,100,f",
    "log@1,100,t",
]


def close(a, b, atol=1e-4):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


def exact(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def recipe(self_cond, **options):
    """What diffusion.py reads of a configuration: the network's self_cond, and DiffusionConfig."""
    options = diffusion.DiffusionConfig(**options)
    return SimpleNamespace(model=SimpleNamespace(self_cond=self_cond), diffusion=options)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --------------------------------------------------------------------------------------------------
# golden numbers: channels are last there, ours are dim 1

PANOPTIC = os.path.join(FOLDER, "panoptic.npz")


@pytest.mark.skipif(
    not os.path.exists(PANOPTIC), reason=f"no {PANOPTIC}: it comes with the panoptic networks"
)
def test_what_needs_no_network_of_the_panoptic_case_agrees_with_the_reference():
    g = Golden(PANOPTIC)
    model, groups = g.config["model"], g.config["decoder"]["outp_softmax_groups"]
    n_bits, b_scale = g.config["task"]["n_bits_label"] // 2, model["b_scale"]
    label_map = g["in:label_map"].long()
    bits = ints_to_bits(label_map.movedim(-1, 1), n_bits, b_scale)
    g.check("out:bits", bits.movedim(1, -1), tolerance=0)
    weight = instance_weights(label_map[..., 1], model["mask_weight_p"])
    g.check("out:pixel_weight", weight)

    gamma = gamma_schedule(model["train_schedule"])(g["in:t"])
    g.check("out:gamma", gamma.view(-1, 1, 1, 1))
    noised = add_noise(bits, gamma, g["in:noise"].movedim(-1, 1))
    g.check("out:noised", noised.movedim(1, -1))

    logits = g["out:logits"].flatten(-2).movedim(-1, 1)
    bits_pred = softmax_bits(logits, groups, b_scale)
    g.check("out:bits_pred", bits_pred.movedim(1, -1), tolerance=1e-6)
    losses = diffusion_loss(logits, model["pred_type"], bits, None, gamma, b_scale, groups, weight)
    g.check("out:loss", losses.mean())

    # The file does not tell the caps on the ids; its random network reaches both.
    num_classes, max_instances = (g["out:panoptic_map"].amax((0, 1, 2)) + 1).tolist()
    maps = bits_to_panoptic(g["out:sampled"].movedim(-1, 1), num_classes, max_instances, n_bits)
    g.check("out:panoptic_map", maps.movedim(1, -1))


# --------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_falls_from_one_to_its_floor(name, dtype):
    gamma = gamma_schedule(name)(torch.linspace(0, 1, 1001, dtype=dtype))
    assert gamma.dtype == dtype and (gamma.diff() <= 0).all()
    assert gamma[0] > 1 - 1e-5 and 1e-9 * (1 - 1e-6) <= gamma[-1] < 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "cosin",
        "cosine@",
        "cosine2",
        "cosine@1",
        "cosine@0,1",
        "sigmoid",
        "sigmoid@-3,3",
        "sigmoid@-3,3,0.9,1",
        "sigmoid@-3,3,o.9",
        "sigmoid@3,-3,nan",
        "sigmoid@3,3,1",
        "sigmoid@-3,3,0",
        "log@0,1,f",
        "log@1,100,maybe",
        "log@1,100",
        "simple_linear@1",
        "simple_linear2",
        "@",
        "",
    ],
)
def test_misspelt_schedules_raise_naming_the_choices(name):
    with pytest.raises(ValueError, match="unknown schedule .*cosine@start,end,tau.*simple_linear"):
        gamma_schedule(name)


# --------------------------------------------------------------------------------------------------
# Predictions and losses


def oracle(x0, eps, gamma, pred_type):
    """The prediction of each type, by the formulas at the top of diffusion.py."""
    if pred_type in ("eps", "v"):
        gamma = gamma.view(-1, *[1] * (x0.ndim - 1))
        return eps if pred_type == "eps" else gamma**0.5 * eps - (1 - gamma) ** 0.5 * x0
    return x0


@pytest.mark.parametrize("rederive", [True, False])
@pytest.mark.parametrize("pred_type", PRED_TYPES)
def test_prediction_of_every_type_gives_back_x0_and_eps(pred_type, rederive):
    x0, eps = normal(4, 3, 5), normal(4, 3, 5, seed=1)
    gamma = torch.tensor([0.999, 0.7, 0.2, 1e-4], dtype=torch.float64)
    x_t = add_noise(x0, gamma, eps)
    pred = oracle(x0, eps, gamma, pred_type)
    back = predict_x0_eps(x_t, gamma, pred, pred_type, math.inf, rederive)
    close(back[0], x0, 1e-10)
    close(back[1], eps, 1e-10)


def test_x0_is_clipped_to_b_scale():
    x, gamma = torch.tensor([[-2.0, -0.3, 0.4, 2.0]]), torch.tensor([0.5])
    x0, _ = predict_x0_eps(x, gamma, x, "x", b_scale=0.25)
    assert x0.tolist() == [[-0.25, -0.25, 0.25, 0.25]]
    x0, _ = predict_x0_eps(x, gamma, x, "x", b_scale=math.inf)
    assert torch.equal(x0, x)


@pytest.mark.parametrize("pred_type", PRED_TYPES)
def test_prediction_at_both_ends_of_time_is_finite(pred_type):
    gamma = gamma_schedule("sigmoid@-3,3,0.9")(torch.tensor([0.0, 1.0]))
    x_t = normal(2, 7, dtype=torch.float32)
    for part in predict_x0_eps(x_t, gamma, x_t / 2, pred_type):
        assert part.isfinite().all()


@pytest.mark.parametrize("pred_type", ["x", "eps", "v"])
def test_squared_losses_vanish_at_the_truth_and_only_there(pred_type):
    x0, eps = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    gamma = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    truth = oracle(x0, eps, gamma, pred_type)
    assert diffusion_loss(truth, pred_type, x0, eps, gamma).max() < 1e-20
    close(diffusion_loss(truth + 0.5, pred_type, x0, eps, gamma), np.full(3, 0.25), 1e-9)


def test_sigmoid_loss_is_cross_entropy_of_bits():
    bits = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) * 0.1
    logits = normal(2, 2, dtype=torch.float32)
    p = logits.sigmoid()
    want = -torch.where(bits > 0, p, 1 - p).log().mean(1)
    close(diffusion_loss(logits, "x_sigmoid_xent", bits, None, None, b_scale=0.1), want, 1e-6)


def test_softmax_loss_and_bits_agree_on_the_true_class():
    ints = torch.tensor([[5, 0, 7], [2, 6, 1]])  # (B, groups)
    bits = ints_to_bits(ints, 3, 0.5)  # (B, 9)
    logits = torch.nn.functional.one_hot(ints, 8).flatten(1) * 60.0  # (B, 24)
    close(softmax_bits(logits, 3, 0.5), bits, 1e-6)
    assert diffusion_loss(logits, "x_softmax_xent", bits, None, None, 0.5, groups=3).max() < 1e-6
    uniform = diffusion_loss(logits * 0, "x_softmax_xent", bits, None, None, 0.5, groups=3)
    close(uniform, np.full(2, math.log(8)), 1e-5)


def test_logits_of_independent_bits_expect_the_same_from_both_heads():
    """A softmax over codes makes bits independent if a code's logit is the sum of its bits'."""
    logits = normal(2, 6, 5)  # two groups of 3 bits
    codes = (ints_to_bits(torch.arange(8)[:, None], 3) > 0).double()  # (8, 3)
    joint = torch.einsum("bgkn,ck->bgcn", logits.unflatten(1, (2, 3)), codes).flatten(
        1, 2
    )  # (2, 16, 5)
    c = recipe("none", pred_type="x_sigmoid_xent", b_scale=0.3)
    close(softmax_bits(joint, 2, 0.3), expected_bits(logits, c), 1e-6)


@pytest.mark.parametrize("pred_type", ["x", "eps", "v", "x_sigmoid_xent", "x_softmax_xent"])
def test_a_pixel_of_weight_zero_does_not_matter(pred_type):
    x0, eps = (
        ints_to_bits(torch.arange(12).view(2, 1, 2, 3), 4),
        normal(2, 4, 2, 3, dtype=torch.float32),
    )
    out = normal(2, 16 if pred_type == "x_softmax_xent" else 4, 2, 3, seed=1, dtype=torch.float32)
    weight = torch.ones(2, 2, 3)

    def losses(out, weight):
        return diffusion_loss(out, pred_type, x0, eps, torch.tensor([0.3, 0.6]), weight=weight)

    close(losses(out, weight), losses(out, None))
    changed = out.clone()
    changed[1, :, 0, 2] = 3 + torch.arange(out.shape[1])
    assert abs(losses(changed, weight)[1] - losses(out, weight)[1]) > 1e-3
    weight[1, 0, 2] = 0
    close(losses(changed, weight), losses(out, weight))


def test_diffuse_is_add_noise_at_uniform_times():
    x0 = normal(4000, 2)
    x_t, eps, gamma = diffuse(x0, "simple_linear", generator=torch.Generator().manual_seed(1))
    close(x_t, add_noise(x0, gamma, eps), 0)
    assert (
        gamma.shape == (4000,)
        and abs(gamma.mean() - 0.5) < 0.02
        and abs(gamma.std() - 12**-0.5) < 0.02
    )
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
    t = torch.rand(4000, dtype=torch.float64)
    close(diffuse(x0, "simple_linear", t)[2], 1 - t, 1e-9)


def test_unit_std_normalises_each_example_alone():
    x = normal(3, 2, 5) * torch.tensor([1.0, 10.0, 0.1]).view(3, 1, 1)
    out = unit_std(x)
    close(out.flatten(1).numpy().std(1), np.ones(3), 1e-12)
    close(out[:1], unit_std(x[:1]), 1e-12)


# --------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("td", [0.0, 1.5])
@pytest.mark.parametrize("pred_type", PRED_TYPES)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_oracle_makes_every_sampler_return_x0(schedule, sampler, pred_type, td):
    x0 = normal(2, 3, 4).tanh()

    def denoise(x_t, gamma, self_cond):
        g = gamma.view(-1, 1, 1)
        eps = (x_t - g**0.5 * x0) / (1 - g) ** 0.5
        return oracle(x0, eps, gamma, pred_type), None

    states = []
    out = sample(
        denoise,
        normal(2, 3, 4, seed=1),
        7,
        schedule=schedule,
        sampler=sampler,
        pred_type=pred_type,
        td=td,
        callback=lambda i, x0, x_t: states.append(x_t),
    )
    close(out, x0, 1e-6)
    assert all(state.isfinite().all() for state in states)
    assert len(states) == 7  # and whether they are where they should be, the next three tests ask


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_ddim_keeps_its_noise(schedule):
    """Given the truth, every state is sqrt(gamma) x0 + sqrt(1 - gamma) eps, eps as at the start."""
    x0, eps, seen = normal(2, 3).tanh(), normal(2, 3, seed=1), []
    t = 1 - torch.arange(6, dtype=torch.float64) / 6
    gammas = gamma_schedule(schedule)(t)

    def denoise(x_t, gamma, self_cond):
        return x0, None

    sample(
        denoise,
        add_noise(x0, gammas[:1], eps),
        6,
        schedule=schedule,
        pred_type="x",
        callback=lambda i, x0, x_t: seen.append((i, x_t)),
    )
    assert [i for i, _ in seen] == list(range(6))
    for (_, x_t), gamma in zip(seen, gammas):
        close(x_t, add_noise(x0, gamma, eps), 1e-9)


def test_ddpm_small_keeps_the_noise_standard_and_large_adds_more():
    """With the posterior variance, (x_t - sqrt(gamma) x0) / sqrt(1 - gamma) stays normal."""
    x0, noise = torch.full((1, 40000), 0.3, dtype=torch.float64), {}
    gammas = gamma_schedule("cosine")(1 - torch.arange(8, dtype=torch.float64) / 8)
    for sampler in ("ddpm@small", "ddpm", "ddpm@large"):
        states = []
        sample(
            lambda *args: (x0, None),
            add_noise(x0, gammas[0], normal(1, 40000)),
            8,
            pred_type="x",
            sampler=sampler,
            generator=torch.Generator().manual_seed(2),
            callback=lambda i, x0, x_t: states.append(x_t),
        )
        noise[sampler] = [(x_t - g**0.5 * x0) / (1 - g) ** 0.5 for x_t, g in zip(states, gammas)]
        for eps in noise[sampler]:
            assert abs(eps.mean()) < 0.03, sampler
    for eps, larger in list(zip(noise["ddpm@small"], noise["ddpm"]))[1:]:
        assert abs(eps.std() - 1) < 0.02 and larger.std() > eps.std() + 0.01
    assert torch.equal(noise["ddpm"][-1], noise["ddpm@large"][-1])


@pytest.mark.parametrize("sampler", ["ddpm", "ddpm@small"])
def test_ddpm_survives_rounding_where_the_schedule_is_flat(sampler):
    x = normal(2, 3, dtype=torch.float32)
    for gamma, gamma_next in [(0.5 + 1e-7, 0.5), (1.0, 1.0)]:
        out = SAMPLERS[sampler](x, x, x, torch.tensor(gamma), torch.tensor(gamma_next), x)
        close(out, x, 1e-6)


@pytest.mark.parametrize("td", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_td_moves_the_state_further_than_the_clock(td, sampler):
    """Call i hears t = 1 - i / n, but its x_t has been brought to max(1 - (i + td) / n, 0)."""
    n, x0, heard, seen = 5, normal(2, 3).tanh(), [], []
    step_noise = normal(n, 2, 3, seed=3)

    def denoise(x_t, gamma, self_cond):
        assert gamma.shape == (2,) and gamma[0] == gamma[1]
        heard.append(gamma[0].item())
        return x0, None

    sample(
        denoise,
        normal(2, 3, seed=1),
        n,
        schedule="simple_linear",
        sampler=sampler,
        pred_type="x",
        td=td,
        step_noise=step_noise,
        callback=lambda i, x0, x_t: seen.append(x_t),
    )
    close(heard, np.clip(np.arange(n) / n, 1e-9, 1), 1e-12)
    for i in range(1, n):
        now, arrived = torch.tensor(
            [[max((i - 1) / n, 1e-9)], [min((i + td) / n, 1)]], dtype=torch.float64
        )
        _, eps = predict_x0_eps(seen[i - 1], now, x0, "x")
        want = (
            add_noise(x0, arrived, eps)
            if sampler == "ddim"
            else ddpm_step(seen[i - 1], x0, eps, now, arrived, step_noise[i - 1])
        )
        close(seen[i], want, 1e-9)


def linear_denoiser(x_t, gamma, self_cond=None, label=0.0):
    return x_t * 0.3 + label + gamma.view(-1, 1), None


def test_guidance_zero_is_no_guidance_and_needs_no_second_call():
    labels = []

    def denoise(x_t, gamma, self_cond, label):
        labels.append(label)
        return linear_denoiser(x_t, gamma, self_cond, label)

    def run(**options):
        return sample(denoise, normal(2, 3), 4, cond={"label": 0.5}, **options)

    plain = run()
    assert labels == [0.5] * 4
    assert torch.equal(run(guidance=0.0, null_cond={"label": -1.0}), plain) and labels == [0.5] * 8
    assert not torch.equal(run(guidance=0.1, null_cond={"label": -1.0}), plain)
    assert labels[8:] == [0.5, -1.0] * 4
    close(run(guidance=3.0, null_cond={"label": 0.5}), plain, 1e-9)


def test_guidance_extrapolates_from_the_unconditional_prediction():
    def denoise(x_t, gamma, self_cond, label=False):
        return torch.full_like(x_t, 0.2 if label else -0.1), None

    out = sample(denoise, normal(1, 3), 2, pred_type="x", cond={"label": True}, guidance=1.5)
    close(out, torch.full((1, 3), 0.2 * 2.5 + 0.1 * 1.5), 1e-6)


def test_same_seed_same_sample_and_another_seed_another():
    def run(seed, sampler="ddpm"):
        generator = torch.Generator().manual_seed(seed)
        return sample(
            linear_denoiser, normal(2, 3), 5, sampler=sampler, b_scale=math.inf, generator=generator
        )

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert torch.equal(run(0, "ddim"), run(1, "ddim"))


@pytest.mark.parametrize("pred_type", ["x", "eps"])
@pytest.mark.parametrize("self_cond", ["x", "eps", "auto"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_estimates_are_fed_back_with_their_decay(self_cond, decay, pred_type):
    fed, estimates = [], []

    def denoise(x_t, gamma, state):
        fed.append(state)
        return linear_denoiser(x_t, gamma)[0] + 0.1 * state, None

    x_init = normal(2, 3)
    gammas = gamma_schedule("cosine")(1 - torch.arange(4, dtype=torch.float64) / 4)
    which = {"x": 0, "eps": 1, "auto": int(pred_type == "eps")}[self_cond]

    def callback(i, x0, x_t):
        estimates.append(predict_x0_eps(x_t, gammas[i], x0, "x")[which])

    sample(
        denoise,
        x_init,
        4,
        pred_type=pred_type,
        self_cond=self_cond,
        self_cond_decay=decay,
        callback=callback,
    )
    want = torch.zeros_like(x_init)
    for state, estimate in zip(fed, estimates):
        close(state, want, 1e-9)
        want = decay * want + (1 - decay) * estimate
    assert fed[1].abs().max() > 0.01


@pytest.mark.parametrize("self_cond", ["latent", "interface", "latent+interface"])
@pytest.mark.parametrize("decay", [0.0, 0.25])
def test_hidden_states_are_carried_from_the_conditional_pass(self_cond, decay):
    fed = []

    def denoise(x_t, gamma, hidden, label=None):
        fed.append(hidden)
        new = torch.full((2, 4, 3), 1.0 + len(fed))
        return x_t * 0.1, (new, -new) if self_cond == "latent+interface" else new

    sample(
        denoise,
        normal(2, 3),
        3,
        cond={"label": 1},
        guidance=1.0,
        self_cond=self_cond,
        self_cond_decay=decay,
    )
    first = (1 - decay) * 2.0  # calls 1, 3, 5 are conditional; 2, 4, 6 are not
    second = decay * first + (1 - decay) * 4.0
    assert fed[0] is None and fed[1] is None and len(fed) == 6
    for hidden, value in zip(fed[2:], (first, first, second, second)):
        if self_cond == "latent+interface":
            close(hidden[1], torch.full((2, 4, 3), -value), 1e-6)
            hidden = hidden[0]
        close(hidden, torch.full((2, 4, 3), value), 1e-6)


def test_without_self_conditioning_nothing_is_fed():
    def denoise(x_t, gamma, self_cond):
        assert self_cond is None
        return x_t, torch.ones(1)

    sample(denoise, normal(2, 3), 3)


def test_hidden_self_conditioning_needs_a_hidden_state():
    with pytest.raises(ValueError, match="'latent' needs a denoiser that returns"):
        sample(linear_denoiser, normal(2, 3), 3, self_cond="latent")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_sampling_never_reads_a_value_back_from_the_device(schedule, sampler):
    """Tensors of the meta device have no values, so any read would raise."""

    def denoise(x_t, gamma, state):
        return x_t * gamma.view(-1, 1) + state, None

    out = sample(
        denoise,
        torch.empty(2, 3, device="meta"),
        4,
        schedule=schedule,
        sampler=sampler,
        td=1.0,
        guidance=2.0,
        self_cond="auto",
        self_cond_decay=0.5,
        callback=lambda i, x0, x_t: None,
    )
    assert out.shape == (2, 3) and out.device.type == "meta"


def test_sampling_leaves_no_gradient_and_keeps_its_start():
    w, x = torch.ones(1, requires_grad=True, dtype=torch.float64), normal(2, 3)
    before = x.clone()
    out = sample(lambda x_t, gamma, self_cond: (x_t * w, None), x, 3, sampler="ddpm")
    assert not out.requires_grad and torch.equal(x, before)


@pytest.mark.parametrize(
    "call,match",
    [
        (
            lambda x: sample(linear_denoiser, x, 2, sampler="ddpm@tiny"),
            "sampler 'ddpm@tiny', .*ddim.*ddpm@small",
        ),
        (
            lambda x: sample(linear_denoiser, x, 2, pred_type="x0"),
            "pred_type 'x0', expected one of x, eps, v, x_sig",
        ),
        (
            lambda x: sample(linear_denoiser, x, 2, self_cond="y"),
            "self_cond 'y', expected one of none, x, eps, auto",
        ),
        (
            lambda x: sample(linear_denoiser, x, 2, schedule="linear"),
            "schedule 'linear'; .*simple_linear",
        ),
        (lambda x: sample(linear_denoiser, x, 0), "steps must be at least 1, got 0"),
        (
            lambda x: diffusion_loss(x, "eps2", x, x, x[:, 0]),
            "pred_type 'eps2', expected one of x, eps, v",
        ),
        (
            lambda x: predict_x0_eps(x, x[:, 0], x, "noise"),
            "pred_type 'noise', expected one of x, eps, v",
        ),
        (
            lambda x: self_cond_for_training(linear_denoiser, x, x[:, 0], {}, recipe("X")),
            "self_cond 'X', expected one of none, x",
        ),
        (
            lambda x: rgb_to_bits(x, "uint9"),
            "RGB code 'uint9', expected one of uint8, gray, uint8_s, oneh",
        ),
        (
            lambda x: bits_to_rgb(x, "uint9"),
            "RGB code 'uint9', expected one of uint8, gray, uint8_s, oneh",
        ),
    ],
)
def test_unknown_names_raise_naming_the_choices(call, match):
    with pytest.raises(ValueError, match=match):
        call(normal(2, 3))


# --------------------------------------------------------------------------------------------------
# Self-conditioning in training


def first_pass(x_t, gamma, self_cond, label):
    """Predicts x0 = 0.5 label wherever nothing was fed; hidden states name their example."""
    fed = 0 if self_cond is None else self_cond.abs().max()
    pred = (0.5 * label + fed)[:, None].expand_as(x_t) * first_pass.w
    return pred, (pred[:, :2].clone(), pred[:, None] * 2)


first_pass.w = torch.ones(1, requires_grad=True)


@pytest.mark.parametrize("rate,n", [(0.5, 2), (0.75, 3), (1.0, 5), (0.1, 0)])
@pytest.mark.parametrize("self_cond", ["x", "eps", "auto", "latent"])
def test_a_fraction_of_the_batch_gets_the_first_estimate(self_cond, rate, n):
    x_t, gamma, label = (
        normal(5, 3, dtype=torch.float32),
        torch.full((5,), 0.36),
        torch.arange(1, 6) / 10,
    )
    c = recipe(self_cond, pred_type="x", self_cond_rate=rate)
    out = self_cond_for_training(first_pass, x_t, gamma, {"label": label}, c)
    pred = (0.5 * label)[:, None].expand(5, 3) * (torch.arange(5) < n)[:, None]
    if self_cond == "latent":
        if n == 0:
            assert out is None
            return
        close(out[1], pred[:, None] * 2, 1e-6)
        out, pred = out[0], pred[:, :2]
    elif self_cond == "eps":
        pred = (x_t - 0.6 * pred) / 0.8 * (torch.arange(5) < n)[:, None]
    close(out, pred, 1e-6)
    assert not out.requires_grad


@pytest.mark.parametrize("self_cond", ["x", "latent+interface"])
def test_masking_keeps_each_example_with_the_given_probability(self_cond):
    B = 2000

    def run(rate, seed=0):
        c = recipe(self_cond, pred_type="x", self_cond_rate=rate, self_cond_masking=True)
        x_t, gamma = normal(B, 3, dtype=torch.float32), torch.full((B,), 0.4)
        cond, generator = {"label": torch.ones(B)}, torch.Generator().manual_seed(seed)
        return self_cond_for_training(first_pass, x_t, gamma, cond, c, generator)

    out = run(0.9)
    if self_cond == "latent+interface":
        assert torch.equal(out[0][:, 0] > 0, out[1][:, 0, 0] > 0)  # one mask for the whole state
        out = out[0]
    kept = out[:, 0] > 0
    close(out, kept[:, None] * torch.full_like(out, 0.5), 1e-6)
    assert 0.87 < kept.float().mean() < 0.93, kept.float().mean()
    if self_cond == "x":
        assert torch.equal(run(0.9), out) and not torch.equal(run(0.9, seed=1), out)
        assert run(1.0).all() and not run(0.0).any()


def test_no_self_conditioning_takes_no_first_pass():
    assert self_cond_for_training(None, normal(2, 3), torch.ones(2), {}, recipe("none")) is None


# --------------------------------------------------------------------------------------------------
# Analog bits


@pytest.mark.parametrize("code", RGB_CODES)
def test_every_colour_survives_every_code(code):
    levels = torch.arange(256).view(16, 16)
    image = torch.stack([levels, levels.flip(0), levels.T], 1)
    bits = rgb_to_bits(image / 255, code, 0.3)
    assert bits.shape[1] == 3 * RGB_CODES[code] and bits.dtype == torch.float32
    assert torch.equal(bits.abs(), torch.full_like(bits, 0.3))
    exact((bits_to_rgb(bits, code) * 255).round().long(), image)
    noisy = bits + 0.25 * torch.rand(bits.shape, generator=torch.Generator().manual_seed(0))
    exact((bits_to_rgb(noisy, code) * 255).round().long(), image)


def test_colours_between_levels_and_outside_the_range_go_where_tensorflow_puts_them():
    image = torch.tensor(
        [[-0.5, 0.5, 0.9999, 0.0039, 1.5]]
    )  # 255.5 equal intervals, so 0.5 is level 127
    for code in RGB_CODES:
        close(bits_to_rgb(rgb_to_bits(image, code), code) * 255, [[0, 127, 255, 0, 255]])


@pytest.mark.parametrize("n_bits", [1, 8, 17])
def test_integers_survive_bits_exactly(n_bits):
    ints = torch.randint(2**n_bits, (4, 3, 6), generator=torch.Generator().manual_seed(0))
    ints[0, 0, :2] = torch.tensor([0, 2**n_bits - 1])
    bits = ints_to_bits(ints, n_bits, 0.1)
    assert bits.shape == (4, 3 * n_bits, 6)
    assert torch.equal(bits_to_ints(bits, n_bits), ints)


def test_the_least_significant_bit_comes_first():
    assert ints_to_bits(torch.tensor([[6, 1]]), 4).tolist() == [[-1, 1, 1, -1, 1, -1, -1, -1]]


def test_gray_neighbours_differ_in_one_bit():
    bits = rgb_to_bits(torch.arange(256).view(256, 1) / 255, "gray")  # (256, 8)
    assert ((bits[1:] != bits[:-1]).sum(1) == 1).all()


def test_shuffle_is_the_permutation_of_its_comment():
    exact(list(diffusion.SHUFFLE), np.random.RandomState(42).permutation(256))


# --------------------------------------------------------------------------------------------------
# Panoptic maps


def test_panoptic_maps_survive_bits_and_are_capped():
    panoptic = torch.randint(256, (2, 2, 4, 5), generator=torch.Generator().manual_seed(0))
    bits = ints_to_bits(panoptic, 8, 0.1)
    assert bits.shape == (2, 16, 4, 5)
    assert torch.equal(bits_to_panoptic(bits, 256, 256), panoptic)
    capped = bits_to_panoptic(bits, 134, 101)
    assert capped[:, 0].max() == 133 and capped[:, 1].max() == 100
    assert torch.equal(capped.amin((0, 2, 3)), panoptic.amin((0, 2, 3)))


def test_instance_weights_favour_small_instances_and_average_one():
    ids = torch.zeros(2, 4, 5, dtype=torch.long)
    ids[0, 0, 0], ids[0, 1] = 200, 3  # 1 pixel, 5 pixels, 14 of the background
    weight = instance_weights(ids, power=0.5)
    close(weight.mean((1, 2)), torch.ones(2), 1e-6)
    assert torch.equal(weight[1], torch.ones(4, 5))

    def ratio(a, b):
        return (weight[0, a, 0] / weight[0, b, 0]).item()

    assert ratio(0, 1) == pytest.approx((6 / 2) ** 0.5) and ratio(1, 2) == pytest.approx(
        (15 / 6) ** 0.5
    )
    assert torch.equal(instance_weights(ids, power=0.0), torch.ones(2, 4, 5))


def test_majority_vote_heals_drops_and_breaks_ties_downwards():
    classes = torch.tensor([[7, 7, 2, 9, 4, 5]])
    ids = torch.tensor([[1, 1, 1, 2, 3, 3]])

    def vote(*args):
        return [m.tolist() for m in majority_vote(*args)]

    assert vote(classes, ids) == [[[7, 7, 7, 9, 4, 4]], [[1, 1, 1, 2, 3, 3]]]
    assert vote(classes, ids, 2) == [[[7, 7, 7, 0, 4, 4]], [[1, 1, 1, 0, 3, 3]]]
    assert vote(classes, ids, 2, 2) == [[[7, 7, 7, 0, 4, 4]], [[1, 1, 1, 0, 3, 3]]]
    assert vote(classes, ids, 2, 1) == [[[7, 7, 2, 0, 4, 5]], [[1, 1, 1, 0, 3, 3]]]
    assert vote(classes * 0, ids) == [[[0] * 6]] * 2
