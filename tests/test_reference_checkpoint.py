"""TensorFlow checkpoints of the reference: read, fitted to another size, and written as ours."""
import json
import os
import re
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_parity import (
    FOLDER,
    Golden,
    channels_first,
    panoptic_config,
    pix2seq_config,
    rin_config,
)

import data
import model as m
import sample
from model import (
    RIN,
    Device,
    Panoptic,
    Pix2Seq,
    Pix2SeqConfig,
    RINConfig,
    adapt_weights,
    convert,
    load_reference_weights,
    load_weights,
    read_reference_checkpoint,
)
from tokenizer import Vocab

VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
SEQUENCES = ["ar_vit", "ar_vit_cls_learned", "ar_resnet50", "ar_resnet50_c4"]


def golden(name):
    return Golden(os.path.join(FOLDER, f"{name}.npz"))


def write_fake(folder, weights, step=7):
    """The files of a checkpoint, the weights in one that numpy can read, as `fake_tensorflow`
    does."""
    arrays = {name + VALUE: w for name, w in weights.items()}
    for name in weights:
        for slot in "mv":
            arrays[f"{name}/.OPTIMIZER_SLOT/optimizer/{slot}{VALUE}"] = np.zeros(1)
    for name in ("global_step", "save_counter", "optimizer/learning_rate"):
        arrays[name + VALUE] = np.ones(1)
    arrays["_CHECKPOINTABLE_OBJECT_GRAPH"] = np.zeros(1)
    with open(folder / f"ckpt-{step}.data-00000-of-00001", "wb") as f:
        np.savez(f, **arrays)
    (folder / f"ckpt-{step}.index").write_bytes(b"index")
    (folder / "checkpoint").write_text(
        f'model_checkpoint_path: "/elsewhere/ckpt-{step}"\n'
        f'all_model_checkpoint_paths: "ckpt-1"\n')
    return folder / f"ckpt-{step}"


@pytest.fixture
def fake_tensorflow(monkeypatch):
    class Reader:
        def __init__(self, prefix):
            self.arrays = dict(np.load(prefix + ".data-00000-of-00001"))

        def get_variable_to_shape_map(self):
            return {key: list(w.shape) for key, w in self.arrays.items()}

        def get_tensor(self, key):
            return self.arrays[key]

    module = SimpleNamespace(train=SimpleNamespace(load_checkpoint=Reader))
    monkeypatch.setitem(sys.modules, "tensorflow", module)


# --------------------------------------------------------------------------------------------------
# reading

def test_only_the_weights_of_the_model_are_read(tmp_path, fake_tensorflow):
    weights = golden("ar_vit").weights
    prefix = write_fake(tmp_path, weights)
    for path in (tmp_path, prefix, f"{prefix}.index", f"{prefix}.data-00000-of-00001"):
        found = read_reference_checkpoint(str(path))
        assert set(found) == set(weights)
        assert all(np.array_equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("file", ["checkpoint", "ckpt-7.index", "ckpt-7.data-00000-of-00001"])
def test_a_missing_file_is_named(tmp_path, fake_tensorflow, file):
    write_fake(tmp_path, {"model/a": np.zeros(3)})
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(file)):
        read_reference_checkpoint(str(tmp_path))


def test_a_missing_part_of_several_is_named(tmp_path, fake_tensorflow):
    prefix = write_fake(tmp_path, {"model/a": np.zeros(3)})
    os.rename(f"{prefix}.data-00000-of-00001", f"{prefix}.data-00000-of-00002")
    with pytest.raises(FileNotFoundError, match="ckpt-7.data-00001-of-00002"):
        read_reference_checkpoint(str(prefix))


def test_a_truncated_file_is_named(tmp_path, fake_tensorflow):
    prefix = write_fake(tmp_path, {"model/a": np.zeros(300)})
    os.truncate(f"{prefix}.data-00000-of-00001", 500)
    with pytest.raises(ValueError, match="ckpt-7.*damaged or truncated"):
        read_reference_checkpoint(str(prefix))


def test_a_checkpoint_of_something_else_is_refused(tmp_path, fake_tensorflow):
    with pytest.raises(ValueError, match="no weights under model/"):
        read_reference_checkpoint(str(write_fake(tmp_path, {"net/a": np.zeros(3)})))


def test_without_tensorflow_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ImportError, match="pip install tensorflow-cpu"):
        read_reference_checkpoint(str(tmp_path))


