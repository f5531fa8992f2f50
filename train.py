"""Train a model: the loop, its recipes, its checkpoints.

Recipes of Pix2Seq (arXiv 2109.10852, section 3.1 and appendix; several tasks at once: 2206.07669) are presets; every field of
a preset can be changed on the command line. The same command goes on from the last checkpoint after any interruption. Under
torchrun the global batch is shared out, with the same result but for the noise of dropout and diffusion. Left out: model and
pipeline parallelism.

    python train.py                                     # det_shapes: from nothing to boxes in minutes on a CPU
    python train.py det_coco_vit_b --data_dir=coco --lr=1e-4
    torchrun --nproc_per_node=8 train.py det_coco_vit_l --data_dir=coco
    python train.py --list                              # presets;  --help: every field;  --bench: speed
"""
import contextlib
import copy
import difflib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import typing
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from data import DataError
from diffusion import PRED_TYPES, RGB_CODES, SAMPLERS, check_choice, denoising_loss, gamma_schedule, generate
from eval import evaluate, evaluate_generation
from model import (SIZES, Pix2SeqConfig, RINConfig, UNetConfig, adapt_weights, build, count_parameters, load_reference_weights, load_weights,
                   read_reference_checkpoint, token_loss)
from sample import TASKS, draw, is_reference, look, make_pieces, make_vocab, pick_device, read_checkpoint, read_weights, tile, true_boxes
from tokenizer import CLASS_SHIFT, Vocab

# ---------------------------------------------------------------------------------------------------------------
# configuration

@dataclass(frozen=True)
class Config:
    """A run. The fields of `model` are set on the command line like these."""
    model: Pix2SeqConfig | RINConfig | UNetConfig = field(default_factory=Pix2SeqConfig)
    # data
    tasks: str = "det"                         # what to learn, some of det,seg,kpt,cap: boxes, masks, joints, captions; or gen: to generate
    task_weights: str = ""                     # loss weight of each, such as 1,0.5; empty: all 1
    task_starts: str = ""                      # step from which each is learned, such as 0,800; empty: all from the first
    data: str = "shapes"                       # shapes (drawn here) or coco (any dataset in COCO's format); gen: shapes, mnist, cifar10, images, videos
    data_dir: str = ""                         # coco: folder with train2017/, val2017/ and annotations/; gen: folder of the files, images, videos
    train_json: str = ""                       # coco: instances for training, if not in data_dir
    train_keypoints: str = ""                  # coco: likewise for kpt
    train_captions: str = ""                   # coco: likewise for cap
    train_images: str = ""                     # coco: their images
    val_json: str = ""                         # coco: instances held out
    val_keypoints: str = ""                    # coco: likewise for kpt
    val_captions: str = ""                     # coco: likewise for cap
    val_images: str = ""                       # coco: their images
    bad_boxes: str = "error"                   # coco: boxes that are empty or outside their image: error or drop
    max_things: int = 4                        # shapes: most objects in a scene
    data_seed: int = 0                         # shapes: another seed is another world
    val_count: int = 500                       # shapes: held-out scenes
    bins: int = 1000                           # coordinate values along a side of the image
    coord_shift: int = 1000                    # first coordinate token; leaves coord_shift - 101 class labels
    text_shift: int = 3000                     # first text token
    # det
    max_objects: int = 100                     # most objects in a sequence, noise boxes counted
    scale_min: float = 0.3                     # scale jitter: smallest size of the image in its canvas (cap too)
    scale_max: float = 2.0                     # scale jitter: largest (cap too)
    flip: bool = True                          # mirror half of the images (seg too)
    noise_boxes: bool = True                   # fill sequences up with noise boxes (sequence augmentation)
    noise_weight: float = 1.0                  # loss weight of the class of a noise box
    pad_weight: float = 0.1                    # loss weight of padding, that is of ending the sequence
    top_p: float = 0.4                         # nucleus of sampling boxes
    top_k: int = 0                             # sample among so many tokens, in every task; 0: all
    temperature: float = 1.0                   # of sampling, in every task; 0: the likeliest token
    # seg and kpt
    max_instances: int = 10                    # seg: objects to learn from an image
    max_points: int = 128                      # seg: points of an object's outline
    seg_samples: int = 8                       # seg: outlines averaged into a mask
    seg_top_p: float = 0.8                     # seg: nucleus of sampling
    instance_scale_min: float = 0.3            # scale jitter: smallest
    instance_scale_max: float = 1.0            # scale jitter: largest
    crop_margin: float = 0.5                   # kpt: the crop is wider than the box by this share of it on each side
    invisible_weight: float = 0.1              # kpt: loss weight of an invisible joint
    kpt_top_p: float = 0.1                     # kpt: nucleus of sampling
    # cap
    pieces: str = ""                           # SentencePiece model file; empty: bytes
    captions_per_image: int = 5                # captions to learn from an image
    caption_length: int = 128                  # most pieces of a caption
    caption_drop: float = 0.5                  # share of input tokens that are hidden
    caption_pad_weight: float = 1.0            # loss weight of padding
    caption_flip: bool = True                  # mirror half of the images, which makes left right
    color_jitter: float = 0.5                  # strength of the colour distortion
    cap_top_p: float = 1.0                     # nucleus of sampling
    # gen
    image_channels: int = 3                    # colours of an image, 1 or 3
    bits: str = ""                             # code of colours in analog bits: uint8, gray, uint8_s or oneh; empty: colours are numbers
    b_scale: float = 1.0                       # data lie in +- this
    pred_type: str = "eps"                     # what the network predicts: x, eps, v, x_sigmoid_xent or x_softmax_xent
    train_schedule: str = "cosine"             # share of signal over time: cosine, cosine@S,E,T, sigmoid@S,E,T, log@S,E,R or simple_linear
    normalize_input: bool = False              # divide what the network sees by its standard deviation
    self_cond_rate: float = 0.5                # share of examples that see an estimate of the same network
    self_cond_masking: bool = False            # choose them one by one; else the first of a batch, which is cheaper
    label_drop: float = 0.0                    # share of labels hidden, for guidance
    sample_schedule: str = "cosine"            # sampling: share of signal over time
    sample_steps: int = 100                    # sampling: calls of the network
    sampler: str = "ddim"                      # sampling: ddim, ddpm, ddpm@large or ddpm@small
    guidance: float = 0.0                      # sampling: how far beyond the prediction without label
    td: float = 0.0                            # sampling: each step goes further by this share of a step
    self_cond_decay: float = 0.0               # sampling: weight of the past in what self-conditioning sees
    judge: bool = False                        # train a small classifier at the end, to judge the samples
    eval_samples: int = 200                    # samples to judge
    # optimisation
    batch_size: int = 32                       # images of each task a step, over all processes and accumulated parts
    task_batches: str = ""                     # likewise, a number for each task, such as 32,8; empty: batch_size for all
    accumulate: int = 1                        # parts that a process computes its share of a batch in: less memory
    epochs: float = 0.0                        # length of training, if steps is 0
    steps: int = 0                             # length of training
    warmup_epochs: float = 0.0                 # linear rise of the learning rate, if warmup_steps is 0
    warmup_steps: int = 0                      # linear rise of the learning rate
    optimizer: str = "adamw"                   # adamw or lamb
    lr: float = 3e-5                           # peak learning rate
    schedule: str = "linear"                   # after the warm-up: linear, cosine, cosine@SHARE, exp@RATE or none
    end_lr_factor: float = 0.01                # last learning rate, as a share of the peak
    weight_decay: float = 0.05                 # decoupled (lamb: a part of the step that is scaled), on every parameter but no_decay
    no_decay: str = ""                         # regular expression for names of parameters without decay, and without lamb's scaling
    beta1: float = 0.9                         # of the mean of gradients
    beta2: float = 0.95                        # of the mean of their squares
    eps: float = 1e-8                          # beside the root of that
    clip_norm: float = 0.0                     # largest global norm of the gradient; 0: no limit
    ema_decay: float = 0.0                     # of the moving average of weights that predicts, less in the first steps; 0: no average
    label_smoothing: float = 0.0               # of the cross entropy
    seed: int = 0                              # of weights, order, augmentation and dropout
    init_from: str = ""                        # start from the weights of a run, or of a TensorFlow checkpoint of the reference
    adapt: bool = False                        # let init_from be of another image size, sequence length, vocabulary or classes
    # the run
    out: str = ""                              # folder of the run (default: out/PRESET)
    fresh: bool = False                        # start again, moving an earlier run in that folder aside
    device: str = "auto"                       # auto, cuda, mps or cpu
    dtype: str = "auto"                        # auto (bfloat16 on cuda, else float32), float32 or bfloat16
    compile: str = "auto"                      # torch.compile: auto (on cuda), on or off
    workers: int = -1                          # processes that load data; -1: one less than the cores of this process's share, at most 8
    log_every: int = 50                        # steps between lines of the log
    eval_every: int = 0                        # steps between evaluations; 0: only at the end
    save_every: int = 500                      # steps between checkpoints
    eval_images: int = 0                       # held-out images of an evaluation while training; 0: all
    pictures: int = 8                          # held-out images drawn at each evaluation


