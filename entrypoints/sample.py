"""`python -m entrypoints.sample`, which MLproject and DVC call."""

from dp_lora.commands.sample import main

if __name__ == "__main__":
    main()
