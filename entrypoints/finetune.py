"""`python -m entrypoints.finetune`, which MLproject and DVC call."""

from dp_lora.commands.finetune import main

if __name__ == "__main__":
    main()
