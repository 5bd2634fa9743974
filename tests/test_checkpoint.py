"""Checkpoints: bit-exact, resumable, and never wrong after damage."""

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jdistill.checkpoint import Checkpointer, _orbax, _orbax_v1
from jdistill.checkpoint import _checkpointer as checkpoint
from tests import processes

pytestmark = pytest.mark.floor  # interfaces of Orbax move from version to version


INTERFACES = {"V0": _orbax.V0, "V1": _orbax_v1.V1}


@pytest.fixture(scope="module", params=INTERFACES, autouse=True)
def interface(request):
    """Every test, by each interface of Orbax."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_orbax, "INTERFACE", INTERFACES[request.param])
        yield request.param


class State(NamedTuple):
    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    key: Any


@flax.struct.dataclass
class Extras:
    values: Any
    name: str = flax.struct.field(pytree_node=False)


optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))


@jax.jit
def train_step(state):
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (40, 50))
    grads = {"dense": {"kernel": noise, "bias": noise[0]}}
    updates, opt_state = optimizer.update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state)


def make_state(seed: int = 0) -> State:
    key = jax.random.key(seed)
    params = {
        "dense": {"kernel": jax.random.normal(key, (40, 50)), "bias": jnp.full(50, 1.0 * seed)}
    }
    return State(jnp.int32(seed), params, {}, optimizer.init(params), jax.random.fold_in(key, 1))


def bits(tree):
    """Every leaf as its type, dtype and bytes, so that NaNs and signed zeros count."""

    def one(leaf):
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
        if isinstance(leaf, jax.Array):
            return "jax", str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()
        return type(leaf), np.asarray(leaf).dtype, np.asarray(leaf).tobytes()

    return jax.tree.structure(tree), [one(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with whole checkpoints of two different states, steps 1 and 2."""
    folder = tmp_path_factory.mktemp("whole")
    with Checkpointer(folder) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), {"step": step})
    return folder


@pytest.fixture
def damageable(two_steps, tmp_path):
    return Path(shutil.copytree(two_steps, tmp_path / "copy"))


def restore(folder, like=None):
    with Checkpointer(folder) as checkpointer:
        return checkpointer.restore_latest(make_state() if like is None else like)


# --- Round trip ---


def test_round_trip_is_bit_exact_for_every_kind_of_leaf(tmp_path):
    odd = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
    odd.view(np.uint32)[0] |= 0x123  # a NaN with a payload
    state = {
        "train": train_step(make_state(3)),
        "extras": Extras({"odd": jnp.asarray(odd), "empty": jnp.zeros((0, 3))}, name="static"),
        "keys": jax.random.split(jax.random.key(7), (2, 3)),
        "half": jnp.arange(5, dtype=jnp.bfloat16),
        "int8": np.arange(-3, 4, dtype=np.int8),  # 7 bytes: what follows lies off alignment
        "wide": np.arange(3, dtype=np.float64) / 3,
        "numpy": np.float64(1 / 3),
        "flags": (True, 5, 0.1),
        "none": None,
    }
    metadata = {"stage": "teacher", "loss": 0.1, "shape": (1, 2), "nested": {"a": None}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, state, metadata)
    zeros = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else type(leaf)(0), state)
    found = restore(tmp_path, zeros)
    assert found.step == 4
    assert found.metadata == json.loads(json.dumps(metadata))
    assert bits(found.state) == bits(state)
    # Off alignment, or a view that keeps all the others alive, it would be slow and surprising.
    assert all(found.state[name].flags.aligned for name in ("int8", "wide"))
    assert all(found.state[name].flags.writeable for name in ("int8", "wide"))


def test_restores_from_shapes_alone(two_steps):
    found = restore(two_steps, jax.eval_shape(make_state))
    assert found.step == 2
    assert bits(found.state) == bits(make_state(2))


def test_restores_the_step_asked_for(two_steps):
    for step in (1, 2):
        found = Checkpointer(two_steps).restore(step, make_state())
        assert (found.step, found.metadata) == (step, {"step": step})
        assert bits(found.state) == bits(make_state(step))
    with pytest.raises(FileNotFoundError, match=r"step 3 in .*, got those of \[1, 2\]; pass a"):
        Checkpointer(two_steps).restore(3, make_state())
    with pytest.raises(FileNotFoundError, match=r"step 1 in .*, got none"):
        Checkpointer(two_steps / "absent").restore(1, make_state())
    assert not (two_steps / "absent").exists()


