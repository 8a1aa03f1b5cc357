"""How one answer is made of experts. Knows nothing of routers, engines or stores."""
