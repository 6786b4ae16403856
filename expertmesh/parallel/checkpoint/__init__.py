"""Named tensors, each cut over ranks in any way, to files and back to ranks that cut otherwise.

On disk a tensor is a set of boxes that cover it. Which rank wrote which box, and how many ranks
there were, does not matter to those that read: each asks for the boxes it holds itself, and reads
of the files only what overlaps. Nothing is pickled.
"""

from expertmesh.parallel.checkpoint.files import Written, flush_folder, sha256, write_json
from expertmesh.parallel.checkpoint.index import Entry, index_file, read_index, single_file
from expertmesh.parallel.checkpoint.load import load_tensors
from expertmesh.parallel.checkpoint.save import Part, plan

__all__ = [
    "Entry",
    "Part",
    "Written",
    "flush_folder",
    "index_file",
    "load_tensors",
    "plan",
    "read_index",
    "sha256",
    "single_file",
    "write_json",
]
