"""Diffusion: noise schedules, prediction types, losses, one sampling loop, and analog bits.

Plain functions of tensors and of one callable, the denoiser, so one loop samples images (RIN,
UNet), discrete pixels (Bit Diffusion) and panoptic masks (Pix2Seq-D). Only what takes a `c` knows
of configurations; nothing here knows of data sets.

    x_t = sqrt(gamma) * x0 + sqrt(1 - gamma) * eps      gamma in [0, 1]; t = 0: data, t = 1: noise
    v   = sqrt(gamma) * eps - sqrt(1 - gamma) * x0

The denoiser is called as `denoise(x_t, gamma, self_cond, **cond)` and returns the pair (prediction
shaped like x_t, hidden state or None):
    gamma (B,)   what the network sees in place of t
    self_cond    for 'x', 'eps', 'auto': zeros_like(x_t), then the last estimate
                 for 'latent', 'interface', 'latent+interface': None, then the last hidden state,
                 a tensor or a tuple of them
    cond         labels, context frames, an encoded image: whatever the network takes, by keyword

Papers: Bit Diffusion 2208.04202 (analog bits, self-conditioning, time intervals), RIN 2212.11972
(latent self-conditioning), Pix2Seq-D 2210.06366 (masks), schedules 2301.10972, guidance 2207.12598,
v 2202.00512.
Left out: learned variances, higher-order solvers, softmax over one-hot.

    python -m pytest -q tests/test_diffusion.py         # what this file claims, checked
    python -c "import diffusion; print(diffusion.gamma_schedule('sigmoid@-3,3,0.9'))"
"""
import math
import re
from dataclasses import replace
from functools import lru_cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map, tree_map_only

from tokenizer import (
    Fraction, NotNegative, Positive, UserError, between, check_choice, frozen, require)

GAMMA_MIN = 1e-9
map_tensors = partial(tree_map_only, torch.Tensor)
PRED_TYPES = ("x", "eps", "v", "x_sigmoid_xent", "x_softmax_xent")     # the reference's; "x" is x0
SELF_CONDS = ("none", "x", "eps", "auto", "latent", "interface", "latent+interface")


@frozen
class DiffusionConfig:
    """What is diffused, and what a network learns about it."""
    bits: Literal["", "uint8", "gray", "uint8_s", "oneh", "ids"] = ""   # analog bits; ids: of maps
    b_scale: Positive = 1.0             # data lie in +- this
    pred_type: Literal[PRED_TYPES] = "eps"      # what the network predicts
    train_schedule: str = "cosine"      # gamma(t): cosine[@S,E,T], sigmoid@S,E,T or simple_linear
    normalize_input: bool = False       # divide what the network sees by its standard deviation
    self_cond_rate: Fraction = 0.5      # self-conditioning probability
    self_cond_masking: bool = False     # choose examples one by one; else the first of a batch
    label_drop: Fraction = 0.0          # label dropout probability, for guidance
    low_noise_weight: between(1, kind=float) = 1.0     # loss weight: min(1 / (1 - gamma), this)
    instance_weight: NotNegative = 0.2  # pan, vps: 1 / pixels of its instance to this power weighs


# --------------------------------------------------------------------------------------------------
# noise, and what a prediction says about it. gamma has one value per example, or one for all; how
# it falls with the time t, `gamma_schedule` says

