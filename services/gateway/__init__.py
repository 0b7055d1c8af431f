"""The gateway: the wire of the Tinker SDK on one side, the coordinator on the other."""
