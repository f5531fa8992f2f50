"""Diffusion: noise schedules, prediction types, losses, one sampling loop, and analog bits.

Plain functions of tensors and of one callable, the denoiser, so one loop samples images (RIN, UNet), discrete pixels (Bit
Diffusion) and panoptic masks (Pix2Seq-D). Only the last section knows of networks and their configuration; data sets nothing.

    x_t = sqrt(gamma) * x0 + sqrt(1 - gamma) * eps      gamma in [0, 1]; t = 0 is data, t = 1 is noise
    v   = sqrt(gamma) * eps - sqrt(1 - gamma) * x0

The denoiser is called as `denoise(x_t, gamma, cond, self_cond)` and returns a prediction shaped like x_t, or
the pair (prediction, hidden state):
    gamma (B,)   what the network sees in place of t
    cond         what the caller passed (labels, encoded image, a tuple of them), or None for no condition
    self_cond    for 'x', 'eps', 'auto': zeros_like(x_t), then the last estimate
                 for 'latent', 'interface', 'latent+interface': None, then the last hidden state (a tensor or a tuple)
For the cross-entropy types the network emits logits: sigmoid_bits or softmax_bits makes a prediction of them.

Papers: Bit Diffusion 2208.04202 (analog bits, self-conditioning, time intervals), RIN 2212.11972 (latent
self-conditioning), Pix2Seq-D 2210.06366 (masks), schedules 2301.10972, guidance 2207.12598, v 2202.00512.
Left out: learned variances, higher-order solvers, losses weighted by time, softmax over one-hot pixels.

    python -m pytest -q tests/test_diffusion.py         # what this file claims, checked
    python -c "import torch, diffusion; print(diffusion.gamma_schedule('sigmoid@-3,3,0.9')(torch.linspace(0, 1, 6)))"
"""
import functools
import math

import torch
import torch.nn.functional as F

GAMMA_MIN = 1e-9
PRED_TYPES = ("x", "eps", "v", "x_sigmoid_xent", "x_softmax_xent")  # the reference's names; "x" is x0
ESTIMATES, HIDDENS = ("x", "eps", "auto"), ("latent", "interface", "latent+interface")
SELF_CONDS = ("none", *ESTIMATES, *HIDDENS)


def check_choice(value, choices, what):
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; choices: {', '.join(choices)}")


