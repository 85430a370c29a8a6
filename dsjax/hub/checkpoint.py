"""A checkpoint folder of the Hub, checked whole before any weight is read; then read in pieces, in our layout."""

import math
import re
from pathlib import Path

import numpy as np

from dsjax.config import ModelConfig, replace
from dsjax.hub import fp8
from dsjax.hub.config import HubConfig, read_config
from dsjax.hub.files import HubError, Stored, open_folder
from dsjax.hub.names import HubTensor, hub_tensors

_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # a constant that old writers kept
_FLOATS = ("F64", "F32", "F16", "BF16")
PIECE_BYTES = 32 << 20  # of float32: what a converter holds of a tensor at a time


class HubCheckpoint:
    """The tensors of a folder and which of ours they are.

    `notes` is what a user should hear. Raises HubError for a missing, unknown, misshapen or unreadable tensor, by name.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.config: HubConfig = read_config(folder)
        self.files: dict[str, Stored] = open_folder(folder)
        self.notes = list(self.config.notes)
        self.model = self._without_absent_mtp(self.config.model)
        self.tensors = [t for t in hub_tensors(self.model) if not t.copy or t.name in self.files]
        self._check()

    @property
    def n_bytes(self) -> int:
        return sum(stored.n_bytes for stored in self.files.values())

    def read(self, tensor: HubTensor, place: tuple[slice, ...]) -> np.ndarray:
        """A block of the tensor in our layout: float32 from FP8, else in the file's dtype."""
        where = tensor.file_slices(place)
        values = self.files[tensor.name].read(*where)
        if (scale := self.scale(tensor.name)) is not None:
            part = scale.read(*map(fp8.blocks_of, where)).astype(np.float32)
            values = fp8.dequantise(values, part, (where[0].start, where[1].start))
        return tensor.to_ours(values)

    def read_blocks(self, tensor: HubTensor, place: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray] | None:
        """The same as e4m3 values and float32 scales, where the file has them and its blocks begin where this one does.

        Scales are those of the matrix [in, out].
        """
        where, scale = tensor.file_slices(place), self.scale(tensor.name)
        if scale is None or tensor.halves or any(s.start % fp8.BLOCK for s in where):
            return None
        values = tensor.to_ours(self.files[tensor.name].read(*where))
        return values, scale.read(*map(fp8.blocks_of, where)).astype(np.float32).T

    def scale(self, name: str) -> Stored | None:
        """Where the scales of an FP8 tensor lie."""
        return self.files.get(name + fp8.SUFFIX)

    def differing_copies(self) -> list[HubTensor]:
        """The MTP layers' copies of embedding and head that are not equal to the shared ones."""
        shared = {t.leaf: self.files[t.name] for t in self.tensors if not t.copy and not t.index}
        return [t for t in self.tensors if t.copy and not _equal(self.files[t.name], shared[t.leaf])]

    def _without_absent_mtp(self, model: ModelConfig) -> ModelConfig:
        depth, n = model.num_nextn_predict_layers, model.num_hidden_layers
        prefixes = tuple(f"model.layers.{n + k}." for k in range(depth))
        if not depth or any(name.startswith(prefixes) for name in self.files):
            return model
        self.notes.append(
            f"num_nextn_predict_layers={depth}, and the files hold no layer {n} (transformers writes none): "
            "the model has no multi-token prediction"
        )
        return replace(model, num_nextn_predict_layers=0)

    def _check(self) -> None:
        wanted = {tensor.name: tensor for tensor in self.tensors}
        missing = [name for name in wanted if name not in self.files]
        if missing:
            raise HubError(f"{self.folder}: {_some(missing)} missing; {self.model.num_hidden_layers} layers need it")
        scales = {name + fp8.SUFFIX: name for name in wanted}
        ignored = [name for name in self.files if _IGNORED.fullmatch(name)]
        extra = [name for name in self.files if name not in wanted and name not in scales and name not in ignored]
        if extra:
            raise HubError(f"{self.folder}: {_some(extra)} not part of a {self.config.raw['model_type']} model")
        if ignored:
            self.notes.append(f"{_some(ignored)} left out: a constant")
        for name, tensor in wanted.items():
            stored = self.files[name]
            if stored.shape != tensor.shape:
                raise HubError(
                    f"{stored.file}: {name} has shape {list(stored.shape)}; config.json makes it {list(tensor.shape)}"
                )
            if stored.dtype not in (*_FLOATS, "F8_E4M3"):
                raise HubError(f"{stored.file}: {name} is {stored.dtype}; expected {', '.join(_FLOATS)} or F8_E4M3")
            self._check_scale(name, stored)

    def _check_scale(self, name: str, stored: Stored) -> None:
        scale = self.scale(name)
        if stored.dtype != "F8_E4M3":
            if scale is not None:
                raise HubError(f"{scale.file}: {name}{fp8.SUFFIX} is there, and {name} is {stored.dtype}, not F8_E4M3")
            return
        if scale is None:
            raise HubError(f"{stored.file}: {name} is F8_E4M3, and {name}{fp8.SUFFIX} is missing")
        expected = fp8.scale_shape(stored.shape)
        if scale.shape != expected or scale.dtype not in (*_FLOATS, "F8_E8M0"):
            raise HubError(
                f"{scale.file}: {name}{fp8.SUFFIX} is {scale.dtype}{list(scale.shape)}; expected F32 or F8_E8M0 "
                f"{list(expected)}, one for each {fp8.BLOCK} x {fp8.BLOCK} block"
            )


def pieces(tensor: HubTensor, most: int = PIECE_BYTES) -> list[tuple[slice, ...]]:
    """Blocks of `tensor.part` one after the other, cut along the file's rows into multiples of 128 of them."""
    whole, axis = [slice(0, n) for n in tensor.part], tensor.row_axis
    unit = math.lcm(fp8.BLOCK, tensor.rows_each)
    rows = max(unit, most // (4 * math.prod(tensor.shape[1:])) // unit * unit)
    step = rows // tensor.rows_each
    cuts = range(0, tensor.part[axis], step)
    return [(*whole[:axis], slice(at, min(at + step, tensor.part[axis])), *whole[axis + 1 :]) for at in cuts]


def _equal(a: Stored, b: Stored) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    step = max(1, PIECE_BYTES * a.shape[0] // a.n_bytes)
    cuts = (slice(at, min(at + step, a.shape[0])) for at in range(0, a.shape[0], step))
    return all(a.read(cut).tobytes() == b.read(cut).tobytes() for cut in cuts)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} {'are' if more else 'is'}"
