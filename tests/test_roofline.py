"""Operations and bytes by arithmetic against the compiler's count, and the roofline's command."""

import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import arithmetic, bench, bench_options, bench_roofline, steps
from experiments.arithmetic import Layer, Work
from experiments.timing import Timed, Timing
from jdistill import nets

SHAPE, BATCH = (12, 12, 2), 8
# No loop, whose body the compiler would count once.
MODEL = nets.ConvNet(
    features=((8, 8),), hidden=(32,), conv_general_dilated=jax.lax.conv_general_dilated
)


def test_layers_of_the_papers_network():
    found = arithmetic.layers(nets.mnist_net(), (28, 28, 1), 128)
    assert found[0] == Layer(
        "conv_0_0", 2 * 128 * 26 * 26 * 32 * 9, 128 * 784, 9 * 32, 128 * 26 * 26 * 32
    )
    assert [layer.name for layer in found] == [
        *("conv_0_0", "conv_0_1", "pool_0", "conv_1_0", "conv_1_1", "pool_1"),
        *("dense_0", "dense_1", "logits"),
    ]
    for before, after in itertools.pairwise(found):
        assert before.outputs == after.inputs
    biases = 2 * 32 + 2 * 64 + 2 * 200 + 10
    assert sum(layer.weights for layer in found) + biases == 312_202
    params, _ = nets.init(MODEL, jax.random.key(0), SHAPE)
    for layer in arithmetic.layers(MODEL, SHAPE, BATCH):
        if not layer.name.startswith("pool"):
            assert params[layer.name]["kernel"].size == layer.weights


def test_forward_counts_are_those_of_the_arrays():
    """Of one layer after the other, from the shapes that the network itself gives."""
    _, state = MODEL.apply(
        {"params": nets.init(MODEL, jax.random.key(0), SHAPE)[0]},
        jnp.zeros((BATCH, *SHAPE)),
        capture_intermediates=True,
    )
    outputs = state["intermediates"]
    for layer in arithmetic.layers(MODEL, SHAPE, BATCH):
        if not layer.name.startswith("pool"):
            assert outputs[layer.name]["__call__"][0].size == layer.outputs


@pytest.mark.parametrize("kind", ["training", "ascending"])
def test_operations_are_the_compilers(kind):
    counted = getattr(arithmetic, kind)(MODEL, SHAPE, BATCH)
    compiled = bench_roofline.compiled_work(getattr(steps, kind)(MODEL, SHAPE, BATCH))
    # The compiler also counts what is pointwise, and dropout's random bits.
    assert 1.0 <= compiled.flops / counted.flops <= 1.5
    # It counts the traffic between operations that the arithmetic takes for one.
    assert 1.0 <= compiled.bytes / counted.bytes <= 5.0
    wider = MODEL.clone(features=((16, 16),))
    assert getattr(arithmetic, kind)(wider, SHAPE, BATCH).flops > 2 * counted.flops


def test_a_training_step_differs_from_an_attacks_by_the_gradient_of_the_weights():
    there = arithmetic.layers(MODEL, SHAPE, BATCH)
    forward = sum(layer.flops for layer in there)
    assert arithmetic.ascending(MODEL, SHAPE, BATCH).flops == 2 * forward
    assert arithmetic.training(MODEL, SHAPE, BATCH).flops == 3 * forward - there[0].flops
    image = 4 * BATCH * math.prod(SHAPE)
    passes = sum(layer.bytes for layer in there)
    assert arithmetic.ascending(MODEL, SHAPE, BATCH).bytes == 2 * passes + 4 * image


def test_the_limit_is_the_longer_of_the_two():
    def point(work, seconds):
        return bench_roofline.Point(
            "a step", Timing(9.0, (seconds,)), 2, work, work, flops_rate=100.0, bytes_rate=10.0
        )

    arithmetic_bound = point(Work(200, 10), 8.0)
    assert arithmetic_bound.seconds == 4.0
    assert arithmetic_bound.limits == {"arithmetic": 2.0, "memory": 1.0}
    assert (arithmetic_bound.binding, arithmetic_bound.achieved) == ("arithmetic", 0.5)
    memory_bound = point(Work(200, 30), 8.0)
    assert (memory_bound.binding, memory_bound.achieved) == ("memory", 0.75)