def expand(values, x):
    """One value per example, or one for all, made to broadcast over x: (B,) -> (B, 1, 1, ...)."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def map_tensors(f, *trees):
    """f over tensors or over tuples of them; None stays None."""
    if trees[0] is None:
        return None
    if isinstance(trees[0], (tuple, list)):
        return tuple(map_tensors(f, *parts) for parts in zip(*trees))
    return f(*trees)


# ---------------------------------------------------------------------------------------------------------------
# gamma(t): the share of signal at time t

def gamma_linear(t):
    return (1 - t).clamp(GAMMA_MIN, 1)


def gamma_cosine_shifted(t):
    return ((t + 0.0002) / 1.00025 * (math.pi / 2)).cos().square().clamp(GAMMA_MIN, 1)


def falling(curve, t, start, end):
    """The piece of a curve from `start` (t = 0) to `end` (t = 1), rescaled to fall from 1 to 0."""
    y, y0, y1 = curve(t * (end - start) + start), curve(t.new_full((), start)), curve(t.new_full((), end))
    return ((y - y1) / (y0 - y1)).clamp(GAMMA_MIN, 1)


def gamma_cosine(t, start, end, tau):
    # In float32 cos(pi/2) is a little below zero, and a fractional power of that is NaN.
    return falling(lambda u: (u * (math.pi / 2)).cos().clamp(min=0) ** (2 * tau), t, start, end)


def gamma_sigmoid(t, start, end, tau):
    return falling(lambda u: (u / tau).sigmoid(), t, start, end)


def gamma_log(t, start, end, reverse):
    return falling(torch.log, t, *((end, start) if reverse else (start, end)))


FLAGS = {"t": True, "true": True, "f": False, "false": False}
SCHEDULES = {  # how the name is written: the function, and what reads each parameter
    "cosine": (gamma_cosine_shifted,),
    "cosine@start,end,tau": (gamma_cosine, float, float, float),
    "sigmoid@start,end,tau": (gamma_sigmoid, float, float, float),
    "log@start,end,reverse": (gamma_log, float, float, lambda text: FLAGS[text.lower()]),
    "simple_linear": (gamma_linear,),
}


@functools.lru_cache
def gamma_schedule(name):
    """The schedule called `name`, such as "cosine" or "sigmoid@-3,3,0.9" (2301.10972, "Strategy 1").

    Returns gamma(t): float tensor t in [0, 1], any shape -> gamma in [1e-9, 1], same shape. ValueError, with
    the choices, for an unknown name, a wrong number of parameters, one that cannot be read, and parameters
    that make no falling curve. In the reference a name need only start right, "cosine" is not
    clipped, and "log" is clipped at 0.
    """
    kind, at, values = name.partition("@")
    values = values.split(",") if at else []
    for form, (f, *readers) in SCHEDULES.items():
        if form.split("@")[0] == kind and len(readers) == len(values):
            try:
                params = [read(value) for read, value in zip(readers, values)]
                first, middle, last = f(torch.tensor([0.0, 0.5, 1.0]), *params).tolist()
            except (ValueError, KeyError, ZeroDivisionError):
                break
            if first > last and first >= middle >= last:  # False for NaN
                return lambda t: f(t, *params)
    raise ValueError(f"unknown schedule {name!r}; choices: {'  '.join(SCHEDULES)}")


# ---------------------------------------------------------------------------------------------------------------
# Noise, and what a prediction says about x0 and eps

def scales(gamma, x):
    """sqrt(gamma), sqrt(1 - gamma), to broadcast over x. The second is kept off zero, as it divides."""
    gamma = expand(gamma, x)
    return gamma.sqrt(), (1 - gamma).clamp(min=GAMMA_MIN).sqrt()


def add_noise(x0, gamma, eps):
    """x_t from data and noise of one shape (B, ...); gamma holds one value per example, or one for all."""
    signal, noise = scales(gamma, x0)
    return signal * x0 + noise * eps


def diffuse(x0, schedule, t=None, generator=None):
    """Noise for a training step, at times t (B,), or at uniform times in [0, 1), one per example.

    x0 float (B, ...), schedule a name. Returns x_t and eps, shaped like x0, and gamma (B,).
    """
    if t is None:
        t = torch.rand(len(x0), generator=generator, device=x0.device, dtype=x0.dtype)
    gamma = gamma_schedule(schedule)(t)
    eps = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
    return add_noise(x0, gamma, eps), eps, gamma


def unit_std(x_t):
    """x_t (B, ...) over its standard deviation, per example (2301.10972, "Strategy 2"). A denoiser wanting such
    input calls this itself: x0 and eps follow from the x_t that is not normalised. The reference takes x_t
    and a concatenated estimate as one tensor here.
    """
    return x_t / x_t.std(dim=tuple(range(1, x_t.ndim)), correction=0, keepdim=True)


def predict_x0_eps(x_t, gamma, pred, pred_type, x0_clip="auto", b_scale=1.0, rederive_eps=True):
    """The data and noise that a prediction implies: (x0, eps), shaped like x_t and pred (B, ...).

    gamma: one value per example, or one for all. x0_clip: "auto" for +-b_scale, a pair (low, high), or None.
    rederive_eps: eps explains x_t given the *clipped* x0, as sampling needs; else 'eps' and 'v' give it.
    A prediction of the cross-entropy types is expected analog bits, so x0. ValueError for unknown names.
    """
    check_choice(pred_type, PRED_TYPES, "pred_type")
    signal, noise = scales(gamma, x_t)
    if pred_type == "eps":
        x0, eps = (x_t - noise * pred) / signal, pred
    elif pred_type == "v":
        x0, eps = signal * x_t - noise * pred, noise * x_t + signal * pred
    else:
        x0, eps = pred, None
    if isinstance(x0_clip, str):
        check_choice(x0_clip, ("auto",), "x0_clip")
        x0_clip = (-b_scale, b_scale)
    if x0_clip is not None:
        x0 = x0.clamp(*x0_clip)
    if rederive_eps or eps is None:
        eps = (x_t - signal * x0) / noise
    return x0, eps


# ---------------------------------------------------------------------------------------------------------------
# Losses, each a scalar. `weight` has one value per position: the shape of x0 without the channels at `dim`.

def weighted_mean(loss, weight, dim):
    return loss.mean() if weight is None else (loss * weight.unsqueeze(dim)).mean()


def mse_loss(pred, target, weight=None, dim=1):
    return weighted_mean((pred - target).square(), weight, dim)


def sigmoid_xent_loss(logits, x0, b_scale=1.0, weight=None, dim=1):
    """Every bit on its own: -log sigmoid(logit), its sign turned where the analog bit x0 is negative."""
    return weighted_mean(F.softplus(-logits * x0 / b_scale), weight, dim)


def softmax_xent_loss(logits, x0, groups, weight=None, dim=1):
    """Every k bits a class: logits (B, groups * 2^k, ...) against analog bits x0 (B, groups * k, ...)."""
    dim = dim % x0.ndim
    targets = bits_to_ints(x0, x0.shape[dim] // groups, dim).unsqueeze(dim + 1)      # (B, groups, 1, ...)
    log_probs = logits.unflatten(dim, (groups, -1)).log_softmax(dim + 1)             # (B, groups, 2^k, ...)
    return weighted_mean(-log_probs.gather(dim + 1, targets).squeeze(dim + 1), weight, dim)


def sigmoid_bits(logits, b_scale=1.0):
    """Expected analog bits, same shape."""
    return (logits.sigmoid() * 2 - 1) * b_scale


def softmax_bits(logits, groups, b_scale=1.0, dim=1):
    """Expected analog bits (B, groups * k, ...) of logits (B, groups * 2^k, ...)."""
    dim = dim % logits.ndim
    probs = logits.unflatten(dim, (groups, -1)).softmax(dim + 1).movedim(dim + 1, -1)  # (B, groups, ..., 2^k)
    classes = torch.arange(probs.shape[-1], device=logits.device)[:, None]
    codes = ints_to_bits(classes, len(classes).bit_length() - 1, b_scale)              # (2^k, k)
    return (probs @ codes.to(probs.dtype)).movedim(-1, dim + 1).flatten(dim, dim + 1)


def diffusion_loss(pred, pred_type, x0, eps, gamma, b_scale=1.0, groups=1, weight=None, dim=1):
    """The loss that belongs to pred_type, of the network's output (logits for the cross-entropy types).

    x0, eps (B, ...), gamma one value per example. ValueError for an unknown pred_type. In the reference the
    image model clips x0 and divides by b_scale in its 'x' loss; the panoptic 'eps' loss ignores the weight.
    """
    check_choice(pred_type, PRED_TYPES, "pred_type")
    if pred_type == "x_sigmoid_xent":
        return sigmoid_xent_loss(pred, x0, b_scale, weight, dim)
    if pred_type == "x_softmax_xent":
        return softmax_xent_loss(pred, x0, groups, weight, dim)
    signal, noise = scales(gamma, x0)
    target = x0 if pred_type == "x" else eps if pred_type == "eps" else signal * eps - noise * x0
    return mse_loss(pred, target, weight, dim)


# ---------------------------------------------------------------------------------------------------------------
# Guidance and self-conditioning

def guided(denoise, x_t, gamma, cond, self_cond, guidance=0.0, null_cond=None):
    """(prediction, hidden or None); guidance as in 2207.12598, hidden from the conditional pass."""
    split = lambda out: out if isinstance(out, (tuple, list)) else (out, None)
    pred, hidden = split(denoise(x_t, gamma, cond, self_cond))
    if guidance:
        null_pred, _ = split(denoise(x_t, gamma, null_cond, self_cond))
        pred = pred * (1 + guidance) - null_pred * guidance
    return pred, hidden


def first_self_cond(self_cond, x_t):
    check_choice(self_cond, SELF_CONDS, "self_cond")
    return torch.zeros_like(x_t) if self_cond in ESTIMATES else None


def next_self_cond(self_cond, pred_type, x0, eps, hidden):
    if self_cond in HIDDENS and hidden is None:
        raise ValueError(f"self_cond {self_cond!r} needs a denoiser that returns (prediction, hidden)")
    if self_cond == "auto":
        self_cond = "eps" if pred_type == "eps" else "x"
    return {"none": None, "x": x0, "eps": eps}.get(self_cond, hidden)


@torch.no_grad()
def self_cond_for_training(denoise, x_t, gamma, cond=None, *, self_cond, rate=0.5, by_masking=False,
                           pred_type="eps", x0_clip="auto", b_scale=1.0, generator=None):
    """The self_cond of a training pass: the estimate (or hidden state) of a first pass without gradient for some
    examples, zeros for the others (2208.04202, "Self-Conditioning"; 2212.11972, "Latent Self-Conditioning").

    x_t (B, ...), gamma (B,), cond None or tensors of B examples. by_masking: the first pass sees the whole
    batch and each example is kept with probability `rate`; else it sees the first int(B * rate) examples,
    which is cheaper, and the result is None if that is 0 and self_cond names a hidden state. The reference
    masks hidden states only.
    """
    B, state = len(x_t), first_self_cond(self_cond, x_t)
    n = B if by_masking else int(B * rate)
    if self_cond == "none" or n == 0:
        return state
    x_t, gamma, cond, state = map_tensors(lambda a: a[:n], (x_t, gamma, cond, state))
    pred, hidden = guided(denoise, x_t, gamma, cond, state)
    x0, eps = predict_x0_eps(x_t, gamma, pred, pred_type, x0_clip, b_scale)
    state = next_self_cond(self_cond, pred_type, x0, eps, hidden)
    if by_masking:
        keep = torch.rand(B, generator=generator, device=x_t.device) < rate
        return map_tensors(lambda a: a * expand(keep, a), state)
    return map_tensors(lambda a: torch.cat([a, a.new_zeros(B - n, *a.shape[1:])]), state)


# ---------------------------------------------------------------------------------------------------------------
# Sampling

def ddim_step(x_t, x0, eps, gamma, gamma_next, noise=None):
    """The same x0 and eps at the next noise level (2010.02502, eq. 12 with sigma = 0)."""
    return add_noise(x0, gamma_next, eps)


def ddpm_step(x_t, x0, eps, gamma, gamma_next, noise, variance="large"):
    """Ancestral (2006.11239, algorithm 2): variance "large" is beta_t, "small" the posterior's given x0."""
    _, sigma = scales(gamma, x_t)
    _, sigma_next = scales(gamma_next, x_t)
    alpha = expand(gamma / gamma_next, x_t).clamp(max=1)  # rounding must not make 1 - alpha negative
    mean = (x_t - (1 - alpha) / sigma * eps) / alpha.sqrt()
    std = (1 - alpha).sqrt() * (sigma_next / sigma if variance == "small" else 1)
    return mean + std * noise