def test_a_damaged_step_that_was_asked_for_is_an_error(two_steps, tmp_path):
    folder = Path(shutil.copytree(two_steps, tmp_path / "copy"))
    (folder / "2/metadata/metadata").write_bytes(b"")
    with pytest.raises(OSError, match=r"whole checkpoint in .*copy/2, got a damaged one"):
        Checkpointer(folder).restore(2, make_state())
    assert bits(Checkpointer(folder).restore(1, make_state()).state) == bits(make_state(1))


def test_resumed_equals_uninterrupted_and_compiles_nothing(tmp_path):
    state = train_step(make_state(5))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    straight = train_step(train_step(state))
    compiled = train_step._cache_size()
    restored = restore(tmp_path).state
    # Committed to one device, they could not meet arrays that lie on a mesh.
    assert not any(leaf.committed for leaf in jax.tree.leaves(restored.params))
    assert bits(train_step(train_step(restored))) == bits(straight)
    assert train_step._cache_size() == compiled


def test_restores_to_the_sharding_asked_for(two_steps):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), make_state()
    )
    state = restore(two_steps, like).state
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(state))
    assert bits(state) == bits(make_state(2))


def test_donating_the_state_after_a_save_changes_nothing_saved(tmp_path):
    donating = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {"w": jnp.arange(200_000.0), "b": jnp.arange(3)}
    before = bits(state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        jax.block_until_ready(donating(state))
    assert bits(restore(tmp_path, {"w": jnp.zeros(200_000), "b": jnp.arange(3)}).state) == before


def test_keeps_the_latest_and_goes_on_in_a_new_process(tmp_path):
    with Checkpointer(tmp_path, max_to_keep=3) as checkpointer:
        for step in (1, 2, 5, 7):
            checkpointer.save(step, make_state(step))
    with Checkpointer(tmp_path, max_to_keep=3) as checkpointer:
        assert checkpointer.steps() == [2, 5, 7]
        checkpointer.save(10, make_state(10), {"new": True})
        found = checkpointer.restore_latest(make_state())  # waits for the save
        assert (found.step, found.metadata) == (10, {"new": True})
    assert checkpointer.steps() == [5, 7, 10]


def test_no_checkpoint_is_none_and_touches_nothing(tmp_path, caplog):
    assert restore(tmp_path / "absent") is None
    assert list(tmp_path.iterdir()) == []
    assert not caplog.records


def test_orbax_is_quiet(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="absl")
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step))
    (tmp_path / "3/_CHECKPOINT_METADATA").write_text("{")
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(make_state()).step == 3
        checkpointer.save(4, make_state(4))
    assert [record.getMessage() for record in caplog.records if record.name == "absl"] == []
    assert capfd.readouterr() == ("", "")
    logging.getLogger("absl").info("others are heard")
    assert caplog.records[-1].getMessage() == "others are heard"


def test_each_interface_goes_on_with_what_the_other_wrote(interface, tmp_path, monkeypatch):
    own = INTERFACES[interface]
    (other,) = set(INTERFACES.values()) - {own}
    for step, writer, reader in ((1, own, other), (2, other, own)):
        monkeypatch.setattr(_orbax, "INTERFACE", writer)
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(step, make_state(step), {"step": step})
        monkeypatch.setattr(_orbax, "INTERFACE", reader)
        found = restore(tmp_path)
        assert (found.step, found.metadata) == (step, {"step": step})
        assert bits(found.state) == bits(make_state(step))
    assert Checkpointer(tmp_path).steps() == [1, 2]


# --- The best ---


def scored(folder, scores, **options):
    """A folder in which a state was saved for each score, and those that stay."""
    with Checkpointer(folder, **options) as checkpointer:
        for step, score in enumerate(scores, start=1):
            checkpointer.save(step, {"w": np.full(9, step)}, {"step": step}, score=score)
    return checkpointer


NINE = {"w": np.zeros(9, int)}


