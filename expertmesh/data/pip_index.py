"""Downloads one file of one release through pip's configured index, and runs none of it.

``pip download`` asks an sdist for its metadata, which executes the package's build backend. So this
script borrows pip's machinery up to the link only: the indexes, find-links folders, proxies,
certificates and credentials are the user's (environment, configuration file, keyring), the file is
stored as it came, and nothing is unpacked, built or imported.

It runs as a process of its own (``python -P pip_index.py FOLDER KIND NAME VERSION SHA256``),
because pip's modules configure logging and signals for a process that they own. It imports nothing
of this package. Lines of JSON on stdout tell the progress, then the file's name.
"""

import json
import os
import sys
from optparse import Values
from typing import Any

from pip._internal.commands.download import DownloadCommand
from pip._internal.exceptions import CommandError

_CHUNK = 1 << 18


def _tell(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


class _Store(DownloadCommand):
    """``pip download`` whose run stops at the stored file."""

    def run(self, options: Values, args: list[str]) -> int:
        name, version, sha256 = args
        session = self.get_default_session(options)
        finder = self._build_package_finder(
            options=options, session=session, ignore_requires_python=True
        )
        found = [c for c in finder.find_all_candidates(name) if str(c.version) == version]
        if not found:
            raise CommandError(
                f"{name}=={version} was not found: the package indexes that pip is configured "
                "with are out of reach or do not hold it"
            )
        # Several indexes may list the release; the one whose listed hash is the pinned one is best.
        found.sort(key=lambda c: c.link.hash != sha256)
        path = os.path.join(options.download_dir, os.path.basename(found[0].link.filename))
        _store(session, found[0].link.url_without_fragment, path)
        _tell(file=path)
        return 0


def _store(session: Any, url: str, path: str) -> None:
    """Write the response's bytes as sent: a decoded .tar.gz would have another hash."""
    with session.get(url, stream=True, headers={"Accept-Encoding": "identity"}) as response:
        response.raise_for_status()
        total = int(response.headers.get("Content-Length") or 0)
        done = 0
        with open(path, "wb") as file:
            while chunk := response.raw.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                _tell(done=done, total=total)
    if total and done != total:
        raise CommandError(f"the connection ended after {done} of {total} bytes")


def main() -> int:
    folder, kind, name, version, sha256 = sys.argv[1:]
    only = "--no-binary=:all:" if kind == "sdist" else "--only-binary=:all:"
    options = ["--quiet", "--no-input", "--retries=1", "--dest", folder, only]
    status: int = _Store("download", "store one file").main([*options, name, version, sha256])
    return status


if __name__ == "__main__":
    sys.exit(main())
