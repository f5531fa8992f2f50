"""The networks: an image encoder with an autoregressive decoder that writes token sequences about the image, and the
denoisers of diffusion, RIN and UNet.

Papers: Pix2Seq (arXiv 2109.10852), its multi-task form (2206.07669), ViT (2010.11929), ResNet (1512.03385), RIN (2212.11972),
UNet as in Bit Diffusion (2208.04202) and Pix2Seq-D (2210.06366).
Images are (B, 3, H, W) float in [0, 1]; a decoder reads and writes (B, T) or, with G sequences about each image,
(B, G, T) integer tokens; a denoiser reads and writes (B, C, H, W), of a video (B, C, T, H, W), in the range of its data.
One attention, one MLP and one layer serve every network in this file.
Left out: the training (train.py), what the tokens mean (tokenizer.py), noise and sampling (diffusion.py).

    python model.py                                     # named sizes: parameters and FLOPs
    python model.py --convert DIR coco.pt --image_size=640 --categories instances_val2017.json     # released weights -> ours
    python -c "import model; print(model.Pix2Seq(model.SIZES['vit_b']))"
"""
import argparse
import glob
import json
import math
import os
import re
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------
# positions

def sincos(coords, dim):
    """Coordinates (...) -> their codes (..., dim): all sines, then all cosines."""
    i = torch.arange(dim, device=coords.device)
    angles = coords[..., None] / 10000 ** (2 * (i // 2) / dim)                 # (..., dim)
    return torch.cat([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1)


def sincos_1d(n, dim, maximum=2 * math.pi):
    """(n, dim) float32 code of n coordinates spread evenly over [0, maximum]."""
    return sincos(torch.arange(n, dtype=torch.float32) / max(n - 1, 1) * maximum, dim)


def sincos_2d(rows, cols, dim, maximum=2 * math.pi):
    """(rows * cols, dim) float32: the first half of the width codes the row, the second the column."""
    if rows == 1 or cols == 1:
        return sincos_1d(rows * cols, dim, maximum)
    y = sincos_1d(rows, dim // 2, maximum)[:, None].expand(rows, cols, dim // 2)
    x = sincos_1d(cols, dim // 2, maximum)[None].expand(rows, cols, dim // 2)
    return torch.cat([y, x], -1).reshape(rows * cols, dim)


def embedding(*shape):
    """A table of truncated normal numbers of deviation 0.02, none beyond two."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02, a=-0.04, b=0.04))


class Position(nn.Module):
    """Adds a position code to (B, N, D) tokens, N = frames * rows * cols or less.
    kind: learned (a parameter), sin_cos (a constant) or sin_cos_plus_learned (their sum, the parameter zero at first)."""

    def __init__(self, kind, rows, cols, dim, maximum=2 * math.pi, frames=1):
        super().__init__()
        self.residual = nn.Parameter(torch.zeros(frames * rows * cols, dim)) if kind == "sin_cos_plus_learned" else None
        if kind == "learned":
            self.code = embedding(frames * rows * cols, dim)
        elif kind in ("sin_cos", "sin_cos_plus_learned"):
            code = sincos_2d(rows, cols, dim, maximum)
            # For several frames of sin_cos alone the reference repeats patch by patch, so its checkpoints expect that.
            code = code.repeat_interleave(frames, 0) if kind == "sin_cos" else code.repeat(frames, 1)
            self.register_buffer("code", code, persistent=False)
        else:
            raise ValueError(f"unknown position code {kind!r}, expected 'learned', 'sin_cos' or 'sin_cos_plus_learned'")

    def table(self):
        return self.code if self.residual is None else self.code + self.residual

    def forward(self, x, start=0):
        return x + self.table()[start:start + x.shape[1]]


# ---------------------------------------------------------------------------------------------------------------
# blocks

def layer_norm(dim):
    return nn.LayerNorm(dim, eps=1e-6)


class DropPath(nn.Module):
    """Leaves out a residual branch of some examples of the batch (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * (torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) < keep).to(x.dtype) / keep


class Attention(nn.Module):
    """Multi-head attention of x (B, T, dim) to keys and values that `project` made, of width att_dim in all heads."""

    def __init__(self, dim, heads, context_dim=None, att_dim=None, dropout=0.0):
        super().__init__()
        att_dim = att_dim or dim
        if heads < 1 or att_dim % heads:
            raise ValueError(f"attention width {att_dim} is not a multiple of its {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(dim, att_dim)
        self.kv = nn.Linear(context_dim or dim, 2 * att_dim)
        self.out = nn.Linear(att_dim, dim)

    def project(self, context):
        """(B, N, context_dim) -> keys and values, each (B, nh, N, hs)."""
        B, N, _ = context.shape
        return self.kv(context).view(B, N, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x, kv, causal=False):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.heads, -1).transpose(1, 2)               # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(q, *kv, is_causal=causal, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def weights(self, x, kv):
        """What `forward` weighs the values with, without causality: (B, nh, T, N), for looking at."""
        q = self.q(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)       # (B, nh, T, hs)
        return (q @ kv[0].transpose(2, 3) / math.sqrt(q.shape[3])).softmax(-1)


class MLP(nn.Module):
    """Pre-norm residual MLP of one hidden layer, exact GELU."""

    def __init__(self, dim, hidden, drop_path=0.0, dropout=0.0):
        super().__init__()
        self.norm, self.fc1, self.fc2 = layer_norm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)

    def forward(self, x):
        return x + self.drop_path(self.fc2(self.dropout(F.gelu(self.fc1(self.norm(x))))))


class KVCache:
    """Keys and values of one decoder layer: those of the image, and those of the tokens written so far."""

    def __init__(self, layer, context, sequences, length):
        self.context = layer.cross_att.project(layer.context_norm(context))
        heads, hs = self.context[0].shape[1], self.context[0].shape[3]
        self.written = self.context[0].new_zeros(2, sequences, heads, length, hs)
        self.length = 0

    def append(self, kv):
        """Keys and values of new tokens, each (S, nh, T, hs) -> those of all tokens up to now."""
        start, self.length = self.length, self.length + kv[0].shape[2]
        self.written[0, :, :, start:self.length], self.written[1, :, :, start:self.length] = kv
        return self.written[0, :, :, :self.length], self.written[1, :, :, :self.length]


class Layer(nn.Module):
    """A transformer layer: self-attention, cross-attention if it has a context, an MLP if mlp_dim; each pre-norm.
    att_dim: width of the cross-attention (default: dim). context_norm: a LayerNorm on the context, too."""

    def __init__(self, dim, mlp_dim, heads, context_dim=None, causal=False, drop_path=0.0, dropout=0.0, att_dropout=0.0,
                 self_attention=True, att_dim=None, context_norm=False):
        super().__init__()
        self.causal = causal
        if self_attention:
            self.self_norm, self.self_att = layer_norm(dim), Attention(dim, heads, dropout=att_dropout)
        if context_dim:
            self.cross_norm = layer_norm(dim)
            self.context_norm = layer_norm(context_dim) if context_norm else nn.Identity()
            self.cross_att = Attention(dim, heads, context_dim, att_dim, dropout=att_dropout)
        self.mlp = MLP(dim, mlp_dim, drop_path, dropout) if mlp_dim else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x, context=None, cache=None):
        """x: (S, T, dim). context: (B, N, context_dim), S a multiple of B: S / B sequences about each image."""
        if hasattr(self, "self_att"):
            y = self.self_norm(x)
            kv = self.self_att.project(y)
            if cache is not None:
                kv = cache.append(kv)
            x = x + self.drop_path(self.self_att(y, kv, causal=self.causal and x.shape[1] > 1))
        if hasattr(self, "cross_att"):
            kv = self.cross_att.project(self.context_norm(context)) if cache is None else cache.context
            # Nothing is masked here, so the sequences about an image are just more queries: no copy of its keys.
            y = self.cross_norm(x).view(kv[0].shape[0], -1, x.shape[2])        # (B, S/B * T, dim)
            x = x + self.drop_path(self.cross_att(y, kv).view(x.shape))
        return self.mlp(x)


def run_layers(layers, x, *args, checkpointing=False):
    """x through all layers; with `checkpointing` their activations are computed again in the backward pass."""
    for layer in layers:
        x = checkpoint(layer, x, *args, use_reentrant=False) if checkpointing else layer(x, *args)
    return x


def starts_at_zero(layer):
    """Marks a layer for `initialize`: its weights start at zero, so that what it adds starts as nothing."""
    layer.zero_at_start = True
    return layer


def initialize(name, module):
    """Glorot-uniform dense and convolution weights, zero biases; embeddings keep their truncated normal (std 0.02)."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        for weight in module.weight.chunk(2) if name.endswith(".kv") else [module.weight]:
            nn.init.xavier_uniform_(weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):            # a ResNet's: truncated normal of variance 1 / inputs
            std = math.prod(module.weight.shape[1:]) ** -0.5
            edge = 2 * std / 0.87962566                # cut at two deviations, made wider so that `std` is what remains
            nn.init.trunc_normal_(module.weight, std=edge / 2, a=-edge, b=edge)
    if hasattr(module, "zero_at_start"):
        nn.init.zeros_(module.weight)


# ---------------------------------------------------------------------------------------------------------------
# ResNet

class ConvNorm(nn.Module):
    """Convolution without bias, then batch norm. Padding is the same on both sides, whatever the stride."""

    def __init__(self, inputs, outputs, kernel, stride=1, dilation=1, scale=1.0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-5, momentum=0.1)
        nn.init.constant_(self.norm.weight, scale)

    def forward(self, x):
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions, the stride in the 3x3 (1512.03385, v1); at first the identity."""

    def __init__(self, inputs, width, stride=1, dilation=1, shortcut=False):
        super().__init__()
        self.convs = nn.ModuleList([ConvNorm(inputs, width, 1), ConvNorm(width, width, 3, stride, dilation),
                                    ConvNorm(width, 4 * width, 1, scale=0.0)])
        self.shortcut = ConvNorm(inputs, 4 * width, 1, stride) if shortcut else nn.Identity()

    def forward(self, x):
        reduce, conv, expand = self.convs
        return F.relu(expand(F.relu(conv(F.relu(reduce(x))))) + self.shortcut(x))


RESNET_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}     # depth: bottlenecks in each stage
RESNET_STRIDES = {"standard": (1, 2, 2, 2), "c4": (1, 2, 2), "c3": (2, 2), "dc5": (1, 2, 2, 1)}    # of each stage


def resnet_cell(variant):
    """Side of a cell of the last feature map, in pixels."""
    return (2 if variant == "c3" else 4) * math.prod(RESNET_STRIDES[variant])


class ResNet(nn.Module):
    """Images (B, 3, H, W) -> list of the feature maps of all stages, finest first, (B, 256 * width * 2^i, H_i, W_i).

    With `freeze`, batch norm uses and keeps the statistics, scales and offsets it was loaded with. If it is trained by
    several processes, each norms by its own images, unless `nn.SyncBatchNorm.convert_sync_batchnorm(model)` (on GPUs only)
    shares the statistics; names and weights stay what they are. The reference averages variances of n, torch of n - 1.
    """

    def __init__(self, variant, depth, width, freeze=False):
        super().__init__()
        for name, value, choices in (("resnet_variant", variant, RESNET_STRIDES), ("resnet_depth", depth, RESNET_BLOCKS)):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(map(str, choices))}")
        self.freeze = freeze
        w = int(64 * width)
        if variant == "c3":
            self.stem = nn.ModuleList([ConvNorm(3, w // 2, 3), ConvNorm(w // 2, w // 2, 3), ConvNorm(w // 2, w, 3)])
        else:
            self.stem = nn.ModuleList([ConvNorm(3, w, 7, 2)])
        self.stages, self.channels = nn.ModuleList(), w
        for i, (stride, blocks) in enumerate(zip(RESNET_STRIDES[variant], RESNET_BLOCKS[depth])):
            dilation = 2 if variant == "dc5" and i == 3 else 1                 # not of the first block, as in the reference
            stage = [Bottleneck(self.channels, w << i, stride, shortcut=True)]
            stage += [Bottleneck(4 * w << i, w << i, dilation=dilation) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*stage))
            self.channels = 4 * w << i
        for norm in self.norms() if freeze else ():
            norm.requires_grad_(False)

    def norms(self):
        return [m for m in self.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]

    def train(self, mode=True):
        super().train(mode)
        for norm in self.norms() if self.freeze else ():
            norm.eval()
        return self

    def forward(self, images):
        x = images
        for conv in self.stem:
            x = F.relu(conv(x))
        # Where a side is even, TensorFlow's 'SAME' pads only its end.
        x = F.max_pool2d(x, 3, 2, padding=(x.shape[2] % 2, x.shape[3] % 2), ceil_mode=True)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


# ---------------------------------------------------------------------------------------------------------------
# Pix2Seq: encoder, projection, decoder

@dataclass(frozen=True)
class Pix2SeqConfig:
    """Everything that fixes the shape of a Pix2Seq model."""
    image_size: tuple[int, int] = (640, 640)   # height and width of the padded image, in pixels
    encoder: str = "vit"                       # image encoder: vit or resnet, a transformer on patches or on a ResNet
    patch_size: int = 16                       # side of a ViT patch, in pixels
    resnet_variant: str = "standard"           # cells of 32 px: standard; of 16: c4 (stops early) or dc5 (dilated); of 8: c3
    resnet_depth: int = 50                     # layers of the whole ResNet: 50, 101 or 152
    resnet_width: float = 1.0                  # factor on the channels of the ResNet
    freeze_bn: bool = False                    # train neither statistics nor scales of the ResNet's batch norm
    enc_layers: int = 12                       # encoder: transformer layers
    enc_dim: int = 768                         # encoder: width
    enc_mlp: int = 3072                        # encoder: hidden width of an MLP
    enc_heads: int = 12                        # encoder: attention heads
    pos_encoding: str = "sin_cos"              # position of an image patch: sin_cos or learned
    cls_token: bool = False                    # prepend a learned token to the patches
    projection: str = "mlp"                    # encoder to decoder: linear, linear_p (+ position) or mlp (+ position, MLP)
    dec_layers: int = 6                        # decoder: transformer layers
    dec_dim: int = 512                         # decoder: width
    dec_mlp: int = 2048                        # decoder: hidden width of an MLP
    dec_heads: int = 16                        # decoder: attention heads
    pos_encoding_dec: str = "learned"          # position of a token in its sequence: sin_cos or learned
    vocab_size: int = 3000                     # tokens in the vocabulary
    max_seq_len: int = 512                     # longest sequence, prompt included
    shared_embedding: bool = True              # one matrix embeds tokens and scores them
    output_bias: bool = True                   # a bias on the scores of the tokens
    drop_path: float = 0.1                     # share of residual branches left out in training
    dropout: float = 0.1                       # share of MLP units left out in training
    att_dropout: float = 0.0                   # share of attention weights left out in training
    checkpointing: bool = False                # recompute activations in the backward pass: less memory, more time


SIZES = {
    "vit_tiny": Pix2SeqConfig(patch_size=32, enc_layers=4, enc_dim=128, enc_mlp=512, enc_heads=4,
                              dec_layers=2, dec_dim=128, dec_mlp=512, dec_heads=4),
    "resnet50": Pix2SeqConfig(encoder="resnet", enc_layers=6, enc_dim=256, enc_mlp=1024, enc_heads=8,
                              dec_layers=6, dec_dim=256, dec_mlp=1024, dec_heads=8),
    "resnet50_c4": Pix2SeqConfig(encoder="resnet", resnet_variant="c4", enc_layers=12, enc_dim=512, enc_mlp=2048, enc_heads=16,
                                 dec_layers=8),
    "vit_b": Pix2SeqConfig(),
    "vit_l": Pix2SeqConfig(enc_layers=24, enc_dim=1024, enc_mlp=4096, enc_heads=16, dec_layers=8),
}


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> tokens (B, N, enc_dim): a transformer over the cells of a grid, row by row, after a class token if
    there is one. A cell is a patch of pixels (encoder vit) or a place in the last feature map of a ResNet (resnet)."""

    def __init__(self, c):
        super().__init__()
        self.checkpointing = c.checkpointing
        if c.encoder == "vit":
            cell, self.resnet = c.patch_size, None
            self.patch = nn.Conv2d(3, c.enc_dim, c.patch_size, c.patch_size)
        elif c.encoder == "resnet":
            self.resnet = ResNet(c.resnet_variant, c.resnet_depth, c.resnet_width, c.freeze_bn)
            cell = resnet_cell(c.resnet_variant)
            self.patch, self.dropout = nn.Linear(self.resnet.channels, c.enc_dim), nn.Dropout(c.dropout)
        else:
            raise ValueError(f"unknown encoder {c.encoder!r}, expected one of vit, resnet")
        # As in the reference, pixels beyond the last whole patch are not looked at (13 of 1333), but a ResNet sees all.
        self.grid = tuple(-(-side // cell) if self.resnet else side // cell for side in c.image_size)
        if 0 in self.grid:
            raise ValueError(f"image_size {c.image_size} is smaller than patch_size {c.patch_size}")
        self.patch_norm = layer_norm(c.enc_dim)
        self.position = Position(c.pos_encoding, *self.grid, c.enc_dim)
        self.cls = embedding(1, c.enc_dim) if c.cls_token else None
        self.layers = nn.ModuleList(Layer(c.enc_dim, c.enc_mlp, c.enc_heads, drop_path=c.drop_path, dropout=c.dropout,
                                          att_dropout=c.att_dropout) for _ in range(c.enc_layers))
        self.norm = layer_norm(c.enc_dim)

    def forward(self, images):
        """Returns the tokens and the list of the ResNet's feature maps, which is empty for a ViT."""
        maps = self.resnet(images) if self.resnet else []
        if maps:
            x = self.patch(self.dropout(maps[-1].flatten(2).transpose(1, 2)))  # (B, N, D)
        else:
            x = self.patch(images).flatten(2).transpose(1, 2)                  # (B, N, D)
        x = self.position(self.patch_norm(x))
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)
        return self.norm(run_layers(self.layers, x, checkpointing=self.checkpointing and self.training)), maps


class Decoder(nn.Module):
    """Tokens (S, T) and encoded images (B, N, dec_dim) -> logits (S, T, vocab_size) of each next token."""

    def __init__(self, c):
        super().__init__()
        self.checkpointing = c.checkpointing
        self.embed = embedding(c.vocab_size, c.dec_dim)
        self.unembed = self.embed if c.shared_embedding else embedding(c.vocab_size, c.dec_dim)
        self.bias = embedding(c.vocab_size) if c.output_bias else None
        self.position = Position(c.pos_encoding_dec, c.max_seq_len, 1, c.dec_dim)
        self.layers = nn.ModuleList(Layer(c.dec_dim, c.dec_mlp, c.dec_heads, c.dec_dim, True, c.drop_path, c.dropout,
                                          c.att_dropout) for _ in range(c.dec_layers))
        self.norm = layer_norm(c.dec_dim)

    def forward(self, tokens, context, caches=None):
        """With `caches`, one KVCache a layer, tokens are the ones that follow those in it, and context is not read."""
        start = caches[0].length if caches else 0
        x = self.position(F.embedding(tokens, self.embed), start)
        if caches:
            for layer, cache in zip(self.layers, caches):
                x = layer(x, cache=cache)
        else:
            x = run_layers(self.layers, x, context, checkpointing=self.checkpointing and self.training)
        return F.linear(self.norm(x), self.unembed, self.bias)


class Generated(NamedTuple):
    """What `Pix2Seq.generate` wrote about G sequences an image, without the prompts."""
    tokens: torch.Tensor                       # (B, G, T) int64; padding once `end` was written
    probs: torch.Tensor                        # (B, G, T) float32 probability of each token in the full softmax
    logprobs: torch.Tensor | None              # (B, G, T, K) float32 log-softmax of the K tokens in `keep`


class Pix2Seq(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.encoder = Encoder(c)
        self.proj, self.proj_norm = nn.Linear(c.enc_dim, c.dec_dim), layer_norm(c.dec_dim)
        if c.projection not in ("linear", "linear_p", "mlp"):
            raise ValueError(f"unknown projection {c.projection!r}, expected 'linear', 'linear_p' or 'mlp'")
        if c.projection != "linear":
            self.proj_position = Position(c.pos_encoding, *self.encoder.grid, c.dec_dim)
        if c.projection == "mlp":
            ratio = c.enc_mlp // c.enc_dim     # the encoder's, as in the reference
            self.proj_mlp = MLP(c.dec_dim, ratio * c.dec_dim, c.drop_path, c.dropout)
        self.decoder = Decoder(c)
        for name, module in self.named_modules():
            initialize(name, module)

    def encode(self, images, features=False):
        """(B, 3, H, W) float in [0, 1] -> (B, N, dec_dim), what the decoder looks at; with `features`, the pair of this
        and the list of a ResNet's feature maps."""
        x, maps = self.encoder(images)
        x = self.proj_norm(self.proj(x))
        if self.config.projection != "linear":
            cls, patches = x.split([x.shape[1] - math.prod(self.encoder.grid), math.prod(self.encoder.grid)], 1)
            x = torch.cat([cls, self.proj_position(patches)], 1)
        if self.config.projection == "mlp":
            x = self.proj_mlp(x)
        return (x, maps) if features else x

    def forward(self, images, tokens):
        """Teacher forcing: (B, 3, H, W) and (B, T) or (B, G, T) -> logits of shape tokens.shape + (vocab_size,)."""
        logits = self.decoder(tokens.flatten(0, -2), self.encode(images))
        return logits.view(*tokens.shape, -1)

    @torch.no_grad()
    def generate(self, context, prompts, length, samples=1, temperature=1.0, top_k=0, top_p=1.0, end=None, keep=None,
                 forbid=None, generator=None, cache=True):
        """Write up to `length` tokens after each prompt.

        context:     (B, N, dec_dim), from `encode`; every sequence about an image shares it
        prompts:     (B, P) or (B, G, P) int64
        samples:     sequences written for each prompt; G grows by this factor, the samples of a prompt side by side
        temperature, top_k, top_p: see `sample_token`; temperature 0 takes the likeliest token
        end:         token after which a sequence is padded; writing stops when all have ended. None: never stop
        keep:        slice of the vocabulary whose log-probabilities are wanted at every step
        forbid:      token that may be written but is replaced in the result by another, drawn without it (2206.07669)
        generator:   torch.Generator on the device of `context`, for results that repeat
        cache:       False runs the decoder over the whole prefix for every token: slow, for tests and timing
        Returns Generated.
        """
        B, P = len(context), prompts.shape[-1]
        if P + length > self.config.max_seq_len + 1:
            raise ValueError(f"prompt of {P} and {length} tokens exceed max_seq_len {self.config.max_seq_len}")
        written = prompts.reshape(-1, P).repeat_interleave(samples, 0)         # (S, P)
        S = len(written)
        caches = [KVCache(layer, context, S, P + length) for layer in self.decoder.layers] if cache else None
        tokens = written.new_zeros(S, length)
        probs = torch.zeros(S, length, device=context.device)
        logprobs = None
        ended = torch.zeros(S, dtype=torch.bool, device=context.device)
        new = written
        for t in range(length):
            logits = self.decoder(new if cache else written, context, caches)[:, -1].float()    # (S, V)
            token = sample_token(logits, temperature, top_k, top_p, generator)
            shown = token
            if forbid is not None:
                logits[:, forbid] = -math.inf
                again = sample_token(logits, temperature, top_k, top_p, generator)
                shown = torch.where(token == forbid, again, token)
            logprob = logits.log_softmax(-1)
            tokens[:, t] = shown.masked_fill(ended, 0)
            probs[:, t] = logprob.gather(1, shown[:, None])[:, 0].exp().masked_fill(ended, 0.0)
            if keep is not None:
                if logprobs is None:
                    logprobs = logprob.new_full((S, length, logprob[:, keep].shape[1]), -math.inf)
                logprobs[:, t] = logprob[:, keep]
            if end is not None:
                ended |= shown == end
                if t % 16 == 15 and ended.all():                               # reading it waits for the GPU: not often
                    break
            new = token[:, None]
            if not cache:
                written = torch.cat([written, new], 1)
        shape = (B, S // B, length)
        return Generated(tokens.view(shape), probs.view(shape), None if logprobs is None else logprobs.view(*shape, -1))

    @torch.no_grad()
    def attention_maps(self, context, tokens):
        """Where the decoder looks when it writes: (1, N, dec_dim) and (1, T) input tokens -> (T, N), for each next token the
        cross-attention over the encoded image, averaged over layers and heads."""
        maps = []
        hooks = [layer.cross_att.register_forward_hook(lambda att, args, _: maps.append(att.weights(*args).mean(1)[0]))
                 for layer in self.decoder.layers]
        try:
            self.decoder(tokens, context)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(maps).mean(0)


def filter_logits(logits, top_k=0, top_p=1.0):
    """(S, V) -> the same with -inf where a token is not among the top_k largest (0: all), or not among the largest
    whose cumulative probability does not exceed top_p; the largest is always kept (nucleus sampling, 1904.09751)."""
    if top_k > 0:
        smallest = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        ordered = logits.sort(-1, descending=True).values
        kept = ordered.softmax(-1).cumsum(-1) <= top_p
        kept[:, 0] = True
        smallest = ordered.masked_fill(~kept, math.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < smallest, -math.inf)
    return logits


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """(S, V) float -> (S,) int64, drawn from the filtered softmax; the likeliest if temperature is 0 or top_k is 1."""
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1)
    probs = filter_logits(logits / temperature, top_k, top_p).softmax(-1)
    # The largest of p / Exponential(1) is a draw from p; unlike torch.multinomial it never waits for the device.
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)


def token_loss(logits, targets, kind="xent", smoothing=0.0, gamma=2.0):
    """Logits (..., T, V) and targets (..., T) -> loss of each token (..., T) float32.
    kind: xent (cross entropy, with label smoothing) or focal (1708.02002, with its gamma)."""
    if kind not in ("xent", "focal"):
        raise ValueError(f"unknown loss {kind!r}, expected 'xent' or 'focal'")
    scores, wanted = logits.reshape(-1, logits.shape[-1]).float(), targets.flatten()
    loss = F.cross_entropy(scores, wanted, label_smoothing=smoothing if kind == "xent" else 0.0, reduction="none")
    if kind == "focal":
        p = torch.exp(-loss)
        loss = (1 - p) ** gamma * -torch.log(p + 1e-8)                         # the reference limits it like this
    return loss.view(targets.shape)


# ---------------------------------------------------------------------------------------------------------------
# denoisers: what they share

class ScalarEmbedding(nn.Module):
    """A number for each example (B,), and optional features (B, features) -> (B, dim). dim: a multiple of 4."""

    def __init__(self, dim, scaling, features=0, normalize=False):
        super().__init__()
        if dim % 4:
            raise ValueError(f"width {dim} of the time embedding is not a multiple of 4")
        self.code_dim, self.scaling, self.normalize = dim // 4, scaling, normalize
        self.fc1, self.fc2 = nn.Linear(dim // 4, dim), nn.Linear(dim + features, dim)

    def forward(self, t, features=None):
        code = sincos(t.float() * self.scaling, self.code_dim)                 # (B, dim / 4)
        if self.normalize:
            code = (code - code.mean(-1, keepdim=True)) / code.std(-1, correction=0, keepdim=True)
        x = F.silu(self.fc1(code))
        return self.fc2(x if features is None else torch.cat([x, features], -1))


def split_cond(x, cond, **widths):
    """The condition of samples x (B, ...) -> its parts in the order of `widths`, None for a part of width 0: not taken.

    cond: the part, or a tuple of all parts, that the network takes; None stands for None in each. Only labels can be None.
    Labels (B,) int64 become one-hot (B, width) float32, zeros for None and for -1: a label dropped for classifier-free
    guidance (2207.12598). Float features (B, ..., width) in their place pass as they are.
    """
    names = [name for name, width in widths.items() if width]
    given = [None] * len(names) if cond is None else list(cond) if isinstance(cond, (tuple, list)) else [cond]
    parts = dict(zip(names, given))
    if len(given) != len(names) or any(parts[name] is None for name in names if name != "labels"):
        raise ValueError(f"as condition this network takes {' and '.join(names) or 'nothing'}, and only labels can be None")
    labels = parts.get("labels")
    if "labels" in parts and labels is None:
        parts["labels"] = torch.zeros(len(x), widths["labels"], device=x.device)
    elif "labels" in parts and not labels.is_floating_point():
        parts["labels"] = F.one_hot(labels + 1, widths["labels"] + 1)[:, 1:].float()
    return [parts.get(name) for name in widths]


class SameConv2d(nn.Conv2d):
    """(B, C, H, W) -> (B, C', H / stride, W / stride), rounded up. Where padding is odd, bottom and right get more of it
    (TensorFlow's "SAME"), unlike torch's own."""

    def forward(self, x):
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):    # width, then height
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def group_norm(dim, like=None):
    """GroupNorm over `dim` channels, with the number of groups that fits `like` channels (default: dim)."""
    return nn.GroupNorm(min((like or dim) // 4, 32), dim)


# ---------------------------------------------------------------------------------------------------------------
# RIN: Recurrent Interface Network

@dataclass(frozen=True)
class RINConfig:
    """Everything that fixes the shape of a RIN. The defaults are those for CIFAR-10 in the reference, without labels."""
    sample_size: tuple[int, int] = (32, 32)    # height and width of what is denoised
    channels: int = 3                          # its channels
    frames: int = 1                            # its frames; 1: an image
    cond_frames: int = 0                       # known frames, as condition of a video
    frame_stride: int = 1                      # frames in a patch of a video
    num_classes: int = 0                       # labels, as condition (or the width of features in their place); 0: none
    self_cond: str = "latent"                  # takes from the call before: none, latent, interface or latent+interface
    interface_patch: int = 2                   # side of the patch that becomes an interface token
    interface_dim: int = 256                   # interface: width
    interface_mlp_ratio: int = 2               # interface: hidden width of an MLP / interface_dim; 0: no MLP after a write
    interface_position: str = "learned"        # interface: positions, learned, sin_cos or sin_cos_plus_learned
    latents: int = 128                         # latent tokens, those for time and condition included
    latent_dim: int = 512                      # latents: width
    latent_mlp_ratio: int = 4                  # latents: hidden width of an MLP / latent_dim
    latent_heads: int = 16                     # latents: heads of self-attention
    latent_position: str = "learned"           # latents: their start, learned, sin_cos or sin_cos_plus_learned
    latent_layers: tuple[int, ...] = (2, 2, 2)  # latent layers of each block, between read and write; 0: it reads, no more
    rw_heads: int = 8                          # attention heads of reads and writes
    rw_context_norm: bool = False              # a LayerNorm on what is read or written, too
    conv_kernel: int = 0                       # side of a depthwise convolution of the interface after a write; 0: none
    conv_dropout: float = 0.0                  # share of its units left out in training
    time_scaling: float = 1000.0               # gamma is multiplied by this before it is coded
    time_on_latents: bool = True               # the time token is a latent; else it is beside the interface
    cond_on_latents: int = 1                   # condition tokens that are latents (a label is 1); 0: beside the interface
    cond_dim: int = 0                          # width of the tokens beside the interface; 0: interface_dim
    cond_proj: bool = True                     # a dense layer on the condition; else it must have that width
    cond_writable: bool = False                # tokens beside the interface are written, too
    cond_decoupled_read: bool = False          # they are read by layers of their own
    drop_path: float = 0.1                     # share of residual branches left out in training
    dropout: float = 0.1                       # share of MLP units left out in training
    att_dropout: float = 0.0                   # share of attention weights left out in training
    checkpointing: bool = False                # recompute activations in the backward pass: less memory, more time


class WarmStart(nn.Module):
    """Adds to x (B, N, dim) what the call before left there (2212.11972, "Latent Self-Conditioning"); at first, nothing."""

    def __init__(self, dim, mlp_dim):
        super().__init__()
        self.mlp, self.norm = MLP(dim, mlp_dim), starts_at_zero(layer_norm(dim))

    def forward(self, x, previous=None):
        return x + self.norm(self.mlp(torch.zeros_like(x) if previous is None else previous))


class InterfaceConv(nn.Module):
    """Depthwise convolution of each frame of the interface (B, frames * rows * cols + others, dim); the others pass."""

    def __init__(self, frames, rows, cols, dim, kernel, dropout):
        super().__init__()
        self.grid = (frames, rows, cols)
        self.depthwise_conv = SameConv2d(dim, dim, kernel, groups=dim)
        self.norm, self.dropout = group_norm(dim), nn.Dropout(dropout)
        self.pointwise_conv = starts_at_zero(nn.Conv2d(dim, dim, 1))

    def forward(self, x):
        n = math.prod(self.grid)
        y = x[:, :n].unflatten(1, self.grid).flatten(0, 1).permute(0, 3, 1, 2)                 # (B * frames, dim, rows, cols)
        y = self.pointwise_conv(self.dropout(F.silu(self.norm(self.depthwise_conv(y)))))
        return torch.cat([x[:, :n] + y.permute(0, 2, 3, 1).reshape(len(x), n, -1), x[:, n:]], 1)


class RINBlock(nn.Module):
    """Read: latents attend to the interface. Process: latents attend to each other. Write: the interface to latents."""

    def __init__(self, c, layers, cond_dim, grid):
        super().__init__()
        self.checkpointing = c.checkpointing
        latent_mlp, rw_dim = c.latent_mlp_ratio * c.latent_dim, min(c.interface_dim, c.latent_dim)
        Attend = partial(Layer, heads=c.rw_heads, self_attention=False, context_norm=c.rw_context_norm)
        self.read = Attend(c.latent_dim, latent_mlp, context_dim=c.interface_dim, att_dim=rw_dim)
        self.read_cond = self.write = self.conv = None
        if c.cond_decoupled_read:
            self.read_cond = Attend(c.latent_dim, latent_mlp, context_dim=cond_dim, att_dim=min(cond_dim, c.latent_dim))
        self.process = nn.ModuleList(Layer(c.latent_dim, latent_mlp, c.latent_heads, drop_path=c.drop_path, dropout=c.dropout,
                                           att_dropout=c.att_dropout) for _ in range(layers))
        if layers:
            interface_mlp = c.interface_mlp_ratio * c.interface_dim
            self.write = Attend(c.interface_dim, interface_mlp, context_dim=c.latent_dim, att_dim=rw_dim)
        if layers and c.conv_kernel:
            self.conv = InterfaceConv(*grid, c.interface_dim, c.conv_kernel, c.conv_dropout)

    def forward(self, latents, interface, beside=None):
        """latents (B, M, latent_dim), interface (B, N, interface_dim), and tokens beside it (B, K, cond_dim), to be read."""
        if self.read_cond is not None:
            latents = self.read(self.read_cond(latents, beside), interface)
        else:
            latents = self.read(latents, interface if beside is None else torch.cat([interface, beside], 1))
        latents = run_layers(self.process, latents, checkpointing=self.checkpointing and self.training)
        if self.write is not None:
            interface = self.write(interface, latents)
        return latents, interface if self.conv is None else self.conv(interface)


class RIN(nn.Module):
    """Recurrent Interface Network (2212.11972), for images and, where frames + cond_frames > 1, for videos.

    In the reference ("tape") several frames with `interface` self-conditioning, with writable tokens beside the interface
    or with a convolution fail or mix up tokens; here they are as one would expect.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.video = c.frames + c.cond_frames > 1
        label_token = c.num_classes > 0 and not self.video                     # in a video it goes with the time
        beside = not c.time_on_latents or (label_token and not c.cond_on_latents)
        cond_dim = c.cond_dim or c.interface_dim
        if c.self_cond not in ("none", "latent", "interface", "latent+interface"):
            raise ValueError(f"unknown self_cond {c.self_cond!r}, expected 'none', 'latent', 'interface' or 'latent+interface'")
        if any(side % c.interface_patch for side in c.sample_size):
            raise ValueError(f"sample_size {c.sample_size} is not a multiple of interface_patch {c.interface_patch}")
        if c.cond_decoupled_read and (c.cond_writable or not beside):
            raise ValueError("cond_decoupled_read needs tokens beside the interface (time_on_latents=False or "
                             "cond_on_latents=0) and cond_writable=False")
        if beside and cond_dim != c.interface_dim and not c.cond_decoupled_read:
            raise ValueError(f"cond_dim {cond_dim} differs from interface_dim {c.interface_dim}: it needs cond_decoupled_read")

        rows, cols = (side // c.interface_patch for side in c.sample_size)
        steps, cond_steps = math.ceil(c.frames / c.frame_stride), math.ceil(c.cond_frames / c.frame_stride)
        grid = (steps + cond_steps, rows, cols)
        self.out_grid = (steps, rows, cols)
        self.patch_shape = (c.frame_stride, c.interface_patch, c.interface_patch, c.channels)
        self.patch = nn.Linear(math.prod(self.patch_shape), c.interface_dim)
        self.patch_norm = layer_norm(c.interface_dim)
        self.interface_position = Position(c.interface_position, rows, cols, c.interface_dim, c.time_scaling, grid[0])
        own_latents = c.latents - c.time_on_latents - label_token * c.cond_on_latents
        self.latent_position = Position(c.latent_position, own_latents, 1, c.latent_dim, c.time_scaling)
        self.time_emb = ScalarEmbedding(c.latent_dim if c.time_on_latents else cond_dim, c.time_scaling,
                                        c.num_classes if self.video else 0, normalize=True)
        self.cond_proj = None
        if label_token:
            width = c.latent_dim if c.cond_on_latents else cond_dim
            self.cond_proj = nn.Linear(c.num_classes, width) if c.cond_proj else nn.Identity()
        self.latent_prev = WarmStart(c.latent_dim, c.latent_mlp_ratio * c.latent_dim) if "latent" in c.self_cond else None
        self.interface_prev = (WarmStart(c.interface_dim, c.interface_mlp_ratio * c.interface_dim)
                               if "interface" in c.self_cond else None)
        self.blocks = nn.ModuleList(RINBlock(c, layers, cond_dim, grid) for layers in c.latent_layers)
        self.norm, self.output = layer_norm(c.interface_dim), nn.Linear(c.interface_dim, math.prod(self.patch_shape))
        for name, module in self.named_modules():
            initialize(name, module)

    def tokens(self, x, start=0):
        """(B, C, T, H, W) -> (B, N, interface_dim), frame by frame, row by row, from position `start` on."""
        t, p, _, _ = self.patch_shape
        extra = -x.shape[2] % t
        x = F.pad(x, (0, 0, 0, 0, extra // 2, extra - extra // 2))             # frames that fill the last patch
        x = x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, t))                # (B, C, T', t, H', p, W', p)
        x = x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)         # (B, T' * H' * W', t * p * p * C)
        return self.interface_position(self.patch_norm(self.patch(x)), start)

    def forward(self, x, gamma, cond=None, hidden=None):
        """A denoiser of diffusion.py.

        x:      (B, channels, *sample_size); of a video (B, channels, frames, *sample_size)
        gamma:  (B,) float, share of signal in x
        cond:   None; or labels (B,) int64, -1 for a dropped one; or, in place of labels, float features (B, num_classes) or
                (B, S, num_classes), such as encoded text; or the known frames of a video (B, channels, cond_frames,
                *sample_size); or the pair (labels, frames) where the network takes both (`split_cond`)
        hidden: what an earlier call returned, for self-conditioning; None is the same as zeros
        Returns the prediction, shaped like x, and hidden = (latents (B, M, latent_dim), interface (B, N, interface_dim)).
        """
        c, B = self.config, len(x)
        expected = (c.channels, *([c.frames] if self.video else []), *c.sample_size)
        if x.shape[1:] != expected:
            raise ValueError(f"got samples of shape {tuple(x.shape[1:])}, expected {expected}")
        labels, known = split_cond(x, cond, labels=c.num_classes, frames=c.cond_frames)
        old_latents, old_interface = hidden or (None, None)

        time = self.time_emb(gamma, labels if self.video else None)[:, None]   # (B, 1, D)
        on_latents, beside = ([time], []) if c.time_on_latents else ([], [time])
        if self.cond_proj is not None:
            token = self.cond_proj(labels)                                     # (B, D) or (B, S, D)
            token = token if token.dim() == 3 else token[:, None].expand(-1, max(c.cond_on_latents, 1), -1)
            (on_latents if c.cond_on_latents else beside).append(token)

        latents = torch.cat([self.latent_position.table().expand(B, -1, -1), *on_latents], 1)  # (B, M, latent_dim)
        if self.latent_prev is not None:
            latents = self.latent_prev(latents, old_latents)
        interface = self.tokens(x if self.video else x.unsqueeze(2))           # (B, n, interface_dim)
        n = interface.shape[1]
        if self.interface_prev is not None:
            interface = self.interface_prev(interface, None if old_interface is None else old_interface[:, :n])
        if known is not None:
            interface = torch.cat([interface, self.tokens(known, start=n)], 1)
        N = interface.shape[1]
        if c.cond_writable:
            interface, beside = torch.cat([interface, *beside], 1), []
        beside = torch.cat(beside, 1) if beside else None

        for block in self.blocks:
            latents, interface = block(latents, interface, beside)

        out = self.output(self.norm(interface[:, :n]))                         # (B, n, t * p * p * C)
        out = out.unflatten(2, self.patch_shape).unflatten(1, self.out_grid)   # (B, T', H', W', t, p, p, C)
        out = out.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)    # (B, C, T, H, W)
        return out[:, :, :c.frames] if self.video else out[:, :, 0], (latents, interface[:, :N])


# ---------------------------------------------------------------------------------------------------------------
# UNet

@dataclass(frozen=True)
class UNetConfig:
    """Everything that fixes the shape of a UNet. The defaults are those for CIFAR-10 in the reference, without labels."""
    sample_size: tuple[int, int] = (32, 32)    # height and width of what is denoised
    channels: int = 3                          # its channels
    num_classes: int = 0                       # labels, as condition (or the width of features in their place); 0: none
    cond_channels: int = 0                     # channels of a map, as condition; 0: none
    context_dim: int = 0                       # width of a sequence to attend to, as condition; 0: none
    self_cond: str = "none"                    # takes from the call before the estimate of: none, x, eps or auto
    softmax_groups: int = 0                    # predicts logits of so many codes, of channels / softmax_groups bits; 0: not
    unet_dim: int = 256                        # width, to be multiplied
    multipliers: tuple[int, ...] = (1, 1, 1)   # width of each resolution / unet_dim, from the finest
    res_blocks: tuple[int, ...] = (3, 3, 3)    # residual blocks of each resolution on the way down; on the way up one more
    kernel_sizes: tuple[int, ...] = (3,)       # side of their convolutions: one, or one of each resolution
    attention_at: tuple[int, ...] = (16, 8)    # heights of the feature maps that have attention
    head_dim: int = 64                         # width of an attention head
    transformer_layers: int = 0                # transformer on the coarsest map: layers; 0: none
    transformer_dim: int = 256                 # transformer: width
    transformer_stride: int = 1                # transformer: side of the patch that becomes a token
    transformer_position: str = "sin_cos"      # transformer: positions, sin_cos, learned or none
    in_stride: int = 1                         # the sample is shrunk by this, and the prediction enlarged
    in_kernel: int = 3                         # side of the first convolution
    out_kernel: int = 3                        # side of the last one; with softmax_groups it is 1
    time_scaling: float = 1000.0               # gamma is multiplied by this before it is coded
    unet_dropout: float = 0.0                  # share of units left out in training


class ResBlock(nn.Module):
    """(B, in_dim, H, W) -> (B, dim, H, W): two convolutions; between them, the time embedding scales and shifts."""

    def __init__(self, in_dim, dim, emb_dim, kernel, dropout):
        super().__init__()
        self.shortcut = nn.Conv2d(in_dim, dim, 1) if in_dim != dim else nn.Identity()
        self.norm_0, self.conv_0 = group_norm(in_dim), SameConv2d(in_dim, dim, kernel)
        self.emb_proj = nn.Linear(emb_dim, 2 * dim)
        self.norm_1, self.dropout = group_norm(dim), nn.Dropout(dropout)
        self.conv_1 = starts_at_zero(SameConv2d(dim, dim, kernel))

    def forward(self, x, emb):
        scale, shift = self.emb_proj(emb)[:, :, None, None].chunk(2, 1)        # (B, dim, 1, 1)
        y = self.conv_0(F.silu(self.norm_0(x)))
        y = self.conv_1(self.dropout(F.silu(self.norm_1(y) * (1 + scale) + shift)))
        return (self.shortcut(x) + y) / math.sqrt(2)


class PixelAttention(nn.Module):
    """Pixels of a map (B, dim, H, W) attend to a sequence (B, S, context_dim), if there is one, then to each other."""

    def __init__(self, dim, head_dim, context_dim=0):
        super().__init__()
        heads = dim // head_dim
        if context_dim:
            self.cross_norm, self.cross_att = nn.GroupNorm(32, dim), Attention(dim, heads, context_dim, heads * head_dim)
        self.self_norm, self.self_att = nn.GroupNorm(32, dim), Attention(dim, heads, att_dim=heads * head_dim)

    def forward(self, x, context=None):
        if hasattr(self, "cross_att"):
            x = self.attend(x, self.cross_norm, self.cross_att, context)
        return self.attend(x, self.self_norm, self.self_att)

    def attend(self, x, norm, att, context=None):
        y = norm(x).flatten(2).transpose(1, 2)                                 # (B, H * W, dim)
        y = att(y, att.project(y if context is None else context))
        return (x + y.transpose(1, 2).reshape(x.shape)) / math.sqrt(2)


class UNetStage(nn.Module):
    """Blocks of one resolution. resize: none, down (halve, at the end) or up (double, at the end)."""

    def __init__(self, c, height, in_dims, dim, kernel, resize):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(d, dim, 4 * c.unet_dim, kernel, c.unet_dropout) for d in in_dims)
        attends = len(in_dims) if height in c.attention_at else 0
        self.attention = nn.ModuleList(PixelAttention(dim, c.head_dim, c.context_dim) for _ in range(attends))
        self.conv_dn = SameConv2d(dim, dim, 3, 2) if resize == "down" else None
        self.conv_up = SameConv2d(dim, dim, 3) if resize == "up" else None

    def forward(self, x, emb, context, kept, keep):
        """kept: list of maps for the way up. keep: whether this is the way down, that adds to it, or up, that takes."""
        for i, block in enumerate(self.blocks):
            x = block(x if keep else torch.cat([x, kept.pop()], 1), emb)
            if keep:
                kept.append(x)
            if self.attention:
                x = self.attention[i](x, context)
        if self.conv_dn is not None:
            x = self.conv_dn(x)
            kept.append(x)
        return x if self.conv_up is None else self.conv_up(F.interpolate(x, scale_factor=2.0))


def depth_to_space(x, side):
    """(B, side * side * C, H, W) -> (B, C, side * H, side * W). TensorFlow's order; pixel_shuffle's has C in front."""
    return F.pixel_shuffle(x.unflatten(1, (side * side, -1)).transpose(1, 2).flatten(1, 2), side)


class MapTransformer(nn.Module):
    """Transformer over the patches of a map (B, in_dim, H, W), with the time as one more token."""

    def __init__(self, c, in_dim, height, width):
        super().__init__()
        dim, self.side = c.transformer_dim, c.transformer_stride
        self.norm_in, self.conv_in = group_norm(in_dim, like=dim), nn.Conv2d(in_dim, dim, self.side, self.side)
        self.position = (nn.Identity() if c.transformer_position == "none" else
                         Position(c.transformer_position, height // self.side, width // self.side, dim))
        self.emb_proj = nn.Linear(4 * c.unet_dim, dim)
        self.layers = nn.ModuleList(Layer(dim, 4 * dim, dim // c.head_dim, c.context_dim, dropout=c.unet_dropout)
                                    for _ in range(c.transformer_layers))
        self.norm_out, self.conv_out = group_norm(dim), nn.Conv2d(dim, dim, 1)

    def forward(self, x, emb, context):
        x = self.conv_in(self.norm_in(x))
        tokens = self.position(x.flatten(2).transpose(1, 2))                   # (B, N, dim)
        tokens = run_layers(self.layers, torch.cat([tokens, self.emb_proj(emb)[:, None]], 1), context)[:, :-1]
        x = tokens.transpose(1, 2).reshape(x.shape)
        return depth_to_space(self.conv_out(self.norm_out(x)), self.side)


class UNet(nn.Module):
    """UNet for diffusion (Ho et al. 2006.11239), as in Bit Diffusion (2208.04202) and Pix2Seq-D (2210.06366)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        levels, height, width = len(c.res_blocks), *(side // c.in_stride for side in c.sample_size)
        kernels = c.kernel_sizes * levels if len(c.kernel_sizes) == 1 else c.kernel_sizes
        coarsest = 2 ** (levels - 1) * (c.transformer_stride if c.transformer_layers else 1)
        if c.self_cond not in ("none", "x", "eps", "auto"):
            raise ValueError(f"unknown self_cond {c.self_cond!r}, expected 'none', 'x', 'eps' or 'auto'")
        if not levels == len(c.multipliers) == len(kernels):
            raise ValueError(f"res_blocks {c.res_blocks}, multipliers {c.multipliers}, kernel_sizes {kernels} differ in length")
        if any(side % (c.in_stride * coarsest) for side in c.sample_size):
            raise ValueError(f"sample_size {c.sample_size} is not a multiple of {c.in_stride * coarsest}")
        if c.softmax_groups and c.channels % c.softmax_groups:
            raise ValueError(f"channels {c.channels} is not a multiple of softmax_groups {c.softmax_groups}")

        dim = c.unet_dim * c.multipliers[0]
        self.time_emb = ScalarEmbedding(4 * c.unet_dim, c.time_scaling, c.num_classes)
        inputs = c.channels * (1 if c.self_cond == "none" else 2) + c.cond_channels
        self.conv_in = SameConv2d(inputs, dim, c.in_kernel, c.in_stride)
        self.norm_in = group_norm(dim)
        self.down, self.up, kept = nn.ModuleList(), nn.ModuleList(), [dim]     # kept: widths of the maps for the way up
        stages = [(blocks, m * c.unet_dim, kernel, height >> i)
                  for i, (blocks, m, kernel) in enumerate(zip(c.res_blocks, c.multipliers, kernels))]
        for i, (blocks, new_dim, kernel, rows) in enumerate(stages):
            resize = "down" if i < levels - 1 else "none"
            self.down.append(UNetStage(c, rows, ([dim] + [new_dim] * blocks)[:blocks], new_dim, kernel, resize))
            kept += [new_dim] * (blocks + (resize == "down"))
            dim = new_dim
        self.transformer = None
        if c.transformer_layers:
            self.transformer = MapTransformer(c, dim, height >> levels - 1, width >> levels - 1)
            dim = c.transformer_dim // c.transformer_stride ** 2
        for i, (blocks, new_dim, kernel, rows) in reversed(list(enumerate(stages))):
            in_dims = [(new_dim if j else dim) + kept.pop() for j in range(blocks + 1)]
            self.up.insert(0, UNetStage(c, rows, in_dims, new_dim, kernel, "up" if i else "none"))
            dim = new_dim
        self.norm_out = group_norm(dim, like=c.unet_dim)
        outputs = 2 ** (c.channels // c.softmax_groups) * c.softmax_groups if c.softmax_groups else c.channels
        self.conv_out = starts_at_zero(SameConv2d(dim, outputs * c.in_stride ** 2, 1 if c.softmax_groups else c.out_kernel))
        for name, module in self.named_modules():
            initialize(name, module)

    def forward(self, x, gamma, cond=None, self_cond=None):
        """A denoiser of diffusion.py.

        x:         (B, channels, *sample_size)
        gamma:     (B,) float, share of signal in x
        cond:      None, or what the config says the network takes, a tuple if that is several of, in this order: labels
                   (B,) int64, -1 for a dropped one, or float features (B, num_classes) in their place; a map (B,
                   cond_channels, *sample_size); a sequence (B, S, context_dim). See `split_cond`
        self_cond: the estimate of an earlier call, shaped like x; None is the same as zeros. Read if config.self_cond
        Returns the prediction, shaped like x; with softmax_groups logits (B, softmax_groups * 2^bits, *sample_size), group by
        group, of which diffusion.softmax_bits makes the expected analog bits.
        """
        c = self.config
        labels, cond_map, context = split_cond(x, cond, labels=c.num_classes, map=c.cond_channels, sequence=c.context_dim)
        emb = F.silu(self.time_emb(gamma, labels))                             # (B, 4 * unet_dim)
        inputs = [x]
        if c.self_cond != "none":
            inputs.append(torch.zeros_like(x) if self_cond is None else self_cond)
        if cond_map is not None:
            inputs.append(cond_map)
        x = self.norm_in(self.conv_in(torch.cat(inputs, 1)))
        kept = [x]
        for stage in self.down:
            x = stage(x, emb, context, kept, keep=True)
        if self.transformer is not None:
            x = self.transformer(x, emb, context)
        for stage in reversed(self.up):                                        # the first is the finest, as of `down`
            x = stage(x, emb, context, kept, keep=False)
        return depth_to_space(self.conv_out(F.silu(self.norm_out(x))), c.in_stride)


NETWORKS = {"Pix2Seq": (Pix2Seq, Pix2SeqConfig), "RIN": (RIN, RINConfig), "UNet": (UNet, UNetConfig)}


def build(config):
    """The network that a configuration is of."""
    return next(network for network, kind in NETWORKS.values() if type(config) is kind)(config)


# ---------------------------------------------------------------------------------------------------------------
# weights from elsewhere: their names and layouts -> ours, then another size -> the model's, then into the model

RENAMES = [                                    # applied in order to a name of the reference's checkpoint
    (r"^model/", ""),
    # RIN ("tape" is its interface); (?<![^/]) is the start of a part of the name
    (r"(?<![^/])(read|read_cond|write)_units/(\d+)/dec_layers/0/", r"blocks/\2/\1/"),
    (r"(?<![^/])latent_processing_units/(\d+)/enc_layers/", r"blocks/\1/process/"),
    (r"(?<![^/])conv_units/(\d+)/", r"blocks/\1/conv/"),
    (r"(?<![^/])(latent|tape)_prev_proj/", r"\1_prev/mlp/"), (r"(?<![^/])(latent|tape)_prev_ln/", r"\1_prev/norm/"),
    (r"(?<![^/])\w+\.S(latent|tape)_pos_emb_res\.Skernel", r"\1_position/residual"),
    (r"(?<![^/])\w+\.S(latent|tape)_pos_emb\.Skernel\.Svis_pos_embedding", r"\1_position/code"),
    (r"(?<![^/])tape_", "interface_"), (r"(?<![^/])output_linear/", "output/"), (r"/enc_ln/", "/context_norm/"),
    (r"(?<![^/])time_emb/dense_0/", "time_emb/fc1/"), (r"(?<![^/])time_emb/dense_1/", "time_emb/fc2/"),
    # UNet
    (r"(?<![^/])dn_units/", "down/"), (r"(?<![^/])up_units/", "up/"), (r"/resnet_blocks/", "/blocks/"),
    (r"(?<![^/])group_norm_", "norm_"), (r"/trans_conv_(in|out)_norm/", r"/norm_\1/"), (r"/trans_conv_", "/conv_"),
    (r"/shortcut_layer/", "/shortcut/"),
    (r"/mh([cs])a_(block|norm)s/(\d+)/",
     lambda m: f"/attention/{m[3]}/{dict(c='cross', s='self')[m[1]]}_{dict(block='att', norm='norm')[m[2]]}/"),
    (r"(?<![^/])transformer_decoder/dec_layers/", "layers/"), (r"(?<![^/])transformer\.Svis_pos_embedding", "position/code"),
    # Pix2Seq
    (r"transformer_encoder/enc_layers|(?<=decoder/)decoder/dec_layers", "layers"),
    (r"/mha_ln/", "/self_norm/"), (r"/mha/", "/self_att/"), (r"_(self|cross)_mha/", r"_\1_att/"),
    (r"/(self|cross)_ln/", r"/\1_norm/"), (r"/(self|cross)_mha/", r"/\1_att/"),
    (r"/_(query|key|value|output)_dense/", lambda m: f"/{dict(query='q', key='k', value='v', output='out')[m[1]]}/"),
    (r"mlp/mlp_layers/0/dense([12])/", r"mlp/fc\1/"), (r"mlp/layernorms/0/", "mlp/norm/"),
    (r"(?<![^/])stem(_conv|_projection)?/", "patch/"), (r"(?<![^/])stem_ln/", "patch_norm/"), (r"(?<![^/])output_ln/", "norm/"),
    (r"^proj_ln/", "proj_norm/"),
    (r"^encoder/(vit|rest)\.Svis_pos_embedding", "encoder/position/code"), (r"^proj\.Svis_pos_embedding", "proj_position/code"),
    (r"^encoder/(vit|rest)\.Scls_token_embedding", "encoder/cls"),
    (r"ar_decoder\.Sseq_pos_embedding", "position/code"), (r"ar_decoder\.S(inp_)?token_embedding", "embed"),
    (r"ar_decoder\.Soutp_token_embedding", "unembed"), (r"ar_decoder\.Soutp_bias", "bias"),
    (r"initial_conv_relu_max_pool/(\d)/conv2d/", lambda m: f"stem/{int(m[1]) // 2}/conv/"),     # 0, or 0, 2, 4 in c3
    (r"initial_conv_relu_max_pool/(\d)/bn/", lambda m: f"stem/{(int(m[1]) - 1) // 2}/norm/"),   # 2, or 1, 3, 6
    (r"/block_groups/(\d)/layers/", r"/stages/\1/"), (r"/projection_layers/\d/", "/shortcut/"),
    (r"/conv_relu_dropblock_layers/(\d)/", lambda m: f"/convs/{int(m[1]) // 3}/"),              # conv, norm, nothing
    (r"/conv2d/", "/conv/"), (r"/[bg]n/", "/norm/"), (r"/moving_mean$", "/running_mean"), (r"/moving_variance$", "/running_var"),
    (r"/(kernel|depthwise_kernel|gamma)$", "/weight"), (r"/beta$", "/bias"),
]


def from_reference(weights):
    """Weights under the reference's names and in its layouts -> {our name: float32 tensor}, {our name: their names}."""
    renamed, names = {}, {}
    for theirs, value in weights.items():
        name = theirs
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        w = torch.from_numpy(np.asarray(value, dtype=np.float32).copy())
        if re.search(r"_att/(q|k|v)/", name):                                  # D x heads x hs, or heads x hs
            w = w.flatten(1).T if name.endswith("weight") else w.flatten()
        elif name.endswith("_att/out/weight"):                                 # heads x hs x D
            w = w.flatten(0, 1).T
        elif re.search(r"(^|/)stem/kernel$", theirs):                          # (frames x) rows x cols x in x out of a patch
            w = w.flatten(0, -2).T
        elif theirs.endswith("/depthwise_kernel"):                             # kh x kw x channels x 1
            w = w.permute(2, 3, 0, 1)
        elif theirs.endswith("/kernel"):                                       # in x out, or kh x kw x in x out
            w = w.permute(3, 2, 0, 1) if w.dim() == 4 else w.T
        name = name.replace("/", ".")
        renamed[name], names[name] = w.contiguous(), theirs
    for name in [n for n in renamed if re.search(r"_att\.k\.", n)]:            # we project keys and values at once
        if name.replace(".k.", ".v.") in renamed:
            v_name, kv_name = name.replace(".k.", ".v."), name.replace(".k.", ".kv.")
            renamed[kv_name] = torch.cat([renamed.pop(name), renamed.pop(v_name)])
            names[kv_name] = f"{names.pop(name)} + {names.pop(v_name)}"
    return renamed, names


@torch.no_grad()
def adapt_weights(weights, model, adapt=False, grid=None, vocabs=None):
    """Fit weights of the same network at another image size, sequence length or vocabulary to `model`.

    weights: {our name: tensor}, as of `from_reference` or of a state dict of ours
    adapt:   False refuses what does not fit as it is. True interpolates learned positions of the image on its grid
             (bicubic), cuts or extends those of the sequence, and moves the rows of the vocabulary; a row that the
             weights do not have stays as the model has it.
    grid:    (rows, columns) of the learned image positions in the weights; None: as the model's, or else square
    vocabs:  the vocabularies (of the weights, of the model), each with bins, coord_shift and text_shift; None: the same,
             up to their sizes. Ranges that lie elsewhere are moved, coordinates of other bins interpolated. Classes need
             nothing: a label has the same token in both.
    Returns the weights and a line about each that was changed. Raises ValueError that names each, if not `adapt`.
    """
    weights, notes = dict(weights), []
    for name, there in model.state_dict().items():
        w = weights.get(name)
        if w is None or w.shape[1:] != there.shape[1:]:
            continue
        if name in ("encoder.position.code", "proj_position.code"):
            new, side = model.encoder.grid, math.isqrt(len(w))
            old = grid or (new if len(w) == len(there) else (side, side))
            if math.prod(old) != len(w):
                raise ValueError(f"{name}: the grid of its {len(w)} positions is not known" + (f", {old} it is not" if grid else ""))
            if old != new:
                notes.append(f"{name}: grid of {old[0]} x {old[1]}, the model has {new[0]} x {new[1]}")
                w = F.interpolate(w.T.reshape(1, -1, *old), new, mode="bicubic", antialias=True)[0].flatten(1).T
        elif name == "decoder.position.code" and len(w) != len(there):
            notes.append(f"{name}: sequences of {len(w)}, the model has {len(there)}")
            w = torch.cat([w[:len(there)].to(there), there[len(w):]])
        elif name in ("decoder.embed", "decoder.unembed", "decoder.bias"):
            old, new = ((v.bins, v.coord_shift, v.text_shift) for v in vocabs) if vocabs else (None, None)
            if len(w) != len(there) or old != new:
                notes.append(f"{name}: vocabulary of {len(w)}, the model has {len(there)}"
                             + (f"; (bins, coord_shift, text_shift) {old}, the model has {new}" if old != new else ""))
                w = move_vocabulary(w, there.clone(), old, new)
        weights[name] = w
    if notes and not adapt:
        raise ValueError("these weights are of another size; train.py --adapt would fit them to the model:\n  " + "\n  ".join(notes))
    return weights, notes


def move_vocabulary(old, new, theirs, ours):
    """Rows (V, ...) of tokens -> into the rows of the same tokens in `new`; theirs, ours: (bins, coord_shift, text_shift)."""
    if theirs == ours:
        spans = [(0, 0, len(old))]
    else:
        (old_bins, old_coord, old_text), (bins, coord, text) = theirs, ours
        spans = [(0, 0, min(old_coord, coord)), (old_text, text, len(old) - old_text)]
        rows = old[old_coord:old_coord + old_bins].reshape(1, old_bins, -1).transpose(1, 2)
        rows = F.interpolate(rows, bins, mode="linear", align_corners=True)    # bin q of n lies at q / (n - 1)
        new[coord:coord + bins] = rows[0].T.reshape(bins, *old.shape[1:])
    for start, to, length in spans:
        length = min(length, len(new) - to)
        new[to:to + length] = old[start:start + length]
    return new


def load_weights(model, weights, names=None):
    """Fill `model` with {our name: tensor}. Raises ValueError, and changes nothing, if any is missing, left over or of
    another shape, naming each: as `names` has it, {our name: name to report}, if given."""
    ours, weights, names = model.state_dict(), dict(weights), names or {}
    shared = getattr(model.config, "shared_embedding", False)
    if shared and {"decoder.embed", "decoder.unembed"} <= set(weights) and torch.equal(weights["decoder.embed"], weights["decoder.unembed"]):
        del weights["decoder.unembed"]                 # a state dict of ours has the one matrix under both names
    wanted = {name for name in ours if not (name.endswith("num_batches_tracked") or shared and name == "decoder.unembed")}
    extra = {name for name in weights if not name.endswith("num_batches_tracked")} - wanted
    problems = [f"missing: {name} (shape {tuple(ours[name].shape)})" for name in sorted(wanted - set(weights))]
    problems += [f"left over: {names.get(name, name)}" for name in sorted(extra)]
    problems += [f"wrong shape: {names.get(name, name)} gives {tuple(weights[name].shape)}, expected {tuple(ours[name].shape)}"
                 for name in sorted(wanted & set(weights)) if weights[name].shape != ours[name].shape]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError("these weights do not fit the model:\n  " + "\n  ".join(problems[:20]) + more)
    with torch.no_grad():
        for name in wanted:
            ours[name].copy_(weights[name])


def load_reference_weights(model, weights, adapt=False, grid=None, vocabs=None):
    """Fill `model` with the weights of the reference's TensorFlow implementation.

    weights: {name: array}, named as in a released checkpoint without `/.ATTRIBUTES/VARIABLE_VALUE`, in its layouts.
    The rest, and what is returned, is as in `adapt_weights`; what is raised, as there and in `load_weights`.
    """
    weights, names = from_reference(weights)
    weights, notes = adapt_weights(weights, model, adapt, grid, vocabs)
    load_weights(model, weights, names)
    return notes


def read_reference_checkpoint(path):
    """A checkpoint of the reference -> {name: array} of its model, for `infer_config` and `load_reference_weights`.

    path: its folder (the file `checkpoint` there tells which), or the start of its files: DIR/ckpt-N of DIR/ckpt-N.index
    and DIR/ckpt-N.data-00000-of-00001. Needs TensorFlow. Raises FileNotFoundError or ValueError naming the file.
    """
    try:
        import tensorflow as tf
    except ImportError as e:
        raise ImportError("reading a TensorFlow checkpoint needs TensorFlow, once: pip install tensorflow-cpu") from e
    prefix = re.sub(r"\.(index|data-\d+-of-\d+)$", "", path)
    if os.path.isdir(path):
        listing = os.path.join(path, "checkpoint")
        with open(listing) as f:
            latest = re.search(r'^model_checkpoint_path: "(.+)"', f.read(), re.M)
        if not latest:
            raise ValueError(f"{listing}: names no checkpoint")
        prefix = os.path.join(path, os.path.basename(latest[1]))               # it may have been written elsewhere
    shards = glob.glob(glob.escape(prefix) + ".data-*-of-*")
    count = int(shards[0].rpartition("-")[2]) if shards else 1
    for file in [f"{prefix}.index"] + [f"{prefix}.data-{i:05}-of-{count:05}" for i in range(count)]:
        if not os.path.exists(file):
            raise FileNotFoundError(f"{file}: no such file, part of the checkpoint {prefix}")
    file = f"{prefix}.index"
    try:
        reader, weights = tf.train.load_checkpoint(prefix), {}
        file = f"{prefix}.data-*"
        for key in sorted(reader.get_variable_to_shape_map()):
            name, _, kind = key.partition("/.")                                # optimizer slots have another kind
            if name.startswith("model/") and kind == "ATTRIBUTES/VARIABLE_VALUE":
                weights[name] = np.asarray(reader.get_tensor(key))
    except Exception as e:                             # TensorFlow raises many types for a damaged file
        raise ValueError(f"{file}: damaged or truncated ({type(e).__name__}: {str(e).splitlines()[0]})") from e
    if not weights:
        raise ValueError(f"{prefix}: no weights under model/, so not a checkpoint of the reference")
    return weights


def infer_config(weights, image_size=None, **known):
    """Names and shapes of the reference's weights -> Pix2SeqConfig.

    image_size: (height, width); may be left out if the image positions are learned on a square grid
    known:      fields that shapes do not always tell: projection linear or linear_p, if positions are sin_cos;
                max_seq_len, if those of the decoder are; resnet_variant dc5, which looks like standard
    Raises ValueError if the weights are not of a Pix2Seq model, or if something is needed that was not given.
    """
    shapes = {name.removeprefix("model/"): np.shape(w) for name, w in weights.items()}
    count = lambda pattern: len({m[0] for name in shapes if (m := re.match(pattern, name))})
    enc, dec, resnet = "encoder/transformer_encoder/enc_layers/0/", "decoder/decoder/dec_layers/0/", "encoder/resnet/"
    position = next((shapes[n] for n in shapes if re.match(r"encoder/(vit|rest)\.Svis_pos_embedding", n)), None)
    try:
        enc_dim, enc_mlp = shapes[enc + "mlp/mlp_layers/0/dense1/kernel"]
        dec_dim, dec_mlp = shapes[dec + "mlp/mlp_layers/0/dense1/kernel"]
        found = dict(enc_layers=count(r"encoder/.*/enc_layers/\d+/"), enc_dim=enc_dim, enc_mlp=enc_mlp,
                     enc_heads=shapes[enc + "mha/_query_dense/bias"][0],
                     dec_layers=count(r"decoder/.*/dec_layers/\d+/"), dec_dim=dec_dim, dec_mlp=dec_mlp,
                     dec_heads=shapes[dec + "self_mha/_query_dense/bias"][0],
                     pos_encoding="learned" if position else "sin_cos", cls_token=count(".*cls_token_embedding") > 0,
                     shared_embedding="decoder/ar_decoder.Stoken_embedding" in shapes,
                     output_bias="decoder/ar_decoder.Soutp_bias" in shapes)
        found["vocab_size"] = shapes[f"decoder/ar_decoder.S{'' if found['shared_embedding'] else 'inp_'}token_embedding"][0]
        if resnet + "initial_conv_relu_max_pool/0/conv2d/kernel" in shapes:
            stages = tuple(count(resnet + rf"block_groups/{i}/layers/\d+/") for i in range(count(resnet + r"block_groups/\d/")))
            depths = [depth for depth, blocks in RESNET_BLOCKS.items() if blocks[:len(stages)] == stages]
            variants = [variant for variant, strides in RESNET_STRIDES.items() if len(strides) == len(stages)]
            if not depths or not variants:
                raise ValueError(f"no ResNet here has stages of {stages} blocks")
            variant = known["resnet_variant"] if known.get("resnet_variant") in variants else variants[0]
            found |= dict(encoder="resnet", resnet_depth=depths[0], resnet_variant=variant,
                          resnet_width=shapes[resnet + "block_groups/0/layers/0/conv_relu_dropblock_layers/0/conv2d/kernel"][3] / 64)
            cell = resnet_cell(variant)
        else:
            cell = shapes["encoder/stem_conv/kernel"][0]
            found |= dict(encoder="vit", patch_size=cell)
    except KeyError as e:
        raise ValueError(f"not the weights of a Pix2Seq model (image encoder, autoregressive decoder): no model/{e.args[0]}") from e
    if count("proj_mlp/"):
        found["projection"] = "mlp"
    elif position:
        found["projection"] = "linear_p" if count(r"proj\.Svis_pos_embedding") else "linear"
    learned = shapes.get("decoder/ar_decoder.Sseq_pos_embedding")
    found |= dict(pos_encoding_dec="learned", max_seq_len=learned[0]) if learned else dict(pos_encoding_dec="sin_cos")
    if position and not image_size and math.isqrt(position[0]) ** 2 == position[0]:
        image_size = (math.isqrt(position[0]) * cell,) * 2
    found |= {"image_size": tuple(image_size)} if image_size else {}
    differ = [f"{k} is {found[k]}, not {v}" for k, v in known.items() if k in found and found[k] != v]
    unknown = {"image_size", "projection", "max_seq_len"} - set(found | known)
    if unknown or differ:
        raise ValueError("; ".join(differ + [f"the weights do not tell {k}: give it, --{k}" for k in sorted(unknown)]))
    return Pix2SeqConfig(**found | known)


# What sample.py and eval.py ask of a run, for weights that no run here trained: train.py's defaults, on COCO.
CONVERTED_RUN = dict(data="coco", data_dir="", **{f"{split}_{kind}": "" for split in ("train", "val") for kind in
                     ("json", "keypoints", "captions", "images")}, bad_boxes="drop", top_p=0.4, top_k=0, temperature=1.0,
                     max_points=128, seg_samples=8, seg_top_p=0.8, crop_margin=0.5, kpt_top_p=0.1, caption_length=128, cap_top_p=1.0)


def reference_checkpoint(path, categories=(), image_size=None, bins=1000, coord_shift=1000, text_shift=3000, pieces="", **known):
    """A checkpoint of the reference (see `read_reference_checkpoint`) -> the content of one of train.py's, for every script.

    categories:              annotation files in COCO's format that name the classes and their joints; without any, the
                             classes are named by number, as far as COCO's 90
    image_size, known:       as of `infer_config`
    bins ... pieces:         of the vocabulary, which the weights do not tell: see tokenizer.Vocab; `pieces` is a SentencePiece file
    Raises ValueError and FileNotFoundError, as what it calls.
    """
    weights = read_reference_checkpoint(path)
    model = Pix2Seq(infer_config(weights, image_size, **known))
    load_reference_weights(model, weights)
    c, room = model.config, coord_shift - 101          # class tokens lie between 100 and coord_shift; ids start at 1
    if not 0 < coord_shift + bins <= text_shift <= c.vocab_size:
        raise ValueError(f"the vocabulary of {c.vocab_size} tokens does not hold {bins} bins from {coord_shift} on, and text from {text_shift} on")
    named = {} if categories else {i: {"id": i, "name": str(i)} for i in range(1, min(90, room) + 1)}
    for file in categories:
        with open(file, encoding="utf-8") as f:
            for category in json.load(f)["categories"]:
                kept = {key: category[key] for key in ("id", "name", "keypoints", "skeleton") if key in category}
                named[category["id"]] = named.get(category["id"], {}) | kept
    if any(not 0 < i <= room for i in named):
        raise ValueError(f"{', '.join(categories)}: category ids go beyond the {room} class tokens")
    run = CONVERTED_RUN | dict(tasks="det,seg,kpt,cap" if c.vocab_size > text_shift else "det",      # text comes with all tasks
                               bins=bins, coord_shift=coord_shift, text_shift=text_shift, pieces=pieces,
                               max_objects=min(100, c.max_seq_len // 5))
    return {"network": "Pix2Seq", "model": model.state_dict(), "step": 0, "preset": "converted", "config": run | {"model": asdict(c)},
            "categories": [category | {"label": i} for i, category in sorted(named.items())]}


# ---------------------------------------------------------------------------------------------------------------
# size table

def count_parameters(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def print_sizes():
    """One row a named size: trainable parameters; FLOPs to encode a 640 x 640 image and to score 500 tokens about it."""
    from torch.utils.flop_counter import FlopCounterMode
    print(f"{'size':14}{'encoder layers x dim':>22}{'decoder layers x dim':>22}{'parameters':>14}{'GFLOPs 640x640':>16}")
    for name, config in SIZES.items():
        with torch.device("meta"):
            model = Pix2Seq(replace(config, image_size=(640, 640))).eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(torch.empty(1, 3, 640, 640), torch.empty(1, 500, dtype=torch.long))
        c = config
        print(f"{name:14}{f'{c.enc_layers} x {c.enc_dim}':>22}{f'{c.dec_layers} x {c.dec_dim}':>22}"
              f"{count_parameters(model):>14,}{counter.get_total_flops() / 1e9:>16.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--convert", nargs=2, metavar=("SRC", "DST"), help="checkpoint of the reference, and the file to write")
    parser.add_argument("--categories", nargs="+", default=[], help="annotation files in COCO's format that name the classes and joints")
    parser.add_argument("--image_size", type=lambda text: tuple(int(n) for n in (text.split(",") * 2)[:2]), help="640, or height,width")
    parser.add_argument("--bins", type=int, default=1000)
    parser.add_argument("--coord_shift", type=int, default=1000)
    parser.add_argument("--text_shift", type=int, default=3000)
    parser.add_argument("--pieces", default="", help="SentencePiece model file, for captions")
    for key, kind in (("projection", str), ("max_seq_len", int), ("resnet_variant", str)):
        parser.add_argument(f"--{key}", type=kind, default=argparse.SUPPRESS, help="where the weights do not tell it")
    args = vars(parser.parse_args())
    paths = args.pop("convert")
    if not paths:
        return print_sizes()
    try:
        content = reference_checkpoint(paths[0], **args)
    except (ImportError, OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    torch.save(content, paths[1] + ".tmp")
    os.replace(paths[1] + ".tmp", paths[1])
    print(f"{content['config']['model']}\nwritten to {paths[1]}; next: python sample.py photo.jpg --ckpt={paths[1]}")


if __name__ == "__main__":
    main()
