"""The networks: an image encoder and an autoregressive decoder that writes token sequences about the image.

Papers: Pix2Seq (arXiv 2109.10852), its multi-task form (2206.07669), ViT (2010.11929), ResNet (1512.03385).
Images are (B, 3, H, W) float in [0, 1]; a decoder reads and writes (B, T) or, with G sequences about each image,
(B, G, T) integer tokens. One attention, one MLP and one layer serve every network in this file.
Left out: the training (train.py), and what the tokens mean (tokenizer.py).

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
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------
# positions

def sincos_1d(n, dim, maximum=2 * math.pi):
    """(n, dim) float32 code of n coordinates spread evenly over [0, maximum]: all sines, then all cosines."""
    coords = torch.arange(n, dtype=torch.float32) / max(n - 1, 1) * maximum
    i = torch.arange(dim)
    angles = coords[:, None] / 10000 ** (2 * (i // 2) / dim)                   # (n, dim)
    return torch.cat([angles[:, 0::2].sin(), angles[:, 1::2].cos()], -1)


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
    """Adds a position code to (B, N, D) tokens. kind: learned (a parameter) or sin_cos (a constant)."""

    def __init__(self, kind, rows, cols, dim, maximum=2 * math.pi):
        super().__init__()
        if kind == "learned":
            self.code = embedding(rows * cols, dim)
        elif kind == "sin_cos":
            self.register_buffer("code", sincos_2d(rows, cols, dim, maximum), persistent=False)
        else:
            raise ValueError(f"unknown position code {kind!r}, expected 'learned' or 'sin_cos'")

    def forward(self, x, start=0):
        return x + self.code[start:start + x.shape[1]]


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
        if att_dim % heads:
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
        self.context = layer.cross_att.project(context)
        heads, hs = self.context[0].shape[1], self.context[0].shape[3]
        self.written = self.context[0].new_zeros(2, sequences, heads, length, hs)
        self.length = 0

    def append(self, kv):
        """Keys and values of new tokens, each (S, nh, T, hs) -> those of all tokens up to now."""
        start, self.length = self.length, self.length + kv[0].shape[2]
        self.written[0, :, :, start:self.length], self.written[1, :, :, start:self.length] = kv
        return self.written[0, :, :, :self.length], self.written[1, :, :, :self.length]


class Layer(nn.Module):
    """A transformer layer: self-attention, then cross-attention if it has a context, then an MLP; each pre-norm."""

    def __init__(self, dim, mlp_dim, heads, context_dim=None, causal=False, drop_path=0.0, dropout=0.0, att_dropout=0.0):
        super().__init__()
        self.causal = causal
        self.self_norm, self.self_att = layer_norm(dim), Attention(dim, heads, dropout=att_dropout)
        if context_dim:
            self.cross_norm = layer_norm(dim)
            self.cross_att = Attention(dim, heads, context_dim, dropout=att_dropout)
        self.mlp = MLP(dim, mlp_dim, drop_path, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, context=None, cache=None):
        """x: (S, T, dim). context: (B, N, context_dim), S a multiple of B: S / B sequences about each image."""
        y = self.self_norm(x)
        kv = self.self_att.project(y)
        if cache is not None:
            kv = cache.append(kv)
        x = x + self.drop_path(self.self_att(y, kv, causal=self.causal and x.shape[1] > 1))
        if hasattr(self, "cross_att"):
            kv = self.cross_att.project(context) if cache is None else cache.context
            # Nothing is masked here, so the sequences about an image are just more queries: no copy of its keys.
            y = self.cross_norm(x).view(kv[0].shape[0], -1, x.shape[2])        # (B, S/B * T, dim)
            x = x + self.drop_path(self.cross_att(y, kv).view(x.shape))
        return self.mlp(x)


def run_layers(layers, x, *args, checkpointing=False):
    """x through all layers; with `checkpointing` their activations are computed again in the backward pass."""
    for layer in layers:
        x = checkpoint(layer, x, *args, use_reentrant=False) if checkpointing else layer(x, *args)
    return x


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
    checkpointing: bool = False                # recompute activations in the backward pass: less memory, 4/3 the time


SIZES = {
    "vit_tiny": Pix2SeqConfig(patch_size=16, enc_layers=6, enc_dim=192, enc_mlp=768, enc_heads=6,
                              dec_layers=3, dec_dim=192, dec_mlp=768, dec_heads=6),
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
# weights from elsewhere: their names and layouts -> ours, then another size -> the model's, then into the model

RENAMES = [                                    # applied in order to a name of the reference's checkpoint
    (r"^model/", ""),
    (r"transformer_encoder/enc_layers|(?<=decoder/)decoder/dec_layers", "layers"),
    (r"/mha_ln/", "/self_norm/"), (r"/mha/", "/self_att/"), (r"_(self|cross)_mha/", r"_\1_att/"),
    (r"/(self|cross)_ln/", r"/\1_norm/"), (r"/(self|cross)_mha/", r"/\1_att/"),
    (r"/_(query|key|value|output)_dense/", lambda m: f"/{dict(query='q', key='k', value='v', output='out')[m[1]]}/"),
    (r"mlp/mlp_layers/0/dense([12])/", r"mlp/fc\1/"), (r"mlp/layernorms/0/", "mlp/norm/"),
    (r"/stem_(conv|projection)/", "/patch/"), (r"/stem_ln/", "/patch_norm/"), (r"/output_ln/", "/norm/"), (r"^proj_ln/", "proj_norm/"),
    (r"^encoder/(vit|rest)\.Svis_pos_embedding", "encoder/position/code"), (r"^proj\.Svis_pos_embedding", "proj_position/code"),
    (r"^encoder/(vit|rest)\.Scls_token_embedding", "encoder/cls"),
    (r"ar_decoder\.Sseq_pos_embedding", "position/code"), (r"ar_decoder\.S(inp_)?token_embedding", "embed"),
    (r"ar_decoder\.Soutp_token_embedding", "unembed"), (r"ar_decoder\.Soutp_bias", "bias"),
    (r"initial_conv_relu_max_pool/(\d)/conv2d/", lambda m: f"stem/{int(m[1]) // 2}/conv/"),     # 0, or 0, 2, 4 in c3
    (r"initial_conv_relu_max_pool/(\d)/bn/", lambda m: f"stem/{(int(m[1]) - 1) // 2}/norm/"),   # 2, or 1, 3, 6
    (r"/block_groups/(\d)/layers/", r"/stages/\1/"), (r"/projection_layers/\d/", "/shortcut/"),
    (r"/conv_relu_dropblock_layers/(\d)/", lambda m: f"/convs/{int(m[1]) // 3}/"),              # conv, norm, nothing
    (r"/conv2d/", "/conv/"), (r"/bn/", "/norm/"), (r"/moving_mean$", "/running_mean"), (r"/moving_variance$", "/running_var"),
    (r"/(kernel|gamma)$", "/weight"), (r"/beta$", "/bias"),
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
    shared = model.config.shared_embedding
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
    return {"model": model.state_dict(), "step": 0, "best": -1.0, "preset": "converted", "config": run | {"model": asdict(c)},
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