def expand(values, x):
    """One value per example, or one for all, made to broadcast over x: (B,) -> (B, 1, 1, ...)."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def scales(gamma, x):
    """sqrt(gamma), sqrt(1 - gamma), to broadcast over x. The second is a divisor: never zero."""
    gamma = expand(gamma, x)
    variance = (1 - gamma).clamp(min=GAMMA_MIN)
    return gamma.sqrt(), variance.sqrt()


def add_noise(x0, gamma, eps):
    """x_t from data and noise of one shape (B, ...)."""
    signal, noise = scales(gamma, x0)
    return signal * x0 + noise * eps


def diffuse(x0, schedule, t=None, generator=None):
    """Noise for a training step, at times t (B,), or at uniform times in [0, 1), one per example.
    x0 float (B, ...), schedule a name. Returns x_t and eps, shaped like x0, and gamma (B,)."""
    if t is None:
        t = uniform(x0, generator)
    gamma = gamma_schedule(schedule)(t)
    eps = normal(x0, generator)
    return add_noise(x0, gamma, eps), eps, gamma


def predict_x0_eps(x_t, gamma, pred, pred_type, b_scale=1.0, rederive_eps=True):
    """The data and noise that a prediction implies: (x0, eps), shaped like x_t and pred (B, ...).

    b_scale:      x0 is clipped to +- this; math.inf leaves it
    rederive_eps: eps explains x_t given the *clipped* x0, as sampling needs; else 'eps' and 'v'
                  give it
    A prediction of the cross-entropy types is expected analog bits, so x0. UserError for an
    unknown pred_type.
    """
    check_choice(pred_type, PRED_TYPES, "pred_type")
    signal, noise = scales(gamma, x_t)
    x0, eps = pred, None
    if pred_type == "eps":
        x0 = (x_t - noise * pred) / signal
        eps = pred
    if pred_type == "v":
        x0 = signal * x_t - noise * pred
        eps = noise * x_t + signal * pred
    x0 = x0.clamp(-b_scale, b_scale)
    if rederive_eps or eps is None:
        eps = (x_t - signal * x0) / noise
    return x0, eps


def diffusion_loss(pred, pred_type, x0, eps, gamma, b_scale=1.0, groups=1, weight=None):
    """The losses (B,) that belong to pred_type, of a network's output (logits for cross entropy).

    x0, eps: (B, C, ...)
    groups:  of bits, each of which is one class of x_softmax_xent
    weight:  one value per position, x0's shape without C, or None
    UserError for an unknown pred_type. In the reference the image model clips x0 and divides by
    b_scale in its 'x' loss; the panoptic 'eps' loss ignores the weight.
    """
    check_choice(pred_type, PRED_TYPES, "pred_type")
    if pred_type == "x_sigmoid_xent":                  # -log sigmoid(logit), or of 1 - it for bit 0
        loss = F.softplus(-pred * x0 / b_scale)
    elif pred_type == "x_softmax_xent":
        loss = softmax_xent(pred, x0, groups)
    else:
        signal, noise = scales(gamma, x0)
        v = signal * eps - noise * x0
        target = {"x": x0, "eps": eps, "v": v}[pred_type]
        loss = (pred - target).square()
    if weight is not None:
        loss = loss * weight.unsqueeze(1)
    return loss.flatten(1).mean(1)


# --------------------------------------------------------------------------------------------------
# sampling

def ddim_step(x_t, x0, eps, gamma, gamma_next, noise):
    """The same x0 and eps at the next noise level (2010.02502, eq. 12 with sigma = 0)."""
    return add_noise(x0, gamma_next, eps)


def ddpm_step(x_t, x0, eps, gamma, gamma_next, noise, variance="large"):
    """Ancestral (2006.11239, algorithm 2): variance "large" is beta_t, "small" the posterior's."""
    _, sigma = scales(gamma, x_t)
    _, sigma_next = scales(gamma_next, x_t)
    alpha = expand(gamma / gamma_next, x_t).clamp(max=1)       # rounding: 1 - alpha must be >= 0
    drift = (1 - alpha) / sigma * eps
    mean = (x_t - drift) / alpha.sqrt()
    std = (1 - alpha).sqrt()
    if variance == "small":
        std = std * (sigma_next / sigma)
    return mean + std * noise


SAMPLERS = {
    "ddim": ddim_step,
    "ddpm": ddpm_step,
    "ddpm@large": ddpm_step,
    "ddpm@small": partial(ddpm_step, variance="small"),
}


