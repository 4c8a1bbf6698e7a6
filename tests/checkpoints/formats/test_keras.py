"""Files of Keras 3, compared with what Keras itself says of them (tests/frameworks/make_keras.py)."""

from pathlib import Path

import pytest

from bncli.batchnorm.conventions import KERAS_3, KERAS_2_OR_3
from tests.checkpoints.formats.corpus import Corpus, check_output, check_values, file_names, pair, unpack

FILES = file_names("keras")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return unpack("keras", tmp_path_factory.mktemp("keras"))


@pytest.mark.parametrize("name", FILES)
def test_arrays_are_those_of_keras_bit_for_bit(corpus: Corpus, name: str) -> None:
    _, layers = corpus.open(name)
    for layer, answer in pair(layers, corpus.answers(name)):
        check_values(layer, answer)
        check_output(layer, answer, eps=answer["epsilon"])


@pytest.mark.parametrize("name", [name for name in FILES if "long" not in name])
def test_order_names_and_hyperparameters_are_those_of_keras_where_the_file_has_them(
    corpus: Corpus, name: str
) -> None:
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
        assert layer.convention in (KERAS_3, KERAS_2_OR_3)