SAMPLERS = {"ddim": ddim_step, "ddpm": ddpm_step, "ddpm@large": ddpm_step,
            "ddpm@small": functools.partial(ddpm_step, variance="small")}


@torch.no_grad()
def sample(denoise, x_init, steps, *, schedule="cosine", sampler="ddim", pred_type="eps", cond=None,
           null_cond=None, guidance=0.0, td=0.0, x0_clip="auto", b_scale=1.0, self_cond="none",
           self_cond_decay=0.0, generator=None, step_noise=None, callback=None):
    """Turns standard normal noise x_init (B, ...), float32 or float64, into samples of its shape: the last x0
    prediction of `steps` calls of the denoiser (top of the file), t from 1 to 0.

    schedule, sampler, pred_type, self_cond: a name of SCHEDULES, SAMPLERS, PRED_TYPES, SELF_CONDS.
    guidance g: out = cond * (1 + g) - uncond * g, where uncond gets null_cond; 0 saves that second call.
    td: asymmetric time intervals (2208.04202). Call i is told t = 1 - i / steps; x_t then moves to the noise
        of max(t - (1 + td) / steps, 0), which is less than the next call is told.
    x0_clip, b_scale: as in predict_x0_eps.
    self_cond_decay: weight of the past in a moving average, from zero, of the estimate or hidden state.
    generator: draws the noise of DDPM, on x_init's device; step_noise (steps, B, ...) replaces it.
    callback(i, x0, x_t): sees each estimate and the x_t it came from. The loop never waits for the device.
    Raises ValueError for an unknown name, listing the choices, and for steps < 1.
    """
    check_choice(sampler, SAMPLERS, "sampler")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    t = 1 - torch.arange(steps, device=x_init.device, dtype=x_init.dtype) / steps
    gammas = gamma_schedule(schedule)(t)
    gammas_next = gamma_schedule(schedule)((t - (1 + td) / steps).clamp(min=0))

    x_t, state = x_init, first_self_cond(self_cond, x_init)
    for i, (gamma, gamma_next) in enumerate(zip(gammas, gammas_next)):
        pred, hidden = guided(denoise, x_t, gamma.expand(len(x_t)), cond, state, guidance, null_cond)
        x0, eps = predict_x0_eps(x_t, gamma, pred, pred_type, x0_clip, b_scale)
        if callback is not None:
            callback(i, x0, x_t)

        new = next_self_cond(self_cond, pred_type, x0, eps, hidden)
        old = map_tensors(torch.zeros_like, new) if state is None else state
        state = map_tensors(lambda a, b: a * (1 - self_cond_decay) + b * self_cond_decay, new, old)

        noise = None if step_noise is None else step_noise[i]
        if noise is None and sampler != "ddim":
            noise = torch.randn(x_t.shape, generator=generator, device=x_t.device, dtype=x_t.dtype)
        x_t = SAMPLERS[sampler](x_t, x0, eps, gamma, gamma_next, noise)
    return x0


