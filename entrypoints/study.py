"""`python -m entrypoints.study`, which MLproject calls."""

from dp_lora.commands.study import main

if __name__ == "__main__":
    main()
