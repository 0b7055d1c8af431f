"""Every public method of the Tinker SDK, called for real, and what came of it checked."""