# ---------------------------------------------------------------------------------------------------------------
# Analog bits (2208.04202): integers as real vectors of +-b_scale, least significant bit first

def ints_to_bits(ints, n_bits, b_scale=1.0, dim=1):
    """Integers in [0, 2^n_bits) to float32 analog bits: (B, C, ...) -> (B, C * n_bits, ...), C at `dim`."""
    dim = dim % ints.ndim
    bits = (ints.unsqueeze(-1) >> torch.arange(n_bits, device=ints.device)) & 1
    return (bits.movedim(-1, dim + 1).flatten(dim, dim + 1).float() * 2 - 1) * b_scale


def bits_to_ints(bits, n_bits, dim=1):
    """Inverse of ints_to_bits, int64; a bit is set where its value is above 0."""
    dim = dim % bits.ndim
    bits = (bits > 0).unflatten(dim, (-1, n_bits)).movedim(dim + 1, -1)                  # (B, C, ..., n_bits)
    return (bits.long() << torch.arange(n_bits, device=bits.device)).sum(-1)


# A random permutation of 0..255, so that near colours get unrelated words ("uint8 (rand)" in
# 2208.04202): np.random.RandomState(42).permutation(256), which the reference lists and checkpoints need.
SHUFFLE = bytes.fromhex(
    "e4064fce75b9f2a7091eb4dee6d98844c70f6018eb137898217cfdd00aa4b86194bedf1956124b89c4b0efb52d421043"
    "d7c9b1268f5437dc688b7f3c65acf57ee1906cb249729e458d6d73f671f35a1daa526f0538849aa241ba55dbed1f0c23"
    "1c2a70167d5dadfb33f05f92cc4c29779b4e961af7a876c18c00024d2e64cd9fb7fe62243dc88e0bfae01be7047a2093"
    "b68a3e8780e8c246c5402ca59c287b9917c0f95127f42f5ec3a12b91af03693585e9c6ee31a35022d307abd86e5b53e5"
    "ea59080d3bdd8311a648e286d1ec3f366b32d4aed5bdfccfe3a93ada30581539cba0f8bbbf81259df101349582976763"
    "7457ca4ad6d279ff14bc476a0e5cb366")
