"""Vision labels as sequences of integer tokens, and back.

A box, a class, a polygon or a caption becomes a row of integers of one shared vocabulary, so that
one network with one loss learns all of them (Pix2Seq, arXiv 2109.10852, section 2.1; a unified
sequence interface, 2206.07669, section 2). Every function works on whole batches; coordinates are
(y, x) fractions of the padded image.

    >>> vocab = Vocab()                                    # 1000 bins, room for 899 classes
    >>> boxes, labels = torch.tensor([[[0.1, 0.2, 0.5, 0.6]]]), torch.tensor([[18]])
    >>> encode_detection(boxes, labels, vocab).targets     # y_min x_min y_max x_max class
    tensor([[1100, 1200, 1500, 1599,  118]])

Below stands what all files share: one exception, and types of options that say what is allowed.
Left out: the order of objects and the noise boxes, which are augmentation (data.py).

    python -m doctest tokenizer.py        # checks the example above
    python -m pytest tests/test_tokenizer.py
"""
import math
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from importlib import import_module
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# the vocabulary

PAD = 0                                                # also ends a detection or polygon sequence
PROMPT_DET, PROMPT_SEG, PROMPT_KPT, PROMPT_CAP = 10, 11, 12, 13
FAKE = 30                                              # class of a noise box; dropped caption token
SEPARATOR, INVISIBLE = 40, 41                          # between two polygons; of a hidden keypoint
CLASS_SHIFT = 100                                      # category id 1 is token 101

PAD_LABEL, FAKE_LABEL = 0, FAKE - CLASS_SHIFT          # labels of a missing box, of a noise box
PAD_POINT, SEPARATOR_POINT, INVISIBLE_POINT = -1.0, -2.0, -3.0     # in both coordinates of a point
POINT_TOKENS = {PAD_POINT: PAD, SEPARATOR_POINT: SEPARATOR, INVISIBLE_POINT: INVISIBLE}


@dataclass(frozen=True)
class Vocab:
    """Where the token ranges lie: special tokens [0, 100), classes [100, coord_shift), coordinates
    [coord_shift, coord_shift + bins), text [text_shift, text_end). UserError if ranges overlap."""
    bins: int = 1000                    # coordinate values along a side of the image
    coord_shift: int = 1000             # first coordinate token; leaves coord_shift - 101 labels
    text_shift: int = 3000              # first text token
    pieces: str = ""                    # SentencePiece model file for captions; empty: bytes

    def __post_init__(self):
        require(self.bins >= 2, f"bins is {self.bins}, expected at least 2")
        require(
            self.coord_shift > CLASS_SHIFT + 1,
            f"coord_shift is {self.coord_shift}, which leaves no class token: expected at "
            f"least {CLASS_SHIFT + 2}")
        end = self.coord_shift + self.bins
        require(
            end <= self.text_shift,
            f"coord_shift + bins: coordinates end at {end}, above text_shift, which is "
            f"{self.text_shift}")

    @property
    def classes(self):
        """slice of the class tokens; position i of it is label i."""
        return slice(CLASS_SHIFT, self.coord_shift)

    @property
    def max_label(self):
        """The largest category label that has a token."""
        return self.coord_shift - CLASS_SHIFT - 1

    @cached_property
    def text(self):
        """What turns text into pieces; piece i is token text_shift + i."""
        return SentencePieces(self.pieces) if self.pieces else BytePieces()

    @property
    def text_end(self):
        return self.text_shift + self.text.size


class Tokens(NamedTuple):
    """What a decoder trains on; all of shape (..., T)."""
    inputs: torch.Tensor                               # int64, starts with the prompt
    targets: torch.Tensor                              # int64, inputs moved by one, uncorrupted
    weights: torch.Tensor                              # float32, loss weight of each target


def quantize(coords, vocab):
    """Fractions (any shape, float) -> coordinate tokens, int64; values outside [0, 1] go to the
    nearest end."""
    last = vocab.bins - 1
    return (coords * last).round().long().clamp(0, last) + vocab.coord_shift


