"""``megalibi convert ACTION IN OUT``: a checkpoint written anew, one module for each action."""