RGB_CODES = {"uint8": 8, "gray": 8, "uint8_s": 8, "oneh": 256}  # channels per colour


def code_words(code, device):
    """(256,) the 8-bit word that stands for each intensity."""
    v = torch.arange(256, device=device)
    if code == "uint8_s":
        return torch.tensor(list(SHUFFLE), device=device)
    return v ^ (v >> 1) if code == "gray" else v


def rgb_to_bits(image, code="uint8", b_scale=1.0, dim=1):
    """Colours in [0, 1] to float32 analog bits, colour by colour: (B, C, ...) -> (B, C * RGB_CODES[code], ...).

    Codes: "uint8" binary, "gray" reflected Gray, "uint8_s" shuffled, "oneh" one-hot. ValueError for others.
    """
    check_choice(code, RGB_CODES, "RGB code")
    dim = dim % image.ndim
    pixels = (image * 255.5).floor().clamp(0, 255).long()  # as TensorFlow converts to uint8; not rounded
    if code != "oneh":
        return ints_to_bits(code_words(code, image.device)[pixels], 8, b_scale, dim)
    return (F.one_hot(pixels, 256).movedim(-1, dim + 1).flatten(dim, dim + 1).float() * 2 - 1) * b_scale


def bits_to_rgb(bits, code="uint8", dim=1):
    """Inverse of rgb_to_bits: float32 multiples of 1/255 in [0, 1]. ValueError for an unknown code."""
    check_choice(code, RGB_CODES, "RGB code")
    dim = dim % bits.ndim
    if code == "oneh":
        return bits.unflatten(dim, (-1, 256)).argmax(dim + 1) / 255
    return code_words(code, bits.device).argsort()[bits_to_ints(bits, 8, dim)] / 255


