"""Files of Flax: against what Flax says of them (tests/frameworks/make_flax.py), and broken ones."""

import struct
from pathlib import Path

import numpy as np
import pytest

from bncli.batchnorm.conventions import FLAX
from bncli.checkpoints import open_checkpoint
from bncli.errors import CheckpointError, NoBatchNormError
from tests.checkpoints.formats.damage import is_refused, mutations, truncated
from tests.checkpoints.formats.framework_answers import FILES, answers, check_layers, opened
from tests.conftest import Bncli

FOLDER = FILES / "flax"
ANSWERS = answers("flax")
SORTED = (
    "the file sorts names as text; the layers are in the order of their names and numbers, which may not be"
    " the network's"
)


@pytest.mark.parametrize("file", ANSWERS)
def test_layers_are_those_of_flax(file: str) -> None:
    kind, layers, _ = opened(FOLDER / file)
    assert kind == "flax msgpack"
    check_layers(layers, ANSWERS[file])
    for layer in layers:
        assert (layer.convention, layer.eps, layer.hyperparameters_known) == (FLAX, None, False)
        assert layer.num_batches_tracked is None


def test_the_order_of_calls_is_kept_where_the_file_has_it() -> None:
    _, layers, notes = opened(FOLDER / "called.msgpack")
    assert [layer.name for layer in layers] == [answer["name"] for answer in ANSWERS["called.msgpack"]]
    assert notes == ()


def test_names_that_are_sorted_as_text_are_put_in_the_order_of_their_numbers() -> None:
    _, layers, notes = opened(FOLDER / "sorted.msgpack")  # where BatchNorm_10 stands before BatchNorm_2
    assert [layer.name for layer in layers][:13] == [f"BatchNorm_{index}" for index in range(13)]
    assert notes == (SORTED,)
    _, layers, _ = opened(FOLDER / "nnx.msgpack")
    assert [layer.name for layer in layers][1:12] == [f"blocks.{index}" for index in range(11)]


def test_an_array_of_several_layers_is_divided_and_one_of_two_axes_is_not() -> None:
    _, layers, notes = opened(FOLDER / "scan.msgpack")
    assert [layer.name for layer in layers][1:] == [f"Block_0.BatchNorm_0[{index}]" for index in range(3)]
    assert "one array for several layers" in notes[-1]
    _, (layer,), notes = opened(FOLDER / "two-axes.msgpack")
    assert layer.num_features == 15
    assert notes == ("BatchNorm_0: BatchNorm over several axes, of shape (3, 5)",)


def test_copies_for_devices_are_one_layer_only_if_they_are_equal() -> None:
    _, layers, notes = opened(FOLDER / "replicated.msgpack")
    assert [layer.name for layer in layers] == ["BatchNorm_0"]
    assert notes == ("every array is there 2 times, as for 2 devices; the copies are equal",)
    _, layers, notes = opened(FOLDER / "drifted.msgpack")
    assert [layer.name for layer in layers] == ["BatchNorm_0[0]", "BatchNorm_0[1]"]
    (note,) = notes
    assert "2 devices: their weights are equal, but each has running statistics of its own" in note
    _, layers, (note,) = opened(FOLDER / "nnx-vmap.msgpack")  # three networks
    assert len(layers) == 3
    assert "3 devices or networks, and the layers differ" in note


def test_the_command_reads_them(bncli: Bncli) -> None:
    outcome = bncli("inspect-stats", FOLDER / "sorted.msgpack")
    assert outcome.code == 0
    assert "found 16 BatchNorm layers" in " ".join(outcome.out.split())


# ---- a writer of our own, for what Flax does not write


def text(name: str) -> bytes:
    return bytes([0xA0 + len(name)] if len(name) < 32 else [0xD9, len(name)]) + name.encode()


def array(values: np.ndarray, dtype: str = "", shape: tuple[int, ...] | None = None) -> bytes:
    lengths = values.shape if shape is None else shape
    packed = (
        b"\x93" + bytes([0x90 + len(lengths)]) + b"".join(b"\xce" + struct.pack(">I", n) for n in lengths)
    )
    packed += text(dtype or values.dtype.name) + b"\xc6" + struct.pack(">I", values.nbytes) + values.tobytes()
    return b"\xc9" + struct.pack(">I", len(packed)) + b"\x01" + packed


def tree(**parts: object) -> bytes:
    content = b"".join(
        text(key) + (part if isinstance(part, bytes) else tree(**part))  # type: ignore[arg-type]
        for key, part in parts.items()
    )
    return bytes([0x80 + len(parts)]) + content


ONES = np.ones(3, "f4")
STATISTICS = {"mean": array(ONES), "var": array(2 * ONES)}


