"""Count the words of many files: every worker counts its files, then sends each word to the worker that sums it.

    python examples/word_count.py [FOLDER] [--pattern "*.py"] [--workers 3]

The shuffle goes from worker to worker: `remotecall_fetch` works between any two processes, and the master sees no
word before the few that it prints. Without FOLDER, Python's own library is counted.
"""

import argparse
import collections
import pathlib
import re
import sysconfig
import zlib

from distpool import addprocs, everywhere, remotecall, remotecall_fetch, rmprocs

WORD = r"[A-Za-z_]{2,}"


def count(paths):
    """Words of these files."""
    words = collections.Counter()
    for path in paths:
        words.update(re.findall(WORD, pathlib.Path(path).read_text(encoding="utf-8", errors="replace")))
    return words


def accept(part):
    """Another worker's counts of words that are summed here; `everywhere` has defined TOTAL and its lock."""
    import __main__

    with __main__.LOCK:
        __main__.TOTAL.update(part)


def count_and_scatter(paths, pids):
    """On a worker: count, and give every worker the words that fall to it."""
    parts = {pid: collections.Counter() for pid in pids}
    for word, times in count(paths).items():
        parts[pids[zlib.crc32(word.encode()) % len(pids)]][word] = times  # hash() differs from process to process
    for pid, part in parts.items():
        remotecall_fetch(accept, pid, part)


def summary(limit):
    """On a worker, when all have scattered: its most frequent words, how many different ones, and how many in all."""
    import __main__

    return __main__.TOTAL.most_common(limit), len(__main__.TOTAL), __main__.TOTAL.total()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", default=pathlib.Path(sysconfig.get_path("stdlib"), "email"))
    parser.add_argument("--pattern", default="*.py")
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()
    paths = sorted(str(path) for path in pathlib.Path(options.folder).rglob(options.pattern) if path.is_file())

    pids = addprocs(options.workers)
    everywhere("import collections, threading; TOTAL = collections.Counter(); LOCK = threading.Lock()", pids)
    shares = {pid: paths[index :: len(pids)] for index, pid in enumerate(pids)}
    for call in [remotecall(count_and_scatter, pid, share, pids) for pid, share in shares.items()]:
        call.wait()
    best, different, total = zip(*(remotecall_fetch(summary, pid, 10) for pid in pids), strict=True)
    rmprocs(pids)

    top = sorted((pair for part in best for pair in part), key=lambda pair: (-pair[1], pair[0]))[:10]
    print(f"{len(paths)} files, {sum(total):,} words, {sum(different):,} different ones")
    print(", ".join(f"{word} {times}" for word, times in top))
    alone = count(paths)
    assert (sum(total), sum(different)) == (alone.total(), len(alone)) and all(alone[word] == n for word, n in top)
    print("checked: one process counts the same")


if __name__ == "__main__":
    main()
