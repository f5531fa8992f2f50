"""The networks: an image encoder with an autoregressive decoder that writes token sequences about
the image (Pix2Seq), the denoisers of diffusion (RIN, UNet, FIT, Panoptic), and ImageAR.

Papers: Pix2Seq (arXiv 2109.10852), its multi-task form (2206.07669), ViT (2010.11929), ResNet
(1512.03385), RIN (2212.11972), UNet as in Bit Diffusion (2208.04202), Pix2Seq-D (2210.06366), FIT
(2305.12689).
Images are (B, 3, H, W) float in [0, 1]; a decoder reads and writes (B, T) or, with G sequences
about each image, (B, G, T) integer tokens; a denoiser reads and writes (B, C, H, W), of a video
(B, C, T, H, W), in the range of its data. One attention, one MLP and one layer serve all networks.
Below the ruled line stand ResNet, the denoisers, hardware, checkpoints, weights of the reference.
Left out: the training (train.py), what tokens mean (tokenizer.py), noise and sampling
(diffusion.py).

    python model.py                                     # named sizes: parameters and FLOPs
    python model.py --convert DIR coco.pt det_coco_vit_b --categories instances_val2017.json
"""
import copy
import glob
import importlib.util
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import zip_longest
from os.path import basename, dirname, isdir, isfile
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import tokenizer
from tokenizer import (
    Count, Natural, Positive, Rate, UserError, between, check_choice, frozen, require)

# --------------------------------------------------------------------------------------------------
# blocks

# Not cuDNN's: for a single query it takes several kernels, and some versions are wrong there.
DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Code = Literal["sin_cos", "learned"]
PositionKind = Literal["learned", "sin_cos", "sin_cos_plus_learned"]


class Position(nn.Module):
    """Adds a position code to tokens (..., N, dim), N = frames * rows * cols or less. kind:
    learned, sin_cos, or sin_cos_plus_learned (their sum, the learned part zero at first)."""

    def __init__(self, kind, rows, cols, dim, maximum=2 * math.pi, frames=1):
        super().__init__()
        self.shape, self.residual = (rows, cols), 0
        if kind == "learned":
            self.code = embedding(frames * rows * cols, dim)
            return
        code = sincos_2d(rows, cols, dim, maximum)
        if kind == "sin_cos":          # for several frames the reference repeats patch by patch
            code = code.repeat_interleave(frames, 0)
        else:
            code = code.repeat(frames, 1)
            self.residual = nn.Parameter(torch.zeros_like(code))
        self.register_buffer("code", code, persistent=False)

    def table(self):
        return self.code + self.residual

    def forward(self, x, at=None):
        """at: positions of the tokens; None: they are the first."""
        return x + self.table()[slice(x.shape[-2]) if at is None else at]

    def start(self, count):
        """The code alone, where latents of `count` examples start: (count, rows, cols, dim)."""
        return self.table().unflatten(0, self.shape).expand(count, -1, -1, -1)


class Attention(nn.Module):
    """Multi-head attention of x (B, T, dim) to keys and values that `project` made."""

    def __init__(self, dim, heads, context_dim=None, att_dim=None, dropout=0.0):
        super().__init__()
        att_dim = att_dim or dim                        # of all heads together
        check_multiples("attention width", heads, "heads", att_dim)
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(dim, att_dim)
        self.kv = nn.Linear(context_dim or dim, 2 * att_dim)
        self.out = nn.Linear(att_dim, dim)
        for layer in self.q, self.kv:                   # in the reference D x heads x size,
            layer.fans = layer.in_features * (heads + att_dim // heads)
        self.out.fans = att_dim + heads * dim           # and heads x size x D

    def project(self, context):
        """(B, N, context_dim) -> keys and values in one tensor (2, B, nh, N, hs)."""
        return self.kv(context).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def query(self, x):
        return self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)     # (B, nh, T, hs)

    def forward(self, x, kv, causal=0, at=None):
        """causal: see Layer. at: positions (T,) of x, of which keys have the first N; None: the
        same ones."""
        q, (k, v) = self.query(x), kv                   # (B, nh, T, hs), (B, nh, N, hs)
        mask = None
        if causal > 1 or at is not None:
            chunk = torch.arange(k.shape[2], device=x.device) // causal
            mask = (chunk if at is None else at // causal)[:, None] >= chunk        # (T, N)
        y = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout * self.training, causal == 1 and mask is None)
        return self.out(y.transpose(1, 2).flatten(2))   # (B, T, dim)


class MLP(nn.Module):
    """Pre-norm residual MLP of one hidden layer, exact GELU."""

    def __init__(self, dim, hidden, drop_path=0.0, dropout=0.0):
        super().__init__()
        self.norm = layer_norm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)

    def forward(self, x):
        y = F.gelu(self.fc1(self.norm(x)))              # (B, T, hidden)
        return x + self.drop_path(self.fc2(self.dropout(y)))


class Layer(nn.Module):
    """A transformer layer: self-attention, cross-attention if there is a context, an MLP if
    mlp_dim; each pre-norm. causal: no token sees later ones; or n: later chunks of n tokens.
    context_norm: a LayerNorm on the context, too. Without self-attention (a read or a write) the
    cross-attention is as wide as the narrower of x and context."""
    checkpointing = False                               # recompute activations in the backward pass

    def __init__(
            self, dim, mlp_dim, heads, context_dim=None, causal=0, drop_path=0.0, dropout=0.0,
            att_dropout=0.0, self_attention=True, context_norm=False):
        super().__init__()
        self.causal = causal
        if self_attention:
            self.self_norm = layer_norm(dim)
            self.self_att = Attention(dim, heads, dropout=att_dropout)
        if context_dim:
            self.cross_norm = layer_norm(dim)
            self.context_norm = layer_norm(context_dim) if context_norm else nn.Identity()
            att_dim = dim if self_attention else min(dim, context_dim)
            self.cross_att = Attention(dim, heads, context_dim, att_dim, att_dropout)
        self.mlp = MLP(dim, mlp_dim, drop_path, dropout) if mlp_dim else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x, context=None, cache=None, at=None):
        """x: (S, T, dim). context: (B, N, context_dim), with S / B sequences about each image.
        With a cache, which has the context, x are tokens at positions `at` (T,)."""
        if self.checkpointing and self.training:
            return checkpoint(self.compute, x, context, use_reentrant=False)
        return self.compute(x, context, cache, at)

    def compute(self, x, context, cache=None, at=None):
        if hasattr(self, "self_att"):
            y = self.self_norm(x)
            kv = self.self_att.project(y)               # (2, S, nh, T, hs)
            if cache is not None:
                kv = cache.append(kv, at)
            x = x + self.drop_path(self.self_att(y, kv, self.causal, at))
        if hasattr(self, "cross_att"):
            kv = self.project_context(context) if cache is None else cache.context
            # Nothing is masked here, so the sequences about an image are just more queries.
            y = self.cross_norm(x).view(kv.shape[1], -1, x.shape[2])        # (B, S/B * T, dim)
            x = x + self.drop_path(self.cross_att(y, kv).view(x.shape))
        return self.mlp(x)

    def project_context(self, context):
        return self.cross_att.project(self.context_norm(context))           # (2, B, nh, N, hs)


class Layers(nn.ModuleList):
    """So many Layers, one after the other."""

    def __init__(self, count, *sizes, **options):
        super().__init__(Layer(*sizes, **options) for _ in range(count))

    def forward(self, x, context=None, caches=(), at=None):
        """caches: of each layer, or of none; see `Layer`."""
        for layer, cache in zip_longest(self, caches):
            x = layer(x, context, cache, at)
        return x


# --------------------------------------------------------------------------------------------------
# Pix2Seq: encoder, projection, decoder

@frozen
class EncoderConfig:
    """Everything that fixes the shape of an Encoder."""
    image_size: tuple[Count, Count] = (640, 640)    # height and width of the padded image, pixels
    encoder: Literal["vit", "resnet", "fit"] = "vit"    # of patches, of a ResNet's features, FIT
    patch_size: Count = 16              # side of a ViT patch, in pixels
    resnet_variant: Literal["standard", "c4", "dc5", "c3"] = "standard"     # stride 32, 16, 16, 8
    resnet_depth: Literal[50, 101, 152] = 50    # layers of the whole ResNet
    resnet_width: Positive = 1.0        # factor on the channels of the ResNet
    freeze_bn: bool = False             # train neither statistics nor scales of batch norm
    enc_layers: Natural = 12            # encoder: transformer layers; of a fit see fit_layers
    enc_dim: Count = 768                # encoder: width
    enc_mlp: Count = 3072               # encoder: hidden width of an MLP
    enc_heads: Count = 12               # encoder: attention heads
    fit_layers: str = "(2)4(2)4"        # fit: (local layers) layers of latents, and so on
    fit_grid: Count = 2                 # fit: groups are the cells of such a grid over the image
    fit_copies: Natural = 1             # fit: more groups, each the whole image as small as a cell
    fit_latents: Count = 32             # fit: latents of a group
    fit_latent_dim: Count = 768         # fit: their width
    patch_norm: bool = True             # normalise patches, as other code's ViT does not
    pos_encoding: Code = "sin_cos"      # position of an image patch
    cls_token: bool = False             # prepend a learned token to the patches
    drop_path: Rate = 0.1               # fraction of residual branches left out in training
    dropout: Rate = 0.1                 # fraction of MLP units left out in training
    att_dropout: Rate = 0.0             # fraction of attention weights left out in training


@frozen
class Pix2SeqConfig(EncoderConfig):
    """Everything that fixes the shape of a Pix2Seq model."""
    TASKS = "det", "seg", "kpt", "cap"
    projection: Literal["linear", "linear_p", "mlp"] = "mlp"    # to the decoder, + position, + MLP
    dec_layers: Natural = 6             # decoder: transformer layers
    dec_dim: Count = 512                # decoder: width
    dec_mlp: Count = 2048               # decoder: hidden width of an MLP
    dec_heads: Count = 16               # decoder: attention heads
    pos_encoding_dec: Code = "learned"  # position of a token
    vocab_size: Count = 3000            # tokens in the vocabulary
    max_seq_len: Count = 512            # longest sequence, prompt included
    shared_embedding: bool = True       # one matrix embeds tokens and scores them
    output_bias: bool = True            # a bias on the scores of the tokens


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> tokens (B, N, enc_dim): a transformer over a grid, row by row, of
    patches of pixels (vit) or of positions in a ResNet's last feature map (resnet)."""

    def __init__(self, c):
        super().__init__()
        dim = c.enc_dim
        self.shapes = []               # (C, H, W) of the feature maps that it returns, too
        if c.encoder == "vit":         # pixels beyond the last whole patch are not seen: 5 of 1333
            self.patch = nn.Conv2d(3, dim, c.patch_size, c.patch_size)
            self.grid = tuple(side // c.patch_size for side in c.image_size)
        else:
            self.resnet = ResNet(c)
            *self.shapes, (channels, *grid) = self.resnet.shapes
            self.grid = tuple(grid)
            self.patch = nn.Linear(channels, dim)
            self.dropout = nn.Dropout(c.dropout)
        require(
            0 not in self.grid,
            f"image_size {c.image_size} is smaller than patch_size {c.patch_size}")
        self.patch_norm = layer_norm(dim) if c.patch_norm else nn.Identity()
        self.position = Position(c.pos_encoding, *self.grid, dim)
        self.cls = embedding(1, dim) if c.cls_token else None
        self.layers = Layers(c.enc_layers, dim, c.enc_mlp, c.enc_heads, **dropouts(c))
        self.norm = layer_norm(dim)

    def forward(self, images):
        """Returns the tokens and a list of feature maps: those of all stages of a ResNet but the
        last, finest first."""
        maps = []
        if hasattr(self, "resnet"):
            *maps, last = self.resnet(images)
            x = self.patch(self.dropout(last.flatten(2).mT))                # (B, N, D)
        else:
            x = self.patch(images).flatten(2).mT        # (B, N, D)
        x = self.position(self.patch_norm(x))
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)           # (B, 1 + N, D)
        return self.norm(self.layers(x)), maps


class Vocabulary(nn.Module):
    """The tables of a network that reads and writes tokens."""

    def __init__(self, c, size, dim):
        super().__init__()
        self.embed = embedding(size, dim)
        self.unembed = None if c.shared_embedding else embedding(size, dim)
        self.bias = embedding(size) if c.output_bias else None

    def scores(self, x):
        """What the network makes of tokens (..., dim) -> logits of the next ones (..., size)."""
        return F.linear(x, self.embed if self.unembed is None else self.unembed, self.bias)


class Decoder(Vocabulary):
    """Tokens (S, T) and encoded images (B, N, dec_dim) -> what `scores` makes logits of the next
    tokens of (S, T, D)."""

    def __init__(self, c, context_dim):
        super().__init__(c, c.vocab_size, c.dec_dim)
        self.position = Position(c.pos_encoding_dec, c.max_seq_len, 1, c.dec_dim)
        self.layers = Layers(
            c.dec_layers, c.dec_dim, c.dec_mlp, c.dec_heads, context_dim, causal=True,
            **dropouts(c))
        self.norm = layer_norm(c.dec_dim)

    def forward(self, tokens, context, caches=(), at=None):
        """With a Cache for each layer, tokens are those at positions `at` (T,)."""
        x = self.position(F.embedding(tokens, self.embed), at)              # (S, T, D)
        return self.norm(self.layers(x, context, caches, at))


class Generated(NamedTuple):
    """What `Pix2Seq.generate` wrote: G sequences per image, without the prompts."""
    tokens: torch.Tensor                                # (B, G, T) int64; padding after the end
    probs: torch.Tensor                                 # (B, G, T) float32, in the full softmax
    logprobs: torch.Tensor                              # (B, G, T, K) float32 of K chosen tokens


