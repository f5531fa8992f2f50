"""Agreement with the reference's TensorFlow implementation, on numbers measured from it.

Every .npz in the folder PARITY_DIR (default: tests/golden) is checked; a file that no check knows
is a failure. Models are built from the file's own configuration and filled by
`load_reference_weights`, as released checkpoints are.
"""
import glob
import json
import math
import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import generate_without_cache

import diffusion
import tokenizer
from model import (
    FIT,
    RIN,
    FITConfig,
    ImageAR,
    ImageARConfig,
    Panoptic,
    PanopticConfig,
    Pix2Seq,
    Pix2SeqConfig,
    RINConfig,
    UNet,
    UNetConfig,
    filter_logits,
    focal_losses,
    from_patches,
    image_tokens,
    load_reference_weights,
    to_patches,
    token_losses,
)
from sample import Config, changed
from tokenizer import Vocab

HERE = os.path.dirname(os.path.abspath(__file__))
FOLDER = os.environ.get("PARITY_DIR") or os.path.join(HERE, "golden")
FILES = sorted(glob.glob(os.path.join(FOLDER, "*.npz")))


class Golden:
    """One file: `config`, `weights`, and tensors by name: g["in:image"]."""

    def __init__(self, path):
        self.npz = np.load(path)
        self.config = json.loads(bytes(self.npz["config"]))
        self.weights = {key[2:]: self.npz[key] for key in self.npz if key.startswith("w:")}
        self.unchecked = {key for key in self.npz if key.startswith("out:")}

    def __getitem__(self, key):
        return torch.from_numpy(self.npz[key])

    def keys(self, start):
        return [key for key in self.npz if key.startswith(start)]

    def check(self, key, ours, tolerance=1e-4):
        """Integers agree exactly, floats within the tolerance."""
        self.unchecked.discard(key)
        expected = self[key]
        shape = tuple(expected.shape)
        assert tuple(ours.shape) == shape, f"{key}: shape {tuple(ours.shape)}, expected {shape}"
        if expected.is_floating_point():
            worst = (ours.double() - expected.double()).abs().max().item()
            assert worst <= tolerance, f"{key}: differs by {worst:.3g}"
        else:
            wrong = (ours.long() != expected.long()).sum().item()
            assert wrong == 0, f"{key}: {wrong} of {expected.numel()} integers differ"


def channels_first(x):
    return x.movedim(-1, 1)


def channels_last(x):
    return x.movedim(1, -1)


# --------------------------------------------------------------------------------------------------
# sequences

def encoder_fields(c):
    """The reference's option names of an encoder -> ours."""
    other = {}
    if "layers" in c:
        other = dict(
            encoder="fit",
            fit_layers=c["layers"],
            fit_grid=c["glimpse_div_rate"],
            fit_copies=c["glimpse_mini_x"],
            fit_latents=c["latents_per_group"],
            fit_latent_dim=c["dim_latent"],
        )
    elif c["resnet_variant"] != "c1":
        other = dict(
            encoder="resnet",
            resnet_variant=c["resnet_variant"],
            resnet_depth=c["resnet_depth"],
            resnet_width=c["resnet_width_multiplier"],
        )
    return dict(
        **other,
        image_size=tuple(c["image_size"]),
        patch_size=c["patch_size"],
        enc_layers=c["num_encoder_layers"],
        enc_dim=c["dim_att"],
        enc_mlp=c["dim_mlp"],
        enc_heads=c["num_heads"],
        pos_encoding=c["pos_encoding"],
        cls_token=c["use_cls_token"],
        drop_path=c["drop_path"],
        dropout=c["drop_units"],
        att_dropout=c["drop_att"],
    )


def pix2seq_config(c):
    return Pix2SeqConfig(
        **encoder_fields(c),
        projection=c["dec_proj_mode"],
        dec_layers=c["num_decoder_layers"],
        dec_dim=c["dim_att_dec"],
        dec_mlp=c["dim_mlp_dec"],
        dec_heads=c["num_heads_dec"],
        pos_encoding_dec=c["pos_encoding_dec"],
        vocab_size=c["vocab_size"],
        max_seq_len=c["max_seq_len"],
        shared_embedding=c["shared_decoder_embedding"],
        output_bias=c["decoder_output_bias"],
    )