@torch.no_grad()
def sample(
        denoise, x_init, steps, *,
        schedule="cosine", sampler="ddim", td=0.0, pred_type="eps", b_scale=1.0,
        cond=None, null_cond=None, guidance=0.0,
        self_cond="none", self_cond_decay=0.0,
        generator=None, step_noise=None, callback=None):
    """Turns standard normal noise x_init (B, ...), float32 or float64, into samples of its shape:
    the last x0 prediction of `steps` calls of the denoiser (top of the file), t from 1 to 0.

    schedule, sampler, pred_type, self_cond: a name of SCHEDULES, SAMPLERS, PRED_TYPES, SELF_CONDS.
    cond, null_cond: dicts, the condition and what stands for none of it.
    guidance g: out = cond * (1 + g) - uncond * g (2207.12598); 0 saves that second call.
    td: asymmetric time intervals (2208.04202). Call i sees t = 1 - i / steps; x_t then moves to the
        noise of max(t - (1 + td) / steps, 0), which is less than the next call sees.
    b_scale: clips x0, as in predict_x0_eps.
    self_cond_decay: weight of the past in a moving average, from zero, of what the network sees.
    generator: draws the noise of DDPM, on x_init's device; step_noise (steps, B, ...) replaces it.
    callback(i, x0, x_t): sees each estimate and the x_t it came from.
    The loop never waits for the device. UserError for an unknown name, listing the choices, and
    for steps < 1.
    """
    check_choice(sampler, SAMPLERS, "sampler")
    require(steps >= 1, f"sample_steps must be at least 1, got {steps}")
    t = 1 - x_init.new_tensor(range(steps)) / steps
    t_next = (t - (1 + td) / steps).clamp(min=0)
    gammas, gammas_next = map(gamma_schedule(schedule), (t, t_next))

    x_t, state = x_init, first_self_cond(self_cond, x_init)
    for i, (gamma, gamma_next) in enumerate(zip(gammas, gammas_next)):
        seen = gamma.expand(len(x_t))                  # (B,)
        pred, hidden = denoise(x_t, seen, state, **(cond or {}))
        if guidance:
            null_pred, _ = denoise(x_t, seen, state, **(null_cond or {}))
            pred = pred * (1 + guidance) - null_pred * guidance
        x0, eps = predict_x0_eps(x_t, gamma, pred, pred_type, b_scale)
        if callback:
            callback(i, x0, x_t)
        new = next_self_cond(self_cond, pred_type, x0, eps, hidden)
        state = moving_average(state, new, self_cond_decay)

        noise = None
        if sampler != "ddim":
            noise = normal(x_t, generator) if step_noise is None else step_noise[i]
        x_t = SAMPLERS[sampler](x_t, x0, eps, gamma, gamma_next, noise)
    return x0


# --------------------------------------------------------------------------------------------------
# self-conditioning (2208.04202, "Self-Conditioning"; 2212.11972, "Latent Self-Conditioning")

def first_self_cond(self_cond, x_t):
    """What the denoiser sees at its first call: an estimate of zeros, or no hidden state."""
    check_choice(self_cond, SELF_CONDS, "self_cond")
    return torch.zeros_like(x_t) if self_cond in ("x", "eps", "auto") else None


def next_self_cond(self_cond, pred_type, x0, eps, hidden):
    """What it sees at the next one."""
    if self_cond == "auto":
        self_cond = "eps" if pred_type == "eps" else "x"
    estimates = {"none": None, "x": x0, "eps": eps}
    require(
        self_cond in estimates or hidden is not None,
        f"self_cond {self_cond!r} needs a denoiser that returns a hidden state")
    return estimates.get(self_cond, hidden)


# --------------------------------------------------------------------------------------------------
# a network and its recipe c (see train.Config): the loss to train on, and samples

def as_denoiser(network, c, logits=False):
    """A network -> a denoiser, see above. logits: leave them, for the cross-entropy losses."""
    def denoise(x_t, gamma, self_cond=None, **cond):
        seen = unit_std(x_t) if c.diffusion.normalize_input else x_t
        pred, hidden = network(seen, gamma, self_cond, **cond)
        pred = pred.float()
        return pred if logits else expected_bits(pred, c), hidden

    return denoise


def denoising_losses(network, batch, c, t=None, generator=None):
    """The losses (B,) of a training step: noise, maybe a pass without gradient whose estimate the
    network then sees (self-conditioning), and a pass with gradient.

    batch: data.Batch on the device, its targets uint8 pixels. While the network trains, labels are
           hidden with probability label_drop, for guidance, the same in both passes; and losses
           are weighted by 1 / (1 - gamma), which turns the error of x0 into that of v (2202.00512,
           section 4), but by low_noise_weight at most (as in 2303.09556)
    t:     (B,), or None for uniform times
    """
    d = c.diffusion
    x0 = pixels_to_x0(batch.targets, c)
    cond, weight = condition(batch.cond, c), None
    if batch.images is not None:                       # of which the targets are panoptic maps
        cond["images"] = batch.images
        weight = batch.cond["known"] * instance_weights(
            batch.targets[:, 1].long(), d.instance_weight)
    if network.training and d.label_drop and "labels" in cond:
        dropped = uniform(x0, generator) < d.label_drop
        cond["labels"] = cond["labels"].masked_fill(dropped, -1)
    x_t, eps, gamma = diffuse(x0, d.train_schedule, t, generator)
    state = self_cond_for_training(as_denoiser(network, c), x_t, gamma, cond, c, generator)
    pred, _ = as_denoiser(network, c, logits=True)(x_t, gamma, state, **cond)
    losses = diffusion_loss(
        pred, d.pred_type, x0, eps, gamma, d.b_scale, c.model.softmax_groups, weight)
    if network.training:
        losses = losses / (1 - gamma).clamp(min=1 / d.low_noise_weight)
    return losses