# ---------------------------------------------------------------------------------------------------------------
# Panoptic maps (2210.06366): a class id and an instance id per pixel, 8 bits each. They become 16 analog
# bits by ints_to_bits(panoptic_map, 8, b_scale).

def bits_to_panoptic(bits, num_classes, max_instances, n_bits=8, dim=1):
    """Analog bits (B, 2 * n_bits, ...) -> (B, 2, ...) int64: class and instance id, each capped."""
    classes, ids = bits_to_ints(bits, n_bits, dim).unbind(dim)
    return torch.stack([classes.clamp(max=num_classes - 1), ids.clamp(max=max_instances - 1)], dim)


def instance_weights(ids, power=0.2, max_instances=256):
    """Loss weight of each pixel, so that small instances count (2210.06366): 1 / (pixels of its instance
    + 1) to `power`, with mean 1 in each image. ids int64 (B, H, W) in [0, max_instances) -> float32.
    """
    flat = ids.flatten(1)                                                                # (B, H*W)
    ones = torch.ones(flat.shape, device=ids.device)
    pixels = ones.new_zeros(len(ids), max_instances).scatter_add(1, flat, ones).gather(1, flat)
    weight = (pixels + 1) ** -power
    return (weight / weight.mean(1, keepdim=True)).view(ids.shape)


def majority_vote(classes, ids, min_pixels=0):
    """Each instance of one image takes the class of most of its pixels (in a tie the smallest); those with fewer
    than min_pixels pixels, or of class 0, become (0, 0). Integer maps (H, W) -> (classes, ids).
    """
    n_classes, n_ids = int(classes.max()) + 1, int(ids.max()) + 1
    votes = torch.bincount((ids * n_classes + classes).flatten(), minlength=n_ids * n_classes)
    votes = votes.view(n_ids, n_classes)
    classes = votes.argmax(1).where(votes.sum(1) >= min_pixels, 0)[ids]
    return classes, ids.where(classes != 0, 0)


# ---------------------------------------------------------------------------------------------------------------
# A network and its recipe: the loss to train on, and samples. c holds the fields of train.Config for generation, and as
# c.model the network's own configuration.

def pixels_to_x0(pixels, c):
    """Colours in [0, 1] (B, C, ...) -> data in +-c.b_scale: the same shape, or (B, C * RGB_CODES[c.bits], ...) analog bits."""
    return rgb_to_bits(pixels, c.bits, c.b_scale) if c.bits else (pixels * 2 - 1) * c.b_scale


def x0_to_pixels(x0, c):
    """Inverse of pixels_to_x0, clipped to [0, 1]."""
    return bits_to_rgb(x0, c.bits) if c.bits else (x0 / c.b_scale / 2 + 0.5).clamp(0, 1)


