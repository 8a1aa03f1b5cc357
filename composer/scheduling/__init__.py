"""Who may run where, and when. Knows nothing of routers, strategies or what a call says."""
