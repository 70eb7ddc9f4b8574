"""What a run writes about itself: its steps, its validations, its memory and where it comes from."""
