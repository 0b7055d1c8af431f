"""The environments that the reward service knows, and how calls reach them."""
