"""`python -m entrypoints.fid`, which MLproject and DVC call."""

from dp_lora.commands.fid import main

if __name__ == "__main__":
    main()
