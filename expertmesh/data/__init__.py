"""Text to batches: fetch, read, tokenise, split, pack, mix, load."""

from expertmesh.data.config import DataBundle, DataConfig, build_data
from expertmesh.data.dataset import Dataset, Sample
from expertmesh.data.loader import Batch, Loader, in_order
from expertmesh.data.mixture import Mixture
from expertmesh.data.packing import DocumentDataset, PackedDataset
from expertmesh.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "DataBundle",
    "DataConfig",
    "Dataset",
    "DocumentDataset",
    "Loader",
    "Mixture",
    "PackedDataset",
    "Sample",
    "Tokenizer",
    "build_data",
    "in_order",
    "load_tokenizer",
]
