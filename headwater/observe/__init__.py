"""What a person sees: the table of metrics and where it is shown, histories, traces."""