def check_pix2seq(g):
    model = Pix2Seq(pix2seq_config(g.config)).eval()
    load_reference_weights(model, g.weights)
    images = channels_first(g["in:image"])
    with torch.no_grad():
        context, logits = model.encode(images), model(images, g["in:seq"])
        g.check("out:encoded", context)
        g.check("out:logits", logits)
        if "layers" in g.config:                       # of a FIT there is no more
            return
        g.check("out:instance_logits", model(images, g["in:instance_seq"]).flatten(0, 1))
    for write in (model.generate, partial(generate_without_cache, model)):
        check_decoding(g, write, context)
    targets, weights = g["in:target"], g["in:token_weights"]
    g.check("out:loss_xent", token_losses(g["out:logits"], targets))
    g.check("out:loss_xent_ls", token_losses(g["out:logits"], targets, smoothing=0.1))
    g.check("out:loss_focal", focal_losses(g["out:logits"], targets, gamma=2.0))
    weighted = (token_losses(logits, targets) * weights).sum() / (weights.sum() + 1e-9)
    g.check("out:weighted_loss_xent", weighted)


def check_decoding(g, write, context):
    everything, length = slice(0, g.config["vocab_size"]), g["out:greedy_tokens"].shape[1]
    out = write(context, g["in:prompt"], length, temperature=0, return_logprobs=everything)
    g.check("out:greedy_tokens", out.tokens[:, 0])
    expected = g["out:greedy_logits"].log_softmax(-1)
    worst = (out.logprobs[:, 0] - expected).abs().max().item()
    assert worst < 1e-4, f"greedy logits differ by {worst:.3g}"
    g.unchecked.discard("out:greedy_logits")
    length = g["out:greedy_tokens_instances"].shape[1]
    out = write(context, g["in:prompt_instances"], length, top_k=1)
    g.check("out:greedy_tokens_instances", out.tokens.flatten(0, 1))


def check_tokens(g):
    c = g.config
    shift, bins = c["coord_vocab_shift"], c["quantization_bins"]
    vocab = Vocab(bins, shift, shift + bins)
    boxes, labels = g["in:bbox"], g["in:label"]
    tokens = tokenizer.encode_detection(
        boxes, labels, vocab, noise_weight=c["noise_bbox_weight"], pad_weight=1.0)
    g.check("out:response_seq", tokens.targets)
    g.check("out:token_weights", tokens.weights)
    real = labels.clamp_min(0)         # the reference marks no noise boxes in instance prompts
    task = c["task_vocab_id"]
    prompt = tokenizer.instance_prompt(task, boxes, labels, vocab)
    empty_or_noise = (prompt == g["out:prompt_seq"]).all(-1) | (labels < 0)
    assert empty_or_noise.all()
    g.check("out:prompt_seq", tokenizer.instance_prompt(task, boxes, real, vocab))
    points = tokenizer.encode_points(g["in:points"], real, vocab)
    g.check("out:point_seq", points)
    g.check("out:points_back", tokenizer.decode_points(points, vocab))
    logits, seq = g["in:logits"], g["in:seq"]
    class_logprobs = logits.log_softmax(-1)[..., vocab.classes]
    found_labels, found_boxes, scores = tokenizer.decode_detection(seq, class_logprobs, vocab)
    g.check("out:det_class", found_labels)
    g.check("out:det_box", found_boxes)
    g.check("out:det_score", scores)
    probs = logits.softmax(-1).gather(-1, seq[..., None])[..., 0]
    score = tokenizer.point_score(g["in:box_score"], seq, probs, c["points_score_weight"])
    g.check("out:weighted_score", score)
    g.check("out:quantized", tokenizer.quantize(g["in:coords"], vocab) - shift)
    g.check("out:dequantized", tokenizer.dequantize(g["out:quantized"] + shift, vocab))
    for key in g.keys("out:top_logits/"):
        k, p = key.removeprefix("out:top_logits/k").split("_p")
        ours, expected = filter_logits(g["in:top_in"], int(k), float(p)), g[key]
        assert ((ours == -torch.inf) == (expected < -1e9)).all(), f"{key}: other tokens are kept"
        g.check(key, ours.where(ours > -torch.inf, expected))


