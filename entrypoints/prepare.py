"""`python -m entrypoints.prepare`, which MLproject and DVC call."""

from dp_lora.commands.prepare import main

if __name__ == "__main__":
    main()
