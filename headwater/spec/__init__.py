"""What a user says: modes, rules, schedules, initial values, lifetimes, layouts. Pure values, no I/O."""