def test_rates_are_operations_and_bytes_over_seconds():
    names = ("PRODUCT", "FULL_PRODUCT", "COPY", "TRAINING", "PGD")
    timings = {
        getattr(bench_roofline, name): Timing(9.0, (seconds,))
        for name, seconds in zip(names, (2.0, 4.0, 8.0, 16.0, 32.0), strict=True)
    }
    sizes = {"num_steps": 4, "batch_size": BATCH, "matmul_size": 10, "copy_megabytes": 1}
    found = bench_roofline.points(Timed(timings, {}, {}), MODEL, SHAPE, **sizes)
    training, pgd = found.points
    assert (training.flops_rate, pgd.flops_rate) == (1000.0, 500.0)  # 2 · 10³ operations
    assert training.bytes_rate == pgd.bytes_rate == 2e6  # 8 passes, there and back
    assert (training.seconds, pgd.seconds) == (4.0, 8.0)
    assert training.work == arithmetic.training(MODEL, SHAPE, BATCH)
    assert pgd.work == arithmetic.ascending(MODEL, SHAPE, BATCH)


def test_passes_go_over_the_array_as_often_as_counted():
    array = np.arange(5, dtype=np.float32)
    found = bench_roofline._passes(array, 1.0, 1.0)
    np.testing.assert_array_equal(found, array + bench_roofline._PASSES)


def test_roofline_command(tmp_path, capsys):
    model = nets.ConvNet(features=((4, 4),), hidden=(8, 6), num_classes=10)
    params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
    inputs = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1)).astype(np.uint8)
    logits = nets.logits_fn(model, {"params": params})(inputs.astype(np.float32) / 255)
    flat = {f"{layer}/{kind}": v for layer, kinds in params.items() for kind, v in kinds.items()}
    np.savez(tmp_path / "network.npz", **flat)
    np.savez(tmp_path / "images.npz", inputs=inputs, labels=np.asarray(logits).argmax(1))
    output = tmp_path / "rows.json"
    arguments = ["--num-steps", "2", "--batch-size", "4", "--repeats", "1", "--json", output]
    arguments += ["--matmul-size", "8", "--copy-megabytes", "1"]
    arguments += ["--network", tmp_path / "network.npz", "--images", tmp_path / "images.npz"]
    bench.run(bench.parse(["roofline", *map(str, arguments)]))
    rows = json.loads(output.read_text())
    assert [row["row"] for row in rows[:3]] == list(
        (bench_roofline.PRODUCT, bench_roofline.FULL_PRODUCT, bench_roofline.COPY)
    )
    for row in rows[:3]:
        assert row["rate"] > 0
        assert row["note"].endswith(row["unit"])
    for row, work in zip(rows[3:], (arithmetic.training, arithmetic.ascending), strict=True):
        assert (row["flops"], row["bytes"]) == work(model, (8, 8, 1), 4)
        assert row["compiler_flops"] >= row["flops"]
        assert row["theirs_s"] == pytest.approx(max(row["limits_s"].values()))
        assert row["achieved"] == pytest.approx(1 / row["ratio"])
        assert row["limit"] in ("arithmetic", "memory")
    printed = capsys.readouterr().out
    assert "training step, batch 4" in printed
    assert "achieved" in printed


def test_the_page_has_the_arithmetic():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "performance.md").read_text("utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    sizes = (nets.mnist_net(), (28, 28, 1), 128)
    for layer in arithmetic.layers(*sizes):
        numbers = [layer.inputs, layer.weights, layer.outputs]
        millions = [f"{layer.flops / 1e6:,.1f}", *(f"{number:,}" for number in numbers)]
        assert [f"`{layer.name}`", *millions, f"{layer.bytes / 1e6:.2f}"] in rows
    for name, work in (
        ("training step", arithmetic.training(*sizes)),
        ("PGD step", arithmetic.ascending(*sizes)),
    ):
        (row,) = (row for row in rows if row[0] == name and len(row) == 6)
        assert row[1] == f"{work.flops / 1e9:.3f}"
        assert row[2] == f"{work.bytes / 1e6:.0f}"
        assert row[3] == f"{work.flops / work.bytes:.0f}"


def test_options_of_the_roofline():
    options = bench.parse(["roofline", "--matmul-size", "64"])
    assert (options.matmul_size, options.copy_megabytes, options.batch_size) == (64, 256, 128)
    with pytest.raises(ValueError, match=r"copy_megabytes .*got 0"):
        bench_options.Roofline(copy_megabytes=0)
