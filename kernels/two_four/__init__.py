"""The 2:4 form of sparse tensor cores: which patterns it carries, and how weights are packed for it."""
