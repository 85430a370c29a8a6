"""A checkpoint's leaves on disk, read and written a slice at a time: for converters, which never hold a model whole.

What is written here is what Orbax restores, and what Orbax writes is read here: zarr arrays by leaf name.
"""

import json
import math
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts

from dsjax.config import ConfigError

CHUNK_BYTES = 64 << 20


class LeafFolder:
    """An item of one checkpoint, `run/checkpoints/STEP/model` or `.../rest`."""

    def __init__(self, step_folder: Path, item: str = "model"):
        self.folder = Path(step_folder).absolute() / item

    def names(self) -> list[str]:
        """Every leaf. Raises ConfigError if this is no checkpoint."""
        try:
            tree = json.loads((self.folder / "_METADATA").read_bytes())["tree_metadata"]
            return ["/".join(key["key"] for key in entry["key_metadata"]) for entry in tree.values()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.folder.parent}: no checkpoint, or a damaged one ({error})") from None

    def open(self, name: str) -> ts.TensorStore:
        """A leaf to read slices of: `leaf[3, 5].read().result()`. Raises ConfigError if it cannot be read."""
        meta = json.loads((self.folder / "_METADATA").read_bytes())
        path = f"{self.folder}/"
        if (self.folder / "manifest.ocdbt").exists():
            store = {"driver": "ocdbt", "base": f"file://{path}", "path": f"{name}/"}
        else:
            store = {"driver": "file", "path": f"{path}{name}/"}
        driver = "zarr3" if meta.get("use_zarr3") else "zarr"
        try:
            return ts.open({"driver": driver, "kvstore": store}, read=True, open=True).result()
        except ValueError as error:
            raise ConfigError(f"{self.folder.parent}: leaf {name} is missing or damaged ({error})") from None

    def create(self, name: str, shape: tuple[int, ...], dtype: np.dtype, chunks: tuple[int, ...]) -> ts.TensorStore:
        """A leaf to write: `leaf[3, 5].write(array).result()`; a slice of whole chunks is written without a read."""
        dtype = np.dtype(dtype)
        metadata = {
            "shape": shape,
            "chunks": chunks,
            "dtype": dtype.name if dtype.kind == "V" else dtype.str,
            "compressor": {"id": "zstd", "level": 1},
        }
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{self.folder}/{name}/"}, "metadata": metadata}
        return ts.open(spec | {"store_data_equal_to_fill_value": True}, create=True, open=False).result()

    def finish(self, names: list[str]) -> None:
        """Makes the folder with these leaves a checkpoint that Orbax restores."""
        value = {"value_type": "jax.Array", "skip_deserialize": False}
        tree = {str((n,)): {"key_metadata": [{"key": n, "key_type": 2}], "value_metadata": value} for n in names}
        whole = {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, "custom_metadata": None}
        (self.folder / "_METADATA").write_text(json.dumps(whole | {"store_array_data_equal_to_fill_value": True}))


def chunking(name: str, a: jax.Array) -> tuple[tuple[int, ...], int]:
    """(axes cut to slices of one, most bytes of a chunk) for Orbax, so that a layer or an expert can be read alone."""
    stacked = any(part in ("dense", "moe", "mtp_input", "mtp_block") for part in name.split("/"))
    if not stacked or math.prod(a.shape) * a.dtype.itemsize <= CHUNK_BYTES:
        return (), CHUNK_BYTES
    return (0, 1) if "experts" in name.split("/") else (0,), CHUNK_BYTES
