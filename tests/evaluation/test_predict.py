import pytest
import torch
from torch import Tensor, nn

from bncli.batchnorm.modes import buffers_digest
from bncli.evaluation import predict


def test_each_image_is_computed_alone_in_eval_mode_and_gets_its_own_answer() -> None:
    sizes = []

    class Records(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            sizes.append(len(x))
            return x

    net, images = nn.Sequential(nn.BatchNorm1d(4), Records()), torch.randn(5, 4)
    net[0](torch.randn(9, 4) + 1)
    digest = buffers_digest(net)
    found = predict(net, images, top=2)
    assert sizes == [1] * 5
    assert net.training
    assert buffers_digest(net) == digest
    expected = net[0].eval()(images).double().softmax(1).topk(2)
    assert [[item.label for item in answer] for answer in found] == expected.indices.tolist()
    for answer, values in zip(found, expected.values.tolist(), strict=True):
        assert [item.probability for item in answer] == pytest.approx(values)


def test_of_equal_classes_the_first_leads_and_top_must_be_positive() -> None:
    (answer,) = predict(nn.Identity(), torch.zeros(1, 3), top=9)
    assert [item.label for item in answer] == [0, 1, 2]
    with pytest.raises(ValueError, match="1 or more"):
        predict(nn.Identity(), torch.zeros(1, 3), top=0)
