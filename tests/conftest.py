"""What all tests share: the project on the path, few threads, scripts, a small Pix2Seq model."""
import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, ROOT)
torch.set_num_threads(1)

from model import Generated, Pix2Seq, Pix2SeqConfig, sample_token


def pytest_configure(config):
    config.addinivalue_line("markers", "campaign: takes minutes, runs only by `-m campaign`")


def pytest_collection_modifyitems(config, items):
    if "campaign" not in config.option.markexpr:
        items[:] = [item for item in items if "campaign" not in item.keywords]


def run(script, *arguments, torchrun=0, process=False, cwd=".", check=True):
    """What a script says to these arguments. Under torchrun or in a process of its own it takes
    seconds longer than in this one."""
    if torchrun or process:
        command = [sys.executable]
        if torchrun:
            command += ["-m", "torch.distributed.run", f"--nproc_per_node={torchrun}"]
            command += ["--standalone"]
        command += [f"{ROOT}/{script}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT)
    else:
        done = call(script, arguments, cwd)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def call(script, arguments, cwd):
    """A script's main, with what subprocess.run would return. Signal handlers stay as they are."""
    main = importlib.import_module(script.removesuffix(".py")).main
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    out, err, code, here = io.StringIO(), io.StringIO(), 0, os.getcwd()
    try:
        os.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with patch.object(sys, "argv", [script, *arguments]):
                main()
    except SystemExit as e:
        code = e.code or 0
        if isinstance(code, str):                      # a message stands for 1
            err.write(f"{code}\n")
            code = 1
    finally:
        os.chdir(here)
        for number, handler in handlers:
            signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


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


@torch.no_grad()
def generate_without_cache(
        model, context, prompts, length, samples=1, suppress=None, generator=None,
        return_logprobs=slice(0), **sampling):
    """What Pix2Seq.generate writes, by reading everything anew for each token."""
    written = prompts.reshape(-1, prompts.shape[-1]).repeat_interleave(samples, 0)
    columns = []
    for _ in range(length):
        logits = model.decoder.scores(model.decoder(written, context)[:, -1])
        uniform = torch.rand(2, len(written), generator=generator)
        token = shown = sample_token(logits, uniform[0], **sampling)
        if suppress is not None:
            logits[:, suppress] = -torch.inf
            other = sample_token(logits, uniform[1], **sampling)
            shown = torch.where(token == suppress, other, token)
        logprob = logits.log_softmax(-1)
        prob = logprob.gather(1, shown[:, None])[:, 0].exp()
        columns.append((shown, prob, logprob[:, return_logprobs]))
        written = torch.cat([written, token[:, None]], 1)
    parts = (torch.stack(part, 1) for part in zip(*columns))
    return Generated(*(x.unflatten(0, (len(context), -1)) for x in parts))
