"""`python -m entrypoints.export`, which MLproject and DVC call."""

from dp_lora.commands.export import main

if __name__ == "__main__":
    main()
