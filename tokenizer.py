"""Vision labels as sequences of integer tokens, and back.

A box, a class, a polygon or a caption becomes a row of integers of one shared vocabulary, so that one network with
one loss learns all of them (Pix2Seq, arXiv 2109.10852, section 2.1; a unified sequence interface, 2206.07669,
section 2). Every function works on whole batches; coordinates are (y, x) fractions of the padded image.

    >>> vocab = Vocab()                                    # 1000 bins, room for 900 classes
    >>> boxes, labels = torch.tensor([[[0.1, 0.2, 0.5, 0.6]]]), torch.tensor([[18]])
    >>> encode_detection(boxes, labels, vocab).targets     # y_min x_min y_max x_max class
    tensor([[1100, 1200, 1500, 1599,  118]])

Left out: the order of objects and the noise boxes, which are augmentation (data.py).

    python -m doctest tokenizer.py        # checks the example above
    python -m pytest tests/test_tokenizer.py
"""
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch

# ---------------------------------------------------------------------------------------------------------------
# the vocabulary

PAD = 0                                                # also ends a detection or polygon sequence
PROMPT_DET, PROMPT_SEG, PROMPT_KPT, PROMPT_CAP = 10, 11, 12, 13
FAKE = 30                                              # class of a noise box; dropped token of a caption
SEPARATOR, INVISIBLE = 40, 41                          # between two polygons; a joint nobody can see
CLASS_SHIFT = 100                                      # category id 1 is token 101

PAD_LABEL, FAKE_LABEL = 0, FAKE - CLASS_SHIFT          # labels of a missing box and of a noise box
PAD_POINT, SEPARATOR_POINT, INVISIBLE_POINT = -1.0, -2.0, -3.0   # stand in both coordinates of a point
POINT_TOKENS = {PAD_POINT: PAD, SEPARATOR_POINT: SEPARATOR, INVISIBLE_POINT: INVISIBLE}


@dataclass(frozen=True)
class Vocab:
    """Where the token ranges lie: special tokens [0, 100), classes [100, coord_shift), coordinates
    [coord_shift, coord_shift + bins), text [text_shift, size). ValueError if two ranges meet or one overflows."""
    bins: int = 1000                                   # coordinate values along a side of the image
    coord_shift: int = 1000
    text_shift: int = 3000
    size: int = 3000                                   # 35000 with the text of the multi-task models

    def __post_init__(self):
        edges = dict(class_shift=CLASS_SHIFT, coord_shift=self.coord_shift,
                     end_of_coordinates=self.coord_shift + self.bins, text_shift=self.text_shift, size=self.size)
        names = list(edges)
        if self.bins < 2:
            raise ValueError(f"bins is {self.bins}, expected at least 2")
        if self.coord_shift <= CLASS_SHIFT + 1:
            raise ValueError(f"coord_shift is {self.coord_shift}, which leaves no class token: expected at least "
                             f"{CLASS_SHIFT + 2}")
        for low, high in zip(names, names[1:]):
            if edges[low] > edges[high]:
                raise ValueError(f"token ranges overlap: {low} is {edges[low]}, above {high}, which is {edges[high]}")

    @property
    def classes(self):
        """slice of the class tokens; position i of it is label i."""
        return slice(CLASS_SHIFT, self.coord_shift)

    @property
    def max_label(self):
        """The largest category label that has a token."""
        return self.coord_shift - CLASS_SHIFT - 1


class Tokens(NamedTuple):
    """What a decoder trains on; all of shape (..., T)."""
    inputs: torch.Tensor                               # int64, starts with the prompt
    targets: torch.Tensor                              # int64, the input moved by one, without corruption
    weights: torch.Tensor                              # float32, the share of each target in the loss


# ---------------------------------------------------------------------------------------------------------------
# coordinates

def quantize(coords, bins):
    """Fractions (any shape, float) -> int64 in [0, bins); values outside [0, 1] go to the nearest end."""
    return (coords * (bins - 1)).round().long().clamp(0, bins - 1)


