"""What a run does about everything that goes wrong: causes and budgets, hangs, the overseer of all attempts."""