def as_denoiser(network, c, logits=False):
    """A network of model.py -> a denoiser as at the top of this file. logits: leave them, for the cross-entropy losses."""
    def denoise(x_t, gamma, cond, self_cond):
        out = network(unit_std(x_t) if c.normalize_input else x_t, gamma, cond, self_cond)
        pred, hidden = out if isinstance(out, tuple) else (out, None)
        pred = pred.float()
        if c.pred_type == "x_sigmoid_xent" and not logits:
            pred = sigmoid_bits(pred, c.b_scale)
        if c.pred_type == "x_softmax_xent" and not logits:
            pred = softmax_bits(pred, c.model.softmax_groups, c.b_scale)
        return pred if hidden is None else (pred, hidden)
    return denoise


def condition(c, labels=None, known=None):
    """What c.model takes as condition (see model.split_cond), a tuple, or None: labels (B,) int64 if it has classes, -1 for a
    dropped one, None for none; known frames (B, C, cond_frames, H, W), like x0, if it predicts what follows them."""
    parts = (labels,) if c.model.num_classes else ()
    return parts + (known,) if getattr(c.model, "cond_frames", 0) else parts or None


def denoising_loss(network, c, pixels, labels=None, t=None, generator=None):
    """The loss of one training step, a scalar: noise, self-conditioning, one pass of the network.

    pixels: (B, C, H, W) in [0, 1]; of a video (B, C, cond_frames + frames, H, W), the known frames first
    labels: (B,) int64, or None; while the network trains, a share of c.label_drop is hidden, for guidance (the reference
            hides others in the pass for self-conditioning; here the same)
    t:      (B,), or None for uniform times
    """
    x0, known = pixels_to_x0(pixels, c), None
    if cond_frames := getattr(c.model, "cond_frames", 0):
        known, x0 = x0[:, :, :cond_frames], x0[:, :, cond_frames:]
    if network.training and labels is not None and c.label_drop:
        kept = torch.rand(len(labels), generator=generator, device=x0.device) >= c.label_drop
        labels = torch.where(kept, labels, -1)
    cond = condition(c, labels, known)
    x_t, eps, gamma = diffuse(x0, c.train_schedule, t, generator)
    state = self_cond_for_training(as_denoiser(network, c), x_t, gamma, cond, self_cond=c.model.self_cond, rate=c.self_cond_rate,
                                   by_masking=c.self_cond_masking, pred_type=c.pred_type, b_scale=c.b_scale, generator=generator)
    out = as_denoiser(network, c, logits=True)(x_t, gamma, cond, state)
    pred = out[0] if isinstance(out, tuple) else out
    return diffusion_loss(pred, c.pred_type, x0, eps, gamma, c.b_scale, getattr(c.model, "softmax_groups", 0))


def generate(network, c, count, labels=None, known=None, generator=None, callback=None):
    """`count` samples of a network: (count, C, H, W) in [0, 1] on its device; of a video (count, C, frames, H, W).

    labels: (count,) int64, -1 or None for none
    known:  (count, C, cond_frames, H, W) in [0, 1], the frames that a video goes on from
    What c says: sample_steps, sample_schedule, sampler, guidance, td, self_cond_decay, and how the network was trained.
    callback(i, pixels): every estimate, as pixels.
    """
    device, m = next(network.parameters()).device, c.model
    frames = [m.frames] if getattr(m, "frames", 1) + getattr(m, "cond_frames", 0) > 1 else []
    x_init = torch.randn(count, m.channels, *frames, *m.sample_size, generator=generator, device=device)
    known = None if known is None else pixels_to_x0(known, c)
    x0 = sample(as_denoiser(network, c), x_init, c.sample_steps, schedule=c.sample_schedule, sampler=c.sampler, pred_type=c.pred_type,
                cond=condition(c, labels, known), null_cond=condition(c, None, known), guidance=c.guidance, td=c.td, b_scale=c.b_scale,
                self_cond=m.self_cond, self_cond_decay=c.self_cond_decay, generator=generator,
                callback=callback and (lambda i, x0, x_t: callback(i, x0_to_pixels(x0, c))))
    return x0_to_pixels(x0, c)