def denoising_loss(network, batch, c):
    """The weighted sum of `denoising_losses`, a scalar."""
    return (denoising_losses(network, batch, c) * batch.weights).sum()


def generate(network, c, count, cond=None, generator=None, callback=None, noise=None):
    """`count` samples of a network, as c.sampling says: uint8 (count, C, [frames,] H, W).

    cond:     like Batch.cond on the device: labels (count,), -1 for none, and context frames; or
              what Panoptic.encode returned
    callback: callback([x_t, x0]) sees both at each step, as pixels of the first four samples
    noise:    to begin with; drawn, if None
    """
    s, device = c.sampling, next(network.parameters()).device
    denoise = as_denoiser(network, c)
    if hasattr(network, "replayed"):                   # see model.Device
        denoise = network.replayed(denoise)
    cond = condition(cond or {}, c)
    if noise is None:
        noise = torch.randn(count, *c.model.sample_shape, generator=generator, device=device)

    def show(i, x0, x_t):
        callback([x0_to_pixels(x[:4], c).cpu() for x in (x_t, x0)])

    x0 = sample(
        denoise,
        noise,
        s.sample_steps,
        schedule=s.sample_schedule,
        sampler=s.sampler,
        pred_type=c.diffusion.pred_type,
        cond=cond,
        null_cond=cond | {"labels": None},
        guidance=s.guidance,
        td=s.td,
        b_scale=c.diffusion.b_scale,
        self_cond=c.model.self_cond,
        self_cond_decay=s.self_cond_decay,
        generator=generator,
        callback=callback and show,
    )
    return x0_to_pixels(x0, c)


# --------------------------------------------------------------------------------------------------
# analog bits (2208.04202): integers as real vectors of +-b_scale, least significant bit first

def ints_to_bits(ints, n_bits, b_scale=1.0):
    """Integers in [0, 2^n_bits) -> float32 analog bits: (B, C, ...) -> (B, C * n_bits, ...)."""
    places = torch.arange(n_bits, device=ints.device)
    bits = ints[..., None] >> places & 1               # (B, C, ..., n_bits)
    return (to_channels(bits).float() * 2 - 1) * b_scale


def bits_to_ints(bits, n_bits):
    """Inverse of ints_to_bits, int64; a bit is set where its value is above 0."""
    places = torch.arange(n_bits, device=bits.device)
    bits = (bits > 0).unflatten(1, (-1, n_bits)).movedim(2, -1).long()         # (B, C, ..., n_bits)
    return (bits << places).sum(-1)


# ==== reference ===================================================================================
# self-conditioning in training (2208.04202; 2212.11972, "Latent Self-Conditioning")

@torch.no_grad()
def self_cond_for_training(denoise, x_t, gamma, cond, c, generator=None):
    """The self_cond of a training pass: what a first pass without gradient gives for some examples,
    zeros for the others.

    x_t (B, ...), gamma (B,), cond a dict of tensors of B examples. With c.diffusion's
    self_cond_masking the first pass sees the whole batch and each example is kept with probability
    self_cond_rate; else it sees the first int(B * rate) examples, which is cheaper, and the result
    is None if that is 0 and self_cond names a hidden state. The reference masks hidden states only.
    """
    d, self_cond, B = c.diffusion, c.model.self_cond, len(x_t)
    n = B if d.self_cond_masking else int(B * d.self_cond_rate)
    if self_cond == "none" or n == 0:
        return first_self_cond(self_cond, x_t)
    x_t, gamma, cond = map_tensors(lambda a: a[:n], (x_t, gamma, cond))
    pred, hidden = denoise(x_t, gamma, first_self_cond(self_cond, x_t), **cond)
    x0, eps = predict_x0_eps(x_t, gamma, pred, d.pred_type, d.b_scale)
    state = next_self_cond(self_cond, d.pred_type, x0, eps, hidden)
    if d.self_cond_masking:
        kept = uniform(x_t, generator) < d.self_cond_rate
        return map_tensors(lambda a: a * expand(kept, a), state)
    return map_tensors(lambda a: torch.cat([a, a.new_zeros(B - n, *a.shape[1:])]), state)