def names(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return [layer.name for layer in opened(path)[1]]


def test_what_looks_like_batch_norm_and_is_none(tmp_path: Path) -> None:
    normalizer = {**STATISTICS, "count": array(np.ones((), "f4"))}
    others = {"obs": normalizer, "opt_state": {"mu": STATISTICS}, "odd": {"mean": array(ONES)}}
    path = tmp_path / "a.msgpack"
    assert names(path, tree(bn=STATISTICS, **others)) == ["bn"]
    with pytest.raises(NoBatchNormError, match="no BatchNorm layer with running statistics"):
        names(path, tree(**others))
    whole = {"mean": array(np.ones(3, "i4")), "var": array(np.ones(3, "i4"))}
    with pytest.raises(NoBatchNormError):
        names(path, tree(bn=whole))


def test_parameters_are_found_beside_the_statistics_and_around_them(tmp_path: Path) -> None:
    affine = {"scale": array(3 * ONES)}
    path = tmp_path / "a.msgpack"
    for content in (
        tree(params={"bn": affine}, batch_stats={"bn": STATISTICS}),
        tree(params={"params": {"bn": affine}}, batch_stats={"bn": STATISTICS}),
        tree(params={"bn": affine}, state={"batch_stats": {"bn": STATISTICS}}),
        tree(params={"bn": affine}, other={"bn": STATISTICS}),
    ):
        path.write_bytes(content)
        (layer,) = opened(path)[1]
        assert layer.weight is not None, content
        assert layer.weight.tolist() == [3, 3, 3]
        assert layer.bias is None
    path.write_bytes(tree(params={"bn": {"scale": array(np.ones(4, "f4"))}}, batch_stats={"bn": STATISTICS}))
    (layer,) = opened(path)[1]
    assert layer.weight is None  # of another length: not its own
    with open_checkpoint(path) as checkpoint:
        assert "params.bn.scale" in checkpoint.tensors


def test_two_networks_in_a_file_keep_their_names_apart(tmp_path: Path) -> None:
    one = {"batch_stats": {"bn": STATISTICS}, "params": {"bn": {"scale": array(ONES)}}}
    assert names(tmp_path / "a.msgpack", tree(model=one, ema=one)) == ["model.bn", "ema.bn"]


def test_names_with_dots_do_not_become_one(tmp_path: Path) -> None:
    content = {"a.b": {"bn": STATISTICS}, "a": {"b.bn": STATISTICS}}
    assert names(tmp_path / "a.msgpack", tree(batch_stats=content)) == ["a.b.bn", "a.b.bn#2"]


# ---- damage


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    for file in ("sorted.msgpack", "chunked.msgpack"):
        for path in truncated(FOLDER / file, tmp_path / file):
            assert is_refused(path)


@pytest.mark.parametrize("file", ["scan.msgpack", "chunked.msgpack"])
def test_a_changed_file_is_refused_or_read(tmp_path: Path, file: str) -> None:
    assert mutations(tmp_path, FOLDER / file, 60) > 3


@pytest.mark.slow
@pytest.mark.parametrize("file", ["sorted.msgpack", "chunked.msgpack"])
def test_many_changed_files_are_refused_or_read(tmp_path: Path, file: str) -> None:
    assert mutations(tmp_path, FOLDER / file, 500) > 20


def test_hostile_files_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.msgpack"
    flax = text("float32")
    deep = b"\x81" + text("a")
    for content in (
        b"\xdf\xff\xff\xff\xff" + text("a") + flax,  # a map of 4 thousand million entries
        b"\x81" + text("a") + b"\xdd\xff\xff\xff\xff" + flax,  # such a list
        b"\x81" + text("a") + b"\xdb\xff\xff\xff\xff" + flax,  # such a text
        b"\x81" + text("a") + b"\xc6\xff\xff\xff\xff" + flax,  # such a run of bytes
        deep * 5000 + flax,  # nested
        b"\x81" + text("a") + b"\xdd\x00\x10\x00\x00" + b"\x80" * 2**20 + flax,  # a million objects
        tree(a=array(ONES)) + b"\0",  # something behind
        tree(bn={"mean": array(ONES, shape=(2**31, 2**31)), "var": array(ONES)}),
        tree(bn={"mean": array(ONES, shape=(4,)), "var": array(ONES)}),
        b"\x81" + b"\xc0" + flax,  # a key that is none
        tree(a={"__msgpack_chunked_array__": b"\xc3", "shape": tree(), "chunks": tree()}, b=array(ONES)),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            opened(path)
        assert "\n" not in str(caught.value)


def test_a_stack_of_very_many_layers_is_refused(tmp_path: Path) -> None:
    many = {"mean": array(np.ones((20_000, 2), "f4")), "var": array(np.ones((20_000, 2), "f4"))}
    (tmp_path / "a.msgpack").write_bytes(tree(batch_stats={"bn": many}))
    with pytest.raises(CheckpointError, match="a stack of more than"):
        opened(tmp_path / "a.msgpack")


def test_only_batch_norm_is_read(tmp_path: Path) -> None:
    from contextlib import ExitStack

    from bncli.checkpoints.any_content import open_file, read_content

    large = np.zeros(2**22, "f4")
    (tmp_path / "a.msgpack").write_bytes(
        tree(params={"kernel": array(large)}, batch_stats={"bn": STATISTICS})
    )
    with ExitStack() as stack:
        file = open_file(str(tmp_path / "a.msgpack"), stack)
        read_content(file, stack)
        assert file.num_read < large.nbytes // 4
