"""Recipes: from a data set to a dense model, its sparse rows and their figures, one TOML file each."""
