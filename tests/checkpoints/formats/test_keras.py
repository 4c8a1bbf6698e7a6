"""Files of Keras 3 and tf.keras 2, compared with what Keras says of them (tests/frameworks/make_*.py)."""

from pathlib import Path

import pytest

from bncli.batchnorm.conventions import KERAS_2, KERAS_2_OR_3, KERAS_3, TENSORFLOW_1
from bncli.checkpoints import open_checkpoint
from bncli.checkpoints.formats.keras_layers import legacy_name
from bncli.errors import CheckpointError
from tests.checkpoints.formats.framework_answers import (
    Corpus,
    check_output,
    check_values,
    file_names,
    pair,
    unpack,
)

FRAMEWORKS = ("keras", "tf_keras")
FILES = [(framework, name) for framework in FRAMEWORKS for name in file_names(framework)]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    return {framework: unpack(framework, tmp_path_factory.mktemp(framework)) for framework in FRAMEWORKS}


@pytest.mark.parametrize(("framework", "name"), FILES)
def test_arrays_are_those_of_keras_bit_for_bit(corpora: dict[str, Corpus], framework: str, name: str) -> None:
    corpus = corpora[framework]
    checkpoint, layers = corpus.open(name)
    for layer, answer in pair(layers, corpus.answers(name)):
        if corpus.files[name].get("ambiguous") and ("gamma" in answer) != ("beta" in answer):
            assert (layer.weight, layer.bias) == (None, None)
            assert layer.name in " ".join(checkpoint.notes)
            continue
        check_values(layer, answer)
        check_output(layer, answer, eps=answer["epsilon"])


@pytest.mark.parametrize(("framework", "name"), FILES)
def test_order_names_and_hyperparameters_are_those_of_keras_where_the_file_has_them(
    corpora: dict[str, Corpus], framework: str, name: str
) -> None:
    corpus = corpora[framework]
    told = corpus.files[name]
    _, layers = corpus.open(name)
    pairs = pair(layers, corpus.answers(name))
    if told["ordered"]:
        assert [layer.name for layer in layers] == [layer.name for layer, _ in pairs]
    for layer, answer in pairs:
        if told["named"]:
            assert layer.name.rpartition(".")[2].partition("#")[0] == answer["name"]
        if told["configured"]:
            assert layer.eps == answer["epsilon"]
            assert layer.momentum == pytest.approx(1 - answer["momentum"], abs=1e-12)
        elif layer.eps is not None:  # those of somebody's class may not be described, others are
            assert layer.eps == answer["epsilon"]
        ours = (KERAS_3, KERAS_2_OR_3) if framework == "keras" else (KERAS_2, KERAS_2_OR_3, TENSORFLOW_1)
        assert layer.convention in ours


def test_a_layer_made_twice_in_one_process_has_the_name_of_its_group() -> None:
    """As in the emotion_model.hdf5 of the package fer 22.5.1."""
    one, inside = "batch_normalization_1", "batch_normalization_2"
    assert legacy_name(one, one, is_alone=True) == one
    assert legacy_name(one, f"{one}_1", is_alone=True) == one
    assert legacy_name("inner", inside, is_alone=True) == f"inner.{inside}"
    assert legacy_name("bn", "bn_1", is_alone=False) == "bn.bn_1"  # two inside a network called bn


def test_shards_are_found_by_their_directory(corpora: dict[str, Corpus], tmp_path: Path) -> None:
    means = set()
    for name in ("sharded", "sharded/flat.weights.json"):
        checkpoint, layers = corpora["keras"].open(name)
        assert checkpoint.kind == "keras shards"
        means.add(str([layer.running_mean for layer in layers]))
    assert len(means) == 1
    for name in ("a", "b"):
        (tmp_path / f"{name}.weights.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a directory, not a checkpoint"):
        open_checkpoint(tmp_path).__enter__()
