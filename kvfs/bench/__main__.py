"""`python -m kvfs.bench`: the same as `kvfs bench`.

Layer: L5.
"""

import argparse
import sys

from kvfs.bench.run import add_arguments, main
from kvfs.errors import KvfsError

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m kvfs.bench")
    add_arguments(parser)
    try:
        sys.exit(main(parser.parse_args()))
    except KvfsError as error:
        sys.stderr.write(f"bench: {error}\n")
        sys.exit(error.exit_code)