# --------------------------------------------------------------------------------------------------
# optimisation

def check_optim(g):
    import train  # all else is checked without it

    for name, o in g.config["cases"].items():
        kernel, bias = (torch.nn.Parameter(g[f"in:{k}0"].clone()) for k in ("kernel", "bias"))
        optim = train.OptimConfig(
            optimizer=o["optimizer"],
            lr=g.config["lr"],
            weight_decay=o["weight_decay"],
            beta1=o["beta1"],
            beta2=o["beta2"],
            adam_eps=o["eps"],
            no_decay=o.get("exclude_from_weight_decay", "").replace(",", "|"),
        )
        optimizer = train.make_optimizer([("kernel", kernel), ("bias", bias)], optim)
        kernels, biases = [], []
        for grads in zip(g["in:grad_kernel"], g["in:grad_bias"]):
            kernel.grad, bias.grad = (grad.clone() for grad in grads)
            # The reference leaves LAMB's gradients as they are.
            if o["global_clipnorm"] > 0 and o["optimizer"] != "lamb":
                torch.nn.utils.clip_grad_norm_([kernel, bias], o["global_clipnorm"])
            optimizer.step()
            kernels.append(kernel.detach().clone())
            biases.append(bias.detach().clone())
        g.check(f"out:{name}/kernel", torch.stack(kernels))
        g.check(f"out:{name}/bias", torch.stack(biases))
    s = g.config["schedule"]
    for key in g.keys("out:lr/"):
        optim = train.OptimConfig(
            lr=s["base_lr"],
            lr_schedule=key.removeprefix("out:lr/"),
            warmup_steps=s["warmup"],
            steps=s["total"],
            end_lr_factor=s["end_lr_factor"],
        )
        rates = [train.learning_rate(step, optim) for step in g["in:steps"].tolist()]
        g.check(key, torch.tensor(rates), tolerance=1e-4 * s["base_lr"])


# --------------------------------------------------------------------------------------------------
# denoisers

def rin_config(c, cond):
    """The reference's option names -> ours. cond: the condition it is called with, whose width the
    configuration lacks."""
    is_label = cond is not None and cond.dim() < 4
    return RINConfig(
        sample_size=(c["image_height"], c["image_width"]),
        channels=c["image_channels"],
        frames=c.get("seq_len", 1) - c.get("seq_cond", 0),
        cond_frames=c.get("seq_cond", 0),
        frame_stride=c.get("seq_stride", 1),
        num_classes=cond.shape[-1] if is_label else 0,
        self_cond=c["self_cond"].replace("tape", "interface"),
        interface_patch=c["patch_size"],
        interface_dim=c["tape_dim"],
        interface_mlp_ratio=c["tape_mlp_ratio"],
        interface_position=c["tape_pos_encoding"],
        latents=c["latent_slots"],
        latent_dim=c["latent_dim"],
        latent_mlp_ratio=c["latent_mlp_ratio"],
        latent_heads=c["latent_num_heads"],
        latent_position=c["latent_pos_encoding"],
        latent_layers=tuple(int(n) for n in c["num_layers"].split(",")),
        rw_heads=c["rw_num_heads"],
        rw_context_norm=c.get("xattn_enc_ln", False),
        conv_kernel=c.get("conv_kernel_size", 0),
        conv_dropout=c.get("conv_drop_units", 0.0),
        time_scaling=c["time_scaling"],
        time_on_latents=c.get("time_on_latent", False),
        cond_on_latents=c.get("cond_on_latent_n", 0),
        cond_dim=c.get("cond_dim", 0),
        cond_proj=c.get("cond_proj", True),
        cond_writable=c.get("cond_tape_writable", False),
        cond_decoupled_read=c.get("cond_decoupled_read", False),
        drop_path=c["drop_path"],
        dropout=c["drop_units"],
        att_dropout=c["drop_att"],
    )


