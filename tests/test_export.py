"""Networks as files: read back the same, on every version, or refused clearly.

Run as a program it writes or reads one export: the folders in `fixtures/export` are what each of
the supported versions wrote, `.venv-floor/bin/python tests/test_export.py save FOLDER`.
"""

import functools
import json
import logging
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdistill import _fingerprint, attacks, evaluate, export, nets, train
from jdistill.export import _folder

ROOT = pathlib.Path(__file__).parents[1]
FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "export"
SHAPE = (8, 8, 1)


def network_of(model, shape=SHAPE, seed=0):
    """A network with weights that are far from those of its start: statistics, biases."""
    params, model_state = nets.init(model, jax.random.key(seed), shape)
    variables = {"params": params, **model_state}
    leaves, structure = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    moved = [2 * leaf + rng.uniform(-0.02, 0.02, leaf.shape).astype(leaf.dtype) for leaf in leaves]
    return nets.logits_fn(model, jax.tree.unflatten(structure, moved))


def examples(number=5, shape=SHAPE, seed=1):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(number, *shape)), jnp.float32)


def linear(weights, inputs):
    return inputs.reshape(inputs.shape[0], -1) @ weights["kernel"] + weights["bias"][None]


@pytest.fixture(scope="module")
def student():
    return network_of(nets.digits_net(width=0.25))


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory):
    return export.save(
        tmp_path_factory.mktemp("export") / "new" / "folder", student, input_shape=SHAPE
    )


# Against the network that was written.


@pytest.mark.floor
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nets.digits_net(width=0.25, shift=0.25, dropout_rate=0.3), SHAPE),
        (nets.plain_net(2, num_classes=3), (8, 8, 3)),
        (nets.resnet(8, conv_general_dilated=jax.lax.conv_general_dilated), (8, 8, 3)),
        (nets.plain_net(2, norm=functools.partial(nets.group_norm, num_groups=4)), (8, 8, 3)),
        (nets.resnet18_imagenet(0.0625, blocks=(1, 1)), (8, 8, 3)),
        (nets.wide_resnet(10, 0.25), (8, 8, 3)),
        (nets.mobilenet_v2(stages=((2, 8, 1, 1),), head_channels=16), (8, 8, 3)),
        (nets.emo_small(0.25, stages=((2, 8, 2, 3, 4, 2),)), (8, 8, 3)),
    ],
    ids=["dropout", "statistics", "residual", "groups", "projections", "wide", "mobile", "attends"],
)
def test_reads_back_what_was_written(model, shape, tmp_path):
    network = network_of(model, shape)
    export.save(tmp_path, network, input_shape=shape)
    inputs = examples(5, shape)
    expected = np.asarray(jax.jit(network)(inputs))
    back = export.load(tmp_path)
    assert back.func == network.func  # the same module: compiled code is shared
    assert jax.tree.structure(back) == jax.tree.structure(network)
    np.testing.assert_array_equal(jax.jit(back)(inputs), expected)
    program = export.load_stablehlo(tmp_path)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(jax.jit(program)(inputs), expected, atol=1e-5 * scale)

    def loss(network, inputs):
        return jnp.sum(jnp.sin(network(inputs) / scale))

    gradient = jax.jit(jax.grad(loss, argnums=1))
    expected = np.asarray(gradient(network, inputs))
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(
        gradient(program, inputs), expected, atol=1e-4 * np.abs(expected).max()
    )


def test_what_is_written(folder, student):
    config = json.loads((folder / "config.json").read_text())
    assert config["network"] == {
        "kind": "ConvNet",
        "features": [[8, 8]],
        "hidden": [16, 16],
        "num_classes": 10,
        "dropout_rate": 0.5,
        "shift": 0.5,
        "conv_general_dilated": "jdistill.nets.conv_general_dilated",
    }
    assert config["input_shape"] == [8, 8, 1]
    assert (config["bounds"], config["num_classes"], config["dtype"]) == ([0, 1], 10, "float32")
    assert config["versions"]["jax"] == jax.__version__
    assert config["program"]["platforms"] == ["cpu", "cuda", "tpu"]
    with np.load(folder / "weights.npz", allow_pickle=False) as held:
        assert set(held) == set(config["weights"]["arrays"])
        np.testing.assert_array_equal(
            held["params/logits/kernel"], student.args[0]["params"]["logits"]["kernel"]
        )
    program = (folder / "model.stablehlo").read_bytes()
    for named in (b"_convnet.py", b"site-packages", str(ROOT).encode(), b"tests"):
        assert named not in program  # where it was written is nobody's business
    assert jax.config.jax_traceback_in_locations_limit != 0


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_one_program_takes_any_batch(folder, student, size):
    inputs = examples(size)
    np.testing.assert_allclose(
        export.load_stablehlo(folder)(inputs), jax.jit(student)(inputs), rtol=1e-5, atol=1e-5
    )


