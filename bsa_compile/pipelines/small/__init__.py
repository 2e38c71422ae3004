"""The small text-to-video model that comes with the package: what it was trained on, and how its videos are judged."""
