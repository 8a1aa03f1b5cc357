"""One endpoint in front of many expert LLMs. Imports nothing: any room can be used alone."""
