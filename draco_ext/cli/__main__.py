"""The entry point of ``python -m draco_ext.cli``."""

from draco_ext.cli import main

if __name__ == "__main__":
    main()