def test_a_trained_state_is_written_in_one_line(tmp_path):
    """What `study.networks` gives."""
    model = nets.plain_net(2, num_classes=3)
    step = train.make_train_step(nets.apply_fn(model), train.sgd(0.1))
    params, model_state = nets.init(model, jax.random.key(0), (8, 8, 3))
    state = train.create_state(step, params, jax.random.key(1), model_state=model_state)
    network = train.logits_fn(step, state)
    inputs = examples(4, (8, 8, 3))
    back = export.load(export.save(tmp_path, network, input_shape=(8, 8, 3), stablehlo=False))
    np.testing.assert_array_equal(jax.jit(back)(inputs), jax.jit(network)(inputs))
    assert {"params", "batch_stats"} == set(back.args[0])


def test_loaded_networks_share_traces(folder):
    count = []

    @jax.jit
    def run(network, inputs):
        count.append(1)
        return network(inputs)

    for read in (export.load, export.load_stablehlo):
        count.clear()
        for _ in range(2):
            run(read(folder), examples())
        assert len(count) == 1
        assert len({_fingerprint.fingerprint(read(folder)) for _ in range(2)}) == 1


# Attacks and measures on the program.


@pytest.mark.floor
def test_pgd_finds_the_same_on_the_program(folder, student):
    inputs = examples(32)
    labels = jnp.argmax(student(inputs), axis=1)
    results = [
        attacks.pgd(network, jax.random.key(0), inputs, labels, eps=0.02, num_steps=10)
        for network in (student, export.load(folder), export.load_stablehlo(folder))
    ]
    assert 0 < results[0].success.sum() < 32
    for result in results[1:]:
        np.testing.assert_array_equal(result.success, results[0].success)
        np.testing.assert_array_equal(result.queries, results[0].queries)
        np.testing.assert_allclose(result.inputs, results[0].inputs, atol=1e-5)


def test_an_attack_with_jacobians_takes_the_program(folder, student):
    inputs = examples(4)
    labels = jnp.argmax(student(inputs), axis=1)
    one, other = (
        attacks.deepfool(network, jax.random.key(0), inputs, labels, num_steps=5)
        for network in (student, export.load_stablehlo(folder))
    )
    np.testing.assert_array_equal(one.success, other.success)
    np.testing.assert_allclose(one.distance, other.distance, rtol=1e-3)


def test_measures_take_the_program(folder, student):
    inputs = examples(16)
    labels = jnp.argmax(student(inputs), axis=1)
    program = export.load_stablehlo(folder)
    plan = {"fgsm": functools.partial(attacks.fgsm, eps=0.1)}
    one, other = (
        evaluate.evaluate(network, inputs, labels, attacks=plan) for network in (student, program)
    )
    for name, value in one.clean._asdict().items():
        np.testing.assert_allclose(getattr(other.clean, name), value, rtol=1e-4, err_msg=name)
    jacobian = jax.vmap(jax.jacrev(lambda row: program(row[None])[0]))
    expected = jax.vmap(jax.jacrev(lambda row: student(row[None])[0]))
    np.testing.assert_allclose(jacobian(inputs[:3]), expected(inputs[:3]), atol=1e-4)


# Networks of the user's own.


class Mine(nn.Module):
    activation: str = "relu"

    @nn.compact
    def __call__(self, inputs, *, train=False):
        hidden = nn.Conv(4, (3, 3))(inputs)
        hidden = getattr(nn, self.activation)(hidden).reshape((inputs.shape[0], -1))
        return nn.Dense(3, param_dtype=jnp.bfloat16)(hidden)


class Other(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, inputs):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(inputs)))))