def dequantize(ints, bins):
    """int64 in [0, bins) -> float32 fractions, at most half a bin from what `quantize` was given."""
    return ints.float() / (bins - 1)


# ---------------------------------------------------------------------------------------------------------------
# object detection (2109.10852, sections 2.1 and 2.4)

def encode_detection(boxes_yxyx, labels, vocab, corrupt=None, noise_weight=1.0, pad_weight=0.1):
    """Objects -> a training sequence: y_min x_min y_max x_max class, once an object, in the given order.

    boxes_yxyx:   (..., N, 4) float fractions
    labels:       (..., N) int64; PAD_LABEL where there is no box (those come last), FAKE_LABEL for noise boxes
    corrupt:      (..., N, 2) float in [0, 1) or None: random numbers that replace each input class token by FAKE
                  (half the time) or by a random class, so that the input never leaks the truth; None keeps them
    noise_weight: loss weight of the class of a noise box; its coordinates weigh 0
    pad_weight:   loss weight of padding, that is of ending the sequence
    Returns Tokens with T = 5 N.
    """
    pad, fake = labels == PAD_LABEL, labels == FAKE_LABEL
    if ((labels < 0) & ~fake).any() or (labels > vocab.max_label).any():
        wrong = labels[((labels < 0) & ~fake) | (labels > vocab.max_label)].unique().tolist()
        raise ValueError(f"labels {wrong} have no token: expected 1..{vocab.max_label}")
    coords = quantize(boxes_yxyx, vocab.bins) + vocab.coord_shift
    classes = labels + CLASS_SHIFT                                             # FAKE_LABEL becomes FAKE
    input_classes = classes
    if corrupt is not None:
        random_class = CLASS_SHIFT + (corrupt[..., 1] * (vocab.coord_shift - CLASS_SHIFT)).long()
        input_classes = torch.where(corrupt[..., 0] < 0.5, FAKE, random_class)

    def serialize(coords, classes, empty):
        objects = torch.cat([coords, classes[..., None]], -1)                  # (..., N, 5)
        return torch.where(pad[..., None], empty, objects).flatten(-2)         # (..., 5 N)

    targets = serialize(coords, classes, PAD)
    inputs = with_prompt(PROMPT_DET, serialize(coords, input_classes, PAD))
    real = torch.where(fake, 0.0, 1.0)
    weights = serialize(real[..., None].expand(boxes_yxyx.shape), torch.where(fake, noise_weight, 1.0), pad_weight)
    return Tokens(inputs, targets, weights)


def with_prompt(prompt, targets):
    """(..., T) targets -> (..., T) inputs: the prompt token, then all targets but the last."""
    return torch.cat([torch.full_like(targets[..., :1], prompt), targets[..., :-1]], -1)


def decode_detection(tokens, class_logprobs, vocab):
    """What a model wrote -> objects. A tail shorter than an object is dropped.

    tokens:         (B, T) int64, without the prompt
    class_logprobs: (B, T, C) float: log-softmax over the *whole* vocabulary, of which only `vocab.classes` is given,
                    so that mass on FAKE lowers the score
    Returns labels (B, N) int64, boxes_yxyx (B, N, 4) float in [0, 1] and scores (B, N), with N = T // 5. The
    class is the likeliest one at the fifth token, whatever was sampled there. From the first PAD in a coordinate on,
    scores are 0: the sequence has ended (the reference goes on; its training sequences never end).
    """
    B, N = tokens.shape[0], tokens.shape[1] // 5
    tokens = tokens[:, :5 * N].view(B, N, 5)
    boxes = dequantize(tokens[..., :4] - vocab.coord_shift, vocab.bins).clamp(0, 1)
    logprobs, labels = class_logprobs[:, 4:5 * N:5].max(-1)                    # (B, N) each
    ended = (tokens[..., :4] == PAD).any(-1).cumsum(-1) > 0
    return labels, boxes, logprobs.exp().masked_fill(ended, 0.0)


