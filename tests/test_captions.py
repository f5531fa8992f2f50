"""Captions: text in pieces, pieces as tokens, and the scores of texts."""

import functools
import importlib.util
import itertools
import json
import math
import os
import shutil
import sys
import types

import pytest
import torch

import tokenizer
from eval import caption_scores, caption_words
from tokenizer import (
    END_PIECE,
    FAKE,
    PAD,
    PROMPT_CAP,
    BytePieces,
    SentencePieces,
    Vocab,
    decode_captions,
    encode_captions,
)

# --------------------------------------------------------------------------------------------------
# pieces and tokens

TEXT = Vocab()
STRANGE = [
    "",
    " ",
    "a red circle above a blue square",
    "\U0001f995 caf\u00e9 \u6f22\u5b57 \u0000\n\t",
    "e\u0301",
    "x" * 300,
]


class FakeProcessor:
    """Stands for sentencepiece's SentencePieceProcessor: a piece per letter, as strict on ids."""

    end = 1

    def LoadFromSerializedProto(self, proto):
        if not proto.startswith(b"model"):
            raise RuntimeError("could not parse")

    def vocab_size(self):
        return 3 + 26

    def eos_id(self):
        return self.end

    def encode(self, text):
        return [3 + ord(c) - ord("a") if c.islower() and c.isascii() else 2 for c in text]

    def decode(self, ids):
        if not all(0 <= i < 29 for i in ids):
            raise IndexError("piece id is out of range")
        return "".join("?" if i == 2 else chr(ord("a") + i - 3) for i in ids if i > 1)


@pytest.fixture
def fake_sentencepiece(monkeypatch, tmp_path):
    """Path of a file that the fake package takes for a model."""
    monkeypatch.setitem(
        sys.modules, "sentencepiece", types.SimpleNamespace(SentencePieceProcessor=FakeProcessor)
    )
    (tmp_path / "a.model").write_bytes(b"model")
    return str(tmp_path / "a.model")


@pytest.mark.parametrize("text", STRANGE)
def test_bytes_decode_to_the_text_they_encode(text):
    ids = BytePieces().encode(text)
    assert (
        ids[-1] == END_PIECE
        and ids.count(END_PIECE) == 1
        and 0 < min(ids)
        and max(ids) < BytePieces.size
    )
    assert BytePieces().decode(ids) == text


def test_every_byte_has_a_piece_of_its_own_and_none_is_the_end_or_padding():
    text = bytes(range(256)).decode("latin-1")
    seen = {i for c in text + "\U0010ffff\uffff" for i in BytePieces().encode(c)[:-1]}
    assert not seen & {PAD, END_PIECE} and seen <= set(range(2, BytePieces.size))
    assert BytePieces().decode(BytePieces().encode(text)) == text


def test_half_a_surrogate_pair_is_encoded_all_the_same():
    assert BytePieces().decode(BytePieces().encode("a\ud83d b")) == "a? b"


def test_decoding_stops_at_the_end_piece_or_padding():
    hi, there = BytePieces().encode("hi")[:-1], BytePieces().encode("there")
    assert (
        BytePieces().decode(hi + [END_PIECE] + there)
        == BytePieces().decode(hi + [PAD] + there)
        == "hi"
    )


def test_bytes_decode_whatever_a_model_writes():
    g = torch.Generator().manual_seed(0)
    for ids in (
        torch.randint(-5000, 40000, (50, 30), generator=g).tolist()
        + torch.randint(2, 258, (50, 30), generator=g).tolist()
    ):
        assert isinstance(BytePieces().decode(ids), str)
    assert BytePieces().decode([2 + 0xFF, 2 + ord("a"), 258, -7, 2 + 0xC3]) == "\ufffda\ufffd"


def test_captions_come_back_from_their_tokens():
    tokens = encode_captions(STRANGE, TEXT, 320)
    assert decode_captions(tokens.targets, TEXT) == STRANGE
    assert (
        tokens.targets.max() < TEXT.text_end
        and tokens.targets[tokens.targets != PAD].min() >= TEXT.text_shift
    )


