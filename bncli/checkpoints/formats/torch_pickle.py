"""What PyTorch's pickles mean: storages, views of them, parameters, ordered dicts; all else stays inert."""

from collections import OrderedDict
from collections.abc import Callable

import torch

from bncli.checkpoints.byte_source import UnreadableFileError
from bncli.checkpoints.formats.inert_pickle import MAX_OPERATIONS, Global, Inert
from bncli.checkpoints.stored_tensor import Storage, StoredTensor, stored_tensor

# torch.FloatStorage and its kin: the type that a storage of torch.save has
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
    "UntypedStorage": torch.uint8,
}
_PLAIN_STORAGES = {
    f"{kind}Storage"
    for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
# types without a storage class of their own, which `_rebuild_tensor_v3` names beside an untyped storage
_NEWER_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
    )
}
# by their names in the module torch
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGE_DTYPES.values()} | _NEWER_DTYPES
_DICTS = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict"}
_SEQUENCES = {
    f"{module}.{name}"
    for module in ("builtins", "__builtin__")
    for name in ("set", "frozenset", "list", "tuple")
} | {"torch.Size"}
_TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
# subclasses of Tensor hold the function that rebuilds the tensor and its arguments
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
# A pickle may name storages and drop them again, which costs it three operations, and us 700 bytes each where
# they are noted. Tensors take about 30, so a sound one never comes near this.
MAX_NOTED = 250_000
# key, number of elements and bytes of each: the storage that holds them
FindStorage = Callable[[str, int, int], Storage]


class StorageView:
    """A typed storage, or a part of one, as a persistent id names it."""

    __slots__ = ("dtype", "offset", "storage")

    def __init__(self, storage: Storage, dtype: torch.dtype, offset: int = 0) -> None:
        self.storage = storage
        self.dtype = dtype
        self.offset = offset  # elements


class TorchMeanings:
    """The meanings of calls and persistent ids in a pickle of `torch.save`.

    `find_storage(key, num_elements, itemsize)` gives the storage of that many elements of so many bytes each.
    """

    def __init__(self, find_storage: FindStorage) -> None:
        self._find_storage = find_storage
        self._num_copied = 0

    def call(self, function: Global, arguments: tuple[object, ...]) -> object:
        """The value of a call that checkpoints consist of; `Inert` for any other."""
        name = function.path
        if name in _TENSORS:
            return self._tensor(arguments)
        if name == "torch._utils._rebuild_tensor_v3" and len(arguments) >= 7:
            return self._tensor(arguments, dtype=arguments[6])
        if name in _PARAMETERS and arguments:
            return arguments[0]
        if name == _FROM_TYPE and len(arguments) >= 3:
            return self._rebuild_from_type(arguments)
        if name in _DICTS:
            return self._dict(arguments)
        if name in _SEQUENCES:
            return arguments[0] if arguments and isinstance(arguments[0], list | tuple) else []
        return Inert(function, arguments)

    def find_persistent(self, key: object) -> object:
        """A storage: ('storage', type, key, location, number of elements, optional view)."""
        if isinstance(key, tuple) and len(key) > 1 and key[0] == "module":  # (.., class, file, source)
            return key[1]
        if not isinstance(key, tuple) or len(key) not in (5, 6) or key[0] != "storage":
            return Inert(None)
        _, kind, name, _, num_elements = key[:5]
        dtype = STORAGE_DTYPES.get(kind.name) if isinstance(kind, Global) else None
        if dtype is None or type(name) is not str or type(num_elements) is not int or num_elements < 0:
            raise UnreadableFileError("a damaged file: a storage without a proper type, key and size")
        storage = self._find_storage(name, num_elements, dtype.itemsize)
        view = key[5] if len(key) == 6 else None
        if isinstance(view, tuple) and len(view) == 3 and type(view[1]) is int and view[1] >= 0:
            return StorageView(storage, dtype, view[1])
        return StorageView(storage, dtype)

    def _tensor(self, arguments: tuple[object, ...], dtype: object = None) -> object:
        if len(arguments) < 4:
            raise UnreadableFileError("a damaged file: a tensor with too few arguments")
        view, offset, shape, stride = arguments[:4]
        if not isinstance(view, StorageView):
            return Inert(None, arguments)
        if dtype is not None:
            found = _NEWER_DTYPES.get(dtype.name) if isinstance(dtype, Global) else None
            if found is None:
                return Inert(None, arguments)
            return stored_tensor(view.storage, found, offset, shape, stride)
        offset = offset + view.offset if type(offset) is int else offset
        return stored_tensor(view.storage, view.dtype, offset, shape, stride)

    def _rebuild_from_type(self, arguments: tuple[object, ...]) -> object:
        function, _, inner = arguments[:3]
        if isinstance(function, Global) and function.path in _TENSORS and isinstance(inner, tuple):
            return self._tensor(inner)
        return Inert(None, arguments)

    def _dict(self, arguments: tuple[object, ...]) -> dict[str, object]:
        content: dict[str, object] = {}
        pairs = arguments[0] if arguments and isinstance(arguments[0], list | tuple) else ()
        # one list of the memo may be the argument of many calls
        self._num_copied += len(pairs)
        if self._num_copied > MAX_OPERATIONS:
            raise UnreadableFileError("a pickle that copies itself without bounds")
        for pair in pairs:
            if isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str):
                content[pair[0]] = pair[1]
        return content


