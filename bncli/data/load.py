"""From the `data` section of the configuration to a data set."""

from dataclasses import replace

from bncli.config import Cifar10Config, DataConfig, NamedDataConfig, StreamableConfig, SyntheticConfig
from bncli.data.dataset import Dataset, Progress


def load_dataset(
    config: DataConfig,
    *,
    progress: Progress | None = None,
    may_download: bool = True,
    only_train: bool = False,
) -> Dataset:
    """Load or generate the data set that `config.name` names.

    `progress(what, done, total)` is called now and then in this thread while something takes long. Without
    `may_download` nothing is fetched but from a `url` that `config` names. With `only_train` the training
    split is both, and the test split is not read; of folders and named data sets it is not even looked for.

    Raises:
        DataError: the data set is missing, incomplete or damaged, or cannot be used.
    """
    dataset = _load(config, progress, may_download=may_download, only_train=only_train)
    if only_train:
        dataset = replace(dataset, test=dataset.train)
    if not isinstance(config, StreamableConfig) or config.classes is None:
        return dataset
    from bncli.data.class_order import read_class_order

    return read_class_order(config.classes).applied_to(dataset)


def _load(config: DataConfig, progress: Progress | None, *, may_download: bool, only_train: bool) -> Dataset:
    # Each source is imported where it is used: torchvision and PIL only when needed.
    if isinstance(config, SyntheticConfig):
        from bncli.data.synthetic import load_synthetic

        return load_synthetic(config, progress, only_train=only_train)
    if isinstance(config, Cifar10Config):
        from bncli.data.cifar10 import load_cifar10

        return load_cifar10(config, progress, may_download=may_download, only_train=only_train)
    if isinstance(config, NamedDataConfig):
        from bncli.data.named import load_named_data

        return load_named_data(config, progress, only_train=only_train)
    from bncli.data.imagefolder import load_image_folder

    return load_image_folder(config, progress, only_train=only_train)
