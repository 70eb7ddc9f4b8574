"""What a run will need before it runs: memory, communication and the roofline of a step."""
