"""Networks as people write them themselves: see `everybodys_networks.py`. All have 4 classes."""

import torch
from torch import Tensor, nn

from bncli.torchvision_compat import import_torchvision


class Answers(nn.Module):
    """A dict as its output."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.body = _body()
        self.head = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to features (N, 8) and logits (N, num_classes)."""
        features = self.body(images)
        return {"features": features, "logits": self.head(features)}


def _body() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def frozen(num_classes: int = 4) -> nn.Module:
    """With torchvision's FrozenBatchNorm2d, whose statistics belong to its weights, in front."""
    norm = import_torchvision().ops.FrozenBatchNorm2d(3)
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm, _body(), nn.Linear(8, num_classes))


def applied_twice(num_classes: int = 4) -> nn.Module:
    """One layer at two places."""
    norm, head = nn.BatchNorm2d(8), nn.Linear(8, num_classes)
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 8, 3), norm, *pool, head)


def timm_frozen(num_classes: int = 4) -> nn.Module:
    """timm's network whose first half is frozen by timm's own function."""
    import_torchvision()  # timm imports it, and finds it broken beside a CPU-only torch
    import timm
    from timm.layers import freeze_batch_norm_2d

    network: nn.Module = timm.create_model("resnet10t", num_classes=num_classes)
    for name in ("conv1", "bn1", "layer1", "layer2"):
        setattr(network, name, freeze_batch_norm_2d(getattr(network, name)))
    return network


class AutoEncoder(nn.Module):
    """No classifier: an image and a code, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(_block(3, 4, 2), _block(4, 6, 2))
        self.decoder = nn.Sequential(nn.Upsample(scale_factor=4), _block(6, 3, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to a code (N, 6, H / 4, W / 4) and images."""
        code = self.encoder(images)
        return {"code": code, "image": self.decoder(code)}


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def lightning_module(num_classes: int = 4) -> nn.Module:
    """A LightningModule, which real Lightning trains and saves."""
    import_torchvision()  # torchmetrics, which Lightning imports, imports it too
    from lightning.pytorch import LightningModule

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(_body(), nn.Linear(8, num_classes))

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.net(images)
            return logits

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Classifier()
