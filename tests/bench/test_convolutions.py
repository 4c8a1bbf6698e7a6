"""Each convolution's products: what is counted, and what is said of those that a step does not compute."""

from pathlib import Path

import pytest

from bncli.bench import convolutions
from bncli.bench.convolutions import bench_convolutions
from bncli.config_file import load_config
from bncli.training import prepare
from bncli.training.run import Run


def test_every_product_is_as_many_operations_as_its_matrix_product(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a second for each way, and for each of the three matrix products
    monkeypatch.setattr(convolutions, "_best_times", lambda ways, device: [1.0] * len(ways))
    run = Run.start(prepare(load_config(tiny_config)))
    first, second = bench_convolutions(run.setup, (), peak=2.0, seconds_per_image=0.5)
    assert [first.name, second.name] == ["stages.0.0.conv", "stages.1.0.conv"]
    assert (first.in_channels, first.out_channels, first.output_size) == (3, 8, (32, 32))
    flops = {first.name: 2 * 50 * 32 * 32 * 8 * 27, second.name: 2 * 50 * 16 * 16 * 16 * 72}
    for layer in (first, second):
        assert layer.num_images == 50
        for product in layer.products:
            assert product.gflops_per_second == pytest.approx(flops[layer.name] / 1e9)
            assert product.matrix_gflops_per_second == pytest.approx(product.gflops_per_second)
            assert product.share_of_peak == pytest.approx(product.gflops_per_second / 2)
    shares = {product.product: product.share_of_step for product in first.products}
    # nobody asks for the gradient by the images themselves
    assert shares == {
        "forward": pytest.approx(1 / 25),
        "by input": None,
        "by weight": pytest.approx(1 / 25),
        "by weight, patches": None,
    }
    patched = bench_convolutions(run.setup, (second.name,), peak=2.0, seconds_per_image=0.5)[1]
    assert [product.share_of_step is None for product in patched.products] == [False, False, True, False]


def test_products_of_groups_and_strides_are_timed_as_the_network_computes_them(
    tiny_config: Path, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("""
from torch import nn
def grouped(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, (3, 1), groups=4, dilation=2),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )
""")
    text = tiny_config.read_text().replace(
        "model: {widths: [8, 16], blocks_per_stage: 1}", f"model: {{name: {tmp_path}/own.py:grouped}}"
    )
    (tmp_path / "own.yaml").write_text(text)
    run = Run.start(prepare(load_config(tmp_path / "own.yaml", ["train.batch_size=4"])))
    first, second = bench_convolutions(run.setup, (), peak=1.0, seconds_per_image=1.0)
    assert (first.name, first.output_size, first.groups) == ("0", (16, 16), 1)
    assert (second.kernel_size, second.output_size, second.groups) == ((3, 1), (12, 16), 4)
    assert [product.product for product in second.products] == ["forward", "by input", "by weight"]
    assert all(product.gflops_per_second > 0 for layer in (first, second) for product in layer.products)