def check_rin(g):
    cond = g["in:cond"] if "in:cond" in g.npz else None
    model = RIN(rin_config(g.config, cond)).eval()
    load_reference_weights(model, g.weights)
    conditions = {}
    if model.config.num_classes:
        conditions["labels"] = cond
    elif cond is not None:
        conditions["frames"] = channels_first(cond)
    hidden = None
    if "in:latent_prev" in g.npz:
        hidden = (g["in:latent_prev"], g["in:tape_prev"])
    with torch.no_grad():
        pred, (latents, interface) = model(
            channels_first(g["in:x"]), g["in:t"], hidden, **conditions)
    g.check("out:x_out", channels_last(pred))
    g.check("out:latent", latents)
    g.check("out:tape", interface)


def check_image_ar(g):
    c, side = g.config, g["in:image"].shape[1]
    sizes = dict(
        fit_layers=c["layers"],
        fit_patch=c["patch_size"],
        fit_dim=c["dim_att"],
        fit_heads=c["num_heads"],
        fit_latents=c["latents_per_group"],
        fit_latent_dim=c["dim_latent"],
        fit_latent_heads=c["num_heads"],
        fit_mlp_ratio=c["dim_mlp"] // c["dim_att"],
        fit_position=c["pos_encoding"],
    )
    if c["arch_name"] == "base":                       # a FIT of one group
        sizes = dict(
            fit_layers=f"({c['num_decoder_layers']})",
            fit_patch=0,
            fit_dim=c["dim_att_dec"],
            fit_heads=c["num_heads_dec"],
            fit_mlp_ratio=c["dim_mlp_dec"] // c["dim_att_dec"],
            fit_position=c["pos_encoding_dec"],
        )
    model = ImageAR(ImageARConfig(
        sample_size=(side, side),
        levels=c["vocab_size"],
        shared_embedding=c["shared_decoder_embedding"],
        output_bias=c["decoder_output_bias"],
        **sizes,
    )).eval()
    load_reference_weights(model, g.weights)
    pixels = (channels_first(g["in:image"]) * 255).byte()              # cut off, as there
    tokens = image_tokens(pixels, model.config)
    with torch.no_grad():
        logits = model(tokens)
    g.check("out:target", tokens.view(g["out:target"].shape))
    g.check("out:logits", logits.view(g["out:logits"].shape))
    bits = token_losses(logits, tokens).mean() / math.log(2)
    g.check("out:bits_per_dim", bits)