def test_a_caption_becomes_prompt_pieces_end_and_padding():
    inputs, targets, weights = encode_captions(["ab", ""], TEXT, 5)
    a, b, end = 3000 + 2 + ord("a"), 3000 + 2 + ord("b"), 3001
    assert targets.tolist() == [[a, b, end, PAD, PAD], [end, PAD, PAD, PAD, PAD]]
    assert inputs.tolist() == [[PROMPT_CAP, a, b, end, PAD], [PROMPT_CAP, end, PAD, PAD, PAD]]
    torch.testing.assert_close(weights, torch.tensor([[1, 1, 0.1, 1, 1], [0.1, 1, 1, 1, 1]]))
    assert (inputs.dtype, targets.dtype, weights.dtype) == (torch.int64, torch.int64, torch.float32)
    weights = encode_captions(["ab"], TEXT, 5, end_weight=0.5, pad_weight=0.0).weights
    assert weights.tolist() == [[1, 1, 0.5, 0, 0]]


@pytest.mark.parametrize("length, ended", [(5, True), (4, False), (2, False), (1, False)])
def test_a_long_caption_is_cut_and_then_has_no_end(length, ended):
    inputs, targets, weights = encode_captions(["abcd"], TEXT, length)
    assert targets.shape == inputs.shape == weights.shape == (1, length)
    assert decode_captions(targets, TEXT) == ["abcd"[:length]]
    assert (targets == TEXT.text_shift + END_PIECE).any() == ended and inputs[0, 0] == PROMPT_CAP


def test_a_cut_inside_a_letter_still_decodes():
    targets = encode_captions(["a\U0001f995"], TEXT, 3).targets
    assert decode_captions(targets, TEXT) == ["a\ufffd"]


def test_no_captions_make_an_empty_batch():
    tokens = encode_captions([], TEXT, 7, drop=torch.rand(0, 7))
    assert all(t.shape == (0, 7) for t in tokens) and decode_captions(tokens.targets, TEXT) == []


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 1.0])
def test_dropped_inputs_are_as_many_as_the_rate_says_and_prompts_among_them(rate):
    texts, drop = (
        ["ab" * 20, ""] * 100,
        torch.rand(200, 64, generator=torch.Generator().manual_seed(0)),
    )
    whole = encode_captions(texts, TEXT, 64)
    some = encode_captions(texts, TEXT, 64, drop=drop, drop_rate=rate)
    fake = some.inputs == FAKE
    assert torch.equal(fake, drop < rate) and torch.equal(some.inputs[~fake], whole.inputs[~fake])
    assert abs(fake.float().mean() - rate) < 0.02 and abs(fake[:, 0].float().mean() - rate) < 0.1
    assert torch.equal(some.targets, whole.targets) and torch.equal(some.weights, whole.weights)


def test_half_of_the_inputs_are_dropped_by_default():
    tokens = encode_captions(["ab"], TEXT, 4, drop=torch.tensor([[0.0, 0.49, 0.5, 0.99]]))
    assert (tokens.inputs == FAKE).tolist() == [[True, True, False, False]]


def test_tokens_that_are_no_text_are_skipped():
    a, b = 3000 + 2 + ord("a"), 3000 + 2 + ord("b")
    tokens = torch.tensor(
        [
            [FAKE, a, 1500, 118, 34999, b, PAD, a],
            [PROMPT_CAP, 3001, a, a, a, a, a, a],
            [3000, a, a, a, a, a, a, a],
        ]
    )
    assert decode_captions(tokens, TEXT) == ["ab", "", ""]


def test_sentence_pieces_wrap_the_model(fake_sentencepiece):
    pieces = SentencePieces(fake_sentencepiece)
    assert (
        pieces.size == 29
        and pieces.encode("ab!") == [3, 4, 2, END_PIECE]
        and pieces.encode("") == [END_PIECE]
    )
    assert pieces.decode([3, 99, -4, 4, END_PIECE, 3]) == pieces.decode([3, 4, PAD, 3]) == "ab"
    vocab = Vocab(pieces=fake_sentencepiece)
    assert vocab.text_end == 3029
    tokens = encode_captions(["ab", "zebra"], vocab, 4)
    assert tokens.targets.tolist() == [[3003, 3004, 3001, PAD], [3028, 3007, 3004, 3020]]
    assert decode_captions(tokens.targets, vocab) == ["ab", "zebr"]


