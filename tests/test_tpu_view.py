"""The TPU compiler's view: what is read and compared, and what happens without that compiler."""

import importlib.util
import json
import re
from collections import Counter

import jax
import numpy as np
import pytest

from experiments import tpu_view
from experiments.bench import lowerings
from experiments.bench.lowerings import LOWERINGS, PRECISIONS
from experiments.bench.rows import record, text
from experiments.tpu_view import Options
from jdistill import runtime
from jdistill.runtime import tpu
from jdistill.runtime.tpu import Estimate
from tests.libtpu import compiler, needs_libtpu

LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="needs to lack the package libtpu"
)
def test_without_the_compiler_the_error_says_what_to_install(capsys):
    with pytest.raises(SystemExit) as stopped:
        runtime.run_main(tpu_view.main, ["--steps", "pgd"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: expected the package libtpu beside JAX, got none; do `pip ")
    assert message.count("\n") == 1


def test_options(capsys):
    options = tpu_view.parse(["--steps", "sweep", "pgd", "--num-runs", "3", "--json", "rows.json"])
    assert options == Options(steps=("sweep", "pgd"), num_runs=3, json="rows.json")
    assert tpu_view.parse([]).steps == ("training", "sweep", "pgd")
    with pytest.raises(SystemExit):
        tpu_view.parse(["--steps", "evaluation"])
    assert "evaluation" in capsys.readouterr().err
    for bad, message in [
        ({"num_runs": 0}, "num_runs >= 1, got 0"),
        ({"width": -1.0}, "width > 0 .*got -1"),
        ({"steps": ()}, "at least one of steps, got none"),
        ({"json": "rows.md"}, "end in .json, got 'rows.md'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Options(**bad)


PROGRAM = """HloModule jit_call

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %n = f32[2]{0} negate(%p), backend_config={"estimated_cycles":"1000"}
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %f = f32[2]{0} fusion(%a), backend_config={"estimated_cycles":"30"}
  %c = f32[2]{0} custom-call(%f), custom_call_target="ConcatBitcast"
  %w = (s32[], f32[2]{0}) while(%c), condition=%x, body=%y
  ROOT %g = f32[2]{0} fusion(%c), backend_config={"flags":[],"estimated_cycles":"4"}
}
"""


def test_what_is_read_of_a_program():
    costs = {"flops": 5.0, "bytes accessed": 6.0, "optimal_seconds": -0.75}
    found = tpu.read(PROGRAM, costs, 6)
    # The operation without an estimate takes no time; cycles are not what is inside the fusions.
    assert found[:-1] == (5.0, 6.0, 0.25, 34, 6, 1)
    assert found.instructions["f32[2]{0} fusion"] == 2
    assert found.instructions["f32[2]{0} negate"] == 1
    assert found.instructions["(s32[], f32[2]{0}) while"] == 1
    assert tpu.read(PROGRAM, costs | {"optimal_seconds": 0.5}, 0).seconds == 0.5
    assert np.isnan(tpu.read("\nENTRY", costs, 0).seconds)


def estimate(seconds, cycles=10, loops=0, **kinds):
    return Estimate(4e9, 3e6, seconds, cycles, 3 * 10**6, loops, Counter(kinds))


def test_rows_are_compared_with_the_first():
    found = [
        estimate(0.002, fusion=2),
        estimate(0.002, fusion=2),
        estimate(0.002, 11, fusion=2),
        estimate(0.004, 30, fusion=3),
        estimate(0.001, loops=2, fusion=2),
    ]
    rows = tpu_view.compared(Options(), "pgd", list(zip([LOWERINGS[0]] * 5, found, strict=True)))
    assert [row.ratio for row in rows] == [1, 1, 1, 2, None]
    assert [row.facts["cycles_ratio"] for row in rows] == [1, 1, 1.1, 3, None]
    assert [row.facts["same_program"] for row in rows] == [True, True, False, False, False]
    assert [row.note[:16] for row in rows] == ["", "the same program", "", "", "has 2 loops, who"]
    made = record(rows[3], {"device": "a chip"})
    assert (made["name"], made["ours_s"], made["theirs_s"]) == (
        f"PGD step: {LOWERINGS[0].name}",
        0.004,
        0.002,
    )
    assert made["command"] == "python -m experiments.tpu_view --steps pgd"
    assert "| 0.004 " in text(rows)  # no range of calls: none was made


def test_every_lowering_is_asked_about():
    asked = []

    def compile_(step):
        asked.append(step)
        return estimate(0.001 * len(asked), fusion=len(asked))

    options = Options(num_runs=3, width=0.1, batch_size=4)
    found = tpu_view.estimates(options, compile_)
    assert len(asked) == 3 * len(LOWERINGS) + len(PRECISIONS)
    assert [one.name for one, _ in found["training"]] == [one.name for one in LOWERINGS]
    assert asked[len(LOWERINGS)].arguments[1].inputs.shape == (3, 4, 28, 28, 1)
    assert tpu_view.compared(options, "sweep", found["sweep"])[0].name.startswith(
        f"sweep step, 3 runs: {LOWERINGS[0].name}"
    )


def operations(name, lowering, platform):
    """How often each operation is in a step that is lowered for a platform; nothing compiles."""
    step = lowerings.step(name, lowering, width=0.1, batch_size=16, num_runs=1)
    traced = jax.jit(step.call).trace(*step.arguments)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    kinds = ("convolution", "select_and_scatter", "dot_general", "while", "slice")
    return {kind: len(re.findall(rf"stablehlo\.{kind}\b", program)) for kind in kinds}


@pytest.mark.parametrize("name", ["training", "pgd"])
def test_rules_for_the_cpu_are_not_in_a_program_for_tpu(name):
    plain, ours, patches = (operations(name, one, "tpu") for one in LOWERINGS)
    assert ours == plain
    assert plain["convolution"] == {"training": 11, "pgd": 8}[name]
    assert plain["select_and_scatter"] == 2
    assert patches["convolution"] == 0
    assert operations(name, LOWERINGS[1], "cpu")["select_and_scatter"] == 0


@pytest.mark.slow
def test_every_lowering_takes_the_same_step():
    found = []
    for one in LOWERINGS:
        step = lowerings.step("pgd", one, width=0.1, batch_size=2, num_runs=1)
        variables, images, _, _, eps = step.arguments
        draws = np.random.default_rng(0)
        leaves, structure = jax.tree.flatten(variables)
        values = [draws.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
        weights = jax.tree.unflatten(structure, values)
        inputs = draws.uniform(0, 1, images.shape).astype(np.float32)
        radii = np.full(eps.shape, 0.1, np.float32)
        found.append(jax.jit(step.call)(weights, inputs, inputs, np.array([3, 7]), radii))
    for moved in found:
        # A sign step: where a gradient is 0 but for rounding, it may go either way.
        assert np.mean(np.abs(moved - found[1]) > 1e-6) < 0.01
        assert np.mean(np.abs(moved - inputs) > 0.02) > 0.5


def test_patches_times_weights_are_the_convolution():
    inputs = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    found = lowerings.patches_convolution(inputs, kernel, (1, 1), "VALID", dimension_numbers=LAYOUT)
    expected = jax.lax.conv_general_dilated(
        inputs, kernel, (1, 1), "VALID", dimension_numbers=LAYOUT
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
@needs_libtpu
def test_command(tmp_path, capsys):
    path = tmp_path / "rows.json"
    with compiler():
        tpu_view.run(Options(steps=("training",), width=0.1, batch_size=2, json=str(path)))
    assert "not a measurement" in capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert [row["name"] for row in rows] == [f"training step: {one.name}" for one in LOWERINGS]
    assert all(row["ours_s"] > 0 and row["facts"]["Mcycles"] > 0 for row in rows)
    # The library's rules for CPU are not in the program for TPU.
    assert [row["facts"]["same_program"] for row in rows] == [True, True, False]