@pytest.mark.floor
def test_a_linen_module_of_ones_own(tmp_path):
    network = network_of(Mine())
    export.save(tmp_path, network, input_shape=SHAPE)
    inputs = examples()
    expected = np.asarray(jax.jit(network)(inputs), np.float32)
    back = export.load(tmp_path, Mine())
    assert back.args[0]["params"]["Dense_0"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(jax.jit(back)(inputs), np.float32), expected)
    program = np.asarray(export.load_stablehlo(tmp_path)(inputs), np.float32)
    np.testing.assert_allclose(program, expected, atol=0.02 * np.abs(expected).max())
    with pytest.raises(ValueError, match=r"expected the model of .*Mine, got None; pass it"):
        export.load(tmp_path)


@pytest.mark.floor
def test_an_nnx_module(tmp_path):
    network = nets.nnx_logits_fn(Other(nnx.Rngs(0)))
    export.save(tmp_path, network, input_shape=(4,))
    inputs = examples(5, (4,))
    other = nets.nnx_logits_fn(Other(nnx.Rngs(1)))
    assert np.abs(other(inputs) - network(inputs)).max() > 0.1
    back = export.load(tmp_path, other)
    np.testing.assert_array_equal(jax.jit(back)(inputs), jax.jit(network)(inputs))
    np.testing.assert_allclose(
        export.load_stablehlo(tmp_path)(inputs), network(inputs), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"no Linen module, got None; pass it"):
        export.load(tmp_path)
    with pytest.raises(ValueError, match="NNX"):
        export.load(tmp_path, Other(nnx.Rngs(0)))


def test_a_function_with_weights(tmp_path):
    rng = np.random.default_rng(0)
    weights = {"kernel": rng.normal(size=(64, 3)).astype("float32"), "bias": np.zeros(3, "float32")}
    network = nets.callable_logits_fn(linear, weights)
    export.save(tmp_path, network, input_shape=SHAPE, bounds=(np.full(SHAPE, -1.0), np.inf))
    zeros = nets.callable_logits_fn(linear, jax.tree.map(jnp.zeros_like, weights))
    inputs = examples()
    np.testing.assert_array_equal(export.load(tmp_path, zeros)(inputs), network(inputs))
    np.testing.assert_allclose(export.load_stablehlo(tmp_path)(inputs), network(inputs), atol=1e-5)


def test_temperature_is_part_of_a_network(tmp_path, student):
    hot = nets.with_temperature(student, 20.0)
    export.save(tmp_path, hot, input_shape=SHAPE)
    inputs = examples()
    np.testing.assert_allclose(
        export.load_stablehlo(tmp_path)(inputs), student(inputs) / 20, rtol=1e-5, atol=1e-6
    )
    blank = nets.with_temperature(jax.tree.map(jnp.zeros_like, student), 1.0)
    np.testing.assert_array_equal(
        jax.jit(export.load(tmp_path, blank))(inputs), jax.jit(hot)(inputs)
    )


# Refusals.


