"""``python -m simtoreal`` is the ``simtoreal`` command."""

from simtoreal.cli import main

if __name__ == "__main__":
    main()
