"""The HTTP edge: OpenAI's wire format in front of the service. Decides nothing about answers."""
