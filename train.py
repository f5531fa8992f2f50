"""Train a model: the loop, its recipes, its checkpoints.

Recipes of Pix2Seq (arXiv 2109.10852, section 3.1 and appendix; several tasks at once: 2206.07669),
Bit Diffusion (2208.04202), RIN (2212.11972), FIT (2305.12689) and Pix2Seq-D (2210.06366) are
presets, of which every field can be changed.
The same command goes on from the last checkpoint after any interruption. Under torchrun the global
batch is shared out, with the same result but for the noise of dropout and diffusion.
Left out: model and pipeline parallelism.

    python train.py                                     # det_shapes: boxes in minutes on a CPU
    python train.py det_coco_vit_b --data_dir=coco --lr=1e-4
    torchrun --nproc_per_node=8 train.py det_coco_vit_l --data_dir=coco
    python train.py --list                              # presets;  --help: options;  --bench: speed
    python train.py --plot out/det_shapes out/second    # their curves, in one picture
"""
import copy
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from os.path import exists
from time import time
from typing import Literal

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import diffusion
import sample
import tokenizer
from eval import evaluate
from model import (
    COLORS, SIZES, Device, Dtype, FITConfig, ImageARConfig, PanopticConfig, Pix2SeqConfig,
    RINConfig, Switch, UNetConfig, adapt_weights, build, count_parameters, image_loss, load,
    load_backbone, load_weights, save, set_checkpointing, token_loss)
from tokenizer import (
    Count, Fraction, Natural, NotNegative, Positive, Rate, Seed, UserError, frozen, require)


@frozen
class OptimConfig:
    """What is learned from the data, how, for how long."""
    seed: Seed = 0                      # of weights, order, augmentation, dropout and noise
    init_from: str = ""                 # start from the weights of a run, or of a checkpoint
    backbone: str = ""                  # weights of a ViT or ResNet that the encoder starts from
    backbone_colors: Literal[tuple(COLORS)] = "imagenet"    # what its images are normalised by
    adapt: bool = False                 # init_from may be of another size, vocabulary, or classes
    batch_size: Count = 32              # images of each task per step, over all processes
    task_batches: tuple[Count, ...] = ()        # the same for each task; empty: batch_size for all
    task_weights: tuple[NotNegative, ...] = ()  # loss weight of each task; empty: all 1
    task_starts: tuple[Natural, ...] = ()       # first step of each task; empty: all 0
    epochs: NotNegative = 0.0           # length of training, if steps is 0
    steps: Natural = 0                  # length of training
    warmup_epochs: NotNegative = 0.0    # linear rise of the learning rate, if warmup_steps is 0
    warmup_steps: Natural = 0           # linear rise of the learning rate
    optimizer: Literal["adamw", "lamb", "muon"] = "adamw"       # how gradients become steps
    lr: Positive = 3e-5                 # peak learning rate
    lr_schedule: str = "linear"         # linear, cosine, cosine@FRACTION, exp@RATE or none
    end_lr_factor: Fraction = 0.01      # last learning rate / peak
    weight_decay: NotNegative = 0.05    # decoupled, on every parameter but no_decay
    no_decay: tokenizer.Pattern = ""    # regular expression: names without decay and LAMB's scaling
    beta1: Rate = 0.9                   # Adam's
    beta2: Rate = 0.95                  # Adam's
    adam_eps: Positive = 1e-8           # Adam's epsilon
    clip_norm: NotNegative = 0.0        # largest global norm of the gradient; 0: no limit
    ema_decay: Rate = 0.0               # of the averaged weights that predict; 0: no average
    label_smoothing: Fraction = 0.0     # of the cross entropy


@frozen
class RunConfig:
    """How a run is run. Not the recipe: these may change when a run goes on."""
    out: str = ""                       # folder of the run (default: out/PRESET)
    fresh: bool = False                 # start again, moving an earlier run in that folder aside
    device: str = "auto"                # auto, cuda, mps, cpu, xla or tpu (see model.Device)
    dtype: Dtype = "auto"               # of matrix products (see model.Device)
    compile: Switch = "auto"            # torch.compile: auto: on cuda
    workers: tokenizer.between(-1) = -1     # processes that load data; -1: by the cores
    accumulate: Count = 1               # parts that a batch is computed in: less memory
    checkpointing: bool = False         # recompute activations: less memory, more time
    log_every: Count = 50               # steps between lines of the log
    save_every: Count = 500             # steps between checkpoints
    eval_every: Natural = 0             # steps between evaluations; 0: only at the end
    eval_images: Natural = 0            # items of an evaluation while training; 0: all
    pictures: Natural = 8               # held-out items drawn at each evaluation
    wandb: bool = False                 # write the log to Weights & Biases, too
    target: Fraction = 0.0              # stop where AP50, exact or class_accuracy on val reaches it


@frozen
class Config(sample.Config):
    """A run: what sample.Config says about the trained model, and how it is trained."""
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()


# LOSS[task](forward, batch, c) -> the weighted sum of a batch's losses, a scalar
LOSS = {
    **dict.fromkeys(Pix2SeqConfig.TASKS, token_loss),
    "gen": diffusion.denoising_loss,
    "ar": image_loss,
    "pan": diffusion.denoising_loss,
    "vps": diffusion.denoising_loss,
}


def train(c):
    """Trains as `c` says; the same command goes on where it was interrupted.
    Returns the last metrics {task: {name: number}}, None if it was asked to stop before."""
    device = Device(c.run.device, c.run.dtype, c.run.compile)       # cpu, cuda, mps; processes
    c, streams = prepare(c, device)                 # wrong input ends here, before the first step
    model = make_model(c, device)
    average = copy.deepcopy(model).eval() if c.optim.ema_decay else model      # what predicts
    optimizer = make_optimizer(model.named_parameters(), c.optim, device.fused)
    start, best = resume(c, device, model, average, optimizer)
    forward, log = device.wrap(model), Log(c, device, model, start)         # wrap: compile, DDP
    task_weights = dict(zip(c.data.tasks, per_task(c, "task_weights", 1.0)))
    batches = batches_from(start, streams, c, device)
    device.catch_signals()
    model.train()

    for step in range(start, c.optim.steps + 1):        # the last turn only saves and evaluates
        # Save before anything that can fail, then evaluate.
        done, stopping = step == c.optim.steps, device.stopping(step)
        if step > start and (done or stopping or step % c.run.save_every == 0):
            log.check_finite()                      # broken weights must not replace good ones
            save_run("last.pt", c, device, step, best, model, average, optimizer)
        if stopping and not done:
            return log.stopped(step)
        if done or c.run.eval_every and step and step % c.run.eval_every == 0:
            metrics = evaluate_run(average, c, device, step, done)
            score = log.evaluated(step, metrics)
            if score is not None and score >= best:
                best = score
                save_run("best.pt", c, device, step, best, model, average)
        if done:
            device.wait()                           # gloo can abort one that ends before others
            return metrics

        # The noise of a step depends on nothing before it, so a resumed run repeats it.
        device.seed((c.optim.seed * 1_000_003 + step) * 65_537 + device.rank)
        lr = learning_rate(step, c.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr

        parts = next(batches)                       # a batch of each task that has started
        # A loss is divided by the weights of the whole step: of all parts and all processes.
        totals, losses = Counter(), Counter()
        for task, batch in parts:
            totals[task] += batch.weights.sum()
        totals = device.sum(totals)
        for n, (task, batch) in enumerate(parts, 1):
            with device.sync_only(forward, n == len(parts)):
                with device.autocast():
                    loss = LOSS[task](forward, batch.to(device.device), c) / (totals[task] + 1e-9)
                # DDP averages gradients over processes, but the parts of a loss add up.
                device.scaler.scale(loss * (device.world * task_weights[task])).backward()
            losses[task] += loss.detach()

        device.scaler.unscale_(optimizer)           # of float16
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.optim.clip_norm or math.inf)
        losses = device.sum(losses)
        device.step(optimizer)
        update_average(average, model, step, c, device)
        device.sync()
        log.step(step + 1, losses, lr, norm, parts)


