"""Side-by-side measurements: the same work for every contender, in one run, in turns. Importing it is cheap."""