# ---------------------------------------------------------------------------------------------------------------
# instances: a box in the prompt, points in the answer (2206.07669, sections 2.2 and 2.3)

def instance_prompt(prompt, boxes_yxyx, labels, vocab):
    """(..., N, 4) fractions and (..., N) labels -> (..., N, 6) int64: prompt, box, class; PAD where there is no box."""
    task = torch.full_like(labels, prompt)[..., None]
    coords = quantize(boxes_yxyx, vocab.bins) + vocab.coord_shift
    tokens = torch.cat([task, coords, labels[..., None] + CLASS_SHIFT], -1)
    return torch.where(labels[..., None] == PAD_LABEL, PAD, tokens)


def encode_points(points, labels, vocab):
    """(..., N, P) flat y x fractions, with the *_POINT marks -> (..., N, P) int64 tokens; PAD where label is PAD_LABEL."""
    tokens = quantize(points, vocab.bins) + vocab.coord_shift
    for mark, token in POINT_TOKENS.items():
        tokens = torch.where(points == mark, token, tokens)
    return torch.where(labels[..., None] == PAD_LABEL, PAD, tokens)


def encode_instances(prompt, boxes_yxyx, labels, points, vocab, mask=None, invisible_weight=1.0, pad_weight=1.0):
    """Objects and their points -> one training sequence an object: the box is told, the points are learned.

    prompt:     PROMPT_SEG or PROMPT_KPT
    boxes_yxyx, labels: as in `instance_prompt`;   points: (..., N, P) as in `encode_points`
    mask:       (..., N, P) bool or None: points that the input hides behind INVISIBLE, so that the model must look at
                the image and not only at the points before
    invisible_weight, pad_weight: loss weights of a target that is INVISIBLE, and of padding
    Returns Tokens of shape (..., N, 5 + P); the prompt weighs nothing.
    """
    told, answer = instance_prompt(prompt, boxes_yxyx, labels, vocab), encode_points(points, labels, vocab)
    sequence = torch.cat([told, answer], -1)                                   # (..., N, 6 + P)
    shown = answer if mask is None else torch.where(mask, INVISIBLE, answer)
    weights = torch.cat([torch.zeros_like(told[..., 1:]), torch.ones_like(answer)], -1).float()
    targets = sequence[..., 1:]
    weights = torch.where(targets == INVISIBLE, invisible_weight, weights).masked_fill(targets == PAD, pad_weight)
    return Tokens(torch.cat([told, shown], -1)[..., :-1], targets, weights)


def decode_points(tokens, vocab):
    """Inverse of `encode_points`: (..., P) int64 -> (..., P) float32 fractions with the *_POINT marks."""
    points = dequantize(tokens - vocab.coord_shift, vocab.bins)
    for mark, token in POINT_TOKENS.items():
        points = torch.where(tokens == token, mark, points)
    return points