@pytest.mark.parametrize(
    ("scores", "options", "kept", "best"),
    [
        ([0.1, 0.9, 0.2, 0.3, 0.4], {"keep_best": 1}, [2, 4, 5], 2),
        ([0.1, 0.9, 0.2, 0.3, 0.4], {"keep_best": 2, "max_to_keep": 1}, [2, 5], 2),
        ([0.1, 0.9, 0.2, 0.3, 0.4], {"keep_best": 3, "max_to_keep": 1}, [2, 4, 5], 2),
        ([0.5, 0.5, 0.5, 0.5], {"keep_best": 1, "max_to_keep": 1}, [1, 4], 1),  # the earliest
        ([0.0, -1.0, None, -2.0], {"keep_best": 1, "max_to_keep": 1}, [1, 4], 1),
        ([None, None, None], {"keep_best": 1}, [2, 3], None),
        ([0.9, 0.1, 0.2, 0.2], {}, [3, 4], 3),  # the best of those that are there
    ],
)
def test_the_best_stay_beside_the_latest(scores, options, kept, best, tmp_path):
    checkpointer = scored(tmp_path, scores, **options)
    assert checkpointer.steps() == kept
    assert checkpointer.restore_latest(NINE).step == len(scores)
    found = checkpointer.restore_best(NINE)
    assert (found and found.step) == best
    if best is not None:
        assert found.metadata == {"step": best}
        assert (found.state["w"] == best).all()


def test_the_best_is_known_in_a_new_process(tmp_path):
    scored(tmp_path, [0.1, 0.9, 0.2, 0.3], keep_best=1)
    with Checkpointer(tmp_path, keep_best=1) as checkpointer:
        for step, score in ((5, 0.9), (6, 0.2), (7, 0.3)):
            checkpointer.save(step, NINE, score=score)
    assert checkpointer.steps() == [2, 6, 7]
    with Checkpointer(tmp_path, keep_best=1) as checkpointer:
        for step, score in ((8, 0.95), (9, 0.1), (10, 0.1)):
            checkpointer.save(step, NINE, score=score)
    assert checkpointer.steps() == [8, 9, 10]


@pytest.mark.parametrize("item", ["metadata/metadata", "state/manifest.ocdbt"])
def test_a_damaged_best_leaves_its_place_to_the_next(item, tmp_path, caplog):
    scored(tmp_path, [0.1, 0.9, 0.2, 0.4, 0.3], keep_best=1)
    (tmp_path / "2" / item).write_bytes(b"")
    with Checkpointer(tmp_path, keep_best=1) as checkpointer:
        assert checkpointer.restore_best(NINE).step == 4
        assert str(tmp_path / "2") in caplog.messages[0]
        assert "step 4 as the best" in caplog.messages[1]
        for step in (6, 7, 8):
            checkpointer.save(step, NINE, score=0.0)
    assert checkpointer.steps() == [4, 7, 8]
    assert (tmp_path / "damaged-2").exists()
    assert restore(tmp_path, NINE).step == 8
    assert len(caplog.messages) == 2


def test_no_whole_checkpoint_is_no_best(tmp_path, caplog):
    scored(tmp_path, [0.1])
    (tmp_path / "1/state/manifest.ocdbt").write_bytes(b"")
    assert Checkpointer(tmp_path).restore_best(NINE) is None
    assert "damaged" in caplog.text
    assert Checkpointer(tmp_path / "absent").restore_best(NINE) is None


def test_a_score_that_was_edited_is_damage(tmp_path, caplog):
    scored(tmp_path, [0.1, 0.2])
    item = tmp_path / "1/metadata/metadata"
    item.write_text(json.dumps({**json.loads(item.read_text()), "score": 0.9}))
    assert Checkpointer(tmp_path).restore_best(NINE).step == 2
    assert "checksum of the metadata differs" in caplog.text


@pytest.mark.parametrize("score", [np.nan, np.inf, "high", [1.0, 2.0]])
def test_a_score_that_is_no_number_is_refused(score, tmp_path):
    with (
        Checkpointer(tmp_path / "new") as checkpointer,
        pytest.raises(ValueError, match=r"expected .*score"),
    ):
        checkpointer.save(1, NINE, score=score)
    assert list(tmp_path.iterdir()) == []


# --- Damage ---