def test_unusable_models_are_named(fake_sentencepiece, tmp_path, monkeypatch):
    (tmp_path / "b.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match="b.model is no SentencePiece model"):
        SentencePieces(str(tmp_path / "b.model"))
    with pytest.raises(FileNotFoundError, match="c.model"):
        SentencePieces(str(tmp_path / "c.model"))
    monkeypatch.setattr(FakeProcessor, "end", 2)
    with pytest.raises(ValueError, match="a.model has end piece 2, expected 1"):
        SentencePieces(fake_sentencepiece)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="a.model needs .* pip install sentencepiece"):
        SentencePieces("a.model")


def test_a_real_sentencepiece_model_decodes_what_it_encodes(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path / "tiny.model"
    things = [
        f"a {color} {kind}"
        for color in ("red", "green", "blue")
        for kind in ("circle", "square", "star")
    ]
    corpus = [
        f"{a} {where} {b}"
        for a, where, b in itertools.product(things, ("above", "left of"), things)
    ]
    with open(path, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=f,
            vocab_size=60,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    pieces = SentencePieces(str(path))
    vocab = Vocab(pieces=str(path))
    targets = encode_captions(corpus, vocab, 64).targets
    assert decode_captions(targets, vocab) == corpus and (
        targets == vocab.text_shift + END_PIECE
    ).sum() == len(corpus)
    for ids in torch.randint(
        -100, 2 * pieces.size, (50, 20), generator=torch.Generator().manual_seed(0)
    ).tolist():
        assert isinstance(pieces.decode(ids), str)
    assert pieces.encode("\ud83d")[-1] == END_PIECE and pieces.decode(pieces.encode("")) == ""
    for broken in (b"", b"junk" * 100, path.read_bytes()[:100]):
        (tmp_path / "broken.model").write_bytes(broken)
        with pytest.raises(ValueError, match="broken.model is no SentencePiece model"):
            SentencePieces(str(tmp_path / "broken.model"))


# --------------------------------------------------------------------------------------------------
# scores

METRICS = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "ROUGE_L", "CIDEr")
has_package = importlib.util.find_spec("pycocoevalcap") is not None
needs_package = pytest.mark.skipif(not has_package, reason="needs pycocoevalcap")
CANDIDATES = {
    1: "A red circle above the blue square.",
    2: "two stars left of a star",
    3: "a green ring",
    4: "",
}
REFERENCES = {
    1: ["a red circle above a blue square", "The blue square isn't above the red circle!"],
    2: ["two yellow stars, left of a ring", "a star right of two stars", "stars"],
    3: ["A green triangle's corner below a green ring"],
    4: ["an empty scene"],
}
# METRICS of some of the images, by pycocoevalcap 1.2 and Java 17
MEASURED = {
    (1, 2, 3, 4): (0.56978, 0.56978, 0.48057, 0.36663, 0.56001, 2.57655),
    (1, 2, 3): (0.68729, 0.68729, 0.57968, 0.44224, 0.74668, 3.43699),
    (1,): (1.0, 1.0, 0.84343, 0.62233, 0.85714, 0.0),
}


def scores(candidates, references):
    """[str], [[str]] -> the metrics."""
    result = caption_scores(dict(enumerate(candidates)), dict(enumerate(references)))
    assert set(result) <= set(METRICS)
    assert all(math.isfinite(x) for x in result.values()), result
    return result


@functools.cache
def has_library():
    return has_package and shutil.which("java") is not None


def official_words(texts):
    """list of str -> list of lists of words, by the Java program inside pycocoevalcap, which takes
    one text per line."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    numbered = {i: [{"caption": " ".join(text.split())}] for i, text in enumerate(texts)}
    return [line.split() for [line] in PTBTokenizer().tokenize(numbered).values()]


@pytest.mark.parametrize("text, words", [
    ("A man's dog, isn't happy.", "a man 's dog is n't happy"),
    ("They can't; it CANNOT -- won't!", "they ca n't it can not wo n't"),
    ("a two-story house - on 1,000 hills", "a two-story house on 1,000 hills"),
    ("At 10:30 p.m. (or 11 o'clock)", "at 10:30 p.m. -lrb- or 11 o'clock -rrb-"),
    ('Mr. Smith\'s cats\' "red" \'toys\'...', "mr. smith 's cats red toys"),
    ("50% of the U.S. & $5.00", "50 % of the u.s. & $ 5.00"),
    ("a dog\u2019s \u201ccaf\u00e9\u201d \u2014 black/white", "a dog 's caf\u00e9 black/white"),
    ("hi,there!! no. 5 '60s", "hi there !! no. 5 '60s"),
    ("", ""),
    (" .,;:?' ", ""),
    ("No.", "no"),
])
def test_words_are_those_of_the_penn_treebank_tokeniser(text, words):
    assert caption_words(text) == words.split()
    if has_library():
        assert official_words([text, "x"])[0] == words.split()


@needs_package
@pytest.mark.parametrize("ids", MEASURED)
def test_numbers_are_those_measured_with_pycocoevalcap(ids):
    found = caption_scores({i: CANDIDATES[i] for i in ids}, REFERENCES)
    assert [found[name] for name in METRICS] == pytest.approx(MEASURED[ids], abs=2e-5)


def test_line_breaks_of_any_kind_part_words():
    texts = ["a\rb", "c\u2028d", "", "e\n\nf", "\x0b\x0c", "g\u2029", ""]
    words = [["a", "b"], ["c", "d"], [], ["e", "f"], [], ["g"], []]
    assert list(map(caption_words, texts)) == words
    if has_library():
        assert official_words(texts) == words


def test_without_the_package_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    tokenizer.notice.cache_clear()
    assert caption_scores({1: "a"}, {1: ["a"]}) == {}
    assert "ROUGE, CIDEr and BLEU need pip install pycocoevalcap" in capsys.readouterr().err


@needs_package
def test_a_candidate_among_its_references_is_perfect():
    candidates = [f"a {w} shape left of {w} {w}" for w in ("red", "green", "blue")]
    found = scores(candidates, [[c.upper() + "."] for c in candidates])
    assert all(found[name] == 1 for name in METRICS[:5]) and found["CIDEr"] == pytest.approx(10)
    found = scores(candidates, [["something else entirely here", c] for c in candidates])
    assert all(found[name] == 1 for name in METRICS[:5]) and found["CIDEr"] > 4.9
    others = scores(candidates[1:] + candidates[:1], [[c] for c in candidates])
    assert others["CIDEr"] < 1 and others["BLEU_4"] < 0.5


@needs_package
@pytest.mark.parametrize("candidates, references", [
    ([""], [["a cat"]]),
    (["a cat"], [[""]]),
    ([""], [[""]]),
    (["?."], [["a"]]),
    (["a"], [["b", ""]]),
    (["", "a cat"], [["a"], ["a cat"]]),
    (["a cat on a mat"], [["a cat on a mat"]]),
])
def test_empty_texts_and_single_images_give_finite_numbers(candidates, references):
    found = scores(candidates, references)
    if len(candidates) == 1:
        assert found.get("CIDEr", 0) == 0
    if candidates == [""] and references == [["a cat"]]:
        assert set(found.values()) == {0}
    if candidates == [""] and references == [[""]]:
        assert found["ROUGE_L"] == 1                   # as in pycocoevalcap: both lack words


@needs_package
def test_references_of_images_without_candidate_change_nothing():
    few = {i: CANDIDATES[i] for i in (1, 3)}
    assert caption_scores(few, REFERENCES) == caption_scores(few, {i: REFERENCES[i] for i in few})


@pytest.mark.parametrize("references", [{7: ["a"]}, {7: ["a"], 8: []}])
def test_an_image_without_references_is_named(references):
    with pytest.raises(ValueError, match="image 8 has a caption"):
        caption_scores({7: "a", 8: "b"}, references)


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no captions"):
        caption_scores({}, {1: ["a"]})


@needs_package
def test_the_first_number_is_rouge_which_chooses_the_best_checkpoint():
    assert next(iter(caption_scores(CANDIDATES, REFERENCES))) == "ROUGE_L"


@needs_package
def test_scores_can_be_written_as_json():
    json.dumps(caption_scores(CANDIDATES, REFERENCES))


@pytest.mark.skipif(
    "COCO_CAPTIONS" not in os.environ, reason="COCO_CAPTIONS names no captions_*.json")
def test_own_words_are_the_official_ones_on_real_captions():
    if not has_library():
        pytest.skip("needs pycocoevalcap and java")
    with open(os.environ["COCO_CAPTIONS"]) as f:
        texts = [a["caption"] for a in json.load(f)["annotations"]]
    differ = [t for t, words in zip(texts, official_words(texts)) if words != caption_words(t)]
    assert len(differ) <= 0.01 * len(texts), differ[:10]