def fit_config(c, g):
    """The reference's option names -> ours. g: the case, for the widths that the configuration
    lacks."""
    cells, rows = math.isqrt(c["num_groups"]), math.isqrt(g["in:x"].shape[2])
    patch = math.isqrt(c["out_dim"] // 3)
    return FITConfig(
        sample_size=(cells * rows * patch,) * 2,
        num_classes=g["in:cond"].shape[-1],
        self_cond=c["self_cond"],
        fit_layers=c["layers"],
        fit_grid=cells,
        fit_patch=patch,
        fit_dim=c["x_dim"],
        fit_heads=c["x_num_heads"],
        fit_local_attention=c["x_self_attention"],
        fit_latents=c["latents_per_group"],
        fit_latent_dim=c["latent_dim"],
        fit_latent_heads=c["latent_num_heads"],
        fit_mlp_ratio=c["mlp_ratio"],
        fit_read_mlp=c["xattn_with_mlp"],
        fit_context_norm=c["xattn_enc_ln"],
        fit_position=c.get("x_pos_encoding", "learned"),
        cond_proj=c["cond_proj"],
    )


def check_fit(g):
    """The reference's denoiser takes the tokens of cells, ours the image that they are of."""
    model = FIT(fit_config(g.config, g)).eval()
    load_reference_weights(model, g.weights)

    def to_image(tokens):
        c, (rows, cols) = model.config, model.grid
        B, G = tokens.shape[:2]
        cells = B, 3, G, rows * c.fit_patch, cols * c.fit_patch
        cells = from_patches(tokens, model.patch_shape, cells)
        return from_patches(cells.movedim(1, 4), model.cell_shape, (B, 3, *c.sample_size))

    hidden = (g["in:latent_prev"],) if "in:latent_prev" in g.npz else None
    with torch.no_grad():
        pred, (latents,) = model(to_image(g["in:x"]), g["in:t"], hidden, g["in:cond"])
    tokens = to_patches(model.cells(pred), model.patch_shape)
    g.check("out:x_out", tokens.unflatten(1, g["in:x"].shape[1:3]))
    g.check("out:latent", latents)


def unet_config(c, g):
    """The reference's option names -> ours. g: the case, for the widths that the configuration
    lacks."""
    kernels = c.get("kernel_sizes", 3)
    return UNetConfig(
        sample_size=tuple(g["in:x"].shape[1:3]),
        channels=c["out_dim"],
        cond_channels=g["in:x"].shape[-1] - c["out_dim"],
        num_classes=g["in:gamma"].shape[1] - 1 if g["in:gamma"].dim() == 2 else 0,
        context_dim=g["in:cond"].shape[-1] if c["conditioning"] else 0,
        softmax_groups=c.get("outp_softmax_groups", 0),
        unet_dim=c["dim"],
        multipliers=tuple(c["ch_multipliers"]),
        res_blocks=tuple(c["n_res_blocks"]),
        kernel_sizes=(kernels,) if isinstance(kernels, int) else tuple(kernels),
        attention_at=tuple(c["mhsa_resolutions"]),
        head_dim=c["per_head_dim"],
        transformer_layers=c["transformer_blocks"],
        transformer_dim=c["transformer_dim"],
        transformer_stride=c["transformer_strides"],
        transformer_position=c["pos_encoding"] or "none",
        in_stride=c["in_strides"],
        in_kernel=c.get("in_kernel_size", 3),
        out_kernel=c.get("out_kernel_size", 3),
        time_scaling=c["time_scaling"],
        unet_dropout=c["dropout"],
    )


def check_unet(g):
    c = unet_config(g.config, g)
    model = UNet(c).eval()
    load_reference_weights(model, g.weights)
    x, gamma = channels_first(g["in:x"]), g["in:gamma"].view(len(g["in:x"]), -1)
    with torch.no_grad():
        out, _ = model(
            x[:, :c.channels],
            gamma[:, 0],
            labels=gamma[:, 1:] if c.num_classes else None,
            map=x[:, c.channels:] if c.cond_channels else None,
            context=g["in:cond"] if c.context_dim else None,
        )
    if c.softmax_groups:
        logits = out.unflatten(1, (c.softmax_groups, -1))           # (B, groups, 2^k, H, W)
        g.check("out:logits", logits.permute(0, 3, 4, 1, 2))
        out = diffusion.softmax_bits(out, c.softmax_groups, g.config["b_scale"])
    g.check("out:x_out", channels_last(out))


def panoptic_config(c):
    """The reference's option names -> ours."""
    model, decoder, video = c["model"], c["decoder"], "proceeding_frames" in c["task"]

    def numbers(name):
        return tuple(int(number) for number in str(decoder[name]).split(","))

    return PanopticConfig(
        **encoder_fields(model),
        sample_size=tuple(model["msize"]),
        channels=c["task"]["n_bits_label"],
        self_cond=model["self_cond"],
        softmax_groups=decoder["outp_softmax_groups"],
        unet_dim=decoder["dim"],
        multipliers=numbers("ch_multipliers"),
        res_blocks=numbers("n_res_blocks"),
        kernel_sizes=numbers("kernel_sizes"),
        attention_at=numbers("mhsa_resolutions"),
        head_dim=decoder["per_head_dim"],
        transformer_layers=decoder["transformer_blocks"],
        transformer_dim=decoder["transformer_dim"],
        transformer_stride=decoder["transformer_strides"],
        transformer_position=decoder["u_pos_encoding"] or "none",
        in_stride=decoder["in_strides"],
        in_kernel=decoder["in_kernel_size"],
        out_kernel=decoder["out_kernel_size"],
        time_scaling=model["time_scaling"],
        unet_dropout=decoder["udrop"],
        past_frames=len(c["task"].get("proceeding_frames", "").split(",")) if video else 0,
        fuse_dim=model["enc_fuse_dim"],
        image_condition=model["conditional"],
    )


def check_panoptic(g):
    video, r = "in:frames" in g.npz, g.config["model"]
    network = Panoptic(panoptic_config(g.config)).eval()
    load_reference_weights(network, g.weights)
    c = changed(
        Config(model=network.config), bits="ids", b_scale=r["b_scale"], pred_type=r["pred_type"],
        normalize_input=r["normalize_noisy_input"],
        train_schedule=r["train_schedule"], sample_schedule=r["infer_schedule"], td=r["td"],
        sampler=r["sampler"], sample_steps=r["iterations"], later_steps=r.get("iterations_2", 0),
        max_segments=g.config["task"].get("max_instances_per_image", 100))
    classes = g.config.get("dataset", {}).get("num_classes", 134)           # COCO's, and 0
    c = replace(c, categories=({},) * (classes - 1))
    d, maps = c.diffusion, channels_first(g["in:label_map"]).long()         # (B, 2, H, W)

    def to_bits(maps):
        return diffusion.ints_to_bits(maps, 8, d.b_scale)

    x0, weight = to_bits(maps), diffusion.instance_weights(maps[:, 1], r["mask_weight_p"])
    g.check("out:bits", channels_last(x0), tolerance=0)
    g.check("out:pixel_weight", weight)
    images, past = g["in:frames"][-1] if video else g["in:image"], None
    if video:
        past = to_bits(channels_first(g["in:past_maps"]))
        g.check("out:cond_bits", channels_last(past), tolerance=0)
    with torch.no_grad():
        cond = network.encode(channels_first(images), past)
    g.check("out:encoded_cat", channels_last(cond["map"][:, :network.cond_dim]), tolerance=2e-3)
    g.check("out:encoded", cond["context"], tolerance=2e-3)

    eps = channels_first(g["in:noise"])
    gamma = diffusion.gamma_schedule(d.train_schedule)(g["in:t"])
    x_t = diffusion.add_noise(x0, gamma, eps)
    g.check("out:gamma", gamma.view(-1, 1, 1, 1))
    g.check("out:noised", channels_last(x_t))
    with torch.no_grad():
        pred, _ = network(x_t, gamma, images=channels_first(images), past=past)
    groups = network.config.softmax_groups
    if "out:logits" in g.npz:
        logits = pred.unflatten(1, (groups, -1))        # (B, groups, 256, H, W)
        g.check("out:logits", logits.permute(0, 3, 4, 1, 2), tolerance=2e-3)
    g.check("out:bits_pred", channels_last(diffusion.expected_bits(pred, c)), tolerance=2e-3)
    losses = diffusion.diffusion_loss(
        pred, d.pred_type, x0, eps, gamma, d.b_scale, groups, weight)
    g.check("out:loss", losses.mean(), tolerance=2e-3)
    if not video:
        s = c.sampling
        bits = diffusion.sample(
            diffusion.as_denoiser(network, c), eps, s.sample_steps, schedule=s.sample_schedule,
            sampler=s.sampler, pred_type=d.pred_type, cond=cond, td=s.td, b_scale=d.b_scale)
        g.check("out:sampled", channels_last(bits), tolerance=2e-3)
        read = diffusion.bits_to_panoptic(
            channels_first(g["out:sampled"]), classes, c.data.max_segments)
        g.check("out:panoptic_map", channels_last(read))
        return
    frames, noise = (g[key].movedim(-1, 2) for key in ("in:frames", "in:sample_noise"))
    ours = diffusion.generate_maps(network, c, frames.transpose(0, 1), noise=noise)
    differ = ours.permute(1, 0, 3, 4, 2) != g["out:video_maps"]             # (T, B, H, W, 2)
    wrong = differ.any(-1).float().mean()
    # Bits near zero flip.
    assert wrong <= 0.01, f"out:video_maps: {wrong:.4f} of the pixels differ"
    g.unchecked.discard("out:video_maps")


# --------------------------------------------------------------------------------------------------
# diffusion

def check_diffusion(g):
    for name in g.config["schedules"]:
        g.check(f"out:gamma/{name}", diffusion.gamma_schedule(name)(g["in:t"]))
    for key in g.keys("out:x0/"):
        _, pred_type, rederive = key.split("/")
        x0, eps = diffusion.predict_x0_eps(
            g["in:xt"], g["in:gamma"], g["in:denoise_out"], pred_type,
            rederive_eps=bool(int(rederive)))
        g.check(key, x0)
        g.check(f"out:eps/{pred_type}/{rederive}", eps)
    A = g["in:A"]                      # a linear denoiser, channels last

    def denoise(x_t, gamma, self_cond=None, label=False):
        x = x_t if self_cond is None else torch.cat([x_t, self_cond], -1)
        y = x @ A[:x.shape[-1]] + 0.1 * gamma.view(-1, 1, 1, 1)
        return y if label else y * 0.5, None

    for name, case in g.config["cases"].items():
        out = diffusion.sample(
            denoise,
            g["in:x_init"],
            g.config["steps"],
            schedule=g.config["schedule"],
            sampler=case.pop("sampler_name"),
            cond={"label": True},
            null_cond={"label": False},
            step_noise=g["in:step_noise"],
            **case,
        )
        g.check(f"out:sample/{name}", out)


def check_bits(g):
    for key in g.keys("out:bits/"):
        code = key.removeprefix("out:bits/")
        bits = diffusion.rgb_to_bits(channels_first(g["in:image"]), code, g.config["b_scale"])
        g.check(key, channels_last(bits), tolerance=0)
        image = diffusion.bits_to_rgb(bits, code)
        g.check(f"out:back/{code}", channels_last(image), tolerance=1e-6)
    n_bits = g["out:int2bits"].shape[-1]
    bits = diffusion.ints_to_bits(g["in:ints"].unsqueeze(1), n_bits)
    g.check("out:int2bits", channels_last(bits + 1) / 2, tolerance=0)         # there 0 and 1
    g.check("out:bits2int", diffusion.bits_to_ints(bits, n_bits)[:, 0])
    classes, ids = diffusion.majority_vote(
        g["in:semantic"], g["in:identity"], g.config["min_pixels"])
    g.check("out:vote_semantic", classes)
    g.check("out:vote_identity", ids)


CHECKS = {
    "ar": check_pix2seq,
    "tokens": check_tokens,
    "optim": check_optim,
    "rin": check_rin,
    "image_ar": check_image_ar,
    "fit_denoiser": check_fit,
    "unet": check_unet,
    "panoptic": check_panoptic,
    "diffusion": check_diffusion,
    "bits": check_bits,
}


def find_check(path):
    """By what it holds, or by how its name starts."""
    name, g = os.path.splitext(os.path.basename(path))[0], Golden(path)
    if g.config.get("name", "").endswith("encoder_ar_decoder"):
        return check_pix2seq, g
    for known in sorted(CHECKS, key=len, reverse=True):
        if name.startswith(known):
            return CHECKS[known], g
    pytest.fail(f"no check knows {path}")


@pytest.mark.parametrize("path", FILES, ids=[os.path.basename(f) for f in FILES])
def test_agrees_with_the_reference(path):
    check, g = find_check(path)
    check(g)
    assert not g.unchecked, f"not checked: {sorted(g.unchecked)}"


def test_there_are_golden_files():
    assert FILES, f"no .npz in {FOLDER}"