def dequantize(tokens, vocab):
    """Coordinate tokens -> float32 fractions, at most half a bin from what was quantized."""
    return (tokens - vocab.coord_shift).float() / (vocab.bins - 1)


def with_prompt(prompt, sequence):
    """(..., T) -> (..., T) input: the prompt token, then the sequence without its last token."""
    return F.pad(sequence[..., :-1], (1, 0), value=prompt)


# --------------------------------------------------------------------------------------------------
# object detection (2109.10852, sections 2.1 and 2.4)

def encode_detection(boxes_yxyx, labels, vocab, corrupt=None, noise_weight=1.0, pad_weight=0.1):
    """Objects -> a training sequence: y_min x_min y_max x_max class per object, in the given order.

    boxes_yxyx:   (..., N, 4) float fractions
    labels:       (..., N) int64; PAD_LABEL where there is no box (those come last), FAKE_LABEL for
                  noise boxes
    corrupt:      (..., N, 2) float in [0, 1) or None: random numbers that replace each input class
                  token by FAKE (half the time) or by a random class, so that the input never leaks
                  the truth; None keeps them
    noise_weight: loss weight of the class of a noise box; its coordinates weigh 0
    pad_weight:   loss weight of padding, that is of ending the sequence
    Returns Tokens with T = 5 N. UserError names labels that have no token.
    """
    pad, fake = labels == PAD_LABEL, labels == FAKE_LABEL
    wrong = (labels < 0) & ~fake | (labels > vocab.max_label)
    if wrong.any():
        names = labels[wrong].unique().tolist()
        raise UserError(f"labels {names} have no token: expected 1..{vocab.max_label}")
    coords = quantize(boxes_yxyx, vocab)
    classes = labels + CLASS_SHIFT                                             # FAKE_LABEL -> FAKE
    input_classes = classes
    if corrupt is not None:
        room = vocab.coord_shift - CLASS_SHIFT
        random_classes = CLASS_SHIFT + (corrupt[..., 1] * room).long()
        input_classes = torch.where(corrupt[..., 0] < 0.5, FAKE, random_classes)

    def serialize(coords, classes, empty):
        objects = torch.cat([coords, classes[..., None]], -1)                  # (..., N, 5)
        return torch.where(pad[..., None], empty, objects).flatten(-2)         # (..., 5 N)

    targets = serialize(coords, classes, PAD)
    inputs = with_prompt(PROMPT_DET, serialize(coords, input_classes, PAD))
    coord_weights = (~fake).float()[..., None].expand_as(boxes_yxyx)
    class_weights = torch.where(fake, noise_weight, 1.0)
    return Tokens(inputs, targets, serialize(coord_weights, class_weights, pad_weight))


def decode_detection(tokens, class_logprobs, vocab):
    """Written tokens -> objects. A tail shorter than an object is dropped.

    tokens:         (B, T) int64, without the prompt
    class_logprobs: (B, T, C) float: log-softmax over the *whole* vocabulary, of which only
                    `vocab.classes` is given, so that mass on FAKE lowers the score
    Returns labels (B, N) int64, boxes_yxyx (B, N, 4) float in [0, 1] and scores (B, N), N = T // 5.
    The class is the likeliest one at the fifth token, whatever was sampled there. From the first
    PAD in a coordinate on, scores are 0: the sequence has ended (the reference goes on; its
    training sequences never end).
    """
    N = tokens.shape[1] // 5
    coords = tokens[:, :5 * N].unflatten(1, (N, 5))[..., :4]                   # (B, N, 4)
    boxes = dequantize(coords, vocab).clamp(0, 1)
    logprobs, labels = class_logprobs[:, 4::5].max(-1)                         # (B, N) each
    ended = (coords == PAD).any(-1).cumsum(-1) > 0
    return labels, boxes, logprobs.exp().masked_fill(ended, 0.0)


# --------------------------------------------------------------------------------------------------
# instances: a box in the prompt, points in the target (2206.07669, sections 2.2 and 2.3)

