"""`python -m entrypoints.audit`, which MLproject and DVC call."""

from dp_lora.commands.audit import main

if __name__ == "__main__":
    main()
