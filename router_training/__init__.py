"""Offline: labelled outcomes in, routers that the service can load out. Imports nothing itself."""
