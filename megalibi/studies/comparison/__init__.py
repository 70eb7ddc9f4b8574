"""The paper's comparison of two models: what each needs, how fast it is, how good it is."""