# --------------------------------------------------------------------------------------------------
# what the loop names, in its order

def make_model(c, device):
    """The network that c.model describes, with random weights, or those of c.optim.init_from."""
    torch.manual_seed(c.optim.seed)
    model = build(c.model)
    if not exists(f"{c.run.out}/last.pt"):             # else weights come from there
        if c.optim.init_from:
            start_from(c.optim.init_from, model, c, device)
        if c.optim.backbone:
            for note in load_backbone(c.optim.backbone, model, c.optim.backbone_colors):
                device.say(f"{c.optim.backbone}: {note}")
    set_checkpointing(model, c.run.checkpointing)
    return device.place(model)


def learning_rate(step, o):
    """Learning rate of a step, counted from 0: a linear rise over warmup_steps, then a decay until
    `steps`. lr_schedule: linear | cosine | cosine@FRACTION (of the half wave) | exp@RATE | none."""
    require(
        re.fullmatch(r"linear|none|cosine(@\d*\.?\d+)?|exp@\d*\.?\d+", o.lr_schedule),
        f"unknown lr_schedule {o.lr_schedule!r}, expected linear, cosine[@FRACTION], exp@RATE "
        f"or none")
    kind, _, number = o.lr_schedule.partition("@")
    number = float(number or 1)
    if step < o.warmup_steps:
        return o.lr * step / o.warmup_steps
    progress = (step - o.warmup_steps) / max(o.steps - o.warmup_steps, 1)
    if kind in ("exp", "none"):                        # none is exp@1
        return o.lr * number ** progress
    progress = min(progress * number, 1.0)
    left = 1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return o.lr * (left * (1 - o.end_lr_factor) + o.end_lr_factor)


def batches_from(start, streams, c, device):
    """Iterator over what this process learns from, from step `start` on: of each step a list of
    (task, Batch), of each task that has started in c.run.accumulate parts."""
    starts = per_task(c, "task_starts")
    tasks = dict(zip(c.data.tasks, zip(batch_sizes(c), starts)))
    positions = data.MicroBatches(
        start, c.optim.steps, tasks, c.run.accumulate, device.rank, device.world)
    parts = iter(data.make_loader(
        streams, positions, partial(data.collate_parts, c), worker_count(c), device.pin))
    return (
        list(islice(parts, c.run.accumulate * sum(step >= first for first in starts)))
        for step in range(start, c.optim.steps))


# ==== reference ===================================================================================
# before the first step

def prepare(c, device):
    """The Config with steps and categories filled in, and the data.Streams to learn from.
    Everything that can be known to be wrong is said here: UserError or OSError."""
    tokenizer.check_fields(*sample.parts_of(c))
    check_tasks(c, device)
    sources = {task: data.make_source(c, "train", task) for task in c.data.tasks}
    categories = {}
    for source in sources.values():
        for category in source.categories:
            known = categories.setdefault(category["id"], dict(category))
            require(
                known["name"] == category["name"],
                f"category {category['id']} has names {known['name']!r}, {category['name']!r}")
            known.update(category)
    first, o = sources[c.data.tasks[0]], c.optim
    per_epoch = len(first) / batch_sizes(c)[0]
    require(
        o.steps or o.epochs and not first.endless,
        "expected --steps, or where data ends --epochs")
    o = replace(
        o, steps=o.steps or round(o.epochs * per_epoch),
        warmup_steps=o.warmup_steps or round(o.warmup_epochs * per_epoch))
    c = replace(c, optim=o, categories=tuple(categories.values()))
    learning_rate(0, o)
    if isinstance(c.model, Pix2SeqConfig):
        check_sequences(c)
    else:
        check_diffusion(c, first)
    held_out = {task: data.make_source(c, "val", task) for task in sources}
    streams = data.Streams({
        task: data.TrainStream(source, task, c, o.seed) for task, source in sources.items()})
    for task in sources:                               # errors are plainer here than from a worker
        streams[task, 0]
    if device.first:
        open_folder(c, device)
        summarize(c, device, {"train": sources, "val": held_out})
    device.wait()
    return c, streams


def open_folder(c, device):
    """Makes the run's folder, and locks it for as long as this process lives. UserError if another
    process has."""
    out = c.run.out
    earlier = exists(out)
    os.makedirs(out, exist_ok=True)
    device.locked = locked(out)
    if c.run.fresh and earlier:
        n = 1
        while exists(f"{out}.{n}"):
            n += 1
        os.rename(out, f"{out}.{n}")
        device.say(f"moved the earlier run to {out}.{n}")
        open_folder(c, device)


def locked(folder):
    """The folder's lock, an open file (on Windows there is none)."""
    lock, process = open(f"{folder}/.lock", "a+"), str(os.getpid())
    with suppress(ImportError):
        import fcntl
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read()
            require(
                owner == process, f"{folder}: process {owner} trains there, expected another --out")
    lock.truncate(0)
    lock.write(process)
    lock.flush()
    return lock


def summarize(c, device, sources):
    """Says what the data holds, and at a run's start writes it into its folder."""
    found = {
        f"{task} {split}": source.summary(c)
        for split, of_split in sources.items() for task, source in of_split.items()
        if not source.endless}
    for name, row in found.items():
        learned = Counter(row["learned"])
        kinds = ", ".join(f"{kind} {number}" for kind, number in learned.most_common(8))
        device.say(f"{name}: {row['images']} images; {len(learned)} classes: {kinds}")
        if not learned:
            tokenizer.notice(f"{name}: nothing to find, so no checkpoint is the best")
    if not exists(f"{c.run.out}/last.pt"):
        with open(f"{c.run.out}/data.json", "w") as f:
            json.dump(found, f, indent=1)


def per_task(c, field, default=0):
    """The value of each task of a field of c.optim that holds one per task, or none."""
    tasks = c.data.tasks
    values = getattr(c.optim, field) or (default,) * len(tasks)
    require(
        len(values) == len(tasks),
        f"--{field} is {values}: expected {len(tasks)} numbers, for {','.join(tasks)}")
    return values


def batch_sizes(c):
    """Images of a batch of each task."""
    return per_task(c, "task_batches", c.optim.batch_size)


def check_tasks(c, device):
    """UserError if tasks are unknown or not for this network, or batches cannot be shared out."""
    tasks = c.data.tasks
    require(
        tasks and len(set(tasks)) == len(tasks),
        f"--tasks={','.join(tasks)}: expected one or more, each once")
    for task in tasks:
        require(
            task in c.model.TASKS,
            f"--tasks={','.join(tasks)}: {task!r} is no task of "
            f"{type(c.model).__name__}, expected some of {','.join(c.model.TASKS)}")
    require(
        0 in per_task(c, "task_starts"),
        "--task_starts: expected a task that starts at step 0")
    per_task(c, "task_weights", 1.0)
    for size in batch_sizes(c):
        require(
            not size % (device.world * c.run.accumulate),
            f"a batch of {size} is not a multiple of {device.world} processes x --accumulate")


