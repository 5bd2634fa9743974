import io
import itertools
import json
import logging
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill import data
from jdistill.data import _cache, _prepared, _types

VALIDATION = 20
REACHABLE = _prepared._reachable  # the fixture below replaces it
IMAGE = {"mnist": (28, 28, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


# ---------------------------------------------------------------------------------------------
# A small set in TFDS's own prepared form: array_record files of tf.Example protos.


def _encoded(image, image_format):
    from PIL import Image

    stream = io.BytesIO()
    image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    image.save(stream, image_format)
    return stream.getvalue()


def _serialized(image, label, identifier, image_format):
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(_encoded(image, image_format))
    example.features.feature["label"].int64_list.value.append(int(label))
    if identifier is not None:
        example.features.feature["id"].bytes_list.value.append(identifier)
    return example.SerializeToString()


def _features(name):
    prefix = "tensorflow_datasets.core.features."
    dimensions = {"dimensions": [str(n) for n in IMAGE[name]]}
    features = {
        "image": {
            "pythonClassName": prefix + "image_feature.Image",
            "image": {"dtype": "uint8", "shape": dimensions},
        },
        "label": {
            "pythonClassName": prefix + "class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "10"},
        },
    }
    if name == "cifar10":
        features["id"] = {"pythonClassName": prefix + "text_feature.Text", "text": {}}
    return {
        "pythonClassName": prefix + "features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }


def prepare(
    root,
    name,
    *,
    version="3.0.1",
    train=60,
    test=10,
    seed=0,
    file_format="array_record",
    top=10,
    image_format="PNG",
):
    """Writes the set; returns its images and labels in stored order, and its ids."""
    from array_record.python.array_record_module import ArrayRecordWriter

    rng = np.random.default_rng(seed)
    folder = pathlib.Path(root, name, version)
    folder.mkdir(parents=True)
    stored, infos = {}, []
    for split, count in (("train", train), ("test", test)):
        images = rng.integers(0, 256, (count, *IMAGE[name]), dtype=np.uint8)
        labels = rng.integers(0, top, count)
        labels[-1] = top - 1
        numbers = rng.permutation(count)
        ids = [b"%s_%05d" % (split.encode(), n) for n in numbers]
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for image, label, identifier in zip(images, labels, ids, strict=True):
            identifier = identifier if name == "cifar10" else None
            writer.write(_serialized(image, label, identifier, image_format))
        writer.close()
        stored[split] = (images, labels, numbers)
        infos.append(
            {
                "name": split,
                "shardLengths": [str(count)],
                "numBytes": str(path.stat().st_size),
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": name, "version": version, "fileFormat": file_format, "splits": infos}
    info["description"] = f"fake, seed {seed}"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(_features(name)))
    return stored


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """No test sees the user's folders, starts a download, or needs 5,000 images."""
    for variable in ("TFDS_DATA_DIR", "JDISTILL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(_prepared, "_reachable", lambda url, seconds: False)
    monkeypatch.setattr(_prepared, "_VALIDATION", VALIDATION)


@pytest.fixture
def folders(tmp_path):
    return {"data_dir": tmp_path / "tfds", "cache_dir": tmp_path / "cache"}


@pytest.fixture
def no_reading(monkeypatch):
    def refuse(*_):
        raise AssertionError("the prepared set was read")

    monkeypatch.setattr(_prepared, "read", refuse)


def _cached(folders):
    return sorted(folders["cache_dir"].glob("*"))


def _vanish(folder):
    folder.rename(folder.with_name(folder.name + "_moved"))


def _assert_same(one, other):
    assert one._replace(train=0, validation=0, test=0) == other._replace(
        train=0, validation=0, test=0
    )
    for a, b in zip(one[1:4], other[1:4], strict=True):
        np.testing.assert_array_equal(a.inputs, b.inputs)
        np.testing.assert_array_equal(a.labels, b.labels)


# ---------------------------------------------------------------------------------------------
# digits


@pytest.mark.floor
def test_digits_are_scikit_learns_images_each_in_one_split():
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    splits = digits[1:4]
    assert [s.inputs.shape for s in splits] == [(n, 8, 8, 1) for n in (1197, 200, 400)]
    assert {s.inputs.dtype for s in splits} == {np.dtype("float32")}
    assert {s.labels.dtype for s in splits} == {np.dtype("int32")}
    found = [
        (image.tobytes(), int(label))
        for s in splits
        for image, label in zip((s.inputs * 16).astype(np.uint8), s.labels, strict=True)
    ]
    bunch = load_digits()
    expected = [
        (image.astype(np.uint8).tobytes(), int(label))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    ]
    assert sorted(found) == sorted(expected)
    for s in splits:
        share = np.bincount(s.labels, minlength=10) / len(s.labels)
        assert share.min() > 0.05
        assert share.max() < 0.16


def test_digits_split_is_frozen():
    digits = data.load("digits")
    assert digits.checksum == "c571366e379fb1f1"
    assert digits.train.labels[:12].tolist() == [2, 8, 2, 6, 6, 7, 1, 9, 8, 5, 2, 8]


def test_changed_digits_are_said_to_be_changed(monkeypatch, caplog):
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    bunch.target[0] = 5
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: bunch)
    assert data.load("digits").checksum != "c571366e379fb1f1"
    assert "differ from those" in caplog.text


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'jdistill\[study\]'"):
        data.load("digits")


def test_digits_of_another_fingerprint_are_refused():
    fingerprint = data.load("digits").fingerprint
    assert data.load("digits", fingerprint=fingerprint).fingerprint == fingerprint
    with pytest.raises(ValueError, match="expected digits with fingerprint 'abc'"):
        data.load("digits", fingerprint="abc")


@pytest.mark.parametrize("name", ["imagenet", "", "MNIST", None])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"'digits', 'mnist', 'fashion_mnist', 'cifar10', got "):
        data.load(name)


# ---------------------------------------------------------------------------------------------
# Reading a prepared set


def test_mnist_keeps_stored_order_and_holds_out_its_first_examples(folders):
    stored = prepare(folders["data_dir"], "mnist")
    events = []
    mnist = data.load("mnist", **folders, progress=events.append)
    images, labels, _ = stored["train"]
    np.testing.assert_array_equal(mnist.validation.inputs * 255, images[:VALIDATION])
    np.testing.assert_array_equal(mnist.validation.labels, labels[:VALIDATION])
    np.testing.assert_array_equal(mnist.train.inputs * 255, images[VALIDATION:])
    np.testing.assert_array_equal(mnist.train.labels, labels[VALIDATION:])
    np.testing.assert_array_equal(mnist.test.inputs * 255, stored["test"][0])
    assert mnist.train.inputs.dtype == np.float32
    assert mnist.train.labels.dtype == np.int32
    assert (mnist.name, mnist.version, mnist.num_classes) == ("mnist", "3.0.1", 10)
    assert "not the papers' first 5,000" in mnist.note
    assert [(e["event"], e["stage"], e["done"], e["total"]) for e in events] == [
        ("read", "read mnist", 60, 70),
        ("read", "read mnist", 70, 70),
    ]


def test_cifar_is_sorted_by_id_before_it_is_split(folders):
    stored = prepare(folders["data_dir"], "cifar10", version="3.0.2")
    cifar = data.load("cifar10", **folders)
    images, labels, numbers = stored["train"]
    order = np.argsort(numbers)
    assert (order != np.arange(len(order))).any()
    np.testing.assert_array_equal(cifar.validation.inputs * 255, images[order[:VALIDATION]])
    np.testing.assert_array_equal(cifar.train.labels, labels[order[VALIDATION:]])
    images, labels, numbers = stored["test"]
    np.testing.assert_array_equal(cifar.test.inputs * 255, images[np.argsort(numbers)])
    np.testing.assert_array_equal(cifar.test.labels, labels[np.argsort(numbers)])


def test_scaling_is_exact_division():
    levels = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    found = _types.scaled(_types.Split(levels, np.zeros(4, np.int32)), 255).inputs
    expected = (levels.astype(np.float64) / 255).astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    assert (found.min(), found.max()) == (0, 1)


def test_data_dir_and_cache_come_from_the_environment(folders, monkeypatch, tmp_path):
    prepare(folders["data_dir"], "mnist")
    monkeypatch.setenv("TFDS_DATA_DIR", str(folders["data_dir"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    first = data.load("mnist")
    assert [p.suffix for p in (tmp_path / "xdg" / "jdistill").iterdir()] == [".npz"]
    monkeypatch.setenv("JDISTILL_CACHE", str(tmp_path / "other"))
    _assert_same(first, data.load("mnist"))
    assert len(list((tmp_path / "other").iterdir())) == 1
    monkeypatch.delenv("JDISTILL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _cache.cache_folder(None) == tmp_path / "home" / ".cache" / "jdistill"
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert _prepared.tfds_root(None) == tmp_path / "home" / "tensorflow_datasets"


def test_highest_whole_version_is_read(tmp_path):
    for version in ("3.0.1", "3.0.9", "3.0.10", "3.1.0.incomplete1", "4.0.0"):
        (tmp_path / "mnist" / version).mkdir(parents=True)
        if version != "4.0.0":  # a preparation that broke off
            (tmp_path / "mnist" / version / "dataset_info.json").write_text("{}")
    assert _prepared.find(tmp_path, "mnist").version == "3.0.10"
    assert _prepared.find(tmp_path, "cifar10") is None


# ---------------------------------------------------------------------------------------------
# The cache


def test_second_load_reads_the_cache_alone(folders, monkeypatch):
    prepare(folders["data_dir"], "mnist")
    first = data.load("mnist", **folders)
    monkeypatch.setattr(_prepared, "read", lambda *_: pytest.fail("read again"))
    _assert_same(first, data.load("mnist", **folders))
    (path,) = _cached(folders)
    assert path.name == f"mnist-3.0.1-{first.fingerprint}.npz"


def test_cache_hit_imports_no_tfds_and_no_scikit_learn(folders):
    prepare(folders["data_dir"], "mnist")
    data.load("mnist", **folders)
    code = (
        "import sys; from jdistill import data;"
        f"data.load('mnist', data_dir={str(folders['data_dir'])!r},"
        f" cache_dir={str(folders['cache_dir'])!r});"
        "print(*[m for m in ('tensorflow_datasets', 'tensorflow', 'sklearn', 'array_record')"
        " if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def test_hit_works_with_the_source_gone(folders, caplog):
    prepare(folders["data_dir"], "mnist")
    first = data.load("mnist", **folders)
    _vanish(folders["data_dir"])
    with caplog.at_level(logging.INFO, "jdistill"):
        _assert_same(first, data.load("mnist", **folders))
    assert [r.levelname for r in caplog.records] == ["INFO"]
    # Asked for elsewhere it is still the only one there is, but not silently.
    elsewhere = {**folders, "data_dir": folders["data_dir"].with_name("elsewhere")}
    _assert_same(first, data.load("mnist", **elsewhere))
    assert caplog.records[-1].levelname == "WARNING"
    assert str(folders["data_dir"]) in caplog.records[-1].getMessage()


def test_two_sets_of_one_name_and_version_are_kept_apart(folders, tmp_path, monkeypatch):
    roots = [tmp_path / "one", tmp_path / "two"]
    loaded = []
    for seed, root in enumerate(roots):
        prepare(root, "cifar10", version="3.0.2", seed=seed)
        loaded.append(data.load("cifar10", data_dir=root, cache_dir=folders["cache_dir"]))
    one, two = loaded
    assert one.version == two.version
    assert one.fingerprint != two.fingerprint
    assert one.checksum != two.checksum
    assert len(_cached(folders)) == 2
    monkeypatch.setattr(_prepared, "read", lambda *_: pytest.fail("read again"))
    for root, expected in zip(roots, loaded, strict=True):
        _assert_same(expected, data.load("cifar10", data_dir=root, cache_dir=folders["cache_dir"]))
        _vanish(root)
    # With the sources gone, the folder that each came from still tells them apart …
    for root, expected in zip(roots, loaded, strict=True):
        _assert_same(expected, data.load("cifar10", data_dir=root, cache_dir=folders["cache_dir"]))
    # … a fingerprint does so too, and without either nothing is guessed.
    chosen = data.load("cifar10", **folders, fingerprint=two.fingerprint)
    _assert_same(two, chosen)
    with pytest.raises(ValueError, match="expected one cached cifar10") as caught:
        data.load("cifar10", **folders)
    for part in (one.fingerprint, two.fingerprint, *map(str, roots), "pass one of these"):
        assert part in str(caught.value)


def test_fingerprint_wins_over_the_source_and_is_never_ignored(folders, tmp_path):
    prepare(tmp_path / "one", "mnist", seed=1)
    prepare(folders["data_dir"], "mnist", seed=2)
    one = data.load("mnist", data_dir=tmp_path / "one", cache_dir=folders["cache_dir"])
    two = data.load("mnist", **folders)
    _assert_same(one, data.load("mnist", **folders, fingerprint=one.fingerprint))
    _assert_same(two, data.load("mnist", **folders, fingerprint=two.fingerprint))
    with pytest.raises(FileNotFoundError, match="'0123456789ab'") as caught:
        data.load("mnist", **folders, fingerprint="0123456789ab")
    assert one.fingerprint in str(caught.value)


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_pixel(path):
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["train_inputs"][3, 5, 5, 0] ^= 1  # a whole zip, so only the checksum can tell
    np.savez(path, **arrays)


def _flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def _drop_array(path):
    with np.load(path) as archive:
        arrays = dict(archive)
    del arrays["test_labels"]
    np.savez(path, **arrays)


def _other_format(path):
    with np.load(path) as archive:
        arrays = dict(archive)
    metadata = json.loads(str(arrays["metadata"]))
    arrays["metadata"] = np.array(json.dumps({**metadata, "format": 0}))
    np.savez(path, **arrays)


DAMAGES = {
    "truncated": _truncate,
    "pixel": _flip_pixel,
    "byte": _flip_byte,
    "missing array": _drop_array,
    "other format": _other_format,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an archive"),
    "pickle": lambda path: path.write_bytes(b"\x80\x04N."),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_cache_is_rebuilt_or_refused(folders, caplog, damage):
    prepare(folders["data_dir"], "mnist")
    first = data.load("mnist", **folders)
    (path,) = _cached(folders)
    whole = path.read_bytes()
    damage(path)
    assert path.read_bytes() != whole
    _assert_same(first, data.load("mnist", **folders))
    assert f"{path} is damaged" in caplog.text
    caplog.clear()
    _assert_same(first, data.load("mnist", **folders))
    assert not caplog.records  # the rebuilt file is sound
    damage(path)
    _vanish(folders["data_dir"])
    with pytest.raises(FileNotFoundError, match="is damaged: "):
        data.load("mnist", **folders)


def test_renamed_cache_file_is_not_believed(folders):
    prepare(folders["data_dir"], "mnist")
    data.load("mnist", **folders)
    (path,) = _cached(folders)
    path.rename(path.with_name(path.name.replace("mnist", "fashion_mnist")))
    with pytest.raises(FileNotFoundError, match=r"it holds mnist-3\.0\.1-"):
        data.load("fashion_mnist", **folders)


def test_unwritable_cache_is_done_without(folders, caplog):
    prepare(folders["data_dir"], "mnist")
    folders["cache_dir"].write_text("a file where the folder should be")
    mnist = data.load("mnist", **folders)
    assert len(mnist.train.labels) == 60 - VALIDATION
    assert "cannot be written" in caplog.text
    assert folders["cache_dir"].read_text() == "a file where the folder should be"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_write_leaves_nothing(folders, monkeypatch, error):
    prepare(folders["data_dir"], "mnist")

    def half(stream, **_):
        stream.write(b"half")
        raise error

    monkeypatch.setattr(np, "savez", half)
    if isinstance(error, OSError):
        data.load("mnist", **folders)
    else:
        with pytest.raises(KeyboardInterrupt):
            data.load("mnist", **folders)
    assert _cached(folders) == []


def test_concurrent_writers_leave_one_whole_file(folders):
    prepare(folders["data_dir"], "mnist")
    first = data.load("mnist", **folders)
    (path,) = _cached(folders)
    key = _cache.Key("mnist", "3.0.1", first.fingerprint)
    entry = _cache.read(folders["cache_dir"], key)
    path.unlink()
    writers = [
        threading.Thread(target=_cache.write, args=(folders["cache_dir"], entry)) for _ in range(4)
    ]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert _cached(folders) == [path]
    assert _cache.read(folders["cache_dir"], key).checksums == entry.checksums


# ---------------------------------------------------------------------------------------------
# What can be wrong with a source


@pytest.mark.parametrize("name", data.NAMES[1:])
def test_absent_set_fails_at_once_and_says_what_to_do(folders, name, no_reading):
    began = time.perf_counter()
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name, **folders)
    assert time.perf_counter() - began < 5
    message = str(caught.value)
    for part in (
        str(folders["data_dir"] / name),
        str(folders["cache_dir"]),
        f"tfds build {name} --file_format=array_record",
        "TFDS_DATA_DIR",
    ):
        assert part in message
    assert _cached(folders) == []


def test_absent_set_is_downloaded_where_that_is_possible(folders, monkeypatch, caplog):
    monkeypatch.setattr(_prepared, "can_prepare", lambda name: True)
    monkeypatch.setattr(_prepared, "prepare", prepare)
    assert len(data.load("mnist", **folders).test.labels) == 10
    assert "TFDS downloads it" in caplog.text


def test_download_wants_tensorflow_and_a_network(monkeypatch):
    for installed, reachable in itertools.product([True, False], repeat=2):
        monkeypatch.setattr(
            _prepared.importlib.util, "find_spec", lambda _, found=installed: found or None
        )
        monkeypatch.setattr(_prepared, "_reachable", lambda *_, answer=reachable: answer)
        assert _prepared.can_prepare("mnist") == (installed and reachable)


class _Answer(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200 if self.path == "/here" else 403)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_reachable_means_an_answer_in_time(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), _Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert REACHABLE(f"{address}/here", 3.0)
        assert not REACHABLE(f"{address}/forbidden", 3.0)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.perf_counter()
        assert not REACHABLE(f"http://127.0.0.1:{silent.getsockname()[1]}/", 0.3)
        assert time.perf_counter() - began < 2


def test_a_name_server_that_hangs_does_not_hang_the_check(monkeypatch):
    # Looking up a name ignores the timeout that is given to `urlopen`.
    released = threading.Event()
    monkeypatch.setattr(_prepared.urllib.request, "urlopen", lambda *_, **__: released.wait(5))
    began = time.perf_counter()
    assert not REACHABLE("http://example.org/", 0.2)
    assert time.perf_counter() - began < 2
    released.set()


def test_images_that_went_through_jpeg_are_named(folders):
    prepare(folders["data_dir"], "cifar10", image_format="JPEG")
    prepare(folders["data_dir"], "mnist")
    for _ in ("prepared", "cached"):
        assert "went through JPEG" in data.load("cifar10", **folders).note
        assert "JPEG" not in data.load("mnist", **folders).note


@pytest.mark.parametrize("file_format", ["tfrecord", "riegeli", None])
def test_wrong_file_format_is_named(folders, file_format):
    prepare(folders["data_dir"], "mnist", file_format=file_format or "tfrecord")
    path = folders["data_dir"] / "mnist" / "3.0.1" / "dataset_info.json"
    if file_format is None:  # old TFDS versions wrote tfrecord without saying so
        info = json.loads(path.read_text())
        del info["fileFormat"]
        path.write_text(json.dumps(info))
    with pytest.raises(ValueError, match="as array_record") as caught:
        data.load("mnist", **folders)
    for part in (file_format or "tfrecord", str(path.parent), "--file_format=array_record"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("absent", "package"),
    [
        (("PIL", "cv2"), "pillow"),
        (("array_record",), "array_record"),
        (("tensorflow_datasets",), "tensorflow-datasets"),
    ],
)
def test_missing_package_is_named(folders, monkeypatch, absent, package):
    prepare(folders["data_dir"], "mnist")
    real = _prepared.importlib.util.find_spec
    monkeypatch.setattr(
        _prepared.importlib.util, "find_spec", lambda m: None if m in absent else real(m)
    )
    with pytest.raises(ImportError, match=f"do: pip install {package}$"):
        data.load("mnist", **folders)


def test_broken_files_end_in_one_error_that_says_what_to_do(folders):
    prepare(folders["data_dir"], "mnist")
    folder = folders["data_dir"] / "mnist" / "3.0.1"
    (folder / "mnist-test.array_record-00000-of-00001").unlink()
    with pytest.raises(OSError, match=r"expected a readable prepared mnist.*tfds build mnist"):
        data.load("mnist", **folders)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected JSON in .*dataset_info.json"):
        data.load("mnist", **folders)
    assert _cached(folders) == []


def test_broken_content_never_reaches_the_cache(folders):
    prepare(folders["data_dir"], "mnist", top=12)
    with pytest.raises(ValueError, match=r"expected labels in 0\.\.9, got 1[01] at index"):
        data.load("mnist", **folders)
    prepare(folders["data_dir"], "fashion_mnist", train=VALIDATION)
    with pytest.raises(ValueError, match="expected more than 20 training examples"):
        data.load("fashion_mnist", **folders)
    assert _cached(folders) == []


def test_wrong_image_shape_is_refused(folders, monkeypatch):
    prepare(folders["data_dir"], "mnist")
    spec = _prepared.SPECS["mnist"]._replace(shape=(28, 14, 2))
    monkeypatch.setitem(_prepared.SPECS, "mnist", spec)
    with pytest.raises(OSError, match=r"\(28, 28, 1\), not \(28, 14, 2\)"):
        data.load("mnist", **folders)


def test_ids_must_differ():
    split = data.Split(np.zeros((2, 1, 1, 1)), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="expected 2 different ids, got 1"):
        _prepared.canonical(split, [b"train_1", b"train_1"])


def test_errors_of_the_callback_are_its_own(folders):
    prepare(folders["data_dir"], "mnist")

    def stop(_):
        raise StopAsyncIteration("mine")

    with pytest.raises(StopAsyncIteration, match="mine"):
        data.load("mnist", **folders, progress=stop)


# ---------------------------------------------------------------------------------------------
# Batches


@pytest.mark.floor
@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(0, 40),
    batch_size=st.integers(1, 17),
    start=st.integers(0, 4),
    shuffled=st.booleans(),
)
def test_every_example_counts_exactly_once(num, batch_size, start, shuffled):
    inputs = np.arange(num, dtype=np.float32)[:, None] / 40
    labels = np.arange(num)
    targets = np.stack([labels, labels + 0.5], 1)
    order = data.epoch_order([1], 0, num) if shuffled else None
    found = list(
        data.batches(inputs, labels, targets, batch_size=batch_size, order=order, start=start)
    )
    assert len(found) == max(0, data.num_batches(num, batch_size) - start)
    seen = []
    for batch in found:
        assert batch.inputs.shape == (batch_size, 1)
        assert batch.mask.dtype == np.float32
        assert batch.labels.dtype == np.int32
        # Padding or not, a row belongs together.
        np.testing.assert_array_equal(batch.inputs[:, 0], inputs[batch.labels, 0])
        np.testing.assert_array_equal(batch.targets, targets[batch.labels])
        real = batch.mask == 1
        assert (batch.mask[~real] == 0).all()
        assert (batch.labels[~real] == batch.labels[0]).all()
        seen += batch.labels[real].tolist()
    expected = labels if order is None else order
    assert seen == expected[start * batch_size :].tolist()


def test_batches_of_a_subset_without_labels():
    inputs = np.arange(10.0)[:, None]
    (batch,) = data.batches(inputs, batch_size=4, order=np.flatnonzero(inputs[:, 0] > 6))
    assert batch.inputs[:, 0].tolist() == [7, 8, 9, 7]
    assert batch.mask.tolist() == [1, 1, 1, 0]
    assert batch.labels is None
    assert batch.targets is None


def test_batches_do_not_alias_the_data():
    inputs = np.zeros((4, 1))
    batch = next(data.batches(inputs, batch_size=2))
    batch.inputs[:] = 1
    assert not inputs.any()


_X, _Y = np.zeros((4, 2)), np.zeros(4, np.int64)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ((np.zeros(4), _Y), {}, "rank >= 2"),
        ((_X, _Y[:3]), {}, "expected labels of shape"),
        ((_X, np.zeros(4)), {}, "expected integer labels"),
        ((_X, _Y, np.zeros(4)), {}, "expected targets of shape"),
        ((_X, _Y, np.zeros((3, 2))), {}, "expected targets of shape"),
        ((_X, _Y), {"batch_size": 0}, "batch_size"),
        ((_X, _Y), {"batch_size": 2.0}, "batch_size"),
        ((_X, _Y), {"start": -1}, "start"),
        ((_X, _Y), {"order": np.array([0, 4])}, "indices in 0..3, got 4"),
        ((_X, _Y), {"order": np.array([0, -1])}, "indices in 0..3, got -1"),
        ((_X, _Y), {"order": np.array([0.0, 1.0])}, "integer indices"),
        ((_X, _Y), {"order": np.array([[0, 1]])}, "integer indices"),
    ],
)
def test_bad_batches_are_refused_at_the_call(columns, options, message):
    with pytest.raises(ValueError, match=message):
        data.batches(*columns, **{"batch_size": 2, **options})


def test_epoch_order_depends_on_every_word_and_the_epoch():
    orders = [
        data.epoch_order(words, epoch, 100)
        for words, epoch in [((1, 2), 0), ((1, 2), 1), ((1, 3), 0), ((2, 2), 0)]
    ]
    for order in orders:
        assert sorted(order) == list(range(100))
    assert len({order.tobytes() for order in orders}) == 4
    np.testing.assert_array_equal(
        orders[0], data.epoch_order(np.array([1, 2], np.uint32), np.int64(0), 100)
    )


@pytest.mark.parametrize(
    "arguments", [([-1], 0, 5), ([1], -1, 5), ([1.5], 0, 5), ([1], 0.5, 5), ([1], 0, -5)]
)
def test_bad_epoch_order_is_refused(arguments):
    with pytest.raises(ValueError, match="whole number"):
        data.epoch_order(*arguments)


# ---------------------------------------------------------------------------------------------
# Real sets, where they are at hand

_REAL = os.environ.get("TFDS_DATA_DIR")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "counts", "seconds"),
    # CIFAR-10 takes 1.2 s where memory is fresh at once; touching 900 MB can cost that again.
    [("mnist", (55000, 5000, 10000), 2), ("cifar10", (45000, 5000, 10000), 4)],
)
def test_real_set(name, counts, seconds, tmp_path, monkeypatch):
    if not (_REAL and _prepared.find(_prepared.tfds_root(_REAL), name)):
        pytest.skip(f"no prepared {name}: TFDS_DATA_DIR does not hold it")
    monkeypatch.setattr(_prepared, "_VALIDATION", 5000)
    folders = {"data_dir": _REAL, "cache_dir": tmp_path}
    first = data.load(name, **folders)
    assert tuple(len(s.labels) for s in first[1:4]) == counts
    for split in first[1:4]:
        assert split.inputs.shape[1:] == IMAGE[name]
        assert (split.inputs.min(), split.inputs.max()) == (0, 1)
        assert (np.bincount(split.labels, minlength=10) > 0.08 * len(split.labels)).all()
    began = time.process_time()  # not the wall's: the tests may share their cores with others
    second = data.load(name, **folders)
    assert time.process_time() - began < seconds
    # The load itself verified that the cached arrays have this checksum.
    assert (second.checksum, second.fingerprint) == (first.checksum, first.fingerprint)
    if name == "mnist":
        # The published global mean of MNIST's training pixels.
        both = np.concatenate([second.train.inputs, second.validation.inputs])
        assert float(both.mean(dtype=np.float64)) == pytest.approx(0.1307, abs=5e-5)
    else:
        # The official order of CIFAR-10: data_batch_1 begins frog, truck, truck, deer, automobile;
        # the test batch begins cat, ship, ship, airplane, frog.
        assert second.validation.labels[:5].tolist() == [6, 9, 9, 4, 1]
        assert second.test.labels[:5].tolist() == [3, 8, 8, 0, 6]
