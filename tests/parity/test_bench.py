"""The commands of `experiments.bench` with the real peers, at their smallest."""

import json

import jax
import numpy as np
import pytest

from experiments import bench, bench_data, bench_train, npz_network, torch_side
from jdistill import nets

pytest.importorskip("torch", reason="needs torch and the toolkits: make parity installs them")

pytestmark = pytest.mark.parity


def test_fgsm_beside_the_toolkits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests want what was compiled
    output = tmp_path / "bench.md"
    arguments = ["--attacks", "fgsm", "--batch-size", "30", "--repeats", "1"]
    bench.run(bench.parse(["attacks", *arguments, "--output", str(output)]))
    (row,) = json.loads(output.with_suffix(".json").read_text())["attacks"]
    assert row["skipped"] == {}
    assert set(row["peers"]) == {"torchattacks", "foolbox"}
    for found in (row["jdistill"], *row["peers"].values()):
        assert found["median_seconds"] > 0
        # One step, the same for all of them.
        assert found["success_rate"] == row["jdistill"]["success_rate"]
    assert f"| {row['fastest_peer']} " in capsys.readouterr().out


@pytest.fixture(scope="module")
def small():
    """Weights of a narrow network, and images `[16, 28, 28, 1]` with labels."""
    inputs, labels = npz_network.read_images(bench._FILES / "images.npz")
    return npz_network.read_params(bench._FILES / "plain_small.npz"), inputs[:16], labels[:16]


def test_training_steps_give_pytorchs_losses(small):
    params, *examples = small
    batches = bench_train.full_batches(*examples, 8, 3)
    tensors = [torch_side.torch_batch(batch.inputs, batch.labels) for batch in batches]
    options = {"dropout_rate": 0.0, "learning_rate": 0.05}
    ours = bench_train.our_training(params, (28, 28, 1), **options)
    theirs = bench_train.torch_training(params, **options)
    # The later losses are those of the updated weights: momentum and all are the same.
    losses = ours(batches)
    np.testing.assert_allclose(losses, theirs(tensors), atol=1e-4)
    again = ours(batches)
    np.testing.assert_allclose(again, theirs(tensors), atol=1e-4)
    assert np.abs(again - losses).max() > 1e-3


def test_dropout_is_where_ours_is(small):
    params = small[0]
    model = torch_side.torch_network(params, dropout_rate=0.5)
    names = [type(layer).__name__ for layer in model]
    assert names[-6:] == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Linear"]
    assert "Dropout" not in [type(layer).__name__ for layer in torch_side.torch_network(params)]
    images, _ = torch_side.torch_batch(*small[1:])
    assert not np.array_equal(model.train()(images), model(images))
    np.testing.assert_array_equal(model.eval()(images), model(images))


def test_ascent_is_pytorchs(small):
    params, *examples = small
    model = npz_network.conv_net(params, (28, 28, 1))
    logits_fn = nets.logits_fn(model, {"params": params})
    ours = bench_train.ascend(logits_fn, *examples, 0.1, num_steps=3)
    images = torch_side.torch_batch(*examples)
    theirs = bench_train.torch_ascend(torch_side.torch_network(params), *images, 0.1, num_steps=3)
    apart = np.abs(np.asarray(ours) - theirs.numpy().transpose(0, 2, 3, 1))
    assert (apart > 1e-5).mean() < 0.01  # a gradient next to 0 may have either sign
    assert np.abs(np.asarray(ours) - examples[0]).max() > 0.09


def test_train_beside_pytorch(tmp_path, capsys):
    output = tmp_path / "rows.json"
    network = ["--network", str(bench._FILES / "plain_small.npz"), "--json", str(output)]
    sizes = ["--batch-size", "4", "--num-steps", "2", "--repeats", "1"]
    bench.run(bench.parse(["train", *network, *sizes]))
    for row in json.loads(output.read_text()):
        assert row["peer"] == "PyTorch"
        assert row["ratio"] == pytest.approx(row["ours_s"] / row["theirs_s"])
        assert row["note"] == ""
        assert "torch" in row["versions"]
    assert "PyTorch with" in capsys.readouterr().out


def test_epoch_beside_a_data_loader():
    timed = bench_data.compare(10, shape=(4, 4, 1), batch_size=4, repeats=1, missing=None)
    count, (images, labels) = timed.results[bench_data.LOADER]
    assert count == 3
    assert (tuple(images.shape), tuple(labels.shape)) == ((2, 4, 4, 1), (2,))
    rows = bench_data.rows(timed, num_examples=10, batch_size=4, missing=None)
    assert [row.theirs is not None for row in rows] == [True, True]