def test_another_model_is_refused(tmp_path, folder):
    with pytest.raises(
        ValueError, match=r"hidden is \[8, 8\], the written one's \[16, 16\].*leave the model out"
    ):
        export.load(folder, nets.ConvNet(features=((8, 8),), hidden=(8, 8)))
    with pytest.raises(ValueError, match=r"shift is 0.25, the written one's 0.5"):
        export.load(folder, nets.digits_net(width=0.25, shift=0.25))
    with pytest.raises(
        ValueError, match=r"got one whose kind is 'linen', the written one's 'ConvNet'; leave"
    ):
        export.load(folder, Mine())
    blank = nets.callable_logits_fn(linear, {"kernel": jnp.ones((64, 3)), "bias": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"expected a model with the weights .* and absent here"):
        export.load(folder, blank)
    with pytest.raises(ValueError, match=r"expected model to be a Flax Linen module, got function"):
        export.load(folder, linear)
    export.save(tmp_path, network_of(Mine()), input_shape=SHAPE)
    # Of the same shapes: the logits tell.
    with pytest.raises(ValueError, match=r"expected the logits that .*pass the model that was"):
        export.load(tmp_path, Mine(activation="tanh"))


@pytest.mark.parametrize("name", ["weights.npz", "model.stablehlo", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_is_found(tmp_path, folder, name, damage):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    place = tmp_path / name
    content = bytearray(place.read_bytes())
    if damage == "truncated":
        place.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = content.index(b"0.5") if name == "config.json" else len(content) // 2
        content[middle] ^= 1
        place.write_bytes(content)
    else:
        place.unlink()
    reads = {
        "weights.npz": (export.load, export.load_stablehlo),
        "model.stablehlo": (export.load_stablehlo,),
        "config.json": (export.load, export.load_stablehlo, export.window),
    }
    for read in reads[name]:
        if (name, damage) == ("config.json", "missing"):
            with pytest.raises(FileNotFoundError, match=r"has no config.json; check the path"):
                read(tmp_path)
        else:
            with pytest.raises(ValueError, match=rf"{name} as export.save .*; copy the whole"):
                read(tmp_path)
    if name == "model.stablehlo":
        export.load(tmp_path)  # which needs the truth alone


def test_pickles_are_not_read(tmp_path, folder):
    """With checksums to match, since whoever can write a folder can write them as well."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    arrays = {name: np.array([{}], object) for name in config["weights"]["arrays"]}
    np.savez(tmp_path / "weights.npz", allow_pickle=True, **arrays)
    config["weights"]["sha256"] = _folder.sha256((tmp_path / "weights.npz").read_bytes())
    config["sha256"] = _folder.checksum(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"weights.npz as .*Object arrays cannot be loaded"):
        export.load(tmp_path)


def test_folders_of_other_kinds(tmp_path, folder, student):
    with pytest.raises(FileNotFoundError, match=r"expected the folder of an export, got .*nothing"):
        export.load(tmp_path / "nothing")
    other = tmp_path / "config.json"
    other.write_text(json.dumps({"study": 1}))
    with pytest.raises(ValueError, match=r"expected the configuration of an export"):
        export.load(tmp_path)
    with pytest.raises(
        ValueError, match=r"expected a folder for an export alone.*; choose another"
    ):
        export.save(tmp_path, student, input_shape=SHAPE)
    assert json.loads(other.read_text()) == {"study": 1}
    config = json.loads((folder / "config.json").read_text())
    other.write_text(json.dumps({**config, "format": 2}))
    with pytest.raises(ValueError, match=r"expected an export of format 1, got 2 .*install"):
        export.load(tmp_path)


def test_replacing_an_export(tmp_path, student):
    export.save(tmp_path, student, input_shape=SHAPE)
    other = network_of(nets.digits_net(width=0.25), seed=3)
    export.save(str(tmp_path), other, input_shape=SHAPE, stablehlo=False)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "weights.npz"]
    inputs = examples()
    np.testing.assert_array_equal(jax.jit(export.load(tmp_path))(inputs), jax.jit(other)(inputs))
    with pytest.raises(ValueError, match=r"expected an export with a program.*use export.load"):
        export.load_stablehlo(tmp_path)
    with pytest.raises(ValueError, match=r"expected an export with a program"):
        export.window(tmp_path)


def test_a_save_that_fails_changes_nothing(tmp_path, student):
    export.save(tmp_path, student, input_shape=SHAPE, stablehlo=False)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def by_size(weights, inputs):
        return (
            inputs.reshape(len(inputs), -1) @ weights if inputs.shape[0] > 2 else inputs @ weights
        )

    def in_python(weights, inputs):
        shape = jax.ShapeDtypeStruct((inputs.shape[0], 3), "float32")
        return jax.pure_callback(
            lambda w, x: np.zeros(shape.shape, "float32"), shape, weights, inputs
        )

    weights = jnp.ones((4, 3))
    good = nets.callable_logits_fn(_product, weights)
    cases = [
        (nets.callable_logits_fn(by_size, weights), "any size.*; pass stablehlo=False"),
        (nets.callable_logits_fn(in_python, weights), "any size.*; pass stablehlo=False"),
        (lambda inputs: inputs, "expected a network whose weights are leaves"),
        (linear, "expected a network whose weights are leaves"),
        (nets.callable_logits_fn(_product, weights * jnp.nan), "got NaN .*diverged"),
        (nets.stack([good, good]), "expected logits of shape"),
        (3, "expected a callable, got int"),
    ]
    for network, message in cases:
        with pytest.raises(ValueError, match=message):
            export.save(tmp_path, network, input_shape=(4,))
    for settings in ({"input_shape": 4}, {"bounds": (1, 0)}, {"stablehlo": 1}):
        with pytest.raises(ValueError, match="expected "):
            export.save(tmp_path, good, **{"input_shape": (4,), **settings})
    with pytest.raises(ValueError, match="expected inputs of rank 4, got shape"):
        export.save(tmp_path, student, input_shape=(4,))
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    callback = nets.callable_logits_fn(in_python, weights)
    export.save(tmp_path, callback, input_shape=(4,), stablehlo=False)


def _product(weights, inputs):
    return inputs @ weights


def test_inputs_of_another_shape(folder):
    program = export.load_stablehlo(folder)
    for shape in [(8, 8, 1), (2, 8, 8, 3), (2, 64), ()]:
        with pytest.raises(ValueError, match=r"expected inputs of shape \[B, 8, 8, 1\], got"):
            program(jnp.zeros(shape))


def test_without_flatbuffers(tmp_path, folder, student, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match=r"expected the package flatbuffers.*stablehlo=False"):
        export.save(tmp_path, student, input_shape=SHAPE)
    with pytest.raises(ImportError, match=r"expected the package flatbuffers"):
        export.load_stablehlo(folder)
    export.load(export.save(tmp_path, student, input_shape=SHAPE, stablehlo=False))


# Versions.


def rewritten(folder, **changes):
    """A configuration with other entries of its program, and the checksum to match."""
    place = folder / "config.json"
    config = json.loads(place.read_text())
    config["program"] |= changes
    config["sha256"] = _folder.checksum(config)
    place.write_text(json.dumps(config))


@pytest.mark.floor
def test_another_calling_convention_is_refused(tmp_path, student):
    export.save(tmp_path, student, input_shape=SHAPE)
    for version in (8, 99):
        rewritten(tmp_path, calling_convention_version=version)
        with pytest.raises(ValueError, match=rf"convention {version}, not .*use export.load, or"):
            export.load_stablehlo(tmp_path)
    export.load(tmp_path)


def test_the_window_is_said(tmp_path, student, caplog):
    with caplog.at_level(logging.INFO, logger="jdistill"):
        export.save(tmp_path, student, input_shape=SHAPE)
    said = export.window(tmp_path)
    assert said in caplog.text
    assert f"written with JAX {jax.__version__} (calling convention" in said
    assert "6 months newer and up to 3 weeks older; this is JAX" in said


WRITTEN_BY = ["0.7.2", "0.10.2", "0.12.0.1"]
# Of the program that a version wrote, where it is read; the others refuse it.
READS = {"0.7.2": {"0.7.2"}, "0.10.2": {"0.7.2", "0.10.2"}, "0.12.0.1": {"0.10.2", "0.12.0.1"}}


def check_crossing(folder):
    """The network of `fixture` in a folder that any version wrote: the weights, and the program."""
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    network, inputs = export.load(folder), examples(6)
    expected = np.load(pathlib.Path(folder) / "logits.npy")
    np.testing.assert_allclose(network(inputs), expected, atol=1e-5 * np.abs(expected).max())
    written = config["versions"]["jax"]
    known = READS.get(jax.__version__, set())
    try:
        program = export.load_stablehlo(folder)
    except ValueError as error:
        assert written not in known
        message = str(error)
        assert f"expected a program that JAX {jax.__version__} reads, got" in message
        assert "use export.load, or a version within the window" in message
        assert f"written with JAX {written}" in message
        return "refused"
    assert jax.__version__ not in READS or written in known
    np.testing.assert_allclose(program(inputs), expected, atol=1e-5 * np.abs(expected).max())
    return "read"


@pytest.mark.floor
@pytest.mark.parametrize("written", WRITTEN_BY)
def test_what_each_version_wrote_is_read(written):
    print(check_crossing(FIXTURES / f"jax-{written}"))


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["floor", "newest"])
def test_other_versions_read_what_is_written_here(lane, tmp_path):
    python = ROOT / f".venv-{lane}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no .venv-{lane}; make {lane} makes it")
    write_fixture(tmp_path)
    command = [str(python), __file__, "check", str(tmp_path)]
    # The flags of this version's XLA may end another one.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in ("read", "refused")


def write_fixture(folder):
    model = nets.ConvNet(features=((2,),), hidden=(), num_classes=3)
    network = network_of(model)
    export.save(folder, network, input_shape=SHAPE)
    np.save(pathlib.Path(folder) / "logits.npy", network(examples(6)))


if __name__ == "__main__":
    verb, folder = sys.argv[1:]
    print(write_fixture(folder) if verb == "save" else check_crossing(folder))
