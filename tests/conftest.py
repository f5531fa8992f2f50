"""What all tests share: the project on the path, few threads, a small Pix2Seq model."""
import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
torch.set_num_threads(1)

from model import Pix2Seq, Pix2SeqConfig


@pytest.fixture
def tiny_config():
    """A Pix2Seq model that takes milliseconds: 32 px, vocabulary 210 (100 bins)."""
    return Pix2SeqConfig(
        image_size=(32, 32),
        patch_size=8,
        enc_layers=2,
        enc_dim=32,
        enc_mlp=64,
        enc_heads=4,
        dec_layers=2,
        dec_dim=32,
        dec_mlp=64,
        dec_heads=4,
        vocab_size=210,
        max_seq_len=64,
        drop_path=0.0,
        dropout=0.0,
    )


@pytest.fixture
def tiny_model(tiny_config):
    torch.manual_seed(0)
    return Pix2Seq(tiny_config).eval()