# --------------------------------------------------------------------------------------------------
# small tools

def normal(x, generator):
    """Standard normal noise shaped like x."""
    return x.new_empty(x.shape).normal_(generator=generator)


def uniform(x, generator):
    """(B,) random numbers in [0, 1), one per example of x (B, ...)."""
    return x.new_empty(len(x)).uniform_(generator=generator)


def to_channels(x):
    """(B, C, ..., K) -> (B, C * K, ...)."""
    return x.movedim(-1, 2).flatten(1, 2)


def moving_average(past, new, decay):
    """decay * past + (1 - decay) * new, tensors or tuples of them; no past counts as zeros."""
    scaled = map_tensors(lambda x: x * (1 - decay), new)
    return scaled if past is None else tree_map(lambda a, b: a + b * decay, scaled, past)


# --------------------------------------------------------------------------------------------------
# noise schedules gamma(t)

def falling(curve):
    """A curve -> gamma(t, start, end, ...): its piece from `start` (t = 0) to `end` (t = 1),
    rescaled to fall from 1 to 0."""
    def gamma(t, start, end, *parameters):
        y = curve(t * (end - start) + start, *parameters)
        first, last = curve(t.new_tensor([start, end]), *parameters)
        return (y - last) / (first - last)

    return gamma


def shifted_cosine(t):
    t = (t + 0.0002) / 1.00025
    return (t * (math.pi / 2)).cos().square()


@falling
def cosine(u, tau):
    # In float32 cos(pi/2) is a little below zero, and a fractional power of that is NaN.
    y = (u * (math.pi / 2)).cos()
    return y.clamp(min=0) ** (2 * tau)


@falling
def sigmoid(u, tau):
    return (u / tau).sigmoid()


def log(t, start, end, reverse):
    if reverse:
        start, end = end, start
    return falling(torch.log)(t, start, end)


def flag(text):
    return "f false t true".split().index(text.lower()) > 1


SCHEDULES = {                          # how the name is written: the function
    "cosine": shifted_cosine,
    "cosine@start,end,tau": cosine,
    "sigmoid@start,end,tau": sigmoid,
    "log@start,end,reverse": log,                      # reverse: t or f
    "simple_linear": lambda t: 1 - t,
}


@lru_cache
def gamma_schedule(name):
    """The schedule called `name`, such as "cosine" or "sigmoid@-3,3,0.9" (2301.10972).

    Returns gamma(t): float tensor t in [0, 1], any shape -> gamma in [1e-9, 1], same shape.
    UserError, with the choices, for an unknown name, a wrong number or kind of parameters, and
    parameters that make no falling curve. In the reference a name need only start right, "cosine"
    is not clipped, and "log" is clipped at 0.
    """
    kind, at, text = name.partition("@")
    texts = text.split(",") if at else []
    for form, curve in SCHEDULES.items():
        start, *names = re.split("[@,]", form)
        if start != kind or len(names) != len(texts):
            continue
        readers = [flag if name == "reverse" else float for name in names]
        try:
            values = [read(text) for read, text in zip(readers, texts)]
        except ValueError:
            break

        def gamma(t):
            return curve(t, *values).clamp(GAMMA_MIN, 1)

        first, middle, last = gamma(torch.tensor([0.0, 0.5, 1.0])).tolist()
        if first > last and first >= middle >= last:                           # False for NaN
            return gamma
    raise UserError(f"unknown schedule {name!r}; choices: {'  '.join(SCHEDULES)}")


# --------------------------------------------------------------------------------------------------
# what a network is given: pixels as data, and its condition

def condition(cond, c):
    """Batch.cond -> what the network c.model takes: labels (B,), -1 for a dropped one, if it has
    classes; context frames, in the range of x0, if it goes on from some; likewise earlier maps."""
    taken = {"labels": c.model.num_classes, "frames": c.model.cond_frames, "known": False}
    return {
        key: pixels_to_x0(value, c) if key in ("frames", "past") else value
        for key, value in cond.items() if taken.get(key, True)}


