"""`python -m entrypoints.count_params`, which MLproject and DVC call."""

from dp_lora.commands.count_params import main

if __name__ == "__main__":
    main()
