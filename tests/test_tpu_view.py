"""The TPU compiler's view: what is read and compared, and what happens without that compiler."""

import importlib.util
import json
import re
from collections import Counter

import jax
import numpy as np
import pytest

from experiments import lowerings, tpu_view
from experiments.lowerings import LOWERINGS, PRECISIONS
from experiments.tpu_view import Estimate, Options, Row
from jdistill import nets, runtime

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
LAYOUT = ("NHWC", "HWIO", "NHWC")


def test_without_the_compiler_the_error_says_what_to_install(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find(name)
    )
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
        ({"num_runs": 0}, "num_runs .*got 0"),
        ({"width": -1.0}, "width .*got -1"),
        ({"steps": ()}, "at least one step, got none"),
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
    found = tpu_view.read(PROGRAM, costs, (1, 2, 3), 9.0)
    assert (found.flops, found.bytes, found.memory) == (5.0, 6.0, 6)
    assert found.optimal_seconds == 0.25  # the operation without an estimate takes no time
    assert found.cycles == 34  # and not what is inside the fusions
    assert found.loops == 1
    assert found.instructions["f32[2]{0} fusion"] == 2
    assert found.instructions["f32[2]{0} negate"] == 1
    assert found.instructions["(s32[], f32[2]{0}) while"] == 1
    assert tpu_view.read("\nENTRY", costs, (0, 0, 0), 1.0).optimal_seconds is None
    assert (
        tpu_view.read(PROGRAM, costs | {"optimal_seconds": 0.5}, (0,) * 3, 1).optimal_seconds == 0.5
    )


def estimate(seconds, cycles=10, loops=0, **kinds):
    return Estimate(4e9, 3e6, seconds, cycles, 10**6, 10**6, 10**6, loops, Counter(kinds), 1.0)


def test_rows_are_compared_with_the_first():
    first = estimate(0.002, fusion=2)
    same = Row("a", "b", estimate(0.002, fusion=2), first)
    assert not Row("a", "b", estimate(0.002, 11, fusion=2), first).same
    slower = Row("a", "c", estimate(0.004, 30, fusion=3), first)
    looped = Row("a", "d", estimate(0.001, loops=2, fusion=2, other=1), first)
    unknown = Row("a", "e", estimate(None), first)
    assert (same.ratio, same.cycles_ratio) == (1.0, 1.0)
    assert same.note == "the same program as the first"
    assert (slower.ratio, slower.cycles_ratio, slower.note) == (2.0, 3.0, "")
    assert (looped.ratio, looped.cycles_ratio) == (None, None)
    assert "2 loops" in looped.note
    assert unknown.ratio is None
    assert Row("a", "b", first, first).note == ""
    record = json.loads(json.dumps(tpu_view.record(slower, {"device": "a chip"})))
    assert (record["row"], record["peer"], record["device"]) == (
        "a: c",
        LOWERINGS[0].name,
        "a chip",
    )
    assert (record["ours_s"], record["theirs_s"], record["ratio"]) == (0.004, 0.002, 2.0)
    assert not record["same_program"]
    assert "not a measurement" in record["note"]


def test_the_table_has_all_lowerings_and_the_runs_one_by_one():
    asked = []

    def compile_(step):
        asked.append(step)
        return estimate(0.001 * len(asked), fusion=len(asked))

    rows = tpu_view.estimates(Options(num_runs=3, width=0.1, batch_size=4), compile_)
    assert len(rows) == len(asked) == 3 * len(LOWERINGS) + len(PRECISIONS)
    assert [row.lowering for row in rows[: len(LOWERINGS)]] == [one.name for one in LOWERINGS]
    assert asked[len(LOWERINGS)].arguments[1].inputs.shape == (3, 4, 28, 28, 1)
    lines = tpu_view.text(rows, 3).splitlines()
    assert len(lines) == 2 + len(rows) + 1
    cells = [cell.strip() for cell in lines[-8].strip("|").split("|")]
    assert cells[:6] == ["sweep step, 3 runs", "3 × the training step", "12", "9", "3.000", "0.50"]


def operations(name, lowering, platform):
    """How often each operation is in a step that is lowered for a platform; nothing compiles."""
    with lowerings.written(lowering):
        step = lowerings.step(name, lowering, width=0.1, batch_size=16, num_runs=1)
        traced = jax.jit(step.call).trace(*step.arguments)
        program = traced.lower(lowering_platforms=(platform,)).as_text()
    kinds = ("convolution", "select_and_scatter", "dot_general", "while", "slice")
    return {kind: len(re.findall(rf"stablehlo\.{kind}\b", program)) for kind in kinds}


@pytest.mark.parametrize("name", ["training", "pgd"])
def test_rules_for_the_cpu_are_not_in_a_program_for_tpu(name):
    plain, ours, rules, patches, mask = (operations(name, one, "tpu") for one in LOWERINGS)
    assert ours == plain
    assert plain["convolution"] == {"training": 11, "pgd": 8}[name]
    assert plain["select_and_scatter"] == 2
    assert mask == plain | {"select_and_scatter": 0, "slice": mask["slice"]}
    assert patches["convolution"] == 0
    assert rules["slice"] > plain["slice"]  # of the surplus rows
    on_cpu = operations(name, LOWERINGS[1], "cpu")
    assert (on_cpu["convolution"], on_cpu["dot_general"]) == (
        rules["convolution"],
        rules["dot_general"],
    )
    assert on_cpu["select_and_scatter"] == 0


@pytest.mark.slow
def test_every_lowering_takes_the_same_step():
    found = []
    for one in LOWERINGS:
        with lowerings.written(one):
            step = lowerings.step("pgd", one, width=0.1, batch_size=2, num_runs=1)
            variables, images, _, _, eps = step.arguments
            leaves, structure = jax.tree.flatten(variables)
            draws = np.random.default_rng(0)
            values = [draws.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
            inputs = draws.uniform(0, 1, images.shape).astype(np.float32)
            weights = jax.tree.unflatten(structure, values)
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
    expected = nets.conv_general_dilated(inputs, kernel, (1, 1), "VALID", dimension_numbers=LAYOUT)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_rules_are_put_back():
    from jdistill.nets import _convnet, _convolution_rules, _pooling

    with lowerings.written(lowerings.Lowering("both", "cpu rules", "mask")):
        assert _pooling.lax is not jax.lax
        assert _convolution_rules.lax.platform_dependent(1, cpu=lambda x: x + 1, default=None) == 2
    assert _pooling.lax is _convolution_rules.lax is jax.lax
    assert _convnet.max_pool is nets.max_pool


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LIBTPU, reason="needs the package libtpu")
def test_command(tmp_path, capsys, monkeypatch):
    for name, value in tpu_view.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tpu_view, "LOWERINGS", LOWERINGS[:3])
    path = tmp_path / "rows.json"
    tpu_view.run(Options(steps=("training",), width=0.1, batch_size=2, json=str(path)))
    assert "not a measurement" in capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert [row["row"] for row in rows] == [f"training step: {one.name}" for one in LOWERINGS[:3]]
    assert all(row["ours_s"] > 0 and row["cycles"] > 0 for row in rows)
    # The library's rules for CPU are not in the program for TPU.
    assert [row["same_program"] for row in rows] == [True, True, False]
