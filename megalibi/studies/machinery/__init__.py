"""What every study needs: jobs in processes of their own, a machine's facts, trainings and scorings."""
