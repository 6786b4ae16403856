"""Text to batches: fetch, read, tokenise, split, pack, mix, load."""

from expertmesh.data.build import DataBundle, build_data
from expertmesh.data.config import DataConfig
from expertmesh.data.dataset import Dataset, Sample
from expertmesh.data.instructions import InstructionDataset
from expertmesh.data.loader import Batch, Loader, in_order
from expertmesh.data.mixture import Mixture
from expertmesh.data.packing import DocumentDataset, PackedDataset
from expertmesh.data.source_files import instruction_source
from expertmesh.data.templates import OPENMOE_TEMPLATE, TEMPLATES
from expertmesh.data.tokenizer import Tokenizer, load_tokenizer
from expertmesh.data.ul2 import DenoisingDataset

__all__ = [
    "OPENMOE_TEMPLATE",
    "TEMPLATES",
    "Batch",
    "DataBundle",
    "DataConfig",
    "Dataset",
    "DenoisingDataset",
    "DocumentDataset",
    "InstructionDataset",
    "Loader",
    "Mixture",
    "PackedDataset",
    "Sample",
    "Tokenizer",
    "build_data",
    "in_order",
    "instruction_source",
    "load_tokenizer",
]
