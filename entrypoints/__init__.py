"""The commands as MLproject and DVC call them, at the project's root; they lie in dp_lora/commands."""
