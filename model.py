"""The networks: an image encoder and an autoregressive decoder that writes token sequences about the image.

Papers: Pix2Seq (arXiv 2109.10852), its multi-task form (2206.07669), ViT (2010.11929).
Images are (B, 3, H, W) float in [0, 1]; a decoder reads and writes (B, T) or, with G sequences about each image,
(B, G, T) integer tokens. One attention, one MLP and one layer serve every network in this file.
Left out: the training (train.py), and what the tokens mean (tokenizer.py).

    python model.py                                     # named sizes: parameters and FLOPs
    python -c "import model; print(model.Pix2Seq(model.SIZES['vit_b']))"
"""
import math
import re
from dataclasses import dataclass, replace
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


class Position(nn.Module):
    """Adds a position code to (B, N, D) tokens. kind: learned (a parameter) or sin_cos (a constant)."""

    def __init__(self, kind, rows, cols, dim, maximum=2 * math.pi):
        super().__init__()
        if kind == "learned":
            self.code = nn.Parameter(torch.empty(rows * cols, dim))
            nn.init.trunc_normal_(self.code, std=0.02)
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


# ---------------------------------------------------------------------------------------------------------------
# Pix2Seq: encoder, projection, decoder

@dataclass(frozen=True)
class Pix2SeqConfig:
    """Everything that fixes the shape of a Pix2Seq model."""
    image_size: tuple[int, int] = (640, 640)   # height and width of the padded image, in pixels
    encoder: str = "vit"                       # image encoder: vit
    patch_size: int = 16                       # side of a ViT patch, in pixels
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
    "vit_b": Pix2SeqConfig(),
    "vit_l": Pix2SeqConfig(enc_layers=24, enc_dim=1024, enc_mlp=4096, enc_heads=16, dec_layers=8),
}


class ViT(nn.Module):
    """Images (B, 3, H, W) -> (B, N, enc_dim), N patches row by row, the class token before them if there is one."""

    def __init__(self, c):
        super().__init__()
        if any(side % c.patch_size for side in c.image_size):
            raise ValueError(f"image_size {c.image_size} is not a multiple of patch_size {c.patch_size}")
        self.grid = (c.image_size[0] // c.patch_size, c.image_size[1] // c.patch_size)
        self.checkpointing = c.checkpointing
        self.patch = nn.Conv2d(3, c.enc_dim, c.patch_size, c.patch_size)
        self.patch_norm = layer_norm(c.enc_dim)
        self.position = Position(c.pos_encoding, *self.grid, c.enc_dim)
        self.cls = nn.Parameter(torch.empty(1, c.enc_dim)) if c.cls_token else None
        if c.cls_token:
            nn.init.trunc_normal_(self.cls, std=0.02)
        self.layers = nn.ModuleList(Layer(c.enc_dim, c.enc_mlp, c.enc_heads, drop_path=c.drop_path, dropout=c.dropout,
                                          att_dropout=c.att_dropout) for _ in range(c.enc_layers))
        self.norm = layer_norm(c.enc_dim)

    def forward(self, images):
        x = self.patch(images).flatten(2).transpose(1, 2)                      # (B, N, D)
        x = self.position(self.patch_norm(x))
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)
        return self.norm(run_layers(self.layers, x, checkpointing=self.checkpointing and self.training))


class Decoder(nn.Module):
    """Tokens (S, T) and encoded images (B, N, dec_dim) -> logits (S, T, vocab_size) of each next token."""

    def __init__(self, c):
        super().__init__()
        self.checkpointing = c.checkpointing
        self.embed = nn.Parameter(torch.empty(c.vocab_size, c.dec_dim))
        self.unembed = self.embed if c.shared_embedding else nn.Parameter(torch.empty(c.vocab_size, c.dec_dim))
        self.bias = nn.Parameter(torch.empty(c.vocab_size)) if c.output_bias else None
        for table in (self.embed, self.unembed, self.bias):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
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
        if c.encoder not in ENCODERS:
            raise ValueError(f"unknown encoder {c.encoder!r}, expected one of {', '.join(ENCODERS)}")
        self.encoder = ENCODERS[c.encoder](c)
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

    def encode(self, images):
        """(B, 3, H, W) float in [0, 1] -> (B, N, dec_dim), what the decoder looks at."""
        x = self.proj_norm(self.proj(self.encoder(images)))
        if self.config.projection != "linear":
            cls, patches = x.split([x.shape[1] - math.prod(self.encoder.grid), math.prod(self.encoder.grid)], 1)
            x = torch.cat([cls, self.proj_position(patches)], 1)
        return self.proj_mlp(x) if self.config.projection == "mlp" else x

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


