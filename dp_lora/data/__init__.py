"""Sources of pictures, the one layout of every dataset, and its one reader."""
