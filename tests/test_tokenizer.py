import doctest

import pytest
import torch

import tokenizer
from tokenizer import FAKE, FAKE_LABEL, PAD, PAD_LABEL, PROMPT_DET, Vocab

VOCAB = Vocab()


def one_hot_logprobs(tokens, vocab):
    """log-probabilities of the classes if each token of the sequence were certain."""
    full = torch.full((*tokens.shape, vocab.text_shift), -torch.inf).scatter(
        -1, tokens[..., None], 0.0
    )
    return full[..., vocab.classes]


def random_objects(B, N, seed=0):
    g = torch.Generator().manual_seed(seed)
    corners = torch.rand(B, N, 2, 2, generator=g).sort(2).values
    return corners.reshape(B, N, 4), torch.randint(1, 900, (B, N), generator=g)


def test_docstring_example_is_true():
    assert doctest.testmod(tokenizer).failed == 0 and doctest.testmod(tokenizer).attempted > 0


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(coord_shift=2500), "coordinates end at 3500"),
        (dict(text_shift=1500), "text_shift, which is 1500"),
        (dict(coord_shift=101), "no class token"),
        (dict(bins=1), "bins is 1"),
    ],
)
def test_ranges_that_overlap_or_overflow_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Vocab(**wrong)


@pytest.mark.parametrize("bins", [2, 100, 1000])
def test_dequantize_inverts_quantize_within_half_a_bin(bins):
    coords = torch.linspace(0, 1, 5001, dtype=torch.float64)
    vocab = Vocab(bins)
    error = (tokenizer.dequantize(tokenizer.quantize(coords, vocab), vocab) - coords).abs().max()
    assert error <= 0.5 / (bins - 1) + 1e-6
    assert tokenizer.quantize(torch.tensor([-3.0, 4.0]), vocab).tolist() == [1000, 999 + bins]


def test_decode_inverts_encode_for_boxes():
    boxes, labels = random_objects(3, 7)
    tokens = tokenizer.encode_detection(boxes, labels, VOCAB)
    found_labels, found_boxes, scores = tokenizer.decode_detection(
        tokens.targets, one_hot_logprobs(tokens.targets, VOCAB), VOCAB
    )
    assert (found_labels == labels).all() and (scores == 1).all()
    assert (found_boxes - boxes).abs().max() <= 0.5 / 999 + 1e-6


def test_input_is_the_prompt_and_the_target_moved_by_one():
    tokens = tokenizer.encode_detection(*random_objects(2, 4), VOCAB)
    assert (tokens.inputs[:, 0] == PROMPT_DET).all()
    assert (tokens.inputs[:, 1:] == tokens.targets[:, :-1]).all()


def test_corruption_hides_every_class_and_no_coordinate():
    boxes, labels = random_objects(50, 20)
    labels[:, 15:] = PAD_LABEL
    corrupt = torch.rand(50, 20, 2, generator=torch.Generator().manual_seed(1))
    plain = tokenizer.encode_detection(boxes, labels, VOCAB)
    tokens = tokenizer.encode_detection(boxes, labels, VOCAB, corrupt)
    assert (tokens.targets == plain.targets).all()
    is_class = (
        torch.arange(100) % 5 == 0
    )  # of the input, where the class of object n stands at 5 n + 5
    changed = tokens.inputs != plain.inputs
    assert not changed[:, ~is_class].any() and not changed[:, 80:].any()
    classes = tokens.inputs[:, 5:80:5]
    assert 0.4 < (classes == FAKE).float().mean() < 0.6
    others = classes[classes != FAKE]
    assert others.min() >= 100 and others.max() < 1000 and others.unique().numel() > 200


def test_noise_boxes_and_padding_get_their_own_weights():
    boxes, labels = random_objects(1, 4)
    labels[0] = torch.tensor([7, 8, FAKE_LABEL, PAD_LABEL])
    tokens = tokenizer.encode_detection(boxes, labels, VOCAB, noise_weight=0.3, pad_weight=0.1)
    expected = [1] * 10 + [0] * 4 + [0.3] + [0.1] * 5
    assert torch.allclose(tokens.weights[0], torch.tensor(expected)), tokens.weights
    assert tokens.targets[0, 14] == FAKE and (tokens.targets[0, 15:] == PAD).all()


def test_fake_never_wins_but_lowers_the_score():
    tokens = tokenizer.encode_detection(*random_objects(1, 1), VOCAB).targets
    logits = torch.zeros(1, 5, 3000)
    logits[0, 4, FAKE], logits[0, 4, 105] = 10.0, 9.0
    labels, _, scores = tokenizer.decode_detection(
        tokens, logits.log_softmax(-1)[..., VOCAB.classes], VOCAB
    )
    assert labels.item() == 5 and scores.item() == pytest.approx(
        logits[0, 4].softmax(-1)[105].item()
    )


def test_a_tail_is_dropped_and_nothing_after_the_end_scores():
    boxes, labels = random_objects(1, 4)
    labels[0, 2:] = PAD_LABEL
    tokens = tokenizer.encode_detection(boxes, labels, VOCAB).targets[:, :18]
    found, _, scores = tokenizer.decode_detection(
        tokens, one_hot_logprobs(tokens, VOCAB).clamp_min(-1), VOCAB
    )
    assert found.shape == (1, 3) and scores[0, :2].gt(0).all() and scores[0, 2] == 0


def test_a_label_without_a_token_is_refused_by_name():
    boxes, labels = random_objects(1, 2)
    labels[0, 1] = 901
    with pytest.raises(ValueError, match=r"\[901\].*1\.\.899"):
        tokenizer.encode_detection(boxes, labels, VOCAB)


def test_no_objects_at_all_is_a_sequence_of_padding():
    tokens = tokenizer.encode_detection(
        torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), VOCAB
    )
    assert (tokens.targets == PAD).all() and torch.allclose(tokens.weights, torch.tensor(0.1))