def split_polygons(points):
    """(P,) float as of `decode_points` -> list of (K, 2) arrays: what stands before the first padding, cut at every
    point of which a coordinate is the separator. A lone coordinate at the end is dropped."""
    points = points[:len(points) // 2 * 2].reshape(-1, 2)
    ended = (points == PAD_POINT).any(-1)
    points = points[:ended.nonzero()[0, 0]] if ended.any() else points
    cut = (points == SEPARATOR_POINT).any(-1)
    group = cut.cumsum(0)[~cut]
    return [points[~cut][group == g].numpy() for g in group.unique()]


def point_score(box_scores, tokens, token_probs, points_weight=1.0):
    """Mean probability of the sampled tokens (B, T), padding left out, mixed with the score of the box (B,)."""
    written = (tokens != PAD).float()
    points_score = (token_probs * written).sum(-1) / written.sum(-1).clamp_min(1)
    return points_weight * points_score + (1 - points_weight) * box_scores


# ---------------------------------------------------------------------------------------------------------------
# captions (2206.07669, section 2): text in pieces, piece i is token text_shift + i

END_PIECE = 1                                          # as in T5 (1910.10683); piece 0 is padding there, and is unused


def real_pieces(ids, size):
    """The ids before the end piece or padding, without those that name no piece."""
    return [i for i in takewhile(lambda i: i not in (PAD, END_PIECE), ids) if END_PIECE < i < size]


class BytePieces:
    """Text as UTF-8 bytes, byte b being piece b + 2. Nothing to train or download; a COCO caption takes 54 on average."""
    size = 2 + 256

    def encode(self, text):
        """str -> list of piece ids, the end piece last. Half a surrogate pair, which has no UTF-8, becomes "?"."""
        return [2 + byte for byte in text.encode("utf-8", "replace")] + [END_PIECE]

    def decode(self, ids):
        """Piece ids -> str, up to the end piece or padding; bytes that are no UTF-8 become U+FFFD."""
        return bytes(i - 2 for i in real_pieces(ids, self.size)).decode("utf-8", "replace")


class SentencePieces:
    """The pieces of a SentencePiece model (1808.06226). The released multi-task checkpoints use c4_en_32k_spm.model, which
    fills their 32,000 text tokens. Needs the optional package sentencepiece; ValueError names a file of no use."""

    def __init__(self, path):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise ImportError(f"{path} needs a package that is not installed: pip install sentencepiece") from None
        with open(path, "rb") as f:
            proto = f.read()
        try:
            self.model = SentencePieceProcessor()
            self.model.LoadFromSerializedProto(proto)
        except RuntimeError as e:
            raise ValueError(f"{path} is no SentencePiece model, or a broken one: {e}") from None
        self.size = self.model.vocab_size()
        if self.model.eos_id() != END_PIECE:
            raise ValueError(f"{path} has end piece {self.model.eos_id()}, expected {END_PIECE}: train it with "
                             "--pad_id=0 --eos_id=1 --unk_id=2 --bos_id=-1")

    def encode(self, text):
        return self.model.encode(text.encode("utf-8", "replace").decode()) + [END_PIECE]

    def decode(self, ids):
        return self.model.decode(real_pieces(ids, self.size))


def encode_captions(captions, vocab, pieces, length, drop=None, drop_rate=0.5, end_weight=0.1, pad_weight=1.0):
    """N captions -> training sequences of `length` tokens: pieces, the end piece, padding.

    captions:   list of N str; one longer than `length` is cut and then has no end piece, so that nothing teaches the
                model to stop there (the reference fails on it)
    drop:       (N, length) float in [0, 1) or None: where it is below `drop_rate`, the input token becomes FAKE, the
                prompt and padding included, so that the model must look at the image and not only at the last words
    end_weight, pad_weight: loss weights; padding weighs as much as text, unlike in detection
    Returns Tokens with shape (N, length). ValueError if the vocabulary has no room for the pieces.
    """
    if vocab.text_shift + pieces.size > vocab.size:
        raise ValueError(f"the vocabulary has size {vocab.size}, expected at least {vocab.text_shift + pieces.size} "
                         f"for {pieces.size} pieces from text_shift {vocab.text_shift} on")
    targets = torch.full((len(captions), length), PAD)
    for row, caption in zip(targets, captions):
        ids = torch.tensor(pieces.encode(caption)[:length])
        row[:len(ids)] = ids + vocab.text_shift
    inputs = with_prompt(PROMPT_CAP, targets)
    if drop is not None:
        inputs = torch.where(drop < drop_rate, FAKE, inputs)
    weights = torch.where(targets == vocab.text_shift + END_PIECE, end_weight, 1.0)
    return Tokens(inputs, targets, weights.masked_fill(targets == PAD, pad_weight))


def decode_captions(tokens, vocab, pieces):
    """What a model wrote, (N, T) int64 without the prompt -> N str. Reading stops at the end piece or padding (the
    reference reads on); tokens that are no text are skipped."""
    ids = torch.where(tokens == PAD, PAD, tokens - vocab.text_shift)
    return [pieces.decode(row) for row in ids.tolist()]
