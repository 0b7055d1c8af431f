"""OpenAI's wire for sampling, so that agents and harnesses roll out against a policy in training.

`routes.routes` is the way in; nothing here knows Tinker's wire but by the ports of `ports`.
"""