class UsesOfStorages:
    """Every use of a storage in a pickle, also where its content does not show it, as in keys of dicts."""

    def __init__(self) -> None:
        self.tensors: list[StoredTensor] = []
        self._views: list[StorageView] = []
        self._understood: set[int] = set()  # identities of views that tensors were made of

    def meanings(self, find_storage: FindStorage) -> TorchMeanings:
        """Meanings that note the uses here."""
        return _NotingMeanings(find_storage, self)

    def note_view(self, view: StorageView) -> None:
        """A view that a pickle names; it is kept, so that no other gets its identity."""
        self._views.append(view)
        self._check_number(len(self._views))

    def note_tensor(self, view: object, tensor: StoredTensor) -> None:
        """A tensor that is made of such a view."""
        self.tensors.append(tensor)
        self._understood.add(id(view))
        self._check_number(len(self.tensors))

    def _check_number(self, number: int) -> None:
        if number > MAX_NOTED:
            raise UnreadableFileError(f"a pickle of more than {MAX_NOTED:,} tensors")

    @property
    def opaque(self) -> list[Storage]:
        """Storages of which something else than a tensor is made, or a tensor of an unknown kind."""
        return [view.storage for view in self._views if id(view) not in self._understood]


class _NotingMeanings(TorchMeanings):
    def __init__(self, find_storage: FindStorage, uses: UsesOfStorages) -> None:
        super().__init__(find_storage)
        self._uses = uses

    def find_persistent(self, key: object) -> object:
        view = super().find_persistent(key)
        if isinstance(view, StorageView):
            self._uses.note_view(view)
        return view

    def _tensor(self, arguments: tuple[object, ...], dtype: object = None) -> object:
        tensor = super()._tensor(arguments, dtype)
        if isinstance(tensor, StoredTensor):
            self._uses.note_tensor(arguments[0], tensor)
        return tensor


class PlainMeanings(TorchMeanings):
    """Only what files of bncli consist of: plain tensors and ordered dicts; all else stays inert."""

    def call(self, function: Global, arguments: tuple[object, ...]) -> object:
        """The value of a call; an ordered dict stays one, because digests tell it from a dict."""
        if function.path == "torch._utils._rebuild_tensor_v2" and arguments:
            return arguments[0] if isinstance(arguments[0], Inert) else self._tensor(arguments)
        if function.path == "collections.OrderedDict" and not arguments:
            return OrderedDict()
        return Inert(function, arguments)

    def find_persistent(self, key: object) -> object:
        """A storage of one of the types that bncli saves."""
        kind = key[1] if type(key) is tuple and len(key) == 5 else None
        if not isinstance(kind, Global) or kind.module != "torch" or kind.name not in _PLAIN_STORAGES:
            return Inert(kind if isinstance(kind, Global) else None)
        return super().find_persistent(key)