# Keys that may change when a run goes on; any other would silently make it another run.
RUNTIME_KEYS = {"out", "fresh", "device", "dtype", "compile", "workers", "log_every", "eval_every", "save_every", "eval_images",
                "pictures", "data_dir", "accumulate", "checkpointing", "sample_schedule", "sample_steps", "sampler", "guidance", "td",
                "self_cond_decay", "judge", "eval_samples", *(f"{split}_{kind}" for split in ("train", "val")
                                                                         for kind in ("json", "keypoints", "captions", "images"))}


@dataclass(frozen=True)
class Preset:
    config: Config
    about: str                                 # the recipe in words
    hardware: str                              # what it is meant for
    result: str                                # measured (hardware, time), published, or not run


# Drawn shapes, for two CPU cores: 64 bins for 64 px, four classes, captions in bytes.
SHAPES = Config(
    Pix2SeqConfig(image_size=(64, 64), patch_size=8, enc_layers=2, enc_dim=96, enc_mlp=192, enc_heads=4, dec_layers=2, dec_dim=96, dec_mlp=192,
                  dec_heads=4, vocab_size=432, max_seq_len=64, drop_path=0.0, dropout=0.0),
    bins=64, coord_shift=110, text_shift=174, max_objects=8, max_instances=2, max_points=24, caption_length=48, captions_per_image=2,
    scale_min=1.0, scale_max=1.0, instance_scale_min=1.0, instance_scale_max=1.0, flip=False, caption_flip=False, color_jitter=0.0,
    caption_pad_weight=0.1, cap_top_p=0.4, workers=0, steps=3600, warmup_steps=400, lr=2e-3, beta2=0.999, eval_every=1500, eval_images=100)
FINETUNE = Config(data="coco", bad_boxes="drop", lr=3e-5, epochs=40, warmup_epochs=2, batch_size=32, log_every=100,
                  eval_every=10_000, save_every=2_000, eval_images=1000)
TEXT_VIT_B = replace(SIZES["vit_b"], vocab_size=35_000)
MULTITASK = replace(FINETUNE, model=TEXT_VIT_B, lr=1e-4, epochs=100, warmup_epochs=10, batch_size=128)
PUBLISHED_AP = {"resnet50": (39.1, 41.7, 42.6), "resnet50_c4": (44.7, 46.9, 47.3), "vit_b": (44.2, 46.5, 47.1), "vit_l": (47.6, 49.2, 50.0)}
NOT_RUN = "not run here"


