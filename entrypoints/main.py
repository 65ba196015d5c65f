"""`python -m entrypoints.main`, which MLproject and DVC call."""

from dp_lora.commands.main import main

if __name__ == "__main__":
    main()
