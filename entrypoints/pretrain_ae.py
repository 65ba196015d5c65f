"""`python -m entrypoints.pretrain_ae`, which MLproject and DVC call."""

from dp_lora.commands.pretrain_ae import main

if __name__ == "__main__":
    main()
