"""What runs in Ray Train's controller: one actor per driver, which starts attempts, ends them and counts why."""
