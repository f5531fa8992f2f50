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
import argparse
import contextlib
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
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# blocks

class Position(nn.Module):
    """Adds a position code to tokens (..., N, dim), N = frames * rows * cols or less. kind:
    learned, sin_cos, or sin_cos_plus_learned (their sum, the learned part zero at first)."""

    def __init__(self, kind, rows, cols, dim, maximum=2 * math.pi, frames=1):
        super().__init__()
        check_choice(kind, ("learned", "sin_cos", "sin_cos_plus_learned"), "position code")
        n, self.shape, self.residual = frames * rows * cols, (rows, cols), None
        if kind == "learned":
            self.code = embedding(n, dim)
            return
        code = sincos_2d(rows, cols, dim, maximum)
        if kind == "sin_cos":          # for several frames the reference repeats patch by patch
            code = code.repeat_interleave(frames, 0)
        else:
            code = code.repeat(frames, 1)
            self.residual = nn.Parameter(torch.zeros(n, dim))
        self.register_buffer("code", code, persistent=False)

    def table(self):
        return self.code if self.residual is None else self.code + self.residual

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
        check_multiple(att_dim, "attention width", heads, "heads")
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(dim, att_dim)
        self.kv = nn.Linear(context_dim or dim, 2 * att_dim)
        self.out = nn.Linear(att_dim, dim)

    def project(self, context):
        """(B, N, context_dim) -> keys and values in one tensor."""
        kv = self.kv(context).unflatten(2, (2, self.heads, -1))             # (B, N, 2, nh, hs)
        return kv.permute(2, 0, 3, 1, 4)                # (2, B, nh, N, hs)

    def query(self, x):
        q = self.q(x).unflatten(2, (self.heads, -1))    # (B, T, nh, hs)
        return q.transpose(1, 2)                        # (B, nh, T, hs)

    def forward(self, x, kv, causal=0, at=None):
        """causal: see Layer. at: positions (T,) of x, of which keys have the first N; None: the
        same ones."""
        q, (k, v) = self.query(x), kv                   # (B, nh, T, hs), (B, nh, N, hs)
        dropout, mask = self.dropout if self.training else 0.0, None
        if causal > 1 or at is not None:
            chunk = torch.arange(k.shape[2], device=x.device) // causal
            mask = (chunk if at is None else at // causal)[:, None] >= chunk        # (T, N)
        is_causal = causal == 1 and mask is None
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
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
    att_dim: width of the cross-attention (default: dim). context_norm: a LayerNorm on it, too."""
    checkpointing = False                               # recompute activations in the backward pass

    def __init__(
            self, dim, mlp_dim, heads, context_dim=None, causal=0, drop_path=0.0, dropout=0.0,
            att_dropout=0.0, self_attention=True, att_dim=None, context_norm=False):
        super().__init__()
        self.causal = causal
        if self_attention:
            self.self_norm = layer_norm(dim)
            self.self_att = Attention(dim, heads, dropout=att_dropout)
        if context_dim:
            self.cross_norm = layer_norm(dim)
            self.context_norm = layer_norm(context_dim) if context_norm else nn.Identity()
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


class Cache:
    """Keys and values of one layer: of its context, if it has one, and of tokens up to now, in
    shapes that change seldom: with `room` for so many tokens."""

    def __init__(self, layer, context, room=0):
        self.context, self.written, self.room = None, None, room
        if context is not None:
            self.context = layer.project_context(context).contiguous()      # read at every token

    def append(self, kv, at):
        """Keys and values of tokens at positions `at` (T,), (2, S, nh, T, hs) -> (2, S, nh, room,
        hs), those of all tokens up to now; later ones are zeros."""
        if self.written is None:
            self.written = kv.new_zeros(*kv.shape[:3], 0, kv.shape[4])
        missing = self.room - self.written.shape[3]
        if missing:
            self.written = F.pad(self.written, (0, 0, 0, missing))
        return self.written.index_copy_(3, at, kv)

    def select(self, rows):
        """Goes on with these of the sequences."""
        self.written = self.written[:, rows]


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

@dataclass(frozen=True)
class EncoderConfig:
    """Everything that fixes the shape of an Encoder."""
    image_size: tuple[int, int] = (640, 640)    # height and width of the padded image, in pixels
    encoder: str = "vit"                # vit, resnet: a transformer on patches, a ResNet; or fit
    patch_size: int = 16                # side of a ViT patch, in pixels
    resnet_variant: str = "standard"    # output stride 32: standard; 16: c4 or dc5 (dilated); 8: c3
    resnet_depth: int = 50              # layers of the whole ResNet: 50, 101 or 152
    resnet_width: float = 1.0           # factor on the channels of the ResNet
    freeze_bn: bool = False             # train neither statistics nor scales of batch norm
    enc_layers: int = 12                # encoder: transformer layers; of a fit see fit_layers
    enc_dim: int = 768                  # encoder: width
    enc_mlp: int = 3072                 # encoder: hidden width of an MLP
    enc_heads: int = 12                 # encoder: attention heads
    fit_layers: str = "(2)4(2)4"        # fit: (local layers) layers of latents, and so on
    fit_grid: int = 2                   # fit: groups are the cells of such a grid over the image
    fit_copies: int = 1                 # fit: more groups, each the whole image as small as a cell
    fit_latents: int = 32               # fit: latents of a group
    fit_latent_dim: int = 768           # fit: their width
    pos_encoding: str = "sin_cos"       # position of an image patch: sin_cos or learned
    cls_token: bool = False             # prepend a learned token to the patches
    drop_path: float = 0.1              # fraction of residual branches left out in training
    dropout: float = 0.1                # fraction of MLP units left out in training
    att_dropout: float = 0.0            # fraction of attention weights left out in training


@dataclass(frozen=True)
class Pix2SeqConfig(EncoderConfig):
    """Everything that fixes the shape of a Pix2Seq model."""
    TASKS = "det", "seg", "kpt", "cap"
    projection: str = "mlp"             # to the decoder: linear, linear_p (+ position), mlp (+ MLP)
    dec_layers: int = 6                 # decoder: transformer layers
    dec_dim: int = 512                  # decoder: width
    dec_mlp: int = 2048                 # decoder: hidden width of an MLP
    dec_heads: int = 16                 # decoder: attention heads
    pos_encoding_dec: str = "learned"   # position of a token in its sequence: sin_cos or learned
    vocab_size: int = 3000              # tokens in the vocabulary
    max_seq_len: int = 512              # longest sequence, prompt included
    shared_embedding: bool = True       # one matrix embeds tokens and scores them
    output_bias: bool = True            # a bias on the scores of the tokens


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> tokens (B, N, enc_dim): a transformer over a grid, row by row, of
    patches of pixels (vit) or of positions in a ResNet's last feature map (resnet)."""

    def __init__(self, c):
        super().__init__()
        check_choice(c.encoder, ("vit", "resnet", "fit"), "encoder")
        stages = []
        if c.encoder == "vit":         # pixels beyond the last whole patch are not seen: 5 of 1333
            self.patch = nn.Conv2d(3, c.enc_dim, c.patch_size, c.patch_size)
            self.grid = tuple(side // c.patch_size for side in c.image_size)
        else:
            self.resnet = ResNet(c)
            *stages, (channels, *grid) = self.resnet.shapes
            self.grid = tuple(grid)
            self.patch = nn.Linear(channels, c.enc_dim)
            self.dropout = nn.Dropout(c.dropout)
        if 0 in self.grid:
            raise ValueError(f"image_size {c.image_size} is smaller than patch_size {c.patch_size}")
        self.shapes = [*stages, (c.enc_dim, *self.grid)]       # of feature maps, finest first
        self.patch_norm = layer_norm(c.enc_dim)
        self.position = Position(c.pos_encoding, *self.grid, c.enc_dim)
        self.cls = embedding(1, c.enc_dim) if c.cls_token else None
        self.layers = Layers(c.enc_layers, c.enc_dim, c.enc_mlp, c.enc_heads, **dropouts(c))
        self.norm = layer_norm(c.enc_dim)

    def forward(self, images, pyramid=False):
        """pyramid: returns feature maps, too, finest first: those of the stages of a ResNet, but in
        place of the last one the tokens."""
        maps = []
        if hasattr(self, "resnet"):
            *maps, last = self.resnet(images)
            features = last.flatten(2).transpose(1, 2)  # (B, N, channels)
            x = self.patch(self.dropout(features))      # (B, N, D)
        else:
            x = self.patch(images).flatten(2).transpose(1, 2)               # (B, N, D)
        x = self.position(self.patch_norm(x))
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)           # (B, 1 + N, D)
        x = self.norm(self.layers(x))
        if not pyramid:
            return x
        return x, [*maps, x.transpose(1, 2).unflatten(2, self.grid)]        # (B, D, h, w)


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
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        check_choice(c.projection, ("linear", "linear_p", "mlp"), "projection")
        self.encoder = FITEncoder(c) if c.encoder == "fit" else Encoder(c)
        if c.encoder == "fit":                          # the decoder attends to what it says
            self.decoder = Decoder(c, self.encoder.dim)
            return initialize(self)
        self.proj, self.proj_norm = nn.Linear(c.enc_dim, c.dec_dim), layer_norm(c.dec_dim)
        if c.projection != "linear":
            self.proj_position = Position(c.pos_encoding, *self.encoder.grid, c.dec_dim)
        if c.projection == "mlp":
            ratio = c.enc_mlp // c.enc_dim              # the encoder's, as in the reference
            self.proj_mlp = MLP(c.dec_dim, ratio * c.dec_dim, c.drop_path, c.dropout)
        self.decoder = Decoder(c, c.dec_dim)
        initialize(self)

    def encode(self, images):
        """(B, 3, H, W) float in [0, 1] -> (B, N, dec_dim), what the decoder attends to."""
        x = self.encoder(images)                        # (B, N, enc_dim)
        if self.config.encoder == "fit":
            return x
        x = self.proj_norm(self.proj(x))                # (B, N, dec_dim)
        if self.config.projection != "linear":
            n = math.prod(self.encoder.grid)            # a class token has no position
            x = torch.cat([x[:, :-n], self.proj_position(x[:, -n:])], 1)
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
    def generate(
            self, context, prompts, length, samples=1, temperature=1.0, top_k=0, top_p=1.0,
            end=None, return_logprobs=slice(0), suppress=None, generator=None):
        """Writes up to `length` tokens after each prompt. Returns Generated.

        context:     (B, N, dec_dim), from `encode`; every sequence about an image shares it
        prompts:     (B, P) or (B, G, P) int64
        samples:     sequences per prompt; G grows by this factor, those of a prompt side by side
        temperature, top_k, top_p: see `sample_token`; temperature 0 takes the likeliest token
        end:         token after which a sequence is padded; stops when all have ended. None: never
        return_logprobs: slice of the vocabulary whose log-probabilities are wanted at every step
        suppress:    token that may be written and read on, but in the result another stands in its
                     place, drawn without it; no probability counts it (2206.07669)
        generator:   torch.Generator on the device of `context`, for results that repeat
        """
        B, P, V = len(context), prompts.shape[-1], self.config.vocab_size
        if P + length > self.config.max_seq_len + 1:
            raise ValueError(                           # the last token is never read
                f"prompt of {P} and {length} tokens exceed max_seq_len {self.config.max_seq_len}")
        new = prompts.reshape(-1, P)                    # what the decoder has not seen
        S, device = len(new) * samples, context.device
        at = torch.arange(P, device=device)             # positions of `new`
        caches = [Cache(layer, context) for layer in self.decoder.layers]
        tokens = new.new_zeros(S, length)
        probs = torch.zeros(S, length, device=device)
        logprobs = probs.new_full((S, length, len(range(V)[return_logprobs])), -math.inf)
        rows = torch.arange(S, device=device)           # the sequences that have not ended
        draw = partial(sample_token, temperature=temperature, top_k=top_k, top_p=top_p)
        for t in range(length):
            for cache in caches:                        # attention masks what is to come
                cache.room = 64 * math.ceil((P + t) / 64)
            x = self.decoder(new, context, caches, at)[:, -1]
            if t == 0:                                  # samples of a prompt part here
                x = x[rows // samples]                  # (S, D)
                for cache in caches:
                    cache.select(rows // samples)
            logits = self.decoder.scores(x).float()     # (S, V)
            uniform = torch.rand(2, S, generator=generator, device=device)[:, rows]
            token = shown = draw(logits, uniform[0])    # (S,)
            if suppress is not None:
                logits[:, suppress] = -math.inf
                shown = torch.where(token == suppress, draw(logits, uniform[1]), token)
            logprob = logits.log_softmax(-1)
            tokens[rows, t] = shown
            probs[rows, t] = logprob.gather(1, shown[:, None])[:, 0].exp()
            logprobs[rows, t] = logprob[:, return_logprobs]
            new, at = token[:, None], at[-1:] + 1
            if end is not None and t % 16 == 15:        # reading it waits for the GPU: not often
                ended = (tokens[rows, :t + 1] == end).any(1).view(B, -1)
                most = int((~ended).sum(1).max())       # as many for each image
                if not most:
                    break
                G = ended.shape[1]
                if most < G:
                    kept = ended.sort(dim=1, stable=True).indices[:, :most]     # of an image's G
                    kept = (kept + G * torch.arange(B, device=device)[:, None]).flatten()
                    rows, new = rows[kept], new[kept]
                    for cache in caches:
                        cache.select(kept)
        if end is not None:
            after = (tokens == end).cumsum(1).cumsum(1) > 1
            tokens, probs = tokens.masked_fill(after, 0), probs.masked_fill(after, 0.0)
        return Generated(*(x.unflatten(0, (B, S // B)) for x in (tokens, probs, logprobs)))


def filter_logits(logits, top_k=0, top_p=1.0):
    """(S, V) -> the same with -inf where a token is not among the top_k largest (0: all), or not
    among the largest whose cumulative probability stays within top_p (nucleus sampling,
    1904.09751); the largest always stays."""
    if top_k > 0:
        smallest = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        ordered = logits.sort(-1, descending=True).values
        within = (ordered.softmax(-1).cumsum(-1) <= top_p).sum(-1, keepdim=True)
        smallest = ordered.gather(-1, within.clamp(min=1) - 1)
        logits = logits.masked_fill(logits < smallest, -math.inf)
    return logits


def sample_token(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """(S, V) float -> (S,) int64, drawn from the filtered softmax by uniform random numbers (S,);
    the likeliest if temperature is 0 or top_k is 1."""
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1)
    probs = filter_logits(logits / temperature, top_k, top_p).softmax(-1)
    # The first token up to which the sum is larger; unlike torch.multinomial it never waits for the
    # device.
    sums = probs.cumsum(-1)
    return (sums <= uniform[:, None] * sums[:, -1:]).sum(-1)


def token_loss(forward, batch, c):
    """The weighted sum of the losses of a batch's tokens. c: a train.Config."""
    losses = forward(batch.images, batch.inputs, batch.targets, c.optim.label_smoothing)
    return (losses * batch.weights).sum()               # (B, [G,] T)


# ==== reference ===================================================================================
# small parts: attention maps, position codes, stochastic depth, initialisation, checks

@torch.no_grad()
def attention_maps(model, context, tokens):
    """Where the decoder of a Pix2Seq looks: (1, N, dim) and input tokens (1, T) -> (T, N), per next
    token the cross-attention to the encoded image, averaged over layers and heads."""
    maps = []

    def look(attention, args, _):
        q, (k, _) = attention.query(args[0]), args[1]           # (1, nh, T, hs), (1, nh, N, hs)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        maps.append(weights.mean(1)[0])                         # (T, N)

    with contextlib.ExitStack() as hooks:
        for layer in model.decoder.layers:
            hooks.enter_context(layer.cross_att.register_forward_hook(look))
        model.decoder(tokens, context)
    return torch.stack(maps).mean(0)


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
    return torch.arange(n, dtype=torch.float32) / max(n - 1, 1) * maximum


def sincos_2d(rows, cols, dim, maximum):
    """(rows * cols, dim) float32: half of the width codes the row, half the column."""
    if 1 in (rows, cols):
        return sincos(spread(rows * cols, maximum), dim)
    coords = torch.cartesian_prod(spread(rows, maximum), spread(cols, maximum))     # (N, 2)
    return sincos(coords, dim // 2).flatten(1)          # (N, dim)


def embedding(*shape):
    """A table of truncated normal numbers of deviation 0.02, none beyond two."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02, a=-0.04, b=0.04))


def layer_norm(dim):
    return nn.LayerNorm(dim, eps=1e-6)


class DropPath(nn.Module):
    """Leaves out a residual branch of some examples (stochastic depth, 1603.09382)."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) < 1 - self.rate
        return x * keep.to(x.dtype) / (1 - self.rate)


def dropouts(c):
    """The rates of a Layer."""
    return dict(drop_path=c.drop_path, dropout=c.dropout, att_dropout=c.att_dropout)


def initialize(model):
    """Glorot-uniform dense and convolution weights, zero biases; embeddings keep their truncated
    normal (std 0.02). Inputs and outputs are counted as the reference shapes its weights, an
    attention's D x heads x size and heads x size x D: it decides how soon small networks learn."""
    for module in model.modules():                      # each before its parts
        if isinstance(module, Attention):
            heads, size = module.heads, module.q.out_features // module.heads
            for part in module.q, module.kv:
                part.fans = part.in_features * (heads + size)
            module.out.fans = heads * (size + module.out.out_features)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            if module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            else:                      # a ResNet's: truncated normal of variance 1 / inputs
                std = module.weight[0].numel() ** -0.5
                edge = 2 * std / 0.87962566             # the cut leaves a deviation of std
                nn.init.trunc_normal_(module.weight, std=edge / 2, a=-edge, b=edge)
        if hasattr(module, "fans"):
            limit = math.sqrt(6 / module.fans)
            nn.init.uniform_(module.weight, -limit, limit)


def starts_at_zero(layer):
    """Marks a layer for `initialize`: it adds nothing at first."""
    layer.fans = math.inf
    return layer


def set_checkpointing(model, on=True):
    """Whether training recomputes the activations of all layers: less memory, more time."""
    for module in model.modules():
        if isinstance(module, Layer):
            module.checkpointing = on


def check_choice(value, choices, what):
    if value not in choices:
        expected = ", ".join(map(str, choices))
        raise ValueError(f"unknown {what} {value!r}, expected one of {expected}")


def check_multiple(number, what, factor, of):
    if factor < 1 or number % factor:
        raise ValueError(f"{what} {number} is not a multiple of {factor} ({of})")


# --------------------------------------------------------------------------------------------------
# ResNet

class ConvNorm(nn.Module):
    """Convolution without bias, then batch norm. Both sides are padded alike at any stride."""

    def __init__(self, inputs, outputs, kernel, stride=1, dilation=1, scale=1.0):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        nn.init.constant_(self.norm.weight, scale)

    def forward(self, x):
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions, the stride in the 3x3 (1512.03385, v1); at
    first the identity."""

    def __init__(self, inputs, width, stride=1, dilation=1):
        super().__init__()
        self.convs = nn.ModuleList([
            ConvNorm(inputs, width, 1),
            ConvNorm(width, width, 3, stride, dilation),
            ConvNorm(width, 4 * width, 1, scale=0.0),
        ])
        self.shortcut = nn.Identity()
        if inputs != 4 * width:
            self.shortcut = ConvNorm(inputs, 4 * width, 1, stride)

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
        check_choice(c.resnet_variant, RESNET_STRIDES, "resnet_variant")
        check_choice(c.resnet_depth, RESNET_BLOCKS, "resnet_depth")
        strides, self.freeze = RESNET_STRIDES[c.resnet_variant], c.freeze_bn
        w = int(64 * c.resnet_width)
        if c.resnet_variant == "c3":
            stem = [ConvNorm(3, w // 2, 3), ConvNorm(w // 2, w // 2, 3), ConvNorm(w // 2, w, 3)]
        else:
            stem = [ConvNorm(3, w, 7, 2)]
        self.stem, self.stages = nn.ModuleList(stem), nn.ModuleList()
        self.shapes = []                                # (C, H, W) of the maps, finest first
        channels, total = w, 2 * stem[0].conv.stride[0]         # total: stride from the image on
        for i, (stride, blocks) in enumerate(zip(strides, RESNET_BLOCKS[c.resnet_depth])):
            width, total = w << i, total * stride
            # The first block of a dilated stage is not dilated, as in the reference.
            dilation = 2 if c.resnet_variant == "dc5" and i == 3 else 1
            stage = [Bottleneck(channels, width, stride)]
            channels = 4 * width
            for _ in range(blocks - 1):
                stage.append(Bottleneck(channels, width, dilation=dilation))
            self.stages.append(nn.Sequential(*stage))
            self.shapes.append((channels, *(math.ceil(side / total) for side in c.image_size)))
        self.train()

    def norms(self):
        return [m for m in self.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))]

    def train(self, mode=True):
        super().train(mode)
        if self.freeze:
            for norm in self.norms():
                norm.eval().requires_grad_(False)
        return self

    def forward(self, images):
        x, maps = images, []
        for conv in self.stem:
            x = F.relu(conv(x))
        # Where a side is even, TensorFlow's 'SAME' pads only its end.
        odd = x.shape[2] % 2, x.shape[3] % 2
        x = F.max_pool2d(x, 3, 2, padding=odd, ceil_mode=True)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


# --------------------------------------------------------------------------------------------------
# parts of denoisers

@dataclass(frozen=True)
class ImageConfig:
    """What all networks share that make images."""
    sample_size: tuple[int, int] = (32, 32)     # height and width of what is made
    channels: int = 3                   # its channels
    num_classes: int = 0                # labels, as condition (or features of that width); 0: none

    # No video and no logits, unless a network has them.
    frames, cond_frames, softmax_groups = 1, 0, 0

    @property
    def sample_shape(self):
        """(C, H, W), or of a video (C, T, H, W)."""
        frames = [self.frames] if self.frames + self.cond_frames > 1 else []
        return self.channels, *frames, *self.sample_size


@dataclass(frozen=True)
class VideoConfig(ImageConfig):
    """What those share that make videos, too."""
    frames: int = 1                     # of the sample; 1: an image
    cond_frames: int = 0                # context frames of a video, as condition


class ScalarEmbedding(nn.Module):
    """A number per example (B,), and optional features (B, features) -> (B, dim)."""

    def __init__(self, dim, scaling, features=0, normalize=False):
        super().__init__()
        check_multiple(dim, "width of the time embedding", 4, "sines and cosines")
        self.scaling, self.normalize = scaling, normalize
        self.fc1, self.fc2 = nn.Linear(dim // 4, dim), nn.Linear(dim + features, dim)

    def forward(self, t, features=None):
        code = sincos(t.float() * self.scaling, self.fc1.in_features)       # (B, dim / 4)
        if self.normalize:
            std = code.std(-1, correction=0, keepdim=True)
            code = (code - code.mean(-1, keepdim=True)) / std
        x = F.silu(self.fc1(code))                      # (B, dim)
        return self.fc2(x if features is None else torch.cat([x, features], -1))


def check_inputs(c, x, labels, **conditions):
    """ValueError if a denoiser's input has another shape than it predicts, or if it gets a
    condition that it does not take, or not one that it needs: name=(value, width or 0)."""
    if x.shape[1:] != c.sample_shape:
        raise ValueError(f"samples of shape {tuple(x.shape[1:])}, expected {c.sample_shape}")
    if labels is not None and not c.num_classes:
        raise ValueError("labels: this network takes none")
    check_conditions(**conditions)


def check_conditions(**conditions):
    for name, (value, width) in conditions.items():
        if (value is not None) != bool(width):
            raise ValueError(f"{name}: this network {'needs them' if width else 'takes none'}")


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
        for size in (x.shape[3], x.shape[2]):
            total = max(kernel - (size % stride or stride), 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def group_norm(dim, like=None):
    """GroupNorm over `dim` channels, in as many groups as fit `like` channels (default: dim)."""
    return nn.GroupNorm(min((like or dim) // 4, 32), dim)


# --------------------------------------------------------------------------------------------------
# parts of a RIN

def check_rin(c, extra):
    """ValueError if options of a RIN contradict each other. extra: there are extra tokens."""
    check_choice(c.self_cond, ("none", "latent", "interface", "latent+interface"), "self_cond")
    for side in c.sample_size:
        check_multiple(side, "sample_size", c.interface_patch, "interface_patch")
    if c.cond_decoupled_read and (c.cond_writable or not extra):
        raise ValueError(
            "cond_decoupled_read needs extra tokens (time_on_latents=False or cond_on_latents=0) "
            "and cond_writable=False")
    if extra and c.cond_dim not in (0, c.interface_dim) and not c.cond_decoupled_read:
        raise ValueError(
            f"cond_dim {c.cond_dim} differs from interface_dim {c.interface_dim}: it needs "
            f"cond_decoupled_read")


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
    """(B, N, t * h * w * C) -> `shape`: (B, C, [T,] H, W)."""
    (_, h, w, _), (B, C, *T, H, W) = patch_shape, shape
    x = x.view(B, -1, H // h, W // w, *patch_shape)     # (B, T', H', W', t, h, w, C)
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
        y = tokens.unflatten(1, self.grid).flatten(0, 1).permute(0, 3, 1, 2)    # (B * T, D, H, W)
        y = self.dropout(F.silu(self.norm(self.depthwise_conv(y))))
        y = self.pointwise_conv(y).permute(0, 2, 3, 1)  # (B * T, H, W, D)
        return torch.cat([tokens + y.reshape(tokens.shape), extra], 1)


# --------------------------------------------------------------------------------------------------
# RIN: Recurrent Interface Network, a denoiser (see diffusion.py)

@dataclass(frozen=True)
class RINConfig(VideoConfig):
    """Everything that fixes the shape of a RIN. The defaults are the reference's for CIFAR-10,
    without labels."""
    TASKS = "gen",
    frame_stride: int = 1               # frames in a patch of a video
    self_cond: str = "latent"           # of the last call: none, latent, interface or both with a +
    interface_patch: int = 2            # side of the patch that becomes an interface token
    interface_dim: int = 256            # interface: width
    interface_mlp_ratio: int = 2        # MLP after a write: hidden width / interface_dim; 0: no MLP
    interface_position: str = "learned"     # learned, sin_cos or sin_cos_plus_learned
    latents: int = 128                  # latent tokens, those for time and condition included
    latent_dim: int = 512               # latents: width
    latent_mlp_ratio: int = 4           # latents: hidden width of an MLP / latent_dim
    latent_heads: int = 16              # latents: heads of self-attention
    latent_position: str = "learned"    # their start: learned, sin_cos or sin_cos_plus_learned
    latent_layers: tuple[int, ...] = (2, 2, 2)  # latent layers of each block; 0: it only reads
    rw_heads: int = 8                   # attention heads of reads and writes
    rw_context_norm: bool = False       # a LayerNorm on what is read or written, too
    conv_kernel: int = 0                # side of a depthwise convolution after a write; 0: none
    conv_dropout: float = 0.0           # fraction of its units left out in training
    time_scaling: float = 1000.0        # gamma is multiplied by this before it is coded
    time_on_latents: bool = True        # the time token is a latent; else an extra token
    cond_on_latents: int = 1            # condition tokens among the latents (1 per label); 0: extra
    cond_dim: int = 0                   # width of extra tokens; 0: interface_dim
    cond_proj: bool = True              # a dense layer on the condition; else it has that width
    cond_writable: bool = False         # extra tokens are written, too
    cond_decoupled_read: bool = False   # extra tokens are read by layers of their own
    drop_path: float = 0.1              # fraction of residual branches left out in training
    dropout: float = 0.1                # fraction of MLP units left out in training
    att_dropout: float = 0.0            # fraction of attention weights left out in training


class RINBlock(nn.Module):
    """Read: latents attend to the interface. Process: latents attend to each other. Write: the
    interface attends to the latents."""

    def __init__(self, c, layers, cond_dim, grid):
        super().__init__()
        latent_mlp = c.latent_mlp_ratio * c.latent_dim
        interface_mlp = c.interface_mlp_ratio * c.interface_dim
        rw_dim = min(c.interface_dim, c.latent_dim)
        attend = partial(
            Layer,
            heads=c.rw_heads,
            self_attention=False,
            context_norm=c.rw_context_norm,
        )
        self.read = attend(c.latent_dim, latent_mlp, context_dim=c.interface_dim, att_dim=rw_dim)
        self.read_cond = self.write = None
        if c.cond_decoupled_read:
            width = min(cond_dim, c.latent_dim)
            self.read_cond = attend(c.latent_dim, latent_mlp, context_dim=cond_dim, att_dim=width)
        self.process = Layers(layers, c.latent_dim, latent_mlp, c.latent_heads, **dropouts(c))
        if layers:
            self.write = attend(
                c.interface_dim, interface_mlp, context_dim=c.latent_dim, att_dim=rw_dim)
        self.conv = nn.Identity()
        if layers and c.conv_kernel:
            self.conv = InterfaceConv(c, grid)

    def forward(self, latents, interface, extra=None):
        """latents (B, M, latent_dim), interface (B, N, interface_dim), and extra tokens that are
        only read (B, K, cond_dim)."""
        context = interface
        if self.read_cond is not None:
            latents = self.read_cond(latents, extra)
        elif extra is not None:
            context = torch.cat([interface, extra], 1)          # (B, N + K, interface_dim)
        latents = self.process(self.read(latents, context))
        if self.write is not None:
            interface = self.write(interface, latents)
        return latents, self.conv(interface)


class RIN(nn.Module):
    """Recurrent Interface Network (2212.11972), for images and, where frames + cond_frames > 1, for
    videos.

    In the reference ("tape") several frames with `interface` self-conditioning, with writable extra
    tokens or with a convolution fail or mix up tokens; here they are as one would expect.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.video = len(c.sample_shape) == 4
        label_token = c.num_classes > 0 and not self.video      # in a video it goes with the time
        cond_dim = c.cond_dim or c.interface_dim
        check_rin(c, extra=not c.time_on_latents or label_token and not c.cond_on_latents)

        rows, cols = (side // c.interface_patch for side in c.sample_size)
        steps = sum(math.ceil(frames / c.frame_stride) for frames in (c.frames, c.cond_frames))
        self.patch_shape = c.frame_stride, c.interface_patch, c.interface_patch, c.channels
        patch_dim = math.prod(self.patch_shape)
        self.patch = nn.Linear(patch_dim, c.interface_dim)      # a convolution in the reference
        self.patch.fans = patch_dim // c.channels * (c.channels + c.interface_dim)
        self.patch_norm = layer_norm(c.interface_dim)
        self.interface_position = Position(
            c.interface_position, rows, cols, c.interface_dim, c.time_scaling, steps)
        own = c.latents - c.time_on_latents - label_token * c.cond_on_latents
        self.latent_position = Position(c.latent_position, own, 1, c.latent_dim, c.time_scaling)
        self.time_emb = ScalarEmbedding(
            c.latent_dim if c.time_on_latents else cond_dim,
            c.time_scaling,
            c.num_classes if self.video else 0,
            normalize=True,
        )
        self.cond_proj = None
        if label_token:
            width = c.latent_dim if c.cond_on_latents else cond_dim
            self.cond_proj = nn.Linear(c.num_classes, width) if c.cond_proj else nn.Identity()
        self.latent_prev = WarmStart(c.latent_dim, c.latent_mlp_ratio, "latent" in c.self_cond)
        self.interface_prev = WarmStart(
            c.interface_dim, c.interface_mlp_ratio, "interface" in c.self_cond)
        self.blocks = nn.ModuleList(
            RINBlock(c, layers, cond_dim, (steps, rows, cols)) for layers in c.latent_layers)
        self.norm = layer_norm(c.interface_dim)
        self.output = nn.Linear(c.interface_dim, patch_dim)
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
        check_inputs(c, x, labels, frames=(frames, c.cond_frames))
        labels = one_hot_labels(labels, c.num_classes, x)       # (B, num_classes)
        old_latents, old_interface = self_cond or (None, None)

        # Tokens for time and condition stand among the latents, or beside the interface.
        time = self.time_emb(gamma, labels if self.video else None)[:, None]        # (B, 1, D)
        latents, extra = [self.latent_position.table().expand(len(x), -1, -1)], []
        (latents if c.time_on_latents else extra).append(time)
        if self.cond_proj is not None:
            token = self.cond_proj(labels)                      # (B, D) or (B, S, D)
            if token.dim() == 2:
                token = token[:, None].expand(-1, max(c.cond_on_latents, 1), -1)
            (latents if c.cond_on_latents else extra).append(token)
        latents = self.latent_prev(torch.cat(latents, 1), old_latents)      # (B, M, latent_dim)

        interface = self.interface_prev(self.tokens(x), old_interface)      # (B, n, interface_dim)
        n = interface.shape[1]
        if frames is not None:
            context = self.tokens(frames, slice(n, None))
            interface = torch.cat([interface, context], 1)      # (B, N, interface_dim)
        N = interface.shape[1]
        if c.cond_writable:
            interface, extra = torch.cat([interface, *extra], 1), []        # (B, N + K, ...)
        extra = torch.cat(extra, 1) if extra else None          # (B, K, cond_dim)

        for block in self.blocks:
            latents, interface = block(latents, interface, extra)

        out = self.output(self.norm(interface[:, :n]))          # (B, n, t * p * p * C)
        out = from_patches(out, self.patch_shape, x.shape)      # (B, C, [T,] H, W)
        return out, (latents, interface[:, :N])


# --------------------------------------------------------------------------------------------------
# FIT, Far-reaching Interleaved Transformer (2305.12689): layers over groups, reads and writes

@dataclass(frozen=True)
class FITSizes(ImageConfig):
    """What both kinds of FIT that make images share."""
    sample_size: tuple[int, int] = (64, 64)     # height and width of an image
    fit_layers: str = "(2)4(2)4(2)"     # (local layers) layers of latents, and so on
    fit_patch: int = 4                  # side of the patch that becomes a token
    fit_dim: int = 512                  # tokens: width
    fit_heads: int = 8                  # tokens: attention heads
    fit_latents: int = 16               # latents of a group
    fit_latent_dim: int = 768           # latents: width
    fit_latent_heads: int = 12          # latents: attention heads
    fit_mlp_ratio: int = 4              # hidden width of an MLP / width
    fit_position: str = "learned"       # of tokens in a group, and of latents: learned or sin_cos
    drop_path: float = 0.0              # fraction of residual branches left out in training
    dropout: float = 0.0                # fraction of MLP units left out in training
    att_dropout: float = 0.0            # fraction of attention weights left out in training

    # What a denoiser alone may have otherwise.
    fit_local_attention, fit_read_mlp, fit_context_norm = True, False, True


@dataclass(frozen=True)
class FITConfig(FITSizes):
    """Everything that fixes the shape of a FIT that denoises images."""
    TASKS = "gen",
    self_cond: str = "latent"           # of the last call: none or latent
    fit_grid: int = 4                   # groups are the cells of such a grid over the image
    fit_local_attention: bool = True    # whether tokens attend to each other; else MLPs alone
    fit_read_mlp: bool = False          # an MLP after tokens and latents have read each other
    fit_context_norm: bool = True       # a LayerNorm on what is read, too
    cond_proj: bool = True              # a dense layer on the condition; else it has that width


class FITBlock(nn.Module):
    """The tokens x of a group attend to each other; a few latents of the group read them; the
    latents of all groups attend to each other; the tokens read the latents of their group.

    local, processing: layers of tokens, of latents; without the latter a block ends after the first
    causal: latents of a group, if no group may see later ones: then tokens read the group before
    last: whether nothing is written back. cond: whether latents also read extra tokens
    """

    def __init__(self, c, local, processing, causal=0, last=False, cond=False):
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
        between = dict(heads=min(c.fit_heads, c.fit_latent_heads), att_dim=min(dim, latent_dim))
        self.read = self.read_cond = self.write = None
        if processing:
            hidden = latent_mlp * c.fit_read_mlp
            self.read = attend(latent_dim, hidden, context_dim=dim, **between)
        if processing and cond:
            self.read_cond = attend(latent_dim, 0, c.fit_latent_heads, context_dim=latent_dim)
        if processing and not last:
            hidden = mlp * c.fit_read_mlp
            self.write = attend(dim, hidden, context_dim=latent_dim, **between)

    def forward(self, x, latents, cond=None):
        """x (B, G, N, dim), latents (B, G, M, latent_dim), and extra tokens (B, K, latent_dim)."""
        groups, x = x.shape[:2], self.local(x.flatten(0, 1))                # (B G, N, dim)
        if self.read is not None:
            latents = self.read(latents.flatten(0, 1), x)                   # (B G, M, latent_dim)
            latents = latents.unflatten(0, groups).flatten(1, 2)            # (B, G M, latent_dim)
            if self.read_cond is not None:
                latents = self.read_cond(latents, cond)
            latents = self.process(latents).unflatten(1, (groups[1], -1))   # (B, G, M, latent_dim)
        if self.write is not None:
            known = latents
            if self.causal:
                known = torch.cat([torch.zeros_like(latents[:, :1]), latents[:, :-1]], 1)
            x = self.write(x, known.flatten(0, 1))
        return x.unflatten(0, groups), latents


def fit_blocks(c, **options):
    """FITBlocks of a FITSizes: for fit_layers "(2)4(1)" one of 2 local layers and 4 of latents, and
    one of 1 local layer."""
    if not re.fullmatch(r"(\(\d+\)[1-9]\d*)*\(\d+\)\d*", c.fit_layers):
        raise ValueError(
            f"fit_layers {c.fit_layers!r}: expected local layers in brackets, layers of latents "
            "behind them, and so on, as in '(2)4(2)4' or '(2)4(2)'")
    counts = re.findall(r"\((\d+)\)(\d*)", c.fit_layers)
    return nn.ModuleList(
        FITBlock(c, int(local), int(processing or 0), last=n == len(counts), **options)
        for n, (local, processing) in enumerate(counts, 1))


# --------------------------------------------------------------------------------------------------
# FIT as an encoder of images, and as a denoiser (2305.12689)

def to_cells(x, side):
    """(B, C, H, W) -> (B, side * side, C, H / side, W / side), row by row."""
    x = x.unflatten(3, (side, -1)).unflatten(2, (side, -1))                 # (B, C, s, h, s, w)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def from_cells(cells, side):
    """The inverse of `to_cells`."""
    x = cells.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5)          # (B, C, s, h, s, w)
    return x.flatten(4, 5).flatten(2, 3)


class FITStem(nn.Module):
    """What the first FITBlock of an encoder or a denoiser sees: tokens of the patches of all
    groups, and the start of their latents."""

    def __init__(self, c, groups):
        super().__init__()
        self.config = c
        self.grid = tuple(side // c.fit_grid // c.fit_patch for side in c.sample_size)  # of a group
        self.patch_shape = 1, c.fit_patch, c.fit_patch, c.channels
        self.patch = nn.Linear(math.prod(self.patch_shape), c.fit_dim)
        self.patch_norm = layer_norm(c.fit_dim)
        self.position = Position(c.fit_position, math.prod(self.grid), 1, c.fit_dim, 1000)
        self.latent_position = Position(
            c.fit_position, groups, c.fit_latents, c.fit_latent_dim, 1000)

    def tokens(self, groups):
        """(B, G, C, h, w) -> (B, G, N, dim)."""
        patches = to_patches(groups.flatten(0, 1), self.patch_shape)        # (B G, N, p * p * C)
        x = self.position(self.patch_norm(self.patch(patches)))
        return x.unflatten(0, groups.shape[:2])


class FITEncoder(FITStem):
    """An Encoder whose groups are the cells of a grid over the image, and small copies of all of
    it. Its output are the latents, or where `fit_layers` ends with local layers, the tokens."""

    def __init__(self, c):
        for side in c.image_size:
            check_multiple(side, "image_size", c.fit_grid * c.patch_size, "fit_grid * patch_size")
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
        self.ends_local = self.blocks[-1].read is None
        self.dim = c.enc_dim if self.ends_local else c.fit_latent_dim
        unused = self.latent_norm if self.ends_local else self.norm         # checkpoints have both
        unused.requires_grad_(False)

    def forward(self, images):
        cells = to_cells(images, self.config.fit_grid)  # (B, cells, 3, h, w)
        small = F.interpolate(images, cells.shape[-2:], mode="bilinear")[:, None]
        x = self.tokens(torch.cat([small] * self.copies + [cells], 1))      # (B, G, N, D)
        latents = self.latent_position.start(len(x))    # (B, G, M, latent_dim)
        for block in self.blocks:
            x, latents = block(x, latents)
        out = self.norm(x) if self.ends_local else self.latent_norm(latents)
        return out.flatten(1, 2)                        # (B, N, dim)


class FIT(FITStem):
    """FIT as a denoiser (2305.12689): groups are the cells of a grid over the image; time and
    condition are tokens that all latents read."""

    def __init__(self, c):
        check_choice(c.self_cond, ("none", "latent"), "self_cond")
        for side in c.sample_size:
            check_multiple(side, "sample_size", c.fit_grid * c.fit_patch, "fit_grid * fit_patch")
        super().__init__(c, c.fit_grid ** 2)
        self.time_emb = ScalarEmbedding(c.fit_latent_dim, 1000, normalize=True)
        self.cond_proj = nn.Identity()
        if c.num_classes and c.cond_proj:
            self.cond_proj = nn.Linear(c.num_classes, c.fit_latent_dim)
        self.latent_prev = WarmStart(c.fit_latent_dim, c.fit_mlp_ratio, c.self_cond == "latent")
        self.blocks = fit_blocks(c, cond=True)
        self.norm = layer_norm(c.fit_dim)
        self.output = nn.Linear(c.fit_dim, math.prod(self.patch_shape))
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
        check_inputs(c, x, labels)
        cond = self.time_emb(gamma)[:, None]                    # (B, 1, latent_dim)
        if c.num_classes:
            token = self.cond_proj(one_hot_labels(labels, c.num_classes, x))
            cond = torch.cat([cond, token.view(len(x), -1, c.fit_latent_dim)], 1)
        cells = to_cells(x, c.fit_grid)                         # (B, G, C, h, w)
        tokens = self.tokens(cells)                             # (B, G, N, D)
        latents = self.latent_prev(self.latent_position.start(len(x)), *(self_cond or ()))
        for block in self.blocks:
            tokens, latents = block(tokens, latents, cond)
        out = self.output(self.norm(tokens)).flatten(0, 1)      # (B G, N, p * p * C)
        out = from_patches(out, self.patch_shape, cells.flatten(0, 1).shape)
        return from_cells(out.view(cells.shape), c.fit_grid), (latents,)


# --------------------------------------------------------------------------------------------------
# ImageAR: an image written pixel by pixel

@dataclass(frozen=True)
class ImageARConfig(FITSizes):
    """Everything that fixes the shape of an ImageAR."""
    TASKS = "ar",
    levels: int = 256                   # of a colour: tokens in the vocabulary
    fit_patch: int = 8                  # side of the patch that becomes a group; 0: one group
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
    levels = pixels.long() * c.levels // 256
    return serpentine(to_patches(levels, c.group_shape), c)


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
        if not 2 <= c.levels <= 256:
            raise ValueError(f"levels {c.levels}: expected 2 to 256")
        for side, patch in zip(c.sample_size, c.group_shape[1:]):
            check_multiple(side, "sample_size", patch, "fit_patch")
        super().__init__(c, c.levels, c.fit_dim)
        self.config = c
        tokens = math.prod(c.group_shape)
        self.groups = math.prod(c.sample_shape) // tokens
        self.label_proj = nn.Linear(c.num_classes, c.fit_dim) if c.num_classes else None
        self.position = Position(c.fit_position, tokens, 1, c.fit_dim, 1000)
        self.blocks = fit_blocks(c, causal=c.fit_latents)
        self.latent_position = None
        if self.blocks[0].read is not None:
            self.latent_position = Position(
                c.fit_position, self.groups, c.fit_latents, c.fit_latent_dim, 1000)
        self.norm = layer_norm(c.fit_dim)
        initialize(self)

    def start(self, tokens, labels, at=None):
        """Tokens before (B, ..., n) and labels -> what the first layer sees (B, ..., n, D). at:
        positions in their group of those that it sees; None: the first ones."""
        x = self.position(F.embedding(tokens, self.embed), at)
        if self.label_proj is not None:
            label = self.label_proj(one_hot_labels(labels, self.config.num_classes, tokens))
            x = x + label.view(len(x), *[1] * (x.ndim - 2), -1)
        return x

    def forward(self, tokens, labels=None):
        """Teacher forcing: (B, G, N) int64 and labels (B,), -1 for none -> logits (B, G, N, V) of
        each token, which sees those before it."""
        before = F.pad(tokens.flatten(1)[:, :-1], (1, 0)).view(tokens.shape)
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
        tokens = F.pad(given, (0, groups * N - K))
        process = [[Cache(layer, None, groups * M) for layer in block.process] for block in blocks]
        write = [                                      # at first the group before knows nothing
            block.write and Cache(block.write, torch.zeros_like(starts[:, 0])) for block in blocks]
        for g in range(groups):
            local = [[Cache(layer, None, N) for layer in block.local] for block in blocks]
            seen = [[] for _ in blocks]                # what latents of each block will read
            for n in range(N):
                t = g * N + n
                last = tokens[:, t - 1:t] if t else tokens.new_zeros(B, 1)
                at = places[n:n + 1]
                x = self.start(last, labels, at)       # (B, 1, D)
                for i, block in enumerate(blocks):
                    x = block.local(x, caches=local[i], at=at)
                    seen[i].append(x)
                    if block.write is not None:
                        x = block.write(x, cache=write[i])
                if t >= K:
                    logits = self.scores(self.norm(x))[:, 0].float()        # (B, V)
                    uniform = torch.rand(B, generator=generator, device=given.device)
                    tokens[:, t] = sample_token(logits, uniform, **sampling)
            latents = None if starts is None else starts[:, g]              # (B, M, latent_dim)
            for i, block in enumerate(blocks):
                if block.read is not None:
                    latents = block.read(latents, torch.cat(seen[i], 1))
                    at = places[g * M:(g + 1) * M]
                    latents = block.process(latents, caches=process[i], at=at)
                if block.write is not None:
                    write[i] = Cache(block.write, latents)
        return tokens.view(B, groups, N)


def image_losses(forward, batch, c):
    """The cross entropy per token (B,), in nats, of the targets of a data.Batch, uint8 pixels."""
    tokens = image_tokens(batch.targets, c.model)
    labels = batch.cond["labels"] if c.model.num_classes else None
    return token_losses(forward(tokens, labels), tokens).flatten(1).mean(1)


def image_loss(forward, batch, c):
    """The weighted sum of the losses of a batch's images."""
    return (image_losses(forward, batch, c) * batch.weights).sum()


# --------------------------------------------------------------------------------------------------
# UNet

@dataclass(frozen=True)
class UNetConfig(VideoConfig):
    """Everything that fixes the shape of a UNet. The defaults are the reference's for CIFAR-10,
    without labels."""
    TASKS = "gen",
    cond_channels: int = 0              # channels of a map, as condition; 0: none
    context_dim: int = 0                # width of a sequence to attend to, as condition; 0: none
    self_cond: str = "none"             # estimate of the last call as input: none, x, eps or auto
    softmax_groups: int = 0             # predicts logits of so many groups of bits; 0: no logits
    unet_dim: int = 256                 # width, to be multiplied
    multipliers: tuple[int, ...] = (1, 1, 1)    # width of each resolution / unet_dim, finest first
    res_blocks: tuple[int, ...] = (3, 3, 3)     # residual blocks going down; going up one more
    kernel_sizes: tuple[int, ...] = (3,)    # side of their convolutions: one, or one per resolution
    attention_at: tuple[int, ...] = (16, 8)     # heights of the feature maps that have attention
    head_dim: int = 64                  # width of an attention head
    transformer_layers: int = 0         # transformer on the coarsest map: layers; 0: none
    transformer_dim: int = 256          # transformer: width
    transformer_stride: int = 1         # transformer: side of the patch that becomes a token
    transformer_position: str = "sin_cos"   # transformer: positions, sin_cos, learned or none
    in_stride: int = 1                  # the sample is shrunk by this, and the prediction enlarged
    in_kernel: int = 3                  # side of the first convolution
    out_kernel: int = 3                 # side of the last one; with softmax_groups it is 1
    time_scaling: float = 1000.0        # gamma is multiplied by this before it is coded
    unet_dropout: float = 0.0           # fraction of units left out in training


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


class PixelAttention(nn.Module):
    """Pixels of a map (B, dim, H, W) attend to a sequence (B, S, context_dim), if there is one,
    then to each other."""

    def __init__(self, dim, head_dim, context_dim=0):
        super().__init__()
        heads = dim // head_dim
        width = heads * head_dim
        if context_dim:
            self.cross_norm = nn.GroupNorm(32, dim)
            self.cross_att = Attention(dim, heads, context_dim, width)
        self.self_norm, self.self_att = nn.GroupNorm(32, dim), Attention(dim, heads, att_dim=width)

    def forward(self, x, context=None):
        if hasattr(self, "cross_att"):
            x = self.attend(x, self.cross_norm, self.cross_att, context)
        return self.attend(x, self.self_norm, self.self_att)

    def attend(self, x, norm, attention, context=None):
        y = norm(x).flatten(2).transpose(1, 2)          # (B, H * W, dim)
        y = attention(y, attention.project(y if context is None else context))
        return (x + y.transpose(1, 2).reshape(x.shape)) / math.sqrt(2)


class UNetStage(nn.Module):
    """Blocks of one resolution, on the way down or up; at the end the map is halved or doubled,
    unless it was the last resolution of that way."""

    def __init__(self, c, level, in_dim, skips, up=False):
        """in_dim: width of what it gets. skips: list of the widths of the maps in `forward`."""
        super().__init__()
        dim, height = c.multipliers[level] * c.unet_dim, c.sample_size[0] // c.in_stride >> level
        kernel = c.kernel_sizes[level % len(c.kernel_sizes)]    # there may be one for all
        self.up, self.blocks = up, nn.ModuleList()
        for _ in range(c.res_blocks[level] + up):
            if up:
                in_dim += skips.pop()
            self.blocks.append(ResBlock(in_dim, dim, 4 * c.unet_dim, kernel, c.unet_dropout))
            if not up:
                skips.append(dim)
            in_dim = dim
        self.attention = nn.ModuleList(
            PixelAttention(dim, c.head_dim, c.context_dim)
            for _ in self.blocks if height in c.attention_at)
        self.conv_dn = self.conv_up = None
        if up and level > 0:
            self.conv_up = SameConv2d(dim, dim, 3)
        if not up and level < len(c.res_blocks) - 1:
            self.conv_dn = SameConv2d(dim, dim, 3, 2)
            skips.append(dim)

    def forward(self, x, emb, context, skips):
        """skips: list of maps, which the way down adds to and the way up takes from."""
        for i, block in enumerate(self.blocks):
            if self.up:
                x = torch.cat([x, skips.pop()], 1)
            x = block(x, emb)
            if not self.up:
                skips.append(x)
            if self.attention:
                x = self.attention[i](x, context)
        if self.conv_dn is not None:
            x = self.conv_dn(x)                         # (B, dim, H / 2, W / 2)
            skips.append(x)
        if self.conv_up is not None:
            x = self.conv_up(F.interpolate(x, scale_factor=2.0))            # (B, dim, 2 H, 2 W)
        return x


def depth_to_space(x, side):
    """(B, side * side * C, H, W) -> (B, C, side * H, side * W), in TensorFlow's order."""
    x = x.unflatten(1, (side * side, -1)).transpose(1, 2)       # pixel_shuffle has C in front
    return F.pixel_shuffle(x.flatten(1, 2), side)


class MapTransformer(nn.Module):
    """Transformer over the patches of a map (B, in_dim, H, W), with the time as one more token."""

    def __init__(self, c, in_dim, height, width):
        super().__init__()
        dim, side = c.transformer_dim, c.transformer_stride
        self.norm_in = group_norm(in_dim, like=dim)
        self.conv_in = nn.Conv2d(in_dim, dim, side, side)
        self.position = nn.Identity()
        if c.transformer_position != "none":
            self.position = Position(c.transformer_position, height // side, width // side, dim)
        self.emb_proj = nn.Linear(4 * c.unet_dim, dim)
        self.layers = Layers(
            c.transformer_layers, dim, 4 * dim, dim // c.head_dim, c.context_dim,
            dropout=c.unet_dropout)
        self.norm_out, self.conv_out = group_norm(dim), nn.Conv2d(dim, dim, 1)

    def forward(self, x, emb, context):
        x = self.conv_in(self.norm_in(x))
        tokens = self.position(x.flatten(2).transpose(1, 2))                # (B, N, dim)
        tokens = torch.cat([tokens, self.emb_proj(emb)[:, None]], 1)        # (B, N + 1, dim)
        tokens = self.layers(tokens, context)[:, :-1]
        x = tokens.transpose(1, 2).reshape(x.shape)
        return depth_to_space(self.conv_out(self.norm_out(x)), self.conv_in.stride[0])


class UNet(nn.Module):
    """UNet for diffusion (2006.11239), as in Bit Diffusion and Pix2Seq-D. The frames of a video are
    channels to it, those of the context too (as in 2205.09853)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        levels = len(c.res_blocks)
        widths = [multiplier * c.unet_dim for multiplier in c.multipliers]
        stride = c.in_stride * 2 ** (levels - 1)                # of the coarsest map
        check_choice(c.self_cond, ("none", "x", "eps", "auto"), "self_cond")
        for side in c.sample_size:
            patch = stride * (c.transformer_stride if c.transformer_layers else 1)
            check_multiple(side, "sample_size", patch, "stride of the coarsest map")
        check_multiple(c.channels, "channels", c.softmax_groups or 1, "softmax_groups")
        if len(widths) != levels or len(c.kernel_sizes) not in (1, levels):
            raise ValueError(
                f"res_blocks {c.res_blocks}, multipliers {c.multipliers}, kernel_sizes "
                f"{c.kernel_sizes} differ in length")

        dim = widths[0]
        self.time_emb = ScalarEmbedding(4 * c.unet_dim, c.time_scaling, c.num_classes)
        frames = c.frames * (1 if c.self_cond == "none" else 2) + c.cond_frames
        inputs = c.channels * frames + c.cond_channels
        self.conv_in = SameConv2d(inputs, dim, c.in_kernel, c.in_stride)
        self.norm_in = group_norm(dim)
        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [dim]     # widths of skips
        for i, width in enumerate(widths):
            self.down.append(UNetStage(c, i, dim, skips))
            dim = width
        self.transformer = None
        if c.transformer_layers:
            rows, cols = (side // stride for side in c.sample_size)
            self.transformer = MapTransformer(c, dim, rows, cols)
            dim = c.transformer_dim // c.transformer_stride ** 2
        for i, width in reversed(list(enumerate(widths))):
            self.up.insert(0, UNetStage(c, i, dim, skips, up=True))
            dim = width
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
        check_inputs(
            c, x, labels, frames=(frames, c.cond_frames), map=(map, c.cond_channels),
            context=(context, c.context_dim))
        labels = one_hot_labels(labels, c.num_classes, x)       # (B, num_classes)
        emb = F.silu(self.time_emb(gamma, labels))              # (B, 4 * unet_dim)
        inputs = [x]
        if c.self_cond != "none":
            inputs.append(torch.zeros_like(x) if self_cond is None else self_cond)
        inputs += [part for part in (frames, map) if part is not None]
        inputs = [part.flatten(1, -3) for part in inputs]       # frames become channels
        x = self.norm_in(self.conv_in(torch.cat(inputs, 1)))
        skips = [x]
        for stage in self.down:
            x = stage(x, emb, context, skips)
        if self.transformer is not None:
            x = self.transformer(x, emb, context)
        for stage in reversed(self.up):                         # the first is the finest
            x = stage(x, emb, context, skips)
        x = depth_to_space(self.conv_out(F.silu(self.norm_out(x))), c.in_stride)
        return x.unflatten(1, (-1, *c.sample_shape[1:-2])), None


# --------------------------------------------------------------------------------------------------
# Panoptic: masks of images and videos (Pix2Seq-D, 2210.06366)

@dataclass(frozen=True)
class PanopticConfig(EncoderConfig, UNetConfig):
    """Everything that fixes the shape of a Panoptic. sample_size and channels are those of the
    analog bits of a panoptic map."""
    TASKS = "pan", "vps"
    encoder: str = "resnet"
    resnet_variant: str = "c4"
    channels: int = 16                  # 8 bits of class and 8 of instance
    softmax_groups: int = 2             # class and instance are predicted as one choice each
    unet_dim: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2)
    res_blocks: tuple[int, ...] = (1, 1, 1, 1)
    attention_at: tuple[int, ...] = ()
    transformer_layers: int = 6
    transformer_dim: int = 512
    in_kernel: int = 1
    out_kernel: int = 1
    past_frames: int = 0                # maps of earlier frames of a video, as condition
    fuse_dim: int = 256                 # width of the image's features, if none is as large as maps
    image_condition: str = "cat+attn"   # features beside the noisy map, tokens to attend to, both


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
    RENAMES = r"""
        ^encoder_fuse/upsample_blocks/  fuse/
        /gn([12])/                      /norm\1/
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        check_choice(c.image_condition, ("cat", "attn", "cat+attn"), "image_condition")
        check_choice(c.encoder, ("vit", "resnet"), "encoder")
        self.encoder = Encoder(c)
        # The feature maps from the coarsest on are merged until they are as large as the masks.
        masks, self.fuse = list(c.sample_size), nn.ModuleDict()
        *shapes, (width, *size) = (c.fuse_dim, *masks), *self.encoder.shapes
        for i, (finer, *larger) in reversed(list(enumerate(shapes))):
            fits = larger[0] <= masks[0] and larger[1] <= masks[1]
            if fits and (i or size != larger):
                self.fuse[str(i)] = UpsampleBlock(width, finer)
                width, size = finer, larger
        if size != masks or masks[0] * self.encoder.grid[1] != masks[1] * self.encoder.grid[0]:
            raise ValueError(
                f"sample_size {c.sample_size}: expected a multiple of {self.encoder.grid}, the "
                f"patches of an image of {c.image_size}")
        self.cond_dim = width
        self.denoiser = UNet(replace(
            c,
            cond_channels=width + c.past_frames * c.channels,
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
        tokens, maps = self.encoder(images, pyramid=True)
        x = maps[-1]
        finer = x.new_zeros(1, 1, *c.sample_size), *maps        # there is no map as large as masks
        for i, block in self.fuse.items():
            x = block(x, finer[int(i)])
        if "cat" not in c.image_condition:
            x = torch.zeros_like(x)
        return {
            "map": x if past is None else torch.cat([x, past], 1),
            "context": tokens if "attn" in c.image_condition else None,
        }

    def forward(self, x, gamma, self_cond=None, images=None, past=None, map=None, context=None):
        """A denoiser of diffusion.py, of the analog bits of maps x (B, channels, *sample_size).
        images and past: see `encode`; in their place, what it returned, map and context."""
        if images is not None:
            map, context = self.encode(images, past).values()
        return self.denoiser(x, gamma, self_cond, map=map, context=context)


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
        dec_layers=6,
        dec_dim=256,
        dec_mlp=1024,
        dec_heads=8,
    ),
    "resnet50_c4": Pix2SeqConfig(
        encoder="resnet",
        resnet_variant="c4",
        enc_layers=12,
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
    """The network that a configuration is of."""
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

    def __init__(self, name="auto", dtype="auto", compile="auto"):
        check_choice(dtype, ("auto", "float32", "bfloat16", "float16"), "dtype")
        check_choice(compile, ("auto", "on", "off"), "compile")
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
        if not available[self.type]:
            raise ValueError(f"device {name} is not available on this machine")
        self.device = torch.device(name)
        self.cuda = self.type == "cuda"
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.type == "xla":
            import torch_xla
            from torch_xla import runtime
            self.device = torch_xla.device()
            self.rank, self.world = runtime.global_ordinal(), runtime.world_size()
            if self.world > 1:
                dist.init_process_group("xla", init_method="xla://")
        self.first = self.rank == 0
        if self.cuda:
            index = os.environ.get("LOCAL_RANK", self.device.index or 0)
            self.device = torch.device("cuda", int(index))
            torch.cuda.set_device(self.device)
            self.name = torch.cuda.get_device_name()
        if "RANK" in os.environ:                        # torchrun started this process
            dist.init_process_group("nccl" if self.cuda else "gloo")
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
        self.pin = self.cuda                            # whether batches go through pinned memory
        self.asked = False                              # to stop
        self.meeting, self.interval, self.met = 0, 1, 0.0       # see `stopping`
        # tqdm's `disable`: bars are for the first process, None: if it has a terminal.
        self.quiet = None if self.first else True

    def place(self, model):
        """The model, on this device."""
        model.to(self.device)
        if self.dtype_by_size and count_parameters(model) > 2e7:    # ViT-B was seen to gain
            self.dtype = torch.bfloat16
        if self.cuda:
            model.to(memory_format=torch.channels_last)
            if self.world > 1:                          # torch shares statistics on GPUs only
                model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return model

    def wrap(self, model):
        """What is called in training, in place of the model."""
        self.compile(model)
        if self.world > 1:
            model = DistributedDataParallel(
                model, [self.device] if self.cuda else None, gradient_as_bucket_view=True)
        return model

    def host(self, model):
        """The model and the device that predict while training: for XLA the CPU, as decoding has
        many shapes and XLA compiles each."""
        if self.type != "xla":
            return model, self
        device = Device("cpu")
        device.first = self.first
        return copy.deepcopy(model).cpu(), device

    def compile(self, model):
        """Each layer by itself: those of a kind share their code, and DDP can sum the gradients of
        one while those of others are computed."""
        if not self.compiled:
            return
        torch._dynamo.config.cache_size_limit = 64      # graphs of a class: train, predict, sizes
        for part in model.modules():
            if isinstance(part, (Layer, ResNet, UNet)):
                part.compile()

    def autocast(self):
        """Context in which matrix products have this dtype."""
        return torch.autocast(self.type, self.dtype, enabled=self.dtype != torch.float32)

    def sync_only(self, forward, last):
        """Context in which gradients are summed over processes if this is the last part."""
        return contextlib.nullcontext() if last or self.world == 1 else forward.no_sync()

    def sum(self, values):
        """{name: 0-dim tensor} -> the same on this device, summed over processes, without waiting
        for the device."""
        total = torch.stack(list(values.values())).to(self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return dict(zip(values, total))

    def gather(self, items):
        """A list -> the lists of all processes."""
        if self.world == 1:
            return [items]
        lists = [None] * self.world
        dist.all_gather_object(lists, items)
        return lists

    def seed(self, number):
        """Begins the random numbers of a step."""
        torch.manual_seed(number)
        if self.type == "xla":
            sys.modules["torch_xla"].manual_seed(number)

    def step(self, optimizer):
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def sync(self):
        """XLA only notes what is to be computed, up to here."""
        if self.type == "xla":
            sys.modules["torch_xla"].sync()

    def catch_signals(self):
        """Ctrl-C and SIGTERM ask to stop."""
        def ask(number, frame):
            self.asked = True

        with contextlib.suppress(ValueError):           # a process of XLA's runs this in a thread
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
        said = self.sum({"asked": torch.tensor(float(self.asked)), "steps": torch.tensor(steps)})
        self.interval = max(int(said["steps"].item()), 1)
        self.meeting = step + self.interval
        return said["asked"].item() > 0

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

    @contextlib.contextmanager
    def fork_rng(self, seed):
        """Context with random numbers of its own."""
        with torch.random.fork_rng([self.device] if self.cuda else []):
            torch.manual_seed(seed)
            yield

    def compilations(self):
        """How many graphs were compiled up to now."""
        if self.type == "xla":
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
    finally:                                            # a failed save leaves nothing behind
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def load(path):
    """The content that `save` wrote, on the CPU. Only tensors and plain values are read: a file
    from a stranger can run no code. FileNotFoundError or ValueError naming the file."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as e:                              # torch raises many types for a damaged file
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise ValueError(f"{path}: damaged, truncated or no checkpoint ({reason})") from e
    if not isinstance(content, dict) or not {"network", "config", "model"} <= content.keys():
        raise ValueError(f"{path}: not a checkpoint of this code")
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path}: a checkpoint of another version of this code (format "
            f"{content.get('format', 1)}, expected {FORMAT}); it must be trained again")
    return content


def load_weights(model, weights, names=None):
    """Fills a model with {our name: tensor}. ValueError, and nothing is changed, if any is missing,
    left over or of another shape, naming each: as `names`, {our name: name to report}, has it."""
    names, ours = names or {}, model.state_dict()
    weights = dict(weights)
    wanted = {name for name in ours if not name.endswith("num_batches_tracked")}
    for name in [name for name in weights if name.endswith("unembed") and name not in ours]:
        twin = weights.get(name.replace("unembed", "embed"), weights[name][:0])
        if torch.equal(weights[name], twin):            # older checkpoints have a shared one twice
            del weights[name]
    problems = []
    for name in sorted(wanted | weights.keys()):
        theirs = names.get(name, name)
        if name not in weights:
            problems.append(f"missing: {name} (shape {tuple(ours[name].shape)})")
        elif name not in ours:
            problems.append(f"left over: {theirs}")
        elif weights[name].shape != ours[name].shape:
            problems.append(
                f"wrong shape: {theirs} gives {tuple(weights[name].shape)}, expected "
                f"{tuple(ours[name].shape)}")
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        shown = "\n  ".join(problems[:20])
        raise ValueError(f"these weights do not fit the model:\n  {shown}{more}")
    with torch.no_grad():
        for name, w in weights.items():
            ours[name].copy_(w)


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
    Returns the weights and a line about each that was changed. ValueError that names each, if not
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
            new, side = model.encoder.grid, math.isqrt(len(w))
            old = grid or (new if len(w) == len(ours) else (side, side))
            if math.prod(old) != len(w):
                raise ValueError(f"{name}: {len(w)} positions, whose grid is not {old}")
            if old != new:
                notes.append(f"{name}: grid of {old}, the model has {new}")
                image = w.T.reshape(1, -1, *old)        # (1, D, rows, columns)
                image = F.interpolate(image, new, mode="bicubic", antialias=True)
                w = image[0].flatten(1).T
        elif name in DECODER_TABLES and len(w) != len(ours):
            notes.append(f"{name}: {len(w)} rows, the model has {len(ours)}")
            w = torch.cat([w[:len(ours)].to(ours), ours[len(w):]])
        weights[name] = w
    if notes and not adapt:
        shown = "\n  ".join(notes)
        raise ValueError(f"these weights are of another size; --adapt would fit them:\n  {shown}")
    return weights, notes


DECODER_TABLES = {"decoder.position.code", "decoder.embed", "decoder.unembed", "decoder.bias"}


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
/_(q|k|v)\w+_dense/                                             /\1/
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
/[bg]n/                                                         /norm/
/moving_mean$                                                   /running_mean
/moving_variance$                                               /running_var
/(kernel|depthwise_kernel|gamma)$                               /weight
/beta$                                                          /bias
"""


def from_reference(weights, renames=""):
    """Weights under the reference's names and in its layouts -> {our name: float32 tensor} and
    {our name: their name}. renames: a network's own, after those of all."""
    renamed, names = {}, {}
    rows = re.findall(r"^ *([^#\s]\S*) *(.*)", RENAMES + renames, re.M)
    for theirs, value in weights.items():
        name = theirs
        for pattern, new in rows:
            name = re.sub(pattern, new, name)
        w = torch.tensor(value, dtype=torch.float32)
        if re.search(r"_att/[qkv]/", name):             # (D x) heads x hs
            w = w.flatten(-2)
        elif name.endswith("_att/out/weight"):          # heads x hs x D
            w = w.flatten(0, 1)
        elif re.search(r"(^|/)stem/kernel$", theirs):   # (frames x) rows x cols x in x out
            w = w.flatten(0, -2)
        elif theirs.endswith("/depthwise_kernel"):      # kh x kw x channels x 1
            w = w.transpose(2, 3)
        if re.search("/(depthwise_)?kernel$", theirs):  # in x out, or kh x kw x in x out
            w = w.permute(3, 2, 0, 1) if w.dim() == 4 else w.T
        name = name.replace("/", ".")
        renamed[name], names[name] = w.contiguous(), theirs
    for k in [name for name in renamed if "_att.k." in name]:
        v, kv = k.replace(".k.", ".v."), k.replace(".k.", ".kv.")
        if v in renamed:                                # we project keys and values at once
            renamed[kv] = torch.cat([renamed.pop(k), renamed.pop(v)])
            names[kv] = f"{names.pop(k)} + {names.pop(v)}"
    return renamed, names


def load_reference_weights(model, weights):
    """`load_weights` for weights of the reference, {name: array}, named as in its checkpoints
    without `/.ATTRIBUTES/VARIABLE_VALUE`, in its layouts."""
    load_weights(model, *from_reference(weights, getattr(model, "RENAMES", "")))


def read_reference_checkpoint(path):
    """A TensorFlow checkpoint -> {name: array} of its model.

    path: its folder (the file `checkpoint` there tells which), or DIR/ckpt-N of its files
          DIR/ckpt-N.index and DIR/ckpt-N.data-00000-of-00001
    Needs TensorFlow. FileNotFoundError or ValueError naming the file.
    """
    try:
        import tensorflow as tf
    except ImportError as e:
        raise ImportError(
            "reading a TensorFlow checkpoint needs TensorFlow, once: pip install tensorflow-cpu"
        ) from e
    prefix = re.sub(r"\.(index|data-\d+-of-\d+)$", "", path)
    if os.path.isdir(path):
        listing = f"{path}/checkpoint"
        with open(listing) as f:
            latest = re.search(r'^model_checkpoint_path: "(.+)"', f.read(), re.M)
        if not latest:
            raise ValueError(f"{listing}: names no checkpoint")
        prefix = f"{path}/{os.path.basename(latest[1])}"            # it may be from elsewhere
    shards = glob.glob(glob.escape(prefix) + ".data-*-of-*")
    count = int(shards[0].rpartition("-")[2]) if shards else 1
    parts = [f"data-{i:05}-of-{count:05}" for i in range(count)]
    for part in ["index", *parts]:
        if not os.path.exists(f"{prefix}.{part}"):
            raise FileNotFoundError(f"{prefix}.{part}: no such file")
    weights = {}
    try:
        reader = tf.train.load_checkpoint(prefix)
        for key in sorted(reader.get_variable_to_shape_map()):
            name, _, kind = key.partition("/.")         # optimizer slots have another kind
            if name.startswith("model/") and kind == "ATTRIBUTES/VARIABLE_VALUE":
                weights[name] = reader.get_tensor(key)
    except Exception as e:                              # TensorFlow raises many types
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        raise ValueError(f"{prefix}: damaged or truncated ({reason})") from e
    if not weights:
        raise ValueError(f"{prefix}: no weights under model/, so not a checkpoint of the reference")
    return weights


def convert(path, c, categories=()):
    """A TensorFlow checkpoint of the network that `c` describes -> the content of one of ours (see
    `save`), of averaged weights if it has them.

    categories: annotation files in COCO's format that name the classes and their keypoints; without
                any, they are named by number, as far as COCO's 90 (panoptic: 133)
    ValueError and FileNotFoundError, as what it calls.
    """
    weights, model = read_reference_checkpoint(path), build(c.model)
    names = sorted(weights, key=lambda name: "_ema/" in name)           # averaged ones win
    weights = {name.replace("_ema/", "/"): weights[name] for name in names}
    counted = isinstance(c.model, PanopticConfig)       # whose labels count the categories
    if not counted:                                     # its denoiser is not all of it
        part = "/denoiser/"
        of_part = {name.replace(part, "/"): w for name, w in weights.items() if part in name}
        weights = of_part or weights
    load_reference_weights(model, weights)
    if isinstance(c.model, Pix2SeqConfig):
        labels = range(1, c.vocab.max_label + 1)
        default = labels[:90]
    elif counted:
        labels, default = range(1 << 24), range(1, 134)
    else:
        labels = default = range(c.model.num_classes)
    known, kept = {}, ("name", "keypoints", "skeleton", "isthing")
    for file in categories:
        with open(file, encoding="utf-8") as f:
            rows = json.load(f)["categories"]
        for row in rows:
            if row["id"] not in labels:
                raise ValueError(f"{file}: category {row['id']} is not of {labels}")
            known.setdefault(row["id"], {}).update({k: row[k] for k in kept if k in row})
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    try:
        check_choice(preset, PRESETS, "preset")
        c = PRESETS[preset].config
        c = replace(c, vocab=replace(c.vocab, pieces=args.pieces))
        save(target, convert(source, c, args.categories))
    except (ImportError, OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    print(f"written to {target}; next: python sample.py photo.jpg --ckpt={target}")


if __name__ == "__main__":
    import model  # train.py imports this file by that name: one set of classes

    model.main()
