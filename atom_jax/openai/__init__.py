"""OpenAI's API as JSON objects, without HTTP: what the server and the batch command have in common."""
