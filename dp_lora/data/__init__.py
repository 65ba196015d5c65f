"""Where pictures come from, the one layout that every dataset has, and its one reader."""
