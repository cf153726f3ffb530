"""Discovery of the skippable blocks of a backbone, by running a copy of it."""
