"""TODO: what deepspeed is."""
