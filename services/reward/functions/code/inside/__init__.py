"""What runs in the sandbox: these files are copied there, and never imported by the service."""