def pixels_to_x0(pixels, c):
    """uint8 (B, C, ...) -> data in +-b_scale: the same shape, or (B, C * bits per colour, ...)."""
    d, colours = c.diffusion, pixels.float() / 255
    if d.bits == "ids":
        return ints_to_bits(pixels.long(), c.model.channels // 2, d.b_scale)
    if d.bits:
        return rgb_to_bits(colours, d.bits, d.b_scale)
    return (colours * 2 - 1) * d.b_scale


def x0_to_pixels(x0, c):
    """Inverse of pixels_to_x0, rounded and clipped to uint8; a class or id too large for a map
    becomes the last one."""
    d = c.diffusion
    if d.bits == "ids":
        return bits_to_panoptic(
            x0, len(c.categories) + 1, c.data.max_segments, c.model.channels // 2).byte()
    colours = bits_to_rgb(x0, d.bits) if d.bits else (x0 / d.b_scale / 2 + 0.5).clamp(0, 1)
    return (colours * 255).round().byte()


def unit_std(x_t):
    """x_t (B, ...) over its standard deviation, per example (2301.10972, "Strategy 2"). x0 and eps
    follow from the x_t that is not normalised. The reference takes x_t and a concatenated estimate
    as one tensor here."""
    std = x_t.flatten(1).std(1, correction=0)          # (B,)
    return x_t / expand(std, x_t)


# --------------------------------------------------------------------------------------------------
# outputs that are logits of bits: each of a bit on its own, or of all values that k bits take

def expected_bits(out, c):
    """A network's output -> what its pred_type predicts: logits become expected analog bits."""
    d = c.diffusion
    if d.pred_type == "x_sigmoid_xent":
        return (out.sigmoid() * 2 - 1) * d.b_scale
    if d.pred_type == "x_softmax_xent":
        return softmax_bits(out, c.model.softmax_groups, d.b_scale)
    return out


def softmax_bits(logits, groups, b_scale=1.0):
    """Expected analog bits (B, groups * k, ...) of logits (B, groups * 2^k, ...)."""
    probs = logits.unflatten(1, (groups, -1)).softmax(2).movedim(2, -1)    # (B, groups, ..., 2^k)
    values = torch.arange(probs.shape[-1], device=logits.device)
    n_bits = len(values).bit_length() - 1
    codes = ints_to_bits(values[:, None], n_bits, b_scale)                     # (2^k, k)
    return to_channels(probs @ codes.to(probs.dtype))


def softmax_xent(logits, x0, groups):
    """Cross entropy (B, groups, ...) of logits (B, groups * 2^k, ...), of which every group is a
    distribution over the values of k bits, against analog bits x0 (B, groups * k, ...)."""
    targets = bits_to_ints(x0, x0.shape[1] // groups)  # (B, groups, ...)
    logits = logits.unflatten(1, (groups, -1))         # (B, groups, 2^k, ...)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none")
    return losses.view(targets.shape)


# --------------------------------------------------------------------------------------------------
# codes of colours

# A random permutation of 0..255, so that near colours get unrelated words ("uint8 (rand)" in
# 2208.04202): np.random.RandomState(42).permutation(256), which checkpoints need.
SHUFFLE = bytes.fromhex("""
    e4064fce75b9f2a7091eb4dee6d98844c70f6018eb137898217cfdd00aa4b861
    94bedf1956124b89c4b0efb52d421043d7c9b1268f5437dc688b7f3c65acf57e
    e1906cb249729e458d6d73f671f35a1daa526f0538849aa241ba55dbed1f0c23
    1c2a70167d5dadfb33f05f92cc4c29779b4e961af7a876c18c00024d2e64cd9f
    b7fe62243dc88e0bfae01be7047a2093b68a3e8780e8c246c5402ca59c287b99
    17c0f95127f42f5ec3a12b91af03693585e9c6ee31a35022d307abd86e5b53e5
    ea59080d3bdd8311a648e286d1ec3f366b32d4aed5bdfccfe3a93ada30581539
    cba0f8bbbf81259df1013495829767637457ca4ad6d279ff14bc476a0e5cb366
""")
RGB_CODES = {"uint8": 8, "gray": 8, "uint8_s": 8, "oneh": 256}                 # channels per colour


def code_words(code, device):
    """(256,) the 8-bit word that stands for each intensity."""
    if code == "uint8_s":
        return torch.tensor(list(SHUFFLE), device=device)
    words = torch.arange(256, device=device)
    return words ^ words >> 1 if code == "gray" else words


def rgb_to_bits(image, code="uint8", b_scale=1.0):
    """Colours in [0, 1] -> float32 analog bits, colour by colour: (B, C, ...) ->
    (B, C * RGB_CODES[code], ...).

    Codes: "uint8" binary, "gray" reflected Gray, "uint8_s" shuffled, "oneh" one-hot. UserError for
    others.
    """
    check_choice(code, RGB_CODES, "RGB code")
    pixels = (image * 255.5).floor().clamp(0, 255).long()  # as TensorFlow converts to uint8
    if code != "oneh":
        return ints_to_bits(code_words(code, image.device)[pixels], 8, b_scale)
    bits = to_channels(F.one_hot(pixels, 256))
    return (bits.float() * 2 - 1) * b_scale


def bits_to_rgb(bits, code="uint8"):
    """Inverse of rgb_to_bits: float32 multiples of 1/255 in [0, 1]. UserError for other codes."""
    check_choice(code, RGB_CODES, "RGB code")
    if code == "oneh":
        pixels = bits.unflatten(1, (-1, 256)).argmax(2)
    else:
        intensities = code_words(code, bits.device).argsort()                  # of each word
        pixels = intensities[bits_to_ints(bits, 8)]
    return pixels / 255


# --------------------------------------------------------------------------------------------------
# panoptic maps (2210.06366): a class id and an instance id per pixel, 8 bits each if published

def bits_to_panoptic(bits, num_classes, max_instances, n_bits=8):
    """Analog bits (B, 2 * n_bits, ...) -> (B, 2, ...) int64: class and instance id, each capped."""
    classes, ids = bits_to_ints(bits, n_bits).unbind(1)
    return torch.stack([classes.clamp(max=num_classes - 1), ids.clamp(max=max_instances - 1)], 1)


def generate_maps(network, c, frames, generator=None, noise=None, callback=None):
    """Panoptic maps of videos (an image is a clip of one frame): each frame is sampled from noise,
    with the maps of the frames before as its condition, if the network takes such.

    frames:   float (B, T, 3, H, W) in [0, 1]; noise: (T, B, bits, h, w), or None to draw it
    callback: of `generate`, for the first frame
    Returns uint8 (B, T, 2, h, w): class and instance id of each pixel.
    """
    m, later = c.model, c.sampling.later_steps or c.sampling.sample_steps
    none = frames.new_zeros((len(frames), 2, *m.sample_size), dtype=torch.uint8)
    maps = [none] * m.past_frames
    for n, images in enumerate(frames.unbind(1)):
        past = None
        if m.past_frames:
            past = pixels_to_x0(torch.cat(maps[-m.past_frames:], 1), c)
        maps.append(generate(
            network,
            c,
            len(images),
            network.encode(images, past),
            generator,
            None if n else callback,
            None if noise is None else noise[n],
        ))
        c = replace(c, sampling=replace(c.sampling, sample_steps=later))
    return torch.stack(maps[m.past_frames:], 1)


def instance_weights(ids, power):
    """Loss weight of each pixel, so that small instances count (2210.06366): 1 / (pixels of its
    instance + 1) to `power`, with mean 1 in each image. ids int64 (B, H, W) in [0, 256) ->
    float32."""
    flat = ids.flatten(1)                                                      # (B, H * W)
    ones = torch.ones_like(flat).float()
    counts = ones.new_zeros(len(ids), 256).scatter_add(1, flat, ones)
    weight = (counts.gather(1, flat) + 1) ** -power
    return (weight / weight.mean(1, keepdim=True)).view(ids.shape)


def majority_vote(classes, ids, min_pixels=0, split_pixels=0):
    """Each instance of one image takes the class of most of its pixels (in a tie the smallest),
    but a part of split_pixels or more of another class keeps that (0: none does). Instances with
    fewer than min_pixels pixels, or of class 0, become (0, 0). Integer maps (H, W) -> (classes,
    ids)."""
    n_classes = int(classes.max()) + 1
    n_ids = int(ids.max()) + 1
    pairs = ids * n_classes + classes
    votes = torch.bincount(pairs.flatten(), minlength=n_ids * n_classes).view(n_ids, n_classes)
    alone = votes[ids, classes] >= (split_pixels or math.inf)
    classes = classes.where(alone, votes.argmax(1)[ids])
    classes = classes.where(votes.sum(1)[ids] >= min_pixels, 0)
    return classes, ids.where(classes != 0, 0)
