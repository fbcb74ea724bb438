"""Compress, fingerprint and count the words of every file of a folder, with a progress bar.

    python examples/folder_processing.py [FOLDER] [--pattern '*.txt'] [--workers 4]

Without a folder it takes a copy of the sources of Python's standard library. A file that cannot be read costs one line
of the report and nothing else.
"""

import argparse
import collections
import gzip
import hashlib
import os
import re
import shutil
import sysconfig
import tempfile
from pathlib import Path

from distpool import DistPool

WORD = re.compile(rb"[A-Za-z_]\w+")


def digest(path):
    """(path, bytes, compressed bytes, sha256, word counts) of one file; the OSError in place of all that, if any."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return path, error
    words = collections.Counter(WORD.findall(content.lower()))
    return path, len(content), len(gzip.compress(content)), hashlib.sha256(content).hexdigest(), words


def copy_of_the_library(folder, limit=400):
    """Real files to work on: Python's own, and one link that leads nowhere."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*/*.py"))
    for number, source in enumerate(sources[:limit]):
        shutil.copy(source, Path(folder, f"{number:03}_{source.name}"))
    Path(folder, "broken.py").symlink_to("nowhere")


def process(folder, pattern, workers):
    files = sorted(str(path) for path in Path(folder).rglob(pattern) if not path.is_dir())
    total, packed, words, unreadable, contents = 0, 0, collections.Counter(), [], collections.defaultdict(list)
    with DistPool(workers, progress=True) as pool:
        for path, *found in pool.imap_unordered(digest, files, chunksize=8):
            if len(found) == 1:
                unreadable.append(f"{path}: {found[0].strerror}")
                continue
            size, compressed, fingerprint, counts = found
            total, packed = total + size, packed + compressed
            words.update(counts)
            contents[fingerprint].append(path)
    print(f"{len(files)} files, {total:,} bytes, {packed:,} compressed")
    print(f"{sum(len(same) - 1 for same in contents.values())} are copies of another")
    print("most frequent words:", ", ".join(f"{word.decode()} {n}" for word, n in words.most_common(6)))
    for line in unreadable:
        print("not read:", line)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("folder", nargs="?")
    arguments.add_argument("--pattern", default="*.py")
    arguments.add_argument("--workers", type=int, default=os.cpu_count())
    options = arguments.parse_args()
    if options.folder:
        process(options.folder, options.pattern, options.workers)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy_of_the_library(folder)
        process(folder, options.pattern, options.workers)


if __name__ == "__main__":
    main()
