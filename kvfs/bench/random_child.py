"""A process that reads pages of a file at random, when told.

Layer: L5. Run as a module; one line on stdin per turn.

    python -m kvfs.bench.random_child PATH READS SEED FLAGS

For each line it drops the pages that the page cache has of the file, says `ready`, waits for
another line, reads, and says `done`. It ends with its stdin.
"""

import mmap
import os
import sys

import numpy as np

from kvfs.units import PAGE


def main() -> None:
    """Read READS pages per turn, each place once."""
    path, reads, seed, flags = sys.argv[1], *map(int, sys.argv[2:5])
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    generator = np.random.default_rng(seed)
    pages = os.fstat(fd).st_size // PAGE
    buffer = [memoryview(mmap.mmap(-1, PAGE))]
    for _ in sys.stdin:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        places = (generator.permutation(pages)[:reads] * PAGE).tolist()
        print("ready", flush=True)
        sys.stdin.readline()
        for place in places:
            if os.preadv(fd, buffer, place) != PAGE:
                sys.exit("short read")
        print("done", flush=True)


if __name__ == "__main__":
    main()