def flip(data: bytes) -> bytes:
    """One bit changed in the middle, where a large file holds the values."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


DAMAGES = {
    "deleted": lambda path, _: path.unlink(),
    "emptied": lambda path, _: path.write_bytes(b""),
    "truncated": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "garbage": lambda path, data: path.write_bytes(bytes(255 - byte for byte in data)),
    "one bit": lambda path, data: path.write_bytes(flip(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_gives_a_whole_state_or_the_one_before(
    damage, two_steps, tmp_path, caplog, capfd
):
    files = [path.relative_to(two_steps) for path in two_steps.glob("2/**/*") if path.is_file()]
    outcome = {}
    for number, name in enumerate(files):
        folder = Path(shutil.copytree(two_steps, tmp_path / str(number)))
        DAMAGES[damage](folder / name, (folder / name).read_bytes())
        caplog.clear()
        with Checkpointer(folder) as checkpointer:
            found = checkpointer.restore_latest(make_state())
            assert bits(found.state) == bits(make_state(found.step)), name
            assert found.metadata == {"step": found.step}
            messages = [record.getMessage() for record in caplog.records]
            if found.step == 1:
                assert str(folder / "2") in messages[0]
                assert "step 1" in messages[1]
            else:
                assert messages == []
            checkpointer.save(3, make_state(3), {"step": 3})
        assert restore(folder).step == 3
        outcome[str(name)] = found.step
    # Some files hold nothing that a restore needs; these do.
    assert outcome["2/metadata/metadata"] == 1
    assert outcome["2/state/manifest.ocdbt"] == 1
    values = max(files, key=lambda name: (two_steps / name).stat().st_size)
    assert (two_steps / values).stat().st_size > 5_000
    assert outcome[str(values)] == 1
    assert capfd.readouterr().err == ""


def test_values_that_orbax_finds_whole_are_checked_too(damageable, tmp_path, caplog):
    with Checkpointer(tmp_path / "other") as checkpointer:
        checkpointer.save(2, make_state(9), {"step": 2})
    shutil.rmtree(damageable / "2/state")
    shutil.copytree(tmp_path / "other/2/state", damageable / "2/state")
    assert restore(damageable).step == 1
    assert "checksum of the state differs" in caplog.text


def test_metadata_that_is_still_json_is_checked_too(damageable, caplog):
    item = damageable / "2/metadata/metadata"
    content = json.loads(item.read_text())
    content["metadata"]["step"] = 3
    item.write_text(json.dumps(content))
    assert restore(damageable).step == 1
    assert "checksum of the metadata differs" in caplog.text


@pytest.mark.parametrize("half", ["5", "5/state", "9.orbax-checkpoint-tmp"])
def test_a_half_written_folder_is_passed_over(half, damageable, caplog):
    (damageable / half).mkdir(parents=True)
    with Checkpointer(damageable) as checkpointer:
        assert checkpointer.restore_latest(make_state()).step == 2
        checkpointer.save(5, make_state(5), {"step": 5})
    assert restore(damageable).step == 5
    # A temporary folder is what a killed process leaves: cleared away, and no damage.
    assert ("skipped the damaged checkpoint" in caplog.text) == (half[0] == "5")
    assert not (damageable / "9.orbax-checkpoint-tmp").exists()


def test_damaged_steps_are_saved_anew_and_set_aside(damageable, caplog):
    shutil.rmtree(damageable / "2/metadata")
    shutil.copytree(damageable / "2", damageable / "6")
    with Checkpointer(damageable) as checkpointer:
        assert checkpointer.restore_latest(make_state()).step == 1
        assert str(damageable / "2") in caplog.text
        assert str(damageable / "6") in caplog.text
        assert checkpointer.steps() == [1, 2, 6]  # looking changes nothing
        checkpointer.save(2, make_state(4), {"again": True})
    found = restore(damageable)
    assert (found.step, found.metadata) == (2, {"again": True})
    assert bits(found.state) == bits(make_state(4))
    assert {path.name for path in damageable.iterdir()} == {"1", "2", "damaged-2", "damaged-6"}


def test_nothing_whole_warns_and_starts_afresh(damageable, caplog):
    for step in (1, 2):
        shutil.rmtree(damageable / f"{step}/state")
    with Checkpointer(damageable) as checkpointer:
        assert checkpointer.restore_latest(make_state()) is None
        assert "starting afresh" in caplog.text
        checkpointer.save(1, make_state(1))
    assert restore(damageable).step == 1


@pytest.mark.parametrize("error", [PermissionError("no right"), MemoryError("no room")])
def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(error, damageable, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint, "_read", fail)
    with Checkpointer(damageable) as checkpointer, pytest.raises(type(error)):
        checkpointer.restore_latest(make_state())


# --- Another state ---


def test_another_architecture_is_named_and_not_damaged(two_steps, caplog):
    wider = make_state()
    wider.params["dense"]["kernel"] = jnp.zeros((40, 60))
    with pytest.raises(ValueError, match=r"\['kernel'\] is float32\[40, 50\] there and float32\[4"):
        restore(two_steps, wider)
    other = make_state()
    other.params["conv"] = other.params.pop("dense")
    with pytest.raises(ValueError, match=r"\['conv'\]\['kernel'\] is absent there and float32"):
        restore(two_steps, other)
    with pytest.raises(ValueError, match=r"opt_state.*there and absent here.*and \d+ more"):
        restore(two_steps, make_state()._replace(opt_state=optax.sgd(0.1).init({})))
    with pytest.raises(ValueError, match=r"state\.key is key<fry>\[\] there and key<rbg>\[\]"):
        restore(two_steps, make_state()._replace(key=jax.random.key(0, impl="rbg")))
    with pytest.raises(ValueError, match=r"state\.step is int32\[\] there and int\[\] here; use"):
        restore(two_steps, make_state()._replace(step=0))
    assert not caplog.records
    assert restore(two_steps).step == 2


def test_a_format_of_the_future_is_named_and_not_damaged(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, Checkpointer(tmp_path) as checkpointer:
        patch.setattr(checkpoint, "_FORMAT", 2)
        checkpointer.save(1, make_state())
    with pytest.raises(ValueError, match="expected a checkpoint of format 1, got format 2; use"):
        restore(tmp_path)


# --- Bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, {"a": jnp.ones(1)}), "expected step to be a whole number >= 0, got -1"),
        ((True, {"a": jnp.ones(1)}), "expected step to be a whole number >= 0, got True"),
        ((1.0, {"a": jnp.ones(1)}), "expected step to be a whole number >= 0, got 1.0"),
        ((1, {}), r"expected a state with leaves, got \{\}"),
        ((1, {"a": "text"}), r"got 'text' at state\['a'\]"),
        ((1, {"a": np.array([None])}), r"got array\(\[None\], dtype=object\) at state\['a'\]"),
        ((1, {"a": 2**70}), r"got 1180591620717411303424 at state\['a'\]"),
        ((1, {"a": jnp.ones(1)}, {"b": jnp.ones(1)}), "expected JSON-able metadata"),
        ((1, {"a": jnp.ones(1)}, {"b": Path("x")}), "expected JSON-able metadata"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(arguments, message, tmp_path):
    with Checkpointer(tmp_path / "new") as checkpointer, pytest.raises(ValueError, match=message):
        checkpointer.save(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [1, 2])
def test_a_step_that_is_not_the_latest_is_refused(step, damageable):
    refused = pytest.raises(ValueError, match=rf"expected step > 2, the latest in .*, got {step};")
    with Checkpointer(damageable) as checkpointer, refused:
        checkpointer.save(step, make_state(8))
    assert bits(restore(damageable).state) == bits(make_state(2))


def test_how_many_to_keep_is_checked(tmp_path):
    with pytest.raises(ValueError, match="max_to_keep to be a whole number >= 1, got 0"):
        Checkpointer(tmp_path, max_to_keep=0)
    with pytest.raises(ValueError, match="keep_best to be a whole number >= 0, got -1"):
        Checkpointer(tmp_path, keep_best=-1)


def test_relative_folders_and_home_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert os.fspath(Checkpointer("runs").directory) == str(tmp_path / "runs")
    assert os.fspath(Checkpointer("~/runs").directory) == str(tmp_path / "home/runs")
    assert os.fspath(Checkpointer("gs://bucket/runs").directory) == "gs://bucket/runs"


# --- Storage that fails, processes that end ---


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("precious")
    for folder in (tmp_path / "file/runs", tmp_path / "file", "/proc/jdistill"):
        refused = pytest.raises(OSError, match=rf"writable workdir, got {folder} .*`--workdir`")
        with Checkpointer(folder) as checkpointer, refused:
            checkpointer.save(1, make_state())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"


def test_a_missing_right_stays_a_permission_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(_orbax.INTERFACE, "__init__", refuse)
    refused = pytest.raises(PermissionError, match=r"writable workdir.*Permission denied")
    with Checkpointer(tmp_path) as checkpointer, refused:
        checkpointer.save(1, make_state())


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(damageable):
    large = make_state(3)._replace(
        model_state={"noise": jax.random.normal(jax.random.key(1), 9**6)}
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer = Checkpointer(damageable)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        checkpointer.save(3, large)  # fails in the background
        with pytest.raises(OSError, match="expected a writable workdir"):
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert bits(restore(damageable).state) == bits(make_state(2))
    with checkpointer:  # room was made: the same step goes through
        checkpointer.save(3, large)
    assert bits(restore(damageable, large).state) == bits(large)


def test_leaving_by_ctrl_c_keeps_the_save_on_its_way(tmp_path):
    def interrupted():
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(1, make_state(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert bits(restore(tmp_path).state) == bits(make_state(1))


@pytest.mark.parametrize(("presses", "saved"), [(1, True), (2, False)])
def test_ctrl_c_waits_for_orbax_and_a_second_one_does_not(presses, saved, tmp_path, monkeypatch):
    save = _orbax.INTERFACE.save

    def pressed(*arguments, **keywords):
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
        save(*arguments, **keywords)

    def interrupted():
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(1, make_state(1))
            pytest.fail("Ctrl-C got lost")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(_orbax.INTERFACE, "save", pressed)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert signal.getsignal(signal.SIGINT) is before
    assert (restore(tmp_path) is not None) == saved


def test_saves_from_a_thread_that_may_set_no_handlers(tmp_path):
    with ThreadPoolExecutor(1) as pool, Checkpointer(tmp_path) as checkpointer:
        pool.submit(checkpointer.save, 1, make_state(1)).result()
    assert bits(restore(tmp_path).state) == bits(make_state(1))


def test_a_failing_close_hides_no_other_error(tmp_path, monkeypatch, caplog):
    def fail(_):
        raise OSError("the last save failed")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "close", fail)
        with pytest.raises(KeyboardInterrupt), Checkpointer(tmp_path):
            raise KeyboardInterrupt
        assert "the last save failed" in caplog.text
        with pytest.raises(OSError, match="the last save failed"), Checkpointer(tmp_path):
            pass


KILLED = """
import sys, numpy as np
from jdistill.checkpoint import Checkpointer, _orbax, _orbax_v1
_orbax.INTERFACE = {"V0": _orbax.V0, "V1": _orbax_v1.V1}[sys.argv[2]]
checkpointer = Checkpointer(sys.argv[1])
like = {"w": np.zeros(300_000, np.int32)}
found = checkpointer.restore_latest(like)
step = found.step if found else 0
while True:
    step += 1
    checkpointer.save(step, {"w": np.full(300_000, step, np.int32)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.03])