def instance_prompt(prompt, boxes_yxyx, labels, vocab):
    """(..., N, 4) fractions and (..., N) labels -> (..., N, 6) int64: prompt, box, class; PAD where
    there is no box."""
    labels = labels[..., None]
    task = torch.full_like(labels, prompt)
    coords = quantize(boxes_yxyx, vocab)
    tokens = torch.cat([task, coords, labels + CLASS_SHIFT], -1)
    return torch.where(labels == PAD_LABEL, PAD, tokens)


def encode_points(points, labels, vocab):
    """(..., N, P) flat y x fractions, with the *_POINT marks -> (..., N, P) int64 tokens; PAD where
    label is PAD_LABEL."""
    tokens = quantize(points, vocab)
    for mark, token in POINT_TOKENS.items():
        tokens = torch.where(points == mark, token, tokens)
    return torch.where(labels[..., None] == PAD_LABEL, PAD, tokens)


def encode_instances(
        prompt, boxes_yxyx, labels, points, vocab, mask=None, invisible_weight=1.0,
        pad_weight=1.0):
    """Objects and their points -> a training sequence per object: prompted by its box.

    prompt:     PROMPT_SEG or PROMPT_KPT
    boxes_yxyx, labels: as in `instance_prompt`;   points: (..., N, P) as in `encode_points`
    mask:       (..., N, P) bool or None: points that the input hides behind INVISIBLE, so that the
                model must look at the image and not only at the points before
    invisible_weight, pad_weight: loss weights of a target that is INVISIBLE, and of padding
    Returns Tokens of shape (..., N, 5 + P); the prompt weighs nothing.
    """
    prompts = instance_prompt(prompt, boxes_yxyx, labels, vocab)               # (..., N, 6)
    points = encode_points(points, labels, vocab)
    shown = points if mask is None else torch.where(mask, INVISIBLE, points)
    inputs = torch.cat([prompts, shown], -1)[..., :-1]
    targets = torch.cat([prompts[..., 1:], points], -1)
    weights = torch.where(targets == INVISIBLE, invisible_weight, 1.0)
    weights[..., :5] = 0.0
    return Tokens(inputs, targets, weights.masked_fill(targets == PAD, pad_weight))


def decode_points(tokens, vocab):
    """Inverse of `encode_points`: (..., P) int64 -> (..., P) float32 fractions with the marks."""
    points = dequantize(tokens, vocab)
    for mark, token in POINT_TOKENS.items():
        points = torch.where(tokens == token, mark, points)
    return points


# ==== reference ===================================================================================
# captions (2206.07669, section 2): text in pieces

END_PIECE = 1                          # as in T5 (1910.10683); piece 0 is padding there, and unused


def encode_captions(
        captions, vocab, length, drop=None, drop_rate=0.5, end_weight=0.1, pad_weight=1.0):
    """N captions -> training sequences of `length` tokens: pieces, the end piece, padding.

    captions:   list of N str; one longer than `length` is cut and then has no end piece, so that
                nothing teaches the model to stop there (the reference fails on it)
    drop:       (N, length) float in [0, 1) or None: where it is below `drop_rate`, the input token
                becomes FAKE, the prompt and padding included, so that the model must look at the
                image and not only at the last words
    end_weight, pad_weight: loss weights; padding weighs as much as text, unlike in detection
    Returns Tokens with shape (N, length).
    """
    targets = torch.full((len(captions), length), PAD)
    for row, caption in zip(targets, captions):
        ids = vocab.text.encode(caption)[:length]
        row[:len(ids)] = torch.tensor(ids) + vocab.text_shift
    inputs = with_prompt(PROMPT_CAP, targets)
    if drop is not None:
        inputs = torch.where(drop < drop_rate, FAKE, inputs)
    weights = torch.where(targets == vocab.text_shift + END_PIECE, end_weight, 1.0)
    return Tokens(inputs, targets, weights.masked_fill(targets == PAD, pad_weight))


