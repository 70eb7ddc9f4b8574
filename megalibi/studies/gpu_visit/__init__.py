"""A visit to a GPU machine: every measurement that needs one, the most precious first."""
