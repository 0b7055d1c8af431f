"""The HTTP edge: Tinker's wire and OpenAI's on one side, the coordinator on the other."""
