"""`python -m entrypoints.import_base`, which MLproject and DVC call."""

from dp_lora.commands.import_base import main

if __name__ == "__main__":
    main()
