"""The plan of a study: what the TPU compiler says of its programs, and what it is multiplied by."""

import functools
import json
import math

import jax
import numpy as np
import pytest

from jdistill import attacks, nets, study, train
from jdistill._jax import backend, planned_for
from jdistill.attacks._core import rows
from jdistill.commands import _plan as command
from jdistill.evaluate import AttackPlan
from jdistill.runtime import tpu
from jdistill.study import Stage, Study, _plan, _programs
from tests.libtpu import compiler, needs_libtpu

DRAWS = np.random.default_rng(0)
NUM_TRAIN, NUM_TEST, SIDE = 256, 64, 8


def split(size):
    return DRAWS.uniform(0, 1, (size, SIDE, SIDE, 1)).astype(np.float32), np.arange(size) % 10


DATA = split(NUM_TRAIN), split(NUM_TEST)


@pytest.fixture
def library():
    with compiler():
        yield


def stage(width, num_epochs=2):
    model = nets.digits_net(width=width)
    return Stage(model=model, optimizer=train.sgd(0.05), num_epochs=num_epochs)


def study_of(**changed):
    """Two architectures in two chains that begin alike."""
    wide, narrow = stage(0.5), stage(0.25)
    settings = {
        "data": DATA,
        "chains": {"none": (wide, narrow), "one": (wide, wide, narrow)},
        "temperatures": (1.0, 20.0),
        "seeds": (0, 1),
        "batch_size": 32,
        "attacks": {"fgsm": functools.partial(attacks.fgsm, eps=0.1)},
    }
    return Study(**{**settings, **changed})


def dense(key, shape):
    first, second = jax.random.split(key)
    size = math.prod(shape)
    return {
        "first": jax.random.normal(first, (size, 256)),
        "second": jax.random.normal(second, (256, 10)),
    }


def apply_dense(params, inputs):
    flat = inputs.reshape(inputs.shape[0], -1)
    return jax.nn.relu(flat @ params["first"]) @ params["second"]


DENSE = Stage(model=(dense, apply_dense), optimizer=train.sgd(0.05), num_epochs=3)
# Of one example, forward: two for each weight.
DENSE_FLOPS = 2 * (SIDE * SIDE * 256 + 256 * 10)


def test_without_the_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(
        ImportError, match=r"libtpu beside JAX, got none; do `pip install 'jdistill"
    ):
        study.plan(study_of(), "v5e:1x1")


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:2,2", "v5e:0x1", "4x4", ""])
def test_what_is_no_topology(name):
    with pytest.raises(ValueError, match=r"expected a topology such as v5e:1x1 .*name the chip"):
        tpu.topology(name)


@pytest.mark.parametrize(("name", "axes"), [("v5e:2x2x2", "2"), ("v5p:4x4", "3")])
def test_a_topology_has_the_axes_of_its_chip(name, axes):
    with pytest.raises(ValueError, match=f"expected {axes} axes of chips"):
        tpu.topology(name)


def test_bad_command_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu, "check_compiler", lambda: None)
    with pytest.raises(ValueError, match=r"expected one of digits, .* or a Python file, got 'cat'"):
        command.run(["cat"])
    with pytest.raises(FileNotFoundError, match="which is neither"):
        command.run([str(tmp_path / "none.py")])
    with pytest.raises(ValueError, match=r"end in \.json"):
        command.run(["digits", "--json", "plan.txt"])
    with pytest.raises(ValueError, match="expected no --workdir for a plan"):
        command.run(["digits", "--workdir", "runs/x"])


def test_bytes_that_chips_exchange_are_read_off_the_program():
    program = """
ENTRY %main {
  %a = f32[784,10]{0,1:T(8,128)} all-reduce(%fusion), channel_id=1
  %b = (bf16[8]{0:T(128)}, s32[2,2]{1,0}) all-gather-start(%x), dimensions={0}
  %c = f32[8]{0} add(%x, %y)
}
"""
    found = tpu.read(program, {}, 0).communication
    assert found == {"all-reduce": 4 * 7840, "all-gather": 2 * 8 + 4 * 4}


