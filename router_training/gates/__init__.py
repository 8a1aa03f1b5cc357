"""Gates over adapters, trained offline. Every kind is a setting of one trainer."""