def presets():
    """{name: Preset}. Every recipe stands here, beside what it gave."""
    yield "det_shapes", Preset(SHAPES, "boxes of drawn shapes, 64 px", "2 CPU cores", "measured on 2 CPU cores: AP50 0.90, AP 0.64 after 5.5 minutes")
    for task, about in (("seg", "outlines"), ("kpt", "joints of the figures"), ("cap", "captions")):
        yield f"{task}_shapes", Preset(replace(SHAPES, tasks=task), f"{about} of drawn shapes, 64 px", "2 CPU cores", NOT_RUN)
    yield "multi_shapes", Preset(
        # Boxes are the hardest to learn, and the others look where boxes taught the network to look: so they come first.
        replace(SHAPES, tasks="det,seg,kpt,cap", task_batches="32,4,24,16", task_weights="2,0.7,1.75,5.5", task_starts="0,1000,1000,1900", max_things=2,
                max_objects=6, max_instances=1, caption_drop=0.0, seg_samples=4, steps=4900, eval_every=0),
        "all four tasks at once on drawn scenes of one or two things, 64 px", "2 CPU cores",
        "measured on 2 CPU cores: AP50 of boxes 0.93, masks 0.77, joints 0.62, captions exactly right 0.55 after 14.4 minutes")
    tiny = Config(replace(SIZES["vit_tiny"], image_size=(256, 256), drop_path=0.0, dropout=0.0), data="coco", bad_boxes="drop", max_objects=30,
                  scale_min=1.0, scale_max=1.0, flip=False, workers=0, steps=4200, warmup_steps=400, lr=1e-3, beta2=0.999, batch_size=16, eval_every=2100)
    yield "det_coco_tiny", Preset(tiny, "boxes with a small ViT, 256 px, to learn a few images by heart", "2 CPU cores",
                                  "measured on 2 CPU cores: AP50 0.78 on 50 training images after 9 minutes, half of its steps")
    yield "multi_coco_tiny", Preset(
        replace(tiny, model=replace(tiny.model, vocab_size=3000 + 258), tasks="det,seg,kpt,cap", max_instances=3, captions_per_image=2, batch_size=4),
        "all four tasks with a small ViT, 256 px", "2 CPU cores", NOT_RUN)
    for size, published in PUBLISHED_AP.items():
        for side, ap in zip((640, 1024, 1333), published):
            yield f"det_coco_{size}" + (f"_{side}" if side > 640 else ""), Preset(
                replace(FINETUNE, model=replace(SIZES[size], image_size=(side, side), checkpointing=side > 640)),
                f"COCO fine-tuning of 2109.10852, {side} px", "8 GPUs", f"{NOT_RUN}; published {ap} AP, from Objects365 weights")
    yield "det_o365_vit_b", Preset(
        replace(FINETUNE, model=SIZES["vit_b"], batch_size=256, epochs=0, steps=400_000, warmup_epochs=0, warmup_steps=20_000, lr=1e-4),
        "Objects365 pretraining of 2109.10852, 640 px (learning rate and warm-up are ours, the paper's are not known)", "32 GPUs", NOT_RUN)
    yield "multi_coco_vit_b", Preset(
        replace(MULTITASK, tasks="det,seg,kpt,cap"), "all four tasks of 2206.07669, 640 px", "32 GPUs", f"{NOT_RUN}; published 44.2 box AP")
    for task, about in (("seg", "masks"), ("kpt", "joints"), ("cap", "captions")):
        yield f"{task}_coco_vit_b", Preset(replace(MULTITASK, tasks=task), f"{about} alone, as in 2206.07669, 640 px", "8 GPUs", NOT_RUN)


# Generation. LAMB leaves biases and norms without decay and scaling, and its gradients are not clipped, as in the reference.
DRAWN = Config(
    UNetConfig(num_classes=4, self_cond="x", unet_dim=32, in_stride=2, multipliers=(1, 2), res_blocks=(1, 1), attention_at=(8,), head_dim=32),
    tasks="gen", flip=False, workers=0, label_drop=0.1, guidance=1.0, sample_steps=50, judge=True, pred_type="x", batch_size=32, steps=4400, warmup_steps=200,
    lr=2e-3, schedule="cosine", weight_decay=0.0, beta2=0.99, clip_norm=1.0, ema_decay=0.998, val_count=200)
DRAWN_RIN = replace(
    DRAWN, model=RINConfig(num_classes=4, interface_patch=4, interface_dim=96, latents=32, latent_dim=128, latent_heads=4, latent_layers=(2, 2, 2),
                           rw_heads=4, drop_path=0.0, dropout=0.0),
    lr=1e-3, self_cond_rate=0.9, self_cond_masking=True)                       # at 2e-3 it diverged near step 1000
LAMB_RIN = Config(tasks="gen", optimizer="lamb", no_decay="bias|norm", weight_decay=0.01, warmup_steps=10_000, steps=150_000, beta2=0.999, ema_decay=0.9999,
                  end_lr_factor=0.0, self_cond_rate=0.9, self_cond_masking=True, sampler="ddpm", log_every=100, eval_every=10_000, save_every=2_000)
ADAM_UNET = Config(tasks="gen", weight_decay=0.0, lr=1e-4, warmup_steps=10_000, schedule="none", beta2=0.999, clip_norm=1.0, ema_decay=0.9999, batch_size=128,
                   sampler="ddpm", log_every=100, eval_every=10_000, save_every=2_000)


def generation_presets():
    """{name: Preset} of what generates."""
    yield "gen_shapes", Preset(DRAWN, "drawn shapes of a class, 32 px, UNet", "2 CPU cores",
                               "measured on 2 CPU cores: 0.970 of 200 samples judged right after 11.2 minutes")
    yield "gen_shapes_rin", Preset(DRAWN_RIN, "the same with a RIN", "2 CPU cores",
                                   "measured on one core: 0.28 of 200 samples judged right after 2000 steps, 12.7 minutes")
    yield "bits_shapes", Preset(
        replace(DRAWN, model=replace(DRAWN.model, sample_size=(16, 16), in_stride=1, channels=24), bits="uint8"),
        "drawn shapes as analog bits (2208.04202), 16 px", "2 CPU cores", "measured on 2 CPU cores: 0.955 of 200 samples judged right after 12.9 minutes")
    yield "video_shapes", Preset(
        replace(DRAWN_RIN, model=replace(DRAWN_RIN.model, num_classes=0, frames=6, cond_frames=2), guidance=0.0, judge=False, batch_size=8),
        "six frames of a moving shape after two known ones, 32 px, RIN", "2 CPU cores", NOT_RUN)
    yield "gen_mnist", Preset(
        replace(DRAWN, model=replace(DRAWN.model, sample_size=(28, 28), channels=1, num_classes=10, attention_at=(7,)), data="mnist", image_channels=1,
                steps=3600),
        "digits of a class, 28 px; --data_dir holds MNIST's idx files", "2 CPU cores",
        "measured on one core, on the 10,000 test digits: 0.995 of 200 samples judged right after 10.9 minutes")
    cifar = replace(ADAM_UNET, model=UNetConfig(num_classes=10, self_cond="eps", unet_dropout=0.3), data="cifar10", steps=1_000_000)
    yield "gen_cifar10_rin", Preset(
        replace(LAMB_RIN, model=RINConfig(num_classes=10), data="cifar10", lr=3e-3, schedule="cosine@0.8", batch_size=256, train_schedule="sigmoid@-3,3,0.9",
                sample_steps=400), "CIFAR-10 RIN of 2212.11972", "8 GPUs", f"{NOT_RUN}; published FID 1.81")
    yield "gen_cifar10_unet", Preset(cifar, "CIFAR-10 UNet of the reference", "8 GPUs", NOT_RUN)
    for code in ("uint8", "uint8_s"):
        yield f"bits_cifar10_{code}", Preset(
            replace(cifar, model=UNetConfig(channels=24, num_classes=10, self_cond="x", softmax_groups=3), bits=code, b_scale=0.5, pred_type="x_softmax_xent",
                    steps=1_500_000), f"CIFAR-10 Bit Diffusion of 2208.04202, code {code}", "8 GPUs", NOT_RUN)
    yield "gen_imagenet64_unet", Preset(
        replace(ADAM_UNET, model=UNetConfig(sample_size=(64, 64), num_classes=1000, self_cond="eps", unet_dim=192, multipliers=(1, 2, 3, 4), res_blocks=(3,) * 4),
                data="images", batch_size=1024, lr=2e-4, steps=250_000), "ImageNet 64 px UNet of the reference; --data_dir holds train/CLASS and val/CLASS",
        "32 GPUs", NOT_RUN)
    yield "gen_imagenet64_rin", Preset(
        replace(LAMB_RIN, data="images", lr=2e-3, schedule="cosine@0.7", batch_size=1024, train_schedule="simple_linear", sample_steps=1000,
                model=RINConfig(sample_size=(64, 64), num_classes=1000, interface_patch=8, latent_layers=(4,) * 4, latent_dim=768, interface_dim=512,
                                interface_mlp_ratio=4, rw_heads=16, drop_path=0.0, dropout=0.0)), "ImageNet 64 px RIN of 2212.11972", "32 GPUs", NOT_RUN)
    yield "gen_video64_rin", Preset(
        replace(LAMB_RIN, data="videos", lr=1e-3, schedule="cosine@0.7", batch_size=256, flip=False, sample_steps=400,
                model=RINConfig(sample_size=(64, 64), frames=11, cond_frames=5, frame_stride=1, interface_patch=8, latent_layers=(4,) * 6, latents=256,
                                latent_dim=768, interface_dim=512, interface_mlp_ratio=4, rw_heads=16, drop_path=0.0, dropout=0.0)),
        "16 frames of 64 px as in 2212.11972 for Kinetics-600 and UCF-101, 11 after 5 known ones (its sizes; optimisation as for ImageNet, ours)",
        "32 GPUs", NOT_RUN)


