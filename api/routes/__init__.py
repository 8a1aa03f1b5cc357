"""One file per resource. A route validates, asks the service, and shapes the reply."""