@pytest.mark.parametrize("name", SEQUENCES)
def test_tensorflow_checkpoint_gives_the_logits_and_tokens_of_the_reference(tmp_path, name):
    tf = pytest.importorskip("tensorflow")
    g = golden(name)
    root, variables = tf.train.Checkpoint(), []
    for key, w in g.weights.items():
        node, parts = root, key.removeprefix("model/").split("/")
        for part in parts[:-1]:
            if not hasattr(node, part):
                setattr(node, part, tf.train.Checkpoint())
            node = getattr(node, part)
        variables.append(tf.Variable(w.astype(np.float32)))
        # TensorFlow writes a slash in a name as .S
        setattr(node, parts[-1].replace(".S", "/"), variables[-1])
    optimizer = tf.compat.v1.train.AdamOptimizer(0.0)
    optimizer.apply_gradients([(tf.ones_like(v), v) for v in variables])       # makes the slots
    step = tf.Variable(1000, dtype=tf.int64)
    saved = tf.train.Checkpoint(model=root, optimizer=optimizer, global_step=step)
    tf.train.CheckpointManager(saved, str(tmp_path), 1).save(1000)
    keys = [key for key, _ in tf.train.list_variables(str(tmp_path))]
    assert any("OPTIMIZER_SLOT" in key for key in keys)
    weights = read_reference_checkpoint(str(tmp_path))
    assert set(weights) == set(g.weights)
    model = Pix2Seq(pix2seq_config(g.config)).eval()
    load_reference_weights(model, weights)
    images, length = channels_first(g["in:image"]), g["out:greedy_tokens"].shape[1]
    with torch.no_grad():
        g.check("out:logits", model(images, g["in:seq"]))
        out = model.generate(model.encode(images), g["in:prompt"], length, temperature=0)
    g.check("out:greedy_tokens", out.tokens[:, 0])


# --------------------------------------------------------------------------------------------------
# another size

@pytest.fixture
def learned(tiny_config):
    """Two models of learned positions; the second is larger in every way that weights can be fitted
    to."""
    torch.manual_seed(0)
    small = replace(tiny_config, pos_encoding="learned", projection="linear_p")
    large = replace(small, image_size=(48, 64), max_seq_len=80, vocab_size=250)
    return Pix2Seq(small), Pix2Seq(large)


def copy_of(model):
    return {name: w.clone() for name, w in model.state_dict().items()}


def test_weights_of_the_same_size_are_loaded_as_they_are(learned):
    torch.manual_seed(9)
    source, other = learned[0], Pix2Seq(learned[0].config)
    weights, notes = adapt_weights(source.state_dict(), other)
    load_weights(other, weights)
    assert notes == []
    for name, w in other.state_dict().items():
        assert torch.equal(w, source.state_dict()[name]), name


def test_another_size_is_refused_by_name_and_changes_nothing(learned):
    before = copy_of(learned[1])
    with pytest.raises(ValueError) as e:
        adapt_weights(learned[0].state_dict(), learned[1])
    for words in (
            "--adapt",
            "encoder.position.code: grid of (4, 4), the model has (6, 8)",
            "proj_position.code",
            "decoder.position.code: 64 rows, the model has 80",
            "decoder.embed: 210 rows, the model has 250",
            "decoder.bias"):
        assert words in str(e.value), str(e.value)
    assert all(torch.equal(w, before[name]) for name, w in learned[1].state_dict().items())


@pytest.mark.parametrize("grows", [True, False])
def test_common_rows_are_kept_and_new_ones_stay_new(learned, grows):
    source, target = learned if grows else learned[::-1]
    fresh = copy_of(target)
    grid = source.encoder.grid
    weights, notes = adapt_weights(source.state_dict(), target, adapt=True, grid=grid)
    load_weights(target, weights)
    assert len(notes) == 5 and len({note.split(":")[0] for note in notes}) == 5, notes
    theirs, ours = source.state_dict(), target.state_dict()
    for name, n in (("decoder.position.code", 64), ("decoder.embed", 210), ("decoder.bias", 210)):
        assert torch.equal(ours[name][:n], theirs[name][:n])
        assert torch.equal(ours[name][n:], fresh[name][n:])


def test_a_shared_embedding_may_stand_in_a_checkpoint_twice(learned):
    weights, other = learned[0].state_dict(), Pix2Seq(learned[0].config)
    weights["decoder.unembed"] = weights["decoder.embed"].clone()      # as older ones have it
    load_weights(other, weights)
    assert torch.equal(other.decoder.embed, learned[0].decoder.embed)
    weights["decoder.unembed"] += 1
    with pytest.raises(ValueError, match="left over: decoder.unembed"):
        load_weights(other, weights)


def test_image_positions_are_interpolated_on_their_grid(learned):
    source, target = learned

    def plane(rows, cols):
        """10 * row + column, as fractions."""
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
        return 10 * (y + 0.5) / rows + (x + 0.5) / cols

    with torch.no_grad():
        source.encoder.position.code.copy_(plane(4, 4).flatten()[:, None].expand(16, 32))
    weights, _ = adapt_weights(source.state_dict(), target, adapt=True)
    code = weights["encoder.position.code"].view(6, 8, 32)
    inside = slice(2, 4), slice(3, 5)                  # where the kernel stays on the grid
    expected = plane(6, 8)[inside][..., None].expand(2, 2, 32)
    assert torch.allclose(code[inside], expected, atol=1e-4), code[inside][..., 0]