LENGTHS = {                                            # c -> tokens of a task's longest sequence
    "det": lambda c: 5 * c.data.max_objects,
    "seg": lambda c: 5 + 2 * c.data.max_points,
    "kpt": lambda c: 5 + 2 * max((len(k.get("keypoints", ())) for k in c.categories), default=0),
    "cap": lambda c: c.data.caption_length,
}


def check_sequences(c):
    """UserError if sequences or vocabulary do not fit the network."""
    for task in c.data.tasks:
        length = LENGTHS[task](c)
        require(
            length <= c.model.max_seq_len,
            f"{task} sequences have {length} tokens, max_seq_len is {c.model.max_seq_len}")
    needed = c.vocab.text_end if "cap" in c.data.tasks else c.vocab.coord_shift + c.vocab.bins
    require(
        needed <= c.model.vocab_size,
        f"vocab_size is {c.model.vocab_size}, the tokens need {needed}")


def check_diffusion(c, source):
    """UserError if data, recipe and network do not fit each other."""
    d, m = c.diffusion, c.model
    diffusion.gamma_schedule(d.train_schedule)
    diffusion.gamma_schedule(c.sampling.sample_schedule)
    require(
        (d.pred_type == "x_softmax_xent") == (m.softmax_groups > 0),
        "pred_type x_softmax_xent and a UNet with softmax_groups belong together")
    if isinstance(m, PanopticConfig):
        most = max(c.data.max_segments - 1, *(row["label"] for row in c.categories))
        require(
            d.bits == "ids" and not m.channels % 2 and most < 1 << m.channels // 2,
            f"bits {d.bits!r}, channels {m.channels}: expected 'ids', twice the bits of {most}")
        return
    # As many of each colour as its code has bits.
    channels = c.data.image_channels * {"": 1, **diffusion.RGB_CODES}.get(d.bits, 0)
    require(
        m.channels == channels,
        f"channels is {m.channels}, but image_channels={c.data.image_channels} with "
        f"bits={d.bits!r} are {channels}")
    require(
        m.num_classes in (0, len(source.classes)),
        f"num_classes is {m.num_classes}, but the data has {len(source.classes)} classes")


