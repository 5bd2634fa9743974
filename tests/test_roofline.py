"""Operations and bytes by arithmetic against the compiler's count, and the roofline's rows."""

import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments.bench.roofline as bench_roofline
from experiments.bench import arithmetic, lowerings, networks, subjects, timing
from experiments.bench.arithmetic import Layer, Work
from experiments.bench.roofline import COPY, FULL_PRODUCT, PGD, PRODUCT, TRAINING, Roofline
from experiments.bench.timing import Timed, Timing
from jdistill import nets

SHAPE, BATCH = (12, 12, 2), 8
MODEL = nets.ConvNet(features=((8, 8),), hidden=(32,))
PAGE = pathlib.Path(__file__).parents[1] / "docs" / "performance.md"


def test_layers_of_the_papers_network():
    found = arithmetic.layers(nets.mnist_net(), (28, 28, 1), 128)
    assert found[0] == Layer(
        "conv_0_0", 2 * 128 * 26 * 26 * 32 * 9, 128 * 784, 9 * 32, 128 * 26 * 26 * 32
    )
    names = "conv_0_0 conv_0_1 pool_0 conv_1_0 conv_1_1 pool_1 dense_0 dense_1 logits"
    assert [layer.name for layer in found] == names.split()
    assert all(before.outputs == after.inputs for before, after in itertools.pairwise(found))
    biases = 2 * 32 + 2 * 64 + 2 * 200 + 10
    assert sum(layer.weights for layer in found) + biases == 312_202


def test_counts_are_those_of_the_arrays():
    """Of one layer after the other, from the shapes that the network itself gives."""
    params = nets.init(MODEL, jax.random.key(0), SHAPE)[0]
    inputs = jnp.zeros((BATCH, *SHAPE))
    _, state = MODEL.apply({"params": params}, inputs, capture_intermediates=True)
    for layer in arithmetic.layers(MODEL, SHAPE, BATCH):
        if not layer.name.startswith("pool"):
            outputs = state["intermediates"][layer.name]["__call__"][0]
            assert (params[layer.name]["kernel"].size, outputs.size) == (
                layer.weights,
                layer.outputs,
            )


@pytest.mark.parametrize("kind", ["training", "ascending"])
def test_operations_are_the_compilers(kind):
    """In plain Flax, which has no loop whose body the compiler would count once."""
    network = lowerings.by_flax(networks.plain_net(MODEL))
    step = getattr(lowerings, kind)(network, SHAPE, BATCH)
    costs = jax.jit(step.call).lower(*step.arguments).compile().cost_analysis()
    counted = getattr(arithmetic, kind)(MODEL, SHAPE, BATCH)
    # The compiler also counts what is pointwise.
    assert 1.0 <= costs["flops"] / counted.flops <= 1.5
    # It counts the traffic between operations that the arithmetic takes for one.
    assert 1.0 <= costs["bytes accessed"] / counted.bytes <= 5.0


def test_a_training_step_differs_from_an_attacks_by_the_gradient_of_the_weights():
    there = arithmetic.layers(MODEL, SHAPE, BATCH)
    forward, passes = (sum(getattr(layer, kind) for layer in there) for kind in ("flops", "bytes"))
    image = 4 * BATCH * math.prod(SHAPE)
    assert arithmetic.ascending(MODEL, SHAPE, BATCH) == (2 * forward, 2 * passes + 4 * image)
    assert arithmetic.training(MODEL, SHAPE, BATCH).flops == 3 * forward - there[0].flops


def test_rates_and_the_longer_of_the_two_limits():
    seconds = {PRODUCT: 2.0, FULL_PRODUCT: 4.0, COPY: 8.0, TRAINING: 16.0, PGD: 32.0}
    timed = Timed({name: Timing(99.0, (value,)) for name, value in seconds.items()}, {}, {})
    options = Roofline(num_steps=4, batch_size=BATCH, matmul_size=10, copy_megabytes=1)
    works = {TRAINING: Work(2000, 10**6), PGD: Work(1000, 8 * 10**6)}
    product, full, copy, training, pgd = bench_roofline.rows(options, timed, works)
    assert (product.facts["rate"], full.facts["rate"]) == (1000, 500)  # 2 · 10³ operations
    assert copy.facts == {"rate": 2e6, "unit": "B/s"}  # 8 passes, there and back
    assert (training.ours_s, pgd.ours_s) == (4, 8)
    # 2,000 operations at 1,000 a second, a million bytes at 2 million; and so on.
    assert (training.theirs_s, training.facts["limit"]) == (2, "arithmetic")
    assert (pgd.theirs_s, pgd.facts["limit"]) == (4, "memory")
    assert training.facts["achieved"] == pgd.facts["achieved"] == 0.5
    assert (training.facts["rate"], pgd.facts["rate"]) == (500, 125)


def test_passes_go_over_the_array_as_often_as_counted():
    array = np.arange(5, dtype=np.float32)
    found = bench_roofline.passes(array, 1.0, 1.0)
    np.testing.assert_array_equal(found, array + bench_roofline.PASSES)


def test_the_calls_are_those_that_are_counted():
    params, _ = nets.init(MODEL, jax.random.key(0), SHAPE)
    inputs = np.random.default_rng(0).uniform(0, 1, (BATCH, *SHAPE)).astype(np.float32)
    labels = np.asarray(subjects.logits_fn(params, SHAPE)(inputs)).argmax(1)
    options = Roofline(num_steps=2, batch_size=BATCH, matmul_size=8, copy_megabytes=1, repeats=1)
    calls = bench_roofline.calls(options, params, subjects.Images(inputs, labels))
    works = bench_roofline.works(options, params, SHAPE)
    assert works == {
        TRAINING: arithmetic.training(MODEL, SHAPE, BATCH),
        PGD: arithmetic.ascending(MODEL, SHAPE, BATCH),
    }
    timed = timing.interleaved(calls, repeats=1)
    assert timed.results[PRODUCT].shape == timed.results[FULL_PRODUCT].shape == (8, 8)
    assert timed.results[COPY].nbytes == 10**6
    assert len(timed.results[TRAINING]) == 2  # losses, one per step
    assert [row.peer for row in bench_roofline.rows(options, timed, works)[3:]] == ["roofline"] * 2


def test_the_page_has_the_arithmetic():
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    sizes = (nets.mnist_net(), (28, 28, 1), 128)
    for layer in arithmetic.layers(*sizes):
        numbers = [layer.inputs, layer.weights, layer.outputs]
        cells = [f"{layer.flops / 1e6:,.1f}", *(f"{number:,}" for number in numbers)]
        assert [f"`{layer.name}`", *cells, f"{layer.bytes / 1e6:.2f}"] in rows
    steps = {"training step": arithmetic.training(*sizes), "PGD step": arithmetic.ascending(*sizes)}
    for name, (flops, moved) in steps.items():
        (row,) = (row for row in rows if row[0] == name and len(row) == 6)
        assert row[1:4] == [f"{flops / 1e9:.3f}", f"{moved / 1e6:.0f}", f"{flops / moved:.0f}"]