def test_a_grid_that_is_not_square_must_be_named(learned):
    source = Pix2Seq(replace(learned[0].config, image_size=(16, 64))).state_dict()
    with pytest.raises(ValueError, match="encoder.position.code: 16 positions, .* not .3, 5"):
        adapt_weights(source, learned[1], adapt=True, grid=(3, 5))
    with pytest.raises(ValueError, match=r"grid of \(2, 8\), the model has \(4, 4\)"):
        adapt_weights(source, learned[0], grid=(2, 8))             # of the same number of positions
    weights = {name: w[:15] if "position" in name else w for name, w in source.items()}
    with pytest.raises(ValueError, match="encoder.position.code: 15 positions"):
        adapt_weights(weights, learned[1], adapt=True)


def test_another_network_is_refused_whatever_is_adapted(learned):
    wider = Pix2Seq(replace(learned[1].config, dec_dim=48))
    weights, _ = adapt_weights(learned[0].state_dict(), wider, adapt=True)
    with pytest.raises(ValueError, match=r"wrong shape: decoder.embed gives \(210, 32\)"):
        load_weights(wider, weights)
    unshared = Pix2Seq(replace(learned[0].config, shared_embedding=False))
    with pytest.raises(ValueError, match="left over: decoder.unembed"):
        load_weights(learned[0], unshared.state_dict())


def test_reference_weights_are_adapted_too():
    g = golden("ar_vit_cls_learned")
    config = replace(pix2seq_config(g.config), image_size=(96, 96), vocab_size=300)
    model, unembed = Pix2Seq(config), g.weights["model/decoder/ar_decoder.Soutp_token_embedding"]
    with pytest.raises(ValueError, match="wrong shape: .*vis_pos_embedding gives"):
        load_reference_weights(model, g.weights)
    weights, names = m.from_reference(g.weights)
    weights, notes = adapt_weights(weights, model, adapt=True, grid=(4, 6))
    load_weights(model, weights, names)
    assert len(notes) == 5
    assert "encoder.position.code: grid of (4, 6), the model has (6, 6)" in notes
    assert np.array_equal(model.decoder.unembed[:200].detach().numpy(), unembed)


# --------------------------------------------------------------------------------------------------
# writing

@dataclass(frozen=True)
class Config:
    """The part of train.Config that converting reads."""
    model: Pix2SeqConfig | RINConfig
    vocab: Vocab = Vocab(60, 130, 190)
    categories: tuple = ()


CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 29, "name": "dog"}]


def write_categories(folder, categories=CATEGORIES):
    """Annotation files; the second names the keypoints of cats. Returns their paths."""
    cat = {"id": 3, "name": "cat", "keypoints": ["ear"], "supercategory": "pet"}
    paths = []
    for name, rows in (("instances_val2017", categories), ("person_keypoints_val2017", [cat])):
        content = {"images": [], "annotations": [], "categories": rows}
        (folder / f"{name}.json").write_text(json.dumps(content))
        paths.append(str(folder / f"{name}.json"))
    return paths


@pytest.mark.parametrize("name", ["ar_vit", "ar_resnet50_c4"])
def test_a_converted_checkpoint_predicts_as_one_of_ours(tmp_path, fake_tensorflow, name):
    g, folder, target = golden(name), tmp_path / "annotations", str(tmp_path / "ours.pt")
    folder.mkdir()
    (tmp_path / "val2017").mkdir()
    write_fake(tmp_path, g.weights)
    coco = data.DataConfig(data="coco", data_dir=str(tmp_path), max_objects=4)
    c = sample.Config(model=pix2seq_config(g.config), vocab=Vocab(60, 130, 190), data=coco)
    m.save(target, convert(str(tmp_path), c, write_categories(folder)))
    model, loaded = sample.load_model(target, Device("cpu"))
    categories = (
        {"id": 3, "name": "cat", "keypoints": ["ear"], "label": 3},
        {"id": 29, "name": "dog", "label": 29})
    assert loaded == replace(c, categories=categories)
    with torch.no_grad():
        g.check("out:logits", model(channels_first(g["in:image"]), g["in:seq"]))
    inputs = sample.Inputs([{"image": Image.new("RGB", (96, 64))}], loaded)
    objects = sample.predict(model, inputs, loaded, ("det",))[0]["objects"]
    assert {obj["category_id"] for obj in objects} <= {3, 29}
    with pytest.raises(ValueError, match="instances_val2017.json: no images"):
        data.make_source(loaded, "val")