def decode_captions(tokens, vocab):
    """Written tokens (N, T) int64, without the prompt -> N str. Reading stops at the end piece or
    padding (the reference reads on); tokens that are no text are skipped."""
    ids = torch.where(tokens == PAD, PAD, tokens - vocab.text_shift)
    return [vocab.text.decode(row) for row in ids.tolist()]


# --------------------------------------------------------------------------------------------------
# what is made of written points

def split_polygons(points):
    """(P,) float as of `decode_points` -> list of (K, 2) arrays: what stands before the first
    padding, cut at every point of which a coordinate is the separator. A lone coordinate at the end
    is dropped."""
    points = points[:len(points) // 2 * 2].reshape(-1, 2)
    padding = (points == PAD_POINT).any(-1)
    points = points[padding.cumsum(0) == 0]
    cut = (points == SEPARATOR_POINT).any(-1)
    group = cut.cumsum(0)[~cut]
    return [points[~cut][group == g].numpy() for g in group.unique()]


def point_score(box_scores, tokens, token_probs, points_weight=1.0):
    """Mean probability of the sampled tokens (B, T), padding left out, mixed with the score of the
    box (B,)."""
    written = (tokens != PAD).float()
    points_score = (token_probs * written).sum(-1) / written.sum(-1).clamp_min(1)
    return points_weight * points_score + (1 - points_weight) * box_scores


# --------------------------------------------------------------------------------------------------
# what a token says

SPECIAL = {
    PAD: "end",
    PROMPT_DET: "boxes?",
    PROMPT_SEG: "mask?",
    PROMPT_KPT: "keypoints?",
    PROMPT_CAP: "caption?",
    FAKE: "noise",
    SEPARATOR: "next polygon",
    INVISIBLE: "invisible",
}


def meaning(token, vocab, names):
    """A token -> its kind, special, class, coordinate or text, and what it says. names: {label:
    name}"""
    if token >= vocab.text_shift:
        piece = token - vocab.text_shift
        return "text", "end" if piece == END_PIECE else vocab.text.decode([piece])
    if token >= vocab.coord_shift:
        return "coordinate", f"{(token - vocab.coord_shift) / (vocab.bins - 1):.3f}"
    if token >= CLASS_SHIFT:
        label = token - CLASS_SHIFT
        return "class", names.get(label, str(label))
    return "special", SPECIAL.get(token, "unused")


# --------------------------------------------------------------------------------------------------
# pieces of text

def real_pieces(ids, size):
    """The ids before the end piece or padding, without those that name no piece."""
    pieces = []
    for i in ids:
        if i in (PAD, END_PIECE):
            break
        if END_PIECE < i < size:
            pieces.append(i)
    return pieces


class BytePieces:
    """Text as UTF-8 bytes, byte b being piece b + 2. Nothing to train or download; a COCO caption
    takes 54 on average."""
    size = 2 + 256

    def encode(self, text):
        """str -> list of piece ids, the end piece last. Half a surrogate pair, which has no UTF-8,
        becomes "?"."""
        return [2 + byte for byte in text.encode("utf-8", "replace")] + [END_PIECE]

    def decode(self, ids):
        """Piece ids -> str, up to the end piece or padding; what is no UTF-8 becomes U+FFFD."""
        text = bytes(i - 2 for i in real_pieces(ids, self.size))
        return text.decode("utf-8", "replace")


class SentencePieces:
    """The pieces of a SentencePiece model (1808.06226). The released multi-task checkpoints use
    c4_en_32k_spm.model, which fills their 32,000 text tokens. Needs the optional package
    sentencepiece; UserError names a file of no use."""

    def __init__(self, path):
        package = optional("sentencepiece", "sentencepiece", path)
        with open(path, "rb") as f:
            proto = f.read()
        try:
            self.model = package.SentencePieceProcessor()
            self.model.LoadFromSerializedProto(proto)
        except RuntimeError as e:
            raise UserError(f"{path} is no SentencePiece model, or a broken one: {e}") from None
        self.size = self.model.vocab_size()
        require(
            self.model.eos_id() == END_PIECE,
            f"{path} has end piece {self.model.eos_id()}, expected {END_PIECE}: train it with "
            "--pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1")

    def encode(self, text):
        text = text.encode("utf-8", "replace").decode()
        return self.model.encode(text) + [END_PIECE]

    def decode(self, ids):
        return self.model.decode(real_pieces(ids, self.size))


# --------------------------------------------------------------------------------------------------
# what all files share: one exception, notices, and types of options that say what is allowed

frozen = dataclass(frozen=True)                        # options, which are replaced, not changed


class UserError(ValueError):
    """What the user can mend. The message names the file or option, the place in it, the value, and
    what was expected."""


def require(condition, message):
    """UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def optional(module, package, what):
    """A module that not everybody needs; ImportError says what needs which package."""
    try:
        return import_module(module)
    except ImportError as e:
        raise ImportError(f"{what} needs the package {package}: pip install {package}") from e


@cache
def notice(text):
    """A line on standard error about what was mended or left out, once, of the first process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def script(main):
    """A script's main that ends with one line about what the user can mend, exit code 1, and
    quietly if it is interrupted or nobody reads on. So it ends where memory is short, too."""
    @wraps(main)
    def run():
        try:
            try:
                main()
            finally:
                sys.stdout.flush()
        except BrokenPipeError:                        # as of `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(130)
        except (UserError, OSError, ImportError) as e:
            # From a process that loads data it comes with a traceback.
            sys.exit("error: " + str(e).rpartition("UserError: ")[2].rstrip())
        except (RuntimeError, MemoryError) as e:
            if not re.search("DataLoader worker|alloc|overflow", str(e)):
                raise
            sys.exit(f"error: {str(e).splitlines()[0]}: a process that loads data died, or memory "
                     f"is short: --workers=0, a smaller --batch_size or network may help")

    return run


def between(low, high=math.inf, kind=int):
    """The type of a finite number from `low` to `high`."""
    text = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
    return Annotated[kind, text, lambda x: low <= x <= high]


Natural, Count, Fraction = between(0), between(1), between(0, 1, float)
Seed = between(0, 1 << 27)                             # that of a step must be a number of 64 bits
NotNegative = between(0, kind=float)
Positive = Annotated[float, "above 0", lambda x: x > 0]
Rate = between(0, 0.999999, float)                     # of what may not be all
Pattern = Annotated[str, "that is a regular expression", re.compile]


def expected(kind):
    """What values a type has, in words."""
    args = get_args(kind)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) or "nothing" for choice in args)
    if get_origin(kind) is Annotated:
        return f"{expected(args[0])} {args[1]}"
    if args:
        return f"{expected(args[0])}, several between commas"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def parsed(text, kind):
    """A text as a value of a type. ValueError, or re.error, if it is none."""
    args = get_args(kind)
    if get_origin(kind) is Literal:
        return args[list(map(str, args)).index(text)]
    if get_origin(kind) is Annotated:
        base, _, test = args
        value = parsed(text, base)
        if test(value):
            return value
    elif args:
        values = tuple(parsed(part, args[0]) for part in text.split(",") if text)
        if len(values) == 1 and ... not in args:                   # 640 stands for 640,640
            values *= len(args)
        if ... in args or len(values) == len(args):
            return values
    elif kind is bool:
        return "false 0 true 1".split().index(text.lower()) > 1
    elif kind is not float or math.isfinite(float(text)):
        return kind(text)
    raise ValueError(text)


def fits(value, kind):
    """Whether a value is of a type: whether its text is read as that value."""
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    with suppress(ValueError, re.error):
        return parsed(text, kind) == value


def check_choice(value, choices, what):
    require(value in choices, f"unknown {what} {value!r}, expected one of {', '.join(choices)}")


def check_fields(*configs):
    """UserError if the value of a field is not of its type."""
    for config in configs:
        for name, kind in get_type_hints(type(config), include_extras=True).items():
            value = getattr(config, name)
            require(fits(value, kind), f"{name} is {value!r}, expected {expected(kind)}")