PRESETS = dict(presets()) | dict(generation_presets())
DEFAULT_PRESET = "det_shapes"


class UsageError(SystemExit):
    """A wrong command line: the message goes to standard error, the exit code is 2."""

    def __init__(self, message):
        print(f"error: {message}", file=sys.stderr)
        super().__init__(2)


def nearest(name, choices):
    close = difflib.get_close_matches(name, choices, 1)
    return f", did you mean {close[0]!r}?" if close else f", expected one of {', '.join(choices)}"


def convert(key, text, kind):
    """The text of a command line -> a value of the field's type."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if typing.get_origin(kind) is tuple:
            values = tuple(int(part) for part in text.split(","))
            if typing.get_args(kind)[-1] is ...:
                return values
            values = values * 2 if len(values) == 1 else values          # 640 stands for 640,640
            return values if len(values) == 2 else 1 / 0
        return kind(text)
    except (ValueError, KeyError, ZeroDivisionError):
        name = kind.__name__ if typing.get_origin(kind) is None else "integers" if typing.get_args(kind)[-1] is ... else "one or two integers"
        raise UsageError(f"--{key}={text}: expected {name}") from None


def parse(argv):
    """Command line -> (preset name, Config, actions). Fields of the model are set like those of the run."""
    actions = {arg for arg in argv if arg in ("--list", "--help", "-h", "--bench")}
    argv = [arg for arg in argv if arg not in actions]
    name = argv.pop(0) if argv and not argv[0].startswith("-") else DEFAULT_PRESET
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}" + nearest(name, PRESETS))
    config = PRESETS[name].config
    run_types, model_types = (typing.get_type_hints(type(part)) for part in (config, config.model))
    run_types.pop("model")
    run, model = {}, {}
    while argv:
        key, equals, text = argv.pop(0).partition("=")
        key = key.removeprefix("--").replace("-", "_") if key.startswith("--") else key
        kind = run_types.get(key) or model_types.get(key)
        if kind is None:
            raise UsageError(f"unknown key {key!r}" + nearest(key, [*run_types, *model_types]))
        if not equals:
            bare = kind is bool and (not argv or argv[0].startswith("--"))
            if not bare and not argv:
                raise UsageError(f"--{key}: expected a value")
            text = "true" if bare else argv.pop(0)
        (run if key in run_types else model)[key] = convert(key, text, kind)
    config = replace(config, **run, model=replace(config.model, **model))
    return name, replace(config, out=config.out or f"out/{name}"), actions


def field_help(config_type):
    """{field: its comment in the source}: the meaning of a field is written once, beside it."""
    return dict(re.findall(r"^    (\w+): .*?# (.+)$", inspect.getsource(config_type), re.M))


def print_help(name, config):
    print(__doc__ + f"\nFields, with the values of {name}:")
    for part in (config, config.model):
        for key, meaning in field_help(type(part)).items():
            print(f"  --{key + '=' + str(getattr(part, key)):34} {meaning}")


def print_presets():
    for name, preset in PRESETS.items():
        print(f"{name}\n    {preset.about}\n    for {preset.hardware}; {preset.result}")


# ---------------------------------------------------------------------------------------------------------------
# optimisation

def learning_rate(step, base, schedule, warmup, total, end_factor):
    """Learning rate of a step, counted from 0: a linear rise over `warmup` steps, then a decay until step `total`.
    schedule: linear | cosine | cosine@SHARE (only that share of the half wave) | exp@RATE | none."""
    form = re.fullmatch(r"(linear|cosine|none)|(cosine|exp)@([\d.]+)", schedule)
    if not form:
        raise ValueError(f"unknown schedule {schedule!r}, expected linear, cosine, cosine@SHARE, exp@RATE or none")
    kind, number = form[1] or form[2], float(form[3] or 1)
    if step < warmup:
        return base * step / warmup
    if kind == "none":
        return base
    progress = (step - warmup) / max(total - warmup, 1)
    if kind == "exp":
        return base * number ** progress
    progress = min(progress * number, 1.0)             # a share of the half wave; linear has 1
    left = 1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return base * (left * (1 - end_factor) + end_factor)


class LAMB(torch.optim.Optimizer):
    """Adam with the step of each parameter, decay included, scaled to the norm of the parameter (1904.00962); a group with
    scaled=False takes Adam's. The reference scales keys and values apart, which are one parameter in model.Attention."""

    def __init__(self, params, lr, betas, eps):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0, scaled=True))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
                state["step"] += 1
                mean = state["mean"].lerp_(p.grad, 1 - beta1) / (1 - beta1 ** state["step"])
                square = state["square"].lerp_(p.grad.square(), 1 - beta2) / (1 - beta2 ** state["step"])
                update = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * p
                if group["scaled"]:
                    norm, length = p.norm(), update.norm()
                    update *= torch.where((norm > 0) & (length > 0), norm / length, 1.0)
                p.sub_(group["lr"] * update)