def test_converted_categories_are_named_by_files_or_by_number(tmp_path, fake_tensorflow):
    g = golden("ar_vit")
    write_fake(tmp_path, g.weights)
    c = Config(pix2seq_config(g.config))
    rows = convert(str(tmp_path), c, write_categories(tmp_path))["config"]["categories"]
    assert rows == (
        {"id": 3, "name": "cat", "keypoints": ["ear"], "label": 3},
        {"id": 29, "name": "dog", "label": 29})
    rows = convert(str(tmp_path), c)["config"]["categories"]
    assert [row["name"] for row in rows] == [str(i) for i in range(1, 30)]
    rows = convert(str(tmp_path), replace(c, vocab=Vocab(20, 180, 200)))["config"]["categories"]
    assert [row["label"] for row in rows] == list(range(1, 80))
    too_many = write_categories(tmp_path, [{"id": 30, "name": "cow"}])
    with pytest.raises(ValueError, match="instances_val2017.json: category 30"):
        convert(str(tmp_path), c, too_many)


def test_another_network_than_the_checkpoints_is_refused(tmp_path, fake_tensorflow):
    g = golden("ar_vit")
    write_fake(tmp_path, g.weights)
    with pytest.raises(ValueError, match=r"embedding gives \(200, \d+\), expected \(300, \d+\)"):
        convert(str(tmp_path), Config(replace(pix2seq_config(g.config), vocab_size=300)))


@pytest.mark.parametrize("averaged", [True, False])
def test_a_denoiser_is_converted_with_its_averaged_weights(tmp_path, fake_tensorflow, averaged):
    g = golden("rin_image")
    last, average = {}, {}
    for name, w in g.weights.items():
        last[name.replace("model/", "model/denoiser/")] = w + 1 if averaged else w
        average[name.replace("model/", "model/denoiser_ema/")] = w
    write_fake(tmp_path, last | average if averaged else last)
    config = rin_config(g.config, g["in:cond"])
    expected = RIN(config)
    load_reference_weights(expected, g.weights)
    content = convert(str(tmp_path), Config(config))
    assert content["network"] == "RIN"
    for name, w in content["model"].items():
        assert torch.equal(w, expected.state_dict()[name]), name
    labels = [row["label"] for row in content["config"]["categories"]]
    assert labels == list(range(config.num_classes))


def test_a_panoptic_network_is_converted_whole_and_its_labels_count_the_categories(
        tmp_path, fake_tensorflow):
    g = golden("panoptic")
    averaged = {name.replace("model/", "model/encoder_ema/"): w for name, w in g.weights.items()
                if name.startswith("model/encoder/")}
    averaged = {name.replace("/encoder_ema/encoder/", "/encoder_ema/"): w
                for name, w in averaged.items()}
    last = {name: w + 1 if name.startswith("model/encoder/") else w
            for name, w in g.weights.items()}
    write_fake(tmp_path, last | averaged)
    c = Config(panoptic_config(g.config))
    expected = Panoptic(c.model)
    load_reference_weights(expected, g.weights)
    file = tmp_path / "panoptic.json"
    file.write_text(json.dumps({"categories": [
        {"id": 92, "name": "sky", "isthing": 0}, {"id": 3, "name": "cat", "isthing": 1}]}))
    content = convert(str(tmp_path), c, [str(file)])
    for name, w in content["model"].items():
        assert torch.equal(w, expected.state_dict()[name]), name
    assert content["config"]["categories"] == (
        {"id": 3, "name": "cat", "isthing": 1, "label": 1},
        {"id": 92, "name": "sky", "isthing": 0, "label": 2})
    assert len(convert(str(tmp_path), c)["config"]["categories"]) == 133


def test_converting_from_the_command_line(tmp_path, fake_tensorflow, monkeypatch, capsys):
    g, target = golden("ar_vit"), str(tmp_path / "ours.pt")
    write_fake(tmp_path, g.weights)
    presets = {"small": SimpleNamespace(config=Config(pix2seq_config(g.config)))}
    monkeypatch.setitem(sys.modules, "train", SimpleNamespace(PRESETS=presets))
    command = ["model.py", "--convert", str(tmp_path), target]
    monkeypatch.setattr(sys, "argv", [*command, "smal"])
    with pytest.raises(SystemExit, match="unknown preset 'smal', expected one of small"):
        m.main()
    files = write_categories(tmp_path)
    monkeypatch.setattr(
        sys, "argv", [*command, "small", "--categories", *files, "--pieces", "c4.model"])
    m.main()
    assert f"sample.py photo.jpg --ckpt={target}" in capsys.readouterr().out
    config = m.load(target)["config"]
    assert config["vocab"]["pieces"] == "c4.model" and len(config["categories"]) == 2
