"""The commands of `experiments.bench` beside PyTorch and a toolkit: what is timed is the same."""

import json

import jax
import numpy as np
import pytest

import experiments.bench.__main__ as bench
import experiments.bench.data as bench_data
import experiments.bench.vit as bench_vit
from experiments.bench import subjects, torch_side
from experiments.bench.subjects import Images
from experiments.bench.train import (
    ascend,
    full_batches,
    our_training,
    torch_ascend,
    torch_training,
)
from jdistill import nets

pytest.importorskip("torch", reason="needs torch and the toolkits: make parity installs them")

pytestmark = pytest.mark.parity
SHAPE = (16, 16, 1)


@pytest.fixture(scope="module")
def small():
    """Weights of a narrow network, not trained, and digits with the labels that it gives them."""
    model = nets.ConvNet(features=((4, 4),), hidden=(8, 8), num_classes=10)
    params = jax.device_get(nets.init(model, jax.random.key(0), SHAPE)[0])
    inputs = subjects.digits(SHAPE).all.inputs[:16]
    return params, Images(inputs, np.asarray(subjects.logits_fn(params, SHAPE)(inputs)).argmax(1))


@pytest.fixture
def written(small, tmp_path):
    """`written(command, *options)`: the rows of a command on these files."""
    params, images = small
    flat = {f"{layer}/{kind}": v for layer, kinds in params.items() for kind, v in kinds.items()}
    np.savez(tmp_path / "network.npz", **flat)
    levels = np.rint(images.inputs * 255).astype(np.uint8)
    np.savez(tmp_path / "images.npz", inputs=levels, labels=images.labels)

    def run(command, *options):
        files = ["--network", tmp_path / "network.npz", "--images", tmp_path / "images.npz"]
        arguments = [command, *options, "--repeats", 1, *files, "--json", tmp_path / "rows.json"]
        bench.run(bench.parse([*map(str, arguments)]))
        return json.loads((tmp_path / "rows.json").read_text())

    return run


def test_fgsm_beside_the_toolkits(written):
    rows = written("attacks", "--attacks", "fgsm", "--batch-size", 10)
    assert {row["peer"] for row in rows} == {"torchattacks", "foolbox"}
    assert rows[0]["theirs_s"] <= rows[1]["theirs_s"]
    for row in rows:
        assert row["note"] == ""
        ours, theirs = row["facts"]["success"]  # one step, the same for all of them
        assert ours == theirs > 0
        assert "--attacks fgsm --batch-size 10" in row["command"]
        assert {"torch", "foolbox"} <= set(row["versions"])


def test_train_beside_pytorch(written):
    rows = written("train", "--batch-size", 4, "--num-steps", 2)
    assert [(row["peer"], row["note"]) for row in rows] == [("PyTorch", "")] * 3
    assert all(row["ratio"] > 0 and row["torch_threads"] for row in rows)


def test_vit_beside_pytorch(tmp_path):
    sizes = ["--patch-sizes", 14, "--width", 8, "--depth", 1, "--num-heads", 2, "--num-steps", 2]
    sizes += ["--batch-size", 4, "--repeats", 1, "--json", tmp_path / "rows.json"]
    bench.run(bench.parse([*map(str, ["vit", *sizes])]))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["peer"], row["note"]) for row in rows] == [("PyTorch", "")] * 2
    assert all(row["ratio"] > 0 and row["torch_threads"] for row in rows)


def test_vit_steps_and_ascent_are_pytorchs():
    options = bench_vit.Vit(num_steps=3, batch_size=6)
    model = nets.ViT(4, 16, 2, 2)
    images = Images(*(column[:18] for column in subjects.digits(SHAPE).all))
    calls = bench_vit.calls(options, model, images, beside_torch=True)
    for _ in range(2):  # the second goes on from the first, with its momentum
        ours, theirs = calls[bench_vit.STEP](), calls[bench_vit.STEP_PEER]()
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    ours, theirs = calls[bench_vit.GRADIENT](), calls[bench_vit.GRADIENT_PEER]()
    apart = np.abs(np.asarray(ours) - theirs.numpy().transpose(0, 2, 3, 1))
    assert (apart > 1e-5).mean() < 0.01  # a gradient next to 0 may have either sign
    assert np.abs(np.asarray(ours) - images.inputs[:6]).max() > 0.09


def test_training_steps_give_pytorchs_losses(small):
    params, images = small
    batches = full_batches(images, 8, 3)
    tensors = [torch_side.torch_batch(batch.inputs, batch.labels) for batch in batches]
    settings = {"dropout_rate": 0.0, "learning_rate": 0.05}
    ours, theirs = our_training(params, SHAPE, **settings), torch_training(params, **settings)
    # The later losses are those of the updated weights: momentum and all are the same.
    first = ours(batches)
    np.testing.assert_allclose(first, theirs(tensors), atol=1e-4)
    again = ours(batches)
    np.testing.assert_allclose(again, theirs(tensors), atol=1e-4)
    assert np.abs(again - first).max() > 1e-3


def test_dropout_is_where_ours_is(small):
    params, images = small
    model = torch_side.torch_network(params, dropout_rate=0.5)
    names = [type(layer).__name__ for layer in model]
    assert names[-6:] == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Linear"]
    assert "Dropout" not in [type(layer).__name__ for layer in torch_side.torch_network(params)]
    batch, _ = torch_side.torch_batch(*images)
    assert not np.array_equal(model.train()(batch), model(batch))
    np.testing.assert_array_equal(model.eval()(batch), model(batch))


def test_ascent_is_pytorchs(small):
    params, images = small
    ours = ascend(subjects.logits_fn(params, SHAPE), *images, 0.1, num_steps=3)
    batch = torch_side.torch_batch(*images)
    theirs = torch_ascend(torch_side.torch_network(params), *batch, 0.1, num_steps=3)
    apart = np.abs(np.asarray(ours) - theirs.numpy().transpose(0, 2, 3, 1))
    assert (apart > 1e-5).mean() < 0.01  # a gradient next to 0 may have either sign
    assert np.abs(np.asarray(ours) - images.inputs).max() > 0.09


def test_epoch_beside_a_data_loader():
    options = bench_data.Data(num_examples=10, batch_size=4)
    calls = bench_data.calls(options, (4, 4, 1), beside_torch=True)
    count, (images, labels) = calls[bench_data.LOADER]()
    assert (count, tuple(images.shape), tuple(labels.shape)) == (3, (2, 4, 4, 1), (2,))
