"""Who may come in, and how those are turned away who may not."""