ENCODERS = {"vit": ViT}


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
        loss = (1 - torch.exp(-loss)) ** gamma * loss
    return loss.view(targets.shape)


# ---------------------------------------------------------------------------------------------------------------
# weights of the reference

RENAMES = [                                    # applied in order to a name of the reference's checkpoint
    (r"^model/", ""),
    (r"transformer_encoder/enc_layers|(?<=decoder/)decoder/dec_layers", "layers"),
    (r"/mha_ln/", "/self_norm/"), (r"/mha/", "/self_att/"), (r"_(self|cross)_mha/", r"_\1_att/"),
    (r"/(self|cross)_ln/", r"/\1_norm/"), (r"/(self|cross)_mha/", r"/\1_att/"),
    (r"/_(query|key|value|output)_dense/", lambda m: f"/{dict(query='q', key='k', value='v', output='out')[m[1]]}/"),
    (r"mlp/mlp_layers/0/dense([12])/", r"mlp/fc\1/"), (r"mlp/layernorms/0/", "mlp/norm/"),
    (r"/stem_conv/", "/patch/"), (r"/stem_ln/", "/patch_norm/"), (r"/output_ln/", "/norm/"), (r"^proj_ln/", "proj_norm/"),
    (r"^encoder/(vit|rest)\.Svis_pos_embedding", "encoder/position/code"), (r"^proj\.Svis_pos_embedding", "proj_position/code"),
    (r"^encoder/(vit|rest)\.Scls_token_embedding", "encoder/cls"),
    (r"ar_decoder\.Sseq_pos_embedding", "position/code"), (r"ar_decoder\.S(inp_)?token_embedding", "embed"),
    (r"ar_decoder\.Soutp_token_embedding", "unembed"), (r"ar_decoder\.Soutp_bias", "bias"),
    (r"/(kernel|gamma)$", "/weight"), (r"/beta$", "/bias"),
]


def from_reference(weights):
    """Weights under the reference's names and in its layouts -> ours: {our name: (float32 tensor, their names)}."""
    renamed = {}
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
        renamed[name.replace("/", ".")] = (w.contiguous(), theirs)
    for name in [n for n in renamed if re.search(r"_att\.k\.", n)]:            # we project keys and values at once
        if name.replace(".k.", ".v.") in renamed:
            (k, k_name), (v, v_name) = renamed.pop(name), renamed.pop(name.replace(".k.", ".v."))
            renamed[name.replace(".k.", ".kv.")] = (torch.cat([k, v]), f"{k_name} + {v_name}")
    return renamed


def load_reference_weights(model, weights):
    """Fill `model` with the weights of the reference's TensorFlow implementation.

    weights: {name: array}, named as in a released checkpoint without `/.ATTRIBUTES/VARIABLE_VALUE`, in its layouts.
    Raises ValueError, and changes nothing, if any is missing, left over or of another shape, naming each.
    """
    ours, theirs = dict(model.named_parameters()) | dict(model.named_buffers()), from_reference(weights)
    wanted = set(model.state_dict()) - {"decoder.unembed"} if model.config.shared_embedding else set(model.state_dict())
    problems = [f"missing: {name} (shape {tuple(ours[name].shape)})" for name in sorted(wanted - set(theirs))]
    problems += [f"left over: {theirs[name][1]}" for name in sorted(set(theirs) - wanted)]
    problems += [f"wrong shape: {theirs[name][1]} gives {tuple(theirs[name][0].shape)}, expected {tuple(ours[name].shape)}"
                 for name in sorted(wanted & set(theirs)) if theirs[name][0].shape != ours[name].shape]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError("these weights do not fit the model:\n  " + "\n  ".join(problems[:20]) + more)
    with torch.no_grad():
        for name in wanted:
            ours[name].copy_(theirs[name][0])


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


if __name__ == "__main__":
    print_sizes()
