"""What every study needs: it starts processes, shares a machine among them, trains models and scores checkpoints."""