def test_multiplications_of_loops():
    inputs, weights = jax.ShapeDtypeStruct((3, 4), np.float32), np.ones((4, 4), np.float32)

    def call(x):
        x, _ = jax.lax.scan(lambda x, _: (x @ weights, None), x, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ weights @ weights, lambda: x @ weights)

    once = 3 * 4 * 4
    assert rows.executed_and_once(call, inputs) == (7 * once, 3 * once)


def test_stages_are_counted_once_and_networks_chain_by_chain():
    plain = study_of()
    examples = plain.examples()
    wide, narrow = _programs.networks_of(plain, examples)
    per_epoch = NUM_TRAIN // 32
    # The second chain adds an assistant and a student: the teachers are one.
    assert wide.roles == {"teacher": 1, "assistant": 1}
    assert narrow.roles == {"student": 2}
    assert (wide.num_steps, narrow.num_steps) == (4 * per_epoch, 4 * per_epoch)
    assert sum(size * count for (_, size), count in _programs.stacks(plain, examples).items()) == 5


def test_a_tracing_for_another_platform_takes_its_branches():
    assert backend() == "cpu"
    with planned_for("tpu"):
        assert backend() == "tpu"
    assert backend() == "cpu"


SMALL = {
    "pgd": AttackPlan(functools.partial(attacks.pgd, eps=0.1, num_steps=5), 32, batch_size=16),
    "cw": AttackPlan(functools.partial(attacks.carlini_wagner_l2, num_searches=2, num_steps=5), 16),
    "autoattack": AttackPlan(functools.partial(attacks.autoattack, eps=0.1), 16),
}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:4x4"])
def test_everything_compiles_and_fits(library, topology):
    wide, narrow = stage(0.5), stage(0.25)
    planned = study_of(chains=[wide, narrow, wide], attacks=SMALL, initial_epochs=1)
    plan = study.plan(planned, topology, largest=False)
    num_chips = {"v5e:1x1": 1, "v5e:4x4": 16}[topology]
    assert len(plan.topology.devices) == num_chips
    assert all(row.fits and 0 < row.memory < 0.9 * 16e9 for row in plan.rows)
    by_part = {row.part: row for row in plan.rows}
    assert by_part["training"].chips == by_part["sweep"].chips == num_chips
    assert by_part["attack"].chips == by_part["forward"].chips == 1
    # Gradients are added up over the chips, and runs know nothing of each other.
    assert set(by_part["training"].communication) == ({"all-reduce"} if num_chips > 1 else set())
    assert by_part["sweep"].communication == {}
    assert by_part["initial"].calls == 2 * NUM_TRAIN // 32  # a pass for each seed
    names = " ".join(row.program for row in plan.rows if row.part == "attack")
    for part in ("pgd", "cw", "APGD", "FAB", "Square"):
        assert part in names
    shown = str(plan)
    assert "estimate and not a measurement: nothing was run on a TPU" in shown
    assert shown.count("training step: ") == 2


@needs_libtpu
@pytest.mark.slow
def test_attacks_compile_with_their_examples_split_over_chips(library):
    devices = tpu.topology("v5e:4x4").devices
    plain = study_of()
    with planned_for("tpu"):
        network = _programs.networks_of(plain, plain.examples())[0]
        stack = _programs.stacked(train.logits_fn(network.step, network.state), 2)
        for plan in (SMALL["pgd"], SMALL["cw"]):
            program = _programs.attack_program(plan.attack, stack, 32, (SIDE, SIDE, 1), devices)
            found = tpu.compiled(program.jitted, *program.arguments, hasty=True)
            assert 0 < found.memory < 0.9 * 16e9
            # The inputs and the weights stay where they are; what is exchanged says who is done.
            assert sum(found.communication.values()) < 4 * 32 * SIDE * SIDE