def test_a_killed_process_leaves_a_whole_checkpoint(delay, interface, tmp_path, caplog):
    command = [sys.executable, "-c", KILLED, str(tmp_path), interface]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 4:
                break
        signal.sigtimedwait([], delay)  # sleeps
        process.send_signal(signal.SIGKILL)
    with Checkpointer(tmp_path) as checkpointer:
        step, state, metadata = checkpointer.restore_latest({"w": np.zeros(300_000, np.int32)})
        assert step >= 3  # 4 may have been on its way, 3 was durable when its save began
        assert metadata == {"step": step}
        assert (state["w"] == step).all()
        checkpointer.save(step + 1, state)
    # What the killed process left half-written is gone.
    assert {path.name for path in tmp_path.iterdir()} <= {str(step), str(step + 1)}


TOGETHER = """
import sys, numpy as np
from jdistill import runtime
from jdistill.checkpoint import Checkpointer, _orbax, _orbax_v1
address, number, folder, interface = sys.argv[1:]
runtime.initialize(address, 2, int(number), timeout_s=20, heartbeat_s=10)
_orbax.INTERFACE = {"V0": _orbax.V0, "V1": _orbax_v1.V1}[interface]
with Checkpointer(folder) as checkpointer:
    for step in (1, 2, 3):
        checkpointer.save(step, {"w": np.full(1000, step)}, {"step": step})
    step, state, metadata = checkpointer.restore_latest({"w": np.zeros(1000, int)})
    assert (state["w"] == step).all(), state
    print(step, metadata, checkpointer.steps())
"""


@pytest.mark.slow
def test_two_processes_save_and_restore_together(interface, tmp_path):
    where = processes.address()
    arguments = [("-c", TOGETHER, where, number, tmp_path, interface) for number in range(2)]
    for process, output, errors in processes.finished([*map(processes.start, arguments)]):
        assert (process.returncode, errors) == (0, "")
        assert "3 {'step': 3} [2, 3]" in output