class Pix2Seq(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config, dim = c, c.dec_dim
        if c.encoder == "fit":                          # the decoder attends to what it says
            self.encoder = FITEncoder(c)
            dim = self.encoder.dim
        else:
            self.encoder = Encoder(c)
            self.proj, self.proj_norm = nn.Linear(c.enc_dim, dim), layer_norm(dim)
            if c.projection != "linear":
                self.proj_position = Position(c.pos_encoding, *self.encoder.grid, dim)
            if c.projection == "mlp":                   # the encoder's ratio, as in the reference
                self.proj_mlp = MLP(dim, c.enc_mlp // c.enc_dim * dim, c.drop_path, c.dropout)
        self.decoder = Decoder(c, dim)
        initialize(self)

    def encode(self, images):
        """(B, 3, H, W) float in [0, 1] -> (B, N, dec_dim), what the decoder attends to."""
        if self.config.encoder == "fit":
            return self.encoder(images)
        x, _ = self.encoder(images)                     # (B, N, enc_dim)
        x = self.proj_norm(self.proj(x))                # (B, N, dec_dim)
        if self.config.projection != "linear":
            first = int(self.config.cls_token)          # a class token has no position
            x = torch.cat([x[:, :first], self.proj_position(x[:, first:])], 1)
        if self.config.projection == "mlp":
            x = self.proj_mlp(x)
        return x

    def forward(self, images, tokens, targets=None, smoothing=0.0):
        """Teacher forcing: images and (B, T) or (B, G, T) -> logits (B, T, V) or (B, G, T, V); with
        targets, shaped like tokens, the cross entropy of each instead."""
        x = self.decoder(tokens.flatten(0, -2), self.encode(images)).view(*tokens.shape, -1)
        if targets is None:
            return self.decoder.scores(x)
        return output_losses(self.decoder, x, targets, smoothing)

    @torch.no_grad()
    @sdpa_kernel(DECODING)
    def generate(
            self, context, prompts, length, samples=1, end=None, return_logprobs=slice(0),
            suppress=None, generator=None, **sampling):
        """Writes up to `length` tokens after each prompt. Returns Generated.

        context:     (B, N, dec_dim), from `encode`; every sequence about an image shares it
        prompts:     (B, P) or (B, G, P) int64
        samples:     sequences per prompt; G grows by this factor, those of a prompt side by side
        end:         token after which a sequence is padded; stops when all have ended. None: never
        return_logprobs: slice of the vocabulary whose log-probabilities are wanted at every step
        suppress:    token that may be written and read on, but in the result another stands in its
                     place, drawn without it; no probability counts it (2206.07669)
        generator:   torch.Generator on the device of `context`, for results that repeat
        sampling:    temperature, top_k, top_p: see `sample_token`
        """
        B, P = len(context), prompts.shape[-1]
        require(
            P + length <= self.config.max_seq_len + 1,  # the last token is never read
            f"prompt of {P} and {length} tokens exceed max_seq_len {self.config.max_seq_len}")
        new = prompts.reshape(-1, P)                    # what the decoder has not seen
        S, device = len(new) * samples, context.device
        at = torch.arange(P, device=device)             # positions of `new`
        caches = [Cache(layer, context, P) for layer in self.decoder.layers]
        tokens = new.new_zeros(S, length)
        probs = torch.zeros(S, length, device=device)
        logprobs = probs.new_full((S, length, len(self.decoder.embed[return_logprobs])), -math.inf)
        rows = torch.arange(S, device=device)           # the sequences that have not ended
        if P > 1:
            self.decoder(new[:, :-1], context, caches, at[:-1])
            for cache in caches:
                cache.select(rows // samples)           # samples of a prompt part here
        new, at = new[rows // samples, -1:], at[-1:]

        @Device.replayed
        def write(new, at, uniform):
            """The next token of each sequence, as it is read on and as it is shown (S,); of that
            the probability (S,); and the log-probabilities that are wanted (S, K)."""
            x = self.decoder(new, context, caches, at)[:, -1]               # (S, D)
            logits = self.decoder.scores(x).float()     # (S, V)
            token = shown = sample_token(logits, uniform[0], **sampling)    # (S,)
            if suppress is not None:
                logits[:, suppress] = -math.inf
                other = sample_token(logits, uniform[1], **sampling)
                shown = torch.where(token == suppress, other, token)
            logprob = logits.log_softmax(-1)
            prob = logprob.gather(1, shown[:, None])[:, 0].exp()
            return token, shown, prob, logprob[:, return_logprobs]

        for t in range(length):
            for cache in caches:                        # attention masks what is to come
                cache.room = 64 * math.ceil((P + (length if context.is_cuda else t)) / 64)
            uniform = torch.rand(2, S, generator=generator, device=device)[:, rows]
            token, tokens[rows, t], probs[rows, t], logprobs[rows, t] = write(new, at, uniform)
            new, at = token[:, None], at + 1
            if end is not None and t % 16 == 15:        # reading it waits for the GPU: not often
                ended = (tokens[rows, :t + 1] == end).any(1).view(B, -1)
                most = int((~ended).sum(1).max())       # as many for each image
                if not most:
                    break
                G = ended.shape[1]
                if most < G:
                    kept = ended.argsort(stable=True)[:, :most]             # of an image's G
                    kept = (kept + G * torch.arange(B, device=device)[:, None]).flatten()
                    rows, new = rows[kept], new[kept]
                    for cache in caches:
                        cache.select(kept)
        if end is not None:
            after = (tokens == end).cumsum(1).cumsum(1) > 1
            tokens[after] = probs[after] = 0
        return Generated(*(x.unflatten(0, (B, -1)) for x in (tokens, probs, logprobs)))


def sample_token(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """(S, V) float -> (S,) int64, drawn from the filtered softmax by uniform random numbers (S,);
    the likeliest if temperature is 0 or top_k is 1."""
    if temperature == 0 or top_k == 1:
        return logits.argmax(1)
    probs = filter_logits(logits / temperature, top_k, top_p).softmax(1)
    # The first token up to which the sum is larger; unlike torch.multinomial it never waits for the
    # device.
    sums = probs.cumsum(1)
    return (sums <= uniform[:, None] * sums[:, -1:]).sum(1)


def token_loss(forward, batch, c):
    """The weighted sum of the losses of a batch's tokens. c: a train.Config."""
    losses = forward(batch.images, batch.inputs, batch.targets, c.optim.label_smoothing)
    return (losses * batch.weights).sum()               # (B, [G,] T)


# ==== reference ===================================================================================
# small parts: caches, filters of logits, attention maps, losses, position codes, stochastic depth,
# initialisation, checks

class Cache:
    """Keys and values of one layer: of its context, if it has one, and of tokens up to now, in
    shapes that change seldom: with `room` for so many tokens."""

    def __init__(self, layer, context, room=0):
        self.written, self.room = None, room
        # Contiguous, as it is read at every token.
        self.context = None if context is None else layer.project_context(context).contiguous()

    def append(self, kv, at):
        """Keys and values of tokens at positions `at` (T,), (2, S, nh, T, hs) -> (2, S, nh, room,
        hs), those of all tokens up to now; later ones are zeros."""
        if self.written is None:
            self.written = kv[..., :0, :]
        missing = self.room - self.written.shape[3]
        if missing:
            self.written = F.pad(self.written, (0, 0, 0, missing))
        return self.written.index_copy_(3, at, kv)

    def select(self, rows):
        """Goes on with these of the sequences."""
        self.written = self.written[:, rows]


def filter_logits(logits, top_k=0, top_p=1.0):
    """(S, V) -> the same with -inf where a token is not among the top_k largest (0: all), or not
    among the largest whose cumulative probability stays within top_p (nucleus sampling,
    1904.09751); the largest always stays."""
    if top_k > 0:
        smallest = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        ordered = logits.sort(descending=True).values
        within = (ordered.softmax(1).cumsum(1) <= top_p).sum(1, keepdim=True)
        smallest = ordered.gather(1, within.clamp(min=1) - 1)
        logits = logits.masked_fill(logits < smallest, -math.inf)
    return logits


@torch.no_grad()
def attention_maps(model, context, tokens):
    """What the decoder of a Pix2Seq makes of an encoded image (1, N, dim) and input tokens (1, T):
    logits of the next tokens (T, V), and where it looks for each (T, N), the cross-attention
    averaged over layers and heads."""
    maps = []

    def look(attention, args):
        x, (k, _), *_ = args                                    # (1, T, D), (1, nh, N, hs)
        q = attention.query(x)                                  # (1, nh, T, hs)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        maps.append(weights.mean(1)[0])                         # (T, N)

    with ExitStack() as hooks:
        for layer in model.decoder.layers:
            hooks.enter_context(layer.cross_att.register_forward_pre_hook(look))
        x = model.decoder(tokens, context)
    return model.decoder.scores(x)[0], torch.stack(maps).mean(0)


def output_losses(decoder, x, targets, smoothing, most=1 << 24):
    """`token_losses` of what a decoder said, x (..., T, D). Logits of large vocabularies, of more
    than `most` numbers, are computed in parts, and in the backward pass again."""
    def losses(x, targets):
        return token_losses(decoder.scores(x), targets, smoothing)

    rows = most // len(decoder.embed)
    if targets.numel() <= rows:
        return losses(x, targets)
    parts = zip(x.flatten(0, -2).split(rows), targets.flatten().split(rows))
    parts = [checkpoint(losses, *part, use_reentrant=False) for part in parts]
    return torch.cat(parts).view(targets.shape)


def token_losses(logits, targets, smoothing=0.0):
    """Logits (..., T, V) and targets (..., T) -> cross entropy of each token (..., T) float32."""
    losses = F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(),
        label_smoothing=smoothing, reduction="none")
    return losses.view(targets.shape)


def sincos(coords, dim):
    """Coordinates (...) -> their codes (..., dim): all sines, then all cosines."""
    i = torch.arange(dim, device=coords.device)
    angles = coords[..., None] / 10000 ** (2 * (i // 2) / dim)              # (..., dim)
    return torch.cat([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1)


def spread(n, maximum):
    """n coordinates spread evenly over [0, maximum], float32."""
    return torch.arange(n) / max(n - 1, 1) * maximum


def sincos_2d(rows, cols, dim, maximum):
    """(rows * cols, dim) float32: half of the width codes the row, half the column."""
    if 1 in (rows, cols):
        return sincos(spread(rows * cols, maximum), dim)
    coords = torch.cartesian_prod(spread(rows, maximum), spread(cols, maximum))     # (N, 2)
    return sincos(coords, dim // 2).flatten(1)          # (N, dim)


layer_norm = partial(nn.LayerNorm, eps=1e-6)


def embedding(*shape):
    """A table of truncated normal numbers of deviation 0.02, none beyond two."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02, a=-0.04, b=0.04))


class DropPath(nn.Dropout):
    """Leaves out a residual branch of some examples (stochastic depth, 1603.09382)."""

    def forward(self, x):
        if self.training and self.p:
            keep = torch.rand(len(x), 1, 1, device=x.device) < 1 - self.p
            x = x * keep / (1 - self.p)
        return x


def dropouts(c):
    """The rates of a Layer."""
    return dict(drop_path=c.drop_path, dropout=c.dropout, att_dropout=c.att_dropout)


def initialize(model):
    """Glorot-uniform dense and convolution weights, zero biases; embeddings keep their truncated
    normal (std 0.02). `fans` of a layer are its inputs and outputs as the reference counts them:
    it decides how soon small networks learn."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            if module.bias is None:    # a ResNet's: truncated normal of variance 1 / inputs
                # The cut leaves 0.88 of the deviation.
                edge = 2 * module.weight[0].numel() ** -0.5 / 0.87962566
                nn.init.trunc_normal_(module.weight, std=edge / 2, a=-edge, b=edge)
            else:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if hasattr(module, "fans"):
            limit = math.sqrt(6 / module.fans)
            nn.init.uniform_(module.weight, -limit, limit)


def starts_at_zero(layer):
    """Marks a layer for `initialize`: it adds nothing at first."""
    layer.fans = math.inf
    return layer


def set_checkpointing(model, on):
    """Whether training recomputes the activations of all layers: less memory, more time."""
    for module in model.modules():
        if isinstance(module, Layer):
            module.checkpointing = on


def check_multiples(what, factor, of, *numbers):
    for number in numbers:
        require(
            factor and not number % factor, f"{what} {number} is not a multiple of {factor} ({of})")


# --------------------------------------------------------------------------------------------------
# ResNet

class ConvNorm(nn.Sequential):
    """Convolution without bias, then batch norm. Both sides are padded alike at any stride."""

    def __init__(self, inputs, outputs, kernel, stride=1, dilation=1):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
        self.norm = nn.BatchNorm2d(outputs)


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions, the stride in the 3x3 (1512.03385, v1); at
    first the identity."""

    def __init__(self, inputs, width, stride=1, dilation=1):
        super().__init__()
        outputs = 4 * width
        self.convs = nn.ModuleList([
            ConvNorm(inputs, width, 1),
            ConvNorm(width, width, 3, stride, dilation),
            ConvNorm(width, outputs, 1),
        ])
        nn.init.zeros_(self.convs[2].norm.weight)
        self.shortcut = ConvNorm(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x):
        reduce, conv, expand = self.convs
        y = expand(F.relu(conv(F.relu(reduce(x)))))
        return F.relu(y + self.shortcut(x))


RESNET_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # depth: of each stage
RESNET_STRIDES = {                                      # variant: of each stage
    "standard": (1, 2, 2, 2),
    "c4": (1, 2, 2),
    "c3": (2, 2),
    "dc5": (1, 2, 2, 1),
}


class ResNet(nn.Module):
    """Images (B, 3, H, W) -> list of the feature maps of all stages, finest first, of 256 * width *
    2^i channels.

    With freeze_bn, batch norm uses and keeps the statistics, scales and offsets it was loaded with.
    Else several processes norm by their own images, unless SyncBatchNorm shares the statistics (see
    Device.place). The reference averages variances of n, torch of n - 1.
    """

    def __init__(self, c):
        super().__init__()
        self.freeze = c.freeze_bn
        layout = zip(RESNET_STRIDES[c.resnet_variant], RESNET_BLOCKS[c.resnet_depth])
        w = int(64 * c.resnet_width)
        half = w // 2
        if c.resnet_variant == "c3":
            stem = [ConvNorm(3, half, 3), ConvNorm(half, half, 3), ConvNorm(half, w, 3)]
        else:
            stem = [ConvNorm(3, w, 7, 2)]
        self.stem, self.stages = nn.ModuleList(stem), nn.ModuleList()
        self.shapes = []                                # (C, H, W) of the maps, finest first
        channels, total = w, 2 * stem[0].conv.stride[0]         # total: stride from the image on
        for i, (stride, blocks) in enumerate(layout):
            width, total = w << i, total * stride
            # dc5's last stage is dilated, but not its first block, as in the reference.
            dilation = 2 if i and stride == 1 else 1
            stage = [Bottleneck(channels, width, stride)]
            channels = 4 * width
            stage += [Bottleneck(channels, width, 1, dilation) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*stage))
            self.shapes.append((channels, *(math.ceil(side / total) for side in c.image_size)))
        self.train()

    def train(self, mode=True):
        super().train(mode)
        if self.freeze:
            for module in self.modules():
                if hasattr(module, "running_mean"):     # batch norm, of one process or of several
                    module.eval().requires_grad_(False)
        return self

    def forward(self, images):
        x, maps = images, []
        for conv in self.stem:
            x = F.relu(conv(x))
        # Where a side is even, TensorFlow's 'SAME' pads only its end.
        odd = [side % 2 for side in x.shape[2:]]
        x = F.max_pool2d(x, 3, 2, odd, ceil_mode=True)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


# --------------------------------------------------------------------------------------------------
# parts of denoisers

@frozen
class ImageConfig:
    """What all networks share that make images."""
    sample_size: tuple[Count, Count] = (32, 32)    # height and width of what is made
    channels: Count = 3                 # its channels
    num_classes: Natural = 0            # labels, as condition (or features of that width); 0: none

    # No video and no logits, unless a network has them.
    frames, cond_frames, softmax_groups = 1, 0, 0

    @property
    def sample_shape(self):
        """(C, H, W), or of a video (C, T, H, W)."""
        frames = [self.frames] if self.frames + self.cond_frames > 1 else []
        return self.channels, *frames, *self.sample_size


@frozen
class VideoConfig(ImageConfig):
    """What those share that make videos, too."""
    frames: Count = 1                   # of the sample; 1: an image
    cond_frames: Natural = 0            # context frames of a video, as condition


class ScalarEmbedding(nn.Module):
    """A number per example (B,), and optional features (B, features) -> (B, dim)."""

    def __init__(self, dim, scaling, features=0, normalize=False):
        super().__init__()
        check_multiples("width of the time embedding", 4, "sines and cosines", dim)
        self.scaling, self.normalize = scaling, normalize
        self.fc1, self.fc2 = nn.Linear(dim // 4, dim), nn.Linear(dim + features, dim)

    def forward(self, t, features=None):
        code = sincos(t.float() * self.scaling, self.fc1.in_features)       # (B, dim / 4)
        if self.normalize:
            code = (code - code.mean(1, keepdim=True)) / code.std(1, correction=0, keepdim=True)
        x = F.silu(self.fc1(code))                      # (B, dim)
        return self.fc2(x if features is None else torch.cat([x, features], 1))


def check_inputs(c, x, labels, **conditions):
    """UserError if a denoiser's input has another shape than it predicts, or if it gets a
    condition that it does not take, or not one that it needs: name=(value, width or 0). Returns
    the labels as `one_hot_labels` does."""
    require(
        x.shape[1:] == c.sample_shape,
        f"samples of shape {tuple(x.shape[1:])}, expected {c.sample_shape}")
    require(labels is None or c.num_classes, "labels: this network takes none")
    check_conditions(**conditions)
    return one_hot_labels(labels, c.num_classes, x)


def check_conditions(**conditions):
    for name, (value, width) in conditions.items():
        require(
            (value is not None) == bool(width),
            f"{name}: this network {'needs them' if width else 'takes none'}")


def one_hot_labels(labels, classes, x):
    """Labels (B,) int64 of samples x (B, ...) -> (B, classes) float32, zeros for None and for -1, a
    label dropped for classifier-free guidance (2207.12598). Float features in their place pass."""
    if labels is None:
        return torch.zeros(len(x), classes, device=x.device)
    if labels.is_floating_point():
        return labels
    return F.one_hot(labels + 1, classes + 1)[:, 1:].float()


class SameConv2d(nn.Conv2d):
    """(B, C, H, W) -> (B, C', H / stride, W / stride), rounded up. Where padding is odd, bottom and
    right get more of it (TensorFlow's "SAME"), unlike torch's own."""

    def forward(self, x):
        pads, (kernel, _), (stride, _) = [], self.kernel_size, self.stride
        for size in reversed(x.shape[2:]):
            total = max(kernel - (size % stride or stride), 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def group_norm(dim, like=None):
    """GroupNorm over `dim` channels, in as many groups as fit `like` channels (default: dim)."""
    return nn.GroupNorm(min((like or dim) // 4, 32), dim)


# --------------------------------------------------------------------------------------------------
# parts of a RIN

def to_patches(x, patch_shape):
    """(B, C, [T,] H, W) -> (B, N, t * h * w * C); frames of zeros fill the last patch in time."""
    (t, h, w, C), (B, *_, H, W) = patch_shape, x.shape
    x = x.reshape(B, C, -1, H, W)                       # (B, C, T, H, W)
    missing = -x.shape[2] % t
    x = F.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))
    x = x.reshape(B, C, -1, t, H // h, h, W // w, w)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)               # (B, T', H', W', t, h, w, C)
    return x.flatten(4).flatten(1, 3)


def from_patches(x, patch_shape, shape):
    """(B, N, t * h * w * C), or of more dimensions -> `shape`: (B, C, [T,] H, W)."""
    (_, h, w, _), (B, C, *T, H, W) = patch_shape, shape
    x = x.reshape(B, -1, H // h, W // w, *patch_shape)  # (B, T', H', W', t, h, w, C)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)               # (B, C, T', t, H', h, W', w)
    x = x.reshape(B, C, -1, H, W)
    return x[:, :, :math.prod(T)].reshape(shape)        # without what filled the last patch


class WarmStart(nn.Module):
    """Adds to x (B, N, dim) what the last call left of its first N tokens (2212.11972, "Latent
    Self-Conditioning"); at first, nothing. Passes x if it is not `on`."""

    def __init__(self, dim, mlp_ratio, on):
        super().__init__()
        self.on = on
        if on:
            self.mlp, self.norm = MLP(dim, mlp_ratio * dim), starts_at_zero(layer_norm(dim))

    def forward(self, x, previous=None):
        if not self.on:
            return x
        previous = torch.zeros_like(x) if previous is None else previous[:, :x.shape[1]]
        return x + self.norm(self.mlp(previous))


class InterfaceConv(nn.Module):
    """Depthwise convolution of each frame of the interface (B, frames * rows * cols + K, dim) of
    such a grid; the extra tokens pass."""

    def __init__(self, c, grid):
        super().__init__()
        dim, self.grid = c.interface_dim, grid
        self.depthwise_conv = SameConv2d(dim, dim, c.conv_kernel, groups=dim)
        self.norm, self.dropout = group_norm(dim), nn.Dropout(c.conv_dropout)
        self.pointwise_conv = starts_at_zero(nn.Conv2d(dim, dim, 1))

    def forward(self, x):
        tokens, extra = x.tensor_split([math.prod(self.grid)], 1)
        y = tokens.unflatten(1, self.grid).flatten(0, 1).movedim(3, 1)      # (B * T, D, H, W)
        y = self.dropout(F.silu(self.norm(self.depthwise_conv(y))))
        y = self.pointwise_conv(y).movedim(1, 3).reshape(tokens.shape)
        return torch.cat([tokens + y, extra], 1)


# --------------------------------------------------------------------------------------------------
# RIN: Recurrent Interface Network, a denoiser (see diffusion.py)

@frozen
class RINConfig(VideoConfig):
    """Everything that fixes the shape of a RIN. The defaults are the reference's for CIFAR-10,
    without labels."""
    TASKS = "gen",
    frame_stride: Count = 1             # frames in a patch of a video
    self_cond: Literal["none", "latent", "interface", "latent+interface"] = "latent"  # fed back
    interface_patch: Count = 2          # side of the patch that becomes an interface token
    interface_dim: Count = 256          # interface: width
    interface_mlp_ratio: Natural = 2    # MLP after a write: hidden width / interface_dim; 0: no MLP
    interface_position: PositionKind = "learned"    # of its tokens
    latents: Count = 128                # latent tokens, those for time and condition included
    latent_dim: Count = 512             # latents: width
    latent_mlp_ratio: Count = 4         # latents: hidden width of an MLP / latent_dim
    latent_heads: Count = 16            # latents: heads of self-attention
    latent_position: PositionKind = "learned"   # their start
    latent_layers: tuple[Natural, ...] = (2, 2, 2)  # of each block; 0: it only reads
    rw_heads: Count = 8                 # attention heads of reads and writes
    rw_context_norm: bool = False       # a LayerNorm on what is read or written, too
    conv_kernel: Natural = 0            # side of a depthwise convolution after a write; 0: none
    conv_dropout: Rate = 0.0            # fraction of its units left out in training
    time_scaling: Positive = 1000.0     # gamma is multiplied by this before it is coded
    time_on_latents: bool = True        # the time token is a latent; else an extra token
    cond_on_latents: Natural = 1        # condition tokens among the latents (1 per label); 0: extra
    cond_dim: Natural = 0               # width of extra tokens; 0: interface_dim
    cond_proj: bool = True              # a dense layer on the condition; else it has that width
    cond_writable: bool = False         # extra tokens are written, too
    cond_decoupled_read: bool = False   # extra tokens are read by layers of their own
    drop_path: Rate = 0.1               # fraction of residual branches left out in training
    dropout: Rate = 0.1                 # fraction of MLP units left out in training
    att_dropout: Rate = 0.0             # fraction of attention weights left out in training


class RINBlock(nn.Module):
    """Read: latents attend to the interface. Process: latents attend to each other. Write: the
    interface attends to the latents."""

    def __init__(self, c, layers, cond_dim, grid):
        super().__init__()
        dim, latent_dim = c.interface_dim, c.latent_dim
        latent_mlp = c.latent_mlp_ratio * latent_dim
        attend = partial(Layer, self_attention=False, context_norm=c.rw_context_norm)
        self.read = attend(latent_dim, latent_mlp, c.rw_heads, dim)
        self.read_cond = self.write = None
        if c.cond_decoupled_read:
            self.read_cond = attend(latent_dim, latent_mlp, c.rw_heads, cond_dim)
        self.process = Layers(layers, latent_dim, latent_mlp, c.latent_heads, **dropouts(c))
        if layers:
            self.write = attend(dim, c.interface_mlp_ratio * dim, c.rw_heads, latent_dim)
        self.conv = InterfaceConv(c, grid) if layers and c.conv_kernel else nn.Identity()

    def forward(self, latents, interface, extra):
        """latents (B, M, latent_dim), interface (B, N, interface_dim), and a list of extra tokens
        that are only read (B, ., cond_dim), K together."""
        if self.read_cond:
            latents, extra = self.read_cond(latents, torch.cat(extra, 1)), []
        latents = self.process(self.read(latents, torch.cat([interface, *extra], 1)))
        if self.write:
            interface = self.write(interface, latents)
        return latents, self.conv(interface)


class RIN(nn.Module):
    """Recurrent Interface Network (2212.11972), for images and, where frames + cond_frames > 1, for
    videos.

    In the reference ("tape") several frames with `interface` self-conditioning, with writable extra
    tokens or with a convolution fail or mix up tokens; here they are as one would expect.
    """

    def __init__(self, c):
        super().__init__()
        self.config = c
        # In a video the label goes with the time.
        label_token = c.num_classes > 0 and len(c.sample_shape) == 3
        dim, latent_dim = c.interface_dim, c.latent_dim
        cond_dim = c.cond_dim or dim
        extra = not c.time_on_latents or label_token and not c.cond_on_latents
        check_multiples("sample_size", c.interface_patch, "interface_patch", *c.sample_size)
        require(
            not c.cond_decoupled_read or extra and not c.cond_writable,
            "cond_decoupled_read needs extra tokens (time_on_latents=False or "
            "cond_on_latents=0) and cond_writable=False")
        require(
            not extra or cond_dim == dim or c.cond_decoupled_read,
            f"cond_dim {cond_dim} is not interface_dim {dim}: it needs cond_decoupled_read")

        grid = [side // c.interface_patch for side in c.sample_size]
        steps = sum(math.ceil(frames / c.frame_stride) for frames in (c.frames, c.cond_frames))
        self.patch_shape = c.frame_stride, c.interface_patch, c.interface_patch, c.channels
        patch_dim = math.prod(self.patch_shape)
        self.patch = nn.Linear(patch_dim, dim)                  # a convolution in the reference
        self.patch.fans = patch_dim // c.channels * (c.channels + dim)
        self.patch_norm = layer_norm(dim)
        self.interface_position = Position(
            c.interface_position, *grid, dim, c.time_scaling, steps)
        own = c.latents - c.time_on_latents - label_token * c.cond_on_latents
        self.latent_position = Position(c.latent_position, 1, own, latent_dim, c.time_scaling)
        self.time_emb = ScalarEmbedding(
            latent_dim if c.time_on_latents else cond_dim, c.time_scaling,
            0 if label_token else c.num_classes, normalize=True)
        self.cond_proj = None
        if label_token:
            width = latent_dim if c.cond_on_latents else cond_dim
            self.cond_proj = nn.Linear(c.num_classes, width) if c.cond_proj else nn.Identity()
        self.latent_prev = WarmStart(latent_dim, c.latent_mlp_ratio, "latent" in c.self_cond)
        self.interface_prev = WarmStart(dim, c.interface_mlp_ratio, "interface" in c.self_cond)
        self.blocks = nn.ModuleList(
            RINBlock(c, layers, cond_dim, (steps, *grid)) for layers in c.latent_layers)
        self.norm = layer_norm(dim)
        self.output = nn.Linear(dim, patch_dim)
        initialize(self)

    def tokens(self, x, at=None):
        """(B, C, [T,] H, W) -> (B, N, interface_dim), frame by frame, row by row."""
        x = self.patch_norm(self.patch(to_patches(x, self.patch_shape)))
        return self.interface_position(x, at)

    def forward(self, x, gamma, self_cond=None, labels=None, frames=None):
        """A denoiser of diffusion.py.

        x:         (B, channels, *sample_size); of a video (B, channels, frames, *sample_size)
        gamma:     (B,) float, signal level of x
        self_cond: the hidden state that an earlier call returned; None is the same as zeros
        labels:    (B,) int64, -1 for none; or float features in their place, (B, num_classes) or
                   (B, S, num_classes), such as encoded text
        frames:    context frames of a video (B, channels, cond_frames, *sample_size)
        Returns the prediction, shaped like x, and the hidden state: latents (B, M, latent_dim) and
        interface (B, N, interface_dim).
        """
        c = self.config
        labels = check_inputs(c, x, labels, frames=(frames, c.cond_frames))     # (B, num_classes)
        old_latents, old_interface = self_cond or (None, None)

        # Tokens for time and condition stand among the latents, or beside the interface.
        time = self.time_emb(gamma, None if self.cond_proj else labels)[:, None]   # (B, 1, D)
        latents, extra = [self.latent_position.start(len(x))[:, 0]], []
        (latents if c.time_on_latents else extra).append(time)
        if self.cond_proj:
            token = self.cond_proj(labels)                      # (B, D) or (B, S, D)
            if token.dim() == 2:
                token = token[:, None].expand(-1, max(c.cond_on_latents, 1), -1)
            (latents if c.cond_on_latents else extra).append(token)
        latents = self.latent_prev(torch.cat(latents, 1), old_latents)      # (B, M, latent_dim)

        interface = self.interface_prev(self.tokens(x), old_interface)      # (B, n, interface_dim)
        n = interface.shape[1]
        if frames is not None:
            interface = torch.cat([interface, self.tokens(frames, slice(n, None))], 1)
        N = interface.shape[1]
        if c.cond_writable:
            interface, extra = torch.cat([interface, *extra], 1), []        # (B, N + K, ...)
        for block in self.blocks:
            latents, interface = block(latents, interface, extra)

        out = self.output(self.norm(interface[:, :n]))          # (B, n, t * p * p * C)
        out = from_patches(out, self.patch_shape, x.shape)      # (B, C, [T,] H, W)
        return out, (latents, interface[:, :N])


# --------------------------------------------------------------------------------------------------
# FIT, Far-reaching Interleaved Transformer (2305.12689): layers over groups, reads and writes

@frozen
class FITSizes(ImageConfig):
    """What both kinds of FIT that make images share."""
    sample_size: tuple[Count, Count] = (64, 64)    # height and width of an image
    fit_layers: str = "(2)4(2)4(2)"     # (local layers) layers of latents, and so on
    fit_patch: Natural = 4              # side of the patch that becomes a token
    fit_dim: Count = 512                # tokens: width
    fit_heads: Count = 8                # tokens: attention heads
    fit_latents: Count = 16             # latents of a group
    fit_latent_dim: Count = 768         # latents: width
    fit_latent_heads: Count = 12        # latents: attention heads
    fit_mlp_ratio: Count = 4            # hidden width of an MLP / width
    fit_position: Code = "learned"      # of tokens in a group, of latents
    drop_path: Rate = 0.0               # fraction of residual branches left out in training
    dropout: Rate = 0.0                 # fraction of MLP units left out in training
    att_dropout: Rate = 0.0             # fraction of attention weights left out in training

    # What a denoiser alone may have otherwise.
    fit_local_attention, fit_read_mlp, fit_context_norm = True, False, True


@frozen
class FITConfig(FITSizes):
    """Everything that fixes the shape of a FIT that denoises images."""
    TASKS = "gen",
    self_cond: Literal["none", "latent"] = "latent"     # of the last call
    fit_grid: Count = 4                 # groups are the cells of such a grid over the image
    fit_local_attention: bool = True    # whether tokens attend to each other; else MLPs alone
    fit_read_mlp: bool = False          # an MLP after tokens and latents have read each other
    fit_context_norm: bool = True       # a LayerNorm on what is read, too
    cond_proj: bool = True              # a dense layer on the condition; else it has that width


class FITBlock(nn.Module):
    """The tokens x of a group attend to each other; a few latents of the group read them; the
    latents of all groups attend to each other; the tokens read the latents of their group.

    local, processing: layers of tokens, of latents; without the latter a block ends after the first
    last: whether nothing is written back
    causal: latents of a group, if no group may see later ones: then tokens read the group before
    cond: whether latents also read extra tokens
    """

    def __init__(self, c, local, processing, last, causal=0, cond=False):
        super().__init__()
        self.causal = causal
        dim, latent_dim = c.fit_dim, c.fit_latent_dim
        mlp, latent_mlp = c.fit_mlp_ratio * dim, c.fit_mlp_ratio * latent_dim
        self.local = Layers(
            local, dim, mlp, c.fit_heads, causal=min(causal, 1),
            self_attention=c.fit_local_attention, **dropouts(c))
        self.process = Layers(
            processing, latent_dim, latent_mlp, c.fit_latent_heads, causal=causal, **dropouts(c))
        attend = partial(Layer, self_attention=False, context_norm=c.fit_context_norm)
        heads = min(c.fit_heads, c.fit_latent_heads)
        self.read = self.read_cond = self.write = None
        if processing:
            self.read = attend(latent_dim, latent_mlp * c.fit_read_mlp, heads, dim)
            if cond:
                self.read_cond = attend(latent_dim, 0, c.fit_latent_heads, latent_dim)
            if not last:
                self.write = attend(dim, mlp * c.fit_read_mlp, heads, latent_dim)

    def forward(self, x, latents, cond=None):
        """x (B, G, N, dim), latents (B, G, M, latent_dim), and extra tokens (B, K, latent_dim)."""
        tokens = self.local(x.flatten(0, 1))                                # (B G, N, dim)
        if self.read:
            read = self.read(latents.flatten(1, 2), tokens)                 # (B, G M, latent_dim)
            if self.read_cond:
                read = self.read_cond(read, cond)
            latents = self.process(read).view(latents.shape)
        if self.write:
            # Zeros stand before the first group.
            known = F.pad(latents, (0, 0, 0, 0, 1, -1)) if self.causal else latents
            tokens = self.write(tokens, known.flatten(0, 1))
        return tokens.view(x.shape), latents


def fit_blocks(c, **options):
    """FITBlocks of a FITSizes: for fit_layers "(2)4(1)" one of 2 local layers and 4 of latents, and
    one of 1 local layer."""
    require(
        re.fullmatch(r"(\(\d+\)[1-9]\d*)*\(\d+\)\d*", c.fit_layers),
        f"fit_layers {c.fit_layers!r}: expected local layers in brackets, layers of latents "
        "behind them, and so on, as in '(2)4(2)4' or '(2)4(2)'")
    counts = re.findall(r"\((\d+)\)(\d*)", c.fit_layers)
    return nn.ModuleList(
        FITBlock(c, int(local), int(processing or 0), n == len(counts), **options)
        for n, (local, processing) in enumerate(counts, 1))


# --------------------------------------------------------------------------------------------------
# FIT as an encoder of images, and as a denoiser (2305.12689)

class FITStem(nn.Module):
    """What the first FITBlock of an encoder or a denoiser sees: tokens of the patches of all
    groups, and the start of their latents."""

    def __init__(self, c, groups):
        super().__init__()
        self.config, dim = c, c.fit_dim
        cell = [side // c.fit_grid for side in c.sample_size]
        self.grid = tuple(side // c.fit_patch for side in cell)     # of a group
        self.cell_shape = 1, *cell, c.channels
        self.patch_shape = 1, c.fit_patch, c.fit_patch, c.channels
        self.patch = nn.Linear(math.prod(self.patch_shape), dim)
        self.patch_norm = layer_norm(dim)
        self.position = Position(c.fit_position, math.prod(self.grid), 1, dim, 1000)
        self.latent_position = Position(
            c.fit_position, groups, c.fit_latents, c.fit_latent_dim, 1000)

    def cells(self, x):
        """(B, C, H, W) -> (B, C, cells, h, w): large patches, row by row, as frames of a video."""
        return to_patches(x, self.cell_shape).unflatten(2, self.cell_shape[1:]).movedim(4, 1)

    def tokens(self, groups):
        """(B, C, G, h, w) -> (B, G, N, dim)."""
        x = self.patch_norm(self.patch(to_patches(groups, self.patch_shape)))
        return self.position(x.unflatten(1, (groups.shape[2], -1)))


class FITEncoder(FITStem):
    """An Encoder whose groups are the cells of a grid over the image, and small copies of all of
    it. Its output are the latents, or where `fit_layers` ends with local layers, the tokens."""

    def __init__(self, c):
        check_multiples(
            "image_size", c.fit_grid * c.patch_size, "fit_grid * patch_size", *c.image_size)
        sizes = FITConfig(
            sample_size=c.image_size,
            fit_layers=c.fit_layers,
            fit_grid=c.fit_grid,
            fit_patch=c.patch_size,
            fit_dim=c.enc_dim,
            fit_heads=c.enc_heads,
            fit_latents=c.fit_latents,
            fit_latent_dim=c.fit_latent_dim,
            fit_latent_heads=c.enc_heads,
            fit_mlp_ratio=c.enc_mlp // c.enc_dim,
            fit_position=c.pos_encoding,
            **dropouts(c),
        )
        super().__init__(sizes, c.fit_grid ** 2 + c.fit_copies)
        self.copies, self.blocks = c.fit_copies, fit_blocks(sizes)
        self.norm, self.latent_norm = layer_norm(c.enc_dim), layer_norm(c.fit_latent_dim)
        self.ends_local = not self.blocks[-1].read
        self.dim = c.enc_dim if self.ends_local else c.fit_latent_dim
        unused = self.latent_norm if self.ends_local else self.norm         # checkpoints have both
        unused.requires_grad_(False)

    def forward(self, images):
        cells = self.cells(images)                      # (B, 3, cells, h, w)
        small = F.interpolate(images, cells.shape[-2:], mode="bilinear")[:, :, None]
        x = self.tokens(torch.cat([small] * self.copies + [cells], 2))      # (B, G, N, D)
        latents = self.latent_position.start(len(x))    # (B, G, M, latent_dim)
        for block in self.blocks:
            x, latents = block(x, latents)
        out = self.norm(x) if self.ends_local else self.latent_norm(latents)
        return out.flatten(1, 2)                        # (B, N, dim)


class FIT(FITStem):
    """FIT as a denoiser (2305.12689): groups are the cells of a grid over the image; time and
    condition are tokens that all latents read."""

    def __init__(self, c):
        check_multiples(
            "sample_size", c.fit_grid * c.fit_patch, "fit_grid * fit_patch", *c.sample_size)
        super().__init__(c, c.fit_grid ** 2)
        dim = c.fit_latent_dim
        self.time_emb = ScalarEmbedding(dim, 1000, normalize=True)
        projected = c.num_classes and c.cond_proj
        self.cond_proj = nn.Linear(c.num_classes, dim) if projected else nn.Identity()
        self.latent_prev = WarmStart(dim, c.fit_mlp_ratio, c.self_cond == "latent")
        self.blocks = fit_blocks(c, cond=True)
        self.norm = layer_norm(c.fit_dim)
        self.output = nn.Linear(c.fit_dim, self.patch.in_features)
        initialize(self)

    def forward(self, x, gamma, self_cond=None, labels=None):
        """A denoiser of diffusion.py.

        x:         (B, channels, *sample_size)
        gamma:     (B,) float, signal level of x
        self_cond: the hidden state that an earlier call returned; None is the same as zeros
        labels:    (B,) int64, -1 for none; or float features in their place, (B, num_classes) or
                   (B, S, num_classes)
        Returns the prediction, shaped like x, and the hidden state: latents (B, G, M, latent_dim).
        """
        c = self.config
        labels = check_inputs(c, x, labels)                     # (B, num_classes)
        token = self.cond_proj(labels).view(len(x), -1, c.fit_latent_dim)   # none without classes
        cond = torch.cat([self.time_emb(gamma)[:, None], token], 1)         # (B, K, latent_dim)
        cells = self.cells(x)                                   # (B, C, G, h, w)
        tokens = self.tokens(cells)                             # (B, G, N, D)
        latents = self.latent_prev(self.latent_position.start(len(x)), *(self_cond or ()))
        for block in self.blocks:
            tokens, latents = block(tokens, latents, cond)
        out = self.output(self.norm(tokens))                    # (B, G, N, p * p * C)
        out = from_patches(out, self.patch_shape, cells.shape).movedim(1, 4)    # (B, G, h, w, C)
        return from_patches(out, self.cell_shape, x.shape), (latents,)


# --------------------------------------------------------------------------------------------------
# ImageAR: an image written pixel by pixel

@frozen
class ImageARConfig(FITSizes):
    """Everything that fixes the shape of an ImageAR."""
    TASKS = "ar",
    levels: between(2, 256) = 256       # of a colour: tokens in the vocabulary
    fit_patch: Natural = 8              # side of the patch that becomes a group; 0: one group
    shared_embedding: bool = False      # one matrix embeds tokens and scores them
    output_bias: bool = True            # a bias on the scores of the tokens

    @property
    def group_shape(self):
        """(1, height, width, channels) of a group, see `to_patches`."""
        sides = (self.fit_patch, self.fit_patch) if self.fit_patch else self.sample_size
        return 1, *sides, self.channels


def image_tokens(pixels, c):
    """uint8 (B, C, H, W) -> int64 (B, G, N): a group per patch, those of every other row from right
    to left, so that each lies beside the last; in it pixels row by row, of each its colours."""
    return serpentine(to_patches(pixels.long() * c.levels // 256, c.group_shape), c)


def token_image(tokens, c):
    """The inverse of `image_tokens`, up to what levels cannot tell apart."""
    middles = serpentine(((2 * tokens + 1) * 128 // c.levels).byte(), c)
    return from_patches(middles, c.group_shape, (len(tokens), *c.sample_shape))


def serpentine(groups, c):
    """Groups (B, G, N) of an image, row by row, with every other row turned."""
    rows = groups.unflatten(1, (-1, c.sample_size[1] // c.group_shape[2])).clone()
    rows[:, 1::2] = rows[:, 1::2].flip(2)
    return rows.flatten(1, 2)


class ImageAR(Vocabulary):
    """A causal FIT over the tokens of an image (2305.12689): a token sees those before it in its
    group, and latents of the groups before. With one group, a plain decoder."""
    RENAMES = "^decoder/layers/ blocks/0/local/\n^decoder/"

    def __init__(self, c):
        check_multiples("sample_size", c.fit_patch or 1, "fit_patch", *c.sample_size)
        dim, tokens = c.fit_dim, math.prod(c.group_shape)
        super().__init__(c, c.levels, dim)
        self.config = c
        self.groups = math.prod(c.sample_shape) // tokens
        self.label_proj = nn.Linear(c.num_classes, dim) if c.num_classes else None
        self.position = Position(c.fit_position, tokens, 1, dim, 1000)
        self.blocks = fit_blocks(c, causal=c.fit_latents)
        self.latent_position = self.blocks[0].read and Position(
            c.fit_position, self.groups, c.fit_latents, c.fit_latent_dim, 1000)
        self.norm = layer_norm(dim)
        initialize(self)

    def start(self, tokens, labels, at=None):
        """Tokens before (B, G, n) and labels -> what the first layer sees (B, G, n, D). at:
        positions in their group of those that it sees; None: the first ones."""
        x = self.position(F.embedding(tokens, self.embed), at)
        if self.label_proj:
            label = self.label_proj(one_hot_labels(labels, self.config.num_classes, tokens))
            x = x + label[:, None, None]
        return x

    def forward(self, tokens, labels=None):
        """Teacher forcing: (B, G, N) int64 and labels (B,), -1 for none -> logits (B, G, N, V) of
        each token, which sees those before it."""
        before = F.pad(tokens.flatten(1), (1, -1)).view(tokens.shape)
        x = self.start(before, labels)                  # (B, G, N, D)
        latents = self.latent_position and self.latent_position.start(len(x))
        for block in self.blocks:
            x, latents = block(x, latents)
        return self.scores(self.norm(x))

    @torch.no_grad()
    def generate(self, given, labels=None, generator=None, **sampling):
        """Writes images that begin with `given`, the first K tokens (B, K) int64, K maybe 0.

        Keys and values are kept: those of tokens within their group, those of latents for good.
        labels: (B,) int64, -1 for none. sampling: see `sample_token`. Returns (B, G, N).
        """
        (B, K), groups, blocks = given.shape, self.groups, self.blocks
        N, M = len(self.position.table()), self.config.fit_latents
        starts = self.latent_position and self.latent_position.start(B)     # (B, G, M, latent_dim)
        places = torch.arange(groups * max(N, M), device=given.device)
        tokens = F.pad(given, (1, groups * N - K))      # a zero stands before the first
        process = [[Cache(layer, None, groups * M) for layer in block.process] for block in blocks]
        write = [                                      # at first the group before knows nothing
            block.write and Cache(block.write, torch.zeros_like(starts[:, 0])) for block in blocks]
        for g in range(groups):
            local = [[Cache(layer, None, N) for layer in block.local] for block in blocks]
            seen = [[] for _ in blocks]                # what latents of each block will read
            for n in range(N):
                t = g * N + n
                at = places[n, None]
                x = self.start(tokens[:, None, t, None], labels, at)[:, 0]  # (B, 1, D)
                for i, block in enumerate(blocks):
                    x = block.local(x, caches=local[i], at=at)
                    seen[i].append(x)
                    if block.write:
                        x = block.write(x, cache=write[i])
                if t >= K:
                    logits = self.scores(self.norm(x))[:, 0].float()        # (B, V)
                    uniform = torch.rand(B, generator=generator, device=given.device)
                    tokens[:, t + 1] = sample_token(logits, uniform, **sampling)
            latents = self.latent_position and starts[:, g]    # (B, M, latent_dim)
            for i, block in enumerate(blocks):
                if block.read:
                    latents = block.read(latents, torch.cat(seen[i], 1))
                    at = places.split(M)[g]
                    latents = block.process(latents, caches=process[i], at=at)
                if block.write:
                    write[i] = Cache(block.write, latents)
        return tokens[:, 1:].unflatten(1, (groups, N))


def image_losses(forward, batch, c):
    """The cross entropy per token (B,), in nats, of the targets of a data.Batch, uint8 pixels."""
    tokens = image_tokens(batch.targets, c.model)
    return token_losses(forward(tokens, batch.cond["labels"]), tokens).flatten(1).mean(1)


def image_loss(forward, batch, c):
    """The weighted sum of the losses of a batch's images."""
    return (image_losses(forward, batch, c) * batch.weights).sum()


# --------------------------------------------------------------------------------------------------
# UNet

@frozen
class UNetConfig(VideoConfig):
    """Everything that fixes the shape of a UNet. The defaults are the reference's for CIFAR-10,
    without labels."""
    TASKS = "gen",
    cond_channels: Natural = 0          # channels of a map, as condition; 0: none
    context_dim: Natural = 0            # width of a sequence to attend to, as condition; 0: none
    self_cond: Literal["none", "x", "eps", "auto"] = "none"     # estimate of the last call as input
    softmax_groups: Natural = 0         # predicts logits of so many groups of bits; 0: no logits
    unet_dim: Count = 256               # width, to be multiplied
    multipliers: tuple[Count, ...] = (1, 1, 1)  # width of each resolution / unet_dim, finest first
    res_blocks: tuple[Count, ...] = (3, 3, 3)    # residual blocks going down; going up one more
    kernel_sizes: tuple[Count, ...] = (3,)  # side of convolutions: one, or one per resolution
    attention_at: tuple[Natural, ...] = (16, 8)    # heights of the feature maps that have attention
    head_dim: Count = 64                # width of an attention head
    transformer_layers: Natural = 0     # transformer on the coarsest map: layers; 0: none
    transformer_dim: Count = 256        # transformer: width
    transformer_stride: Count = 1       # transformer: side of the patch that becomes a token
    transformer_position: Literal["sin_cos", "learned", "none"] = "sin_cos"     # of its tokens
    in_stride: Count = 1                # the sample is shrunk by this, and the prediction enlarged
    in_kernel: Count = 3                # side of the first convolution
    out_kernel: Count = 3               # side of the last one; with softmax_groups it is 1
    time_scaling: Positive = 1000.0     # gamma is multiplied by this before it is coded
    unet_dropout: Rate = 0.0            # fraction of units left out in training


class ResBlock(nn.Module):
    """(B, in_dim, H, W) -> (B, dim, H, W): two convolutions; between them, the time embedding
    scales and shifts."""

    def __init__(self, in_dim, dim, emb_dim, kernel, dropout):
        super().__init__()
        self.shortcut = nn.Conv2d(in_dim, dim, 1) if in_dim != dim else nn.Identity()
        self.norm_0, self.conv_0 = group_norm(in_dim), SameConv2d(in_dim, dim, kernel)
        self.emb_proj = nn.Linear(emb_dim, 2 * dim)
        self.norm_1, self.dropout = group_norm(dim), nn.Dropout(dropout)
        self.conv_1 = starts_at_zero(SameConv2d(dim, dim, kernel))

    def forward(self, x, emb):
        scale, shift = self.emb_proj(emb)[:, :, None, None].chunk(2, 1)     # (B, dim, 1, 1)
        y = self.conv_0(F.silu(self.norm_0(x)))
        y = F.silu(self.norm_1(y) * (1 + scale) + shift)
        return (self.shortcut(x) + self.conv_1(self.dropout(y))) / math.sqrt(2)


class PixelAttention(nn.ModuleDict):
    """Pixels of a map (B, dim, H, W) attend to a sequence (B, S, context_dim), if there is one,
    then to each other."""

    def __init__(self, dim, head_dim, context_dim=0):
        super().__init__()
        heads, self.kinds = dim // head_dim, ["cross", "self"] if context_dim else ["self"]
        for kind in self.kinds:
            width = context_dim if kind == "cross" else dim
            self[f"{kind}_norm"] = nn.GroupNorm(32, dim)
            self[f"{kind}_att"] = Attention(dim, heads, width, heads * head_dim)

    def forward(self, x, context=None):
        for kind in self.kinds:
            norm, attention = self[f"{kind}_norm"], self[f"{kind}_att"]
            y = norm(x).flatten(2).mT                   # (B, H * W, dim)
            y = attention(y, attention.project(context if kind == "cross" else y))
            x = (x + y.mT.reshape(x.shape)) / math.sqrt(2)
        return x


class UNetStage(nn.Module):
    """Blocks of one resolution, on the way down or up; at the end the map is halved or doubled,
    unless it was the last resolution of that way."""

    def __init__(self, c, level, coarser=0):
        """coarser: on the way up, width of the map of the resolution below; 0: on the way down."""
        super().__init__()
        finer, dim = (c.multipliers[max(i, 0)] * c.unet_dim for i in (level - 1, level))
        height = c.sample_size[0] // c.in_stride >> level
        kernel = c.kernel_sizes[level % len(c.kernel_sizes)]    # there may be one for all
        # Widths of what each block gets: going up, a map of the way down, too.
        widths = [coarser or finer] + (c.res_blocks[level] - 1) * [dim]
        if coarser:
            widths = [width + dim for width in widths] + [dim + finer]
        self.up, self.blocks = coarser > 0, nn.ModuleList(
            ResBlock(width, dim, 4 * c.unet_dim, kernel, c.unet_dropout) for width in widths)
        self.attention = nn.ModuleList(
            PixelAttention(dim, c.head_dim, c.context_dim)
            for _ in widths if height in c.attention_at)
        last = len(c.res_blocks) - 1
        self.conv_dn = None if coarser or level == last else SameConv2d(dim, dim, 3, 2)
        self.conv_up = SameConv2d(dim, dim, 3) if coarser and level else None

    def forward(self, x, emb, context, skips):
        """skips: list of maps, which the way down adds to and the way up takes from."""
        for block, attention in zip_longest(self.blocks, self.attention):
            if self.up:
                x = torch.cat([x, skips.pop()], 1)
            x = block(x, emb)
            if not self.up:
                skips.append(x)
            if attention:
                x = attention(x, context)
        if self.conv_dn:
            x = self.conv_dn(x)                         # (B, dim, H / 2, W / 2)
            skips.append(x)
        if self.conv_up:
            x = self.conv_up(F.interpolate(x, scale_factor=2.0))            # (B, dim, 2 H, 2 W)
        return x


def depth_to_space(x, side):
    """(B, side * side * C, H, W) -> (B, C, side * H, side * W), in TensorFlow's order."""
    x = x.unflatten(1, (side * side, -1)).transpose(1, 2)       # pixel_shuffle has C in front
    return F.pixel_shuffle(x.flatten(1, 2), side)


class MapTransformer(nn.Module):
    """Transformer over such a grid of patches of a map (B, in_dim, H, W), with the time as one more
    token."""

    def __init__(self, c, in_dim, grid):
        super().__init__()
        dim, side = c.transformer_dim, c.transformer_stride
        self.norm_in = group_norm(in_dim, like=dim)
        self.conv_in = nn.Conv2d(in_dim, dim, side, side)
        kind = c.transformer_position
        self.position = Position(kind, *grid, dim) if kind != "none" else nn.Identity()
        self.emb_proj = nn.Linear(4 * c.unet_dim, dim)
        self.layers = Layers(
            c.transformer_layers, dim, 4 * dim, dim // c.head_dim, c.context_dim,
            dropout=c.unet_dropout)
        self.norm_out, self.conv_out = group_norm(dim), nn.Conv2d(dim, dim, 1)

    def forward(self, x, emb, context):
        x = self.conv_in(self.norm_in(x))
        tokens = self.position(x.flatten(2).mT)                             # (B, N, dim)
        tokens = torch.cat([tokens, self.emb_proj(emb)[:, None]], 1)        # (B, N + 1, dim)
        tokens = self.layers(tokens, context)[:, :-1]
        x = tokens.mT.reshape(x.shape)
        return depth_to_space(self.conv_out(self.norm_out(x)), self.conv_in.stride[0])


class UNet(nn.Module):
    """UNet for diffusion (2006.11239), as in Bit Diffusion and Pix2Seq-D. The frames of a video are
    channels to it, those of the context too (as in 2205.09853)."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        levels = len(c.res_blocks)
        dim, *coarser = widths = [multiplier * c.unet_dim for multiplier in c.multipliers]
        stride = c.in_stride * 2 ** (levels - 1)                # of the coarsest map
        patch = stride * (c.transformer_stride if c.transformer_layers else 1)
        check_multiples("sample_size", patch, "stride of the coarsest map", *c.sample_size)
        check_multiples("channels", c.softmax_groups or 1, "softmax_groups", c.channels)
        require(
            len(widths) == levels and len(c.kernel_sizes) in (1, levels),
            f"res_blocks {c.res_blocks}, multipliers {c.multipliers}, kernel_sizes "
            f"{c.kernel_sizes} differ in length")

        self.time_emb = ScalarEmbedding(4 * c.unet_dim, c.time_scaling, c.num_classes)
        frames = c.frames * (1 if c.self_cond == "none" else 2) + c.cond_frames
        inputs = c.channels * frames + c.cond_channels
        self.conv_in = SameConv2d(inputs, dim, c.in_kernel, c.in_stride)
        self.norm_in = group_norm(dim)
        self.down = nn.ModuleList(UNetStage(c, i) for i in range(levels))
        transformer, coarsest = None, widths[-1]
        if c.transformer_layers:
            transformer = MapTransformer(c, coarsest, [side // patch for side in c.sample_size])
            coarsest = c.transformer_dim // c.transformer_stride ** 2
        self.up = nn.ModuleList(
            UNetStage(c, i, width) for i, width in enumerate([*coarser, coarsest]))
        self.transformer = transformer
        self.norm_out = group_norm(dim, like=c.unet_dim)
        outputs, kernel = c.channels, c.out_kernel
        if c.softmax_groups:
            outputs, kernel = 2 ** (c.channels // c.softmax_groups) * c.softmax_groups, 1
        outputs *= c.frames * c.in_stride ** 2
        self.conv_out = starts_at_zero(SameConv2d(dim, outputs, kernel))
        initialize(self)

    def forward(
            self, x, gamma, self_cond=None, labels=None, frames=None, map=None, context=None):
        """A denoiser of diffusion.py.

        x:         (B, channels, *sample_size); of a video (B, channels, frames, *sample_size)
        gamma:     (B,) float, signal level of x
        self_cond: the estimate of an earlier call, shaped like x; None is the same as zeros
        labels:    (B,) int64, -1 for none; or float features (B, num_classes) in their place
        frames:    context frames of a video (B, channels, cond_frames, *sample_size)
        map:       (B, cond_channels, *sample_size)
        context:   a sequence (B, S, context_dim)
        Returns the prediction, shaped like x, and None; with softmax_groups logits (B,
        softmax_groups * 2^bits, [frames,] *sample_size), group by group, of which softmax_bits
        makes the expected analog bits.
        """
        c = self.config
        labels = check_inputs(                                  # (B, num_classes)
            c, x, labels, frames=(frames, c.cond_frames), map=(map, c.cond_channels),
            context=(context, c.context_dim))
        emb = F.silu(self.time_emb(gamma, labels))              # (B, 4 * unet_dim)
        if c.self_cond == "none":
            self_cond = None
        elif self_cond is None:
            self_cond = torch.zeros_like(x)
        # Frames become channels.
        parts = [part.flatten(1, -3) for part in (x, self_cond, frames, map) if part is not None]
        x = self.norm_in(self.conv_in(torch.cat(parts, 1)))
        skips = [x]
        for stage in self.down:
            x = stage(x, emb, context, skips)
        if self.transformer:
            x = self.transformer(x, emb, context)
        for stage in reversed(self.up):                         # the first is the finest
            x = stage(x, emb, context, skips)
        x = depth_to_space(self.conv_out(F.silu(self.norm_out(x))), c.in_stride)
        return x.unflatten(1, (-1, *c.sample_shape[1:-2])), None


# --------------------------------------------------------------------------------------------------
# Panoptic: masks of images and videos (Pix2Seq-D, 2210.06366)

@frozen
class PanopticConfig(EncoderConfig, UNetConfig):
    """Everything that fixes the shape of a Panoptic. sample_size and channels are those of the
    analog bits of a panoptic map."""
    TASKS = "pan", "vps"
    encoder: Literal["vit", "resnet"] = "resnet"
    resnet_variant: Literal["standard", "c4", "dc5", "c3"] = "c4"
    cls_token: Literal[False] = False   # every token is of a patch
    channels: Count = 16                # 8 bits of class and 8 of instance
    softmax_groups: Natural = 2         # class and instance are predicted as one choice each
    unet_dim: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2)
    res_blocks: tuple[int, ...] = (1, 1, 1, 1)
    attention_at: tuple[int, ...] = ()
    transformer_layers: int = 6
    transformer_dim: int = 512
    in_kernel: int = 1
    out_kernel: int = 1
    past_frames: Natural = 0            # maps of earlier frames of a video, as condition
    fuse_dim: Count = 256               # width of the image's features, if none is as large as maps
    image_condition: Literal["cat", "attn", "cat+attn"] = "cat+attn"    # features beside it, tokens


class UpsampleBlock(nn.Module):
    """A coarse map (B, in_dim, h, w) -> a finer one (B, dim, H, W), to which `finer` is added."""

    def __init__(self, in_dim, dim):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(in_dim, dim, 1), group_norm(dim)
        self.conv2, self.norm2 = SameConv2d(dim, dim, 3), group_norm(dim)

    def forward(self, x, finer):
        x = F.silu(self.norm1(self.conv1(x)))
        x = F.interpolate(x, finer.shape[2:]) + finer
        return F.silu(self.norm2(self.conv2(x)))


class Panoptic(nn.Module):
    """Denoises the analog bits of the panoptic map of an image, or of a frame of a video
    (2210.06366): a UNet that sees what an Encoder makes of the image."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.encoder = Encoder(c)
        (height, width), (rows, columns) = c.sample_size, self.encoder.grid
        require(
            height * columns == width * rows,
            f"sample_size {c.sample_size}: expected a multiple of {self.encoder.grid}, patches")
        # The feature maps from the coarsest on are merged until they are as large as the masks.
        shapes = [(c.fuse_dim, height, width), *self.encoder.shapes]
        dim, size, self.fuse = c.enc_dim, [rows, columns], nn.ModuleDict()
        for i, (finer, *larger) in reversed(list(enumerate(shapes))):
            fits = larger[0] <= height and larger[1] <= width
            if fits and (i or size != larger):
                self.fuse[str(i)] = UpsampleBlock(dim, finer)
                dim, size = finer, larger
        self.cond_dim = dim
        self.denoiser = UNet(replace(
            c,
            cond_channels=dim + c.past_frames * c.channels,
            context_dim=c.enc_dim if "attn" in c.image_condition else 0,
        ))
        initialize(self)

    def encode(self, images, past=None):
        """What the denoiser sees beside the noisy map, the same in all steps of sampling: a dict.

        images: (B, 3, H, W) float in [0, 1]
        past:   of a video, analog bits of the maps of past_frames frames before, the oldest first
                (B, past_frames * channels, *sample_size); where there is none, of a map of zeros
        """
        c = self.config
        check_conditions(past=(past, c.past_frames))
        tokens, maps = self.encoder(images)
        x = tokens.mT.unflatten(2, self.encoder.grid)           # (B, enc_dim, rows, columns)
        finer = x.new_zeros(1, 1, *c.sample_size), *maps        # there is no map as large as masks
        for i, block in self.fuse.items():
            x = block(x, finer[int(i)])
        if "cat" not in c.image_condition:
            x = torch.zeros_like(x)
        return {
            "map": x if past is None else torch.cat([x, past], 1),
            "context": tokens if "attn" in c.image_condition else None,
        }

    def forward(self, x, gamma, self_cond=None, **cond):
        """A denoiser of diffusion.py, of the analog bits of maps x (B, channels, *sample_size).
        cond: images and past, see `encode`; in their place, what it returned, map and context."""
        if "images" in cond:
            cond = self.encode(**cond)
        return self.denoiser(x, gamma, self_cond, **cond)


def focal_losses(logits, targets, gamma=2.0):
    """Like `token_losses`, the focal loss (1708.02002)."""
    p = torch.exp(-token_losses(logits, targets))
    return (1 - p) ** gamma * -torch.log(p + 1e-8)      # the reference limits it like this


# --------------------------------------------------------------------------------------------------
# named networks and sizes

NETWORKS = {
    "Pix2Seq": (Pix2Seq, Pix2SeqConfig),
    "RIN": (RIN, RINConfig),
    "UNet": (UNet, UNetConfig),
    "Panoptic": (Panoptic, PanopticConfig),
    "FIT": (FIT, FITConfig),
    "ImageAR": (ImageAR, ImageARConfig),
}
SIZES = {
    "vit_tiny": Pix2SeqConfig(
        patch_size=32,
        enc_layers=4,
        enc_dim=128,
        enc_mlp=512,
        enc_heads=4,
        dec_layers=2,
        dec_dim=128,
        dec_mlp=512,
        dec_heads=4,
    ),
    "resnet50": Pix2SeqConfig(
        encoder="resnet",
        enc_layers=6,
        enc_dim=256,
        enc_mlp=1024,
        enc_heads=8,
        dec_dim=256,
        dec_mlp=1024,
        dec_heads=8,
    ),
    "resnet50_c4": Pix2SeqConfig(
        encoder="resnet",
        resnet_variant="c4",
        enc_dim=512,
        enc_mlp=2048,
        enc_heads=16,
        dec_layers=8,
    ),
    "fit_b": Pix2SeqConfig(encoder="fit", fit_layers="(2)4(2)", fit_grid=4),
    "vit_b": Pix2SeqConfig(),
    "vit_l": Pix2SeqConfig(
        enc_layers=24,
        enc_dim=1024,
        enc_mlp=4096,
        enc_heads=16,
        dec_layers=8,
    ),
}


def build(config):
    """The network that a configuration is of. UserError if a field is not of its type."""
    tokenizer.check_fields(config)
    return next(network for network, kind in NETWORKS.values() if type(config) is kind)(config)


def count_parameters(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def print_sizes():
    """Trainable parameters of each named size, and of each network with the defaults of its fields;
    of a Pix2Seq FLOPs to encode a 640 x 640 image and to score 500 tokens about it."""
    from torch.utils.flop_counter import FlopCounterMode
    sizes = SIZES | {name: config() for name, (_, config) in NETWORKS.items()}
    print(f"{'size':14}{'parameters':>14}{'GFLOPs 640x640':>16}")
    for name, c in sizes.items():
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            model = build(c).eval()
            if isinstance(model, Pix2Seq):
                model(torch.empty(1, 3, 640, 640), torch.empty(1, 500, dtype=torch.long))
        gflops = round(counter.get_total_flops() / 1e9, 1)
        print(f"{name:14}{count_parameters(model):>14,}{gflops or '':>16}")


# --------------------------------------------------------------------------------------------------
# hardware: all that differs between cpu, cuda, mps and xla, one process and several

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Switch = Literal["auto", "on", "off"]


class Device:
    """The hardware of this process, one of `world` that torchrun or `launch` started, or the only
    one.

    name:    auto (cuda, else mps, else cpu), cuda, cuda:1, mps, cpu, xla: a TPU by torch_xla, or
             tpu: one by TorchTPU, as any other device (untried)
    dtype:   of matrix products: auto (on cuda bfloat16, float16 where it has none; bfloat16 for
             large networks on a cpu that has it; else float32), float32, bfloat16, or float16,
             whose losses are scaled
    compile: torch.compile: auto (on cuda), on or off
    """
    rank, world = 0, 1
    xla = None                                          # the module torch_xla
    asked = False                                       # to stop
    meeting, interval, met = 0, 1, 0.0                  # see `stopping`

    def __init__(self, name="auto", dtype="auto", compile="auto"):
        check_choice(dtype, get_args(Dtype), "dtype")
        check_choice(compile, get_args(Switch), "compile")
        available = {
            "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available(),
            "cpu": True,
            "xla": importlib.util.find_spec("torch_xla") is not None,
            "tpu": hasattr(torch, "tpu"),
        }
        if name == "auto":
            name = next(filter(available.get, available))
        self.type = self.name = name.partition(":")[0]
        check_choice(self.type, ("auto", *available), "device")
        require(available[self.type], f"device {name} is not available on this machine")
        self.device = torch.device(name)
        self.cuda = self.pin = self.type == "cuda"      # pin: batches go through pinned memory
        if self.type == "xla":
            import torch_xla
            from torch_xla import runtime
            self.xla, self.device = torch_xla, torch_xla.device()
            self.rank, self.world = runtime.global_ordinal(), runtime.world_size()
            if self.world > 1:
                dist.init_process_group("xla", init_method="xla://")
        if self.cuda:
            index = os.environ.get("LOCAL_RANK", self.device.index or 0)
            self.device = torch.device(f"cuda:{index}")
            torch.cuda.set_device(self.device)
            self.name = torch.cuda.get_device_name()
        if "RANK" in os.environ:                        # torchrun started this process
            dist.init_process_group("nccl" if self.cuda else "gloo")
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.first = self.rank == 0
        known = getattr(torch.cpu, "get_capabilities", dict)()      # torch 2.9 does not say
        self.dtype_by_size = dtype == "auto" and self.type == "cpu" and (
            known.get("amx_bf16") or known.get("avx512_bf16"))
        if dtype == "auto":
            native = self.cuda and torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = "bfloat16" if native else "float16" if self.cuda else "float32"
        self.dtype = getattr(torch, dtype)
        self.scaler = torch.amp.GradScaler(self.type, enabled=dtype == "float16")
        torch.set_float32_matmul_precision("high")
        self.compiled = compile == "on" or compile == "auto" and self.cuda
        self.fused = self.type in ("cuda", "cpu")       # whether AdamW may be fused
        # tqdm's `disable`: bars are for the first process, None: if it has a terminal.
        self.quiet = None if self.first else True

    def place(self, model):
        """The model, on this device."""
        model.to(self.device).replayed = self.replayed
        if self.dtype_by_size and count_parameters(model) > 2e7:    # ViT-B was seen to gain
            self.dtype = torch.bfloat16
        if self.cuda:
            model.to(memory_format=torch.channels_last)
            if self.world > 1:                          # torch shares statistics on GPUs only
                model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model

    def cast(self, model):
        """A model that only predicts, weights of its matrix products in this dtype for good."""
        for part in model.modules():
            if isinstance(part, (nn.Linear, nn.Conv2d)):
                part.to(self.dtype)
        return model

    def wrap(self, model):
        """What is called in training, in place of the model."""
        self.compile(model)
        if self.world == 1:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def host(self, model):
        """The model and the device that predict while training: for XLA the CPU, as decoding has
        many shapes and XLA compiles each."""
        if not self.xla:
            return model, self
        device = Device("cpu")
        device.first = self.first
        return copy.deepcopy(model).cpu(), device

    def compile(self, model):
        """Each layer by itself: those of a kind share their code, and DDP can sum the gradients of
        one while those of others are computed."""
        if self.compiled:
            torch._dynamo.config.cache_size_limit = 64  # graphs of a class: train, predict, sizes
            for part in model.modules():
                if isinstance(part, (Layer, ResNet, UNet)):
                    part.compile()

    @staticmethod
    def replayed(work):
        """work(*tensors, **constants) -> tensors. On cuda the third call for tensors of a shape
        records its kernels as a graph, which later ones launch at once, into the same results: they
        read copies of the tensors; constants, and what else `work` uses, stay where they are."""
        calls, graphs = Counter(), {}

        def leaves(tree):
            return [x for x in tree_leaves(tree) if x is not None]

        def call(*tensors, **constants):
            given = leaves(tensors)
            key = *(x.shape for x in given), *map(id, constants.values())
            calls[key] += 1
            if not given[0].is_cuda or calls[key] < 3:  # the second one may still compile
                return work(*tensors, **constants)
            if key not in graphs:
                graph = torch.cuda.CUDAGraph()
                places = tree_map_only(torch.Tensor, torch.clone, tensors)
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    graphs[key] = graph, places, work(*places, **constants)
            graph, places, results = graphs[key]
            torch._foreach_copy_(leaves(places), given)
            graph.replay()
            return results

        return call

    def autocast(self):
        """Context in which matrix products have this dtype."""
        return torch.autocast(self.type, self.dtype, enabled=self.dtype != torch.float32)

    def sync_only(self, forward, last):
        """Context in which gradients are summed over processes if this is the last part."""
        return nullcontext() if last or self.world == 1 else forward.no_sync()

    def sum(self, values):
        """{name: 0-dim tensor} -> the same on this device, summed over processes, without waiting
        for the device."""
        total = torch.stack(list(values.values())).to(self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return dict(zip(values, total))

    def gather(self, items):
        """A list -> the lists of all processes."""
        lists = [items] * self.world
        if self.world > 1:
            dist.all_gather_object(lists, items)
        return lists

    def number(self, x):
        """A number that changes from step to step. XLA takes equal numbers of a step for one input
        and compiles anew when two happen to meet, so for it each is a tensor of its own."""
        return torch.tensor([x], device=self.device) if self.xla else x

    def seed(self, number):
        """Begins the random numbers of a step."""
        torch.manual_seed(number)
        if self.xla:
            self.xla.manual_seed(number)

    def step(self, optimizer):
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def sync(self):
        """XLA only notes what is to be computed, up to here."""
        if self.xla:
            self.xla.sync()

    def catch_signals(self):
        """Ctrl-C and SIGTERM ask to stop."""
        def ask(number, frame):
            self.asked = True

        with suppress(ValueError):           # a process of XLA's runs this in a thread
            signal.signal(signal.SIGINT, ask)
            signal.signal(signal.SIGTERM, ask)

    def stopping(self, step):
        """Whether any process was asked to stop. Several must agree, and reading what they agreed
        on waits for the device: they meet every five seconds or so, after steps of which the first
        one says how many."""
        if self.world == 1:
            return self.asked
        if step < self.meeting:
            return False
        seconds, self.met = time.time() - self.met, time.time()
        steps = 5 * self.interval / max(seconds, 0.001) * self.first
        said = self.sum({"asked": torch.tensor(self.asked), "steps": torch.tensor(steps)})
        self.interval = max(int(said["steps"]), 1)
        self.meeting = step + self.interval
        return bool(said["asked"])

    def wait(self):
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    @staticmethod
    def launch(name, work):
        """Calls work(number), for xla in a process per chip of this machine."""
        if name != "xla":
            return work(0)
        import torch_xla
        torch_xla.launch(work)

    @staticmethod
    def close():
        if dist.is_initialized():
            dist.destroy_process_group()

    def generator(self, seed):
        return torch.Generator(self.device).manual_seed(seed)

    @contextmanager
    def fork_rng(self, seed):
        """Context with random numbers of its own."""
        with torch.random.fork_rng([self.device] if self.cuda else []):
            torch.manual_seed(seed)
            yield

    def compilations(self):
        """How many graphs were compiled up to now."""
        if self.xla:
            from torch_xla.debug import metrics
            return metrics.counter_value("UncachedCompile") or 0
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def memory_gb(self):
        """Peak memory of this process in GiB: of the GPU, or resident (0 on Windows)."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2 ** 30
        try:
            import resource
        except ImportError:
            return 0.0
        unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    def say(self, text):
        """A line on standard output, of the first process, that leaves progress bars whole."""
        if self.first:
            tqdm.write(text)
            sys.stdout.flush()


# --------------------------------------------------------------------------------------------------
# checkpoints

FORMAT = 2                                              # of a checkpoint's content


def save(path, content):
    """Writes a checkpoint whole or not at all: under another name first, then renamed.

    content: {network: class name, config: nested dict of a Config, model: state dict, step, best,
    maybe ema: state dict of averaged weights, maybe optimizer: state dict}
    """
    temporary = f"{path}.tmp"
    content = tree_map_only(torch.Tensor, torch.Tensor.cpu, content)
    try:
        with open(temporary, "wb") as f:
            torch.save({"format": FORMAT, **content}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):                  # Windows cannot open one
            folder = os.open(dirname(path) or ".", os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except RuntimeError as e:                           # torch's, for any failing write
        raise OSError(f"{path} could not be written: {e}") from e
    finally:                                            # a failed save leaves nothing behind
        with suppress(FileNotFoundError):
            os.remove(temporary)


def load(path):
    """The content that `save` wrote, on the CPU. Only tensors and plain values are read: a file
    from a stranger can run no code. UserError naming the file, also if a bit of it is wrong."""
    require(isfile(path), f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as packed:
            if broken := packed.testzip():
                raise zipfile.BadZipFile(f"checksum of {broken}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                              # torch raises many types for a damaged file
        raise UserError(f"{path}: damaged, truncated or no checkpoint ({reason(e)})") from e
    require(
        isinstance(content, dict) and {"network", "config", "model"} <= content.keys(),
        f"{path}: not a checkpoint of this code")
    require(
        content.get("format") == FORMAT,
        f"{path}: has format {content.get('format', 1)}, expected {FORMAT}: to be trained anew")
    return content


def reason(error):
    """The type of an exception, and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def load_weights(model, weights, names=None):
    """Fills a model with {our name: tensor}. UserError, and nothing is changed, if any is missing,
    left over or of another shape, naming each: as `names`, {our name: name to report}, has it."""
    names, ours = names or {}, model.state_dict()
    problems = [
        f"missing: {name} (shape {tuple(w.shape)})" for name, w in ours.items()
        if name not in weights and not name.endswith("num_batches_tracked")]
    for name, w in weights.items():
        theirs = names.get(name, name)
        if name not in ours:            # older checkpoints have a shared table twice
            twin = weights.get(name.replace("unembed", "embed"), w)
            if twin is w or not torch.equal(w, twin):
                problems.append(f"left over: {theirs}")
        elif w.shape != ours[name].shape:
            problems.append(
                f"wrong shape: {theirs} gives {tuple(w.shape)}, expected {tuple(ours[name].shape)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"these weights do not fit the model: {'; '.join(sorted(problems)[:5])}{more}")
    model.load_state_dict(weights, strict=False)


@torch.no_grad()
def adapt_weights(weights, model, adapt=False, grid=None):
    """Fits weights of the same network at another image size, sequence length or size of the
    vocabulary, or without earlier maps as condition, to `model`.

    weights: {our name: tensor}
    adapt:   False refuses what does not fit as it is. True interpolates learned positions of the
             image on their grid (bicubic), and cuts tables of the sequence's positions and of the
             vocabulary, or extends them by the rows that the model has; earlier maps weigh nothing.
    grid:    (rows, columns) of the learned image positions in the weights; None: as the model's, or
             else square
    Returns the weights and a line about each that was changed. UserError that names each, if not
    `adapt`. Tokens must mean the same in both.
    """
    weights, notes = dict(weights), []
    for name, ours in model.state_dict().items():
        w = weights.get(name)
        if w is None:
            continue
        extra = ours.shape[1] - w.shape[1] if name == "denoiser.conv_in.weight" else 0
        if extra > 0:
            notes.append(f"{name}: {extra} channels more, of earlier maps, begin at zero")
            w = F.pad(w, (0, 0, 0, 0, 0, extra))
        elif w.shape[1:] != ours.shape[1:]:
            continue
        elif name in ("encoder.position.code", "proj_position.code"):
            new = model.encoder.grid
            old = grid or (new if len(w) == len(ours) else 2 * (math.isqrt(len(w)),))
            require(
                math.prod(old) == len(w), f"{name}: {len(w)} positions, whose grid is not {old}")
            if old != new:
                notes.append(f"{name}: grid of {old}, the model has {new}")
                image = w.T.reshape(1, -1, *old)        # (1, D, rows, columns)
                image = F.interpolate(image, new, mode="bicubic", antialias=True)[0]
                w = image.flatten(1).T
        elif re.fullmatch(r"decoder\.(.*code|embed|unembed|bias)", name) and len(w) != len(ours):
            notes.append(f"{name}: {len(w)} rows, the model has {len(ours)}")
            w = torch.cat([w[:len(ours)].to(ours), ours[len(w):]])
        weights[name] = w
    require(
        not notes or adapt,
        f"these weights are of another size; --adapt would fit them: {'; '.join(notes)}")
    return weights, notes


# --------------------------------------------------------------------------------------------------
# TensorFlow checkpoints of the reference: their names and layouts -> ours

# A pattern, and what it becomes, applied in order to a name.
RENAMES = r"""
^model/
# FIT ("x" are its tokens, "l" its latents)
\bx_network/(\d+)/(enc|dec)_layers/                             blocks/\1/local/
\bl_network/(\d+)/(enc|dec)_layers/                             blocks/\1/process/
\bl2x_cross_attn/(\d+)/                                         blocks/\1/read/
\bl2c_cross_attn/(\d+)/                                         blocks/\1/read_cond/
\bx2l_cross_attn/(\d+)/                                         blocks/\1/write/
\bx_output_ln/                                                  norm/
\bl_output_ln/                                                  latent_norm/
\bx_output_linear/                                              output/
\b\w+\.Sx_pos_emb\.Skernel\.Svis_pos_embedding                  position/code
# RIN ("tape" is its interface)
\b(read|read_cond|write)_units/(\d+)/dec_layers/0/              blocks/\2/\1/
\blatent_processing_units/(\d+)/enc_layers/                     blocks/\1/process/
\bconv_units/(\d+)/                                             blocks/\1/conv/
\b(latent|tape)_prev_proj/                                      \1_prev/mlp/
\b(latent|tape)_prev_ln/                                        \1_prev/norm/
\b\w+\.S(latent|tape)_pos_emb_res\.Skernel                      \1_position/residual
\b\w+\.S(latent|tape)_pos_emb\.Skernel\.Svis_pos_embedding      \1_position/code
\btape_                                                         interface_
\boutput_linear/                                                output/
/enc_ln/                                                        /context_norm/
\btime_emb/dense_0/                                             time_emb/fc1/
\btime_emb/dense_1/                                             time_emb/fc2/
# UNet
\bdn_units/                                                     down/
\bup_units/                                                     up/
/resnet_blocks/                                                 /blocks/
\bgroup_norm_                                                   norm_
/trans_conv_(in|out)_norm/                                      /norm_\1/
/trans_conv_                                                    /conv_
/shortcut_layer/                                                /shortcut/
/mhca_blocks/(\d+)/                                             /attention/\1/cross_att/
/mhca_norms/(\d+)/                                              /attention/\1/cross_norm/
/mhsa_blocks/(\d+)/                                             /attention/\1/self_att/
/mhsa_norms/(\d+)/                                              /attention/\1/self_norm/
\btransformer_decoder/dec_layers/                               layers/
\btransformer\.Svis_pos_embedding                               position/code
# Pix2Seq
transformer_encoder/enc_layers|(?<=decoder/)decoder/dec_layers  layers
/mha_ln/                                                        /self_norm/
/mha/                                                           /self_att/
_(self|cross)_mha/                                              _\1_att/
/(self|cross)_ln/                                               /\1_norm/
/(self|cross)_mha/                                              /\1_att/
/_query_dense/                                                  /q/
/_(key|value)_dense/                                            /kv/
/_output_dense/                                                 /out/
mlp/mlp_layers/0/dense([12])/                                   mlp/fc\1/
mlp/layernorms/0/                                               mlp/norm/
\bstem(_conv|_projection)?/                                     patch/
\bstem_ln/                                                      patch_norm/
\boutput_ln/                                                    norm/
^proj_ln/                                                       proj_norm/
^encoder/(vit|rest)\.Svis_pos_embedding                         encoder/position/code
^proj\.Svis_pos_embedding                                       proj_position/code
^encoder/(vit|rest)\.Scls_token_embedding                       encoder/cls
ar_decoder\.Sseq_pos_embedding                                  position/code
(ar_decoder|fitar)\.S(inp_)?token_embedding                     embed
(ar_decoder|fitar)\.Soutp_token_embedding                       unembed
(ar_decoder|fitar)\.Soutp_bias                                  bias
# Panoptic
^encoder_fuse/upsample_blocks/                                  fuse/
# ResNet: the stem's layers are conv, norm, or in c3 conv, norm, nothing, conv, norm, ...
initial_conv_relu_max_pool/[01]/conv2d/                         stem/0/conv/
initial_conv_relu_max_pool/[23]/conv2d/                         stem/1/conv/
initial_conv_relu_max_pool/[45]/conv2d/                         stem/2/conv/
initial_conv_relu_max_pool/[12]/bn/                             stem/0/norm/
initial_conv_relu_max_pool/[34]/bn/                             stem/1/norm/
initial_conv_relu_max_pool/[56]/bn/                             stem/2/norm/
/block_groups/(\d)/layers/                                      /stages/\1/
/projection_layers/\d/                                          /shortcut/
/conv_relu_dropblock_layers/[0-2]/                              /convs/0/
/conv_relu_dropblock_layers/[3-5]/                              /convs/1/
/conv_relu_dropblock_layers/[6-8]/                              /convs/2/
/conv2d/                                                        /conv/
/[bg]n([12]?)/                                                  /norm\1/
/moving_mean$                                                   /running_mean
/moving_variance$                                               /running_var
/(kernel|depthwise_kernel|gamma)$                               /weight
/beta$                                                          /bias
"""


def renamed(name, renames):
    for pattern, new in re.findall(r"^ *([^#\s]\S*) *(.*)", renames, re.M):
        name = re.sub(pattern, new, name)
    return name


def from_reference(weights, renames=""):
    """Weights under the reference's names and in its layouts -> {our name: float32 tensor} and
    {our name: their name}. renames: a network's own, after those of all."""
    ours, names = {}, {}
    for theirs, value in sorted(weights.items()):       # keys before values
        name = renamed(theirs, RENAMES + renames)
        w = torch.tensor(value, dtype=torch.float32)
        if re.search("_att/(q|kv)/", name):             # (D x) heads x hs
            w = w.flatten(-2)
        elif re.search("(^|/)(_output_dense|stem)/kernel$", theirs):
            w = w.flatten(0, -2)                        # heads x hs, (frames x) rows x cols x in
        elif theirs.endswith("/depthwise_kernel"):      # kh x kw x channels x 1
            w = w.transpose(2, 3)
        if re.search("/(depthwise_)?kernel$", theirs):  # in x out, or kh x kw x in x out
            w = w.movedim((-1, -2), (0, 1))
        name = name.replace("/", ".")
        if name in ours:                                # we project keys and values at once
            w, theirs = torch.cat([ours[name], w]), f"{names[name]} + {theirs}"
        ours[name], names[name] = w, theirs
    return ours, names


def load_reference_weights(model, weights):
    """`load_weights` for weights of the reference, {name: array}, named as in its checkpoints
    without `/.ATTRIBUTES/VARIABLE_VALUE`, in its layouts."""
    load_weights(model, *from_reference(weights, getattr(model, "RENAMES", "")))


def read_reference_checkpoint(path):
    """A TensorFlow checkpoint -> {name: array} of its model, sorted by name.

    path: its folder (the file `checkpoint` there tells which), or DIR/ckpt-N of its files
          DIR/ckpt-N.index and DIR/ckpt-N.data-00000-of-00001
    Needs TensorFlow. FileNotFoundError or UserError naming the file.
    """
    tf = tokenizer.optional("tensorflow", "tensorflow-cpu", f"{path}: reading it, once,")
    prefix = re.sub(r"\.(index|data-\d+-of-\d+)$", "", path)
    if isdir(path):
        with open(f"{path}/checkpoint", errors="replace") as f:
            latest = re.search(r'^model_checkpoint_path: "(.+)"', f.read(), re.M)
        require(latest, f"{path}/checkpoint: names no checkpoint")
        prefix = f"{path}/{basename(latest[1])}"            # it may be from elsewhere
    shards = glob.glob(glob.escape(prefix) + ".data-*-of-*")
    count = int(shards[0].rpartition("-")[2]) if shards else 1
    for part in ["index", *(f"data-{i:05}-of-{count:05}" for i in range(count))]:
        os.stat(f"{prefix}.{part}")                     # or FileNotFoundError
    weights = {}
    try:
        reader = tf.train.load_checkpoint(prefix)
        for key in sorted(reader.get_variable_to_shape_map()):
            # Optimizer slots have another part that begins with a dot.
            if found := re.fullmatch(r"(model(/[^/.][^/]*)+)/\.ATTRIBUTES/VARIABLE_VALUE", key):
                weights[found[1]] = reader.get_tensor(key)
    except Exception as e:                              # TensorFlow raises many types
        raise UserError(f"{prefix}: damaged or truncated ({reason(e)})") from e
    require(weights, f"{prefix}: no weights under model/, so not a checkpoint of the reference")
    return weights


def convert(path, c, categories=()):
    """A TensorFlow checkpoint of the network that `c` describes -> the content of one of ours (see
    `save`), of averaged weights if it has them.

    categories: annotation files in COCO's format that name the classes and their keypoints; without
                any, they are named by number, as far as COCO's 90 (panoptic: 133)
    UserError and FileNotFoundError, as what it calls.
    """
    import data

    model, weights = build(c.model), read_reference_checkpoint(path)
    weights = {                                         # averaged ones come later, and win
        name.replace("_ema/", "/"): w for name, w in weights.items()}
    counted = isinstance(c.model, PanopticConfig)       # whose labels count the categories
    if counted:
        labels, default = range(1 << 24), range(1, 134)
    elif isinstance(c.model, Pix2SeqConfig):
        labels = range(1, c.vocab.max_label + 1)
        default = labels[:90]
    else:
        labels = default = range(c.model.num_classes)
        part = "/denoiser/"                             # all that is ours, if it is there
        weights = {
            name.replace(part, "/"): w for name, w in weights.items() if part in name} or weights
    load_reference_weights(model, weights)
    known = {}
    for file in categories:
        rows = data.read_json(file, ())["categories"]
        require(rows, f"{file}: no categories")
        for i, row in data.read_categories(file, rows, "kpt", (), 1 << 24).items():
            require(i in labels, f"{file}: category {i} is not of {labels}")
            known[i] = known.get(i, {}) | row
    rows = tuple(
        {"id": i, "name": str(i), **known.get(i, {}), "label": n if counted else i}
        for n, i in enumerate(sorted(known) or default, 1))
    return {
        "network": type(model).__name__,
        "config": asdict(replace(c, categories=rows)),
        "model": model.state_dict(),
        "step": 0,
        "best": -math.inf,
    }


# --------------------------------------------------------------------------------------------------
# weights of others: ViT and ResNet as timm and torchvision name and store them

BACKBONE_RENAMES = r"""
^(module|backbone)\.
^(patch_embed\.proj|conv_proj)\.                                encoder.patch.
^(cls|class)_token$                                             encoder.cls
^(encoder\.)?pos_embed(ding)?$                                  encoder.position.code
^(blocks\.|encoder\.layers\.encoder_layer_)                     encoder.layers.
^(norm|encoder\.ln)\.                                           encoder.norm.
\.(norm1|ln_1)\.                                                .self_norm.
\.(norm2|ln_2)\.                                                .mlp.norm.
\.(attn\.qkv\.|self_attention\.in_proj_)                        .self_att.qkv.
\.(attn\.proj|self_attention\.out_proj)\.                       .self_att.out.
\.mlp\.(0|linear_1)\.                                           .mlp.fc1.
\.mlp\.(3|linear_2)\.                                           .mlp.fc2.
\.ls1\.gamma$                                                   .self_att.out.scale
\.ls2\.gamma$                                                   .mlp.fc2.scale
# ResNet
^conv1\.                                                        encoder.resnet.stem.0.conv.
^bn1\.                                                          encoder.resnet.stem.0.norm.
^layer1\.                                                       encoder.resnet.stages.0.
^layer2\.                                                       encoder.resnet.stages.1.
^layer3\.                                                       encoder.resnet.stages.2.
^layer4\.                                                       encoder.resnet.stages.3.
\.conv1\.                                                       .convs.0.conv.
\.conv2\.                                                       .convs.1.conv.
\.conv3\.                                                       .convs.2.conv.
\.bn1\.                                                         .convs.0.norm.
\.bn2\.                                                         .convs.1.norm.
\.bn3\.                                                         .convs.2.norm.
\.downsample\.0\.                                               .shortcut.conv.
\.downsample\.1\.                                               .shortcut.norm.
"""
# Mean and deviation of red, green and blue that such a network's images were normalised by.
COLORS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),    # torchvision, DeiT, MAE, DINOv2
    "half": (3 * (0.5,), 3 * (0.5,)),                  # augreg
}


def read_weights(path):
    """{name: tensor} of a file of torch, or of safetensors: the size of its header, the header
    {name: {dtype, shape, data_offsets}}, and the bytes. UserError if it is none."""
    try:
        if not path.endswith(".safetensors"):
            content = torch.load(path, map_location="cpu", weights_only=True)
            return content.get("model", content.get("state_dict", content))
        with open(path, "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
            content = torch.frombuffer(bytearray(f.read()), dtype=torch.uint8)
        header.pop("__metadata__", None)
        for name, row in header.items():
            kind = row["dtype"].replace("F", "float").replace("I", "int").lower()      # BF16, I64
            w = content[slice(*row["data_offsets"])].clone()           # aligned
            header[name] = w.view(getattr(torch, kind)).view(row["shape"])
        return header
    except Exception as e:                             # torch raises many types
        raise UserError(                               # the rest of torch's words is bad advice
            f"{path}: neither weights of torch nor safetensors ({reason(e).partition('. ')[0]})"
        ) from e


@torch.no_grad()
def load_backbone(path, model, colors):
    """Starts the encoder of a Pix2Seq from the weights of a ViT or ResNet of timm or torchvision,
    whose images are normalised by COLORS[colors]; that becomes part of its first convolution (a
    ResNet's is padded by zeros, so it differs at the edges). Returns lines about what was adapted
    and what did not fit. UserError if nothing does."""
    weights = {
        renamed(name, BACKBONE_RENAMES): w.float()
        for name, w in read_weights(path).items() if torch.is_tensor(w)}
    for name, w in list(weights.items()):
        layer, _, kind = name.rpartition(".")
        if layer.endswith(".qkv"):                     # we project keys and values at once
            q, kv = name.replace("qkv", "q"), name.replace("qkv", "kv")
            weights[q], weights[kv] = weights.pop(name).tensor_split([len(w) // 3])
        if kind == "scale":                            # of what the layer adds (LayerScale)
            weights[f"{layer}.weight"] *= w[:, None]
            weights[f"{layer}.bias"] *= w
            del weights[name]
    if "encoder.position.code" in weights:             # (1, maybe a class token's + N, dim)
        codes = weights["encoder.position.code"][0]
        first = len(codes) - math.isqrt(len(codes)) ** 2
        weights["encoder.position.code"] = codes[first:]
        if "encoder.cls" in weights:
            weights["encoder.cls"] = weights["encoder.cls"][0] + codes[:1] * (first > 0)
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in COLORS[colors])
    for conv, moved, sign in (
            ("encoder.patch.weight", "encoder.patch.bias", -1),
            ("encoder.resnet.stem.0.conv.weight", "encoder.resnet.stem.0.norm.running_mean", 1)):
        if conv in weights:
            weights[conv] = weights[conv] / std
            weights[moved] = weights.get(moved, 0) + sign * (weights[conv] * mean).sum((1, 2, 3))
    (weights, notes), ours = adapt_weights(weights, model, adapt=True), model.state_dict()
    fitting = {
        name: w for name, w in weights.items() if name in ours and w.shape == ours[name].shape}
    require(fitting, f"{path}: no weights that fit the encoder, such as {list(weights)[:3]}")
    load_weights(model, ours | fitting)
    encoder = {name for name in ours if name.startswith("encoder.")}
    return [
        *notes,
        f"left out: {sorted(weights.keys() - fitting.keys())}",
        f"not in the file: {sorted(encoder - fitting.keys())}",
    ]


@tokenizer.script
def main():
    import sample

    parser = sample.Parser(description=__doc__)
    parser.add_argument(
        "--convert", nargs=3, metavar=("DIR", "OUT", "PRESET"),
        help="TensorFlow checkpoint of the reference, the file to write, the preset that it is of")
    parser.add_argument(
        "--categories", nargs="+", default=[], metavar="FILE",
        help="annotation files in COCO's format that name the classes and keypoints")
    parser.add_argument(
        "--pieces", metavar="FILE", default="", help="SentencePiece model file, for captions")
    args = parser.parse_args()
    if not args.convert:
        return print_sizes()
    from train import PRESETS

    source, target, preset = args.convert
    check_choice(preset, PRESETS, "preset")
    c = sample.changed(PRESETS[preset].config, pieces=args.pieces)
    save(target, convert(source, c, args.categories))
    print(f"written to {target}; next: python sample.py photo.jpg --ckpt={target}")


if __name__ == "__main__":
    import model  # train.py imports this file by that name: one set of classes

    model.main()
