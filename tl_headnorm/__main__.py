"""python -m tl_headnorm"""

import sys


def main() -> int:
    from tl_headnorm.cli import main as run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
