"""`python -m entrypoints.resolve`, which DVC calls."""

from dp_lora.commands.resolve import main

if __name__ == "__main__":
    main()
