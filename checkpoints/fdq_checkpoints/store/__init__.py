"""The fdq checkpoint: manifest, Orbax, commit, restore."""
