"""The log as decisions: who is a member, what each has outstanding, which entry comes next."""