def worker_count(c):
    """Processes that load data: by default one less than the cores of this process, at most 8."""
    if c.run.workers >= 0:
        return c.run.workers
    share = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(8, max(share // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1, 0))


def make_optimizer(named_parameters, o, fused=False):
    """AdamW with decoupled decay, LAMB or Muon. Without decay go the parameters whose name matches
    no_decay. The reference does not clip the gradient for LAMB; here clip_norm holds for all."""
    makers = {"adamw": torch.optim.AdamW, "lamb": LAMB, "muon": Muon}
    groups = {}                                        # by what they have in common
    for name, p in named_parameters:
        if p.requires_grad:
            exempt = bool(o.no_decay and re.search(o.no_decay, name))
            plain = exempt if o.optimizer == "lamb" else p.ndim < 2 or not name.endswith(".weight")
            variables = 0 if plain else 1 + (".kv." in name)           # keys and values are two
            group = {
                "params": [],
                "weight_decay": 0 if exempt else o.weight_decay,
                "variables": variables,
            }
            groups.setdefault((exempt, variables), group)["params"].append(p)
    return makers[o.optimizer](
        groups.values(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.adam_eps,
        fused=fused and o.optimizer == "adamw")


class LAMB(torch.optim.AdamW):
    """Adam with the step of each variable, decay included, scaled to the norm of the variable
    (1904.00962)."""

    @torch.no_grad()
    def step(self):
        lr, before = self.param_groups[0]["lr"], []    # the same in all
        for group in self.param_groups:
            before.append([p.clone() for p in group["params"]])
            group["lr"] = 1.0
        super().step()
        for group, old in zip(self.param_groups, before):
            group["lr"], params, n = lr, group["params"], group["variables"]
            changes = torch._foreach_sub(params, old)
            if n:
                values, steps = (
                    [variable for x in xs for variable in x.chunk(n)] for xs in (old, changes))
                norms = torch.stack(torch._foreach_norm(values))
                lengths = torch.stack(torch._foreach_norm(steps))
                scales = torch.where((norms > 0) & (lengths > 0), norms / lengths, 1.0)
                torch._foreach_mul_(steps, scales.unbind())
            torch._foreach_copy_(params, torch._foreach_add(old, changes, alpha=lr))


class Muon(torch.optim.AdamW):
    """Nesterov momentum whose matrices are made orthogonal (Jordan 2024, kellerjordan.github.io),
    as long as a step of Adam (2502.16982, section 2.2); tables and vectors take Adam's step."""

    @torch.no_grad()
    def step(self):
        alike = {}                                     # matrices of one shape are done at once
        for group in self.param_groups:
            n = group["variables"]
            for p in group["params"] if n else ():
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:                          # AdamW looks for a step in each
                    state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(p))
                momentum = state["momentum"].lerp_(p.grad, 0.05)
                ahead = p.grad.lerp(momentum, 0.95).flatten(1)
                p.grad = None                          # nothing is left of it for Adam
                for matrix, change in zip(p.chunk(n), ahead.chunk(n)):
                    alike.setdefault(change.shape, []).append((matrix, change, group))
        super().step()
        for shape, rows in alike.items():
            matrices, changes, groups = zip(*rows)
            changes = 0.2 * max(shape) ** 0.5 * orthogonal(torch.stack(changes))
            for matrix, change, group in zip(matrices, changes, groups):
                change = change.view_as(matrix) + group["weight_decay"] * matrix
                matrix.sub_(group["lr"] * change)


def orthogonal(x):
    """Matrices (N, rows, columns) -> nearly the nearest ones with all singular values 1: five steps
    of an odd polynomial that takes singular values from (0, 1] to about 1."""
    if x.shape[1] > x.shape[2]:                        # the smaller square is cheaper
        return orthogonal(x.mT).mT
    x = torch.nn.functional.normalize(x, dim=(1, 2), eps=1e-7)
    for _ in range(5):
        square = x @ x.mT
        change = torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, change, x, beta=3.4445)
    return x


@torch.no_grad()
def update_average(average, model, step, c, device):
    """Moves the averaged weights, if there are any, on to those of the model. They forget the first
    ones faster, as these are worth little (the reference's start from random ones)."""
    if average is not model:
        weight = device.number(1 - min(c.optim.ema_decay, (1 + step) / (10 + step)))
        ours, theirs = list(average.parameters()), list(model.parameters())
        torch._foreach_lerp_(ours, theirs, [weight] * len(ours))
        for ours, theirs in zip(average.buffers(), model.buffers()):
            ours.copy_(theirs)


def evaluate_run(model, c, device, step, done):
    """Metrics on held-out data, and pictures of predictions in a folder in the run's."""
    model, device = device.host(model)
    metrics, _ = evaluate(
        model, c, "val", device,
        workers=worker_count(c), limit=0 if done or c.run.target else c.run.eval_images)
    if device.first and c.run.pictures:
        sample.show(
            model, c, c.data.tasks,
            sample.SampleOptions(count=c.run.pictures, out=f"{c.run.out}/step_{step:07d}"),
            device.generator(0))
    return metrics


# --------------------------------------------------------------------------------------------------
# checkpoints of a run

def save_run(name, c, device, step, best, model, average, optimizer=None):
    """Writes a checkpoint (see model.save) into the run's folder, on the first process."""
    if not device.first:
        return
    content = {
        "network": type(model).__name__,
        "config": asdict(c),
        "step": step,
        "best": best,
        "model": model.state_dict(),
    }
    if average is not model:
        content["ema"] = average.state_dict()
    if optimizer:
        content |= {"optimizer": optimizer.state_dict(), "scaler": device.scaler.state_dict()}
    save(f"{c.run.out}/{name}", content)


def resume(c, device, model, average, optimizer):
    """Goes on from the run's last.pt if there is one. Returns (step, best score). UserError,
    naming what differs, if it is of another run: only `sampling` and `run` may change, and `steps`
    grow."""
    path = f"{c.run.out}/last.pt"
    if not exists(path):
        return 0, -math.inf
    try:
        saved = load(path)
    except UserError as e:
        raise UserError(
            f"{e}; --fresh starts again, --init_from={c.run.out}/best.pt from its weights") from e
    then, now = facts(saved["config"]), facts(asdict(c))
    if now["steps"] > then["steps"]:
        device.say(
            f"{path} is of a run of {then['steps']} steps: the learning rate goes on as if it had "
            f"been one of {now['steps']}")
        then["steps"] = now["steps"]
    changed = [f"{key}: {then.get(key)} there, {value} here"
               for key, value in now.items() if then.get(key, value) != value]
    require(
        not changed,
        f"{path} is of another run ({'; '.join(changed)}): expected another --out, or --fresh")
    load_weights(model, saved["model"])
    try:
        optimizer.load_state_dict(saved["optimizer"])
    except KeyError as e:
        raise UserError(
            f"{path}: was begun with another version of {c.optim.optimizer}, which kept no {e}: "
            f"--init_from={c.run.out}/best.pt starts from its weights") from e
    if scaler := saved.get("scaler"):
        device.scaler.load_state_dict(scaler)
    if average is not model:
        load_weights(average, saved["ema"])
    return saved["step"], saved["best"]


def facts(config):
    """What makes a nested dict of a Config this run and no other, by name."""
    found = {}
    for part in "optim", "diffusion", "data", "vocab", "model":
        found |= config[part]
    return found | {
        "classes": ", ".join(f"{row['label']} {row['name']}" for row in config["categories"])}


def start_from(path, model, c, device):
    """Fills a model with the weights of another run, and says what was adapted. UserError, naming
    everything, if they do not fit and c.optim.adapt is not given."""
    donor, there = sample.read_model(sample.find_checkpoint(path))
    require(
        type(donor) is type(model),
        f"{path} holds a {type(donor).__name__}, not a {type(model).__name__}")
    for name, value in vars(there.vocab).items():
        require(
            name == "pieces" or value == getattr(c.vocab, name),
            f"{path} has {name} {value}, not {getattr(c.vocab, name)}")
    then, now = ({category["label"]: category["name"] for category in config.categories}
                 for config in (there, c))
    # A class that the checkpoint knows by its number alone may be called anything.
    changed = [label for label, name in now.items() if then.get(label) not in (name, str(label))]
    if changed and not c.optim.adapt:
        label = changed[0]
        raise UserError(
            f"{path} has other classes: label {label} is {then.get(label)!r} there, {now[label]!r} "
            f"here ({len(changed)} differ); --adapt starts the tokens of those afresh")
    grid = getattr(getattr(donor, "encoder", None), "grid", None)      # of learned positions
    weights, notes = adapt_weights(donor.state_dict(), model, c.optim.adapt, grid)
    if changed:
        notes.append(f"{len(changed)} of {len(now)} classes differ, their tokens start afresh")
        rows = [tokenizer.CLASS_SHIFT + label for label in changed]
        for name in weights.keys() & {"decoder.embed", "decoder.unembed", "decoder.bias"}:
            weights[name][rows] = model.state_dict()[name][rows]
    load_weights(model, weights)
    for note in notes:
        device.say(f"adapted: {note}")
    device.say(f"started from {path}")


# --------------------------------------------------------------------------------------------------
# the log

QUOTED = "AP50", "exact", "class_accuracy"              # what a target is about


class Log:
    """Lines for people on standard output, for programs in log.jsonl, for TensorBoard if it is
    installed; and what ends a run."""

    def __init__(self, c, device, model, start):
        self.c, self.device, self.losses, self.warned = c, device, {}, set()
        self.path, self.board, self.wandb = f"{c.run.out}/log.jsonl", None, None
        self.born, self.reached = time(), None
        self.restart(start)
        device.say(
            f"{c.run.out}: {count_parameters(model):,} parameters, {c.optim.steps} steps of "
            f"{sum(batch_sizes(c))} images, on {device.world} x {device.name}"
            + (f", going on from step {start}; a larger --steps goes further" if start else ""))
        self.bar = tqdm(
            total=c.optim.steps, initial=start, disable=device.quiet, dynamic_ncols=True)
        if not device.first:
            return
        if exists(self.path):                  # forget what came after the last checkpoint
            kept = []
            for entry in read_log(c.run.out):
                # An evaluation at `start` is made again.
                if (entry.get("step", start), "lr" not in entry) <= (start, False):
                    kept.append(json.dumps(entry) + "\n")
            with open(self.path, "w") as f:
                f.writelines(kept)
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(c.run.out, purge_step=start + 1)
        if c.run.wandb:
            wandb = tokenizer.optional("wandb", "wandb", "--wandb")
            self.wandb = wandb.init(project="nano-pix2seq", name=c.run.out, config=asdict(c))

    def restart(self, step):
        """Begins a span of steps to be timed."""
        self.began, self.since, self.images = time(), step, 0

    def write(self, step, values, shown):
        """Writes {name: number}, for people only those whose names are `shown`."""
        if not self.device.first:
            return
        with open(self.path, "a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        self.device.say(
            f"step {step:>7} " + " ".join(f"{key} {values[key]:.4g}" for key in shown))
        if self.wandb:
            self.wandb.log(values, step)
        for key, value in values.items() if self.board else ():
            if isinstance(value, float):
                self.board.add_scalar(key, value, step)

    def step(self, step, losses, lr, norm, parts):
        """One step is done; every log_every-th is written."""
        self.losses = losses
        for _, batch in parts:
            self.images += len(batch.weights) * self.device.world
            for message in set(batch.skipped) - self.warned:
                self.warned.add(message)
                self.device.say(f"warning: left out, {len(self.warned)} so far: {message}")
        self.bar.update()
        if step % self.c.run.log_every:
            return
        losses = self.check_finite()
        values = {"loss": sum(losses.values())}
        if len(self.c.data.tasks) > 1:
            values |= {f"loss_{task}": loss for task, loss in losses.items()}
        seconds = time() - self.began
        values |= {
            "lr": lr,
            "grad_norm": norm.item(),
            "ms": 1000 * seconds / (step - self.since),
            "img_per_s": self.images / seconds,
            "memory_gb": self.device.memory_gb(),
        }
        self.write(step, values, values)
        self.bar.set_postfix(loss=f"{values['loss']:.3f}")
        self.restart(step)

    def check_finite(self):
        """The last losses, for which it waits. UserError if one is not finite."""
        losses = {task: loss.item() for task, loss in self.losses.items()}
        require(
            math.isfinite(sum(losses.values())),
            f"the loss is {losses}; lower --lr or set --clip_norm; last.pt is from before it")
        return losses

    def evaluated(self, step, metrics):
        """Writes the metrics. Returns the mean of each task's first one, None if there are none."""
        self.restart(step)                             # evaluation is not training time
        if not metrics:
            return
        values, shown = {}, []
        for task, numbers in metrics.items():
            named = {f"{task}_{name}": value for name, value in numbers.items()}
            values |= named
            shown += [name for name, value in named.items() if isinstance(value, float)][:3]
        firsts = [next(iter(numbers.values())) for numbers in metrics.values()]
        score = None
        if -1 not in firsts:                           # else there was nothing to find
            score = values["score"] = sum(firsts) / len(firsts)
        self.write(step, values, shown)
        numbers = metrics[self.c.data.tasks[0]]
        for name in QUOTED:
            if 0 < self.c.run.target <= numbers.get(name, 0):
                self.reached, self.device.asked = metrics, True
                self.device.say(
                    f"{name} {numbers[name]:.3f} after {(time() - self.born) / 60:.2f} minutes")
        return score

    def stopped(self, step):
        """Says where the run stopped. Returns the metrics that reached the target, None if none
        did; on other processes than the first {}, as at the end."""
        self.bar.close()
        self.device.say(
            f"stopped at step {step}, saved in {self.c.run.out}/last.pt; the same command goes on")
        return self.reached if self.device.first else {}


def read_log(folder):
    """Yields the dicts in a run's log.jsonl, one per line; a line that holds none, or half of one,
    is passed over."""
    with open(f"{folder}/log.jsonl", errors="replace") as f:
        for line in f:
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    yield entry


def plot(folders):
    """Draws loss and score of runs by step, into curves.png in the first one's folder."""
    matplotlib = tokenizer.optional("matplotlib.figure", "matplotlib", "--plot")
    figure = matplotlib.Figure((12, 4))
    for name, axes in zip(("loss", "score"), figure.subplots(1, 2)):
        for folder in folders:
            points = [(row["step"], row[name]) for row in read_log(folder) if name in row]
            axes.plot(*zip(*points), ".-", label=folder)
        axes.set_title(f"{name} by step")
        axes.legend()
    figure.savefig(f"{folders[0]}/curves.png")
    print(f"{folders[0]}/curves.png")


# --------------------------------------------------------------------------------------------------
# presets

PRESETS = {}


class Recipe:
    """A subclass whose name is in lower case is a row of PRESETS: the fields, named as on the
    command line, in which it differs from the one it is derived from, or from Config's defaults.
    Its docstring says the recipe in words, and what it gave here, or is published. name: the row's,
    if not the class's.
    """
    config = Config()
    model = None                       # another network in place of the whole `config.model`

    def __init_subclass__(cls, name=None):
        name, fields = name or cls.__name__, vars(cls)
        c = replace(cls.config, model=fields.get("model", cls.config.model))
        unknown = set(fields).difference(vars(Recipe), *map(vars, sample.parts_of(c)))
        assert not unknown, f"preset {name}: no field is called {unknown}"
        cls.config = sample.changed(c, **fields)
        if name.islower():
            PRESETS[name] = cls


class Small(Recipe):
    """For two CPU cores: no processes that load data, and images as they are."""
    workers = 0
    flip = False


class Long(Recipe):
    """Runs of days."""
    log_every = 100
    eval_every = 10_000
    save_every = 2_000


# Drawn shapes, for two CPU cores: 64 bins for 64 px, four classes, captions in bytes.
class det_shapes(Small):
    """boxes of drawn shapes, 64 px
    AP50 0.98, AP 0.82 after 4.3 minutes, on test, three seeds"""
    image_size = 64, 64
    patch_size = 8
    enc_layers = dec_layers = 2
    enc_dim = dec_dim = 96
    enc_mlp = dec_mlp = 192
    enc_heads = dec_heads = 4
    drop_path = dropout = 0.0
    vocab_size = 432
    max_seq_len = 64
    bins = 64
    coord_shift = 110
    text_shift = 174
    max_objects = 8
    max_instances = 2
    max_points = 24
    caption_length = 48
    captions_per_image = 2
    scale_min = scale_max = 1.0
    instance_scale_min = 1.0
    caption_flip = False
    color_jitter = 0.0
    caption_pad_weight = 0.1
    cap_top_p = 0.4
    optimizer = "muon"
    steps = 1200
    warmup_steps = 50
    lr = 1e-2
    beta2 = 0.999
    eval_every = 300
    eval_images = 100


class det_shapes_fit(det_shapes):
    """the same boxes with a FIT as encoder
    AP50 0.97, AP 0.78 after 5.9 minutes, on test, three seeds"""
    encoder = "fit"
    fit_layers = "(1)1(1)1"
    fit_latents = 8
    fit_latent_dim = 96


class seg_shapes(det_shapes):
    """polygons of drawn shapes, 64 px
    not run here"""
    tasks = "seg",


class kpt_shapes(det_shapes):
    """keypoints of the figures of drawn shapes, 64 px
    not run here"""
    tasks = "kpt",


class cap_shapes(det_shapes):
    """captions of drawn shapes, 64 px
    not run here"""
    tasks = "cap",


class multi_shapes(det_shapes):
    """all four tasks at once on drawn scenes of one or two shapes, 64 px
    AP50 boxes 0.99, masks 0.91, keypoints 0.88, exact captions 0.81 after 10.5 minutes, on
    test, three seeds"""
    tasks = Pix2SeqConfig.TASKS                        # det, seg, kpt, cap
    task_batches = 32, 4, 24, 16
    task_weights = 2, 0.7, 1.75, 5.5
    task_starts = 0, 400, 400, 700                     # the others look where boxes taught to look
    max_shapes = 2
    max_objects = 6
    max_instances = 1
    caption_drop = 0.0
    seg_samples = 4
    steps = 1700
    eval_every = 0


# COCO and other photos.
class det_coco_tiny(Small):
    """boxes with a small ViT, 256 px, to overfit a few images
    AP 0.83 on 90 photos that it learned from, 0 on others, after some 26 minutes"""
    model = SIZES["vit_tiny"]
    image_size = 256, 256
    drop_path = dropout = 0.0
    data = "coco"
    bad_boxes = "drop"
    max_objects = 30
    scale_min = scale_max = 1.0
    steps = 4200
    warmup_steps = 400
    lr = 1e-3
    beta2 = 0.999
    batch_size = 16
    eval_every = 2100


class multi_coco_tiny(det_coco_tiny):
    """all four tasks with a small ViT, 256 px
    not run here"""
    tasks = Pix2SeqConfig.TASKS
    vocab_size = 3000 + 258
    max_instances = 3
    captions_per_image = 2
    batch_size = 4


class CocoFineTuning(Long):
    """As in 2109.10852; without another model that of vit_b, the default."""
    data = "coco"
    bad_boxes = "drop"
    epochs = 40
    warmup_epochs = 2
    eval_images = 1000


PUBLISHED_AP = {                                       # at 640, 1024 and 1333 px
    "vit_b": (44.2, 46.5, 47.1),
    "vit_l": (47.6, 49.2, 50.0),
    "resnet50": (39.1, 41.7, 42.6),
    "resnet50_c4": (44.7, 46.9, 47.3),
}
for size, published in PUBLISHED_AP.items():
    for side, ap in zip((640, 1024, 1333), published):
        class Published(CocoFineTuning, name=f"det_coco_{size}_{side}".removesuffix("_640")):
            __doc__ = (
                f"COCO fine-tuning of 2109.10852, {side} px; 8 GPUs\n"
                f"    not run here; published {ap} AP, from Objects365 weights")
            model = SIZES[size]
            image_size = side, side
            checkpointing = side > 640


class det_coco_fit_b(CocoFineTuning):
    """the same fine-tuning with a FIT as encoder (2305.12689; its sizes here are ours), 640 px
    not run here"""
    model = SIZES["fit_b"]


class det_o365_vit_b(CocoFineTuning):
    """Objects365 pretraining of 2109.10852, 640 px (learning rate and warm-up are ours); 32 GPUs
    not run here"""
    batch_size = 256
    epochs = warmup_epochs = 0
    steps = 400_000
    warmup_steps = 20_000
    lr = 1e-4


class multi_coco_vit_b(CocoFineTuning):
    """all four tasks of 2206.07669, 640 px; 32 GPUs
    not run here; published 44.2 box AP"""
    tasks = Pix2SeqConfig.TASKS
    vocab_size = 35_000
    lr = 1e-4
    epochs = 100
    warmup_epochs = 10
    batch_size = 128


class seg_coco_vit_b(multi_coco_vit_b):
    """masks alone, as in 2206.07669, 640 px; 8 GPUs
    not run here"""
    tasks = "seg",


class kpt_coco_vit_b(multi_coco_vit_b):
    """keypoints alone, as in 2206.07669, 640 px; 8 GPUs
    not run here"""
    tasks = "kpt",


class cap_coco_vit_b(multi_coco_vit_b):
    """captions alone, as in 2206.07669, 640 px; 8 GPUs
    not run here"""
    tasks = "cap",


# Generation, for two CPU cores.
class gen_shapes(Small):
    """drawn shapes of a class, 32 px, UNet
    0.985 of 200 samples classified right, on test, after 12.6 minutes on one core"""
    model = UNetConfig()
    num_classes = 4
    self_cond = "x"
    unet_dim = 32
    in_stride = 2
    multipliers = 1, 2
    res_blocks = 1, 1
    attention_at = 8,
    head_dim = 32
    tasks = "gen",
    label_drop = 0.1
    guidance = 1.0
    sample_steps = 50
    proxy_classifier = True
    pred_type = "x"
    low_noise_weight = 16.0                            # where outlines are drawn
    optimizer = "muon"
    steps = 1500
    warmup_steps = 200
    lr = 5e-3
    lr_schedule = "cosine"
    weight_decay = 0.0
    beta2 = 0.99
    clip_norm = 1.0
    ema_decay = 0.998
    val_count = 200
    pictures = 64


class gen_shapes_rin(gen_shapes):
    """the same with a RIN
    0.705 of 200 samples classified right, on test, three seeds; 15.0 to 16.0 minutes"""
    model = RINConfig()
    num_classes = 4
    interface_patch = 4
    interface_dim = 128
    interface_mlp_ratio = 4
    interface_position = "sin_cos_plus_learned"
    latents = 16
    latent_dim = 96
    latent_heads = 4
    latent_layers = 1, 1, 1, 1
    rw_heads = 4
    conv_kernel = 3
    drop_path = dropout = 0.0
    guidance = 5.0                                     # less of it: fewer of the class, but nearer
    self_cond_rate = 0.0                               # its norm stays 0: no use in sampling either
    steps = 1900
    warmup_steps = 100
    sample_steps = 25


class bits_shapes(gen_shapes):
    """drawn shapes as analog bits (2208.04202), 16 px
    0.845 of 200 samples classified right, on test, after 12.1 minutes on one core"""
    sample_size = 16, 16
    in_stride = 1
    channels = 24                                      # 3 colours of 8 bits
    bits = "uint8"
    low_noise_weight = 1.0                             # bits are right there without it
    steps = 1200


class video_shapes(gen_shapes):
    """six frames of a moving shape after two context frames, 32 px, UNet
    frame_error 0.0080, copy_error 0.0183 after 13.2 minutes, on test, three seeds"""
    num_classes = 0
    frames = 6
    cond_frames = 2
    self_cond = "none"
    guidance = 0.0
    proxy_classifier = False
    b_scale = 0.1                                      # much noise: what follows must be foreseen
    low_noise_weight = 1.0
    batch_size = 16
    steps = 3500
    sample_steps = 10


class gen_mnist(gen_shapes):
    """digits of a class, 28 px; --data_dir holds MNIST's idx files
    0.990 of 200 samples classified right after 8.6 minutes on one core"""
    sample_size = 28, 28
    channels = image_channels = 1
    num_classes = 10
    attention_at = 7,
    data = "mnist"
    steps = 1200


class gen_shapes_fit(gen_shapes_rin):
    """drawn shapes of a class, 32 px, FIT
    0.555 of 200 samples classified right, on test, three seeds; some 14 minutes"""
    model = FITConfig()
    sample_size = 32, 32
    num_classes = 4
    fit_layers = "(1)1(1)1(1)1(1)"
    fit_patch = 2
    fit_dim = 64
    fit_heads = 2
    fit_latents = 4
    fit_latent_dim = 128
    fit_latent_heads = 4
    fit_position = "sin_cos"                           # learned ones begin too small to be seen
    steps = 1100


class ar_shapes(gen_shapes):
    """drawn shapes of a class written pixel by pixel, 16 px, 8 levels a colour, FIT
    0.165 bits per dimension after 11.3 minutes, on test, one seed"""
    model = ImageARConfig()
    sample_size = 16, 16
    levels = 8
    num_classes = 4
    fit_layers = "(2)1(2)1(1)"
    fit_patch = 4
    fit_dim = 96
    fit_heads = 4
    fit_latents = 6
    fit_latent_dim = 128
    fit_latent_heads = 4
    fit_mlp_ratio = 2
    tasks = "ar",
    lr_schedule = "linear"
    clip_norm = 0.0
    ema_decay = 0.0
    batch_size = 16
    steps = 650
    warmup_steps = 100


class ar_shapes_decoder(ar_shapes):
    """the same with a plain decoder of that size, for that time: one group, no latents
    0.217 bits per dimension, on test, one seed"""
    fit_layers = "(6)"
    fit_dim = 128
    fit_patch = 0
    steps = 350


class ar_mnist(ar_shapes):
    """digits of a class written pixel by pixel, 28 px, FIT; --data_dir holds MNIST's idx files
    not run here"""
    sample_size = 28, 28
    channels = image_channels = 1
    num_classes = 10
    fit_patch = 7
    data = "mnist"


# Panoptic masks, for two CPU cores.
class pan_shapes(gen_shapes):
    """panoptic masks of drawn scenes, 64 px
    PQ 0.71 after some 10 minutes, on test, three seeds"""
    model = PanopticConfig()
    image_size = 64, 64
    encoder = "vit"
    patch_size = 4
    enc_layers = 2
    enc_dim = 96
    enc_mlp = 192
    enc_heads = 4
    drop_path = dropout = 0.0
    channels = 6
    fuse_dim = 32
    unet_dim = 32
    multipliers = 1, 2
    res_blocks = 1, 1
    transformer_layers = 1
    transformer_dim = 64
    head_dim = 32
    tasks = "pan",
    bits = "ids"
    normalize_input = True
    b_scale = 0.4
    pred_type = "x_softmax_xent"
    max_segments = 8
    scale_min = scale_max = 1.0
    color_jitter = 0.0
    guidance = 0.0
    sample_steps = 20
    td = 2.0
    min_pixels = 4
    split_pixels = 64
    batch_size = 16
    low_noise_weight = 4.0
    pictures = 8


class vps_shapes(pan_shapes):
    """panoptic masks of clips in which drawn shapes cross, leave and return, 64 px
    STQ 0.66, J&F 0.63 after 17.5 minutes, on test, three seeds"""
    tasks = "vps",
    past_frames = 2
    later_steps = 5
    steps = 2000
    val_count = 60


class pan_coco_tiny(pan_shapes):
    """panoptic masks, 256 px, to overfit a few images
    PQ 0.61 on two images of COCO that it learned from, after 10.4 minutes"""
    image_size = 256, 256
    patch_size = 16
    sample_size = 128, 128
    in_stride = 2
    channels = 16
    softmax_groups = 0
    pred_type = "x"
    data = "coco"
    max_segments = 101
    random_ids = False                                 # else minutes are not enough
    min_pixels = 200                                   # eight of a mask
    split_pixels = 0
    low_noise_weight = 1.0
    batch_size = 2


# Panoptic masks as published, in two stages; 32 GPUs.
class pan_coco_256(Long):
    """panoptic masks of COCO (2210.06366), 256 px, masks of 128 px: the first stage; 32 GPUs
    not run here"""
    model = PanopticConfig()
    image_size = 256, 256
    sample_size = 128, 128
    time_scaling = 1.0
    tasks = "pan",
    data = "coco"
    bits = "ids"
    b_scale = 0.1
    pred_type = "x_softmax_xent"
    self_cond_rate = 0.0
    max_segments = 101
    scale_max = 3.0
    scale_min = 1.0
    color_jitter = 1.0
    sample_steps = 20
    td = 1.0
    lr = 1e-4
    end_lr_factor = 0.1
    beta2 = 0.999
    clip_norm = 1.0
    ema_decay = 0.999
    batch_size = 512
    epochs = 800
    warmup_epochs = 5


class pan_coco_1024(pan_coco_256):
    """the same with 1024 px, masks of 512 px: the second stage, --init_from the first; 16 GPUs
    not run here; published PQ 50.3"""
    image_size = 1024, 1024
    sample_size = 512, 512
    scale_max = 1.0
    color_jitter = 0.0
    lr = 1e-5
    batch_size = 16
    epochs = 15
    warmup_epochs = 0


class pan_cityscapes(pan_coco_1024):
    """Cityscapes, 1024 x 2048 px, in COCO's panoptic format, --init_from pan_coco_256; 16 GPUs
    not run here; published PQ 64.0"""
    image_size = 1024, 2048
    sample_size = 512, 1024
    epochs = 50


class vps_kitti_step(pan_coco_1024):
    """KITTI-STEP, 384 x 1248 px, --init_from pan_coco_1024; 32 GPUs
    not run here"""
    tasks = "vps",
    data = "kitti_step"
    image_size = 384, 1248
    sample_size = 192, 624
    past_frames = 2
    max_segments = 256
    end_lr_factor = 1.0
    ema_decay = 0.99
    batch_size = 32
    epochs = 0
    steps = 50_000


class vps_davis(vps_kitti_step):
    """DAVIS 2017, unsupervised, 512 x 1024 px, --init_from pan_coco_1024; 32 GPUs
    not run here; published J&F 68.4"""
    data = "davis"
    image_size = 512, 1024
    sample_size = 256, 512
    max_segments = 16


# Generation as published. LAMB leaves biases and norms without decay and scaling.
class gen_cifar10_unet(Long):
    """CIFAR-10 UNet of the reference; 8 GPUs
    not run here"""
    model = UNetConfig()
    num_classes = 10
    self_cond = "eps"
    unet_dropout = 0.3
    tasks = "gen",
    data = "cifar10"
    sampler = "ddpm"
    weight_decay = 0.0
    lr = 1e-4
    lr_schedule = "none"
    beta2 = 0.999
    clip_norm = 1.0
    ema_decay = 0.9999
    batch_size = 128
    warmup_steps = 10_000
    steps = 1_000_000
    pictures = 64


class gen_cifar10_rin(gen_cifar10_unet):
    """CIFAR-10 RIN of 2212.11972; 8 GPUs
    not run here; published FID 1.81"""
    model = RINConfig()
    num_classes = 10
    train_schedule = "sigmoid@-3,3,0.9"
    self_cond_rate = 0.9
    self_cond_masking = True
    sample_steps = 400
    optimizer = "lamb"
    no_decay = "bias|norm"
    weight_decay = 0.01
    lr = 3e-3
    lr_schedule = "cosine@0.8"
    end_lr_factor = 0.0
    clip_norm = 0.0
    batch_size = 256
    steps = 150_000


class bits_cifar10_uint8(gen_cifar10_unet):
    """CIFAR-10 Bit Diffusion of 2208.04202, code uint8; 8 GPUs
    not run here"""
    channels = 24
    self_cond = "x"
    softmax_groups = 3
    unet_dropout = 0.0
    bits = "uint8"
    b_scale = 0.5
    pred_type = "x_softmax_xent"
    steps = 1_500_000


class bits_cifar10_uint8_s(bits_cifar10_uint8):
    """CIFAR-10 Bit Diffusion of 2208.04202, code uint8_s; 8 GPUs
    not run here"""
    bits = "uint8_s"


class gen_imagenet64_unet(gen_cifar10_unet):
    """ImageNet 64 px UNet of the reference; --data_dir holds train/CLASS and val/CLASS; 32 GPUs
    not run here"""
    sample_size = 64, 64
    num_classes = 1000
    unet_dim = 192
    multipliers = 1, 2, 3, 4
    res_blocks = 3, 3, 3, 3
    unet_dropout = 0.0
    data = "images"
    batch_size = 1024
    lr = 2e-4
    steps = 250_000


class gen_imagenet64_rin(gen_cifar10_rin):
    """ImageNet 64 px RIN of 2212.11972; 32 GPUs
    not run here"""
    sample_size = 64, 64
    num_classes = 1000
    interface_patch = 8
    interface_dim = 512
    interface_mlp_ratio = 4
    latent_layers = 4, 4, 4, 4
    latent_dim = 768
    rw_heads = 16
    drop_path = dropout = 0.0
    data = "images"
    train_schedule = "simple_linear"
    sample_steps = 1000
    lr = 2e-3
    lr_schedule = "cosine@0.7"
    batch_size = 1024


class gen_imagenet64_fit(gen_imagenet64_rin):
    """ImageNet 64 px with a FIT (2305.12689; sizes ours, recipe of the RIN); 32 GPUs
    not run here"""
    model = FITConfig()
    num_classes = 1000


class gen_imagenet128_fit(gen_imagenet64_fit):
    """the same with 128 px
    not run here"""
    sample_size = 128, 128
    fit_patch = 8


class ar_imagenet64_fit(gen_imagenet64_rin):
    """ImageNet 64 px written value by value with a FIT (2305.12689; sizes ours); 32 GPUs
    not run here"""
    model = ImageARConfig()
    num_classes = 1000
    tasks = "ar",
    optimizer = "adamw"
    lr = 1e-3


class gen_video64_rin(gen_imagenet64_rin):
    """11 frames of 64 px after 5, sizes of 2212.11972 (Kinetics-600), optimisation ours; 32 GPUs
    not run here"""
    frames = 11
    cond_frames = 5
    num_classes = 0
    latent_layers = 6 * (4,)
    latents = 256
    data = "videos"
    flip = False
    train_schedule = "cosine"
    sample_steps = 400
    lr = 1e-3
    batch_size = 256


# --------------------------------------------------------------------------------------------------
# command line

@frozen
class Commands:
    """What is asked for in place of training."""
    list: bool = False                  # show the presets
    plot: tuple = ()                    # draw the curves of the runs in these folders
    bench: bool = False                 # measure the speed of this machine
    json: bool = False                  # of --bench: its rows, in a last line
    against: str = ""                   # of --bench: beside that of the checkout in this folder


def parse(argv):
    """Command line -> (Config, Commands). The preset stands first, or is det_shapes."""
    if not argv or argv[0].startswith("-"):
        argv = "det_shapes", *argv
    name, *argv = argv
    parser = sample.Parser(usage="train.py [PRESET] [--OPTION=VALUE ...]", description=__doc__)
    parser.add_argument("--plot", nargs="+", metavar="RUN", help="draw the curves of these folders")
    if name not in PRESETS:
        parser.error(f"unknown preset {name!r}{sample.nearest(name, PRESETS)}")
    c = PRESETS[name].config
    parts = sample.parts_of(c)
    parts.remove(c.diffusion if isinstance(c.model, Pix2SeqConfig) else c.vocab)
    parser.add_config(Commands(), *parts, without=("plot",))
    args = parser.parse(argv)
    try:
        c = sample.apply(c, args)
    except UserError as e:
        parser.error(str(e))
    c = sample.changed(c, out=c.run.out or f"out/{name}")
    return c, sample.given(Commands(), vars(args))


@tokenizer.script
def main():
    c, commands = parse(sys.argv[1:])
    if commands.list:
        for name, row in PRESETS.items():
            print(f"{name}\n    {row.__doc__}")
        return
    if commands.plot:
        return plot(commands.plot)
    Device.launch(c.run.device, partial(start, c, commands))


def start(c, commands, _):
    """What this process does of what the command line asks for."""
    began = time()
    try:
        if commands.against:
            return bench_against(commands.against)
        if commands.bench:
            rows = bench(c)
            if commands.json:
                print(json.dumps(rows))
            return
        metrics = train(c)
    finally:
        Device.close()
    if metrics is None:
        sys.exit(130)
    for task, numbers in metrics.items():
        shown = [f"{name} {x:.3f}" for name, x in numbers.items() if isinstance(x, float)]
        print(f"{task}: {', '.join(shown[:4])}")
    if metrics:
        print(
            f"{(time() - began) / 60:.1f} minutes\n"
            f"checkpoints {c.run.out}/best.pt and last.pt, pictures step_*/, log.jsonl\n"
            f"next: python sample.py --ckpt={c.run.out}")


def bench(c):
    """Prints median times of training and of prediction on this machine, how much of the speed of a
    large matrix product training has, memory, and how often something was compiled meanwhile."""
    device = Device(c.run.device, c.run.dtype, c.run.compile)
    c, streams = prepare(c, device)
    c = sample.changed(c, steps=10 ** 6, task_starts=())       # batches must not run out
    model = make_model(c, device)
    optimizer = make_optimizer(model.named_parameters(), c.optim, device.fused)
    forward = device.wrap(model)
    batches, images = batches_from(0, streams, c, device), sum(batch_sizes(c))
    rows = {}

    def loss():
        with device.autocast():
            return sum(LOSS[task](forward, batch.to(device.device), c) for task, batch in parts)

    def backward():
        device.scaler.scale(loss()).backward()
        device.sync()

    def step():
        backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        device.step(optimizer)
        device.sync()

    def measure(name, work, count=images, unit="images"):
        work()
        before = device.compilations()
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        median = timer.blocked_autorange(min_run_time=2.0).median
        row = rows[name] = {
            "ms": 1000 * median,
            "per_second": count / median,
            "compilations": device.compilations() - before,
        }
        device.say(
            f"{name:12}{row['ms']:10.1f} ms{row['per_second']:14.1f} {unit} per second, "
            f"{row['compilations']} compilations")
        return median

    device.say(f"{images} images per step on {device.world} x {device.name}, {device.dtype}")
    measure("data", partial(next, batches))
    parts = next(batches)
    model.train()
    with torch.no_grad():
        measure("forward", loss)
    measure("backward", backward)                      # and forward
    seconds = measure("step", step)
    memory = device.memory_gb()
    square = torch.rand(4096, 4096, device=device.device, dtype=device.dtype)
    peak = 2 * 4096 ** 3 / measure("matmul", lambda: square @ square, 1, "products")
    device.cast(model.eval())
    with torch.no_grad(), device.autocast():
        BENCH[c.data.tasks[0]](model, c, device, measure)
    forward = model                                    # DDP does not know the cast
    with FlopCounterMode(display=False) as flops:      # last, as it ends what compile did
        backward()
    speed = flops.get_total_flops() / seconds
    device.say(
        f"step: {speed / 1e9:.0f} GFLOPS, {speed / peak:.0%} of a large product's; peak memory "
        f"{memory:.1f} GiB")
    return rows


def bench_sequences(model, c, device, measure):
    """Time to encode an image, to write one long sequence about it, and the polygons of 16 objects,
    none of which ends."""
    image = torch.rand(1, 3, *c.model.image_size, device=device.device)
    measure("encode", partial(model.encode, image), 1)
    generate = partial(model.generate, model.encode(image))
    prompts = torch.full((1, 16, 6), 10, device=device.device)
    length, s = 5 * c.data.max_objects, c.sampling
    measure("decode", partial(generate, prompts[:, 0, :1], length, top_p=s.top_p), length, "tokens")
    measure(
        "16 objects",
        partial(generate, prompts, 2 * c.data.max_points, samples=s.seg_samples, top_p=s.seg_top_p),
        16 * s.seg_samples, "polygons")


def bench_samples(model, c, device, measure):
    inputs = sample.Inputs(list(sample.sample_records(c, 1)), c)
    measure("sample", partial(sample.PREDICT[c.data.tasks[0]], model, inputs, c), 1)


def bench_against(folder):
    """Runs --bench here and in another checkout in turn, three times, with the other options of the
    command line, and prints medians. UserError if one fails, which has said why."""
    times = {}
    ours = "--bench", "--json", "--against", folder, f"--against={folder}"
    options = [text for text in sys.argv[1:] if text not in ours]
    for n, script in enumerate(3 * (f"{folder}/train.py", __file__)):
        done = subprocess.run(
            [sys.executable, script, *options, "--bench"], stdout=subprocess.PIPE, text=True)
        require(not done.returncode, f"{script}: --bench failed, exit code {done.returncode}")
        for name, ms in re.findall(r"^(.+?) +([\d.]+) ms", done.stdout, re.M):
            times.setdefault(name, ([], []))[n % 2].append(float(ms))
    print(f"{'':12}{'there':>10}{'here':>10}  times as fast")
    for name, both in times.items():
        if all(both):
            there, here = map(statistics.median, both)
            print(f"{name:12}{there:10.1f}{here:10.1f}{there / here:10.2f}")


BENCH = dict.fromkeys(LOSS, bench_samples) | dict.fromkeys(Pix2SeqConfig.TASKS, bench_sequences)


if __name__ == "__main__":
    main()