@needs_libtpu
@pytest.mark.slow
def test_flops_are_those_of_an_analytical_count(library):
    steps = 7
    planned = study_of(
        chains=[DENSE] * 2,
        batch_size=128,  # what is done to weights and not to examples is not counted
        attacks={
            "pgd": AttackPlan(functools.partial(attacks.pgd, eps=0.1, num_steps=steps), 32),
            "pgd on the host": AttackPlan(
                functools.partial(
                    attacks.ensemble,
                    attacks=[functools.partial(attacks.pgd, eps=0.1, num_steps=steps)],
                ),
                32,
            ),
        },
    )
    plan = study.plan(planned, "v5e:1x1", largest=False)
    total = {row.program.split(":")[0]: row.flops * row.calls for row in plan.rows}
    trained = 2 * 4 * 3 * NUM_TRAIN  # generations, runs, epochs
    # The gradient of the first layer's inputs is not asked for.
    training = trained * (3 * DENSE_FLOPS - 2 * SIDE * SIDE * 256)
    assert total["training step"] == pytest.approx(training, rel=0.1)
    assert total["sweep step"] == pytest.approx(training, rel=0.15)
    labeled = 4 * (512 + 2 * 512)  # runs; the training set and each network's test set, padded
    assert total["forward"] == pytest.approx(labeled * DENSE_FLOPS, rel=0.1)
    # Weights get no gradient; the clean input and the verification are passes of their own.
    attacked = 2 * 4 * 32 * (2 * steps + 2) * DENSE_FLOPS
    assert total["pgd of a stack of 2"] == pytest.approx(attacked, rel=0.2)
    assert total["pgd on the host"] == pytest.approx(attacked, rel=0.2)


@needs_libtpu
@pytest.mark.slow
def test_the_largest_size_fits_and_more_does_not(library):
    devices = tpu.topology("v5e:1x1").devices
    planned = study_of(chains=[DENSE] * 2)
    examples = planned.examples()
    with planned_for("tpu"):
        networks = _programs.networks_of(planned, examples)
        (program,) = _programs.training_programs(planned, examples, networks, devices)
        program = program._replace(most=10**9)
        found = _plan.estimate(program)
        budget = 20 * found.memory
        most = _plan.largest_of(program, found, budget)
        used = _plan.estimate(program.resized(most)).memory
        assert 0.7 * budget < used <= budget
        assert _plan.estimate(program.resized(2 * most)).memory > budget
        assert _plan.largest_of(program, found, 1.0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_everything_lowers_for(platform):
    wide, narrow = stage(0.5), stage(0.25)
    planned = study_of(chains=[wide, narrow, wide], attacks=SMALL)
    examples = planned.examples()
    device = jax.devices()[:1]
    with planned_for(platform):
        networks = _programs.networks_of(planned, examples)
        programs = [
            *_programs.training_programs(planned, examples, networks, device),
            *_programs.sweep_programs(planned, examples, networks, device),
            *_programs.forward_programs(planned, examples, networks, device),
            *_programs.attack_programs(planned, examples, device, []),
        ]
        # Of AutoAttack APGD on two losses, FAB, and Square.
        assert len(programs) == 2 * (1 + 1 + 1 + 2 + 4)
        for program in programs:
            lowered = program.jitted.trace(*program.arguments).lower(lowering_platforms=(platform,))
            assert "stablehlo.dot_general" in lowered.as_text()


OWN = """
import functools
from jdistill import attacks, data, nets, train
from jdistill.study import Stage, Study

def study(width: float = 0.5):
    stage = Stage(model=nets.digits_net(width=width), optimizer=train.sgd(0.05), num_epochs=1)
    fgsm = functools.partial(attacks.fgsm, eps=0.1)
    load = functools.partial(data.load, "digits")
    return Study(data=load, chains=[stage] * 2, attacks={"fgsm": fgsm})
"""


@needs_libtpu
@pytest.mark.slow
def test_command(library, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    file, path = tmp_path / "own.py", tmp_path / "plan.json"
    file.write_text(OWN)
    command.run([str(file), "--no-largest", "--width", "0.25", "--json", str(path)])
    shown = capsys.readouterr().out
    assert shown.startswith("v5e:1x1: 1 chip of 16 GB")
    assert "training step: teacher, student (" in shown
    kept = json.loads(path.read_text())
    assert (kept["topology"], kept["chips"], kept["measured"]) == ("v5e:1x1", 1, False)
    assert {row["part"] for row in kept["rows"]} >= {"training", "sweep", "forward", "attack"}
