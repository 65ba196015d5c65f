"""`python -m entrypoints.pretrain_ldm`, which MLproject and DVC call."""

from dp_lora.commands.pretrain_ldm import main

if __name__ == "__main__":
    main()