def make_optimizer(named_parameters, c, device):
    """AdamW with decoupled decay, or LAMB, in groups: without decay go the parameters whose name matches c.no_decay.
    The reference does not clip the gradient for LAMB; here clip_norm holds for both."""
    if c.optimizer not in ("adamw", "lamb"):
        raise ValueError(f"unknown optimizer {c.optimizer!r}, expected adamw or lamb")
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    exempt = [p for name, p in named if c.no_decay and re.search(c.no_decay, name)]
    decayed = [p for name, p in named if not (c.no_decay and re.search(c.no_decay, name))]
    groups = [{"params": decayed, "weight_decay": c.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    options = dict(lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps)
    if c.optimizer == "lamb":
        groups[1]["scaled"] = False
        return LAMB([g for g in groups if g["params"]], **options)
    return torch.optim.AdamW([g for g in groups if g["params"]], **options, fused=device.type in ("cpu", "cuda"))


# ---------------------------------------------------------------------------------------------------------------
# checkpoints

def save(path, content):
    """Write a file whole or not at all: under another name first, then renamed."""
    with open(path + ".tmp", "wb") as f:
        torch.save(content, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def check_same_run(saved, config, path):
    """ValueError if a checkpoint's configuration differs from this one in more than how it is run."""
    flat = lambda c: {k: v for k, v in c.items() if k != "model"} | c["model"]
    now, then = json.loads(json.dumps(flat(asdict(config)))), json.loads(json.dumps(flat(saved)))
    changed = [f"{k}: {then.get(k)} there, {v} here" for k, v in now.items() if k not in RUNTIME_KEYS and then.get(k) != v]
    if changed:
        raise ValueError(f"{path} is of another run ({'; '.join(changed)}): use the same values, another --out, or --fresh")


# ---------------------------------------------------------------------------------------------------------------
# the run

class Run:
    """What every part of a run needs: configuration, processes, device, data, model."""

    def __init__(self, name, config):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(config.device)
        if "RANK" in os.environ:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        on_cuda = self.device.type == "cuda"
        self.dtype = getattr(torch, config.dtype if config.dtype != "auto" else "bfloat16" if on_cuda else "float32")
        self.compiled = config.compile == "on" or (config.compile == "auto" and on_cuda)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.workers = config.workers if config.workers >= 0 else min(8, max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1, 0))
        torch.set_float32_matmul_precision("high")

        self.tasks, self.generates = tuple(config.tasks.split(",")), config.tasks == "gen"
        for task in self.tasks:
            if task not in TASKS and not self.generates:
                raise ValueError(f"--tasks={config.tasks}: unknown task {task!r}, expected some of {','.join(TASKS)}, or gen")
        if self.generates == isinstance(config.model, Pix2SeqConfig):
            raise ValueError(f"--tasks={config.tasks}: the network of this preset, {type(config.model).__name__}, is for "
                             f"{','.join(TASKS) if self.generates else 'gen'}")
        self.task_weights = dict(zip(self.tasks, self.numbers("task_weights", config.task_weights, float) or [1.0] * len(self.tasks)))
        self.batches = dict(zip(self.tasks, self.numbers("task_batches", config.task_batches, int) or [config.batch_size] * len(self.tasks)))
        self.images = sum(self.batches.values())       # of a step
        self.starts = dict(zip(self.tasks, self.numbers("task_starts", config.task_starts, int) or [0] * len(self.tasks)))
        if min(self.starts.values()) > 0:
            raise ValueError(f"--task_starts={config.task_starts}: expected a task that starts at step 0")
        for size in self.batches.values():
            if size < 1 or size % (self.world * config.accumulate):
                raise ValueError(f"a batch of {size} is not a multiple of {self.world} processes x accumulate {config.accumulate}")
        if config.data == "shapes":                    # one source for all tasks; coco has a file for each
            self.source = dict.fromkeys(self.tasks, data.make_source(config, "train", self.tasks[0]))
        else:
            self.source = {task: data.make_source(config, "train", task) for task in self.tasks}
        first = self.source[self.tasks[0]]
        if not config.steps:
            if not config.epochs or first.endless:
                raise ValueError("expected --steps" + ("" if first.endless else " or --epochs"))
            config = replace(config, steps=round(config.epochs * len(first) / self.batches[self.tasks[0]]))
        if not config.warmup_steps and config.warmup_epochs:
            config = replace(config, warmup_steps=round(config.warmup_epochs * len(first) / self.batches[self.tasks[0]]))
        learning_rate(0, config.lr, config.schedule, config.warmup_steps, config.steps, config.end_lr_factor)
        self.name, self.config = name, config
        self.check_generation(first) if self.generates else self.check_sequences()
        # What predictions need: the configuration, and the categories that they may name.
        self.predictor = SimpleNamespace(**vars(config), categories=self.categories)

        torch.manual_seed(config.seed)
        self.model = build(config.model).to(self.device)
        if on_cuda:
            self.model.to(memory_format=torch.channels_last)
            if self.world > 1:                         # torch shares batch-norm statistics on GPUs only
                self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        if config.init_from and (config.fresh or not os.path.exists(f"{config.out}/last.pt")):
            self.start_from(config)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False) if config.ema_decay else None
        self.optimizer = make_optimizer(self.model.named_parameters(), config, self.device)
        self.forward = torch.compile(self.model) if self.compiled else self.model
        if self.world > 1:
            self.forward = DistributedDataParallel(self.forward, [self.device.index] if on_cuda else None)

    def check_sequences(self):
        """Categories, vocabulary and pieces of a run on sequences; ValueError if they do not fit the network."""
        c, self.categories = self.config, merge_categories(self.source.values())
        self.vocab, self.pieces = make_vocab(c), make_pieces(c)
        joints = max((len(category.get("keypoints", ())) for category in self.categories), default=0)
        longest = {"det": 5 * c.max_objects, "seg": 5 + 2 * c.max_points, "kpt": 5 + 2 * joints, "cap": c.caption_length}
        for task in self.tasks:
            if longest[task] > c.model.max_seq_len:
                raise ValueError(f"{task} sequences have {longest[task]} tokens, max_seq_len is {c.model.max_seq_len}")
        if "cap" in self.tasks and self.vocab.text_shift + self.pieces.size > self.vocab.size:
            raise ValueError(f"vocab_size is {self.vocab.size}, captions need {self.vocab.text_shift + self.pieces.size}")

    def check_generation(self, first):
        """Classes of a run that generates; ValueError if data, recipe and network do not fit each other."""
        c, self.categories = self.config, [{"id": i, "name": name, "label": i} for i, name in enumerate(first.classes)]
        self.vocab = self.pieces = None
        for schedule in (c.train_schedule, c.sample_schedule):
            gamma_schedule(schedule)
        for value, choices, key in ((c.pred_type, PRED_TYPES, "pred_type"), (c.sampler, SAMPLERS, "sampler"), (c.bits, ("", *RGB_CODES), "bits")):
            check_choice(value, choices, key)
        channels = c.image_channels * RGB_CODES.get(c.bits, 1)
        if c.model.channels != channels:
            raise ValueError(f"channels is {c.model.channels}, but image_channels={c.image_channels} with bits={c.bits!r} are {channels}")
        if c.model.num_classes not in (0, len(first.classes)):
            raise ValueError(f"num_classes is {c.model.num_classes}, but the data has {len(first.classes)} classes")
        if (c.pred_type == "x_softmax_xent") != (getattr(c.model, "softmax_groups", 0) > 0):
            raise ValueError("pred_type x_softmax_xent and a UNet with softmax_groups belong together")
        data.TrainStream(first, "gen", c)[0]           # what does not fit is said more plainly here than from a worker

    def numbers(self, key, text, kind):
        """The text of a field that holds a number for each task -> list; [] if it is empty."""
        try:
            values = [kind(part) for part in text.split(",")] if text else []
        except ValueError:
            values = [None]
        if values and (len(values) != len(self.tasks) or None in values):
            raise ValueError(f"--{key}={text}: expected {len(self.tasks)} numbers, for {','.join(self.tasks)}")
        return values

    def start_from(self, config):
        """Weights of another run, or of the reference. ValueError, naming everything, if they do not fit and --adapt is not given."""
        if self.generates:
            if is_reference(config.init_from):         # its checkpoints hold the network and its average
                weights = read_reference_checkpoint(config.init_from)
                load_reference_weights(self.model, {name.replace("/denoiser_ema/", "/"): w for name, w in weights.items() if "/denoiser_ema/" in name})
            else:
                content = read_weights(config.init_from)
                load_weights(self.model, content.get("ema", content["model"]))
            return self.say(f"started from {config.init_from}")
        c = config.model                               # what a checkpoint of the reference does not tell is as here
        content = read_weights(config.init_from, image_size=c.image_size, projection=c.projection, bins=config.bins,
                               coord_shift=config.coord_shift, text_shift=config.text_shift)
        then = content["config"]
        vocabs = Vocab(then["bins"], then["coord_shift"], then["text_shift"], then["model"]["vocab_size"]), self.vocab
        grid = None                                    # of learned image positions in the checkpoint
        if then["model"]["pos_encoding"] == "learned" and then["model"]["encoder"] == "vit":
            grid = tuple(side // then["model"]["patch_size"] for side in then["model"]["image_size"])
        classes = [{k["label"]: k["name"] for k in categories} for categories in (content["categories"], self.categories)]
        changed = [label for label, name in classes[1].items() if classes[0].get(label) not in (name, str(label))]
        if changed and not config.adapt:
            raise ValueError(f"{config.init_from} has other classes: label {changed[0]} is {classes[0].get(changed[0])!r} there, {classes[1][changed[0]]!r} here "
                             f"({len(changed)} differ); --adapt starts the tokens of those afresh")
        weights, notes = adapt_weights(content["model"], self.model, config.adapt, grid, vocabs)
        fresh = {name: self.model.state_dict()[name][CLASS_SHIFT:].clone() for name in ("decoder.embed", "decoder.unembed", "decoder.bias") if name in weights}
        load_weights(self.model, weights)
        with torch.no_grad():
            for name, rows in fresh.items():
                for label in changed:
                    self.model.state_dict()[name][CLASS_SHIFT + label] = rows[label]
        for note in notes + ([f"{len(changed)} of {len(classes[1])} classes are others there, their tokens start afresh"] if changed else []):
            self.say(f"adapted: {note}")
        self.say(f"started from {config.init_from}")

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)
            sys.stdout.flush()

    def loader(self, task, start, steps):
        """Batches of a task for this process from a step on, in `accumulate` parts a step."""
        c = self.config
        positions = data.Positions(start, steps, self.batches[task], c.accumulate, self.rank, self.world)
        collate = data.TrainCollate(task, c, self.vocab, self.pieces)
        return data.make_loader(data.TrainStream(self.source[task], task, c), positions, collate, self.workers, pin=self.device.type == "cuda")

    def loss(self, batch):
        """Weighted sum of the losses of a batch's tokens, or sum of its examples' losses in generation."""
        if self.generates:
            pixels, labels = data.to_floats(batch["pixels"], self.device), batch["label"].to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                return denoising_loss(self.forward, self.config, pixels, labels) * len(pixels)
        images = data.to_images(batch["image"], batch["size"], self.device)
        inputs, targets, weights = (batch[k].to(self.device, non_blocking=True) for k in ("inputs", "targets", "weights"))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self.forward(images, inputs)
        return (token_loss(logits, targets, smoothing=self.config.label_smoothing) * weights).sum()

    def step(self, parts, step, stop):
        """One optimiser step on this process's parts of each task's batch, {task: list}. Returns the loss of each task (K,) and
        the gradient's norm, as tensors, and one that is positive if any process was asked to stop. Nothing here waits for the device."""
        c = self.config
        # The noise of a step depends on nothing before it, so a run that goes on repeats it.
        torch.manual_seed((c.seed * 1_000_003 + step) * 65_537 + self.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, c.lr, c.schedule, c.warmup_steps, c.steps, c.end_lr_factor)
        shared = torch.stack([*(sum(part["weights"].sum() for part in parts[task]) for task in parts), torch.tensor(float(stop))]).to(self.device)
        if self.world > 1:
            dist.all_reduce(shared)
        losses = torch.zeros(len(parts), device=self.device)
        left = len(parts) * c.accumulate
        for k, task in enumerate(parts):
            for part in parts[task]:
                left -= 1
                with contextlib.nullcontext() if not left or self.world == 1 else self.forward.no_sync():
                    loss = self.loss(part) / (shared[k] + 1e-9)
                    # Gradients are averaged over processes, but the parts of a loss add up.
                    (loss * (self.world * self.task_weights[task])).backward()
                losses[k] += loss.detach()
        if self.world > 1:
            dist.all_reduce(losses)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip_norm if c.clip_norm > 0 else math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            with torch.no_grad():
                # The first weights are worth little, so the average forgets them faster (the reference starts from random ones).
                torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - min(c.ema_decay, (1 + step) / (10 + step)))
                for ours, theirs in zip(self.average.buffers(), self.model.buffers()):
                    ours.copy_(theirs)
        return losses, norm, shared[-1]

    def checkpoint(self, step, best, optimizer=True):
        content = {"network": type(self.model).__name__, "model": self.model.state_dict(), "step": step, "best": best, "preset": self.name,
                   "config": asdict(self.config), "categories": self.categories}
        if self.average is not None:
            content["ema"] = self.average.state_dict()
        return content | ({"optimizer": self.optimizer.state_dict()} if optimizer else {})

    def resume(self):
        """Go on from last.pt if there is one. Returns (step, best score)."""
        path = f"{self.config.out}/last.pt"
        if not os.path.exists(path):
            return 0, -math.inf
        saved = read_checkpoint(path, self.device)
        check_same_run(saved["config"], self.config, path)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(saved["ema"])
        return saved["step"], saved["best"]

    def evaluate(self, step, limit=None):
        """Metrics on held-out data {task: {name: number}} (empty on all processes but the first), and a picture of predictions."""
        c, model = self.config, self.average or self.model
        size = max(1, min(c.batch_size // self.world, 100))
        if self.generates:
            metrics, samples = evaluate_generation(model, self.predictor, batch_size=size, judge=c.judge and limit is None, count=limit or c.eval_samples,
                                                   dtype=self.dtype)
            if self.rank == 0 and c.pictures:
                data.save_grid(samples, f"{c.out}/step_{step:07d}")
            return {"gen": metrics}
        metrics, _ = evaluate(model, self.predictor, self.tasks, "val", "own" if "det" in self.tasks else "truth",
                              batch_size=size, workers=self.workers, limit=limit, dtype=self.dtype)
        if self.rank == 0 and c.pictures:
            self.draw(f"{c.out}/step_{step:07d}.png")
        return metrics

    def draw(self, path):
        """Predictions on the first held-out images, always the same ones."""
        model = (self.average or self.model).eval()
        source, pictures = data.make_source(self.config, "val", self.tasks[0]), []
        own = "det" in self.tasks or "cap" in self.tasks
        for i in range(min(self.config.pictures, len(source))):
            with contextlib.suppress(DataError):
                record = source[i]
                boxes = None if own else true_boxes(record, {label: n for n, label in source.label_of.items()})
                tasks = self.tasks if "det" in self.tasks else [t for t in self.tasks if t == "cap"] or self.tasks
                found = look(model, [record["image"]], self.predictor, tasks, boxes and [boxes], torch.Generator(self.device).manual_seed(0))
                pictures.append(draw(record["image"], found[0], self.predictor, side=256))
        if pictures:
            tile(pictures).save(path)
        self.model.train()


def merge_categories(sources):
    """The categories of all tasks: [{id, name, label, and keypoints and skeleton if it has joints}]."""
    merged = {}
    for source in sources:
        for category in source.categories:
            kept = {key: category[key] for key in ("id", "name", "keypoints", "skeleton") if key in category}
            merged.setdefault(category["id"], {}).update(kept, label=source.label_of[category["id"]])
    return list(merged.values())


LOGGED = ("AP", "AP50", "AP75", "BLEU_4", "ROUGE_L", "CIDEr", "exact", "loss", "class_accuracy", "judge_accuracy", "frechet", "frechet_real",
          "frame_error", "copy_error")


def headline(task, metrics):
    """The number of a task's metrics that the best checkpoint is chosen by, averaged over tasks; more is better."""
    return -metrics["loss"] if task == "gen" else metrics["ROUGE_L" if task == "cap" else "AP"]


class Log:
    """Lines for people on standard output, for programs in log.jsonl, for TensorBoard if it is installed."""

    def __init__(self, run, start):
        self.run, self.path, self.board = run, f"{run.config.out}/log.jsonl", None
        if run.rank > 0:
            return
        if os.path.exists(self.path):                  # forget what an interrupted run logged after its last checkpoint
            with open(self.path) as f:
                lines = [line for line in f if line.endswith("}\n") and json.loads(line)["step"] <= start]
            with open(self.path, "w") as f:
                f.writelines(lines)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(run.config.out)

    def __call__(self, step, **values):
        if self.run.rank > 0:
            return
        with open(self.path, "a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        self.run.say(f"step {step:>7} " + " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()))
        for key, value in values.items() if self.board else ():
            self.board.add_scalar(key, value, step)


def memory_gb(device):
    """Peak memory of this process in GiB: of the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    import resource                                    # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def train(run):
    """The loop. Returns the final metrics on the first process, or None if it was interrupted."""
    c = run.config
    if c.fresh and run.rank == 0 and os.path.exists(c.out):
        aside = next(f"{c.out}.{n}" for n in range(1, 10_000) if not os.path.exists(f"{c.out}.{n}"))
        shutil.move(c.out, aside)
        run.say(f"moved the earlier run to {aside}")
    os.makedirs(c.out, exist_ok=True)
    if run.world > 1:
        dist.barrier()
    start, best = run.resume()
    log = Log(run, start)
    run.say(f"{run.name}: {count_parameters(run.model):,} parameters, {c.steps} steps of {run.images} images, on {run.world} x {run.device.type}"
            + (f", going on from step {start}" if start else ""))

    named = lambda losses: {f"loss_{task}": value for task, value in zip(parts, losses.tolist())}
    asked = []                                         # signals that asked to stop
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.append(number))
    batches = {task: iter(run.loader(task, max(start, run.starts[task]), c.steps)) for task in run.tasks}
    bar = tqdm(total=c.steps, initial=start, disable=run.rank > 0 or not sys.stderr.isatty(), dynamic_ncols=True)
    skipped, began, since, images, metrics = set(), time.time(), start, 0, None
    run.model.train()
    step = start
    while True:
        done = step == c.steps
        # Processes must agree to stop, and reading what they agreed on waits for the device: not at every step.
        stopping = bool(asked) if run.world == 1 else step > start and step % 8 == 0 and stop.item() > 0
        if step > start and (done or stopping or step % c.save_every == 0 or (c.eval_every and step % c.eval_every == 0)):
            if not losses.isfinite().all():
                raise FloatingPointError(f"the loss is {named(losses)} at step {step}; {c.out}/last.pt is from before it")
        if done or (c.eval_every and step > start and step % c.eval_every == 0 and not stopping):
            metrics = run.evaluate(step, None if done or not c.eval_images else c.eval_images)
            if run.rank == 0:
                log(step, **{f"{task}_{name}": value for task, m in metrics.items() for name, value in m.items() if name in LOGGED})
                score = sum(headline(task, metrics[task]) for task in run.tasks) / len(run.tasks)
                if score > best:
                    best = score
                    save(f"{c.out}/best.pt", run.checkpoint(step, best, optimizer=False))
            began, since, images = time.time(), step, 0             # evaluation is not training time
        if run.rank == 0 and step > start and (done or stopping or step % c.save_every == 0):
            save(f"{c.out}/last.pt", run.checkpoint(step, best))
        if done or stopping:
            break

        parts = {task: [next(batches[task]) for _ in range(c.accumulate)] for task in run.tasks if step >= run.starts[task]}
        for message in {m for batch in parts.values() for part in batch for m in part["skipped"]} - skipped:
            skipped.add(message)
            run.say(f"warning: left out, {len(skipped)} so far: {message}")
        losses, norm, stop = run.step(parts, step, bool(asked))
        step, images = step + 1, images + sum(run.batches[task] for task in parts)
        bar.update()
        if step % c.log_every == 0 or run.device.type == "cpu" and not losses.isfinite().all():
            if not losses.isfinite().all():
                raise FloatingPointError(f"the loss is {named(losses)} at step {step} (gradient norm {norm.item():.3g}); lower --lr or set --clip_norm")
            seconds = time.time() - began
            log(step, loss=losses.sum().item(), **(named(losses) if len(run.tasks) > 1 else {}), lr=run.optimizer.param_groups[0]["lr"],
                grad_norm=norm.item(), ms=1000 * seconds / (step - since), img_per_s=images / seconds, memory_gb=memory_gb(run.device))
            bar.set_postfix(loss=f"{losses.sum().item():.3f}")
            began, since, images = time.time(), step, 0
    bar.close()
    if not done:
        run.say(f"stopped at step {step}, saved in {c.out}/last.pt; the same command goes on from there")
        sys.exit(128 + (asked[0] if asked else signal.SIGTERM))
    return metrics


def main():
    name, config, actions = parse(sys.argv[1:])
    if actions & {"--help", "-h"}:
        return print_help(name, config)
    if "--list" in actions:
        return print_presets()
    began = time.time()
    try:
        run = Run(name, config)
        if "--bench" in actions:
            return bench(run)
        metrics = train(run)
    except (DataError, ValueError, FileNotFoundError, FloatingPointError) as e:
        sys.exit(f"error: {e}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if run.rank == 0:
        out = run.config.out
        for task, m in metrics.items():
            print(f"{task}: " + ", ".join(f"{name} {m[name]:.3f}" for name in LOGGED if name in m)
                  + (f", {m['samples']} samples" if run.generates else f" on {m['images']} held-out images"))
        print(f"{(time.time() - began) / 60:.1f} minutes\n"
              f"checkpoints {out}/best.pt and {out}/last.pt, pictures {out}/step_*.png, log {out}/log.jsonl\n"
              f"next: python sample.py --ckpt={out}")


# ---------------------------------------------------------------------------------------------------------------
# speed

PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "3090": 71, "V100": 125, "T4": 65}   # dense, 16 bit


def bench(run):
    """Time the parts of training and decoding on this machine, after a warm-up; medians."""
    from torch.utils.flop_counter import FlopCounterMode
    c, device = run.config, run.device
    sync = torch.cuda.synchronize if device.type == "cuda" else torch.mps.synchronize if device.type == "mps" else lambda: None

    def median_ms(work, repeats, warmup=3):
        times = []
        for i in range(warmup + repeats):
            sync()
            begin = time.perf_counter()
            work()
            sync()
            times.append(1000 * (time.perf_counter() - begin))
        return sorted(times[warmup:])[repeats // 2]

    loaders = {task: iter(run.loader(task, 0, 1000)) for task in run.tasks}
    fetch = lambda: {task: [next(loaders[task]) for _ in range(c.accumulate)] for task in run.tasks}
    heavy = count_parameters(run.model) > 20e6 and device.type == "cpu"
    repeats, warm = (3, 1) if heavy else (20, 5)
    data_ms = median_ms(fetch, repeats, warm)
    parts = fetch()
    run.model.train()

    def forward():
        with torch.no_grad():
            for part in sum(parts.values(), []):
                run.loss(part)

    def backward():
        for part in sum(parts.values(), []):
            run.loss(part).backward()
        run.optimizer.zero_grad(set_to_none=True)

    forward_ms, both_ms = median_ms(forward, repeats, warm), median_ms(backward, repeats, warm)
    step_ms = median_ms(lambda: run.step(parts, 1, False), repeats, warm)
    tokens = sum(part["weights"].numel() for part in sum(parts.values(), []))              # in generation, as many as images
    run.say(f"{run.name} on {run.world} x {torch.cuda.get_device_name() if device.type == 'cuda' else device.type}, {run.dtype}, "
            f"{run.images} images a step, compile {'on' if run.compiled else 'off'}\n"
            f"data       {data_ms:9.1f} ms   {1000 * run.images / data_ms:9.1f} img/s from {run.workers} workers a task\n"
            f"forward    {forward_ms:9.1f} ms\nbackward   {both_ms - forward_ms:9.1f} ms\n"
            f"step       {step_ms:9.1f} ms   {1000 * run.images / step_ms:9.1f} img/s   {1000 * tokens * run.world / step_ms:9.0f} tokens/s   "
            f"peak memory {memory_gb(device):.1f} GiB")
    if device.type == "cuda":
        run.forward = run.model                        # operations inside a compiled graph are not counted
        with FlopCounterMode(display=False) as counter:
            backward()
        peak = next((v for k, v in PEAK_TFLOPS.items() if k in torch.cuda.get_device_name()), None)
        rate = counter.get_total_flops() / step_ms / 1e9
        run.say(f"           {rate:.0f} TFLOP/s, " + (f"{100 * rate / peak:.0f} % of the chip's {peak}" if peak else "peak of this chip not known"))

    run.model.eval()
    if run.generates:
        with torch.no_grad(), torch.autocast(device.type, run.dtype, enabled=run.dtype != torch.float32):
            known = torch.rand(1, c.image_channels, c.model.cond_frames, *c.model.sample_size, device=device) if getattr(c.model, "cond_frames", 0) else None
            sample_ms = median_ms(lambda: generate(run.model, c, 1, known=known), 3, 1)
        return run.say(f"sample     {sample_ms:9.1f} ms   one, in {c.sample_steps} steps")
    image = torch.rand(1, 3, *c.model.image_size, device=device)
    prompt, length, took = torch.full((1, 1), 10, device=device), 5 * c.max_objects, {}
    with torch.no_grad(), torch.autocast(device.type, run.dtype, enabled=run.dtype != torch.float32):
        encode_ms = median_ms(lambda: run.model.encode(image), repeats, 1)
        context = run.model.encode(image)
        for cache in (True, False):
            took[cache] = median_ms(lambda: run.model.generate(context, prompt, length, top_p=c.top_p, cache=cache), 3 if cache else 1, 1 if cache else 0)
    run.say(f"encode     {encode_ms:9.1f} ms   one image\n"
            f"decode     {took[True]:9.1f} ms   {1000 * length / took[True]:9.1f} tokens/s, {length} tokens, batch 1\n"
            f"  no cache {took[False]:9.1f} ms   {1000 * length / took[False]:9.1f} tokens/s: the cache is {took[False] / took[True]:.1f} times faster")


if __name__ == "__main__":
    main()
