"""One endpoint in front of many expert LLMs. Imports nothing, so that any room can be used alone."""
