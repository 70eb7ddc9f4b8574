"""What a rank does to save: which files it has, their copy in host memory, and writing them while training goes on."""
